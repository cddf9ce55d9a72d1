"""Speed and memory of training and generation on a CUDA GPU, with Mistral-7B's architecture and random weights.

Speed and memory do not depend on the values of weights or tokens, so nothing is downloaded: rows have SAMSum's real
lengths (benchmarks/samsum_lengths.json) and random tokens, and go through the same functions as the notebooks.

    python benchmarks/speed.py make-model FOLDER      once: 7.24 B random parameters, 14.5 GB on disk
    python benchmarks/speed.py FOLDER SETUP [...]     each setup in a process of its own; one JSON line each
    python benchmarks/speed.py rows FILE              the same rows for benchmarks/peers.py
    python benchmarks/speed.py lengths                how samsum_lengths.json was made (needs data/raw/samsum)
"""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).resolve().parent
RECIPE = {"lora.r": 32, "lora.lora_dropout": 0.0, "training.optim": "adamw_torch_fused", "prompt.style": "plain"}
ROWS = "training.per_device_train_batch_size"
TRAIN = {  # setup: overrides of samsum_best; rows a step, steps, and what limits memory
    "ours_64gib": {ROWS: 54, "training.max_steps": 25, "engine.memory_gib": 64.0},
    "ours_checkpointed": {ROWS: 32, "training.max_steps": 25, "engine.memory_gib": 10.0, "engine.checkpointing": "on"},
    "ours_batch_16": {ROWS: 16, "training.max_steps": 60},
    "ours_batch_3": {ROWS: 3, "training.max_steps": 120, "engine.graphs": "off"},
    "ours_batch_3_dropout": {
        ROWS: 3,
        "training.max_steps": 60,
        "engine.graphs": "off",
        "lora.lora_dropout": 0.1,  # as `samsum`
    },
    "ours_dropout": {ROWS: 54, "training.max_steps": 15, "lora.lora_dropout": 0.1},
    "ours_fp8": {ROWS: 54, "training.max_steps": 25, "engine.memory_gib": 64.0, "engine.fp8": "on"},
    "ours_batch_3_graphs": {ROWS: 3, "training.max_steps": 300, "engine.graphs": "on"},
    "ours_batch_3_dropout_graphs": {
        ROWS: 3,
        "training.max_steps": 300,
        "engine.graphs": "on",
        "lora.lora_dropout": 0.1,
    },
    "ours_batch_16_graphs": {ROWS: 16, "training.max_steps": 120, "engine.graphs": "on"},
    "smollm2_16": {ROWS: 16, "training.max_steps": 400, "engine.graphs": "off"},  # with SmolLM2's folder
    "smollm2_16_graphs": {ROWS: 16, "training.max_steps": 400, "engine.graphs": "on"},
    "ours_plain_layers": {ROWS: 54, "training.max_steps": 15, "engine.fused": "off"},
    "ours_padded": {ROWS: 54, "training.max_steps": 15, "engine.packing": "off"},
    "ours_fp16": {ROWS: 54, "training.max_steps": 15, "quantization.bnb_4bit_compute_dtype": "float16"},
} | {f"capped_{gib}": {ROWS: 16, "training.max_steps": 25, "engine.memory_gib": float(gib)} for gib in (15, 22, 38, 78)}
JOB = {ROWS: 16, "training.num_train_epochs": 3.0}


def make_model(folder: str):
    """Mistral-7B-Instruct-v0.2's shapes with random bfloat16 weights, and a tokenizer that stands in for its own."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=32768, sliding_window=None, rms_norm_eps=1e-5,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        MistralForCausalLM(config).save_pretrained(folder, max_shard_size="5GB")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (HERE.parent / "data/demo/base" / name).exists():
            shutil.copy(HERE.parent / "data/demo/base" / name, folder)


def lengths():
    """Token counts of prompt and answer: 1,024 random training rows, the recipe's first 7,366, and the test rows."""
    from src import data, published, recipes

    recipe = recipes.load("samsum")
    data.prepare(recipe)
    tok = published.official_tokenizer("first")

    def sizes(row):
        prompt = f"[INST] Summarize the following dialogue.\n\n{row['dialogue']} [/INST]"
        answer = tok(f" {row['summary']}", add_special_tokens=False)["input_ids"]
        return [len(tok(prompt)["input_ids"]), len(answer) + 1]

    shuffled = data.read_rows(data.source_files(recipe)["train"])
    random.Random(0).shuffle(shuffled)
    found = {
        "sample": [sizes(row) for row in shuffled[:1024]],
        "train": [sizes(row) for row in data.load_split(recipe, "train")[:7366]],
        "test": [sizes(row) for row in data.load_split(recipe, "test")],
    }
    (HERE / "samsum_lengths.json").write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")


