"""Frozen products in 8 bits, by the plain functions: how far off they are, and who computes with them."""

import pytest
import torch
from torch._dynamo import testing
from transformers import MistralConfig

from src import engine
from src.engine import fp8, fused
from src.engine.batches import pack, pad
from src.engine.trainer import summed_loss
from tests.engine.conftest import fill, random_rows, tiny, trainable, with_adapter
from tests.engine.test_fuse import gradients


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(found, expected) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_a_row_is_rounded_with_a_scale_of_its_own():
    x = random(5, 64) * torch.tensor([1e-6, 1.0, 30.0, 1e4, 0.0])[:, None]
    rounded, scale = fp8.quantize(x)
    assert rounded.dtype == torch.float8_e4m3fn and scale.shape == (5, 1) and scale.dtype == torch.float32
    assert rounded.float().abs().amax(1).tolist() == [448.0] * 4 + [0.0]
    back = rounded.float() * scale
    assert (back[:4] - x[:4]).abs().div(x[:4].abs().clamp(min=1e-30)).median() < 0.04 and not back[4].any()


def test_forward_and_backward_are_the_products_with_rounded_weights():
    weights, x = [random(48, 32, seed=1) * 3, random(16, 32, seed=2) * 0.1], random(7, 32, seed=3)
    grads = [random(7, 48, seed=4), random(7, 16, seed=5) * 100]
    rows = [fp8.quantize(weight) for weight in weights]
    exact = [weight.float() * scale for weight, scale in rows]
    for found, weight in zip(fp8.forward(x, rows), exact, strict=True):
        assert 0.001 < off(found, x @ weight.t()) < 0.05  # x is rounded, too
    found = fp8.backward(grads, *fp8.across(rows))
    expected = sum(g @ weight for g, weight in zip(grads, exact, strict=True))
    assert found.shape == (7, 32) and 0.001 < off(found, expected) < 0.05


def test_rounding_is_compiled_for_few_kinds_of_input(monkeypatch):
    """Dynamo gives a function up after eight (`recompile_limit`), and what is left runs as a dozen small kernels."""
    counter = testing.CompileCounter()
    compiled = torch.compile(fp8.rounded, backend=counter)

    def on_a_gpu(*inputs):  # as `one_kernel` does there
        for x in (x for x in inputs if torch.is_tensor(x) and x.ndim > 1):
            torch._dynamo.maybe_mark_dynamic(x, 0)
            torch._dynamo.mark_static(x, 1)
        return compiled(*inputs)

    monkeypatch.setattr(fp8, "quantize", on_a_gpu)
    shapes = [
        [(64, 64), (16, 64), (16, 64)],
        [(64, 64)],
        [(224, 64), (224, 64)],
        [(64, 224)],
    ]  # q k v, o, gate up, down
    for tokens, learns in ((90, False), (110, True), (130, True)):
        for group in shapes:
            rows = [fp8.rounded(random(*shape).bfloat16()) for shape in group]
            x = random(tokens, group[0][1]).bfloat16().requires_grad_(learns)  # the first layer's input does not learn
            with torch.no_grad():  # as inside of an autograd.Function
                fp8.forward(x, rows)
                fp8.backward([random(tokens, shape[0]).bfloat16() for shape in group], *fp8.across(rows))
    assert counter.frame_count == 5 <= torch._dynamo.config.recompile_limit


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_step_in_fp8_has_nearly_the_gradients_of_one_without(load, rows, dropout):
    model, batch = fill(load(lora_dropout=dropout)).train(), pack(list(rows)[:4])

    def step(in_fp8=False):
        torch.manual_seed(1)
        with fused(model, True, in_fp8):
            loss, found = gradients(model, batch)
        return loss, torch.cat([value.flatten() for value in found.values()])

    plain, expected = step()
    loss, found = step(in_fp8=True)
    assert loss == pytest.approx(plain, rel=0.01) and loss != plain
    assert 0.001 < off(found, expected) < 0.1
    assert step()[0] == plain and len(trainable(model)) == 28


def test_validation_losses_and_answers_keep_16_bits(load, rows, tokenizer):
    model, batch = fill(load()), pad(list(rows)[:3], tokenizer.pad_token_id)

    def loss(**options):
        with fused(model, True, **options), torch.inference_mode():
            return summed_loss(model, dict(batch))[0].item()

    assert loss(in_fp8=True) == loss()


def test_a_width_that_the_product_refuses_keeps_16_bits(rows):
    """24 columns of the model's width are no multiple of 16, 48 of the MLP are: no projection is left for fp8."""
    model, batch = fill(with_adapter(tiny(MistralConfig, hidden_size=24))), pack(random_rows([9, 14]))
    with fused(model):
        expected = gradients(model, batch)[0]
    with fused(model, True, True):
        assert gradients(model, batch)[0] == expected


def test_a_plan_with_fp8_needs_a_gpu_that_has_it(load, rows, quantization, tmp_path):
    from peft import LoraConfig
    from transformers import TrainingArguments

    config, arguments = load().config, TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(engine.PlanError, match="engine.fp8 is 'on': expected a GPU of compute capability 9.0"):
        lora, device = LoraConfig(target_modules="all-linear"), torch.device("cpu")
        engine.plan(config, lora, quantization, arguments, rows, device, fp8="on")
