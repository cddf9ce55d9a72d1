"""A rating sheet: answers of two systems, blinded and shuffled, for a reader to mark against their dialogues.

ROUGE rewards shared words, so it does not see who did what, nor what was made up. A reader does: `draw` rows, `write`
the sheet, fill it in a spreadsheet, `read` it back, and `summary` compares the systems on the same rows.
"""

import csv
import hashlib
import io
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from src import runs, scoring
from src.analysis.tables import LABELS, p_value

MEANING = {  # column that a reader marks: what a yes means
    "faithful": "nothing in it is contradicted or unsupported by the dialogue",
    "wrong speaker": "something said or done is given to the wrong person",
    "invented": "it says something that the dialogue does not say",
    "omission": "a main point of the dialogue is missing",
}
HOW = {  # the line under the header: says in every column what belongs there
    "sheet id": "how to fill",
    "dialogue": "Judge each summary by its own dialogue. Lines may be sorted and columns added; change no text.",
    "section": "the note section that was asked for, where there is one: what it does not ask for is no omission",
    "summary": "Yes is 1, x or yes; no is 0, no or empty. A line whose `faithful` is empty is not rated yet.",
    **MEANING,
    "reader": "who reads, once in the column, e.g. A. Reader (person) or the name of a model (model)",
}
MARKS = {"1": True, "x": True, "yes": True, "0": False, "no": False, "": False}
FORMULA = "=+-@\t\r\n'＝＋－＠"  # a cell that begins so runs in a spreadsheet, or is written as one that would


class SheetError(ValueError):
    """A filled sheet that cannot be counted. The message names the file, the line and the column."""


def draw(of: str, predictions: dict[str, list[dict]], n: int = 30, seed: int = 42) -> tuple[list[dict], dict]:
    """The sheet, one line an answer in random order, and its key: which line is which row of which system.

    of: what is rated, "<run>/<evaluation>". predictions: {system: rows with id, dialogue and prediction}, two systems,
    the same rows (as `Evaluation.predictions`). n rows are drawn, all where there are fewer.
    """
    first, second = predictions.values()
    if n < 1 or [row["id"] for row in first] != [row["id"] for row in second]:
        raise ValueError(f"n is {n}, rows are {len(first)} and {len(second)}: expected n from 1 and the same rows.")
    rng = random.Random(seed)
    chosen = rng.sample(range(len(first)), min(n, len(first)))
    lines = [(system, rows[i]) for system, rows in predictions.items() for i in chosen]
    rng.shuffle(lines)
    digest = _digest(of, seed, *(f"{system} {row['id']} {row['prediction']}" for system, row in lines))[:6]
    sheet, key = [], {"of": of, "sheet": f"q{digest}", "seed": seed, "systems": list(predictions), "lines": {}}
    for number, (system, row) in enumerate(lines, 1):
        name = f"q{digest}-{number:03d}"  # no spreadsheet takes it for a number or a date
        texts = {"dialogue": row["dialogue"], "summary": row["prediction"]}
        asked = {"section": row.get("section", "")}
        sheet.append({"sheet id": name} | texts | asked | dict.fromkeys([*MEANING, "reader"], ""))
        key["lines"][name] = {"row": row["id"], "system": system} | {c: _digest(text) for c, text in texts.items()}
    return sheet, key


def _digest(*texts) -> str:
    """16 hex digits of the texts, whatever a spreadsheet does to line ends, other white space and apostrophes."""
    plain = [re.sub(r"\s+", " ", str(text)).lstrip("' ").rstrip() for text in texts]
    return hashlib.sha256("\n".join(plain).encode()).hexdigest()[:16]


def write(folder: Path, sheet: list[dict], key: dict) -> Path:
    """Write folder/sheet-<id>.csv and key-<id>.json; return the sheet. One that is there, filled maybe, stays."""
    path = folder / f"sheet-{key['sheet']}.csv"
    table = pd.DataFrame([HOW, *sheet], columns=list(HOW))
    table = table.map(lambda cell: f"'{cell}" if cell.startswith(tuple(FORMULA)) else cell)
    if not path.exists():
        text = table.to_csv(index=False, lineterminator="\n")
        runs.write_atomic(path, f"\ufeff{text}")  # the mark that makes Excel read UTF-8
    runs.write_json(folder / f"key-{key['sheet']}.json", key)
    return path


def filled(folder: Path, key: dict) -> list[list[dict]]:
    """What `read` makes of every sheet-<id>*.csv that has ratings: the sheet itself, and copies of other readers."""
    found = [read(path, key) for path in sorted(folder.glob(f"sheet-{key['sheet']}*.csv"))]
    return [ratings for ratings in found if any(line["faithful"] is not None for line in ratings)]


