"""Hugging Face's Trainer, set up for completion-only QLoRA: which rows go into a step, what the loss counts, what is recorded."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from src import batching, experiments, generation, kernels, modeling, planner, prompts

PROGRESS = "progress.json"  # of a checkpoint: tokens trained on and seconds taken until then
EVAL_BATCH = 16  # rows in a forward pass of the validation loss, at most


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


def summed_loss(model, inputs: dict) -> tuple[torch.Tensor, int]:
    """Cross-entropy summed over the supervised tokens of a batch (of `batching`), and their number. No other logits are computed."""
    inputs = send_to_device(inputs, model.device)
    _, _, count = inputs.pop("labels"), inputs.pop("tokens"), inputs.pop("supervised")
    positions, targets = inputs.pop("positions"), inputs.pop("targets")
    logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=prompts.IGNORE, reduction="sum"
    )
    return loss, count


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

    def __init__(
        self, *args, sampler: batching.StepSampler, pad_id: int, tokens: int, log_path, answer_samples, **kwargs
    ):
        self.sampler, self.pad_id, self.answer_samples, self.seen_tokens = sampler, pad_id, answer_samples, 0
        self.tokens = tokens  # of the largest forward pass that was planned
        super().__init__(*args, data_collator=self.collate, **kwargs)
        self.model_accepts_loss_kwargs = True  # have the supervised tokens of the whole optimizer step counted
        self.recorder = Log(log_path, self)
        self.add_callback(self.recorder)

    def collate(self, rows) -> dict:
        return batching.pack(rows) if self.sampler.packed else batching.pad(rows, self.pad_id)

    def get_train_dataloader(self):
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.collate,
            pin_memory=self.args.device.type == "cuda",
        )
        return self.accelerator.prepare(loader)

    def floating_point_ops(self, inputs) -> int:
        return 0  # counted over all parameters at every step otherwise, and read by nobody

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen_tokens += inputs["tokens"]
        return summed_loss(model, inputs)[0] / num_items_in_batch

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.recorder.stop()
        batches = (self.collate(rows) for rows in validation_batches(self.eval_dataset, self.tokens))
        with self.compute_loss_context_manager():
            metrics = {f"{metric_key_prefix}_loss": validation_loss(self.model, batches)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.answer_samples(self.state.global_step)
        return metrics


def validation_batches(rows, tokens: int) -> list[list]:
    """Rows of like length, at most EVAL_BATCH together, and no more than a training pass holds, padding included (one at least)."""
    batches = []
    for row in sorted(rows, key=lambda row: len(row.input_ids)):
        size = len(batches[-1]) + 1 if batches else 0
        if not batches or size > EVAL_BATCH or size * len(row.input_ids) > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


class Log(TrainerCallback):
    """Appends to train_log.jsonl: step, epoch, loss, eval_loss, learning_rate, grad_norm, tokens, seconds, tokens_per_second, peak_gib.

    `tokens`: real prompt and answer tokens since the start, no padding. `seconds`: time in optimizer steps since the start,
    evaluations left out. Of a resumed run the rows after its checkpoint are dropped, since those steps come again.
    """

    def __init__(self, path, trainer):
        self.path, self.trainer, self.clock, self.seconds, self.last = path, trainer, None, 0.0, (0, 0.0)
        self.before = 0.0  # seconds of a resumed run until its checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            rows = [
                row for row in experiments.read_jsonl(self.path, "02_train_qlora") if row["step"] <= state.global_step
            ]
            experiments.write_jsonl(self.path, rows)
            done = experiments.read_json(self.checkpoint(args, state) / PROGRESS, "02_train_qlora")
            self.trainer.seen_tokens, self.seconds = done["tokens"], done["seconds"]
            self.last, self.before = (self.trainer.seen_tokens, self.seconds), self.seconds

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock = self.clock or time.perf_counter()

    def stop(self):
        """Count the time since the clock ran, and stop it until the next step."""
        if self.clock:
            self.seconds += time.perf_counter() - self.clock
        self.clock = None

    def checkpoint(self, args, state) -> Path:
        return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def on_save(self, args, state, control, **kwargs):
        self.stop()
        done = {"tokens": self.trainer.seen_tokens, "seconds": self.seconds}
        experiments.write_json(self.checkpoint(args, state) / PROGRESS, done)

    def on_log(self, args, state, control, logs=None, **kwargs):
        row = {key: logs[key] for key in ("loss", "eval_loss", "learning_rate", "grad_norm") if key in logs}
        if not row:
            return
        if "loss" in row:
            self.stop()
            self.clock = time.perf_counter()
            tokens, before = self.trainer.seen_tokens, self.last
            self.last = (tokens, self.seconds)
            row |= {"tokens": tokens, "seconds": round(self.seconds, 3)}
            row["tokens_per_second"] = round((tokens - before[0]) / (self.seconds - before[1]))
        if args.device.type == "cuda":
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        append(self.path, {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **row})


def append(path, row: dict):
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def arguments(experiment, device: torch.device, plan: dict) -> TrainingArguments:
    """The experiment as transformers' TrainingArguments. An optimiser that needs CUDA becomes plain AdamW on a CPU (the manifest says which ran)."""
    t = experiment.training
    dtype = modeling.compute_dtype(experiment, device)
    needs_cuda = "8bit" in t.optimizer or "paged" in t.optimizer or "bnb" in t.optimizer
    when = "steps" if t.eval_steps else "epoch"
    logging = max(5 if device.type == "cuda" else 1, plan["optimizer steps"] // 50)  # a log waits for the GPU
    logging = min(logging, plan["optimizer steps"])  # one at least
    args = TrainingArguments(
        output_dir=str(experiment.run_dir / "checkpoints"),
        num_train_epochs=t.epochs,
        max_steps=t.max_steps or -1,
        per_device_train_batch_size=1,  # only its product with the next line is used, and that not for batching
        gradient_accumulation_steps=plan["forward passes a step"],
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
        logging_steps=logging,
        logging_nan_inf_filter=False,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type != "cuda",
        seed=experiment.seed,
        report_to="none",
        remove_unused_columns=False,
        accelerator_config={"non_blocking": device.type == "cuda"},  # batches reach the GPU without stopping it
        restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # the model lies on one; the Trainer would wrap a 16-bit one in DataParallel
    return args


def train(experiment, model, tokenizer, train_rows, validation_rows, samples=(), inputs=None, plan=None) -> dict:
    """Train the adapter of `model` (a PeftModel) in place on `train_rows`; all rows are prompts.Encoded.

    Writes train_log.jsonl, adapter/ and, last, manifest.json to the run folder and returns the manifest. An interrupted run
    goes on from its last checkpoint; a finished one is loaded, not trained again. `samples`: rows answered at every
    evaluation. `inputs`: checksums of what the run reads (data, base model); a run folder that was begun with others is
    refused with a TrainingError, so that two never mix.
    """
    run, t, device = experiment.run_dir, experiment.training, model.device
    if model.run_id != experiment.run_id:
        raise TrainingError(
            f"The adapter was made for run {model.run_id}, this is run {experiment.run_id}: run the cell that loads the model again, then this one."
        )
    begin_run(experiment, inputs)
    if (run / "manifest.json").exists():
        for name in ("adapter/adapter_model.safetensors", "train_log.jsonl"):
            if not (run / name).exists():
                raise TrainingError(
                    f"{experiments.relative(run)} is of a finished run, and its {name} is gone: delete the folder to train again."
                )
        print(
            f"{experiments.relative(run)} holds this run, finished: its adapter is loaded. Delete the folder to train again."
        )
        set_peft_model_state_dict(model, load_file(run / "adapter" / "adapter_model.safetensors"))
        return experiments.read_json(run / "manifest.json", "02_train_qlora")
    log_path = run / "train_log.jsonl"
    plan = plan or planner.plan(experiment, train_rows)
    if plan["batches"] == "packed" and not batching.rows_stay_apart(model):
        raise TrainingError(
            f"Layers of {experiment.base_model} ({type(model.get_base_model()).__name__}) look across the rows of a packed batch: "
            "set training.packing to 'off'."
        )
    if plan["weights"].endswith("once"):
        modeling.dequantize(model)

    def answer_samples(step):
        answers = generation.generate(model, tokenizer, samples, experiment, progress=False)
        for row, answer in zip(samples, answers, strict=True):
            entry = {"step": step, "id": row.id, "reference": row.answer_text, "sample": answer["prediction"]}
            append(log_path, entry)
            print(
                f"step {step}, row {row.id}\n  reference: {row.answer_text}\n  generated: {answer['prediction']}",
                flush=True,
            )

    lengths = [len(row.input_ids) for row in train_rows]
    retries, start = [], time.perf_counter()
    while True:
        args = arguments(experiment, device, plan)
        packed, passes = plan["batches"] == "packed", plan["forward passes a step"]
        checkpoint = last_checkpoint(run / "checkpoints")
        if checkpoint is None:
            log_path.unlink(missing_ok=True)
            model.load_state_dict(model.untrained, strict=False)
        trainer = SummaryTrainer(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=validation_rows,
            sampler=batching.StepSampler(lengths, t.batch_size, passes, experiment.seed, packed),
            pad_id=tokenizer.pad_token_id,
            tokens=plan["tokens a forward pass"],
            log_path=log_path,
            answer_samples=answer_samples,
            callbacks=[EarlyStoppingCallback(t.early_stopping_patience)] if t.early_stopping_patience else None,
        )
        if out_of_memory(trainer, model, plan, checkpoint):
            retries.append(plan)
            plan = planner.smaller(experiment, train_rows, plan)
            if plan is None:
                raise TrainingError(
                    f"The GPU's memory does not hold one training step of {experiment.base_model}, one row at a time with checkpointing. "
                    "Lower prompt.max_tokens or lora.rank, or free the GPU."
                )
            print(
                f"Out of GPU memory: going on with {plan['tokens a forward pass']} tokens a forward pass, {plan['forward passes a step']} passes "
                f"a step, checkpointing {'on' if plan['checkpointing'] else 'off'}. A step still holds {t.batch_size} rows."
            )
            del trainer
            modeling.free_cuda()
        else:
            break
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
        "train_seconds": round(trainer.recorder.before + seconds, 1),
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
        "plans_out_of_memory": retries,
        "inputs": inputs or {},
    }
    experiments.write_json(run / "manifest.json", manifest)
    if not t.keep_checkpoints:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return manifest


def out_of_memory(trainer, model, plan: dict, checkpoint) -> bool:
    """Train under the plan; True when the GPU's memory did not hold it."""
    if plan["checkpointing"]:
        model.get_base_model().activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": kernels.checkpoint_contexts}
        )
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    try:
        with kernels.fused(model, plan["fused"]), short_walks(model):
            trainer.train(resume_from_checkpoint=checkpoint)
    except torch.OutOfMemoryError:
        return True
    finally:
        if plan["checkpointing"]:
            model.get_base_model().activation_checkpointing_disable()
    return False


def last_checkpoint(folder):
    """The newest checkpoint that was written whole (PROGRESS comes last), or None; later ones are deleted."""
    while folder.is_dir() and (newest := get_last_checkpoint(str(folder))):
        if (Path(newest) / PROGRESS).is_file():
            return newest
        shutil.rmtree(newest)
    return None


@contextmanager
def short_walks(model):
    """Inside, parameters() and zero_grad() of the model meet its trainable parameters alone, and train() only acts on a change.

    The Trainer calls each at every step, and each visits every module of the model, while the GPU waits if steps are short.
    """
    model.train()  # a fresh adapter says it is training while the base model under it is not
    trainable = [p for p in model.parameters() if p.requires_grad]

    def zero_grad():
        for p in trainable:
            p.grad = None

    def train(mode: bool = True):
        return model if model.training is mode else type(model).train(model, mode)

    model.parameters, model.zero_grad, model.train = (lambda recurse=True: iter(trainable)), zero_grad, train
    try:
        yield
    finally:
        del model.parameters, model.zero_grad, model.train


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


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # training needs no scorer
        return None


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
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=experiments.ROOT, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "git_commit": commit,
    }
