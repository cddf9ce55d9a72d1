"""A list of runs: read and checked, run at once, skipped when done; and the files that start it on other machines."""

import json
import re
import subprocess
import sys

import pytest

from src import recipes, runs, sweep
from tests.test_notebooks import SMALL, copy_repository

TINY = {**SMALL, "training.max_steps": 2, "evaluation.rows": 4, "generation.max_new_tokens": 4}
LIST = [{"experiment": "demo", "overrides": TINY}, {"experiment": "demo", "overrides": {**TINY, "lora.r": 4}}]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two runs at once, started twice: its folder, and (exit code, what it said) of each start."""
    folder = tmp_path_factory.mktemp("swept")
    copy_repository(folder)
    (folder / "sweep.json").write_text(json.dumps(LIST), encoding="utf-8")
    command, said = [sys.executable, "-m", "src.sweep", "sweep.json", "2"], []
    for _ in range(2):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        said.append((done.returncode, done.stdout + done.stderr))
    return folder, said


def test_two_runs_at_once_are_both_whole(swept):
    folder, [(code, said), _] = swept
    assert code == 0 and said.endswith("all runs are done\n"), said
    found = {}
    for number in (1, 2):
        own = [line for line in said.splitlines() if line.startswith(f"[{number} demo] ")]
        name = re.search(r"== run (\S+)", "\n".join(own))[1]
        manifest = json.loads((folder / "outputs" / name / "manifest.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "outputs" / name / "config.json").read_text(encoding="utf-8"))
        assert manifest["steps"] == 2 and (folder / "outputs" / name / "notebooks" / "04_compare.ipynb").is_file()
        found[config["recipe"]["lora"]["r"]] = name
        assert sum("step 2/2: loss" in line for line in own) == 1  # its own log lines, not the other's too
    assert len(found) == 2 and 4 in found


def test_a_sweep_skips_what_is_done(swept):
    folder, [_, (code, said)] = swept
    assert code == 0 and said.count("done: demo-") == 2 and "==" not in said


def test_the_same_recipe_with_other_overrides_is_not_done(swept, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", swept[0])
    assert sweep.done("demo", TINY) != sweep.done("demo", {**TINY, "lora.r": 4}) is not None
    assert sweep.done("demo", {**TINY, "lora.r": 8}) is None and sweep.done("custom", TINY) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read as JSON"),
        ("{}", "holds no list of runs"),
        ('[{"recipe": "demo"}]', "run 1: found {'recipe': 'demo'}, expected a list such as"),
        ('[{"experiment": "demo"}, {"experiment": "demi"}]', "run 2: Unknown recipe 'demi'"),
        ('[{"experiment": "demo", "overrides": {"lora.rank": 8}}]', "run 1: Unknown override 'lora.rank'"),
    ],
)
def test_a_list_is_refused_before_anything_runs(tmp_path, capsys, text, message):
    (tmp_path / "sweep.json").write_text(text, encoding="utf-8")
    assert sweep.main([str(tmp_path / "sweep.json")]) == 1
    assert message in capsys.readouterr().err


def test_jobs_get_a_gpu_each_and_a_failed_one_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "sweep.json").write_text(json.dumps([{"experiment": "demo"}] * 4), encoding="utf-8")
    given = []
    monkeypatch.setattr(sweep, "done", lambda *entry: None)
    monkeypatch.setattr(sweep, "prepare", lambda listed: given.append(len(listed)))
    monkeypatch.setattr(sweep, "start", lambda number, name, overrides, gpu: given.append(gpu) or number == 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert sweep.main([str(tmp_path / "sweep.json"), "2"]) == 1
    assert given[0] == 4 and set(given[1:]) <= {"4", "7"} and len(given) == 5
    assert "failed: 3; the same command tries again" in capsys.readouterr().out
    given.clear()
    sweep.sweep(tmp_path / "sweep.json")
    assert given == [None] * 4  # one after the other, each prepares its own rows


def test_runs_at_once_on_different_files_are_refused(monkeypatch):
    listed = [("custom", {"data.train_file": f"{name}.csv"}) for name in "ab"]
    with pytest.raises(recipes.RecipeError, match="different files of the dataset 'custom'"):
        sweep.prepare(listed)


@pytest.mark.parametrize("words", [[], ["a.json", "none"], ["a.json", "0"], ["a.json", "2", "3"], [""]])
def test_a_wrong_call_says_how(words, capsys):
    assert sweep.main(words) == 2 and "JOBS" in capsys.readouterr().err
