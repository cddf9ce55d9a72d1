"""A run and its evaluation, made by hand: 3 rows, 2 systems, numbers that tests know. Texts are hostile."""

import copy

import pytest

from src import recipes, runs

EVIL = "<script>alert('x')</script>&<b>"
ROWS = [  # reference, base, fine-tuned; the last base answer is longer than any plot, one answer is empty
    ("Allergic to penicillin.", "Takes 99 mg.", "Allergic to penicillin."),
    (f"None. {EVIL}", "None.", ""),
    ("Left knee pain for two days.", "pain " * 60, f"Left knee pain {EVIL}"),
]
PER_ROW = {"base": [0.0, 0.5, 0.25], "finetuned": [1.0, 0.0, 0.75]}


def score(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def system(rouge_1, rouge_l, bleu):
    scores = {"ROUGE-1": rouge_1, "ROUGE-2": score(0.125), "ROUGE-L": rouge_l, "sacreBLEU": bleu, "chrF": score(37.25)}
    return {"all": scores, "clean": None, "sections": {"CC": {"n": 2, "ROUGE-1": rouge_1, "ROUGE-L": rouge_l}}}


def statistics(words, flagged, ended=None):
    found = {"mean words": words, "words per reference word": 0.5, "novel bigrams": None}
    found |= {"rows with unsupported numbers": flagged, "empty": 0.0}
    return found | ({"ended by EOS": ended, "hit the length cap": 1 - ended} if ended is not None else {})


def difference(value, low, high, p):
    return {"difference": value, "low": low, "high": high, "p": p}


METRICS = {
    "dataset": "demo",
    "split": "test",
    "n": 3,
    "n_clean": 2,
    "systems": {
        "base": system(score(0.25, 0.125, 0.375), score(0.25), score(3.14159, 2.0, 4.5)),
        "finetuned": system(score(0.875, 0.75, 1.0), score(0.58333), score(81.25, 79.0, 83.96)),
    },
    "paired": {
        "finetuned minus base": {
            "all": {
                "ROUGE-1": difference(0.625, 0.5, 0.75, 1 / 1001),
                "ROUGE-L": difference(-0.058, None, None, None),
                "sacreBLEU": difference(78.10841, 70.0, 80.0, 0.04),
            }
        }
    },
    "per_row": {name: {"ROUGE-1": values, "ROUGE-L": values} for name, values in PER_ROW.items()},
    "text": {
        "base": statistics(21.0, 1 / 3, 2 / 3),
        "finetuned": statistics(2.5, 0.0, 1.0),
        "LEAD-3": statistics(4.0, 0.0),
        "reference": statistics(4.0, 0.0),
    },
    "others": {"a person": {"split": "all", "n": 2, "all": {"ROUGE-1": score(0.5), "sacreBLEU": score(12.34, 10, 15)}}},
    "settings": {"sacrebleu signature": "nrefs:1|version:2.6.0", "columns": {"ROUGE-1": "rouge-score"}},
}
METRICS["systems"]["finetuned"]["clean"] = copy.deepcopy(METRICS["systems"]["finetuned"]["all"]) | {
    "ROUGE-1": score(0.8)
}
METRICS["systems"]["base"]["clean"] = copy.deepcopy(METRICS["systems"]["base"]["all"])


@pytest.fixture
def metrics():
    return copy.deepcopy(METRICS) | {"run": "demo-00000001", "evaluation": "test-0000000a"}


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """A function that writes a finished run under a temporary root, and returns it."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)

    def make(name="demo-00000001", recipe="demo", overrides=None, day=1, identity=None, losses=(1.5, 1.25)):
        fields = recipes.load(recipe, overrides).model_dump()
        config = {"run": name, "recipe": fields, "identity": {"lora": {}, "training": {}} | (identity or {})}
        manifest = {
            "run": name,
            "finished": f"2025-01-{day:02d}T10:00:00+00:00",
            "steps": 20,
            "best_step": 20,
            "rows": {"train": 64, "validation": 8},
            "train_seconds": 90.0,
            "device": "CPU, 2 threads",
            "base_commit": None,
            "sha256": {},
        }
        log = [{"step": 10, "loss": 2.0}, {"step": 10, "eval_loss": losses[0]}]
        log += [{"step": 20, "loss": 1.0}, {"step": 20, "eval_loss": losses[1]}, {"step": 20, "sample": "x", "id": "0"}]
        folder = tmp_path / "outputs" / name
        runs.files.write_sealed(folder / "config.json", config)
        runs.files.write_sealed(folder / "manifest.json", manifest)
        runs.write_jsonl(folder / "train_log.jsonl", log)
        return runs.Run(name)

    return make


@pytest.fixture
def make_evaluation():
    """A function that writes a scored evaluation of a run, and returns it."""

    def make(run, name="test-0000000a", metrics=METRICS, generation=None, day=1, hour=12):
        evaluation = runs.Evaluation(run, name)
        about = {"run": run.name, "evaluation": name, "created": f"2025-01-{day:02d}T{hour}:00:00.000000+00:00"}
        about |= {"split": metrics["split"], "rows": metrics["n"], "generation": generation or {"max_new_tokens": 96}}
        runs.files.write_sealed(evaluation.folder / "evaluation.json", about)
        for number, label in ((1, "base"), (2, "finetuned")):
            answers = [
                {
                    "id": f"{i}{EVIL}",
                    "section": EVIL,
                    "dialogue": f"A: {EVIL} penicillin, 12 mg {i}",
                    "reference": texts[0],
                    "prediction": texts[number],
                    "tokens": 5 + number,
                    "stop": "length" if label == "base" else "eos",
                }
                for i, texts in enumerate(ROWS)
            ]
            runs.write_jsonl(evaluation.folder / "predictions" / f"{label}.jsonl", answers)
        written = copy.deepcopy(metrics) | {"run": run.name, "evaluation": name, "sha256": {}}
        runs.files.write_sealed(evaluation.folder / "metrics.json", written)
        return evaluation

    return make
