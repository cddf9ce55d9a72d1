"""Tables say what the metrics file says, compare runs by what differs, and run no formula in a spreadsheet."""

import copy
import csv
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from src import recipes, runs
from src.analysis import tables
from tests.analysis.conftest import METRICS, score


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


def test_runs_are_compared_by_the_fields_in_which_they_differ(make_run, make_evaluation):
    # the review's case: rank 8 for 20 steps beside the default; without max_steps in the table, rank gets the blame
    full = make_run("demo-00000001", day=2, losses=(1.5, 0.5))
    short = make_run("demo-00000002", overrides={"lora.r": 8, "training.max_steps": 20}, day=1)
    current = make_evaluation(full, day=3)
    worse = copy.deepcopy(METRICS)
    worse["systems"]["finetuned"]["all"]["ROUGE-L"] = score(0.187)
    make_evaluation(short, metrics=worse, day=2)
    table = tables.runs_table("demo", current)
    assert list(table.index) == ["demo-00000002", "demo-00000001"]  # by date
    assert list(table.columns) == [
        "evaluation", "date", "split", "n", "lora.r", "training.max_steps", "steps", "minutes",
        "best validation loss", "base ROUGE-L", "ROUGE-1", "ROUGE-L", "sacreBLEU", "chrF",
    ]  # fmt: skip
    assert table.loc["demo-00000002"].tolist() == [
        "test-0000000a", "2025-01-02 12:00", "test", 3, "8", "20", 20, "1.5", "1.250",
        "0.250", "0.875 [0.750, 1.000]", "0.187", "81.2 [79.0, 84.0]", "37.2",
    ]  # fmt: skip
    shown = table.loc["demo-00000001"]
    assert shown["evaluation"] == "test-0000000a (this one)" and shown["best validation loss"] == "0.500"
    assert (shown["lora.r"], shown["training.max_steps"]) == ("16", "-1")


def test_one_run_has_no_differing_field_and_machine_fields_do_not_count(make_run, make_evaluation):
    make_evaluation(make_run("demo-00000001"))
    make_evaluation(make_run("demo-00000002", overrides={"engine.packing": "off", "device": "cpu"}))
    make_evaluation(make_run("custom-00000003", "custom", {"data.train_file": "data/raw/mine.csv"}))
    assert list(tables.runs_table("demo").columns)[:5] == ["evaluation", "date", "split", "n", "steps"]
    assert list(tables.runs_table("custom").index) == ["custom-00000003"]
    assert len(tables.runs_table("samsum")) == 0


def test_a_number_changed_in_a_cell_alone_is_a_column_too(make_run, make_evaluation):
    make_evaluation(make_run("demo-00000001"))
    make_evaluation(make_run("demo-00000002", identity={"training": {"adam_beta2": 0.98}}))
    assert tables.runs_table("demo")["training.adam_beta2"].tolist() == ["", "0.98"]


def answers_of(evaluation, good: int):
    """Write 12 fine-tuned answers of which the first `good` are the reference and the others share no word with it."""
    rows = [
        {"id": str(i), "prediction": f"row {i} is right" if i < good else "no", "reference": f"row {i} is right"}
        for i in range(12)
    ]
    runs.write_jsonl(evaluation.folder / "predictions" / "finetuned.jsonl", rows)


