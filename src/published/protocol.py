"""What the two published recipes do with data: split, prompts and what is scored."""

from pathlib import Path

import pandas as pd
from transformers import PreTrainedTokenizerFast

RECIPE2_TURN = "You are a helpful assistant. Your task is to generate following dialogue summarization:"


def official_tokenizer(prepend: str = "always"):
    """Mistral's tokenizer of v0.1 and Instruct-v0.2 from mistral-common's file, as the hub's tokenizer.json has it.

    Merges are ordered by piece score; transformers' own conversion orders them by id, which differs on repeated spaces.
    `prepend`: "always" (Mistral-7B-v0.1) or "first" (the newer Instruct-v0.2 files). Adds BOS unless told otherwise.
    """
    import mistral_common
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    path = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    sp = sentencepiece.SentencePieceProcessor(str(path))
    vocabulary = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    splits = [
        (-sp.get_score(i), vocabulary[p[:k]], vocabulary[p[k:]], p[:k], p[k:])
        for p, i in vocabulary.items()
        for k in range(1, len(p))
        if p[:k] in vocabulary and p[k:] in vocabulary
    ]
    merges = [(left, right) for *_, left, right in sorted(splits)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def recipe1_split(rows: list[dict]) -> tuple[list[int], list[int]]:
    """Row numbers of recipe 1's training and validation set.

    It draws 90% of the training file, resets the index and then drops *that* index from the file: the rest is the
    file's last rows, most of which were drawn.
    """
    drawn = pd.Series(range(len(rows))).sample(frac=0.9, random_state=42)
    return drawn.tolist(), list(range(len(drawn), len(rows)))


def recipe1_prompt(row: dict) -> str:
    return f"Summarize the following dialogue for section: {row['section']}\n{row['dialogue']}\nSummary:"


def recipe2_prompt(dialogue: str) -> str:
    """What recipe 2 gives its models to continue: the training text with the summary left out."""
    return f"<s>[INST] {RECIPE2_TURN}\n{dialogue}[/INST]\n</s>"


def recipe1_protocol(rows: list[dict], validation: list[int], tokenizer) -> dict[str, list[str]]:
    """What recipe 1 would have scored as the answers of three systems: prompt (512 tokens) and answer (200).

    A perfect summariser answers with the reference, a silent one with nothing, a rambling one with another dialogue.
    """

    def cut(text, tokens):
        ids = tokenizer(text)["input_ids"][: tokens + 1]  # and BOS
        return tokenizer.decode(ids, skip_special_tokens=True)

    chosen = [rows[i] for i in validation]
    long = sorted(rows[: validation[0]], key=lambda row: -len(row["dialogue"]))  # dialogues of 200 tokens at least
    answers = {
        "perfect (the reference)": [row["summary"] for row in chosen],
        "silent (nothing)": ["" for _ in chosen],
        "rambling (200 tokens of another dialogue)": [long[i]["dialogue"] for i in range(len(chosen))],
    }
    return {
        name: [f"{cut(recipe1_prompt(row), 511)} {cut(text, 200)}" for row, text in zip(chosen, texts, strict=True)]
        for name, texts in answers.items()
    }
