"""Runs are compared by what differs, over seeds where there are several, and on the same rows alone."""

import copy

import numpy as np
import pytest
from scipy import stats

from src import recipes, runs
from src.analysis import compare, figures
from tests.analysis.conftest import METRICS, PER_ROW, score


def shown(current, **more):
    return compare.table(compare.find(current, **more), current)


def test_runs_are_compared_by_the_fields_in_which_they_differ(make_run, make_evaluation):
    # the review's case: rank 8 for 20 steps beside the default; without max_steps in the table, rank gets the blame
    full = make_run("demo-00000001", day=2, losses=(1.5, 0.5))
    short = make_run("demo-00000002", overrides={"lora.r": 8, "training.max_steps": 20}, day=1)
    current = make_evaluation(full, day=3)
    worse = copy.deepcopy(METRICS)
    worse["systems"]["finetuned"]["all"]["ROUGE-L"] = score(0.187)
    make_evaluation(short, metrics=worse, day=2)
    table = shown(current)
    assert list(table.index) == ["demo-00000002", "demo-00000001"]  # by date
    assert list(table.columns) == [
        "evaluation", "date", "split", "n", "lora.r", "training.max_steps", "steps", "minutes",
        "best validation loss", "base ROUGE-L", "ROUGE-1", "ROUGE-L", "sacreBLEU", "chrF",
        "ROUGE-L difference", "p",
    ]  # fmt: skip
    assert table.loc["demo-00000002"].tolist() == [
        "test-0000000a", "2025-01-02 12:00", "test", 3, "8", "20", 20, "1.5", "1.250",
        "0.250", "0.875 [0.750, 1.000]", "0.187", "81.2 [79.0, 84.0]", "37.2",
        "0.000", "too few rows",
    ]  # fmt: skip
    own = table.loc["demo-00000001"]
    assert own["evaluation"] == "test-0000000a (this one)" and own["best validation loss"] == "0.500"
    assert (own["lora.r"], own["training.max_steps"], own["ROUGE-L difference"], own["p"]) == ("16", "-1", "", "")


def test_one_run_has_no_differing_field_and_machine_fields_do_not_count(make_run, make_evaluation):
    first = make_evaluation(make_run("demo-00000001"))
    make_evaluation(make_run("demo-00000002", overrides={"engine.packing": "off", "device": "cpu"}))
    custom = make_run("custom-00000003", "custom", {"data.train_file": "data/raw/mine.csv"})
    own = make_evaluation(custom, metrics=METRICS | {"dataset": "custom"})
    assert list(shown(first).columns)[:5] == ["evaluation", "date", "split", "n", "steps"]
    assert list(shown(own).index) == ["custom-00000003"]


def test_a_number_changed_in_a_cell_alone_is_a_column_too(make_run, make_evaluation):
    first = make_evaluation(make_run("demo-00000001"))
    make_evaluation(make_run("demo-00000002", identity={"training": {"adam_beta2": 0.98}}))
    assert shown(first)["training.adam_beta2"].tolist() == ["", "0.98"]


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
    table = shown(made[-1])
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
    assert compare.about_seeds(compare.find(made[0]), made[0]).startswith(
        "seeds 1, 2, 42: the last rows are their means"
    )
    assert compare.about_seeds(compare.find(alone), alone).startswith("one seed: no evidence about the setting")


def test_seeds_that_were_scored_in_other_ways_are_not_pooled(make_run, make_evaluation):
    make_evaluation(make_run("demo-00000001", overrides={"seed": 1}))
    make_evaluation(make_run("demo-00000002", overrides={"seed": 2}), generation={"max_new_tokens": 5})
    third = make_evaluation(make_run("demo-00000003", overrides={"seed": 3}, identity={"base": "another"}))
    assert list(shown(third).index) == ["demo-00000001", "demo-00000002", "demo-00000003"]
    assert compare.about_seeds(compare.find(third), third).startswith("one seed")


def test_half_a_folder_stops_no_other_run(make_run, make_evaluation):
    whole = make_evaluation(make_run("demo-00000001"))
    broken = make_run("demo-00000002")
    make_evaluation(broken)
    (broken.folder / "config.json").unlink()
    make_run("demo-00000003")  # trained, not scored
    assert list(shown(whole).index) == ["demo-00000001"]


