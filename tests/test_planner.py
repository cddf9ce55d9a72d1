"""The planner: bytes add up from shapes, batches keep the recipe, a plan fits or says why not."""

import dataclasses
import json

import pytest
import torch

from src import batching, experiments, kernels, modeling, planner, prompts


@pytest.fixture
def setup(tiny_model, records):
    e = experiments.load_experiment("demo", **{"base_model": str(tiny_model), "device": "cpu", "lora.rank": 4})
    return e, prompts.build_all(records, modeling.load_tokenizer(e), e.prompt)


def test_shapes_are_those_of_the_loaded_model(setup):
    e, _ = setup
    s = planner.shapes(e)
    # a layer: q 64x64, k and v 64x32, o 64x64, gate, up and down 64x128
    assert s["linear"] == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert s["other"] == 2 * 512 * 64 + 5 * 64  # embeddings, head, norms
    assert s["adapter"] == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192) and s["kv"] == 32 and s["largest"] == 64 * 128
    model = modeling.add_adapter(modeling.load_base(e, modeling.load_tokenizer(e)), e)
    counted = modeling.count_parameters(model)
    assert counted == {"trainable": s["adapter"], "total": s["adapter"] + s["linear"] + s["other"]}


def test_memory_of_mistral_7b_by_hand():
    e = experiments.load_experiment("samsum_best")
    s = {
        "layers": 32, "hidden": 4096, "intermediate": 14336, "kv": 1024, "vocabulary": 32000,
        "linear": 6_979_321_856, "largest": 4096 * 14336, "other": 262_410_240, "adapter": 83_886_080,
    }  # fmt: skip
    plain = planner.memory(e, s, 1000, 100, checkpointing=False, dequantized=False, fused=True)
    assert plain["weights"] == pytest.approx(6_979_321_856 * (0.5 + 1 / 64 + 1 / 4096) + 2 * 262_410_240, rel=1e-6)
    assert plain["adapter"] == 18 * 83_886_080 and plain["logits"] == 100 * 32000 * 14
    once = planner.memory(e, s, 1000, 100, checkpointing=False, dequantized=True, fused=True)
    assert once["weights"] == 2 * (6_979_321_856 + 262_410_240) and once["dequantised layer"] == 0
    less = planner.memory(e, s, 1000, 100, checkpointing=True, dequantized=False, fused=True)
    assert less["activations"] < plain["activations"] / 4
    twice = planner.memory(e, s, 2000, 100, checkpointing=False, dequantized=False, fused=True)
    assert twice["activations"] == 2 * plain["activations"]


@pytest.mark.parametrize("packed", [True, False])
def test_batches_keep_the_budget_and_the_rows_of_a_step(setup, packed):
    e, _ = setup
    lengths = [20 + (13 * i) % 90 for i in range(64)]  # at most 109
    for budget in (120, 300, 10**6):
        passes, size = planner._batches(e, lengths, packed, budget)
        assert size <= budget and (packed or e.training.batch_size % passes == 0)
        sampler = batching.StepSampler(lengths, e.training.batch_size, passes, e.seed, packed)
        own = [[lengths[i] for i in batch] for batch in sampler]
        assert size == max(sum(b) if packed else max(b) * len(b) for b in own)
    assert planner._batches(e, lengths, packed, 1)[0] == e.training.batch_size  # every row passes alone


def test_smaller_halves_the_budget_then_checkpoints_then_gives_up(setup):
    e, rows = setup
    rows = rows * 8
    plan = planner.plan(e, rows)
    seen = []
    while plan := planner.smaller(e, rows, plan):
        seen.append((plan["forward passes a step"], plan["checkpointing"]))
    assert [p for p, _ in seen] == sorted(p for p, _ in seen) and seen[-1] == (8, True) and not seen[0][1]


def test_the_plan_counts_what_will_be_trained(setup):
    e, rows = setup
    plan = planner.plan(e, rows * 9)  # 27 rows, steps of 8, one epoch: 4 steps
    assert plan["optimizer steps"] == 4 and plan["rows an optimizer step"] == 8 and plan["batches"] == "padded"
    assert plan["predicted minutes"] is not None and plan["predicted GiB"] is None  # GPU memory is what is planned


def test_max_steps_counts_whatever_epochs_says(setup):
    e, rows = setup
    e = dataclasses.replace(e, training=dataclasses.replace(e.training, max_steps=12))
    assert planner.plan(e, rows * 9)["optimizer steps"] == 12


