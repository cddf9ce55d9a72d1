"""Checkpoints that a training can go on from: whole, as they were written, with the best one that they refer to."""

import json
import shutil
from pathlib import Path

from src.runs import files


def newest(folder: Path, aside: Path) -> Path | None:
    """The newest checkpoint of a folder that training can go on from; None if there is none.

    One that a kill cut short is deleted. One whose best checkpoint is gone goes to `aside` under another name.
    """
    states = {}
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:  # the Trainer writes its state last
            states[path] = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path)
    for path, state in states.items():
        best = Path(state.get("best_model_checkpoint") or path).name
        if folder / best in states:
            return path
        print(f"{files.relative(path)} needs {best}, which is gone: training goes on from an earlier one, or anew.")
        files.set_aside(path, aside)
    return None
