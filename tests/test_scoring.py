"""Scores: equal to the libraries called directly, equal to cases worked by hand, and right on the published files."""

import math
import random
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from scipy import stats

from src import intervals, runs, scoring

WORDS = "the patient denies fever running runs pain knees chest for two weeks daily. He is no better! 10 mg".split()


def texts(seed, n=60):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, 25))) for _ in range(n)]


def test_three_word_texts_worked_by_hand():
    # prediction "a b c", reference "a c d e": overlap {a, c} = 2, P = 2/3, R = 2/4, F1 = 2PR/(P+R) = 4/7.
    # bigrams ab bc / ac cd de: none. LCS "a c" = 2: as ROUGE-1. Swapped arguments keep F1: the next test sees them.
    rows = scoring.score_rows(["a b c"], ["a c d e"])
    found = [rows[column][0] for column in ("ROUGE-1", "ROUGE-2", "ROUGE-L")]
    assert found == pytest.approx([4 / 7, 0, 4 / 7])


def test_bleu_counts_are_prediction_against_reference():
    # "the the the" against "the cat": 1 clipped match of 3 unigrams, 0 of 2 bigrams; lengths 3 and 2.
    # Swapped it would be 1 of 2 and 0 of 1.
    matches, totals, lengths = [1, 0, 0, 0], [3, 2, 1, 0], [3, 2]
    assert scoring.score_rows(["the the the"], ["the cat"])["counts"][0, :10].tolist() == matches + totals + lengths


def test_stemmer_and_sentence_lines_by_hand():
    # "knees hurting" and "knee hurt" share no word before stemming, both after it
    rows = scoring.score_rows(["knees hurting"], ["knee hurt"])
    assert rows["ROUGE-1"][0] == 0 and rows["ROUGE-1 stemmed"][0] == 1
    # sentences swapped: as one text the longest common subsequence is one of two sentences; line by line both are found
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


def test_bleu_and_chrf_of_any_rows_are_sacrebleus():
    predictions, references = (
        texts(1, 40) + ["", "", "xy"],
        texts(2, 40) + ["", "knees", ""],
    )  # empty and one-word texts
    rows = scoring.score_rows(predictions, references)
    rng, smoothed, highest = random.Random(0), 0, 0
    for size in [1] * 43 + [2, 3, 5, 20, 43] * 10:
        chosen = [rng.randrange(43) for _ in range(size)] if size > 1 else [smoothed % 43]
        smoothed += 1
        one, other = [predictions[i] for i in chosen], [[references[i] for i in chosen]]
        found = scoring.corpus(rows, chosen)
        assert found["sacreBLEU"] == pytest.approx(BLEU().corpus_score(one, other).score, abs=1e-9)
        assert found["chrF"] == pytest.approx(CHRF().corpus_score(one, other).score, abs=1e-9)
        plain = BLEU(smooth_method="none").corpus_score(one, other).score
        assert found["BLEU (0-1)"] == pytest.approx(plain / 100, abs=1e-9)
        highest = max(highest, plain)
    assert highest > 0  # most texts have no four words in common
    draws = scoring.resamples(43, 0)
    drawn = intervals.distribution(rows, draws)
    for column, values in drawn.items():
        by_one = [scoring.corpus(rows, draw)[column] for draw in draws[:50]]
        np.testing.assert_allclose(values[:50], by_one, atol=1e-9)


def test_chrf_by_hand():
    # "abc" against "abcd": characters 3 of 3 and 3 of 4, pairs 2 of 2 and 2 of 3, triples 1 of 1 and 1 of 2; the four
    # letters have a 4-gram that "abc" lacks: it does not count. P = 1, R = (3/4 + 2/3 + 1/2) / 3 = 23/36
    recall = 23 / 36
    expected = 100 * 5 * recall / (4 + recall)  # F2: recall twice the weight
    assert scoring.corpus(scoring.score_rows(["abc"], ["abcd"]))["chrF"] == pytest.approx(expected)
    swapped = scoring.corpus(scoring.score_rows(["abcd"], ["abc"]))["chrF"]
    assert swapped == pytest.approx(100 * 5 * recall / (4 * recall + 1))


