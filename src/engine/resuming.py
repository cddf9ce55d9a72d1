"""What a checkpoint between two logs needs, so that the next log says what it would have said without a stop."""

import json
import math
from pathlib import Path

import torch
from transformers.trainer_pt_utils import nested_gather

UNLOGGED = "unlogged.json"  # of a checkpoint: the loss since the last log, the step of that, the seconds so far


def read(checkpoint: str | None) -> dict | None:
    """What `BetweenLogs` wrote into a checkpoint; None where there is nothing."""
    path = checkpoint and Path(checkpoint, UNLOGGED)
    return json.loads(path.read_text("utf-8")) if path and path.is_file() else None


class TrainingError(RuntimeError):
    """A training that cannot go on. The message says at which step, and what to change."""


def refuse_divergence(trainer, values: dict[str, float]):
    """Raise TrainingError for a value that is no number, with the last good checkpoint named."""
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise TrainingError(
            f"The {wrong[0]} is {values[wrong[0]]} at step {trainer.state.global_step}: training has diverged"
            f"{', or float16 has overflowed' if trainer.args.fp16 else ''}. The last good checkpoint is "
            f"{trainer.progress.checkpoint or 'none: it was the start'}. Lower learning_rate, lengthen warmup_steps, "
            "or set bnb_4bit_compute_dtype to 'float32'; that is another run."
        )


def explain_cuda(trainer, error: RuntimeError):
    """Raise TrainingError for an error of CUDA, after which a process can use its GPU no more."""
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
        raise TrainingError(
            f"The GPU failed in step {trainer.state.global_step + 1}: {str(error).splitlines()[0]}. The last good "
            f"checkpoint is {trainer.progress.checkpoint or 'none: it was the start'}. Restart the kernel and run the "
            "same again: it goes on from there. If it fails there again, set engine.fused and engine.graphs to 'off'."
        ) from error


class BetweenLogs:
    """Of a Trainer with `progress`: checkpoints keep what is summed up since the last log, `unlogged` is taken up."""

    unlogged = None

    def _save_checkpoint(self, model, trial):
        self.progress.on_epoch_end(self.args, self.state, self.control)  # its seconds so far
        loss = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        weights = sum(p.detach().sum().item() for p in self.model.parameters() if p.requires_grad)
        refuse_divergence(self, {"loss": loss, "sum of the adapter's weights": weights})  # before it is kept
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            sums = {"loss": loss, "logged": self._globalstep_last_logged, "seconds": self.progress.seconds}
            path = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}", UNLOGGED)
            path.write_text(json.dumps(sums), "utf-8")

    def _run_epoch(self, *args, **kwargs):
        if self.unlogged:
            self._tr_loss += self.unlogged["loss"]
            self._globalstep_last_logged, self.progress.seconds = self.unlogged["logged"], self.unlogged["seconds"]
            self.unlogged = None
        super()._run_epoch(*args, **kwargs)
