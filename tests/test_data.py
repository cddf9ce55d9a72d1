"""Data: what is read and refused, what is a leak, and the counts of the published files."""

import collections
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import sys
import tomllib

import pytest

from src import data, recipes, runs
from src.data import DataError, leaks

ROOT = runs.ROOT
needs_mts = pytest.mark.skipif(
    not (ROOT / "data/raw/mts-dialog").is_dir(), reason="the published MTS-Dialog files are not in data/raw"
)
needs_samsum = pytest.mark.skipif(
    not (ROOT / "data/raw/samsum").is_dir(), reason="the published SAMSum files are not in data/raw"
)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    return tmp_path


def custom(repository, text, name="mine.csv", overrides=None):
    (repository / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return recipes.load("custom", {"data.train_file": name, **(overrides or {})})


ROWS = "dialogue,summary\n" + "".join(f'"A: hello {n}\nB: hi",s{n}\n' for n in range(20))


def test_a_single_file_is_split_by_seed_and_copies_stay_together(repository):
    copies = "".join(
        f"a: HELLO {n} b hi!,copy{n}\n" for n in range(20)
    )  # the same dialogues but for case and punctuation
    recipe = custom(repository, ROWS + copies)
    report = data.prepare(recipe)
    assert sum(report["rows"].values()) == 40 and report["rows"] == {"train": 32, "validation": 4, "test": 4}
    assert report["leaks"]["across"] == {
        "validation in train": 0,
        "test in train": 0,
        "test in validation": 0,
    }
    first = data.load_split(recipe, "test")
    assert first == data.load_split(recipe, "test") and {r["dialogue"].count("\n") for r in first} == {0, 1}
    with pytest.raises(DataError, match="seed 42; expected .* seed 1. Run notebooks/01"):
        data.load_split(custom(repository, ROWS + copies, overrides={"data.split_seed": 1}), "test")
    assert data.load_split(custom(repository, ROWS + copies, overrides={"seed": 1}), "test") == first  # the same rows


def test_the_split_of_a_seed_never_changes():
    # rows 0 to 9 shuffled by random.Random(42) are 7 3 2 8 5 6 9 4 0 1: the first is the test row, then validation
    rows = [row(n, f"dialogue {n}") for n in range(10)]
    parts = data.split_by_seed(rows, 42, pathlib.Path("mine.csv"))
    assert {split: [r["id"] for r in part] for split, part in parts.items()} == {
        "train": ["2", "8", "5", "6", "9", "4", "0", "1"],
        "validation": ["3"],
        "test": ["7"],
    }


def test_preparing_twice_writes_the_same_bytes(repository):
    recipe = custom(repository, ROWS)
    first = data.prepare(recipe)["processed"]
    assert data.prepare(recipe)["processed"] == first == data.fingerprint(recipe)


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


def test_json_with_number_ids_null_sections_and_other_columns_is_read(repository):
    rows = [{"ID": 7, "Section": None, "Dialogue ": "a", "SUMMARY": "b", "notes": [1]}]
    (repository / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    assert data.read_rows(repository / "a.json") == [{"id": "7", "section": "", "dialogue": "a", "summary": "b"}]


@pytest.mark.parametrize("character", [";", "\t", "|"])
def test_another_delimiter_is_found_in_the_header_and_reported(repository, character):
    text = "dialogue,summary\n" + "".join(f"a{n},b\n" for n in range(10))
    assert set(data.prepare(custom(repository, text))["sources"]["train"]) == {"file", "sha256"}
    recipe = custom(repository, "\n\n" + text.replace(",", character).replace("a0", "a, then b"))
    assert data.prepare(recipe)["sources"]["train"]["delimiter"] == character
    assert {r["summary"] for r in data.train_rows(recipe)} == {"b"}
    assert "a, then b" in {r["dialogue"] for split in recipes.splits("custom") for r in data.load_split(recipe, split)}


def test_a_table_with_an_index_without_a_name_is_read(repository):
    (repository / "a.csv").write_text(",dialogue,summary\n0,a,b\n", encoding="utf-8")
    assert data.read_rows(repository / "a.csv") == [{"id": "1", "section": "", "dialogue": "a", "summary": "b"}]


def test_a_file_that_may_not_be_read_is_one_clear_error(repository, monkeypatch):
    custom(repository, ROWS)

    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", denied)
    with pytest.raises(DataError, match=r"mine.csv cannot be read \(Permission denied\)"):
        data.read_rows(repository / "mine.csv")


def test_a_file_over_the_limit_is_refused_unread_and_the_limit_can_be_raised(repository, monkeypatch):
    with (repository / "big.csv").open("wb") as file:
        file.truncate(512_000_001)  # sparse: takes no room on the disk
    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "open", lambda *arguments, **options: pytest.fail("the file was read"))
        with pytest.raises(DataError, match="big.csv has 512,000,001 bytes: expected at most 512,000,000.*max_file_mb"):
            data.read_rows(repository / "big.csv")
    with pytest.raises(DataError, match="holds NUL bytes"):  # read now, and refused after its first bytes
        data.read_rows(repository / "big.csv", 600)
    text = "dialogue,summary\n" + f"{'x' * 500_000},y\nb,c\nd,e\n" + f"{'z' * 600_000},y\n"
    with pytest.raises(DataError, match="raise data.max_file_mb"):
        data.prepare(custom(repository, text, overrides={"data.max_file_mb": 1}))
    assert data.prepare(custom(repository, text, overrides={"data.max_file_mb": 2}))["rows"]["train"] == 2


# ---------------------------------------------------------------- published files


def test_another_checksum_is_an_error_with_the_remedy(repository):
    folder = repository / "data" / "raw" / "mts-dialog"
    folder.mkdir(parents=True)
    (folder / "MTS-Dialog-TrainingSet.csv").write_text("x", encoding="utf-8")
    with pytest.raises(
        DataError,
        match=r"TrainingSet.csv has sha256 2d711.*expected 65a28.*Delete it and run again.*place it at data/raw/mts-di",
    ):
        data.prepare(recipes.load("mts_dialog"))
    assert not (repository / "data" / "processed").exists()


def test_half_of_an_unpacked_file_is_an_error_that_names_the_archive(repository):
    folder = repository / "data" / "raw" / "samsum"
    folder.mkdir(parents=True)
    for name in ("train.json", "val.json", "test.json"):
        (folder / name).write_text("[", encoding="utf-8")
    with pytest.raises(DataError, match=r"train.json has sha256.*Delete it.*place it at data/raw/samsum/corpus.7z"):
        data.prepare(recipes.load("samsum"))


def test_no_network_and_no_file_names_url_path_and_checksum(repository, monkeypatch):
    import pooch
    import requests

    def unreachable(url, file, _):
        pathlib.Path(file).write_text("half", encoding="utf-8")
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(pooch.core, "choose_downloader", lambda url, progressbar: unreachable)
    with pytest.raises(
        DataError,
        match=r"corpus.7z is missing and https://arxiv.org\S+ cannot be fetched.*a97674c.*at data/raw/samsum/corpus.7z",
    ):
        data.prepare(recipes.load("samsum"))
    assert list((repository / "data" / "raw" / "samsum").iterdir()) == []


@pytest.fixture
def downloads(monkeypatch):
    """Every download brings "abc"."""
    import pooch

    def download(url, file, _):
        pathlib.Path(file).write_bytes(b"abc")

    monkeypatch.setattr(pooch.core, "choose_downloader", lambda url, progressbar: download)


# sha256 of "abc", as published with the algorithm
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_download_is_verified_and_renamed(repository, downloads):
    assert data.fetch(repository / "raw", "x.csv", ABC, "https://host.invalid/x.csv").read_bytes() == b"abc"
    assert [p.name for p in (repository / "raw").iterdir()] == ["x.csv"]


def test_a_broken_download_never_gets_its_final_name(repository, downloads, monkeypatch):
    renamed = []
    monkeypatch.setattr(shutil, "move", lambda path, target: renamed.append(target))
    with pytest.raises(DataError, match=f"raw/x.csv from https://host.invalid/x.csv.*expected 0{{64}} but got {ABC}"):
        data.fetch(repository / "raw", "x.csv", "0" * 64, "https://host.invalid/x.csv")
    assert not renamed and list((repository / "raw").iterdir()) == []


def test_missing_files_are_unpacked_from_the_archive(repository, monkeypatch):
    import py7zr

    folder, entry = repository / "data" / "raw" / "samsum", data.source("samsum")
    folder.mkdir(parents=True)
    with py7zr.SevenZipFile(folder / "corpus.7z", "w") as archive:
        for name in ("train.json", "val.json", "test.json"):
            archive.writestr(name, name)
    for file in entry["files"].values():
        name = repository / file["name"]
        name.write_text(file["name"], encoding="utf-8")
        file["sha256"] = runs.sha256_file(folder / "corpus.7z" if file["name"] == "corpus.7z" else name)
    monkeypatch.setattr(sys.modules["src.data.prepare"], "source", lambda dataset: entry)
    (folder / "val.json").write_text("val.json", encoding="utf-8")  # placed by hand: stays
    files = data.source_files(recipes.load("samsum"))
    assert {split: path.read_text() for split, path in files.items()} == {
        "train": "train.json",
        "validation": "val.json",
        "test": "test.json",
    }
    assert sorted(os.listdir(folder)) == ["corpus.7z", "test.json", "train.json", "val.json"]


# ---------------------------------------------------------------- processed rows


def test_edited_rows_are_noticed(repository):
    recipe = custom(repository, ROWS)
    data.prepare(recipe)
    path = data.processed_dir(recipe) / "train.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("s1", "S1"), encoding="utf-8")
    with pytest.raises(DataError, match="train.jsonl is not the file that 01 wrote"):
        data.train_rows(recipe)


def test_an_own_file_that_is_gone_is_named(repository):
    recipe = custom(repository, ROWS)
    data.prepare(recipe)
    (repository / "mine.csv").unlink()
    with pytest.raises(DataError, match="mine.csv is missing: expected the file that 01 read"):
        data.train_rows(recipe)


def test_of_a_file_outside_the_repository_nothing_but_its_name_is_kept(repository, tmp_path_factory):
    home = tmp_path_factory.mktemp("alice")
    (home / "mine.csv").write_text(ROWS, encoding="utf-8")
    for given in (str(home / "mine.csv"), os.path.relpath(home / "mine.csv", repository)):
        recipe = recipes.load("custom", {"data.train_file": given})
        data.prepare(recipe)
        written = (data.processed_dir(recipe) / "report.json").read_text(encoding="utf-8")
        assert "alice" not in written and '"file": "mine.csv"' in written
        assert len(data.train_rows(recipe)) == 16
    published = recipes.load("custom", {"data.train_file": "mine.csv"})  # as a run of these rows keeps it
    assert data.train_rows(published) == data.train_rows(recipe)
    (home / "mine.csv").write_text(ROWS + "x,y\n", encoding="utf-8")
    with pytest.raises(DataError, match="The prepared rows come from"):
        data.train_rows(recipe)
    with pytest.raises(DataError, match="other.csv is missing"):
        data.train_rows(recipes.load("custom", {"data.train_file": "other.csv"}))


def test_unprepared_data_names_notebook_01(repository):
    with pytest.raises(FileNotFoundError, match="run notebooks/01_prepare_data.ipynb first"):
        data.train_rows(recipes.load("demo"))


def test_load_gives_the_rows_of_the_recipe_as_datasets(repository):
    limits = {"data.train_rows": 5, "data.validation_rows": 1, "evaluation.rows": 2}
    recipe = custom(repository, ROWS.replace("s7", "None"), overrides=limits)
    data.prepare(recipe)
    rows = data.load(recipe)
    assert {split: len(part) for split, part in rows.items()} == {"train": 5, "validation": 1, "evaluation": 2}
    assert list(rows["train"]) == data.train_rows(recipe) and list(rows["evaluation"]) == data.evaluation_rows(recipe)
    assert set(rows["train"].column_names) == {"id", "section", "dialogue", "summary"}
    both = recipes.load("custom", {**limits, "data.train_file": "mine.csv", "evaluation.split": "validation"})
    assert list(data.load(both)["validation"]) == data.validation_rows(both)
    assert list(data.load(both)["evaluation"]) == data.evaluation_rows(both) and len(data.evaluation_rows(both)) == 2


# ---------------------------------------------------------------- leaks


def row(number, dialogue):
    return {"id": str(number), "section": "", "dialogue": dialogue, "summary": "s"}


WORDS = " ".join(f"w{i}" for i in range(20))


def test_audit_finds_same_and_near_dialogues():
    rows = {
        "train": [row(1, "A: Hi there, you!"), row(2, WORDS), row(3, "a hi THERE you"), row(4, "unrelated")],
        "test": [row(1, "a - hi there; YOU"), row(2, WORDS + " x"), row(3, "something else")],
    }
    found = data.audit(rows)
    assert found["within"] == {"train": ["3"], "test": []}
    assert found["across"] == {"test in train": ["1"]}
    # 20 words have 13 sequences of 8; all of them are in the longer text
    assert found["near"] == {"test in train": [{"id": "2", "other": "2", "share": 1.0}]}


def test_seen_tells_copies_from_near_duplicates():
    # of 20 words, 14 in common are 7 of 13 sequences, and 13 in common are 6 of 13: above and below one half
    cut = [" ".join(WORDS.split()[:n] + [f"x{i}" for i in range(20 - n)]) for n in (14, 13)]
    held_out = [row(1, "other"), row(2, cut[0]), row(3, cut[1]), row(4, WORDS.upper() + "!"), row(5, WORDS + " x")]
    assert data.seen(held_out, [row(9, WORDS)]) == {"same": ["4"], "near": ["2", "5"]}


def test_dialogues_of_emoji_or_punctuation_alone_are_not_all_the_same():
    texts = ["😀", "👍", "👍 👍", "👍👍", "...", "?!"]
    assert len({data.key(row(n, text)) for n, text in enumerate(texts)}) == 5  # blanks do not count
    assert data.seen([row(1, "😀")], [row(1, "👍")]) == {"same": [], "near": []}


@pytest.mark.parametrize(("copies", "near"), [(200, ["1"]), (201, [])])
def test_sequences_in_more_than_200_training_rows_are_boilerplate(copies, near):
    train = [row(n, f"{WORDS} ending{n}") for n in range(copies)]
    assert leaks.BOILERPLATE == 200
    assert data.seen([row(1, WORDS + " other words")], train)["near"] == near
    # without the boilerplate, what is left of two dialogues still counts
    own = " ".join(f"v{i}" for i in range(20))
    train.append(row("own", f"{WORDS} {own}"))
    assert data.seen([row(1, own)], train)["near"] == ["1"]


def by_sets(records, train):
    """What `leaks.overlaps` is meant to find, from sets of words: slow, and simple enough to be believed."""
    sets = [
        {" ".join(w[i : i + 8]) for i in range(len(w) - 7)} for w in (r["dialogue"].split() for r in train + records)
    ]
    count = collections.Counter(sequence for row in sets[: len(train)] for sequence in row)
    rare = [{sequence for sequence in row if count[sequence] <= leaks.BOILERPLATE} for row in sets]
    for record in rare[len(train) :]:
        shared = {n: len(record & row) for n, row in enumerate(rare[: len(train)]) if record & row}
        yield {n: shared[n] / min(len(record), len(rare[n])) for n in sorted(shared, key=lambda n: (-shared[n], n))}


@pytest.mark.parametrize("seed", range(40))
def test_overlaps_are_those_of_the_words_themselves(seed):
    draw = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(draw.choice([2, 9, 40]))]
    texts = [" ".join(draw.choices(vocabulary, k=draw.randrange(30))) for _ in range(draw.randrange(280))]
    rows = [row(n, text) for n, text in enumerate(texts)]
    held, train = rows[:9], rows[9:]
    found = leaks.overlaps([leaks.sequences(r) for r in held], [leaks.sequences(r) for r in train])
    assert [list(shares.items()) for shares in found] == [list(shares.items()) for shares in by_sets(held, train)]


