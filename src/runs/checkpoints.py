"""Checkpoints that a training can go on from: whole, as they were written, with the best one that they refer to."""

import json
import shutil
from pathlib import Path

from src.runs import files

SEAL = "checksums.json"  # of a checkpoint's files, written last


def seal(trainer):
    """Have a Trainer write, last in every checkpoint, the checksums of its files, and only then delete older ones."""
    from transformers import TrainerCallback  # loads torch
    from transformers.trainer_utils import rotate_checkpoints

    limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None  # it deletes before the new one is whole

    class Seal(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if not state.is_world_process_zero or not folder.is_dir():
                return
            sums = files.checksums(folder)  # other processes may still be writing their random state
            sums = {name: sha for name, sha in sums.items() if name != SEAL and not name.startswith("rng_state_")}
            files.write_sealed(folder / SEAL, {"checkpoint": folder.name, "sha256": sums})
            rotate_checkpoints(args.output_dir, limit, state.best_model_checkpoint, use_mtime=True)

    trainer.add_callback(Seal())


def remove_halves(folder: Path):
    """Delete the checkpoints that miss a file: a kill or a full disk cut their writing or their deletion short."""
    for path in folder.glob("checkpoint-*"):
        try:
            written = [*files.read_sealed(path / SEAL, "02_train_qlora")["sha256"], SEAL]
        except FileNotFoundError:
            written = [SEAL]
        except files.Damage:
            continue
        missing = [name for name in written if not (path / name).is_file()]
        if missing:
            print(f"{files.relative(path)} was half written or half deleted ({missing[0]} is missing): removed.")
            shutil.rmtree(path)


def newest(folder: Path, aside: Path) -> Path | None:
    """The newest checkpoint of a folder that training can go on from; None if there is none.

    One that misses a file is deleted. One that was damaged since, or whose best checkpoint is gone, goes to `aside`
    under another name.
    """
    remove_halves(folder)
    states, earlier = {}, "training goes on from an earlier one, or anew."
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            files.check(path, SEAL, files.read_sealed(path / SEAL, "02_train_qlora"), "checkpoint")
            states[path] = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (files.Damage, FileNotFoundError, ValueError) as error:
            print(f"{error} It was set aside as {files.relative(files.set_aside(path, aside))}: {earlier}")
    for path, state in states.items():
        best = Path(state.get("best_model_checkpoint") or path).name
        if folder / best in states:
            return path
        print(f"{files.relative(path)} needs {best}, which is gone: {earlier}")
        files.set_aside(path, aside)
    return None
