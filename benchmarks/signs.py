"""How often the warning signs of src.analysis.faithfulness err: on references, on spoiled ones, and against people.

    python benchmarks/signs.py     half a minute on a CPU; writes results/signs.json

Needs MTS-Dialog's files (fetched if missing) and takes SAMSum's where they are. Two signs that were dropped are
measured too: lost negations, and names of drugs (pip install drug-named-entity-recognition==2.0.9, no requirement).
"""

import bz2
import importlib.util
import json
import pickle
import re
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from src import data, recipes, runs, scoring  # noqa: E402
from src.analysis import baselines, faithfulness  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "signs.json"
NEGATION = re.compile(
    r"\b(?:no|not|none|never|nothing|nor|neither|without|den(?:y|ies|ied)|negative|unremarkable)\b|n't\b"
)
# What a negation is taken out of a reference by: "No fever." as "Fever.", "denies" as "reports"
NEGATED = re.compile(r"\b(?:no|not|never|without) |\bdenies\b", re.I)
PEOPLE = {"precision below 1": ("FactualPrecision", np.less, 1), "hallucination": ("HallucinationRate", np.greater, 0)}


def lost_negations(summary: str, dialogue: str) -> bool:
    """Dropped: whether the dialogue negates something and the summary nothing."""
    return bool(NEGATION.search(dialogue.lower())) and not NEGATION.search(summary.lower())


def drug_finder():
    """Dropped: a function like `unsupported` for names of drugs, trade names and generic ones alike; None without the
    package. Only its dictionary is read: its import builds indices for seconds.
    """
    package = importlib.util.find_spec("drug_named_entity_recognition")
    if package is None:
        return None
    with bz2.open(Path(package.origin).parent / "drug_ner_dictionary.pkl.bz2") as file:
        generic = pickle.load(file)["drug_variant_to_canonical"]

    def unsupported(summary: str, dialogue: str) -> set[str]:
        said = set(faithfulness.words(dialogue))
        known = {name for word in said for name in generic.get(word, ())}
        return {w for w in set(faithfulness.words(summary)) - said if w in generic and not known & set(generic[w])}

    return unsupported


def without_a_negation(record: dict) -> str | None:
    """The reference without its first negation; None where it has none."""
    changed = NEGATED.sub(lambda found: "reports" if found[0].lower() == "denies" else "", record["summary"], count=1)
    return changed if changed != record["summary"] else None


def on_references(dataset: str, records: list[dict], sign, spoil=None) -> dict:
    """How many references a sign flags, and how many of the spoiled ones it newly flags."""
    row = {"dataset": dataset, "n": len(records)}
    row["flagged"] = sum(bool(sign(record["summary"], record["dialogue"])) for record in records)
    if spoil:
        pairs = [(record, spoil(record)) for record in records]
        pairs = [(record, spoiled) for record, spoiled in pairs if spoiled is not None]
        before = [sign(record["summary"], record["dialogue"]) for record, _ in pairs]
        after = [sign(spoiled, record["dialogue"]) for record, spoiled in pairs]
        new = [a - b if isinstance(a, set) else a and not b for a, b in zip(after, before, strict=True)]
        row |= {"spoiled": len(pairs), "found": sum(map(bool, new))}
    return row


def auc(values: np.ndarray, wrong: np.ndarray) -> float:
    """The chance that a wrong row has the larger value (ties count half). 0.5 is chance."""
    ranks, bad = stats.rankdata(values), int(wrong.sum())
    return (ranks[wrong].sum() - bad * (bad + 1) / 2) / (bad * (len(wrong) - bad))


def against_people(values: np.ndarray, wrong: np.ndarray, draws: list[np.ndarray]) -> dict:
    """How a sign finds the rows in which people found something wrong; the interval is over dialogues."""
    drawn = [auc(values[draw], wrong[draw]) for draw in draws if 0 < wrong[draw].sum() < len(draw)]
    row = {"base rate": wrong.mean(), "AUC": auc(values, wrong)}
    row["low"], row["high"] = np.quantile(drawn, [0.025, 0.975])
    if set(np.unique(values)) <= {0, 1}:
        hits = int(values[wrong].sum())
        row |= {"flagged": int(values.sum()), "precision": hits / max(1, values.sum()), "recall": hits / wrong.sum()}
    return {key: round(float(value), 3) if key != "flagged" else value for key, value in row.items()}


def main():
    mts, samsum, drugs = recipes.load("mts_dialog"), recipes.load("samsum"), drug_finder()
    data.prepare(mts)
    sets = {"MTS-Dialog": [r for split in recipes.splits("mts_dialog")[1:] for r in data.load_split(mts, split)]}
    if (runs.ROOT / "data" / "raw" / "samsum" / "test.json").exists():
        data.prepare(samsum)
        sets["SAMSum test"] = data.load_split(samsum, "test")
    signs = {
        "numbers": (faithfulness.unsupported, baselines.number_changed),
        "lost negations (dropped)": (lost_negations, without_a_negation),
    } | ({"drugs (dropped)": (drugs, None)} if drugs else {})
    references = [
        {"sign": name} | on_references(dataset, records, *sign)
        for name, sign in signs.items()
        for dataset, records in sets.items()
    ]
    outputs, scores = baselines.released_outputs(), baselines.manual_scores()
    dialogues = len({row["ID"] for row in outputs})  # each was summarised by four systems, which are drawn together
    positions = np.arange(len(outputs)).reshape(-1, dialogues)
    draws = [positions[:, draw].ravel() for draw in scoring.resamples(dialogues, seed=0)]
    signs["novel bigrams"] = (lambda *texts: np.nan_to_num(faithfulness.novel_bigrams(*texts)), None)
    people = []
    for name, (sign, _) in signs.items():
        values = [sign(row["Automatic Summary"], row["Dialogue"]) for row in outputs]
        values = np.array([bool(value) if isinstance(value, set) else value for value in values], dtype=float)
        for found, (column, compare, bound) in PEOPLE.items():
            wrong = compare([row[column] for row in scores], bound)
            people.append({"sign": name, "people": found, "n": len(outputs)} | against_people(values, wrong, draws))
    RESULTS.write_text(json.dumps({"references": references, "people": people}, indent=1) + "\n", encoding="utf-8")
    for row in references + people:
        print(row)


if __name__ == "__main__":
    main()
