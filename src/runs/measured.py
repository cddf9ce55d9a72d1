"""What a training measured and what it ran on, for manifest.json."""

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from dataclasses import asdict

from src import runs
from src.runs import files, identity

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
        "processes": trainer.args.world_size,  # one a GPU; no part of what the run is
        "plan": asdict(plan) if plan else None,
        "plans_out_of_memory": [asdict(p) for p in getattr(trainer, "failed_plans", [])],
        **environment(model.device),
    }


def environment(device=None) -> dict:
    """What a step ran on: library versions, device, the commit with "-dirty" where files were changed, and these files.

    `device`: a torch device; where it is left out, the GPU if there is one. "code": the sha256 of src.
    """
    import torch

    git, modified = _git("describe", "--always", "--dirty", "--abbrev=40"), {}
    for line in (_git("status", "--porcelain", "--untracked-files=all", "--", "src", "notebooks") or "").splitlines():
        path = line[2:].strip().rpartition(" -> ")[2].strip('"')
        modified[path] = files.sha256_file(runs.ROOT / path) if (runs.ROOT / path).is_file() else "deleted"
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    return {
        "versions": versions(PACKAGES) | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "git": git,
        "modified": modified,
        "code": identity.code("*.py", "*/*.py", "recipes/*.toml"),
    }


def versions(packages) -> dict[str, str | None]:
    """The installed version of each package; None for one that is not installed."""
    found = dict.fromkeys(packages)
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # training needs no scorer
            pass
    return found


def peak_gib(before: float | None = None) -> float | None:
    """The most memory (GiB) that this process had on a GPU, or `before` if that is more; None without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return before
    return max(before or 0.0, round(torch.cuda.max_memory_allocated() / 2**30, 3))


def _git(*command) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=runs.ROOT, capture_output=True, text=True)
        return done.stdout.rstrip() or None
    except OSError:  # no git on this machine
        return None
