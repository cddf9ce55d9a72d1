"""What a training measured and what it ran on, for manifest.json."""

import datetime
import importlib.metadata
import platform
import subprocess
from dataclasses import asdict

from src import runs
from src.runs import identity

PACKAGES = "torch transformers peft bitsandbytes accelerate datasets evaluate rouge-score sacrebleu".split()


def measured(trainer) -> dict:
    """Steps, tokens, seconds (in optimizer steps), peak memory (GiB), parameters, plan and environment of a training.

    `trainer`: after `train`. What a plain transformers Trainer does not measure is None.
    """
    model, state = trainer.model, trainer.state
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    trainable, total = model.get_nb_trainable_parameters()
    plan = getattr(trainer, "plan", None)
    return {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        "steps": state.global_step,
        "best_step": best or state.global_step,
        "rows": {"train": len(trainer.train_dataset), "validation": len(trainer.eval_dataset)},
        "train_tokens": state.num_input_tokens_seen or None,
        "train_seconds": round(trainer.seconds, 1) if hasattr(trainer, "seconds") else None,
        "peak_gib": getattr(trainer, "peak_gib", None),
        "optim": identity.plain(trainer.args.optim),
        "parameters": {"trainable": trainable, "total": total},
        "plan": asdict(plan) if plan else None,
        "plans_out_of_memory": [asdict(p) for p in getattr(trainer, "failed_plans", [])],
        **environment(model.device),
    }


def environment(device) -> dict:
    """What a run ran on: library versions, machine, and the commit with "-dirty" where files were changed."""
    import torch

    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        git = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git on this machine
        git = None
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # training needs no scorer
            versions[package] = None
    threads = f"CPU, {torch.get_num_threads()} threads"
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        "git": git,
    }