def test_intervals_and_tests_of_a_large_split_take_a_moment():
    rows = scoring.score_rows(texts(1, 819), texts(2, 819))
    start = time.process_time()
    scoring.with_intervals(rows, np.arange(819), 0)
    assert time.process_time() - start < 2  # 0.1 s


def seeds_of(rng, count, n, seed_sd, row_sd=0.2, noise_sd=0.05):
    """Scores of `count` seeds on n rows around 0.5: seed + row + what is left, each normal."""
    effects = rng.normal(0, seed_sd, count)[:, None] + rng.normal(0, row_sd, n) + rng.normal(0, noise_sd, (count, n))
    return [scored(0.5 + values) for values in effects]


def test_over_seeds_is_the_two_intervals_combined():
    # three seeds whose rows differ by a constant: rows as in one interval, seeds Student's t of -0.1, 0, 0.1
    values = mixed(100, 0.3, 0.1) * 0.5 + 0.2
    rows = [scored(values + shift) for shift in (-0.1, 0, 0.1)]
    found = scoring.over_seeds(rows, seed=0)["ROUGE-L"]
    alone = scoring.with_intervals(rows[1], np.arange(100), 0)["ROUGE-L"]
    assert found["value"] == pytest.approx(values.mean()) and found["sd"] == pytest.approx(0.1)
    seeds = 4.3027 * 0.1 / 3**0.5  # t of two degrees of freedom
    assert found["low"] == pytest.approx(found["value"] - np.hypot(alone["value"] - alone["low"], seeds), abs=1e-4)
    assert found["high"] == pytest.approx(found["value"] + np.hypot(alone["high"] - alone["value"], seeds), abs=1e-4)
    same = scoring.over_seeds([rows[1]] * 3, seed=0)["ROUGE-L"]
    assert same["sd"] == pytest.approx(0) and same["low"] == pytest.approx(alone["low"])


def test_over_seeds_scores_every_column_and_stays_on_the_scale():
    rows = [scoring.score_rows(texts(s, 100), texts(9, 100)) for s in (1, 2)]
    found = scoring.over_seeds(rows, seed=0)
    by_seed = [scoring.corpus(scored_rows) for scored_rows in rows]
    assert set(found) == set(scoring.COLUMNS)
    for column, score in found.items():
        assert score["value"] == pytest.approx((by_seed[0][column] + by_seed[1][column]) / 2)
        assert score["sd"] == pytest.approx(abs(by_seed[0][column] - by_seed[1][column]) / 2**0.5)
        assert (
            0 <= score["low"] < score["value"] < score["high"] <= (100 if "BLEU" in column or column == "chrF" else 1)
        )
    few = [{column: values[:9] for column, values in scored_rows.items()} for scored_rows in rows]
    assert all(score["low"] is None and score["sd"] >= 0 for score in scoring.over_seeds(few, 0).values())
    apart = scoring.over_seeds([scored(mixed(60, 0.9, 0)), scored(mixed(60, 0, 0.9))], 0)["ROUGE-L"]
    assert (apart["low"], apart["high"]) == (0, 1)  # two seeds so far apart say nothing


@pytest.mark.parametrize("sizes", [(60,), (60, 59)])
def test_over_seeds_needs_two_seeds_with_the_same_rows(sizes):
    with pytest.raises(ValueError, match="expected the same rows for at least two seeds"):
        scoring.over_seeds([scored(mixed(n, 0.3, 0.1)) for n in sizes], 0)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("seed_sd", [0.0, 0.02, 0.1])
def test_the_interval_over_seeds_holds_the_mean_of_all_seeds_and_rows(count, seed_sd):
    rng = np.random.default_rng(count)
    found = [scoring.over_seeds(seeds_of(rng, count, 50, seed_sd), 0)["ROUGE-L"] for _ in range(400)]
    assert np.mean([score["low"] <= 0.5 <= score["high"] for score in found]) > 0.92


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


def mixed(n: int, zeros: float, ones: float, seed: int = 0) -> np.ndarray:
    """Row scores as real ones are: many 0, some 1, the others between."""
    rng = np.random.default_rng(seed)
    kind = rng.random(n)
    return np.where(kind < zeros, 0, np.where(kind > 1 - ones, 1, rng.beta(2, 5, n)))


