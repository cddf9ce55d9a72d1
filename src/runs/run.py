"""A trained run in outputs/<recipe>-<8 hex>: opened, locked, continued, saved, checked and found again."""

import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from src import recipes, runs
from src.runs import checkpoints, files, identity, locks
from src.runs.files import read_jsonl, read_sealed, write_json, write_jsonl, write_sealed
from src.runs.measured import measured


@dataclass(frozen=True)
class Run:
    """One trained run, or one that is being trained."""

    name: str

    @property
    def folder(self) -> Path:
        return runs.ROOT / "outputs" / self.name

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def finished(self) -> bool:
        return (self.folder / "manifest.json").is_file()

    @property
    def opened(self) -> str:
        """When 02 opened the run last, or finished it, as ISO text."""
        path = self.folder / ".opened"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else self.manifest["finished"]

    @property
    def config(self) -> dict:
        return read_sealed(self.folder / "config.json", "02_train_qlora")

    @property
    def manifest(self) -> dict:
        return read_sealed(self.folder / "manifest.json", "02_train_qlora")

    @property
    def log(self) -> list[dict]:
        """The rows of train_log.jsonl: losses, evaluations and samples, by step."""
        return read_jsonl(self.folder / "train_log.jsonl", "02_train_qlora")

    @property
    def base_commit(self) -> str | None:
        """The hub commit of the base model; None for a folder."""
        base = self.config["identity"].get("base")
        return base if isinstance(base, str) else None

    def recipe(self, overrides: dict | None = None) -> recipes.Recipe:
        """The recipe as it was trained, with other evaluation, generation, engine or device settings.

        Its revision is the commit that the base model came from. Raises runs.RunError for an override of anything else
        that differs from what was trained.
        """
        config, overrides = self.config, overrides or {}
        recipe = recipes.build(config["recipe"], overrides)
        for key, trained in recipe._overridden.items():
            if (
                key.endswith("_file")
                and trained
                and files.public(overrides[key] or "") in (trained, Path(trained).name)
            ):
                continue  # the same, outside of the repository
            if not key.startswith(("evaluation.", "generation.", "engine.")) and key != "device":
                raise runs.RunError(
                    f"{key} is {trained!r} in run {self.name} and {overrides[key]!r} in OVERRIDES. To score a run with "
                    "that value, train it with 02 first; to score this run, leave the field out."
                )
        return recipe.model_copy(update={"revision": self.base_commit or recipe.revision})

    def checkpoint(self) -> str | None:
        """The newest checkpoint that training can go on from, relative to the current folder; None if there is none."""
        found = checkpoints.newest(self.checkpoints, self.folder)
        return os.path.relpath(found) if found else None

    def check(self) -> "Run":
        """This run, after its files were compared with the checksums of the manifest.

        Raises Damage, with the whole run set aside under another name, when one is not the file that was written.
        """
        if not self.finished:
            self.manifest  # noqa: B018  raises: run 02 first
        with locks.set_aside_if_damaged(self.folder, "02_train_qlora"):
            files.check(self.folder, "manifest.json", self.manifest, "run")
        return self

    def check_trainer(self, trainer):
        """Raise RunError unless the objects of this trainer are the ones that the run is named after."""
        recipe, base = self.recipe(), {"base": self.config["identity"]["base"]}
        name = identity.name(recipe.name, base | identity.of_run(trainer, recipe))
        if name != self.name:
            raise runs.RunError(
                f"This trainer makes {name}, not {self.name}: run the cell with `runs.open` again, then this."
            )

    def load_adapter(self, trainer):
        """Load the finished run's weights into the trainer's model."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        self.check_trainer(trainer)
        set_peft_model_state_dict(trainer.model, load_file(self.check().adapter / "adapter_model.safetensors"))

    def save(self, trainer, tokenizer, data: dict | None = None) -> dict:
        """Write the trained adapter, its tokenizer and prompt template, the log and, last, manifest.json; return it.

        `data`: sha256 of the processed files by split. Releases the run's lock.
        """
        self.check_trainer(trainer)
        model = trainer.model
        with files.aside(self.adapter) as adapter:
            model.save_pretrained(adapter)
            (adapter / "README.md").unlink(missing_ok=True)  # names folders of this machine; 04 writes the model card
            tokenizer.save_pretrained(adapter)
            write_json(adapter / "prompt_template.json", self.config["prompt_template"])
        write_jsonl(self.folder / "train_log.jsonl", trainer.state.log_history)
        sums = {f"adapter/{name}": sha for name, sha in files.checksums(self.adapter).items()}
        manifest = {"run": self.name, "base_commit": self.base_commit, **measured(trainer)}
        manifest |= {"data": data or {}, "sha256": sums | files.checksums(self.folder, "[ct]*.json*")}
        write_sealed(self.folder / "manifest.json", manifest)
        self.remove_checkpoints()
        self.unlock()
        return manifest

    def remove_checkpoints(self):
        """Delete the checkpoints of a run that is finished, unless its recipe keeps them."""
        if not self.recipe().training.keep_checkpoints:
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    @contextmanager
    def writing(self):
        """Explain a disk that takes no more of a training, as a RunError, and remove what is half written."""
        try:
            with files.writing(self.folder):
                yield
        except runs.RunError:
            checkpoints.remove_halves(self.checkpoints)
            files.remove_leftovers(self.folder)
            raise

    def lock(self):
        """Take the run's folder for this process. Raises runs.RunError when another process has it."""
        locks.hold(self.folder, "being trained")

    def unlock(self):
        """Let other processes open the run."""
        locks.release(self.folder)


