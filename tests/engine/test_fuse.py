"""Fused layers compute what PEFT's own compute: outputs, losses, gradients, and adapters after several steps."""

import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer

from src import engine
from src.engine import fused
from src.engine.batches import pack, pad
from src.engine.elementwise import rotary
from src.engine.lora import Group, checkpoint_contexts
from src.engine.trainer import summed_loss
from tests.engine.conftest import LINEAR, fill, random_rows, tiny, trainable, weights_of, with_adapter

IDS = torch.tensor([[1, 5, 9, 30, 31, 32, 8, 7]])


def checkpointed(model, on: bool = True):
    if on:
        arguments = {"use_reentrant": False, "context_fn": checkpoint_contexts}
        model.get_base_model().activation_checkpointing_enable(arguments)
    return model.train()


def gradients(model, batch):
    model.zero_grad()
    loss, _ = summed_loss(model, batch)
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def assert_close(found: dict, expected: dict, **tolerance):
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("dequantized", [False, True])
def test_fused_layers_equal_the_plain_ones(load, tokenizer, rows, dequantized):
    model, batch = fill(load()), pad(list(rows)[:3], tokenizer.pad_token_id)
    if dequantized:
        engine.dequantize(model)
    plain, expected = gradients(model, batch)
    with fused(model) as count:
        assert count == 2 * 5 + 5  # q, k, v, o and the MLP of two layers, five norms
        loss, found = gradients(model, batch)
    assert loss == pytest.approx(plain, rel=1e-5) and len(found) == 28
    assert_close(found, expected, rtol=2e-3, atol=2e-5)
    again, _ = gradients(model, batch)
    assert again == plain  # the context leaves PEFT's forward behind


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", ["Mistral", "Qwen3", "Olmo2"])
def test_four_optimizer_steps_end_with_the_same_adapter(name, checkpointing):
    """The factors move, so the copies that the fused layers compute with must be renewed before every forward pass.

    In OLMo-2 a norm follows the MLP and keeps its output, so no product may be left out of a recomputed layer (E1).
    """
    plain = checkpointed(fill(with_adapter(tiny(getattr(transformers, f"{name}Config"))), 0.1), checkpointing)
    fast = copy.deepcopy(plain)
    rows = random_rows([9, 14, 5, 11, 8, 12, 7, 10])
    batched = [pack(rows[:3]), pad(rows[3:5], 0), pack(rows[5:]), pad(rows[:2], 0)]

    def train(model):
        optimizer, losses = torch.optim.SGD(trainable(model).values(), lr=0.5), []
        for batch in batched:
            optimizer.zero_grad()
            loss, count = summed_loss(model, batch)
            (loss / count).backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    before = weights_of(plain)
    losses = train(plain)
    with fused(fast) as count:
        assert count >= 2 * 4
        assert train(fast) == pytest.approx(losses, rel=1e-4)
    assert_close(weights_of(fast), weights_of(plain), rtol=1e-3, atol=1e-5)
    moved = max((value - before[name]).abs().max().item() for name, value in weights_of(plain).items())
    assert moved > 1e-2  # a thousand times what the two may differ by


@pytest.mark.parametrize("name", ["Olmo3", "Exaone4"])
def test_a_checkpointed_step_has_the_same_gradients_where_norms_follow_the_mlp(name):
    model = checkpointed(fill(with_adapter(tiny(getattr(transformers, f"{name}Config"))), 0.1))
    batch = pack(random_rows([9, 14, 5]))
    plain, expected = gradients(model, batch)
    with fused(model):
        loss, found = gradients(model, batch)
    assert loss == pytest.approx(plain, rel=1e-5)
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "products"), [("Mistral", 4 + 3), ("Qwen3", 4 + 3), ("Olmo2", 4 + 4)])
def test_a_recomputed_layer_leaves_out_the_last_product_only_where_nothing_keeps_it(monkeypatch, name, products):
    """q, k and v together, o, gate and up together, down: four in the forward pass, three or four recomputed."""
    model = checkpointed(fill(with_adapter(tiny(getattr(transformers, f"{name}Config")))))
    calls, project = [], Group.project
    monkeypatch.setattr(Group, "project", lambda self, *args: calls.append(self) or project(self, *args))
    with fused(model):
        gradients(model, pack(random_rows([9, 14])))
    assert len(calls) == 2 * products  # layers


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"lora_bias": True}, 5),
        ({"use_dora": True}, 5),
        # another rank or alpha is another scale: q, k and v of a layer stay PEFT's, o and the MLP are fused
        ({"rank_pattern": {"k_proj": 2}}, 2 * 2 + 5),
        ({"alpha_pattern": {"v_proj": 3}}, 2 * 2 + 5),
        ({"rank_pattern": {"up_proj": 2}}, 2 * 4 + 5),
        # another scale of the down projection alone is that of its own group
        ({"rank_pattern": {"down_proj": 2}}, 2 * 5 + 5),
        # other ranks of one scale share a group
        ({"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 4}}, 2 * 5 + 5),
        ({"target_modules": ["q_proj", "v_proj"]}, 5),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}, 2 * 3 + 5),
        ({"use_rslora": True}, 2 * 5 + 5),
        # with dropout the kernels of a group want one rank
        ({"lora_dropout": 0.1, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 4}}, 2 * 2 + 5),
        ({"lora_dropout": 0.1}, 2 * 5 + 5),
    ],
    ids=str,
)
def test_an_adapter_is_computed_rightly_or_left_to_peft(load, tokenizer, rows, fields, count):
    model, batch = fill(load(**fields)).eval(), pad(list(rows)[:3], tokenizer.pad_token_id)  # test_dropout trains it
    plain, expected = gradients(model, batch)
    with fused(model) as replaced:
        assert replaced == count
        loss, found = gradients(model, batch)
    assert loss == pytest.approx(plain, rel=1e-5)
    assert_close(found, expected, rtol=2e-3, atol=2e-5)