def scored(values) -> dict:
    return {"ROUGE-L": np.asarray(values, dtype=float)}


def test_bounds_over_50_rows_are_scipys_percentile_bootstrap():
    values = mixed(200, 0.3, 0.1)
    found = scoring.with_intervals(scored(values), np.arange(200), seed=0)["ROUGE-L"]
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=0).confidence_interval
    assert found["value"] == values.mean()
    assert (found["low"], found["high"]) == pytest.approx(tuple(theirs), abs=0.004)  # the interval is 0.08 wide
    # a mean of 2,000 uniform values has standard error sqrt(1/12/2000) = 0.00645: the interval is 3.92 of them wide
    uniform = np.random.default_rng(0).random(2000)
    found = scoring.with_intervals(scored(uniform), np.arange(2000), seed=0)["ROUGE-L"]
    assert found["high"] - found["low"] == pytest.approx(3.92 * 0.00645, rel=0.15)


@pytest.mark.parametrize("column", ["sacreBLEU", "chrF"])
def test_bounds_of_bleu_and_chrf_are_scipys_bca_bootstrap(column):
    references = [r or "well" for r in texts(2, n=120)]
    rng = random.Random(1)
    predictions = [" ".join(w for w in r.split() if rng.random() < rng.choice([0.4, 0.95])) for r in references]
    rows = scoring.score_rows(predictions, references)
    theirs = stats.bootstrap(
        (np.arange(120),), lambda chosen: scoring.corpus(rows, chosen.astype(int))[column], method="BCa",
        n_resamples=4000, vectorized=False, rng=0,
    ).confidence_interval  # fmt: skip
    found = _all(rows, 120)[column]
    assert (found["low"], found["high"]) == pytest.approx(tuple(theirs), abs=0.07 * (theirs.high - theirs.low))
    percentiles = np.quantile(intervals.distribution(rows, scoring.resamples(120, 0))[column], [0.025, 0.975])
    assert (found["low"], found["high"]) != pytest.approx(tuple(percentiles), rel=1e-3)


def test_bca_of_a_skewed_sample_is_scipys():
    values = np.exp(1.5 * np.random.default_rng(0).normal(size=40))  # the acceleration moves both bounds far upwards
    draws = np.random.default_rng(1).integers(0, 40, (100_000, 40))
    drawn, without = values[draws].mean(1), (values.sum() - values) / 39
    theirs = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=100_000, rng=0).confidence_interval
    width = theirs.high - theirs.low
    assert intervals._bca(drawn, values.mean(), without) == pytest.approx(tuple(theirs), abs=0.02 * width)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert low < theirs.low - 0.04 * width and high < theirs.high - 0.1 * width


def test_bounds_of_10_to_50_rows_are_scipys_t_interval_with_the_ends_of_the_scale():
    for n in (10, 50):
        values = mixed(n, 0.3, 0.1)
        found = scoring.with_intervals(scored(values), np.arange(n), seed=0)["ROUGE-L"]
        more = np.append(values, [0, 1])
        low, high = stats.t.interval(0.95, n + 1, loc=more.mean(), scale=stats.sem(more))
        assert (found["low"], found["high"]) == pytest.approx((max(low, 0), high))
        assert found["low"] <= found["value"] <= found["high"]
        better = {"ROUGE-L": np.minimum(values + mixed(n, 0.5, 0, seed=1), 1)}
        difference = better["ROUGE-L"] - values
        more = np.append(difference, [-0.5, 0.5])
        test = scoring.paired_test(scored(values), better, np.arange(n), seed=0)["ROUGE-L"]
        expected = stats.t.interval(0.95, n + 1, loc=more.mean(), scale=stats.sem(more))
        assert (test["low"], test["high"]) == pytest.approx(expected)


