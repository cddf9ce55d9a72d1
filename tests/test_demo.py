"""The embedded default: dialogues that their generator writes, a base that does not know the task, and training that learns."""

import dataclasses
import importlib.util
import re

import pandas as pd
import pytest

from src import data, experiments, generation, modeling, prompts, scoring, training

DEMO = experiments.ROOT / "data" / "demo"


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
    # MTS-Dialog's training file: "None.", "Noncontributory.", "No known drug allergies." and the like are 5 to 10% of its rows
    stock = {"None.", "Noncontributory.", "No known drug allergies.", "Otherwise negative."}
    assert 0.04 < sum(r["summary"] in stock for r in splits["train"]) / 1200 < 0.12


def test_the_base_is_small_enough_and_its_tokenizer_round_trips(splits):
    files = list((DEMO / "base").iterdir())
    assert sum(f.stat().st_size for f in files) <= 25e6 and not any(f.suffix in (".bin", ".pt", ".pkl") for f in files)
    tokenizer = modeling.load_tokenizer(experiments.load_experiment("demo"))
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for row in [*splits["test"], {"dialogue": "é 😀 </s> <s>  two\n\ntabs\t", "summary": ""}]:
        ids = tokenizer(row["dialogue"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == row["dialogue"] and not {0, 1, 2} & set(ids)


def test_a_shortened_run_learns_to_summarise(tmp_path, monkeypatch):
    """400 rows, 100 steps, 40 test rows: the gain of the full demo, at a seventh of its time.

    Measured: base ROUGE-L .124, fine-tuned .773, .734 and .666 with seeds 42, 1 and 2, every answer ended by EOS, .87 to 1.00 words a
    reference word. The seed is fixed at 42: the gain of .65 leaves a margin of .20. They fail when labels sit on the prompt (.043), when EOS is not
    supervised (.562, 1.94 words a reference word) and when the adapter is not applied (.124).
    """
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(DEMO)
    e = experiments.load_experiment(
        "demo", **{"data.train_rows": 400, "training.batch_size": 4, "device": "cpu", "seed": 42}
    )
    e = dataclasses.replace(e, training=dataclasses.replace(e.training, eval_steps=None, sample_rows=0))
    data.prepare(e)
    tokenizer = modeling.load_tokenizer(e)
    rows, validation = (
        prompts.build_all(r, tokenizer, e.prompt) for r in (data.train_rows(e), data.validation_rows(e)[:20])
    )
    training.train(e, modeling.add_adapter(modeling.load_base(e, tokenizer), e), tokenizer, rows, validation)
    records = data.eval_rows(e)[:40]
    model = modeling.load_finetuned(e, tokenizer)
    predictions = generation.predict(model, tokenizer, records, prompts.build_all(records, tokenizer, e.prompt), e)
    references = [r["summary"] for r in records]
    score = {
        name: scoring.corpus(scoring.score_rows([a["prediction"] for a in answers], references))["ROUGE-L"]
        for name, answers in predictions.items()
    }
    ended = sum(a["stop"] == "eos" for a in predictions["finetuned"]) / 40
    words = scoring.text_statistics([a["prediction"] for a in predictions["finetuned"]], records)[
        "words per reference word"
    ]
    print(f"base {score['base']:.3f}, fine-tuned {score['finetuned']:.3f}, EOS {ended:.2f}, length {words:.2f}")
    assert score["base"] < 0.25
    assert score["finetuned"] > score["base"] + 0.45
    assert ended == 1 and 0.8 < words < 1.25  # without a supervised EOS it writes on


def test_readme_and_notebook_04_show_the_committed_scores():
    outputs = experiments.ROOT / "outputs" / "demo"
    scores = pd.read_csv(outputs / "scores.csv", index_col=0, dtype=str)
    readme = (experiments.ROOT / "README.md").read_text(encoding="utf-8")
    notebook = (experiments.ROOT / "notebooks" / "04_compare.ipynb").read_text(encoding="utf-8")
    columns = ["ROUGE-1", "ROUGE-2", "ROUGE-L", "sacreBLEU"]
    for system in ("base", "fine-tuned", "whole dialogue", "nearest training summary"):
        values = scores.loc[system, columns].tolist()
        assert f"| {system} | {' | '.join(values)} | {scores.loc[system, 'n']} |" in readme
        assert all(value in notebook for value in values)
    base, tuned = (scores.loc[system, "ROUGE-L"].split()[0].lstrip("0") for system in ("base", "fine-tuned"))
    assert f"| ROUGE-L unstemmed | {base} | {tuned} |" in readme
