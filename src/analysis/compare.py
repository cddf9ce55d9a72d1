"""Runs of a dataset side by side: what was changed from one to the other, and what that did to the scores."""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd

from src import recipes, runs, scoring
from src.analysis.tables import cells, digits, interval, p_value

MAIN = ("ROUGE-1", "ROUGE-L", "sacreBLEU", "chrF")
DIFFERENCE = "ROUGE-L difference"


@dataclass(frozen=True)
class Compared:
    """One evaluation of one run among others."""

    evaluation: runs.Evaluation
    changed: dict[str, str]  # the fields in which those that are compared differ: {"lora.r": "8"}
    difference: dict | None  # of ROUGE-L to the chosen run's: {"difference", "low", "high", "p"}; None: other rows

    @property
    def label(self) -> str:
        """The run's name and what it changed, for a figure."""
        changed = ", ".join(f"{field.rpartition('.')[2]} {value or '-'}" for field, value in self.changed.items())
        return self.evaluation.run.name + (f"\n{changed}" if changed else "")


def find(current, names=(), against: str | None = None) -> list[Compared]:
    """All evaluations of the runs of that names, or of all finished runs of the dataset of `current`; oldest first.

    current: the evaluation that is looked at; its run is always among them. against: the run whose answers to the same
    rows the others' differences are taken to; None: the run of `current`. Raises runs.RunError for an unknown name.
    """
    dataset = current.metrics["dataset"]
    known = {run.name: run for run in runs.finished() if run.config["recipe"]["data"]["dataset"] == dataset}
    for name in (*names, *([against] if against else [])):
        if name not in known:
            raise runs.RunError(f"No finished run of {dataset} is named {name!r}. Found: {', '.join(known) or 'none'}.")
    wanted = {*names, against, current.run.name} if names else set(known)
    found = [one for run in known.values() if run.name in wanted for one in runs.evaluations(run)]
    found.sort(key=lambda one: one.config["created"])
    settings = [
        _trained(one.run.config) | {f"generation.{key}": value for key, value in one.config["generation"].items()}
        for one in found
    ]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    differing = [key for key in keys if len({json.dumps(setting.get(key)) for setting in settings}) > 1]
    zero = current
    if against not in (None, current.run.name):
        same = [one for one in found if one.run.name == against and _rows(one) == _rows(current)]
        if not same:
            raise runs.RunError(f"Run {against} was not scored on the rows of {current.name}: run 03 for it first.")
        zero = same[-1]
    rows = _rows(zero)
    return [
        Compared(
            evaluation,
            {key: _shown(setting.get(key)) for key in differing},
            _difference(zero, evaluation) if evaluation != zero and _rows(evaluation) == rows else None,
        )
        for evaluation, setting in zip(found, settings, strict=True)
    ]


def _rows(evaluation) -> list[tuple]:
    return [(row["id"], row["reference"]) for row in evaluation.predictions["finetuned"]]


def _difference(zero, evaluation) -> dict:
    first, second = ({"ROUGE-L": np.array(e.metrics["per_row"]["finetuned"]["ROUGE-L"])} for e in (zero, evaluation))
    chosen, seed = np.arange(len(first["ROUGE-L"])), zero.run.config["recipe"]["seed"]
    return scoring.paired_test(first, second, chosen, seed)["ROUGE-L"]


def table(compared: list[Compared], current) -> pd.DataFrame:
    """One row an evaluation, `current` marked: changed fields, steps, minutes, losses, fine-tuned scores, difference.

    Then a row for each setting that was trained with several seeds: mean, 95% interval and standard deviation (SD).
    """
    whole = pd.DataFrame([_row(one, one.evaluation == current) for one in compared]).set_index("run").fillna("")
    means = [_over_seeds(group, whole) for group in _settings(compared) if len(group) > 1]
    return pd.concat([whole, *means]).fillna("") if means else whole


