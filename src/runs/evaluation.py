"""A run scored on one split with one way of decoding, in outputs/<run>/evaluations/<split>-<8 hex>."""

import re
import time
from dataclasses import dataclass
from pathlib import Path

from src import runs
from src.runs import files, identity, locks
from src.runs.files import read_jsonl, read_sealed, write_jsonl, write_sealed
from src.runs.measured import environment, peak_gib
from src.runs.run import Run

SYSTEMS = ("base", "finetuned")
ANSWER = ("prediction", "tokens", "stop", "prompt_tokens", "cut_tokens")  # what a kept answer holds, beside its id


class Answers:
    """The answers of one system, written after every batch: `engine.generate`'s `keep`.

    found: {row number: answer}, of this process or of one that was stopped. seconds: in which they were generated.
    """

    def __init__(self, path: Path, found: dict[int, dict], spent: dict, of: dict):
        self.path, self.found, self.of, self.started = path, found, of, time.monotonic()
        self.spent = {"seconds": 0.0, "peak_gib": None} | spent

    def add(self, answers: dict[int, dict]):
        """Keep the answers of a batch. Raises runs.RunError when the disk does not take them."""
        self.found |= answers
        now = time.monotonic()
        self.spent["seconds"] = round(self.spent["seconds"] + now - self.started, 3)
        self.spent["peak_gib"], self.started = peak_gib(self.spent["peak_gib"]), now
        answers = {str(row): self.found[row] for row in sorted(self.found)}
        write_sealed(self.path, {"of": self.of, **self.spent, "answers": answers})


@dataclass(frozen=True)
class Evaluation:
    run: Run
    name: str

    @property
    def folder(self) -> Path:
        return self.run.folder / "evaluations" / self.name

    @property
    def comparison(self) -> Path:
        """Where 04 writes tables, figures and the page."""
        return self.folder / "comparison"

    @property
    def opened(self) -> str:
        """When 03 opened the evaluation last, as ISO text; "" where that is not known."""
        path = self.folder / ".opened"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    @property
    def config(self) -> dict:
        return read_sealed(self.folder / "evaluation.json", "03_evaluate")

    @property
    def metrics(self) -> dict:
        return read_sealed(self.folder / "metrics.json", "03_evaluate")

    @property
    def predictions(self) -> dict[str, list[dict]]:
        """{"base": rows, "finetuned": rows}, in the order of the split."""
        return {name: read_jsonl(self.folder / "predictions" / f"{name}.jsonl", "03_evaluate") for name in SYSTEMS}

    @property
    def answered(self) -> bool:
        """Whether every row is answered by both systems, so that no model is needed."""
        return all(len(self.keep(system).found) == self.config["rows"] for system in SYSTEMS)

    def keep(self, system: str, rank: int = 0) -> Answers:
        """The kept answers of a system: of the batches that a stopped process finished, or of a finished evaluation.

        rank: of the process that adds to them, which writes a file of its own; it takes as long as the slowest.
        """
        name, found, spent = f".answers-{system}", {}, {}
        path = self.folder / f"{name}{f'.{rank}' if rank else ''}.json"
        of = {"run": self.run.name, "evaluation": self.name, "system": system}
        for kept in sorted(self.folder.glob(f"{name}.*json")):
            try:
                part = read_sealed(kept, "03_evaluate")
                if part.pop("of", None) != of:
                    raise files.Damage(f"{files.relative(kept)} holds other answers than those of {of}.")
                found |= {int(row): answer for row, answer in part.pop("answers").items()}
                spent = {key: max(filter(None, (value, spent.get(key))), default=value) for key, value in part.items()}
            except files.Damage as error:
                print(f"{error} It was set aside as {files.relative(files.set_aside(kept))}.")
        if not found and (self.folder / "metrics.json").is_file():
            rows, spent = self.predictions[system], self.metrics["answered"][system]
            found = {n: {"id": row["id"]} | {key: row[key] for key in ANSWER} for n, row in enumerate(rows)}
        return Answers(path, found, spent, of)

    def save_predictions(self, records) -> dict[str, list[dict]]:
        """Write the kept answers of each system beside their records, {system: rows}; return them so."""
        rows = {}
        for system in SYSTEMS:
            found = self.keep(system).found
            rows[system] = [
                {"id": r["id"], "section": r["section"], "dialogue": r["dialogue"], "reference": r["summary"]}
                | {key: found[n][key] for key in ANSWER}
                for n, r in enumerate(records)
            ]
            if not (self.folder / "metrics.json").is_file():
                write_jsonl(self.folder / "predictions" / f"{system}.jsonl", rows[system])
        return rows

    def save_metrics(self, metrics: dict) -> Path:
        """Write metrics.json, which makes the evaluation a finished one, and let other processes have it."""
        spent = {system: self.keep(system).spent for system in SYSTEMS}
        names = {"run": self.run.name, "evaluation": self.name}
        sums = files.checksums(self.folder, "evaluation.json")
        sums |= {
            f"predictions/{name}": s for name, s in files.checksums(self.folder / "predictions", "*.jsonl").items()
        }
        made = {"inputs": self.config["inputs"], "answered": spent, "sha256": sums}
        path = write_sealed(self.folder / "metrics.json", names | metrics | made)
        for system in SYSTEMS:
            for kept in self.folder.glob(f".answers-{system}.*json"):
                kept.unlink()
        locks.release(self.folder)
        return path

    def seal_comparison(self) -> Path:
        """Write comparison.json: sha256 of what 04 has written in comparison/, and of the run's model card."""
        sums = {f"comparison/{name}": sum for name, sum in files.checksums(self.comparison).items()}
        made = {"evaluation": self.name, "card": files.checksums(self.run.adapter, "README.md"), "sha256": sums}
        return write_sealed(self.folder / "comparison.json", made)

    @property
    def compared(self) -> dict:
        return read_sealed(self.folder / "comparison.json", "04_compare")

    def check(self) -> "Evaluation":
        """This finished evaluation, after its files were compared with the checksums of metrics.json.

        Raises Damage, with the whole evaluation set aside under another name, when one is not what was written.
        """
        with locks.set_aside_if_damaged(self.folder, "03_evaluate"):
            files.check(self.folder, "metrics.json", self.metrics, "evaluation")
            if self.metrics["run"] != self.run.name:
                raise files.Damage(f"{files.relative(self.folder)} is of run {self.metrics['run']}.")
        return self