def test_a_long_audit_says_how_far_it_is(capsys):
    assert data.audit({"train": [row(n, f"d{n}") for n in range(20_000)], "test": []})["across"] == {
        "test in train": []
    }
    assert capsys.readouterr().out == "leak audit: 20,000 of 20,000 rows of train read\n"


def held_out(repository, train, validation, test, overrides):
    files = {"train": train, "validation": validation, "test": test}
    for split, part in files.items():
        (repository / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    recipe = recipes.load("custom", {**{f"data.{split}_file": f"{split}.jsonl" for split in files}, **overrides})
    data.prepare(recipe)
    return recipe


def test_leaked_rows_can_be_left_out_of_training(repository):
    rows = [row(n, f"d{n}") for n in range(10)]
    near = [row("near", WORDS + " x"), row("near too", "x " + WORDS)]
    overrides = {"data.drop_leaked": True, "data.train_rows": 6}
    recipe = held_out(repository, near + rows[:8], rows[7:9], [rows[5], rows[9], row("w", WORDS)], overrides)
    assert [r["id"] for r in data.train_rows(recipe)] == ["0", "1", "2", "3", "4", "6"]
    found = json.loads((data.processed_dir(recipe) / "leaks.json").read_text(encoding="utf-8"))
    assert found["across"]["test in train"] == ["5"] and found["across"]["validation in train"] == ["7"]
    assert data.report(recipe)["leaks"]["near"]["test in train"] == 1 == len(found["near"]["test in train"])
    test = data.evaluation_rows(recipe)
    assert data.seen(test, data.train_rows(recipe)) == {"same": [], "near": []}  # the leaked rows were left out
    assert data.seen(test, data.load_split(recipe, "train")) == {"same": ["5"], "near": ["w"]}


def test_leaving_out_every_training_row_is_refused(repository):
    rows = [row(n, f"d{n}") for n in range(3)]
    recipe = held_out(repository, rows, rows, rows, {"data.drop_leaked": True})
    with pytest.raises(DataError, match="data.drop_leaked leaves no row to train on"):
        data.train_rows(recipe)


@needs_mts
def test_the_published_mts_dialog_files_are_what_we_say():
    recipe = recipes.load("mts_dialog")
    report = data.prepare(recipe)
    assert report["rows"] == {"train": 1201, "validation": 100, "test1": 200, "test2": 200} and not report["dropped"]
    rows, expected = (
        data.train_rows(recipe),
        {"validation": ["4", "58"], "test1": ["96", "106"], "test2": ["59", "153"]},
    )
    assert {split: data.seen(data.load_split(recipe, split), rows)["same"] for split in expected} == expected
    near = {pair: n for pair, n in report["leaks"]["near"].items() if pair.endswith("in train")}
    assert near == {"validation in train": 0, "test1 in train": 1, "test2 in train": 5}
    assert ids_of_leaks(recipe) == "93a6e000b36b761ed9aa7b0622727247fc72d11dddc365b1428f11f324f22e9b"
    assert not any("\r" in r["dialogue"] for r in rows) and sum(r["summary"] == "None." for r in rows) == 37
    assert len(data.read_table(data.published_file("mts_dialog", "released_outputs"))) == 400
    best = data.train_rows(recipes.load("mts_dialog_best"))
    seen = [data.seen(data.load_split(recipe, split), best) for split in expected]
    assert seen == [{"same": [], "near": []}] * 3 and 1180 < len(best) < 1201


def ids_of_leaks(recipe):
    """sha256 of all ids and shares that the audit wrote: those of its first version, which used sets."""
    found = json.loads((data.processed_dir(recipe) / "leaks.json").read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


@needs_samsum
def test_the_published_samsum_files_are_what_we_say():
    recipe = recipes.load("samsum")
    report = data.prepare(recipe)
    assert report["rows"] == {"train": 14731, "validation": 818, "test": 819}
    assert report["dropped"] == {"train": [{"id": "13828807", "reason": "empty dialogue"}]}
    assert report["leaks"]["across"] == {"validation in train": 47, "test in train": 42, "test in validation": 4}
    assert report["leaks"]["near"] == {"validation in train": 8, "test in train": 6, "test in validation": 1}
    assert report["leaks"]["within"]["train"] == 487
    assert ids_of_leaks(recipe) == "ae6147cafe302ab0b4f500d825f2155a07a6f8cd909da29f8fe3faaa5d30c03a"
    assert len(data.train_rows(recipe)) == 7366
    best = data.train_rows(recipes.load("samsum_best"))
    others = [r for split in ("validation", "test") for r in data.load_split(recipe, split)]
    assert data.seen(others, best) == {"same": [], "near": []} and len(best) > 14600


def test_data_readme_names_every_checksum_and_row_count():
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    published = tomllib.loads((ROOT / "data" / "sources.toml").read_text(encoding="utf-8"))
    files = [file for dataset in published for file in data.source(dataset)["files"].values()]
    assert len(files) == 10
    for file in files:
        assert re.search(rf"\| {re.escape(file['name'])} \|.* {file['sha256']} \|", text)
    assert sorted(re.findall(r"[0-9a-f]{64}", text)) == sorted(file["sha256"] for file in files)
    for entry in published.values():
        assert entry["licence"] in text and entry["page"] in text and f"data/raw/{entry['folder']}/" in text
    assert published["mts_dialog"]["commit"] in text and published["mts_dialog"]["commit"] in files[0]["url"]
    assert re.search(r"14,731", text)
