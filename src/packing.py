"""Rows of an optimizer step without padding: dealt into forward passes of like size, each one flat sequence of whole rows.

No row sees another: positions restart at every row, and attention is told where rows begin (`kernels.varlen_attention`).
"""

import torch
import torch.nn.functional as F

from src.prompts import IGNORE


def bins(lengths: list[int], count: int) -> list[list[int]]:
    """Indices of `lengths` in `count` bins of nearly the same sum: longest first, each to the emptiest bin. Empty bins are left out."""
    filled, sums = [[] for _ in range(count)], [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        emptiest = min(range(count), key=sums.__getitem__)
        filled[emptiest].append(i)
        sums[emptiest] += lengths[i]
    return [sorted(b) for b in filled if b]


def passes_needed(steps: list[list[int]], lengths: list[int], budget: int) -> int:
    """The fewest forward passes a step that keep every pass of every step within `budget` tokens (a longer row passes alone)."""
    count = 1
    for step in steps:
        own = [lengths[i] for i in step]
        while count < len(step) and max(sum(own[i] for i in b) for b in bins(own, count)) > max(budget, max(own)):
            count += 1
    return count


def flatten(rows) -> dict[str, torch.Tensor]:
    """Encoded rows as one sequence of T tokens without padding.

    Returns input_ids, position_ids and labels of shape (1, T), the keyword arguments of variable-length attention
    (cu_seq_lens_q/k: int32, n + 1 row starts; max_length_q/k: longest row) and `tokens` = T. A label never crosses rows:
    the first token of each row is nobody's target.
    """
    lengths = [len(row.input_ids) for row in rows]
    ids = torch.tensor([i for row in rows for i in row.input_ids])
    labels = torch.tensor([label for row in rows for label in [IGNORE, *row.labels[1:]]])
    positions = torch.cat([torch.arange(n) for n in lengths])
    starts = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    longest = max(lengths)
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "labels": labels[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
        "tokens": len(ids),
    }
