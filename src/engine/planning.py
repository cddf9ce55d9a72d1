"""What fits, decided before the model is loaded: tokens a forward pass, passes an optimizer step, checkpointing, weight format.

The memory of a step is added up from the architecture's shapes (a model on torch's meta device: no weights, any architecture).
The time comes from the machine's measured matrix-product rate. Constants that cannot be derived are named below with where
they were measured; benchmarks/README.md holds predicted against measured.
"""

import itertools
import math
import time
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from src.engine import fuse, weights
from src.engine.attention import has_varlen
from src.engine.batches import IGNORE, StepSampler, pass_tokens

TOKENS = 16384  # a forward pass above this gains no speed (measured on an H200)
RESERVE = 0.95  # share of the free memory that a plan may fill: the rest is fragmentation
WORKSPACE = 2**28  # bytes: cuBLAS workspaces, kernels' temporaries
SHARE, SHARE_CHECKPOINTED = 0.66, 0.72  # of the matrix-product rate that training reaches with every layer fused
SHARE_PLAIN = 0.45  # the same where layers run through PEFT's own forward
DEQUANTIZE = 1.8e12  # bytes a second of turning NF4 into 16 bits, 2.5 bytes a weight
LAUNCH_PLAIN, LAUNCH_4BIT = 0.21, 0.33  # seconds to launch a pass of 32 layers with 16-bit and 4-bit weights (H200)
CPU_SHARE = 0.4  # of the CPU's matrix-product rate, demo model on two cores
CPU_PASS = 60  # a forward pass on a CPU costs as much as this many tokens more (demo model on two cores)
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class PlanError(RuntimeError):
    """A model that cannot be trained on this machine as asked. The message says what is needed and what to change."""


@dataclass(frozen=True)
class Plan:
    """How a run is computed on this machine. Nothing here changes what is trained."""

    rows: int  # of the training set
    rows_per_step: int
    steps: int  # optimizer steps
    packed: bool  # rows end to end; otherwise padded
    passes: int  # forward passes an optimizer step
    tokens: int  # of the largest pass, padding included
    checkpointing: bool  # activations are computed again in the backward pass instead of kept
    dequantized: bool  # 4-bit weights are turned into 16-bit ones once, before training
    fused: bool  # LoRA layers run through engine.fused
    gib: float | None  # predicted peak of a GPU's memory
    minutes: float  # predicted time of training

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{key}</th><td>{value}</td></tr>" for key, value in asdict(self).items())
        return f"<table>{rows}</table>"


