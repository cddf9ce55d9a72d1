"""Tables, figures and pages made from a run's files. No torch here; every text from a dataset or a model is HTML-escaped."""

import html
import random

import numpy as np
import pandas as pd

from src import experiments
from src.experiments import read_json, read_jsonl, relative, write_atomic

SYSTEMS = {"base": "base", "finetuned": "fine-tuned"}  # as files name them, as readers do
PUBLISHED = {  # published_by, the same for every scorer: {column: value}; scorers are named by the columns
    "mts_dialog": [
        (
            "published: recipe 1 (its own split, prompt scored)",
            "train rows 1081-1200",
            120,
            {"ROUGE-1": 0.1318, "ROUGE-2": 0.0456, "ROUGE-L": 0.0900, "BLEU (0-1)": 0.0260},
        ),
        ("published: MEDIQA-Chat 2023, 4th", "test1", 200, {"ROUGE-1": 0.401}),
        ("published: MEDIQA-Sum 2023 task B, best", "test2", 200, {"ROUGE-1": 0.43}),
    ],
    "samsum": [
        (
            "published: recipe 2, base",
            "test",
            819,
            {
                "ROUGE-1 stemmed": 0.2917,
                "ROUGE-2 stemmed": 0.0995,
                "ROUGE-L stemmed": 0.2184,
                "ROUGE-Lsum stemmed": 0.2290,
            },
        ),
        (
            "published: recipe 2, fine-tuned",
            "test",
            819,
            {
                "ROUGE-1 stemmed": 0.5158,
                "ROUGE-2 stemmed": 0.2651,
                "ROUGE-L stemmed": 0.4296,
                "ROUGE-Lsum stemmed": 0.4295,
            },
        ),
        (
            "published: bart-large-xsum-samsum (model card)",
            "test",
            819,
            {"ROUGE-1 stemmed": 0.533, "ROUGE-2 stemmed": 0.284, "ROUGE-L stemmed": 0.441},
        ),
        (
            "published: MV-BART (2020), re-scored",
            "test",
            819,
            {
                "ROUGE-1 stemmed": 0.539,
                "ROUGE-2 stemmed": 0.284,
                "ROUGE-L stemmed": 0.444,
                "ROUGE-Lsum stemmed": 0.493,
            },
        ),
    ],
}
COLORS = {"reference": "#7f7f7f", "base": "#d08c2c", "finetuned": "#2b6ca3"}
CSS = (
    "<style>.dlg{font:14px/1.5 system-ui,sans-serif;max-width:70em}.dlg table{border-collapse:collapse;width:100%}"
    ".dlg td,.dlg th{border:1px solid #ccc!important;padding:.5em .7em!important;text-align:left!important;"
    "vertical-align:top!important;white-space:pre-wrap!important;max-width:none!important}"
    ".dlg th{background:#f4f4f4;width:9em;white-space:normal!important}.dlg mark{background:#cfe3f6;color:#000;padding:1px 0}"
    ".dlg .dim{color:#666}.dlg .warn{background:#fbe3c8;padding:0 .3em}</style>"
)


# ---------------------------------------------------------------- tables


def results_table(metrics: dict, columns=None, clean: bool = False) -> pd.DataFrame:
    """One row a system: value and 95% interval of every column; `clean` leaves leaked dialogues out."""
    rows = {}
    for name, system in metrics["systems"].items():
        scores = system["clean"] if clean and metrics["n_clean"] < metrics["n"] else system["all"]
        rows[SYSTEMS.get(name, name)] = {"n": metrics["n_clean" if clean else "n"]} | _cells(scores or {}, columns)
    return pd.DataFrame(rows).T.rename_axis("system")


def _cells(scores: dict, columns) -> dict[str, str]:
    return {
        column: interval(score, 1 if column == "sacreBLEU" else 3)
        for column, score in scores.items()
        if not columns or column in columns
    }


def interval(score: dict, digits: int) -> str:
    """A score {"value", "low", "high"} as text: value [low, high]; the value alone where low is None."""
    value = f"{score['value']:.{digits}f}"
    return value if score["low"] is None else f"{value} [{score['low']:.{digits}f}, {score['high']:.{digits}f}]"


