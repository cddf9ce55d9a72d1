"""Kills 01, 02, 03, 04 and 06 at random moments, runs each until it is done, and compares with an undisturbed run.

`OMP_NUM_THREADS=1 python benchmarks/kills.py [--kills N] [--minutes M] [--seed S] [--out FILE] [STEP ...]` writes the
section "kills" of results/reliability.json. A step is its notebook's own cells, on the demo's shortest rows, in a
process of its own that SIGKILL ends with its children; the moments are drawn from the time that the step takes.
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

if __name__ == "__main__":  # a test that imports this goes on to draw figures in kernels
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src import recipes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
ROWS = {"train": 24, "validation": 4, "test": 10}
OVERRIDES = {
    "device": "cpu", "training.max_steps": 8, "training.eval_steps": 2, "training.per_device_train_batch_size": 3,
    "generation.max_new_tokens": 6, "engine.batch_size": 2, "quantization.load_in_4bit": False,
}  # fmt: skip
if "checkpoint_minutes" in recipes.Engine.model_fields:
    OVERRIDES["engine.checkpoint_minutes"] = 1e-5  # a checkpoint at every step, beside those of evaluations
PARAMETERS = {
    "RECIPE": "demo", "OVERRIDES": OVERRIDES, "EXAMPLE_ROW": 0, "NUM_GPUS": 1, "REDO": False, "EVALUATION": "latest",
    "COMPARED": [], "AGAINST": None, "ROWS": 2, "RATED": 4, "PUSH": False, "HUB_NAME": "", "SECTION": "ALLERGY",
    "DIALOGUE": "Doctor: Any allergies?\nPatient: To penicillin.", "SHOTS": 0,
}  # fmt: skip
STEPS = {  # step: (notebook, words of the cell from which on it may be killed: before, it only reads)
    "01": ("01_prepare_data", "data.prepare("),
    "02": ("02_train_qlora", "engine.FastTrainer("),
    "03": ("03_evaluate", "runs.open_evaluation("),
    "04": ("04_compare", "written = "),
    "06": ("06_use_it", "runs.aside(home)"),
}
LEFT_OUT = ("on_colab = ", 'RECIPE = "', 'RUN = "', "shots = ", "invented = ", "follow_the_card", "token_view")
LEFT_OUT += ("loss_curve(run.log", "after = ")
PATTERN = ("02", "03", "04", "02 saving", "06", "01", "03", "02", "04", "03")  # what is killed, again and again
TIMES = re.compile(r"seconds|runtime|per_second|minutes|finished|created|seal|peak_gib")  # fields that hold no result
TIMED = {"train_log.jsonl", "evaluation.json"}  # files whose sha256 differs, because a time is in them


def cells(step: str) -> list[str]:
    """The code of a step, cell by cell: its notebook, without set-up, parameters and what only shows."""
    notebook = json.loads((ROOT / "notebooks" / f"{STEPS[step][0]}.ipynb").read_text(encoding="utf-8"))
    found = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = [source for source in found if STEPS[step][1] in source or not any(word in source for word in LEFT_OUT)]
    return found[:1] if step == "01" else found  # the rest of 01 shows what the first has written


def work(step: str, root: Path, begun: int):
    """In a process of its own: run a step in a repository `root`; a byte goes to the pipe `begun` where it may die."""
    from src import engine, runs

    engine.planning.matmul_rate = lambda device, dtype: 1e11  # the plan's timing of this machine takes seconds
    runs.ROOT = root
    os.chdir(root)
    space = PARAMETERS | {"RUN": "demo" if step == "06" else "latest"}
    for source in cells(step):
        if STEPS[step][1] in source:
            os.write(begun, b".")
        exec(source, space)


def attempt(step: str, root: Path, moment=None) -> tuple[str, float]:
    """Run a step in a process group of its own, killed at `moment`: seconds, or a function that says when.

    Returns ("done", "killed" or what went wrong, the seconds from where it may be killed).
    """
    log = root.with_suffix(".log")
    begun, write = os.pipe()
    child = os.fork()  # torch is imported once; this process computes nothing, so that a fork is safe
    if not child:
        try:
            os.setsid()
            with log.open("w", encoding="utf-8") as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            work(step, root, write)
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)
    os.close(write)
    os.read(begun, 1)  # or its end, where the step failed before
    os.close(begun)
    begin = time.monotonic()
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        seconds = time.monotonic() - begin
        if moment is not None and (moment() if callable(moment) else seconds >= moment):
            os.killpg(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.001)
    seconds = time.monotonic() - begin
    if os.WIFSIGNALED(ended[1]):
        return "killed", seconds
    return ("done" if ended[1] == 0 else log.read_text(encoding="utf-8", errors="replace")[-1500:]), seconds


def untimed(value):
    """A JSON value without times, and without the sums of files that hold one."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if not TIMES.search(k) and k not in TIMED}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def state(root: Path) -> dict:
    """{file: its bytes, or its JSON without times} of all that the steps wrote, leftovers and hidden files included."""
    found = {}
    for path in sorted(path for top in ("data/processed", "outputs") for path in (root / top).rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir() or path.name in (".lock", ".opened"):
            if path.is_dir() and (".tmp" in name or "damaged" in name):
                found[name] = "a folder"
        elif path.suffix == ".json":
            found[name] = untimed(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").split("\n")
            found[name] = [untimed(json.loads(line)) for line in lines if line]
        else:
            found[name] = path.read_bytes()
    return found


def differences(root: Path, whole: Path) -> list[str]:
    """The files that are not in both repositories, or not the same."""
    try:
        found, expected = state(root), state(whole)
    except ValueError as error:
        return [f"a file that is no JSON: {error}"]
    return [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]


def repository(root: Path):
    """A repository with the demo's shortest rows and its base model."""
    (root / "data" / "demo").mkdir(parents=True)
    (root / "data" / "demo" / "base").symlink_to(ROOT / "data" / "demo" / "base")
    for split, count in ROWS.items():
        with (ROOT / "data" / "demo" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file)
        with (root / "data" / "demo" / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *sorted(lines, key=lambda line: len("".join(line)))[:count]])


def undisturbed(folder: Path, last: str) -> dict[str, tuple[Path, Path, float]]:
    """{step: (the repository before it, after it, seconds)} up to the `last`, each run without a kill."""
    before = folder / "00"
    repository(before)
    found = {}
    for step in (step for step in STEPS if step <= last):
        after = shutil.copytree(before, folder / step, symlinks=True)
        how, seconds = attempt(step, after)
        if how != "done":
            raise RuntimeError(f"{step} fails without a kill: {how}")
        found[step] = (before, after, seconds)
        before = after
    return found


def saving(root: Path):
    """A function that says when a checkpoint is half written."""

    def half_written():
        folders = (root / "outputs").glob("*/checkpoints/checkpoint-*")
        return any(not (folder / "checksums.json").is_file() for folder in folders)

    return half_written


def trial(kind: str, whole, root: Path, draw: random.Random) -> tuple[int, list[str]]:
    """Kill a step one to three times, and run it until it is done. Returns (kills, what differs)."""
    step, (before, after, seconds) = kind[:2], whole
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(before, root, symlinks=True)
    moments, kills = [draw.uniform(0, seconds) for _ in range(draw.choice((1, 2, 3)))], 0
    if kind.endswith("saving"):
        moments[0] = saving(root)
    for moment in [*moments, None]:
        how, _ = attempt(step, root, moment)
        kills += how == "killed"
        if how not in ("killed", "done"):
            return kills, [how]
    return kills, differences(root, after)


def main(arguments: list[str]) -> dict:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("steps", nargs="*", default=PATTERN)
    options = parser.parse_args(arguments)
    import bitsandbytes  # noqa: F401  everything that the cells import is, before any fork
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    from peft import PeftModel  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, models  # noqa: F401

    from src import data, engine, prompts, qlora, runs, scoring, takehome, try_it  # noqa: F401
    from src.runs.measured import versions

    models.mistral.modeling_mistral, models.llama.tokenization_llama  # noqa: B018
    torch.set_num_threads(1)
    begin, draw, n = time.monotonic(), random.Random(options.seed), 0
    section = {
        "what": "kills of 01, 02, 03, 04 and 06 at random moments after which the same command ended bit for bit alike",
        "tried": 0, "handled": 0, "by": {step: [0, 0] for step in STEPS}, "failures": [],
        "command": f"OMP_NUM_THREADS=1 python benchmarks/kills.py --kills {options.kills} --seed {options.seed}",
        "overrides": OVERRIDES, "versions": versions(["torch", "transformers", "peft"]),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        whole = undisturbed(Path(folder), max(kind[:2] for kind in options.steps))
        print({step: round(seconds, 2) for step, (_, _, seconds) in whole.items()}, flush=True)
        while section["tried"] < options.kills and time.monotonic() - begin < 60 * options.minutes:
            kind, n = options.steps[n % len(options.steps)], n + 1
            step = kind[:2]
            kills, different = trial(kind, whole[step], Path(folder) / "trial", draw)
            well = 0 if different else kills
            section["tried"], section["handled"] = section["tried"] + kills, section["handled"] + well
            section["by"][step] = [section["by"][step][0] + kills, section["by"][step][1] + well]
            section["failures"] += [f"{kind}: {what}" for what in different]
            section["seconds"] = round(time.monotonic() - begin)
            results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
            text = json.dumps(results | {"kills": section}, indent=2, ensure_ascii=False)
            options.out.write_text(text + "\n", encoding="utf-8")
            print(section["tried"], "kills,", section["seconds"], "s:", kind, kills, different, flush=True)
    return section


if __name__ == "__main__":
    print(main(sys.argv[1:]))
