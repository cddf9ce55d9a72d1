"""Dropout of an adapter's input, one mask a projection, drawn from a seed wherever it is needed and never kept.

An element stays if a hash of (seed, token, column) is large enough. These are the plain functions; CUDA's are in
dropout_cuda and read the input once for all projections. x (T, in); a (projections x r, in), every A of a group under
each other; u and du (T, projections x r); seeds (projections,) int32; p: the share of zeros.
"""

import torch

ONES = 0xFFFFFFFF  # arithmetic modulo 2**32, in int64


def draw_seeds(count: int, device: torch.device) -> torch.Tensor:
    """Seeds (count,) from the device's own generator: set_seed repeats them, and a CUDA graph draws new ones."""
    return torch.randint(0, 2**31 - 1, (count,), dtype=torch.int32, device=device)


def mix(h: torch.Tensor) -> torch.Tensor:
    """A hash of 32 bits in which every bit depends on every bit (Wellons' lowbias32)."""
    h = (h ^ (h >> 16)) * 0x21F0AAAD & ONES
    h = (h ^ (h >> 15)) * 0x735A2D97 & ONES
    return h ^ (h >> 15)


def kept(seed: torch.Tensor, p: float, tokens: int, width: int) -> torch.Tensor:
    """The mask (tokens, width) of one seed: true where the input stays."""
    seed, t, k = seed.long(), *(torch.arange(n, device=seed.device) for n in (tokens, width))
    row, column = mix(t + seed & ONES), (k * 0x61C88647 + mix(seed)) & ONES
    h = (row[:, None] ^ column) * 0x21F0AAAD & ONES
    return ((h ^ (h >> 15)) * 0x735A2D97 & ONES) >= limit(p)


def limit(p: float) -> int:
    return round(p * 2**32)


def low(x, a, seeds, p: float, alpha: float) -> torch.Tensor:
    """(T, projections x r): alpha (x * mask) A^T of every projection."""
    if x.is_cuda:
        return _cuda().low(x, a, seeds, limit(p), alpha)
    parts = zip(_masked(x, seeds, p), a.chunk(len(seeds)), strict=True)
    return torch.cat([part @ own.t() for part, own in parts], 1).mul_(alpha)


def input_gradient(du, a, seeds, p: float) -> torch.Tensor:
    """(T, in): the sum over the projections of (du A) * mask."""
    if du.is_cuda:
        return _cuda().input_gradient(du, a, seeds, limit(p))
    parts = zip(seeds, du.chunk(len(seeds), 1), a.chunk(len(seeds)), strict=True)
    return sum((part @ own) * kept(seed, p, len(du), a.shape[1]) for seed, part, own in parts)


def factor_gradient(du, x, seeds, p: float) -> torch.Tensor:
    """(projections x r, in): du^T (x * mask) of every projection, in float32."""
    if x.is_cuda:
        return _cuda().factor_gradient(du, x, seeds, limit(p))
    parts = zip(du.chunk(len(seeds), 1), _masked(x, seeds, p), strict=True)
    return torch.cat([(part.t() @ masked).float() for part, masked in parts])


def _masked(x, seeds, p: float):
    return (x * kept(seed, p, *x.shape) for seed in seeds)


def _cuda():
    from src.engine import dropout_cuda  # imports Triton, which the CPU's torch comes without

    return dropout_cuda
