"""LoRA layers without their overhead: the same function as PEFT's own forward, with fewer passes over memory.

PEFT reads and writes every activation several times more: casts, scale, add, and one gradient addition for every projection
that shares an input. Here the low-rank part is written first and the large matrix product is added on top of it (beta = 1 of a
GEMM, which costs nothing), in the backward pass too. Projections that share an input share one product with their A matrices.
The MLP computes silu(gate) * up again in the backward pass instead of keeping it.
"""

from contextlib import contextmanager, nullcontext

import torch

from src.engine.elementwise import gated, gated_backward


class Layer:
    """One LoRA projection: y = x W^T + scale (x A^T) B^T, W frozen (4-bit or plain), A (r, in) and B (out, r) trained in float32."""

    def __init__(self, module):
        self.base, self.scale = module.get_base_layer(), module.scaling["default"]
        self.a, self.b = module.lora_A["default"].weight, module.lora_B["default"].weight

    def weight(self, dtype) -> torch.Tensor:
        """W of shape (out, in) in the compute dtype; dequantised at every call if it is kept in 4 bits."""
        state = getattr(self.base.weight, "quant_state", None)
        if state is None:
            return self.base.weight.to(dtype)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.base.weight.data, state).to(dtype)


class Group:
    """LoRA projections of one input and one scale, with copies of their factors in the compute dtype.

    `fused` renews the copies before every forward pass.
    """

    def __init__(self, modules, dtype):
        self.layers = [Layer(module) for module in modules]
        self.scale, self.ranks = self.layers[0].scale, [layer.a.shape[0] for layer in self.layers]
        self.factors = [factor for layer in self.layers for factor in (layer.a, layer.b)]
        self.a = torch.cat([layer.a.detach() for layer in self.layers]).to(dtype)  # all A of the group under each other
        self.bs = [layer.b.detach().to(dtype) for layer in self.layers]
        self.copies = [c for pair in zip(self.a.split(self.ranks), self.bs, strict=True) for c in pair]

    def low(self, x) -> torch.Tensor:
        """(T, sum of ranks): scale x A^T of every projection."""
        return torch.addmm(x.new_empty(()), x, self.a.t(), beta=0, alpha=self.scale)

    def project(self, x, u) -> list[torch.Tensor]:
        """Every projection of x (T, in): the low-rank part first, x W^T added onto it."""
        parts = zip(self.layers, self.bs, u.split(self.ranks, 1), strict=True)
        return [(part @ b.t()).addmm_(x, layer.weight(x.dtype).t()) for layer, b, part in parts]

    def input_gradient(self, grads) -> tuple[torch.Tensor, torch.Tensor]:
        """(dx, du) from the gradients of the projections; the products with W are added onto one dx."""
        du = grads[0].new_empty(len(grads[0]), len(self.a))
        for part, g, b in zip(du.split(self.ranks, 1), grads, self.bs, strict=True):
            torch.addmm(part, g, b, beta=0, alpha=self.scale, out=part)
        dx = du @ self.a
        for g, layer in zip(grads, self.layers, strict=True):
            dx.addmm_(g, layer.weight(dx.dtype))
        return dx, du

    def factor_gradients(self, x, u, du, grads) -> list[torch.Tensor]:
        """The gradients of `factors`, in float32."""
        das = _product32(du.t(), x).split(self.ranks)
        dbs = [_product32(g.t(), part) for g, part in zip(grads, u.split(self.ranks, 1), strict=True)]
        return [f for pair in zip(das, dbs, strict=True) for f in pair]


def _product32(a, b) -> torch.Tensor:
    """The matrix product in float32, on CUDA without a 16-bit one in between."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else (a @ b).float()


class SharedInput(torch.autograd.Function):
    """LoRA projections of one input (q, k and v; or o alone). apply(x, group, *group.factors) -> one output a projection."""

    @staticmethod
    def forward(ctx, x, group, *factors):
        flat = x.reshape(-1, x.shape[-1])
        u = group.low(flat)
        ctx.group, ctx.shape = group, x.shape
        ctx.save_for_backward(flat, u)
        return tuple(y.view(*x.shape[:-1], -1) for y in group.project(flat, u))

    @staticmethod
    def backward(ctx, *grads):
        flat, u = ctx.saved_tensors
        grads = [g.reshape(-1, g.shape[-1]) for g in grads]
        dx, du = ctx.group.input_gradient(grads)
        return dx.view(ctx.shape), None, *ctx.group.factor_gradients(flat, u, du, grads)


class GatedMLP(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), all three with LoRA. Keeps x, gate and up; computes silu(gate) * up again in backward.

    `output_is_kept`: whether a later layer keeps the output for its own backward pass, as a norm behind the MLP does.
    """

    @staticmethod
    def forward(ctx, x, inner, outer, output_is_kept, *factors):
        flat = x.reshape(-1, x.shape[-1])
        u = inner.low(flat)
        gate, up = inner.project(flat, u)
        h = gated(gate, up)
        v = outer.low(h)
        ctx.inner, ctx.outer, ctx.shape = inner, outer, x.shape
        ctx.save_for_backward(flat, gate, up, u, v)
        if _recomputing and not output_is_kept:  # nothing that the backward pass reads depends on the output
            return torch.empty_like(x)
        return outer.project(h, v)[0].view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        flat, gate, up, u, v = ctx.saved_tensors
        grads = [grad.reshape(-1, grad.shape[-1])]
        dh, dv = ctx.outer.input_gradient(grads)
        h, *dgates = gated_backward(dh, gate, up)
        del dh
        outer = ctx.outer.factor_gradients(h, v, dv, grads)
        del h
        dx, du = ctx.inner.input_gradient(dgates)
        return dx.view(ctx.shape), None, None, None, *ctx.inner.factor_gradients(flat, u, du, dgates), *outer


_recomputing = False  # true while a checkpointed layer runs once more for its saved tensors


@contextmanager
def _recompute():
    global _recomputing
    _recomputing = True
    try:
        yield
    finally:
        _recomputing = False


def checkpoint_contexts():
    """`context_fn` of torch's checkpoint: lets the fused MLP know that it runs for its saved tensors only."""
    return nullcontext(), _recompute()
