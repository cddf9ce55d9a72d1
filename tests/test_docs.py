"""Every path, command and link in the texts for people holds, and CONTRIBUTING.md's example works to the letter."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from benchmarks import docs
from src import recipes
from tests.test_notebooks import ROOT, copy_repository

PLACES = ". data data/demo outputs outputs/demo/adapter benchmarks src/engine src/recipes cloud".split()
TEXTS = [path for place in PLACES for path in sorted((ROOT / place).glob("*.md"))]
MADE = re.compile(
    r"data/(raw|processed|models)|\.venv|\.build|lab(/|$)|outputs/[\w-]*[<*]|evaluations/|.*(lunch|[<*])"
)  # git ignores them


def ids(path):
    return path.relative_to(ROOT).as_posix()


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def anchors(path):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path, text):
    """Links whose target does not exist, or whose address is none."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"\w+:", link):
            address = urlsplit(link)
            if address.scheme != "https" or not re.fullmatch(r"([\w-]+\.)+[a-z]+", address.netloc):
                wrong.append(link)
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


def missing_paths(path, text):
    """Paths in `code` that exist neither from the root nor from the page's folder, nor are made by a run."""
    named = re.findall(r"`((?:[\w.*<>-]+/)+[\w.*<>-]*|[\w-]+\.(?:py|md|toml|csv|txt|ipynb|cff))`", text)
    places = (ROOT, path.parent, ROOT / "src", ROOT / "notebooks")
    return [n for n in named if not MADE.match(n) and not n[0].isupper() and not any((p / n).exists() for p in places)]


def broken_commands(text, targets):
    """make targets, modules and scripts that do not exist, recipes that nobody wrote, OVERRIDES that do not load."""
    wrong = []
    text = re.sub(r"'\{[^']*\}'", lambda m: re.sub(r"\s*\n\s*", " ", m[0]), text)
    for target, rest in re.findall(r"(?:^ *|`)make ([a-z]+)([^\n`]*)", text, re.M):
        given = dict(re.findall(r"([A-Z]+)=('[^']*'|\S+)", rest.split("#")[0]))
        recipe = given.get("EXPERIMENT", "demo")
        try:
            assert target in targets
            if recipe != "lunch":  # CONTRIBUTING.md's own
                recipes.load(recipe, json.loads(given.get("OVERRIDES", "{}").strip("'")))
        except (AssertionError, ValueError) as error:
            wrong.append(f"make {target}{rest}: {error}")
    for module in re.findall(r"python -m (src[\w.]*)", text):
        if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
            wrong.append(f"python -m {module}")
    for script in re.findall(r"python ([\w/]+\.py)|pytest ([\w/]+\.py)", text):
        if not (ROOT / "".join(script)).is_file():
            wrong.append("".join(script))
    return wrong


def make_targets():
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


@pytest.mark.parametrize("path", TEXTS, ids=ids)
def test_paths_links_and_commands_of_a_page_hold(path):
    text = path.read_text(encoding="utf-8")
    assert not broken_links(path, text)
    assert not missing_paths(path, text)
    assert not broken_commands(text, make_targets())


def test_the_checks_find_what_is_broken():
    readme, targets = ROOT / "README.md", make_targets()
    links = (
        "[a](src) [b](gone.md) [c](data/README.md#samsum) [d](data/README.md#gone) [e](http://x.org) [f](https://a b)"
    )
    assert broken_links(readme, f"{links} [g](https://nowhere)") == [
        "gone.md", "data/README.md#gone", "http://x.org", "https://nowhere",
    ]  # fmt: skip
    paths = "`src/runs` `src/gone.py` `data/raw/x` `outputs/<run>` `lora.r` `gone.md` `runs/files.py`"
    assert missing_paths(readme, paths) == ["src/gone.py", "gone.md"]
    good = """make run EXPERIMENT=samsum OVERRIDES='{"lora.r": 8,\n      "seed": 1}'  # comment"""
    assert not broken_commands(f"    {good}\n`make try`, we make sense\n", targets)
    bad = [
        "make gone",
        "make run EXPERIMENT=gone",
        """make run OVERRIDES='{"lora.rank": 8}'""",
        "make run OVERRIDES='{'",
    ]
    for command in [
        *bad,
        "python -m src.gone",
        "python benchmarks/gone.py",
        ".venv/bin/python -m pytest tests/gone.py",
    ]:
        assert len(broken_commands(f"    {command}", targets)) == 1, command


