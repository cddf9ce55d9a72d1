"""How sure a score is: from the scores of rows to those of a split, 95% intervals, paired tests and means over seeds.

*rows* is what `scoring.score_rows` returns: {column: one value a row}, and the pooled metrics' counts under "counts".
benchmarks/coverage.py measures how often these intervals hold the truth on real scores.
"""

import numpy as np
from scipy import stats

from src.metrics.pooled import pooled

DRAWS = 1000  # bootstrap samples behind an interval, and random swaps behind a p-value
FEW = 10  # rows; fewer have no interval and no p-value
EXACT = 20  # rows; up to here, p-values of row means count all 2^n swaps
SMALL = 50  # rows; up to here, intervals are Student's t and not the bootstrap, which would be too short
POOLED = 100  # rows; fewer have no interval for BLEU and chrF: every kind that was tried is too short
METHODS = {  # how intervals and two-sided p-values are made, by the number of rows
    "interval, over 50 rows": f"percentile bootstrap over rows, {DRAWS} draws that all systems share, 95%",
    "interval of BLEU and chrF, from 100 rows": "BCa bootstrap over the same draws (bias-corrected, accelerated)",
    "interval of BLEU and chrF, under 100 rows": "none",
    "interval, 10 to 50 rows": "Student's t over the rows and two more: 0 and 1 for a score, -0.5 and 0.5 for a "
    "difference; 95%; none for rows that are all equal",
    "interval and p, under 10 rows": "none",
    "interval over seeds": "half-widths squared and added: that over rows, of the mean over seeds, and Student's t "
    "over the seeds' scores",
    "p, over 20 rows": f"approximate randomisation, {DRAWS} draws: the systems' answers to a row are swapped at random",
    "p, 10 to 20 rows": "exact: all 2^n swaps; for BLEU and chrF as over 20 rows",
    "checked on real scores": "how often intervals hold the truth: benchmarks/README.md, at least 90% of the time",
}


def corpus(rows: dict[str, np.ndarray], chosen=slice(None)) -> dict[str, float]:
    """Score the chosen rows together: the mean of the rows for ROUGE, the pooled counts for BLEU and chrF."""
    values = {column: float(rows[column][chosen].mean()) for column in rows if column != "counts"}
    if "counts" in rows:
        values |= {column: float(v) for column, v in pooled(rows["counts"][chosen].sum(0)).items()}
    return values


def resamples(n: int, seed: int) -> np.ndarray:
    """DRAWS x n row numbers drawn with replacement: the same for every system, so that differences are paired."""
    return np.random.default_rng(seed).integers(0, n, (DRAWS, n))


def distribution(rows: dict[str, np.ndarray], draws: np.ndarray) -> dict[str, np.ndarray]:
    """Every score of `corpus` on every draw: an array of DRAWS values for each column."""
    n, columns = draws.shape[1], [column for column in rows if column != "counts"]
    flat = (draws + n * np.arange(len(draws))[:, None]).ravel()
    times = np.bincount(flat, minlength=draws.size).reshape(draws.shape).astype(float)  # each row is in each draw
    values = {column: times @ rows[column] / n for column in columns}
    return values | (pooled(times @ rows["counts"]) if "counts" in rows else {})


def _intervals(systems: list[dict], weights: list[float], seed: int, extra=(0, 1)) -> dict[str, tuple[float, float]]:
    """95% intervals over rows for each score's weighted sum over `systems`, which have the same rows; see METHODS.

    Weights are 1 for a system, -1 and 1 for a difference, 1/k for a mean. No entry for a column without an interval.
    extra: see `_student`.
    """

    def summed(scores: list[dict]) -> dict[str, np.ndarray]:
        return {c: sum(w * part[c] for w, part in zip(weights, scores, strict=True)) for c in scores[0]}

    n = len(next(iter(systems[0].values())))
    if n <= SMALL:
        return _student(summed([{c: v for c, v in rows.items() if c != "counts"} for rows in systems]), extra)
    draws = resamples(n, seed)
    drawn = summed([distribution(rows, draws) for rows in systems])
    intervals = {c: tuple(np.quantile(drawn[c], [0.025, 0.975]).tolist()) for c in systems[0] if c != "counts"}
    if n >= POOLED and "counts" in systems[0]:
        totals = [rows["counts"].sum(0) for rows in systems]
        values = summed([pooled(total) for total in totals])
        without = summed([pooled(total - rows["counts"]) for total, rows in zip(totals, systems, strict=True)])
        intervals |= {column: _bca(drawn[column], values[column], without[column]) for column in values}
    return intervals


