"""transformers' Trainer over packed steps: completion-only loss, memory retry, and what a log row holds.

`FastTrainer` is a Trainer: arguments, schedules, checkpoints, resuming, callbacks and the progress bar are Hugging Face's.
"""

import dataclasses
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from src.engine import batches, decode, weights
from src.engine.attention import rows_stay_apart
from src.engine.fuse import fused
from src.engine.lora import checkpoint_contexts
from src.engine.planning import Plan, PlanError, smaller

EVAL_ROWS = 16  # in a forward pass of the validation loss, at most


def summed_loss(model, inputs: dict) -> tuple[torch.Tensor, int]:
    """Cross-entropy (nats) summed over the supervised tokens of a batch of `batches`, and their number.

    Logits are computed at supervised positions only.
    """
    inputs = send_to_device(inputs, model.device)
    positions, targets, count = inputs.pop("positions"), inputs.pop("targets"), inputs.pop("supervised")
    del inputs["labels"], inputs["tokens"]
    logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=batches.IGNORE, reduction="sum"
    )
    return loss, count


@torch.no_grad()
def validation_loss(model, batched) -> float:
    """Mean cross-entropy (nats) a supervised token over all batches."""
    was_training = model.training
    model.eval()
    sums = [(loss.item(), n) for loss, n in (summed_loss(model, dict(batch)) for batch in batched)]
    model.train(was_training)
    return sum(loss for loss, _ in sums) / sum(n for _, n in sums)


def validation_batches(rows, tokens: int) -> list[list]:
    """Rows of like length, at most EVAL_ROWS together and no more than `tokens` with padding; one row at least."""
    found = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        size = len(found[-1]) + 1 if found else 0
        if not found or size > EVAL_ROWS or size * len(row["input_ids"]) > tokens:
            found.append([])
        found[-1].append(row)
    return found


def renew_adapter(model, seed: int):
    """Give the adapter its first weights, drawn from `seed`: a run that starts is the same however often it is started."""
    config = model.peft_config["default"]
    torch.manual_seed(seed)
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")


