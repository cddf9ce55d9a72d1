"""Scores: equal to the libraries called directly, equal to cases worked by hand, and right on the published files."""

import math
import random
import time

import numpy as np
import pytest
import torch
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from src import data, experiments, scoring
from tests.test_data import needs_mts, needs_samsum

WORDS = "the patient denies fever running runs pain knees chest for two weeks daily. He is no better! 10 mg".split()


def texts(seed, n=60):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, 25))) for _ in range(n)]


def means(values):
    return {k: round(v, 4) for k, v in values.items()}


def test_three_word_texts_worked_by_hand():
    # prediction "a b c", reference "a c d e": overlap {a, c} = 2, P = 2/3, R = 2/4, F1 = 2PR/(P+R) = 4/7.
    # bigrams ab bc / ac cd de: none. LCS "a c" = 2: as ROUGE-1. Swapped arguments keep F1, so the next test looks at P and R.
    rows = scoring.score_rows(["a b c"], ["a c d e"])
    assert (
        rows["ROUGE-1"][0] == pytest.approx(4 / 7)
        and rows["ROUGE-2"][0] == 0
        and rows["ROUGE-L"][0] == pytest.approx(4 / 7)
    )


def test_bleu_counts_are_prediction_against_reference():
    # "the the the" against "the cat": 1 clipped match of 3 unigrams, 0 of 2 bigrams; lengths 3 and 2. Swapped: 1 of 2, 0 of 1.
    assert scoring.score_rows(["the the the"], ["the cat"])["counts"][0].tolist() == [
        1,
        0,
        0,
        0,
        3,
        2,
        1,
        0,
        3,
        2,
    ]


def test_stemmer_and_sentence_lines_by_hand():
    # "knees hurting" and "knee hurt" share no word before stemming, both after it
    rows = scoring.score_rows(["knees hurting"], ["knee hurt"])
    assert rows["ROUGE-1"][0] == 0 and rows["ROUGE-1 stemmed"][0] == 1
    # sentences swapped: as one text the longest common subsequence is one sentence of two (1/2); line by line both are found
    rows = scoring.score_rows(["c d. a b."], ["a b. c d."])
    assert rows["ROUGE-L stemmed"][0] == 0.5 and rows["ROUGE-Lsum stemmed"][0] == 1


def test_rouge_equals_rouge_score_called_directly():
    predictions, references = texts(1), texts(2)
    rows = scoring.score_rows(predictions, references)
    for stem in (False, True):
        scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stem)
        for i, (p, r) in enumerate(zip(predictions, references, strict=True)):
            for name, score in scorer.score(r, p).items():
                column = f"ROUGE-{name[5:]}" + (" stemmed" if stem else "")
                assert rows[column][i] == pytest.approx(score.fmeasure, abs=1e-9)
    scorer = rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=True)
    lines = [[t.replace(". ", ".\n").replace("! ", "!\n") for t in side] for side in (predictions, references)]
    direct = [scorer.score(r, p)["rougeLsum"].fmeasure for p, r in zip(*lines, strict=True)]
    np.testing.assert_allclose(rows["ROUGE-Lsum stemmed"], direct, atol=1e-9)


def test_bleu_equals_sacrebleu_called_directly():
    predictions, references = texts(1), texts(2)
    values = scoring.corpus(scoring.score_rows(predictions, references))
    assert values["sacreBLEU"] == pytest.approx(BLEU().corpus_score(predictions, [references]).score, abs=1e-9)
    plain = BLEU(smooth_method="none").corpus_score(predictions, [references]).score
    assert values["BLEU (0-1)"] == pytest.approx(plain / 100, abs=1e-9) and plain > 0


