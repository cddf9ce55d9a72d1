"""The published protocols, replayed: the split and its leak, the scored prompt, each defect on a row worked by hand, and the table."""

import pandas as pd
import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from src import data, experiments, generation, modeling, prompts, published, scoring
from tests.test_data import needs_mts

ROOT = experiments.ROOT
ROW = prompts.Encoded("0", prompt_ids=[1, 5, 6], answer_ids=[7, 2], prompt_text="", answer_text="", cut_tokens=0)
X = prompts.IGNORE


def test_recipe_1_validates_on_rows_that_it_trains_on():
    drawn, validation = published.recipe1_split([{}] * 1201)
    assert len(drawn) == 1081 and validation == list(range(1081, 1201))
    assert len(set(drawn) & set(validation)) == 108 and len(set(range(1201)) - set(drawn) - set(validation)) == 108


@needs_mts
def test_the_published_score_lies_between_rambling_and_silence():
    e = experiments.load_experiment("mts_dialog")
    data.prepare(e, progress=False)
    rows = data.load_split(e, "train")
    _, validation = published.recipe1_split(rows)
    replayed = published.recipe1_protocol(rows, validation, published.official_tokenizer())
    references = [rows[i]["summary"] for i in validation]
    perfect, silent, rambling = (scoring.corpus(scoring.score_rows(p, references)) for p in replayed.values())
    assert perfect["ROUGE-1"] == pytest.approx(0.306, abs=0.001)
    assert silent["ROUGE-1"] == pytest.approx(0.194, abs=0.002)
    for column, value in {"ROUGE-1": 0.1318, "ROUGE-2": 0.0456, "ROUGE-L": 0.0900}.items():  # as published
        assert rambling[column] < value < silent[column] < perfect[column]


def test_each_defect_does_to_a_row_what_it_says():
    def seen(row):
        return row.input_ids, row.labels

    assert seen(ROW) == ([1, 5, 6, 7, 2], [X, X, X, 7, 2])
    assert seen(published.labels_from_prompt(ROW)) == ([1, 5, 6], [X, 5, 6])
    assert seen(published.loss_on_prompt(ROW)) == ([1, 5, 6, 7, 2], [X, 5, 6, 7, 2])
    assert seen(published.eos_unsupervised(ROW)) == ([1, 5, 6, 7], [X, X, X, 7])
    assert seen(published.bos_twice(ROW)) == ([1, 1, 5, 6, 7, 2], [X, X, X, X, 7, 2])
    assert published.eos_ends_prompt(ROW).prompt_ids == [1, 5, 6, 2]
    both = {d.name: d for d in published.DEFECTS}["recipe 2 together"]
    assert seen(both.train(ROW)) == ([1, 5, 6, 7, 2], [X, 5, 6, 7, 2]) and both.ask(ROW).prompt_ids == [1, 5, 6, 2]


def test_transformers_collator_overwrites_labels_as_labels_from_prompt_says():
    tokenizer = published.official_tokenizer()
    prompt, summary = tokenizer("A: hello there\nSummary:")["input_ids"], tokenizer("A greeting.")["input_ids"]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": prompt, "labels": summary}])
    assert batch["labels"][0].tolist() == prompt
    assert published.labels_from_prompt(ROW).labels[1:] == ROW.prompt_ids[1:]  # the first label predicts nothing


def test_right_padding_predicts_the_answer_from_a_pad_token(tiny_model, records):
    e = experiments.load_experiment("demo", **{"base_model": str(tiny_model), "generation.max_new_tokens": 1})
    tokenizer = modeling.load_tokenizer(e)
    model = modeling.load_base(e, tokenizer).eval()
    rows = prompts.build_all(records, tokenizer, e.prompt)
    width = max(len(row.prompt_ids) for row in rows) + 1
    for row, answer in zip(rows, published.generate_right_padded(model, tokenizer, rows, e), strict=True):
        pads = width - len(row.prompt_ids)
        ids = torch.tensor([[*row.prompt_ids, *[tokenizer.pad_token_id] * pads]])
        mask = torch.tensor([[1] * len(row.prompt_ids) + [0] * pads])
        positions = torch.tensor([[*range(len(row.prompt_ids)), *[len(row.prompt_ids) - 1] * pads]])
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, -1]
        assert answer == generation.answer(row, [logits.argmax().item()], tokenizer, [tokenizer.eos_token_id])


