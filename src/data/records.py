"""A record is {"id", "section" ("" if there is none), "dialogue", "summary"}, all text: read from a file, and checked.

Reading is strict where text could be lost or swapped without a word. Errors show at most 80 characters of a user's row.
"""

import csv
import io
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

from src import runs

MAX_BYTES = 512_000_000  # of a file; a larger one would fill the memory before it is refused
FIELDS = {  # column name in lower case: field of a record
    "id": "id", "section": "section", "section_header": "section",
    "dialogue": "dialogue", "summary": "summary", "section_text": "summary",
}  # fmt: skip


class DataError(ValueError):
    """A file or rows that cannot be used. The message says what was found and expected, where, and what to do."""


def read_rows(path: Path) -> list[dict]:
    """Read the records of a CSV, JSON or JSONL file. Line ends become \\n, other text stays as it is ("None" too).

    Accepts MTS-Dialog's column names (ID, section_header, section_text) beside ours, in any case. Raises DataError.
    """
    table, name = read_table(path), runs.relative(path)
    if not table:
        raise DataError(f"{name} holds no rows: expected at least one with dialogue and summary.")
    rows = [(number, _renamed(path, number, row)) for number, row in enumerate(table, 1)]
    missing = [column for column in ("dialogue", "summary") if any(column not in row for _, row in rows)]
    if missing:
        lacking = [number for number, row in rows if any(column not in row for column in missing)]
        where = "every row" if len(lacking) == len(rows) else _some(lacking, "row")
        raise DataError(
            f"{name} has the columns {_shown(', '.join(table[0]))}; {', '.join(missing)} missing in {where}. Expected "
            "dialogue and summary (optional: id, section), or MTS-Dialog's ID, section_header, section_text, dialogue."
        )
    wrong = [number for number, row in rows if not all(isinstance(row[c], str) for c in ("dialogue", "summary"))]
    _refuse(path, wrong, "dialogue or summary is not text", "Expected strings.")
    wrong = [number for number, row in rows if not isinstance(row.get("id"), str | int | float)]
    if any("id" in row for _, row in rows):
        _refuse(path, wrong, "id is missing, null, a list or an object", "Give every row text or a number, or none.")
    wrong = [number for number, row in rows if isinstance(row.get("section"), dict | list)]
    _refuse(path, wrong, "section is a list or an object", "Expected text or null.")
    wrong = [number for number, row in rows if re.search("[\ud800-\udfff]", "".join(map(str, row.values())))]
    _refuse(path, wrong, "half of a surrogate pair (\\ud800 to \\udfff)", "Replace it by a character.")
    return [
        {
            "id": str(row.get("id", number)),
            "section": "" if row.get("section") is None else str(row["section"]),
            "dialogue": normalise(row["dialogue"]),
            "summary": normalise(row["summary"]),
        }
        for number, row in rows
    ]


def _renamed(path: Path, number: int, row: dict) -> dict:
    """Name the columns of a record as in FIELDS and leave out the others."""
    names = {}
    for name in row:
        field = FIELDS.get(name.strip().lower())
        if field in names:
            both = _shown(f"{names[field]} and {name}")
            _refuse(path, [number], f"two columns for {field} ({both})", "Rename or remove one.")
        if field:
            names[field] = name
    return {field: row[name] for field, name in names.items()}


