"""What fits, decided before the model is loaded: tokens a forward pass, passes a step, checkpointing, weight format.

Memory is added up from a model's shapes, time from the measured rate of matrix products. benchmarks/README.md holds
predicted against measured.
"""

import itertools
import math
from dataclasses import asdict, dataclass, replace

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoModelForCausalLM

from src.engine import fuse, weights
from src.engine.attention import has_varlen
from src.engine.batches import IGNORE, StepSampler
from src.engine.weights import matmul_rate

TOKENS = 16384  # a forward pass above this gains no speed (measured on an H200)
RESERVE = 0.95  # share of the free memory that a plan may fill: the rest is fragmentation
WORKSPACE = 2**28  # bytes: cuBLAS workspaces, kernels' temporaries
WAITS = 2  # a step that launches its kernels so many times as long as they compute is recorded: 7B, below 2,000 tokens
DROPOUT_TOKENS = 4000  # a step of fewer waits for launching the masks' kernels longer than for PEFT's own layers
SHARE, SHARE_CHECKPOINTED = 0.66, 0.72  # of the matrix-product rate that training reaches with every layer fused
FP8 = 1.1  # training with 8-bit products is so many times as fast as with 16-bit ones (H200)
SHARE_PLAIN = 0.45  # the same where layers run through PEFT's own forward
DEQUANTIZE = 1.8e12  # bytes a second of turning NF4 into 16 bits, 2.5 bytes a weight
LAUNCH_PLAIN, LAUNCH_4BIT = 0.21, 0.33  # seconds to launch a pass of 32 layers with 16-bit and 4-bit weights (H200)
CPU_SHARE = 0.4  # of the CPU's matrix-product rate, demo model on two cores
CPU_PASS = 90  # a forward pass on a CPU costs as much as this many tokens more (demo model on two cores)
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class PlanError(RuntimeError):
    """A model that cannot be trained on this machine as asked. The message says what is needed and what to change."""


@dataclass(frozen=True)
class Plan:
    """How a run is computed on this machine. Nothing here but fp8 changes what is trained."""

    rows: int  # of the training set
    rows_per_step: int
    steps: int  # optimizer steps
    packed: bool  # rows end to end; otherwise padded
    passes: int  # forward passes an optimizer step, of each process
    tokens: int  # of the largest pass, padding included
    checkpointing: bool  # activations are computed again in the backward pass instead of kept
    dequantized: bool  # 4-bit weights are turned into 16-bit ones (or two 8-bit copies) once, before training
    fused: bool  # LoRA layers run through engine.fused
    gib: float | None  # predicted peak of a GPU's memory
    minutes: float  # predicted time of training
    fp8: bool = False  # frozen products of fused layers in 8 bits
    ranks: int = 1  # processes, one a GPU, that share every optimizer step
    graphs: bool = False  # steps are recorded as CUDA graphs

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{key}</th><td>{value}</td></tr>" for key, value in asdict(self).items())
        return f"<table>{rows}</table>"


