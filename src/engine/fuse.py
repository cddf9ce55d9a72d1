"""Which modules of a model compute through `lora` and `elementwise`, and the context in which they do."""

import functools
import importlib.util
import sys
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from src.engine.dropout import draw_seeds
from src.engine.elementwise import is_llamas, rms_norm, rotary
from src.engine.lora import GatedMLP, Group, SharedInput


def available(device: torch.device) -> bool:
    """Whether `fused` pays on this device: a GPU with Triton."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def fusable(*modules) -> bool:
    """Whether these are LoRA projections of one scale, each with one active adapter that is plain: not DoRA, say."""
    return all(
        isinstance(m, LoraLayer)
        and list(m.lora_A) == m.active_adapters == ["default"]
        and not (m.disable_adapters or m.merged or m.lora_variant or m.lora_bias["default"])
        and m.scaling["default"] == modules[0].scaling["default"]
        and (isinstance(m.lora_dropout["default"], nn.Identity) or m.r["default"] == modules[0].r["default"])
        and getattr(m.get_base_layer(), "bias", None) is None
        and (m.get_base_layer().weight.is_floating_point() or hasattr(m.get_base_layer().weight, "quant_state"))
        for m in modules
    )


@contextmanager
def fused(model, enabled: bool = True, in_fp8: bool = False):
    """Compute the layers of a PeftModel through `lora` and `elementwise`; yield how many modules that replaced.

    Others keep their forward, as do all while the adapter is disabled. A model that is fused already stays as it is.
    in_fp8: see `Group.use_fp8`.
    """
    forwards, groups, rotated = {}, [], set()
    modules = list(model.modules()) if enabled else []
    if any(getattr(vars(module).get("forward"), "__module__", None) == __name__ for module in modules):
        modules = []
    dtype = model.get_input_embeddings().weight.dtype
    added = {m.mlp for m in modules if hasattr(m, "mlp") and is_llamas(type(m), "forward", LlamaDecoderLayer)}
    for module in modules:
        if hasattr(module, "q_proj"):
            groups += _shared([getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")], dtype, forwards)
            groups += _shared([getattr(module, "o_proj", None)], dtype, forwards)
            source = sys.modules[type(module).__module__]
            if is_llamas(source, "rotate_half") and is_llamas(source, "apply_rotary_pos_emb"):
                rotated.add(source)
        elif hasattr(module, "gate_proj"):
            groups += _mlp(module, dtype, module not in added, forwards)
        elif hasattr(module, "variance_epsilon") and is_llamas(type(module), "forward", LlamaRMSNorm):
            forwards[module] = _norm(module)
    copies = [copy for group in groups for copy in group.copies]
    factors = [factor for group in groups for factor in group.factors]
    for group in groups if in_fp8 else ():
        group.use_fp8()

    def renew(*_):
        with torch.no_grad():
            torch._foreach_copy_(copies, factors)
        dropping = [group for group in groups if group.p and group.dropout.training]
        counts = [len(group.modules) for group in dropping]
        if counts:
            for group, seeds in zip(dropping, draw_seeds(sum(counts), model.device).split(counts), strict=True):
                group.drawn = seeds

    with ExitStack() as stack:
        if groups:  # on the decoder: training and generation both pass through it, whichever wrapper they enter by
            stack.callback(model.get_base_model().base_model.register_forward_pre_hook(renew).remove)
        for source in rotated:
            stack.callback(setattr, source, "apply_rotary_pos_emb", source.apply_rotary_pos_emb)
            source.apply_rotary_pos_emb = rotary
        for module, forward in forwards.items():
            stack.callback(delattr, module, "forward")
            module.forward = forward
        yield len(forwards)


def _shared(projections, dtype, forwards: dict) -> list[Group]:
    """Have the first projection compute all of them. The others hand out what it kept, if they get the same input."""
    if not fusable(*projections):
        return []
    group, kept, (first, *others) = Group(projections, dtype), {}, projections

    def compute(x, plain=first.forward):
        if first.disable_adapters:
            return plain(x)
        out, *rest = SharedInput.apply(x, group, *group.factors)
        if others:
            kept.update(zip(others, rest, strict=True), x=x)
        return out

    def hand_out(x, module, plain):
        if kept.get("x") is not x or module not in kept:
            return plain(x)
        out = kept.pop(module)
        if len(kept) == 1:  # the input alone
            kept.clear()
        return out

    forwards[first] = compute
    for module in others:
        forwards[module] = functools.partial(hand_out, module=module, plain=module.forward)
    return [group]


def _mlp(mlp, dtype, output_is_kept: bool, forwards: dict) -> list[Group]:
    projections = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    silu = type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    fits = silu and is_llamas(type(mlp), "forward", LlamaMLP)
    if not (fits and fusable(*projections[:2]) and fusable(projections[2])):
        return []
    inner, outer, plain = Group(projections[:2], dtype), Group(projections[2:], dtype), mlp.forward

    def forward(x):
        if projections[0].disable_adapters:
            return plain(x)
        return GatedMLP.apply(x, inner, outer, output_is_kept, *inner.factors, *outer.factors)

    forwards[mlp] = forward
    return [inner, outer]


def _norm(norm):
    return lambda x: rms_norm(x.reshape(-1, x.shape[-1]), norm.weight, norm.variance_epsilon).view(x.shape)
