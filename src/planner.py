"""What fits, decided before the model is loaded: tokens a forward pass, passes an optimizer step, checkpointing, weight format.

The memory of a step is added up from the architecture's shapes (a model on torch's meta device: no weights, any
architecture); the time from the GPU's measured matrix-product rate. Constants that cannot be derived are named below with
where they were measured; benchmarks/README.md holds predicted against measured.
"""

import itertools
import math
import time

import torch
from torch import nn

from src import batching, experiments, kernels, modeling

TOKENS = 16384  # a forward pass above this gains no speed (measured on an H200)
RESERVE = 0.95  # share of the free memory that a plan may fill: the rest is fragmentation
WORKSPACE = 2**28  # bytes: cuBLAS workspaces, kernels' temporaries
SHARE = {
    False: 0.66,
    True: 0.72,
}  # of the matrix-product rate that fused training reaches, without and with checkpointing
PLAIN = 0.45  # the same where layers run through PEFT's own forward
DEQUANTIZE = 1.8e12  # bytes a second of turning NF4 into 16 bits, 2.5 bytes a weight
PASS_SECONDS = {
    True: 0.21,
    False: 0.33,
}  # to launch a pass of 32 layers from Python, with plain and with 4-bit weights (H200)
CPU_SHARE = 0.4  # of the CPU's matrix-product rate, demo model on two cores


def shapes(experiment) -> dict:
    """The architecture in numbers: bytes need these and nothing else. Reads config.json only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with modeling.hub_errors(experiment, "configuration"):
        config = AutoConfig.from_pretrained(modeling.model_source(experiment), revision=experiment.revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config = config.get_text_config()
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    targets = [m for n, m in model.named_modules() if n.rpartition(".")[2] in experiment.lora.target_modules]
    if not linear:
        raise modeling.ModelError(
            f"{experiment.base_model} ({type(model).__name__}) has no linear layers (torch.nn.Linear), so nothing to quantise or adapt: "
            "choose another base_model."
        )
    weights = sum(m.weight.numel() for m in linear.values())
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "intermediate": getattr(config, "intermediate_size", 4 * config.hidden_size),
        "kv": (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
        "vocabulary": config.vocab_size,
        "linear": weights,
        "largest": max(m.weight.numel() for m in linear.values()),
        "other": sum(p.numel() for p in model.parameters()) - weights,
        "adapter": sum(
            experiment.lora.rank * (m.in_features + m.out_features) for m in targets if isinstance(m, nn.Linear)
        ),
    }


def memory(
    experiment, s: dict, tokens: int, supervised: int, checkpointing: bool, dequantized: bool, fused: bool
) -> dict:
    """Bytes at the peak of a training step by what they are for. `tokens`, `supervised`: of the largest forward pass."""
    q, r = experiment.quantization, experiment.lora.rank
    four_bit = 0.5 + (1 / 64 + 4 / (64 * 256) if q.double else 4 / 64)  # blocks of 64 share an absmax
    weights = s["linear"] * (2 if dequantized or q.bits == 16 else four_bit) + s["other"] * 2
    h, i, kv = s["hidden"], s["intermediate"], s["kv"]
    # 16-bit numbers a token keeps in a layer for the backward pass: inputs of norms and projections, q, k, v, attention, gate, up;
    # PEFT's own layers keep the norms' inputs in float32, every step of the activation and, for each projection, dropout's output and mask
    kept = (6 * h + 2 * kv + 2 * i + 7 * r) if fused else (8 * h + 2 * kv + 4 * i + 14 * r)
    if experiment.lora.dropout:
        kept += 7 * h + i // 2
    layer = 2 * tokens * kept
    logits = supervised * s["vocabulary"] * 14  # 16-bit, float32, log-softmax and their gradients
    activations = s["layers"] * layer
    if (
        checkpointing
    ):  # the layers' inputs; then the logits, or one layer with its product and the gradients of gate, up and product
        activations = s["layers"] * 2 * tokens * h + max(layer + 2 * tokens * 4 * i, logits)
    return {
        "weights": int(weights),
        "adapter": 18 * s["adapter"],  # float32 weight, gradient and two moments, a 16-bit copy
        "activations": activations,
        "logits": 0 if checkpointing else logits,
        "dequantised layer": 0 if dequantized or q.bits == 16 else 2 * s["largest"],
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


def free_memory(experiment, device: torch.device) -> float:
    """Bytes a run may use: what is free on the GPU, at most training.memory_gib and the process's own limit."""
    free = modeling.free_bytes(device) + torch.cuda.memory_allocated(device)
    return min(free, experiment.training.memory_gib * 2**30) if experiment.training.memory_gib else free


