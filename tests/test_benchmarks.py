"""The benchmark's tables are made from committed results, and the plan predicts what was measured."""

import dataclasses
import importlib
import json

import numpy as np
import pytest
import torch
from transformers import MistralConfig, TrainingArguments

from benchmarks import coverage, pictures, real, speed, tables, two_gpus
from src import intervals, recipes, scoring
from src.engine import planning

RESULTS = {name: tables.results(name) for name in ("h200",)}


@pytest.mark.parametrize("file", list(tables.BLOCKS))
def test_tables_are_what_the_committed_results_make(file):
    assert tables.filled(file) == (tables.ROOT / file).read_text(encoding="utf-8")


def test_figures_in_readmes_prose_are_those_of_the_committed_results():
    text = " ".join((tables.ROOT / "README.md").read_text(encoding="utf-8").split())
    call = {r["setup"]: r["tok_s"] for r in RESULTS["h200"] if r.get("call") == 5 and "tok_s" in r}
    graphs, without = call["ours_batch_3_dropout_graphs"], call["ours_batch_3_dropout"]
    assert f"{graphs:,} tokens/s where kernels launched one by one gave {without:,}" in text
    two = {r["setup"]: r.get("speedup") for r in tables.results("two_gpus")}
    assert f"train {two['train_2_54']} times as fast with 54 rows each, {two['train_2_16']} times with 16" in text
    losses = tables.results("two_gpus_losses")
    pairs = list(zip(losses["one GPU"]["loss"], losses["two GPUs"]["loss"], strict=True))
    assert losses["steps"][-1] == 396 and len(pairs) == 11 and max(abs(b / a - 1) for a, b in pairs) < 0.0015
    laptop = tables.results("laptop")
    base, tuned = (laptop["systems"][system]["ROUGE-L"] for system in ("base", "finetuned"))
    shown = [f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in (base, tuned)]
    assert f"took ROUGE-L from {shown[0]} to {shown[1]} ({laptop['n']} rows, unstemmed)" in text
    assert f"{round(laptop['minutes'])} minutes on 2 CPU cores" in text
    small = {r["setup"]: r for r in tables.results("small")}
    rates = small["smollm2_16_graphs"]["tok_s"], small["smollm2_16"]["tok_s"]
    assert f"the small model {rates[0]:,} where they gave {rates[1]:,}" in text
    assert f"{round(small['samsum_small']['train_seconds'])} seconds of training on an H100" in text


def test_capped_runs_stayed_within_their_limit_without_a_retry():
    capped = [r for r in RESULTS["h200"] if r.get("capped_gib")]
    assert all(r["peak_gib"] <= r["capped_gib"] and r["retries"] == 0 for r in capped) and len(capped) >= 6


def test_the_claims_of_speed_are_those_of_one_call():
    found = {r["setup"]: r for r in RESULTS["h200"]}
    for ours, theirs, least in (
        ("ours_64gib", "unsloth_packed_16k", 1.8),
        ("ours_64gib", "unsloth_packed_8k", 1.8),
        ("ours_checkpointed", "unsloth_packed_16k_checkpointed", 1.4),
    ):
        assert found[ours]["call"] == found[theirs]["call"]
        assert found[ours]["tok_s"] >= least * found[theirs]["tok_s"]


@pytest.fixture
def on_gpu(monkeypatch):
    """plan(overrides, rows, ...) of Mistral-7B on a stand-in GPU."""
    from peft import LoraConfig

    config = MistralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip

    def plan(overrides, rows, tflops, gib, packed=True, triton=True):
        monkeypatch.setattr(planning, "has_varlen", lambda *_: packed)
        monkeypatch.setattr(planning.fuse, "available", lambda device: triton)
        monkeypatch.setattr(planning, "matmul_rate", lambda *_: tflops * 1e12)
        monkeypatch.setattr(planning.weights, "free_bytes", lambda device: gib * 2**30)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        recipe = recipes.load("samsum_best", overrides)
        ours = {"eval_steps", "early_stopping_patience", "sample_rows", "keep_checkpoints", "load_best_model_at_end"}
        arguments = TrainingArguments(
            output_dir="unused", seed=recipe.seed, use_cpu=True, **recipe.training.model_dump(exclude=ours)
        )
        quantization = type(
            "Quantization", (), recipe.quantization.model_dump() | {"bnb_4bit_compute_dtype": torch.bfloat16}
        )
        options = recipe.engine.limits()
        lora = LoraConfig(**recipe.lora.model_dump())
        return planning.plan(config, lora, quantization, arguments, rows, torch.device("cuda", 0), **options)

    return plan


