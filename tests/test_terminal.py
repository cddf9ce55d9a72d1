"""What `make run` and `make lab` say and keep: log lines, warnings, a stop by Ctrl-C, copies of notebooks."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from src import data, lab, runs, terminal
from tests.test_notebooks import SMALL, copy_repository


def test_a_log_row_says_step_loss_rate_and_the_time_left():
    row = {"step": 5, "loss": 0.5, "epoch": 0.5, "seconds": 30.0, "tokens_per_second": 1234}
    # half of one epoch took 30 s: the other half takes as long, and there are 10 steps
    assert terminal.line(row, 1.0, -1) == "  step 5/10: loss 0.5000, 1,234 tokens/s, 30 s of training left"
    # a fifth of 25 steps: four times 30 s are left
    assert terminal.line(row, 1.0, 25) == "  step 5/25: loss 0.5000, 1,234 tokens/s, 2.0 min of training left"
    assert terminal.line({"step": 5, "eval_loss": 0.25}, 1.0, -1) == "  step 5: validation loss 0.2500"


def test_references_over_the_cap_are_counted_and_the_cap_that_fits_is_named(capsys):
    rows = {"train": {"prompt_ids": [[1], [1, 2]], "labels": [[-100, 7, 8, 9], [-100, -100, 7]]}}  # 3 and 1 tokens
    data.warn_of_lengths(rows, 3)
    assert capsys.readouterr().err == ""
    data.warn_of_lengths(rows, 2)
    said = capsys.readouterr().err
    assert "1 of 2 train references" in said and '{"generation.max_new_tokens": 3}' in said


def test_rows_beyond_the_positions_of_the_base_are_told_with_the_limit_that_keeps_to_them(capsys):
    rows = {"train": {"prompt_ids": [[1], [1, 2]], "labels": [[-100, 7], [-100, -100, 7]]}}  # prompts of 1 and 2 tokens
    data.warn_of_lengths(rows, 3, 5)
    assert capsys.readouterr().err == ""
    data.warn_of_lengths(rows, 3, 4)
    said = capsys.readouterr().err
    assert "prompt of 2 tokens" in said and '{"prompt.max_tokens": 1}' in said


def test_lab_copies_follow_the_repository_until_they_are_edited(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "notebooks").mkdir()
    first, second = (tmp_path / "notebooks" / f"{n}.ipynb" for n in (1, 2))
    first.write_text("a"), second.write_text("b")
    lab.copy()
    (tmp_path / "lab" / "1.ipynb").write_text("mine")
    first.write_text("a2"), second.write_text("b2")
    assert "lab/1.ipynb was edited" in lab.copy()[0]
    assert (tmp_path / "lab" / "1.ipynb").read_text() == "mine"
    assert (tmp_path / "lab" / "2.ipynb").read_text() == "b2"  # untouched: it follows


def test_a_wrong_name_is_refused_in_a_second():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "src.run", "samsun"], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Did you mean" in done.stderr
    assert time.perf_counter() - start < 3  # 0.5 s when nothing else runs; importing papermill alone takes longer
    program = "import sys; from src import run; run.main(['samsun']); sys.exit('papermill' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=runs.ROOT, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A chain that is sent Ctrl-C after its first checkpoint: folder, command, what it said, its exit status."""
    folder = tmp_path_factory.mktemp("stopped")
    copy_repository(folder)
    overrides = {**SMALL, "training.max_steps": 400, "generation.max_new_tokens": 4, "training.sample_rows": 0}
    command = [sys.executable, "-m", "src.run", "demo", json.dumps(overrides)]
    said, warned, pause = folder / "said.txt", folder / "warned.txt", time.time() + 240
    with said.open("w") as out, warned.open("w") as err:
        running = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=err, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
        )  # fmt: skip
        try:
            while "  step 8/400: loss " not in said.read_text() and running.poll() is None and time.time() < pause:
                time.sleep(0.2)
            running.send_signal(signal.SIGINT)
            running.wait(timeout=60)
        finally:
            running.kill()
    out, err = said.read_text(), warned.read_text()
    return folder, out, err, running.returncode


def test_rows_cuts_and_the_plan_are_said_before_training_then_a_line_a_step(stopped):
    _, out, err, _ = stopped
    said = [out.index(w) for w in ("== 01", "usable rows", "prompts cut", "== 02", "Plan(", "  step 8/400: loss ")]
    assert said == sorted(said)
    assert "tokens/s" in out and "validation loss" in out
    assert "references are longer than generation.max_new_tokens = 4" in err


def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on_and_leaves_no_kernel(stopped):
    folder, _, err, status = stopped
    assert status == 130 and "Traceback" not in err, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("Stopped. The same command goes on from step ")
    kernels = [pid for pid in os.listdir("/proc") if pid.isdigit() and _works_in(pid, folder)]
    assert not kernels


def _works_in(pid: str, folder) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/cwd").startswith(str(folder))
    except OSError:
        return False
