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

import functools
import importlib.util
import inspect
import sys
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

NAME = "varlen"


# ---------------------------------------------------------------- attention


def has_varlen(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether torch's variable-length flash attention runs on this device: 16 bits, compute capability 8.0 and up."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """A transformers attention function. query (batch, heads, T, d); key and value (batch, kv heads, S, d), grouped queries allowed.

    Packed rows (batch 1 with the `cu_seq_lens_q` and `_k` of `batching.flat_rows`): variable-length flash attention, or sdpa with
    a block mask where there is none. `seqused_k` (rows,): how many keys of each row's stretch of a cache count (`generation.FlatCache`).
    Anything else: transformers' sdpa.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    starts, used = kwargs.get("cu_seq_lens_q"), kwargs.get("seqused_k")
    if starts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    starts_k = kwargs["cu_seq_lens_k"]
    if not (query.is_cuda and has_varlen(query.device, query.dtype)):
        mask = block_mask(starts, starts_k, used, query.shape[2], key.shape[2], sliding_window)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))
    longest, longest_k = kwargs["max_length_q"], kwargs["max_length_k"]
    window = (sliding_window - 1 if sliding_window and sliding_window < longest_k else -1, 0)
    if used is None:
        out = _varlen_attn()(q, k, v, starts, starts_k, longest, longest_k, scale=scaling, window_size=window)
    else:  # the operator below varlen_attn, which has no seqused_k in torch 2.11
        if longest == 1 and window[0] == -1:
            window = (-1, -1)  # one query sees every key, causal or not; so told, the kernel reads a group's keys once
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts_k, longest, longest_k, 0.0, window == (-1, 0), False,
            scale=scaling, window_size_left=window[0], window_size_right=window[1], seqused_k=used,
        )[0]  # fmt: skip
    return out.unsqueeze(0), None


@functools.cache
def _varlen_attn():
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped heads as they are, later releases want to be told
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, enable_gqa=True) if grouped else varlen_attn


def block_mask(starts, starts_k, used, queries: int, keys: int, window: int | None = None) -> torch.Tensor:
    """(1, 1, queries, keys) boolean: causal within each row, at most `window` tokens back, nothing across rows.

    starts, starts_k (rows + 1,): where each row's queries and keys begin; used (rows,): how many of its keys count, None for as
    many as it has queries. A row's last query is at the position of its last key.
    """
    ends = starts[1:] - starts[:-1] if used is None else used
    i, j = torch.arange(queries, device=starts.device), torch.arange(keys, device=starts.device)
    row = torch.bucketize(i, starts, right=True) - 1
    at = ends[row] - (starts[1:][row] - i)  # the position in its row of every query, and of every key
    row_k = torch.bucketize(j, starts_k, right=True) - 1
    at_k = j - starts_k[row_k]
    seen = (row[:, None] == row_k) & (at_k <= at[:, None])
    return (seen & (at_k > at[:, None] - window) if window else seen)[None, None]


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
        self.base, self.scale = module.get_base_layer(), module.scaling["default"]
        self.a, self.b = module.lora_A["default"].weight, module.lora_B["default"].weight

    def weight(self, dtype) -> torch.Tensor:
        """W of shape (out, in) in the compute dtype; dequantised anew at every call if it is kept in 4 bits."""
        state = getattr(self.base.weight, "quant_state", None)
        if state is None:
            return self.base.weight.to(dtype)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.base.weight.data, state).to(dtype)


class Group:
    """LoRA projections of one input, with copies of their factors in the compute dtype that are renewed before every forward pass."""

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
    """down(silu(gate(x)) * up(x)), all three with LoRA. Keeps x, gate and up; silu(gate) * up is computed again in backward."""

    @staticmethod
    def forward(ctx, x, inner, outer, *factors):
        flat = x.reshape(-1, x.shape[-1])
        u = inner.low(flat)
        gate, up = inner.project(flat, u)
        h = gated(gate, up)
        v = outer.low(h)
        ctx.inner, ctx.outer, ctx.shape = inner, outer, x.shape
        ctx.save_for_backward(flat, gate, up, u, v)
        if _recomputing:  # nothing that the backward pass reads depends on the output: spare the product
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
        return dx.view(ctx.shape), None, None, *ctx.inner.factor_gradients(flat, u, du, dgates), *outer


_recomputing = False


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


def _gated(gate, up):
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def _gated_backward(dh, gate, up):
    gate32, up32, dh32 = gate.float(), up.float(), dh.float()
    sigmoid = torch.sigmoid(gate32)
    silu = gate32 * sigmoid
    dgate = dh32 * up32 * sigmoid * (1 + gate32 * (1 - sigmoid))
    return (silu * up32).to(gate.dtype), dgate.to(gate.dtype), (dh32 * silu).to(gate.dtype)


_compiled = {}


def _on_cuda(function, *arguments):
    """The element-wise function as one kernel on CUDA (torch.compile, any number of tokens), as it stands elsewhere.

    Tensors have their tokens in dimension 0 (matrices) or 1 (heads and rotary tables).
    """
    if not arguments[0].is_cuda:
        return function(*arguments)
    if function not in _compiled:
        _compiled[function] = torch.compile(function)
    for x in arguments:
        if torch.is_tensor(x) and x.ndim > 1:
            torch._dynamo.maybe_mark_dynamic(x, 0 if x.ndim == 2 else 1)
    return _compiled[function](*arguments)