def test_every_measured_peak_lies_within_15_percent_of_todays_plan(on_gpu):
    trained = [r for r in RESULTS["h200"] if "plan" in r]
    assert len(trained) >= 12
    parts = {part: speed.rows(part) for part in ("sample", "train")}
    for r in trained:
        changed = speed.RECIPE | (speed.TRAIN.get(r["setup"]) or speed.JOB)
        rows = parts["train" if r["setup"] == "job" else "sample"]
        gib, fused = r["capped_gib"] or 139, r["plan"]["fused"]
        plan = on_gpu(changed, rows, r["matmul_tflops"], gib, r["plan"]["packed"], fused)
        same = ("checkpointing", "dequantized", "packed", "steps", "rows_per_step")
        assert [getattr(plan, key) for key in same] == [r["plan"][key] for key in same], r["setup"]
        if plan.packed:  # padded steps hold other rows than when this was measured
            assert plan.passes == r["plan"]["passes"], r["setup"]
            assert plan.gib == pytest.approx(r["peak_gib"], rel=0.15), r["setup"]


def test_layers_that_are_fused_in_part_are_planned_as_plain_ones(on_gpu):
    rows, part = speed.rows("sample"), {"lora.target_modules": ["q_proj", "v_proj"]}
    gib = [
        on_gpu(speed.RECIPE | changed, rows, 790, 139, triton=triton).gib
        for changed in ({}, part)
        for triton in (True, False)
    ]
    assert gib[0] < gib[1] and gib[2] == gib[3]


def test_results_hold_every_field_of_a_plan():
    fields = {field.name: field.default for field in dataclasses.fields(planning.Plan)}
    needed = {name for name, default in fields.items() if default is dataclasses.MISSING}  # older results lack others
    for name, results in RESULTS.items():
        plans = [set(r["plan"]) for r in results if "plan" in r]
        assert plans and all(needed <= plan <= set(fields) for plan in plans), name


def test_every_interval_that_is_printed_holds_the_truth_in_nine_of_ten_draws():
    found = tables.results("coverage")
    shares = {
        kind: [r for r in found if r["kind"].startswith(kind) and r["share"] is not None] for kind in ("int", "p")
    }
    assert len(shares["int"]) > 150 and len(shares["p"]) > 50
    assert {r["n"] for r in found} == set(coverage.SIZES) and {r.get("seeds") for r in found} == {None, 2, 3, 5}
    short = [r for r in shares["int"] if r["share"] < 0.9]
    assert not short, short
    wrong = [r for r in shares["p"] if not 0.02 < r["share"] < 0.08]
    assert not wrong, wrong
    # and where intervals are none, the code prints none
    printed = {(r["column"], r["n"]) for r in shares["int"] if "seeds" not in r}
    for column, least in (("ROUGE-1", scoring.FEW), ("ROUGE-L", scoring.FEW), ("chrF", intervals.POOLED)):
        assert {n for c, n in printed if c == column} == {n for n in coverage.SIZES if n >= least}


