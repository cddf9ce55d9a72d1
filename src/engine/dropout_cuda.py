"""The functions of dropout.py as Triton kernels: same arguments, same masks, `limit` in place of p.

Programs of one block of x follow each other, a projection each, so that all but the first find it in the cache.
"""

import torch
import triton
import triton.language as tl

PROGRAMS = 528  # that the sum over tokens is spread over, at least: four for each of a large GPU's processors


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = (h ^ (h >> 15)) * 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def _kept(seed, t, k, limit: tl.constexpr):
    """dropout.kept for tokens t and columns k, whose shapes broadcast."""
    seed = seed.to(tl.uint32)
    h = (_mix(t.to(tl.uint32) + seed) ^ (k.to(tl.uint32) * 0x61C88647 + _mix(seed))) * 0x21F0AAAD
    return (h ^ (h >> 15)) * 0x735A2D97 >= limit


@triton.jit
def _low(
    x, a, seeds, u, alpha, tokens, width, rank, R: tl.constexpr, limit: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr
):
    n, t, j = tl.program_id(0), tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, R)
    seed, total = tl.load(seeds + n), tl.zeros((BT, R), tl.float32)
    rows, factors = x + t[:, None].to(tl.int64) * width, a + (n * rank + j[None, :]) * width
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        block = tl.load(rows + k[None, :], mask=(t[:, None] < tokens) & (k[None, :] < width), other=0.0)
        factor = tl.load(factors + k[:, None], mask=(j[None, :] < rank) & (k[:, None] < width), other=0.0)
        block = tl.where(_kept(seed, t[:, None], k[None, :], limit), block, 0.0).to(factor.dtype)
        total = tl.dot(block, factor, total, input_precision="ieee")
    out = u + t[:, None] * (tl.num_programs(0) * rank) + n * rank + j[None, :]
    tl.store(out, (total * alpha).to(u.dtype.element_ty), mask=(t[:, None] < tokens) & (j[None, :] < rank))


@triton.jit
def _input_gradient(
    du, a, seeds, dx, tokens, width, rank,
    N: tl.constexpr, R: tl.constexpr, limit: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    k, t = tl.program_id(0) * BK + tl.arange(0, BK), tl.program_id(1) * BT + tl.arange(0, BT)
    j, total = tl.arange(0, R), tl.zeros((BT, BK), tl.float32)
    for n in tl.static_range(N):
        at = du + t[:, None] * (N * rank) + n * rank + j[None, :]
        part = tl.load(at, mask=(t[:, None] < tokens) & (j[None, :] < rank), other=0.0)
        at = a + (n * rank + j[:, None]) * width + k[None, :]
        factor = tl.load(at, mask=(j[:, None] < rank) & (k[None, :] < width), other=0.0)
        product = tl.dot(part, factor, input_precision="ieee")
        total += tl.where(_kept(tl.load(seeds + n), t[:, None], k[None, :], limit), product, 0.0)
    out = dx + t[:, None].to(tl.int64) * width + k[None, :]
    tl.store(out, total.to(dx.dtype.element_ty), mask=(t[:, None] < tokens) & (k[None, :] < width))


@triton.jit
def _factor_gradient(
    du, x, seeds, da, tokens, width, rank, share,
    R: tl.constexpr, limit: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One split's part: `share` tokens, a multiple of BT. Columns of x are rows of the product, which a GPU likes."""
    n, k, split = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK), tl.program_id(2)
    j, seed, ranks = tl.arange(0, R), tl.load(seeds + n), tl.num_programs(0) * rank
    total = tl.zeros((BK, R), tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, tokens), BT):
        t = start + tl.arange(0, BT)
        at = x + t[None, :].to(tl.int64) * width + k[:, None]
        block = tl.load(at, mask=(t[None, :] < tokens) & (k[:, None] < width), other=0.0)
        at = du + t[:, None] * ranks + n * rank + j[None, :]
        part = tl.load(at, mask=(t[:, None] < tokens) & (j[None, :] < rank), other=0.0)
        block = tl.where(_kept(seed, t[None, :], k[:, None], limit), block, 0.0).to(part.dtype)
        total = tl.dot(block, part, total, input_precision="ieee")
    out = da + (split * ranks + n * rank + j[None, :]).to(tl.int64) * width + k[:, None]
    tl.store(out, total, mask=(j[None, :] < rank) & (k[:, None] < width))


def _sizes(a, seeds) -> tuple[int, int, int]:
    """Projections, the rank of one, and the power of two from 16 on that a matrix unit takes for it."""
    rank = len(a) // len(seeds)
    return len(seeds), rank, max(16, triton.next_power_of_2(rank))


def low(x, a, seeds, limit: int, alpha: float) -> torch.Tensor:
    (n, rank, padded), (tokens, width) = _sizes(a, seeds), x.shape
    u = x.new_empty(tokens, len(a))
    grid, tile = (n, triton.cdiv(tokens, LOW["BT"])), LOW
    _low[grid](x, a, seeds, u, alpha, tokens, width, rank, R=padded, limit=limit, **tile)
    return u


def input_gradient(du, a, seeds, limit: int) -> torch.Tensor:
    (n, rank, padded), tokens, width = _sizes(a, seeds), len(du), a.shape[1]
    dx = du.new_empty(tokens, width)
    grid = (triton.cdiv(width, INPUT["BK"]), triton.cdiv(tokens, INPUT["BT"]))
    _input_gradient[grid](du, a, seeds, dx, tokens, width, rank, N=n, R=padded, limit=limit, **INPUT)
    return dx


def factor_gradient(du, x, seeds, limit: int) -> torch.Tensor:
    (n, rank, padded), (tokens, width) = _sizes(du.t(), seeds), x.shape
    blocks, columns = triton.cdiv(tokens, FACTOR["BT"]), n * triton.cdiv(width, FACTOR["BK"])
    share = triton.cdiv(blocks, min(blocks, triton.cdiv(PROGRAMS, columns))) * FACTOR["BT"]
    splits = triton.cdiv(tokens, share)
    da = torch.empty(splits, n * rank, width, dtype=torch.float32, device=x.device)
    grid = (n, triton.cdiv(width, FACTOR["BK"]), splits)
    _factor_gradient[grid](du, x, seeds, da, tokens, width, rank, share, R=padded, limit=limit, **FACTOR)
    return da.sum(0)


LOW = {"BT": 64, "BK": 64, "num_warps": 4, "num_stages": 4}
INPUT = {"BT": 64, "BK": 128, "num_warps": 4, "num_stages": 2}
FACTOR = {"BT": 64, "BK": 128, "num_warps": 4, "num_stages": 3}
