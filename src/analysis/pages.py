"""Texts for people: tokens, answers and dialogues side by side as HTML, and the adapter's model card.

The templates are the *.j2 files beside this module. Every text from a dataset or a model is escaped.
"""

import os
import random
import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from src import data, recipes, runs
from src.analysis import marks, tables

FOLDER = Path(__file__).parent
TEMPLATES = Environment(
    autoescape=lambda name: name.endswith(".html.j2"),  # all but the model card, which is no HTML
    loader=FileSystemLoader(FOLDER),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["sha256"] = lambda text: f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
GROUPS = {  # of choose_rows, as the page calls them
    "random": "Random rows",
    "gained": "Most gained against base (ROUGE-L)",
    "lost": "Most lost against base (ROUGE-L)",
}
KINDS = {  # of an answer: what the page's filter calls them
    "lacks": "a number or drug that the dialogue lacks",
    "new": "a word that dialogue and reference lack",
    "empty": "empty",
    "cut": "cut at the cap",
}
SYSTEMS = ("base", "finetuned")


def _render(template: str, **values) -> str:
    return TEMPLATES.get_template(template).render(**values)


def token_view(tokens: list[dict]) -> str:
    """HTML of the tokens of one row in order, the supervised ones highlighted. `tokens`: prompts.token_table."""
    signs = {"Ġ": "·", "▁": "·", "Ċ": "⏎\n", "<0x0A>": "⏎\n"}  # a space and a line end, as tokenizers write them
    shown = []
    for token in tokens:
        text = re.sub("|".join(signs), lambda sign: signs[sign[0]], token["token"])
        shown.append((marks.visible(text), token["supervised"]))
    return _render("tokens.html.j2", tokens=shown)


def answers_view(answers: dict[str, str]) -> str:
    """HTML of named texts, one under the other; texts that `marks.marked_html` made keep their marks."""
    shown = {name: text if isinstance(text, Markup) else marks.visible(text) for name, text in answers.items()}
    return _render("answers.html.j2", answers=shown)


def folded(title: str, text: str) -> Markup:
    """HTML of a long text, as it is written, that a click unfolds."""
    return Markup("<details><summary>{}</summary><pre>{}</pre></details>").format(title, text)


def choose_rows(metrics: dict, count: int = 3, seed: int = 0) -> dict[str, list[int]]:
    """Row numbers worth reading: random ones, and those that gained and lost most against base by ROUGE-L.

    Ties go by row order. Rows without a gain are not among the gained, nor rows without a loss among the lost.
    """
    gain = _gain(metrics)
    gained = [i for i in np.argsort(-gain, kind="stable").tolist() if gain[i] > 0][:count]
    lost = [i for i in np.argsort(gain, kind="stable").tolist() if gain[i] < 0][:count]
    rest = [i for i in range(len(gain)) if i not in gained + lost]
    return {"random": random.Random(seed).sample(rest, min(count, len(rest))), "gained": gained, "lost": lost}


def _gain(metrics: dict) -> np.ndarray:
    """Fine-tuned minus base of every row, in ROUGE-L."""
    base, tuned = (np.array(metrics["per_row"][name]["ROUGE-L"]) for name in SYSTEMS)
    return tuned - base


def examples(predictions: dict[str, list[dict]], chosen: dict[str, list[int]]) -> pd.DataFrame:
    """The chosen rows as a table: what they are, dialogue, and base, fine-tuned and reference summary."""
    rows = {}
    for group, i in ((group, i) for group, numbers in chosen.items() for i in numbers):
        base = predictions["base"][i]
        answers = {tables.LABELS[name]: predictions[name][i]["prediction"] for name in SYSTEMS}
        texts = {"section": base["section"], "dialogue": base["dialogue"], **answers, "reference": base["reference"]}
        rows[group, base["id"]] = texts
    return pd.DataFrame(rows.values(), index=pd.MultiIndex.from_tuples(rows, names=["rows", "id"]))


def side_by_side(metrics: dict, predictions: dict[str, list[dict]], chosen: dict[str, list[int]]) -> str:
    """HTML of dialogues with base, fine-tuned and reference summary in columns, marked as marks.py says."""
    groups = {GROUPS.get(group, group): [_row(metrics, predictions, i) for i in chosen[group]] for group in chosen}
    return _render("side_by_side.html.j2", groups=groups, marks=marks.NAMES)


def _row(metrics: dict, predictions: dict[str, list[dict]], i: int) -> dict:
    shown, flags = predictions["base"][i], []
    dialogue, reference, answers = shown["dialogue"], shown["reference"], []
    scores = {name: metrics["per_row"][name]["ROUGE-L"][i] for name in SYSTEMS}
    for name in SYSTEMS:
        answer = predictions[name][i]
        found = marks.pieces(answer["prediction"], dialogue, reference)
        lacks = list(dict.fromkeys(marks.visible(piece) for piece, kind in found if kind in ("number", "drug")))
        kinds = {"cut": answer["stop"] != "eos", "empty": not answer["prediction"].strip(), "lacks": lacks}
        kinds["new"] = any(kind == "new" for _, kind in found)
        flags += [f"{name}-{kind}" for kind, holds in kinds.items() if holds]
        text = marks.marked_html(answer["prediction"], dialogue, reference)
        about = {"label": tables.LABELS[name], "score": f"{scores[name]:.3f}", "tokens": answer["tokens"]}
        answers.append(about | {"text": text, "lacks": lacks, "cut": kinds["cut"]})
    return {
        **{key: marks.visible(shown[key]) for key in ("id", "section", "dialogue")},
        "reference": marks.marked_html(reference, dialogue, reference, kinds=("number", "drug")),
        "answers": answers,
        "flags": flags,
        "score": answers[1]["score"],
        "gain": f"{scores['finetuned'] - scores['base'] + 0.0:+.3f}",
    }


def save_page(folder: Path, metrics: dict, predictions: dict[str, list[dict]], limit: int = 950_000) -> Path:
    """Write folder/side_by_side.html: every row, to be sorted and filtered, in one file that needs no network.

    Its policy lets only its own style and script run. Where all rows would need more than `limit` bytes, the most
    gained and lost and random others fill it, and the page says so.
    """
    n, extremes = metrics["n"], np.argsort(_gain(metrics), kind="stable").tolist()
    rows, size = {}, 20_000  # head, style and script
    for i in dict.fromkeys([*extremes[:25], *extremes[-25:], *random.Random(0).sample(range(n), n)]):
        row = _row(metrics, predictions, i)
        size += len(_render("row.html.j2", row=row).encode()) + 200
        if size > limit:
            break
        rows[i] = row
    shown = [rows[i] for i in sorted(rows)]
    flagged = {flag for row in shown for flag in row["flags"]}
    flags = {f"{s}-{kind}": f"{tables.LABELS[s]}: {name}" for s in reversed(SYSTEMS) for kind, name in KINDS.items()}
    style, more, script = ((FOLDER / name).read_text("utf-8") for name in ("style.css", "page.css", "page.js"))
    page = _render(
        "page.html.j2",
        title=f"{metrics['run']}, {metrics['split']}, n={metrics['n']}: base, fine-tuned, reference",
        **{"style": Markup(style + more), "script": Markup(script), "rows": shown, "n": n, "marks": marks.NAMES},
        flags={flag: name for flag, name in flags.items() if flag in flagged},
        sections=sorted({row["section"] for row in shown}),
    )
    return runs.write_atomic(folder / "side_by_side.html", page)


def model_card(run, evaluation) -> str:
    """README.md of the adapter: what it is, how to use it, what it scores and what it is not for.

    Its metadata are the hub's; the scores are in the model-index.
    """
    from huggingface_hub import ModelCard

    metrics, recipe, columns = evaluation.metrics, run.recipe(), ("ROUGE-1", "ROUGE-2", "ROUGE-L", "sacreBLEU")
    tuned, base = (metrics["systems"][name]["all"] for name in ("finetuned", "base"))
    scores, tags = {column: tuned[column]["value"] for column in columns}, ["lora", "qlora", "summarization"]
    card_data = runs.card_data(run.name, recipe, "peft", tags, metrics["split"], scores)
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