@pytest.mark.parametrize("n", [10, 100])
def test_coverage_counts_what_holds(n, monkeypatch):
    # scores of 100 rows whose mean is 0.5: an interval of the whole scale always holds it, one above it never
    rows = {"ROUGE-L": np.linspace(0, 1, 100)}
    monkeypatch.setitem(coverage.REPEATS, "rows", 30)
    for low, high, expected in ((0.0, 1.0, True), (0.6, 1.0, False)):
        score = {"ROUGE-L": {"low": low, "high": high}}
        monkeypatch.setattr(scoring, "with_intervals", lambda *_, score=score: score)
        hits = coverage.singles(rows, "rows", n, np.random.default_rng(0))
        assert hits == {"ROUGE-L": [expected] * 30}
    assert coverage.lines("k", "x", n, {"ROUGE-L": [True, False, None, True]})[0]["share"] == round(2 / 3, 4)
    assert coverage.lines("k", "x", n, {"ROUGE-L": [None] * 4})[0]["share"] is None


def test_equal_systems_are_made_by_swapping_within_rows(monkeypatch):
    # one system always 1, the other 0: the difference is 1, and 0 on average once the answers are swapped at random
    monkeypatch.setitem(coverage.REPEATS, "rows", 200)
    seen = []

    def test(first, second, chosen, seed):
        seen.append((first["ROUGE-L"][chosen], second["ROUGE-L"][chosen]))
        return {"ROUGE-L": {"low": 0.9, "high": 1.0, "p": 0.01}}

    monkeypatch.setattr(scoring, "paired_test", test)
    ones, zeros = {"ROUGE-L": np.ones(100)}, {"ROUGE-L": np.zeros(100)}
    hits, false = coverage.pairs(zeros, ones, "rows", 10, np.random.default_rng(0))
    assert hits["ROUGE-L"] == [True] * 200 and false["ROUGE-L"] == [True] * 200
    assert all((second - first == 1).all() for first, second in seen[::2])
    swapped = np.array([second - first for first, second in seen[1::2]])
    assert set(np.abs(swapped).ravel()) == {1.0} and abs(swapped.mean()) < 0.1


def test_every_job_on_real_data_is_a_recipe_and_has_a_file_of_its_own(tmp_path):
    jobs = [job for stage in real.stages().values() for job in stage]
    assert len({real.result(tmp_path, job) for job in jobs}) == len(jobs) == 85
    published = importlib.import_module("src.published")
    for job in jobs:
        recipe = recipes.load(job.recipe, job.overrides)
        assert set(job.splits) <= set(recipes.splits(recipe.data.dataset)) and set(job.decodings) <= set(real.DECODINGS)
        trained = {published.DEFECTS[name].train for name in job.answered}
        assert len(trained) == 1  # one adapter for all that a job answers
    for values in real.DECODINGS.values():
        recipes.load("mts_dialog_small", {f"generation.{key}": value for key, value in values.items()})


def test_comparisons_differ_from_the_short_training_in_one_thing():
    jobs = [job for stage in ("defects", "rank", "epochs", "bits") for job in real.stages()[stage]]
    short = recipes.load("samsum_small", real.SHORT)
    for job in jobs:
        changed = recipes.load(job.recipe, job.overrides).model_copy(update={"seed": short.seed}).model_dump()
        sections = [key for key, value in changed.items() if value != short.model_dump()[key]]
        assert len(sections) <= 1, job.name  # rank and alpha go together


def test_real_results_say_what_they_are():
    found = tables.results("real")
    kinds = {"dataset": {"samsum", "mts_dialog"}, "system": {"base", "finetuned"}}
    kinds["scorer"] = {"rouge-score, stemmed", "rouge-score, unstemmed"}
    sizes = {("samsum", "test"): 819, ("samsum", "validation"): 818, ("mts_dialog", "validation"): 100}
    for r in found:
        assert all(r[key] in known for key, known in kinds.items())
        assert r["n"] == sizes.get((r["dataset"], r["split"]), 200) and 0 <= r["length_cap"] <= 1
        for rouge in ("rouge1", "rouge2", "rougeL"):
            assert 0 <= r[f"{rouge}_low"] < r[rouge] < r[f"{rouge}_high"] < 100
        if r["seed"] == "mean" and r["system"] == "finetuned":
            same = [o for o in found if all(o[k] == r[k] for k in ("dataset", "split", "system", "setting"))]
            seeds = [o["rouge1"] for o in same if o["seed"] != "mean"]
            assert len(seeds) >= 2 and r["rouge1"] == pytest.approx(np.mean(seeds), abs=0.01)
            caps = [o["length_cap"] for o in same if o["seed"] != "mean"]
            assert r["length_cap"] == pytest.approx(np.mean(caps), abs=1e-4)
    tuned = {r["split"] for r in found if r["setting"].startswith("tuning")}
    assert tuned == {"validation"} and len(found) > 90


