"""On a CUDA device: packed rows, fused layers and 16-bit paths compute what the CPU computes. Run: pytest -m gpu."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, TrainingArguments

from src import data, engine, prompts, qlora, recipes, runs
from src.engine import batches, dropout, fp8, planning, trainer, weights
from src.engine.attention import rows_stay_apart, varlen_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

torch.set_num_threads(
    min(4, torch.get_num_threads())
)  # of the CPU that is compared with: more only wait for each other


def load(device="cuda", count=16, **overrides):
    """(recipe, device, tokenizer, the demo's base with a random adapter, training rows)."""
    recipe = recipes.load("demo", overrides)
    device = qlora.resolve_device(device)
    tokenizer = qlora.load_tokenizer(recipe)
    model = get_peft_model(qlora.load_base(recipe, tokenizer, device), LoraConfig(**recipe.lora.model_dump()))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    records = data.read_rows(runs.ROOT / "data" / "demo" / "train.csv")[:count]
    return recipe, device, tokenizer, model, prompts.build_all(records, tokenizer, recipe.prompt)


def gradients(model, batched):
    model.zero_grad()
    total = 0.0
    for batch in batched:
        loss, _ = trainer.summed_loss(model, batch)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def close(a, b, tolerance):
    return ((a - b).norm() / b.norm()).item() < tolerance


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_packed_fused_steps_equal_plain_padded_ones(dtype):
    _, _, tokenizer, model, rows = load(**{"quantization.bnb_4bit_compute_dtype": dtype})
    assert rows_stay_apart(model)
    rows = list(rows)
    with torch.autocast("cuda", getattr(torch, dtype)):
        alone, expected = gradients(model, [batches.pad([row], tokenizer.pad_token_id) for row in rows])
        packed, found = gradients(model, [batches.pack(rows)])
        assert packed == pytest.approx(alone, rel=5e-3) and close(found, expected, 0.05)
        with engine.fused(model) as count:
            assert count > 0
            fused, found = gradients(model, [batches.pack(rows)])
        assert fused == pytest.approx(alone, rel=5e-3) and close(found, expected, 0.05)
    exact = load("cpu")[3]
    _, reference = gradients(exact, [batches.pad(rows, tokenizer.pad_token_id)])
    assert close(found, reference.cuda(), 0.05)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("reading", [True, False], ids=["prompts", "one new token"])
def test_attention_over_a_flat_cache_agrees_with_the_cpu(window, reading):
    """Eight query heads in two groups; rows of 7, 40 and 2 tokens in stretches of 9, 50 and 300 slots, one unused."""
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal, module.training = 4, True, False
    used, begin = torch.tensor([7, 2], dtype=torch.int32), torch.tensor([0, 59, 359], dtype=torch.int32)
    queries = used if reading else torch.ones(2, dtype=torch.int32)
    starts = torch.nn.functional.pad(queries.cumsum(0, dtype=torch.int32), (1, 0))
    q = torch.randn((1, 8, int(starts[-1]), 64), generator=generator).bfloat16()
    k, v = (torch.randn((1, 2, 359, 64), generator=generator).bfloat16() for _ in range(2))

    def attention(device):
        tensors = (x.to(device) for x in (q, k, v))
        rows = {
            "cu_seq_lens_q": starts.to(device),
            "cu_seq_lens_k": begin.to(device),
            "seqused_k": used.to(device),
            "max_length_q": int(queries.max()),
            "max_length_k": 7,
        }
        return varlen_attention(module, *tensors, None, scaling=0.125, sliding_window=window, **rows)[0]

    with torch.inference_mode():
        torch.testing.assert_close(attention("cuda").cpu(), attention("cpu"), rtol=2e-2, atol=2e-2)


def trained(folder, name, **overrides):
    """(trainer, validation loss) after 50 steps over 400 rows of the demo."""
    recipe, device, tokenizer, model, rows = load(name, 400, **overrides)
    dtype = qlora.compute_dtype(recipe, device)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=50, per_device_train_batch_size=8, learning_rate=3e-3, eval_strategy="no",
        lr_scheduler_type="cosine", warmup_steps=0.05, save_strategy="no",
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=device.type == "cpu", seed=1,
    )  # fmt: skip
    lora, quantization = model.peft_config["default"], qlora.quantization_config(recipe, device)
    options = {"packing": "on", "checkpointing": recipe.engine.checkpointing, "fp8": recipe.engine.fp8}
    options["graphs"] = recipe.engine.graphs
    plan = engine.plan(qlora.load_config(recipe), lora, quantization, arguments, rows, device, **options)
    fast = engine.FastTrainer(model, arguments, rows, rows.select(range(40)), tokenizer, plan)
    fast.train()
    assert all(math.isfinite(row["loss"]) for row in fast.state.log_history if "loss" in row)
    return fast, fast.evaluate()["eval_loss"]