def published_table(dataset: str) -> pd.DataFrame:
    """Published numbers for a dataset, each in the column of the scorer that it came from. Empty for the demo and own data."""
    rows = {name: {"split": split, "n": n, **scores} for name, split, n, scores in PUBLISHED.get(dataset, [])}
    return pd.DataFrame(rows).T.rename_axis("system").fillna("")


def others_table(others: dict, columns=None) -> pd.DataFrame:
    """Other systems' and people's summaries, scored here by the same functions; each on its own rows (metrics["others"])."""
    rows = {
        name: {"split": other["split"], "n": other["n"]} | _cells(other["all"], columns)
        for name, other in others.items()
    }
    return pd.DataFrame(rows).T.rename_axis("system")


def paired_table(metrics: dict) -> pd.DataFrame:
    """Fine-tuned minus base, on all rows and on the rows without leaks: difference, 95% interval, p (paired bootstrap)."""
    rows = {}
    for subset, columns in metrics["paired"]["finetuned minus base"].items():
        for column, test in columns.items():
            digits = 1 if column == "sacreBLEU" else 3
            rows[(subset, column)] = {
                "difference": interval({"value": test["difference"], **test}, digits),
                "p": f"{test['p']:.3f}",
            }
    return pd.DataFrame(rows).T.rename_axis(["rows", "column"])


def text_table(metrics: dict) -> pd.DataFrame:
    """Length, novelty, unsupported facts and how answers ended, one row a system."""
    rows = {"(the references)": metrics["reference_text"]}
    rows |= {SYSTEMS.get(name, name): system["text"] for name, system in metrics["systems"].items()}
    table = pd.DataFrame(rows).T
    return table.astype(float).map(lambda x: "" if x != x else f"{x:.2f}").rename_axis("system")


def section_table(metrics: dict, column: str = "ROUGE-L") -> pd.DataFrame:
    """One row a section: n and the column's value with interval for base and fine-tuned. Sections under five rows have no interval."""
    base, tuned = (metrics["systems"][name]["sections"] for name in ("base", "finetuned"))
    rows = {
        s: {
            "n": base[s]["n"],
            "base": interval(base[s][column], 3),
            "fine-tuned": interval(tuned[s][column], 3),
        }
        for s in base
    }
    return pd.DataFrame(rows).T.rename_axis("section")


def runs_table(dataset: str) -> pd.DataFrame:
    """Every evaluated run of a dataset under outputs/ with its main settings and scores; folders without config.json are left out."""
    rows = {}
    for path in sorted((experiments.ROOT / "outputs").glob("*/metrics.json")):
        if not (path.parent / "config.json").is_file():
            continue
        metrics, config = (
            read_json(path, "03_evaluate"),
            read_json(path.parent / "config.json", "02_train_qlora"),
        )
        if metrics["dataset"] != dataset:
            continue
        tuned = metrics["systems"]["finetuned"]["all"]
        rows[metrics["run_id"]] = {
            **({"file": config["data"]["train_file"]} if dataset == "custom" else {}),
            "base model": config["base_model"],
            "split": metrics["split"],
            "n": metrics["n"],
            "rank": config["lora"]["rank"],
            "learning rate": config["training"]["learning_rate"],
            "epochs": config["training"]["epochs"],
            "seed": config["seed"],
            **{c: interval(tuned[c], 1 if c == "sacreBLEU" else 3) for c in ("ROUGE-1", "ROUGE-L", "sacreBLEU")},
        }
    return pd.DataFrame(rows).T.rename_axis("run")


# ---------------------------------------------------------------- text for people


def escape(text) -> str:
    return html.escape(str(text))


def tokens_html(tokens: list[dict]) -> str:
    """The tokens of one row (prompts.token_table) in order, the supervised ones highlighted."""
    shown = []
    for token in tokens:
        text = (
            escape(token["token"])
            .replace("Ġ", "·")
            .replace("▁", "·")
            .replace("Ċ", "⏎\n")
            .replace("&lt;0x0A&gt;", "⏎\n")
        )
        shown.append(f"<mark>{text}</mark>" if token["supervised"] else text)
    return f"{CSS}<div class=dlg><div style='white-space:pre-wrap;font-family:monospace'>{'&#8203;'.join(shown)}</div></div>"