class FastTrainer(Trainer):
    """A Trainer whose steps hold the rows that the arguments say, in the forward passes that the plan says.

    model: a PeftModel. train_dataset, eval_dataset: columns id, input_ids, labels. plan: from `engine.plan`. After `train`,
    `plan` is the one that memory held, `failed_plans` the ones before it, `seconds` the time in optimizer steps.
    """

    def __init__(self, model, args, train_dataset, eval_dataset, processing_class, plan: Plan, callbacks=None):
        self.plan, self.failed_plans, self.seconds = plan, [], 0.0
        self.rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        if plan.packed and not rows_stay_apart(model):
            raise PlanError(
                f"Layers of {type(model.get_base_model()).__name__} look across the rows of a packed batch: set engine.packing to "
                "'off'."
            )
        on_cuda = model.device.type == "cuda"
        every = max(5 if on_cuda else 1, plan.steps // 50)  # a log waits for the GPU
        args = dataclasses.replace(
            args,
            per_device_train_batch_size=1,  # only its product with the next line is used, and that not for batching
            gradient_accumulation_steps=plan.passes,
            logging_steps=min(every, plan.steps),
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            accelerator_config={"non_blocking": on_cuda},  # batches reach the GPU without stopping it
            restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
        )
        if args.n_gpu > 1:
            args._n_gpu = 1  # the model lies on one; the Trainer would wrap a 16-bit one in DataParallel
        self.lengths = [len(ids) for ids in train_dataset["input_ids"]]
        self.pad_id, self.quantized = processing_class.pad_token_id, None
        super().__init__(
            model, args, self.collate, train_dataset, eval_dataset, processing_class,
            callbacks=[_Clock(self), *(callbacks or [])],
        )  # fmt: skip
        self.model_accepts_loss_kwargs = True  # have the supervised tokens of the whole optimizer step counted

    @property
    def peak_gib(self) -> float | None:
        """Peak of the GPU memory that tensors took in training; None on a CPU."""
        device = self.model.device
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3) if device.type == "cuda" else None

    def collate(self, rows) -> dict:
        return batches.pack(rows) if self.plan.packed else batches.pad(rows, self.pad_id)

    def get_train_dataloader(self):
        sampler = batches.StepSampler(
            self.lengths, self.rows_per_step, self.plan.passes, self.args.seed, self.plan.packed
        )
        pinned = self.args.device.type == "cuda"
        loader = DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.collate, pin_memory=pinned)
        return self.accelerator.prepare(loader)

    def floating_point_ops(self, inputs) -> int:
        return 0  # counted over all parameters at every step otherwise, and read by nobody

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.state.num_input_tokens_seen += inputs["tokens"]
        return summed_loss(model, inputs)[0] / num_items_in_batch

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        rows = list(eval_dataset or self.eval_dataset)
        batched = (self.collate(part) for part in validation_batches(rows, self.plan.tokens))
        with self.compute_loss_context_manager():
            metrics = {f"{metric_key_prefix}_loss": validation_loss(self.model, batched)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict, start_time=None):
        """Add to a row: tokens (real ones since the start), seconds in steps, tokens_per_second, peak_gib."""
        if not {"loss", "eval_loss"} & set(logs):
            return
        before = next((row for row in reversed(self.state.log_history) if "loss" in row), {})
        logs |= {"tokens": self.state.num_input_tokens_seen, "seconds": round(self.seconds, 3)}
        if "loss" in logs and self.seconds > before.get("seconds", 0):
            new, seconds = logs["tokens"] - before.get("tokens", 0), self.seconds - before.get("seconds", 0)
            logs["tokens_per_second"] = round(new / seconds)
        if self.peak_gib is not None:
            logs["peak_gib"] = self.peak_gib
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Train from the start, or go on from a checkpoint; with a smaller plan whenever memory runs out.

        Without a checkpoint the adapter gets its first weights from args.seed. A checkpoint after which the run had nothing left
        to do is loaded, not trained further.
        """
        while True:
            if resume_from_checkpoint is None:
                renew_adapter(self.model, self.args.seed)
            elif self._was_done(resume_from_checkpoint):
                return None
            with self._engine() as outcome:
                outcome.append(super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs))
            if outcome:
                return outcome[0]
            self._shrink()
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)

    @contextmanager
    def _engine(self):
        """Train as the plan says; leave the yielded list empty if the GPU's memory does not hold it."""
        base, device = self.model.get_base_model(), self.model.device
        if self.plan.dequantized and self.quantized is None:
            self.quantized = weights.dequantize(self.model, keep=True)
        if self.plan.checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            with fused(self.model, self.plan.fused), short_walks(self.model):
                yield []
        except torch.OutOfMemoryError:
            pass
        finally:
            if self.plan.checkpointing:
                base.activation_checkpointing_disable()

    def _shrink(self):
        self.failed_plans.append(self.plan)
        plan = smaller(self.plan, self.lengths, self.args.seed)
        if plan is None:
            raise PlanError(
                "The GPU's memory does not hold one training step, one row at a time with 4-bit weights and checkpointing. Lower "
                "prompt.max_tokens or lora.r, or free the GPU."
            )
        if self.quantized is not None and not plan.dequantized:
            weights.requantize(self.model, self.quantized)
            self.quantized = None
        self.plan, self.args.gradient_accumulation_steps = plan, plan.passes
        self.optimizer = self.lr_scheduler = None
        self.model.zero_grad()
        weights.free_cuda()
        print(
            f"Out of GPU memory: going on with {plan.tokens} tokens a forward pass, {plan.passes} passes a step, "
            f"{'4-bit' if not plan.dequantized else '16-bit'} weights, checkpointing {'on' if plan.checkpointing else 'off'}. "
            f"A step still holds {self.rows_per_step} rows."
        )

    def _was_done(self, checkpoint: str) -> bool:
        """Load a checkpoint that was written when the run had decided to stop; False for any other."""
        state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        if not state.stateful_callbacks.get("TrainerControl", {}).get("args", {}).get("should_training_stop"):
            return False
        self.state = state
        self.seconds = max((row.get("seconds", 0.0) for row in state.log_history), default=0.0)
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        return True


class _Clock(TrainerCallback):
    """Counts the seconds in optimizer steps into trainer.seconds; evaluations and saving are left out."""

    def __init__(self, trainer):
        self.trainer, self.start = trainer, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = None
        self.trainer.seconds = max((row.get("seconds", 0.0) for row in state.log_history), default=0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter() if self.start is None else self.start

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            if args.device.type == "cuda":
                torch.cuda.synchronize(args.device)
            self.trainer.seconds += time.perf_counter() - self.start
            self.start = None


class SampleAnswers(TrainerCallback):
    """Answers a few rows at every evaluation, prints them and keeps them in the log beside the losses."""

    def __init__(self, rows, tokenizer, generation):
        self.rows, self.tokenizer, self.generation = list(rows), tokenizer, generation

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        answers = decode.generate(model, self.tokenizer, self.rows, self.generation, args.seed, progress=False)
        for row, answer in zip(self.rows, answers, strict=True):
            reference, text = row["answer_text"], answer["prediction"]
            sample = {"step": state.global_step, "id": row["id"], "reference": reference, "sample": text}
            state.log_history.append(sample)
            print(
                f"step {state.global_step}, row {row['id']}\n  reference: {reference}\n  generated: {text}", flush=True
            )


class LogFile(TrainerCallback):
    """Keeps a JSON Lines file equal to the Trainer's log_history; written under a temporary name and renamed."""

    def __init__(self, path):
        self.path = Path(path)

    def on_log(self, args, state, control, **kwargs):
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in state.log_history), "utf-8")
        temporary.replace(self.path)

    on_evaluate = on_train_end = on_log


@contextmanager
def short_walks(model):
    """Make model.parameters() and zero_grad() meet the trainable parameters alone, and train() act on a change alone.

    The Trainer calls each at every step, and each visits every module of the model: 15 ms a step of a 7B.
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