def plan(
    config, lora, quantization, arguments, rows, device,
    packing="auto", fused="auto", checkpointing="auto", memory_gib=None, tokens_per_pass=None,
) -> Plan:  # fmt: skip
    """How to train on these rows on this device, as fast as its memory allows.

    config: the base model's PretrainedConfig. lora, quantization, arguments: LoraConfig, BitsAndBytesConfig and
    TrainingArguments; the rows of a step are per_device_train_batch_size times gradient_accumulation_steps. rows: a dataset with
    input_ids and labels. memory_gib: plan for at most this much GPU memory. tokens_per_pass: at most, instead of planned.
    Raises PlanError when not even the longest row fits, or a target module is not in the model.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    steps = math.ceil(arguments.num_train_epochs * math.ceil(len(lengths) / per_step))
    steps = arguments.max_steps if arguments.max_steps > 0 else steps
    dtype = quantization.bnb_4bit_compute_dtype
    packed = packing == "on" or (packing == "auto" and has_varlen(device, dtype))
    s = shapes(config, lora)
    first = Plan(
        len(lengths), per_step, steps, packed, 1, 0, checkpointing == "on", False,
        fused == "auto" and lora.lora_dropout == 0 and fuse.available(device), None, 0.0,
    )  # fmt: skip
    tokens = sum(lengths) / len(lengths) * min(per_step, len(lengths)) * steps  # of the whole training
    rate = matmul_rate(device, dtype)
    if device.type != "cuda":
        first = replace(first, dequantized=quantization.load_in_4bit)
        return _cpu_plan(first, lengths, arguments.seed, tokens_per_pass, s, rate)
    free = weights.free_bytes(device) + torch.cuda.memory_allocated(device)
    free = RESERVE * min(free, memory_gib * 2**30 if memory_gib else free)
    answers = [sum(label != IGNORE for label in labels) for labels in rows["labels"]]
    supervised = max(answers) / 2 / max(lengths) + sum(answers) / sum(lengths) / 2  # share of a pass's tokens
    found = []
    for checkpointed in {"auto": (False, True), "on": (True,), "off": (False,)}[checkpointing]:
        for dequantized in (True, False) if quantization.load_in_4bit else (False,):
            candidate = replace(first, checkpointing=checkpointed, dequantized=dequantized)
            candidate = _fitted(
                candidate, lengths, arguments.seed, tokens_per_pass, supervised, s, quantization, lora, free
            )
            if candidate:
                seconds = _seconds(candidate, tokens, rate, s, quantization, lora)
                found.append(replace(candidate, minutes=round(seconds / 60, 1)))
    if found:
        return min(found, key=lambda p: (p.minutes, p.passes, p.checkpointing))
    least = replace(first, checkpointing=True, tokens=max(lengths))
    need = sum(memory(least, max(answers), s, quantization, lora).values()) / 2**30
    raise PlanError(
        f"{config.name_or_path or type(config).__name__} does not fit on {torch.cuda.get_device_name(device)}: the longest "
        f"row ({max(lengths)} tokens) needs {need:.1f} GiB even with checkpointing, {free / 2**30:.1f} GiB can be used. "
        "Lower prompt.max_tokens or lora.r, set engine.checkpointing to 'auto', or free the GPU."
    )


def _fitted(p: Plan, lengths, seed, most, supervised, s, quantization, lora, free) -> Plan | None:
    """The plan with the largest passes that fit into `free` bytes; None if not even the longest row does."""
    budget = most or TOKENS
    while True:
        p = with_passes(p, lengths, seed, budget)
        need = sum(memory(p, math.ceil(p.tokens * supervised), s, quantization, lora).values())
        if need <= free or most:
            return replace(p, gib=round(need / 2**30, 1))
        if p.tokens <= max(lengths):
            return None
        budget = min(budget, p.tokens) * 3 // 4


def _seconds(p: Plan, tokens: float, rate: float, s: dict, quantization, lora) -> float:
    share = (SHARE_CHECKPOINTED if p.checkpointing else SHARE) if _all_fused(p, lora) else SHARE_PLAIN
    seconds = tokens * (6 if p.checkpointing else 4) * s["linear"] / rate / share
    in_4bit = quantization.load_in_4bit and not p.dequantized
    if in_4bit:  # read 4 bits, write 16, every pass
        seconds += p.steps * p.passes * (3 if p.checkpointing else 2) * 2.5 * s["linear"] / DEQUANTIZE
    launch = (LAUNCH_4BIT if in_4bit else LAUNCH_PLAIN) * (1.4 if p.checkpointing else 1) * s["layers"] / 32
    return max(seconds, p.steps * p.passes * launch)


def _cpu_plan(first: Plan, lengths, seed, most, s: dict, rate: float) -> Plan:
    """The number of passes that computes fewest tokens, with padding and the cost of launching a pass counted as tokens."""
    found = []
    for passes in [1] if first.packed and not most else range(1, first.rows_per_step + 1):
        sizes = _pass_sizes(replace(first, passes=passes), lengths, seed)
        if not most or max(sizes) <= max(most, max(lengths)) or passes == first.rows_per_step:
            tokens = sum(sizes) + CPU_PASS * len(sizes)
            found.append((tokens, replace(first, passes=passes, tokens=max(sizes))))
    tokens, best = min(found, key=lambda pair: pair[0])
    seconds = tokens * 4 * (s["linear"] + s["other"] / 2) / rate / CPU_SHARE
    return replace(best, minutes=round(seconds / 60, 1))


def _all_fused(p: Plan, lora) -> bool:
    targets = lora.target_modules
    return p.fused and (targets == "all-linear" or LAYERS <= set(targets))


def shapes(config, lora) -> dict:
    """The architecture in numbers: layers, widths, and weights by kind. Loads no weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    c, head = config.get_text_config(), model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    inner = {n: m for n, m in linear.items() if m is not head}
    names = {name.rpartition(".")[2] for name in linear}
    if not inner:
        raise PlanError(
            f"{type(model).__name__} has no linear layers (torch.nn.Linear), so nothing to quantise or adapt: choose another "
            "base_model."
        )
    targets = {n.rpartition(".")[2] for n in inner} if lora.target_modules == "all-linear" else set(lora.target_modules)
    if targets - names:
        raise PlanError(
            f"target_modules names {', '.join(sorted(targets - names))}: {type(model).__name__} has the linear layers "
            f"{', '.join(sorted(names))}."
        )
    adapted = [m for n, m in linear.items() if n.rpartition(".")[2] in targets]
    weights_ = sum(m.weight.numel() for m in inner.values())
    head_width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return {
        "layers": c.num_hidden_layers,
        "hidden": c.hidden_size,
        "intermediate": getattr(c, "intermediate_size", 4 * c.hidden_size),
        "kv": (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) * head_width,
        "vocabulary": c.vocab_size,
        "linear": weights_,
        "largest": max(m.weight.numel() for m in inner.values()),
        "other": sum(p.numel() for p in model.parameters()) - weights_,
        "adapter": sum(lora.r * (m.in_features + m.out_features) for m in adapted),
    }