def test_unsmoothed_bleu_is_the_published_formula():
    # 4 of 5 unigrams, 3 of 4, 2 of 3, 1 of 2 n-grams; lengths 5 and 6: BP = exp(1 - 6/5)
    rows = scoring.score_rows(["a b c d x"], ["a b c d e f"])
    expected = math.exp(1 - 6 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert scoring.corpus(rows)["BLEU (0-1)"] == pytest.approx(expected)


def test_an_empty_answer_scores_zero_and_an_equal_one_the_maximum():
    rows = scoring.score_rows(["", "a b c d"], ["a b c d", "a b c d"])
    assert rows["ROUGE-1"].tolist() == [0, 1] and rows["ROUGE-L"].tolist() == [0, 1]


def test_a_one_word_reference_cannot_have_rouge_2():
    assert scoring.score_rows(["None."], ["None."])["ROUGE-2"][0] == 0


def test_different_numbers_of_rows_are_an_error():
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        scoring.score_rows(["a"], ["a", "b"])


def test_interval_holds_the_value_and_shrinks_with_rows():
    rng = np.random.default_rng(0)
    small, large = rng.random(20), rng.random(2000)
    a, b = scoring._mean_interval(small, 0), scoring._mean_interval(large, 0)
    assert a["low"] < a["value"] < a["high"] and b["high"] - b["low"] < (a["high"] - a["low"]) / 5
    # a mean of 2,000 uniform values has standard error sqrt(1/12/2000) = 0.00645: the interval is about 3.92 of them wide
    assert b["high"] - b["low"] == pytest.approx(3.92 * 0.00645, rel=0.15)


def test_paired_test_sees_a_difference_and_none():
    n = 50
    rows = scoring.score_rows(["a b c d"] * n, ["a b c d"] * n)
    worse = scoring.score_rows(["a b x y"] * n, ["a b c d"] * n)
    every = np.arange(n)
    same = scoring.paired_test(rows, rows, every, 0)["ROUGE-1"]
    assert same["difference"] == 0 and same["p"] == 1
    other = scoring.paired_test(worse, rows, every, 0)["ROUGE-1"]
    assert other["difference"] == pytest.approx(0.5) and other["p"] == pytest.approx(1 / 1001)


def test_our_resamples_counted_as_sacrebleu_counts_give_its_p_value():
    rng = random.Random(3)
    references = [r or "well" for r in texts(2, n=150)]
    worse, better = (
        [" ".join(w if rng.random() < keep else rng.choice(WORDS) for w in r.split()) for r in references]
        for keep in (0.70, 0.715)
    )
    one, two = (scoring.score_rows(p, references) for p in (worse, better))
    systems = [("worse", worse), ("better", better)]
    _, theirs = PairedTest(systems, {"BLEU": BLEU()}, [references], test_type="bs", n_samples=1000)()
    ours = scoring.paired_test(one, two, np.arange(150), seed=0)["sacreBLEU"]
    assert ours["difference"] == pytest.approx(theirs["BLEU"][1].score - theirs["BLEU"][0].score)
    draws = scoring.resamples(150, 0)
    drawn = np.abs(scoring.distribution(two, draws)["sacreBLEU"] - scoring.distribution(one, draws)["sacreBLEU"])
    assert (drawn - drawn.mean() > ours["difference"]).mean() == pytest.approx(theirs["BLEU"][1].p_value, abs=0.06)
    assert 0.1 < theirs["BLEU"][1].p_value < ours["p"]  # it counts one side only, we count both


def test_leads_and_stock_answers_by_hand():
    record = {
        "id": "1",
        "section": "ALLERGY",
        "dialogue": "A: one\nB: two three four\nA: five six\nB: seven eight nine ten\nA: x",
        "summary": "",
    }
    assert scoring.lead3(record) == "A: one\nB: two three four\nA: five six"
    assert scoring.longest3(record) == "B: two three four\nA: five six\nB: seven eight nine ten"
    train = [{"section": "ALLERGY", "summary": s, "dialogue": "z"} for s in ("None.", "None.", "Sulfa.")] + [
        {"section": "CC", "summary": "Cough.", "dialogue": "B: seven eight nine ten"}
    ]
    assert scoring.stock_answers([record, {**record, "section": "NEW"}], train) == ["None.", "None."]
    assert scoring.nearest_summaries([{**record, "section": ""}], train) == ["Cough."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ten milligrams of lisinopril", {"10", "lisinopril"}),
        ("nineteen eighty eight, thirty-eight, three hundred", {"1988", "38", "300"}),
        ("two thousand twenty one and one hundred and five", {"2021", "105"}),
        ("a week, one pack, 2.5 mg", {"2.5"}),
        ("decide on the inside", set()),
        ("1. Aspirin. 2. Zocor.\n3. Rest for 4 days. He is 63.", {"4", "63"}),  # enumerators are no numbers
        ("Both died in their eighties", {"80"}),
    ],
)
def test_numbers_and_drugs_in_words_or_digits(text, expected):
    assert scoring.facts(text) == expected