def test_the_benchmark_table_is_made_from_the_committed_results():
    from benchmarks import speed

    text = (experiments.ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert text.split("<!-- table -->\n")[1].split("<!-- end -->")[0] == speed.table() + "\n"
    assert text.split("<!-- cpu table -->\n")[1].split("<!-- cpu end -->")[0] == speed.cpu_table() + "\n"
    results = json.loads((experiments.ROOT / "benchmarks" / "results" / "h200.json").read_text(encoding="utf-8"))
    wrong = {"ours_dropout", "ours_padded"}  # what these runs said led to a mend, see the test of today's plan
    trained = [r for r in results if "predicted_gib" in r and r["setup"] not in wrong]
    assert len(trained) >= 12 and all(abs(r["predicted_gib"] / r["peak_gib"] - 1) <= 0.15 for r in trained)
    capped = [r for r in trained if r["capped_gib"]]
    assert all(r["peak_gib"] <= r["capped_gib"] and r["retries"] == 0 for r in capped) and len(capped) >= 6


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    """plan(experiment, rows, ...) of Mistral-7B on a stand-in GPU."""
    from transformers import MistralConfig

    MistralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    ).save_pretrained(tmp_path)  # fmt: skip
    monkeypatch.setattr(modeling, "resolve_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(modeling, "compute_dtype", lambda *_: torch.float16)

    def plan(name, rows, tflops, gib, packed=True, triton=True, **overrides):
        monkeypatch.setattr(kernels, "has_varlen", lambda *_: packed)
        monkeypatch.setattr(kernels, "wanted", lambda e, device: triton and e.lora.dropout == 0)
        monkeypatch.setattr(planner, "matmul_rate", lambda *_: tflops * 1e12)
        monkeypatch.setattr(planner, "free_memory", lambda *_: gib * 2**30)
        return planner.plan(experiments.load_experiment(name, base_model=str(tmp_path), **overrides), rows)

    return plan


@pytest.mark.parametrize(
    ("name", "gpu", "tflops", "gib", "packed"),
    [("samsum_best", "A100 80 GB", 250, 79, True), ("samsum_best", "T4", 40, 14.6, False), ("samsum", "H200", 790, 139, True)],
)  # fmt: skip
def test_the_readmes_minutes_on_other_gpus_are_the_planners(on_gpu, name, gpu, tflops, gib, packed):
    from benchmarks import speed

    rows = speed.rows("train")  # half of SAMSum, which is what `samsum` trains on
    plan = on_gpu(name, rows if name == "samsum" else rows * 2, tflops, gib, packed)
    minutes = f"{plan['predicted minutes']:.0f} minutes"
    readme = (experiments.ROOT / "README.md").read_text(encoding="utf-8")
    assert (f"{minutes} on an {gpu} by the planner" if name == "samsum" else f"| {gpu} | {minutes} |") in readme


def test_every_measured_peak_lies_within_15_percent_of_todays_plan(on_gpu):
    from benchmarks import speed

    results = json.loads((experiments.ROOT / "benchmarks" / "results" / "h200.json").read_text(encoding="utf-8"))
    trained = [r for r in results if "plan" in r]
    assert len(trained) >= 12
    parts = {part: speed.rows(part) for part in ("sample", "train")}
    for r in trained:
        changed = speed.TRAIN.get(r["setup"]) or speed.JOB
        packed, passes = r["plan"]["batches"] == "packed", r["plan"]["forward passes a step"]
        if not packed:  # as many rows a pass as were measured
            changed = changed | {"training.micro_batch_size": changed["training.batch_size"] // passes}
        rows = parts["train" if r["setup"] == "job" else "sample"]
        gib, fused = r["capped_gib"] or 139, r["plan"]["fused"]
        plan = on_gpu("samsum_best", rows, r["matmul_tflops"], gib, packed, fused, **(speed.RECIPE | changed))
        same = ("checkpointing", "weights", "batches", "forward passes a step", "optimizer steps")
        assert [plan[key] for key in same] == [r["plan"][key] for key in same], r["setup"]
        assert plan["predicted GiB"] == pytest.approx(r["peak_gib"], rel=0.15), r["setup"]


def test_layers_that_are_fused_in_part_are_planned_as_plain_ones(on_gpu):
    from benchmarks import speed

    rows, part = speed.rows("sample"), {"lora.target_modules": ("q_proj", "v_proj")}
    gib = [
        on_gpu("samsum_best", rows, 790, 139, triton=triton, **changed)["predicted GiB"]
        for changed in ({}, part)
        for triton in (True, False)
    ]
    assert gib[0] < gib[1] and gib[2] == gib[3]


def test_the_readmes_gpu_figures_are_the_benchmarks():
    results = json.loads((experiments.ROOT / "benchmarks" / "results" / "h200.json").read_text(encoding="utf-8"))
    job = next(r for r in results if r["setup"] == "job")["training_minutes"]
    readme = (experiments.ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| H200 | {2 * job:.0f} minutes |" in readme and f"half of the rows took {job:.1f} minutes" in readme
    told = {
        r["setup"]: f"{r['tok_s']:,} ({r['peak_gib']:{'.1f' if r['peak_gib'] < 10 else '.0f'}} GiB)"
        for r in results
        if "tok_s" in r
    }
    fast, small = (
        ("ours_64gib", "unsloth_packed_16k"),
        ("ours_checkpointed", "unsloth_packed_16k_checkpointed", "hf_padded"),
    )
    assert f"| without checkpointing | {' | '.join(told[s] for s in fast)} | |" in readme
    assert f"| with checkpointing | {' | '.join(told[s] for s in small)} |" in readme
    speed = {r["setup"]: f"{r['tok_s']:,}" for r in results if "tok_s" in r}
    assert f"at the {speed['ours_batch_3_dropout']} tokens/s that were measured" in readme
    assert f"ran at {speed['recipe2']} in the same call" in readme and f"at {speed['job']}." in readme
    measured = {r["setup"]: r for r in results}  # the goals: 1.8 and 1.4 times Unsloth packed in the same call
    for ours, theirs, least in ((*fast, 1.8), ("ours_64gib", "unsloth_packed_8k", 1.8), (*small[:2], 1.4)):
        assert measured[ours]["call"] == measured[theirs]["call"]
        assert measured[ours]["tok_s"] >= least * measured[theirs]["tok_s"]
