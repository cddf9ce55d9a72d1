"""The published protocols, replayed: the split and its leak, the scored prompt, each defect on a row worked by hand."""

import dataclasses
import tomllib
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, GenerationConfig

from src import data, prompts, published, qlora, recipes, runs, scoring
from src.analysis import tables
from src.engine import decode
from src.published import answering, contamination, defects
from src.published.costs import holm
from src.published.costs import verdict as verdict_of
from tests.test_data import needs_mts

ROOT = runs.ROOT
ROW = prompts.Encoded("0", prompt_ids=[1, 5, 6], answer_ids=[7, 2], prompt_text="", answer_text="", cut_tokens=0)
X = prompts.IGNORE


def test_recipe_1_validates_on_rows_that_it_trains_on():
    drawn, validation = published.recipe1_split([{}] * 1201)
    assert len(drawn) == 1081 and validation == list(range(1081, 1201))
    assert len(set(drawn) & set(validation)) == 108 and len(set(range(1201)) - set(drawn) - set(validation)) == 108


@needs_mts
def test_the_published_score_lies_between_rambling_and_silence():
    recipe = recipes.load("mts_dialog")
    data.prepare(recipe)
    rows = data.load_split(recipe, "train")
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
    assert seen(defects.labels_from_prompt(ROW)) == ([1, 5, 6], [X, 5, 6])
    assert seen(defects.loss_on_prompt(ROW)) == ([1, 5, 6, 7, 2], [X, 5, 6, 7, 2])
    assert seen(defects.eos_unsupervised(ROW)) == ([1, 5, 6, 7], [X, X, X, 7])
    assert seen(defects.bos_twice(ROW)) == ([1, 1, 5, 6, 7, 2], [X, X, X, X, 7, 2])
    assert defects.eos_ends_prompt(ROW).prompt_ids == [1, 5, 6, 2]
    both = published.DEFECTS["recipe 2 together"]
    assert seen(both.train(ROW)) == ([1, 5, 6, 7, 2], [X, 5, 6, 7, 2]) and both.ask(ROW).prompt_ids == [1, 5, 6, 2]


def test_transformers_collator_overwrites_labels_as_labels_from_prompt_says():
    tokenizer = published.official_tokenizer()
    prompt, summary = tokenizer("A: hello there\nSummary:")["input_ids"], tokenizer("A greeting.")["input_ids"]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": prompt, "labels": summary}])
    assert batch["labels"][0].tolist() == prompt
    assert defects.labels_from_prompt(ROW).labels[1:] == ROW.prompt_ids[1:]  # the first label predicts nothing


def test_right_padding_predicts_the_answer_from_a_pad_token(tiny_model, records):
    recipe = recipes.load("demo", {"base_model": str(tiny_model)})
    tokenizer = qlora.load_tokenizer(recipe)
    model = qlora.load_base(recipe, tokenizer, torch.device("cpu")).eval()
    rows = prompts.build_all(records, tokenizer, recipe.prompt)
    width = max(map(len, rows["prompt_ids"])) + 1
    answers = answering.generate_right_padded(model, tokenizer, rows, GenerationConfig(max_new_tokens=1))
    for row, answer in zip(rows, answers, strict=True):
        prompt = row["prompt_ids"]
        pads = width - len(prompt)
        ids = torch.tensor([[*prompt, *[tokenizer.pad_token_id] * pads]])
        mask = torch.tensor([[1] * len(prompt) + [0] * pads])
        positions = torch.tensor([[*range(len(prompt)), *[len(prompt) - 1] * pads]])
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, -1]
        assert answer == decode.answer(row, [logits.argmax().item()], tokenizer, [tokenizer.eos_token_id])


def test_teacher_forced_predictions_are_guesses_after_the_references_own_tokens(tiny_model, records):
    recipe = recipes.load("demo", {"base_model": str(tiny_model)})
    tokenizer = qlora.load_tokenizer(recipe)
    model = qlora.load_base(recipe, tokenizer, torch.device("cpu")).eval()
    rows = prompts.build_all(records, tokenizer, recipe.prompt)
    spell = SimpleNamespace(
        pad_token_id=tokenizer.pad_token_id, decode=lambda ids, skip_special_tokens: " ".join(map(str, ids))
    )  # shows every id
    for row, found in zip(rows, answering.teacher_forced(model, spell, rows), strict=True):
        answer = [label for label in row["labels"] if label != X]
        ids, guesses = list(row["prompt_ids"]), []
        for token in answer:  # one at a time, as generation would, but the reference's token goes on
            guesses.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
            ids.append(token)
        text = " ".join(map(str, guesses))
        assert found == {"id": row["id"], "prediction": text, "stop": "reference", "tokens": len(answer)}


