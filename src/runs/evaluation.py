"""A run scored on one split with one way of decoding, in outputs/<run>/evaluations/<split>-<8 hex>."""

import datetime
from dataclasses import dataclass
from pathlib import Path

from src import runs
from src.runs import identity
from src.runs.files import read_json, read_jsonl, write_json, write_jsonl
from src.runs.run import Run

SYSTEMS = ("base", "finetuned")


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
    def config(self) -> dict:
        return read_json(self.folder / "evaluation.json", "03_evaluate")

    @property
    def metrics(self) -> dict:
        return read_json(self.folder / "metrics.json", "03_evaluate")

    @property
    def predictions(self) -> dict[str, list[dict]]:
        """{"base": rows, "finetuned": rows}, in the order of the split."""
        return {name: read_jsonl(self.folder / "predictions" / f"{name}.jsonl", "03_evaluate") for name in SYSTEMS}

    def save_predictions(self, records, answers: dict[str, list[dict]]) -> dict[str, list[dict]]:
        """Write the answers of each system (rows of `engine.generate`) beside their records; return them so."""
        rows = {}
        for system, found in answers.items():
            rows[system] = [
                {"id": r["id"], "section": r["section"], "dialogue": r["dialogue"], "reference": r["summary"], **a}
                for r, a in zip(records, found, strict=True)
            ]
            write_jsonl(self.folder / "predictions" / f"{system}.jsonl", rows[system])
        return rows

    def save_metrics(self, metrics: dict) -> Path:
        """Write metrics.json, which makes the evaluation a finished one."""
        return write_json(self.folder / "metrics.json", {"run": self.run.name, "evaluation": self.name, **metrics})


def open_evaluation(run: Run, recipe, rows, generation) -> Evaluation:
    """The evaluation of a run on these prompts with this decoding: the same values find the same folder.

    recipe: names the split and the seed of sampling. rows: a dataset with prompt_ids. generation: a GenerationConfig.
    """
    values = identity.of_evaluation(run, recipe.evaluation.split, rows, generation, recipe.seed)
    evaluation = Evaluation(run, identity.name(recipe.evaluation.split, values))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    config = {"run": run.name, "evaluation": evaluation.name, "created": now, "limit": recipe.evaluation.rows, **values}
    write_json(evaluation.folder / "evaluation.json", config)
    return evaluation


def evaluations(run: Run) -> list[Evaluation]:
    """The finished evaluations of a run, the newest last."""
    found = [Evaluation(run, path.parent.name) for path in (run.folder / "evaluations").glob("*/metrics.json")]
    return sorted(found, key=lambda evaluation: (evaluation.config["created"], evaluation.name))


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
