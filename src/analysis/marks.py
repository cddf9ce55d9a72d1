"""Marks inside a summary: words that the reference has, and numbers, drugs and words that the dialogue lacks.

They show where to look, not what is wrong: a new word is often a good paraphrase, and a wrong sentence made of the
dialogue's own words has no mark. As HTML for pages, as plain text for a terminal.
"""

import functools
import re
import unicodedata

from markupsafe import Markup

from src.analysis.faithfulness import facts, unsupported

WORD = re.compile(r"([^\W_]+(?:[.'’/-][^\W_]+)*)")
DRUG = re.compile(  # endings that the WHO gives to names of drugs
    r"[a-z]{2,}(?:azepam|azole|caine|cillin|codone|coxib|cycline|dipine|dronate|floxacin|formin|gliptin|mycin|olol"
    r"|oprazole|parin|phylline|prazole|pril|profen|sartan|semide|setron|statin|thiazide|triptan|vir|zosin|oxetine)s?"
)
COMMON = frozenset(  # words that say nothing new
    "a about after all also an and any are as at be because been before but by can could did do does down each for "
    "from had has have he her here him his how i if in into is it its me more my no not of off on or other our out "
    "over own she since so some such than that the their them then there these they this those through to too under "
    "until up very was we were what when where which while who will with would you your".split()
)
NAMES = {  # kind of mark: what a legend calls it
    "shared": "in the reference too",
    "number": "number that the dialogue lacks",
    "drug": "drug that the dialogue lacks",
    "new": "word that dialogue and reference lack",
}
TEXT_LEGEND = "[99?] a number or drug that the dialogue lacks; word* a word that it lacks"
EMOJI_JOINER = re.compile("(?<=[\u2600-\U0001faff\ufe0f])\u200d(?=[\u2600-\U0001faff])")
BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that are drawn as nothing


def visible(text: str) -> str:
    """The text with control, ANSI, bidi, zero-width and other unseen characters written out, so that none acts.

    Escape becomes ␛, a right-to-left override ‹U+202E›. Line ends, tabs and the joiners inside of an emoji stay.
    """
    joiners = {found.start() for found in EMOJI_JOINER.finditer(text)}
    return "".join(c if c in "\n\t" or i in joiners else _shown(c) for i, c in enumerate(text))


@functools.cache
def _shown(character: str) -> str:
    code = ord(character)
    if code < 32 or code == 127:
        return chr(0x2400 + code) if code < 32 else "␡"
    unseen = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in BLANK
    return f"‹U+{code:04X}›" if unseen or 0xE0100 <= code <= 0xE01EF else character


@functools.cache
def stem(word: str) -> str:
    """The word lower-cased, without possessive and ending (Porter), as stemmed ROUGE compares words."""
    return _porter().stem(re.sub(r"['’]s$", "", word.lower()))


@functools.cache
def _porter():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


@functools.lru_cache(maxsize=4096)  # a dialogue is held against several summaries
def _stems(text: str) -> frozenset[str]:
    parts = (part for word in WORD.findall(text) for part in {word, *re.split(r"[.'’/-]", word)})
    return frozenset(stem(part) for part in parts if part)


def pieces(text: str, dialogue: str, reference: str = "") -> list[tuple[str, str]]:
    """The text cut into (piece, kind), to be joined again; kind is "" or a key of NAMES."""
    parts = WORD.split(text)  # words at the odd positions
    lacking, said, wanted = _numbers(parts, unsupported(text, dialogue)), _stems(dialogue), _stems(reference)
    found = []
    for i, part in enumerate(parts):
        if not part:
            continue
        kind = ""
        if i in lacking:
            kind = "number"
        elif i % 2:
            lacks = stem(part) not in said and not _stems(part) <= said
            if lacks and DRUG.fullmatch(part.lower()):
                kind = "drug"
            elif stem(part) in wanted:
                kind = "shared"
            elif lacks and part[0].isalpha() and len(part) > 1 and part.lower() not in COMMON and not facts(part):
                kind = "new"
        elif part.isspace() and found and "\n" not in part and i + 1 < len(parts) - 1:
            kind = "space"
        found.append((part, kind))
    return _joined(found)


def _numbers(parts: list[str], flags: set[str]) -> set[int]:
    """Positions of the words that state one of the numbers, alone or with up to three that follow ("twenty three")."""
    marked, left = set(), set(flags)
    for size in range(1, 5):
        hits = set()
        for start in range(1, len(parts) if left else 0, 2):
            span = parts[start : start + 2 * size - 1]
            stated = facts("".join(span)) & left if len(span) == 2 * size - 1 else set()
            if stated and not marked & set(range(start, start + len(span))):
                hits |= stated
                marked |= set(range(start, start + len(span)))
        left -= hits
    return marked


def _joined(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbours of one kind as one piece; a space belongs to the kind that stands on both of its sides."""
    joined = []
    for i, (part, kind) in enumerate(found):
        if kind == "space":
            before, after = joined[-1][1], found[i + 1][1] if i + 1 < len(found) else ""
            kind = before if before == after == "shared" else ""
        if joined and joined[-1][1] == kind and kind in ("", "shared", "number"):
            joined[-1] = (joined[-1][0] + part, kind)
        else:
            joined.append((part, kind))
    return joined


def marked_html(text: str, dialogue: str, reference: str = "", kinds=tuple(NAMES)) -> Markup:
    """The text as escaped HTML, each piece of one of the kinds in `<span class="m-KIND">`."""
    html = Markup("")
    for piece, kind in pieces(text, dialogue, reference):
        html += Markup('<span class="m-{}">{}</span>').format(kind, visible(piece)) if kind in kinds else visible(piece)
    return html


def marked_text(text: str, dialogue: str) -> str:
    """The text for a terminal, nothing in it interpreted: see TEXT_LEGEND."""
    shown = {"number": "[{}?]", "drug": "[{}?]", "new": "{}*"}
    return "".join(shown.get(kind, "{}").format(visible(piece)) for piece, kind in pieces(text, dialogue))