@pytest.mark.parametrize(("zeros", "ones"), [(0.0, 0.0), (0.55, 0.05), (0.2, 0.6)])
@pytest.mark.parametrize("n", [10, 20, 50])
def test_intervals_of_few_rows_hold_the_true_mean(zeros, ones, n):
    truth = mixed(100_000, zeros, ones, seed=1).mean()
    samples = mixed(500 * n, zeros, ones, seed=2).reshape(500, n)
    found = [scoring.with_intervals(scored(sample), np.arange(n), 0)["ROUGE-L"] for sample in samples]
    found = [score for score in found if score["low"] is not None]
    assert len(found) > 450
    assert np.mean([score["low"] <= truth <= score["high"] for score in found]) > 0.92


def test_few_or_equal_rows_have_no_interval():
    one = scoring.score_rows(["a b"] * 9, ["a c"] * 9)
    assert all(score["low"] is None and score["high"] is None for score in _all(one, 9).values())
    equal = scoring.score_rows(["a b c d"] * 40, ["a b c d"] * 40)  # never "1.000 [1.000, 1.000]" from few rows
    assert _all(equal, 40)["ROUGE-1"] == {"value": 1, "low": None, "high": None}
    varied = scoring.score_rows(texts(1, 40), texts(2, 40))
    assert _all(varied, 40)["ROUGE-1"]["low"] is not None
    more = scoring.score_rows(texts(1, 100), texts(2, 100))
    for column in ("sacreBLEU", "chrF", "BLEU (0-1)"):
        assert _all(varied, 40)[column]["low"] is None  # pooled counts of few rows: no interval that holds is known
        assert _all({c: values[:99] for c, values in more.items()}, 99)[column]["low"] is None
        found = _all(more, 100)[column]
        assert found["low"] < found["value"] < found["high"]
    nothing = scoring.score_rows(["x"] * 100, ["y"] * 100)
    assert _all(nothing, 100)["sacreBLEU"] == {"value": 0, "low": 0, "high": 0}


def _all(rows, n):
    return scoring.with_intervals(rows, np.arange(n), seed=0)


def test_one_seed_gives_one_interval_whatever_the_other_columns():
    rows = scoring.score_rows(texts(1, 60), texts(2, 60))
    assert (
        scoring.with_intervals({"ROUGE-L": rows["ROUGE-L"]}, np.arange(60), 3)["ROUGE-L"]
        == (scoring.with_intervals(rows, np.arange(60), 3)["ROUGE-L"])
    )


def test_systems_share_their_draws_so_equal_errors_cancel():
    rows = scoring.score_rows(texts(1, 100), texts(2, 100))  # as varied as rows are
    better = {column: values + 0.125 for column, values in rows.items() if column != "counts"}
    test = scoring.paired_test(rows, better | {"counts": rows["counts"]}, np.arange(100), seed=0)
    assert test["ROUGE-L"] == pytest.approx({"difference": 0.125, "low": 0.125, "high": 0.125, "p": 1 / 1001})
    assert test["sacreBLEU"] == {"difference": 0, "low": 0, "high": 0, "p": 1}
    apart = scoring.with_intervals(better, np.arange(100), 0)["ROUGE-L"]
    assert apart["high"] - apart["low"] > 0.04  # each alone is far from certain


def test_paired_test_sees_a_difference_and_none():
    n = 60
    rows = scoring.score_rows(["a b c d"] * n, ["a b c d"] * n)
    worse = scoring.score_rows(["a b x y"] * n, ["a b c d"] * n)
    every = np.arange(n)
    same = scoring.paired_test(rows, rows, every, 0)["ROUGE-1"]
    assert same["difference"] == 0 and same["p"] == 1
    other = scoring.paired_test(worse, rows, every, 0)["ROUGE-1"]
    assert other["difference"] == pytest.approx(0.5) and other["p"] == pytest.approx(1 / 1001)


@pytest.mark.parametrize(("n", "p"), [(1, None), (9, None), (10, 2 / 2**10), (20, 2 / 2**20), (21, 1 / 1001)])
def test_equal_gains_in_few_rows_have_the_smallest_p_that_their_number_allows(n, p):
    # all differences have one sign: of the 2^n ways to swap, only "none" and "all" are as extreme
    first, second = scored(np.linspace(0.1, 0.4, n)), scored(np.linspace(0.1, 0.4, n) + 0.058)
    test = scoring.paired_test(first, second, np.arange(n), seed=0)["ROUGE-L"]
    assert test["difference"] == pytest.approx(0.058) and test["p"] == (None if p is None else pytest.approx(p))
    assert test["low"] is None and test["high"] is None  # equal differences


