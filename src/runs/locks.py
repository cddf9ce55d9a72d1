"""One process a folder: a second one is told who has it. A killed process holds nothing."""

import datetime
import json
import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

from src import runs
from src.runs import files

HELD = {}  # {folder: its lock}; a lock that nothing refers to is let go


def _lock(folder: Path):
    from filelock import FileLock  # flock; where a file system has none, a file that names the process

    return HELD.setdefault(folder, FileLock(folder / ".lock", timeout=0, thread_local=False))


def hold(folder: Path, doing: str):
    """Take a folder for this process, which may already have it, and remove what a killed one left half written.

    Raises runs.RunError when another process has it. `doing`: what is done to it, "being trained".
    """
    from filelock import Timeout

    holder = folder / ".lock.json"
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if not _lock(folder).is_locked:
                _lock(folder).acquire()
        except Timeout:
            who = json.loads(holder.read_text(encoding="utf-8")) if holder.is_file() else {}
            raise runs.RunError(
                f"{files.relative(folder)} is {doing} by process {who.get('process', '?')} on {who.get('host', '?')} "
                f"since {who.get('since', '?')}: wait for it, or stop it (or delete .lock "
                "there, if that host is gone). Then run this cell again."
            ) from None
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    chain = os.environ.get("CHAIN")  # the `make run` that this process belongs to
    files.write_json(holder, {"process": os.getpid(), "host": socket.gethostname(), "since": now, "chain": chain})
    files.remove_leftovers(folder)


def release(folder: Path):
    """Let other processes have the folder."""
    (folder / ".lock.json").unlink(missing_ok=True)
    if folder in HELD:
        with suppress(OSError):  # an empty file counts as held where a copy of the folder meets no flock
            if HELD[folder].is_locked and not (folder / ".lock").stat().st_size:
                (folder / ".lock").unlink()
        HELD.pop(folder).release(force=True)


@contextmanager
def held(folder: Path, doing: str):
    """Hold a folder as long as a `with` block lasts."""
    hold(folder, doing)
    try:
        yield
    finally:
        release(folder)


@contextmanager
def set_aside_if_damaged(folder: Path, made_by: str):
    """Where the block finds damage, rename the whole folder, so that nothing of it is used, and raise Damage again."""
    try:
        yield
    except (files.Damage, FileNotFoundError) as error:
        hold(folder, "being used")
        release(folder)
        raise files.Damage(
            f"{error} {files.relative(folder)} was set aside, whole, as {files.relative(files.set_aside(folder))}: put "
            f"the right file back and rename the folder, or run notebooks/{made_by}.ipynb to make it anew."
        ) from None
