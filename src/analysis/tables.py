"""Tables of one evaluation, from its metrics.json."""

import re
from decimal import Decimal
from pathlib import Path

import pandas as pd

from src import runs, scoring
from src.analysis.marks import visible

LABELS = {"base": "base", "finetuned": "fine-tuned", "reference": "(the references)"}  # in files: for readers
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


def cells(scores: dict, columns=None) -> dict[str, str]:
    return {c: interval(score, digits(c)) for c, score in scores.items() if columns is None or c in columns}


def results(metrics: dict, columns=None, clean: bool = False) -> pd.DataFrame:
    """One row a system: n, and value with 95% interval of every column. `clean`: of rows that were not trained on."""
    rows = {}
    for name, system in metrics["systems"].items():
        scores = system["clean"] if clean and metrics["n_clean"] < metrics["n"] else system["all"]
        n = metrics["n_clean"] if clean else metrics["n"]
        rows[LABELS.get(name, name)] = {"n": n} | cells(scores or {}, columns)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("system")


def published(dataset: str) -> pd.DataFrame:
    """Published numbers for a dataset, each in the column of its own scorer. No rows for the demo and own data."""
    table = pd.read_csv(PUBLISHED, dtype=str, keep_default_na=False).set_index("system")
    table = table[table["dataset"] == dataset].drop(columns=["dataset", "source"])
    table = table.loc[:, (table != "").any()]
    scores = [column for column in table if column.startswith(("ROUGE", *scoring.COLUMNS))]
    table[scores] = table[scores].map(lambda value: f"{Decimal(value):.3f}" if value else "")
    return table


def others(scores: dict, columns=None) -> pd.DataFrame:
    """Other systems' and people's summaries, scored here, each on its own rows. `scores`: metrics["others"]."""
    rows = {
        name: {"split": other["split"], "n": other["n"]} | cells(other["all"], columns)
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
    order = ["reference", *(name for name in metrics["text"] if name != "reference")]
    table = pd.DataFrame.from_dict({LABELS.get(n, n): metrics["text"][n] for n in order}, orient="index")
    for column in table:
        shown = "{:.2f}" if "words" in column else "{:.0%}"
        table[column] = table[column].map(shown.format, na_action="ignore")  # not every system was generated
    return table.fillna("").rename_axis("system")


def sections(metrics: dict, column: str = "ROUGE-L") -> pd.DataFrame:
    """One row a section: n, and the column's value for base and fine-tuned, with an interval from ten rows on."""
    base, tuned = (metrics["systems"][name]["sections"] for name in ("base", "finetuned"))
    rows = {
        name: {"n": found["n"], "base": interval(found[column], 3), "fine-tuned": interval(tuned[name][column], 3)}
        for name, found in base.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("section")


def samples(log: list[dict]) -> pd.DataFrame:
    """The answers to validation dialogues at each evaluation, a column a step; a tick where one is the reference.

    log: the rows of train_log.jsonl.
    """
    rows = {}
    for row in (row for row in log if "sample" in row):
        right = row["sample"].split() == row["reference"].split()
        answers = rows.setdefault(row["id"], {"reference": row["reference"]})
        answers[f"step {row['step']}"] = f"{row['sample']} ✓" if right else row["sample"]
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("dialogue").map(visible).fillna("")


def readable(table: pd.DataFrame):
    """A table of texts for a notebook: to the left, with their line ends, and HTML shown as it is written, not run."""
    shown = table.style.format(escape="html")
    for axis in (0, 1):
        shown = shown.format_index(escape="html", axis=axis)
    return shown.set_properties(**{"text-align": "left", "white-space": "pre-wrap"})


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