def answers_html(answers: dict[str, str]) -> str:
    """Named texts, one under the other."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text) or '<span class=dim>(empty)</span>'}</td></tr>"
        for name, text in answers.items()
    )
    return f"{CSS}<div class=dlg><table>{rows}</table></div>"


def load_run(experiment) -> tuple[dict, dict[str, list[dict]]]:
    """(metrics, {"base": rows, "finetuned": rows}) of a run, from its files."""
    metrics = read_json(experiment.run_dir / "metrics.json", "03_evaluate")
    return metrics, {
        name: read_jsonl(experiment.run_dir / "predictions" / f"{name}.jsonl", "03_evaluate") for name in SYSTEMS
    }


def choose_rows(metrics: dict, count: int = 3, seed: int = 0) -> dict[str, list[int]]:
    """Row numbers worth reading: best and worst of the fine-tuned model by ROUGE-L, and random ones."""
    order = np.argsort(metrics["per_row"]["finetuned"]["ROUGE-L"], kind="stable").tolist()
    middle = [i for i in order if i not in order[:count] + order[-count:]]
    return {
        "random": random.Random(seed).sample(middle, min(count, len(middle))),
        "best": order[-count:][::-1],
        "worst": order[:count],
    }


def side_by_side(metrics: dict, predictions: dict, chosen: dict[str, list[int]]) -> str:
    """HTML of dialogues with reference, base and fine-tuned summary. Unsupported numbers and drug-like words are named."""
    from src import scoring

    parts = [CSS, "<div class=dlg>"]
    for title, numbers in chosen.items():
        parts.append(
            f"<h3>{escape(title.capitalize())} by ROUGE-L of the fine-tuned model</h3>"
            if title != "random"
            else "<h3>Random</h3>"
        )
        for i in numbers:
            row = predictions["base"][i]
            cells = {"section": row["section"], "dialogue": row["dialogue"], "reference": row["reference"]}
            cells = {name: escape(text) for name, text in cells.items() if text}
            for name, label in SYSTEMS.items():
                answer = predictions[name][i]
                flags = sorted(scoring.unsupported(answer["prediction"], row["dialogue"]))
                note = f"<br><span class=warn>not in the dialogue: {escape(', '.join(flags))}</span>" if flags else ""
                ended = f"{answer['tokens']} tokens, {'cut at the cap' if answer['stop'] == 'length' else 'EOS'}"
                score = metrics["per_row"][name]["ROUGE-L"][i]
                text = escape(answer["prediction"]) or "<span class=dim>(empty)</span>"
                cells[label] = f"{text}{note}<br><span class=dim>ROUGE-L {score:.3f} · {ended}</span>"
            lines = "".join(f"<tr><th>{name}</th><td>{cell}</td></tr>" for name, cell in cells.items())
            parts.append(f"<p class=dim>row {escape(row['id'])}</p><table>{lines}</table>")
    return "\n".join(parts) + "</div>"


def write_page(experiment, body: str):
    """outputs/<run>/comparison/side_by_side.html: self-contained, no script."""
    title = escape(f"{experiment.run_id}: reference, base, fine-tuned")
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><body style='margin:2em'><h2>{title}</h2>{body}</body></html>\n"
    return write_atomic(experiment.run_dir / "comparison" / "side_by_side.html", page)


def model_card(experiment, manifest: dict, metrics: dict) -> str:
    """README.md of the adapter: what it is, how it was trained, what it scores, what it is not for."""
    tuned, base = (metrics["systems"][name]["all"] for name in ("finetuned", "base"))
    scores = "\n".join(
        f"| {c} | {interval(base[c], 3)} | {interval(tuned[c], 3)} |"
        for c in ("ROUGE-1", "ROUGE-2", "ROUGE-L", "sacreBLEU")
    )
    return f"""---
library_name: peft
base_model: {experiment.base_model}
tags: [lora, qlora, summarization]
---
# {experiment.run_id}

LoRA adapter (rank {experiment.lora.rank}, alpha {experiment.lora.alpha}; {", ".join(experiment.lora.target_modules)}) that summarises
dialogues, trained on the {experiment.quantization.bits}-bit base `{experiment.base_model}` (revision {experiment.revision}, commit {manifest["base_commit"]}) with
{manifest["rows"]["train"]} rows of `{experiment.data.dataset}` in {manifest["optimizer_steps"]} steps on {manifest["device"]}.
The prompt is in `prompt_template.json`. The licences of the base model and of the data apply; data/README.md names them.

Scores on the split `{metrics["split"]}`, n={metrics["n"]}, 95% bootstrap intervals:

