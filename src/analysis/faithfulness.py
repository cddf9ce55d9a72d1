"""What ROUGE does not see: numbers of a summary that its dialogue lacks, and word pairs of its own. Warning signs only.

A fluent wrong sentence made of the dialogue's own words is never flagged. Notebook 05 compares the signs with people;
benchmarks/README.md says how often they err, and why drugs and negations are not among them.
"""

import functools
import math
import re

import numpy as np
from text_to_num import alpha2digit

ENUMERATOR = re.compile(r"(?:^\s*|(?<=\n)\s*|(?<=\.)\s+)[1-9]\.(?=\s)")  # "1. Aspirin. 2. Zocor." holds no numbers
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # the comma of 1,500
DECADES = "twenties thirties forties fifties sixties seventies eighties nineties".split()  # from 20 on
MONTHS = "january february march april may june july august september october november december".split()
NUMBER = re.compile(r"\d+(?:\.\d+)?")
QUARTERS = {"quarter past": "15", "half past": "30", "quarter to": "45"}
CLOCK = re.compile(r"\b(\d\d?):(\d\d)\b")
TWO_PARTS = re.compile(r"(?<![\d.])(\d\d?) (\d\d(?:\.\d+)?)(?![\d/:])")  # "one twenty" is 1 20, "one o two" 1 02


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits; . ' / - join within a word (2.5, don't, 120/80, follow-up)."""
    return re.findall(r"[a-z0-9]+(?:[.'/-][a-z0-9]+)*", text.lower())


def facts(text: str) -> set[str]:
    """The numbers that a text states, in digits or in words (read by text2num), each as digits.

    "forty first" is 41, "nineteen eighty eight" 1988, "one twenty over eighty" 120 and 80, "eleven thirty" 11 and 30,
    "1,500" 1500, "04/15/2005" 4, 15 and 2005, and "12.0" 12. 0 and 1 are left out, because "a week" is "1 week".
    """
    return set(_read(text)[0])


def unsupported(summary: str, dialogue: str) -> set[str]:
    """Numbers of the summary that its dialogue lacks. Empty is no proof of a faithful summary.

    The dialogue is read generously: a month's name supports its number, 1988 supports 88 and 88 supports 1988,
    "two thirty" supports 2, 30 and 230, and "quarter past" 15.
    """
    return set(_read(summary)[0] - _read(dialogue)[1])


@functools.lru_cache(maxsize=16384)  # a dialogue is held against the summaries of all systems
def _read(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """The numbers that a text states, and all that it supports."""
    text = THOUSANDS.sub("", ENUMERATOR.sub(" ", text.lower())).replace("\n", " . ")
    text = re.sub(r"(?<=[a-z])(?:-(?=[a-z])|'s\b)", " ", text)  # sixty-three-year-old
    text = alpha2digit(re.sub(r"\boh\b", "o", text), "en", threshold=0)
    for n, decade in enumerate(DECADES, 2):
        text = text.replace(decade, str(10 * n))  # "in her eighties" is "in her 80s"
    text = re.sub(r"(?<!\d)\.(?=\d)|\bpoint (?=\d)", "0.", text)
    joined = TWO_PARTS.sub(lambda two: two[1] + two[2] if two[1] in ("1", "19", "20") else two[0], text)
    stated = {_digits(number) for number in NUMBER.findall(joined)}
    known = stated | {_digits(number) for number in NUMBER.findall(text)}
    known |= {_digits(first + second) for first, second in TWO_PARTS.findall(text)}
    known |= {_digits(f"{hour}.{minute}") for hour, minute in CLOCK.findall(text)}  # 4:30 is written 4.30 too
    known |= {minutes for spoken, minutes in QUARTERS.items() if spoken in text}
    known |= {str(n) for n, month in enumerate(MONTHS, 1) if re.search(rf"\b{month}\b", text)}
    for year in [number for number in known if re.fullmatch(r"(?:19|20)?\d\d|\d", number)]:
        known |= {_digits(year[2:])} if len(year) == 4 else {f"19{year:0>2}", f"20{year:0>2}"}
    return frozenset(stated - {"0", "1"}), frozenset(known)


def _digits(number: str) -> str:
    """12.0 as 12, 2.50 as 2.5, 05 as 5; 120 stays."""
    whole, _, rest = number.partition(".")
    return ".".join(filter(None, (whole.lstrip("0") or "0", rest.rstrip("0"))))


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
    n, references, found = len(records), [record["summary"] for record in records], {}
    for name, texts in (systems | {"reference": references}).items():
        pairs = [(text, record["dialogue"]) for text, record in zip(texts, records, strict=True)]
        length, novel = sum(len(text.split()) for text in texts), [novel_bigrams(*pair) for pair in pairs]
        found[name] = {
            "mean words": length / n,
            "words per reference word": length / sum(len(reference.split()) for reference in references),
            "novel bigrams": None if np.isnan(novel).all() else float(np.nanmean(novel)),
            "rows with unsupported numbers": sum(bool(unsupported(*pair)) for pair in pairs) / n,
            "empty": sum(not text.strip() for text in texts) / n,
        }
        ends = [answer["stop"] for answer in answers.get(name, ())]
        if ends:
            found[name] |= {"ended by EOS": ends.count("eos") / n, "hit the length cap": ends.count("length") / n}
    return found
