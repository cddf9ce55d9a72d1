"""Files that are written whole or not at all, sealed against damage, and errors that say what to do about a file."""

import datetime
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from hashlib import file_digest, sha256
from pathlib import Path

from src import runs

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = dict.fromkeys(FULL, "the disk, or this user's share of it, is full") | {
    errno.EROFS: "the file system can only be read",
    errno.EACCES: "this process has no permission to write there",
    errno.EPERM: "this process has no permission to write there",
}


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A hidden name beside `path`, for a file or a folder that is removed when the block is left.

    What killed processes left under such a name is removed too. Raises runs.RunError on a full disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f".{escape(path.name)}.*.tmp"):
            if old == temporary or not _runs(old.suffixes[-2][1:]):
                remove(old)
        try:
            yield temporary
        finally:
            remove(temporary)


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A `scratch` that takes the name `path` when the block is left well: a file or folder is whole, or as before."""
    with scratch(path) as temporary:
        yield temporary
        if temporary.is_dir():
            remove(path)
        temporary.replace(path)


def _runs(process: str) -> bool:
    """Whether a process of this machine with that number runs, or may run."""
    if os.name != "posix" or not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)  # asks, and sends nothing
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def write_atomic(path: Path, text: str) -> Path:
    """Write UTF-8 text under a temporary name and rename it, so that a reader never meets half a file."""
    with aside(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # the name must not reach the disk before the text
    return path


def mark_opened(folder: Path):
    """Note that a run or an evaluation is used now: "latest" is the one opened last."""
    write_atomic(folder / ".opened", datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"))


def write_json(path: Path, value) -> Path:
    return write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows) -> Path:
    return write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path, made_by: str):
    """Parse a JSON file that an earlier notebook wrote. A missing file is an error that names that notebook."""
    return json.loads(_read(path, made_by))


def read_jsonl(path: Path, made_by: str) -> list[dict]:
    """The rows of a JSONL file that an earlier notebook wrote. A missing file is an error that names that notebook."""
    return [json.loads(line) for line in _read(path, made_by).decode().split("\n") if line]


def _read(path: Path, made_by: str) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{relative(path)} is missing: run notebooks/{made_by}.ipynb first.")
    return path.read_bytes()


def relative(path: Path) -> str:
    """The path as a user of the repository writes it: relative to the root, with forward slashes."""
    path = Path(path)
    return path.relative_to(runs.ROOT).as_posix() if path.is_relative_to(runs.ROOT) else str(path)


def public(path: str | Path) -> str:
    """What may be published of a path: where it lies in the repository; of one outside, its name alone."""
    path = Path(os.path.abspath(runs.ROOT / Path(path).expanduser()))
    return relative(path) if path.is_relative_to(runs.ROOT) else path.name


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


# --- damage -----------------------------------------------------------------------------------------------------------


class Damage(runs.RunError):
    """A file that is not the one that was written."""


def _seal(value: dict) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, value: dict) -> Path:
    """Write a JSON object whose last field, "seal", is the sha256 of the others."""
    return write_json(path, value | {"seal": _seal(value)})


def read_sealed(path: Path, made_by: str) -> dict:
    """Read what `write_sealed` wrote. Raises Damage where that was cut, edited, or written by an older version."""
    text = _read(path, made_by)
    try:
        value = json.loads(text)
        seal = value.pop("seal")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise Damage(f"{relative(path)} is not the file that was written: found no whole JSON with its seal.") from None
    if _seal(value) != seal:
        raise Damage(
            f"{relative(path)} is not the file that was written: found content of sha256 {_seal(value)}, "
            f"expected its seal {seal}."
        )
    return value


def checksums(folder: Path, pattern: str = "*") -> dict[str, str]:
    """{name: sha256} of the files of a folder that match."""
    return {path.name: sha256_file(path) for path in sorted(folder.glob(pattern)) if path.is_file()}


def differences(folder: Path, expected: dict[str, str]) -> Iterator[str]:
    """A sentence for each of these files of a folder that has another sha256 than {name: sha256}."""
    for name, sha in expected.items():
        path = folder / name
        found = sha256_file(path) if path.is_file() else "no file"
        if found != sha:
            yield f"{relative(path)} is not the file that was written: found {found}, expected sha256 {sha}."


def check(folder: Path, sealed: str, written: dict, kind: str):
    """Raise Damage unless `written`, read from the sealed file of a folder, is this folder's and holds its checksums.

    kind: the key under which it names the folder.
    """
    if written[kind] != folder.name:
        raise Damage(f"{relative(folder / sealed)} is of {kind} {written[kind]}, expected {folder.name}.")
    for difference in differences(folder, written["sha256"]):
        raise Damage(difference)


def set_aside(path: Path, beside: Path | None = None) -> Path:
    """Rename a damaged file or folder to the first free <name>.damaged-<n>, beside itself or in another folder."""
    place, n = beside or path.parent, 1
    while (place / f"{path.name}.damaged-{n}").exists():
        n += 1
    return path.rename(place / f"{path.name}.damaged-{n}")


# --- disks and kills --------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path):
    """Explain in one paragraph, as a RunError, why a path cannot be written: a full disk, no permission."""
    try:
        yield
    except Exception as error:
        why = unwritable(error)
        if why is None or isinstance(error, runs.RunError):
            raise
        name = re.sub(r"\.([^/]+)\.\d+\.tmp(?=/|$)", r"\1", relative(path))  # not the one that it has meanwhile
        there = next(p for p in (path, *path.parents) if p.is_dir())
        room = f"{shutil.disk_usage(there).free / 2**20:,.0f} MiB are free"
        raise runs.RunError(
            f"{name} cannot be written: {why} ({room}). What was written before is whole. Make room, or mend "
            "the permission, and run the same again: it goes on from there."
        ) from error


def unwritable(error: Exception) -> str | None:
    """Why a file could not be written, for an error of Python, torch or safetensors; None for any other error."""
    number = getattr(error, "errno", None)
    if number is None:
        found = re.search(r"(?:os error|code:) (\d+)", str(error))
        number = int(found[1]) if found else errno.ENOSPC if "inline_container" in str(error) else None
    return UNWRITABLE.get(number)


def remove(path: Path):
    """Delete a file, or a folder with what is in it; nothing where there is neither."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def remove_leftovers(folder: Path):
    """Delete the temporary files that killed processes left in a folder that this process holds."""
    for path in folder.rglob(".*.tmp"):
        remove(path)
