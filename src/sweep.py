"""A list of runs, one after the other or several at once: `python -m src.sweep FILE [JOBS]`.

FILE is a JSON list such as [{"experiment": "samsum", "overrides": {"seed": 1}}, ...]; overrides may be left out. With
JOBS above 1 each job sees one GPU of its own. What is done already, with the same overrides, is skipped, so the same
command goes on after a stop, and repeats what failed.
"""

import json
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from src import data, recipes, runs


def read(path: Path) -> list[tuple[str, dict]]:
    """The (experiment, overrides) of a sweep's file, all of them checked. Raises recipes.RecipeError."""
    shape = 'a list such as [{"experiment": "samsum", "overrides": {"seed": 1}}]'
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise recipes.RecipeError(f"{path} cannot be read as JSON ({error}): expected {shape}.") from None
    if not isinstance(listed, list) or not listed:
        raise recipes.RecipeError(f"{path} holds no list of runs: expected {shape}.")
    found = []
    for number, entry in enumerate(listed, 1):
        if not isinstance(entry, dict) or not {"experiment"} <= set(entry) <= {"experiment", "overrides"}:
            raise recipes.RecipeError(f"{path}, run {number}: found {recipes.shown(entry)}, expected {shape}.")
        try:
            recipes.load(entry["experiment"], entry.get("overrides"))
        except recipes.RecipeError as error:
            raise recipes.RecipeError(f"{path}, run {number}: {error}") from None
        found.append((entry["experiment"], entry.get("overrides", {})))
    return found


def done(name: str, overrides: dict) -> str | None:
    """The finished run that `make run` made of a recipe with just these overrides, scores and all; None if none did."""
    for path in (runs.ROOT / "outputs").glob("*/notebooks/04_compare.ipynb"):
        given = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("papermill", {}).get("parameters", {})
        if (given.get("RECIPE"), given.get("OVERRIDES")) == (name, overrides):
            run = runs.Run(path.parents[1].name)
            if run.finished and list(run.folder.glob("evaluations/*/metrics.json")):
                return run.name
    return None


def prepare(listed: list[tuple[str, dict]]):
    """What 01 does, once for every dataset: jobs that run at once may not write the same rows. Raises RecipeError."""
    seen = {}
    for name, overrides in listed:
        recipe = recipes.load(name, overrides)
        sources = recipe.data.model_dump(include={"train_file", "validation_file", "test_file", "split_seed"})
        if seen.setdefault(recipe.data.dataset, sources) != sources:
            raise recipes.RecipeError(
                f"Runs on different files of the dataset {recipe.data.dataset!r}: expected one, because jobs at once "
                "share its rows. Put them into two sweeps, or set JOBS to 1."
            )
    for dataset in seen:
        data.prepare(next(r for r in (recipes.load(*entry) for entry in listed) if r.data.dataset == dataset))
    for base in {recipes.load(*entry).base_model for entry in listed}:
        data.fetch_model(base)


def start(number: int, name: str, overrides: dict, gpu: str | None) -> int:
    """Run one chain with its lines marked; return its exit code."""
    command = [sys.executable, "-m", "src.run", name, json.dumps(overrides), "1", *(["prepared"] if gpu else [])]
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}) | {"PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, cwd=runs.ROOT, env=env, **pipes) as child:
        for line in child.stdout:
            print(f"[{number} {name}] {line}", end="", flush=True)
    return child.returncode


def sweep(path: Path, jobs: int = 1) -> list[int]:
    """Run what the file lists and is not done; return the numbers of the runs that failed, counted from 1."""
    listed, waiting = read(path), []
    for number, entry in enumerate(listed, 1):
        run = done(*entry)
        print(f"[{number} {entry[0]}] " + (f"done: {run}" if run else json.dumps(entry[1])), flush=True)
        waiting += [] if run else [(number, *entry)]
    if jobs > 1 and waiting:
        prepare([entry for _, *entry in waiting])
    gpus, visible = queue.Queue(), os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    for n in range(jobs):
        gpus.put((visible[n % len(visible)] if visible[0] else str(n)) if jobs > 1 else None)

    def job(entry) -> int:
        gpu = gpus.get()
        try:
            return start(*entry, gpu)
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            codes = list(pool.map(job, waiting))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C, which the jobs get too, none starts
    return [entry[0] for entry, code in zip(waiting, codes, strict=True) if code]


def main(words: list[str]) -> int:
    if not 1 <= len(words) <= 2 or not words[0] or not (words[1:] or ["1"])[0].isdecimal() or words[1:] == ["0"]:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        failed = sweep(Path(words[0]), int((words[1:] or ["1"])[0]))
    except (recipes.RecipeError, runs.RunError, data.DataError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on with what is not done.", file=sys.stderr)
        return 130
    print(f"failed: {', '.join(map(str, failed))}; the same command tries again" if failed else "all runs are done")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
