"""Packing and fused layers compute what the plain ones compute: outputs, losses and gradients."""

import pytest
import torch

from src import batching, experiments, kernels, modeling, prompts, training


def test_bins_are_balanced_and_hold_every_row_once():
    # 9 | 7 | 5+1 -> longest first to the emptiest: 9, 7, 5, then 4 to the bin of 5, 3 to that of 7, 1 to that of 9 or 9+1
    found = batching.bins([5, 9, 1, 7, 3, 4], 3)
    assert sorted(i for b in found for i in b) == [0, 1, 2, 3, 4, 5]
    assert sorted(sum([5, 9, 1, 7, 3, 4][i] for i in b) for b in found) == [9, 10, 10]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("batch_size", "passes"), [(4, 1), (4, 2), (4, 4), (6, 3)])
def test_a_step_holds_exactly_its_rows(packed, batch_size, passes):
    lengths = [(7 * i) % 23 + 1 for i in range(22)]  # 22 rows: the last step of an epoch is short
    sampler = batching.StepSampler(lengths, batch_size, passes, seed=1, packed=packed)
    batches = list(sampler)
    assert len(batches) == len(sampler) and sorted(i for b in batches for i in b) == list(range(22))
    whole = 22 // batch_size
    for step in range(whole):
        assert sum(len(b) for b in batches[step * passes : (step + 1) * passes]) == batch_size
    sampler.set_epoch(1)
    assert list(sampler) != batches
    sampler.set_epoch(0)
    assert list(sampler) == batches


def test_padded_batches_hold_rows_of_like_length():
    lengths = [(37 * i) % 101 + 1 for i in range(256)]
    padded = [[lengths[i] for i in b] for b in batching.StepSampler(lengths, 8, 1, 0, packed=False)]
    waste = sum(max(b) * len(b) for b in padded) / sum(lengths) - 1
    assert waste < 0.1  # unsorted, a batch of 8 would be padded to about twice its tokens


@pytest.fixture
def setup(tiny_model, records):
    e = experiments.load_experiment("demo", **{"base_model": str(tiny_model), "device": "cpu"})
    tokenizer = modeling.load_tokenizer(e)
    model = modeling.add_adapter(modeling.load_base(e, tokenizer), e)
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
    alone, expected = gradients(model, [batching.pad([row], tokenizer.pad_token_id) for row in rows])
    packed, found = gradients(model, [batching.pack(rows)])
    assert packed[0][1] == sum(n for _, n in alone)
    assert packed[0][0] == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_packed_row_does_not_see_its_neighbour(setup):
    _, _, model, rows = setup

    def loss_of_last(first):
        both, own = (training.summed_loss(model, batching.pack(part))[0].item() for part in ([first, rows[2]], [first]))
        return both - own

    assert loss_of_last(rows[0]) == pytest.approx(loss_of_last(rows[1]), rel=1e-4)


def shown(*arguments):
    return ["".join(map(str, line)) for line in kernels.block_mask(*arguments)[0, 0].int().tolist()]


def test_the_block_mask_is_causal_within_rows_and_keeps_to_the_window():
    starts = torch.tensor([0, 2, 5])  # rows of two and three tokens
    rows = ["10000", "11000", "00100", "00110", "00111"]
    assert shown(starts, starts, None, 5, 5) == rows
    window = ["10000", "11000", "00100", "00110", "00011"]  # two tokens back, itself included
    assert shown(starts, starts, None, 5, 5, 2) == window


def test_the_block_mask_of_a_cache_shows_each_row_the_used_slots_of_its_stretch():
    # stretches of four, three and two slots, the middle row finished; one query each for the first and the last
    starts, starts_k, used = torch.tensor([0, 1, 2]), torch.tensor([0, 7, 9]), torch.tensor([3, 2])
    assert shown(starts, starts_k, used, 2, 9) == ["111000000", "000000011"]
    assert shown(starts, starts_k, used, 2, 9, 2) == ["011000000", "000000011"]
    # reading prompts: as many queries as slots used
    assert shown(torch.tensor([0, 2, 3]), torch.tensor([0, 4, 6]), torch.tensor([2, 1]), 3, 6) == [
        "100000",
        "110000",
        "000010",
    ]


@pytest.mark.parametrize("dequantized", [False, True])
def test_fused_layers_equal_the_plain_ones(setup, dequantized):
    _, tokenizer, model, rows = setup
    if dequantized:
        modeling.dequantize(model)
    batch = batching.pad(rows, tokenizer.pad_token_id)
    plain, expected = gradients(model, [batch])
    with kernels.fused(model) as count:
        assert count == 2 * 5 + 5  # q, k, v, o and the MLP of two layers, five norms
        fused, found = gradients(model, [batch])
    assert fused[0][0] == pytest.approx(plain[0][0], rel=1e-5) and len(found) == 28
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-5)
    again, _ = gradients(model, [batch])
    assert again == plain  # the context leaves PEFT's forward behind


def test_dropout_keeps_pefts_own_forward(tiny_model):
    e = experiments.load_experiment("demo", **{"base_model": str(tiny_model), "lora.dropout": 0.1})
    model = modeling.add_adapter(modeling.load_base(e, modeling.load_tokenizer(e)), e)
    with kernels.fused(model) as count:
        assert count == 5  # the norms


def test_other_architectures_keep_what_is_not_llamas():
    """Cohere turns its heads in another way and normalises otherwise; Phi has no o_proj, and a bias."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, CohereConfig, PhiConfig

    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    for config, some in ((CohereConfig(**sizes), True), (PhiConfig(**sizes), False)):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config)
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False))
        ids = torch.arange(20)[None]
        plain = model(input_ids=ids).logits
        with kernels.fused(model) as count:
            assert (count > 0) is some
            torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [((9, 0), torch.bfloat16, True), ((8, 0), torch.float16, True), ((9, 0), torch.float32, False), ((7, 5), torch.float16, False)],
)  # fmt: skip
def test_flash_attention_takes_16_bits_on_recent_gpus(monkeypatch, capability, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernels.has_varlen(torch.device("cuda"), dtype) is expected
    assert not kernels.has_varlen(torch.device("cpu"), dtype)