@pytest.mark.parametrize("n", [10, 13, 200])
def test_p_is_scipys_permutation_test(n):
    rng = np.random.default_rng(4)
    first = mixed(n, 0.3, 0.1)
    second = first + rng.normal(0.15 / np.sqrt(n), 0.15, n)
    theirs = stats.permutation_test(
        (second - first,), np.mean, permutation_type="samples", n_resamples=9999, vectorized=True, rng=0
    ).pvalue
    ours = scoring.paired_test(scored(first), scored(second), np.arange(n), seed=0)["ROUGE-L"]["p"]
    assert 0.01 < theirs < 0.99
    assert ours == pytest.approx(theirs, abs=1e-9 if n <= intervals.EXACT else 0.05)


@pytest.mark.parametrize("n", [10, 30])
def test_one_in_twenty_equal_systems_is_called_different(n):
    first, second = mixed(100_000, 0.3, 0.05, seed=5), mixed(100_000, 0.6, 0.05, seed=6)
    rng, rejected = np.random.default_rng(7), 0
    for _ in range(600):
        rows, swapped = rng.integers(0, len(first), n), rng.integers(0, 2, n).astype(bool)
        one, two = np.where(swapped, second[rows], first[rows]), np.where(swapped, first[rows], second[rows])
        rejected += scoring.paired_test(scored(one), scored(two), np.arange(n), seed=0)["ROUGE-L"]["p"] < 0.05
    assert 0.02 < rejected / 600 < 0.08


def test_bleu_is_tested_by_swapping_the_counts_of_rows():
    references = [f"row {i} has four words" for i in range(12)]
    perfect = scoring.score_rows(references, references)
    worse = scoring.score_rows(["row x has four words"] * 12, references)
    test = scoring.paired_test(worse, perfect, np.arange(12), seed=0)["sacreBLEU"]
    assert test["difference"] > 40 and test["p"] < 0.01
    assert scoring.paired_test(perfect, perfect, np.arange(12), seed=0)["sacreBLEU"]["p"] == 1


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
    before, after = (intervals.distribution(rows, draws)["sacreBLEU"] for rows in (one, two))
    drawn = np.abs(after - before)
    assert (drawn - drawn.mean() > ours["difference"]).mean() == pytest.approx(theirs["BLEU"][1].p_value, abs=0.06)
    low, high = np.quantile(after - before, [0.025, 0.975])  # BCa's bounds lie near the percentiles
    assert (ours["low"], ours["high"]) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_clean_rows_are_clean_and_sections_are_sections():
    # finetuned is right in section A (even rows) and says nothing in B; rows 0 and 1 were trained on
    records = [{"id": str(i), "section": "AB"[i % 2], "dialogue": f"d {i}", "summary": f"s {i}"} for i in range(24)]
    right = [record["summary"] if record["section"] == "A" else "" for record in records]
    copied = ["s 0", "s 1"] + [""] * 22  # knows nothing but the two rows that it was trained on
    metrics = scoring.evaluate(records, {"base": copied, "finetuned": right}, {"0", "1"}, seed=0)
    assert (metrics["n"], metrics["n_clean"]) == (24, 22)
    base, tuned = metrics["systems"]["base"], metrics["systems"]["finetuned"]
    assert base["all"]["ROUGE-1"]["value"] == pytest.approx(2 / 24) and base["clean"]["ROUGE-1"]["value"] == 0
    assert tuned["all"]["ROUGE-1"]["value"] == 0.5 and tuned["clean"]["ROUGE-1"]["value"] == 0.5
    assert {name: (section["n"], section["ROUGE-L"]["value"]) for name, section in tuned["sections"].items()} == {
        "A": (12, 1),
        "B": (12, 0),
    }
    assert tuned["sections"]["A"]["ROUGE-L"]["low"] is None  # 12 equal rows
    paired = metrics["paired"]["finetuned minus base"]
    assert paired["all"]["ROUGE-L"]["difference"] == pytest.approx(10 / 24)
    assert paired["clean"]["ROUGE-L"]["difference"] == 0.5
    assert metrics["per_row"]["finetuned"]["ROUGE-L"] == [1, 0] * 12
    assert set(metrics["settings"]["columns"]) == set(tuned["all"])
    assert "version:" in metrics["settings"]["sacrebleu signature"]
    assert metrics["settings"]["chrF signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0")


