"""Numbers, drugs and negations: read from words or digits, and held against the dialogue."""

import math

import pytest

from src.analysis import faithfulness


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ten milligrams of lisinopril", {"10", "lisinopril"}),
        ("nineteen eighty eight, thirty-eight, three hundred", {"1988", "38", "300"}),
        ("two thousand twenty one and one hundred and five", {"2021", "105"}),
        ("nineteen o five, nineteen oh five", {"1905"}),
        ("a week, one pack, 2.5 mg", {"2.5"}),
        ("decide on the inside", set()),
        ("1. Aspirin. 2. Zocor.\n3. Rest for 4 days. He is 63.", {"4", "63"}),  # enumerators are no numbers
        ("Both died in their eighties", {"80"}),
        ("1,500 mg, then 12,000 steps", {"1500", "12000"}),  # 500 mg is another dose
        ("500, 750 mg", {"500", "750"}),  # a list, no thousands
        ("12.0 mg", {"12"}),
        ("2.50 mg, 120/80, 100", {"2.5", "120", "80", "100"}),
        ("fifty", {"50"}),
        ("five and", {"5"}),
        ("three hundred and", {"300"}),
    ],
)
def test_numbers_and_drugs_in_words_or_digits(text, expected):
    assert faithfulness.facts(text) == expected


def test_ordinary_words_with_a_drugs_ending_are_no_drugs():
    ordinary = (
        "provide provides outside inside alongside suicide homicide worldwide nationwide countryside bedside seaside "
        "override coincide pesticide peroxide chloride triglyceride cholesterol"
    )
    assert faithfulness.facts(ordinary) == set()
    drugs = (
        "furosemide torsemide bumetanide glyburide glipizide glimepiride hydrochlorothiazide loperamide "
        "metoclopramide cyclophosphamide lenalidomide liraglutide exenatide octreotide budesonide finasteride "
        "albuterol salmeterol formoterol vilanterol"
    ).split()
    assert faithfulness.facts(" ".join(drugs)) == set(drugs)


def test_an_unsupported_dose_is_flagged_and_a_supported_one_is_not():
    dialogue = "Patient: I take fifty milligrams of metoprolol."
    assert faithfulness.unsupported("Metoprolol 50 mg.", dialogue) == set()
    assert faithfulness.unsupported("Metoprolol 50.0 mg.", dialogue) == set()
    assert faithfulness.unsupported("Atenolol 25 mg.", dialogue) == {"atenolol", "25"}
    assert faithfulness.unsupported("1,500 mg", "500 mg") == {"1500"}


@pytest.mark.parametrize(
    ("summary", "dialogue", "lost"),
    [
        ("Cough.", "Patient: I don't have fever.", True),
        ("Cough, denies fever.", "Patient: No fever.", False),
        ("Cough.", "Patient: I have a cough now, and notes.", False),  # "now" and "notes" negate nothing
    ],
)
def test_a_summary_without_any_negation_is_counted_when_the_dialogue_has_one(summary, dialogue, lost):
    assert faithfulness.lost_negations(summary, dialogue) is lost


def test_novel_bigrams_by_hand():
    # "a b", "b z": one of two is new
    assert faithfulness.novel_bigrams("a b z", "x a b") == 0.5
    assert math.isnan(faithfulness.novel_bigrams("a", "a"))


def test_statistics_of_every_system_and_of_the_references():
    records = [
        {"dialogue": "Doctor: No fever? I take 5 mg.", "summary": "no fever now"},
        {"dialogue": "Patient: I cough.", "summary": "coughs"},
    ]
    systems = {"base": ["takes 99 mg", ""], "LEAD-3": [record["dialogue"] for record in records]}
    answers = {"base": [{"stop": "length"}, {"stop": "eos"}]}
    found = faithfulness.statistics(systems, records, answers)
    assert list(found) == ["base", "LEAD-3", "reference"]
    assert found["base"] == {
        "mean words": 1.5,
        "words per reference word": 3 / 4,
        "novel bigrams": 1,  # of the first row; the second has none
        "rows with unsupported numbers or drugs": 0.5,
        "rows that lose every negation": 0.5,
        "empty": 0.5,
        "ended by EOS": 0.5,
        "hit the length cap": 0.5,
    }
    copied = found["LEAD-3"]
    assert copied["novel bigrams"] == 0 and copied["rows with unsupported numbers or drugs"] == 0
    assert "ended by EOS" not in copied
    assert found["reference"]["mean words"] == 2 and found["reference"]["words per reference word"] == 1
    single = faithfulness.statistics({"one word": ["a"]}, records[:1], {})["one word"]
    assert single["novel bigrams"] is None  # no pair of words in any row; JSON has no nan
