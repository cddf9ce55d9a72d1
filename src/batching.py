"""Which rows go into a forward pass, and their tensors: packed without padding, or padded with rows of like length together.

An optimizer step always holds the recipe's `batch_size` rows, in however many forward passes. Packed, no row sees another:
positions restart at every row, and attention is told where rows begin (`kernels.varlen_attention`).
"""

import math
import random

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device

from src.prompts import IGNORE

GROUP = (
    16  # padded: optimizer steps whose rows are sorted by length together, so that a batch holds rows of like length
)


class StepSampler:
    """Row indices of every forward pass of an epoch; `passes` of them make an optimizer step of exactly `batch_size` rows.

    Rows are shuffled by (seed, epoch). Packed: the step's rows are dealt into passes of like size. Padded: rows are sorted by
    length within groups of GROUP steps before they are cut into steps, and the steps shuffled. The last step of an epoch
    may hold fewer rows.
    """

    def __init__(self, lengths: list[int], batch_size: int, passes: int, seed: int, packed: bool):
        self.lengths, self.batch_size, self.passes, self.seed, self.packed = lengths, batch_size, passes, seed, packed
        self.epoch = 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole * self.passes + (min(rest, self.passes) if self.packed else math.ceil(rest / self._rows))

    @property
    def _rows(self) -> int:
        return self.batch_size // self.passes

    def __iter__(self):
        generator = random.Random(f"{self.seed}-{self.epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        if not self.packed:
            span = GROUP * self.batch_size
            groups = [sorted(order[i : i + span], key=self.lengths.__getitem__) for i in range(0, len(order), span)]
            order = [i for group in groups for i in group]
        steps = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        short = [steps.pop()] if len(steps[-1]) < self.batch_size else []  # stays at the end of the epoch
        if not self.packed:
            generator.shuffle(steps)
        for step in steps + short:
            if self.packed:
                for part in bins([self.lengths[i] for i in step], min(self.passes, len(step))):
                    yield [step[i] for i in part]
            else:
                yield from (step[i : i + self._rows] for i in range(0, len(step), self._rows))


def bins(lengths: list[int], count: int) -> list[list[int]]:
    """Indices of `lengths` in `count` bins of nearly the same sum: longest first, each to the emptiest bin."""
    filled, sums = [[] for _ in range(count)], [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        emptiest = min(range(count), key=sums.__getitem__)
        filled[emptiest].append(i)
        sums[emptiest] += lengths[i]
    return [sorted(b) for b in filled]


def pad(rows, pad_id: int) -> dict:
    """Right-padded rows: input_ids, attention_mask and labels of shape (rows, longest row), and `_supervise`'s entries.

    Padding is masked by length, not by id.
    """
    width = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORE)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row.input_ids), torch.tensor(row.labels), 1
    return {"input_ids": ids, "attention_mask": mask} | _supervise(labels, rows)


def pack(rows) -> dict:
    """Rows as one sequence of T tokens without padding: input_ids, position_ids and labels of shape (1, T), `_supervise`'s entries.

    Also the keyword arguments of variable-length attention: cu_seq_lens_q and _k (int32, n + 1 row starts), max_length_q and
    _k (tokens of the longest row). A label never crosses rows: the first token of each row is nobody's target.
    """
    ids = [i for row in rows for i in row.input_ids]
    labels = torch.tensor([label for row in rows for label in [IGNORE, *row.labels[1:]]])
    return flat_rows(ids, [len(row.input_ids) for row in rows]) | _supervise(labels[None], rows)


def flat_rows(ids: list[int], lengths: list[int]) -> dict:
    """`pack` without labels: the model's inputs for rows of these lengths laid end to end in `ids`."""
    starts = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    return {
        "input_ids": torch.tensor(ids)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@torch.no_grad()
def rows_stay_apart(model) -> bool:
    """Whether a row packed behind another gets the logits that it gets alone; tried once for each model.

    True of attention alone. Layers that carry a state along the sequence (Mamba, convolutions), or that number positions
    themselves, mix packed rows.
    """
    if not hasattr(model, "packs_rows"):
        training = model.training
        model.eval()
        first, second = [5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16]
        flat = flat_rows(first + second, [len(first), len(second)])
        packed = model(**send_to_device(flat, model.device), use_cache=False).logits[0, len(first) :].float()
        alone = model(input_ids=torch.tensor([second], device=model.device), use_cache=False).logits[0].float()
        # 16-bit rounding moves logits by hundredths of their norm, another row's tokens by the whole of it
        model.packs_rows = bool((packed - alone).norm() <= 0.25 * alone.norm())
        model.train(training)
    return model.packs_rows


def _supervise(labels: torch.Tensor, rows) -> dict:
    """Labels (rows, T); `positions`: columns whose logits are needed; `targets` (rows, positions); counts of real and supervised tokens.

    Worked out here, on the CPU, so that a training step never waits for the GPU.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # position i predicts token i + 1
    positions = (shifted != IGNORE).any(0).nonzero().squeeze(1)
    targets = shifted[:, positions]
    return {
        "labels": labels,
        "positions": positions,
        "targets": targets,
        "supervised": int((targets != IGNORE).sum()),
        "tokens": sum(len(row.input_ids) for row in rows),
    }
