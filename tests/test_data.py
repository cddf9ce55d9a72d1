"""Data: what is read and refused, what is a leak, and the counts of the published files."""

import json
import re

import pytest

from src import data, experiments
from src.data import DataError

ROOT = experiments.ROOT
needs_mts = pytest.mark.skipif(
    not (ROOT / "data/raw/mts-dialog").is_dir(), reason="the published MTS-Dialog files are not in data/raw"
)
needs_samsum = pytest.mark.skipif(
    not (ROOT / "data/raw/samsum").is_dir(), reason="the published SAMSum files are not in data/raw"
)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    return tmp_path


def custom(repository, text, name="mine.csv", **overrides):
    (repository / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return experiments.load_experiment("custom", **{"data.train_file": name, **overrides})


ROWS = "dialogue,summary\n" + "".join(f'"A: hello {n}\nB: hi",s{n}\n' for n in range(20))


def test_a_single_file_is_split_by_seed_and_copies_stay_together(repository):
    copies = "".join(
        f"a: HELLO {n} b hi!,copy{n}\n" for n in range(20)
    )  # the same dialogues but for case and punctuation
    e = custom(repository, ROWS + copies)
    report = data.prepare(e)
    assert sum(report["rows"].values()) == 40 and report["rows"] == {"train": 32, "validation": 4, "test": 4}
    assert report["leaks"]["across"] == {
        "validation in train": 0,
        "test in train": 0,
        "test in validation": 0,
    }
    first = data.load_split(e, "test")
    assert first == data.load_split(e, "test") and {r["dialogue"].count("\n") for r in first} == {0, 1}
    with pytest.raises(DataError, match="seed 42; expected .* seed 1. Run notebooks/01"):
        data.load_split(custom(repository, ROWS + copies, **{"data.split_seed": 1}), "test")
    assert data.load_split(custom(repository, ROWS + copies, seed=1), "test") == first  # other seeds, same test rows


def test_preparing_twice_writes_the_same_bytes(repository):
    e = custom(repository, ROWS)
    first = data.prepare(e)["processed"]
    assert data.prepare(e)["processed"] == first


def test_jsonl_csv_and_mts_column_names_read_alike(repository):
    (repository / "a.jsonl").write_text('{"dialogue": "A: x\\r\\nB: y ", "summary": "None"}\n', encoding="utf-8")
    (repository / "a.csv").write_bytes(
        b'\xef\xbb\xbfID,section_header,section_text,dialogue\n7,CC,None,"A: x\r\nB: y"\n'
    )
    assert data.read_rows(repository / "a.jsonl") == [
        {"id": "1", "section": "", "dialogue": "A: x\nB: y", "summary": "None"}
    ]
    assert data.read_rows(repository / "a.csv") == [
        {"id": "7", "section": "CC", "dialogue": "A: x\nB: y", "summary": "None"}
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "dialogue,text\na,b\n",
            r"mine.csv has the columns dialogue, text; summary missing in every row. Expected dialogue and summary",
        ),
        ("", r"holds no rows"),
        ("dialogue,summary\na,b\n,c\nd,\n", r"mine.csv: empty dialogue or summary in rows 2, 3"),
        ("id,dialogue,summary\n1,a,b\n1,c,d\n", r"uses id 1 more than once"),
        (
            b"dialogue,summary\na,b\nc,caf\xe9\n",
            r"mine.csv is not UTF-8: byte b'\\xe9' at offset 26 \(line 3\)",
        ),
        ("dialogue,summary\na,b,c\n", r"more or fewer fields than its header in row 1"),
        ("dialogue,summary\na,b\nc,d\n", r"2 different dialogue\(s\) cannot be split"),
    ],
)
def test_a_bad_file_is_one_clear_error_and_nothing_is_written(repository, content, message):
    with pytest.raises(DataError, match=message):
        data.prepare(custom(repository, content))
    assert not (repository / "data").exists()


