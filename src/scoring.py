"""ROUGE and BLEU of every row and of a whole split, with intervals and paired tests.

ROUGE comes from rouge-score and BLEU from sacrebleu, through the local `evaluate` modules in src/metrics.
A *system* is a list of predictions, one for each row of the evaluation split.
"""

import functools
import importlib.metadata
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

DRAWS = 1000  # bootstrap samples behind an interval, and random swaps behind a p-value
FEW = 10  # rows; fewer have no interval and no p-value
EXACT = 20  # rows; up to here, p-values of row means count all 2^n swaps
SMALL = 50  # rows; up to here, intervals are Student's t and not the bootstrap, which would be too short
COLUMNS = {  # column: what computes it, on which scale
    "ROUGE-1": "rouge-score, F1 0-1, no stemmer (MEDIQA-Chat's official setting)",
    "ROUGE-2": "as ROUGE-1; 0 for a one-word reference, even for a perfect answer",
    "ROUGE-L": "as ROUGE-1, longest common subsequence over the whole text",
    "ROUGE-1 stemmed": "rouge-score, F1 0-1, Porter stemmer (recipe 2 and the Hugging Face scripts)",
    "ROUGE-2 stemmed": "as ROUGE-1 stemmed",
    "ROUGE-L stemmed": "as ROUGE-1 stemmed",
    "ROUGE-Lsum stemmed": "rouge-score, F1 0-1, Porter stemmer, one sentence a line (the SAMSum literature's R-L)",
    "sacreBLEU": "sacrebleu corpus BLEU, 0-100",
    "BLEU (0-1)": "corpus BLEU without smoothing, 0-1, 13a tokens (evaluate's `bleu`, as recipe 1 prints it)",
}
METHODS = {  # how intervals and two-sided p-values are made, by the number of rows
    "interval, over 50 rows": f"percentile bootstrap over rows, {DRAWS} draws that all systems share, 95%",
    "interval, 10 to 50 rows": "Student's t over the rows and two more: 0 and 1 for a score, -0.5 and 0.5 for a "
    "difference; 95%, covers 95-100% on real rows; none for BLEU, none for rows that are all equal",
    "interval and p, under 10 rows": "none",
    "p, over 20 rows": f"approximate randomisation, {DRAWS} draws: the systems' answers to a row are swapped at random",
    "p, 10 to 20 rows": "exact: all 2^n swaps; for BLEU as over 20 rows",
}


@functools.cache
def metric(name: str):
    """Load the local `evaluate` module src/metrics/<name>.py. Needs no network."""
    import evaluate

    return evaluate.load(str(Path(__file__).parent / "metrics" / f"{name}.py"))


def score_rows(predictions: list[str], references: list[str]) -> dict[str, np.ndarray]:
    """Score every row: an array of n values for each ROUGE column, and "counts".

    "counts" is n x 10: BLEU's matches of 1- to 4-grams, their totals, and prediction and reference length in tokens.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: expected the same number, at least one."
        )
    rouge = metric("summary_rouge").compute(predictions=predictions, references=references)
    bleu = metric("summary_bleu").compute(predictions=predictions, references=references)
    return {column: np.array(values) for column, values in rouge.items()} | {"counts": np.array(bleu["counts"])}


def rouge_l(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Mean ROUGE-L (F1 0-1, no stemmer), for a training that keeps its best adapter by it."""
    return {"rougeL": float(score_rows(predictions, references)["ROUGE-L"].mean())}


def bleu(counts: np.ndarray, smooth: bool) -> float:
    """Corpus BLEU (0-100) from summed counts (10 values), with sacrebleu's default smoothing (exp) or without."""
    from sacrebleu.metrics import BLEU

    total, method = [int(count) for count in counts], "exp" if smooth else "none"
    return BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method=method).score


def corpus(rows: dict[str, np.ndarray], chosen=slice(None)) -> dict[str, float]:
    """Score the chosen rows together: the mean of the rows for ROUGE, the pooled counts for BLEU."""
    values = {column: float(rows[column][chosen].mean()) for column in rows if column != "counts"}
    if "counts" in rows:
        counts = rows["counts"][chosen].sum(0)
        values |= {"sacreBLEU": bleu(counts, True), "BLEU (0-1)": bleu(counts, False) / 100}
    return values