def rows(part: str):
    """A dataset as prompts.build_all makes it, of random tokens with the real lengths."""
    from src import prompts

    draw = random.Random(0)
    sizes = json.loads((HERE / "samsum_lengths.json").read_text(encoding="utf-8"))[part]
    encoded = []
    for n, (p, a) in enumerate(sizes):
        prompt = [1] + [draw.randrange(3, 4000) for _ in range(p - 1)]
        answer = [draw.randrange(3, 4000) for _ in range(a - 1)] + [2]
        encoded.append(prompts.Encoded(str(n), prompt, answer, "", "", 0))
    return prompts.dataset(encoded)


def setup_of(folder: str, overrides: dict):
    """The recipe samsum_best on the model in `folder`, its device, and notebook 02's three configuration objects."""
    import tempfile

    from peft import LoraConfig
    from transformers import TrainingArguments

    from src import qlora, recipes

    qlora.quiet()
    recipe = recipes.load("samsum_best", {"base_model": folder, **RECIPE, **overrides})
    device = qlora.resolve_device(recipe.device)
    dtype = qlora.compute_dtype(recipe, device)
    ours = {"eval_steps", "early_stopping_patience", "sample_rows", "keep_checkpoints", "load_best_model_at_end"}
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), seed=recipe.seed, eval_strategy="epoch", bf16=str(dtype) == "torch.bfloat16",
        fp16=str(dtype) == "torch.float16", use_cpu=device.type == "cpu", save_strategy="no", disable_tqdm=True,
        **recipe.training.model_dump(exclude=ours),
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", **recipe.lora.model_dump())
    return recipe, device, qlora.quantization_config(recipe, device), lora, arguments


def planned(recipe, device, quantization, lora, arguments, encoded):
    from src import engine, qlora

    options = recipe.engine.limits()
    return engine.plan(qlora.load_config(recipe), lora, quantization, arguments, encoded, device, **options)


