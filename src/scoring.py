"""ROUGE, BLEU and chrF of every row and of a whole split, with intervals and paired tests.

ROUGE comes from rouge-score, BLEU's and chrF's counts from sacrebleu, through the `evaluate` modules in src/metrics.
A *system* is a list of predictions, one for each row of the evaluation split.
"""

import functools
import importlib.metadata
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from src.intervals import DRAWS, FEW, METHODS, corpus, over_seeds, paired_test, resamples, with_intervals  # noqa: F401

COUNTED = ("bleu", "chrf")  # metrics of pooled counts
COLUMNS = {  # column: what computes it, on which scale
    "ROUGE-1": "rouge-score, F1 0-1, no stemmer (MEDIQA-Chat's official setting)",
    "ROUGE-2": "as ROUGE-1; 0 for a one-word reference, even for a perfect answer",
    "ROUGE-L": "as ROUGE-1, longest common subsequence over the whole text",
    "ROUGE-1 stemmed": "rouge-score, F1 0-1, Porter stemmer (recipe 2 and the Hugging Face scripts)",
    "ROUGE-2 stemmed": "as ROUGE-1 stemmed",
    "ROUGE-L stemmed": "as ROUGE-1 stemmed",
    "ROUGE-Lsum stemmed": "rouge-score, F1 0-1, Porter stemmer, one sentence a line (the SAMSum literature's R-L)",
    "sacreBLEU": "sacrebleu corpus BLEU, 0-100",
    "chrF": "sacrebleu corpus chrF2, 0-100: character 1- to 6-grams, recall twice the weight of precision",
    "BLEU (0-1)": "corpus BLEU without smoothing, 0-1, 13a tokens (evaluate's `bleu`, as recipe 1 prints it)",
}


@functools.cache
def metric(name: str):
    """Load the local `evaluate` module src/metrics/<name>.py. Needs no network."""
    import evaluate

    return evaluate.load(str(Path(__file__).parent / "metrics" / f"{name}.py"))


def score_rows(predictions: list[str], references: list[str]) -> dict[str, np.ndarray]:
    """Score every row: an array of n values for each ROUGE column, and "counts".

    "counts" is n x 28, to be summed over rows: BLEU's matches of 1- to 4-grams, their totals, prediction's and
    reference's length in tokens; then chrF's characters n-grams of prediction, reference and both, for n from 1 to 6.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: expected the same number, at least one."
        )
    rouge = metric("summary_rouge").compute(predictions=predictions, references=references)
    counted = [metric(f"summary_{name}").compute(predictions=predictions, references=references) for name in COUNTED]
    counts = np.concatenate([np.array(found["counts"]) for found in counted], axis=1)
    return {column: np.array(values) for column, values in rouge.items()} | {"counts": counts}


def rouge_l(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Mean ROUGE-L (F1 0-1, no stemmer), for a training that keeps its best adapter by it."""
    return {"rougeL": float(score_rows(predictions, references)["ROUGE-L"].mean())}


def bertscore(predictions: list[str], references: list[str], model: str) -> tuple[np.ndarray, str]:
    """BERTScore F1 of every row, not rescaled, and bert-score's own name for model, layer and versions."""
    try:
        from bert_score import score
    except ImportError:
        raise ModuleNotFoundError(
            f"evaluation.bertscore_model is {model!r}, and the package bert-score is not installed: "
            "`pip install bert-score`, or leave the field out."
        ) from None
    (_, _, f1), signature = score(predictions, references, model_type=model, return_hash=True)
    return f1.double().numpy(), signature


def evaluate(
    records: list[dict], systems: dict[str, list[str]], unclean: set[str], seed: int, bertscore_model: str | None = None
) -> dict:
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
    rows, scores, signature = {name: score_rows(texts, references) for name, texts in systems.items()}, {}, None
    if bertscore_model:  # in one call, so that the model is loaded once
        texts = [prediction for predictions in systems.values() for prediction in predictions]
        values, signature = bertscore(texts, references * len(systems), bertscore_model)
        for name, part in zip(systems, np.split(values, len(systems)), strict=True):
            rows[name]["BERTScore F1"] = part
    both, main = [name for name in ("base", "finetuned") if name in rows], ("ROUGE-1", "ROUGE-L")
    for name in systems:
        means = {column: rows[name][column] for column in main}
        scores[name] = {"clean": None} | {part: with_intervals(rows[name], i, seed) for part, i in parts.items()}
        scores[name]["sections"] = {
            section: {"n": len(chosen)} | with_intervals(means, np.array(chosen), seed)
            for section, chosen in sorted(sections.items(), key=lambda item: -len(item[1]))
        }
    pair = [rows[name] for name in both]
    tests = {part: paired_test(*pair, chosen, seed) for part, chosen in parts.items()} if len(pair) == 2 else None
    return {
        "n": len(records),
        "n_clean": len(clean),
        "systems": scores,
        "paired": {"finetuned minus base": tests} if tests else {},
        "per_row": {name: {column: rows[name][column].round(6).tolist() for column in main} for name in both},
        "settings": settings(seed, signature),
    }


def _warn_of_other_alphabets(references: list[str]):
    letters = re.findall(r"[^\W\d_]", " ".join(references).lower())
    other = sum(not letter.isascii() for letter in letters) / max(1, len(letters))
    if other > 0.02:
        print(
            f"Warning: {other:.0%} of the references' letters are outside of a-z. rouge-score drops them, so ROUGE "
            "says little here; see BLEU."
        )


def settings(seed: int, bertscore_signature: str | None = None) -> dict:
    """The scorer, version and signature behind every column, and how intervals and p-values are made."""
    columns = COLUMNS | ({"BERTScore F1": f"bert-score, {bertscore_signature}"} if bertscore_signature else {})
    signatures = [metric(f"summary_{m}").compute(predictions=["a"], references=["a"])["signature"] for m in COUNTED]
    versions = {name: importlib.metadata.version(name) for name in ("rouge-score", "sacrebleu", "evaluate", "scipy")}
    return {
        "columns": columns,
        "sacrebleu signature": signatures[0],
        "chrF signature": signatures[1],
        "versions": versions,
        "methods": METHODS,
        "draws": DRAWS,
        "seed": seed,
    }