def memory(p: Plan, supervised: int, s: dict, quantization, lora) -> dict[str, int]:
    """Bytes at the peak of a training step by what they are for. `supervised`: tokens of the largest pass that the loss sees."""
    double, r, tokens = quantization.bnb_4bit_use_double_quant, lora.r, p.tokens
    four_bit = 0.5 + (1 / 64 + 4 / (64 * 256) if double else 4 / 64)  # blocks of 64 share an absmax
    plain = p.dequantized or not quantization.load_in_4bit
    h, i, kv = s["hidden"], s["intermediate"], s["kv"]
    # 16-bit numbers a token keeps in a layer for the backward pass: inputs of norms and projections, q, k, v, attention, gate,
    # up. PEFT's own layers keep the norms' inputs in float32, every step of the activation and, for each projection, dropout's
    # output and mask.
    kept = (6 * h + 2 * kv + 2 * i + 7 * r) if _all_fused(p, lora) else (8 * h + 2 * kv + 4 * i + 14 * r)
    kept += 7 * h + i // 2 if lora.lora_dropout else 0
    layer = 2 * tokens * kept
    logits = supervised * s["vocabulary"] * 14  # 16-bit, float32, log-softmax and their gradients
    activations = s["layers"] * layer
    if p.checkpointing:  # the layers' inputs; then the logits, or one layer with the gradients of gate, up and product
        activations = s["layers"] * 2 * tokens * h + max(layer + 2 * tokens * 4 * i, logits)
    return {
        "weights": int(s["linear"] * (2 if plain else four_bit) + s["other"] * 2),
        "adapter": 18 * s["adapter"],  # float32 weight, gradient and two moments, a 16-bit copy
        "activations": activations,
        "logits": 0 if p.checkpointing else logits,
        "dequantised layer": 0 if plain else 2 * s["largest"],
        "workspace": WORKSPACE,
    }


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a square matrix product, measured in a few hundredths of a second."""
    n, repeats = (8192, 8) if device.type == "cuda" else (1024, 6)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    _wait(device)
    return 2 * n**3 * repeats / (time.perf_counter() - start)


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_passes(p: Plan, lengths: list[int], seed: int, budget: int) -> Plan:
    """The plan with the fewest passes a step that keep within `budget` tokens. A longer row passes alone."""
    p = replace(p, passes=max(1, math.ceil(p.rows_per_step * sum(lengths) / len(lengths) / budget)))
    while True:
        p = replace(p, passes=min(p.passes, p.rows_per_step))
        largest = max(_pass_sizes(p, lengths, seed))
        if largest <= max(budget, max(lengths)) or p.passes == p.rows_per_step:
            return replace(p, tokens=largest)
        p = replace(p, passes=p.passes + 1)


def _pass_sizes(p: Plan, lengths: list[int], seed: int) -> list[int]:
    """Tokens of every forward pass of the training, padding included."""
    sampler, per_epoch, sizes = StepSampler(lengths, p.rows_per_step, p.passes, seed, p.packed), len(lengths), []
    per_epoch = math.ceil(len(lengths) / p.rows_per_step)
    for epoch in range(math.ceil(p.steps / per_epoch)):
        sampler.set_epoch(epoch)
        passes = itertools.islice(sampler, (p.steps - epoch * per_epoch) * p.passes)
        sizes += [pass_tokens([lengths[i] for i in rows], p.packed) for rows in passes]
    return sizes


def smaller(p: Plan, lengths: list[int], seed: int) -> Plan | None:
    """The plan after an out-of-memory error: half the tokens a pass, then 4-bit weights, then checkpointing, then None."""
    halved = with_passes(p, lengths, seed, p.tokens // 2)
    if halved.passes > p.passes:
        return halved
    if p.dequantized:
        return replace(p, dequantized=False)
    return None if p.checkpointing else replace(p, checkpointing=True)
