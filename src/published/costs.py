"""What each defect costs: from scores by seed to differences with intervals, p-values and a word."""

import numpy as np
import pandas as pd

from src.published.defects import DEFECTS

SMALL = 0.1  # of the corrected score: an interval around 0 that stays within this still says something


def costs(measured: pd.DataFrame, column: str = "ROUGE-L") -> pd.DataFrame:
    """One row a defect: seeds, mean score and difference, each with a 95% interval (Student's t) over the seeds.

    measured: columns defect, seed, `column` and "ended by EOS", as of `measure` on any recipe. The difference is from
    "corrected": paired by seed where both use the same adapters, else Welch's. What is not trained has no seeds: the
    base is compared with the corrected runs, its variants with it. "p" is two-sided and Holm-corrected over all
    comparisons, intervals are not corrected. "verdict" says both in a word, see `verdict`. What one seed cannot say is
    NaN.
    """
    order = list(measured["defect"].unique())
    scores = {name: part.set_index("seed")[column] for name, part in measured.groupby("defect")}
    rows = {}
    for name in order:
        mean, low, high, _ = _test(scores[name])
        rows[name] = {"seeds": len(scores[name]) if _trained(name) else 0, column: mean}
        rows[name] |= {f"{column} low": low, f"{column} high": high}
        against = "corrected" if _trained(name) or name == "base model" else "base model"
        if name != "corrected" and against in scores:
            found = _compare(name, scores[name], scores[against])
            rows[name] |= dict(zip(("difference", "difference low", "difference high", "p"), found, strict=True))
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("defect")
    table["p"] = holm(table["p"])
    table["verdict"] = [verdict(row, table.at["corrected", column]) for row in table.to_dict("records")]
    table["ended by EOS"] = measured.groupby("defect")["ended by EOS"].mean()
    return table


def holm(p: pd.Series) -> pd.Series:
    """Holm's step-down correction: the k-th smallest of m p-values times m - k + 1, never below the one before."""
    ascending = p.dropna().sort_values()
    factors = np.arange(len(ascending), 0, -1)
    return (ascending * factors).cummax().clip(upper=1).reindex(p.index)


def _trained(name: str) -> bool:
    return name not in DEFECTS or DEFECTS[name].train is not None


def _test(values) -> tuple[float, float, float, float]:
    """Mean, its 95% interval and p for "the mean is 0", by Student's t; NaN for what one value cannot say."""
    from scipy.stats import ttest_1samp

    if len(values) < 2 or np.ptp(values) == 0:
        return float(np.mean(values)), np.nan, np.nan, np.nan
    result = ttest_1samp(values, 0)
    return (float(np.mean(values)), *result.confidence_interval(), result.pvalue)


def _compare(name: str, values: pd.Series, reference: pd.Series) -> tuple[float, float, float, float]:
    """Difference of the means, values minus reference, its 95% interval and p."""
    from scipy.stats import ttest_ind

    if not _trained(name):
        return _test(values.iloc[0] - reference)
    if name in DEFECTS and DEFECTS[name].training == DEFECTS["corrected"].training:  # the same adapters
        return _test((values - reference).dropna())
    difference = values.mean() - reference.mean()
    if min(len(values), len(reference)) < 2:
        return difference, np.nan, np.nan, np.nan
    result = ttest_ind(values, reference, equal_var=False)
    return (difference, *result.confidence_interval(), result.pvalue)


def verdict(row: dict, corrected: float) -> str:
    """costs or flatters: p is below .05. perhaps: only the uncorrected interval excludes 0. small: the interval holds 0
    and stays within 10% of the corrected score. uninformative: it holds 0 and is wider. Nothing without a p.
    """
    low, high, p = row["difference low"], row["difference high"], row["p"]
    if pd.isna(p):
        return ""
    if p < 0.05 or not low <= 0 <= high:
        return ("" if p < 0.05 else "perhaps ") + ("costs" if row["difference"] < 0 else "flatters")
    return "small" if max(-low, high) <= SMALL * corrected else "uninformative"