| scorer | base | fine-tuned |
|---|---|---|
{scores}

Summaries can be wrong in numbers, drugs and negations. Not for clinical use.
"""


def print_summary(experiment):
    """The last words of `make demo` and `make run`: scores and where everything lies."""
    metrics, _ = load_run(experiment)
    table = pd.DataFrame(
        {
            SYSTEMS.get(name, name): {c: s["all"][c]["value"] for c in ("ROUGE-1", "ROUGE-2", "ROUGE-L", "sacreBLEU")}
            | {"n": metrics["n"]}
            for name, s in metrics["systems"].items()
        }
    ).T.astype({"n": int})
    print(f"\n{experiment.run_id}, split {metrics['split']}: ROUGE F1 0-1 unstemmed, sacreBLEU 0-100")
    print(table.round({"ROUGE-1": 3, "ROUGE-2": 3, "ROUGE-L": 3, "sacreBLEU": 1}).to_string())
    print(f"\nrun folder          {relative(experiment.run_dir)}")
    print(f"executed notebooks  {relative(experiment.run_dir / 'notebooks')}")
    print(f"side by side        {relative(experiment.run_dir / 'comparison' / 'side_by_side.html')}")


# ---------------------------------------------------------------- figures


def figure(width: float = 8, height: float = 3.2, columns: int = 1):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    plt.close(fig)  # shown by display(), once
    return fig, axes[0]


def loss_curve(log: pd.DataFrame, manifest: dict):
    """Training loss of the logged steps, validation loss at every evaluation, and the step whose adapter was kept."""
    fig, (axis,) = figure()
    loss = log.dropna(subset=["loss"])
    axis.plot(loss["step"], loss["loss"], color=COLORS["reference"], label="training (mean since the last log)")
    if "eval_loss" in log:
        evaluations = log.dropna(subset=["eval_loss"])
        axis.plot(evaluations["step"], evaluations["eval_loss"], "o-", color=COLORS["finetuned"], label="validation")
        kept = evaluations[evaluations["step"] == manifest["best_step"]]
        axis.plot(kept["step"], kept["eval_loss"], "o", ms=12, mfc="none", color=COLORS["finetuned"], label="kept")
    axis.set(xlabel="optimizer step", ylabel="loss (nats a supervised token)", ylim=(0, None))
    axis.legend(frameon=False)
    return fig


def score_distributions(metrics: dict, column: str = "ROUGE-L"):
    """Histogram of the per-row scores of base and fine-tuned."""
    fig, (axis,) = figure()
    for name, label in SYSTEMS.items():
        axis.hist(
            metrics["per_row"][name][column],
            bins=np.linspace(0, 1, 21),
            alpha=0.6,
            color=COLORS[name],
            label=label,
        )
    axis.set(xlabel=f"{column} of a row (F1, 0-1, unstemmed)", ylabel=f"rows (n={metrics['n']})", xlim=(0, 1))
    axis.legend(frameon=False)
    return fig


def length_plot(predictions: dict):
    """Words in each summary against words in its reference; on the line the two are equally long."""
    fig, axes = figure(columns=2)
    limit = max(len(r["reference"].split()) for r in predictions["base"]) + 5
    for axis, (name, label) in zip(axes, SYSTEMS.items(), strict=True):
        x = [len(r["reference"].split()) for r in predictions[name]]
        y = [min(len(r["prediction"].split()), 2 * limit) for r in predictions[name]]
        axis.plot([0, limit], [0, limit], color=COLORS["reference"], lw=1)
        axis.scatter(x, y, s=10, alpha=0.5, color=COLORS[name])
        axis.set(xlabel="words in the reference", ylabel="words in the summary", title=label)
        axis.set(xlim=(0, limit), ylim=(-1, 2 * limit + 2))
    return fig


def save_figure(experiment, name: str, fig):
    """outputs/<run>/comparison/<name>.png"""
    path = experiment.run_dir / "comparison" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{name}.tmp.png")
    fig.savefig(temporary, dpi=130)
    temporary.replace(path)
    return path


def save_table(experiment, name: str, table: pd.DataFrame):
    """outputs/<run>/comparison/<name>.csv"""
    return write_atomic(experiment.run_dir / "comparison" / f"{name}.csv", table.to_csv(lineterminator="\n"))
