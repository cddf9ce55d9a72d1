"""Checkpoints that a training can go on from: whole, as they were written, with the best one that they refer to."""

import json
import shutil
from pathlib import Path

from src.runs import files

SUMS = "checksums.json"  # {file: sha256}, which the engine's trainer adds once a checkpoint is written


def newest(folder: Path, aside: Path) -> Path | None:
    """The newest checkpoint of a folder that training can go on from; None if there is none.

    One that a kill cut short is deleted. One that was damaged since goes to `aside` under another name, and is said.
    """
    states = {}
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        is_summed = (path / SUMS).is_file()
        try:  # the Trainer writes its state last
            states[path] = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            files.check(path, json.loads((path / SUMS).read_text(encoding="utf-8")) if is_summed else {})
        except (OSError, ValueError, AttributeError, files.Damage) as error:
            states.pop(path, None)
            if not is_summed:
                shutil.rmtree(path)
                continue
            what = error if isinstance(error, files.Damage) else f"{files.relative(path)} is damaged."
            print(f"{what} It was set aside as {files.relative(files.set_aside(path, aside))}.")
    for path, state in states.items():
        best = Path(state.get("best_model_checkpoint") or path).name
        if folder / best in states:
            return path
        print(f"{files.relative(path)} needs {best}, which is gone: training goes on from an earlier one, or anew.")
        files.set_aside(path, aside)
    return None
