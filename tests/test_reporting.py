"""Reporting: tables say what was computed, nothing from data is interpreted as HTML, runs of one dataset are compared."""

import re

import pandas as pd
import pytest

from src import experiments, reporting, scoring

EVIL = "<script>alert('x')</script>&<b>"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with hostile texts, scored for real."""
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    e = experiments.load_experiment("demo")
    records = [
        {"id": f"{i}{EVIL}", "section": EVIL, "dialogue": f"A: {EVIL} {i}", "summary": f"s {i} {EVIL}"}
        for i in range(12)
    ]
    shared = [
        {"id": r["id"], "section": r["section"], "dialogue": r["dialogue"], "reference": r["summary"]} for r in records
    ]
    predictions = {
        "base": [{**s, "prediction": f"{EVIL} 99", "tokens": 5, "stop": "length"} for s in shared],
        "finetuned": [{**s, "prediction": s["reference"], "tokens": 5, "stop": "eos"} for s in shared],
    }
    experiments.save_config(e)
    for name, rows in predictions.items():
        experiments.write_jsonl(e.run_dir / "predictions" / f"{name}.jsonl", rows)
    experiments.write_json(e.run_dir / "metrics.json", scoring.evaluate_run(e, predictions, records, records, (), {}))
    return e


def test_side_by_side_escapes_everything_and_shows_what_it_should(run):
    metrics, predictions = reporting.load_run(run)
    chosen = reporting.choose_rows(metrics, 2)
    assert {k: len(v) for k, v in chosen.items()} == {"random": 2, "best": 2, "worst": 2}
    page = reporting.write_page(run, reporting.side_by_side(metrics, predictions, chosen)).read_text(encoding="utf-8")
    assert "<script>" not in page and "<b>" not in page and "&lt;script&gt;" in page
    assert "not in the dialogue: 99" in page and "cut at the cap" in page and "http" not in page


def test_inline_views_escape_too():
    for view in (
        reporting.answers_html({EVIL: EVIL}),
        reporting.tokens_html([{"token": EVIL, "supervised": True}, {"token": EVIL, "supervised": False}]),
    ):
        assert "<script>" not in view and "&lt;script&gt;" in view


def test_tokens_show_which_are_supervised():
    view = reporting.tokens_html([{"token": "Ġprompt", "supervised": False}, {"token": "Ġanswer", "supervised": True}])
    assert re.findall("<mark>(.*?)</mark>", view) == ["·answer"]


def test_results_table_holds_values_with_intervals(run):
    metrics, _ = reporting.load_run(run)
    table = reporting.results_table(metrics, ["ROUGE-1", "sacreBLEU"])
    assert list(table.columns) == ["n", "ROUGE-1", "sacreBLEU"]
    assert table.loc["fine-tuned", "ROUGE-1"] == "1.000 [1.000, 1.000]" and table.loc["fine-tuned", "n"] == 12
    assert {"base", "whole dialogue", "LEAD-3", "LONGEST-3", "nearest training summary"} <= set(table.index)
    none = {name: system | {"clean": None} for name, system in metrics["systems"].items()}
    seen = reporting.results_table(metrics | {"n_clean": 0, "systems": none}, clean=True)
    assert list(seen.columns) == ["n"] and set(seen["n"]) == {
        0
    }  # every row was trained on: nothing to score, not all rows


def test_published_numbers_stand_in_the_column_of_their_scorer():
    samsum = reporting.published_table("samsum")
    assert samsum.loc["published: recipe 2, fine-tuned", "ROUGE-L stemmed"] == 0.4296
    assert not any(c in samsum.columns for c in ("ROUGE-1", "ROUGE-2", "ROUGE-L"))  # recipe 2 is stemmed
    assert reporting.published_table("mts_dialog").filter(like="recipe 1", axis=0)["ROUGE-1"].item() == 0.1318
    assert len(reporting.published_table("demo")) == 0


def test_all_runs_of_a_dataset_are_listed(run):
    table = reporting.runs_table("demo")
    assert list(table.index) == [run.run_id] and table["n"].item() == 12
    assert len(reporting.runs_table("samsum")) == 0
    (run.run_dir / "config.json").unlink()  # half a folder stops no other run's notebook
    assert len(reporting.runs_table("demo")) == 0


def test_a_missing_prediction_file_names_notebook_03(run):
    (run.run_dir / "predictions" / "base.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="03_evaluate"):
        reporting.load_run(run)


def test_the_summary_prints_scores_and_paths(run, capsys):
    reporting.print_summary(run)
    out = capsys.readouterr().out
    assert re.search(r"fine-tuned +1.000 +\d.\d+ +1.000 +100.0 +12", out)
    assert f"outputs/{run.run_id}/notebooks" in out and "side_by_side.html" in out


def test_figures_and_tables_are_files(run):
    metrics, predictions = reporting.load_run(run)
    log = pd.DataFrame([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}])
    figures = {
        "loss": reporting.loss_curve(log, {"best_step": 2}),
        "scores": reporting.score_distributions(metrics),
        "lengths": reporting.length_plot(predictions),
    }
    for name, fig in figures.items():
        assert reporting.save_figure(run, name, fig).read_bytes()[:4] == b"\x89PNG"
        assert all(axis.get_xlabel() and axis.get_ylabel() for axis in fig.axes)
    path = reporting.save_table(run, "scores", reporting.results_table(metrics))
    assert path.read_text(encoding="utf-8").startswith("system,n,ROUGE-1")


def test_reporting_and_scoring_import_no_torch():
    import subprocess
    import sys

    code = "import sys; from src import data, experiments, reporting, scoring; assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=experiments.ROOT if (experiments.ROOT / "src").exists() else ".",
    )
