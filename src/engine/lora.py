"""LoRA layers that compute what PEFT's own do with fewer passes over memory.

PEFT casts, scales and adds up activations and gradients. Here the low-rank part is written first and the large matrix
product is added onto it, which costs a GEMM nothing. Projections of one input share one product with their A matrices,
unless dropout gives each an input of its own.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from peft.utils.integrations import dequantize_bnb_weight

from src.engine import dropout, fp8
from src.engine.elementwise import gated, gated_backward


def base_weight(module, dtype) -> torch.Tensor:
    """The frozen weight W (out, in) of a LoRA projection in the compute dtype. 4-bit ones are dequantised each time."""
    weight = module.get_base_layer().weight
    return (dequantize_bnb_weight(weight) if hasattr(weight, "quant_state") else weight).to(dtype)


class Group:
    """LoRA projections y = x W^T + scale (dropped(x) A^T) B^T of one input and one scale. A is (r, in), B (out, r)."""

    def __init__(self, modules, dtype):
        self.modules, self.scale = modules, modules[0].scaling["default"]
        self.dropout, self.drawn = modules[0].lora_dropout["default"], None
        self.p = getattr(self.dropout, "p", 0.0)  # PEFT has an Identity for none
        lows, highs = [m.lora_A["default"].weight for m in modules], [m.lora_B["default"].weight for m in modules]
        self.ranks, self.factors = [low.shape[0] for low in lows], lows + highs
        self.a = torch.cat([low.detach() for low in lows]).to(dtype)  # all A of the group under each other
        self.bs = [high.detach().to(dtype) for high in highs]
        self.copies = [*self.a.split(self.ranks), *self.bs]  # `fused` renews them before every forward pass
        self.rows = self.across = ()

    def use_fp8(self):
        """Compute the frozen products of training through `fp8`, from two copies of the weights, a byte a weight."""
        weights = [base_weight(module, self.a.dtype) for module in self.modules]
        if all(n % 16 == 0 for weight in weights for n in weight.shape):  # others the product refuses
            self.rows = [fp8.rounded(weight) for weight in weights]
            self.across = fp8.across(self.rows)

    @property
    def seeds(self) -> torch.Tensor | None:
        """A seed a projection for the masks of this pass, which `fused` has drawn; None where nothing is dropped."""
        return self.drawn if self.p and self.dropout.training else None

    def low(self, x, seeds) -> torch.Tensor:
        """(T, sum of ranks): scale dropped(x) A^T of every projection."""
        if seeds is not None:
            return dropout.low(x, self.a, seeds, self.p, self.scale / (1 - self.p))
        return torch.addmm(x.new_empty(()), x, self.a.t(), beta=0, alpha=self.scale)

    def project(self, x, u) -> list[torch.Tensor]:
        """Every projection of x (T, in)."""
        if self.rows and not torch.is_inference_mode_enabled():  # answers and validation losses: 16 bits
            parts = zip(fp8.forward(x, self.rows), self.bs, u.split(self.ranks, 1), strict=True)
            return [y.addmm_(part, b.t()) for y, b, part in parts]
        parts = zip(self.modules, self.bs, u.split(self.ranks, 1), strict=True)
        return [(part @ b.t()).addmm_(x, base_weight(module, x.dtype).t()) for module, b, part in parts]

    def input_gradient(self, grads, seeds) -> tuple[torch.Tensor, torch.Tensor]:
        """(dx, du) from the gradients of the projections."""
        du = grads[0].new_empty(len(grads[0]), len(self.a))
        scale = self.scale if seeds is None else self.scale / (1 - self.p)
        for part, g, b in zip(du.split(self.ranks, 1), grads, self.bs, strict=True):
            torch.addmm(part, g, b, beta=0, alpha=scale, out=part)
        if self.across:
            dx = fp8.backward(grads, *self.across)
            low = None if seeds is None else dropout.input_gradient(du, self.a, seeds, self.p)
            return (dx.addmm_(du, self.a) if seeds is None else dx.add_(low)), du
        dx = du @ self.a if seeds is None else dropout.input_gradient(du, self.a, seeds, self.p)
        for g, module in zip(grads, self.modules, strict=True):
            dx.addmm_(g, base_weight(module, dx.dtype))
        return dx, du

    def factor_gradients(self, x, u, du, grads, seeds) -> list[torch.Tensor]:
        """The gradients of `factors`, in float32."""
        da = _product32(du.t(), x) if seeds is None else dropout.factor_gradient(du, x, seeds, self.p)
        dbs = [_product32(g.t(), part) for g, part in zip(grads, u.split(self.ranks, 1), strict=True)]
        return [*da.split(self.ranks), *dbs]


def _product32(a, b) -> torch.Tensor:
    """The matrix product in float32, on CUDA without a 16-bit one in between."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else (a @ b).float()


class SharedInput(torch.autograd.Function):
    """The LoRA projections of a group, one output each: apply(x, group, *group.factors)."""

    @staticmethod
    def forward(ctx, x, group, *factors):
        flat = x.reshape(-1, x.shape[-1])
        ctx.group, ctx.shape, ctx.seeds = group, x.shape, group.seeds
        u = group.low(flat, ctx.seeds)
        ctx.save_for_backward(flat, u)
        return tuple(y.view(*x.shape[:-1], -1) for y in group.project(flat, u))

    @staticmethod
    def backward(ctx, *grads):
        flat, u = ctx.saved_tensors
        grads = [g.reshape(-1, g.shape[-1]) for g in grads]
        dx, du = ctx.group.input_gradient(grads, ctx.seeds)
        return dx.view(ctx.shape), None, *ctx.group.factor_gradients(flat, u, du, grads, ctx.seeds)


class GatedMLP(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), all with LoRA. The product is computed again in the backward pass, not kept."""

    @staticmethod
    def forward(ctx, x, inner, outer, output_is_kept, *factors):
        flat = x.reshape(-1, x.shape[-1])
        ctx.inner, ctx.outer, ctx.shape, ctx.seeds = inner, outer, x.shape, (inner.seeds, outer.seeds)
        u = inner.low(flat, ctx.seeds[0])
        gate, up = inner.project(flat, u)
        h = F.silu(gate).mul_(up) if torch.is_inference_mode_enabled() else gated(gate, up)  # in place: less memory
        v = outer.low(h, ctx.seeds[1])
        ctx.save_for_backward(flat, gate, up, u, v)
        if _recomputing and not output_is_kept:  # by a later layer for its backward pass: nothing will read the output
            return torch.empty_like(x)
        return outer.project(h, v)[0].view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        flat, gate, up, u, v = ctx.saved_tensors
        grads, (inner, outer) = [grad.reshape(-1, grad.shape[-1])], ctx.seeds
        dh, dv = ctx.outer.input_gradient(grads, outer)
        h, *dgates = gated_backward(dh, gate, up)
        del dh
        outers = ctx.outer.factor_gradients(h, v, dv, grads, outer)
        del h
        dx, du = ctx.inner.input_gradient(dgates, inner)
        inners = ctx.inner.factor_gradients(flat, u, du, dgates, inner)
        return dx.view(ctx.shape), None, None, None, *inners, *outers


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
