"""What a summary is worth: ROUGE and BLEU per row and corpus, intervals, paired tests, systems without a model, faithfulness.

Rouge comes from rouge-score and BLEU from sacrebleu, through the local `evaluate` modules in src/metrics. No torch here.
A *system* is a list of predictions, one a row of the evaluation split.
"""

import functools
import importlib.metadata
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

BOOTSTRAP = 1000  # resamples of the rows behind every 95% interval and paired test
ROUGE = {  # column: key of the local rouge module
    "ROUGE-1": "rouge1",
    "ROUGE-2": "rouge2",
    "ROUGE-L": "rougeL",
    "ROUGE-1 stemmed": "rouge1_stemmed",
    "ROUGE-2 stemmed": "rouge2_stemmed",
    "ROUGE-L stemmed": "rougeL_stemmed",
    "ROUGE-Lsum stemmed": "rougeLsum_stemmed",
}
COLUMNS = {  # column: what computes it, on which scale
    "ROUGE-1": "rouge-score, F1 0-1, no stemmer (MEDIQA-Chat's official setting)",
    "ROUGE-2": "as ROUGE-1; 0 for a one-word reference, even for a perfect answer",
    "ROUGE-L": "as ROUGE-1, longest common subsequence over the whole text",
    "ROUGE-1 stemmed": "rouge-score, F1 0-1, Porter stemmer (recipe 2 and the Hugging Face scripts)",
    "ROUGE-2 stemmed": "as ROUGE-1 stemmed",
    "ROUGE-L stemmed": "as ROUGE-1 stemmed",
    "ROUGE-Lsum stemmed": "rouge-score, F1 0-1, Porter stemmer, one sentence a line (the SAMSum literature's R-L)",
    "sacreBLEU": "sacrebleu corpus BLEU, 0-100",
    "BLEU (0-1)": "corpus BLEU without smoothing, 0-1, 13a tokens (evaluate's `bleu`, as recipe 1 prints it)",
}
BERTSCORE = {
    "BERTScore": "bert-score F1, the official English model (roberta-large), not rescaled: compare differences only"
}


@functools.cache
def metric(name: str):
    """The local `evaluate` module src/metrics/<name>.py; needs no network."""
    import evaluate

    return evaluate.load(str(Path(__file__).parent / "metrics" / f"{name}.py"))


@functools.cache
def bert_scorer():
    """bert-score's scorer with its official English model; None, and said so, when the package or the model cannot be had."""
    try:
        from bert_score import BERTScorer

        return BERTScorer(lang="en")
    except ImportError:
        print("No BERTScore column: bert-score is not installed (pip install bert-score).")
    except OSError as error:
        print(f"No BERTScore column: its model is neither cached nor reachable ({str(error).splitlines()[0]})")
    return None


