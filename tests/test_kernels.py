"""Packing and fused layers compute what the plain ones compute: outputs, losses and gradients."""

import pytest
import torch

from src import experiments, kernels, modeling, packing, prompts, training


def test_bins_are_balanced_and_hold_every_row_once():
    # 9 | 7 | 5+1 -> longest first to the emptiest: 9, 7, 5, then 4 to the bin of 5, 3 to that of 7, 1 to that of 9 or 9+1
    found = packing.bins([5, 9, 1, 7, 3, 4], 3)
    assert sorted(i for b in found for i in b) == [0, 1, 2, 3, 4, 5]
    assert sorted(sum([5, 9, 1, 7, 3, 4][i] for i in b) for b in found) == [9, 10, 10]


def test_passes_needed_keeps_the_budget_unless_one_row_is_longer():
    assert packing.passes_needed([[0, 1, 2, 3]], [10, 10, 10, 10], 40) == 1
    assert packing.passes_needed([[0, 1, 2, 3]], [10, 10, 10, 10], 20) == 2
    assert packing.passes_needed([[0, 1]], [50, 10], 20) == 2  # the row of 50 passes alone


@pytest.fixture
def setup(tiny_model, records):
    e = experiments.load_experiment("demo", **{"base_model": str(tiny_model), "device": "cpu"})
    tokenizer = modeling.load_tokenizer(e)
    kernels.register()
    model = modeling.add_adapter(modeling.load_base(e, tokenizer, attention=kernels.NAME), e)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # B is zero in a fresh adapter, and would hide half of what can go wrong
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return e, tokenizer, model, prompts.build_all(records, tokenizer, e.prompt)


def gradients(model, batches):
    model.zero_grad()
    losses = []
    for batch in batches:
        loss, n = training.summed_loss(model, batch)
        loss.backward()
        losses.append((loss.item(), n))
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_rows_equal_rows_alone(setup):
    _, tokenizer, model, rows = setup
    alone, expected = gradients(model, [training.collate([row], tokenizer.pad_token_id) for row in rows])
    packed, found = gradients(model, [packing.flatten(rows)])
    assert packed[0][1] == sum(n for _, n in alone)
    assert packed[0][0] == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_packed_row_does_not_see_its_neighbour(setup):
    _, _, model, rows = setup

    def loss_of_last(first):
        batch = packing.flatten([first, rows[2]])
        batch["labels"][0, : len(first.input_ids)] = prompts.IGNORE
        return training.summed_loss(model, batch)[0].item()

    assert loss_of_last(rows[0]) == pytest.approx(loss_of_last(rows[1]), rel=1e-6)


@pytest.mark.parametrize("dequantized", [False, True])
def test_fused_lora_equals_peft(setup, dequantized):
    _, tokenizer, model, rows = setup
    if dequantized:
        modeling.dequantize(model)
    batch = training.collate(rows, tokenizer.pad_token_id)
    plain, expected = gradients(model, [batch])
    with kernels.fused_lora(model) as count:
        assert count == 2 * 5  # q, k, v, o and the MLP of two layers
        fused, found = gradients(model, [batch])
    assert fused[0][0] == pytest.approx(plain[0][0], rel=1e-5) and len(found) == 28
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-5)
    again, _ = gradients(model, [batch])
    assert again == plain  # the context leaves PEFT's forward behind


def test_dropout_keeps_pefts_own_forward(tiny_model):
    e = experiments.load_experiment("demo", **{"base_model": str(tiny_model), "lora.dropout": 0.1})
    model = modeling.add_adapter(modeling.load_base(e, modeling.load_tokenizer(e)), e)
    with kernels.fused_lora(model) as count:
        assert count == 0
