"""Tables as files hold them: CSV (comma, semicolon, tab or bar), JSON, JSONL and parquet, read row by row.

Reading is strict where text could be lost or swapped without a word, and no error shows a row's text (it may be a
patient's): it says which row or line, and names columns only if they are ones that a record has.
"""

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from src import runs

MAX_MB = 512  # of a file, and of the text in a parquet file; data.max_file_mb raises it
FIELDS = {  # column name in lower case: field of a record
    "id": "id", "section": "section", "section_header": "section",
    "dialogue": "dialogue", "summary": "summary", "section_text": "summary",
}  # fmt: skip
EXPECTED = "expected CSV, TSV, JSON, JSONL or parquet"
BINARY = {  # first bytes: what the file is, what to do
    b"\x1f\x8b": ("a gzip archive", "Unpack it"),
    b"BZh": ("a bzip2 archive", "Unpack it"),
    b"\xfd7zXZ": ("an xz archive", "Unpack it"),
    b"\x28\xb5\x2f\xfd": ("a zstandard archive", "Unpack it"),
    b"7z\xbc\xaf": ("a 7z archive", "Unpack it"),
    b"PK": ("an Excel file or a zip archive", "Save the sheet as CSV in UTF-8, or unpack the archive"),
    b"\xd0\xcf\x11\xe0": ("an old Excel or Word file", "Save the sheet as CSV in UTF-8"),
    b"%PDF": ("a PDF", "Copy its dialogues into a CSV"),
    b"SQLite format 3": ("a SQLite database", "Export the table as CSV"),
    b"\x93NUMPY": ("a NumPy array", "Save the rows as CSV or JSONL"),
    b"ARROW1": ("an Arrow file", "Save it as parquet"),
    b"\x89PNG": ("a picture", "Type its dialogues into a CSV"),
    b"\xff\xfe": ("text in UTF-16", "Save it as UTF-8"),
    b"\xfe\xff": ("text in UTF-16", "Save it as UTF-8"),
}


class DataError(ValueError):
    """A file or rows that cannot be used. The message says what was found and expected, where, and what to do."""


def read_table(path: Path, max_mb: float = MAX_MB) -> list[dict]:
    """All rows of a file as dictionaries, with columns and values as they are written. Raises DataError."""
    return list(table(path, max_mb))


def verified(path: Path, sha256: str, by_hand: str) -> Path:
    """The path of a file that has this sha256. Raises DataError; by_hand: what to do where it cannot be fetched."""
    found = runs.sha256_file(path)
    if found != sha256:
        raise DataError(
            f"{runs.relative(path)} has sha256 {found}, expected {sha256}: it is not the published file, or a part of "
            f"it. Delete it and run again. {by_hand}"
        )
    return path


def table(path: Path, max_mb: float = MAX_MB) -> Iterator[dict]:
    """The rows of a file one after the other. The first bytes decide what it is, not its name. Raises DataError.

    A file of more than max_mb (10^6 bytes) is refused unread. Only a JSON list is held in memory as a whole.
    """
    name = shown_path(path)
    start = _start(path, max_mb)
    try:
        if start.startswith(b"PAR1") or path.suffix.lower() in (".parquet", ".pq"):
            kind, rows = "parquet", _parquet(path, max_mb)
        elif start[:1] in (b"[", b"{") or path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
            kind, rows = ("JSON", _json(path)) if start[:1] == b"[" else ("JSONL", _jsonl(path))
        else:
            kind, rows = "CSV", _csv(path)
        yield from rows
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{name} {_not_utf8(path, kind, error)}") from None
    except MemoryError:
        raise DataError(f"{name} does not fit into this machine's memory as {kind}: give fewer rows.") from None
    except RecursionError:
        raise DataError(f"{name} cannot be parsed as {kind} (nested too deeply): {EXPECTED}.") from None
    except (ValueError, csv.Error) as error:
        raise DataError(f"{name} cannot be parsed as {kind} ({error}): {EXPECTED}.") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror or 'damaged'}): {EXPECTED}.") from None


def delimiter(path: Path) -> str:
    """The delimiter of a CSV: a comma, unless its header has dialogue and summary between semicolons, bars or tabs.

    "," for the other formats, which have none.
    """
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.read(10_000).lstrip().partition("\n")[0].replace('"', "")
    for character in ";\t|":
        if {"dialogue", "summary"} <= {field(column) for column in header.split(character)}:
            return character
    return ","


def field(column: str) -> str | None:
    """The field of a record that a column holds, whatever its case; None for a column that is not used."""
    return FIELDS.get(column.strip().lower())


def shown_path(path: Path) -> str:
    """The path for a message: on one line, at most 80 characters."""
    line = "".join(c if c.isprintable() else "?" for c in runs.relative(path))
    return line if len(line) <= 80 else f"{line[:38]}...{line[-39:]}"


def some(items: list, word: str) -> str:
    """`rows 1, 2 and 3 more`; the items are numbers, never text of a file."""
    more = f" and {len(items) - 10} more" if len(items) > 10 else ""
    return f"{word}{'s' if len(items) > 1 else ''} {', '.join(map(str, items[:10]))}{more}"


def refuse(path: Path, rows: list[int], found: str, remedy: str):
    """Raise DataError if `rows` (numbers, from 1) is not empty."""
    if rows:
        raise DataError(f"{shown_path(path)}: {found} in {some(rows, 'row')}. {remedy}")


def _start(path: Path, max_mb: float) -> bytes:
    """The first bytes of a file without BOM and blanks, after everything that needs no reading has been refused."""
    name = shown_path(path)
    if re.match(r"\w{2,}:/", runs.relative(path)):
        raise DataError(f"{name} is an address: {EXPECTED} on this machine. Download it and give the file's path.")
    try:
        if not path.is_file():
            kind = "a directory" if path.is_dir() else "no ordinary file" if path.exists() else "missing"
            raise DataError(f"{name} is {kind}: {EXPECTED} with the columns dialogue and summary at that path.")
        size = path.stat().st_size
        if size > max_mb * 1e6:
            raise DataError(
                f"{name} has {size:,} bytes: expected at most {max_mb * 1e6:,.0f}. Take fewer rows, or raise "
                "data.max_file_mb: the rows need several times the file's size in memory."
            )
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror}): {EXPECTED} that you may read.") from None
    for magic, (kind, remedy) in BINARY.items():
        if start.startswith(magic):
            raise DataError(f"{name} is {kind}: {EXPECTED}. {remedy} and give that file.")
    if b"\0" in start and not start.startswith(b"PAR1"):
        raise DataError(f"{name} holds NUL bytes, so it is not text: {EXPECTED}, text in UTF-8.")
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()


def _not_utf8(path: Path, kind: str, error: UnicodeDecodeError) -> str:
    """Where the first byte is that is not UTF-8. A chunk's error does not know its place in the file."""
    if kind == "parquet":
        return f"has text that is not UTF-8 ({error.reason}): write the file again from text."
    raw = path.read_bytes()
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as found:
        error = found
    line = raw.count(b"\n", 0, error.start) + 1
    where = f"byte {raw[error.start : error.start + 1]!r} at offset {error.start} (line {line})"
    return f"is not UTF-8: {where}. Save the file as UTF-8 text and run again."


def _csv(path: Path) -> Iterator[dict]:
    """Rows named by the header. Only the first column may lack a name, as a table's index does."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = (fields for fields in csv.reader(file, delimiter=delimiter(path), strict=True) if fields)
        header = next(lines, [])
        wrong = [n for n, name in enumerate(header, 1) if name in header[: n - 1] or (n > 1 and not name.strip())]
        if wrong:
            known = {field(header[n - 1]) for n in wrong} - {None}
            which = some(wrong, "column") + (f" ({', '.join(sorted(known))})" if known else "")
            raise DataError(
                f"{shown_path(path)} has {which} twice or without a name in its header: expected different names. "
                "Rename or remove a column."
            )
        uneven = []
        for number, fields in enumerate(lines, 1):
            if len(fields) == len(header):
                yield dict(zip(header, fields, strict=True))
            else:
                uneven.append(number)
        refuse(path, uneven, "more or fewer fields than its header", "Quote fields that hold the delimiter.")


def _json(path: Path) -> Iterator[dict]:
    rows = _parsed(path.read_text(encoding="utf-8-sig"))
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a list whose items are not all objects")
    yield from rows


def _jsonl(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = _parsed(line, f"line {number}: ")
                if not isinstance(row, dict):
                    raise ValueError(f"line {number}: not an object")
                yield row


def _parsed(text: str, where: str = ""):
    """The value of a JSON text. The message of its ValueError gives the place, and none of the text."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = where.replace(": ", f", column {error.colno}: ") or f"line {error.lineno}, column {error.colno}: "
        raise ValueError(f"{place}{error.msg}") from None
    except RecursionError:
        raise ValueError(f"{where}nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def _object(pairs: list[tuple]) -> dict:
    twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
    if twice:
        names = [field(key) or "one that is not used" for key in twice[:1]]
        raise ValueError(f"a key ({names[0]}) more than once in an object")
    return dict(pairs)


def _parquet(path: Path, max_mb: float) -> Iterator[dict]:
    """Rows of the columns that a record has, a thousand at a time; their text together is at most max_mb."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = [n for n, name in enumerate(names, 1) if name in names[: n - 1] and field(name)]
            if twice:
                raise DataError(f"{shown_path(path)} has {some(twice, 'column')} twice: rename or remove a column.")
            wanted, held = [name for name in names if field(name)], 0
            rows = (batch.to_pylist() for batch in file.iter_batches(1000, columns=wanted))
            for row in itertools.chain.from_iterable(rows):
                held += sum(len(value) for value in row.values() if isinstance(value, str))
                if held > max_mb * 1e6:
                    raise DataError(
                        f"{shown_path(path)} holds more than {max_mb * 1e6:,.0f} characters: take fewer rows, or raise "
                        "data.max_file_mb."
                    )
                yield row
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"damaged, or another format ({type(error).__name__})") from None
