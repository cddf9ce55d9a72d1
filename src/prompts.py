"""The only place where prompt text exists: a record becomes prompt and answer ids, to train, answer and show.

Plain style (base models):  <s>{instruction}\\n{dialogue}\\n{cue} {summary}</s>
Chat style (instruct models): the tokenizer's own chat template; the user's turn is instruction, empty line, dialogue.
The text of a dialogue or an example is never parsed for special tokens, so a patient who says "</s>" stays a patient.
"""

import functools
import itertools
import re
from dataclasses import dataclass

from datasets import Dataset

IGNORE = -100  # the label of a token that is not supervised (PyTorch's cross_entropy default)


class PromptError(ValueError):
    """A prompt that cannot be built as the recipe asks."""


@dataclass(frozen=True)
class Encoded:
    """One row as token ids: `prompt_ids` starts with the only BOS (where there is one), `answer_ids` ends in EOS."""

    id: str
    prompt_ids: list[int]
    answer_ids: list[int]
    prompt_text: str  # what the prompt reads like, special tokens spelt out
    answer_text: str
    cut_tokens: int  # prompt tokens lost because the end of the dialogue did not fit

    @property
    def input_ids(self) -> list[int]:
        return self.prompt_ids + self.answer_ids

    @property
    def labels(self) -> list[int]:
        """Completion only: IGNORE on the prompt, the ids themselves on answer and EOS."""
        return [IGNORE] * len(self.prompt_ids) + self.answer_ids


