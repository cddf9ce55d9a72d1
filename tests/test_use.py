"""`make try` and what notebook 06 is made of, on the demo's committed adapter."""

import io
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from src import prompts, qlora, recipes, runs, takehome, try_it
from tests.test_notebooks import code_of

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
    assert len(seconds) == 2 and re.search(r"\d tokens/s\)", done.stdout)


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
    runs.write_sealed(folder / "config.json", config)
    runs.write_sealed(folder / "manifest.json", {"finished": finished})


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


def executed(name):
    """The text that the committed notebook printed and showed."""
    cells = json.loads((runs.ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    return "\n".join("".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/plain", "")) for o in outputs)


def test_06_shows_its_objects_scores_the_merged_model_and_uploads_nothing():
    code, shown = code_of("06_use_it"), executed("06_use_it")
    for words in ("GenerationConfig(", "merge_and_unload()", "follow_the_card(", "PUSH = False", "if PUSH:"):
        assert words in code, words
    assert re.search(r"^base +40 .*\nfine-tuned +40 .*\nmerged, 16 bits +40 ", shown, re.M)
    assert re.search(r"merged minus fine-tuned, ROUGE-L: -?0\.\d{3} \[-?0\.\d{3}, 0\.\d{3}\]; \d+ of 40 answers", shown)
    assert "outputs/merged-demo" in shown and str(runs.ROOT) not in shown


@pytest.mark.skipif(
    "avx512_bf16" in open("/proc/cpuinfo", encoding="utf-8").read(), reason="bitsandbytes computes in 16 bits here"
)
def test_the_cards_own_code_answers_in_a_fresh_process_as_the_run_does(demo):
    recipe = try_it.DEMO.recipe()
    rows = try_it.prompt_rows(CHAT.strip(), "ALLERGY", demo[0], recipe.prompt)
    here = try_it.answers(demo[1], demo[0], rows, qlora.generation_config(recipe))["fine-tuned"]["prediction"]
    assert here and takehome.follow_the_card(try_it.DEMO.adapter, "ALLERGY", CHAT.strip()) == here


def test_a_card_that_is_missing_or_fails_is_an_error_that_says_so(tmp_path):
    with pytest.raises(runs.RunError, match="README.md is missing: run notebooks/04_compare"):
        takehome.follow_the_card(tmp_path, "", "")
    (tmp_path / "README.md").write_text("```python\nraise SystemExit('no such base')\n```", encoding="utf-8")
    with pytest.raises(runs.RunError, match="no such base"):
        takehome.follow_the_card(tmp_path, "", "")


CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
HOSTILE = "Doctor: {{ .System }} {section}?\nPatient: \\1 {dialogue}, yes."


@pytest.mark.parametrize("style", ["plain", "chat"])
@pytest.mark.parametrize("instruction", ["Summarize for section: {section}", "Summarize {{.Prompt}} {x} in a line:"])
def test_the_modelfile_renders_the_prompt_of_training_token_by_token(style, instruction):
    recipe = recipes.load("demo", {"prompt.style": style, "prompt.instruction": instruction})
    tokenizer = qlora.load_tokenizer(recipe)
    tokenizer.chat_template = CHATML if style == "chat" else None
    generation = qlora.generation_config(recipe)
    template = prompts.template(tokenizer, recipe.prompt)
    made = takehome.modelfile(template, tokenizer, generation)
    for dialogue in (CHAT.strip(), HOSTILE):
        record = {"id": "1", "section": "ALLERGY", "dialogue": dialogue, "summary": ""}
        wanted = prompts.build(record, tokenizer, recipe.prompt).prompt_ids
        text = takehome.render(made, "ALLERGY", dialogue)  # llama.cpp puts the BOS token before it
        assert [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] == wanted
    lines = made.splitlines()
    for line in ('PARAMETER stop "</s>"', "PARAMETER temperature 0", "PARAMETER repeat_penalty 1.0"):
        assert line in lines
    assert "PARAMETER num_predict 96" in lines and "PARAMETER num_ctx 608" in lines  # 512 of the prompt and 96 new
    sampling = recipes.load("demo", {"generation.do_sample": True, "generation.temperature": 0.7})
    sampled = takehome.modelfile(template, tokenizer, qlora.generation_config(sampling))
    assert "PARAMETER temperature 0.7" in sampled.splitlines()


def test_a_prompt_that_a_modelfile_cannot_hold_is_refused():
    recipe = recipes.load("demo", {"prompt.instruction": 'Say """'})
    tokenizer = qlora.load_tokenizer(recipe)
    template = prompts.template(tokenizer, recipe.prompt)
    with pytest.raises(ValueError, match="which ends a TEMPLATE"):
        takehome.modelfile(template, tokenizer, qlora.generation_config(recipe))


def test_the_merged_models_card_has_its_scores_where_the_hub_looks_for_them():
    from huggingface_hub import ModelCard

    card = takehome.merged_card(try_it.DEMO, {"ROUGE-1": 0.91234, "ROUGE-L": 0.5}, 40, "test")
    read = ModelCard(card).data
    assert [(r.metric_name, r.metric_value) for r in read.eval_results] == [
        ("ROUGE-1 (F1, 0-1, no stemmer)", 0.9123), ("ROUGE-L (F1, 0-1, no stemmer)", 0.5),
    ]  # fmt: skip
    assert read.model_name == "demo-merged" and read.eval_results[0].dataset_split == "test"
    assert "first 40 rows of test" in card and "| ROUGE-1 | 0.912 |" in card


def test_the_lines_for_servers_are_shell_that_sends_the_prompt_of_training():
    recipe = recipes.load("demo", {"prompt.instruction": "What's said on {section}?"})
    tokenizer = qlora.load_tokenizer(recipe)
    template = prompts.template(tokenizer, recipe.prompt)
    folder = runs.ROOT / "outputs" / "merged-demo"
    lines = takehome.serving(folder, template, qlora.generation_config(recipe), "CC")
    assert subprocess.run(["bash", "-n"], input=lines, text=True).returncode == 0
    curl = next(line for line in lines.splitlines() if line.startswith("curl"))
    body = shlex.split(curl)[-1]
    sent = json.loads(body)
    assert sent["prompt"].startswith("<s>What's said on CC?\n") and sent["add_special_tokens"] is False
    assert "--served-model-name merged-demo" in lines and "convert_hf_to_gguf.py outputs/merged-demo " in lines


def test_conversion_is_llama_cpps_own_and_only_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert takehome.to_gguf(tmp_path) is None
    tool = tmp_path / "convert_hf_to_gguf.py"
    tool.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[-1], 'w').write(' '.join(sys.argv[1:4]))\n")
    tool.chmod(0o755)
    assert takehome.to_gguf(tmp_path).read_text() == f"{tmp_path} --outtype bf16"
