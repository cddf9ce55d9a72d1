"""Several processes train and answer one run: real ones, started by torchrun, over gloo on the CPU."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import GenerationConfig

from src import data, engine, gpus, prompts, qlora, recipes, reuse, runs
from src import run as run_chain
from src.engine import batches
from tests.cells import cell, demo_rows
from tests.test_runs import opened

ROOT = runs.ROOT
STEPS = 24
OVERRIDES = {  # nine rows, four a step: the third step of an epoch has one row, so one of two processes has none
    "base_model": "models/tiny", "device": "cpu", "data.train_rows": 9, "training.max_steps": STEPS,
    "training.eval_steps": 2, "training.per_device_train_batch_size": 4, "training.sample_rows": 3,
    "training.learning_rate": 1e-3, "training.keep_checkpoints": True, "generation.max_new_tokens": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory, tiny_model):
    """A repository with src, the tiny model and the demo's first rows, prepared as 01 does it."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_model, root / "models" / "tiny")
    demo_rows(root, {"train": 12, "validation": 5, "test": 7})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "ROOT", root)
        patch.chdir(root)
        patch.setattr(engine.planning, "matmul_rate", lambda device, dtype: 1e11)
        data.prepare(recipes.load("demo"))
        yield root


@pytest.fixture(scope="module")
def alone(repository):
    """The run as one process trains it, in a folder aside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gpus._train("demo", OVERRIDES)
    torch.set_num_threads(threads)
    return shutil.copytree(runs.find("demo").folder, repository / "alone")


@pytest.fixture(scope="module")
def killed(repository, alone):
    """(the run as two processes left it when one of them was killed, the error that told so)."""
    run = runs.find("demo")
    for part in ("checkpoints", "adapter"):
        shutil.rmtree(run.folder / part)
    (run.folder / "manifest.json").unlink()
    (run.folder / "train_log.jsonl").unlink()
    killer = threading.Thread(target=kill_second, args=(run.checkpoints / "checkpoint-4" / "trainer_state.json",))
    killer.start()
    with pytest.raises(runs.RunError) as error:
        gpus.train(run, 2)
    killer.join()
    return run, str(error.value), shutil.copytree(run.folder, repository / "killed")


def kill_second(checkpoint: Path, seconds: float = 120):
    """Kill the second process of a training as soon as the checkpoint is there."""
    until = time.monotonic() + seconds
    while not checkpoint.is_file() and time.monotonic() < until:
        time.sleep(0.005)
    kill_process("1", runs.ROOT)


def kill_process(rank: str, folder: Path):
    """Kill the process of that RANK among those that train in a folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            ours = os.path.samefile(process / "cwd", folder)
        except OSError:
            continue
        if ours and b"src.gpus" in words and f"RANK={rank}".encode() in variables:
            os.kill(int(process.name), signal.SIGKILL)


def logged(folder: Path, what: str) -> dict[int, float]:
    rows = map(json.loads, (folder / "train_log.jsonl").read_text("utf-8").splitlines())
    return {row["step"]: row[what] for row in rows if what in row}


def assert_same_run(found: Path, expected: Path):
    for what in ("loss", "eval_loss", "grad_norm", "tokens", "sample"):
        exact = what in ("tokens", "sample")
        wanted = logged(expected, what)
        assert logged(found, what) == (wanted if exact else pytest.approx(wanted, rel=1e-3))
        assert len(wanted) == (STEPS if what in ("loss", "grad_norm", "tokens") else STEPS // 2)
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (found, expected)]
    assert_close(*weights, rtol=1e-2, atol=1e-4)


def test_a_killed_process_ends_the_job_and_says_how_to_go_on(killed):
    run, message, folder = killed
    assert f"train {run.name}: process 1 was killed by signal 9" in message and "goes on from there" in message
    assert not run.finished and (folder / "train_log.jsonl").is_file()