def _bca(drawn: np.ndarray, value: float, without: np.ndarray) -> tuple[float, float]:
    """Efron's (1987) bias-corrected and accelerated 95% interval. without: the score without each row in turn."""
    left = without.mean() - without
    spread = (left**2).sum() ** 1.5
    acceleration = (left**3).sum() / (6 * spread) if spread > 0 else 0.0
    below = ((drawn < value).mean() + (drawn <= value).mean()) / 2
    bias = stats.norm.ppf(np.clip(below, 1 / DRAWS, 1 - 1 / DRAWS))
    z = bias + stats.norm.ppf([0.025, 0.975])
    low, high = np.quantile(drawn, stats.norm.cdf(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


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
    intervals = {column: _within(column, *bounds) for column, bounds in _intervals([part], [1], seed).items()}
    scores = {}
    for column, value in corpus(part).items():
        low, high = intervals.get(column, (None, None))
        scores[column] = {"value": value, "low": low, "high": high}
    return scores


def _within(column: str, low: float, high: float) -> tuple[float, float]:
    """The bounds, moved to the ends of the column's scale where they lie outside of it."""
    return max(low, 0.0), min(high, 100.0 if column in ("sacreBLEU", "chrF") else 1.0)


def over_seeds(rows: list[dict[str, np.ndarray]], seed: int) -> dict[str, dict]:
    """What a setting scores, whatever the seed: {column: {"value", "sd", "low", "high"}}.

    rows: `score_rows` of the same rows for each of two seeds or more. "value" is the mean over seeds, "sd" the standard
    deviation of their scores; the 95% interval covers both other rows and other seeds (METHODS says how).
    """
    sizes = [len(next(iter(scored.values()))) for scored in rows]
    if len(rows) < 2 or len(set(sizes)) > 1:
        raise ValueError(f"Seeds with {sizes} rows: expected the same rows for at least two seeds.")
    by_seed, found = [corpus(scored) for scored in rows], {}
    intervals = _intervals(rows, [1 / len(rows)] * len(rows), seed)
    for column in by_seed[0]:
        values = np.array([scores[column] for scores in by_seed])
        value, sd = float(values.mean()), float(values.std(ddof=1))
        found[column] = {"value": value, "sd": sd, "low": None, "high": None}
        if column in intervals:
            seeds = stats.t.ppf(0.975, len(rows) - 1) * sd / np.sqrt(len(rows))
            below, above = (float(np.hypot(bound - value, seeds)) for bound in intervals[column])
            found[column]["low"], found[column]["high"] = _within(column, value - below, value + above)
    return found


def paired_test(first: dict, second: dict, chosen: np.ndarray, seed: int) -> dict[str, dict]:
    """Second minus first on the chosen rows: {column: {"difference", "low", "high", "p"}}; METHODS says how.

    p is two-sided: the share of swaps whose difference is at least as large as the one observed.
    `low`, `high` and `p` are None where there are too few rows.
    """
    one, two = ({column: values[chosen] for column, values in rows.items()} for rows in (first, second))
    before, after = corpus(one), corpus(two)
    intervals = _intervals([one, two], [-1, 1], seed, (-0.5, 0.5))
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
    n = len(next(iter(one.values())))
    rows = np.array([two[column] - one[column] for column in columns]).reshape(-1, n).T  # n x columns
    swapped = np.random.default_rng(seed).integers(0, 2, (DRAWS, n)).astype(float)
    drawn = dict(zip(columns, ((1 - 2 * swapped) @ rows / n).T, strict=True))
    if "counts" in one:
        moved = swapped @ (two["counts"] - one["counts"])  # DRAWS x 28
        base, other = (pooled(c) for c in (one["counts"].sum(0) + moved, two["counts"].sum(0) - moved))
        drawn |= {column: other[column] - base[column] for column in base}
    tolerance = {column: abs(value) * (1 - 1e-9) for column, value in observed.items()}
    p = {c: (int((np.abs(values) >= tolerance[c]).sum()) + 1) / (DRAWS + 1) for c, values in drawn.items()}
    if n <= EXACT:
        p |= {c: _exact(rows[:, i], n * tolerance[c]) for i, c in enumerate(columns)}
    return p


def _exact(differences: np.ndarray, least: float) -> float:
    """The share of all 2^n sums of +-differences that are `least` or more in size, from the sums of two halves."""
    halves = []
    for half in np.array_split(differences, 2):
        sums = np.zeros(1)
        for value in half:
            sums = np.concatenate([sums + value, sums - value])
        halves.append(sums)
    one, other = halves[0], np.sort(halves[1])
    above = len(other) - np.searchsorted(other, least - one)
    below = np.searchsorted(other, -least - one, side="right")
    return min(1.0, float((above + below).sum()) / 2 ** len(differences))  # a sum of 0 counts twice if `least` is 0
