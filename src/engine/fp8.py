"""Products with frozen weights in 8 bits (e4m3, 4 significant bits), one scale a row, summed in float32.

Weights are rounded once, activations and gradients at every use, so this trains another function, close to the 16-bit
one. Tensor cores multiply such numbers twice as fast. x (T, in), a weight W (out, in), y = x W^T, gradient g (T, out).
"""

import torch

from src.engine.elementwise import one_kernel

E4M3, LARGEST = torch.float8_e4m3fn, 448.0


def rounded(x, by=None, *others):
    """(q, scale (T, 1)): x and others, side by side (T, width), times `by` (width,), are about q (e4m3) times scale."""
    y = (torch.cat([x, *others], 1) if others else x).float()
    y = y if by is None else y * by
    scale = y.abs().amax(1, keepdim=True).clamp(min=1e-30) / LARGEST
    return (y / scale).to(E4M3), scale


quantize = one_kernel(rounded)  # of activations and gradients


def product(a, scale, b, scale_b, dtype) -> torch.Tensor:
    """(rows of a, rows of b): scale (rows of a, 1) a b^T scale_b (1, rows of b)."""
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), scale, scale_b, out_dtype=dtype, use_fast_accum=True)
    return (a.float() @ b.float().t() * scale * scale_b).to(dtype)


def across(rows: list[tuple]) -> tuple[torch.Tensor, ...]:
    """Of what `rounded` made of weights with one input: scales, all weights transposed (in, sum of out), ones.

    A gradient's columns are multiplied with the scales before they are rounded, so the same 8-bit weights serve.
    """
    scales = torch.cat([scale for _, scale in rows]).flatten()
    weights = torch.cat([weight.view(torch.uint8) for weight, _ in rows]).t().contiguous().view(E4M3)
    return scales, weights, scales.new_ones(1, len(weights))


def forward(x, rows: list[tuple]) -> list[torch.Tensor]:
    """x W^T of every weight."""
    x8 = quantize(x.detach())  # else a kernel more for every width: dynamo compiles a function eight times at most
    return [product(*x8, weight, scale.view(1, -1), x.dtype) for weight, scale in rows]


def backward(grads: list[torch.Tensor], scales, weights, ones) -> torch.Tensor:
    """(T, in): the sum over the weights of g W, from what `across` returned."""
    first, *others = grads
    return product(*quantize(first, scales, *others), weights, ones, first.dtype)
