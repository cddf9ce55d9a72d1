"""Hugging Face's Trainer, set up for completion-only QLoRA: which rows go into a step, what the loss counts, what is recorded."""

import importlib.metadata
import json
import math
import platform
import random
import shutil
import subprocess
import time

import torch
import torch.nn.functional as F
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from src import experiments, generation, modeling, prompts

EVAL_BATCH = 16  # rows in a forward pass of the validation loss
GROUP = 16  # optimizer steps whose rows are sorted by length together, so that a padded batch holds rows of like length


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


class StepSampler:
    """Row indices of every forward pass of an epoch: each optimizer step holds exactly `batch_size` rows (the last may hold fewer).

    Rows are shuffled by (seed, epoch), sorted by length within groups of GROUP steps, cut into steps, and the steps
    shuffled. A step is `batch_size // micro_batch_size` forward passes.
    """

    def __init__(self, lengths: list[int], batch_size: int, micro_batch_size: int, seed: int):
        self.lengths, self.batch_size, self.micro_batch_size, self.seed, self.epoch = (
            lengths,
            batch_size,
            micro_batch_size,
            seed,
            0,
        )

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole * (self.batch_size // self.micro_batch_size) + math.ceil(rest / self.micro_batch_size)

    def __iter__(self):
        generator = random.Random(f"{self.seed}-{self.epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        span = GROUP * self.batch_size
        groups = [sorted(order[i : i + span], key=self.lengths.__getitem__) for i in range(0, len(order), span)]
        steps = [group[i : i + self.batch_size] for group in groups for i in range(0, len(group), self.batch_size)]
        short = [step for step in steps if len(step) < self.batch_size]  # at most one, at the end of the epoch
        steps = [step for step in steps if len(step) == self.batch_size]
        generator.shuffle(steps)
        for step in steps + short:
            for i in range(0, len(step), self.micro_batch_size):
                yield step[i : i + self.micro_batch_size]


def collate(rows, pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded input_ids, attention_mask and labels of shape (rows, longest row), and the number of real tokens.

    Padding is masked by length, not by id.
    """
    width = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), prompts.IGNORE)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row.input_ids), torch.tensor(row.labels), 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "tokens": sum(len(row.input_ids) for row in rows),
    }


def summed_loss(model, inputs: dict) -> tuple[torch.Tensor, int]:
    """Cross-entropy summed over the supervised tokens of a batch, and their number. Logits exist only where a row has a label."""
    inputs = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in inputs.items()}
    inputs.pop("tokens", None)
    targets = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=prompts.IGNORE)  # position i predicts token i + 1
    positions = (targets != prompts.IGNORE).any(0).nonzero().squeeze(1)
    logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits
    targets = targets[:, positions]
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=prompts.IGNORE, reduction="sum"
    )
    return loss, int((targets != prompts.IGNORE).sum())


@torch.no_grad()
def validation_loss(model, batches) -> float:
    """Mean cross-entropy (nats) a supervised token over all batches."""
    was_training = model.training
    model.eval()
    sums = [(loss.item(), n) for loss, n in (summed_loss(model, dict(batch)) for batch in batches)]
    model.train(was_training)
    return sum(loss for loss, _ in sums) / sum(n for _, n in sums)


class SummaryTrainer(Trainer):
    """Trainer with the project's batches and loss; checkpoints, schedules, resuming and the progress bar are Hugging Face's."""

    def __init__(self, *args, sampler: StepSampler, pad_id: int, log_path, answer_samples, **kwargs):
        self.sampler, self.pad_id, self.answer_samples, self.seen_tokens = sampler, pad_id, answer_samples, 0
        super().__init__(*args, data_collator=lambda rows: collate(rows, pad_id), **kwargs)
        self.model_accepts_loss_kwargs = True  # have the supervised tokens of the whole optimizer step counted
        self.add_callback(Log(log_path, self))

    def get_train_dataloader(self):
        return self.accelerator.prepare(
            DataLoader(self.train_dataset, batch_sampler=self.sampler, collate_fn=self.data_collator)
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen_tokens += inputs["tokens"]
        return summed_loss(model, inputs)[0] / num_items_in_batch

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        rows = sorted(self.eval_dataset, key=lambda row: len(row.input_ids))
        batches = (collate(rows[i : i + EVAL_BATCH], self.pad_id) for i in range(0, len(rows), EVAL_BATCH))
        with self.compute_loss_context_manager():
            metrics = {f"{metric_key_prefix}_loss": validation_loss(self.model, batches)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.answer_samples(self.state.global_step)
        return metrics


class Log(TrainerCallback):
    """Appends to train_log.jsonl: step, epoch, loss, eval_loss, learning_rate, grad_norm, tokens_per_second, peak_gib."""

    def __init__(self, path, trainer):
        self.path, self.trainer, self.clock, self.tokens = path, trainer, None, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock = self.clock or time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        row = {key: logs[key] for key in ("loss", "eval_loss", "learning_rate", "grad_norm") if key in logs}
        if not row:
            return
        if "loss" in row:  # tokens are real prompt and answer tokens, no padding; the clock leaves evaluations out
            tokens, now = self.trainer.seen_tokens, time.perf_counter()
            row["tokens_per_second"] = round((tokens - self.tokens) / (now - self.clock))
            self.tokens, self.clock = tokens, now
        else:
            self.tokens, self.clock = self.trainer.seen_tokens, None
        if args.device.type == "cuda":
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        append(self.path, {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **row})


def append(path, row: dict):
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def total_steps(experiment, rows: int) -> int:
    """Optimizer steps of a run over `rows` training rows."""
    per_epoch = math.ceil(rows / experiment.training.batch_size)
    steps = math.ceil(experiment.training.epochs * per_epoch)
    return min(steps, experiment.training.max_steps or steps)


def plan(experiment, rows) -> dict:
    """What a step will be."""
    t = experiment.training
    return {
        "rows": len(rows),
        "optimizer steps": total_steps(experiment, len(rows)),
        "rows per optimizer step": t.batch_size,
    }


def arguments(experiment, device: torch.device, micro_batch_size: int, steps: int) -> TrainingArguments:
    """The experiment as transformers' TrainingArguments. An optimiser that needs CUDA becomes plain AdamW on a CPU (the manifest says which ran)."""
    t = experiment.training
    dtype = modeling.compute_dtype(experiment, device)
    needs_cuda = "8bit" in t.optimizer or "paged" in t.optimizer or "bnb" in t.optimizer
    when = "steps" if t.eval_steps else "epoch"
    return TrainingArguments(
        output_dir=str(experiment.run_dir / "checkpoints"),
        num_train_epochs=t.epochs,
        max_steps=t.max_steps or -1,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=t.batch_size // micro_batch_size,
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.schedule,
        warmup_steps=t.warmup_steps,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        optim="adamw_torch" if needs_cuda and device.type != "cuda" else t.optimizer,
        eval_strategy=when,
        eval_steps=t.eval_steps,
        save_strategy=when,
        save_steps=t.eval_steps or 500,
        save_total_limit=2,
        load_best_model_at_end=t.keep_best,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=max(1, steps // 50),
        logging_nan_inf_filter=False,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type != "cuda",
        seed=experiment.seed,
        report_to="none",
        remove_unused_columns=False,
    )


def train(experiment, model, tokenizer, train_rows, validation_rows, samples=(), inputs=None, plan=None) -> dict:
    """Train the adapter of `model` (a PeftModel) in place on `train_rows`; all rows are prompts.Encoded.

    Writes train_log.jsonl, adapter/ and, last, manifest.json to the run folder and returns the manifest. An interrupted run
    goes on from its last checkpoint; a finished one is loaded, not trained again. `samples`: rows answered at every
    evaluation. `inputs`: checksums of what the run reads (data, base model); a run folder that was begun with others is
    refused with a TrainingError, so that two never mix.
    """
    run, t, device = experiment.run_dir, experiment.training, model.device
    begin_run(experiment, inputs)
    if (run / "manifest.json").exists():
        print(
            f"{experiments.relative(run)} holds this run, finished: its adapter is loaded. Delete the folder to train again."
        )
        set_peft_model_state_dict(model, load_file(run / "adapter" / "adapter_model.safetensors"))
        return experiments.read_json(run / "manifest.json", "02_train_qlora")
    log_path = run / "train_log.jsonl"
    micro = t.micro_batch_size or t.batch_size
    steps = total_steps(experiment, len(train_rows))
    args = arguments(experiment, device, micro, steps)
    checkpoint = get_last_checkpoint(args.output_dir) if (run / "checkpoints").is_dir() else None
    if checkpoint is None:
        log_path.unlink(missing_ok=True)

    def answer_samples(step):
        for row, answer in zip(
            samples, generation.generate(model, tokenizer, samples, experiment, progress=False), strict=True
        ):
            append(
                log_path,
                {"step": step, "id": row.id, "reference": row.answer_text, "sample": answer["prediction"]},
            )
            print(
                f"step {step}, row {row.id}\n  reference: {row.answer_text}\n  generated: {answer['prediction']}",
                flush=True,
            )

    trainer = SummaryTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        sampler=StepSampler([len(row.input_ids) for row in train_rows], t.batch_size, micro, experiment.seed),
        pad_id=tokenizer.pad_token_id,
        log_path=log_path,
        answer_samples=answer_samples,
        callbacks=[EarlyStoppingCallback(t.early_stopping_patience)] if t.early_stopping_patience else None,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    save_adapter(experiment, model, tokenizer)
    manifest = {
        "run_id": experiment.run_id,
        "base_commit": model.get_base_model().base_commit,
        "seed": experiment.seed,
        "optimizer": args.optim.value,
        "optimizer_steps": trainer.state.global_step,
        "best_step": best_step(trainer) if t.keep_best else trainer.state.global_step,
        "rows": {"train": len(train_rows), "validation": len(validation_rows)},
        "cut_prompts": sum(row.cut_tokens > 0 for row in train_rows),
        "train_tokens": trainer.seen_tokens,
        "train_seconds": round(seconds, 1),
        "resumed_from_step": int(checkpoint.rpartition("-")[2]) if checkpoint else None,
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3) if device.type == "cuda" else None,
        "parameters": modeling.count_parameters(model),
        **environment(device),
        "sha256": {
            file.name: experiments.sha256_file(file)
            for file in sorted((run / "adapter").iterdir())
            if file.suffix in (".safetensors", ".json")
        },
        "plan": plan,
        "inputs": inputs or {},
    }
    experiments.write_json(run / "manifest.json", manifest)
    if not t.keep_checkpoints:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return manifest


def begin_run(experiment, inputs: dict | None):
    """Write config.json, or check that the one in the run folder began with the same inputs."""
    path = experiment.run_dir / "config.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8")).get("inputs")
        if found != (inputs or {}):
            raise TrainingError(
                f"{experiments.relative(path.parent)} was begun with other data or another base model: found {found}, expected {inputs}. "
                "Delete the folder to start anew."
            )
    else:
        experiments.save_config(experiment, inputs)


def best_step(trainer) -> int:
    return (
        int(trainer.state.best_model_checkpoint.rpartition("-")[2])
        if trainer.state.best_model_checkpoint
        else trainer.state.global_step
    )


def save_adapter(experiment, model, tokenizer):
    """Adapter weights (safetensors), tokenizer and prompt template in outputs/<run>/adapter, written aside and renamed."""
    folder, temporary = experiment.run_dir / "adapter", experiment.run_dir / ".adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    experiments.write_json(temporary / "prompt_template.json", prompts.template(tokenizer, experiment.prompt))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def environment(device: torch.device) -> dict:
    """What the run ran on: library versions, machine, git commit (None outside a checkout)."""
    packages = (
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "accelerate",
        "datasets",
        "evaluate",
        "rouge-score",
        "sacrebleu",
    )
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=experiments.ROOT, capture_output=True, text=True)
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "git_commit": git.stdout.strip() or None,
    }
