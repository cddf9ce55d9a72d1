"""Notebooks: committed as run, and the whole chain on the real published files with few rows and steps."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src import recipes, reuse, runs
from tests.test_data import needs_mts, needs_samsum

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def test_there_are_notebooks_to_check():
    assert [p.stem for p in NOTEBOOKS][:4] == [
        "01_prepare_data",
        "02_train_qlora",
        "03_evaluate",
        "04_compare",
    ]
    assert NOTEBOOKS[-1].stem == "06_use_it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_as_run(path):
    cells = [c for c in load(path)["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c["outputs"]]
    assert outputs and not any(o["output_type"] == "error" for o in outputs)
    assert not any("widget" in kind for o in outputs for kind in o.get("data", {}))
    assert not any("\r" in "".join(o.get("text", "")) for o in outputs)  # of a progress bar, its last state alone
    assert all(source(c).strip() for c in cells) and max(len(source(c).splitlines()) for c in cells) <= 25


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_keeps_the_house_rules(path):
    cells = load(path)["cells"]
    code = "\n".join(source(c) for c in cells if c["cell_type"] == "code")
    assert not re.search(r"^\s*(def|class) ", code, re.M)
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    first = [source(c) for c in cells if c["cell_type"] == "code"][0]
    assert first == source(next(c for c in load(NOTEBOOKS[0])["cells"] if c["cell_type"] == "code"))


def code_of(name):
    cells = load(ROOT / "notebooks" / f"{name}.ipynb")["cells"]
    return "\n".join(source(c) for c in cells if c["cell_type"] == "code")


def test_the_experiment_stands_in_the_notebooks():
    for words in ("BitsAndBytesConfig(", "from_pretrained(", "LoraConfig(", "get_peft_model(", "TrainingArguments("):
        assert words in code_of("02_train_qlora"), words
    for words in ("print_trainable_parameters()", "FastTrainer(", "trainer.train("):
        assert words in code_of("02_train_qlora"), words
    for words in ("GenerationConfig(", "disable_adapter()", "engine.generate("):
        assert words in code_of("03_evaluate"), words


def test_notebook_04_needs_no_torch():
    lines = [line for line in code_of("04_compare").splitlines() if re.match("(from|import) ", line)]
    program = "\n".join([*lines, "assert not {'torch', 'transformers'} & set(sys.modules)"])
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)
    assert any("analysis" in line for line in lines)


def copy_repository(folder, raw=None):
    """A copy of what the chain needs, without git; raw data linked."""
    for name in ("src", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data" / "raw").mkdir(parents=True)
    (folder / "data" / "demo").symlink_to(ROOT / "data" / "demo")
    for name in ("sources.toml", "models.toml", "published_scores.csv"):
        shutil.copy(ROOT / "data" / name, folder / "data" / name)
    if raw:
        (folder / "data" / "raw" / raw).symlink_to(ROOT / "data" / "raw" / raw)


def chain(folder, recipe, overrides):
    """Run the chain in the copy; return the run's folder, its evaluation's folder and what was printed."""
    command = [sys.executable, "-m", "src.run", recipe, json.dumps(overrides)]
    environment = {**os.environ, "HF_TOKEN": TOKEN}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    tells_nothing_of_this_machine(folder, done.stdout + done.stderr)
    run = folder / "outputs" / re.search(r"== run (\S+)", done.stdout)[1]
    evaluations = sorted((run / "evaluations").iterdir(), key=lambda path: path.stat().st_mtime)
    return run, evaluations[-1], done.stdout


TOKEN = "hf_PlantedTokenThatMustNotBeWritten"


def tells_nothing_of_this_machine(folder, said):
    """No file that a run leaves, its executed notebooks included, holds the token or a path of this machine."""
    seen = 0
    for path in [path for part in ("outputs", "data/processed") for path in (folder / part).rglob("*")]:
        if path.is_file():
            content, seen = path.read_bytes(), seen + 1
            for secret in (TOKEN, str(folder), str(ROOT), f"{Path.home()}/", sys.prefix):
                assert secret.encode() not in content, (path.relative_to(folder), secret)
    assert seen > 30 and TOKEN not in said


SMALL = {
    "base_model": "data/demo/base",
    "device": "cpu",
    "data.train_rows": 24,
    "data.validation_rows": 6,
    "evaluation.rows": 12,
    "prompt.max_tokens": 256,
    "training.max_steps": 4,
    "training.warmup_steps": 0,
    "training.per_device_train_batch_size": 6,
    "training.gradient_accumulation_steps": 1,
    "training.eval_steps": 2,
    "generation.max_new_tokens": 16,
}


def check_run(run, evaluation, stdout, rows):
    for name in (
        "config.json manifest.json train_log.jsonl adapter/adapter_model.safetensors adapter/prompt_template.json "
        "adapter/README.md notebooks/04_compare.ipynb"
    ).split():
        assert (run / name).is_file(), name
    for name in (
        "evaluation.json metrics.json predictions/base.jsonl predictions/finetuned.jsonl comparison/side_by_side.html "
        "comparison/scores.csv"
    ).split():
        assert (evaluation / name).is_file(), name
    metrics = load(evaluation / "metrics.json")
    assert metrics["n"] == rows and metrics["systems"]["finetuned"]["all"]["ROUGE-1"]["value"] >= 0
    assert not (run / "checkpoints").exists() and f"outputs/{run.name}" in stdout
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["step"] for r in log if "eval_loss" in r] == [2, 4]
    shown = min(3, load(run / "manifest.json")["rows"]["validation"])  # rows of validation, at both evaluations
    assert sum("sample" in r for r in log) == 2 * shown


@needs_mts
def test_the_chain_runs_on_the_real_mts_dialog_and_scores_another_split_without_training(tmp_path):
    copy_repository(tmp_path, "mts-dialog")
    run, evaluation, stdout = chain(tmp_path, "mts_dialog", SMALL)
    check_run(run, evaluation, stdout, 12)
    report = load(tmp_path / "data" / "processed" / "mts_dialog" / "report.json")
    assert report["rows"] == {"train": 1201, "validation": 100, "test1": 200, "test2": 200}
    trained = (run / "manifest.json").read_bytes()
    other = {"evaluation.split": "test2", "generation.num_beams": 2}
    again, second, _ = chain(tmp_path, "mts_dialog", SMALL | other)
    assert again == run and (run / "manifest.json").read_bytes() == trained  # nothing was trained again
    assert second != evaluation and load(second / "metrics.json")["split"] == "test2"
    assert load(evaluation / "metrics.json")["split"] == "test1"


@needs_samsum
def test_the_chain_runs_on_the_real_samsum(tmp_path):
    copy_repository(tmp_path, "samsum")
    # the base has no chat template, so the instruct prompt becomes a plain one here
    run, evaluation, stdout = chain(tmp_path, "samsum", {**SMALL, "prompt.style": "plain"})
    check_run(run, evaluation, stdout, 12)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A chain on a file of one's own: the copy of the repository, its overrides, and what `chain` returned."""
    folder = tmp_path_factory.mktemp("own")
    copy_repository(folder)
    rows = [{"dialogue": f"Ann: lunch at {n}?\nBob: fine", "summary": f"They meet at {n}."} for n in range(40)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    overrides = {**SMALL, "prompt.style": "plain", "data.train_file": "mine.jsonl", "evaluation.rows": 4}
    return folder, overrides, *chain(folder, "custom", overrides)


def test_the_chain_runs_on_a_file_of_ones_own(own):
    _, _, run, evaluation, stdout = own
    check_run(run, evaluation, stdout, 4)
    assert "too few to compare" in stdout
    answers = [json.loads(line) for line in (evaluation / "predictions" / "finetuned.jsonl").open(encoding="utf-8")]
    for row in answers[:2]:
        assert follow_the_card(run / "adapter", row["section"], row["dialogue"]) == row["prediction"]


def test_the_same_command_again_reuses_what_is_there_and_says_which(own):
    folder, overrides, run, evaluation, _ = own
    kept = [run / "notebooks" / name for name in (*(f"{n}.ipynb" for n in reuse.NOTEBOOKS), reuse.RECORD)]
    kept.append(evaluation / "metrics.json")
    before, page = [path.read_bytes() for path in kept], evaluation / "comparison" / "side_by_side.html"
    page.unlink()
    sheet = (run / "notebooks" / "04_compare.ipynb").stat().st_mtime_ns
    command = [sys.executable, "-m", "src.run", "custom", json.dumps(overrides)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("== ")] == [
        "== 01, 02, 03 are not run again: nothing that they read has changed.",
        f"== reused: run {run.name} and its evaluation {evaluation.name}",
        "== 04_compare",
    ]
    assert page.is_file() and (run / "notebooks" / "04_compare.ipynb").stat().st_mtime_ns > sheet
    assert [path.read_bytes() for path in kept] == before


ADDED = "\n# a comment\n"
CHANGES = {  # what is changed in the copy: (file, what becomes of its bytes, or None to delete it, what is said)
    "own file": ("mine.jsonl", lambda b: b + b'\n{"dialogue": "A: so?", "summary": "So."}', "rows or base"),
    "prepared rows": ("data/processed/custom/test.jsonl", None, "rows or base"),
    "code": ("src/scoring.py", lambda b: b + ADDED.encode(), "code changed"),
    "a recipe's file": ("src/recipes/demo.toml", lambda b: b + ADDED.encode(), "code changed"),
    "a notebook": ("notebooks/03_evaluate.ipynb", lambda b: b.replace(b"REDO = False", b"REDO = True "), "notebooks"),
    "predictions": ("RUN/EVALUATION/predictions/base.jsonl", lambda b: b + b"\n", "was set aside"),
    "adapter": ("RUN/adapter/adapter_model.safetensors", lambda b: b[:-1], "was set aside"),
    "an executed notebook": ("RUN/notebooks/03_evaluate.ipynb", None, ""),
    "record": ("RUN/notebooks/inputs.json", lambda b: b.replace(b"transformers", b"transformer5"), "its seal"),
    "nothing": ("README.md", lambda _: b"", None),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changed_is_run_again(own, tmp_path, what):
    _, overrides, run, evaluation, _ = own
    path, change, said = CHANGES[what]
    shutil.copytree(own[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    path = tmp_path / path.replace("RUN", f"outputs/{run.name}").replace("EVALUATION", f"evaluations/{evaluation.name}")
    before = path.read_bytes() if path.is_file() else b""
    path.write_bytes(change(before)) if change else path.unlink()
    program = f"from src import recipes, reuse\nprint(reuse.find(recipes.load('custom', {overrides!r})))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    if said is None:
        assert done.stdout.strip() == f"Evaluation(run=Run(name='{run.name}'), name='{evaluation.name}')"
    else:
        assert done.stdout.endswith("None\n") and said in done.stdout


def test_other_settings_versions_or_weights_are_run_again(own, monkeypatch, capsys):
    folder, overrides, run, _, _ = own
    monkeypatch.setattr(runs, "ROOT", folder)
    monkeypatch.setattr(reuse.identity, "code", lambda *_: load(run / "notebooks" / "inputs.json")["code"])
    same = recipes.load("custom", overrides)
    assert reuse.find(same).run.name == run.name
    for other in ({"lora.r": 3}, {"generation.max_new_tokens": 15}, {"seed": 1}, {"evaluation.rows": 3}):
        assert reuse.find(recipes.load("custom", overrides | other)) is None, other
    assert capsys.readouterr().out == ""
    with monkeypatch.context() as other:
        other.setattr(reuse.measured, "versions", lambda _: {"torch": "0.1"})
        assert reuse.find(same) is None
    assert "versions changed" in capsys.readouterr().out
    monkeypatch.setattr(reuse.identity, "base", lambda *_: {"model.safetensors": "0"})
    assert reuse.find(same) is None
    assert "base model changed" in capsys.readouterr().out


def follow_the_card(adapter, section, dialogue):
    """What the model card's own snippet prints for a dialogue, run in a fresh process in the adapter's folder."""
    snippet = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(encoding="utf-8"), re.S)[1]
    snippet, dialogues = re.subn(r"^dialogue = .*$", lambda _: f"dialogue = {dialogue!r}", snippet, flags=re.M)
    snippet, sections = re.subn('"{section}", ".*?"', lambda _: f'"{{section}}", {section!r}', snippet)
    assert dialogues == sections == 1
    if "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("bitsandbytes computes in 16 bits on this CPU, unless qlora.prepare stops it")
    command = [sys.executable, "-W", "ignore", "-c", snippet]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=adapter, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["samsun"], "Unknown recipe 'samsun'"),
        (["demo", '{"lora.rank": 8}'], "Did you mean 'lora.r'"),
        (["demo", "{"], "OVERRIDES is not JSON"),
        (["demo", "[1]"], "expected a dictionary"),
        (["demo", '{"device": "cuda:7"}'], "device is 'cuda:7'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_paragraph(tmp_path, arguments, message):
    copy_repository(tmp_path)
    command = [sys.executable, "-m", "src.run", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
