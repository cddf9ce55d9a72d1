"""A local `evaluate` module: ROUGE F1 of every row, by Google's rouge-score.

Nothing is fetched. evaluate reads this file's imports before it runs it, and wants one import a line.
"""

import functools
import re

import datasets
import evaluate
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, tokenize

DESCRIPTION = "F1 (0-1) of every row: ROUGE-1/2/L unstemmed and stemmed, ROUGE-Lsum stemmed over lines of one sentence."


class WordCache:
    """rouge-score's own tokeniser with a cache: every word is stemmed once, which is most of the time otherwise."""

    def __init__(self, stem: bool):
        self.stem = functools.cache(PorterStemmer().stem) if stem else None
        self.tokenize = functools.lru_cache(4096)(self._tokenize)

    def _tokenize(self, text):
        words = tokenize.tokenize(text, None)
        return [self.stem(word) if self.stem and len(word) > 3 else word for word in words]  # as rouge-score does


PLAIN = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=WordCache(False))
STEMMED = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], tokenizer=WordCache(True))


def sentences(text):
    """Put one sentence on a line, for ROUGE-Lsum. A text that has lines (a dialogue's turns) keeps them."""
    return text if "\n" in text else re.sub(r"(?<=[.!?])\s+", "\n", text)


class SummaryRouge(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="Lin (2004), ROUGE", features=features)

    def _compute(self, predictions, references):
        columns = {}
        for prediction, reference in zip(predictions, references, strict=True):
            plain = PLAIN.score(reference, prediction)
            stemmed = STEMMED.score(sentences(reference), sentences(prediction))
            for scores, suffix in ((plain, ""), (stemmed, " stemmed")):
                for name, score in scores.items():
                    columns.setdefault(f"ROUGE-{name[5:]}{suffix}", []).append(score.fmeasure)
        return columns
