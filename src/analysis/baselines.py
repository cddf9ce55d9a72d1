"""Summaries that no run of ours made: systems without a model, and what other systems and people wrote."""

import math
import random
import re
from collections import Counter, defaultdict

import numpy as np
from scipy import sparse

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
    dialogues_with = Counter(word for count in counts for word in count)
    column = {word: i for i, word in enumerate(dialogues_with)}
    idf = {word: math.log(len(train) / n) for word, n in dialogues_with.items()}

    def vectors(counts: list[Counter]) -> sparse.csr_array:
        known = [[(word, n) for word, n in count.items() if word in column] for count in counts]
        weights = [(1 + math.log(n)) * idf[word] for row in known for word, n in row]
        columns = np.array([column[word] for row in known for word, _ in row], dtype=int)
        ends = np.cumsum([0, *map(len, known)])
        return sparse.csr_array((weights, columns, ends), shape=(len(counts), len(column)))

    trained, sections, summaries = vectors(counts), np.array([row["section"] for row in train]), []
    norms = np.sqrt(np.maximum((trained * trained).sum(axis=1), 1e-12))
    for record in records:
        similarity = trained @ vectors([Counter(words(record["dialogue"]))]).toarray()[0] / norms
        same = sections == record["section"]
        if same.any():
            similarity = np.where(same, similarity, -1)
        summaries.append(train[int(similarity.argmax())]["summary"])
    return summaries


def without_model(records: list[dict], train: list[dict]) -> dict[str, list[str]]:
    """Systems that need no model, by name. A model that scores below "whole dialogue" is worth less than a copy."""
    systems = {
        "whole dialogue": [record["dialogue"] for record in records],
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
    changes = {"references, two speakers swapped": speakers_swapped, "references, one number changed": number_changed}
    found = {}
    for name, change in changes.items():
        wrong = {i: text for i, record in enumerate(records) if (text := change(record)) is not None}
        if wrong:
            rows = f"{split}, {len(wrong)} of {len(records)} rows"
            found[name] = (rows, list(wrong.values()), [records[i]["summary"] for i in wrong])
    return found


def released_outputs() -> list[dict]:
    """The summaries that four EACL-2023 systems made of MTS-Dialog's validation split, system after system (CC BY 4.0).

    400 rows: ID, Dialogue, Reference Summary, Automatic Summary.
    """
    return data.read_table(data.published_file("mts_dialog", "released_outputs"))


def manual_scores() -> list[dict[str, float]]:
    """What people found in each row of `released_outputs`: FactualPrecision, HallucinationRate and others, 0-1."""
    rows = data.read_table(data.published_file("mts_dialog", "manual_scores"))
    return [{name: float(value) for name, value in row.items()} for row in rows]


def human_pairs(rows: list[dict]) -> list[tuple[str, str]]:
    """(one annotator's summary, another's): one pair for every dialogue that occurs with two different summaries."""
    summaries = defaultdict(list)
    for row in rows:
        found = summaries[data.key(row)]
        if row["summary"] not in found:
            found.append(row["summary"])
    return [(found[1], found[0]) for found in summaries.values() if len(found) > 1]


def other_systems(recipe) -> dict[str, tuple[str, list[str], list[str]]]:
    """Summaries of the recipe's dataset by other systems or people: {name: (split, summaries, references)}.

    MTS-Dialog: the released outputs, of each system as many as there are ids. SAMSum: one annotator's summary
    against another's, from all splits. Other datasets: nothing.
    """
    systems = {}
    if recipe.data.dataset == "mts_dialog":
        rows = released_outputs()
        n = len({row["ID"] for row in rows})
        for number, system in enumerate((rows[start : start + n] for start in range(0, len(rows), n)), 1):
            texts = ([row[column] for row in system] for column in ("Automatic Summary", "Reference Summary"))
            systems[f"EACL-2023 system {number} (released outputs)"] = ("validation", *texts)
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