def read_table(path: Path) -> list[dict]:
    """Read the rows of a CSV, JSON or JSONL file, with columns and values as they are written. Raises DataError."""
    text, name, suffix = _read_text(path), runs.relative(path), path.suffix.lower()
    kind = suffix[1:] if suffix in (".json", ".jsonl") else "CSV"
    try:
        if kind == "json":
            table = json.loads(text, object_pairs_hook=_object)
        elif kind == "jsonl":
            table = [_json_line(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        else:
            csv.field_size_limit(2**31 - 1)
            lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter(path), strict=True)
            table = [fields for fields in lines if fields]
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{name} cannot be parsed as {kind} ({error}): expected CSV, JSON or JSONL.") from None
    if kind == "CSV":
        return _with_header(path, table)
    if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
        raise DataError(f"{name} is not a list of records: expected one object with dialogue and summary a row.")
    return table


def _with_header(path: Path, table: list[list[str]]) -> list[dict]:
    """Name the fields of CSV rows by the first row. Only the first column may lack a name, as a table's index does."""
    header, rows = table[0] if table else [], list(enumerate(table[1:], 1))
    wrong = [repr(column) for n, column in enumerate(header) if column in header[:n] or (n > 0 and not column.strip())]
    if wrong:
        found = f"{_some(wrong, 'column')} twice or without a name in its header"
        raise DataError(f"{runs.relative(path)} has {found}: expected different names. Rename or remove a column.")
    uneven = [number for number, fields in rows if len(fields) != len(header)]
    _refuse(path, uneven, "more or fewer fields than its header", "Quote fields that hold commas.")
    _refuse(path, [number for number, fields in rows if fields == header], "the header again", "Remove it there.")
    return [dict(zip(header, fields, strict=True)) for _, fields in rows]


def delimiter(path: Path) -> str:
    """What stands between a file's columns: a comma, unless the header has dialogue and summary between ; or tabs."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.read(10_000).strip().partition("\n")[0]
    for character in ";\t":
        columns = next(csv.reader([header], delimiter=character), [])
        if {"dialogue", "summary"} <= {FIELDS.get(column.strip().lower()) for column in columns}:
            return character
    return ","


def _read_text(path: Path) -> str:
    name, expected = runs.relative(path), "expected a CSV, JSON or JSONL file"
    try:
        if not path.is_file():
            found = "is a directory" if path.is_dir() else "is missing"
            raise DataError(f"{name} {found}: {expected} with the columns dialogue and summary at that path.")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{name} has {size:,} bytes: {expected} of at most {MAX_BYTES:,}. Take fewer rows.")
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{_shown(name)} cannot be read ({error.strerror}): {expected} that you may read.") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{name} is not UTF-8: byte {raw[error.start : error.start + 1]!r} at offset {error.start} (line {line}). "
            "Save the file as UTF-8 text (CSV, JSON or JSONL) and run again."
        ) from None


def _json_line(line: str, number: int) -> dict:
    try:
        return json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from None


def _object(pairs: list[tuple]) -> dict:
    twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
    if twice:
        raise ValueError(f"{_some(twice, 'key')} more than once in an object")
    return dict(pairs)


def normalise(text: str) -> str:
    """Turn CRLF and CR into LF, which the published files mix, and strip blanks at both ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _shown(text: str) -> str:
    """At most 80 characters of the text, on one line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[:400]).split())
    return line if len(line) <= 80 else f"{line[:77]}..."


def _some(items: list, word: str) -> str:
    more = f" and {len(items) - 10} more" if len(items) > 10 else ""
    return f"{word}{'s' if len(items) > 1 else ''} {_shown(', '.join(map(str, items[:10])))}{more}"


def _refuse(path: Path, rows: list, found: str, remedy: str):
    """Raise DataError if `rows` (numbers or ids) is not empty."""
    if rows:
        raise DataError(f"{runs.relative(path)}: {found} in {_some(rows, 'row')}. {remedy}")


def _is_empty(text: str) -> bool:
    """True if nothing of the text can be seen: blanks, control characters and characters without width."""
    return all(unicodedata.category(character) in ("Cc", "Cf", "Mn", "Zs", "Zl", "Zp") for character in text)


def usable(rows: list[dict], path: Path, strict: bool) -> tuple[list[dict], list[dict]]:
    """Return (rows with text on both sides, dropped [{"id", "reason"}]). `strict` (own files): refuse, drop nothing."""
    name, ids = runs.relative(path), Counter(row["id"] for row in rows)
    if any(_is_empty(found) for found in ids):
        raise DataError(f"{name} has rows whose id is empty: give every row an id, or leave the column out.")
    twice = [found for found, n in ids.items() if n > 1]
    if twice:
        raise DataError(f"{name} uses {_some(twice, 'id')} more than once: every row of a file needs an id of its own.")
    texts = [(row["id"], column, row[column]) for row in rows for column in ("dialogue", "summary")]
    dropped = [{"id": found, "reason": f"empty {column}"} for found, column, text in texts if _is_empty(text)]
    if strict:
        _refuse(path, [item["id"] for item in dropped], "empty dialogue or summary", "Fill or remove them.")
    gone = {item["id"] for item in dropped}
    return [row for row in rows if row["id"] not in gone], dropped
