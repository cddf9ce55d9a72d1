"""Tables of one evaluation (from its metrics.json), of all evaluations of a run, and of all runs of a dataset."""

import json
import re
from decimal import Decimal
from pathlib import Path

import pandas as pd

from src import runs, scoring

LABELS = {
    "base": "base",
    "finetuned": "fine-tuned",
    "reference": "(the references)",
}  # as files name them: as readers do
MAIN = ("ROUGE-1", "ROUGE-L", "sacreBLEU", "chrF")  # the columns of tables that compare runs
PUBLISHED = Path(__file__).resolve().parents[2] / "data" / "published_scores.csv"
PLAIN = re.compile(r"[-+]?[\d.]+%?( \[[-+]?[\d.]+, [-+]?[\d.]+\])?")  # a number, with or without its interval


def interval(score: dict, decimals: int) -> str:
    """A score {"value", "low", "high"} as `value [low, high]`; the value alone where there is no interval."""
    value, low, high = (score[key] for key in ("value", "low", "high"))
    text = f"{value:.{decimals}f}"
    return text if low is None else f"{text} [{low:.{decimals}f}, {high:.{decimals}f}]"


def p_value(p: float | None) -> str:
    """p as text; "<0.001" is as small as the draws can show."""
    if p is None:
        return "too few rows"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def digits(column: str) -> int:
    """Decimals that a column is shown with."""
    return 1 if column in ("sacreBLEU", "chrF") else 3


def _cells(scores: dict, columns=None) -> dict[str, str]:
    return {c: interval(score, digits(c)) for c, score in scores.items() if columns is None or c in columns}


def results(metrics: dict, columns=None, clean: bool = False) -> pd.DataFrame:
    """One row a system: n, and value with 95% interval of every column. `clean`: of rows that were not trained on."""
    rows = {}
    for name, system in metrics["systems"].items():
        scores = system["clean"] if clean and metrics["n_clean"] < metrics["n"] else system["all"]
        n = metrics["n_clean"] if clean else metrics["n"]
        rows[LABELS.get(name, name)] = {"n": n} | _cells(scores or {}, columns)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("system")


def published(dataset: str) -> pd.DataFrame:
    """Published numbers for a dataset, each in the column of its own scorer. No rows for the demo and own data."""
    table = pd.read_csv(PUBLISHED, dtype=str, keep_default_na=False).set_index("system")
    table = table[table["dataset"] == dataset].drop(columns=["dataset", "source"])
    table = table.loc[:, [bool((table[column] != "").any()) for column in table]]
    scores = [column for column in table if column.startswith(("ROUGE", *scoring.COLUMNS))]
    table[scores] = table[scores].map(lambda value: f"{Decimal(value):.3f}" if value else "")
    return table


