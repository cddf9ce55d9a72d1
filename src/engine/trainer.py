"""transformers' Trainer over planned forward passes, with a loss on the answers alone."""

import dataclasses
import math
import os

import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object, send_to_device, set_seed
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState

from src.engine import batches, faults, resuming, weights
from src.engine.attention import rows_stay_apart
from src.engine.callbacks import Progress, short_walks
from src.engine.fuse import fused
from src.engine.graphs import StepGraphs
from src.engine.lora import checkpoint_contexts
from src.engine.planning import Plan, PlanError, smaller


def summed_loss(model, inputs: dict) -> tuple[torch.Tensor, int]:
    """Cross-entropy (nats) summed over the supervised tokens of a batch, and their number. No other logits are made."""
    inputs = send_to_device(inputs, model.device)
    positions, targets, count = inputs.pop("positions"), inputs.pop("targets"), inputs.pop("supervised")
    del inputs["labels"], inputs["tokens"]
    logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum"), count


def renew_adapter(model, seed: int):
    """Give the adapter its first weights, drawn from `seed`: those of set_seed and get_peft_model."""
    config = model.peft_config["default"]
    torch.manual_seed(seed)
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")


class FastTrainer(resuming.BetweenLogs, Trainer):
    """A Trainer whose steps hold the rows that the arguments say, in the forward passes that the plan says.

    model: a PeftModel. train_dataset, eval_dataset: columns id, input_ids, labels. After `train`, `plan` is the one
    that memory held, `failed_plans` the ones before it, `seconds` the time in optimizer steps.
    """

    def __init__(self, model, args, train_dataset, eval_dataset, processing_class, plan: Plan, callbacks=None):
        if plan.packed and not rows_stay_apart(model):
            kind = type(model.get_base_model()).__name__
            raise PlanError(f"Layers of {kind} look across the rows of a packed batch: set engine.packing to 'off'.")
        # one plan for all processes: that of the one with the least memory
        plan = max(gather_object([plan]), key=lambda p: (p.checkpointing, not p.dequantized, p.passes))
        self.plan, self.failed_plans, self.quantized, self.progress = plan, [], {}, Progress()
        self.rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.lengths = [len(ids) for ids in train_dataset["input_ids"]]
        answers = sorted(sum(label != batches.IGNORE for label in labels) for labels in train_dataset["labels"])
        self.most_supervised, self.recorded = 64 * math.ceil(sum(answers[-self.rows_per_step :]) / 64), 0
        self.graphs, self.pad_id, on_cuda = None, processing_class.pad_token_id, model.device.type == "cuda"
        args = dataclasses.replace(
            args,
            per_device_train_batch_size=1,  # only its product with the next line is used, and that not for batching
            gradient_accumulation_steps=plan.passes,
            logging_steps=min(plan.steps, max(5 if on_cuda else 1, plan.steps // 50)),  # a log waits for the GPU
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            accelerator_config={"non_blocking": on_cuda},  # batches reach a GPU without stopping it
            restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
            ddp_find_unused_parameters=False,
        )
        if args.n_gpu > 1:
            args._n_gpu = 1  # the model lies on one; the Trainer would wrap a 16-bit one in DataParallel
        callbacks = [self.progress, *(callbacks or [])]
        super().__init__(model, args, self.collate, train_dataset, eval_dataset, processing_class, callbacks=callbacks)
        self.model_accepts_loss_kwargs = True  # have the supervised tokens of the whole optimizer step counted

    @property
    def seconds(self) -> float:
        return self.progress.seconds

    @property
    def peak_gib(self) -> float | None:
        device = self.model.device
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3) if device.type == "cuda" else None

    def collate(self, rows) -> dict:
        rows = rows or [{"input_ids": [self.pad_id] * 2, "labels": [batches.IGNORE] * 2}]  # nothing to do in this pass
        return batches.pack(rows) if self.plan.packed else batches.pad(rows, self.pad_id)

    def collate_step(self, rows) -> dict:
        """`collate`, and one of few sizes where steps are recorded, of 128 tokens or a 24th of the largest step."""
        if not self.plan.graphs:
            return self.collate(rows)
        multiple = 128 * math.ceil(self.plan.tokens / 24 / 128)
        return batches.pack_to(rows, multiple, self.rows_per_step + 1, self.most_supervised)

    def get_train_dataloader(self):
        plan, args, pinned = self.plan, self.args, self.args.device.type == "cuda"
        share = args.process_index, args.world_size
        sampler = batches.StepSampler(self.lengths, self.rows_per_step, plan.passes, args.seed, plan.packed, *share)
        loader = DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.collate_step, pin_memory=pinned)
        # as for one process: the sampler has shared the rows out
        return prepare_data_loader(loader, args.device, 1, 0, put_on_device=True, non_blocking=pinned)

    def floating_point_ops(self, inputs) -> int:
        return 0  # counted over all parameters at every step otherwise, and read by nobody

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a pass, of which the mean over the processes is summed over a step: the step's mean a token."""
        return summed_loss(model, inputs)[0] / num_items_in_batch * self.args.world_size

    def training_step(self, model, inputs, num_items_in_batch=None):
        if model is not self.model:  # DistributedDataParallel, whose own walks are as long
            vars(model).update({name: vars(self.model)[name] for name in ("parameters", "zero_grad", "train")})
        if not self.graphs:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        return self.graphs(inputs, num_items_in_batch)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Return and log the mean cross-entropy (nats) of a supervised token."""
        parts = batches.validation_batches(eval_dataset or self.eval_dataset, self.plan.tokens)
        self.model.eval()
        with torch.inference_mode(), self.compute_loss_context_manager():
            own = parts[self.args.process_index :: self.args.world_size]
            sums = [summed_loss(self.model, self.collate(part)) for part in own]
        sums = [sum(loss.item() for loss, _ in sums), sum(n for _, n in sums)]
        loss, count = self.accelerator.reduce(torch.tensor(sums, dtype=torch.float64, device=self.args.device)).tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict, start_time=None):
        """Log losses only, with tokens (real ones since the start), seconds, tokens_per_second and peak_gib beside.

        tokens are those of all processes, peak_gib is this one's.
        """
        until = self.state.global_step, self.lengths, self.rows_per_step, self.args.seed
        self.state.num_input_tokens_seen = batches.tokens_until(*until)
        if not {"loss", "eval_loss"} & set(logs):
            return
        names = ("loss", "eval_loss") if self.args.fp16 else ("loss", "eval_loss", "grad_norm")  # fp16 skips such steps
        faults.refuse_divergence(self, {name: logs[name] for name in names if name in logs})
        before = next((row for row in reversed(self.state.log_history) if "loss" in row), {})
        row = {**logs, "tokens": self.state.num_input_tokens_seen, "seconds": round(self.seconds, 3)}
        if "loss" in logs and row["seconds"] > before.get("seconds", 0):
            new, seconds = row["tokens"] - before.get("tokens", 0), row["seconds"] - before.get("seconds", 0)
            row["tokens_per_second"] = round(new / seconds)
        if self.peak_gib is not None:
            row["peak_gib"] = self.peak_gib
        super().log(row, start_time)

    def train(self, resume_from_checkpoint: str | None = None):
        """Train from args.seed's first weights or go on from a checkpoint, with a smaller plan when memory runs out.

        In one process of several (torchrun), all call this: each computes its share of every step.
        """
        if self.plan.ranks != self.args.world_size:
            raise PlanError(
                f"The plan is for {self.plan.ranks} processes, and this is one of {self.args.world_size}: plan again "
                "with `ranks` left out, or start as many by torchrun."
            )
        self.progress.checkpoint = resume_from_checkpoint
        while True:
            checkpoint = self.progress.checkpoint
            self.optimizer = self.lr_scheduler = None  # those of an earlier attempt hold other parameters
            if checkpoint is None:
                renew_adapter(self.model, self.args.seed)
            elif self._was_done(checkpoint):
                return None
            self.unlogged = resuming.read(checkpoint)
            if self.args.process_index:
                set_seed(self.args.seed, device_specific=True)  # dropout of its own
            result = self._attempt(checkpoint)
            if result is not None:
                return result
            self._shrink()

    def _attempt(self, checkpoint: str | None):
        """Train as the plan says. Return None if the GPU's memory does not hold that."""
        base, device, self.model_wrapped = self.model.get_base_model(), self.model.device, self.model
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        frozen += [name for name, _ in self.model.named_buffers()]
        self.model._ddp_params_and_buffers_to_ignore = frozen  # every process has loaded them: nothing to send
        if self.plan.dequantized and not self.quantized and not self.plan.fp8:
            self.quantized = weights.dequantize(self.model, keep=True)
        if self.plan.checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
        if self.plan.graphs:
            self.graphs = StepGraphs(self.model, lambda x: summed_loss(self.model, x)[0], self.args.world_size)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        try:
            # what DistributedDataParallel keeps of autograd's graph has to lie on the stream that records
            stream = self.graphs.stream if self.graphs and self.args.world_size > 1 else None
            with fused(self.model, self.plan.fused, self.plan.fp8), short_walks(self.model), torch.cuda.stream(stream):
                result = super().train(resume_from_checkpoint=checkpoint)
            if stream:
                stream.synchronize()
            return result
        except torch.OutOfMemoryError:
            if self.args.world_size > 1:  # the others wait for this one's gradients
                raise PlanError(
                    f"The memory of {device} does not hold {self.plan.tokens} tokens a forward pass. Set "
                    f"engine.tokens_per_pass to {self.plan.tokens // 2} and start again: it goes on from the last "
                    "checkpoint."
                ) from None
            return None
        except RuntimeError as error:
            faults.explain_cuda(self, error)
            raise
        finally:
            if self.plan.checkpointing:
                base.activation_checkpointing_disable()
            if self.graphs:
                self.recorded = 0 if self.graphs.refused else len(self.graphs.recorded)
                self.graphs = None  # their memory goes

    def _shrink(self):
        """Go on with the next smaller plan. Raises PlanError if there is none."""
        self.failed_plans.append(self.plan)
        plan = smaller(self.plan, self.lengths, self.args.seed)
        if plan is None:
            raise PlanError(
                "The GPU's memory does not hold one training step, one row at a time with 4-bit weights and "
                "checkpointing, or in fp8. Lower prompt.max_tokens or lora.r, set engine.fp8 to 'off', or free the GPU."
            )
        if self.quantized and not plan.dequantized:
            weights.requantize(self.model, self.quantized)
            self.quantized = {}
        self.plan, self.args.gradient_accumulation_steps = plan, plan.passes
        self.model.zero_grad()
        weights.free_cuda()
        print(
            f"Out of GPU memory: going on with {plan.tokens} tokens a forward pass, {plan.passes} passes a step of "
            f"{self.rows_per_step} rows, dequantized={plan.dequantized}, checkpointing={plan.checkpointing}."
        )

    def _was_done(self, checkpoint: str) -> bool:
        """Load a checkpoint that was written when the run had decided to stop; False for any other."""
        state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        if not state.stateful_callbacks.get("TrainerControl", {}).get("args", {}).get("should_training_stop"):
            return False
        self.state = state
        self.progress.on_train_begin(self.args, state, self.control)
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        return True
