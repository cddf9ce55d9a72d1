"""Attention over packed rows: several rows laid end to end in one sequence, none of which sees another.

Where torch has variable-length flash attention (compute capability 8.0 and up) it does the work. Elsewhere packed rows go through
sdpa with a block mask, which costs more and computes the same.
"""

import functools
import inspect

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device

ATTENTION = "varlen"  # the name under which transformers finds `varlen_attention`; see `register`


def has_varlen(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether torch's variable-length flash attention runs on this device: 16 bits, compute capability 8.0 and up."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """A transformers attention function. query (batch, heads, T, d); key and value (batch, kv heads, S, d), grouped queries allowed.

    Packed rows (batch 1, with the `cu_seq_lens_q` and `_k` of `flat_rows`): variable-length flash attention, or sdpa with a
    block mask where there is none. `seqused_k` (rows,): how many keys of each row's stretch of a cache count
    (`decode.FlatCache`). Anything else: transformers' sdpa.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    starts, used = kwargs.get("cu_seq_lens_q"), kwargs.get("seqused_k")
    if starts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    starts_k = kwargs["cu_seq_lens_k"]
    if not (query.is_cuda and has_varlen(query.device, query.dtype)):
        mask = block_mask(starts, starts_k, used, query.shape[2], key.shape[2], sliding_window)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))
    longest, longest_k = kwargs["max_length_q"], kwargs["max_length_k"]
    window = (sliding_window - 1 if sliding_window and sliding_window < longest_k else -1, 0)
    if used is None:
        out = _varlen_attn()(q, k, v, starts, starts_k, longest, longest_k, scale=scaling, window_size=window)
    else:  # the operator below varlen_attn, which has no seqused_k in torch 2.11
        if longest == 1 and window[0] == -1:
            window = (-1, -1)  # one query sees every key, causal or not: told so, the kernel reads a group's keys once
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts_k, longest, longest_k, 0.0, window == (-1, 0), False,
            scale=scaling, window_size_left=window[0], window_size_right=window[1], seqused_k=used,
        )[0]  # fmt: skip
    return out.unsqueeze(0), None


@functools.cache
def _varlen_attn():
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped heads as they are, later releases want to be told
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, enable_gqa=True) if grouped else varlen_attn


def block_mask(starts, starts_k, used, queries: int, keys: int, window: int | None = None) -> torch.Tensor:
    """Return a (1, 1, queries, keys) boolean mask: causal within a row, at most `window` tokens back, nothing across rows.

    starts, starts_k (rows + 1,): where each row's queries and keys begin. used (rows,): how many of its keys count; None: as
    many as it has queries. A row's last query is at the position of its last key.
    """
    ends = starts[1:] - starts[:-1] if used is None else used
    i, j = torch.arange(queries, device=starts.device), torch.arange(keys, device=starts.device)
    row = torch.bucketize(i, starts, right=True) - 1
    at = ends[row] - (starts[1:][row] - i)  # the position in its row of every query, and of every key
    row_k = torch.bucketize(j, starts_k, right=True) - 1
    at_k = j - starts_k[row_k]
    seen = (row[:, None] == row_k) & (at_k <= at[:, None])
    return (seen & (at_k > at[:, None] - window) if window else seen)[None, None]


def register():
    """Make attn_implementation="varlen" known to transformers. Packed rows need no mask: their starts say it all."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*args, attention_mask=None, **kwargs):
        return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)

    AttentionInterface.register(ATTENTION, varlen_attention)
    AttentionMaskInterface.register(ATTENTION, mask)


def flat_rows(ids: list[int], lengths: list[int]) -> dict:
    """The model's inputs for rows of these lengths, laid end to end in `ids`: input_ids and position_ids (1, T)."""
    starts = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    return {
        "input_ids": torch.tensor(ids)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@torch.no_grad()
def rows_stay_apart(model) -> bool:
    """Whether a packed row gets the logits that it gets alone, whatever its neighbour. Tried on two short rows.

    True of attention alone. Layers that carry a state along the sequence (Mamba, convolutions) mix packed rows: with other
    tokens in the first row, the second row's logits are no longer the same to the last bit. Layers that number positions
    themselves keep rows apart and still shift them, so the row alone must come out close as well.
    """
    training = model.training
    model.eval()
    first, other, second = [5, 6, 7, 8, 9, 10, 11], [12, 5, 9, 5, 13, 6, 14], [12, 13, 14, 15, 16]

    def logits(*rows):
        flat = flat_rows([token for row in rows for token in row], [len(row) for row in rows])
        return model(**send_to_device(flat, model.device), use_cache=False).logits[0, -len(second) :].float()

    packed = logits(first, second)
    alone = model(input_ids=torch.tensor([second], device=model.device), use_cache=False).logits[0].float()
    close = (packed - alone).norm() <= 0.25 * alone.norm()  # 16-bit rounding moves logits by hundredths of their norm
    apart = bool(torch.equal(packed, logits(other, second)) and close)
    model.train(training)
    return apart