def read(path: Path, key: dict) -> list[dict]:
    """The ratings of a sheet, the first system's before the second's: [{"row", "system", "reader", "summary"} and a
    True, False or None (not rated) for each column of MEANING].

    Raises SheetError for a sheet of another evaluation, missing or changed lines, unknown marks, ratings that
    contradict themselves, and ratings without a reader.
    """
    lines = _lines(path, key)
    names = {line["reader"].strip() for line in lines.values()} - {""}
    ratings = []
    for name, about in sorted(key["lines"].items(), key=lambda item: key["systems"].index(item[1]["system"])):
        line, where, marks = lines[name], f"{path.name}, line {name}", {}
        for column in ("dialogue", "summary"):
            if _digest(line[column]) != about[column]:
                raise SheetError(
                    f"{where}, column {column}: the text was changed, found {line[column][:60]!r}. Copy it from the "
                    "sheet as it was written."
                )
        for column in MEANING:
            marks[column] = MARKS.get(line[column].strip().lower())
            if marks[column] is None:
                found = f"{where}, column {column}: found {line[column]!r}"
                raise SheetError(f"{found}, expected 1, x or yes; 0, no or nothing.")
        rated, yes = bool(line["faithful"].strip()), [column for column in MEANING if marks[column]]
        if yes and not rated:
            raise SheetError(f"{where}: {yes[0]} is marked, faithful is empty: expected 1 or 0.")
        wrong = [column for column in ("wrong speaker", "invented") if {"faithful", column} <= set(yes)]
        if wrong:
            raise SheetError(f"{where}: faithful and {wrong[0]} are both marked: expected one of them.")
        if rated and len(names) != 1:
            raise SheetError(
                f"{path.name}, column reader: found {', '.join(sorted(names)) or 'nothing'}, expected one name, of a "
                "person or a model. Two readers fill two copies of the sheet."
            )
        summary = re.sub(f"^'(?=[{re.escape(FORMULA)}])", "", line["summary"])
        of = {"row": about["row"], "system": about["system"], "reader": next(iter(names), ""), "summary": summary}
        ratings.append(of | (marks if rated else dict.fromkeys(MEANING)))
    return ratings


def _lines(path: Path, key: dict) -> dict[str, dict]:
    """{sheet id: line} of a sheet saved with commas, semicolons or tabs; exactly the lines of the key."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SheetError(f"{path.name} is not UTF-8: save it as CSV UTF-8.") from None
    header = text.partition("\n")[0]
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), restval="")
    missing = [column for column in HOW if column not in (table.fieldnames or [])]
    if missing:
        raise SheetError(f"{path.name}: column {missing[0]} is missing, found {table.fieldnames}.")
    lines = [line for line in table if line["sheet id"].strip() not in ("", HOW["sheet id"])]
    names = [line["sheet id"].strip() for line in lines]
    twice = [name for name, n in Counter(names).items() if n > 1]
    strange = [name for name in names if name not in key["lines"]]
    lacking = [name for name in key["lines"] if name not in names]
    if twice:
        raise SheetError(f"{path.name}, line {twice[0]} is there twice.")
    if strange:
        raise SheetError(
            f"{path.name}, line {strange[0]} is of another sheet: expected {key['sheet']}-..., drawn from {key['of']}."
        )
    if lacking:
        raise SheetError(f"{path.name}, line {lacking[0]} is missing, {len(lacking)} of {len(key['lines'])} in all.")
    return dict(zip(names, lines, strict=True))


def share(count: int, n: int) -> str:
    """`40% [25, 58] of 30`: a share of n with Wilson's 95% interval; without one where n is under scoring.FEW."""
    if n == 0:
        return "not rated"
    if n < scoring.FEW:
        return f"{count / n:.0%} of {n}"
    low, high = stats.binomtest(count, n).proportion_ci(method="wilson")
    return f"{count / n:.0%} [{100 * low:.0f}, {100 * high:.0f}] of {n}"


def summary(ratings: list[dict]) -> pd.DataFrame:
    """One row a column of the sheet: who read, each system's share of rated answers, the second minus the first.

    The difference is of the rows whose two answers are rated, n pairs, in percentage points, with the 95% interval of
    Agresti and Min (2005) and p by McNemar's exact test; neither for fewer than scoring.FEW pairs.
    """
    rated = [line for line in ratings if line["faithful"] is not None]
    answers = {line["system"]: {} for line in ratings}
    for line in rated:
        answers[line["system"]][line["row"]] = line
    first, second = answers.values()
    both = [(first[row], second[row]) for row in first if row in second]
    reader, table = next((line["reader"] for line in rated), "nobody"), {}
    for column in MEANING:
        shares = {
            LABELS.get(system, system): share(sum(a[column] for a in lines.values()), len(lines))
            for system, lines in answers.items()
        }
        lost, won = sum(a[column] > b[column] for a, b in both), sum(a[column] < b[column] for a, b in both)
        tested = {"pairs": len(both), "difference": _difference(lost, won, len(both))}
        p = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
        table[column] = {"reader": reader} | shares | tested | {"p": p_value(p if len(both) >= scoring.FEW else None)}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("what was read")


def _difference(lost: int, won: int, n: int) -> str:
    """Percentage points: `won` pairs have the mark in the second system alone, `lost` in the first alone."""
    if n < scoring.FEW:
        return f"{round(100 * (won - lost) / n):+d}" if n else ""
    more, middle = n + 2, (won - lost) / (n + 2)  # two pairs more, half a pair in each cell
    half = stats.norm.ppf(0.975) * ((won + lost + 1) / more - middle**2) ** 0.5 / more**0.5
    low, high = max(middle - half, -1), min(middle + half, 1)
    return f"{round(100 * (won - lost) / n):+d} [{round(100 * low):+d}, {round(100 * high):+d}]"


def kappa(first: list[dict], second: list[dict]) -> pd.DataFrame:
    """Cohen's kappa of two readers for each column, over the answers that both rated; none where both say one thing."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if None not in (a["faithful"], b["faithful"])]
    n, table = len(pairs), {}
    for column in MEANING:
        marks = np.array([(a[column], b[column]) for a, b in pairs], dtype=float).reshape(-1, 2)
        agreed, yes = sum(marks[:, 0] == marks[:, 1]) / max(1, n), marks.sum(axis=0) / max(1, n)
        chance = yes.prod() + (1 - yes).prod()
        value = "" if n < scoring.FEW or chance == 1 else f"{(agreed - chance) / (1 - chance):.2f}"
        table[column] = {"n": n, "agreed": f"{agreed:.0%}", "kappa": value}
    readers = [next((line["reader"] for line in lines if line["reader"]), "nobody") for lines in (first, second)]
    return pd.DataFrame.from_dict(table, orient="index").rename_axis(" and ".join(readers))