def test_settings_are_named_by_what_differs():
    def named(name, overrides=None, **answers):
        job = {"name": name, "overrides": overrides or {}}
        return real.setting(job, {"decoding": "as the recipe", "split": "test", "defect": "corrected", **answers})

    assert named("main-samsum-42") == named("base-samsum_small-nf4") == "as the recipe"
    assert named("main-mts-1", decoding=real.BEAMS) == "as the recipe, 4 beams, no repeated 6-gram"
    assert named("rank-8-1", {"lora.r": 8}) == "3,000 rows, 1 epoch, rank 8"
    assert named("bits-16 bits-1") == "3,000 rows, 1 epoch, 16 bits"
    assert named("tune-mts-0.001-8") == "" and named("tune-mts-0.001-8", split="validation") == "tuning: 0.001-8"
    assert named("defects-labels-1", defect="labels from the prompt") == ""


def test_pictures_draw_every_committed_result_and_their_tables_are_the_committed_ones(tmp_path):
    written = pictures.main(tmp_path)
    assert [path.name for path in written] == ["scores.csv", "scores.png"] * 2 + ["learning_curve.png", "speed.png"]
    for path in written:
        committed = tables.ROOT / path.relative_to(tmp_path)
        assert committed.is_file() and path.stat().st_size > (10_000 if path.suffix == ".png" else 300)
        assert path.suffix == ".png" or path.read_text() == committed.read_text()


def test_two_gpus_are_shown_beside_one_with_errors_and_memory(tmp_path, monkeypatch):
    found = {
        "train_1_16": {"setup": "train_1_16", "gpus": 1, "tok_s": 1000, "peak_gib": 30.5, "gpu": "X"},
        "train_2_16": {"setup": "train_2_16", "gpus": 2, "tok_s": 1250, "peak_gib": 30.25, "gpu": "X"},
        "fsdp2_2": {
            "setup": "fsdp2_2",
            "gpus": 2,
            "weights_gib": [2.5, 2.25],
            "peak_gib": [7, 8],
            "seconds_a_step": 1.5,
        },
        "fsdp1_2": {"setup": "fsdp1_2", "gpus": 2, "error": "ended with code 1", "said": ""},
        "profile_2_16": {"setup": "profile_2_16", "gpus": 2, "ms_a_step": {"wall": 170.5, "communication": 1.25}},
    }
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.two_gpus() == "Not measured yet."
    (tmp_path / "two_gpus.json").write_text(json.dumps(two_gpus.with_speedup(found)), encoding="utf-8")
    lines = tables.two_gpus().splitlines()
    assert "| train_2_16 | 2 | 1,250 | 1.25 |  | 30.25 | X |" in lines
    assert "| train_1_16 | 1 | 1,000 |  |  | 30.5 | X |" in lines
    assert "| fsdp2_2 | 2 | 1.5 s a step |  | 2.5 | 8 |  |" in lines
    assert any(line.startswith("| fsdp1_2 | 2 | ended with code 1 |") for line in lines)
    assert "- profile_2_16: wall 170.5, communication 1.25" in lines


def test_a_shared_step_is_never_shorter_than_launching_it():
    one, two, eight = (tables.step_seconds(16, gpus, "NVLink") for gpus in (1, 2, 8))
    assert one == pytest.approx(16 * 202 / 17135) and 0.169 < two < eight < one
    assert tables.step_seconds(432, 8, "NVLink") == pytest.approx(54 * 202 / 18709 + 7 / 4 * 335.5e6 / 329e9)
    assert tables.step_seconds(16, 8, "100 Gbit/s") > one