def _committed():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.split()  # nothing in a copy without git


def test_enough_is_checked():
    text = "\n".join(path.read_text(encoding="utf-8") for path in TEXTS)
    assert set(TEXTS) >= {ROOT / name for name in _committed()}
    assert {"README.md", "CONTRIBUTING.md", "data/README.md", "src/recipes/README.md"} <= set(map(ids, TEXTS))
    assert len(re.findall(r"\]\([^)]+\)", text)) > 40 and len(re.findall(r"make [a-z]+", text)) > 15


def test_the_page_of_fields_says_default_values_and_meaning_of_each():
    page = docs.FIELDS.read_text(encoding="utf-8")  # test_structure.py holds it to be fresh
    for key in recipes.flat(recipes.load("demo").model_dump()):
        (row,) = re.findall(rf"^\| `{re.escape(key)}` \| (.*) \|$", page, re.M)
        default, values, meaning = (cell.strip() for cell in re.split(r"(?<!\\)\|", row))
        assert default and values and len(meaning) > 5, key
    assert "| `lora.r` | `16` | whole number, 1 to 65,536 | columns of each low-rank factor" in page


def test_the_citation_names_nobody_who_was_not_asked():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["license"] == "Apache-2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["authors"] == [{"name": "The authors of this repository"}]


def example():
    """(text before, language, block) of CONTRIBUTING.md's worked example, in order."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Worked example")[1]
    return re.findall(r"\n\n([^\n`]*(?:`[^`]*`[^`]*?)+|[^\n]*):\n\n```(\w+)\n(.*?)```", text, re.S)


def follow(folder, before, language, block):
    """Do in a copy of the repository what a step of the example says; return what was printed."""
    if language == "python":
        command = [sys.executable, "-c", block]
    elif language == "sh":
        here = f"make -o .venv/installed BIN={Path(sys.executable).parent} run"  # this Python instead of .venv
        block = block.replace("make run", here).replace(".venv/bin/python", sys.executable)
        command = ["bash", "-ec", block]
    elif language == "diff":
        old, new = (line[1:] for line in block.splitlines())
        path = folder / re.findall(r"`(\S+\.py)`", before)[0]
        source = path.read_text(encoding="utf-8")
        assert source.count(old + "\n") == 1
        path.write_text(source.replace(old, new), encoding="utf-8")
        return ""
    else:
        path = folder / re.findall(r"`([\w/]+\.toml)`", before)[-1]
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + block)
        return ""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_worked_example_does_what_it_says(tmp_path):
    copy_repository(tmp_path)
    shutil.copy(ROOT / "Makefile", tmp_path / "Makefile")
    (tmp_path / "benchmarks").mkdir(exist_ok=True)
    shutil.copy(ROOT / "benchmarks" / "docs.py", tmp_path / "benchmarks")
    steps = example()
    assert [language for _, language, _ in steps] == ["python", "toml", "diff", "toml", "sh"]
    *made, (before, language, commands) = steps
    for step in made:
        follow(tmp_path, *step)
    first, second, third = commands.strip().splitlines()
    follow(tmp_path, before, language, first)
    assert "demo, mts_dialog, samsum, lunch, custom" in (tmp_path / "src/recipes/README.md").read_text(encoding="utf-8")
    printed = follow(tmp_path, before, language, second)
    run = tmp_path / "outputs" / re.search(r"== run (lunch-\w+)", printed)[1]
    assert json.loads((run / "manifest.json").read_text(encoding="utf-8"))["rows"]["train"] == 12
    assert "https://example.org/lunch), CC0" in (run / "adapter" / "README.md").read_text(encoding="utf-8")
    changed = "from src import recipes; print(recipes.load('lunch', {'lora.r': 4}).lora.r)"
    loaded = subprocess.run([sys.executable, "-c", changed], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert third.endswith("""OVERRIDES='{"lora.r": 4}'""") and loaded.stdout == "4\n"
