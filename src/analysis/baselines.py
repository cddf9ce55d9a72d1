"""Summaries that no run of ours made: systems without a model, and what other systems and people wrote."""

import math
import random
import re
from collections import Counter, defaultdict

import numpy as np

from src import data, recipes, scoring
from src.analysis.faithfulness import words

NUMBER_WORDS = [
    "two three four five six seven eight nine".split(),
    "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split(),
    "twenty thirty forty fifty sixty seventy eighty ninety".split(),
]
CHANGEABLE = re.compile(  # not the 2 of "2. Zocor"
    rf"\b(?:(?!\d\.\s)\d{{1,4}}|{'|'.join(word for kind in NUMBER_WORDS for word in kind)})\b", re.I
)


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
    """The most frequent training summary of each record's section; of all rows where training lacks the section."""
    by_section, of_all = defaultdict(Counter), Counter()
    for row in train:
        by_section[row["section"]][row["summary"]] += 1
        of_all[row["summary"]] += 1
    return [by_section.get(record["section"], of_all).most_common(1)[0][0] for record in records]


def nearest_summaries(records: list[dict], train: list[dict]) -> list[str]:
    """The summary of the training row whose dialogue is most similar, within the record's section where it has rows.

    Similarity is the cosine of word vectors with weights (1 + ln n) ln(N / df): n is the word's count in the dialogue,
    df the number of the N training dialogues that hold it. (scikit-learn adds 1 to the second factor by default.)
    """
    counts = [Counter(words(row["dialogue"])) for row in train]
    frequency = Counter(word for count in counts for word in count)
    idf = {word: math.log(len(train) / n) for word, n in frequency.items()}
    rows_of, weights_of, norms = defaultdict(list), defaultdict(list), np.zeros(len(train))
    for i, count in enumerate(counts):
        for word, n in count.items():
            weight = (1 + math.log(n)) * idf[word]
            rows_of[word].append(i)
            weights_of[word].append(weight)
            norms[i] += weight**2
    index = {word: (np.array(rows), np.array(weights_of[word])) for word, rows in rows_of.items()}
    sections, norms = np.array([row["section"] for row in train]), np.sqrt(np.maximum(norms, 1e-12))
    summaries = []
    for record in records:
        similarity = np.zeros(len(train))
        for word, n in Counter(words(record["dialogue"])).items():
            if word in index:
                rows, weights = index[word]
                similarity[rows] += (1 + math.log(n)) * idf[word] * weights
        similarity /= norms
        same = sections == record["section"]
        if same.any():
            similarity = np.where(same, similarity, -1)
        summaries.append(train[int(similarity.argmax())]["summary"])
    return summaries


def without_model(records: list[dict], train: list[dict]) -> dict[str, list[str]]:
    """Systems that need no model, by name. A model that scores below "whole dialogue" is worth less than a copy."""
    systems = {
        "whole dialogue": [whole_dialogue(record) for record in records],
        "LEAD-3": [lead3(record) for record in records],
        "LONGEST-3": [longest3(record) for record in records],
        "nearest training summary": nearest_summaries(records, train),
    }
    if any(record["section"] for record in records):
        systems["stock answer of the section"] = stock_answers(records, train)
    return systems


