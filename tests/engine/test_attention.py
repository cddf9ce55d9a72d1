"""Attention over packed rows: the mask, the arguments of the flash kernel, and models that mix packed rows."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from src.engine import attention, has_varlen, rows_stay_apart
from src.engine.attention import block_mask, flat_rows, varlen_attention
from tests.engine.conftest import random_rows, tiny


def shown(*arguments):
    return ["".join(map(str, line)) for line in block_mask(*arguments)[0, 0].int().tolist()]


def test_the_block_mask_is_causal_within_rows_and_keeps_to_the_window():
    starts = torch.tensor([0, 2, 5])  # rows of two and three tokens
    assert shown(starts, starts, None, 5, 5) == ["10000", "11000", "00100", "00110", "00111"]
    # two tokens back, itself included
    assert shown(starts, starts, None, 5, 5, 2) == ["10000", "11000", "00100", "00110", "00011"]


def test_the_block_mask_of_a_cache_shows_each_row_the_used_slots_of_its_own():
    # four, three and two slots, the middle row finished; one query each for the first and the last
    starts, starts_k, used = torch.tensor([0, 1, 2]), torch.tensor([0, 7, 9]), torch.tensor([3, 2])
    assert shown(starts, starts_k, used, 2, 9) == ["111000000", "000000011"]
    assert shown(starts, starts_k, used, 2, 9, 2) == ["011000000", "000000011"]
    # reading prompts: as many queries as slots used
    starts, starts_k, used = torch.tensor([0, 2, 3]), torch.tensor([0, 4, 6]), torch.tensor([2, 1])
    assert shown(starts, starts_k, used, 3, 6) == ["100000", "110000", "000010"]


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((9, 0), torch.bfloat16, True),
        ((8, 0), torch.float16, True),
        ((9, 0), torch.float32, False),
        ((7, 5), torch.float16, False),
    ],
)
def test_flash_attention_takes_16_bits_on_recent_gpus(monkeypatch, capability, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_varlen(torch.device("cuda"), dtype) is expected
    assert not has_varlen(torch.device("cpu"), dtype)


def flash_by_the_book(q, k, v, starts, starts_k, longest, longest_k, dropout, causal, debug, *, scale,
                      window_size_left, window_size_right, seqused_k):  # fmt: skip
    """What FlashAttention-2 documents for these arguments, row by row.

    Query i of a row sees key j if i + n_k - n - left <= j <= i + n_k - n + right, where -1 means no limit; `causal` is
    a right limit of 0.
    """
    assert dropout == 0.0 and not debug and q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    right = 0 if causal else window_size_right
    out = torch.full_like(q, torch.nan)
    for row in range(len(starts) - 1):
        a, b, c = int(starts[row]), int(starts[row + 1]), int(starts_k[row])
        n, n_k = b - a, int(starts_k[row + 1]) - c if seqused_k is None else int(seqused_k[row])
        assert n <= longest and n_k <= longest_k
        i, j = torch.arange(n)[:, None] + n_k - n, torch.arange(n_k)[None]
        mask = ((j >= i - window_size_left) | (window_size_left < 0)) & ((j <= i + right) | (right < 0))
        parts = (x.transpose(0, 1)[None] for x in (q[a:b], k[c : c + n_k], v[c : c + n_k]))
        own = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=True)
        out[a:b] = own[0].transpose(0, 1)
    return out, None, None, None, None


@pytest.mark.parametrize("window", [None, 3, 5, 400], ids=lambda w: f"window {w}")
@pytest.mark.parametrize("case", ["training", "reading prompts", "one new token"])
def test_the_flash_kernel_is_asked_for_what_the_block_mask_shows(monkeypatch, window, case):
    """Four query heads in two groups. Rows of 7, 4 and 2 tokens, in a cache with 9, 6 and 300 slots a row."""
    used = torch.tensor([7, 4, 2], dtype=torch.int32)
    queries = torch.ones_like(used) if case == "one new token" else used
    starts = F.pad(queries.cumsum(0, dtype=torch.int32), (1, 0))
    slots = used if case == "training" else torch.tensor([9, 6, 300], dtype=torch.int32)
    starts_k = F.pad(slots.cumsum(0, dtype=torch.int32), (1, 0))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((1, 4, int(starts[-1]), 8), generator=generator)
    k, v = (torch.randn((1, 2, int(starts_k[-1]), 8), generator=generator) for _ in range(2))
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal, module.training = 2, True, False
    said = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts_k, "max_length_q": int(queries.max()), "max_length_k": 7}
    if case != "training":
        said["seqused_k"] = used

    def attend():
        return varlen_attention(module, q, k, v, None, scaling=0.3, sliding_window=window, **said)[0]

    by_mask = attend()
    monkeypatch.setattr(attention, "has_varlen", lambda *_: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_by_the_book)
    torch.testing.assert_close(attend(), by_mask)


@pytest.mark.parametrize("masked", [True, False])
def test_rows_that_are_not_packed_get_transformers_own_attention(masked):
    """Also beyond the sliding window, with and without an attention mask."""
    sizes = {"sliding_window": 5, "vocab_size": 64}
    model = tiny(transformers.MistralConfig, **sizes).eval()
    ids = torch.tensor([row["input_ids"] for row in random_rows([12, 12])])
    said = {"attention_mask": torch.ones_like(ids)} if masked else {}
    with torch.no_grad():
        ours = model(input_ids=ids, **said).logits
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(ours, model(input_ids=ids, **said).logits, rtol=1e-5, atol=1e-6)
        model.config.sliding_window = None
        beyond = model(input_ids=ids, **said).logits
    assert (ours - beyond)[:, 6:].abs().max() > 1e-4  # the window matters to the later tokens


def test_flat_rows_number_positions_and_mark_where_rows_start():
    flat = flat_rows([4, 5, 6, 7, 8], [2, 3])
    assert flat["input_ids"].tolist() == [[4, 5, 6, 7, 8]] and flat["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert flat["cu_seq_lens_q"].tolist() == [0, 2, 5] and flat["max_length_q"] == flat["max_length_k"] == 3


@pytest.mark.parametrize("name", ["Mistral", "GPTNeoX", "OPT"])
def test_rows_stay_apart_in_layers_of_attention(name):
    model = tiny(getattr(transformers, f"{name}Config")).train()
    assert rows_stay_apart(model) and model.training


def test_rows_that_are_numbered_as_one_are_not_packed(monkeypatch):
    """A row keeps to itself there, and still gets other logits than alone, since its positions do not start again."""
    model = tiny(transformers.OPTConfig)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **said: forward(**said))
    assert not rows_stay_apart(model)


HYBRID = {
    "Mamba": {"state_size": 4},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Jamba": {"mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 1,
              "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "RecurrentGemma": {"lru_width": 32, "block_types": ["recurrent", "attention"]},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRID)
def test_layers_that_carry_a_state_along_the_sequence_mix_packed_rows(name):
    """With the weights that each model starts from (E4): the mixing is small there, and must be found."""
    assert not rows_stay_apart(tiny(getattr(transformers, f"{name}Config"), **HYBRID[name]))