def resamples(n: int, seed: int) -> np.ndarray:
    """DRAWS x n row numbers drawn with replacement: the same for every system, so that differences are paired."""
    return np.random.default_rng(seed).integers(0, n, (DRAWS, n))


def distribution(rows: dict[str, np.ndarray], draws: np.ndarray) -> dict[str, np.ndarray]:
    """Every score of `corpus` on every draw: an array of DRAWS values for each column."""
    values = {column: rows[column][draws].mean(1) for column in rows if column != "counts"}
    if "counts" in rows:
        values |= _bleu_columns(rows["counts"][draws].sum(1))
    return values


def _bleu_columns(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Both BLEU columns for each of DRAWS x 10 summed counts."""
    plain = np.array([bleu(total, False) for total in counts])
    return {"sacreBLEU": np.array([bleu(total, True) for total in counts]), "BLEU (0-1)": plain / 100}


def _percentiles(drawn: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """The middle 95% of the drawn values of each column."""
    return {column: tuple(np.quantile(values, [0.025, 0.975]).tolist()) for column, values in drawn.items()}


def _student(rows: dict[str, np.ndarray], extra: tuple[float, float]) -> dict[str, tuple[float, float]]:
    """95% intervals for the means of 10 to 50 rows; no entry for other columns, fewer rows and rows that are all equal.

    Where many rows are 0 and few are 1 (one-word references), 10 rows seldom show both, and Student's t alone covers
    68-88%. Two `extra` rows, one scale apart, make up for that, as in the "plus four" interval of a proportion.
    """
    intervals = {}
    for column, values in rows.items():
        if column != "counts" and len(values) >= FEW and np.ptp(values) > 1e-9:
            more = np.append(values, extra)
            half = stats.t.ppf(0.975, len(more) - 1) * more.std(ddof=1) / np.sqrt(len(more))
            intervals[column] = (float(more.mean() - half), float(more.mean() + half))
    return intervals


def with_intervals(rows: dict[str, np.ndarray], chosen: np.ndarray, seed: int) -> dict[str, dict]:
    """Score the chosen rows with 95% intervals: {column: {"value", "low", "high"}}; METHODS says which kind.

    `low` and `high` are None where no interval holds.
    """
    part = {column: values[chosen] for column, values in rows.items()}
    if len(chosen) > SMALL:
        intervals = _percentiles(distribution(part, resamples(len(chosen), seed)))
    else:
        intervals = {column: (max(low, 0.0), min(high, 1.0)) for column, (low, high) in _student(part, (0, 1)).items()}
    scores = {}
    for column, value in corpus(part).items():
        low, high = intervals.get(column, (None, None))
        scores[column] = {"value": value, "low": low, "high": high}
    return scores


def paired_test(first: dict, second: dict, chosen: np.ndarray, seed: int) -> dict[str, dict]:
    """Second minus first on the chosen rows: {column: {"difference", "low", "high", "p"}}; METHODS says how.

    p is two-sided: the share of swaps whose difference is at least as large as the one observed.
    `low`, `high` and `p` are None where there are too few rows.
    """
    one, two = ({column: values[chosen] for column, values in rows.items()} for rows in (first, second))
    before, after = corpus(one), corpus(two)
    if len(chosen) > SMALL:
        draws = resamples(len(chosen), seed)
        base, other = distribution(one, draws), distribution(two, draws)
        intervals = _percentiles({column: other[column] - base[column] for column in before})
    else:
        intervals = _student({column: two[column] - one[column] for column in one}, (-0.5, 0.5))
    differences = {column: after[column] - before[column] for column in before}
    p_values = _swap_test(one, two, differences, seed) if len(chosen) >= FEW else {}
    tests = {}
    for column, difference in differences.items():
        low, high = intervals.get(column, (None, None))
        tests[column] = {"difference": difference, "low": low, "high": high, "p": p_values.get(column)}
    return tests


def _swap_test(one: dict, two: dict, observed: dict[str, float], seed: int) -> dict[str, float]:
    """Two-sided p-values: how often a difference as large as `observed` comes from swapping the systems within rows."""
    columns = [column for column in one if column != "counts"]
    rows = np.stack([two[column] - one[column] for column in columns], axis=1)  # n x columns
    n = len(rows)
    swapped = np.random.default_rng(seed).integers(0, 2, (DRAWS, n))
    drawn = dict(zip(columns, ((1 - 2 * swapped) @ rows / n).T, strict=True))
    if "counts" in one:
        moved = swapped @ (two["counts"] - one["counts"])  # DRAWS x 10
        base, other = (_bleu_columns(c) for c in (one["counts"].sum(0) + moved, two["counts"].sum(0) - moved))
        drawn |= {column: other[column] - base[column] for column in base}
    tolerance = {column: abs(value) * (1 - 1e-9) for column, value in observed.items()}
    p = {c: (int((np.abs(values) >= tolerance[c]).sum()) + 1) / (DRAWS + 1) for c, values in drawn.items()}
    if n <= EXACT:
        sums = rows[:1]  # one sign of the first row is enough: the other half of the swaps mirrors this one
        for row in rows[1:]:
            sums = np.concatenate([sums + row, sums - row])
        p |= {c: float((np.abs(sums[:, i] / n) >= tolerance[c]).mean()) for i, c in enumerate(columns)}
    return p


def evaluate(records: list[dict], systems: dict[str, list[str]], unclean: set[str], seed: int) -> dict:
    """Score every system on all rows, on the clean rows (whose id is not in `unclean`) and by section.

    Returns {"n", "n_clean", "systems": {name: {"all", "clean", "sections"}}, "paired", "per_row", "settings"}.
    "clean" is None if no row or every row is unclean. "paired" and "per_row" hold base and finetuned, where given.
    """
    references = [record["summary"] for record in records]
    _warn_of_other_alphabets(references)
    clean = np.array([i for i, record in enumerate(records) if record["id"] not in unclean], dtype=int)
    parts = {"all": np.arange(len(records))} | ({"clean": clean} if 0 < len(clean) < len(records) else {})
    sections = defaultdict(list)
    for i, record in enumerate(records):
        if record["section"]:
            sections[record["section"]].append(i)
    rows, scores = {}, {}
    for name, predictions in systems.items():
        rows[name] = score_rows(predictions, references)
        means = {column: rows[name][column] for column in ("ROUGE-1", "ROUGE-L")}
        scores[name] = {"clean": None} | {part: with_intervals(rows[name], i, seed) for part, i in parts.items()}
        scores[name]["sections"] = {
            section: {"n": len(chosen)} | with_intervals(means, np.array(chosen), seed)
            for section, chosen in sorted(sections.items(), key=lambda item: -len(item[1]))
        }
    pair = [rows[name] for name in ("base", "finetuned") if name in rows]
    tests = {part: paired_test(*pair, chosen, seed) for part, chosen in parts.items()} if len(pair) == 2 else None
    return {
        "n": len(records),
        "n_clean": len(clean),
        "systems": scores,
        "paired": {"finetuned minus base": tests} if tests else {},
        "per_row": {
            name: {column: rows[name][column].round(6).tolist() for column in ("ROUGE-1", "ROUGE-L")}
            for name in ("base", "finetuned")
            if name in rows
        },
        "settings": settings(seed),
    }


def _warn_of_other_alphabets(references: list[str]):
    letters = re.findall(r"[^\W\d_]", " ".join(references).lower())
    other = sum(not letter.isascii() for letter in letters) / max(1, len(letters))
    if other > 0.02:
        print(
            f"Warning: {other:.0%} of the references' letters are outside of a-z. rouge-score drops them, so ROUGE "
            "says little here; see BLEU."
        )


def settings(seed: int) -> dict:
    """The scorer, version and signature behind every column, and how intervals and p-values are made."""
    signature = metric("summary_bleu").compute(predictions=["a"], references=["a"])["signature"]
    versions = {name: importlib.metadata.version(name) for name in ("rouge-score", "sacrebleu", "evaluate", "scipy")}
    return {
        "columns": COLUMNS,
        "sacrebleu signature": signature,
        "versions": versions,
        "methods": METHODS,
        "draws": DRAWS,
        "seed": seed,
    }
