"""Trainings that cannot go on, in one paragraph that names the last good checkpoint."""

import math

import torch


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
