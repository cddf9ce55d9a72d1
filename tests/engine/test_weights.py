"""4-bit weights to 16-bit ones and back: the same function each time, and the memory that is free."""

import types

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config

from src import engine
from src.engine import weights
from tests.engine.conftest import SIZES, fill, tiny, with_adapter

IDS = torch.tensor([[1, 5, 9, 30, 31, 32]])


def four_bit(model) -> list:
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


@pytest.fixture
def with_bias(tmp_path):
    """A tiny Qwen2 in 4 bits, whose q, k and v have a bias."""
    names = Qwen2Config().to_dict()
    model = tiny(Qwen2Config, **{name: value for name, value in SIZES.items() if name in names})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)


@pytest.mark.parametrize("double", [True, False])
def test_dequantised_weights_compute_the_same_function(load, quantization, double):
    quantization.bnb_4bit_use_double_quant = double
    model = fill(load()).eval()
    before = model(input_ids=IDS).logits
    assert len(four_bit(model)) == 14
    assert engine.dequantize(model) == {} and not four_bit(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-5, atol=1e-5)
    again = {name: parameter.clone() for name, parameter in model.named_parameters()}
    engine.dequantize(model)  # nothing is left to do
    assert all(torch.equal(parameter, again[name]) for name, parameter in model.named_parameters())


def test_a_model_that_is_not_quantised_stays_as_it_is(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = dict(model.named_parameters())
    assert engine.dequantize(model, keep=True) == {}
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_4_bit_weights_come_back_bit_by_bit(with_bias):
    model = fill(with_adapter(with_bias)).eval()
    before, names = model(input_ids=IDS).logits, [name for name, _ in model.named_parameters()]
    biases = {name: parameter for name, parameter in model.named_parameters() if name.endswith("bias")}
    assert len(biases) == 6
    kept = engine.dequantize(model, keep=True)
    assert len(kept) == 14 and not four_bit(model) and all(module.bias is None for module in kept.values())
    between = model(input_ids=IDS).logits
    torch.testing.assert_close(between, before, rtol=1e-5, atol=1e-5)
    weights.requantize(model, kept)
    assert len(four_bit(model)) == 14 and [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(input_ids=IDS).logits, before)
    found = dict(model.named_parameters())
    assert all(found[name] is bias for name, bias in biases.items())
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()  # and gradients flow through them
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def stand_in(numbers: list[int]):
    """A model on a GPU with 4-bit weights of that many numbers each."""
    states = [types.SimpleNamespace(quant_state=types.SimpleNamespace(shape=torch.Size([n]))) for n in numbers]
    return types.SimpleNamespace(device=torch.device("cuda"), parameters=lambda: [*states, torch.zeros(1)])


def test_dequantising_fits_if_the_16_bit_weights_take_at_most_60_percent_of_what_is_free(monkeypatch, tiny_model):
    for free, fits in ((2000, True), (1999, False)):  # 600 numbers of two bytes are 1,200 bytes
        monkeypatch.setattr(weights, "free_bytes", lambda device, free=free: free)
        assert engine.dequantized_fits(stand_in([200, 400])) is fits
    assert engine.dequantized_fits(AutoModelForCausalLM.from_pretrained(tiny_model))  # on a CPU


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 50 + 20), (0.5, 50 - 30 + 20), (0.9, 50 + 20)])
def test_free_memory_counts_the_own_reserve_and_keeps_to_the_own_limit(monkeypatch, fraction, expected):
    """Of 100 bytes 50 are free; this process reserves 30 and uses 10 of them, so 20 more are its own."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    assert weights.free_bytes(torch.device("cuda")) == expected
