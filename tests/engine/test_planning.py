"""The plan: bytes add up from shapes, passes keep the rows of a step, a plan fits or says why not."""

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, MistralConfig, TrainingArguments

from src.engine import Plan, PlanError, plan, planning
from src.engine.batches import IGNORE, StepSampler
from tests.engine.conftest import LINEAR, pass_tokens

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TINY = MistralConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
MISTRAL = MistralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, name_or_path="mistralai/Mistral-7B-v0.1",
)  # fmt: skip
LENGTHS = [20 + (13 * i) % 90 for i in range(64)]  # at most 109


def lora(**fields):
    return LoraConfig(**{"r": 4, "target_modules": LINEAR, **fields})


def quantized(load_in_4bit=True, double=True, dtype=torch.float32):
    return BitsAndBytesConfig(load_in_4bit=load_in_4bit, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype)


def arguments(per_step=8, **fields):
    return TrainingArguments(output_dir="unused", per_device_train_batch_size=per_step, use_cpu=True, **fields)


def dataset(lengths, answer=4):
    labels = [[IGNORE] * (n - answer) + [5] * answer for n in lengths]
    return {"input_ids": [[5] * n for n in lengths], "labels": labels}


def of(lengths, per_step=8, steps=None, packed=True, **fields):
    """A Plan of one epoch over rows of these lengths."""
    steps = steps or math.ceil(len(lengths) / per_step)
    values = {"passes": 1, "tokens": 0, "checkpointing": False, "dequantized": False, "fused": True, **fields}
    return Plan(len(lengths), per_step, steps, packed, gib=None, minutes=0.0, **values)


def test_shapes_are_those_of_the_loaded_model():
    s = planning.shapes(TINY, lora())
    # a layer: q 64x64, k and v 64x32, o 64x64, gate, up and down 64x128
    assert s["linear"] == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert s["other"] == 2 * 512 * 64 + 5 * 64  # embeddings, head, norms
    assert s["adapter"] == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192) and s["kv"] == 32 and s["largest"] == 64 * 128
    model = get_peft_model(AutoModelForCausalLM.from_config(TINY), lora())
    assert model.get_nb_trainable_parameters() == (s["adapter"], s["adapter"] + s["linear"] + s["other"])


@pytest.mark.parametrize(
    "targets",
    ["all-linear", r".*\.(q|v)_proj", ["q_proj", "lm_head"], ["layers.1.mlp.down_proj"]],
    ids=str,
)
def test_the_planned_adapter_is_the_one_that_peft_makes(targets):
    planned = planning.shapes(TINY, lora(target_modules=targets))["adapter"]
    model = get_peft_model(AutoModelForCausalLM.from_config(TINY), lora(target_modules=targets, task_type="CAUSAL_LM"))
    assert model.get_nb_trainable_parameters()[0] == planned > 0


def test_an_unknown_target_module_is_named_beside_the_linear_layers_there_are():
    with pytest.raises(
        PlanError, match="names query, w1: MistralForCausalLM has the linear layers down_proj, gate_proj"
    ):
        planning.shapes(TINY, lora(target_modules=["w1", "q_proj", "query"]))


def test_a_model_without_linear_layers_is_refused_before_it_is_loaded():
    with pytest.raises(PlanError, match="GPT2LMHeadModel has no linear layers.*choose another base_model"):
        planning.shapes(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1), lora())


