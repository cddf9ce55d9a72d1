"""Lengths that a person should know of before training."""

import sys


def warn_of_long_references(rows: dict, cap: int) -> None:
    """Say on stderr which splits have references of more than `cap` tokens (EOS included), and the cap they ask for.

    rows: {split: dataset of `build_all`}. cap: generation.max_new_tokens.
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
