"""The two published protocols and their defects, replayed for notebook 05. Nothing else imports this: the corrected path never meets it.

Recipe 1 is Mistral-7B-v0.1 on MTS-Dialog (imsachinsingh00/DocBot_Mistral), recipe 2 Mistral-7B-Instruct-v0.2 on SAMSum
(msznajder/mistral-7b-samsum-dialogue-summary-finetune).
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers

from src import data, experiments, generation, modeling, prompts, reporting, scoring, training

SEEDS = (1, 2, 3)
RECIPE2_TURN = "You are a helpful assistant. Your task is to generate following dialogue summarization:"
STUDENT = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}  # t's 97.5% quantile by seeds


def official_tokenizer(prepend: str = "always"):
    """Mistral's tokenizer of v0.1 and Instruct-v0.2 from mistral-common's file, as the hub's tokenizer.json has it; no network.

    Merges are ordered by piece score; transformers' own conversion orders them by id, which differs on repeated spaces.
    `prepend`: "always" (Mistral-7B-v0.1) or "first" (the newer Instruct-v0.2 files). Adds BOS unless told otherwise.
    """
    import mistral_common
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    path = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    sp = sentencepiece.SentencePieceProcessor(str(path))
    vocabulary = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    splits = [
        (-sp.get_score(i), p[:k], p[k:])
        for p, i in vocabulary.items()
        for k in range(1, len(p))
        if p[:k] in vocabulary and p[k:] in vocabulary
    ]
    splits.sort(key=lambda split: (split[0], vocabulary[split[1]], vocabulary[split[2]]))
    merges = [(a, b) for _, a, b in splits]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


# ---------------------------------------------------------------- recipe 1's protocol, from data alone


def recipe1_split(rows: list[dict]) -> tuple[list[int], list[int]]:
    """Row numbers of recipe 1's training and validation set.

    It draws 90% of the training file, resets the index and then drops *that* index from the file: the rest is simply the
    file's last rows, most of which were drawn.
    """
    drawn = pd.Series(range(len(rows))).sample(frac=0.9, random_state=42)
    return drawn.tolist(), list(range(len(drawn), len(rows)))


def recipe1_prompt(row: dict) -> str:
    return f"Summarize the following dialogue for section: {row['section']}\n{row['dialogue']}\nSummary:"


def recipe2_prompt(dialogue: str) -> str:
    """What recipe 2 gives its models to continue: the training text with the summary left out."""
    return f"<s>[INST] {RECIPE2_TURN}\n{dialogue}[/INST]\n</s>"


def recipe1_protocol(rows: list[dict], validation: list[int], tokenizer) -> dict[str, list[str]]:
    """What recipe 1 would have scored as the answers of three systems on its validation rows: prompt (512 tokens) and answer (200).

    A perfect summariser answers with the reference, a silent one with nothing, a rambling one with another row's dialogue.
    """

    def cut(text, tokens):
        ids = tokenizer(text)["input_ids"][: tokens + 1]  # and BOS
        return tokenizer.decode(ids, skip_special_tokens=True)

    chosen = [rows[i] for i in validation]
    long = sorted(rows[: validation[0]], key=lambda row: -len(row["dialogue"]))  # dialogues of 200 tokens at least
    answers = {
        "perfect (the reference)": [row["summary"] for row in chosen],
        "silent (nothing)": ["" for _ in chosen],
        "rambling (200 tokens of another dialogue)": [long[i]["dialogue"] for i in range(len(chosen))],
    }
    return {
        name: [f"{cut(recipe1_prompt(row), 511)} {cut(text, 200)}" for row, text in zip(chosen, texts, strict=True)]
        for name, texts in answers.items()
    }


# ---------------------------------------------------------------- one defect at a time, with the demo's model


def as_is(row: prompts.Encoded) -> prompts.Encoded:
    return row


def labels_from_prompt(row):
    """Recipe 1's collator: the labels are a copy of the input, and the input is the prompt alone."""
    return dataclasses.replace(row, prompt_ids=row.prompt_ids[:1], answer_ids=row.prompt_ids[1:])


def loss_on_prompt(row):
    """Prompt and answer are supervised, but for the first token, which nothing predicts."""
    return dataclasses.replace(row, prompt_ids=row.prompt_ids[:1], answer_ids=row.prompt_ids[1:] + row.answer_ids)


