"""The embedded default: dialogues that their generator writes, a base that is new to the task, training that learns."""

import importlib.util
import re

import pandas as pd
import pytest
from transformers import GenerationConfig

from src import data, engine, prompts, published, qlora, recipes, runs, scoring

DEMO = runs.ROOT / "data" / "demo"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate", DEMO / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def splits():
    return {split: data.read_rows(DEMO / f"{split}.csv") for split in ("train", "validation", "test")}


def test_the_generator_writes_the_committed_files(generator, tmp_path):
    generator.write(tmp_path)
    for split in ("train", "validation", "test"):
        assert (tmp_path / f"{split}.csv").read_bytes() == (DEMO / f"{split}.csv").read_bytes()


def test_no_dialogue_crosses_splits(splits):
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 1200,
        "validation": 100,
        "test": 200,
    }
    audit = data.audit(splits)
    assert not any(audit["across"].values()) and not any(audit["within"].values())


def test_test_rows_name_things_that_training_never_did(splits, generator):
    def entities(rows):
        text = " ".join(r["dialogue"] + " " + r["summary"] for r in rows).lower()
        words = set(re.findall(r"[a-z]+", text))
        return {e.lower() for e in [*generator.DRUGS, *generator.SURNAMES, *generator.JOBS] if e.lower() in words}

    def doses(rows):
        return {m for r in rows for m in re.findall(r"(\w+ \d+) mg", r["summary"].lower())}

    new = entities(splits["test"]) - entities(splits["train"])
    assert len(new) >= 10  # every seventh drug, job and surname is held out
    assert len(doses(splits["test"]) - doses(splits["train"])) > 0.5 * len(doses(splits["test"]))


def test_stock_answers_come_in_about_the_published_share(splits):
    # MTS-Dialog's training file: "None.", "Noncontributory.", "No known drug allergies." and the like are 5 to 10%
    stock = {"None.", "Noncontributory.", "No known drug allergies.", "Otherwise negative."}
    assert 0.04 < sum(r["summary"] in stock for r in splits["train"]) / 1200 < 0.12


def test_the_base_is_small_enough_and_its_tokenizer_round_trips(splits):
    files = list((DEMO / "base").iterdir())
    assert sum(f.stat().st_size for f in files) <= 25e6 and not any(f.suffix in (".bin", ".pt", ".pkl") for f in files)
    tokenizer = qlora.load_tokenizer(recipes.load("demo"))
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for row in [*splits["test"], {"dialogue": "é 😀 </s> <s>  two\n\ntabs\t", "summary": ""}]:
        ids = tokenizer(row["dialogue"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == row["dialogue"] and not {0, 1, 2} & set(ids)


def test_a_shortened_run_learns_to_summarise(tmp_path, monkeypatch):
    """400 rows, 100 steps, 40 test rows: the gain of the full demo, at a seventh of its time.

    The first build reached .773, .734 and .666 with seeds 42, 1 and 2 here, from .124: the gain of .45 leaves a margin.
    With it, labels on the prompt gave .043, an unsupervised EOS .562 at 1.94 words a reference word.
    """
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(DEMO)
    overrides = {"data.train_rows": 400, "data.validation_rows": 20, "evaluation.rows": 40, "device": "cpu"}
    overrides |= {"training.per_device_train_batch_size": 4}
    recipe = recipes.load("demo", overrides)
    data.prepare(recipe)
    tokenizer, records = qlora.load_tokenizer(recipe), data.load(recipe)
    rows = {name: [prompts.build(r, tokenizer, recipe.prompt) for r in part] for name, part in records.items()}
    model = published.fine_tuned(published.DEFECTS["corrected"], overrides, 42, tokenizer, rows)
    asked, greedy = prompts.dataset(rows["evaluation"]), GenerationConfig(max_new_tokens=96)
    with model.disable_adapter():
        base = engine.generate(model, tokenizer, asked, greedy, progress=False)
    tuned = engine.generate(model, tokenizer, asked, greedy, progress=False)
    references = [r["summary"] for r in records["evaluation"]]
    before, after = (
        scoring.corpus(scoring.score_rows([a["prediction"] for a in answers], references))["ROUGE-L"]
        for answers in (base, tuned)
    )
    ended = sum(a["stop"] == "eos" for a in tuned) / 40
    words = sum(len(a["prediction"].split()) for a in tuned) / sum(len(r.split()) for r in references)
    print(f"base {before:.3f}, fine-tuned {after:.3f}, EOS {ended:.2f}, words a reference word {words:.2f}")
    assert before < 0.25
    assert after > before + 0.45
    assert ended == 1 and 0.8 < words < 1.25  # without a supervised EOS it writes on


def test_notebook_04_shows_the_committed_scores():
    scores = pd.read_csv(runs.ROOT / "outputs" / "demo" / "scores.csv", index_col=0, dtype=str)
    notebook = (runs.ROOT / "notebooks" / "04_compare.ipynb").read_text(encoding="utf-8")
    for system in ("base", "fine-tuned", "whole dialogue", "nearest training summary"):
        assert all(value in notebook for value in scores.loc[system, ["ROUGE-1", "ROUGE-2", "ROUGE-L", "sacreBLEU"]])
    base, tuned = (float(scores.loc[system, "ROUGE-L"].split()[0]) for system in ("base", "fine-tuned"))
    assert base <= 0.25 and tuned >= 0.85  # what the demo promises