def gated(gate, up):
    """silu(gate) * up; in generation as transformers computes it, whose many shapes are not worth compiling for."""
    return F.silu(gate).mul_(up) if torch.is_inference_mode_enabled() else _on_cuda(_gated, gate, up)


def gated_backward(dh, gate, up):
    """silu(gate) * up once more, and the gradients of gate and up, from that of the product."""
    return _on_cuda(_gated_backward, dh, gate, up)


def _rms_norm(x, weight, eps: float):
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotary(q, k, cos, sin):
    def turned(x):
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)

    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def rotary(q, k, cos, sin, unsqueeze_dim=1):
    """Rotary embedding of q and k (batch, heads, T, d), worked on as (batch, T, heads, d): so the projections wrote them, and
    so attention reads them, and nothing is copied on the way.
    """
    function = (lambda *x: _on_cuda(_rotary, *x)) if torch.is_grad_enabled() else _rotary
    q, k = function(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


@functools.cache
def _is_llamas(owner, name: str, of: str | None = None) -> bool:
    """Whether the function of this name is word for word Llama's, as in Mistral, Qwen and many more; others keep their own."""
    from transformers.models.llama import modeling_llama

    reference = getattr(modeling_llama, of) if of else modeling_llama
    try:
        return inspect.getsource(getattr(owner, name)) == inspect.getsource(getattr(reference, name))
    except (AttributeError, OSError, TypeError):
        return False


def fusable(module) -> bool:
    """A LoRA projection with one plain adapter, without dropout and bias."""
    from peft.tuners.lora import LoraLayer

    return (
        isinstance(module, LoraLayer)
        and list(module.lora_A) == ["default"]
        and isinstance(module.lora_dropout["default"], nn.Identity)
        and getattr(module.get_base_layer(), "bias", None) is None
    )


def _attention(attention, dtype) -> list[Group]:
    projections = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if not all(p is not None and fusable(p) for p in projections):
        return []
    group, kept = Group(projections, dtype), {}

    def q(x):
        out = SharedInput.apply(x, group, *group.factors)
        kept["k"], kept["v"] = out[1:]
        return out[0]

    projections[0].forward = q
    projections[1].forward = lambda x: kept.pop("k")
    projections[2].forward = lambda x: kept.pop("v")
    return [group]


def _single(module, dtype) -> list[Group]:
    if not fusable(module):
        return []
    group = Group([module], dtype)
    module.forward = lambda x: SharedInput.apply(x, group, *group.factors)[0]
    return [group]


def _mlp(mlp, dtype) -> list[Group]:
    projections = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = getattr(mlp, "act_fn", None)
    if not _is_llamas(type(mlp), "forward", "LlamaMLP"):
        return []
    is_silu = isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
    if not is_silu or not all(p is not None and fusable(p) for p in projections):
        return []
    inner, outer = Group(projections[:2], dtype), Group(projections[2:], dtype)
    mlp.forward = lambda x: GatedMLP.apply(x, inner, outer, *inner.factors, *outer.factors)
    return [inner, outer]


def _norm(norm) -> bool:
    if not hasattr(norm, "variance_epsilon") or not _is_llamas(type(norm), "forward", "LlamaRMSNorm"):
        return False
    plain = norm.forward

    def forward(x):
        if not torch.is_grad_enabled():  # generation: other shapes at every batch are not worth compiling for
            return plain(x)
        return _on_cuda(_rms_norm, x.reshape(-1, x.shape[-1]), norm.weight, norm.variance_epsilon).view(x.shape)

    norm.forward = forward
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
    changed, groups, rotated = [], [], {}
    dtype = model.get_input_embeddings().weight.dtype
    for module in model.modules() if enabled else ():
        if hasattr(module, "q_proj"):
            if found := _attention(module, dtype):
                changed += [module.q_proj, module.k_proj, module.v_proj]
            if single := _single(getattr(module, "o_proj", None), dtype):
                changed.append(module.o_proj)
            groups += found + single
            source = sys.modules[type(module).__module__]
            if _is_llamas(source, "rotate_half") and _is_llamas(source, "apply_rotary_pos_emb"):
                rotated.setdefault(source, source.apply_rotary_pos_emb)
        elif hasattr(module, "gate_proj"):
            if found := _mlp(module, dtype):
                changed.append(module)
            groups += found
        elif _norm(module):
            changed.append(module)
    copies = [copy for group in groups for copy in group.copies]
    factors = [factor for group in groups for factor in group.factors]

    def renew(*_):
        with torch.no_grad():
            torch._foreach_copy_(copies, factors)

    # on the decoder: training and generation both pass through it, whichever wrapper they enter by
    hook = model.get_base_model().base_model.register_forward_pre_hook(renew) if groups else None
    for source in rotated:
        source.apply_rotary_pos_emb = rotary
    try:
        yield len(changed)
    finally:
        for module in changed:
            del module.forward
        for source, function in rotated.items():
            source.apply_rotary_pos_emb = function
        if hook:
            hook.remove()
