"""Which rows go into a forward pass, and their tensors: packed without padding, or padded with rows of like length together.

A row is a mapping with input_ids and labels, lists of one length; labels are IGNORE where the loss does not look.
"""

import random

import torch
import torch.nn.functional as F

from src.engine.attention import flat_rows

IGNORE = -100  # the label of a token that is not supervised (PyTorch's cross_entropy default)


class StepSampler:
    """Row indices of every forward pass of an epoch; `passes` of them make an optimizer step of exactly `rows_per_step` rows.

    Rows are shuffled by (seed, epoch) and cut into steps, the same ones for every number of passes, packed or not: a step
    holds what the recipe says on every machine. Within a step, rows are dealt into passes of like size (packed) or of like
    length (padded). The last step of an epoch may hold fewer rows.
    """

    def __init__(self, lengths: list[int], rows_per_step: int, passes: int, seed: int, packed: bool):
        self.lengths, self.rows_per_step, self.passes, self.seed, self.packed = (
            lengths, rows_per_step, passes, seed, packed,
        )  # fmt: skip
        self.epoch = 0

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


def pass_tokens(lengths: list[int], packed: bool) -> int:
    """Tokens that a forward pass over rows of these lengths computes, padding included."""
    return sum(lengths) if packed else max(lengths) * len(lengths)


def pad(rows, pad_id: int) -> dict:
    """Right-padded rows: input_ids, attention_mask and labels (rows, longest row), and the entries of `_supervise`.

    Padding is masked by length, not by id.
    """
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORE)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), 1
    return {"input_ids": ids, "attention_mask": mask} | _supervise(labels, rows)


def pack(rows) -> dict:
    """Rows as one sequence of T tokens without padding: input_ids, position_ids and labels (1, T), and `_supervise`'s entries."""
    labels = torch.tensor([IGNORE if i == 0 else label for row in rows for i, label in enumerate(row["labels"])])
    flat = flat_rows([i for row in rows for i in row["input_ids"]], [len(row["input_ids"]) for row in rows])
    return flat | _supervise(labels[None], rows)


def _supervise(labels: torch.Tensor, rows) -> dict:
    """labels; `positions`: columns whose logits are needed; `targets` (rows, positions); counts of supervised and real tokens.

    Computed here, on the CPU, so that a training step never waits for the GPU.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # position i predicts token i + 1
    positions = (shifted != IGNORE).any(0).nonzero().squeeze(1)
    targets = shifted[:, positions]
    return {
        "labels": labels,
        "positions": positions,
        "targets": targets,
        "supervised": int((targets != IGNORE).sum()),
        "tokens": sum(len(row["input_ids"]) for row in rows),
    }