def eos_unsupervised(row):
    """EOS is the last token of a row: without a label it might as well not be there."""
    return dataclasses.replace(row, answer_ids=row.answer_ids[:-1])


def bos_twice(row):
    return dataclasses.replace(row, prompt_ids=row.prompt_ids[:1] + row.prompt_ids)


def eos_ends_prompt(row):
    return dataclasses.replace(row, prompt_ids=[*row.prompt_ids, row.answer_ids[-1]])


@dataclass(frozen=True)
class Defect:
    """One thing that is published, and what this repository does instead; the defaults are what it does."""

    name: str
    source: str = ""  # who publishes it
    published: str = ""
    corrected: str = ""
    why: str = ""
    overrides: dict = field(default_factory=dict)  # of the experiment, in training
    train: Callable | None = as_is  # what becomes of a training row (prompts.Encoded); None: no training
    ask: Callable = as_is  # what becomes of a row to be answered
    right_padded: bool = False
    merged: bool = False  # the adapter is merged into unquantised weights before generation
    prompt_scored: bool = False


QV = {"lora.target_modules": ["q_proj", "v_proj"]}
DEFECTS = (
    Defect("corrected", "this repository"),
    Defect("base model", "no training", train=None),
    Defect(
        "labels from the prompt",
        "recipe 1",
        "the collator copies the input over the labels, and the input is the prompt alone",
        "labels are the answer and its EOS",
        "no summary is ever trained on",
        train=labels_from_prompt,
    ),
    Defect(
        "prompt scored",
        "recipe 1",
        "the prompt counts as part of the summary",
        "an answer starts at a token position",
        "precision falls with the length of the dialogue",
        prompt_scored=True,
    ),
    Defect(
        "right-padded generation",
        "recipe 1",
        "padding stands between prompt and answer",
        "prompts are padded on the left",
        "the first token is predicted from a pad token",
        right_padded=True,
    ),
    Defect(
        "q and v only",
        "recipe 1",
        "adapters on q_proj and v_proj",
        "on all linear layers",
        "fewer weights that can change",
        QV,
    ),
    Defect(
        "rank 4",
        "recipe 1",
        "rank 4 (as its README says)",
        "rank 16",
        "fewer directions that can change",
        {"lora.rank": 4},
    ),
    Defect(
        "loss on the prompt",
        "recipe 2",
        "prompt and answer are supervised",
        "the answer and its EOS are",
        "most of the gradient teaches dialogues, not summaries",
        train=loss_on_prompt,
    ),
    Defect(
        "BOS twice",
        "recipe 2",
        "the template writes <s>, the tokenizer adds another",
        "one BOS",
        "an input that pretraining never saw",
        train=bos_twice,
        ask=bos_twice,
    ),
    Defect(
        "EOS ends the prompt",
        "recipe 2",
        "the model has to go on after </s>",
        "no EOS in a prompt",
        "after EOS comes another document, not an answer",
        ask=eos_ends_prompt,
    ),
    Defect(
        "merged, unquantised",
        "recipe 2",
        "trained on 4-bit weights, scored on merged full-precision ones",
        "the same 4-bit weights in both",
        "another model than the trained one is scored",
        merged=True,
    ),
    Defect(
        "EOS unsupervised",
        "common (pad token = EOS)",
        "every EOS is masked as padding",
        "padding is masked by length",
        "the model never learns to stop",
        train=eos_unsupervised,
    ),
    Defect(
        "recipe 1 together",
        "recipe 1",
        "labels from the prompt, right-padded generation and the prompt scored",
        "none of them",
        train=labels_from_prompt,
        right_padded=True,
        prompt_scored=True,
    ),
    Defect(
        "recipe 2 together",
        "recipe 2",
        "loss on the prompt, EOS ends the prompt, merged and unquantised",
        "none of them",
        train=loss_on_prompt,
        ask=eos_ends_prompt,
        merged=True,
    ),
)