def test_bad_json_and_wrong_types_are_named(repository):
    with pytest.raises(DataError, match="cannot be parsed as jsonl"):
        data.prepare(custom(repository, "{", "x.jsonl"))
    with pytest.raises(DataError, match="dialogue or summary is not text in row 1"):
        data.prepare(custom(repository, '{"dialogue": 3, "summary": "x"}', "x.jsonl"))


def test_a_missing_custom_file_is_named(repository):
    with pytest.raises(DataError, match="nothing.csv is missing"):
        data.prepare(experiments.load_experiment("custom", **{"data.train_file": "nothing.csv"}))


def test_one_held_out_file_without_the_other_is_refused(repository):
    with pytest.raises(DataError, match="give both, or neither"):
        data.prepare(custom(repository, ROWS, **{"data.test_file": "mine.csv"}))


def test_another_checksum_is_an_error_with_the_remedy(repository):
    folder = repository / "data" / "raw" / "mts-dialog"
    folder.mkdir(parents=True)
    (folder / "MTS-Dialog-TrainingSet.csv").write_text("x", encoding="utf-8")
    with pytest.raises(
        DataError,
        match=r"TrainingSet.csv has sha256 2d711.*expected 65a28.*Delete it and run again.*place it at data/raw/mts-dialog",
    ):
        data.prepare(experiments.load_experiment("mts_dialog"))
    assert not (repository / "data" / "processed").exists()


def test_no_network_and_no_file_names_url_path_and_checksum(repository, monkeypatch):
    import pooch
    import requests

    def unreachable(url, known_hash, path, fname, progressbar):
        (path / fname).write_text("half", encoding="utf-8")
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(pooch, "retrieve", unreachable)
    with pytest.raises(
        DataError,
        match=r"corpus.7z is missing and https://arxiv.org\S+ cannot be fetched.*a97674c.*place it at data/raw/samsum/corpus.7z",
    ):
        data.prepare(experiments.load_experiment("samsum"))
    assert list((repository / "data" / "raw" / "samsum").iterdir()) == []


def test_a_download_is_verified_and_renamed(repository, monkeypatch):
    import pooch

    monkeypatch.setattr(
        pooch,
        "retrieve",
        lambda url, known_hash, path, fname, progressbar: (path / fname).write_bytes(b"abc"),
    )
    # sha256 of "abc", as published with the algorithm
    sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert data.fetch(repository / "raw", "x.csv", sha, "https://host.invalid/x.csv", False).read_bytes() == b"abc"
    assert [p.name for p in (repository / "raw").iterdir()] == ["x.csv"]


def test_edited_rows_are_noticed(repository):
    e = custom(repository, ROWS)
    data.prepare(e)
    path = e.processed_dir / "train.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("s1", "S1"), encoding="utf-8")
    with pytest.raises(DataError, match="train.jsonl is not the file that 01 wrote"):
        data.train_rows(e)


def test_unprepared_data_names_notebook_01(repository):
    with pytest.raises(FileNotFoundError, match="run notebooks/01_prepare_data.ipynb first"):
        data.train_rows(experiments.load_experiment("demo"))


def row(number, dialogue):
    return {"id": str(number), "section": "", "dialogue": dialogue, "summary": "s"}


def test_audit_finds_same_and_near_dialogues():
    words = " ".join(f"w{i}" for i in range(20))
    rows = {
        "train": [row(1, "A: Hi there, you!"), row(2, words), row(3, "a hi THERE you"), row(4, "unrelated")],
        "test": [row(1, "a - hi there; YOU"), row(2, words + " x"), row(3, "something else")],
    }
    found = data.audit(rows)
    assert found["within"] == {"train": ["3"], "test": []}
    assert found["across"] == {"test in train": ["1"]}
    # 20 words have 13 sequences of 8; all of them are in the longer text
    assert found["near"] == {"test in train": [{"id": "2", "other": "2", "share": 1.0}]}