def plan(
    config, lora, quantization, arguments, rows, device,
    packing="auto", fused="auto", checkpointing="auto", memory_gib=None, tokens_per_pass=None, fp8="off", graphs="auto",
    ranks=None,
) -> Plan:  # fmt: skip
    """Plan how to train on these rows on this device, as fast as its memory allows.

    config: the base model's PretrainedConfig. lora, quantization, arguments: LoraConfig, BitsAndBytesConfig and
    TrainingArguments. rows: a dataset with input_ids and labels. memory_gib, tokens_per_pass: at most. ranks: how many
    processes will share a step; None: as many as there are. Raises PlanError when not even the longest row fits, a
    target module is not in the model, lora.r is above its rank, warmup does not end, or fp8 is asked for in vain.
    """
    lengths, ranks = [len(ids) for ids in rows["input_ids"]], ranks or arguments.world_size
    per_step, steps = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps, arguments.max_steps
    steps = steps if steps > 0 else math.ceil(arguments.num_train_epochs * math.ceil(len(lengths) / per_step))
    if 1 <= arguments.warmup_steps >= steps and arguments.lr_scheduler_type != "constant":
        raise PlanError(
            f"training.warmup_steps is {arguments.warmup_steps:g}, and {len(lengths)} rows make {steps} optimizer "
            "step(s), so that the learning rate never reaches its peak: lower it, or train longer."
        )
    dtype = quantization.bnb_4bit_compute_dtype
    packed = packing == "on" or (packing == "auto" and has_varlen(device, dtype))
    eight, in_4bit, mean = fp8 == "on", quantization.load_in_4bit, sum(lengths) / len(lengths)
    size = mean * per_step / ranks  # tokens of a step of one process
    triton, half = fuse.available(device), dtype == torch.bfloat16
    s, rate = shapes(config, lora), matmul_rate(device, dtype)
    computing, launching = size * 4 * s["linear"] / rate / SHARE, LAUNCH_PLAIN * s["layers"] / 32
    wanted = graphs == "on" or (graphs == "auto" and launching > WAITS * computing)
    recorded = wanted and packed and triton and half
    slow_masks = lora.lora_dropout > 0 and size < DROPOUT_TOKENS and not (eight or recorded)
    is_fused, on = fused == "auto" and triton and not slow_masks, checkpointing == "on"
    if eight and not (is_fused and half and has_varlen(device, dtype, (9, 0)) and not on):
        raise PlanError(
            "engine.fp8 is 'on': expected a GPU of compute capability 9.0, Triton, bfloat16, fused layers and no "
            f"checkpointing; found {device.type}, {dtype}, {fused!r}, {checkpointing!r}. Set engine.fp8 to 'off'."
        )
    machine = (on, in_4bit or eight, is_fused, None, 0.0, eight, ranks, recorded)
    first = Plan(len(lengths), per_step, steps, packed, 1, 0, *machine)
    if device.type != "cuda":
        return _cpu_plan(first, lengths, arguments.seed, tokens_per_pass, s, rate)
    free = weights.free_bytes(device) + torch.cuda.memory_allocated(device)
    free = RESERVE * min(free, memory_gib * 2**30 if memory_gib else free)
    answers = [sum(label != IGNORE for label in labels) for labels in rows["labels"]]
    # of a pass's tokens: halfway between the share in the whole set and that of the longest answer in the longest row
    supervised = (sum(answers) / sum(lengths) + max(answers) / max(lengths)) / 2
    mean *= min(per_step, len(lengths)) / ranks

    def need(p: Plan) -> int:
        return sum(memory(p, math.ceil(p.tokens * supervised), s, quantization, lora).values())

    found = []
    for checkpointed in {"auto": (False, True), "on": (True,), "off": (False,)}["off" if eight else checkpointing]:
        for dequantized in (True,) if eight else (True, False) if in_4bit else (False,):
            p = replace(first, checkpointing=checkpointed, dequantized=dequantized)
            p = with_passes(p, lengths, arguments.seed, tokens_per_pass or TOKENS)
            while need(p) > free and p.tokens > max(lengths) and not tokens_per_pass:
                p = with_passes(p, lengths, arguments.seed, p.tokens * 3 // 4)
            if need(p) <= free or tokens_per_pass:
                seconds = _seconds(p, mean * steps, rate, s, quantization)
                p = replace(p, gib=round(need(p) / 2**30, 1), minutes=round(seconds / 60, 1))
                found.append(((seconds, p.passes, p.tokens, checkpointed, dequantized), p))
    if found:
        p = min(found)[1]
        return replace(p, graphs=p.graphs and p.passes == 1 and not p.checkpointing and p.dequantized >= in_4bit)
    least = replace(first, checkpointing=not eight, dequantized=eight, tokens=max(lengths))
    least = sum(memory(least, max(answers), s, quantization, lora).values()) / 2**30
    way = "in fp8 without" if eight else "even with"
    raise PlanError(
        f"{config.name_or_path or type(config).__name__} does not fit on {torch.cuda.get_device_name(device)}: the "
        f"longest row ({max(lengths)} tokens) needs {least:.1f} GiB {way} checkpointing, {free / 2**30:.1f} GiB can be "
        "used. Lower prompt.max_tokens or lora.r, set engine.checkpointing to 'auto', fp8 to 'off', or free the GPU."
    )


def _cpu_plan(first: Plan, lengths, seed, most, s: dict, rate: float) -> Plan:
    """The number of passes that computes fewest tokens, with padding and the cost of launching a pass as tokens."""
    found = []
    for passes in range(1, min(math.ceil(first.rows_per_step / first.ranks), len(lengths)) + 1):
        sizes = _pass_sizes(replace(first, passes=passes), lengths, seed)
        if max(sizes) <= max(most or math.inf, max(lengths)):
            found.append((sum(sizes) + CPU_PASS * len(sizes), passes, max(sizes)))
    tokens, passes, largest = min(found)
    seconds = tokens * 4 * (s["linear"] + s["other"] / 2) / rate / CPU_SHARE
    return replace(first, passes=passes, tokens=largest, minutes=round(seconds / 60, 1))


def _seconds(p: Plan, tokens: float, rate: float, s: dict, quantization) -> float:
    fast = SHARE_CHECKPOINTED if p.checkpointing else SHARE
    share = (fast if p.fused and s["all layers"] else SHARE_PLAIN) * (FP8 if p.fp8 else 1)
    seconds = tokens * (6 if p.checkpointing else 4) * s["linear"] / rate / share
    in_4bit = quantization.load_in_4bit and not p.dequantized
    if in_4bit:  # read 4 bits, write 16, every pass
        seconds += p.steps * p.passes * (3 if p.checkpointing else 2) * 2.5 * s["linear"] / DEQUANTIZE
    launch = (LAUNCH_4BIT if in_4bit else LAUNCH_PLAIN) * (1.4 if p.checkpointing else 1) * s["layers"] / 32
    return seconds if p.graphs else max(seconds, p.steps * p.passes * launch)


def shapes(config, lora) -> dict:
    """The architecture in numbers: layers, widths, and weights by kind. Loads no weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    c, head = config.get_text_config(), model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    inner = [m for m in linear.values() if m is not head]
    if not inner:
        raise PlanError(
            f"{type(model).__name__} has no linear layers (torch.nn.Linear), so nothing to quantise or adapt: choose "
            "another base_model."
        )
    targets = lora.target_modules
    named = [] if isinstance(targets, str) else targets  # otherwise a pattern, or "all-linear"
    unknown = [target for target in named if not any(f".{n}".endswith(f".{target}") for n in linear)]
    if unknown:
        raise PlanError(
            f"target_modules names {', '.join(sorted(unknown))}: {type(model).__name__} has the linear layers "
            f"{', '.join(sorted({n.rpartition('.')[2] for n in linear}))}."
        )
    adapted = [m for n, m in linear.items() if check_target_module_exists(lora, n)]
    adapted = inner if targets == "all-linear" else adapted
    widest = max(min(m.in_features, m.out_features) for m in adapted)
    if lora.r > widest:
        raise PlanError(f"lora.r is {lora.r}: {type(model).__name__}'s adapted layers have a rank of at most {widest}.")
    sizes = [m.weight.numel() for m in inner]
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    head_width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return {
        "layers": c.num_hidden_layers, "hidden": c.hidden_size, "kv": heads * head_width, "vocabulary": c.vocab_size,
        "intermediate": getattr(c, "intermediate_size", 4 * c.hidden_size), "linear": sum(sizes), "largest": max(sizes),
        "other": sum(p.numel() for p in model.parameters()) - sum(sizes),
        "adapter": sum(lora.r * (m.in_features + m.out_features) for m in adapted),
        "all layers": targets == "all-linear" or LAYERS <= set(targets),
    }  # fmt: skip


def memory(p: Plan, supervised: int, s: dict, quantization, lora) -> dict[str, int]:
    """Bytes at the peak of a training step, by use. `supervised`: tokens of the largest pass that the loss sees."""
    double, r, tokens = quantization.bnb_4bit_use_double_quant, lora.r, p.tokens
    four_bit = 0.5 + (1 / 64 + 4 / (64 * 256) if double else 4 / 64)  # blocks of 64 share an absmax
    plain = p.dequantized or not quantization.load_in_4bit
    weight = 2 if not quantization.load_in_4bit or (plain and not p.fp8) else four_bit
    h, i, kv = s["hidden"], s["intermediate"], s["kv"]
    # 16-bit numbers a token keeps in a layer for the backward pass: inputs of norms and projections, q, k, v, gate, up,
    # attention. PEFT's own layers keep the norms' inputs in float32, every step of the activation and, for each
    # projection, dropout's output and mask.
    fast = p.fused and s["all layers"]
    kept = (6 * h + 2 * kv + 2 * i + 7 * r) if fast else (8 * h + 2 * kv + 4 * i + 14 * r)
    kept += 7 * h + i // 2 if lora.lora_dropout and not fast else 0
    layer = 2 * tokens * kept
    logits = supervised * s["vocabulary"] * 14  # 16-bit, float32, log-softmax and their gradients
    activations = s["layers"] * layer
    if p.checkpointing:  # the layers' inputs; then the logits, or one layer with the gradients of gate, up and product
        activations = s["layers"] * 2 * tokens * h + max(layer + 2 * tokens * 4 * i, logits)
    return {
        "weights": int(s["linear"] * (weight + 2 * p.fp8) + s["other"] * 2),
        "adapter": (22 if p.graphs else 18) * s["adapter"],  # float32 weight, gradient, two moments; 16-bit copy
        "activations": activations,
        "logits": 0 if p.checkpointing else logits,
        "dequantised layer": 0 if plain else 2 * s["largest"],
        "workspace": WORKSPACE,
    }


def with_passes(p: Plan, lengths: list[int], seed: int, budget: int) -> Plan:
    """The plan with the fewest passes a step that keep within `budget` tokens. A longer row passes alone."""
    fewest = max(1, math.ceil(p.rows_per_step * sum(lengths) / len(lengths) / p.ranks / budget))
    most = math.ceil(p.rows_per_step / p.ranks)
    for passes in range(min(fewest, most), most + 1):
        p = replace(p, passes=passes)
        p = replace(p, tokens=max(_pass_sizes(p, lengths, seed)))
        if p.tokens <= max(budget, max(lengths)):
            break
    return p


def _pass_sizes(p: Plan, lengths: list[int], seed: int) -> list[int]:
    """Tokens of every forward pass of the training, padding included, of all processes."""
    sizes, per_epoch = [], math.ceil(len(lengths) / p.rows_per_step)
    for rank, epoch in itertools.product(range(p.ranks), range(math.ceil(p.steps / per_epoch))):
        sampler = StepSampler(lengths, p.rows_per_step, p.passes, seed, p.packed, rank, p.ranks)
        sampler.set_epoch(epoch)
        passes = itertools.islice(sampler, (p.steps - epoch * per_epoch) * p.passes)
        passes = ([lengths[i] for i in rows] for rows in passes)
        sizes += [sum(own) if p.packed else max(own, default=0) * len(own) for own in passes]
    return sizes


def smaller(p: Plan, lengths: list[int], seed: int) -> Plan | None:
    """The plan after running out of memory: half the tokens a pass; then 4-bit weights; then checkpointing; or None."""
    p = replace(p, graphs=False)
    halved = with_passes(p, lengths, seed, p.tokens // 2)
    if halved.passes > p.passes:
        return halved
    if p.dequantized and not p.fp8:
        return replace(p, dequantized=False)
    return None if p.fp8 or p.checkpointing else replace(p, checkpointing=True)
