"""Texts for people: tokens, answers and dialogues side by side as HTML, and the adapter's model card.

The templates are the *.j2 files beside this module. Every text from a dataset or a model is escaped.
"""

import os
import random
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from src import data, recipes, runs
from src.analysis import marks, tables

TEMPLATES = Environment(
    autoescape=lambda name: name.endswith(".html.j2"),  # all but the model card, which is no HTML
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
GROUPS = {  # of choose_rows, as the page calls them
    "random": "Random rows",
    "gained": "Most gained against base (ROUGE-L)",
    "lost": "Most lost against base (ROUGE-L)",
}
FLAGS = {  # data-flags of a row: what the page's filter calls them
    "finetuned-lacks": "fine-tuned: a number or drug that the dialogue lacks",
    "finetuned-new": "fine-tuned: a word that dialogue and reference lack",
    "finetuned-empty": "fine-tuned: empty",
    "finetuned-cut": "fine-tuned: cut at the cap",
    "base-lacks": "base: a number or drug that the dialogue lacks",
    "base-new": "base: a word that dialogue and reference lack",
    "base-empty": "base: empty",
    "base-cut": "base: cut at the cap",
}
STYLES = ("style.css", "page.css")


def _render(template: str, **values) -> str:
    return TEMPLATES.get_template(template).render(**values)


def token_view(tokens: list[dict]) -> str:
    """HTML of the tokens of one row in order, the supervised ones highlighted. `tokens`: prompts.token_table."""
    visible = {"Ġ": "·", "▁": "·", "Ċ": "⏎\n", "<0x0A>": "⏎\n"}  # a space and a line end, as tokenizers write them
    shown = []
    for token in tokens:
        text = token["token"]
        for written, mark in visible.items():
            text = text.replace(written, mark)
        shown.append({"text": marks.visible(text), "supervised": token["supervised"]})
    return _render("tokens.html.j2", tokens=shown)


def answers_view(answers: dict[str, str]) -> str:
    """HTML of named texts, one under the other; texts that `marks.marked_html` made keep their marks."""
    shown = {name: text if isinstance(text, Markup) else marks.visible(text) for name, text in answers.items()}
    return _render("answers.html.j2", answers=shown)


def choose_rows(metrics: dict, count: int = 3, seed: int = 0) -> dict[str, list[int]]:
    """Row numbers worth reading: random ones, and those that gained and lost most against base by ROUGE-L.

    Ties go by row order. Rows without a gain are not among the gained, nor rows without a loss among the lost.
    """
    base, tuned = (np.array(metrics["per_row"][name]["ROUGE-L"]) for name in ("base", "finetuned"))
    gain = tuned - base
    gained = [i for i in np.argsort(-gain, kind="stable").tolist() if gain[i] > 0][:count]
    lost = [i for i in np.argsort(gain, kind="stable").tolist() if gain[i] < 0][:count]
    rest = [i for i in range(len(gain)) if i not in gained + lost]
    return {"random": random.Random(seed).sample(rest, min(count, len(rest))), "gained": gained, "lost": lost}


def examples(predictions: dict[str, list[dict]], chosen: dict[str, list[int]]) -> pd.DataFrame:
    """The chosen rows as a table: what they are, dialogue, and base, fine-tuned and reference summary."""
    rows = {
        (group, predictions["base"][i]["id"]): {"section": predictions["base"][i]["section"]}
        | {"dialogue": predictions["base"][i]["dialogue"]}
        | {tables.LABELS[name]: predictions[name][i]["prediction"] for name in ("base", "finetuned")}
        | {"reference": predictions["base"][i]["reference"]}
        for group, numbers in chosen.items()
        for i in numbers
    }
    return pd.DataFrame(rows.values(), index=pd.MultiIndex.from_tuples(rows, names=["rows", "id"]))


def side_by_side(metrics: dict, predictions: dict[str, list[dict]], chosen: dict[str, list[int]]) -> str:
    """HTML of dialogues with base, fine-tuned and reference summary in columns, marked as marks.py says."""
    groups = {GROUPS.get(group, group): [_row(metrics, predictions, i) for i in chosen[group]] for group in chosen}
    return _render("side_by_side.html.j2", groups=groups, marks=marks.NAMES)


def _row(metrics: dict, predictions: dict[str, list[dict]], i: int) -> dict:
    row, answers = predictions["base"][i], [_answer(metrics, predictions, name, i) for name in ("base", "finetuned")]
    base, tuned = (metrics["per_row"][name]["ROUGE-L"][i] for name in ("base", "finetuned"))
    return {
        **{key: marks.visible(row[key]) for key in ("id", "section", "dialogue")},
        "reference": marks.marked_html(row["reference"], row["dialogue"], row["reference"], kinds=("number", "drug")),
        "answers": answers,
        "kinds": " ".join(f"{answer['name']}-{kind}" for answer in answers for kind in sorted(answer["kinds"])),
        "score": f"{tuned:.3f}",
        "gain": f"{tuned - base + 0.0:+.3f}",
    }


def _answer(metrics: dict, predictions: dict[str, list[dict]], name: str, i: int) -> dict:
    row = predictions[name][i]
    text = row["prediction"]
    found = marks.pieces(text, row["dialogue"], row["reference"])
    lacks = [marks.visible(piece) for piece, kind in found if kind in ("number", "drug")]
    kinds = {"lacks" for _ in lacks} | {"new" for _, kind in found if kind == "new"}
    return {
        "name": name,
        "label": tables.LABELS[name],
        "text": marks.marked_html(text, row["dialogue"], row["reference"]),
        "flags": list(dict.fromkeys(lacks)),
        "kinds": kinds | ({"cut"} if row["stop"] != "eos" else set()) | (set() if text.strip() else {"empty"}),
        "score": f"{metrics['per_row'][name]['ROUGE-L'][i]:.3f}",
        "tokens": row["tokens"],
        "ended": "EOS" if row["stop"] == "eos" else "cut at the cap",
    }


def save_page(folder: Path, metrics: dict, predictions: dict[str, list[dict]], limit: int = 950_000) -> Path:
    """Write folder/side_by_side.html: every row, to be sorted and filtered, in one file that needs no network.

    Its policy lets only its own style and script run. Where all rows would need more than `limit` bytes, the most
    gained and lost and random others fill it, and the page says so.
    """
    gain = np.array(metrics["per_row"]["finetuned"]["ROUGE-L"]) - np.array(metrics["per_row"]["base"]["ROUGE-L"])
    shuffled, extremes = random.Random(0).sample(range(len(gain)), len(gain)), np.argsort(gain, kind="stable").tolist()
    rows, size = {}, 20_000  # head, style and script
    for i in dict.fromkeys([*extremes[:25], *extremes[-25:], *shuffled]):
        row = _row(metrics, predictions, i)
        size += len(_render("row.html.j2", row=row).encode()) + 200
        if size > limit:
            break
        rows[i] = row
    shown = [rows[i] for i in sorted(rows)]
    here = Path(__file__).parent
    style, script = ("".join((here / f).read_text("utf-8") for f in files) for files in (STYLES, ["page.js"]))
    hashes = [f"sha256-{b64encode(sha256(part.encode()).digest()).decode()}" for part in (style, script)]
    page = _render(
        "page.html.j2",
        title=f"{metrics['run']}, {metrics['split']}, n={metrics['n']}: base, fine-tuned, reference",
        **{"style": Markup(style), "script": Markup(script), "style_hash": hashes[0], "script_hash": hashes[1]},
        **{"rows": shown, "n": len(gain), "marks": marks.NAMES},
        flags={kind: name for kind, name in FLAGS.items() if any(kind in row["kinds"].split() for row in shown)},
        sections=sorted({row["section"] for row in shown}),
    )
    return runs.write_atomic(folder / "side_by_side.html", page)


def model_card(run, evaluation) -> str:
    """README.md of the adapter: what it is, how to use it, what it scores and what it is not for.

    Its metadata are the hub's; the scores are in the model-index.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    metrics, recipe, columns = evaluation.metrics, run.recipe(), ("ROUGE-1", "ROUGE-2", "ROUGE-L", "sacreBLEU")
    tuned, base = (metrics["systems"][name]["all"] for name in ("finetuned", "base"))
    results = [
        EvalResult(
            task_type="summarization",
            dataset_type=recipe.data.dataset,
            dataset_name=recipe.data.dataset,
            dataset_split=metrics["split"],
            metric_type="bleu" if column == "sacreBLEU" else "rouge",
            metric_name="sacreBLEU (0-100)" if column == "sacreBLEU" else f"{column} (F1, 0-1, no stemmer)",
            metric_value=round(tuned[column]["value"], 4),
        )
        for column in columns
    ]
    card_data = ModelCardData(
        model_name=run.name,
        base_model=recipe.base_model,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "qlora", "summarization"],
        eval_results=results,
    )
    content = _render(
        "model_card.md.j2",
        card_data=card_data.to_yaml(),
        run=run.name,
        recipe=recipe.model_dump(),
        local=(runs.ROOT / recipe.base_model).is_dir(),
        manifest=run.manifest,
        source=data.source(recipe.data.dataset) if recipe.data.dataset not in ("demo", "custom") else None,
        snippet=_snippet(run, evaluation, recipe),
        metrics=metrics,
        scores=[(c, *(tables.interval(s[c], tables.digits(c)) for s in (base, tuned))) for c in columns],
    )
    return str(ModelCard(content))


def _snippet(run, evaluation, recipe) -> str:
    """Python that summarises one dialogue with the adapter, to be run inside of its folder."""
    decoding = evaluation.config["generation"]
    settings = {"do_sample": False} | {key: decoding[key] for key in recipes.Generation.model_fields if key in decoding}
    local, precision = runs.ROOT / recipe.base_model, recipe.quantization.bnb_4bit_compute_dtype
    usual = "torch.bfloat16 if torch.cuda.is_available() else torch.float32  # float16 on GPUs before Ampere"
    return _render(
        "snippet.py.j2",
        q=recipe.quantization.model_dump(),
        dtype=usual if precision == "auto" else f"torch.{precision}",
        base=Path(os.path.relpath(local, run.adapter)).as_posix() if local.is_dir() else recipe.base_model,
        revision=run.manifest["base_commit"],
        resize=recipe.pad_token == "add",
        generation=", ".join(f"{key}={value!r}" for key, value in settings.items()),
    )