def test_losses_after_fifty_steps_agree_between_cpu_and_gpu(tmp_path):
    _, cpu = trained(tmp_path, "cpu")
    half, again = {"quantization.bnb_4bit_compute_dtype": "float16"}, {"engine.checkpointing": "on"}
    for extra in ({}, half, again):
        fast, gpu = trained(tmp_path, "cuda", **extra)
        print(extra, "CPU", cpu, "GPU", gpu, fast.plan)
        assert fast.plan.fused and gpu == pytest.approx(cpu, rel=0.05)  # 16-bit rounding over 50 steps; 2.4% was seen


def test_generation_agrees_with_the_cpu():
    greedy = GenerationConfig(max_new_tokens=24)
    *_, tokenizer, model, rows = load()
    on_gpu = engine.generate(model, tokenizer, rows, greedy, progress=False)
    assert engine.generate(model, tokenizer, rows, greedy, batch_size=3, progress=False) == on_gpu
    *_, other, _ = load("cpu")
    on_cpu = engine.generate(other, tokenizer, rows, greedy, progress=False)
    same = sum(a["prediction"] == b["prediction"] for a, b in zip(on_gpu, on_cpu, strict=True))
    assert same >= len(rows) // 4  # a random adapter has many near ties, which bfloat16 breaks; 7 of 16 were seen


def test_sampled_answers_do_not_depend_on_the_batch():
    *_, tokenizer, model, rows = load()
    sampled = GenerationConfig(max_new_tokens=16, do_sample=True, temperature=0.7, top_p=0.9)
    first = engine.generate(model, tokenizer, rows, sampled, seed=3, progress=False)
    again = engine.generate(model, tokenizer, rows, sampled, seed=3, batch_size=5, progress=False)
    same = sum(a["prediction"] == b["prediction"] for a, b in zip(first, again, strict=True))
    assert same >= len(rows) - 2  # kernels for other batches may round a near tie the other way


def test_four_bit_weights_come_back_as_they_were():
    _, _, _, model, rows = load()
    batch = batches.pack(list(rows))
    with torch.inference_mode():
        before = trainer.summed_loss(model, dict(batch))[0]
        weights.free_cuda()
        taken = torch.cuda.memory_allocated()
        kept = weights.dequantize(model, keep=True)
        assert torch.cuda.memory_allocated() > taken
        weights.requantize(model, kept)
        assert trainer.summed_loss(model, dict(batch))[0] == before
        assert torch.cuda.memory_allocated() <= taken * 1.01 + 2**20


def test_a_plan_that_runs_out_of_memory_goes_on_smaller(tmp_path, monkeypatch):
    real, calls = planning.smaller, []
    monkeypatch.setattr(trainer, "smaller", lambda *args: calls.append(1) or real(*args))
    loss = trainer.FastTrainer.compute_loss

    def too_large(self, model, inputs, **kwargs):
        if self.plan.dequantized:
            torch.empty(2**45, device="cuda")
        return loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(trainer.FastTrainer, "compute_loss", too_large)
    fast, value = trained(tmp_path, "cuda")
    assert calls and not fast.plan.dequantized and len(fast.failed_plans) == len(calls) and math.isfinite(value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "width", "count", "rank"), [(300, 320, 3, 4), (1111, 4096, 2, 32), (70, 72, 1, 20)])