def test_costs_by_hand():
    scores = {"corrected": [0.5, 0.6, 0.7], "worse": [0.3, 0.4, 0.5]}
    rows = [
        {"defect": name, "seed": seed, "ROUGE-L": value, "ended by EOS": 0.5}
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]
    worse = published.costs(pd.DataFrame(rows)).loc["worse"]
    # mean .4, standard deviation .1: 4.303 * .1 / sqrt(3) = .2484; every seed loses exactly .2, so that interval has no width
    assert worse["ROUGE-L"] == pytest.approx(0.4) and worse["ROUGE-L high"] == pytest.approx(0.4 + 0.2484, abs=1e-4)
    for column in ("difference", "difference low", "difference high"):
        assert worse[column] == pytest.approx(-0.2)


def test_agreement_by_hand():
    # the first system invents a dose in every summary and people say so; the second copies the dialogue
    released, manual = [], []
    for system in range(2):
        for n in range(6):
            dialogue = f"Patient: no {n + 20} mg."
            summary = f"Took {n + 50} mg." if system == 0 else dialogue
            released.append(
                {"ID": str(n), "Dialogue": dialogue, "Automatic Summary": summary, "Reference Summary": "Took it."}
            )
            human = float(system == 0)
            manual.append(
                {
                    "HallucinationRate": human,
                    "FactualPrecision": 1 - human,
                    "FactualRecall": n / 6,
                    "OmissionRate": human,
                }
            )
    table = published.agreement(released, manual)
    lacking = table.loc["a number or drug that the dialogue lacks"]
    assert lacking["HallucinationRate"] == "1.00 [1.00, 1.00]" and lacking["FactualPrecision"] == "-1.00 [-1.00, -1.00]"
    assert table.loc["every negation lost", "OmissionRate"] == "1.00 [1.00, 1.00]"
    assert table.loc["every negation lost", "FactualRecall"].startswith("0.00 ")


def test_defects_that_train_alike_share_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(ROOT / "data" / "demo")
    data.prepare(experiments.load_experiment("demo"))
    settings = {"data.train_rows": 8, "data.validation_rows": 2, "data.eval_rows": 4, "training.eval_steps": None}
    settings |= {"training.sample_rows": 0, "generation.max_new_tokens": 4, "device": "cpu"}
    by_name = {d.name: d for d in published.DEFECTS}
    chosen = [by_name[n] for n in ("corrected", "prompt scored", "merged, unquantised", "base model", "rank 4")]
    measured = published.measure(settings, chosen, seeds=(1,))
    assert set(measured["defect"]) == {d.name for d in chosen} and measured["seed"].eq(1).all()
    runs = {p.name.rpartition("-")[0]: p for p in (tmp_path / "outputs").iterdir()}
    assert set(runs) == {"published-corrected", "published-rank_4"}
    ranks = {name: experiments.read_json(p / "adapter" / "adapter_config.json", "02")["r"] for name, p in runs.items()}
    assert ranks == {"published-corrected": 16, "published-rank_4": 4}


def test_readme_tells_what_the_tables_hold():
    folder = ROOT / "outputs" / "published_recipes"
    table = pd.read_csv(folder / "defects.csv", index_col=0)
    assert list(table.index) == [d.name for d in published.DEFECTS]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line.split(" | ") for line in readme.splitlines() if line.startswith("| ") and line.count(" | ") == 3]
    told = {cells[0][2:]: cells[2] for cells in lines if cells[0][2:] in table.index}
    assert len(told) >= 10
    for name, value in told.items():
        assert value == table.loc[name, "ROUGE-L"], name
    protocol = pd.read_csv(folder / "protocol.csv", index_col=0)["ROUGE-1"]
    samsum = pd.read_csv(folder / "samsum.csv", index_col=0)["ROUGE-L stemmed"].str.split().str[0]
    prose = " ".join(readme.split())
    for start, value in {
        "a perfect summariser gets ROUGE-1 ": protocol["perfect (the reference)"],
        "one that says nothing ": protocol["silent (nothing)"],
        "its published ": protocol["published: recipe 1"],
        "lies below the first three lines of a chat (": float(samsum["LEAD-3"]),
        "what one annotator scores against another (": float(samsum["one human against another"]),
    }.items():
        assert start + f"{value:.3f}".lstrip("0") in prose, start
