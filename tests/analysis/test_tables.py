"""Tables say what the metrics file says, compare runs by what differs, and run no formula in a spreadsheet."""

import csv
import re

import pandas as pd
import pytest

from src.analysis import tables


def test_results_show_value_and_interval_of_every_system(metrics):
    table = tables.results(metrics, ["ROUGE-1", "ROUGE-L", "sacreBLEU"])
    assert table.to_dict("index") == {
        "base": {"n": 3, "ROUGE-1": "0.250 [0.125, 0.375]", "ROUGE-L": "0.250", "sacreBLEU": "3.1 [2.0, 4.5]"},
        "fine-tuned": {"n": 3, "ROUGE-1": "0.875 [0.750, 1.000]", "ROUGE-L": "0.583", "sacreBLEU": "81.2 [79.0, 84.0]"},
    }
    assert list(tables.results(metrics).columns) == ["n", "ROUGE-1", "ROUGE-2", "ROUGE-L", "sacreBLEU", "chrF"]


def test_clean_results_are_those_of_the_clean_rows(metrics):
    table = tables.results(metrics, ["ROUGE-1"], clean=True)
    assert table.loc["fine-tuned"].to_dict() == {"n": 2, "ROUGE-1": "0.800"}
    all_clean = tables.results(metrics | {"n_clean": 3}, ["ROUGE-1"], clean=True)
    assert all_clean.loc["fine-tuned"].to_dict() == {"n": 3, "ROUGE-1": "0.875 [0.750, 1.000]"}
    for system in metrics["systems"].values():
        system["clean"] = None  # every row was trained on: nothing to score
    none = tables.results(metrics | {"n_clean": 0}, clean=True)
    assert list(none.columns) == ["n"] and set(none["n"]) == {0}


def test_published_numbers_stand_in_the_column_of_their_scorer():
    samsum = tables.published("samsum")
    assert samsum.loc["published: recipe 2, fine-tuned"].to_dict() == {
        "split": "test",
        "n": "819",
        "ROUGE-1 stemmed": "0.516",
        "ROUGE-2 stemmed": "0.265",
        "ROUGE-L stemmed": "0.430",
        "ROUGE-Lsum stemmed": "",
        "ROUGE-Lsum stemmed, no sentence lines": "0.430",  # 0.4295: computed otherwise, so it has its own column
    } | dict.fromkeys((f"ROUGE-{kind} (scorer unstated)" for kind in ("1", "2", "L", "Lsum")), "")
    assert not {"ROUGE-1", "ROUGE-2", "ROUGE-L"} & set(samsum.columns)  # recipe 2 is stemmed
    card = samsum.loc["published: bart-large-xsum-samsum (model card)"]
    assert (card["ROUGE-1 stemmed"], card["ROUGE-1 (scorer unstated)"]) == ("", "0.533")
    mts = tables.published("mts_dialog")
    assert mts.filter(like="recipe 1", axis=0)["ROUGE-1"].item() == "0.132" and len(mts) == 17
    assert len(tables.published("demo")) == 0


def test_other_peoples_summaries_keep_their_own_split_and_n(metrics):
    table = tables.others(metrics["others"], ["ROUGE-1", "sacreBLEU"])
    assert table.loc["a person"].to_dict() == {
        "split": "all", "n": 2, "ROUGE-1": "0.500", "sacreBLEU": "12.3 [10.0, 15.0]",
    }  # fmt: skip
    assert len(tables.others({})) == 0


def test_paired_differences_with_interval_and_p(metrics):
    table = tables.paired(metrics)
    assert table.index.names == ["rows", "column"]
    assert table.loc[("all", "ROUGE-1")].tolist() == ["0.625 [0.500, 0.750]", "<0.001"]  # 1/1001 is the floor
    assert table.loc[("all", "ROUGE-L")].tolist() == ["-0.058", "too few rows"]
    assert table.loc[("all", "sacreBLEU")].tolist() == ["78.1 [70.0, 80.0]", "0.040"]