def score_rows(predictions: list[str], references: list[str]) -> dict[str, np.ndarray]:
    """Per-row scores: one array of n values a ROUGE column (and BERTScore, where it can be had), and "counts".

    "counts" is n x 10: BLEU's matches by n, its totals by n, the lengths of prediction and reference in 13a tokens.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: expected as many, at least one."
        )
    rouge = metric("summary_rouge").compute(predictions=predictions, references=references)
    bleu = metric("summary_bleu").compute(predictions=predictions, references=references)
    rows = {column: np.array(rouge[key]) for column, key in ROUGE.items()}
    if bert_scorer():
        rows["BERTScore"] = np.zeros(len(references))
        filled = [i for i, p in enumerate(predictions) if p.strip() and references[i].strip()]  # an empty text scores 0
        if filled:
            texts = [predictions[i] for i in filled], [references[i] for i in filled]
            rows["BERTScore"][filled] = bert_scorer().score(*texts)[2].numpy()
    return rows | {"counts": np.array(bleu["counts"])}


def bleu(counts: np.ndarray, smooth: bool) -> float:
    """Corpus BLEU, 0-100, of summed per-row counts by sacrebleu; `smooth` as sacrebleu does by default (exp), or not at all."""
    from sacrebleu.metrics import BLEU

    total = [int(x) for x in counts.sum(0)]
    return BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp" if smooth else "none").score


def corpus(rows: dict[str, np.ndarray], chosen=slice(None)) -> dict[str, float]:
    """Corpus scores of the chosen rows: the mean of the rows for ROUGE, the pooled counts for BLEU."""
    values = {column: float(rows[column][chosen].mean()) for column in rows if column != "counts"}
    counts = rows["counts"][chosen]
    return values | {"sacreBLEU": bleu(counts, True), "BLEU (0-1)": bleu(counts, False) / 100}


def resamples(n: int, seed: int) -> np.ndarray:
    """BOOTSTRAP x n row indices drawn with replacement; the same for every system, so differences are paired."""
    return np.random.default_rng(seed).integers(0, n, (BOOTSTRAP, n))


def distribution(rows: dict, draws: np.ndarray) -> dict[str, np.ndarray]:
    """Every corpus score on every resample: one array of BOOTSTRAP values a column."""
    values = {column: rows[column][draws].mean(1) for column in rows if column != "counts"}
    counts = rows["counts"][draws].sum(1, keepdims=True)
    values["sacreBLEU"] = np.array([bleu(c, True) for c in counts])
    values["BLEU (0-1)"] = np.array([bleu(c, False) for c in counts]) / 100
    return values


def with_intervals(rows: dict, chosen: np.ndarray, seed: int) -> dict[str, dict]:
    """{column: {"value", "low", "high"}} of the chosen rows; percentile bootstrap, 95%."""
    part = {name: values[chosen] for name, values in rows.items()}
    drawn = distribution(part, resamples(len(chosen), seed))
    return {
        column: {
            "value": value,
            "low": float(np.quantile(drawn[column], 0.025)),
            "high": float(np.quantile(drawn[column], 0.975)),
        }
        for column, value in corpus(part).items()
    }


def score_others(others: dict, seed: int) -> dict[str, dict]:
    """{name: {"split", "n", "all": scores with intervals}} of what `data.others` found, each on rows of its own."""
    return {
        name: {
            "split": split,
            "n": len(references),
            "all": with_intervals(score_rows(predictions, references), np.arange(len(references)), seed),
        }
        for name, (split, predictions, references) in others.items()
    }


def paired_test(first: dict, second: dict, chosen: np.ndarray, seed: int) -> dict[str, dict]:
    """Second minus first: {column: {"difference", "low", "high", "p"}} by paired bootstrap over rows.

    p is two-sided (Koehn 2004, Berg-Kirkpatrick 2012): the share of resamples whose difference, centred on its mean, is at least
    as large as the observed one; (hits + 1) / (resamples + 1). sacrebleu's paired bootstrap counts one side of absolute
    differences, so its p for the same resamples is smaller: about half of this one for a clear difference.
    """
    one, two = ({name: values[chosen] for name, values in rows.items()} for rows in (first, second))
    draws = resamples(len(chosen), seed)
    before, after = distribution(one, draws), distribution(two, draws)
    observed = {column: value - corpus(one)[column] for column, value in corpus(two).items()}
    result = {}
    for column, difference in observed.items():
        drawn = after[column] - before[column]
        hits = int((np.abs(drawn - drawn.mean()) >= abs(difference)).sum())
        low, high = np.quantile(drawn, [0.025, 0.975])
        result[column] = {
            "difference": difference,
            "low": float(low),
            "high": float(high),
            "p": (hits + 1) / (BOOTSTRAP + 1),
        }
    return result


# ---------------------------------------------------------------- systems without a model


def whole_dialogue(record: dict) -> str:
    return record["dialogue"]


def lead3(record: dict) -> str:
    """The first three turns (lines), speaker labels kept."""
    return "\n".join(record["dialogue"].split("\n")[:3])


def longest3(record: dict) -> str:
    """The three turns with most words, in their order, speaker labels kept."""
    turns = record["dialogue"].split("\n")
    chosen = sorted(range(len(turns)), key=lambda i: -len(turns[i].split()))[:3]
    return "\n".join(turns[i] for i in sorted(chosen))


def stock_answers(records: list[dict], train: list[dict]) -> list[str]:
    """The most frequent training summary of each record's section (of all rows for an unseen section)."""
    by_section = defaultdict(Counter)
    for row in train:
        by_section[row["section"]][row["summary"]] += 1
        by_section[None][row["summary"]] += 1
    return [by_section[r["section"] if r["section"] in by_section else None].most_common(1)[0][0] for r in records]


