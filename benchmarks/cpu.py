"""Speed of training on a CPU: the demo's base, and SmolLM2-135M on SAMSum, by this engine and by a plain Trainer.

    python benchmarks/cpu.py               every setup in a process of its own; one JSON line each
    python benchmarks/cpu.py SETUP         one of them

Needs what notebook 01 fetches for `samsum_small`. Nothing else should run beside it.
"""

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROWS = "training.per_device_train_batch_size"
DEMO = {ROWS: 8, "training.max_steps": 48, "data.validation_rows": 2}
SMOL = {ROWS: 8, "training.max_steps": 6, "data.train_rows": 60, "data.validation_rows": 2}
SETUPS = {  # setup: recipe, overrides, whether 4-bit weights are dequantised once
    "demo_padded": ("demo", DEMO | {"engine.packing": "off"}, True),
    "demo_packed": ("demo", DEMO | {"engine.packing": "on"}, True),
    "demo_plain_trainer": ("demo", DEMO, None),
    "smol_padded": ("samsum_small", SMOL | {"engine.packing": "off"}, True),
    "smol_padded_4bit": ("samsum_small", SMOL | {"engine.packing": "off"}, False),
    "smol_packed": ("samsum_small", SMOL | {"engine.packing": "on"}, True),
    "smol_plain_trainer": ("samsum_small", SMOL, None),
}


def measured(setup: str) -> dict:
    """Real tokens a second of one setup after its first sixth, the share of padding, and what the machine can do."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import TrainingArguments

    from src import data, engine, prompts, qlora, recipes
    from src.engine import batches, planning

    name, overrides, dequantized = SETUPS[setup]
    recipe = recipes.load(name, overrides | {"device": "cpu", "training.load_best_model_at_end": False})
    qlora.quiet()
    data.prepare(recipe)
    tokenizer, device = qlora.load_tokenizer(recipe), qlora.resolve_device("cpu")
    encoded = prompts.build_all(data.train_rows(recipe), tokenizer, recipe.prompt)
    quantization = qlora.quantization_config(recipe, device)
    lora = LoraConfig(task_type="CAUSAL_LM", **recipe.lora.model_dump())
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), seed=recipe.seed, use_cpu=True, eval_strategy="no", save_strategy="no",
        disable_tqdm=True, logging_steps=1, optim="adamw_torch", remove_unused_columns=False, report_to="none",
        **recipe.training.arguments(),
    )  # fmt: skip
    model = get_peft_model(qlora.load_base(recipe, tokenizer, device, quantization), lora)
    lengths, skip = [len(ids) for ids in encoded["input_ids"]], arguments.max_steps // 6
    if dequantized is None:
        seen = plain(model, arguments, encoded, tokenizer, skip)
    else:
        limits = recipe.engine.limits()
        plan = engine.plan(qlora.load_config(recipe), lora, quantization, arguments, encoded, device, **limits)
        plan = dataclasses.replace(plan, dequantized=dequantized)
        trainer = engine.FastTrainer(model, arguments, encoded, encoded.select(range(2)), tokenizer, plan)
        with contextlib.redirect_stdout(sys.stderr):  # log lines
            trainer.train()
        log = [row for row in trainer.state.log_history if "loss" in row and row["step"] >= skip]
        sampler = batches.StepSampler(lengths, plan.rows_per_step, plan.passes, recipe.seed, plan.packed)
        steps = itertools.islice(sampler, arguments.max_steps * plan.passes)
        passes = [[lengths[i] for i in part] for part in steps]
        seen = {
            "tok_s": (log[-1]["tokens"] - log[0]["tokens"]) / (log[-1]["seconds"] - log[0]["seconds"]),
            "passes": plan.passes,
            "padding": 1 - sum(map(sum, passes)) / sum((sum(p) if plan.packed else len(p) * max(p)) for p in passes),
            "loss": log[-1]["loss"],
        }
    return {
        "setup": setup,
        "ours": dequantized is not None,
        **{key: round(value, 3 if key in ("padding", "loss") else None) for key, value in seen.items()},
        "matmul_gflops": round(planning.matmul_rate(torch.device("cpu"), torch.float32) / 1e9),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def plain(model, arguments, encoded, tokenizer, skip: int) -> dict:
    """The same rows under transformers' own Trainer and its collator, which pads: every position's logits."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.times = []

        def on_step_end(self, *_, **__):
            self.times.append(time.perf_counter())

    class Counting(DataCollatorForSeq2Seq):
        def __call__(self, features, return_tensors=None):
            batch = super().__call__(features, return_tensors)
            counts.append((int(batch["attention_mask"].sum()), batch["attention_mask"].numel()))
            return batch

    counts, clock = [], Clock()
    masked = ([-100] * len(row["prompt_ids"]) + row["input_ids"][len(row["prompt_ids"]) :] for row in encoded)
    rows = [{"input_ids": row["input_ids"], "labels": labels} for row, labels in zip(encoded, masked, strict=True)]
    trainer = Trainer(model, arguments, Counting(tokenizer), train_dataset=rows, callbacks=[clock])
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    used = counts[skip : arguments.max_steps]
    real, padded = (sum(column) for column in zip(*used, strict=True))
    return {
        "tok_s": real / (clock.times[-1] - clock.times[skip - 1]),
        "passes": 1,
        "padding": 1 - real / padded,
        "loss": [row["loss"] for row in trainer.state.log_history if "loss" in row][-1],
    }


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(measured(sys.argv[1])), flush=True)
    else:
        for setup in SETUPS:
            subprocess.run([sys.executable, __file__, setup], check=True, timeout=900)
