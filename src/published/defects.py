"""One published defect at a time, trained and scored, on the demo's small model or another recipe's.

defects.toml says who published which, and why it matters.
"""

import contextlib
import dataclasses
import io
import itertools
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from src import data, engine, prompts, qlora, recipes, runs, scoring
from src.published.answering import answer

PROSE = Path(__file__).with_name("defects.toml")


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
    """One thing that is published (defects.toml says who does what); the defaults are what this repository does."""

    overrides: dict = field(default_factory=dict)  # of the recipe, in training
    train: Callable | None = as_is  # what becomes of a training row (prompts.Encoded); None: no training
    ask: Callable = as_is  # what becomes of a row to be answered
    right_padded: bool = False
    merged: bool = False  # the adapter is merged into unquantised weights before generation
    teacher_forced: bool = False  # nothing is generated: each token is guessed after the reference's tokens before it
    prompt_scored: bool = False
    letters_scored: bool = False  # a newline between all letters of answer and reference

    @property
    def training(self) -> tuple:
        """Defects of generation and scoring that agree in this share one fine-tuned model a seed."""
        return tuple((key, str(value)) for key, value in self.overrides.items()), self.train

    @property
    def answering(self) -> tuple:
        """Defects that agree in this too differ in scoring alone, and share the answers."""
        return self.training, self.ask, self.right_padded, self.merged, self.teacher_forced


DEFECTS = {
    "corrected": Defect(),
    "base model": Defect(train=None),
    "labels from the prompt": Defect(train=labels_from_prompt),
    "prompt scored": Defect(prompt_scored=True),
    "right-padded generation": Defect(right_padded=True),
    "q and v only": Defect({"lora.target_modules": ["q_proj", "v_proj"]}),
    "rank 4": Defect({"lora.r": 4}),
    "loss on the prompt": Defect(train=loss_on_prompt),
    "BOS twice": Defect(train=bos_twice, ask=bos_twice),
    "EOS ends the prompt": Defect(ask=eos_ends_prompt),
    "merged, unquantised": Defect(merged=True),
    "EOS unsupervised": Defect(train=eos_unsupervised),
    "teacher-forced scoring": Defect(teacher_forced=True),
    "teacher-forced scoring, base": Defect(train=None, teacher_forced=True),
    "newline between letters": Defect(letters_scored=True),
    "newline between letters, base": Defect(train=None, letters_scored=True),
    "recipe 1 together": Defect(train=labels_from_prompt, right_padded=True, prompt_scored=True),
    "recipe 2 together": Defect(train=loss_on_prompt, ask=eos_ends_prompt, merged=True),
}


def measure(overrides: dict, seeds, defects=DEFECTS, recipe: str = "demo", workers: int | None = None) -> pd.DataFrame:
    """One row a defect and seed: scores and how answers ended, on the recipe's evaluation rows.

    `overrides`: of the recipe, for all of them. What is not trained depends on no seed and has one row, of the first.
    `workers`: processes side by side, each with one thread; by default one a core on a CPU, and 1 on a GPU.
    """
    if workers is None:
        on_cpu = qlora.resolve_device(recipes.load(recipe, overrides).device).type == "cpu"
        workers = os.cpu_count() if on_cpu else 1
    jobs = []  # one a seed and training, so that no adapter is trained twice at once
    for seed in seeds:
        chosen = [name for name, defect in defects.items() if defect.train or seed == seeds[0]]
        for training in {defects[name].training: None for name in chosen}:
            jobs.append((overrides, seed, {n: defects[n] for n in chosen if defects[n].training == training}, recipe))
    if workers == 1:
        found = [_measured(*job) for job in jobs]
    else:
        spawn = multiprocessing.get_context("spawn")  # a forked child would hang in torch's threads
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = list(pool.map(_measured, *zip(*jobs, strict=True)))
    order = list(defects)
    rows = sorted(itertools.chain(*found), key=lambda row: (seeds.index(row["seed"]), order.index(row["defect"])))
    return pd.DataFrame(rows)


def _measured(overrides: dict, seed: int, defects: dict, recipe: str) -> list[dict]:
    """The rows of `measure` for one seed and defects that share a training; what it prints is dropped."""
    qlora.quiet()
    with contextlib.redirect_stdout(io.StringIO()):
        given = answers(overrides, seed, defects, recipe)
        _, rows = encoded(recipes.load(recipe, overrides))
        return [{"defect": n, "seed": seed} | score(defects[n], part, rows["evaluation"]) for n, part in given.items()]


def answers(overrides: dict, seed: int, defects=DEFECTS, recipe: str = "demo") -> dict[str, list[dict]]:
    """What a model fine-tuned under each defect answers: {defect: [{"id", "prediction", "stop", "tokens"}]}.

    In the order of the evaluation rows; `score` needs nothing else. Each training lies in outputs/published-*, and one
    that is there already is not repeated, so one call may ask for one defect: `{name: DEFECTS[name]}`.
    """
    tokenizer, rows = encoded(recipes.load(recipe, overrides))
    models, given = {}, {}
    for defect in defects.values():
        if defect.training not in models:
            models[defect.training] = fine_tuned(defect, overrides, seed, tokenizer, rows, recipe)
        if defect.answering not in given:
            asked = recipes.load(recipe, overrides), tokenizer, rows["evaluation"]
            given[defect.answering] = answer(defect, models[defect.training], *asked)
    columns = ("id", "prediction", "stop", "tokens")
    found = {name: given[defect.answering] for name, defect in defects.items()}
    return {name: [{column: row[column] for column in columns} for row in part] for name, part in found.items()}


def score(defect: Defect, given: list[dict], rows: list[prompts.Encoded]) -> dict:
    """ROUGE-1, ROUGE-L, sacreBLEU and the share "ended by EOS" of one defect's `answers` to these rows.

    The share is None where nothing was generated. Raises ValueError when the answers are to other rows.
    """
    if [row.id for row in rows] != [answer["id"] for answer in given]:
        raise ValueError(f"{len(given)} answers that are not, in this order, to the {len(rows)} rows: pass both whole.")
    texts, references = [answer["prediction"] for answer in given], [row.answer_text for row in rows]
    if defect.prompt_scored:
        texts = [f"{row.prompt_text} {text}" for row, text in zip(rows, texts, strict=True)]
    if defect.letters_scored:
        texts, references = (["\n".join(text) for text in part] for part in (texts, references))
    scores = scoring.corpus(scoring.score_rows(texts, references))
    ended = None if defect.teacher_forced else sum(answer["stop"] == "eos" for answer in given) / len(given)
    return {column: scores[column] for column in ("ROUGE-1", "ROUGE-L", "sacreBLEU")} | {"ended by EOS": ended}


def encoded(recipe):
    """The recipe's tokenizer, and its "train", "validation" and "evaluation" rows as lists of prompts.Encoded."""
    tokenizer = qlora.load_tokenizer(recipe)
    parts = data.load(recipe)
    return tokenizer, {name: [prompts.build(r, tokenizer, recipe.prompt) for r in part] for name, part in parts.items()}


def fine_tuned(defect: Defect, overrides: dict, seed: int, tokenizer, rows: dict, recipe: str = "demo"):
    """A model trained under the defect (02's cells in short), or the base with a fresh adapter where it says so.

    Trained to the end without evaluations: the last adapter is the one.
    """
    first = next((name for name, known in DEFECTS.items() if known.training == defect.training), "own")
    name = "published-" + ("" if recipe == "demo" else f"{recipe}-") + re.sub(r"\W+", "_", first)
    best = {"training.load_best_model_at_end": False}
    recipe = recipes.load(recipe, {**overrides, **best, **defect.overrides, "seed": seed})
    recipe = recipe.model_copy(update={"name": name})
    model = qlora.load_adapted(recipe, tokenizer, qlora.resolve_device(recipe.device))
    if defect.train:
        train(defect, recipe, model, tokenizer, rows)
    if engine.dequantized_fits(model):
        engine.dequantize(model)  # the same values, computed once and not at every step
    return model


def train(defect: Defect, recipe, model, tokenizer, rows: dict):
    """Train the model's adapter on the rows as the defect has them, or load it from the run that did; return the run.

    Evaluates every epoch where the recipe keeps the best adapter, else never.
    """
    device, lora = model.device, model.peft_config["default"]
    parts = [prompts.dataset([defect.train(row) for row in rows[part]]) for part in ("train", "validation")]
    when = "epoch" if recipe.training.load_best_model_at_end else "no"
    arguments = qlora.training_arguments(recipe, device, eval_strategy=when, save_strategy=when)
    config, quantization = qlora.load_config(recipe), qlora.quantization_config(recipe, device)
    plan = engine.plan(config, lora, quantization, arguments, parts[0], device, **recipe.engine.limits())
    rouge = recipe.training.metric_for_best_model == "rougeL"
    generation = qlora.generation_config(recipe)
    callbacks = [engine.SampleAnswers(parts[1], tokenizer, generation, 0, scoring.rouge_l)] if rouge else []
    trainer = engine.FastTrainer(model, arguments, *parts, tokenizer, plan, callbacks)
    run = runs.open(recipe, trainer, prompts.template(tokenizer, recipe.prompt))
    if run.finished:
        run.load_adapter(trainer)
    else:
        trainer.train(resume_from_checkpoint=run.checkpoint())
        run.save(trainer, tokenizer)
    return run