def test_the_notebook_goes_on_after_a_kill_and_ends_as_one_process_that_was_never_stopped(killed, alone, capfd):
    run, _, _ = killed
    started = max(int(path.name.rpartition("-")[2]) for path in run.checkpoints.glob("checkpoint-*"))
    assert 0 < started < STEPS
    space = opened(OVERRIDES) | {"NUM_GPUS": 2}
    assert space["run"] == run
    exec(cell("02_train_qlora", "trainer.train("), space)
    assert_same_run(run.folder, alone)
    trained = get_peft_model_state_dict(space["model"])
    assert_close(
        trained, load_file(run.adapter / "adapter_model.safetensors"), rtol=0, atol=0
    )  # as after training here
    assert run.manifest["processes"] == 2 and run.manifest["plan"]["ranks"] == 2
    said = capfd.readouterr().out
    assert said.count(f"step {STEPS}/{STEPS}: loss") == 1  # one process speaks
    assert f"run {run.name}" in said


def test_the_run_goes_on_with_another_number_of_processes(killed, alone):
    run, _, folder = killed
    shutil.rmtree(run.folder)
    shutil.copytree(folder, run.folder)
    gpus._train(run.name, {})
    assert run.finished and run.manifest["processes"] == 1
    assert_same_run(run.folder, alone)


def test_the_notebook_gets_the_answers_of_one_process_from_two(repository, alone):
    run = runs.find("demo")
    recipe = run.recipe({"generation.do_sample": True, "generation.temperature": 0.7})
    tokenizer = qlora.load_tokenizer(recipe)
    records = data.load(recipe)
    rows = prompts.build_all(records["evaluation"], tokenizer, recipe.prompt, records["train"])
    space = {"recipe": recipe, "run": run, "rows": rows, "runs": runs, "GenerationConfig": GenerationConfig}
    space |= {"REDO": False, "NUM_GPUS": 2, "gpus": gpus}
    exec(cell("03_evaluate", "= GenerationConfig("), space)
    evaluation, generation = space["evaluation"], space["generation"]
    model = qlora.load_finetuned(run, recipe, tokenizer)
    engine.dequantize(model)
    expected = engine.generate(model, tokenizer, rows, generation, recipe.seed, progress=False)
    first = dict(list(enumerate(expected))[:2])
    evaluation.keep("finetuned").add(first)  # answered by one process before
    exec(cell("03_evaluate", "evaluation.answered"), space)
    assert space["model"] is None
    assert len(list(evaluation.folder.glob(".answers-*.json"))) == 4  # a file a process and system
    found = evaluation.keep("finetuned").found
    assert [found[n] for n in range(7)] == expected and evaluation.answered
    predictions = evaluation.save_predictions(records["evaluation"])
    assert [row["prediction"] for row in predictions["finetuned"]] == [row["prediction"] for row in expected]
    evaluation.save_metrics({})
    assert not list(evaluation.folder.glob(".answers-*"))


def test_a_run_that_its_recipe_does_not_make_is_refused(repository, alone, capsys):
    run = runs.find("demo")
    other = shutil.copytree(run.folder, run.folder.with_name("demo-00000000"))
    try:
        assert gpus.main(["train", other.name]) == 1
    finally:
        shutil.rmtree(other)
    said = capsys.readouterr().err
    assert f"This trainer makes {run.name}, not demo-00000000" in said and "NUM_GPUS = 1" in said


