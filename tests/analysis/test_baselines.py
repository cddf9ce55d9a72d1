"""Systems without a model by hand, and the published files' known scores."""

import re
import time

import pytest

from src import data, recipes, scoring
from src.analysis import baselines
from tests.test_data import needs_mts, needs_samsum

RECORD = {
    "id": "1",
    "section": "ALLERGY",
    "dialogue": "A: one\nB: two three four\nA: five six\nB: seven eight nine ten\nA: x",
    "summary": "",
}
TRAIN = [{"section": "ALLERGY", "summary": s, "dialogue": "z"} for s in ("None.", "None.", "Sulfa.")] + [
    {"section": "CC", "summary": "Cough.", "dialogue": "B: seven eight nine ten"}
]


def test_leads_and_stock_answers_by_hand():
    assert baselines.lead3(RECORD) == "A: one\nB: two three four\nA: five six"
    assert baselines.longest3(RECORD) == "B: two three four\nA: five six\nB: seven eight nine ten"
    assert baselines.stock_answers([RECORD, {**RECORD, "section": "NEW"}], TRAIN) == ["None.", "None."]


def test_the_nearest_summary_is_of_the_own_section_where_training_has_it():
    assert baselines.nearest_summaries([{**RECORD, "section": ""}], TRAIN) == ["Cough."]
    assert baselines.nearest_summaries([{**RECORD, "section": "CC"}], TRAIN) == ["Cough."]
    assert baselines.nearest_summaries([RECORD], TRAIN) == ["None."]  # nothing in common: the first of its section
    # rare words weigh more: "a" is in every dialogue (weight ln 1 = 0), "b" in one of three (ln 3)
    train = [{"section": "", "summary": s, "dialogue": d} for s, d in (("1", "a a c"), ("2", "a b"), ("3", "a"))]
    assert baselines.nearest_summaries([{**RECORD, "section": "", "dialogue": "a a a b"}], train) == ["2"]


def test_systems_without_a_model_have_a_summary_for_every_record():
    systems = baselines.without_model([RECORD, {**RECORD, "id": "2", "section": ""}], TRAIN)
    assert list(systems) == [
        "whole dialogue", "LEAD-3", "LONGEST-3", "nearest training summary", "stock answer of the section",
    ]  # fmt: skip
    assert all(len(summaries) == 2 for summaries in systems.values())
    assert "stock answer of the section" not in baselines.without_model([{**RECORD, "section": ""}], TRAIN)


def test_human_pairs_need_two_different_summaries():
    rows = [{"dialogue": d, "summary": s} for d, s in (("x", "1"), ("X!", "2"), ("x", "3"), ("y", "4"), ("y", "4"))]
    assert baselines.human_pairs(rows) == [("2", "1")]


def test_others_are_scored_on_their_own_rows():
    others = {"a person": ("all", ["s 1", "x"], ["s 1", "y"])}
    found = baselines.score_others(others, seed=0)["a person"]
    assert (found["split"], found["n"]) == ("all", 2)
    assert found["all"]["ROUGE-1"] == {"value": 0.5, "low": None, "high": None}
    assert baselines.other_systems(recipes.load("demo")) == {}


@pytest.mark.parametrize(
    ("summary", "swapped"),
    [
        ("Ann calls Bob. Bob thanks Ann.", "Bob calls Ann. Ann thanks Bob."),
        ("Bob's mother likes Ann", "Ann's mother likes Bob"),
        ("Ann Lee tells Bob about Ann", "Bob tells Ann Lee about Ann"),  # the second Ann is no speaker here
        ("Ann Lee and Cy wait for Bob", "Bob and Cy wait for Ann Lee"),  # the first two who speak, of three
        ("Annabel calls Bob", None),  # names one of them
        ("ann calls Bob", None),
        ("They meet", None),
    ],
)
def test_the_first_two_speakers_named_are_swapped(summary, swapped):
    first = "Ann Lee" if "Ann Lee" in summary else "Ann"
    record = {"dialogue": f"{first}: hi Dan: x\nBob: hello\n{first}: bye\nCy: me too", "summary": summary}
    assert baselines.speakers_swapped(record) == swapped


def test_a_name_within_another_is_not_swapped():
    record = {"dialogue": "Ann: x\nAnn Lee: y", "summary": "Ann Lee calls Ann."}
    assert baselines.speakers_swapped(record) == "Ann calls Ann Lee."


def test_names_with_signs_are_swapped_as_they_stand():
    record = {"dialogue": "A.J.: x\nMr. (B): y", "summary": "A.J met A.J. and Mr. (B)"}
    assert baselines.speakers_swapped(record) == "A.J met Mr. (B) and A.J."


@pytest.mark.parametrize(
    ("summary", "pattern"),
    [
        ("Takes 5 mg.", r"Takes [2-46-9] mg\."),
        ("Takes 57 mg.", r"Takes (?!57)[1-9]\d mg\."),
        ("In 1984. He came", r"In 19(?!84)[1-9]\d\. He came"),  # the last two digits
        ("Six months", "(Two|Three|Four|Five|Seven|Eight|Nine) months"),
        ("for twenty days", "for (thirty|forty|fifty|sixty|seventy|eighty|ninety) days"),
        ("1. Zocor 2. Aspirin 40 mg", r"1\. Zocor 2\. Aspirin (?!40)[1-9]\d mg"),
    ],
)
def test_one_number_changes_into_another_of_its_kind(summary, pattern):
    changed = [baselines.number_changed({"id": str(i), "summary": summary}) for i in range(40)]
    assert changed == [baselines.number_changed({"id": str(i), "summary": summary}) for i in range(40)]
    assert {bool(re.fullmatch(pattern, text or summary)) for text in changed} == {True}