def test_scoring_defects_by_hand():
    rows = [dataclasses.replace(ROW, prompt_text="a b", answer_text="cat")]
    given = [{"id": "0", "prediction": "act", "stop": "eos", "tokens": 2}]

    def score(**flags):
        return published.score(defects.Defect(**flags), given, rows)

    assert (score()["ROUGE-1"], score()["ended by EOS"]) == (0, 1)
    letters = score(letters_scored=True)  # a c t against c a t: the same letters, two of them in order
    assert (letters["ROUGE-1"], letters["ROUGE-L"]) == (1, pytest.approx(2 / 3))
    assert score(teacher_forced=True)["ended by EOS"] is None
    given[0]["prediction"] = "cat"
    assert score()["ROUGE-1"] == 1
    assert score(prompt_scored=True)["ROUGE-1"] == pytest.approx(0.5)  # a b cat against cat: precision 1/3, recall 1
    with pytest.raises(ValueError, match="1 answers that are not, in this order, to the 2 rows"):
        published.score(defects.Defect(), given, rows * 2)


def by_seed(**scores):
    """What `measure` returns, from {defect with _ for blanks: the scores of seeds 1, 2, ...}."""
    return pd.DataFrame(
        {"defect": name.replace("_", " "), "seed": seed, "ROUGE-L": value, "ended by EOS": 0.5}
        for name, values in scores.items()
        for seed, value in enumerate(values, 1)
    )


def test_costs_by_hand():
    corrected = [0.5, 0.6, 0.7, 0.6, 0.6]
    measured = by_seed(
        corrected=corrected, base_model=[0.2], prompt_scored=[0.29, 0.4, 0.51], rank_4=[0.2, 0.3, 0.4],
        EOS_unsupervised=[0.1, 0.6, 1.1], **{"teacher-forced_scoring,_base": [0.45]},
    )  # fmt: skip
    table = published.costs(measured)
    assert list(table.index) == list(measured["defect"].unique())
    assert table["seeds"].tolist() == [5, 0, 3, 3, 3, 0]
    # mean .6, standard deviation sqrt(.02 / 4) = .0707: 2.776 * .0707 / sqrt(5) = .0878
    assert table.at["corrected", "ROUGE-L high"] == pytest.approx(0.6878, abs=1e-4)
    assert pd.isna(table.loc["corrected", ["difference", "p"]]).all() and table.at["corrected", "verdict"] == ""
    # the base has no seeds: the difference is as wide as the corrected mean; no interval around it alone
    base = table.loc["base model"]
    assert base["difference"] == pytest.approx(-0.4) and base["difference high"] == pytest.approx(-0.3122, abs=1e-4)
    assert pd.isna(base["ROUGE-L low"])
    # the same adapter: paired over the seeds both have. -.21, -.20, -.19: 4.303 * .01 / sqrt(3) = .0248
    paired = table.loc["prompt scored"]
    assert [paired[c] for c in ("difference", "difference low")] == pytest.approx([-0.2, -0.2248], abs=1e-4)
    # another adapter: Welch over all seeds. Standard error sqrt(.01 / 3 + .005 / 5) = .0658, degrees of freedom
    # (.01 / 3 + .001)^2 / ((.01 / 3)^2 / 2 + .001^2 / 4) = 3.23, t = 3.06: -.3 +- .2014
    welch = table.loc["rank 4"]
    assert [welch[c] for c in ("difference", "difference high")] == pytest.approx([-0.3, -0.0986], abs=1e-3)
    # variants of the base are compared with the base: two numbers, no chance in them
    assert table.at["teacher-forced scoring, base", "difference"] == pytest.approx(0.25)
    assert table["p"].isna().tolist() == [True, False, False, False, False, True]
    assert table["verdict"].tolist() == ["", "costs", "costs", "costs", "uninformative", ""]
    assert table.at["rank 4", "p"] == pytest.approx(2 * 0.0168, abs=1e-3)  # t = 4.56; the third of four


