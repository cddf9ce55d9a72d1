"""Texts for people: tokens, answers and dialogues side by side as HTML, and the adapter's model card.

The templates are the *.j2 files beside this module. Every text from a dataset or a model is escaped.
"""

import os
import random
import re
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from src import data, recipes, runs
from src.analysis import tables
from src.analysis.faithfulness import facts, unsupported

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
        shown.append({"text": text, "supervised": token["supervised"]})
    return _render("tokens.html.j2", tokens=shown)


def answers_view(answers: dict[str, str]) -> str:
    """HTML of named texts, one under the other."""
    return _render("answers.html.j2", answers=answers)


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


def side_by_side(metrics: dict, predictions: dict[str, list[dict]], chosen: dict[str, list[int]]) -> str:
    """HTML of dialogues with base, fine-tuned and reference summary. Unsupported numbers are marked."""
    groups = {}
    for group, numbers in chosen.items():
        rows = []
        for i in numbers:
            row = predictions["base"][i]
            answers = [_answer(metrics, predictions, name, i) for name in ("base", "finetuned")]
            rows.append({key: row[key] for key in ("id", "section", "dialogue", "reference")} | {"answers": answers})
        groups[GROUPS.get(group, group)] = rows
    return _render("side_by_side.html.j2", groups=groups)


def _answer(metrics: dict, predictions: dict[str, list[dict]], name: str, i: int) -> dict:
    row = predictions[name][i]
    flags = unsupported(row["prediction"], row["dialogue"])
    return {
        "label": tables.LABELS[name],
        "text": _marked(row["prediction"], flags),
        "flags": sorted(flags),
        "score": f"{metrics['per_row'][name]['ROUGE-L'][i]:.3f}",
        "tokens": row["tokens"],
        "ended": "EOS" if row["stop"] == "eos" else "cut at the cap",
    }


def _marked(text: str, flags: set[str]) -> Markup:
    """The text, escaped, with every word that states one of the flagged facts marked."""
    marked = Markup("")
    for word in re.split(r"(\s+)", text):
        marked += Markup('<span class="warn">{}</span>').format(word) if facts(word) & flags else escape(word)
    return marked


def save_page(folder: Path, metrics: dict, body: str) -> Path:
    """Write folder/side_by_side.html around the HTML of `side_by_side`: self-contained, without scripts."""
    title = f"{metrics['run']}, {metrics['split']}, n={metrics['n']}: base, fine-tuned, reference"
    page = _render("page.html.j2", title=title, body=Markup(body))
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
        source=data.source(recipe.data.dataset) if recipe.data.dataset in ("mts_dialog", "samsum") else None,
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
