"""On Colab, simulated: the first cell clones, and installs beside Colab's own packages. No network is touched."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks import docs
from src import colab, runs
from tests.test_docs import broken_links
from tests.test_notebooks import NOTEBOOKS, ROOT, SMALL, copy_repository, load, source

PROOF = ROOT / "benchmarks" / "t4_proof.ipynb"


def setup_of(path):
    return next(c for c in load(path)["cells"] if c["cell_type"] == "code")


def test_the_first_cell_is_short_folded_and_the_same_everywhere():
    cells = [setup_of(path) for path in [*NOTEBOOKS, PROOF]]
    assert len({source(cell) for cell in cells}) == 1 and source(cells[0]).startswith("# @title Setup")
    assert all(c["metadata"] == {"cellView": "form", "jupyter": {"source_hidden": True}} for c in cells)
    assert not any(cell["outputs"] for cell in cells)


CELL = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
result = shell.run_cell(sys.argv[1])
print(json.dumps([repr(result.error_before_exec or result.error_in_exec or ""), __import__("os").getcwd()]))
"""


def run_cell(folder, on_colab, code, repository=""):
    """Run the first cell in a fresh process in a folder, where pip and git are recorded: error, place, what was called.

    On Colab means that google.colab is imported before, as there.
    """
    called = folder / "called.jsonl"
    called.unlink(missing_ok=True)
    record = f"import json, sys\nopen({str(called)!r}, 'a').write(json.dumps(sys.argv) + '\\n')\n"
    fakes = folder / "fakes"
    (fakes / "google" / "colab").mkdir(parents=True, exist_ok=True)
    (fakes / "google" / "colab" / "__init__.py").write_text("")
    (fakes / "pip").mkdir(exist_ok=True)
    (fakes / "pip" / "__init__.py").write_text("")
    kept = (
        "argument = sys.argv\nif '-c' in argument: argument.append(open(argument[argument.index('-c') + 1]).read())\n"
    )
    (fakes / "pip" / "__main__.py").write_text("import sys\n" + kept + record)
    git = fakes / "git"
    copy = f"import shutil\nshutil.copytree({str(ROOT / 'src')!r}, sys.argv[-1] + '/src')\n"
    copy += f"shutil.copy({str(ROOT / 'requirements.txt')!r}, sys.argv[-1])\n"
    git.write_text(f"#!{sys.executable}\n{record}{copy}")
    git.chmod(0o755)
    code = code.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
    before = "import google.colab\n" if on_colab else ""
    environment = {**os.environ, "PYTHONPATH": str(fakes), "PATH": f"{fakes}{os.pathsep}{os.environ['PATH']}"}
    environment["IPYTHONDIR"] = str(folder / "ipython")
    command = [sys.executable, "-c", before + CELL, code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.strip().splitlines()
    calls = [json.loads(line) for line in called.read_text().splitlines()] if called.is_file() else []
    return [*json.loads(last), "\n".join(printed), calls]


def test_on_colab_the_first_cell_clones_then_installs_what_is_missing_and_keeps_torch(tmp_path):
    code = source(setup_of(NOTEBOOKS[0]))
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    changed = requirements.replace("peft==", "peft==9").replace("torch==", "torch==9").replace("ruff==", "ruff==9")
    error, place, printed, calls = run_cell(tmp_path, True, code, "https://github.com/owner/name")
    assert (error, place, printed) == ("''", str(tmp_path / "repository"), "")
    assert [call[1:] for call in calls if "clone" in call] == [
        ["clone", "--quiet", "--depth", "1", "https://github.com/owner/name", "repository"]
    ]
    (tmp_path / "repository" / "requirements.txt").write_text(changed)
    error, place, printed, calls = run_cell(tmp_path, True, code, "https://github.com/owner/name")
    (pip,) = calls  # the clone is found: it is not cloned again
    version = re.search(r"^peft==(\S+)", requirements, re.M)[1]
    assert f"peft==9{version}" in pip and not [a for a in pip[:-1] if re.match("(torch|pandas|ruff|pytest)==", a)]
    kept = pip[-1].splitlines()
    assert f"torch=={metadata.version('torch')}" in kept and f"numpy=={metadata.version('numpy')}" in kept
    assert (error, place) == ("''", str(tmp_path / "repository"))


def test_elsewhere_the_first_cell_installs_nothing_and_says_where_it_has_to_be_run(tmp_path):
    code = source(setup_of(NOTEBOOKS[0]))
    error, place, printed, calls = run_cell(tmp_path, False, code, "https://github.com/owner/name")
    assert "FileNotFoundError" in error and "clone it" in error and not calls and place == str(tmp_path)
    (tmp_path / "clone" / "notebooks").mkdir(parents=True)
    (tmp_path / "clone" / "src").symlink_to(ROOT / "src")
    (tmp_path / "clone" / "requirements.txt").write_text("peft==999\n")
    shutil.move(tmp_path / "fakes", tmp_path / "clone" / "notebooks" / "fakes")
    error, place, printed, calls = run_cell(tmp_path / "clone" / "notebooks", False, code)
    assert (error, place, printed, calls) == ("''", str(tmp_path / "clone"), "", [])


def test_without_an_address_colab_is_told_to_clone(tmp_path):
    error, _, _, calls = run_cell(tmp_path, True, source(setup_of(NOTEBOOKS[0])).replace(docs.COLAB, ""))
    if re.search('^REPOSITORY = ""', source(setup_of(NOTEBOOKS[0])), re.M):
        assert "FileNotFoundError" in error and not calls


@pytest.fixture
def pip(monkeypatch):
    """`colab.setup` with pip replaced: what it was asked for, and versions that it may change."""
    asked, versions = [], {"torch": "2.10.0+cu126", "numpy": "2.0.2", "pandas": "2.2.2", "transformers": "5.0.0"}

    def run(command, **_):
        asked.append(command)
        for line in command[command.index("-c") + 2 :]:
            name, version = line.split("==")
            versions[name] = version
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(colab, "_versions", lambda: dict(versions))
    monkeypatch.setattr(colab.subprocess, "run", run)
    monkeypatch.setattr(colab.metadata, "packages_distributions", lambda: {"loaded_module": ["transformers"]})
    return asked, versions


def test_what_is_installed_is_not_installed_again(pip):
    asked, versions = pip
    colab.setup()
    assert len(asked) == 1 and versions["torch"] == "2.10.0+cu126" and versions["pandas"] == "2.2.2"
    assert {"scipy", "matplotlib", "papermill"} <= versions.keys() and not {
        "ruff",
        "pytest",
        "jupyter",
    } & versions.keys()
    colab.setup()
    assert len(asked) == 1


def test_a_restart_is_asked_for_when_a_loaded_package_changed(pip, monkeypatch):
    monkeypatch.setitem(sys.modules, "loaded_module", sys)
    with pytest.raises(colab.RestartNeeded, match="transformers changed under this session: Runtime > Restart"):
        colab.setup()
    colab.setup()  # after the restart: nothing to do


@pytest.mark.parametrize(("name", "version"), [("torch", "2.5.1+cu121"), ("pandas", "2.1.4")])
def test_packages_that_are_too_old_are_named(pip, name, version):
    pip[1][name] = version
    with pytest.raises(RuntimeError, match=f"Colab's {name} is {re.escape(version)}: expected 2"):
        colab.setup()
    assert not pip[0]


def test_what_pip_says_is_shown_when_it_fails(pip, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: ResolutionImpossible")
    monkeypatch.setattr(colab.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="ResolutionImpossible"):
        colab.setup()


def test_colab_needs_no_package_before_it_installs():
    code = (
        "import sys; from src import colab; print(sorted({'numpy', 'pandas', 'torch', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_outputs_in_another_folder_outlive_the_clone(tmp_path, monkeypatch):
    """Runs are written through the link, and a second clone finds them."""
    drive = tmp_path / "drive" / "outputs"
    for name in ("first", "second"):
        clone = tmp_path / name
        (clone / "outputs").mkdir(parents=True)
        (clone / "outputs" / "LOG.md").write_text("committed")
        monkeypatch.setattr(colab, "ROOT", clone)
        monkeypatch.setattr(runs, "ROOT", clone)
        colab.keep_outputs(str(drive))
        colab.keep_outputs(str(drive))  # the cell is run again
        assert (clone / "outputs").is_symlink() and (clone / "outputs" / "LOG.md").read_text() == "committed"
        run = runs.Run("demo-0000000a")
        assert runs.relative(run.folder / "config.json") == "outputs/demo-0000000a/config.json"
        if name == "first":
            runs.write_sealed(run.folder / "config.json", {"kept": True})
        shutil.rmtree(clone) if name == "first" else None
    assert runs.read_sealed(run.folder / "config.json", "02")["kept"] and (drive / "demo-0000000a").is_dir()


def proof(folder, **parameters):
    """Run the proof notebook on the demo's base in a copy, on the CPU."""
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("results", "*.py"))
    written = folder / "proof.ipynb"
    command = [sys.executable, "-m", "papermill", "benchmarks/t4_proof.ipynb", str(written), "-k", "python3"]
    overrides = {**SMALL, "training.learning_rate": 3e-3, "training.per_device_train_batch_size": 4}
    overrides = {k: v for k, v in overrides.items() if k not in ("training.max_steps", "training.eval_steps")}
    yaml = json.dumps({"RECIPE": "demo", "OVERRIDES": overrides, **parameters})
    done = subprocess.run([*command, "-y", yaml], cwd=folder, capture_output=True, text=True, timeout=300)
    return done, load(written)


def test_the_proof_for_a_t4_is_not_run_and_says_so():
    first, *cells = load(PROOF)["cells"]
    assert source(first).startswith("**Nobody has run this notebook on a T4 yet.**")
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert max(len(source(cell).splitlines()) for cell in cells) <= 25
    code = "\n".join(map(source, cells))
    for words in ("STEPS = 20", "MOST_GIB = 15.0", "assert peak < MOST_GIB", "assert last < first"):
        assert words in code, words


def test_the_proof_holds_on_the_demo_on_a_cpu_and_fails_where_the_loss_rises(tmp_path):
    copy_repository(tmp_path)
    (tmp_path / "outputs").mkdir()
    done, written = proof(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    *_, last = [output for cell in written["cells"] for output in cell.get("outputs", [])]
    assert "holds, without a GPU" in "".join(last["text"]) and '"steps": 20' in "".join(last["text"])
    code = source(written["cells"][-1])
    state = {"STEPS": 20, "MOST_GIB": 15.0, "torch": type("torch", (), {"cuda": FakeGpu(True)}), "json": json}
    good = {"steps": 20, "plan": {"gib": 9.0}, "peak_gib": 9.1, "plans_out_of_memory": []}
    good |= dict.fromkeys(("device", "train_tokens", "train_seconds", "versions"), "x")
    falling = [{"loss": 3 - step / 10} for step in range(20)]
    exec(code, state | {"run": FakeRun(good, falling)})
    for manifest, log, message in (
        (good, falling[::-1], "the loss rose from"),
        (good | {"peak_gib": 15.1}, falling, "peak 15.1 GiB: expected less"),
        (good | {"peak_gib": 14.0}, falling, "planned 9.0"),
        (good | {"steps": 19}, falling, "19 steps"),
        (good | {"plans_out_of_memory": [1]}, falling, "did not fit as planned"),
    ):
        with pytest.raises(AssertionError, match=message):
            exec(code, state | {"run": FakeRun(manifest, log)})


class FakeGpu:
    def __init__(self, available):
        self.is_available = lambda: available


class FakeRun:
    def __init__(self, manifest, log):
        self.manifest, self.log = manifest, log


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of what `make links` writes to."""
    copy_repository(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(PROOF, tmp_path / "benchmarks")
    for name in ("README.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "FIELDS", tmp_path / "fields.md")
    return tmp_path


def test_make_links_writes_the_address_everywhere_and_another_over_it(copied, capsys):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^links:.*\n\t\$\(BIN\)/python -m benchmarks.docs '\$\(REPOSITORY\)'$", makefile, re.M)
    before = {path: load(path) for path in (copied / "notebooks").glob("*.ipynb")}
    for repository in ("someone/first", "some-one/second.name"):
        assert docs.main([repository]) == 0 and "CITATION.cff" in capsys.readouterr().out
        for path in [*before, copied / "benchmarks" / "t4_proof.ipynb"]:
            markdown = source(next(c for c in load(path)["cells"] if c["cell_type"] == "markdown"))
            target = f"https://colab.research.google.com/github/{repository}/blob/main/{path.relative_to(copied)}"
            assert re.findall(r"colab-badge.svg\)\]\((.*?)\)", markdown) == [target]
            assert f'REPOSITORY = "https://github.com/{repository}"' in source(setup_of(path))
            if path in before:
                assert [c.get("outputs") for c in load(path)["cells"]] == [
                    c.get("outputs") for c in before[path]["cells"]
                ]
        readme = (copied / "README.md").read_text(encoding="utf-8")
        badges = re.findall(rf"\(https://colab.research.google.com/github/{repository}/blob/main/(\S+?)\)", readme)
        assert badges == [f"notebooks/{path.name}" for path in NOTEBOOKS] and "/first" not in readme.replace(
            repository, ""
        )
        assert not [link for link in broken_links(ROOT / "README.md", readme) if "colab" in link]
        citation = (copied / "CITATION.cff").read_text(encoding="utf-8")
        assert re.findall("^repository-code: (.*)", citation, re.M) == [f"https://github.com/{repository}"]


@pytest.mark.parametrize("repository", ["", "name", "https://github.com/owner/name", "a/b/c", "a/b'c"])
def test_what_is_no_owner_and_name_is_refused(copied, capsys, repository):
    before = {path: path.read_bytes() for path in copied.glob("*.*")}
    assert docs.main([repository]) == 1 and "expected owner/name" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_a_file_without_a_place_for_the_address_is_named_and_nothing_is_written(copied, capsys):
    readme = copied / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("| [03_evaluate]", "| 03: [03_evaluate]"), "utf-8")
    assert docs.main(["owner/name"]) == 1 and "README.md: 0 places" in capsys.readouterr().err
    assert 'REPOSITORY = ""' in source(setup_of(copied / "notebooks" / "01_prepare_data.ipynb"))


def test_under_colabs_python_all_sources_are_read_and_the_requirements_found():
    found = [*Path.home().glob(".pyenv/versions/3.12.*/bin/python"), shutil.which("python3.12")]
    python = next((p for p in found if p and subprocess.run([p, "-V"], capture_output=True).returncode == 0), None)
    if python is None:
        pytest.skip("python 3.12, which Colab has, is not here")
    code = """import ast, pathlib
from src import colab
sources = [ast.parse(path.read_text("utf-8")) for path in pathlib.Path("src").rglob("*.py")]
print(len(sources), len(colab.wanted({})))"""
    done = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    files, lines = map(int, done.stdout.split())
    assert files > 30 and lines > 15