def others(scores: dict, columns=None) -> pd.DataFrame:
    """Other systems' and people's summaries, scored here, each on its own rows. `scores`: metrics["others"]."""
    rows = {
        name: {"split": other["split"], "n": other["n"]} | _cells(other["all"], columns)
        for name, other in scores.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("system")


def paired(metrics: dict) -> pd.DataFrame:
    """Fine-tuned minus base on all rows, and on the clean ones where some are not: difference, 95% interval and p."""
    rows = {}
    for subset, tests in metrics["paired"]["finetuned minus base"].items():
        for column, test in tests.items():
            difference = interval({"value": test["difference"], **test}, digits(column))
            rows[subset, column] = {"difference": difference, "p": p_value(test["p"])}
    return pd.DataFrame(rows.values(), index=pd.MultiIndex.from_tuples(rows, names=["rows", "column"]))


def text(metrics: dict) -> pd.DataFrame:
    """Lengths in words, novelty, unsupported numbers and how answers ended, one row a system; shares as percentages."""

    def cell(name: str, value: float | None) -> str:
        if value is None or value != value:  # not every system was generated
            return ""
        return f"{value:.0%}" if "words" not in name else f"{value:.2f}"

    order = ["reference", *(name for name in metrics["text"] if name != "reference")]
    table = pd.DataFrame.from_dict({LABELS.get(n, n): metrics["text"][n] for n in order}, orient="index")
    return table.apply(lambda values: values.map(lambda value: cell(values.name, value))).rename_axis("system")


def sections(metrics: dict, column: str = "ROUGE-L") -> pd.DataFrame:
    """One row a section: n, and the column's value for base and fine-tuned, with an interval from ten rows on."""
    base, tuned = (metrics["systems"][name]["sections"] for name in ("base", "finetuned"))
    rows = {
        section: {"n": base[section]["n"]}
        | {
            LABELS[name]: interval(scores[section][column], 3)
            for name, scores in (("base", base), ("finetuned", tuned))
        }
        for section in base
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("section")


def runs_table(dataset: str, current=None) -> pd.DataFrame:
    """One row for every evaluation of every finished run of a dataset, oldest first; the `current` one is marked.

    The columns: the settings in which the rows differ, steps, minutes, validation loss, and the fine-tuned scores.
    Then a row for each setting that was trained with several seeds: mean, 95% interval and standard deviation (SD).
    """
    found = [run for run in runs.finished() if run.config["recipe"]["data"]["dataset"] == dataset]
    table = _evaluations(found, current).set_index("run")
    means = [_over_seeds(group, table) for group in _settings(found) if len(group) > 1]
    return pd.concat([table, *means]).fillna("") if means else table


def about_seeds(current) -> str:
    """A sentence on how many seeds stand behind an evaluation."""
    found = runs.finished(current.run.config["recipe"]["name"])
    group = next((group for group in _settings(found) if (current.run, current) in group), [])
    seeds = [run.config["recipe"]["seed"] for run, _ in group]
    if len(seeds) < 2:
        return "one seed: no evidence about the setting. Train it with other seeds, e.g. OVERRIDES = {'seed': 1}."
    return f"seeds {', '.join(map(str, seeds))}: the last rows are their means, with intervals over rows and seeds."


def _settings(found: list) -> list[list[tuple]]:
    """[(run, its newest evaluation), ...] for each setting and way of scoring, whatever the seed; one run a seed."""
    groups = {}
    for run in found:
        setting = {key: value for key, value in _trained(run.config).items() if not key.endswith("seed")}
        setting["base"] = run.config["identity"].get("base")
        for evaluation in runs.evaluations(run):
            about = evaluation.config
            scored = {key: about.get(key) for key in ("split", "rows", "prompts", "generation")}
            key = json.dumps([setting, scored], sort_keys=True, default=str)
            groups.setdefault(key, {})[run.config["recipe"]["seed"]] = (run, evaluation)
    return [list(group.values()) for group in groups.values()]


def _over_seeds(group: list[tuple], table: pd.DataFrame) -> pd.DataFrame:
    """One row under `runs_table`: the setting's fields, and the fine-tuned scores over its seeds, scored again."""
    scored = []
    for _, evaluation in group:
        answers = evaluation.predictions["finetuned"]
        scored.append(scoring.score_rows([a["prediction"] for a in answers], [a["reference"] for a in answers]))
    found = scoring.over_seeds(scored, group[0][0].config["recipe"]["seed"])
    seeds = [run.config["recipe"]["seed"] for run, _ in group]
    names = {(run.name, evaluation.name) for run, evaluation in group}
    rows = table[[(run, name.split(" ")[0]) in names for run, name in table["evaluation"].items()]]
    row = {column: rows[column].iloc[0] if rows[column].nunique() == 1 else "" for column in table} | {"evaluation": ""}
    row |= {c: f"{interval(found[c], digits(c))}, SD {found[c]['sd']:.{digits(c)}f}" for c in MAIN}
    return pd.DataFrame([row], index=pd.Index([f"mean of seeds {', '.join(map(str, seeds))}"], name="run"))


def _evaluations(found: list, current) -> pd.DataFrame:
    rows, settings = [], []
    for run in found:
        config, manifest = run.config, run.manifest
        losses = [row["eval_loss"] for row in run.log if "eval_loss" in row]
        for evaluation in runs.evaluations(run):
            metrics, about = evaluation.metrics, evaluation.config
            tuned, base = (metrics["systems"][name]["all"] for name in ("finetuned", "base"))
            settings.append(_trained(config) | {f"generation.{key}": v for key, v in about["generation"].items()})
            row = {
                "run": run.name,
                "evaluation": evaluation.name + (" (this one)" if evaluation == current else ""),
                "date": about["created"][:16].replace("T", " "),
                "split": metrics["split"],
                "n": metrics["n"],
                "steps": manifest["steps"],
                "minutes": f"{manifest['train_seconds'] / 60:.1f}",
                "best validation loss": f"{min(losses):.3f}" if losses else "",
                "base ROUGE-L": interval(base["ROUGE-L"], 3),
            }
            rows.append((about["created"], row | _cells(tuned, MAIN)))
    first = ["run", "evaluation", "date", "split", "n"]
    if not rows:
        return pd.DataFrame(columns=[*first, "steps", "minutes", "best validation loss", "base ROUGE-L", *MAIN])
    keys = dict.fromkeys(key for setting in settings for key in setting)
    differing = [key for key in keys if len({json.dumps(setting.get(key)) for setting in settings}) > 1]
    changed = pd.DataFrame([{key: _shown(setting.get(key)) for key in differing} for setting in settings])
    table = pd.DataFrame([row for _, row in rows])
    table = pd.concat([table[first], changed, table.drop(columns=first)], axis=1)
    order = sorted(range(len(rows)), key=lambda i: rows[i][0])
    return table.iloc[order]


def _trained(config: dict) -> dict:
    """What was trained, as {dotted name: value}: the recipe's fields, and what only a cell's objects can change."""
    recipe, fields = config["recipe"], {}
    for name, value in recipe.items():
        if isinstance(value, dict) and name not in ("evaluation", "generation", "engine"):
            fields |= {f"{name}.{key}": part for key, part in value.items()}
        elif not isinstance(value, dict) and name not in ("name", "device"):
            fields[name] = value
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


def save(folder: Path, name: str, table: pd.DataFrame) -> Path:
    """Write folder/<name>.csv. A text cell that a spreadsheet would run as a formula gets a leading apostrophe."""

    def safe(cell):
        is_formula = isinstance(cell, str) and cell[:1] in "=+-@\t\r" and cell and not PLAIN.fullmatch(cell)
        return f"'{cell}" if is_formula else cell

    whole = table.reset_index().map(safe).rename(columns=safe)
    return runs.write_atomic(folder / f"{name}.csv", whole.to_csv(index=False, lineterminator="\n"))


def print_summary(run, evaluation):
    """Print scores and paths: the last words of `make demo` and `make run`."""
    metrics = evaluation.metrics
    columns = ("ROUGE-1", "ROUGE-2", "ROUGE-L", "sacreBLEU", "chrF")
    rows = {
        LABELS.get(name, name): {c: f"{system['all'][c]['value']:.{digits(c)}f}" for c in columns}
        for name, system in metrics["systems"].items()
    }
    print(f"\n{run.name}, {metrics['split']}, n={metrics['n']}: ROUGE F1 0-1 unstemmed, sacreBLEU and chrF 0-100")
    print(pd.DataFrame.from_dict(rows, orient="index").to_string())
    if metrics["n"] < scoring.FEW:
        print(f"{metrics['n']} rows are too few to compare systems: expected at least {scoring.FEW}.")
    print(f"\nrun folder          {runs.relative(run.folder)}")
    print(f"executed notebooks  {runs.relative(run.folder / 'notebooks')}")
    print(f"side by side        {runs.relative(evaluation.comparison / 'side_by_side.html')}")