def test_a_narrow_interval_around_zero_is_small_and_one_seed_says_nothing():
    narrow = published.costs(by_seed(corrected=[0.5, 0.6, 0.7], merged=[0.5, 0.6, 0.7]).replace("merged", "own defect"))
    assert narrow.at["own defect", "verdict"] == "uninformative"  # .1 apart within each: +-.23
    close = by_seed(corrected=[0.599, 0.6, 0.601], rank_4=[0.6, 0.601, 0.602])
    assert published.costs(close).at["rank 4", "verdict"] == "small"
    one = published.costs(by_seed(corrected=[0.5], rank_4=[0.4], base_model=[0.1]))
    assert one["difference"].tolist()[1:] == pytest.approx([-0.1, -0.4])
    assert one[["ROUGE-L low", "difference low", "p"]].isna().all(axis=None) and set(one["verdict"]) == {""}
    flatters = by_seed(corrected=[0.599, 0.6, 0.601], prompt_scored=[0.7, 0.7, 0.7])
    assert published.costs(flatters).at["prompt scored", "verdict"] == "flatters"


def test_verdicts_by_hand():
    def verdict(low, high, p):
        row = {"difference": (low + high) / 2, "difference low": low, "difference high": high, "p": p}
        return verdict_of(row, corrected=0.5)

    assert [verdict(-0.3, -0.1, 0.01), verdict(0.1, 0.3, 0.01), verdict(-0.3, 0.1, float("nan"))] == [
        "costs", "flatters", "",
    ]  # fmt: skip
    assert [verdict(-0.3, -0.1, 0.06), verdict(0.1, 0.3, 0.06)] == ["perhaps costs", "perhaps flatters"]
    assert [verdict(-0.05, 0.04, 0.9), verdict(-0.06, 0.04, 0.9), verdict(-0.04, 0.06, 0.9)] == [
        "small", "uninformative", "uninformative",
    ]  # fmt: skip


def test_holm_by_hand():
    p = pd.Series({"a": 0.01, "b": 0.04, "c": 0.03, "d": float("nan"), "e": 0.9})
    # .01 * 4, .03 * 3, then .04 * 2 = .08 is below .09 and becomes it; .9 * 1
    assert holm(p).round(6).tolist()[:3] == [0.04, 0.09, 0.09]
    assert pd.isna(holm(p)["d"]) and holm(p)["e"] == 0.9


def test_a_model_that_memorised_a_text_is_found(tiny_model, records):
    recipe = recipes.load("demo", {"base_model": str(tiny_model)})
    tokenizer = qlora.load_tokenizer(recipe)
    known = [record["dialogue"] for record in records]
    control = [" ".join(reversed(text.split())) for text in known]  # the same words
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = published.memorised(model, tokenizer, known, control)
    assert before["p"] > 0.05
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        for text in known:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = published.memorised(model, tokenizer, known, control)
    assert after["p"] == 1 / 20 and after["suspected"] > -0.5 > after["control"]  # the first of 6 over 3 ways to split
    assert published.memorised(model, tokenizer, known, control, paired=True)["p"] == 1 / 8  # of 2^3 swaps
    with pytest.raises(ValueError, match="'x' has 1 tokens: expected at least 4"):
        contamination.continuation(model, tokenizer, ["x"])