def test_an_unsupported_dose_is_flagged_and_a_supported_one_is_not():
    dialogue = "Patient: I take fifty milligrams of metoprolol."
    assert scoring.unsupported("Metoprolol 50 mg.", dialogue) == set()
    assert scoring.unsupported("Atenolol 25 mg.", dialogue) == {"atenolol", "25"}


@pytest.mark.parametrize(
    ("summary", "dialogue", "lost"),
    [
        ("Cough.", "Patient: I don't have fever.", True),
        ("Cough, denies fever.", "Patient: No fever.", False),
        ("Cough.", "Patient: I have a cough now, and notes.", False),  # "now" and "notes" negate nothing
    ],
)
def test_a_summary_without_any_negation_is_counted_when_the_dialogue_has_one(summary, dialogue, lost):
    assert scoring.lost_negations(summary, dialogue) is lost


def test_bertscore_is_a_column_where_it_can_be_had_and_absent_elsewhere(monkeypatch):
    class Scorer:
        hash = "roberta-large_L17"

        def score(self, predictions, references):
            assert all(predictions + references)  # bert-score 0.3 with transformers 5 breaks off at an empty text
            f = torch.tensor([0.9, 0.5][: len(predictions)])
            return f / 2, f / 3, f

    assert "BERTScore" not in scoring.score_rows(["a"], ["a"])
    assert scoring.settings(0)["bert-score hash"] is None
    monkeypatch.setattr(scoring, "bert_scorer", Scorer)
    assert scoring.score_rows(["", "b"], ["a", "b"])["BERTScore"].tolist() == pytest.approx([0, 0.9])
    rows = scoring.score_rows(["a", "b"], ["a", "c"])
    assert scoring.corpus(rows)["BERTScore"] == pytest.approx(0.7)  # the mean of F, which is the third of P, R, F
    assert scoring.with_intervals(rows, np.arange(2), 0)["BERTScore"]["low"] == pytest.approx(0.5)
    assert "BERTScore" in scoring.settings(0)["columns"] and scoring.settings(0)["bert-score hash"] == Scorer.hash


def test_novel_bigrams_by_hand():
    # "a b", "b z": one of two is new
    assert scoring.novel_bigrams("a b z", "x a b") == 0.5 and math.isnan(scoring.novel_bigrams("a", "a"))


def test_human_pairs_need_two_different_summaries():
    rows = [{"dialogue": d, "summary": s} for d, s in (("x", "1"), ("X!", "2"), ("x", "3"), ("y", "4"), ("y", "4"))]
    assert data.human_pairs([rows[:2], rows[2:]]) == [("2", "1")]


def test_a_whole_run_is_scored_with_clean_rows_and_sections():
    records = [{"id": str(i), "section": "AB"[i % 2], "dialogue": f"d {i}", "summary": f"s {i}"} for i in range(12)]
    answers = {"base": [], "finetuned": []}
    for r in records:
        answers["base"].append({"prediction": "", "stop": "length", "tokens": 9})
        answers["finetuned"].append({"prediction": r["summary"], "stop": "eos", "tokens": 3})
    e, others = experiments.load_experiment("demo"), {"a person": ("all", ["s 1", "x"], ["s 1", "y"])}
    metrics = scoring.evaluate_run(e, answers, records, records[:3], {"0", "1"}, others)
    assert metrics["others"]["a person"]["n"] == 2 and metrics["others"]["a person"]["all"]["ROUGE-1"]["value"] == 0.5
    assert metrics["n"] == 12 and metrics["n_clean"] == 10
    tuned, base = metrics["systems"]["finetuned"], metrics["systems"]["base"]
    assert tuned["all"]["ROUGE-1"]["value"] == 1 and base["clean"]["ROUGE-1"]["value"] == 0
    assert {s: v["n"] for s, v in tuned["sections"].items()} == {"A": 6, "B": 6}
    assert base["text"]["empty"] == 1 and base["text"]["hit the length cap"] == 1 and tuned["text"]["ended by EOS"] == 1
    assert metrics["paired"]["finetuned minus base"]["clean"]["ROUGE-L"]["difference"] == 1
    assert "version:" in metrics["settings"]["sacrebleu signature"] and set(metrics["settings"]["columns"]) == set(
        tuned["all"]
    )


