"""What `make run` says while notebooks run: the cells tagged `terminal`, warnings, and a line a log step."""

import json
import os
import sys
import threading
import time
from pathlib import Path

from papermill.engines import NBClientEngine, papermill_engines

from src import runs


class Speaking(NBClientEngine):
    """papermill's engine, which prints the text outputs of cells tagged `terminal` as each of them is done."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        complete = nb_man.cell_complete

        def cell_complete(cell, cell_index, **more):
            complete(cell, cell_index, **more)
            if "terminal" in cell.metadata.get("tags", []):
                for output in cell.outputs:
                    text = output.get("data", {}).get("text/plain") or output.get("text", "")
                    if text and output.get("name") != "stderr":  # that is on the terminal already
                        print(text.rstrip("\n"), flush=True)

        nb_man.cell_complete = cell_complete
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


papermill_engines.register("speaking", Speaking)


class Warnings:
    """What kernels write to stderr, on this process's: progress bars too on a terminal, whole lines alone elsewhere."""

    def write(self, text: str):
        if not sys.stderr.isatty():
            text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("\r"))
            text = "" if "\r" in text or not text.strip() else text
        sys.stderr.write(text)

    def flush(self):
        sys.stderr.flush()


class Training:
    """`with Training():` prints a line for each new step in the log of the run that is opened meanwhile."""

    def __enter__(self):
        self.since, self.stop, self.said, self.known = time.time(), threading.Event(), 0, None
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()

    def run(self) -> runs.Run | None:
        """The run that 02 opened since, if it has."""
        found = [path for path in (runs.ROOT / "outputs").glob("*/.opened") if path.stat().st_mtime >= self.since]
        chains, own = [_chain(path.parent) for path in found], os.environ.get("CHAIN")
        wanted = own if own in chains else None  # not another `make run`'s of a sweep
        found = [path for path, chain in zip(found, chains, strict=True) if chain == wanted]
        if found and (wanted or not self.known):
            self.known = runs.Run(max(found, key=lambda path: path.stat().st_mtime).parent.name)
        return self.known

    def _follow(self):
        while not self.stop.wait(0.5):
            self._say()
        self._say()

    def _say(self):
        run = self.run()
        log = run and run.folder / "train_log.jsonl"
        if not log or not log.is_file() or log.stat().st_mtime < self.since:
            return
        rows = [row for row in run.log if "loss" in row or "eval_loss" in row]
        training = run.config["recipe"]["training"]
        for row in rows[self.said :]:
            print(line(row, training["num_train_epochs"], training["max_steps"]), flush=True)
        self.said = len(rows)


def _chain(folder: Path) -> str | None:
    """Which `make run` has a run's folder, as the process that holds it wrote down."""
    try:
        return json.loads((folder / ".lock.json").read_text(encoding="utf-8")).get("chain")
    except (OSError, ValueError):
        return None


def line(row: dict, epochs: float, max_steps: int) -> str:
    """A row of train_log.jsonl as text: step, loss (nats a token), tokens a second and the time that training needs."""
    if "eval_loss" in row:
        return f"  step {row['step']}: validation loss {row['eval_loss']:.4f}"
    done = row["step"] / max_steps if max_steps > 0 else row["epoch"] / epochs
    seconds = row["seconds"] * (1 / done - 1)
    left = f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
    steps, rate = max(row["step"], round(row["step"] / done)), row.get("tokens_per_second", 0)
    return f"  step {row['step']}/{steps}: loss {row['loss']:.4f}, {rate:,} tokens/s, {left} of training left"


def next_step(run: runs.Run | None) -> str:
    """Where the same command goes on after a stop, in words."""
    if run is None or run.finished:
        return "from the notebook that was stopped" if run else "from the start"
    states = run.checkpoints.glob("checkpoint-*/trainer_state.json") if run.checkpoints.is_dir() else []
    steps = [_step(path) for path in states]
    return f"from step {max(steps)} of {run.name}" if any(steps) else f"with {run.name} from its first step"


def _step(state: Path) -> int:
    try:
        return json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError):  # a checkpoint that the stop cut short
        return 0
