"""Draws committed results: scores of SmolLM2 beside other systems, its learning curve, and training speed.

    python benchmarks/pictures.py

Reads benchmarks/results and outputs/published_recipes; writes scores.csv and PNGs into outputs/samsum_small and
outputs/mts_dialog_small, and benchmarks/results/speed.png. No model, no dataset.
"""

import json
import re
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.analysis import figures, tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {"base": "SmolLM2-135M, base", "finetuned": "SmolLM2-135M, fine-tuned"}
DATASETS = {  # folder of outputs: dataset, split with other systems, their table, its columns for ROUGE-1, -2, -L
    "samsum_small": ("samsum", "test", "samsum.csv", [f"ROUGE-{k} stemmed" for k in "12L"]),
    "mts_dialog_small": ("mts_dialog", "validation", "mts_dialog.csv", [f"ROUGE-{k}" for k in "12L"]),
}


def main(root: Path = ROOT) -> list[Path]:
    """Draw everything into the folders of `root`, and return the files written."""
    real = pd.DataFrame(json.loads((RESULTS / "real.json").read_text(encoding="utf-8")))
    written = []
    for folder, (dataset, split, others, columns) in DATASETS.items():
        target = root / "outputs" / folder
        own = real[(real["dataset"] == dataset) & (real["setting"] == "as the recipe") & (real["seed"] == "mean")]
        written.append(tables.save(target, "scores", scores(own, columns)))
        known = pd.read_csv(ROOT / "outputs" / "published_recipes" / others, index_col="system", dtype=str)
        written.append(figures.save(target, "scores", systems(own[own["split"] == split], known, columns, split)))
    written.append(figures.save(root / "outputs" / "samsum_small", "learning_curve", learning_curve(real)))
    written.append(figures.save(root / "benchmarks" / "results", "speed", speed()))
    return written


def scores(own: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """One row a split and system, mean of three seeds: n, rows trained on, ROUGE 0-100 with 95% intervals."""
    rows = []
    for found in own.sort_values(["split", "system"]).to_dict("records"):
        parts = zip(columns, ("rouge1", "rouge2", "rougeL"), strict=True)
        text = {c: f"{found[k]:.1f} [{found[k + '_low']:.1f}, {found[k + '_high']:.1f}]" for c, k in parts}
        about = {
            "system": NAMES[found["system"]],
            "split": found["split"],
            "n": found["n"],
            "trained on": found["rows"],
        }
        rows.append(about | text | {"at the length cap": f"{found['length_cap']:.1%}"})
    return pd.DataFrame(rows).set_index("system")


def systems(own: pd.DataFrame, known: pd.DataFrame, columns: list[str], split: str):
    """ROUGE-1 and ROUGE-L of all systems of a split as dots with 95% intervals; without one where none is known."""
    found = {}
    for row in own.to_dict("records"):
        keys = ("rouge1", "rougeL")
        found[NAMES[row["system"]]] = [tuple(row[k + end] for end in ("", "_low", "_high")) for k in keys]
    for name, row in known[known["split"] == split].iterrows():
        parts = [re.findall(r"[\d.]+", str(row[column])) for column in (columns[0], columns[2])]
        if all(parts):
            found[name] = [tuple(100 * float(x) for x in part) for part in parts]
    order = sorted(found, key=lambda name: -found[name][1][0])
    title = f"{'SAMSum' if 'stemmed' in columns[0] else 'MTS-Dialog'}, {split}, n={own['n'].iloc[0]}"
    fig, axes = figures.figure(width=10, height=0.27 * len(order) + 1, columns=2, title=title)
    for axis, column, k in zip(axes, (columns[0], columns[2]), (0, 1), strict=True):
        rows = {
            name: dict(zip(("value", "low", "high"), (*found[name][k], None, None), strict=False)) for name in order
        }
        for key, name in NAMES.items():
            rows[name]["color"] = figures.COLORS[key]
        figures.dots(axis, rows, names=k == 0)
        axis.set(xlabel=f"{column}{'' if 'stemmed' in column else ' unstemmed'} (F1, 0-100, 95%)", xlim=(0, None))
    return fig


def learning_curve(real: pd.DataFrame):
    """ROUGE-L on SAMSum's test split by training rows: a dot a seed, a line through their means."""
    chosen = real["setting"].str.contains("rows, best of") | (real["setting"] == "as the recipe")
    part = real[chosen & (real["dataset"] == "samsum") & (real["split"] == "test") & (real["system"] == "finetuned")]
    fig, (axis,) = figures.figure(title="SmolLM2-135M on SAMSum, test, n=819: how many rows are enough")
    seeds = part[part["seed"] != "mean"]
    means = part[part["seed"] == "mean"].sort_values("rows")
    color = figures.COLORS["finetuned"]
    axis.plot(means["rows"], means["rougeL"], color=color, lw=1.5)
    axis.plot(seeds["rows"], seeds["rougeL"], "o", color=color, ms=6, alpha=0.7, label="a seed")
    base = real[(real["dataset"] == "samsum") & (real["setting"] == "as the recipe") & (real["system"] == "base")]
    axis.axhline(base["rougeL"].iloc[0], color=figures.COLORS["base"], ls="--", label="base")
    axis.set(xscale="log", xlabel="training rows", ylabel="ROUGE-L stemmed (F1, 0-100)", ylim=(0, 42))
    axis.set_xticks(means["rows"], [f"{rows:,}" for rows in means["rows"]], rotation=30)
    axis.minorticks_off()
    axis.legend(frameon=False, loc="lower right")
    return fig


def speed():
    """Training tokens/s of a 7B's shapes on an H200 as bars with their memory, ours beside what users pick."""
    found = {r["setup"]: r for r in json.loads((RESULTS / "h200.json").read_text(encoding="utf-8"))}
    shown = {
        "ours_64gib": "this repository",
        "unsloth_packed_16k": "Unsloth, packed",
        "ours_checkpointed": "this repository, checkpointing",
        "unsloth_packed_16k_checkpointed": "Unsloth, packed, checkpointing",
        "recipe1": "recipe 1's settings, plain Trainer",
        "hf_padded": "plain Trainer, checkpointing",
        "recipe2": "recipe 2's settings, plain Trainer",
    }
    fig, (axis,) = figures.figure(title="QLoRA training, Mistral-7B's shapes and random weights, one H200")
    for y, setup in enumerate(reversed(shown)):
        r, own = found[setup], setup.startswith("ours")
        axis.barh(y, r["tok_s"], color=figures.COLORS["finetuned" if own else "reference"])
        axis.annotate(f" {r['tok_s']:,} ({r['peak_gib']:.0f} GiB)", (r["tok_s"], y), va="center", fontsize="small")
    axis.set_yticks(range(len(shown)), list(shown.values())[::-1])
    axis.set(xlabel="tokens/s, no padding counted (peak memory)", xlim=(0, 23000))
    return fig


if __name__ == "__main__":
    for path in main():
        print(path.relative_to(ROOT))