def test_dropout_kernels_agree_with_the_plain_functions(tokens, width, count, rank, dtype):
    generator, p = torch.Generator().manual_seed(0), 0.1
    x, a, du = (
        torch.randn(n, generator=generator) for n in ((tokens, width), (count * rank, width), (tokens, count * rank))
    )
    seeds = torch.tensor([7, 123456789, 2**31 - 2], dtype=torch.int32)[:count]
    x, a, du = (y.to(dtype) for y in (x, a, du))
    cuda = [y.cuda() for y in (x, a, du, seeds)]

    def all_three(x, a, du, seeds):
        yield dropout.low(x, a, seeds, p, 2.0)
        yield dropout.input_gradient(du, a, seeds, p)
        yield dropout.factor_gradient(du, x, seeds, p)

    exactly = all_three(x.double(), a.double(), du.double(), seeds)
    for found, expected in zip(all_three(*cuda), exactly, strict=True):
        assert close(found.cpu().double(), expected.double(), 1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("tokens", [1, 300, 1111])
def test_products_in_fp8_agree_with_the_plain_functions(tokens):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    weights, x, grads = [random(512, 256), random(64, 256) * 3], random(tokens, 256), []
    grads = [random(tokens, 512), random(tokens, 64) * 1e-6]

    def products(device):
        rows = [fp8.quantize(weight.to(device)) for weight in weights]
        yield from fp8.forward(x.to(device), rows)
        yield fp8.backward([g.to(device) for g in grads], *fp8.across(rows))

    for found, expected in zip(products("cuda"), products("cpu"), strict=True):
        assert found.dtype == torch.bfloat16 and close(found.cpu().double(), expected.double(), 1e-2)
    exact = grads[0].double() @ weights[0].double() + grads[1].double() @ weights[1].double()
    assert close(found.cpu().double(), exact, 0.06)


def test_training_in_fp8_falls_as_far_as_in_16_bits(tmp_path):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    fast, value = trained(tmp_path, "cuda", **{"engine.fp8": "on"})
    _, expected = trained(tmp_path, "cuda")
    print("fp8", value, "16 bits", expected)
    assert fast.plan.fp8 and value != expected and value == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_recorded_steps_train_what_plain_ones_do(tmp_path, monkeypatch, rate):
    """Recorded; the same padded steps launched one kernel after the other; and not padded, with the same masks."""
    dropout_rate = {"lora.lora_dropout": rate}
    fast, recorded = trained(tmp_path, "cuda", **{"engine.graphs": "on"}, **dropout_rate)
    assert fast.plan.graphs and fast.recorded > 0

    class Launched(trainer.StepGraphs):
        def __init__(self, *args):
            super().__init__(*args)
            self.stream = None

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "StepGraphs", Launched)
        _, launched = trained(tmp_path, "cuda", **{"engine.graphs": "on"}, **dropout_rate)
    monkeypatch.setattr(planning, "DROPOUT_TOKENS", 0)  # fused although dropout's steps are short
    _, plain = trained(tmp_path, "cuda", **{"engine.graphs": "off"}, **dropout_rate)
    print("recorded", recorded, "launched", launched, "plain", plain)
    assert recorded == pytest.approx(launched, rel=5e-3) and recorded == pytest.approx(plain, rel=1e-2)


def test_recorded_steps_in_fp8(tmp_path):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    fast, recorded = trained(tmp_path, "cuda", **{"engine.graphs": "on", "engine.fp8": "on"})
    _, plain = trained(tmp_path, "cuda", **{"engine.fp8": "on", "engine.graphs": "off"})
    assert fast.plan.graphs and fast.recorded > 0
    assert recorded == pytest.approx(plain, rel=1e-2)