def speakers_swapped(record: dict) -> str | None:
    """The reference with the first two speakers that it names exchanged: "Ann calls Bob" as "Bob calls Ann".

    A speaker is what stands before the colon of a dialogue's line. None where the reference does not name two.
    """
    speakers = dict.fromkeys(re.findall(r"^([^:\n]+):", record["dialogue"], re.M))
    named = [name for name in speakers if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", record["summary"])][:2]
    if len(named) < 2:
        return None
    either = "|".join(re.escape(name) for name in sorted(named, key=len, reverse=True))  # "Ann Lee" before "Ann"
    return re.sub(rf"(?<!\w)(?:{either})(?!\w)", lambda name: named[name[0] == named[0]], record["summary"])


def number_changed(record: dict) -> str | None:
    """The reference with one number, drawn with the record's id as seed, changed into another of its kind.

    Kinds: the same but for its last two digits; two to nine; ten to nineteen; the tens. None without a number but 1.
    """
    text, draw = record["summary"], random.Random(record["id"])
    found = [number for number in CHANGEABLE.finditer(text) if number[0] != "1"]
    if not found:
        return None
    number = draw.choice(found)
    old, kept, last = number[0].lower(), number[0][:-2], number[0][-2:]
    if old.isdigit():
        same = [kept + str(n) for n in range(max(2, 10 ** (len(last) - 1)), 10 ** len(last))]
    else:
        same = next(kind for kind in NUMBER_WORDS if old in kind)
    new = draw.choice([other for other in same if other != old])
    return text[: number.start()] + (new.capitalize() if number[0][0].isupper() else new) + text[number.end() :]


def probes(records: list[dict], split: str) -> dict[str, tuple[str, list[str], list[str]]]:
    """References made wrong, for the rows where that can be done: {name: (which rows, wrong, right)}.

    A score that these keep is a score that a wrong summary can have. Scored like `other_systems`. A probe that can
    change no row is left out.
    """
    found = {}
    for name, change in (
        ("references, two speakers swapped", speakers_swapped),
        ("references, one number changed", number_changed),
    ):
        pairs = [(change(record), record["summary"]) for record in records]
        pairs = [(wrong, right) for wrong, right in pairs if wrong is not None]
        if pairs:
            rows = f"{split}, {len(pairs)} of {len(records)} rows"
            found[name] = (rows, [wrong for wrong, _ in pairs], [right for _, right in pairs])
    return found


def released_outputs(progress: bool = True) -> list[dict]:
    """The summaries that four EACL-2023 systems made of MTS-Dialog's validation split, system after system (CC BY 4.0).

    400 rows: ID, Dialogue, Reference Summary, Automatic Summary.
    """
    return data.read_table(data.published_file("mts_dialog", "released_outputs", progress))


def manual_scores(progress: bool = True) -> list[dict[str, float]]:
    """What people found in each row of `released_outputs`: FactualPrecision, HallucinationRate and others, 0-1."""
    rows = data.read_table(data.published_file("mts_dialog", "manual_scores", progress))
    return [{name: float(value) for name, value in row.items()} for row in rows]


def human_pairs(rows: list[dict]) -> list[tuple[str, str]]:
    """(one annotator's summary, another's): one pair for every dialogue that occurs with two different summaries."""
    summaries = defaultdict(list)
    for row in rows:
        found = summaries[data.key(row)]
        if row["summary"] not in found:
            found.append(row["summary"])
    return [(found[1], found[0]) for found in summaries.values() if len(found) > 1]


def other_systems(recipe, progress: bool = True) -> dict[str, tuple[str, list[str], list[str]]]:
    """Summaries of the recipe's dataset by other systems or people: {name: (split, summaries, references)}.

    MTS-Dialog: the released outputs; each system starts where the ids begin again. SAMSum: one annotator's summary
    against another's, from all splits. Other datasets: nothing.
    """
    systems = {}
    if recipe.data.dataset == "mts_dialog":
        rows = released_outputs(progress)
        starts = [i for i, row in enumerate(rows) if row["ID"] == rows[0]["ID"]]
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(rows)], strict=True), 1):
            summaries = [row["Automatic Summary"] for row in rows[start:end]]
            references = [row["Reference Summary"] for row in rows[start:end]]
            systems[f"EACL-2023 system {number} (released outputs)"] = ("validation", summaries, references)
    if recipe.data.dataset == "samsum":
        splits = recipes.splits("samsum")
        pairs = human_pairs([row for split in splits for row in data.load_split(recipe, split)])
        systems["one human against another"] = ("all", [one for one, _ in pairs], [other for _, other in pairs])
    return systems


def score_others(others: dict[str, tuple[str, list[str], list[str]]], seed: int) -> dict[str, dict]:
    """Score what `other_systems` found, each on its own rows: {name: {"split", "n", "all": scores with intervals}}."""
    scores = {}
    for name, (split, summaries, references) in others.items():
        n, rows = len(references), scoring.score_rows(summaries, references)
        scores[name] = {"split": split, "n": n, "all": scoring.with_intervals(rows, np.arange(n), seed)}
    return scores
