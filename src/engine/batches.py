"""Which rows go into a forward pass, and their tensors: packed without padding, or padded to the longest one.

A row is a mapping with input_ids and labels, two lists of one length. Labels are IGNORE where the loss does not look.
"""

import math
import random

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from src.engine.attention import flat_rows

EVAL_ROWS = 16  # in a forward pass of the validation loss, at most
IGNORE = -100  # the label of a token that is not supervised (PyTorch's cross_entropy default)


class StepSampler:
    """Row indices of every forward pass of an epoch; `passes` of them make an optimizer step of `rows_per_step` rows.

    Rows are shuffled by (seed, epoch) and cut into steps, the same ones on every machine. The rows of a step are dealt
    into passes of similar size (packed) or of similar length (padded). The last step of an epoch may hold fewer rows.
    Where `ranks` processes share a step, each makes as many passes and this gives those of one `rank`: a pass is empty
    where there are fewer rows than passes.
    """

    def __init__(self, lengths: list[int], rows_per_step: int, passes: int, seed: int, packed: bool, rank=0, ranks=1):
        self.lengths, self.rows_per_step, self.passes = lengths, rows_per_step, passes
        self.seed, self.packed, self.epoch, self.rank, self.ranks = seed, packed, 0, rank, ranks

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.rows_per_step)
        return whole * self.passes + min(math.ceil(rest / self.ranks), self.passes)

    def __iter__(self):
        for step in steps(len(self.lengths), self.rows_per_step, self.seed, self.epoch):
            lengths, count = [self.lengths[i] for i in step], min(self.passes, math.ceil(len(step) / self.ranks))
            parts = bins(lengths, count * self.ranks) if self.packed else runs(lengths, count * self.ranks)
            for part in parts[self.rank :: self.ranks]:
                yield [step[i] for i in part]


def steps(rows: int, rows_per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """The numbers of the rows of every optimizer step of an epoch, which depend on nothing else."""
    order = list(range(rows))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return [order[start : start + rows_per_step] for start in range(0, rows, rows_per_step)]


def tokens_until(step: int, lengths: list[int], rows_per_step: int, seed: int) -> int:
    """Tokens of all rows (as often as they were trained on) of the first `step` optimizer steps of a training."""
    epochs, rest = divmod(step, math.ceil(len(lengths) / rows_per_step))
    begun = steps(len(lengths), rows_per_step, seed, epochs)[:rest]
    return epochs * sum(lengths) + sum(lengths[i] for rows in begun for i in rows)


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


def validation_batches(rows, tokens: int) -> list[list]:
    """Rows of similar length, at most EVAL_ROWS together and no more than `tokens` with padding; one row at least."""
    found = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        size = len(found[-1]) + 1 if found else 0
        if not found or size > EVAL_ROWS or size * len(row["input_ids"]) > tokens:
            found.append([])
        found[-1].append(row)
    return found


def pack_to(rows, multiple: int, count: int, positions: int) -> dict:
    """`pack` with the shapes of other steps: so many positions and `count` rows, of a multiple of so many tokens.

    Rows without labels are added (one at least), and positions without a target. Loss and gradients stay the same.
    """
    missing, own = count - len(rows), sum(len(row["input_ids"]) for row in rows)
    size = multiple * -(-(own + missing) // multiple)
    empty = [{"input_ids": [0] * n, "labels": [IGNORE] * n} for n in [1] * (missing - 1) + [size - own - missing + 1]]
    found = pack([*rows, *empty])
    more = (0, positions - len(found["positions"]))
    found["positions"], found["targets"] = F.pad(found["positions"], more), F.pad(found["targets"], more, value=IGNORE)
    return found | {"max_length_q": size, "max_length_k": size, "tokens": own}


def _supervise(labels: torch.Tensor, rows) -> dict:
    """labels; `positions`: columns whose logits are needed; `targets` (rows, positions); supervised and real tokens."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # position i predicts token i + 1
    positions = (shifted != IGNORE).any(0).nonzero().squeeze(1)
    targets = shifted[:, positions]
    supervised, tokens = int((targets != IGNORE).sum()), sum(len(row["input_ids"]) for row in rows)
    return {
        "labels": labels, "positions": positions, "targets": targets, "supervised": supervised, "tokens": tokens,
    }  # fmt: skip
