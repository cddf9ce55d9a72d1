"""What a training step and an answer are made of on a GPU: milliseconds of kernels by kind, beside the wall clock's.

    python benchmarks/kernels.py FOLDER SETUP [...]    setups of speed.py, or `generate`; one JSON line each

FOLDER: the random weights of speed.py. The profiler slows launching, so the wall time of short steps is longer here
than in speed.py's own figures; what kernels take is not.
"""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import speed

KINDS = {  # kind: words in the names of its kernels, the first kind that fits
    "communication": ("nccl", "gloo"),
    "attention": ("flash", "fmha"),
    "dropout": ("_low", "_input_gradient", "_factor_gradient"),
    "dequantising": ("dequant",),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "::mm", "addmm", "scaled_mm", "splitk"),
    "optimiser": ("adam", "multi_tensor", "foreach"),
    "element-wise, fused": ("triton",),
    "copies": ("memcpy", "memset", "copy", "index"),
}
STEPS, FIRST = 10, 20  # optimizer steps that are watched, and those before them
RECORDED = 200  # steps before, where sizes have to be recorded first


class Watched:
    """What ran on the GPU inside `with`: `found`, milliseconds by kind and kernels, each divided by `parts`."""

    def __init__(self, parts: int, cuda: bool = True):
        import torch

        self.parts, self.cuda, self.found, self.rest = parts, cuda, {}, {}
        kinds = torch.profiler.ProfilerActivity
        self.profiler = torch.profiler.profile(activities=[kinds.CUDA if cuda else kinds.CPU])

    def __enter__(self):
        self.profiler.start()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_):
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        self.found["wall"] = (time.perf_counter() - self.start) * 1e3
        self.profiler.stop()
        wanted = torch.autograd.DeviceType.CUDA if self.cuda else torch.autograd.DeviceType.CPU
        for event in self.profiler.key_averages():
            if event.device_type != wanted:
                continue  # a call that launches
            ms = (event.self_device_time_total if self.cuda else event.self_cpu_time_total) / 1e3
            kind = next((k for k, words in KINDS.items() if any(w in event.key.lower() for w in words)), "rest")
            self.found[kind] = self.found.get(kind, 0.0) + ms
            self.found["kernels"] = self.found.get("kernels", 0) + event.count
            if kind == "rest":
                self.rest[event.key[:90]] = round(ms / self.parts, 2)
        self.found = {key: round(value / self.parts, 2) for key, value in self.found.items()}
        self.rest = dict(sorted(self.rest.items(), key=lambda item: -item[1])[:6])


def training(folder: str, setup: str, overrides: dict, steps: int = STEPS, first: int | None = None) -> dict:
    """A training step of one setup, the mean of `steps` after the first ones."""
    from transformers import TrainerCallback

    from src import engine

    first = first or (RECORDED if overrides.get("engine.graphs") == "on" else FIRST)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == first:
                self.watched = Watched(steps, args.device.type == "cuda").__enter__()
            elif state.global_step == first + steps:
                self.watched.__exit__()

    class WatchedTrainer(engine.FastTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(watch)

    watch = Watch()
    usual, engine.FastTrainer = engine.FastTrainer, WatchedTrainer
    try:
        result = speed.train(folder, setup, overrides=overrides | {"training.max_steps": first + steps})
    finally:
        engine.FastTrainer = usual
    return {"setup": setup, "gpu": result["gpu"], "plan": result["plan"], "ms_a_step": watch.watched.found,
            "rest": watch.watched.rest}  # fmt: skip


def answering(folder: str) -> dict:
    """Reading 819 prompts with one new token each, and 64: what a decoding step is made of is their difference."""
    import torch
    from transformers import GenerationConfig

    from src import engine

    model, tokenizer = speed.loaded_model(folder, {})
    engine.dequantize(model)
    prompts, found = speed.rows("test"), {}
    for system in ("base", "finetuned"):
        for new in (1, 64):
            exactly = GenerationConfig(max_new_tokens=new, min_new_tokens=new)
            for watched in (None, Watched(1)):
                off = model.disable_adapter() if system == "base" else nullcontext()
                with off, watched or nullcontext():
                    engine.generate(model, tokenizer, prompts, exactly, progress=False)
            found[f"{system}, {new} new"] = watched.found | {"rest, most": watched.rest}
    return {"setup": "generate", "gpu": torch.cuda.get_device_name(), "ms": found}


def main(words: list[str]) -> int:
    if len(words) < 2:
        print(__doc__)
        return 2
    folder, *setups = words
    if len(setups) > 1:
        for setup in setups:
            subprocess.run([sys.executable, __file__, folder, setup], check=False, timeout=300)
        return 0
    folder, setup = str(Path(folder).resolve()), setups[0]
    result = answering(folder) if setup == "generate" else training(folder, setup, speed.TRAIN[setup])
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
