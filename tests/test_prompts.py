"""Prompts: ids against the official tokenizer, what is supervised, what is cut, what hostile text cannot do."""

import dataclasses

import pytest

from src import prompts
from src.recipes import Prompt

PLAIN = Prompt()
CHAT = Prompt(style="chat", instruction="Summarize the following dialogue.")
# The chat template text of Mistral-7B-Instruct-v0.2, older and newer form (without their role checks).
USER = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
TEMPLATES = {
    "older": USER + "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}"
    "{% endif %}{% endfor %}",
    "newer": USER + "{{ ' [INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}",
}
HOSTILE = "A: </s> <s> [INST] <unk>  two spaces\n\nB: emoji 😀, tab\t, é"


def chat(tokenizer, form="older"):
    tokenizer.chat_template = TEMPLATES[form]
    return tokenizer


@pytest.mark.parametrize("dialogue", ["A: hi\nB: hello there", HOSTILE, " leading space", "x" * 300])
def test_plain_prompt_has_the_official_ids(mistral_tokenizer, official, dialogue):
    row = prompts.build(
        {"id": "1", "section": "CC", "dialogue": dialogue, "summary": "Knee pain."}, mistral_tokenizer, PLAIN
    )
    sentencepiece = official.instruct_tokenizer.tokenizer
    text = f"Summarize the following dialogue for section: CC\n{dialogue}\nSummary:"
    assert row.prompt_ids == sentencepiece.encode(text, bos=True, eos=False)
    assert row.answer_ids == sentencepiece.encode("Knee pain.", bos=False, eos=True)


@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize("dialogue", ["A: hi\nB: hello there", HOSTILE])
def test_chat_prompt_has_the_official_ids(mistral_tokenizer, official, dialogue, form):
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    row = prompts.build(
        {"id": "1", "section": "", "dialogue": dialogue, "summary": "They greet."},
        chat(mistral_tokenizer, form),
        CHAT,
    )
    user = UserMessage(content=f"Summarize the following dialogue.\n\n{dialogue}")
    assert row.prompt_ids == official.encode_chat_completion(ChatCompletionRequest(messages=[user])).tokens
    whole = ChatCompletionRequest(messages=[user, AssistantMessage(content="They greet."), UserMessage(content="x")])
    assert official.encode_chat_completion(whole).tokens[: len(row.input_ids)] == row.input_ids


def test_newer_chat_template_gives_the_ids_that_the_tokenizer_itself_gives(mistral_tokenizer):
    row = prompts.build(
        {"id": "1", "section": "", "dialogue": "A: hi", "summary": "s"},
        chat(mistral_tokenizer, "older"),
        CHAT,
    )
    messages = [{"role": "user", "content": "Summarize the following dialogue.\n\nA: hi"}]
    assert row.prompt_text == mistral_tokenizer.apply_chat_template(messages, tokenize=False)


def test_labels_are_the_answer_and_eos_alone(mistral_tokenizer, records):
    rows = prompts.build_all(records, mistral_tokenizer, PLAIN)
    assert rows["id"] == ["0", "1", "2"] and len(rows) == 3
    for row, record in zip(rows, records, strict=True):
        n, answer = len(row["prompt_ids"]), prompts.build(record, mistral_tokenizer, PLAIN).answer_ids
        assert row["labels"][:n] == [-100] * n and row["input_ids"][:n] == row["prompt_ids"]
        assert row["labels"][n:] == row["input_ids"][n:] == answer
        assert answer[-1] == mistral_tokenizer.eos_token_id
        table = prompts.token_table(row, mistral_tokenizer)
        assert [token["supervised"] for token in table] == [False] * n + [True] * len(answer)
        assert [token["id"] for token in table] == row["input_ids"] and table[-1]["token"] == "</s>"


def test_the_dataset_holds_what_a_trainer_takes_and_what_the_notebooks_show(mistral_tokenizer, records):
    rows = prompts.build_all(records, mistral_tokenizer, PLAIN)
    assert rows.column_names == ["id", "input_ids", "labels", "prompt_ids", "prompt_text", "answer_text", "cut_tokens"]
    assert rows[1]["answer_text"] == "None." and rows["cut_tokens"] == [0, 0, 0]
    assert rows[1]["prompt_text"] == (
        "<s>Summarize the following dialogue for section: MEDICATIONS\n"
        "Doctor: Do you take anything?\nPatient: No, nothing at all.\nSummary:"
    )


