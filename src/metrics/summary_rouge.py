"""A local `evaluate` module: ROUGE F1 of every row, by Google's rouge-score. Nothing is fetched.

evaluate reads this file's imports before it runs it, and wants one import a line.
"""

import functools
import re

import datasets
import evaluate
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, tokenize

DESCRIPTION = (
    "ROUGE-1/2/L unstemmed and stemmed, ROUGE-Lsum stemmed over newline-split sentences; F1 in 0-1, one value a row."
)


class WordCache:
    """rouge-score's own tokenisation, with every word stemmed once: the Porter stemmer is most of the time otherwise."""

    def __init__(self, stem: bool):
        stemmer = PorterStemmer()
        self.stem = (
            functools.lru_cache(None)(lambda word: stemmer.stem(word) if len(word) > 3 else word)
            if stem
            else lambda word: word
        )
        self.tokenize = functools.lru_cache(4096)(self._tokenize)

    def _tokenize(self, text):
        return [self.stem(word) for word in tokenize.tokenize(text, None)]


PLAIN = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=WordCache(False))
STEMMED = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], tokenizer=WordCache(True))


def sentences(text):
    """One sentence a line, as ROUGE-Lsum wants it. A text in lines keeps its lines (a dialogue's turns); any other is cut after . ! ?"""
    return text if "\n" in text else re.sub(r"(?<=[.!?])\s+", "\n", text)


class SummaryRouge(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="Lin (2004), ROUGE", features=features)

    def _compute(self, predictions, references):
        rows = {}
        for prediction, reference in zip(predictions, references, strict=True):
            scores = {name: score.fmeasure for name, score in PLAIN.score(reference, prediction).items()}
            stemmed = STEMMED.score(sentences(reference), sentences(prediction))
            scores.update({f"{name}_stemmed": score.fmeasure for name, score in stemmed.items()})
            for name, value in scores.items():
                rows.setdefault(name, []).append(value)
        return rows
