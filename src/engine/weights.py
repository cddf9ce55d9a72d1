"""4-bit weights turned into 16-bit ones and back, and what memory is free."""

import gc

import torch
from torch import nn


@torch.no_grad()
def dequantize(model, keep: bool = False) -> dict[str, nn.Module]:
    """Replace every 4-bit layer by a linear layer that holds exactly the values it computes with, in the compute dtype.

    The same function at four times the memory; it spares the dequantisation at every use. Works in place. `keep`: return the
    4-bit layers by name, in the CPU's memory, for `requantize`; otherwise they are let go and nothing is returned.
    """
    import bitsandbytes as bnb

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit) and not hasattr(module, "base_layer")
    }
    for name, module in layers.items():
        weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(module.compute_dtype or weight.dtype), requires_grad=False)
        linear.bias, module.bias = module.bias, None
        _swap(model, name, linear)
        if keep:
            module.to("cpu")
    kept = layers if keep else {}
    layers = module = None
    free_cuda()  # a 4-bit weight and its layer refer to each other: without this its memory would stay taken
    return kept


def requantize(model, layers: dict[str, nn.Module]):
    """Put the 4-bit layers that `dequantize` returned back in their places, on the model's device. Works in place."""
    device = model.device
    for name, module in layers.items():
        bias = model.get_submodule(name).bias
        _swap(model, name, nn.Identity())  # the 16-bit weights go before the 4-bit ones come
        module.to(device).bias = bias
        _swap(model, name, module)
    free_cuda()


def _swap(model, name: str, module: nn.Module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def dequantized_fits(model) -> bool:
    """Whether the 16-bit weights of `dequantize` would take at most 60% of what the device has free (always on a CPU)."""
    if model.device.type != "cuda":
        return True
    states = (getattr(p, "quant_state", None) for p in model.parameters())
    need = sum(2 * state.shape.numel() for state in states if state is not None)
    return need <= 0.6 * free_bytes(model.device)


def free_bytes(device: torch.device) -> float:
    """Bytes that this process can still use of a GPU's memory, its own unused reserve included."""
    free, total = torch.cuda.mem_get_info(device)
    limit = total * torch.cuda.get_per_process_memory_fraction(device) - torch.cuda.memory_reserved(device)
    return min(free, limit) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_cuda():
    """Give memory that nothing holds any more back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