def measure(settings: dict, defects=DEFECTS, seeds=SEEDS) -> pd.DataFrame:
    """One row a defect and seed: its scores and how answers ended, on the demo's evaluation rows.

    `settings`: overrides of the demo experiment, for all alike. Defects of generation and scoring share one adapter. Each
    run lies in outputs/published-*; one that is there already is not trained again.
    """
    from IPython.utils.capture import capture_output

    demo = experiments.load_experiment("demo", **settings)
    tokenizer, records = modeling.load_tokenizer(demo), data.eval_rows(demo)
    splits = data.train_rows(demo), data.validation_rows(demo), records
    train, validation, asked = (prompts.build_all(rows, tokenizer, demo.prompt) for rows in splits)
    inputs = {"data": data.fingerprint(demo), "base_model": modeling.fingerprint(demo)}
    runs, found = {}, {}
    for defect in defects:
        runs.setdefault((str(defect.overrides), defect.train), []).append(defect)
    start = time.perf_counter()
    for seed in seeds:
        for (_, change), alike in runs.items():
            if change is None and seed != seeds[0]:  # untrained: no seed changes it
                found |= {(d.name, seed): found[d.name, seeds[0]] for d in alike}
                continue
            experiment = experiments.load_experiment("demo", **settings, **alike[0].overrides, seed=seed)
            experiment = dataclasses.replace(experiment, name="published-" + re.sub(r"\W+", "_", alike[0].name))
            with capture_output():  # the logs of thirty trainings
                model = modeling.add_adapter(modeling.load_base(experiment, tokenizer), experiment)
                modeling.dequantize(model)  # the same function, faster
                if change is not None:
                    training.train(
                        experiment,
                        model,
                        tokenizer,
                        [change(row) for row in train],
                        [change(row) for row in validation],
                        inputs=inputs,
                    )
                for defect in alike:
                    answers = answer(defect, experiment, model, tokenizer, [defect.ask(row) for row in asked])
                    texts = [
                        f"{row.prompt_text} {a['prediction']}" if defect.prompt_scored else a["prediction"]
                        for row, a in zip(asked, answers, strict=True)
                    ]
                    scores = scoring.corpus(scoring.score_rows(texts, [record["summary"] for record in records]))
                    found[defect.name, seed] = {
                        **{column: scores[column] for column in ("ROUGE-1", "ROUGE-L", "sacreBLEU")},
                        "ended by EOS": sum(a["stop"] == "eos" for a in answers) / len(answers),
                    }
        print(f"seed {seed}: {(time.perf_counter() - start) / 60:.1f} minutes so far")
    return pd.DataFrame([{"defect": d.name, "seed": s, **found[d.name, s]} for d in defects for s in seeds])


def answer(defect: Defect, experiment, model, tokenizer, rows) -> list[dict]:
    """The answers to `rows` as the defect has them generated; entries as `generation.generate` returns them."""
    if defect.merged:
        from peft import PeftModel

        whole = dataclasses.replace(experiment, quantization=dataclasses.replace(experiment.quantization, bits=16))
        model = PeftModel.from_pretrained(modeling.load_base(whole, tokenizer), experiment.run_dir / "adapter")
        model = model.merge_and_unload().eval()
    return (generate_right_padded if defect.right_padded else generation.generate)(model, tokenizer, rows, experiment)


