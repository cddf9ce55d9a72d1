"""What makes a training step fast on CUDA: attention over packed rows, and layers without their element-wise overhead.

`varlen_attention` runs where torch has variable-length flash attention (compute capability 8.0 and up); elsewhere packed rows go
through sdpa with a block mask, which costs more and computes the same.

`fused` replaces, for the duration of training, the forward of the LoRA projections of attention and MLP by autograd functions
that compute the same. PEFT's own forward reads and writes every activation several times more: casts, scale, add, and
one gradient addition for every projection that shares an input. Here the low-rank part is written first and the large
matrix product is added on top of it (beta = 1 of a GEMM, which costs nothing), in the backward pass too; projections that
share an input share one product with their A matrices; and the MLP recomputes silu(gate) * up instead of keeping it. RMSNorm,
rotary embedding and the gated activation become one kernel each through torch.compile.
"""

import importlib.util
import inspect
import sys
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

NAME = "varlen"


# ---------------------------------------------------------------- attention


def has_varlen(device: torch.device) -> bool:
    """Whether torch's variable-length flash attention runs on this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """A transformers attention function: packed rows (1, heads, T, d) if cu_seq_lens_q is given, sdpa otherwise (generation)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    starts, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if starts is None or not query.is_cuda:
        if starts is not None:
            attention_mask = block_mask(starts, query.shape[2], sliding_window)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    options = {}
    if q.shape[1] != k.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    window = (sliding_window - 1 if sliding_window else -1, 0)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=window, **options)
    return out.unsqueeze(0), None


def block_mask(starts: torch.Tensor, length: int, window: int | None = None) -> torch.Tensor:
    """(1, 1, T, T) boolean: causal within each row, at most `window` tokens back, nothing across rows."""
    row = torch.bucketize(torch.arange(length, device=starts.device), starts, right=True)
    same = torch.tril(row[:, None] == row[None])
    return (torch.triu(same, 1 - window) if window else same)[None, None]


def register():
    """Make attention="varlen" known to transformers. Its mask function builds none for packed rows: the row starts say it all."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*args, attention_mask=None, **kwargs):
        return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)

    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, mask)


# ---------------------------------------------------------------- LoRA


class Layer:
    """One LoRA projection: y = x W^T + scale (x A^T) B^T, W frozen (4-bit or plain), A (r, in) and B (out, r) trained in float32."""

    def __init__(self, module):
        base = module.get_base_layer()
        self.base, self.scale = base, module.scaling["default"]
        self.a, self.b = module.lora_A["default"].weight, module.lora_B["default"].weight

    def weight(self, dtype) -> torch.Tensor:
        """W of shape (out, in) in the compute dtype; dequantised anew at every call if it is kept in 4 bits."""
        state = getattr(self.base.weight, "quant_state", None)
        if state is None:
            return self.base.weight.to(dtype)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.base.weight.data, state).to(dtype)


def project(x, layer: Layer, u, b) -> torch.Tensor:
    """x W^T on top of u b^T. x: (T, in), u: (T, r) = x A^T, b: (out, r), already scaled."""
    return (u @ b.t()).addmm_(x, layer.weight(x.dtype).t())


class SharedInput(torch.autograd.Function):
    """Several LoRA projections of one input (q, k, v). apply(x, layers, a1, b1, a2, b2, ...) -> one output a layer."""

    @staticmethod
    def forward(ctx, x, layers, *factors):
        flat = x.reshape(-1, x.shape[-1])
        a = torch.cat(factors[::2]).to(x.dtype)
        u = flat @ a.t()
        bs = [(b * layer.scale).to(x.dtype) for layer, b in zip(layers, factors[1::2], strict=True)]
        us = u.split([b.shape[1] for b in bs], 1)
        ctx.layers, ctx.shape = layers, x.shape
        ctx.save_for_backward(flat, u, a, *bs)
        return tuple(
            project(flat, layer, part, b).view(*x.shape[:-1], -1) for layer, part, b in zip(layers, us, bs, strict=True)
        )

    @staticmethod
    def backward(ctx, *grads):
        flat, u, a, *bs = ctx.saved_tensors
        dx, das, dbs = shared_backward(ctx.layers, flat, u, a, bs, [g.reshape(-1, g.shape[-1]) for g in grads])
        return (dx.view(ctx.shape), None, *(g for pair in zip(das, dbs, strict=True) for g in pair))


def shared_backward(layers, x, u, a, bs, grads):
    """(dx, dA of each layer, dB of each layer) for projections of x; the products with W are added onto one dx."""
    ranks = [b.shape[1] for b in bs]
    du = torch.cat([g @ b for g, b in zip(grads, bs, strict=True)], 1)
    das = (du.t() @ x).float().split(ranks)
    dbs = [
        (g.t() @ part).float() * layer.scale for g, part, layer in zip(grads, u.split(ranks, 1), layers, strict=True)
    ]
    dx = du @ a
    for g, layer in zip(grads, layers, strict=True):
        dx.addmm_(g, layer.weight(x.dtype))
    return dx, das, dbs


class GatedMLP(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), all three with LoRA. Keeps x, gate and up; silu(gate) * up is computed again in backward."""

    @staticmethod
    def forward(ctx, x, layers, ag, bg, au, bu, ad, bd):
        flat = x.reshape(-1, x.shape[-1])
        a, down_a = torch.cat([ag, au]).to(x.dtype), ad.to(x.dtype)
        bs = [(b * layer.scale).to(x.dtype) for layer, b in zip(layers, (bg, bu, bd), strict=True)]
        u = flat @ a.t()
        ug, uu = u.split([bs[0].shape[1], bs[1].shape[1]], 1)
        gate, up = project(flat, layers[0], ug, bs[0]), project(flat, layers[1], uu, bs[1])
        h = gated(gate, up)
        ud = h @ down_a.t()
        ctx.layers, ctx.shape = layers, x.shape
        ctx.save_for_backward(flat, gate, up, u, ud, a, down_a, *bs)
        return project(h, layers[2], ud, bs[2]).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        flat, gate, up, u, ud, a, down_a, bg, bu, bd = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        h = gated(gate, up)
        dh, (da,), (db,) = shared_backward(ctx.layers[2:], h, ud, down_a, [bd], [grad])
        del h
        dgate, dup = gated_backward(dh, gate, up)
        dx, das, dbs = shared_backward(ctx.layers[:2], flat, u, a, [bg, bu], [dgate, dup])
        return dx.view(ctx.shape), None, das[0], dbs[0], das[1], dbs[1], da, db


