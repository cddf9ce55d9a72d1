"""Element-wise parts of a layer as one kernel each on CUDA, with fewer reads and writes than transformers' Llama."""

import functools
import inspect

import torch
import torch.nn.functional as F
from transformers.models.llama import modeling_llama

compiled = functools.cache(torch.compile)


@functools.cache
def is_llamas(owner, name: str, of=modeling_llama) -> bool:
    """Whether the function of this name is word for word Llama's, as in Mistral and Qwen."""
    try:
        return inspect.getsource(getattr(owner, name)) == inspect.getsource(getattr(of, name))
    except (AttributeError, OSError, TypeError):
        return False


def one_kernel(function):
    """Run the function as one kernel on CUDA (torch.compile, any number of tokens), as it stands elsewhere.

    In inference mode, too, it runs as it stands: generation has too many shapes to compile for. Tensors have their
    tokens in dimension 0 (matrices) or 1 (heads and rotary tables).
    """

    @functools.wraps(function)
    def run(*arguments):
        if not arguments[0].is_cuda or torch.is_inference_mode_enabled():
            return function(*arguments)
        for x in arguments:
            if torch.is_tensor(x) and x.ndim > 1:
                torch._dynamo.maybe_mark_dynamic(x, 0 if x.ndim == 2 else 1)
                torch._dynamo.mark_static(x, x.ndim - 1)  # a width that may vary is read without vectors
        return compiled(function)(*arguments)

    return run


@one_kernel
def gated(gate, up):
    """silu(gate) * up."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


@one_kernel
def gated_backward(dh, gate, up):
    """Return (silu(gate) * up, gradient of gate, gradient of up) from the gradient dh of the product."""
    gate32, up32, dh32 = gate.float(), up.float(), dh.float()
    sigmoid = torch.sigmoid(gate32)
    silu = gate32 * sigmoid
    dgate = dh32 * up32 * sigmoid * (1 + gate32 * (1 - sigmoid))
    return (silu * up32).to(gate.dtype), dgate.to(gate.dtype), (dh32 * silu).to(gate.dtype)


@one_kernel
def rms_norm(x, weight, eps: float):
    """RMSNorm of x (T, width)."""
    if torch.is_inference_mode_enabled():  # torch's own kernel
        return weight * F.rms_norm(x, x.shape[-1:], None, eps)
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


_rotary = one_kernel(modeling_llama.apply_rotary_pos_emb)  # as it is before `fused` puts `rotary` in its place


def rotary(q, k, cos, sin, unsqueeze_dim=1):
    """Rotary embedding of q and k (batch, heads, T, d), computed as they lie in memory: (batch, T, heads, d)."""
    q, k = _rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, 2)
    return q.transpose(1, 2), k.transpose(1, 2)