def plan(experiment, rows) -> dict:
    """How to train on these rows (prompts.Encoded) on this machine; a dict for people and for `training.train`.

    The rows of an optimizer step stay those of the recipe (training.batch_size), however many passes they need. Raises
    ModelError when not even the longest row fits.
    """
    t, device = experiment.training, modeling.resolve_device(experiment.device)
    lengths = [len(row.input_ids) for row in rows]
    steps = _steps(experiment, len(rows))
    tokens = sum(lengths) / len(rows) * min(t.batch_size, len(rows)) * steps  # of the whole training
    packed = t.packing == "on" or (
        t.packing == "auto" and kernels.has_varlen(device, modeling.compute_dtype(experiment, device))
    )
    s = shapes(experiment)
    common = {"rows": len(rows), "optimizer steps": steps, "rows an optimizer step": t.batch_size}
    if device.type != "cuda":
        seconds = tokens * 4 * (s["linear"] + s["other"] / 2) / matmul_rate(device, torch.float32) / CPU_SHARE
        passes, size = _batches(experiment, lengths, packed, t.token_budget or 10**9)
        return common | {
            "batches": "packed" if packed else "padded",
            "forward passes a step": passes,
            "tokens a forward pass": size,
            "checkpointing": t.checkpointing == "on",
            "weights": _format(experiment, False),
            "fused": False,
            "predicted GiB": None,
            "predicted minutes": round(seconds / 60, 1),
        }
    fused = kernels.wanted(experiment, device)
    whole = fused and set(experiments.ALL_LINEAR) <= set(
        experiment.lora.target_modules
    )  # memory and speed of every layer fused
    rate = matmul_rate(device, modeling.compute_dtype(experiment, device))
    free = free_memory(experiment, device)
    share = (
        max(len(row.answer_ids) for row in rows) / 2 / max(lengths)
        + sum(len(row.answer_ids) for row in rows) / sum(lengths) / 2
    )
    found = []
    for checkpointing in {"auto": (False, True), "on": (True,), "off": (False,)}[t.checkpointing]:
        for dequantized in (True, False) if experiment.quantization.bits == 4 else (False,):
            budget = t.token_budget or TOKENS
            while True:
                passes, size = _batches(experiment, lengths, packed, budget)
                parts = memory(experiment, s, size, math.ceil(size * share), checkpointing, dequantized, whole)
                if sum(parts.values()) <= RESERVE * free or t.token_budget or size <= max(lengths):
                    break
                budget = min(budget, size) * 3 // 4
            if sum(parts.values()) > RESERVE * free and not t.token_budget:
                continue
            flop = tokens * (6 if checkpointing else 4) * s["linear"]
            seconds = flop / rate / (SHARE[checkpointing] if whole else PLAIN)
            if not dequantized and experiment.quantization.bits == 4:  # read 4 bits, write 16, every pass
                seconds += steps * passes * (3 if checkpointing else 2) * 2.5 * s["linear"] / DEQUANTIZE
            plain = dequantized or experiment.quantization.bits == 16
            launch = PASS_SECONDS[plain] * (1.4 if checkpointing else 1) * s["layers"] / 32
            seconds = max(seconds, steps * passes * launch)
            found.append((seconds, passes, size, checkpointing, dequantized, sum(parts.values())))
    if not found:
        need = sum(
            memory(experiment, s, max(lengths), max(len(r.answer_ids) for r in rows), True, False, whole).values()
        )
        raise modeling.ModelError(
            f"{experiment.base_model} does not fit on {torch.cuda.get_device_name(device)}: the longest row ({max(lengths)} tokens) needs "
            f"{need / 2**30:.1f} GiB even with checkpointing, {RESERVE * free / 2**30:.1f} GiB can be used. Lower prompt.max_tokens or "
            "lora.rank, set training.checkpointing to 'auto', or free the GPU."
        )
    seconds, passes, size, checkpointing, dequantized, total = min(found)
    return common | {
        "batches": "packed" if packed else "padded",
        "forward passes a step": passes,
        "tokens a forward pass": size,
        "checkpointing": checkpointing,
        "weights": _format(experiment, dequantized),
        "fused": fused,
        "predicted GiB": round(total / 2**30, 1),
        "predicted minutes": round(seconds / 60, 1),
    }


def _format(experiment, dequantized: bool) -> str:
    if experiment.quantization.bits == 16:
        return "16 bit"
    return f"{experiment.quantization.type}, {'dequantised once' if dequantized else 'dequantised at every use'}"


def _steps(experiment, rows: int) -> int:
    t = experiment.training
    return t.max_steps or math.ceil(t.epochs * math.ceil(rows / t.batch_size))


def _batches(experiment, lengths, packed: bool, budget: int) -> tuple[int, int]:
    """(forward passes a step, tokens of the largest one, padding included): the fewest passes that keep within `budget` tokens.

    A row that is longer than the budget passes alone.
    """
    t = experiment.training
    steps, per_epoch = _steps(experiment, len(lengths)), math.ceil(len(lengths) / t.batch_size)

    def largest(passes):
        sampler = batching.StepSampler(lengths, t.batch_size, passes, experiment.seed, packed)
        sizes = []
        for epoch in range(math.ceil(steps / per_epoch)):
            sampler.set_epoch(epoch)
            run = itertools.islice(sampler, (steps - epoch * per_epoch) * passes)
            own = ([lengths[i] for i in batch] for batch in run)
            sizes.append(max(sum(b) if packed else max(b) * len(b) for b in own))
        return max(sizes)

    if t.micro_batch_size and not packed:
        passes = t.batch_size // t.micro_batch_size
        return passes, largest(passes)
    passes = min(t.batch_size, max(1, math.ceil(t.batch_size * sum(lengths) / len(lengths) / budget)))
    while True:
        if packed or t.batch_size % passes == 0:
            size = largest(passes)
            if size <= max(budget, max(lengths)) or passes >= t.batch_size:
                return passes, size
        passes += 1


def smaller(experiment, rows, plan: dict) -> dict | None:
    """The plan after an out-of-memory error: half the tokens a forward pass, then checkpointing; None when neither is left."""
    lengths = [len(row.input_ids) for row in rows]
    passes, size = _batches(experiment, lengths, plan["batches"] == "packed", plan["tokens a forward pass"] // 2)
    if passes > plan["forward passes a step"] and not experiment.training.micro_batch_size:
        return plan | {"forward passes a step": passes, "tokens a forward pass": size}
    if not plan["checkpointing"] and experiment.training.checkpointing == "auto":
        return plan | {"checkpointing": True}
    return None