def test_leaked_rows_can_be_left_out_of_training(repository):
    rows = [{"id": str(n), "dialogue": f"d{n}", "summary": "s"} for n in range(10)]
    for split, part in (("train", rows[:8]), ("validation", rows[7:9]), ("test", rows[5:6] + rows[9:])):
        (repository / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    files = {f"data.{split}_file": f"{split}.jsonl" for split in ("train", "validation", "test")}
    e = experiments.load_experiment("custom", **files, **{"data.drop_leaked": True, "data.train_rows": 6})
    data.prepare(e)
    assert [r["id"] for r in data.train_rows(e)] == ["0", "1", "2", "3", "4", "6"]
    assert data.leaked_ids(e, "test") == {"5"} and data.leaked_ids(e, "validation") == {"7"}
    test = data.eval_rows(e)
    assert data.seen_ids(test, data.train_rows(e)) == set()  # the leaked row was left out
    assert data.seen_ids(test, data.load_split(e, "train")) == {"5"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"dialogue": "a", "summary": "b"}\n{"dialogue": "c", "summ\n', "line 2, column"),
        ('{"dialogue": "a", "summary": "b"}\n{"dialogue": "c"}\n', "summary missing in row 2"),
        ('{"dialogue": "a"}\n', "summary missing in every row"),
    ],
)
def test_an_error_in_an_own_file_names_the_line(repository, text, message):
    (repository / "own.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(data.DataError, match=message):
        data.read_rows(repository / "own.jsonl")


def test_rows_without_an_id_are_counted_from_one_and_an_empty_id_is_refused(repository):
    path = repository / "own.csv"
    path.write_text("dialogue,summary\na,b\nc,\n", encoding="utf-8")
    with pytest.raises(data.DataError, match="empty dialogue or summary in row 2"):
        data.usable(data.read_rows(path), path, strict=True)
    path.write_text("id,dialogue,summary\n,a,b\n,c,d\n", encoding="utf-8")
    with pytest.raises(data.DataError, match="rows whose id is empty"):
        data.usable(data.read_rows(path), path, strict=True)


@needs_mts
def test_the_published_mts_dialog_files_are_what_we_say():
    e = experiments.load_experiment("mts_dialog")
    report = data.prepare(e, progress=False)
    assert report["rows"] == {"train": 1201, "validation": 100, "test1": 200, "test2": 200} and not report["dropped"]
    assert data.leaked_ids(e, "validation") == {"4", "58"}
    assert data.leaked_ids(e, "test1") == {"96", "106"} and data.leaked_ids(e, "test2") == {"59", "153"}
    rows = data.train_rows(e)
    assert not any("\r" in r["dialogue"] for r in rows) and sum(r["summary"] == "None." for r in rows) == 37
    assert len(data.released_outputs(progress=False)) == 400


@needs_samsum
def test_the_published_samsum_files_are_what_we_say():
    e = experiments.load_experiment("samsum")
    report = data.prepare(e, progress=False)
    assert report["rows"] == {"train": 14731, "validation": 818, "test": 819}
    assert report["dropped"] == {"train": [{"id": "13828807", "reason": "empty dialogue"}]}
    assert len(data.leaked_ids(e, "test")) == 42 and len(data.leaked_ids(e, "validation")) == 47
    assert report["leaks"]["within"]["train"] == 487 and report["leaks"]["across"]["test in validation"] == 4
    assert len(data.train_rows(e)) == 7366
    best = data.train_rows(experiments.load_experiment("samsum_best"))
    held_out = {data.key(r) for s in ("validation", "test") for r in data.load_split(e, s)}
    assert not held_out & {data.key(r) for r in best} and len(best) > 14600


def test_data_readme_names_every_checksum_and_row_count():
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    published = [
        *data.MTS_FILES.values(),
        *data.SAMSUM_FILES.values(),
        data.RELEASED_OUTPUTS,
        data.MANUAL_SCORES,
        data.SAMSUM_ARCHIVE,
    ]
    assert len(published) == 10
    for name, sha in published:
        assert name in text and sha in text
    assert data.MTS_COMMIT in text and re.search(r"14,731", text)
