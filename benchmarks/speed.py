"""Speed and memory of training and generation on a CUDA GPU, with Mistral-7B's architecture and random weights.

Speed and memory do not depend on the values of weights or tokens, so nothing is downloaded: rows have SAMSum's real lengths
(benchmarks/samsum_lengths.json) and random tokens, and go through the same src functions as a run.

    python benchmarks/speed.py make-model FOLDER      once: 7.24 B random parameters, 14.5 GB on disk
    python benchmarks/speed.py FOLDER SETUP [...]     each setup in a process of its own; one JSON line each
    python benchmarks/speed.py rows FILE              the same rows for benchmarks/peers.py
    python benchmarks/speed.py cpu                    the demo's training on a CPU, three ways to batch
    python benchmarks/speed.py table                  the README's tables from results/*.json
    python benchmarks/speed.py lengths                how samsum_lengths.json was made (needs data/raw/samsum)
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).resolve().parent
RECIPE = {"training.optimizer": "adamw_torch_fused", "quantization.double": True, "lora.rank": 32, "lora.dropout": 0.0}
TRAIN = {  # setup: overrides of samsum_best; rows a step, steps, and what limits memory
    "ours_64gib": {"training.batch_size": 54, "training.max_steps": 25, "training.memory_gib": 64.0},
    "ours_checkpointed": {"training.batch_size": 32, "training.max_steps": 25, "training.memory_gib": 10.0, "training.checkpointing": "on"},
    "ours_batch_16": {"training.batch_size": 16, "training.max_steps": 60},
    "ours_batch_3": {"training.batch_size": 3, "training.max_steps": 120},
    "ours_batch_3_dropout": {"training.batch_size": 3, "training.max_steps": 60, "lora.dropout": 0.1},  # as `samsum`
    "ours_dropout": {"training.batch_size": 54, "training.max_steps": 15, "lora.dropout": 0.1},
    "ours_plain_layers": {"training.batch_size": 54, "training.max_steps": 15, "training.kernels": "off"},
    "ours_padded": {"training.batch_size": 54, "training.max_steps": 15, "training.packing": "off"},
    "ours_fp16": {"training.batch_size": 54, "training.max_steps": 15, "quantization.compute_dtype": "float16"},
} | {
    f"capped_{gib}": {"training.batch_size": 16, "training.max_steps": 25, "training.memory_gib": float(gib)} for gib in (15, 22, 38, 78)
}  # fmt: skip
JOB = {"training.batch_size": 16, "training.epochs": 3}

CPU = {
    "cpu_length_sorted": ("off", 16),
    "cpu_shuffled": ("off", 1),
    "cpu_packed": ("on", 16),
}  # training.packing, batching.GROUP


def make_model(folder: str):
    """Mistral-7B-Instruct-v0.2's shapes with random bfloat16 weights, and a tokenizer with enough tokens to stand in for its own."""
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
    from src import data, experiments, published

    e = experiments.load_experiment("samsum")
    data.prepare(e)
    tok = published.official_tokenizer("first")

    def sizes(row):
        prompt = f"[INST] Summarize the following dialogue.\n\n{row['dialogue']} [/INST]"
        return [
            len(tok(prompt)["input_ids"]),
            len(tok(f" {row['summary']}", add_special_tokens=False)["input_ids"]) + 1,
        ]

    shuffled = data.read_rows(data.source_files(e)["train"])
    random.Random(0).shuffle(shuffled)
    found = {
        "sample": [sizes(row) for row in shuffled[:1024]],
        "train": [sizes(row) for row in data.load_split(e, "train")[:7366]],
        "test": [sizes(row) for row in data.load_split(e, "test")],
    }
    (HERE / "samsum_lengths.json").write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")


