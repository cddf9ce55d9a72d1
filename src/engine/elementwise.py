"""Element-wise parts of a layer as one kernel each on CUDA: gated activation, RMSNorm, rotary embedding.

Each function computes what transformers' Llama does, word for word (`is_llamas` tells), with fewer reads and writes of memory.
"""

import functools
import inspect

import torch
import torch.nn.functional as F


@functools.cache
def is_llamas(owner, name: str, of: str | None = None) -> bool:
    """Whether the function of this name is word for word Llama's, as in Mistral and Qwen; other models keep their own."""
    from transformers.models.llama import modeling_llama

    reference = getattr(modeling_llama, of) if of else modeling_llama
    try:
        return inspect.getsource(getattr(owner, name)) == inspect.getsource(getattr(reference, name))
    except (AttributeError, OSError, TypeError):
        return False


@functools.cache
def _compiled(function):
    return torch.compile(function)


def _on_cuda(function, *arguments):
    """Run the function as one kernel on CUDA (torch.compile, any number of tokens), as it stands elsewhere.

    Tensors have their tokens in dimension 0 (matrices) or 1 (heads and rotary tables).
    """
    if not arguments[0].is_cuda:
        return function(*arguments)
    for x in arguments:
        if torch.is_tensor(x) and x.ndim > 1:
            torch._dynamo.maybe_mark_dynamic(x, 0 if x.ndim == 2 else 1)
    return _compiled(function)(*arguments)


def gated(gate, up):
    """silu(gate) * up. In generation as transformers computes it, whose many shapes are not worth compiling for."""
    return F.silu(gate).mul_(up) if torch.is_inference_mode_enabled() else _on_cuda(_gated, gate, up)


def _gated(gate, up):
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def gated_backward(dh, gate, up):
    """(silu(gate) * up once more, gradient of gate, gradient of up) from the gradient dh of the product."""
    return _on_cuda(_gated_backward, dh, gate, up)


def _gated_backward(dh, gate, up):
    gate32, up32, dh32 = gate.float(), up.float(), dh.float()
    sigmoid = torch.sigmoid(gate32)
    silu = gate32 * sigmoid
    dgate = dh32 * up32 * sigmoid * (1 + gate32 * (1 - sigmoid))
    return (silu * up32).to(gate.dtype), dgate.to(gate.dtype), (dh32 * silu).to(gate.dtype)


def rms_norm(x, weight, eps: float):
    """RMSNorm of x (..., width)."""
    return _on_cuda(_rms_norm, x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)


def _rms_norm(x, weight, eps: float):
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary(q, k, cos, sin, unsqueeze_dim=1):
    """Rotary embedding of q and k (batch, heads, T, d), computed as (batch, T, heads, d).

    The projections wrote them in that order and attention reads them so; nothing is copied on the way.
    """
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, k = _on_cuda(_rotary, q, k, cos, sin) if torch.is_grad_enabled() else _rotary(q, k, cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def _rotary(q, k, cos, sin):
    def turned(x):
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)

    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin
