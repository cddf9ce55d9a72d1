"""Files that are written whole or not at all, and errors that say which notebook writes a missing one."""

import json
import os
from hashlib import file_digest
from pathlib import Path

from src import runs


def write_atomic(path: Path, text: str) -> Path:
    """Write UTF-8 text under a temporary name and rename it, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: Path, value) -> Path:
    return write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows) -> Path:
    return write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path, made_by: str):
    """Parse a JSON file that an earlier notebook wrote. A missing file is an error that names that notebook."""
    return json.loads(_read(path, made_by))


def read_jsonl(path: Path, made_by: str) -> list[dict]:
    """The rows of a JSONL file that an earlier notebook wrote. A missing file is an error that names that notebook."""
    return [json.loads(line) for line in _read(path, made_by).split("\n") if line]


def _read(path: Path, made_by: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{relative(path)} is missing: run notebooks/{made_by}.ipynb first.")
    return path.read_text(encoding="utf-8")


def relative(path: Path) -> str:
    """The path as a user of the repository writes it: relative to the root, with forward slashes."""
    path = Path(path)
    return path.relative_to(runs.ROOT).as_posix() if path.is_relative_to(runs.ROOT) else str(path)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