def test_a_merged_adapter_is_not_added_twice(load):
    model = fill(load()).eval()
    model.merge_adapter()
    merged = model(input_ids=IDS).logits
    with fused(model) as count:
        assert count == 5
        torch.testing.assert_close(model(input_ids=IDS).logits, merged, rtol=1e-5, atol=1e-5)


def test_eight_bit_weights_are_left_to_peft(load):
    """They are integers beside a scale of their own, which the fused product would leave out."""
    model = load()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = torch.zeros(module.out_features, module.in_features, dtype=torch.int8)
            module.base_layer = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            module.base_layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    with fused(model) as count:
        assert count == 5


def test_a_disabled_adapter_is_the_base_model_exactly(load, tiny_model):
    model = fill(load()).eval()
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=IDS).logits
    with torch.no_grad(), fused(model):
        tuned = model(input_ids=IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, base)
        torch.testing.assert_close(model(input_ids=IDS).logits, tuned, rtol=0, atol=0)
    with torch.no_grad(), model.disable_adapter(), fused(model):
        assert torch.equal(model(input_ids=IDS).logits, base)
    assert (tuned - base).abs().max() > 1e-3


def test_projections_of_different_inputs_are_computed_apart(load):
    """As in cross-attention, where k and v read what another model wrote; or where k is asked before q."""
    model = fill(load()).eval()
    attention = model.get_base_model().model.layers[0].self_attn
    x, other = (torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(n)) for n in (1, 2))

    def projected():
        yield attention.q_proj(x), attention.k_proj(other), attention.v_proj(other)
        yield attention.k_proj(other), attention.v_proj(x), attention.q_proj(x)
        yield attention.q_proj(x), attention.q_proj(other), attention.k_proj(x), attention.v_proj(other)
        yield attention.q_proj(x), attention.v_proj(x), attention.k_proj(x), attention.k_proj(x)

    with torch.no_grad():
        expected = list(projected())
        with fused(model) as count:
            assert count == 15
            for found, plain in zip(projected(), expected, strict=True):
                for a, b in zip(found, plain, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_the_projections_share_is_let_go_after_the_last_one(load):
    model, x = load(), torch.randn(1, 3, 64)
    attention, gone = model.get_base_model().model.layers[0].self_attn, weakref.ref(x)
    with torch.no_grad(), fused(model):
        attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        del x
        assert gone() is None


def test_fusing_a_fused_model_again_changes_nothing(load, tokenizer, rows):
    """Training answers samples inside of its own context, and generating enters another one."""
    model, batch = fill(load()), pad(list(rows)[:3], tokenizer.pad_token_id)
    mistral = transformers.models.mistral.modeling_mistral
    plain, expected = gradients(model, batch)
    with fused(model) as outer:
        with fused(model) as inner, torch.inference_mode():
            assert (outer, inner) == (15, 0)
            model(input_ids=IDS)
        for parameter in trainable(model).values():
            parameter.data.mul_(2)  # the outer context's copies must still follow
        for parameter in trainable(model).values():
            parameter.data.div_(2)
        replaced = [module for module in model.modules() if "forward" in vars(module)]
        assert len(replaced) == 15 and mistral.apply_rotary_pos_emb is rotary
        loss, found = gradients(model, batch)
    assert loss == pytest.approx(plain, rel=1e-5)
    assert_close(found, expected, rtol=2e-3, atol=2e-5)
    assert not any("forward" in vars(module) for module in model.modules())
    assert mistral.apply_rotary_pos_emb.__module__ == mistral.__name__
    with fused(model) as count:  # and it can be fused once more
        assert count == 15


def test_an_error_inside_puts_everything_back(load):
    model = load()
    with pytest.raises(KeyboardInterrupt), fused(model):
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in model.modules())
    with fused(model, enabled=False) as count:
        assert count == 0 and not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["Cohere", "Phi", "Gemma"])
def test_other_architectures_keep_what_is_not_llamas(name):
    """Cohere turns its heads and normalises in other ways; Phi has no o_proj, and a bias; Gemma has a gelu."""
    base = tiny(getattr(transformers, f"{name}Config"))
    targets = [n for n in LINEAR if any(part.endswith(n) for part, _ in base.named_modules())]
    model = fill(with_adapter(base, target_modules=targets)).train()
    batch = pack(random_rows([9, 14, 5]))
    plain, expected = gradients(model, batch)
    with fused(model) as count:
        assert count == {"Cohere": 2 * 5, "Phi": 0, "Gemma": 2 * 4}[name]
        loss, found = gradients(model, batch)
    assert loss == pytest.approx(plain, rel=1e-4)
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_context_of_a_recomputed_layer_ends_with_it():
    first, second = checkpoint_contexts()
    assert isinstance(first, nullcontext)
    with pytest.raises(ValueError), second:
        raise ValueError
    model = fill(with_adapter(tiny(transformers.MistralConfig)))
    with fused(model):
        assert torch.isfinite(model(input_ids=IDS).logits).all()
