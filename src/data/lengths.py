"""Lengths that a person should know of before training."""

import sys


def warn_of_lengths(rows: dict, cap: int, positions: int | None = None) -> None:
    """Say on stderr which references are longer than `cap` tokens (EOS included), and which rows than the base knows.

    rows: {split: dataset of `build_all`}. cap: generation.max_new_tokens. positions: that the base model was trained
    with, in tokens; None: not known. What to set is named.
    """
    tokens = {
        name: [len(labels) - len(prompt) for labels, prompt in zip(part["labels"], part["prompt_ids"], strict=True)]
        for name, part in rows.items()
    }
    over = {name: sum(n > cap for n in found) for name, found in tokens.items()}
    if any(over.values()):
        found = ", ".join(f"{n} of {len(tokens[name])} {name}" for name, n in over.items() if n)
        print(
            f"Warning: {found} references are longer than generation.max_new_tokens = {cap}, so an answer cannot be as "
            f'long: OVERRIDES = {{"generation.max_new_tokens": {max(map(max, tokens.values()))}}} lets them all fit.',
            file=sys.stderr,
        )
    longest = max(len(prompt) for part in rows.values() for prompt in part["prompt_ids"])
    if positions and longest + cap > positions:
        print(
            f"Warning: a prompt of {longest} tokens and an answer of up to {cap} are more than the {positions} tokens "
            f'that the base model was made for: OVERRIDES = {{"prompt.max_tokens": {positions - cap}}} keeps to them.',
            file=sys.stderr,
        )