def nearest_summaries(records: list[dict], train: list[dict]) -> list[str]:
    """The summary of the training row whose dialogue is most alike: cosine of tf-idf word vectors, within the same section if it has rows."""
    documents = [Counter(_words(row["dialogue"])) for row in train]
    frequency = Counter(word for document in documents for word in document)
    idf = {word: math.log(len(train) / n) for word, n in frequency.items()}
    postings, norms = defaultdict(list), np.zeros(len(train))
    for i, document in enumerate(documents):
        for word, n in document.items():
            weight = (1 + math.log(n)) * idf[word]
            postings[word].append((i, weight))
            norms[i] += weight**2
    arrays = {word: (np.array([i for i, _ in hits]), np.array([w for _, w in hits])) for word, hits in postings.items()}
    sections = np.array([row["section"] for row in train])
    chosen = []
    for record in records:
        similarity = np.zeros(len(train))
        for word, n in Counter(_words(record["dialogue"])).items():
            if word in arrays:
                rows, weights = arrays[word]
                similarity[rows] += (1 + math.log(n)) * idf[word] * weights
        similarity /= np.sqrt(np.maximum(norms, 1e-12))
        same = sections == record["section"]
        chosen.append(
            train[int(np.where(same, similarity, -1).argmax() if same.any() else similarity.argmax())]["summary"]
        )
    return chosen


def without_model(records: list[dict], train: list[dict]) -> dict[str, list[str]]:
    """Systems that anyone can beat or not, by name. A model below "whole dialogue" is worth less than a copy."""
    systems = {
        "whole dialogue": [whole_dialogue(r) for r in records],
        "LEAD-3": [lead3(r) for r in records],
        "LONGEST-3": [longest3(r) for r in records],
        "nearest training summary": nearest_summaries(records, train),
    }
    if any(r["section"] for r in records):
        systems["stock answer of the section"] = stock_answers(records, train)
    return systems