@pytest.mark.parametrize(("rows", "passes", "packed"), [(9, 1, True), (9, 2, False), (16, 2, True), (17, 3, True)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_every_step_evenly_and_lose_no_row(rows, passes, packed, ranks):
    lengths = [10 + 7 * n % 13 for n in range(rows)]
    sampler = [batches.StepSampler(lengths, 8, passes, 5, packed, rank, ranks) for rank in range(ranks)]
    shares = [list(own) for own in sampler]
    assert [len(own) for own in sampler] == [len(share) for share in shares] == [len(shares[0])] * ranks
    for number, step in enumerate(batches.steps(rows, 8, 5, 0)):
        parts = [part for share in shares for part in share[number * passes : (number + 1) * passes]]
        assert sorted(i for part in parts for i in part) == sorted(step)
    sums = [sum(lengths[i] for part in share[:passes] for i in part) for share in shares]
    assert max(sums) - min(sums) <= (max(lengths) if packed else 3 * max(lengths))


def test_tokens_are_counted_over_epochs():
    lengths = [1, 10, 100, 1000, 10000]
    first, second, third = batches.steps(5, 2, 7, 1)
    assert batches.tokens_until(4, lengths, 2, 7) == 11111 + sum(lengths[i] for i in first)
    assert batches.tokens_until(6, lengths, 2, 7) == 22222 and len(third) == 1


def test_make_run_gives_the_number_of_gpus_to_training_and_answering(monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(
        run_chain, "_execute", lambda notebook, folder, parameters: given.update({notebook: parameters})
    )
    monkeypatch.setattr("src.reuse.find", lambda recipe: None)
    monkeypatch.setattr("src.reuse.inputs", lambda recipe: {})
    monkeypatch.setattr(run_chain, "_opened", lambda notebook: runs.Run("demo-00000000"))
    monkeypatch.setattr(reuse, "inputs", lambda recipe: {})  # nothing is prepared here
    monkeypatch.setattr(runs, "find_evaluation", lambda run: (_ for _ in ()).throw(runs.RunError("so far")))
    assert run_chain.main(["demo", "{}", "2"]) == 1 and "so far" in capsys.readouterr().err
    assert {name: values.get("NUM_GPUS") for name, values in given.items()} == {
        "01_prepare_data": None, "02_train_qlora": 2, "03_evaluate": 2,
    }  # fmt: skip
    assert run_chain.main(["demo", "{}", "two"]) == run_chain.main(["demo", "{}", "0"]) == 2


def test_torchrun_reports_who_ended_first():
    report = "Root Cause (first observed failure):\n[0]:\n  rank      : 3 (local_rank: 1)\n  exitcode  : 1 (pid: 7)\n"
    assert gpus._first([report]) == "process 3 ended with code 1 (see above)"
    assert gpus._first(["x\n", "process 1 of 2: data.train_file is gone.\n", report]).endswith("train_file is gone")
    assert gpus._first(["nothing"]) == "one ended early (see above)"


def test_more_processes_than_gpus_is_told(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(qlora.ModelError, match="device is 'cuda:3', and this machine shows torch 2"):
        qlora.resolve_device("auto")


def test_a_process_ends_with_the_notebook_that_started_it():
    program = "import time; from src import gpus; gpus._end_with_parent(); time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {gpus.ENDS: "1"}, stdin=subprocess.PIPE
    )
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    child.stdin.close()  # what the end of its parent does
    assert child.wait(30) == 1


def test_on_two_machines_the_end_of_a_process_ends_the_job_and_each_says_so(repository, alone):
    """torchrun, started once a machine, as cloud/README.md says; both are this one, over gloo."""
    folder = shutil.copytree(repository, repository.with_name("machines"), dirs_exist_ok=True)
    shutil.rmtree(folder / "outputs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    words = ["--module", "src.gpus", "train", "demo", json.dumps(OVERRIDES | {"training.max_steps": 4000})]
    machines = [
        subprocess.Popen(
            [*command, "--node-rank", rank, *words], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    until = time.monotonic() + 120
    while not list(folder.glob("outputs/demo-*/checkpoints/checkpoint-4/trainer_state.json")):
        assert all(machine.poll() is None for machine in machines) and time.monotonic() < until
        time.sleep(0.02)
    kill_process("1", folder)
    said = [machine.communicate(timeout=90)[1] for machine in machines]
    assert all(machine.returncode not in (0, None) for machine in machines)
    assert "process 0 of 2 cannot go on" in said[0] and "goes on from the last checkpoint" in said[0]
    assert "-9" in said[1]