def open(recipe, trainer, prompt_template: dict) -> Run:
    """The run that these objects are, in its own folder: the same values find the same run, others start a new one.

    `trainer`: a transformers Trainer over a PeftModel; its checkpoints go to the run's folder from here on. The folder
    is locked until `save`. Raises runs.RunError when another process trains this run. A damaged run is set aside.
    """
    kind = str(trainer.model.peft_config["default"].init_lora_weights).lower()
    if kind.startswith(("pissa", "olora", "corda", "loftq")):
        raise runs.RunError(
            f"init_lora_weights is {kind!r}, which changes the base weights, and a run keeps the adapter alone: "
            "expected True or 'gaussian'."
        )
    base = identity.base(identity.base_name(trainer.model), recipe.revision)
    values = {"base": base, **identity.of_run(trainer, recipe)}
    run = Run(identity.name(recipe.name, values))
    trainer.args.output_dir = os.path.relpath(run.checkpoints)  # so that no file names a folder of this machine
    settings = trainer.model.peft_config["default"]  # where others find the base: an id, or a folder of this repository
    where = identity.base_name(trainer.model)
    settings.base_model_name_or_path = Path(where).name if Path(where).is_absolute() else where
    settings.revision = base if isinstance(base, str) else None
    try:
        found = run.finished and run.check()
    except files.Damage as error:
        print(f"{error} It is made anew now.")
        found = None
    if not found:
        run.lock()
    files.mark_opened(run.folder)
    if found:
        run.remove_checkpoints()  # a kill may have come before `save` did so
        run.unlock()
        return run
    config = {
        "run": run.name,
        "recipe": identity.published(identity.as_trained(recipe, trainer)),
        "identity": values,
        "prompt_template": prompt_template,
    }
    write_sealed(run.folder / "config.json", config)
    checkpoints.seal(trainer)
    trainer.train = run.writing()(trainer.train)  # so that 02 calls a Trainer's own `train`, and a full disk is told
    return run


def finished(recipe_name: str | None = None) -> list[Run]:
    """The finished runs under outputs/, of one recipe or all, the newest last. A damaged one is set aside and named."""
    whole = []
    for path in sorted((runs.ROOT / "outputs").glob("*/manifest.json")):
        run = Run(path.parent.name)
        if not re.search("-[0-9a-f]{8}$", run.name):
            continue  # others' folders, and damaged ones
        try:
            with locks.set_aside_if_damaged(run.folder, "02_train_qlora"):
                run.config, run.manifest  # noqa: B018  their seals
            whole.append(run)
        except files.Damage as error:  # it stops no other run
            print(error)
    chosen = [run for run in whole if recipe_name in (None, run.config["recipe"]["name"])]
    return sorted(chosen, key=lambda run: (run.opened, run.name))


def find(recipe_name: str, run: str = "latest", overrides: dict | None = None) -> Run:
    """The run of that name; "latest": the newest finished run of the recipe that was trained with these `overrides`.

    Raises Damage, with the run set aside, when one of its files is not what was written.
    """
    known = finished(recipe_name if run == "latest" else None)
    if run == "latest":
        known = [candidate for candidate in known if _agrees(candidate, overrides or {})]
        wanted = f"of recipe {recipe_name!r}" + (f" with {overrides}" if overrides else "")
    else:
        wanted = f"named {run!r}"
        known = [candidate for candidate in known if candidate.name == run]
    if known:
        return known[-1].check()
    others = ", ".join(candidate.name for candidate in finished()) or "none"
    raise runs.RunError(
        f"No finished run {wanted} under outputs/: run notebooks/02_train_qlora.ipynb first. Found: {others}."
    )


def _agrees(run: Run, overrides: dict) -> bool:
    try:
        run.recipe(overrides)
    except runs.RunError:
        return False
    return True