@torch.inference_mode()
def generate_right_padded(model, tokenizer, rows, experiment) -> list[dict]:
    """`generation.generate` with at least one pad token between every prompt and its answer."""
    config, results = generation.generation_config(experiment, tokenizer, model), []
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of right padding, rightly
    model.eval()
    for start in range(0, len(rows), 64):
        chosen = rows[start : start + 64]
        width = max(len(row.prompt_ids) for row in chosen) + 1
        ids = torch.full((len(chosen), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(chosen):
            ids[i, : len(row.prompt_ids)] = torch.tensor(row.prompt_ids)
            mask[i, : len(row.prompt_ids)] = 1
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        results += [
            generation.answer(row, new, tokenizer, config.eos_token_id) for row, new in zip(chosen, output, strict=True)
        ]
    transformers.logging.set_verbosity(verbosity)
    return results


def costs(measured: pd.DataFrame) -> pd.DataFrame:
    """One row a defect: mean over the seeds and difference from "corrected", each with a 95% interval (Student's t over seeds).

    Differences are paired by seed. With three seeds the interval is 2.48 standard deviations on each side: wide, and honest.
    """
    order = measured["defect"].unique()
    by_seed = measured.pivot(index="defect", columns="seed", values="ROUGE-L").loc[order]
    table = {}
    for name, values in (("ROUGE-L", by_seed), ("difference", by_seed - by_seed.loc["corrected"])):
        mean, half = values.mean(axis=1), STUDENT[values.shape[1]] * values.std(axis=1) / math.sqrt(values.shape[1])
        table |= {name: mean, f"{name} low": mean - half, f"{name} high": mean + half}
    table["ended by EOS"] = measured.groupby("defect")["ended by EOS"].mean()
    return pd.DataFrame(table).loc[order]


def explained(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `costs` for readers: what is published, what it costs, what is done instead and why."""
    rows = {}
    for defect in DEFECTS:
        row = table.loc[defect.name]
        value, difference = (
            {"value": row[name], "low": row[f"{name} low"], "high": row[f"{name} high"]}
            for name in ("ROUGE-L", "difference")
        )
        if defect.train is None:  # no seed changes it
            value["low"] = None
        rows[defect.name] = {
            "source": defect.source,
            "ROUGE-L": reporting.interval(value, 3),
            "difference": reporting.interval(difference, 3) if defect.name != "corrected" else "",
            "ended by EOS": f"{row['ended by EOS']:.0%}",
            "published": defect.published,
            "corrected": defect.corrected,
            "why": defect.why,
        }
    return pd.DataFrame(rows).T.rename_axis("defect")


def cost_plot(measured: pd.DataFrame):
    """Every seed's score of every defect, its mean, and the corrected mean as a line."""
    order = list(measured["defect"].unique())[::-1]
    fig, (axis,) = reporting.figure(height=0.34 * len(order) + 0.8)
    mean = measured.groupby("defect")["ROUGE-L"].mean()
    axis.axvline(mean["corrected"], color=reporting.COLORS["reference"], lw=1)
    colors = {"corrected": reporting.COLORS["finetuned"], "base model": reporting.COLORS["reference"]}
    for y, name in enumerate(order):
        color = colors.get(name, reporting.COLORS["base"])
        axis.plot([mean[name]] * 2, [y - 0.3, y + 0.3], color=color, lw=2)
        values = measured.loc[measured["defect"] == name, "ROUGE-L"]
        axis.plot(values, [y] * len(values), "o", ms=5, alpha=0.7, color=color)
    axis.set(xlabel="ROUGE-L (F1, 0-1, unstemmed): a dot a seed, a bar their mean", xlim=(0, None))
    axis.set_yticks(range(len(order)), order)
    axis.grid(axis="x", color="#e5e5e5", lw=0.8)
    axis.set_axisbelow(True)
    return fig


# ---------------------------------------------------------------- people's fact scores


def agreement(released: list[dict], manual: list[dict]) -> pd.DataFrame:
    """Pearson's r of each automatic score with what people found in the same summaries, with 95% bootstrap intervals over dialogues.

    `released`, `manual`: rows of `data.released_outputs` and `data.manual_scores`, system after system.
    """
    texts = [(row["Automatic Summary"], row["Dialogue"]) for row in released]
    rouge = scoring.score_rows([s for s, _ in texts], [row["Reference Summary"] for row in released])
    scores = {
        "a number or drug that the dialogue lacks": [bool(scoring.unsupported(s, d)) for s, d in texts],
        "every negation lost": [scoring.lost_negations(s, d) for s, d in texts],
        "novel bigrams": [scoring.novel_bigrams(s, d) for s, d in texts],
        "ROUGE-1": rouge["ROUGE-1"],
        "ROUGE-L": rouge["ROUGE-L"],
    }
    dialogues = len({row["ID"] for row in released})
    positions = np.arange(len(released)).reshape(-1, dialogues)  # systems x dialogues
    draws = [positions[:, draw].ravel() for draw in scoring.resamples(dialogues, seed=0)]
    table = {}
    for name, values in scores.items():
        values = np.nan_to_num(np.asarray(values, dtype=float))  # a summary of one word has no bigram
        table[name] = {}
        for human in ("FactualPrecision", "HallucinationRate", "FactualRecall", "OmissionRate"):
            theirs = np.array([row[human] for row in manual])
            low, high = np.quantile([np.corrcoef(values[d], theirs[d])[0, 1] for d in draws], [0.025, 0.975])
            r, low, high = np.round([np.corrcoef(values, theirs)[0, 1], low, high], 2) + 0.0  # no "-0.00"
            table[name][human] = f"{r:.2f} [{low:.2f}, {high:.2f}]"
    return pd.DataFrame(table).T.rename_axis(f"Pearson's r, n={len(released)}")
