"""Notebooks: committed as run, and the whole chain on the real published files with few rows and steps."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_as_run(path):
    cells = [c for c in load(path)["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c["outputs"]]
    assert outputs and not any(o["output_type"] == "error" for o in outputs)
    assert not any("widget" in kind for o in outputs for kind in o.get("data", {}))
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


def test_notebook_04_needs_no_torch():
    cells = load(ROOT / "notebooks" / "04_compare.ipynb")["cells"]
    code = "\n".join(source(c) for c in cells if c["cell_type"] == "code")
    imported = set(re.findall(r"\w+", " ".join(re.findall(r"^from src import (.*)$", code, re.M))))
    assert imported and imported <= {
        "data",
        "experiments",
        "reporting",
        "scoring",
    }  # test_reporting: these need no torch
    assert not re.search(r"^\s*(import|from) (torch|transformers)", code, re.M)


def chain(tmp_path, experiment, overrides, raw=None):
    """Copy the repository (without git, raw data linked), run the chain there, return the run folder."""
    for name in ("src", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(ROOT / "data" / "demo")
    if raw:
        (tmp_path / "data" / "raw").mkdir()
        (tmp_path / "data" / "raw" / raw).symlink_to(ROOT / "data" / "raw" / raw)
    command = [sys.executable, "-m", "src.run", experiment, json.dumps(overrides)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = list((tmp_path / "outputs").iterdir())
    assert len(runs) == 1
    return runs[0], done.stdout


SMALL = {
    "base_model": "data/demo/base",
    "device": "cpu",
    "data.train_rows": 24,
    "data.validation_rows": 6,
    "data.eval_rows": 8,
    "prompt.max_tokens": 256,
    "training.max_steps": 4,
    "training.batch_size": 6,
    "training.eval_steps": 2,
    "generation.max_new_tokens": 16,
}


def check_run(run, stdout, rows):
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    for name in (
        "config.json manifest.json train_log.jsonl metrics.json predictions/base.jsonl predictions/finetuned.jsonl "
        "adapter/adapter_model.safetensors adapter/prompt_template.json adapter/README.md comparison/side_by_side.html "
        "comparison/scores.csv notebooks/04_compare.ipynb"
    ).split():
        assert name in names, name
    metrics = load(run / "metrics.json")
    assert metrics["n"] == rows and metrics["systems"]["finetuned"]["all"]["ROUGE-1"]["value"] >= 0
    assert not (run / "checkpoints").exists() and f"outputs/{run.name}" in stdout
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["step"] for r in log if "eval_loss" in r] == [2, 4]


@needs_mts
def test_the_chain_runs_on_the_real_mts_dialog(tmp_path):
    run, stdout = chain(tmp_path, "mts_dialog", SMALL, "mts-dialog")
    check_run(run, stdout, 8)
    report = load(tmp_path / "data" / "processed" / "mts_dialog" / "report.json")
    assert report["rows"] == {"train": 1201, "validation": 100, "test1": 200, "test2": 200}


@needs_samsum
def test_the_chain_runs_on_the_real_samsum(tmp_path):
    # the base has no chat template, so the instruct prompt becomes a plain one here
    run, stdout = chain(tmp_path, "samsum", {**SMALL, "prompt.style": "plain"}, "samsum")
    check_run(run, stdout, 8)


def test_the_chain_runs_on_a_file_of_ones_own(tmp_path):
    rows = [{"dialogue": f"Ann: lunch at {n}?\nBob: fine", "summary": f"They meet at {n}."} for n in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    overrides = {**SMALL, "prompt.style": "plain", "data.train_file": "mine.jsonl", "data.eval_rows": 4}
    run, stdout = chain(tmp_path, "custom", overrides)
    check_run(run, stdout, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["samsun"], "Unknown experiment 'samsun'"),
        (["demo", '{"lora.rnk": 8}'], "Did you mean 'lora.rank'"),
        (["demo", "{"], "OVERRIDES is not JSON"),
        (["demo", "[1]"], "expected a JSON object"),
        (["demo", '{"device": "cuda:7"}'], "device is 'cuda:7'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_paragraph(tmp_path, arguments, message):
    for name in ("src", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(ROOT / "data" / "demo")
    done = subprocess.run(
        [sys.executable, "-m", "src.run", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_every_path_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"\]\(([^)#:]+)\)", text)) | set(
        re.findall(r"`((?:src|notebooks|data/demo|tests|benchmarks|outputs/demo|\.ci)/[\w./-]*)`", text)
    )
    assert len(paths) >= 12
    for path in paths:
        assert (ROOT / path).exists(), path
