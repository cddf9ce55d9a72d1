"""What each defect costs: from the scores by seed to differences, intervals and p-values."""

import pandas as pd


def costs(measured: pd.DataFrame) -> pd.DataFrame:
    """One row a defect: mean over the seeds and difference from "corrected", each with a 95% interval (Student's t).

    Differences are paired by seed. With three seeds the interval is 2.48 standard deviations on each side.
    """
    from scipy.stats import t

    order = measured["defect"].unique()
    by_seed = measured.pivot(index="defect", columns="seed", values="ROUGE-L").loc[order]
    count, table = by_seed.shape[1], {}
    for name, values in (("ROUGE-L", by_seed), ("difference", by_seed - by_seed.loc["corrected"])):
        mean, half = values.mean(axis=1), t.ppf(0.975, count - 1) * values.std(axis=1) / count**0.5
        table |= {name: mean, f"{name} low": mean - half, f"{name} high": mean + half}
    table["ended by EOS"] = measured.groupby("defect")["ended by EOS"].mean()
    return pd.DataFrame(table).loc[order]