def test_continuation_by_hand(tiny_model):
    recipe = recipes.load("demo", {"base_model": str(tiny_model)})
    tokenizer = qlora.load_tokenizer(recipe)
    model = qlora.load_base(recipe, tokenizer, torch.device("cpu")).eval()
    ids = tokenizer("None, my left knee", add_special_tokens=False)["input_ids"]
    n, expected = len(ids), []
    for k in range(n - n // 2, n):  # one token at a time
        logits = model(input_ids=torch.tensor([[tokenizer.bos_token_id, *ids[:k]]])).logits[0, -1]
        expected.append(logits.log_softmax(-1)[ids[k]].item())
    assert n >= 4
    found = contamination.continuation(model, tokenizer, ["None, my left knee"])
    assert found == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_anchors_that_are_stored_as_scores_say_where_from():
    table = pd.read_csv(tables.PUBLISHED, dtype=str, keep_default_na=False)
    assert (table["source"] != "").all() and table["system"].is_unique
    again = table[table["source"].str.startswith("re-scored") & (table["dataset"] == "mts_dialog")]
    assert len(again) == 15 and again["source"].str.contains(r"@[0-9a-f]{7}").all()
    assert again["split"].value_counts().to_dict() == {"test1": 8, "test2": 4, "validation": 3}
    capped = table[table["system"].str.contains("T5-(?:base|small)") & (table["dataset"] == "samsum")]
    assert len(capped) == 3 and capped["system"].str.contains("cut at").all()


def test_defects_that_train_alike_share_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(ROOT / "data" / "demo")
    data.prepare(recipes.load("demo"))
    overrides = {"data.train_rows": 8, "data.validation_rows": 2, "evaluation.rows": 4, "device": "cpu"}
    overrides |= {"generation.max_new_tokens": 4}
    names = ("corrected", "prompt scored", "merged, unquantised", "base model", "rank 4", "right-padded generation")
    monkeypatch.setattr(answering, "BATCH", 3)  # of 4 rows: two batches
    chosen = {name: published.DEFECTS[name] for name in names}
    measured = published.measure(overrides, (1,), chosen, workers=1)
    assert set(measured["defect"]) == set(names) and measured["seed"].eq(1).all()
    found = {run.config["recipe"]["name"]: run for run in runs.finished()}
    assert set(found) == {"published-corrected", "published-rank_4"}
    assert {name: run.config["identity"]["lora"]["r"] for name, run in found.items()} == {
        "published-corrected": 16,
        "published-rank_4": 4,
    }
    again = published.measure(overrides, (1,), chosen, workers=1)
    pd.testing.assert_frame_equal(again, measured)  # found, not trained again
    given = published.answers(overrides, 1, {"prompt scored": published.DEFECTS["prompt scored"]})["prompt scored"]
    assert len(runs.finished()) == 2  # alone it still finds the run of "corrected"
    assert [set(answer) for answer in given] == [{"id", "prediction", "stop", "tokens"}] * 4
    _, rows = published.encoded(recipes.load("demo", overrides))
    scored = published.score(published.DEFECTS["prompt scored"], given, rows["evaluation"])
    assert scored["ROUGE-L"] == measured.set_index("defect")["ROUGE-L"]["prompt scored"]


def test_measuring_in_processes_side_by_side_is_measuring_one_after_the_other():
    data.prepare(recipes.load("demo"))
    overrides = {"evaluation.rows": 4, "data.train_rows": 4, "generation.max_new_tokens": 4, "device": "cpu"}
    names = ("newline between letters, base", "base model", "teacher-forced scoring, base")
    base = {name: published.DEFECTS[name] for name in names}
    alone = published.measure(overrides, (1, 2), base, workers=1)
    assert alone["seed"].tolist() == [1, 1, 1] and alone["defect"].tolist() == list(names)  # no seed in the base
    assert alone["ROUGE-L"].nunique() == 3
    pd.testing.assert_frame_equal(published.measure(overrides, (1, 2), base, workers=2), alone)


def test_every_defect_but_the_controls_is_explained_and_measured():
    prose = tomllib.loads(published.PROSE.read_text(encoding="utf-8"))
    controls = {"corrected", "base model"} | {name for name in published.DEFECTS if name.endswith(", base")}
    assert len(controls) == 4 and set(prose) == set(published.DEFECTS) - controls
    assert all({"source", "published", "corrected", "why"} == set(entry) for entry in prose.values())
    table = pd.read_csv(ROOT / "outputs" / "published_recipes" / "defects.csv", index_col=0)
    assert list(table.index) == list(published.DEFECTS)


def test_the_readmes_figures_of_the_published_recipes_are_the_tables():
    folder = ROOT / "outputs" / "published_recipes"
    protocol = pd.read_csv(folder / "protocol.csv", index_col=0)["ROUGE-1"]
    samsum = pd.read_csv(folder / "samsum.csv", index_col=0)["ROUGE-L stemmed"].str.split().str[0].astype(float)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in ("perfect (the reference)", "silent (nothing)", "published: recipe 1"):
        assert f"{protocol[row]:.3f}".lstrip("0") in readme, row
    assert samsum["published: recipe 2, base"] < samsum["LEAD-3"]  # "its base scores below the first three lines"
    scores = tables.published("mts_dialog").iloc[0]
    assert float(scores["ROUGE-1"]) == pytest.approx(protocol["published: recipe 1"], abs=5e-4)
