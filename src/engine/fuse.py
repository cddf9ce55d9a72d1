"""Which modules of a model compute through `lora` and `elementwise`, and the context in which they do."""

import importlib.util
import sys
from contextlib import contextmanager

import torch
from torch import nn

from src.engine.elementwise import is_llamas, rms_norm, rotary
from src.engine.lora import GatedMLP, Group, SharedInput


def available(device: torch.device) -> bool:
    """Whether `fused` pays on this device: a GPU with Triton."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def fusable(*modules) -> bool:
    """Whether these are LoRA projections that the functions above compute, and may be computed together.

    Each has one plain active adapter: no dropout, no bias, no variant such as DoRA. All have the same scale.
    """
    from peft.tuners.lora import LoraLayer

    return all(
        isinstance(module, LoraLayer)
        and list(module.lora_A) == ["default"]
        and module.active_adapters == ["default"]
        and not (module.disable_adapters or module.merged or module.lora_variant)
        and isinstance(module.lora_dropout["default"], nn.Identity)
        and not module.lora_bias["default"]
        and getattr(module.get_base_layer(), "bias", None) is None
        and module.scaling["default"] == modules[0].scaling["default"]
        for module in modules
    )


@contextmanager
def fused(model, enabled: bool = True):
    """Compute the LoRA layers of a PeftModel through the functions above inside the context; yield how many were replaced.

    Modules that they do not fit keep their own forward, and so does every module while its adapter is disabled.
    """
    replaced, groups, rotated = [], [], {}
    dtype = model.get_input_embeddings().weight.dtype
    modules = list(model.modules()) if enabled else []
    plain_mlps = {m.mlp for m in modules if hasattr(m, "mlp") and is_llamas(type(m), "forward", "LlamaDecoderLayer")}
    for module in modules:
        if hasattr(module, "q_proj"):
            groups += _attention(module, dtype, replaced) + _single(getattr(module, "o_proj", None), dtype, replaced)
            source = sys.modules[type(module).__module__]
            if is_llamas(source, "rotate_half") and is_llamas(source, "apply_rotary_pos_emb"):
                rotated.setdefault(source, source.apply_rotary_pos_emb)
        elif hasattr(module, "gate_proj"):
            groups += _mlp(module, dtype, module not in plain_mlps, replaced)
        elif hasattr(module, "variance_epsilon") and is_llamas(type(module), "forward", "LlamaRMSNorm"):
            _norm(module, replaced)
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
        yield len(replaced)
    finally:
        for module in replaced:
            del module.forward
        for source, function in rotated.items():
            source.apply_rotary_pos_emb = function
        if hook:
            hook.remove()


def _replace(module, forward, replaced: list):
    module.forward = forward
    replaced.append(module)


def _attention(attention, dtype, replaced: list) -> list[Group]:
    projections = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if not fusable(*projections):
        return []
    group, plain, kept = Group(projections, dtype), [p.forward for p in projections], {}

    def q(x):
        if projections[0].disable_adapters:
            return plain[0](x)
        out = SharedInput.apply(x, group, *group.factors)
        kept.update(x=x, k=out[1], v=out[2])
        return out[0]

    def k(x):
        return kept.pop("k") if kept.get("x") is x and "k" in kept else plain[1](x)

    def v(x):
        out = kept.pop("v") if kept.get("x") is x and "v" in kept else plain[2](x)
        kept.pop("x", None)
        return out

    for projection, forward in zip(projections, (q, k, v), strict=True):
        _replace(projection, forward, replaced)
    return [group]


def _single(module, dtype, replaced: list) -> list[Group]:
    if not fusable(module):
        return []
    group, plain = Group([module], dtype), module.forward

    def forward(x):
        return plain(x) if module.disable_adapters else SharedInput.apply(x, group, *group.factors)[0]

    _replace(module, forward, replaced)
    return [group]


def _mlp(mlp, dtype, output_is_kept: bool, replaced: list) -> list[Group]:
    projections = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = getattr(mlp, "act_fn", None)
    is_silu = isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
    own = is_llamas(type(mlp), "forward", "LlamaMLP") and is_silu
    if not (own and fusable(*projections[:2]) and fusable(projections[2])):
        return []
    inner, outer, plain = Group(projections[:2], dtype), Group(projections[2:], dtype), mlp.forward

    def forward(x):
        if projections[0].disable_adapters:
            return plain(x)
        return GatedMLP.apply(x, inner, outer, output_is_kept, *inner.factors, *outer.factors)

    _replace(mlp, forward, replaced)
    return [inner, outer]


def _norm(norm, replaced: list):
    plain = norm.forward

    def forward(x):
        if not torch.is_grad_enabled():  # generation: other shapes at every batch are not worth compiling for
            return plain(x)
        return rms_norm(x, norm.weight, norm.variance_epsilon)

    _replace(norm, forward, replaced)
