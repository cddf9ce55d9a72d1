# ruff: noqa: F811  fixtures of test_runs are imported and named again as arguments
"""Two processes at one folder: the second is told who has it, on which host, since when; a killed one has nothing."""

import errno
import json
import os
import re
import signal
import subprocess
import sys

import filelock
import pytest

from src import data, recipes, runs
from src.runs import RunError
from tests.test_runs import done, fast, finished, name, opened, prepared, root, scored  # noqa: F401  some are fixtures

ROOT = runs.ROOT
HOLD = """
import errno, fcntl, os, sys, time
from pathlib import Path
if sys.argv[4] == "no flock":
    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")
    fcntl.flock = flock
from src import runs
runs.ROOT, folder = Path(sys.argv[1]), Path(sys.argv[2])
try:
    with runs.held(folder, sys.argv[3]):
        (folder / f".rows.jsonl.{os.getpid()}.tmp").write_text("{")
        print("locked", flush=True)
        time.sleep(120)
except runs.RunError as error:
    print(error, flush=True)
"""


def run(finished):
    fresh = runs.Run(name({"lora.r": 2}))
    fresh.unlock()
    return fresh.folder, "being trained", lambda: opened({"lora.r": 2})


def evaluation(finished):
    found = scored(finished)
    runs.locks.release(found.folder)
    return found.folder, "being written", lambda: scored(finished)


def rows(finished):
    recipe = recipes.load("demo")
    return data.processed_dir(recipe), "being prepared", lambda: data.prepare(recipe)


@pytest.fixture(params=["flock", "no flock"])
def flock(request, monkeypatch):
    """A file system with and without flock, as some network drives are: there, a file says who has the lock."""
    if request.param == "no flock":

        def missing(*args):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(filelock._unix.fcntl, "flock", missing)
    return request.param


def second(folder, doing, flock="flock"):
    """Another process that takes the folder, and what it says."""
    command = [sys.executable, "-W", "ignore", "-c", HOLD, str(runs.ROOT), str(folder), doing, flock]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return child, child.stdout.readline()


@pytest.mark.filterwarnings("ignore:.*flock")
@pytest.mark.parametrize("kind", [run, evaluation, rows])
def test_a_second_process_is_refused_until_the_first_is_killed(finished, kind, flock):
    folder, doing, act = kind(finished)
    child, said = second(folder, doing, flock)
    try:
        assert said == "locked\n"
        half = folder / f".rows.jsonl.{child.pid}.tmp"
        who = rf"{runs.relative(folder)} is {doing} by process {child.pid} on {re.escape(os.uname().nodename)} "
        with pytest.raises(RunError, match=who + r"since 20\d\d-\d\d-\d\dT[\d:+]+: wait for it, or stop it .*Then run"):
            act()
        assert half.exists()  # nothing of another's is touched
        if kind is run:
            assert name() == finished.name  # another run may be opened meanwhile
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    act()
    assert not half.exists()
    holder = folder / ".lock.json"
    assert kind is rows and not holder.exists() or json.loads(holder.read_text())["process"] == os.getpid()


@pytest.mark.filterwarnings("ignore:.*flock")
@pytest.mark.parametrize("kind", [run, evaluation])
def test_this_process_may_open_a_folder_twice_and_others_may_not(finished, kind, flock):
    folder, doing, act = kind(finished)
    act()
    act()
    child, said = second(folder, doing, flock)
    child.kill()
    child.wait()
    assert said.startswith(
        f"{runs.relative(folder)} is {doing} by process {os.getpid()} on {os.uname().nodename} since"
    )
    runs.locks.release(folder)
    child, said = second(folder, doing, flock)
    child.kill()
    child.wait()
    assert said == "locked\n"


def test_rows_are_read_and_a_finished_run_is_opened_while_another_process_has_them(finished):
    folder, doing, _ = rows(finished)
    children = [second(folder, doing)[0], second(finished.folder, "being trained")[0]]
    try:
        assert opened()["run"] == finished and data.load_split(recipes.load("demo"), "test")
    finally:
        for child in children:
            child.kill()
            child.wait()
