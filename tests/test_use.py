"""`make try` and what notebook 06 is made of, on the demo's committed adapter."""

import io
import json
import os
import re
import subprocess
import sys

import pytest

from src import recipes, runs, try_it

CHAT = "Doctor: Any allergies?\nPatient: Yes, to penicillin. I got a rash.\n"


@pytest.fixture(scope="module")
def demo():
    return try_it.load(try_it.DEMO)


@pytest.fixture
def chat(tmp_path):
    path = tmp_path / "my chat's.txt"
    path.write_text(CHAT, encoding="utf-8")
    return path


def test_make_try_answers_from_a_clone_in_two_columns(chat, tmp_path):
    environment = {**os.environ, "COLUMNS": "80", "FILE": str(chat), "SECTION": "allergy", "RUN": "demo"}
    recipe = re.search(r"^try:.*\n\t@(.*)", (runs.ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
    command = recipe.replace("$$", "$").replace("$(BIN)/python", sys.executable)
    done = subprocess.run(command, shell=True, cwd=runs.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "section ALLERGY" and re.fullmatch(r"BASE +\| FINE-TUNED", lines[1])
    left, right = zip(*(line.split("|") for line in lines[1:] if "|" in line), strict=True)
    assert {len(part) for part in left} == {39} and max(map(len, lines[1:-2])) <= 80
    assert "Penicillin" in right[2] and "Penicillin*" not in right[2]
    seconds = [float(found) for found in re.findall(r"([\d.]+) s,", done.stdout)]
    assert len(seconds) == 2 and max(seconds) < 3 and re.search(r"\d tokens/s\)", done.stdout)


def test_the_committed_adapter_is_a_run_that_03_does_not_mistake_for_one():
    assert try_it.DEMO.recipe() == recipes.load("demo") and not try_it.DEMO.finished
    config = json.loads((try_it.DEMO.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "data/demo/base" and config["r"] == 16
    files = sorted(path.name for path in try_it.DEMO.adapter.iterdir())
    assert files == sorted(
        "README.md adapter_config.json adapter_model.safetensors prompt_template.json tokenizer.json "
        "tokenizer_config.json".split()
    )
    assert sum(path.stat().st_size for path in try_it.DEMO.adapter.iterdir()) < 4e6


def finish(root, name, recipe, finished):
    folder = root / "outputs" / name
    config = {"run": name, "recipe": recipes.load("demo").model_dump() | {"name": recipe}}
    runs.write_json(folder / "config.json", config)
    runs.write_json(folder / "manifest.json", {"finished": finished})


def test_the_newest_finished_run_of_a_recipe_comes_before_the_committed_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert try_it.find() == try_it.find("demo") == try_it.DEMO
    with pytest.raises(runs.RunError, match="No finished run named 'samsum'"):
        try_it.find("samsum")
    finish(tmp_path, "samsum-0000000a", "samsum", "2026-01-01")
    finish(tmp_path, "demo-0000000b", "demo", "2026-01-03")
    finish(tmp_path, "demo-0000000c", "demo", "2026-01-02")
    finish(tmp_path, "published-rank_4-0000000d", "published-rank_4", "2026-01-04")
    assert try_it.find().name == try_it.find("demo").name == "demo-0000000b"
    assert try_it.find("samsum").name == "samsum-0000000a" and try_it.find("demo-0000000c").name == "demo-0000000c"


@pytest.mark.parametrize(
    ("content", "section", "run", "message"),
    [
        (None, "", "", r"chat.txt' cannot be read \(No such file or directory\): expected a UTF-8 text file"),
        (b"", "", "", "is empty, or holds no letter"),
        ("\u202e \u200b -\n".encode(), "", "", "is empty, or holds no letter"),
        (b"Doctor: \xff", "", "", r"is not UTF-8 text \(byte 8\)"),
        (b"a" * 1_000_001, "", "", "is too long, more than 1,000,000 bytes"),
        (CHAT.encode(), "ALERGY", "", "SECTION is 'ALERGY': expected one of FAM/SOCHX.* Did you mean 'ALLERGY'?"),
        (CHAT.encode(), "\x1b[31m", "", r"SECTION is '\\x1b\[31m': expected one of"),
        (CHAT.encode(), "", "demo-12", "No finished run named 'demo-12'"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(tmp_path, capsys, content, section, run, message):
    path = tmp_path / "chat.txt"
    if content is not None:
        path.write_bytes(content)
    assert try_it.main(str(path), section, run) == 1
    printed = capsys.readouterr()
    assert re.search(message, printed.err) and printed.err.count("\n") == 1 and not printed.out
    assert "Loading" not in printed.err and "\x1b" not in printed.err


def test_a_section_is_for_prompts_that_name_one():
    samsum, demo = recipes.load("samsum"), recipes.load("demo")
    assert try_it.choose_section(samsum) == "" and try_it.choose_section(demo, "Allergy") == "ALLERGY"
    assert try_it.choose_section(demo) == "FAM/SOCHX"  # 293 of 1,200 rows, the most
    with pytest.raises(try_it.TryError, match="prompts of recipe samsum name none"):
        try_it.choose_section(samsum, "ALLERGY")


def test_a_dialogue_that_does_not_fit_is_refused_and_never_cut(demo):
    prompt = try_it.DEMO.recipe().prompt
    rows = try_it.prompt_rows(CHAT, "ALLERGY", demo[0], prompt)
    assert CHAT in rows[0]["prompt_text"] and rows[0]["cut_tokens"] == 0
    with pytest.raises(try_it.TryError, match=r"too long: its prompt has \d{4} tokens, expected at most 512"):
        try_it.prompt_rows(CHAT * 80, "ALLERGY", demo[0], prompt)


def test_a_dialogue_comes_from_stdin_where_no_file_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfAnn: hi\r\nBob: ho\r\n")))
    assert try_it.read_dialogue("") == "Ann: hi\nBob: ho"


def test_columns_stay_columns_whatever_a_model_answers():
    one = {"tokens": 5, "seconds": 0.5, "stop": "eos"}
    found = {
        "base": one | {"prediction": "\x1b[2Jred\rblue \u202eevil\nsecond line " + "x" * 50},
        "fine-tuned": one | {"prediction": "", "stop": "length"},
    }
    printed = try_it.side_by_side(found, "red blue", 43)
    assert not {"\x1b", "\r", "\u202e"} & set(printed)
    lines = printed.splitlines()
    assert lines[0] == "BASE                 | FINE-TUNED" and {line.find("|") for line in lines} == {21}
    assert "(empty)" in lines[2] and max(map(len, lines)) <= 43
    assert "cut at the cap, 0.5 s, 10 tokens/s" in " ".join(line[23:] for line in lines)
