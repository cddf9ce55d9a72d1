"""Leaks: which dialogues are the same as, or nearly the same as, one that a model is trained on."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

SEQUENCE = 8  # words; dialogues are compared by their 8-word sequences
NEAR = 0.5  # near duplicates share at least this part of the smaller one's sequences
BOILERPLATE = 200  # training rows; a sequence in more of them is a greeting or a form, and not compared


def key(row: dict) -> str:
    """What "the same dialogue" means: lower case, without punctuation and blanks; emoji alone just without blanks."""
    return re.sub(r"[\W_]+", "", row["dialogue"].lower()) or re.sub(r"\s+", "", row["dialogue"])


def sequences(row: dict) -> np.ndarray:
    """Hashes of the dialogue's 8-word sequences: sorted, each once."""
    words = re.findall(r"\w+", row["dialogue"].lower())
    starts = range(len(words) - SEQUENCE + 1)
    return np.unique(np.array([hash(tuple(words[start : start + SEQUENCE])) for start in starts], dtype=np.int64))


def overlaps(records: list[np.ndarray], train: list[np.ndarray]) -> Iterator[dict[int, float]]:
    """For the `sequences` of each record, {position in train: shared ones / those of the smaller}, most shared first.

    Sequences that occur in more than 200 training rows (boilerplate) are skipped on both sides, so that a dialogue
    copied more often than that is not found. A dialogue of fewer than 8 words overlaps with none.
    """
    values = np.concatenate([np.empty(0, np.int64), *train])
    order = np.argsort(values, kind="stable")
    rows = np.repeat(np.arange(len(train)), [len(row) for row in train])[order]
    known, first, count = np.unique(values[order], return_index=True, return_counts=True)
    rare = count <= BOILERPLATE
    sizes = np.bincount(rows[np.repeat(rare, count)], minlength=len(train))
    for record in records:
        at = np.searchsorted(known, record)
        at[at == len(known)] = -1
        both = known[at] == record if len(known) else np.zeros(len(record), dtype=bool)
        size, at = len(record) - (both & ~rare[at]).sum() if len(known) else len(record), at[both]
        at = at[rare[at]]
        shared = Counter(row for begin, n in zip(first[at], count[at], strict=True) for row in rows[begin : begin + n])
        most_first = sorted(shared, key=lambda position: (-shared[position], position))
        yield {int(n): shared[n] / min(size, sizes[n]) for n in most_first}


def told(rows: list, what: str) -> Iterator:
    """The rows; a line is printed after every 20,000, which take a few seconds."""
    for number, row in enumerate(rows, 1):
        yield row
        if number % 20_000 == 0:
            print(f"leak audit: {number:,} of {len(rows):,} {what}", flush=True)


def seen(records: list[dict], train: list[dict]) -> dict[str, list[str]]:
    """Ids of the records whose dialogue ("same"), or only a near duplicate of it ("near"), was trained on."""
    found = audit({"train": train, "records": records})
    return {
        "same": found["across"]["records in train"],
        "near": [hit["id"] for hit in found["near"]["records in train"]],
    }


def audit(rows: dict[str, list[dict]]) -> dict:
    """Find dialogues that occur twice, within and across splits.

    Returns {"within": {split: ids of extra copies}, "across": {"test in train": ids}, "near": {"test in train": [{"id",
    "other", "share"}]}}. `near` holds dialogues that are no copy, and share at least half of the smaller one's 8-word
    sequences with the row that they share most with.
    """
    keys = {split: [key(row) for row in part] for split, part in rows.items()}
    compared = {split: [sequences(row) for row in told(part, f"rows of {split} read")] for split, part in rows.items()}
    within, across, near = {}, {}, {}
    for split, part in rows.items():
        first = {dialogue: n for n, dialogue in reversed(list(enumerate(keys[split])))}
        within[split] = [row["id"] for n, row in enumerate(part) if first[keys[split][n]] != n]
    for train, held_out in itertools.combinations(rows, 2):
        pair, trained, found = f"{held_out} in {train}", set(keys[train]), overlaps(compared[held_out], compared[train])
        across[pair], near[pair] = [], []
        compare = told(rows[held_out], f"rows of {held_out} compared with {train}")
        for row, dialogue, shares in zip(compare, keys[held_out], found, strict=True):
            other, share = next(iter(shares.items()), (None, 0))
            if dialogue in trained:
                across[pair].append(row["id"])
            elif share >= NEAR:
                near[pair].append({"id": row["id"], "other": rows[train][other]["id"], "share": round(share, 3)})
    return {"within": within, "across": across, "near": near}
