"""Dropout inside the fused layers: one mask a projection, PEFT's own results for the same masks, drawn once a pass."""

import copy

import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import nn

from src.engine import dropout, fuse, fused
from src.engine.batches import pack, pad
from src.engine.lora import SharedInput
from tests.engine.conftest import fill, random_rows, tiny, with_adapter
from tests.engine.test_fuse import assert_close, checkpointed, gradients

P = 0.3
CPU = torch.device("cpu")


class Masked(nn.Module):
    """PEFT's dropout, with the mask of a seed in place of a random one."""

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        return (flat * dropout.kept(self.seed, P, *flat.shape) / (1 - P)).view(x.shape)


@pytest.fixture
def models(monkeypatch):
    """models(architecture, checkpointing) -> (PEFT's layers with the masks of 14 seeds, the same model to be fused)."""

    def build(name="Mistral", checkpointing=False):
        fast = fill(with_adapter(tiny(getattr(transformers, f"{name}Config")), lora_dropout=P), 0.1)
        fast, plain = checkpointed(fast, checkpointing), checkpointed(copy.deepcopy(fast), checkpointing)
        projections = [module for module in plain.modules() if isinstance(module, LoraLayer)]
        seeds = torch.arange(100, 100 + len(projections), dtype=torch.int32)
        for module, seed in zip(projections, seeds, strict=True):
            module.lora_dropout["default"] = Masked(seed)
        monkeypatch.setattr(fuse, "draw_seeds", lambda count, device: seeds if count == len(seeds) else None)
        return plain, fast

    return build


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", ["Mistral", "Olmo2"])
@pytest.mark.parametrize("batch", [pack, lambda rows: pad(rows, 0)], ids=["packed", "padded"])
def test_gradients_are_those_of_pefts_layers_with_the_same_masks(models, batch, name, checkpointing):
    """Checkpointed, a layer runs once more for its backward pass: another mask there would change the gradients."""
    plain, fast = models(name, checkpointing)
    rows = random_rows([9, 14, 5])
    expected, expected_gradients = gradients(plain, batch(rows))
    with fused(fast) as count:
        assert count >= 2 * 4
        loss, found = gradients(fast, batch(rows))
    assert loss == pytest.approx(expected, rel=1e-5) and len(found) == 28
    assert_close(found, expected_gradients, rtol=1e-3, atol=1e-5)
    undropped = gradients(fast.eval(), batch(rows))[1]
    moved = [(found[name] - value).norm() / value.norm() for name, value in undropped.items()]
    assert min(moved) > 0.01  # every factor's gradient has felt a mask


def test_evaluation_drops_nothing_and_draws_nothing(models):
    plain, fast = models()
    ids = torch.tensor([[1, 5, 9, 30, 31, 32]])
    expected = fast.eval()(input_ids=ids).logits
    with fused(fast):
        state = torch.get_rng_state()
        torch.testing.assert_close(fast(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(state, torch.get_rng_state())
    assert not torch.allclose(plain(input_ids=ids).logits, expected, rtol=1e-3)


def test_every_pass_draws_new_masks_and_a_seed_repeats_them():
    model, batch = fill(with_adapter(tiny(transformers.MistralConfig), lora_dropout=P)).train(), pack(random_rows([9]))
    with fused(model):
        losses = []
        for seed in (1, None, 1):
            if seed:
                torch.manual_seed(seed)
            losses.append(gradients(model, batch)[0])
    assert losses[0] == losses[2] != losses[1]


def test_the_share_of_zeros_is_p():
    """In all, by token and by column; and masks of neighbouring tokens, columns and seeds have nothing in common."""
    tokens, width, seeds = 512, 1024, torch.tensor([1, 2, 123456789, 2**31 - 2], dtype=torch.int32)
    for p in (0.05, 0.1, 0.5, 0.75):
        zeros = 1 - torch.stack([dropout.kept(seed, p, tokens, width).float() for seed in seeds])
        spread = (p * (1 - p)) ** 0.5
        centred = (zeros - p) / spread
        for mean, n in ((centred.mean((1, 2)), tokens * width), (centred.mean(2), width), (centred.mean(1), tokens)):
            assert (mean * n**0.5).abs().max() < 6  # standard errors; thousands of draws
            assert mean.numel() < 100 or (mean * n**0.5).std() == pytest.approx(1, abs=0.1)
        pairs = [
            (centred[:, 1:], centred[:, :-1]),
            (centred[:, :, 1:], centred[:, :, :-1]),
            (centred[1:], centred[:-1]),
        ]
        pairs.append((centred[:, :, 64:], centred[:, :, :-64]))
        for a, b in pairs:
            assert abs((a * b).mean()) * a.numel() ** 0.5 < 5


def test_seeds_differ():
    assert len(set(dropout.draw_seeds(224, CPU).tolist())) == 224


def test_a_projection_has_a_mask_of_its_own(models, monkeypatch):
    """q, k and v read the same x; one mask for the three would train something else than PEFT does."""
    _, fast = models()
    seen, apply = [], SharedInput.apply
    monkeypatch.setattr(SharedInput, "apply", lambda x, group, *f: seen.append(group.seeds) or apply(x, group, *f))
    with fused(fast):
        gradients(fast, pack(random_rows([9])))
    assert [seeds.tolist() for seeds in seen] == [[100, 101, 102], [103], [107, 108, 109], [110]]