def test_evaluations_of_a_run_differ_in_split_and_decoding(make_run, make_evaluation):
    run = make_run()
    make_evaluation(run, "validation-0000000b", METRICS | {"split": "validation"}, day=4)
    beams = make_evaluation(run, "test-0000000c", generation={"max_new_tokens": 96, "num_beams": 4}, day=5)
    table = shown(beams)
    assert table["evaluation"].tolist() == ["validation-0000000b", "test-0000000c (this one)"]
    assert table["split"].tolist() == ["validation", "test"] and table["generation.num_beams"].tolist() == ["", "4"]
    assert list(table.columns) == [
        "evaluation", "date", "split", "n", "generation.num_beams", "steps", "minutes", "best validation loss",
        "base ROUGE-L", "ROUGE-1", "ROUGE-L", "sacreBLEU", "chrF", "ROUGE-L difference", "p",
    ]  # fmt: skip


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
        current = make_evaluation(first)
        make_evaluation(second)
        if name != "data.dataset":
            assert name in shown(current).columns, name
            tried += 1
    assert tried > 35


def _changes(recipe: dict):
    for name, value in recipe.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", "changed") for key in value)
        else:
            yield name, "changed"


@pytest.fixture
def three(make_run, make_evaluation):
    """Evaluations of three runs on 12 rows: rank 16, rank 8 (half a point lower in every row), and another split."""
    scores, made = np.linspace(0.4, 0.9, 12), []
    for number, (rank, values, split) in enumerate(
        [(16, scores, "test"), (8, scores - 0.05, "test"), (4, scores, "v")]
    ):
        metrics = copy.deepcopy(METRICS) | {"n": 12, "split": split}
        metrics["per_row"] = {"base": PER_ROW["base"] * 4, "finetuned": {"ROUGE-L": values.tolist()}}
        metrics["systems"]["finetuned"]["all"]["ROUGE-L"] = score(values.mean(), 0.3, 0.95)
        run = make_run(f"demo-0000000{number}", overrides={"lora.r": rank}, day=number + 1)
        made.append(make_evaluation(run, f"{split}-0000000a", metrics, day=number + 1))
        answers_of(made[-1], 3)
        if split != "test":
            rows = made[-1].predictions["finetuned"]
            runs.write_jsonl(made[-1].folder / "predictions" / "finetuned.jsonl", rows[:11])
    return made


def test_runs_are_compared_with_a_chosen_one_on_the_same_rows_alone(three):
    first, second, other = three
    found = compare.find(first)
    assert [one.difference is None for one in found] == [True, False, True]  # itself, rank 8, other rows
    gain = found[1].difference
    assert gain["difference"] == pytest.approx(-0.05) and gain["p"] == 2 / 2**12
    # Student's t over equal differences and the two more rows, -.5 and .5
    more = np.array([-0.05] * 12 + [-0.5, 0.5])
    half = stats.t.ppf(0.975, 13) * more.std(ddof=1) / 14**0.5
    assert gain["high"] == pytest.approx(-0.05 + half + (more.mean() + 0.05), abs=1e-9) or gain["low"] is None
    backwards = compare.find(first, against=second.run.name)
    assert backwards[0].difference["difference"] == pytest.approx(0.05) and backwards[1].difference is None
    assert [one.evaluation.run.name for one in compare.find(first, names=[other.run.name])] == [
        first.run.name, other.run.name,
    ]  # fmt: skip
    with pytest.raises(runs.RunError, match="No finished run of demo is named 'demo-ffffffff'. Found: demo-00000000"):
        compare.find(first, names=["demo-ffffffff"])
    with pytest.raises(runs.RunError, match="demo-00000002 was not scored on the rows of test-0000000a"):
        compare.find(first, against=other.run.name)


def test_figures_of_runs_show_scores_differences_and_losses(three):
    found = compare.find(three[0])
    fig = figures.compared(found, three[0].run.name)
    scores, gains = fig.axes
    assert [label.get_text() for label in scores.get_yticklabels()] == [
        "demo-00000002\nr 4 (v, n=12)", "demo-00000001\nr 8 (test, n=12)", "demo-00000000\nr 16 (test, n=12)",
    ]  # fmt: skip
    points = [line.get_xydata().tolist()[0] for line in scores.lines if line.get_marker() == "o"]
    assert points == [[0.25, 0], [0.65, 0], [0.25, 1], [pytest.approx(0.6), 1], [0.25, 2], [0.65, 2]]
    (gain,) = (line.get_xydata().tolist()[0] for line in gains.lines if line.get_marker() == "o")
    assert gain == [pytest.approx(-0.05), 1] and gains.get_xlabel() == "fine-tuned minus demo-00000000's, same rows"
    (axis,) = figures.loss_curves(found).axes
    curves = [line.get_xydata().tolist() for line in axis.lines]
    assert curves == [[[10, 2.0], [20, 1.0]], [[10, 1.5], [20, 1.25]]] * 3
    assert len({line.get_color() for line in axis.lines}) == 3