def test_only_one_of_two_numbers_changes_and_which_depends_on_the_id():
    texts = {baselines.number_changed({"id": str(i), "summary": "5 or 7"}) for i in range(99)}
    assert {text[0] == "5" for text in texts} == {True, False}
    assert all((text[0] == "5") != (text[-1] == "7") for text in texts)
    assert baselines.number_changed({"id": "1", "summary": "one of 1 patient"}) is None


def test_probes_hold_the_rows_that_can_be_changed():
    records = [
        {"id": "1", "dialogue": "Ann: x\nBob: y", "summary": "Ann calls Bob"},
        {"id": "2", "dialogue": "Ann: x\nBob: y", "summary": "They talk"},
    ]
    assert baselines.probes(records, "test") == {
        "references, two speakers swapped": ("test, 1 of 2 rows", ["Bob calls Ann"], ["Ann calls Bob"])
    }
    scored = baselines.score_others(baselines.probes(records, "test"), seed=0)["references, two speakers swapped"]
    assert scored["n"] == 1 and scored["all"]["ROUGE-1"]["value"] == 1  # the words are the same
    assert scored["all"]["ROUGE-L"]["value"] == pytest.approx(1 / 3)  # one word in order: P = R = 1/3
    assert baselines.probes(records[1:], "test") == {}


@needs_samsum
def test_a_wrong_speaker_costs_one_percent_of_rouge_1():
    recipe = recipes.load("samsum")
    data.prepare(recipe)
    split, wrong, right = baselines.probes(data.evaluation_rows(recipe), "test")["references, two speakers swapped"]
    scores = scoring.corpus(scoring.score_rows(wrong, right))
    assert split == "test, 619 of 819 rows" and len(wrong) == 619
    assert [round(scores[c], 3) for c in ("ROUGE-1", "ROUGE-L")] == [0.987, 0.864]  # review/numbers.md
    assert round(scores["sacreBLEU"], 1) == 79.8


@needs_mts
def test_published_mts_dialog_figures():
    recipe = recipes.load("mts_dialog", {"evaluation.split": "validation"})
    data.prepare(recipe)
    records = data.evaluation_rows(recipe)
    references = [record["summary"] for record in records]
    columns = ["ROUGE-1", "ROUGE-2", "ROUGE-L"]
    whole = scoring.corpus(scoring.score_rows([r["dialogue"] for r in records], references))
    assert [round(whole[c], 3) for c in columns] == [0.209, 0.068, 0.152]
    longest = scoring.corpus(scoring.score_rows([baselines.longest3(r) for r in records], references))
    assert [round(100 * longest[c], 1) for c in columns] == [21.1, 7.0, 15.7]
    nearest = scoring.corpus(
        scoring.score_rows(baselines.nearest_summaries(records, data.train_rows(recipe)), references)
    )
    assert [round(nearest[c], 4) for c in ("ROUGE-1", "ROUGE-L")] == [0.2368, 0.1930]  # review/numbers.md
    systems = baselines.other_systems(recipe)
    assert [(split, len(p), len(r)) for split, p, r in systems.values()] == [("validation", 100, 100)] * 4
    scores = [scoring.corpus(scoring.score_rows(p, r)) for _, p, r in systems.values()]
    assert [round(s["ROUGE-1"], 4) for s in scores] == [0.2948, 0.3838, 0.4021, 0.4088]
    assert [100 * s["ROUGE-2"] for s in scores] == pytest.approx([11.6, 17.2, 16.9, 16.6], abs=0.06)
    assert [round(100 * s["ROUGE-L"], 1) for s in scores] == [26.0, 31.2, 33.7, 33.9]


@needs_samsum
def test_published_samsum_figures():
    recipe = recipes.load("samsum")
    data.prepare(recipe)
    records = data.evaluation_rows(recipe)
    references = [record["summary"] for record in records]
    columns = ["ROUGE-1 stemmed", "ROUGE-2 stemmed", "ROUGE-L stemmed", "ROUGE-Lsum stemmed"]
    lead = scoring.corpus(scoring.score_rows([baselines.lead3(r) for r in records], references))
    assert [round(100 * lead[c], 1) for c in columns] == [31.3, 8.7, 24.2, 29.4]
    longest = scoring.corpus(scoring.score_rows([baselines.longest3(r) for r in records], references))
    assert [round(100 * longest[c], 1) for c in columns[:3]] == [31.9, 10.2, 24.2]
    split, one, another = baselines.other_systems(recipe)["one human against another"]
    human = scoring.corpus(scoring.score_rows(one, another))
    assert split == "all"
    assert len(one) == 563  # dialogues with two different summaries; one more occurs twice with the same
    assert [100 * human[c] for c in columns[:3]] == pytest.approx([50.4, 24.0, 40.6], abs=0.15)


@needs_samsum
def test_scoring_every_system_on_samsum_takes_seconds():
    recipe = recipes.load("samsum")
    data.prepare(recipe)
    records, train = data.evaluation_rows(recipe), data.train_rows(recipe)
    systems = baselines.without_model(records, train)
    start = time.perf_counter()
    scores = scoring.evaluate(records, systems, set(), seed=0)
    print(f"{len(systems)} systems, {len(records)} rows: {time.perf_counter() - start:.1f} s")
    assert scores["n"] == 819 and len(scores["systems"]) == 4