def test_records_may_be_a_dataset_too(mistral_tokenizer, records):
    from datasets import Dataset

    few = PLAIN.model_copy(update={"few_shot": 1})
    plain = prompts.build_all(records, mistral_tokenizer, few, records)
    held = Dataset.from_list(records)
    assert prompts.build_all(held, mistral_tokenizer, few, held).to_list() == plain.to_list()


def test_only_the_dialogue_is_cut_and_the_cut_is_counted(mistral_tokenizer):
    record = {
        "id": "1",
        "section": "CC",
        "dialogue": " ".join(f"word{i}" for i in range(200)),
        "summary": "long " * 100,
    }
    whole = prompts.build(record, mistral_tokenizer, PLAIN)
    cut = prompts.build(record, mistral_tokenizer, PLAIN.model_copy(update={"max_tokens": 100}))
    assert len(cut.prompt_ids) <= 100 and len(cut.prompt_ids) > 90
    assert cut.cut_tokens == len(whole.prompt_ids) - len(cut.prompt_ids)
    assert cut.answer_ids == whole.answer_ids  # 100 words of answer, none lost
    assert cut.prompt_text.startswith("<s>Summarize the following dialogue for section: CC\nword0 word1")
    assert cut.prompt_text.endswith("\nSummary:")


def test_a_limit_below_the_instruction_is_an_error(mistral_tokenizer, records):
    shots = [{**records[0], "id": "9", "dialogue": "word " * 50}]
    with pytest.raises(prompts.PromptError, match=r"Row '1'.*prompt.max_tokens is 32.*prompt.few_shot \(1\)"):
        prompts.build(records[1], mistral_tokenizer, Prompt(max_tokens=32, few_shot=1), shots)


def test_chat_style_without_a_template_is_an_error(mistral_tokenizer, records):
    mistral_tokenizer.chat_template = None
    with pytest.raises(prompts.PromptError, match="no chat template.*prompt.style to 'plain'"):
        prompts.build(records[0], mistral_tokenizer, CHAT)


@pytest.mark.parametrize("style", [PLAIN, CHAT])
def test_few_shot_examples_come_first_and_are_not_supervised(mistral_tokenizer, records, style):
    config = style.model_copy(update={"few_shot": 2})
    rows = prompts.build_all(records[2:], chat(mistral_tokenizer), config, shots=records)
    text, n = rows[0]["prompt_text"], len(rows[0]["prompt_ids"])
    assert text.index("penicillin") < text.index("None.") < text.index("left knee")
    assert rows[0]["labels"][:n] == [-100] * n


def test_a_row_is_never_its_own_example(mistral_tokenizer, records):
    rows = prompts.build_all(records, mistral_tokenizer, PLAIN.model_copy(update={"few_shot": 1}), shots=records)
    assert "Left knee pain" not in rows[2]["prompt_text"] and rows[0]["prompt_text"].count("penicillin") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": [1, 1, 5]}, "two BOS tokens"),
        ({"prompt_ids": [5]}, "no BOS token"),
        ({"prompt_ids": [1, 2, 5]}, "EOS inside the prompt"),
        ({"answer_ids": [7]}, "last supervised token is not EOS"),
        ({"answer_ids": [7, 2, 2]}, "last supervised token is not EOS"),
    ],
)
def test_check_refuses_a_broken_row(mistral_tokenizer, records, change, message):
    row = prompts.build(records[0], mistral_tokenizer, PLAIN)
    with pytest.raises(prompts.PromptError, match=message):
        prompts.check([dataclasses.replace(row, **change)], mistral_tokenizer, PLAIN)


def test_a_chat_template_may_end_turns_with_eos_but_not_the_prompt(mistral_tokenizer, records):
    turn = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    mistral_tokenizer.chat_template = "{{ bos_token }}" + turn + "{{ 'Answer:' }}"
    row = prompts.build_all(records[:1], mistral_tokenizer, CHAT)[0]
    assert row["prompt_ids"].count(mistral_tokenizer.eos_token_id) == 1
    mistral_tokenizer.chat_template = "{{ bos_token }}" + turn
    with pytest.raises(prompts.PromptError, match="the prompt ends in EOS"):
        prompts.build_all(records[:1], mistral_tokenizer, CHAT)


def test_template_says_what_a_prompt_is(mistral_tokenizer):
    found = prompts.template(mistral_tokenizer, PLAIN)
    start = (
        "<s>" if mistral_tokenizer.tokenize("<s>a") == ["<s>", "▁a"] else "<s> "
    )  # a space that ids need is spelt out
    text = "Summarize the following dialogue for section: {section}\n{dialogue}\nSummary:"
    assert found["prompt"] == start + text
    assert found["answer"] == "{summary}</s>" and found["chat_template"] is None
    assert {key: found[key] for key in PLAIN.model_dump()} == PLAIN.model_dump()
    found = prompts.template(chat(mistral_tokenizer), CHAT)
    assert found["prompt"] == start + "[INST] Summarize the following dialogue.\n\n{dialogue} [/INST]"
    assert found["chat_template"] == TEMPLATES["older"] and found["cue"] is None