def open_evaluation(run: Run, recipe, rows, generation, redo: bool = False) -> Evaluation:
    """The evaluation of a run on these prompts with this decoding: the same values find the same folder.

    recipe: names the split and the seed of sampling. rows: a dataset with prompt_ids. generation: a GenerationConfig.
    Answers that are there are kept if they came from the same adapter, versions and code, and not with `redo`. The
    folder is locked until `save_metrics`. Raises runs.RunError when another process has it, or the run is damaged.
    """
    values = identity.of_evaluation(run, recipe.evaluation.split, rows, generation, recipe.seed)
    evaluation = Evaluation(run, identity.name(recipe.evaluation.split, values))
    folder, inputs = evaluation.folder, identity.answers_depend_on(run.check())
    try:
        if (folder / "metrics.json").is_file():
            evaluation.check()
    except files.Damage as error:
        print(f"{error} It is made anew now.")
    locks.hold(folder, "being written")
    try:
        same = not redo and evaluation.config["inputs"] == inputs
    except (files.Damage, FileNotFoundError, KeyError):
        same = False
    if not same:
        for old in [folder / "metrics.json", *folder.glob(".answers-*.json")]:
            old.unlink(missing_ok=True)
    files.mark_opened(folder)
    if not (folder / "metrics.json").is_file():
        config = {"run": run.name, "evaluation": evaluation.name, "created": evaluation.opened}
        config |= {"limit": recipe.evaluation.rows, **values, "inputs": inputs, "environment": environment()}
        write_sealed(folder / "evaluation.json", config)
    return evaluation


def evaluations(run: Run) -> list[Evaluation]:
    """The finished evaluations of a run, the newest last."""
    found = [Evaluation(run, path.parent.name) for path in (run.folder / "evaluations").glob("*/metrics.json")]
    found = [evaluation for evaluation in found if re.search("-[0-9a-f]{8}$", evaluation.name)]
    for evaluation in found:
        evaluation.check()
    return sorted(found, key=lambda evaluation: (evaluation.opened, evaluation.name))


def find_evaluation(run: Run, name: str = "latest") -> Evaluation:
    """The evaluation of that name, or the newest one of the run."""
    known = [evaluation for evaluation in evaluations(run) if name in ("latest", evaluation.name)]
    if known:
        return known[-1]
    others = ", ".join(evaluation.name for evaluation in evaluations(run)) or "none"
    wanted = "" if name == "latest" else f" named {name!r}"
    raise runs.RunError(
        f"Run {run.name} has no evaluation{wanted}: run notebooks/03_evaluate.ipynb first. Found: {others}."
    )