def test_text_statistics_put_the_references_first_and_shares_in_percent(metrics):
    table = tables.text(metrics)
    assert list(table.index) == ["(the references)", "base", "fine-tuned", "LEAD-3"]
    base = table.loc["base"]
    assert base["mean words"] == "21.00" and base["words per reference word"] == "0.50"
    assert base["rows with unsupported numbers"] == "33%" and base["ended by EOS"] == "67%"
    assert base["novel bigrams"] == "" and table.loc["LEAD-3", "ended by EOS"] == ""


def test_sections_compare_base_and_fine_tuned(metrics):
    table = tables.sections(metrics, "ROUGE-1")
    assert table.loc["CC"].to_dict() == {"n": 2, "base": "0.250 [0.125, 0.375]", "fine-tuned": "0.875 [0.750, 1.000]"}


def test_saved_tables_run_no_formula_and_keep_numbers(tmp_path):
    cells = ["=1+1", "+cmd", "-2+3", "@SUM(A1)", "\tx", "-0.058", "-0.058 [-0.070, -0.046]", "plain", "", "-5%"]
    table = pd.DataFrame({"=head": cells, "value": [-0.5] * len(cells)}, index=pd.Index(cells, name="system"))
    path = tables.save(tmp_path / "comparison", "scores", table)
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert path.name == "scores.csv" and header == ["system", "'=head", "value"]
    safe = ["'=1+1", "'+cmd", "'-2+3", "'@SUM(A1)", "'\tx", "-0.058", "-0.058 [-0.070, -0.046]", "plain", "", "-5%"]
    assert [row[0] for row in rows] == safe and [row[1] for row in rows] == safe
    assert {row[2] for row in rows} == {"-0.5"}


def test_saved_tables_keep_both_index_columns(tmp_path, metrics):
    text = tables.save(tmp_path, "paired", tables.paired(metrics)).read_text(encoding="utf-8")
    assert text.splitlines()[:2] == ["rows,column,difference,p", 'all,ROUGE-1,"0.625 [0.500, 0.750]",<0.001']


def test_the_summary_prints_scores_and_paths(make_run, make_evaluation, capsys):
    run = make_run()
    tables.print_summary(run, make_evaluation(run))
    out = capsys.readouterr().out
    assert "demo-00000001, test, n=3" in out and re.search(r"fine-tuned +0.875 +0.125 +0.583 +81.2", out)
    assert "3 rows are too few to compare systems: expected at least 10." in out
    assert "outputs/demo-00000001/notebooks" in out
    assert "outputs/demo-00000001/evaluations/test-0000000a/comparison/side_by_side.html" in out


def test_a_missing_metrics_file_names_its_notebook(make_run, make_evaluation):
    run = make_run()
    evaluation = make_evaluation(run)
    (evaluation.folder / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="03_evaluate"):
        tables.print_summary(run, evaluation)


def test_samples_stand_in_a_row_a_dialogue_and_a_column_a_step_with_a_tick_where_right():
    log = [{"step": 5, "loss": 1.0}]
    for step, answers in ((10, ("no", "right one")), (20, ("\x1b[31mno", "right  one"))):
        log += [{"step": step, "id": str(i), "reference": "right one", "sample": a} for i, a in enumerate(answers)]
    assert tables.samples(log).to_dict("index") == {
        "0": {"reference": "right one", "step 10": "no", "step 20": "␛[31mno"},
        "1": {"reference": "right one", "step 10": "right one ✓", "step 20": "right  one ✓"},
    }
    assert len(tables.samples(log[:1])) == 0


def test_texts_in_a_table_are_shown_and_never_run():
    evil = "<script>alert(1)</script>"
    table = pd.DataFrame({f"{evil}step": [f"{evil}\nnext"]}, index=[f"{evil}row"])
    html = tables.readable(table).to_html()
    assert "<script" not in html and html.count("&lt;script&gt;") == 3 and "text-align: left" in html