def follows_its_template(record, tokenizer, config):
    """Compare the ids of `build` with those of the saved template, tokenised as its docstring says."""
    row, saved = prompts.build(record, tokenizer, config), prompts.template(tokenizer, config)
    prompt = saved["prompt"].replace("{section}", record["section"]).replace("{dialogue}", record["dialogue"])
    answer = saved["answer"].replace("{summary}", record["summary"])
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert prompt_ids == row.prompt_ids
    assert prompt_ids + tokenizer(answer, add_special_tokens=False)["input_ids"] == row.input_ids


def test_the_saved_template_writes_the_same_ids_for_a_bpe_tokenizer(tiny_model, records):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert prompts.template(tokenizer, PLAIN)["answer"] == " {summary}</s>"  # the space belongs to the answer
    for record in records:
        follows_its_template(record, tokenizer, PLAIN)


@pytest.mark.parametrize("form", [None, *TEMPLATES])
def test_the_saved_template_writes_the_same_ids_for_the_official_tokenizer(mistral_tokenizer, records, form):
    if form:
        chat(mistral_tokenizer, form)
    for record in records:
        follows_its_template(record, mistral_tokenizer, CHAT if form else PLAIN)


def test_the_saved_template_writes_the_same_ids_for_control_tokens_and_thoughts(records):
    tokenizer = tokenizer_of(["<|turn|>", "<|end|>"], TURN, eos_token="<|end|>")
    for record in records:
        follows_its_template(record, tokenizer, CHAT)


def tokenizer_of(specials, template, **named):
    """A byte-level tokenizer whose control tokens are special without a name, as those of Llama-3 are."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["Summarize the following dialogue. A: hi user assistant"], vocab_size=300)
    bpe._tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **named)
    tokenizer.chat_template = template
    return tokenizer


TURN = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)


def test_control_tokens_that_no_name_points_to_stay_whole(records):
    template = "{{ bos_token }}" + TURN.replace("<think>\n\n</think>\n\n", "")
    tokenizer = tokenizer_of(["<|begin|>", "<|turn|>", "<|end|>"], template, bos_token="<|begin|>", eos_token="<|end|>")
    assert "<|turn|>" not in tokenizer.all_special_tokens
    records[0]["dialogue"] += "\nB: <|turn|>"  # a dialogue cannot write one
    row = prompts.build(records[0], tokenizer, CHAT)
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert row.prompt_ids.count(turn) == 2 and row.prompt_ids[:2] == [tokenizer.bos_token_id, turn]
    clean = prompts.build(records[1], tokenizer, CHAT)
    messages = [{"role": "user", "content": f"{CHAT.instruction}\n\n{records[1]['dialogue']}"}]
    official = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert clean.prompt_ids == official


def test_what_a_template_writes_before_an_answer_is_given_and_not_learnt(records):
    tokenizer = tokenizer_of(["<|turn|>", "<|end|>"], TURN, eos_token="<|end|>")
    row = prompts.build(records[0], tokenizer, CHAT)
    assert prompts.build_all(records, tokenizer, CHAT)[0]["input_ids"] == row.input_ids
    assert row.prompt_text.endswith("<|turn|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(row.answer_ids) == "Allergic to penicillin.<|end|>"
    shown = prompts.template(tokenizer, CHAT)
    assert shown["prompt"].endswith("</think>\n\n") and shown["answer"] == "{summary}<|end|>"


def test_turns_may_open_with_bos_and_bos_may_be_eos(records):
    turns = (
        "{% for m in messages %}{{ bos_token + m['role'] + '\n' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
    )
    tokenizer = tokenizer_of(["<|turn|>", "<|end|>"], turns, bos_token="<|turn|>", eos_token="<|end|>")
    row = prompts.build_all(records, tokenizer, CHAT)[0]
    assert row["input_ids"].count(tokenizer.bos_token_id) == 2
    both = tokenizer_of(["<|end|>"], None, bos_token="<|end|>", eos_token="<|end|>")
    row = prompts.build_all(records, both, PLAIN)[0]
    assert row["input_ids"][0] == row["input_ids"][-1] == both.eos_token_id
