"""The rating sheet: blind, safe in a spreadsheet, read back as it was written, and counted as the textbooks do."""

import csv
import json
import re

import pandas as pd
import pytest
from scipy import stats

from src import runs
from src.analysis import ratings, tables
from tests.cells import cell

TEXTS = ["=1+1", "+cmd", "-2 mg", "@SUM(A1)", "\tx", "'Tis well.", "'=x", "", "two\nlines", 'He said "no", twice.', "ü"]
N = 12


def predictions():
    """Two systems, 12 rows; dialogues and answers are hostile, and no two answers are equal."""
    rows = [{"id": f"r{i}", "dialogue": f"{TEXTS[i % len(TEXTS)]} dialogue {i}"} for i in range(N)]
    first = [row | {"prediction": f"{TEXTS[i % len(TEXTS)]}{i}"} for i, row in enumerate(rows)]
    second = [row | {"prediction": f"{TEXTS[(i + 1) % len(TEXTS)]} other {i}"} for i, row in enumerate(rows)]
    return {"base": first, "finetuned": second}


def drawn(tmp_path, n=N, of="demo-1/test-1", seed=42):
    sheet, key = ratings.draw(of, predictions(), n, seed)
    return ratings.write(tmp_path, sheet, key), key


def cells(path, delimiter=","):
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def save(path, lines, delimiter=",", encoding="utf-8-sig"):
    with path.open("w", encoding=encoding, newline="") as file:
        table = csv.DictWriter(file, list(lines[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows(lines)
    return path


def mark(path, key, marks, reader="A. Reader (person)", **save_as):
    """Fill the sheet: marks(row number, system) is a dictionary of columns."""
    lines = cells(path)
    lines[1]["reader"] = reader
    for line in lines[1:]:
        about = key["lines"][line["sheet id"]]
        line.update(marks(int(re.search(r"\d+", about["row"])[0]), about["system"]))
    return save(path, lines, **save_as)


def all_faithful(row, system):
    return {"faithful": "1"}


def test_the_sheet_is_blind_shuffled_and_drawn_by_the_seed(tmp_path):
    path, key = drawn(tmp_path, n=6)
    lines = cells(path)
    assert list(lines[0]) == [
        "sheet id", "dialogue", "section", "summary", "faithful", "wrong speaker", "invented", "omission", "reader",
    ]  # fmt: skip
    assert lines[0]["invented"] == "it says something that the dialogue does not say"  # the line that explains
    assert len(lines) == 1 + 12 and all(line["faithful"] == "" for line in lines[1:])
    text = path.read_text(encoding="utf-8")
    assert text[0] == "\ufeff"  # without it Excel takes the file for another encoding
    assert "base" not in text and "finetuned" not in text and not re.search(r"\br\d+\b", text)
    about = [key["lines"][line["sheet id"]] for line in lines[1:]]
    systems = [line["system"] for line in about]
    assert sorted(systems) == ["base"] * 6 + ["finetuned"] * 6 and systems != sorted(systems)
    rows = [{line["row"] for line in about if line["system"] == system} for system in ("base", "finetuned")]
    assert rows[0] == rows[1] and len(rows[0]) == 6  # the same rows of both
    assert drawn(tmp_path, n=6)[1] == key
    assert {line["row"] for line in drawn(tmp_path, n=6, seed=1)[1]["lines"].values()} != rows[0]
    assert len(drawn(tmp_path, n=30)[1]["lines"]) == 2 * N  # all rows where there are fewer


def test_no_answer_runs_as_a_formula_and_all_are_read_back_unchanged(tmp_path):
    path, key = drawn(tmp_path)
    for line in cells(path):
        assert not any(cell.startswith(tuple("=+-@\t\r")) for cell in line.values())
    expected = {(system, row["id"]): row["prediction"] for system, rows in predictions().items() for row in rows}
    for delimiter in ",;\t":  # as spreadsheets of other countries save it
        saved = mark(path, key, all_faithful, delimiter=delimiter)
        read = ratings.read(saved, key)
        assert {(line["system"], line["row"]): line["summary"] for line in read} == expected
        assert [line["system"] for line in read] == ["base"] * N + ["finetuned"] * N
        save(path, cells(path, delimiter))


def test_a_spreadsheets_habits_are_no_changes(tmp_path):
    # lines sorted, a column added, line ends of Windows, and the apostrophes taken for what they are in a spreadsheet
    path, key = drawn(tmp_path)
    mark(path, key, all_faithful)
    lines = sorted(cells(path), key=lambda line: line["dialogue"], reverse=True)
    for line in lines:
        line["note"] = "mine"
        line["summary"] = line["summary"].replace("\n", "\r\n").removeprefix("'")
    assert len(ratings.read(save(path, lines), key)) == 2 * N


def test_the_key_is_written_apart_and_says_which_line_is_which(tmp_path):
    path, key = drawn(tmp_path)
    (other,) = tmp_path.glob("key-*.json")
    assert json.loads(other.read_text(encoding="utf-8")) == key and other.stem[4:] == path.stem[6:] == key["sheet"]
    assert key["of"] == "demo-1/test-1" and key["seed"] == 42
    assert not any("dialogue 3" in str(value) for value in key["lines"].values())  # no text of the data set


def test_a_filled_sheet_is_never_written_over(tmp_path):
    path, key = drawn(tmp_path)
    assert ratings.filled(tmp_path, key) == []
    mark(path, key, all_faithful)
    again, _ = drawn(tmp_path)
    assert again == path and len(ratings.filled(tmp_path, key)) == 1
    path.with_name(f"{path.stem}-second.csv").write_bytes(path.read_bytes())
    assert len(ratings.filled(tmp_path, key)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.pop(5), r"line {id} is missing, 1 of 24"),
        (lambda lines: lines[5].update(summary="changed"), r"line {id}, column summary: the text was changed"),
        (lambda lines: lines[5].update(dialogue="changed"), r"line {id}, column dialogue: the text was changed"),
        (lambda lines: lines[5].update(invented="perhaps"), r"line {id}, column invented: found 'perhaps', expected 1"),
        (lambda lines: lines[5].update({"sheet id": "q000000-005"}), r"line q000000-005 is of another sheet"),
        (lambda lines: lines.append(dict(lines[5])), r"line {id} is there twice"),
        (lambda lines: lines[5].update(faithful="", omission="x"), r"line {id}: omission is marked, faithful is empty"),
        (lambda lines: lines[5].update(invented="1"), r"line {id}: faithful and invented are both marked"),
        (lambda lines: lines[1].update(reader=""), r"column reader: found nothing, expected one name"),
        (lambda lines: lines[7].update(reader="B"), r"column reader: found A. Reader \(person\), B, expected one"),
        (lambda lines: [line.pop("omission") for line in lines], r"column omission is missing"),
    ],
)
def test_a_sheet_that_cannot_be_counted_is_refused_by_line_and_column(tmp_path, change, message):
    path, key = drawn(tmp_path)
    lines = cells(mark(path, key, all_faithful))
    message = message.format(id=lines[5]["sheet id"])
    change(lines)
    with pytest.raises(ratings.SheetError, match=f"{path.name}.*{message}"):
        ratings.read(save(path, lines), key)


def test_a_sheet_of_another_evaluation_or_encoding_is_refused(tmp_path):
    path, key = drawn(tmp_path)
    with pytest.raises(
        ratings.SheetError, match=r"is of another sheet: expected q\w{6}-\.\.\., drawn from demo-1/test-2"
    ):
        ratings.read(path, drawn(tmp_path, of="demo-1/test-2")[1])
    with pytest.raises(ratings.SheetError, match="not UTF-8"):
        ratings.read(save(path, [line | {"reader": "ü"} for line in cells(path)], encoding="latin-1"), key)


def test_other_rows_or_none_cannot_be_drawn():
    systems = predictions()
    with pytest.raises(ValueError, match="n is 0"):
        ratings.draw("x", systems, 0)
    with pytest.raises(ValueError, match="rows are 12 and 11"):
        ratings.draw("x", systems | {"finetuned": systems["finetuned"][1:]})


def test_every_accepted_mark_and_unrated_lines(tmp_path):
    path, key = drawn(tmp_path, n=3)
    marks = {0: {"faithful": "X"}, 1: {"faithful": " yes "}, 2: {"faithful": "no", "omission": "1"}}
    rows = sorted({about["row"] for about in key["lines"].values()})
    given = {row: marks[i] for i, row in enumerate(rows)}
    mark(path, key, lambda row, system: given[f"r{row}"] if system == "base" else {})
    read = ratings.read(path, key)
    found = {line["row"]: (line["faithful"], line["omission"]) for line in read if line["system"] == "base"}
    assert [found[row] for row in rows] == [(True, False), (True, False), (False, True)]
    assert {line["faithful"] for line in read if line["system"] == "finetuned"} == {None}
    table = ratings.summary(read)  # three rows: a share, and nothing that needs ten
    assert table.loc["faithful"].to_dict() == {
        "reader": "A. Reader (person)", "base": "67% of 3", "fine-tuned": "not rated", "pairs": 0, "difference": "",
        "p": "too few rows",
    }  # fmt: skip


def test_shares_differences_and_p_are_the_textbooks(tmp_path):
    # faithful: base in rows 0-2, fine-tuned in rows 2-10: 8 rows gained, 2 lost. 12 pairs: +6/12 = +50 points.
    path, key = drawn(tmp_path)
    faithful = {"base": range(0, 3), "finetuned": range(2, 11)}
    mark(path, key, lambda row, system: {"faithful": str(int(row in faithful[system]))})
    table = ratings.summary(ratings.read(path, key))
    assert set(table["reader"]) == {"A. Reader (person)"}
    # Wilson by hand, 3 of 12: centre (3 + 1.92) / (12 + 3.84) = .3106, half 1.96 sqrt(.25 .75 / 12 + .08/12) ... = .222
    z, p, n = 1.959964, 3 / 12, 12
    centre, half = (p + z**2 / (2 * n)) / (1 + z**2 / n), z * (p * (1 - p) / n + z**2 / (4 * n * n)) ** 0.5
    half /= 1 + z**2 / n
    row = table.loc["faithful"]
    assert row["base"] == f"25% [{100 * (centre - half):.0f}, {100 * (centre + half):.0f}] of 12" == "25% [9, 53] of 12"
    # exact McNemar: 8 of 10 discordant pairs one way: 2 (1 + 10 + 45) / 2^10
    assert float(row["p"]) == pytest.approx(2 * 56 / 1024, abs=5e-4)
    # Agresti-Min: half a pair more in each cell, (8.5 - 2.5) / 14 and Wald on 14 pairs
    middle, spread = 6 / 14, (11 / 14 - (6 / 14) ** 2) ** 0.5 / 14**0.5
    low, high = 100 * (middle - z * spread), 100 * (middle + z * spread)
    assert (row["pairs"], row["difference"]) == (12, f"+50 [{low:+.0f}, {high:+.0f}]")
    omission = table.loc["omission"]  # nobody marked it
    assert (omission["base"], omission["p"]) == ("0% [0, 24] of 12", "1.000")


def test_a_summary_pairs_the_rows_that_both_have(tmp_path):
    path, key = drawn(tmp_path)
    left = {"base": {0}, "finetuned": {1, 2}}  # not rated: 9 pairs remain
    mark(path, key, lambda row, system: {} if row in left[system] else {"faithful": "0", "invented": "x"})
    row = ratings.summary(ratings.read(path, key)).loc["invented"]
    assert row["pairs"] == 9 and row["p"] == "too few rows" and row["difference"] == "+0"
    assert re.fullmatch(r"100% \[.*\] of 11", row["base"]) and row["fine-tuned"].endswith("] of 10")


def test_kappa_of_two_readers(tmp_path):
    # 24 answers: both yes 6, only the first 6, only the second 2, both no 10: agreed 16/24; the first says yes to 12,
    # the second to 8, so chance is 1/2 1/3 + 1/2 2/3 = 1/2 and kappa (2/3 - 1/2) / (1/2) = 1/3
    path, key = drawn(tmp_path)
    numbers = {name: i for i, name in enumerate(key["lines"])}
    sheets = []
    for reader, yes in (("A (person)", {*range(12)}), ("B (model)", {*range(6), 12, 13})):
        lines = cells(path)
        lines[1]["reader"] = reader
        for line in lines[1:]:
            line["faithful"] = "x" if numbers[line["sheet id"]] in yes else "0"
        sheets.append(ratings.read(save(tmp_path / f"{reader}.csv", lines), key))
    table = ratings.kappa(*sheets)
    assert table.index.name == "A (person) and B (model)"
    assert table.loc["faithful"].to_dict() == {"n": 24, "agreed": "67%", "kappa": "0.33"}
    assert table.loc["invented"].to_dict() == {"n": 24, "agreed": "100%", "kappa": ""}  # both always no
    some = [dict(line, faithful=None) if i > 8 else line for i, line in enumerate(sheets[0])]
    assert ratings.kappa(some, sheets[1]).loc["faithful", "kappa"] == ""  # nine answers


def test_wilson_covers_small_shares():
    # of 2,000 draws of 30 answers with a share of 10%, Wilson's interval holds it in about 95%
    found = []
    for count in stats.binom.rvs(30, 0.1, size=2000, random_state=0):
        low, high, _ = re.findall(r"\d+", ratings.share(int(count), 30).partition("[")[2])
        found.append(int(low) <= 10 <= int(high))
    assert 0.92 < sum(found) / len(found) < 0.99


def test_the_cells_of_04_write_a_sheet_and_read_it_back(make_run, make_evaluation, capsys):
    run = make_run()
    evaluation, shown = make_evaluation(run), []
    values = {"run": run, "evaluation": evaluation, "predictions": evaluation.predictions, "seed": 42, "RATED": 30}
    values |= {"ratings": ratings, "tables": tables, "runs": runs, "pd": pd, "display": lambda *all: shown.extend(all)}
    for words in (("ratings.draw(",), ("ratings.filled(",)):
        exec(cell("04_compare", *words), values)
    out = capsys.readouterr().out
    folder = "outputs/demo-00000001/evaluations/test-0000000a/ratings"
    assert f"6 answers to 3 dialogues in {folder}/sheet-q" in out and "Nobody has read this sheet yet" in out
    assert len(shown) == 1 and list(shown[0].columns)[0] == "how to fill" and shown[0].data.shape[1] == 3  # two
    mark(values["sheet_path"], values["key"], lambda row, system: {"faithful": "1" if system == "finetuned" else "0"})
    exec(cell("04_compare", "ratings.filled("), values)
    assert capsys.readouterr().out == ""
    assert shown[1].loc["faithful", ["base", "fine-tuned"]].tolist() == ["0% of 3", "100% of 3"]