def rows(part: str):
    """prompts.Encoded rows of random tokens with the real lengths."""
    from src import prompts

    draw = random.Random(0)
    sizes = json.loads((HERE / "samsum_lengths.json").read_text(encoding="utf-8"))[part]
    return [
        prompts.Encoded(str(n), [1] + [draw.randrange(3, 4000) for _ in range(p - 1)], [draw.randrange(3, 4000) for _ in range(a - 1)] + [2], "", "", 0)
        for n, (p, a) in enumerate(sizes)
    ]  # fmt: skip


def load(folder: str, overrides: dict):
    from src import experiments, modeling

    e = experiments.load_experiment(
        "samsum_best",
        **{"base_model": folder, "prompt.style": "plain", "training.sample_rows": 0, **RECIPE, **overrides},
    )
    return e, modeling.load_tokenizer(e)


def train(folder: str, setup: str, part: str = "sample", overrides=None, warmup: int | None = None) -> dict:
    """One training setup through src.training.train; tokens/s are real tokens after the warm-up steps, memory the allocator's peak."""
    import torch

    from src import experiments, modeling, planner, training

    experiments.ROOT = Path(tempfile.mkdtemp())
    e, tokenizer = load(folder, TRAIN[setup] if overrides is None else overrides)
    device = modeling.resolve_device("auto")
    if e.training.memory_gib:
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, e.training.memory_gib * 2**30 / total), device)
    encoded = rows(part)
    rate = planner.matmul_rate(device, modeling.compute_dtype(e, device))
    plan = planner.plan(e, encoded)
    print(json.dumps(plan), file=sys.stderr)
    start = time.perf_counter()
    model = modeling.add_adapter(modeling.load_base(e, tokenizer), e)
    loaded = time.perf_counter()
    manifest = training.train(e, model, tokenizer, encoded, encoded[:4], plan=plan)
    trained = time.perf_counter()
    log = [json.loads(line) for line in (e.run_dir / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    log = [row for row in log if "loss" in row]
    first = next(row for row in log if row["step"] >= (warmup or max(5, len(log) // 4)))
    tokens, seconds = log[-1]["tokens"] - first["tokens"], log[-1]["seconds"] - first["seconds"]
    mean = sum(len(row.input_ids) for row in encoded) / len(encoded)
    shutil.rmtree(experiments.ROOT)
    return {
        "setup": setup,
        "ours": True,
        "tok_s": round(tokens / seconds),
        "samples_s": round(tokens / seconds / mean, 1),
        "peak_gib": manifest["peak_gib"],
        "matmul_share": round(tokens / seconds * (6 if manifest["plan"]["checkpointing"] else 4) * 6.98e9 / rate, 3),
        "matmul_tflops": round(rate / 1e12),
        "capped_gib": e.training.memory_gib,
        "predicted_gib": plan["predicted GiB"],
        "predicted_minutes": plan["predicted minutes"],
        "minutes": round((trained - loaded) / 60, 2),
        "load_seconds": round(loaded - start, 1),
        "first_steps_seconds": round(first["seconds"], 1),
        "losses": [row["loss"] for row in log[:: max(1, len(log) // 4)]],
        "retries": len(manifest["plans_out_of_memory"]),
        "plan": manifest["plan"],
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
    }


def cpu(setup: str) -> dict:
    """The demo's first 60 steps on this machine's CPU; real tokens a second after 10 of them, and the share of the batches that is padding."""
    import dataclasses

    import torch

    from src import batching, data, experiments, modeling, planner, prompts, training

    packing, batching.GROUP = CPU[setup]
    overrides = {"training.packing": packing, "training.max_steps": 60, "training.sample_rows": 0, "device": "cpu"}
    e = experiments.load_experiment("demo", **overrides)
    e = dataclasses.replace(e, name=f"benchmark_{setup}", training=dataclasses.replace(e.training, eval_steps=None))
    data.prepare(e)
    tokenizer = modeling.load_tokenizer(e)
    encoded = prompts.build_all(data.train_rows(e), tokenizer, e.prompt)
    sizes = [len(row.input_ids) for row in encoded]
    batches = [
        [sizes[i] for i in b] for b in batching.StepSampler(sizes, e.training.batch_size, 1, e.seed, packing == "on")
    ]
    computed = sum(sum(b) if packing == "on" else max(b) * len(b) for b in batches[:60])
    shutil.rmtree(e.run_dir, ignore_errors=True)
    training.train(e, modeling.add_adapter(modeling.load_base(e, tokenizer), e), tokenizer, encoded, encoded[:2])
    log = [json.loads(line) for line in (e.run_dir / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    log = [row for row in log if "loss" in row and row["step"] >= 10]
    shutil.rmtree(e.run_dir)
    return {
        "setup": setup,
        "ours": True,
        "tok_s": round((log[-1]["tokens"] - log[0]["tokens"]) / (log[-1]["seconds"] - log[0]["seconds"])),
        "padding": round(1 - sum(map(sum, batches[:60])) / computed, 3),
        "matmul_gflops": round(planner.matmul_rate(torch.device("cpu"), torch.float32) / 1e9),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def generate(folder: str, setup: str) -> dict:
    """New tokens a second: 64 for each of the 819 test prompts, prompts read included, from the base and from the fine-tuned model, through src.generation."""
    import torch

    from src import generation, kernels, modeling

    fixed = {"generation.max_new_tokens": 64, "generation.min_new_tokens": 64}
    e, tokenizer = load(folder, fixed | ({"generation.dequantize": "off"} if "4bit" in setup else {}))
    model = modeling.add_adapter(modeling.load_base(e, tokenizer), e)
    encoded = rows("test")
    records = [{"id": r.id, "section": "", "dialogue": "", "summary": ""} for r in encoded]
    generation.predict(model, tokenizer, records[:8], encoded[:8], e)  # warm-up, and dequantisation
    torch.cuda.reset_peak_memory_stats()
    seconds, new = {}, 0
    for system in ("base", "finetuned"):
        torch.cuda.synchronize()
        start = time.perf_counter()
        if system == "base":
            with model.disable_adapter():
                answers = generation.generate(model, tokenizer, encoded, e)
        else:
            with kernels.fused(model, kernels.wanted(e, model.device)):
                answers = generation.generate(model, tokenizer, encoded, e)
        torch.cuda.synchronize()
        seconds[system] = time.perf_counter() - start
        new += sum(a["tokens"] for a in answers)
    return {
        "setup": setup,
        "ours": True,
        "new_tok_s": round(new / sum(seconds.values())),
        "base_new_tok_s": round(new / 2 / seconds["base"]),
        "finetuned_new_tok_s": round(new / 2 / seconds["finetuned"]),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def job(folder: str) -> dict:
    """The job a user waits for: 7,366 SAMSum rows for 3 epochs, 16 rows a step, then 819 test summaries from each model.

    Random weights never stop, so every answer gets the cap's 256 tokens from the base model and 100, the longest reference, from
    the fine-tuned one.
    """
    import dataclasses

    import torch

    from src import generation, kernels, modeling

    trained = train(folder, "job", "train", JOB, warmup=30)
    modeling.free_cuda()
    encoded, seconds = rows("test"), {}
    e, tokenizer = load(folder, {"generation.max_new_tokens": 256, "generation.min_new_tokens": 256})
    start = time.perf_counter()
    model = modeling.add_adapter(modeling.load_base(e, tokenizer), e)
    modeling.dequantize(model)
    loading = trained["load_seconds"] + time.perf_counter() - start
    start = time.perf_counter()
    with model.disable_adapter():
        generation.generate(model, tokenizer, encoded, e)
    torch.cuda.synchronize()
    seconds["base"] = time.perf_counter() - start
    e = dataclasses.replace(e, generation=dataclasses.replace(e.generation, max_new_tokens=100, min_new_tokens=100))
    start = time.perf_counter()
    with kernels.fused(model, kernels.wanted(e, model.device)):
        generation.generate(model, tokenizer, encoded, e)
    torch.cuda.synchronize()
    seconds["finetuned"] = time.perf_counter() - start
    return trained | {
        "minutes": round(trained["minutes"] + (loading + sum(seconds.values())) / 60, 2),
        "training_minutes": trained["minutes"],
        "load_seconds": round(loading, 1),
        "generation_seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def cpu_table() -> str:
    """The README's second table: the demo on a CPU."""
    runs = {}
    for r in json.loads((HERE / "results" / "cpu.json").read_text(encoding="utf-8")):
        runs.setdefault((r["setup"], r["padding"]), []).append(f"{r['tok_s']:,}")
    lines = ["| setup | tokens/s, every run | padding |", "|---|---|---|"]
    lines += [f"| {setup} | {', '.join(speeds)} | {padding:.1%} |" for (setup, padding), speeds in runs.items()]
    return "\n".join(lines)


def table(path: Path = HERE / "results" / "h200.json") -> str:
    """The README's tables of a GPU: training, ours and the peers', then generation and the whole job."""
    lines = [
        "| setup | rows a step | tokens/s | samples/s | of the matmul rate | peak GiB | predicted GiB | plan | call |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    results = json.loads(path.read_text(encoding="utf-8"))
    for r in results:
        if "tok_s" not in r or r["setup"] == "job":
            continue
        if not r["ours"]:
            lines.append(
                f"| {r['setup']} | | {r['tok_s']:,} | {r['samples_s']:.1f} | | {r['peak_gib']:.1f} | | peers.py | {r['call']} |"
            )
            continue
        p = r["plan"]
        plan = f"{p['forward passes a step']} x {p['tokens a forward pass']:,} tokens, {p['weights']}" + (
            ", checkpointing" if p["checkpointing"] else ""
        )
        cap = f" (limit {r['capped_gib']:.0f} GiB)" if r["capped_gib"] else ""
        lines.append(
            f"| {r['setup']}{cap} | {p['rows an optimizer step']} | {r['tok_s']:,} | {r['samples_s']} | {r['matmul_share']:.0%} of {r['matmul_tflops']} TFLOP/s "
            f"| {r['peak_gib']:.1f} | {r['predicted_gib']:.1f} | {plan} | {r['call']} |"
        )
    for r in results:
        if "new_tok_s" in r:
            lines.append(
                f"\nGeneration, 819 prompts, 64 new tokens each, reading the prompts included: {r['new_tok_s']:,} new tokens/s "
                f"(base {r['base_new_tok_s']:,}, fine-tuned {r['finetuned_new_tok_s']:,}), peak {r['peak_gib']:.1f} GiB."
            )
        if r["setup"] == "job":
            g = r["generation_seconds"]
            lines.append(
                f"\nThe whole job: {r['minutes']:.1f} minutes. Training 7,366 rows for 3 epochs, {r['plan']['rows an optimizer step']} rows a step, "
                f"{r['training_minutes']:.1f} ({r['predicted_minutes']:.1f} predicted; {r['tok_s']:,} tokens/s); 819 answers of 256 tokens from the base model "
                f"{g['base'] / 60:.1f}, of 100 from the fine-tuned one {g['finetuned'] / 60:.1f}; loading {r['load_seconds'] / 60:.1f}."
            )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["make-model"]:
        make_model(arguments[1])
    elif arguments[:1] == ["rows"]:
        pairs = [{"p": row.prompt_ids, "s": row.answer_ids} for row in rows("sample")]
        Path(arguments[1]).write_text(json.dumps(pairs), encoding="utf-8")
    elif arguments == ["lengths"]:
        lengths()
    elif arguments == ["cpu"]:
        for setup in CPU:
            subprocess.run([sys.executable, __file__, "cpu", setup], check=False, timeout=400)
    elif arguments[:1] == ["cpu"]:
        print(json.dumps(cpu(arguments[1])), flush=True)
    elif arguments == ["table"]:
        print(f"{table()}\n\n{cpu_table()}")
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