def train(folder: str, setup: str, part: str = "sample", overrides=None, warmup: int | None = None) -> dict:
    """One training setup; tokens/s are real tokens after the warm-up steps, memory the allocator's peak."""
    import torch
    from peft import get_peft_model

    from src import engine, qlora
    from src.engine import planning

    objects = setup_of(folder, TRAIN[setup] if overrides is None else overrides)
    recipe, device, quantization, lora, arguments = objects
    tokenizer, encoded = qlora.load_tokenizer(recipe), rows(part)
    if recipe.engine.memory_gib:
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, recipe.engine.memory_gib * 2**30 / total), device)
    rate = planning.matmul_rate(device, quantization.bnb_4bit_compute_dtype)
    plan = planned(*objects, encoded)
    print(plan, file=sys.stderr)
    start = time.perf_counter()
    torch.manual_seed(recipe.seed)
    model = get_peft_model(qlora.load_base(recipe, tokenizer, device, quantization), lora)
    loaded = time.perf_counter()
    trainer = engine.FastTrainer(model, arguments, encoded, encoded.select(range(4)), tokenizer, plan)
    trainer.train()
    trained = time.perf_counter()
    log = [row for row in trainer.state.log_history if "loss" in row]
    if plan.graphs:
        warmup = warmup or plan.steps // 2  # by then the usual sizes are recorded
    first = next(row for row in log if row["step"] >= (warmup or max(5, len(log) // 4)))
    tokens, seconds = log[-1]["tokens"] - first["tokens"], log[-1]["seconds"] - first["seconds"]
    mean = sum(map(len, encoded["input_ids"])) / len(encoded)
    per_token = (6 if trainer.plan.checkpointing else 4) * planning.shapes(qlora.load_config(recipe), lora)["linear"]
    return {
        "setup": setup,
        "ours": True,
        "tok_s": round(tokens / seconds),
        "samples_s": round(tokens / seconds / mean, 1),
        "steps_s": round((log[-1]["step"] - first["step"]) / seconds, 2),
        "peak_gib": trainer.peak_gib,
        "matmul_share": round(tokens / seconds / plan.ranks * per_token / rate, 3),
        "matmul_tflops": round(rate / 1e12),
        "capped_gib": recipe.engine.memory_gib,
        "predicted_gib": plan.gib,
        "predicted_minutes": plan.minutes,
        "minutes": round((trained - loaded) / 60, 2),
        "load_seconds": round(loaded - start, 1),
        "first_steps_seconds": round(first["seconds"], 1),
        "recorded": trainer.recorded,  # sizes of steps
        "losses": [row["loss"] for row in log[:: max(1, len(log) // 4)]],
        "retries": len(trainer.failed_plans),
        "plan": dataclasses.asdict(trainer.plan),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
    }


def answers_in(model, tokenizer, encoded, tokens: int) -> tuple[float, int]:
    """Seconds and new tokens of answering every prompt with exactly so many tokens."""
    import torch
    from transformers import GenerationConfig

    from src import engine

    exactly = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens)
    torch.cuda.synchronize()
    start = time.perf_counter()
    answers = engine.generate(model, tokenizer, encoded, exactly, progress=False)
    torch.cuda.synchronize()
    return time.perf_counter() - start, sum(a["tokens"] for a in answers)


def loaded_model(folder: str, overrides: dict):
    from peft import get_peft_model

    from src import qlora

    recipe, device, quantization, lora, _ = setup_of(folder, overrides)
    tokenizer = qlora.load_tokenizer(recipe)
    return get_peft_model(qlora.load_base(recipe, tokenizer, device, quantization), lora), tokenizer


def generate(folder: str, setup: str) -> dict:
    """New tokens a second: 64 for each of the 819 test prompts, reading included, from base and fine-tuned model."""
    import torch

    from src import engine

    model, tokenizer = loaded_model(folder, {})
    if "4bit" not in setup and engine.dequantized_fits(model):
        engine.dequantize(model)
    encoded = rows("test")
    answers_in(model, tokenizer, encoded.select(range(8)), 64)  # warm-up
    torch.cuda.reset_peak_memory_stats()
    with model.disable_adapter():
        base, new = answers_in(model, tokenizer, encoded, 64)
    tuned, _ = answers_in(model, tokenizer, encoded, 64)
    return {
        "setup": setup,
        "ours": True,
        "new_tok_s": round(2 * new / (base + tuned)),
        "base_new_tok_s": round(new / base),
        "finetuned_new_tok_s": round(new / tuned),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def job(folder: str) -> dict:
    """The job a user waits for: 7,366 SAMSum rows for 3 epochs, 16 rows a step, then 819 test summaries of each model.

    Random weights never stop, so every answer gets the cap's 256 tokens from the base model and 100, the longest
    reference, from the fine-tuned one.
    """
    from src import engine

    trained = train(folder, "job", "train", JOB, warmup=30)
    engine.free_cuda()
    encoded, start = rows("test"), time.perf_counter()
    model, tokenizer = loaded_model(folder, {})
    engine.dequantize(model)
    loading = trained["load_seconds"] + time.perf_counter() - start
    with model.disable_adapter():
        base, _ = answers_in(model, tokenizer, encoded, 256)
    tuned, _ = answers_in(model, tokenizer, encoded, 100)
    return trained | {
        "minutes": round(trained["minutes"] + (loading + base + tuned) / 60, 2),
        "training_minutes": trained["minutes"],
        "load_seconds": round(loading, 1),
        "generation_seconds": {"base": round(base, 1), "finetuned": round(tuned, 1)},
    }


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["make-model"]:
        make_model(arguments[1])
    elif arguments[:1] == ["rows"]:
        split = [(row["input_ids"], len(row["prompt_ids"])) for row in rows("sample")]
        pairs = [{"p": ids[:n], "s": ids[n:]} for ids, n in split]
        Path(arguments[1]).write_text(json.dumps(pairs), encoding="utf-8")
    elif arguments == ["lengths"]:
        lengths()
    elif len(arguments) == 2:
        folder, setup = str(Path(arguments[0]).resolve()), arguments[1]
        result = (
            job(folder)
            if setup == "job"
            else generate(folder, setup)
            if setup.startswith("generate")
            else train(folder, setup)
        )
        print(json.dumps(result), flush=True)
    elif len(arguments) > 2:
        for setup in arguments[1:]:
            subprocess.run([sys.executable, __file__, arguments[0], setup], check=False, timeout=400)
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
