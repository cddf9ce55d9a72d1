"""A record is {"id", "section" ("" if there is none), "dialogue", "summary"}, all text: read and checked."""

import re
import unicodedata
from collections import Counter
from pathlib import Path

from src.data.tables import MAX_MB, DataError, field, refuse, shown_path, some, table

COLUMNS = "dialogue and summary (optional: id, section), or MTS-Dialog's ID, section_header, section_text, dialogue"


def read_rows(path: Path, max_mb: float = MAX_MB) -> list[dict]:
    """Read the records of a CSV, TSV, JSON, JSONL or parquet file. Line ends become \\n, other text stays ("None" too).

    Accepts MTS-Dialog's column names (ID, section_header, section_text) beside ours, in any case. Raises DataError, and
    says so of all rows that share a fault.
    """
    rows, wrong, with_id, others = [], {check: [] for check in REMEDIES}, 0, 0
    for number, row in enumerate(table(path, max_mb), 1):
        row, unused = _renamed(path, number, row)
        others = max(others, unused)
        with_id += "id" in row
        found = _faults(row)
        for fault in found:
            wrong[fault].append(number)
        if not found or found == ["id"]:
            rows.append(
                {
                    "id": str(row.get("id", number)),
                    "section": "" if row.get("section") is None else str(row["section"]),
                    "dialogue": normalise(row["dialogue"]),
                    "summary": normalise(row["summary"]),
                }
            )
    _check_columns(path, wrong, number if rows or any(wrong.values()) else 0, others)
    if not with_id:
        wrong["id"] = []
    for fault, (found, remedy) in REMEDIES.items():
        refuse(path, wrong[fault], found, remedy)
    return rows


REMEDIES = {  # fault of a row: what is said of it, what to do
    "dialogue": ("dialogue missing", "Expected every row to have it."),
    "summary": ("summary missing", "Expected every row to have it."),
    "text": ("dialogue or summary is not text", "Expected strings."),
    "id": ("id is missing, null, or no text and no number", "Give every row text or a number, or none."),
    "section": ("section is no text and no number", "Expected text or null."),
    "surrogate": ("half of a surrogate pair (\\ud800 to \\udfff)", "Replace it by a character."),
    "nul": ("a NUL character (\\u0000)", "Remove it."),
    "header": ("the header again", "Remove it there."),
}


def _faults(row: dict) -> list[str]:
    """Which of REMEDIES a row with renamed columns has. "id" also where the column is missing."""
    faults = [name for name in ("dialogue", "summary") if name not in row]
    if faults:
        return faults
    values = [row["dialogue"], row["summary"]]
    if not all(isinstance(value, str) for value in values):
        return ["text"]
    given, section = row.get("id"), row.get("section")
    if not _is_name(given):
        faults.append("id")
    if section is not None and not _is_name(section):
        if isinstance(section, float):  # not a number: how a table without a value for this row says so
            row["section"] = None
        else:
            faults.append("section")
    text = "".join([*values, str(given), str(section)])
    if re.search("[\ud800-\udfff]", text):
        faults.append("surrogate")
    if "\0" in text:
        faults.append("nul")
    if values[0].strip().lower() == "dialogue" and field(values[1]) == "summary":
        faults.append("header")
    return faults


def _is_name(value) -> bool:
    """True for text and numbers; not for true, false and not-a-number."""
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value == value


def _check_columns(path: Path, wrong: dict, total: int, others: int):
    """Refuse a file without rows, and one in which no row has a dialogue or a summary (unknown columns are counted)."""
    if not total:
        raise DataError(f"{shown_path(path)} holds no rows: expected at least one with dialogue and summary.")
    missing = [name for name in ("dialogue", "summary") if len(wrong[name]) == total]
    if missing:
        raise DataError(
            f"{shown_path(path)}: {' and '.join(missing)} missing in every row; up to {others} other column(s) in a "
            f"row. Expected the columns {COLUMNS}. Name them so in the file's first row (CSV) or keys (JSON)."
        )


def _renamed(path: Path, number: int, row: dict) -> tuple[dict, int]:
    """Name the columns of a record as in FIELDS; how many others it had. Two columns for one field are a DataError."""
    names = {}
    for name in row:
        known = field(name)
        if known in names:
            both = f"{names[known].strip()} and {name.strip()}"
            refuse(path, [number], f"two columns for {known} ({both})", "Rename or remove one.")
        if known:
            names[known] = name
    return {known: row[name] for known, name in names.items()}, len(row) - len(names)


def normalise(text: str) -> str:
    """Turn CRLF and CR into LF, which the published files mix, and strip blanks at both ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def is_empty(text: str) -> bool:
    """True if nothing of the text can be seen: blanks, control characters and characters without width."""
    return all(
        unicodedata.category(character) in ("Cc", "Cf", "Mn", "Zs", "Zl", "Zp") or character in INVISIBLE
        for character in text
    )


INVISIBLE = "\u115f\u1160\u3164\uffa0\u2800"  # letters and a pattern by their category, and blank on every screen


def usable(rows: list[dict], path: Path, strict: bool) -> tuple[list[dict], list[dict]]:
    """Return (rows with text on both sides, dropped [{"id", "reason"}]). `strict` (own files): refuse, drop nothing."""
    name = shown_path(path)
    refuse(path, [n for n, row in enumerate(rows, 1) if is_empty(row["id"])], "an empty id", "Give every row an id.")
    seen = Counter(row["id"] for row in rows)
    twice = [n for n, row in enumerate(rows, 1) if seen[row["id"]] > 1]
    if twice:
        raise DataError(
            f"{name} uses an id more than once, in {some(twice, 'row')}: every row of a file needs an id of its own."
        )
    kept, dropped, empty = [], [], []
    for number, row in enumerate(rows, 1):
        columns = [column for column in ("dialogue", "summary") if is_empty(row[column])]
        dropped += [{"id": row["id"], "reason": f"empty {column}"} for column in columns]
        (empty if columns else kept).append(number)
    if strict:
        refuse(path, empty, "empty dialogue or summary", "Fill or remove them.")
    return [rows[number - 1] for number in kept], dropped
