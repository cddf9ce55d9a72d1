"""How often the intervals and tests of src/intervals.py are right, on real scores: writes results/coverage.json.

OMP_NUM_THREADS=1 .venv/bin/python benchmarks/coverage.py    (about 6 minutes on one core; needs data/raw)

The population: MTS-Dialog's 100 validation dialogues, answered by the four EACL-2023 systems (released outputs) and by
two systems without a model. n of them are drawn with replacement, and the truth is the score of all 100: an interval of
95% should hold it in 95% of the draws. For p, the two answers to a row are swapped at random first, so that no
system is better, and p < .05 should come up in 5%. A seed is a random blend of the four EACL systems: which of them
answers a row is drawn with weights from a Dirichlet distribution, whose parameter says how much seeds differ.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from src import data, intervals, recipes, scoring  # noqa: E402
from src.analysis import baselines  # noqa: E402
from src.metrics.pooled import pooled  # noqa: E402

SIZES = (5, 10, 15, 20, 35, 50, 51, 75, 100, 200)
REPEATS = {"rows": 1000, "counts": 500, "seeds": 250}  # draws for ROUGE, for BLEU and chrF, for seeds
BLENDS = {"alike": 50.0, "moderate": 2.0, "far apart": 0.2}  # how much seeds differ: the Dirichlet's parameter
PAIRS = (("EACL 1", "EACL 4"), ("stock answer", "EACL 4"))
SINGLE = ("EACL 1", "EACL 4", "stock answer", "whole dialogue")


def population() -> dict[str, dict[str, np.ndarray]]:
    """{system: ROUGE-1 and ROUGE-L of 100 rows, and counts}."""
    recipe = recipes.load("mts_dialog")
    found = [(p, r) for _, p, r in baselines.other_systems(recipe).values()]
    systems = {f"EACL {number}": predictions for number, (predictions, _) in enumerate(found, 1)}
    records = data.load_split(recipe, "validation")
    by_reference = {record["summary"].strip(): record for record in records}
    references = found[0][1]
    rows = [by_reference[reference.strip()] for reference in references]
    systems["stock answer"] = baselines.stock_answers(rows, data.load_split(recipe, "train"))
    systems["whole dialogue"] = [row["dialogue"] for row in rows]
    columns = ("ROUGE-1", "ROUGE-L", "counts")
    return {
        name: {column: values for column, values in scoring.score_rows(texts, references).items() if column in columns}
        for name, texts in systems.items()
    }


def part(rows: dict, kind: str) -> dict:
    """The ROUGE columns ("rows") or the counts, which are slower to draw ("counts")."""
    return {column: values for column, values in rows.items() if (column == "counts") == (kind == "counts")}


def holds(truth: float, found: dict) -> bool | None:
    return None if found["low"] is None else bool(found["low"] <= truth <= found["high"])


def singles(rows: dict, kind: str, n: int, rng) -> dict[str, list]:
    """{column: whether each draw's interval holds the truth; None where there is no interval}."""
    chosen, truth = part(rows, kind), scoring.corpus(rows)
    hits = {}
    for repeat in range(REPEATS[kind]):
        scores = scoring.with_intervals(chosen, rng.integers(0, 100, n), repeat)
        for column, score in scores.items():
            hits.setdefault(column, []).append(holds(truth[column], score))
    return hits


def pairs(first: dict, second: dict, kind: str, n: int, rng) -> tuple[dict[str, list], dict[str, list]]:
    """As `singles`, for the difference; and {column: whether p < .05 with the systems swapped at random}."""
    one, two = part(first, kind), part(second, kind)
    before, after = scoring.corpus(first), scoring.corpus(second)
    hits, false = {}, {}
    for repeat in range(REPEATS[kind]):
        drawn, swap = rng.integers(0, 100, n), rng.integers(0, 2, n).astype(bool)
        tests = scoring.paired_test(one, two, drawn, repeat)
        mixed = []
        for a, b in ((one, two), (two, one)):
            mixed.append({c: np.where(swap[:, None] if a[c].ndim > 1 else swap, a[c][drawn], b[c][drawn]) for c in a})
        equal = scoring.paired_test(*mixed, np.arange(n), repeat)
        for column, test in tests.items():
            hits.setdefault(column, []).append(holds(after[column] - before[column], test))
            p = equal[column]["p"]
            false.setdefault(column, []).append(None if p is None else p < 0.05)
    return hits, false


def seeds(systems: list[dict], concentration: float, n: int, count: int, rng) -> dict[str, list]:
    """As `singles`, for the mean over `count` seeds."""
    stacked = {column: np.stack([system[column] for system in systems]) for column in systems[0]}  # 4 x 100 (x 28)
    weights = rng.dirichlet([concentration] * 4, 20_000)
    truth = {column: values.mean() for column, values in stacked.items() if column != "counts"}
    mean_counts = np.einsum("sk,kc->sc", weights, stacked["counts"].sum(1))
    truth |= {column: values.mean() for column, values in pooled(mean_counts).items()}
    hits = {}
    for repeat in range(REPEATS["seeds"]):
        drawn, scored = rng.integers(0, 100, n), []
        for seed in rng.integers(0, len(weights), count):
            who = rng.choice(4, 100, p=weights[seed])[drawn]  # a row drawn twice is one row, with one answer
            scored.append({column: values[who, drawn] for column, values in stacked.items()})
        for column, score in scoring.over_seeds(scored, repeat).items():
            hits.setdefault(column, []).append(holds(truth[column], score))
    return hits


def lines(kind: str, of: str, n: int, hits: dict[str, list], **more) -> list[dict]:
    """One result a column: the share of draws that hold, among those that have an interval or p."""
    found = []
    for column, values in hits.items():
        known = [value for value in values if value is not None]
        rate = round(float(np.mean(known)), 4) if len(known) > len(values) / 10 else None
        found.append({"kind": kind, "of": of, "column": column, "n": n, "repeats": len(known), "share": rate, **more})
    return [line for line in found if line["column"] != "BLEU (0-1)"]


def main():
    start, results, rng = time.time(), [], np.random.default_rng(0)
    systems = population()
    for n in SIZES:
        for kind in ("rows", "counts"):
            if kind == "counts" and n < intervals.POOLED and n not in (10, 50):
                continue  # no interval; p at two sizes
            for name in SINGLE:
                results += lines("interval of a score", name, n, singles(systems[name], kind, n, rng))
            for first, second in PAIRS:
                hits, false = pairs(systems[first], systems[second], kind, n, rng)
                results += lines("interval of a difference", f"{second} minus {first}", n, hits)
                results += lines("p < .05 of equal systems", f"{second} and {first}", n, false)
        print(f"n={n}: {time.time() - start:.0f} s", flush=True)
    for count in (2, 3, 5):
        for name, concentration in BLENDS.items():
            for n in (20, 100):
                hits = seeds([systems[f"EACL {k}"] for k in (1, 2, 3, 4)], concentration, n, count, rng)
                results += lines("interval over seeds", f"seeds {name}", n, hits, seeds=count)
        print(f"{count} seeds: {time.time() - start:.0f} s", flush=True)
    path = ROOT / "benchmarks" / "results" / "coverage.json"
    path.write_text("[\n" + ",\n".join(json.dumps(line) for line in results) + "\n]\n", encoding="utf-8")
    print(f"{len(results)} results in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
