"""Files of one's own: what is read and what is refused, one case a line. No refusal shows a row's text."""

import gzip
import io
import json
import os
import string
import zipfile

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src import data, recipes, runs
from src.data import DataError

SECRET = "Mrs-Smith-of-Elm-Street"  # in every row: must never stand in a message
TALK = f"Doctor: hello {SECRET}, how are you?"
GOOD = [{"dialogue": f"{TALK} {n}", "summary": f"Fine {n}."} for n in range(4)]


def table(header="dialogue,summary", rows=("a1,b1", "a2,b2", "a3,b3"), end="\n"):
    return end.join([header, *(f"{SECRET} {row}" for row in rows)]) + end


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


def parquet(rows, **options):
    found = io.BytesIO()
    (rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows)).to_parquet(found, **options)
    return found.getvalue()


def with_column(**values):
    """Good rows with more columns."""
    return [row | values for row in GOOD]


def zipped(name):
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w") as archive:
        archive.writestr(name, "x")
    return found.getvalue()


UNQUOTED = f"dialogue,summary\n{TALK},Fine.\na,b\n"
SHORT = f"dialogue,summary\n{TALK.replace(',', '')}\na,b\n"
DEEP = '{"dialogue": ' + "[" * 50_000 + "]" * 50_000 + ', "summary": "b"}'
READ = {  # what: (file name, content, rows expected)
    **{
        f"{words} between {mark!r}, {suffix}": (f"x{suffix}", table(words.replace(",", mark), [f"a{mark}b"] * 3), 3)
        for mark in ",;\t"
        for suffix in (".csv", ".tsv", ".txt", ".CSV", "")
        for words in ("dialogue,summary", "Dialogue,Summary", " DIALOGUE , SUMMARY ")
    },
    **{f"line ends {end!r}": ("x.csv", table(end=end), 3) for end in ("\n", "\r\n", "\r")},
    "BOM": ("x.csv", "\ufeff" + table(), 3),
    "blank lines": ("x.csv", table().replace("\n", "\n\n"), 3),
    "index without a name": ("x.csv", table(",dialogue,summary", ["0,a,b", "1,c,d"]), 2),
    "other columns": ("x.csv", table("n,dialogue,summary,more", ["0,a,b,c", "1,c,d,e"]), 2),
    "MTS-Dialog's names": ("x.csv", "ID,section_header,section_text,dialogue\n1,CC,b,a\n2,CC,d,c\n", 2),
    "quoted line ends and commas": ("x.csv", 'dialogue,summary\n"a, b\nc ""d""",e\n', 1),
    "quotes inside a field": ("x.csv", 'dialogue,summary\nhe said "no",e\n', 1),
    "None is text": ("x.csv", table(rows=["a,None", "b,NA", "c,nan", "d,null"]), 4),
    **{f"JSON list as {s or 'no suffix'}": (f"x{s}", json.dumps(GOOD), 4) for s in (".json", ".jsonl", ".txt", "")},
    **{f"JSONL as {s or 'no suffix'}": (f"x{s}", lines(*GOOD), 4) for s in (".jsonl", ".json", ".ndjson", ".txt", "")},
    "indented JSON": ("x.json", json.dumps(GOOD, indent=2), 4),
    "JSON with BOM and blanks": ("x.json", "\ufeff \n" + json.dumps(GOOD), 4),
    "JSONL with line separators inside": ("x.jsonl", lines({"dialogue": "a\u2028b\x85c", "summary": "d"}), 1),
    "JSONL unescaped separators": (
        "x.jsonl",
        '{"dialogue": "a\u2028b\x0bc\x85", "summary": "d"}'.replace("\x0b", ""),
        1,
    ),
    "JSONL with CRLF": ("x.jsonl", lines(*GOOD).replace("\n", "\r\n"), 4),
    "numbers as ids": ("x.jsonl", lines(*({"id": n, **row} for n, row in enumerate(GOOD))), 4),
    "null section": ("x.jsonl", lines(*with_column(section=None)), 4),
    "NaN section": ("x.jsonl", lines(*with_column(section=float("nan"))), 4),
    "number as section": ("x.jsonl", lines(*with_column(section=3)), 4),
    "objects in other columns": ("x.jsonl", lines(*with_column(notes={"a": [1]})), 4),
    "one record in a .json": ("x.json", json.dumps(GOOD[0]), 1),
    "parquet": ("x.parquet", parquet(GOOD), 4),
    "parquet, other suffix": ("x.csv", parquet(GOOD), 4),
    "parquet, header case": ("x.pq", parquet([{"Dialogue": "a", "SUMMARY": "b"}]), 1),
    "parquet, ids and null section": ("x.parquet", parquet([{"id": 3, "section": None, **GOOD[0]}]), 1),
    "parquet, index": ("x.parquet", parquet(pd.DataFrame(GOOD, index=list("abcd"))), 4),
    **{f"parquet, {c}": ("x.parquet", parquet(GOOD, compression=c), 4) for c in ("gzip", "zstd", "brotli", None)},
}
REFUSED = {  # what: (file name, content, what the message says)
    **{
        f"more fields than the header, {name}": (name, UNQUOTED, "more or fewer fields than its header in row 1")
        for name in ("x.csv", "x.CSV", "x.txt", "x.tsv", "x", "x.dat", "x.csv.bak")
    },
    **{
        f"fewer fields than the header, {name}": (name, SHORT, "more or fewer fields than its header in row 1")
        for name in ("x.csv", "x.CSV", "x.txt", "x.tsv", "x")
    },
    "uneven between tabs": ("x.tsv", "dialogue\tsummary\na\tb\tc\n", "more or fewer fields"),
    "uneven between semicolons": ("x.csv", "dialogue;summary\na;b;c\n", "more or fewer fields"),
    "many uneven rows": ("x.csv", "dialogue,summary\n" + "a,b,c\n" * 30, "and 20 more"),
    **{
        f"column twice: {header}": ("x.csv", table(header, ["a," * header.count(",") + "b"]), message)
        for header, message in {
            "dialogue,summary,summary": "column 3 (summary) twice",
            "dialogue,dialogue,summary": "column 2 (dialogue) twice",
            "id,dialogue,id,summary": "column 3 (id) twice",
            "dialogue,summary,": "column 3 twice or without a name",
            "dialogue,,summary": "column 2 twice or without a name",
            "dialogue,summary,x,x": "column 4 twice",
            "dialogue,summary,section_text": "two columns for summary",
            "dialogue,summary,Summary": "two columns for summary",
            "dialogue, dialogue ,summary": "two columns for dialogue",
            "section,section_header,dialogue,summary": "two columns for section",
            "id,ID,dialogue,summary": "two columns for id",
        }.items()
    },
    **{
        f"key twice: {key}": (
            "x.jsonl",
            lines(GOOD[0]) + f'\n{{"dialogue": "a", "summary": "b", "{key}": "c", "{key}": "d"}}',
            "line 2: a key",
        )
        for key in ("dialogue", "summary", "notes")
    },
    "key twice deeper": ("x.json", '[{"dialogue": "a", "summary": "b", "x": {"y": 1, "y": 2}}]', "a key (one that is"),
    "two keys for a field": ("x.jsonl", lines(with_column(section_text="c")[0]), "two columns for summary"),
    "parquet column for a field twice": ("x.parquet", parquet(with_column(Summary="c")), "two columns for summary"),
    **{
        f"second header {again!r}": ("x.csv", f"dialogue,summary\na,b\n{again}\nc,d\n", "the header again in row 2")
        for again in ("dialogue,summary", "Dialogue,Summary", " dialogue , summary ", '"dialogue","summary"')
    },
    "second header between tabs": ("x.tsv", "dialogue\tsummary\ndialogue\tsummary\n", "the header again in row 1"),
    "second header in JSON": (
        "x.json",
        json.dumps([*GOOD, {"dialogue": "dialogue", "summary": "Summary"}]),
        "in row 5",
    ),
    "second header, MTS": ("x.csv", "dialogue,section_text\na,b\ndialogue,section_text\n", "the header again in row 2"),
    "no header": ("x.csv", f'"{TALK}",Fine.\na,b\n', "dialogue and summary missing in every row"),
    "one column": ("x.csv", f"dialogue\n{SECRET}\n", "summary missing in every row"),
    "wrong names": ("x.csv", table("text,target"), "dialogue and summary missing in every row; up to 2 other"),
    "wrong keys": ("x.jsonl", lines({"text": SECRET, "label": SECRET}), "dialogue and summary missing in every row"),
    "key missing in a row": ("x.jsonl", lines(*GOOD, {"dialogue": SECRET}), "summary missing in row 5"),
    "another delimiter": ("x.csv", table("dialogue^summary", ["a^b"]), "missing in every row"),
    "quote left open": ("x.csv", f'dialogue,summary\n"{TALK},Fine.\na,b\n', "cannot be parsed as CSV"),
    "text after a quote": ("x.csv", f'dialogue,summary\n"{TALK}" x,Fine.\n', "cannot be parsed as CSV"),
    **{
        f"{kind} without rows": (name, content, "holds no rows")
        for kind, name, content in (
            ("empty CSV", "x.csv", ""),
            ("blank CSV", "x.csv", "\n \n".replace(" ", "")),
            ("header", "x.csv", "dialogue,summary\n"),
            ("BOM", "x.csv", "\ufeff"),
            ("JSON list", "x.json", "[]"),
            ("empty JSONL", "x.jsonl", ""),
            ("parquet", "x.parquet", parquet(pd.DataFrame({"dialogue": [], "summary": []}))),
        )
    },
    **{
        f"nothing to see in {column}: {text!r}": (
            "x.jsonl",
            lines(GOOD[0], GOOD[1] | {column: text}),
            "empty dialogue or summary in row 2",
        )
        for column in ("dialogue", "summary")
        for text in (
            "",
            " \n\t",
            "\u200b",
            "\u200b\ufeff\u2060",
            "\u00ad",
            "\u00a0\u3000",
            "\u2800",
            "\u3164",
            "\x01\x7f",
            "\u202e\u2066",
        )
    },
    "nothing to see in CSV": ("x.csv", f"dialogue,summary\n{SECRET},b\n{SECRET},\u200b\n", "in row 2"),
    **{
        f"{column} is {value!r}": ("x.jsonl", lines(GOOD[0], GOOD[1] | {column: value}), "is not text in row 2")
        for column in ("dialogue", "summary")
        for value in (None, 3, 1.5, True, [SECRET], {"a": SECRET}, float("nan"))
    },
    **{
        f"id is {value!r}": ("x.jsonl", lines({"id": 1, **GOOD[0]}, {"id": value, **GOOD[1]}), "id is missing, null")
        for value in (None, True, [1], {"a": SECRET}, float("nan"))
    },
    "id missing in a row": ("x.jsonl", lines({"id": 1, **GOOD[0]}, GOOD[1]), "id is missing, null, or no text"),
    "null id in parquet": (
        "x.parquet",
        parquet([{"id": "a", **GOOD[0]}, {"id": None, **GOOD[1]}]),
        "id is missing, null",
    ),
    "empty id": ("x.csv", table("id,dialogue,summary", [",a,b"]).replace(SECRET + " ", ""), "an empty id in row 1"),
    "invisible id": ("x.jsonl", lines(*with_column(id="\u200b")[:1]), "an empty id in row 1"),
    "id twice": ("x.jsonl", lines(*with_column(id=SECRET)), "uses an id more than once, in rows 1, 2, 3, 4"),
    "id as number and as text": ("x.jsonl", lines({"id": 1, **GOOD[0]}, {"id": "1", **GOOD[1]}), "uses an id more"),
    **{
        f"section is {value!r}": ("x.jsonl", lines(*with_column(section=value)[:1]), "section is no text and no number")
        for value in ([SECRET], {"a": SECRET}, True, [])
    },
    **{
        f"surrogate in {key}": ("x.jsonl", f'{{"{key}": "\\ud800", {json.dumps(row)[1:]}', "half of a surrogate pair")
        for key, row in (
            ("dialogue", {"summary": SECRET}),
            ("summary", {"dialogue": SECRET}),
            ("id", GOOD[0]),
            ("section", GOOD[0]),
        )
    },
    "low surrogate": ("x.json", f'[{{"dialogue": "{SECRET}\\udc00", "summary": "b"}}]', "half of a surrogate pair"),
    "NUL in JSON": ("x.jsonl", lines({"dialogue": f"{SECRET}\0", "summary": "b"}), "a NUL character"),
    "NUL in CSV": ("x.csv", f"dialogue,summary\n{SECRET}\0,b\n", "holds NUL bytes"),
    "NUL in CSV, late": ("x.csv", table() + "x" * 5000 + f",{SECRET}\0\n", "a NUL character (\\u0000) in row 4"),
    "nested lists": ("x.json", "[" * 100_000, "nested too deeply"),
    "nested objects": ("x.jsonl", '{"a":' * 100_000, "line 1: nested too deeply"),
    "nested value": ("x.jsonl", DEEP, "line 1: nested too deeply"),
    "huge number": (
        "x.jsonl",
        f'{{"dialogue": {"9" * 5000}, "summary": "b"}}',
        "cannot be parsed as JSONL (line 1: Exceeds",
    ),
    "half an object": ("x.jsonl", lines(*GOOD) + f'\n{{"dialogue": "{SECRET}', "line 5, column 14"),
    "half a list": ("x.json", json.dumps(GOOD)[:-1], "cannot be parsed as JSON (line 1, column"),
    "single quotes": ("x.json", "[{'dialogue': 'a'}]", "cannot be parsed as JSON"),
    "raw line end in a string": (
        "x.json",
        f'[{{"dialogue": "{SECRET}\n", "summary": "b"}}]',
        "Invalid control character",
    ),
    "list of texts": ("x.json", json.dumps([SECRET]), "a list whose items are not all objects"),
    "list of lists": ("x.json", json.dumps([[SECRET, "b"]]), "a list whose items are not all objects"),
    "text in JSONL": ("x.jsonl", f"{lines(*GOOD)}\n{json.dumps(SECRET)}", "line 5: not an object"),
    "object of columns": ("x.json", json.dumps({"dialogue": [SECRET], "summary": ["b"]}), "is not text in row 1"),
    "object of rows": ("x.json", json.dumps({"data": GOOD}), "missing in every row"),
    "indented record": ("x.json", json.dumps(GOOD[0], indent=1), "cannot be parsed as JSONL (line 1, column"),
    "a word": ("x.json", SECRET, "cannot be parsed as JSONL (line 1, column 1"),
    "YAML": ("x.yaml", f"- dialogue: {SECRET}\n  summary: b\n", "missing in every row"),
    "XML": ("x.xml", f"<rows>\n<dialogue>{SECRET}</dialogue></rows>", "missing in every row"),
    **{
        f"{codec}": ("x.csv", f"dialogue,summary\n{SECRET} caf\xe9 \u20ac,b\n".encode(codec), message)
        for codec, message in {
            "cp1252": "is not UTF-8: byte b'\\xe9' at offset 44 (line 2). Save the file as UTF-8",
            "utf-16": "UTF-16",
            "utf-16-le": "NUL bytes",
            "utf-16-be": "NUL bytes",
            "utf-32": "UTF-16",
        }.items()
    },
    "cut UTF-8": ("x.jsonl", lines(GOOD[0]).encode() + b'\n{"dialogue": "\xf0\x9f', "(line 2)"),
    "late byte": ("x.csv", table(rows=["a,b"] * 9000).encode() + b"\xff,b\n", "(line 9002)"),
    **{
        f"{what}": (name, content, message)
        for what, name, content, message in (
            ("gzip", "x.csv.gz", gzip.compress(table().encode()), "is a gzip archive: .* Unpack it"),
            ("gzip as csv", "x.csv", gzip.compress(table().encode()), "is a gzip archive"),
            ("xlsx", "x.xlsx", zipped("xl/workbook.xml"), "is an Excel file or a zip archive: .* as CSV in UTF-8"),
            ("zip", "x.zip", zipped("x.csv"), "is an Excel file or a zip archive: .* unpack the archive"),
            ("xls", "x.xls", b"\xd0\xcf\x11\xe0\xa1\xb1", "is an old Excel"),
            ("bzip2", "x.bz2", b"BZh91AY&SY", "bzip2"),
            ("pdf", "x.pdf", b"%PDF-1.7\n" + SECRET.encode(), "is a PDF"),
            ("xz", "x.xz", b"\xfd7zXZ\0\0", "an xz archive"),
            ("7z", "x.7z", b"7z\xbc\xaf\x27\x1c", "7z archive"),
            ("sqlite", "x.db", b"SQLite format 3\0", "SQLite"),
            ("zstandard", "x.zst", b"\x28\xb5\x2f\xfd\0", "zstandard"),
            ("npy", "x.npy", b"\x93NUMPY\1\0", "NumPy"),
            ("png", "x.png", b"\x89PNG\r\n\x1a\n", "is a picture"),
            ("arrow", "x.arrow", b"ARROW1\0\0", "Save it as parquet"),
            ("zeros", "x.csv", b"\0" * 9000, "holds NUL bytes"),
            ("bytes", "x.csv", bytes(range(1, 256)), "is not UTF-8"),
            ("parquet in name", "x.parquet", table(), "cannot be parsed as parquet (damaged, or another format"),
            ("half a parquet", "x.parquet", parquet(GOOD)[:-30], "cannot be parsed as parquet"),
            ("damaged parquet", "x.parquet", b"PAR1" + b"x" * 50 + b"PAR1", "cannot be parsed as parquet"),
            ("empty parquet", "x.parquet", b"", "cannot be parsed as parquet"),
            ("parquet of bytes", "x.parquet", parquet([{"dialogue": SECRET.encode(), "summary": b"b"}]), "is not text"),
            (
                "parquet of lists",
                "x.parquet",
                parquet([{"dialogue": [SECRET], "summary": "b"}]),
                "is not text in row 1",
            ),
            (
                "parquet with null",
                "x.parquet",
                parquet([{"dialogue": SECRET, "summary": None}, GOOD[0]]),
                "not text in row 1",
            ),
            ("parquet of others", "x.parquet", parquet([{"a": SECRET}]), "missing in every row"),
        )
    },
    "one dialogue": ("x.csv", table(rows=["a,b"]), "x.csv: 1 different dialogue(s) cannot be split"),
    "two dialogues": ("x.csv", table(rows=["a,b", "c,d", "A!,e"]), "2 different dialogue(s) cannot be split"),
}
ELSEWHERE = {  # data.train_file: what the message says
    "nothing.csv": "nothing.csv is missing: expected CSV",
    "folder": "folder is a directory: expected CSV",
    "folder/../folder/": "is a directory",
    "": "data.train_file is .. .str.: expected the path of a file",
    "https://host.invalid/x.csv": "is an address: expected .* Download it",
    "s3://bucket/x.parquet": "is an address",
    "hf://datasets/a/b": "is an address",
    "file:///tmp/x.csv": "is an address",
    "x" * 5000 + ".csv": "File name too long",
    "loop.csv": "is missing|symbolic links",
    "pipe.csv": "is no ordinary file",
    "/dev/zero": "is no ordinary file",
    "dangling.csv": "is missing",
    "a\nb.csv": "data.train_file is .* expected the path of a file",
    "~/nothing-of-this-name.csv": "is missing",
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def refused(repository, name) -> str:
    """The one line that refuses a file, after which nothing may have been written."""
    with pytest.raises((DataError, recipes.RecipeError)) as error:
        data.prepare(recipes.load("custom", {"data.train_file": name}))
    message = str(error.value)
    assert "\n" not in message and len(message) < 500 and SECRET not in message
    assert not (repository / "data").exists()
    return message


def test_there_are_as_many_cases_as_we_say():
    assert len(READ) >= 60 and len(REFUSED) + len(ELSEWHERE) >= 150


@pytest.mark.parametrize("case", READ)
def test_a_good_file_is_read_whole(repository, case):
    name, content, count = READ[case]
    path = write(repository, name, content)
    rows, dropped = data.records.usable(data.read_rows(path), path, strict=True)
    assert len(rows) == count and not dropped
    assert all(
        row["dialogue"] and row["summary"] and set(row) == {"id", "section", "dialogue", "summary"} for row in rows
    )


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_is_one_line_without_its_text(repository, case):
    name, content, expected = REFUSED[case]
    write(repository, name, content)
    message = refused(repository, name)
    assert message.startswith(name) and all(part in message for part in expected.split(" .* ")), message


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_no_file_has_its_remedy(repository, name):
    (repository / "folder").mkdir()
    (repository / "loop.csv").symlink_to("loop.csv")
    (repository / "dangling.csv").symlink_to("gone.csv")
    os.mkfifo(repository / "pipe.csv")
    with pytest.raises((DataError, recipes.RecipeError), match=ELSEWHERE[name]):
        data.prepare(recipes.load("custom", {"data.train_file": name}))


def test_a_parquet_file_that_grows_over_the_limit_is_refused(repository):
    path = write(repository, "x.parquet", parquet([{"dialogue": "word " * 300_000, "summary": "b"}] * 3))
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match="holds more than 2,000,000 characters: take fewer rows, or raise"):
        data.read_rows(path, 2)
    assert len(data.read_rows(path, 5)) == 3


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.sampled_from([",", ";", "\t"]))
def test_what_is_written_as_csv_and_json_is_read_or_refused_and_never_changed(tmp_path_factory, pairs, mark):
    import csv

    folder = tmp_path_factory.mktemp("any")
    with (folder / "x.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=mark, quoting=csv.QUOTE_ALL).writerows([("dialogue", "summary"), *pairs])
    write(folder, "x.jsonl", lines(*({"dialogue": a, "summary": b} for a, b in pairs)))
    for path in (folder / "x.csv", folder / "x.jsonl"):
        found = data.read_rows(path)
        assert [(row["dialogue"], row["summary"]) for row in found] == [
            tuple(text.replace("\r\n", "\n").replace("\r", "\n").strip() for text in pair) for pair in pairs
        ]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(string.printable + "é\u200b", max_size=200).map(str.encode)))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    for name in ("x.csv", "x.json", "x.jsonl", "x.parquet", "x"):
        path = write(tmp_path_factory.mktemp("any"), name, content)
        try:
            assert data.read_rows(path)
        except DataError as error:
            assert "\n" not in str(error)
