"""Which rows go into a forward pass, and their tensors: packed without padding, or padded to the longest one.

A row is a mapping with input_ids and labels, two lists of one length. Labels are IGNORE where the loss does not look.
"""

import random

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from src.engine.attention import flat_rows

IGNORE = -100  # the label of a token that is not supervised (PyTorch's cross_entropy default)


class StepSampler:
    """Row indices of every forward pass of an epoch; `passes` of them make an optimizer step of `rows_per_step` rows.

    Rows are shuffled by (seed, epoch) and cut into steps, the same ones on every machine. The rows of a step are dealt
    into passes of similar size (packed) or of similar length (padded). The last step of an epoch may hold fewer rows.
    """

    def __init__(self, lengths: list[int], rows_per_step: int, passes: int, seed: int, packed: bool):
        self.lengths, self.rows_per_step, self.passes = lengths, rows_per_step, passes
        self.seed, self.packed, self.epoch = seed, packed, 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.rows_per_step)
        return whole * self.passes + min(rest, self.passes)

    def __iter__(self):
        order = list(range(len(self.lengths)))
        random.Random(f"{self.seed}-{self.epoch}").shuffle(order)
        for start in range(0, len(order), self.rows_per_step):
            step = order[start : start + self.rows_per_step]
            lengths, count = [self.lengths[i] for i in step], min(self.passes, len(step))
            for part in bins(lengths, count) if self.packed else runs(lengths, count):
                yield [step[i] for i in part]


def bins(lengths: list[int], count: int) -> list[list[int]]:
    """Indices of `lengths` in `count` bins of nearly the same sum: longest first, each to the emptiest bin."""
    filled, sums = [[] for _ in range(count)], [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        emptiest = min(range(count), key=sums.__getitem__)
        filled[emptiest].append(i)
        sums[emptiest] += lengths[i]
    return [sorted(b) for b in filled]


def runs(lengths: list[int], count: int) -> list[list[int]]:
    """Indices of `lengths` sorted by length and cut into `count` runs, which differ by one row at most."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    edges = [round(len(order) * n / count) for n in range(count + 1)]
    return [order[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def pad(rows, pad_id: int) -> dict:
    """Right-padded rows: input_ids and attention_mask (rows, longest row), and what `_supervise` adds."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor([IGNORE, *row["labels"][1:]]) for row in rows]  # nothing predicts a first token
    return {
        "input_ids": pad_sequence(ids, True, pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0),
    } | _supervise(pad_sequence(labels, True, IGNORE), rows)


def pack(rows) -> dict:
    """Rows as one sequence of T tokens without padding: what `flat_rows` and `_supervise` return."""
    flat = flat_rows([i for row in rows for i in row["input_ids"]], [len(row["input_ids"]) for row in rows])
    labels = [label for row in rows for label in [IGNORE, *row["labels"][1:]]]  # no row predicts the next one's first
    return flat | _supervise(torch.tensor([labels]), rows)


def _supervise(labels: torch.Tensor, rows) -> dict:
    """labels; `positions`: columns whose logits are needed; `targets` (rows, positions); supervised and real tokens."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # position i predicts token i + 1
    positions = (shifted != IGNORE).any(0).nonzero().squeeze(1)
    targets = shifted[:, positions]
    supervised, tokens = int((targets != IGNORE).sum()), sum(len(row["input_ids"]) for row in rows)
    return {
        "labels": labels, "positions": positions, "targets": targets, "supervised": supervised, "tokens": tokens,
    }  # fmt: skip