def test_memory_of_mistral_7b_by_hand():
    s = planning.shapes(MISTRAL, lora(r=32))
    assert (s["linear"], s["other"], s["adapter"]) == (6_979_321_856, 262_410_240, 83_886_080)

    def memory(tokens=1000, fused=True, config=None, q=None, **fields):
        p = of([1000], tokens=tokens, fused=fused, **fields)
        return planning.memory(p, 100, s, q or quantized(), config or lora(r=32))

    kept = memory()
    # four bits, one byte for the absmax of 64 weights, four for that of 256 of those; the rest in 16 bits
    assert kept["weights"] == pytest.approx(6_979_321_856 * (0.5 + 1 / 64 + 1 / 4096) + 2 * 262_410_240, rel=1e-6)
    assert memory(q=quantized(double=False))["weights"] - kept["weights"] == pytest.approx(
        6_979_321_856 * (4 / 64 - 1 / 64 - 1 / 4096), rel=1e-6
    )
    assert kept["adapter"] == 18 * 83_886_080 and kept["logits"] == 100 * 32000 * 14
    assert kept["dequantised layer"] == 2 * 4096 * 14336
    # a token in a layer: six times the width, keys and values, gate and up, seven low-rank outputs
    assert kept["activations"] == 32 * 2 * 1000 * (6 * 4096 + 2 * 1024 + 2 * 14336 + 7 * 32)
    for once in (memory(dequantized=True), memory(q=quantized(load_in_4bit=False))):
        assert once["weights"] == 2 * (6_979_321_856 + 262_410_240) and once["dequantised layer"] == 0
    assert memory(checkpointing=True)["activations"] < kept["activations"] / 4
    eight = memory(dequantized=True, fp8=True)  # two copies of a byte beside the four bits
    assert eight["weights"] == pytest.approx(kept["weights"] + 2 * 6_979_321_856, rel=1e-6)
    assert memory(tokens=2000)["activations"] == 2 * kept["activations"]
    assert memory(fused=False)["activations"] > kept["activations"]
    dropping = lora(r=32, lora_dropout=0.1)  # fused, its masks are computed again; PEFT's layers keep them
    assert memory(config=dropping) == kept
    plain = memory(fused=False)["activations"]
    assert memory(config=dropping, fused=False)["activations"] == plain + 32 * 2 * 1000 * (7 * 4096 + 14336 // 2)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("budget", [120, 300, 10**6])
def test_passes_keep_the_budget_and_are_the_fewest_that_do(packed, budget):
    p = planning.with_passes(of(LENGTHS, packed=packed), LENGTHS, 1, budget)

    def largest(passes):
        sampler = StepSampler(LENGTHS, 8, passes, 1, packed)
        return max(pass_tokens([LENGTHS[i] for i in part], packed) for part in sampler)

    assert p.tokens == largest(p.passes) <= budget
    assert p.passes == 1 or largest(p.passes - 1) > budget


def test_a_row_above_the_budget_passes_alone():
    p = planning.with_passes(of(LENGTHS), LENGTHS, 1, budget=1)
    assert p.passes == 8 and p.tokens == max(LENGTHS)


def test_smaller_halves_the_passes_then_takes_4_bit_weights_then_checkpoints_then_gives_up():
    p = planning.with_passes(of(LENGTHS, dequantized=True), LENGTHS, 1, 10**6)
    seen = []
    while p := planning.smaller(p, LENGTHS, 1):
        seen.append((p.passes, p.dequantized, p.checkpointing))
    halved = [step for step in seen if step[0] < 8]
    assert len(halved) >= 2 and all(step[1:] == (True, False) for step in halved) and halved == sorted(halved)
    assert seen[len(halved) :] == [(8, True, False), (8, False, False), (8, False, True)]


def test_the_plan_counts_what_will_be_trained():
    p = plan(TINY, lora(), quantized(), arguments(num_train_epochs=1), dataset([30] * 27), CPU)
    assert (p.rows, p.rows_per_step, p.steps, p.packed) == (27, 8, 4, False)  # 27 rows, steps of 8
    assert p.gib is None and p.minutes >= 0 and p.dequantized and not p.fused
    assert plan(TINY, lora(), quantized(), arguments(num_train_epochs=1.5), dataset([30] * 27), CPU).steps == 6
    assert plan(TINY, lora(), quantized(), arguments(max_steps=12), dataset([30] * 27), CPU).steps == 12
    accumulated = arguments(per_step=4, gradient_accumulation_steps=3)
    assert plan(TINY, lora(), quantized(), accumulated, dataset([30] * 27), CPU).rows_per_step == 12
    assert not plan(TINY, lora(), quantized(load_in_4bit=False), arguments(), dataset([30] * 9), CPU).dequantized
    assert plan(TINY, lora(), quantized(), arguments(), dataset([30] * 9), CPU, checkpointing="on").checkpointing


@pytest.mark.parametrize("lengths", [LENGTHS, [10] * 64, [5] * 56 + [400] * 8], ids=["mixed", "equal", "two kinds"])
def test_on_a_cpu_passes_weigh_padding_against_the_cost_of_a_pass(lengths):
    p = plan(TINY, lora(), quantized(), arguments(seed=3, num_train_epochs=2), dataset(lengths), CPU)

    def cost(passes):
        found = 0
        for epoch in range(2):
            sampler = StepSampler(lengths, 8, passes, 3, packed=False)
            sampler.set_epoch(epoch)
            found += sum(pass_tokens([lengths[i] for i in part], False) + planning.CPU_PASS for part in sampler)
        return found

    costs = {passes: cost(passes) for passes in range(1, 9)}
    assert costs[p.passes] == min(costs.values())
    assert p.passes == 1 if len(set(lengths)) == 1 else p.passes > 1  # rows of one length need no padding


def test_on_a_cpu_packed_rows_pass_together_unless_a_limit_is_asked():
    given = (TINY, lora(), quantized(), arguments(seed=3), dataset(LENGTHS), CPU)
    together = plan(*given, packing="on")
    assert together.packed and together.passes == 1 and together.tokens > 400
    for packing in ("on", "off"):
        limited = plan(*given, packing=packing, tokens_per_pass=250)
        assert limited.tokens <= 250 and 1 < limited.passes < 8
    assert plan(*given, tokens_per_pass=1).tokens == max(LENGTHS)  # one row at least


def test_a_plan_is_shown_as_a_table():
    shown = plan(TINY, lora(), quantized(), arguments(), dataset([30] * 9), CPU)._repr_html_()
    assert "<th>rows_per_step</th><td>8</td>" in shown


@pytest.fixture
def on_gpu(monkeypatch):
    """plan_of(gib=, ...) -> the plan of Mistral-7B on a stand-in GPU with that much free memory."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Stand-in")

    def plan_of(
        gib, lengths=(100, 180, 700) * 40, packed=True, triton=True, tflops=790, config=None, model=MISTRAL, **limits
    ):
        monkeypatch.setattr(planning, "has_varlen", lambda *_: packed)
        monkeypatch.setattr(planning.fuse, "available", lambda device: triton)
        monkeypatch.setattr(planning, "matmul_rate", lambda *_: tflops * 1e12)
        monkeypatch.setattr(planning.weights, "free_bytes", lambda device: gib * 2**30)
        given = (model, config or lora(r=32), quantized(dtype=torch.bfloat16), arguments(16, num_train_epochs=3))
        return plan(*given, dataset(list(lengths), answer=40), GPU, **limits)

    return plan_of


def test_a_large_gpu_keeps_activations_and_dequantises_once(on_gpu):
    p = on_gpu(139)
    assert p.packed and p.fused and p.dequantized and not p.checkpointing
    assert p.passes == 1 and p.tokens <= planning.TOKENS and 15 < p.gib < 0.95 * 139


def test_the_plan_gets_more_careful_as_memory_shrinks(on_gpu):
    found = [on_gpu(gib) for gib in (139, 60, 24, 16, 8)]
    assert all(p.gib <= planning.RESERVE * gib for p, gib in zip(found, (139, 60, 24, 16, 8), strict=True))
    assert [p.minutes for p in found] == sorted(p.minutes for p in found)
    assert found[0].dequantized and not found[-1].dequantized and found[-1].checkpointing
    assert found[-1].passes > found[0].passes
    assert on_gpu(139, memory_gib=16) == found[3]


def test_of_what_fits_the_fastest_is_planned(on_gpu):
    """In 24 GiB: 16-bit weights with checkpointing in one pass, rather than 4-bit weights without it in two."""
    p, kept = on_gpu(24), on_gpu(24, checkpointing="off")
    assert p == on_gpu(24, checkpointing="on") and (p.passes, p.dequantized) == (1, True)
    assert (kept.passes, kept.dequantized) == (2, False) and p.minutes < kept.minutes


def test_asked_settings_are_kept(on_gpu):
    assert on_gpu(139, checkpointing="on").checkpointing
    assert not on_gpu(139, fused="off").fused and not on_gpu(139, triton=False).fused
    assert not on_gpu(139, packing="off").packed and on_gpu(139, packed=False, packing="on").packed
    assert on_gpu(139, tokens_per_pass=1400).tokens <= 1400
    assert on_gpu(139, config=lora(r=32, lora_dropout=0.1)).fused
    short = {"lengths": (100, 180, 300) * 40}  # 16 rows a step: too few tokens to pay for launching the masks' kernels
    assert on_gpu(139, **short).fused and not on_gpu(139, config=lora(r=32, lora_dropout=0.1), **short).fused


def test_fp8_is_planned_where_it_runs_and_refused_elsewhere(on_gpu):
    fast, short = on_gpu(139, fp8="on"), {"lengths": (100, 180, 300) * 40, "config": lora(r=32, lora_dropout=0.1)}
    assert fast.fp8 and fast.fused and fast.dequantized
    assert on_gpu(139, fp8="on", tflops=10).minutes < on_gpu(139, tflops=10).minutes
    assert not on_gpu(139).fp8 and on_gpu(139, fp8="on", **short).fused
    assert on_gpu(40, fp8="on").passes > 1  # rather than checkpointing or 4-bit weights, which fp8 does not pay for
    with pytest.raises(PlanError, match=r"needs \d+\.\d GiB in fp8 without checkpointing, 11\.4 GiB.*fp8 to 'off'"):
        on_gpu(12, fp8="on")
    one = replace(fast, passes=16, tokens=700)
    assert planning.smaller(one, [700] * 16, 1) is None and planning.smaller(replace(one, fp8=False), [700] * 16, 1)
    for options in ({"fused": "off"}, {"triton": False}, {"packed": False}, {"checkpointing": "on"}):
        with pytest.raises(PlanError, match=r"engine.fp8 is 'on'.*found cuda, torch.bfloat16.*Set engine.fp8 to 'off'"):
            on_gpu(139, fp8="on", **options)


def test_short_steps_are_recorded_where_one_pass_of_16_bit_weights_holds_them(on_gpu):
    short, longer = {"lengths": (60, 90, 180) * 40}, {"lengths": (100, 180, 300) * 40}  # 1,760 and 3,093 tokens a step
    assert on_gpu(139, **short).graphs and not on_gpu(139, **longer).graphs
    assert on_gpu(139, ranks=2, **longer).graphs  # each computes half of a step
    small = {"model": MistralConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30)}
    assert on_gpu(139, **small, **longer).graphs  # fewer weights, as many kernels
    assert on_gpu(139, graphs="on", **longer).graphs and not on_gpu(139, graphs="off", **short).graphs
    dropping = on_gpu(139, config=lora(r=32, lora_dropout=0.1), **short)
    assert dropping.graphs and dropping.fused  # nothing waits for launching the masks' kernels
    plain = on_gpu(139, graphs="off", **short)
    assert dropping.gib - plain.gib == pytest.approx(4 * 83_886_080 / 2**30, abs=0.11)
    for options in ({"triton": False}, {"checkpointing": "on"}, {"packing": "off"}, {"tokens_per_pass": 900}):
        assert not on_gpu(139, **options, **short).graphs, options
    fours = on_gpu(12, **short)
    assert not fours.dequantized and not fours.graphs
    assert not planning.smaller(replace(dropping, passes=16), [100] * 120, 1).graphs


def test_layers_that_are_fused_in_part_are_planned_as_plain_ones(on_gpu):
    part = lora(r=32, target_modules=["q_proj", "v_proj"])
    whole, plain, some, none = (
        on_gpu(139, triton=triton, config=config) for config in (None, part) for triton in (True, False)
    )
    assert whole.gib < plain.gib and whole.minutes < plain.minutes
    assert replace(some, fused=False) == none


def test_when_nothing_fits_the_error_says_what_is_needed_and_what_there_is(on_gpu):
    message = (
        r"mistralai/Mistral-7B-v0.1 does not fit on Stand-in: the longest row \(9000 tokens\) needs \d+\.\d GiB even "
        r"with checkpointing, 3\.8 GiB can be used\. Lower prompt.max_tokens or lora.r"
    )
    with pytest.raises(PlanError, match=message) as raised:
        on_gpu(4, lengths=[100, 9000])
    # 4-bit weights 3.8 GiB with embeddings, adapter and its moments 1.4, layers' inputs 2.2, one layer 1.0, and more
    assert 8 < float(str(raised.value).split("needs ")[1].split()[0]) < 14
    with pytest.raises(PlanError, match="set engine.checkpointing to 'auto'"):
        on_gpu(6, lengths=[100, 2000], checkpointing="off")