# ---------------------------------------------------------------- what scores do not see

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = {word: 10 * n for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
NUMBER_WORDS = {word: n for n, word in enumerate(ONES.split())} | TENS
DECADES = {word[:-1] + "ies": n for word, n in TENS.items()}  # "in her eighties" is "in her 80s"
ENUMERATOR = re.compile(r"(?:(?<=^)|(?<=[.\n]))\s*[1-9]\.(?=\s)")  # "1. Aspirin. 2. Zocor." holds no numbers
NEGATION = re.compile(
    r"\b(?:no|not|none|never|nothing|nor|neither|without|den(?:y|ies|ied)|negative|unremarkable)\b|n't\b"
)
DRUG = re.compile(
    r"(?:cillin|mycin|micin|floxacin|cycline|azole|pril|sartan|olol|dipine|statin|formin|gliptin|glitazone|prazole|tidine|setron|triptan|"
    r"profen|oxicam|coxib|codone|morphone|barbital|azepam|zolam|oxetine|aline|traline|parin|xaban|lukast|terol|sone|solone|ide|thiazide|mab)$"
)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:[.'/-][a-z0-9]+)*", text.lower())


def facts(text: str) -> set[str]:
    """Numbers as digits ("thirty-two" is 32, "nineteen eighty eight" 1988, "three hundred" 300) and, from seven letters, words with a drug's ending."""
    words = [part for word in _words(ENUMERATOR.sub(" ", text).replace(",000", "000")) for part in word.split("-")]
    found = {word for word in words if len(word) >= 7 and DRUG.search(word)}
    found.update(number for word in words for number in re.findall(r"\d+(?:\.\d+)?", word))
    found.update(str(DECADES[word]) for word in words if word in DECADES)
    i = 0
    while i < len(words):
        value, i = _spoken(words, i) if words[i] in NUMBER_WORDS else (None, i + 1)
        if value is not None:
            found.add(str(value))
    return found - {"0", "1"}  # "a week" is "1 week"


def _spoken(words: list[str], i: int) -> tuple[int, int]:
    """The number that the words from i on spell, and the position behind it."""

    def below_hundred(i):
        value = NUMBER_WORDS[words[i]]
        if value >= 20 and i + 1 < len(words) and 1 <= NUMBER_WORDS.get(words[i + 1], 0) <= 9:
            return value + NUMBER_WORDS[words[i + 1]], i + 2
        return value, i + 1

    value, i = below_hundred(i)
    for unit, name in ((1000, "thousand"), (100, "hundred")):
        if i < len(words) and words[i] == name:
            value, i = value * unit, i + 1
            i += i + 1 < len(words) and words[i] == "and" and words[i + 1] in NUMBER_WORDS
            if i < len(words) and words[i] in NUMBER_WORDS:
                rest, i = _spoken(words, i)
                value += rest
            return value, i
    if 11 <= value <= 20 and i < len(words):  # years: nineteen eighty eight, nineteen o five
        j = i + (words[i] in ("o", "oh"))
        if j < len(words) and words[j] in NUMBER_WORDS and (j > i or NUMBER_WORDS[words[j]] >= 10):
            rest, i = below_hundred(j)
            value = 100 * value + rest
    return value, i


def unsupported(summary: str, dialogue: str) -> set[str]:
    """Numbers and drug-like words of the summary that its dialogue does not contain. Empty is no proof of a faithful summary."""
    return facts(summary) - facts(dialogue)


def lost_negations(summary: str, dialogue: str) -> bool:
    """The dialogue negates something ("no", "denies", "n't") and the summary nothing at all."""
    return bool(NEGATION.search(dialogue.lower())) and not NEGATION.search(summary.lower())


def novel_bigrams(summary: str, dialogue: str) -> float:
    """Share of the summary's word pairs that the dialogue does not have; nan for a summary of fewer than two words."""
    words, source = _words(summary), _words(dialogue)
    pairs = list(zip(words, words[1:], strict=False))
    known = set(zip(source, source[1:], strict=False))
    return sum(pair not in known for pair in pairs) / len(pairs) if pairs else math.nan


def text_statistics(predictions: list[str], records: list[dict], answers: list[dict] | None = None) -> dict[str, float]:
    """Lengths in words, novelty, unsupported facts; with `answers` (rows of 03) also how generation ended."""
    lengths = [len(p.split()) for p in predictions]
    references = [len(r["summary"].split()) for r in records]
    flagged = [unsupported(p, r["dialogue"]) for p, r in zip(predictions, records, strict=True)]
    lost = [lost_negations(p, r["dialogue"]) for p, r in zip(predictions, records, strict=True)]
    novel = [novel_bigrams(p, r["dialogue"]) for p, r in zip(predictions, records, strict=True)]
    n = len(records)
    statistics = {
        "mean words": sum(lengths) / n,
        "words per reference word": sum(lengths) / sum(references),
        "novel bigrams": float(np.nanmean(novel)) if not np.isnan(novel).all() else None,
        "rows with unsupported numbers or drugs": sum(map(bool, flagged)) / n,
        "rows that lose every negation": sum(lost) / n,
        "empty": sum(not p.strip() for p in predictions) / n,
    }
    if answers:
        statistics["ended by EOS"] = sum(a["stop"] == "eos" for a in answers) / n
        statistics["hit the length cap"] = sum(a["stop"] == "length" for a in answers) / n
    return statistics


# ---------------------------------------------------------------- a whole run


def evaluate_systems(records, systems: dict[str, list[str]], leaked=(), seed=0, answers=None) -> dict:
    """Score every system on all rows, on the rows without leaked dialogues and by section.

    Returns {"n", "n_clean", "systems": {name: {"all", "clean", "sections", "text"}}, "rows": {name: per-row scores}}.
    """
    references = [r["summary"] for r in records]
    letters = re.findall(r"[^\W\d_]", " ".join(references).lower())
    foreign = sum(not letter.isascii() for letter in letters) / max(1, len(letters))
    if foreign > 0.02:
        print(
            f"Warning: {foreign:.0%} of the references' letters are outside of a-z. rouge-score drops them, so ROUGE says little here; see BLEU."
        )
    everything = np.arange(len(records))
    clean = np.array([i for i, r in enumerate(records) if r["id"] not in leaked], dtype=int)
    sections = defaultdict(list)
    for i, record in enumerate(records):
        sections[record["section"]].append(i)
    result, rows = {}, {}
    for name, predictions in systems.items():
        rows[name] = score_rows(predictions, references)
        result[name] = {
            "all": with_intervals(rows[name], everything, seed),
            "clean": with_intervals(rows[name], clean, seed) if 0 < len(clean) < len(everything) else None,
            "text": text_statistics(predictions, records, (answers or {}).get(name)),
            "sections": {
                section: {
                    "n": len(chosen),
                    **{c: _mean_interval(rows[name][c][chosen], seed) for c in ("ROUGE-1", "ROUGE-L")},
                }
                for section, chosen in sorted(sections.items(), key=lambda item: -len(item[1]))
                if section
            },
        }
    return {"n": len(records), "n_clean": len(clean), "systems": result, "rows": rows}


def _mean_interval(values: np.ndarray, seed: int) -> dict[str, float | None]:
    """Mean and 95% bootstrap interval; no interval from fewer than five rows."""
    means = values[resamples(len(values), seed)].mean(1) if len(values) >= 5 else None
    low, high = np.quantile(means, [0.025, 0.975]).tolist() if means is not None else (None, None)
    return {"value": float(values.mean()), "low": low, "high": high}


def evaluate_run(
    experiment, predictions: dict[str, list[dict]], records: list[dict], train: list[dict], leaked, others: dict
) -> dict:
    """The content of metrics.json: base, fine-tuned and the systems without a model, scored alike.

    `predictions`: {"base": rows, "finetuned": rows} of 03; `records` the evaluation rows, `train` the rows trained on;
    `others`: what `data.others` found, scored on its own rows.
    """
    systems = {name: [row["prediction"] for row in rows] for name, rows in predictions.items()} | without_model(
        records, train
    )
    scores = evaluate_systems(records, systems, leaked, experiment.seed, predictions)
    rows = scores.pop("rows")
    chosen = {"all": np.arange(len(records))}
    if 0 < scores["n_clean"] < len(records):
        chosen["clean"] = np.array([i for i, r in enumerate(records) if r["id"] not in leaked])
    pairs = {k: paired_test(rows["base"], rows["finetuned"], c, experiment.seed) for k, c in chosen.items()}
    text = text_statistics([r["summary"] for r in records], records)
    return {
        "run_id": experiment.run_id,
        "dataset": experiment.data.dataset,
        "split": experiment.data.eval_split,
        **scores,
        "others": score_others(others, experiment.seed),
        "reference_text": text,
        "paired": {"finetuned minus base": pairs},
        "per_row": {
            name: {
                "ROUGE-1": rows[name]["ROUGE-1"].round(6).tolist(),
                "ROUGE-L": rows[name]["ROUGE-L"].round(6).tolist(),
            }
            for name in predictions
        },
        "settings": settings(experiment.seed),
    }


def settings(seed: int) -> dict:
    """Which scorer, which version, which signature is behind every column."""
    signature = metric("summary_bleu").compute(predictions=["a"], references=["a"])["signature"]
    versions = {name: importlib.metadata.version(name) for name in ("rouge-score", "sacrebleu", "evaluate")}
    return {
        "columns": COLUMNS | (BERTSCORE if bert_scorer() else {}),
        "sacrebleu signature": signature,
        "bert-score hash": bert_scorer().hash if bert_scorer() else None,
        "versions": versions,
        "bootstrap": BOOTSTRAP,
        "seed": seed,
    }
