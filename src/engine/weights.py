"""4-bit weights turned into 16-bit ones and back; what memory is free and how fast a device multiplies."""

import functools

import torch
from accelerate.utils.memory import clear_device_cache
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from torch.utils.benchmark import Timer

free_cuda = functools.partial(clear_device_cache, garbage_collection=True)  # gives unused memory back to the GPU


@torch.no_grad()
def dequantize(model, keep: bool = False) -> dict[str, nn.Module]:
    """Replace every 4-bit layer in place by a linear layer of exactly the values it computes with.

    That takes four times the memory and is faster. `keep`: return the 4-bit layers by name, in the CPU's memory.
    """
    import bitsandbytes as bnb

    layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    for name, module in layers.items():
        weight = dequantize_bnb_weight(module.weight)
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(module.compute_dtype or weight.dtype), requires_grad=False)
        linear.bias, module.bias = module.bias, None
        model.set_submodule(name, linear)
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
        model.set_submodule(name, nn.Identity())  # the 16-bit weights go before the 4-bit ones come
        module.to(device).bias = bias
        model.set_submodule(name, module)
    free_cuda()


def dequantized_fits(model) -> bool:
    """Whether the 16-bit weights of `dequantize` take at most 60% of a GPU's free memory. Always true on a CPU."""
    states = (getattr(p, "quant_state", None) for p in model.parameters())
    need = sum(2 * state.shape.numel() for state in states if state is not None)
    return model.device.type != "cuda" or need <= 0.6 * free_bytes(model.device)


def free_bytes(device: torch.device) -> float:
    """Bytes that this process can still use of a GPU's memory, its own unused reserve included."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    limit = total * torch.cuda.get_per_process_memory_fraction(device) - reserved
    return min(free, limit) + reserved - torch.cuda.memory_allocated(device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a square matrix product, measured in a few hundredths of a second."""
    n, repeats = (8192, 8) if device.type == "cuda" else (1024, 6)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    with torch.cuda.device(device.index if device.type == "cuda" else -1):  # the timer waits for the current one
        return 2 * n**3 / timer.timeit(repeats).median