def test_all_rows_clean_or_all_unclean_need_no_second_score():
    records = [{"id": str(i), "section": "", "dialogue": "d", "summary": "s"} for i in range(3)]
    for unclean, n in ((set(), 3), ({"0", "1", "2"}, 0)):
        metrics = scoring.evaluate(records, {"LEAD-3": ["s"] * 3}, unclean, seed=0)
        assert metrics["n_clean"] == n and metrics["systems"]["LEAD-3"]["clean"] is None
        assert metrics["paired"] == {} and metrics["per_row"] == {}
        assert metrics["systems"]["LEAD-3"]["sections"] == {}


def test_references_that_rouge_cannot_read_are_said_so(capsys):
    record = {"id": "1", "section": "", "dialogue": "А: привет", "summary": "Они здороваются."}
    scoring.evaluate([record] * 5, {"base": [record["summary"]] * 5}, set(), seed=0)
    assert "100% of the references' letters are outside of a-z" in capsys.readouterr().out
    english = record | {"summary": "They greet at the café."}
    scoring.evaluate([english] * 5, {"base": [english["summary"]] * 5}, set(), seed=0)
    assert "outside" in capsys.readouterr().out  # one letter of eighteen
    scoring.evaluate([record | {"summary": "They greet."}] * 5, {"base": ["They greet."] * 5}, set(), seed=0)
    assert capsys.readouterr().out == ""


def test_scores_tables_figures_and_pages_import_no_torch():
    modules = "scoring data runs recipes analysis.tables analysis.pages analysis.figures analysis.baselines"
    imports = ", ".join(f"src.{name}" for name in [*modules.split(), "analysis.faithfulness"])
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT).returncode == 0


def fake_bert_score(monkeypatch, calls):
    """A stand-in for the package: F1 is 1 for an equal text, else 0.25. No real weights were ever loaded here."""
    import torch

    def score(candidates, references, model_type, return_hash):
        calls.append((len(candidates), model_type))
        f1 = torch.tensor([1.0 if c == r else 0.25 for c, r in zip(candidates, references, strict=True)])
        return (f1 * 0, f1 * 0, f1), f"{model_type}_L40_no-idf_version=0.3.12"

    monkeypatch.setitem(sys.modules, "bert_score", types.SimpleNamespace(score=score))


def test_bertscore_is_a_column_that_names_its_model(monkeypatch):
    records = [{"id": str(i), "section": "", "dialogue": f"d {i}", "summary": f"s {i}"} for i in range(12)]
    systems = {"base": ["x"] * 12, "finetuned": [record["summary"] for record in records]}
    calls = []
    fake_bert_score(monkeypatch, calls)
    metrics = scoring.evaluate(records, systems, set(), 0, bertscore_model="some/model")
    assert calls == [(24, "some/model")]
    found = {name: system["all"]["BERTScore F1"]["value"] for name, system in metrics["systems"].items()}
    assert found == {"base": 0.25, "finetuned": 1}
    assert metrics["paired"]["finetuned minus base"]["all"]["BERTScore F1"]["p"] == 2 / 2**12
    assert "some/model_L40_no-idf_version=0.3.12" in metrics["settings"]["columns"]["BERTScore F1"]
    without = scoring.evaluate(records, systems, set(), 0)
    assert (
        "BERTScore F1" not in without["systems"]["base"]["all"] and "BERTScore F1" not in without["settings"]["columns"]
    )
    assert len(calls) == 1


def test_bertscore_without_its_package_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(ModuleNotFoundError, match="bertscore_model is 'some/model', and the package bert-score is not"):
        scoring.bertscore(["a"], ["a"], "some/model")
