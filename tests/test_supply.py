"""What comes from elsewhere: pinned commits, weights without code, packages that are audited and tried newer."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import supply
from src import qlora, recipes

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", recipes.names())
def test_a_base_model_of_the_hub_is_pinned_to_a_commit(name):
    recipe = recipes.load(name)
    on_hub = not recipe.base_model.startswith("data/")
    assert on_hub == recipe.base_model.startswith("mistralai/") == bool(re.fullmatch("[0-9a-f]{40}", recipe.revision))


def test_another_base_model_does_not_keep_the_commit_of_the_first():
    assert recipes.load("samsum", {"lora.r": 8}).revision == recipes.load("samsum").revision != "main"
    assert recipes.load("samsum", {"base_model": "a/b"}).revision == "main"
    assert recipes.load("samsum", {"base_model": "a/b", "revision": "v1"}).revision == "v1"
    same = {"base_model": "mistralai/Mistral-7B-Instruct-v0.2"}
    assert recipes.load("samsum", same).revision == recipes.load("samsum").revision


@pytest.mark.parametrize(("overrides", "warned"), [({}, True), ({"revision": "a" * 40}, False), (None, False)])
def test_main_of_the_hub_is_warned_of_by_name(tiny_model, monkeypatch, capsys, overrides, warned):
    real = qlora.AutoTokenizer.from_pretrained
    monkeypatch.setattr(qlora.AutoTokenizer, "from_pretrained", lambda name, **_: real(tiny_model))
    local = {"base_model": str(tiny_model)}
    qlora.load_tokenizer(recipes.load("demo", local if overrides is None else {"base_model": "a/b", **overrides}))
    assert ("Warning: revision is 'main' of 'a/b'" in capsys.readouterr().err) == warned


def test_weights_are_safetensors_and_no_code_of_others_runs():
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    cells = {
        path: "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
        for path in (ROOT / "notebooks").glob("*.ipynb")
    }
    texts = cells | {path: path.read_text(encoding="utf-8") for path in sources}
    assert len(texts) > 50
    for path, text in texts.items():
        assert "trust_remote_code" not in text, path
        if "benchmarks" not in str(path):
            assert not re.search(r"pickle|torch\.load|allow_pickle|\beval\(.*input|shell=True", text), path
        for call in re.findall(r"AutoModelForCausalLM\.from_pretrained\((.*?)\n *\)\n", text, re.S):
            assert "revision=" not in call or "use_safetensors=True" in call, path


def test_pins_are_all_of_requirements():
    lines = [
        line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line[:1].isalpha()
    ]
    assert len(supply.pins()) == len(lines) > 20 and supply.pins()["rouge-score"] == "0.1.2"


def test_the_library_that_breaks_a_test_is_named():
    # a breaks t1, b breaks t2, and t3 fails with whatever is newer
    broken, newer = {"t1", "t2", "t3"}, {"a": ("1", "2"), "b": ("1", "3"), "c": ("1", "4")}
    fails = {"a": {"t2", "t3"}, "b": {"t1", "t3"}, "c": broken}
    assert supply.blame(broken, newer, lambda package, pin: fails[package]) == {"a": {"t1"}, "b": {"t2"}, "": {"t3"}}


def test_the_tests_that_fail_are_read_from_pytest(tmp_path):
    import sys

    path = tmp_path / "test_x.py"
    path.write_text("def test_a():\n    pass\ndef test_b():\n    assert False\n", encoding="utf-8")
    assert {name.rpartition("::")[2] for name in supply.failing(Path(sys.executable), [str(path)])} == {"test_b"}
    path.write_text("def test_a():\n    pass\n", encoding="utf-8")
    assert supply.failing(Path(sys.executable), [str(path)]) == set()
    assert supply.failing(Path(sys.executable), ["no_such_file.py"]) == {"pytest itself"}


def package(name, **fields):
    return {"name": name, "version": "1.0", "vulns": [], **fields}


SKIPPED = {"name": "b", "skip_reason": "not found"}
VULNERABLE = package("c", vulns=[{"id": "CVE-1", "fix_versions": ["1.1"]}])


@pytest.mark.parametrize(
    ("answers", "code", "said"),
    [
        ([None, None], 2, "Nothing was audited: neither pypi's advisories nor osv can be reached"),
        ([[SKIPPED, SKIPPED], None], 2, "Nothing was audited"),
        ([None, [package("a"), SKIPPED]], 0, "osv answered for 1 of 2 packages: 0 known vulnerabilities"),
        ([[package("a"), VULNERABLE]], 1, "c 1.0: CVE-1, mended in 1.1"),
    ],
)
def test_an_audit_says_what_it_found_or_that_nobody_answered(monkeypatch, capsys, answers, code, said):
    from subprocess import CompletedProcess

    texts = iter("" if found is None else json.dumps({"dependencies": found}) for found in answers)
    monkeypatch.setattr(supply, "environment", lambda name, packages: Path("python"))
    monkeypatch.setattr(supply.subprocess, "run", lambda command, **_: CompletedProcess(command, 1, next(texts), "x"))
    assert supply.audit() == code and said in capsys.readouterr().out