@needs_mts
def test_published_mts_dialog_figures():
    e = experiments.load_experiment("mts_dialog", **{"data.eval_split": "validation"})
    data.prepare(e, progress=False)
    rows = data.eval_rows(e)
    references = [r["summary"] for r in rows]
    whole = scoring.corpus(scoring.score_rows([scoring.whole_dialogue(r) for r in rows], references))
    assert [round(whole[c], 3) for c in ("ROUGE-1", "ROUGE-2", "ROUGE-L")] == [0.209, 0.068, 0.152]
    longest = scoring.corpus(scoring.score_rows([scoring.longest3(r) for r in rows], references))
    assert [round(100 * longest[c], 1) for c in ("ROUGE-1", "ROUGE-2", "ROUGE-L")] == [21.1, 7.0, 15.7]
    systems = data.others(e, progress=False)
    assert [(split, len(p), len(r)) for split, p, r in systems.values()] == [("validation", 100, 100)] * 4
    scores = [scoring.corpus(scoring.score_rows(p, r)) for _, p, r in systems.values()]
    assert [round(s["ROUGE-1"], 4) for s in scores] == [0.2948, 0.3838, 0.4021, 0.4088]
    assert [100 * s["ROUGE-2"] for s in scores] == pytest.approx([11.6, 17.2, 16.9, 16.6], abs=0.06)
    assert [round(100 * s["ROUGE-L"], 1) for s in scores] == [26.0, 31.2, 33.7, 33.9]


@needs_samsum
def test_published_samsum_figures():
    e = experiments.load_experiment("samsum")
    data.prepare(e, progress=False)
    rows = data.eval_rows(e)
    references = [r["summary"] for r in rows]
    columns = ["ROUGE-1 stemmed", "ROUGE-2 stemmed", "ROUGE-L stemmed", "ROUGE-Lsum stemmed"]
    lead = scoring.corpus(scoring.score_rows([scoring.lead3(r) for r in rows], references))
    assert [round(100 * lead[c], 1) for c in columns] == [31.3, 8.7, 24.2, 29.4]
    longest = scoring.corpus(scoring.score_rows([scoring.longest3(r) for r in rows], references))
    assert [round(100 * longest[c], 1) for c in columns[:3]] == [31.9, 10.2, 24.2]
    split, one, another = data.others(e)["one human against another"]
    human = scoring.corpus(scoring.score_rows(one, another))
    assert split == "all"
    assert len(one) == 563  # dialogues with two different summaries; one more occurs twice with the same
    assert [100 * human[c] for c in columns[:3]] == pytest.approx([50.4, 24.0, 40.6], abs=0.15)


@needs_samsum
def test_scoring_every_system_on_samsum_takes_seconds():
    e = experiments.load_experiment("samsum")
    data.prepare(e, progress=False)
    rows, train = data.eval_rows(e), data.train_rows(e)
    systems = scoring.without_model(rows, train)
    start = time.perf_counter()
    scores = scoring.evaluate_systems(rows, systems)
    print(f"{len(systems)} systems, {len(rows)} rows: {time.perf_counter() - start:.1f} s")
    assert scores["n"] == 819 and len(scores["systems"]) == 4


def test_references_that_rouge_cannot_read_are_said_so(capsys):
    record = {"id": "1", "section": "", "dialogue": "А: привет", "summary": "Они здороваются."}
    scoring.evaluate_systems([record] * 5, {"base": [record["summary"]] * 5})
    assert "100% of the references' letters are outside of a-z" in capsys.readouterr().out
    english = record | {"summary": "They greet at the café."}
    scoring.evaluate_systems([english] * 5, {"base": [english["summary"]] * 5})
    assert "outside" in capsys.readouterr().out  # one letter of eighteen
    scoring.evaluate_systems([record | {"summary": "They greet."}] * 5, {"base": ["They greet."] * 5})
    assert capsys.readouterr().out == ""
