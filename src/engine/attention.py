"""Attention over packed rows: several rows laid end to end in one sequence, none of which sees another.

Where there is no variable-length flash attention, sdpa with a block mask computes the same and costs more.
"""

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "varlen"  # the name under which transformers finds `varlen_attention`; see `register`


def has_varlen(device: torch.device, dtype: torch.dtype = torch.bfloat16, least=(8, 0)) -> bool:
    """Whether torch's variable-length flash attention runs here: on CUDA from compute capability 8.0, in 16 bits."""
    fits = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return fits and torch.cuda.get_device_capability(device) >= least


def varlen_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """A transformers attention function. query (batch, heads, T, d); key and value (batch, kv heads, S, d).

    Packed rows have batch 1 and the arguments of `flat_rows`. `seqused_k` (rows,): how many keys of each row count, of
    those that `decode.FlatCache` has room for. Anything else goes through transformers' sdpa.
    """
    starts, starts_k, used = (kwargs.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seqused_k"))
    n, n_k = query.shape[2], key.shape[2]
    if starts is not None and has_varlen(query.device, query.dtype):
        q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))
        longest, longest_k = kwargs["max_length_q"], kwargs["max_length_k"]
        left = sliding_window - 1 if sliding_window and sliding_window < longest_k else -1
        # One query sees every key, causal or not. Without the causal flag the kernel reads the keys of a group once.
        right = -1 if longest == 1 and left == -1 else 0
        out = torch.ops.aten._flash_attention_forward(  # below torch's varlen_attn, which has no seqused_k in 2.11
            q, k, v, starts, starts_k, longest, longest_k, 0.0, (left, right) == (-1, 0), False,
            scale=scaling, window_size_left=left, window_size_right=right, seqused_k=used,
        )[0]  # fmt: skip
        return out.unsqueeze(0), None
    if starts is not None:
        attention_mask = block_mask(starts, starts_k, used, n, n_k, sliding_window)
    elif attention_mask is None and sliding_window and n_k > sliding_window:  # `register` made no mask
        ends = torch.tensor([[0, n], [0, n_k]], device=query.device)
        attention_mask = block_mask(*ends, ends[1, 1:], n, n_k, sliding_window)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def block_mask(starts, starts_k, used, queries: int, keys: int, window: int | None = None) -> torch.Tensor:
    """Return a (1, 1, queries, keys) boolean mask: causal within a row, `window` tokens back, nothing across rows.

    starts, starts_k (rows + 1,): where each row's queries and keys begin. used (rows,): how many of its keys count, the
    last one at the position of its last query; None: as many as it has queries.
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

    def mask(*args, attention_mask=None, **kwargs):
        return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)

    AttentionInterface.register(ATTENTION, varlen_attention)
    AttentionMaskInterface.register(ATTENTION, mask)


def flat_rows(ids: list[int], lengths: list[int]) -> dict:
    """The model's inputs for rows of these lengths, laid end to end in `ids`: input_ids and position_ids (1, T)."""
    starts = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return {
        "input_ids": torch.tensor([ids]), "position_ids": positions[None], "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts, "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip


@torch.no_grad()
def rows_stay_apart(model) -> bool:
    """Whether a packed row gets the logits that it gets alone. Tried on two short rows."""
    training = model.training
    model.eval()
    first, other, second = [5, 6, 7, 8, 9, 10, 11], [12, 5, 9, 5, 13, 6, 14], [12, 13, 14, 15, 16]

    def logits(*rows):
        flat = flat_rows([token for row in rows for token in row], [len(row) for row in rows])
        return model(**send_to_device(flat, model.device), use_cache=False).logits[0, -len(second) :].float()

    packed, moved = logits(first, second), logits(other, second)  # by layers that carry a state along the sequence
    alone = model(input_ids=torch.tensor([second], device=model.device), use_cache=False).logits[0].float()
    close = (packed - alone).norm() <= 0.25 * alone.norm()  # 16-bit rounding moves logits by hundredths of their norm
    model.train(training)
    return bool(torch.equal(packed, moved) and close)
