"""Leaks: which dialogues are the same as, or nearly the same as, one that a model is trained on."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

SEQUENCE = 8  # words; dialogues are compared by their 8-word sequences
NEAR = 0.5  # near duplicates share at least this part of the smaller one's sequences
BOILERPLATE = 200  # training rows; a sequence in more of them is a greeting or a form, and not compared


def key(row: dict) -> str:
    """What "the same dialogue" means: lower case, without punctuation and blanks; emoji alone just without blanks."""
    return re.sub(r"[\W_]+", "", row["dialogue"].lower()) or re.sub(r"\s+", "", row["dialogue"])


def sequences(row: dict) -> set[int]:
    """Hashes of the dialogue's 8-word sequences."""
    words = re.findall(r"\w+", row["dialogue"].lower())
    return {hash(tuple(words[start : start + SEQUENCE])) for start in range(len(words) - SEQUENCE + 1)}


def overlaps(records: list[set[int]], train: list[set[int]]) -> Iterator[dict[int, float]]:
    """For the `sequences` of each record, {position in train: shared ones / those of the smaller}, most shared first.

    Sequences that occur in more than 200 training rows (boilerplate) are skipped on both sides, so that a dialogue
    copied more often than that is not found. A dialogue of fewer than 8 words overlaps with none.
    """
    rows_with, index = Counter(), defaultdict(list)
    for row in train:
        rows_with.update(row)
    common = {sequence for sequence, n in rows_with.items() if n > BOILERPLATE}
    records = [record - common for record in records]
    wanted = set().union(*records)
    for position, row in enumerate(train):
        for sequence in wanted & row:
            index[sequence].append(position)
    for record in records:
        shared = Counter(position for sequence in record for position in index.get(sequence, ()))
        most_first = sorted(shared, key=lambda position: (-shared[position], position))
        yield {n: shared[n] / min(len(record), len(train[n] - common)) for n in most_first}


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
    compared = {split: [sequences(row) for row in part] for split, part in rows.items()}
    within, across, near = {}, {}, {}
    for split, part in rows.items():
        first = {dialogue: n for n, dialogue in reversed(list(enumerate(keys[split])))}
        within[split] = [row["id"] for n, row in enumerate(part) if first[keys[split][n]] != n]
    for train, held_out in itertools.combinations(rows, 2):
        pair, trained, found = f"{held_out} in {train}", set(keys[train]), overlaps(compared[held_out], compared[train])
        across[pair], near[pair] = [], []
        for row, dialogue, shares in zip(rows[held_out], keys[held_out], found, strict=True):
            other, share = next(iter(shares.items()), (None, 0))
            if dialogue in trained:
                across[pair].append(row["id"])
            elif share >= NEAR:
                near[pair].append({"id": row["id"], "other": rows[train][other]["id"], "share": round(share, 3)})
    return {"within": within, "across": across, "near": near}