def test_runs_that_differ_in_the_seed_alone_get_a_row_of_their_mean(make_run, make_evaluation):
    made = []
    for number, (seed, good) in enumerate([(1, 6), (2, 7), (42, 8)], 1):
        run = make_run(f"demo-0000000{number}", overrides={"seed": seed}, day=number)
        evaluation = make_evaluation(run, day=number)
        answers_of(evaluation, good)
        make_evaluation(run, "validation-0000000b", METRICS | {"split": "validation", "n": 4}, day=number)
        answers_of(runs.Evaluation(run, "validation-0000000b"), good)
        made.append(evaluation)
    other = make_run("demo-00000009", overrides={"seed": 3, "lora.r": 8}, day=9)
    alone = make_evaluation(other, day=9)
    table = tables.runs_table("demo", made[-1])
    assert list(table.index[-2:]) == ["mean of seeds 1, 2, 42"] * 2 and len(table) == 7 + 2
    row = table.iloc[-2]  # of test; below it is validation's
    assert (row["split"], row["n"], row["lora.r"], row["seed"], row["evaluation"]) == ("test", 3, "16", "", "")
    assert table.iloc[-1]["split"] == "validation"
    # 6, 7 and 8 of 12 rows are right: mean 7/12, SD 1/12; each row scores 1, 0 or (two rows) 1/3 and 2/3 over the seeds
    means = np.array([1] * 6 + [2 / 3, 1 / 3] + [0] * 4)
    more = np.append(means, [0, 1])
    rows = stats.t.ppf(0.975, 13) * more.std(ddof=1) / 14**0.5
    seeds = stats.t.ppf(0.975, 2) / 12 / 3**0.5
    low, high = (7 / 12 + side * np.hypot(rows + side * (more.mean() - means.mean()), seeds) for side in (-1, 1))
    assert row["ROUGE-L"] == f"0.583 [{low:.3f}, {high:.3f}], SD 0.083"
    assert row["sacreBLEU"].partition(", SD ")[2] and "[" not in row["sacreBLEU"]  # 12 rows: no interval for BLEU
    assert tables.about_seeds(made[0]).startswith("seeds 1, 2, 42: the last rows are their means")
    assert tables.about_seeds(alone).startswith("one seed: no evidence about the setting")


def test_seeds_that_were_scored_in_other_ways_are_not_pooled(make_run, make_evaluation):
    make_evaluation(make_run("demo-00000001", overrides={"seed": 1}))
    make_evaluation(make_run("demo-00000002", overrides={"seed": 2}), generation={"max_new_tokens": 5})
    third = make_evaluation(make_run("demo-00000003", overrides={"seed": 3}, identity={"base": "another"}))
    assert list(tables.runs_table("demo").index) == ["demo-00000001", "demo-00000002", "demo-00000003"]
    assert tables.about_seeds(third).startswith("one seed")


def test_half_a_folder_stops_no_other_run(make_run, make_evaluation):
    make_evaluation(make_run("demo-00000001"))
    broken = make_run("demo-00000002")
    make_evaluation(broken)
    (broken.folder / "config.json").unlink()
    make_run("demo-00000003")  # trained, not scored
    assert list(tables.runs_table("demo").index) == ["demo-00000001"]


def test_evaluations_of_a_run_differ_in_split_and_decoding(make_run, make_evaluation):
    run = make_run()
    make_evaluation(run, "validation-0000000b", METRICS | {"split": "validation"}, day=4)
    beams = make_evaluation(run, "test-0000000c", generation={"max_new_tokens": 96, "num_beams": 4}, day=5)
    table = tables.runs_table("demo", beams)
    assert table["evaluation"].tolist() == ["validation-0000000b", "test-0000000c (this one)"]
    assert table["split"].tolist() == ["validation", "test"] and table["generation.num_beams"].tolist() == ["", "4"]
    assert list(table.columns) == [
        "evaluation", "date", "split", "n", "generation.num_beams", "steps", "minutes", "best validation loss",
        "base ROUGE-L", "ROUGE-1", "ROUGE-L", "sacreBLEU", "chrF",
    ]  # fmt: skip


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


def test_every_recipe_field_is_in_the_comparison(make_run, make_evaluation):
    """A field that tables ignored would hide a tweak."""
    machine = {"device", "name"}
    tried = 0
    for name, value in _changes(recipes.load("demo").model_dump()):
        if name in machine or name.split(".")[0] in ("engine", "generation", "evaluation"):
            continue
        first, second = make_run("demo-00000001"), make_run("demo-00000002")
        config = second.config
        section, _, field = name.rpartition(".")
        (config["recipe"][section] if section else config["recipe"])[field] = value
        runs.files.write_sealed(second.folder / "config.json", config)
        make_evaluation(first)
        make_evaluation(second)
        if name != "data.dataset":
            assert name in tables.runs_table("demo").columns, name
            tried += 1
    assert tried > 35


def _changes(recipe: dict):
    for name, value in recipe.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", "changed") for key in value)
        else:
            yield name, "changed"
