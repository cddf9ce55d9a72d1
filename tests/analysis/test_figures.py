"""Figures show the metrics file's numbers and name their run, split and n."""

import numpy as np
from matplotlib.colors import to_hex

from src.analysis import figures


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_the_loss_curve_holds_the_logs_points_and_marks_the_kept_step(make_run):
    run = make_run()
    fig = figures.loss_curve(run.log, run.manifest)
    lines = {line.get_label(): line.get_xydata().tolist() for line in fig.axes[0].lines}
    assert lines == {
        "training (mean since the last log)": [[10, 2.0], [20, 1.0]],
        "validation": [[10, 1.5], [20, 1.25]],
        "kept": [[20, 1.25]],
    }
    assert fig.get_suptitle() == "demo-00000001, 64 training and 8 validation rows"
    without = figures.loss_curve([row for row in run.log if "loss" in row], run.manifest)
    assert len(without.axes[0].lines) == 1  # stopped before the first evaluation


def test_score_distributions_count_every_row_in_its_bin(metrics):
    fig = figures.score_distributions(metrics)
    (axis,) = fig.axes
    counts = {patch.get_label(): patch.get_xy() for patch in axis.patches}
    assert set(counts) == {"base", "fine-tuned"}
    for label, values in (("base", [0.0, 0.5, 0.25]), ("fine-tuned", [1.0, 0.0, 0.75])):
        outline = counts[label]
        for value in values:  # 1.0 is in the last of 20 bins
            left = min(int(value * 20), 19) / 20
            inside = outline[np.isclose(outline[:, 0], left) | np.isclose(outline[:, 0], left + 0.05)]
            assert inside[:, 1].max() == 1
    assert fig.get_suptitle() == "demo-00000001, test, n=3" and axis.get_xlabel() and axis.get_ylabel()


def test_lengths_beyond_the_plot_are_triangles_and_say_so(make_run, make_evaluation):
    evaluation = make_evaluation(make_run())
    fig = figures.length_plot(evaluation.metrics, evaluation.predictions)
    base, tuned = fig.axes
    # references have 3, 2 and 6 words: the axis ends at 11, summaries above 22 words are triangles
    points, triangles = (collection.get_offsets().tolist() for collection in base.collections)
    assert points == [[3, 3], [2, 1]] and triangles == [[6, 22]]
    assert base.get_title("right") == "triangles: 22+ (1 of 3 rows)" and texts(base) == ["equal length"]
    assert [collection.get_offsets().tolist() for collection in tuned.collections] == [[[3, 3], [2, 0], [6, 4]]]
    assert tuned.get_title("right") == "" and texts(tuned) == ["equal length"]
    assert (base.get_title("left"), tuned.get_title("left")) == ("base", "fine-tuned")
    assert fig.get_suptitle() == "demo-00000001, test, n=3"


def test_figures_are_files_dark_on_white_in_any_style(tmp_path, metrics):
    import matplotlib.pyplot as plt

    with plt.style.context("dark_background"):
        fig = figures.score_distributions(metrics)
        path = figures.save(tmp_path / "comparison", "scores", fig)
    assert path.read_bytes()[:4] == b"\x89PNG" and [p.name for p in path.parent.iterdir()] == ["scores.png"]
    corner, label = plt.imread(path)[0, 0], fig.axes[0].xaxis.label
    assert corner.tolist() == [1, 1, 1, 1] and to_hex(label.get_color()) == "#000000"
    assert len(set(figures.COLORS.values())) == 3


def test_systems_are_dots_the_best_on_top_and_sections_pairs_the_largest_gain_on_top(metrics):
    first, second = figures.systems(metrics).axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["base", "fine-tuned"]
    assert [line.get_xydata().tolist() for line in first.lines] == [
        [[0.125, 0], [0.375, 0]], [[0.25, 0]], [[0.75, 1], [1.0, 1]], [[0.875, 1]],
    ]  # fmt: skip
    assert [line.get_xydata().tolist() for line in second.lines] == [[[0.25, 0]], [[0.58333, 1]]]
    for name, gain in (("ALLERGY", 0.7), ("PLAN", -0.2)):
        for system, value in (("base", 0.25), ("finetuned", 0.25 + gain)):
            cell = {"n": 1, "ROUGE-L": {"value": value, "low": None, "high": None}}
            metrics["systems"][system]["sections"][name] = cell
    (axis,) = figures.sections(metrics).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["PLAN (n=1)", "CC (n=2)", "ALLERGY (n=1)"]
    faces = {
        f"{line.get_xdata()[0]:.2f}": line.get_markerfacecolor() for line in axis.lines if line.get_marker() == "o"
    }
    assert (faces["0.25"], faces["0.05"]) == ("white", figures.COLORS["finetuned"])  # the base is hollow
    for system in ("base", "finetuned"):
        metrics["systems"][system]["sections"] = {}
    assert figures.sections(metrics) is None