def _gated(gate, up):
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def _gated_backward(dh, gate, up):
    gate32, dh32 = gate.float(), dh.float()
    sigmoid = torch.sigmoid(gate32)
    dgate = dh32 * up.float() * sigmoid * (1 + gate32 * (1 - sigmoid))
    return dgate.to(gate.dtype), (dh32 * gate32 * sigmoid).to(gate.dtype)


_compiled = {}


def _on_cuda(function, *arguments):
    """The element-wise function as one kernel on CUDA (torch.compile, any number of tokens), as it stands elsewhere.

    Tensors have their tokens in dimension 0 (matrices) or 2 (heads), or 1 (rotary tables).
    """
    if not arguments[0].is_cuda:
        return function(*arguments)
    if function not in _compiled:
        _compiled[function] = torch.compile(function)
    for x in arguments:
        if torch.is_tensor(x) and x.ndim > 1:
            torch._dynamo.maybe_mark_dynamic(x, {2: 0, 3: 1, 4: 2}[x.ndim])
    return _compiled[function](*arguments)


def gated(gate, up):
    return _on_cuda(_gated, gate, up)


def gated_backward(dh, gate, up):
    return _on_cuda(_gated_backward, dh, gate, up)


def _rms_norm(x, weight, eps: float):
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotary(q, k, cos, sin):
    def turned(x):
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def rotary(q, k, cos, sin, unsqueeze_dim=1):
    return _on_cuda(_rotary, q, k, cos, sin)


def fusable(module) -> bool:
    """A LoRA projection with one plain adapter, without dropout and bias."""
    from peft.tuners.lora import LoraLayer

    return (
        isinstance(module, LoraLayer)
        and list(module.lora_A) == ["default"]
        and isinstance(module.lora_dropout["default"], nn.Identity)
        and getattr(module.get_base_layer(), "bias", None) is None
    )


def _attention(attention) -> bool:
    projections = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if not all(p is not None and fusable(p) for p in projections):
        return False
    layers, kept = [Layer(p) for p in projections], {}

    def q(x):
        out = SharedInput.apply(x, layers, *(f for layer in layers for f in (layer.a, layer.b)))
        kept["k"], kept["v"] = out[1:]
        return out[0]

    projections[0].forward = q
    projections[1].forward = lambda x: kept.pop("k")
    projections[2].forward = lambda x: kept.pop("v")
    return True


def _single(module) -> bool:
    if not fusable(module):
        return False
    layer = Layer(module)
    module.forward = lambda x: SharedInput.apply(x, [layer], layer.a, layer.b)[0]
    return True


def _mlp(mlp) -> bool:
    projections = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    is_silu = (
        isinstance(getattr(mlp, "act_fn", None), nn.SiLU)
        or type(getattr(mlp, "act_fn", None)).__name__ == "SiLUActivation"
    )
    if not is_silu or not all(p is not None and fusable(p) for p in projections):
        return False
    layers = [Layer(p) for p in projections]
    mlp.forward = lambda x: GatedMLP.apply(x, layers, *(f for layer in layers for f in (layer.a, layer.b)))
    return True


def _norm(norm) -> bool:
    if not type(norm).__name__.endswith("RMSNorm") or not hasattr(norm, "variance_epsilon"):
        return False
    norm.forward = lambda x: _on_cuda(_rms_norm, x.reshape(-1, x.shape[-1]), norm.weight, norm.variance_epsilon).view(
        x.shape
    )
    return True


def wanted(experiment, device: torch.device) -> bool:
    """Whether `fused` should be on: training.kernels, a GPU with Triton, and no dropout inside the adapter."""
    on = experiment.training.kernels == "auto" and experiment.lora.dropout == 0
    return on and device.type == "cuda" and importlib.util.find_spec("triton") is not None


@contextmanager
def fused(model, enabled: bool = True):
    """Train through the fused functions inside the context; yields how many modules they replaced.

    Adapters they do not fit (dropout, bias, DoRA, other activations) keep their own forward.
    """
    changed, rotated = [], {}
    for module in model.modules() if enabled else ():
        if hasattr(module, "q_proj") and _attention(module):
            changed += [module.q_proj, module.k_proj, module.v_proj]
            if _single(module.o_proj):
                changed.append(module.o_proj)
            source = sys.modules[type(module).__module__]
            if hasattr(source, "apply_rotary_pos_emb"):
                rotated.setdefault(source, source.apply_rotary_pos_emb)
        elif hasattr(module, "gate_proj") and _mlp(module):
            changed.append(module)
        elif _norm(module):
            changed.append(module)
    for source in rotated:
        source.apply_rotary_pos_emb = rotary
    try:
        yield len(changed)
    finally:
        for module in changed:
            del module.forward
        for source, function in rotated.items():
            source.apply_rotary_pos_emb = function
