"""Real SIGKILLs of 01 and 02 by benchmarks/kills.py, a few of its moments; and what a kill leaves beside a file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import kills
from src import runs

ROOT = Path(__file__).resolve().parents[1]


def test_after_a_kill_the_same_command_ends_as_if_nothing_had_happened(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/kills.py", "--kills", "3", "--seed", "0", "--out", str(out)]
    done = subprocess.run(
        [*command, "01", "02 saving"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text(encoding="utf-8"))["kills"]
    assert found["failures"] == [] and found["handled"] == found["tried"] >= 3
    assert found["by"]["02"][0] >= 1 and sum(tried for tried, _ in found["by"].values()) == found["tried"]


@pytest.fixture
def alike(tmp_path):
    """Two repositories with the same files of a run."""
    for root in ("one", "two"):
        runs.write_json(tmp_path / root / "outputs" / "demo-1" / "manifest.json", {"steps": 4, "train_seconds": root})
        runs.write_jsonl(
            tmp_path / root / "outputs" / "demo-1" / "train_log.jsonl", [{"loss": 0.5, "eval_runtime": root}]
        )
        (tmp_path / root / "outputs" / "demo-1" / "adapter_model.safetensors").write_bytes(b"\x00\x01")
    return tmp_path / "one", tmp_path / "two"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", '{"steps": 5, "train_seconds": 1}'), ("manifest.json", '{"steps": 4'),
        ("train_log.jsonl", '{"loss": 0.25}\n'), ("adapter_model.safetensors", "\x00\x02"), (".lock.json", "{}"),
        ("adapter.damaged-1/a", ""), (".manifest.json.12.tmp", ""), ("checkpoints/checkpoint-4/a", ""),
    ],
)  # fmt: skip
def test_the_comparison_sees_other_values_and_leftovers_and_no_times(alike, name, content):
    one, two = alike
    assert kills.differences(one, two) == []
    path = one / "outputs" / "demo-1" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    assert kills.differences(one, two)


def test_the_next_write_of_a_file_removes_what_killed_processes_left_of_it(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {number: tmp_path / f".a.json.{number}.tmp" for number in (gone.pid, os.getppid(), "x")}
    other = tmp_path / f".b.json.{gone.pid}.tmp"
    for path in (*names.values(), other):
        path.write_text("{", encoding="utf-8")
    runs.write_json(tmp_path / "a.json", {"x": 1})
    assert not names.pop(gone.pid).exists()
    assert all(path.exists() for path in (*names.values(), other)) and len(list(tmp_path.iterdir())) == 4


def test_older_checkpoints_go_only_after_the_new_one_is_whole(tmp_path, monkeypatch):
    """Else a kill between the two leaves nothing to go on from."""
    import transformers

    from src.runs import checkpoints

    callbacks, kept = [], []
    args = SimpleNamespace(output_dir=str(tmp_path), save_total_limit=2)
    checkpoints.seal(SimpleNamespace(args=args, add_callback=callbacks.append))
    assert args.save_total_limit is None  # transformers itself deletes nothing
    rmtree = transformers.trainer_utils.shutil.rmtree

    def remove(path, **said):
        kept.append({folder.name for folder in tmp_path.iterdir() if (folder / checkpoints.SEAL).is_file()})
        rmtree(path, **said)

    monkeypatch.setattr(transformers.trainer_utils.shutil, "rmtree", remove)
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
        best = str(tmp_path / "checkpoint-1")
        state = SimpleNamespace(global_step=step, is_world_process_zero=True, best_model_checkpoint=best)
        callbacks[0].on_save(args, state, None)
    assert kept == [{"checkpoint-1", "checkpoint-2", "checkpoint-3"}]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
