"""Figures of a run and of an evaluation. Dark on white, in colours that colour-blind readers tell apart.

Every figure names its run, split and n, so that the file alone says what it shows.
"""

from pathlib import Path

import numpy as np

from src import runs

COLORS = {"reference": "#6b6b6b", "base": "#b06f10", "finetuned": "#2b6ca3"}
MORE = ("#2b6ca3", "#b06f10", "#7a3e9d", "#1a7f5a", "#c2336b", "#6b6b6b")  # for runs, in order
LINES = {"base": "--", "finetuned": "-"}
LABELS = {"base": "base", "finetuned": "fine-tuned"}


def figure(width: float = 8, height: float = 3.2, columns: int = 1, title: str = "", alt: str = ""):
    """A figure and its axes in matplotlib's default style, shown by `show` alone; alt: what it shows, for ears."""
    import matplotlib.pyplot as plt

    with plt.style.context("default"):  # also where a notebook or a settings file has a dark style
        fig, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
        if title:
            fig.suptitle(title, fontsize="medium")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    plt.close(fig)  # or a notebook shows it a second time
    fig.alt = ": ".join(filter(None, (title, alt)))
    return fig, axes[0]


def show(*figs):
    """Display figures with their texts for those who hear the page."""
    from IPython.display import display

    for fig in figs:
        display(fig, metadata={"image/png": {"alt": fig.alt}})


def about(metrics: dict) -> str:
    """The words that name an evaluation in a title."""
    return f"{metrics['run']}, {metrics['split']}, n={metrics['n']}"


def dots(axis, rows: dict[str, dict], names: bool = True):
    """One line a row, the first on top: a dot, and its 95% interval where it has one.

    rows: {label: {"value", "low", "high"}}, low None without an interval; "color" and "hollow" may be set. A label may
    have several dots: {label: [{...}, {...}]}. names: whether labels are written.
    """
    for y, found in enumerate(reversed(rows.values())):
        for one in found if isinstance(found, list) else [found]:
            color = one.get("color", COLORS["reference"])
            if one["low"] is not None:
                axis.plot([one["low"], one["high"]], [y, y], color=color, lw=2)
            face = "white" if one.get("hollow") else color
            axis.plot(one["value"], y, "o", color=color, mfc=face, ms=6, label=one.get("label"))
    axis.set_yticks(range(len(rows)), list(rows)[::-1] if names else [""] * len(rows), fontsize="small")
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.grid(axis="y", color="#dddddd", lw=0.5)


def systems(metrics: dict, columns=("ROUGE-1", "ROUGE-L")):
    """All systems of an evaluation, the best by the last column on top, as dots with 95% intervals."""
    scores = {name: system["all"] for name, system in metrics["systems"].items()}
    order = sorted(scores, key=lambda name: -scores[name][columns[-1]]["value"])
    alt = f"dots with 95% intervals, from the best by {columns[-1]}: {', '.join(LABELS.get(n, n) for n in order)}"
    fig, axes = figure(9, 0.3 * len(order) + 1, columns=len(columns), title=about(metrics), alt=alt)
    for axis, column in zip(axes, columns, strict=True):
        rows = {LABELS.get(n, n): scores[n][column] | {"color": COLORS.get(n, COLORS["reference"])} for n in order}
        dots(axis, rows, names=column == columns[0])
        axis.set(xlabel=f"{column} (F1, 0-1, unstemmed)", xlim=(0, 1.02))
    return fig


def sections(metrics: dict, column: str = "ROUGE-L"):
    """Base and fine-tuned by section, the largest gain on top; None where the dataset has no sections."""
    base, tuned = (metrics["systems"][name]["sections"] for name in LABELS)
    if not base:
        return None
    order = sorted(base, key=lambda s: base[s][column]["value"] - tuned[s][column]["value"])
    alt = f"{column} of base and fine-tuned by section, from the largest gain: {', '.join(order)}"
    fig, (axis,) = figure(8, 0.27 * len(order) + 1.2, title=about(metrics), alt=alt)
    rows = {f"{s} (n={base[s]['n']})": _pair(base[s][column], tuned[s][column], s == order[0]) for s in order}
    dots(axis, rows)
    axis.set(xlabel=f"{column} (F1, 0-1, unstemmed)", xlim=(0, 1.02))
    fig.legend(loc="outside upper right", ncols=2, frameon=False)
    return fig


def _pair(base: dict, tuned: dict, labelled: bool) -> list[dict]:
    """Two dots for `dots`: the base's is hollow. labelled: whether the legend names them."""
    base = base | {"color": COLORS["base"], "hollow": True}
    tuned = tuned | {"color": COLORS["finetuned"]}
    return [base | {"label": LABELS["base"]}, tuned | {"label": LABELS["finetuned"]}] if labelled else [base, tuned]


