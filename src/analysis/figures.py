"""Figures of a run and of an evaluation. Dark on white, in colours that colour-blind readers tell apart.

Every figure names its run, split and n, so that the file alone says what it shows.
"""

import os
from pathlib import Path

import numpy as np

COLORS = {"reference": "#6b6b6b", "base": "#b06f10", "finetuned": "#2b6ca3"}
LINES = {"base": "--", "finetuned": "-"}
LABELS = {"base": "base", "finetuned": "fine-tuned"}


def figure(width: float = 8, height: float = 3.2, columns: int = 1, title: str | None = None):
    """A figure and its axes in matplotlib's default style, shown by display() alone."""
    import matplotlib.pyplot as plt

    with plt.style.context("default"):  # also where a notebook or a settings file has a dark style
        fig, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
        if title:
            fig.suptitle(title, fontsize="medium")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    plt.close(fig)  # or a notebook shows it a second time
    return fig, axes[0]


def about(metrics: dict) -> str:
    """The words that name an evaluation in a title."""
    return f"{metrics['run']}, {metrics['split']}, n={metrics['n']}"


def loss_curve(log: list[dict], manifest: dict):
    """Training loss, validation loss at every evaluation, and the step whose adapter was kept.

    `log`: the rows of train_log.jsonl.
    """
    from matplotlib import ticker

    rows = manifest["rows"]
    fig, (axis,) = figure(title=f"{manifest['run']}, {rows['train']} training and {rows['validation']} validation rows")
    trained = [(row["step"], row["loss"]) for row in log if "loss" in row]
    evaluated = [(row["step"], row["eval_loss"]) for row in log if "eval_loss" in row]
    kept = [point for point in evaluated if point[0] == manifest["best_step"]]
    blue = {"color": COLORS["finetuned"], "marker": "o"}
    for points, style in (
        (trained, {"color": COLORS["reference"], "label": "training (mean since the last log)"}),
        (evaluated, {**blue, "label": "validation"}),
        (kept, {**blue, "label": "kept", "ls": "", "ms": 12, "mfc": "none"}),
    ):
        if points:
            axis.plot(*zip(*points, strict=True), **style)
    axis.set(xlabel="optimizer step", ylabel="loss (nats a supervised token)", yscale="log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.legend(frameon=False)
    return fig


def score_distributions(metrics: dict, column: str = "ROUGE-L"):
    """Histogram of the per-row scores of base (dashed) and fine-tuned."""
    fig, (axis,) = figure(title=about(metrics))
    for name, label in LABELS.items():
        style = {"histtype": "step", "lw": 2, "ls": LINES[name], "color": COLORS[name]}
        axis.hist(metrics["per_row"][name][column], bins=np.linspace(0, 1, 21), label=label, **style)
    axis.set(xlabel=f"{column} of a row (F1, 0-1, unstemmed)", ylabel="rows", xlim=(0, 1))
    axis.legend(frameon=False, loc="upper center")
    return fig


def length_plot(metrics: dict, predictions: dict[str, list[dict]]):
    """Words in each summary against words in its reference. Triangles at the top stand for longer summaries."""
    fig, axes = figure(columns=2, title=about(metrics))
    references = [len(row["reference"].split()) for row in predictions["base"]]
    limit = max(references) + 5
    top, right = 2 * limit, 1.3 * limit  # no point lies in the last quarter, where the line is named
    for axis, (name, label) in zip(axes, LABELS.items(), strict=True):
        lengths = [len(row["prediction"].split()) for row in predictions[name]]
        inside = [(x, y) for x, y in zip(references, lengths, strict=True) if y <= top]
        beyond = [x for x, y in zip(references, lengths, strict=True) if y > top]
        axis.plot([0, right], [0, right], color=COLORS["reference"], lw=1)
        below = {"ha": "right", "va": "top", "color": COLORS["reference"], "fontsize": "small"}
        axis.annotate("equal length", (0.99 * right, 0.74 * right), **below)
        if inside:
            axis.scatter(*zip(*inside, strict=True), s=14, alpha=0.5, color=COLORS[name])
        if beyond:
            axis.scatter(beyond, [top] * len(beyond), s=24, marker="^", alpha=0.7, color=COLORS[name])
            note = f"triangles: {top}+ ({len(beyond)} of {len(lengths)} rows)"
            axis.set_title(note, loc="right", fontsize="small", color=COLORS[name])
        axis.set(xlabel="words in the reference", ylabel="words in the summary")
        axis.set_title(label, loc="left", fontsize="medium")
        axis.set(xlim=(0, right), ylim=(-0.03 * top, 1.05 * top))
    return fig


def save(folder: Path, name: str, fig) -> Path:
    """Write folder/<name>.png, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path, temporary = folder / f"{name}.png", folder / f".{name}.{os.getpid()}.tmp.png"
    try:
        fig.savefig(temporary, dpi=130, facecolor="white")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
