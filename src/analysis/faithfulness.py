"""What ROUGE does not see: numbers, drugs and negations of a summary, held against its dialogue. Warning signs only.

A fluent wrong sentence made of the dialogue's own words is never flagged. Notebook 05 compares the signs with people.
"""

import math
import re

import numpy as np

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = {word: 10 * n for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
NUMBER_WORDS = {word: n for n, word in enumerate(UNITS)} | TENS
DECADES = {word[:-1] + "ies": n for word, n in TENS.items()}  # "in her eighties" is "in her 80s"
ENUMERATOR = re.compile(r"(?:(?<=^)|(?<=[.\n]))\s*[1-9]\.(?=\s)")  # "1. Aspirin. 2. Zocor." holds no numbers
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # the comma of 1,500
NEGATION = re.compile(
    r"\b(?:no|not|none|never|nothing|nor|neither|without|den(?:y|ies|ied)|negative|unremarkable)\b|n't\b"
)
# -ide and -terol only behind a drug's stem: "provide", "outside", "suicide" and "cholesterol" are no drugs
DRUG = re.compile(
    r"(?:cillin|mycin|micin|floxacin|cycline|azole|pril|sartan|olol|dipine|statin|formin|gliptin|glitazone|prazole|"
    r"tidine|setron|triptan|profen|oxicam|coxib|codone|morphone|barbital|azepam|zolam|oxetine|aline|traline|parin|"
    r"xaban|lukast|sone|solone|mab|(?:bu|me|mo|lan)terol|"
    r"(?:semide|tanide|amide|domide|zide|buride|piride|glutide|natide|reotide|sonide|olide|steride))$"
)


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits; . ' / - join within a word (2.5, don't, 120/80, follow-up)."""
    return re.findall(r"[a-z0-9]+(?:[.'/-][a-z0-9]+)*", text.lower())


def facts(text: str) -> set[str]:
    """Numbers as digits, and words of at least seven letters with a drug's ending.

    "thirty-two" is 32, "nineteen eighty eight" 1988, "three hundred" 300, "1,500" 1500 and "12.0" 12.
    0 and 1 are left out, because "a week" is "1 week".
    """
    parts = [part for word in words(THOUSANDS.sub("", ENUMERATOR.sub(" ", text))) for part in word.split("-")]
    found = {part for part in parts if len(part) >= 7 and DRUG.search(part)}
    for part in parts:
        found.update(_digits(number) for number in re.findall(r"\d+(?:\.\d+)?", part))
        if part in DECADES:
            found.add(str(DECADES[part]))
    position = 0
    while position < len(parts):
        if parts[position] in NUMBER_WORDS:
            value, position = _spoken(parts, position)
            found.add(str(value))
        else:
            position += 1
    return found - {"0", "1"}


def _digits(number: str) -> str:
    """12.0 as 12, 2.50 as 2.5; 120 stays."""
    return number.rstrip("0").rstrip(".") if "." in number else number


def _spoken(parts: list[str], start: int) -> tuple[int, int]:
    """The number that the words from `start` spell, and the position behind it."""
    value, position = _below_hundred(parts, start)
    for unit, name in ((1000, "thousand"), (100, "hundred")):
        if parts[position : position + 1] == [name]:
            value, position = value * unit, position + 1
            if parts[position : position + 1] == ["and"] and _is_number(parts, position + 1):
                position += 1
            if _is_number(parts, position):
                rest, position = _spoken(parts, position)
                value += rest
            return value, position
    if 11 <= value <= 20:  # years: nineteen eighty eight, nineteen o five
        after_zero = parts[position : position + 1] in (["o"], ["oh"])
        year = position + 1 if after_zero else position
        if _is_number(parts, year) and (after_zero or NUMBER_WORDS[parts[year]] >= 10):
            rest, position = _below_hundred(parts, year)
            value = 100 * value + rest
    return value, position


def _is_number(parts: list[str], position: int) -> bool:
    return position < len(parts) and parts[position] in NUMBER_WORDS


def _below_hundred(parts: list[str], start: int) -> tuple[int, int]:
    value = NUMBER_WORDS[parts[start]]
    if value >= 20 and _is_number(parts, start + 1) and 1 <= NUMBER_WORDS[parts[start + 1]] <= 9:
        return value + NUMBER_WORDS[parts[start + 1]], start + 2
    return value, start + 1


def unsupported(summary: str, dialogue: str) -> set[str]:
    """Numbers and drug-like words of the summary that its dialogue lacks. Empty is no proof of a faithful summary."""
    return facts(summary) - facts(dialogue)


def lost_negations(summary: str, dialogue: str) -> bool:
    """Whether the dialogue negates something ("no", "denies", "n't") and the summary nothing at all."""
    return bool(NEGATION.search(dialogue.lower())) and not NEGATION.search(summary.lower())


def novel_bigrams(summary: str, dialogue: str) -> float:
    """Share of the summary's word pairs that the dialogue lacks; nan for a summary of fewer than two words."""
    own, source = words(summary), words(dialogue)
    pairs = list(zip(own, own[1:], strict=False))
    known = set(zip(source, source[1:], strict=False))
    return sum(pair not in known for pair in pairs) / len(pairs) if pairs else math.nan


def statistics(systems: dict[str, list[str]], records: list[dict], answers: dict[str, list[dict]]) -> dict[str, dict]:
    """Lengths in words and shares of rows (0-1) for every system, and for the references under "reference".

    `answers`: prediction rows of the systems that were generated; for these also how generation ended.
    """
    texts = systems | {"reference": [record["summary"] for record in records]}
    return {name: _statistics(texts[name], records, answers.get(name)) for name in texts}


def _statistics(predictions: list[str], records: list[dict], answers: list[dict] | None) -> dict[str, float | None]:
    n, pairs = len(records), [(p, r["dialogue"]) for p, r in zip(predictions, records, strict=True)]
    lengths = sum(len(prediction.split()) for prediction in predictions)
    novel = [novel_bigrams(*pair) for pair in pairs]
    found = {
        "mean words": lengths / n,
        "words per reference word": lengths / sum(len(record["summary"].split()) for record in records),
        "novel bigrams": None if np.isnan(novel).all() else float(np.nanmean(novel)),
        "rows with unsupported numbers or drugs": sum(bool(unsupported(*pair)) for pair in pairs) / n,
        "rows that lose every negation": sum(lost_negations(*pair) for pair in pairs) / n,
        "empty": sum(not prediction.strip() for prediction in predictions) / n,
    }
    if answers:
        found["ended by EOS"] = sum(answer["stop"] == "eos" for answer in answers) / n
        found["hit the length cap"] = sum(answer["stop"] == "length" for answer in answers) / n
    return found