def compared(found: list, against: str):
    """Runs beside each other: fine-tuned ROUGE-L with the base as a tick, and the difference to the run `against`.

    found: of compare.find.
    """
    alt = f"a row for each of {len(found)} evaluations, scores on the left, differences to {against} on the right"
    title = "ROUGE-L (F1, 0-1, unstemmed), 95%"
    fig, (scores, gains) = figure(11, 0.45 * len(found) + 1.3, columns=2, title=title, alt=alt)
    rows, differences = {}, {}
    for one in found:
        metrics = one.evaluation.metrics
        tuned, base = (metrics["systems"][name]["all"]["ROUGE-L"] for name in ("finetuned", "base"))
        label = f"{one.label} ({metrics['split']}, n={metrics['n']})"
        while label in rows:
            label += " "  # another way of decoding
        rows[label] = _pair(base, tuned, not rows)
        gain = one.difference
        differences[label] = [{"value": gain["difference"], **gain, "color": COLORS["finetuned"]}] if gain else []
    dots(scores, rows)
    dots(gains, differences, names=False)
    scores.set(xlabel="score", xlim=(0, 1.02))
    gains.axvline(0, color=COLORS["reference"], lw=1)
    gains.set(xlabel=f"fine-tuned minus {against}'s, same rows")
    fig.legend(loc="outside upper right", ncols=2, frameon=False)
    return fig


def loss_curves(found: list):
    """Training loss (thin) and validation loss (dots) of runs over each other. found: of compare.find."""
    runs = {one.evaluation.run.name: one for one in found}
    alt = f"training and validation loss by step of {', '.join(runs)}"
    fig, (axis,) = figure(9, 3.6, title="Loss of the runs compared", alt=alt)
    for i, one in enumerate(runs.values()):
        log = one.evaluation.run.log
        style = {"color": MORE[i % len(MORE)], "ls": ("-", "--", ":", "-.")[i // len(MORE) % 4]}
        trained, evaluated = _points(log, "loss"), _points(log, "eval_loss")
        axis.plot(*zip(*trained, strict=True), lw=0.8, alpha=0.5, **style)
        axis.plot(*zip(*(evaluated or trained[-1:]), strict=True), marker="o", ms=4, label=one.label, **style)
    _name_losses(axis)
    fig.legend(loc="outside right upper", frameon=False, fontsize="small")
    return fig


def _points(log: list[dict], column: str) -> list[tuple[int, float]]:
    return [(row["step"], row[column]) for row in log if column in row]


def _name_losses(axis):
    from matplotlib import ticker

    axis.set(xlabel="optimizer step", ylabel="loss (nats a supervised token)", yscale="log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def loss_curve(log: list[dict], manifest: dict):
    """Training loss, validation loss at every evaluation, and the step whose adapter was kept.

    `log`: the rows of train_log.jsonl.
    """
    rows = manifest["rows"]
    title = f"{manifest['run']}, {rows['train']} training and {rows['validation']} validation rows"
    fig, (axis,) = figure(title=title, alt="training and validation loss by step, the kept adapter circled")
    trained, evaluated = _points(log, "loss"), _points(log, "eval_loss")
    kept = [point for point in evaluated if point[0] == manifest["best_step"]]
    blue = {"color": COLORS["finetuned"], "marker": "o"}
    for points, style in (
        (trained, {"color": COLORS["reference"], "label": "training (mean since the last log)"}),
        (evaluated, {**blue, "label": "validation"}),
        (kept, {**blue, "label": "kept", "ls": "", "ms": 12, "mfc": "none"}),
    ):
        if points:
            axis.plot(*zip(*points, strict=True), **style)
    _name_losses(axis)
    axis.legend(frameon=False)
    return fig


def score_distributions(metrics: dict, column: str = "ROUGE-L"):
    """Histogram of the per-row scores of base (dashed) and fine-tuned."""
    fig, (axis,) = figure(title=about(metrics), alt=f"histogram of {column} by row, base dashed, fine-tuned solid")
    for name, label in LABELS.items():
        style = {"histtype": "step", "lw": 2, "ls": LINES[name], "color": COLORS[name]}
        axis.hist(metrics["per_row"][name][column], bins=np.linspace(0, 1, 21), label=label, **style)
    axis.set(xlabel=f"{column} of a row (F1, 0-1, unstemmed)", ylabel="rows", xlim=(0, 1))
    axis.legend(frameon=False, loc="upper center")
    return fig


def length_plot(metrics: dict, predictions: dict[str, list[dict]]):
    """Words in each summary against words in its reference. Triangles at the top stand for longer summaries."""
    fig, axes = figure(columns=2, title=about(metrics), alt="words in each summary against words in its reference")
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
        axis.set_title(label, loc="left", fontsize="medium")
        axis.set(xlabel="words in the reference", ylabel="words in the summary")
        axis.set(xlim=(0, right), ylim=(-0.03 * top, 1.05 * top))
    return fig


def save(folder: Path, name: str, fig) -> Path:
    """Write folder/<name>.png, whole or not at all."""
    path = folder / f"{name}.png"
    with runs.aside(path) as temporary:
        fig.savefig(temporary, format="png", dpi=130, facecolor="white", metadata={"Description": fig.alt})
    return path