def build(record: dict, tokenizer, config, shots=()) -> Encoded:
    """Tokenise one record under a recipe's prompt settings (`recipe.prompt`).

    `shots`: records shown, with their summaries, before the dialogue. A prompt over config.max_tokens loses the end of
    its dialogue and nothing else; the answer is never cut. Raises PromptError when even an empty dialogue does not fit.
    """
    dialogue = record["dialogue"]
    pieces = _pieces(record, dialogue, tokenizer, config, shots)
    full = prompt_ids = _encode(pieces, tokenizer)
    if len(full) > config.max_tokens:
        alone = tokenizer(dialogue, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        offsets = alone["offset_mapping"]
        keep = len(offsets)
        while len(prompt_ids) > config.max_tokens:
            keep -= len(prompt_ids) - config.max_tokens
            if keep <= 0:
                raise PromptError(
                    f"Row {record['id']!r}: the prompt without its dialogue has about {len(full) - len(offsets)} "
                    f"tokens, and prompt.max_tokens is {config.max_tokens}. Raise prompt.max_tokens, or lower "
                    f"prompt.few_shot ({config.few_shot})."
                )
            pieces = _pieces(record, dialogue[: offsets[keep][0]].rstrip(), tokenizer, config, shots)
            prompt_ids = _encode(pieces, tokenizer)
    answer_text = record["summary"].strip()
    return Encoded(
        id=record["id"],
        prompt_ids=prompt_ids,
        answer_ids=_encode([(_lead(tokenizer, config) + answer_text, False)], tokenizer) + [tokenizer.eos_token_id],
        prompt_text="".join(text for text, _ in pieces),
        answer_text=answer_text,
        cut_tokens=len(full) - len(prompt_ids),
    )


def build_all(records, tokenizer, config, shots=()) -> Dataset:
    """`build` for every record, then `check`: a dataset with the columns of `dataset`.

    `shots`: the training records. The first ones are shown where config.few_shot asks for examples; a record is never
    its own example.
    """
    first = list(itertools.islice(shots, config.few_shot + 1))
    rows = [
        build(record, tokenizer, config, [s for s in first if s["dialogue"] != record["dialogue"]][: config.few_shot])
        for record in records
    ]
    check(rows, tokenizer, config)
    return dataset(rows)


def dataset(rows: list[Encoded]) -> Dataset:
    """The rows as a dataset: id, input_ids, labels, prompt_ids, prompt_text, answer_text, cut_tokens.

    `input_ids` and `labels` are what any transformers Trainer takes; `prompt_ids` is what generation starts from.
    """
    columns = ("id", "input_ids", "labels", "prompt_ids", "prompt_text", "answer_text", "cut_tokens")
    return Dataset.from_dict({name: [getattr(row, name) for row in rows] for name in columns})


def check(rows, tokenizer, config):
    """What must hold for every row, or training teaches something else; raises PromptError naming the row.

    One BOS at the start, not two; prompt tokens unsupervised; the answer and its EOS supervised, in that order; neither
    token inside a plain prompt; no EOS at the end of a chat prompt (it ends turns; the next one is the model's).
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for row in rows:
        supervised = [label for label in row.labels if label != IGNORE]
        inside = row.prompt_ids[0 if bos is None else 1 :]
        broken = {
            "no BOS token at the start": bos is not None and row.input_ids[0] != bos,
            "two BOS tokens at the start, expected one": bos is not None and row.input_ids[:2] == [bos, bos],
            "BOS or EOS inside the prompt": config.style == "plain" and not {bos, eos}.isdisjoint(inside),
            "the prompt ends in EOS": row.prompt_ids[-1] == eos,
            "the last supervised token is not EOS": supervised[-1:] != [eos] or supervised.count(eos) != 1,
            "the labels are not the answer alone": (supervised, len(row.labels))
            != (row.answer_ids, len(row.input_ids)),
        }
        if any(broken.values()):
            problem = next(text for text, is_broken in broken.items() if is_broken)
            misfit = f"The chat template or the tokenizer does not fit prompt.style {config.style!r}."
            raise PromptError(f"Row {row.id!r}: {problem}. {misfit}")


def token_table(row: dict, tokenizer) -> list[dict]:
    """Token by token: id, the text it stands for, whether the loss sees it. The notebooks show this."""
    return [
        {"id": i, "token": tokenizer.convert_ids_to_tokens(i), "supervised": label != IGNORE}
        for i, label in zip(row["input_ids"], row["labels"], strict=True)
    ]


def template(tokenizer, config) -> dict:
    """What is needed to write the same prompt elsewhere; saved beside the adapter.

    "prompt" ends where the answer starts. It spells special tokens out: replace {section} and {dialogue}, then tokenise
    it with add_special_tokens=False. "answer" is what follows in training, tokenised on its own in the same way.
    """
    example = {"id": "template", "section": "{section}", "dialogue": "{dialogue}", "summary": "{summary}"}
    pieces = _pieces(example, "{dialogue}", tokenizer, config, ())
    prompt = "".join(text for text, _ in pieces)
    if tokenizer(prompt, add_special_tokens=False)["input_ids"] != _encode(pieces, tokenizer):
        # This tokenizer adds a space to the start of a text, but not after a special token inside of one: spell it out.
        prompt = re.sub(f"{_specials(tokenizer, len(tokenizer)).pattern} ?", r"\1 ", prompt)
    return {
        **config.model_dump(),
        "cue": config.cue if config.style == "plain" else None,
        "chat_template": tokenizer.chat_template if config.style == "chat" else None,
        "prompt": prompt,
        "answer": _lead(tokenizer, config) + "{summary}" + tokenizer.eos_token,
    }


def _pieces(record, dialogue, tokenizer, config, shots) -> list[tuple[str, bool]]:
    """The prompt as (text, trusted): only trusted text, which is the template's own, may name special tokens."""
    shown = [(shot, shot["dialogue"], shot["summary"].strip()) for shot in shots] + [(record, dialogue, None)]
    if config.style == "plain":
        pieces = [(tokenizer.bos_token or "", True)]
        for example, text, answer in shown:
            asked = f"{_instruction(example, config)}\n{text}\n{config.cue}"
            pieces += [(asked, False), (f" {answer}\n\n", False)]
        return pieces[:-1]  # the last answer is the model's
    if not tokenizer.chat_template:
        raise PromptError(
            "prompt.style is 'chat', and the tokenizer of this base model has no chat template: choose an instruct "
            "model, or set prompt.style to 'plain'."
        )
    turns = []
    for example, text, answer in shown:
        turns += [("user", f"{_instruction(example, config)}\n\n{text}"), ("assistant", answer)]
    # Markers stand in for the contents while the template is rendered, so that its text and theirs stay apart.
    marked = {f"\ue000{number}\ue001": turn for number, turn in enumerate(turns[:-1])}  # the last is the model's
    messages = [{"role": role, "content": marker} for marker, (role, _) in marked.items()]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    start = _turn_start(tokenizer, tokenizer.chat_template)
    if start.strip():  # e.g. an empty block of thoughts: given, not to be learnt or generated
        rendered += start
    parts = re.split("(" + "|".join(map(re.escape, marked)) + ")", rendered)
    return [(marked[part][1], False) if part in marked else (part, True) for part in parts if part]


def _instruction(record, config) -> str:
    return config.instruction.replace("{section}", record["section"])


def _lead(tokenizer, config) -> str:
    """The space before an answer; none where the tokenizer adds it (SentencePiece) or the template has none."""
    if _adds_space(tokenizer):
        return ""
    if config.style == "plain":
        return " "
    lead = _turn_start(tokenizer, tokenizer.chat_template)
    return "" if lead.strip() else lead


@functools.lru_cache(maxsize=4)
def _turn_start(tokenizer, template: str) -> str:
    """What a chat template writes between the generation prompt and an answer."""
    turn = [{"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "\ue001"}]
    prompt = tokenizer.apply_chat_template(turn[:1], chat_template=template, tokenize=False, add_generation_prompt=True)
    both = tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False)
    return both[len(prompt) : both.index("\ue001")] if both.startswith(prompt) else ""


def _adds_space(tokenizer) -> bool:
    return tokenizer.tokenize("a") == tokenizer.tokenize(" a") or tokenizer.tokenize("a")[0].startswith("▁")


@functools.lru_cache(maxsize=4)
def _specials(tokenizer, size: int) -> re.Pattern:
    """Every special token: the named ones (BOS, ...) and a chat template's control tokens.

    `size`: of the tokenizer, so that tokens added later are not missed in the cache.
    """
    names = {*tokenizer.all_special_tokens, *(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)}
    return re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")")


def _encode(pieces, tokenizer) -> list[int]:
    """Ids of the pieces as one text. Special tokens are recognised in trusted pieces only."""
    specials = _specials(tokenizer, len(tokenizer))
    parts: list[str | int] = []
    for text, trusted in pieces:
        for part in specials.split(text) if trusted else [text]:
            if trusted and specials.fullmatch(part):
                parts.append(tokenizer.convert_tokens_to_ids(part))
            elif part and parts and isinstance(parts[-1], str):
                parts[-1] += part
            elif part:
                parts.append(part)
    ids = []
    for number, part in enumerate(parts):
        if isinstance(part, int):
            ids.append(part)
            continue
        if number and part.startswith(" ") and _adds_space(tokenizer):
            part = part[1:]  # SentencePiece adds the space after a special token itself
        ids += tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids
