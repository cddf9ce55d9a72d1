"""One published defect at a time, trained and scored on the demo's small model; defects.toml says who and why."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig, TrainingArguments

from src import data, engine, prompts, qlora, recipes, runs, scoring
from src.engine import decode

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
    prompt_scored: bool = False


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
    "recipe 1 together": Defect(train=labels_from_prompt, right_padded=True, prompt_scored=True),
    "recipe 2 together": Defect(train=loss_on_prompt, ask=eos_ends_prompt, merged=True),
}


def measure(overrides: dict, seeds, defects=DEFECTS) -> pd.DataFrame:
    """One row a defect and seed: scores and how answers ended, on the demo's evaluation rows.

    `overrides`: of the demo recipe, for all of them. Defects of generation and scoring share one adapter. Each run
    lies in outputs/published-*; one that is there already is not trained again.
    """
    demo = recipes.load("demo", overrides)
    tokenizer, parts = qlora.load_tokenizer(demo), data.load(demo)
    rows = {name: [prompts.build(r, tokenizer, demo.prompt) for r in part] for name, part in parts.items()}
    found = []
    for seed in seeds:
        models = {}
        for name, defect in defects.items():
            recipe = recipes.load("demo", {**overrides, **defect.overrides, "seed": seed})
            key = (str(defect.overrides), defect.train)
            if key not in models:
                models[key] = fine_tuned(name, recipe, defect, tokenizer, rows)
            found.append(
                {"defect": name, "seed": seed} | _scores(defect, recipe, models[key], tokenizer, rows["evaluation"])
            )
    return pd.DataFrame(found)


def fine_tuned(name: str, recipe, defect: Defect, tokenizer, rows: dict):
    """A model trained under the defect (02's cells in short), or the base with a fresh adapter where it says so."""
    device = qlora.resolve_device(recipe.device)
    recipe = recipe.model_copy(update={"name": "published-" + re.sub(r"\W+", "_", name)})
    quantization, lora = qlora.quantization_config(recipe, device), LoraConfig(**recipe.lora.model_dump())
    transformers.set_seed(recipe.seed)
    model = get_peft_model(qlora.load_base(recipe, tokenizer, device, quantization), lora)
    if defect.train is None:
        return model
    train, validation = (prompts.dataset([defect.train(row) for row in rows[part]]) for part in ("train", "validation"))
    ours = {"eval_steps", "early_stopping_patience", "sample_rows", "keep_checkpoints"}  # the other fields are theirs
    arguments = TrainingArguments(
        output_dir="outputs", seed=recipe.seed, eval_strategy="epoch", save_strategy="epoch", disable_tqdm=True,
        use_cpu=device.type == "cpu", **recipe.training.model_dump(exclude=ours),
    )  # fmt: skip
    plan = engine.plan(qlora.load_config(recipe), lora, quantization, arguments, train, device)
    trainer = engine.FastTrainer(model, arguments, train, validation, tokenizer, plan)
    run = runs.open(recipe, trainer, prompts.template(tokenizer, recipe.prompt))
    if run.finished:
        run.load_adapter(trainer)
    else:
        trainer.train(resume_from_checkpoint=run.checkpoint())
        run.save(trainer, tokenizer)
    return model


def _scores(defect: Defect, recipe, model, tokenizer, rows: list) -> dict:
    asked = prompts.dataset([defect.ask(row) for row in rows])
    if defect.merged:
        whole = recipe.model_copy(
            update={"quantization": recipe.quantization.model_copy(update={"load_in_4bit": False})}
        )
        model = merged(model, qlora.load_base(whole, tokenizer, model.device))
    generation = GenerationConfig(max_new_tokens=recipe.generation.max_new_tokens)
    generate = generate_right_padded if defect.right_padded else engine.generate
    answers = generate(model, tokenizer, asked, generation, progress=False)
    texts = [a["prediction"] for a in answers]
    if defect.prompt_scored:
        texts = [f"{row.prompt_text} {text}" for row, text in zip(rows, texts, strict=True)]
    scores = scoring.corpus(scoring.score_rows(texts, [row.answer_text for row in rows]))
    ended = sum(a["stop"] == "eos" for a in answers) / len(answers)
    return {column: scores[column] for column in ("ROUGE-1", "ROUGE-L", "sacreBLEU")} | {"ended by EOS": ended}


def merged(model, base):
    """An unquantised base model with the adapter of `model` merged into its weights."""
    other = PeftModel(base, model.peft_config["default"])
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    return other.merge_and_unload().eval()


@torch.inference_mode()
def generate_right_padded(model, tokenizer, rows, generation, progress=False) -> list[dict]:
    """`engine.generate` with at least one pad token between every prompt and its answer."""
    config = decode.complete(generation, tokenizer, model)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of right padding, rightly
    model.eval()
    width = max(map(len, rows["prompt_ids"])) + 1
    ids = torch.tensor([p + [tokenizer.pad_token_id] * (width - len(p)) for p in rows["prompt_ids"]])
    mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in rows["prompt_ids"]])
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    transformers.logging.set_verbosity(verbosity)
    return [decode.answer(row, new, tokenizer, config.eos_token_id) for row, new in zip(rows, output, strict=True)]


def costs(measured: pd.DataFrame) -> pd.DataFrame:
    """One row a defect: mean over the seeds and difference from "corrected", each with a 95% interval (Student's t).

    Differences are paired by seed. With three seeds the interval is 2.48 standard deviations on each side.
    """
    from scipy.stats import t

    order = measured["defect"].unique()
    by_seed = measured.pivot(index="defect", columns="seed", values="ROUGE-L").loc[order]
    count, table = by_seed.shape[1], {}
    for name, values in (("ROUGE-L", by_seed), ("difference", by_seed - by_seed.loc["corrected"])):
        mean, half = values.mean(axis=1), t.ppf(0.975, count - 1) * values.std(axis=1) / count**0.5
        table |= {name: mean, f"{name} low": mean - half, f"{name} high": mean + half}
    table["ended by EOS"] = measured.groupby("defect")["ended by EOS"].mean()
    return pd.DataFrame(table).loc[order]
