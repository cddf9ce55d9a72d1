"""A local `evaluate` module: chrF2 by sacrebleu, as the counts of every row, so that any subset of rows can be scored.

Nothing is fetched. evaluate reads this file's imports before it runs it, and wants one import a line.
"""

import datasets
import evaluate
from sacrebleu.metrics import CHRF

DESCRIPTION = "Character 1- to 6-grams of every row: those of the prediction, of the reference and of both; signature."


class SummaryChrf(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="Popovic (2015), chrF", features=features)

    def _compute(self, predictions, references):
        chrf = CHRF()
        chrf.corpus_score(predictions[:1], [references[:1]])  # sacrebleu has a signature only after a score
        counts = CHRF()._extract_corpus_statistics(predictions, [references])  # 6 x (prediction, reference, both) a row
        return {"counts": counts, "signature": str(chrf.get_signature())}