def _row(one: Compared, current: bool) -> dict:
    evaluation, metrics = one.evaluation, one.evaluation.metrics
    run, about = evaluation.run, evaluation.config
    losses = [row["eval_loss"] for row in run.log if "eval_loss" in row]
    tuned, base = (metrics["systems"][name]["all"] for name in ("finetuned", "base"))
    gain = one.difference
    return {
        "run": run.name,
        "evaluation": evaluation.name + (" (this one)" if current else ""),
        "date": about["created"][:16].replace("T", " "),
        "split": metrics["split"],
        "n": metrics["n"],
        **one.changed,
        "steps": run.manifest["steps"],
        "minutes": f"{run.manifest['train_seconds'] / 60:.1f}",
        "best validation loss": f"{min(losses):.3f}" if losses else "",
        "base ROUGE-L": interval(base["ROUGE-L"], 3),
        **cells(tuned, MAIN),
        **({DIFFERENCE: interval({"value": gain["difference"], **gain}, 3), "p": p_value(gain["p"])} if gain else {}),
    }


def about_seeds(compared: list[Compared], current) -> str:
    """A sentence on how many seeds, among those compared, stand behind an evaluation."""
    group = next((group for group in _settings(compared) if any(one.evaluation == current for one in group)), [])
    seeds = [one.evaluation.run.config["recipe"]["seed"] for one in group]
    if len(seeds) < 2:
        return "one seed: no evidence about the setting. Train it with other seeds, e.g. OVERRIDES = {'seed': 1}."
    return f"seeds {', '.join(map(str, seeds))}: the last rows are their means, with intervals over rows and seeds."


def _settings(compared: list[Compared]) -> list[list[Compared]]:
    """Those with one setting and one way of scoring, whatever the seed: each run's newest, one run a seed."""
    groups = {}
    for one in sorted(compared, key=lambda one: (one.evaluation.run.opened, one.evaluation.opened)):
        config, about = one.evaluation.run.config, one.evaluation.config
        setting = {key: value for key, value in _trained(config).items() if not key.endswith("seed")}
        setting |= {"base": config["identity"].get("base"), "recipe": config["recipe"]["name"]}
        scored = {key: about.get(key) for key in ("split", "rows", "prompts", "generation")}
        key = json.dumps([setting, scored], sort_keys=True, default=str)
        groups.setdefault(key, {})[config["recipe"]["seed"]] = one
    return [list(group.values()) for group in groups.values()]


def _over_seeds(group: list[Compared], whole: pd.DataFrame) -> pd.DataFrame:
    """One row under `table`: the setting's fields, and the fine-tuned scores over its seeds, scored again."""
    scored = []
    for one in group:
        answers = one.evaluation.predictions["finetuned"]
        scored.append(scoring.score_rows([a["prediction"] for a in answers], [a["reference"] for a in answers]))
    seeds = [one.evaluation.run.config["recipe"]["seed"] for one in group]
    found = scoring.over_seeds(scored, seeds[0])
    names = {(one.evaluation.run.name, one.evaluation.name) for one in group}
    rows = whole[[(run, name.split(" ")[0]) in names for run, name in whole["evaluation"].items()]]
    row = {column: rows[column].iloc[0] if rows[column].nunique() == 1 else "" for column in whole} | {"evaluation": ""}
    row |= {c: f"{interval(found[c], digits(c))}, SD {found[c]['sd']:.{digits(c)}f}" for c in MAIN}
    row |= {column: "" for column in (DIFFERENCE, "p") if column in row}
    return pd.DataFrame([row], index=pd.Index([f"mean of seeds {', '.join(map(str, seeds))}"], name="run"))


def _trained(config: dict) -> dict:
    """What was trained, as {dotted name: value}: the recipe's fields, and what only a cell's objects can change."""
    recipe, other = config["recipe"], ("evaluation", "generation", "engine", "device")
    fields = {key: value for key, value in recipes.flat(recipe).items() if key.partition(".")[0] not in other}
    for section in ("lora", "training"):
        fields |= {
            f"{section}.{key}": value
            for key, value in config["identity"][section].items()
            if key not in recipe and key not in recipe[section]
        }
    return fields


def _shown(value) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
