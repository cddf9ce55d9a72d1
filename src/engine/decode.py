"""Batched decoding: one answer a row, in the order of the rows, the same whatever the batch."""

import copy
import sys

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from tqdm import tqdm
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer

from src.engine import weights
from src.engine.attention import flat_rows, has_varlen, rows_stay_apart
from src.engine.fuse import available, fused

PREFILL = 16384  # prompt tokens read in one forward pass


@torch.inference_mode()
def generate(model, tokenizer, rows, generation, seed=0, batch_size=None, label="", progress=True) -> list[dict]:
    """Answer every prompt of `rows`, as many at a time as memory holds, longest first.

    rows: a dataset with id, prompt_ids and cut_tokens. generation: a GenerationConfig; the tokens that end an answer are its own
    and the model's, whose chat template may have several. seed: of sampling, drawn for each row by itself.

    Returns, in the order of `rows`: {"id", "prediction", "tokens", "stop", "prompt_tokens", "cut_tokens"}. `tokens` counts new
    tokens with EOS, `stop` is "eos" or "length" (max_new_tokens reached). Prompt ids are dropped before decoding, never searched
    for in the text. Raises RuntimeError when memory does not hold one prompt.
    """
    was_training = model.training
    model.eval()
    config = with_end_tokens(generation, tokenizer, model)
    flat = unpadded(model, config)
    prompts = (
        [list(ids) for ids in rows["prompt_ids"]] if not isinstance(rows, list) else [r["prompt_ids"] for r in rows]
    )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found, start, most = [None] * len(prompts), 0, batch_size
    bar = tqdm(total=len(prompts), desc=f"generate {label}".strip(), unit="row", disable=not progress, file=sys.stdout)
    with fused(model, available(model.device) and hasattr(model, "peft_config")):
        while start < len(prompts):
            size = most or fitting(model, [len(prompts[i]) for i in order[start:]], config, flat)
            chosen = order[start : start + size]
            try:
                new = (_decode_flat if flat else _decode_padded)(
                    model, [prompts[i] for i in chosen], config, chosen, seed, bar
                )
            except torch.OutOfMemoryError:
                new = None
            if new is None:  # outside of `except`, which still holds the failed batch's tensors
                if len(chosen) == 1:
                    raise RuntimeError(
                        f"The GPU's memory does not hold one prompt of {len(prompts[chosen[0]])} tokens and its answer. Set "
                        "engine.dequantize to 'off' or free the GPU; else train with a lower prompt.max_tokens."
                    )
                most = len(chosen) // 2
                print(f"Out of GPU memory: going on with {most} prompts a batch.")
                weights.free_cuda()
                continue
            for i, tokens in zip(chosen, new, strict=True):
                found[i] = tokens
            start += len(chosen)
            bar.update(start - bar.n)
    bar.close()
    model.train(was_training)
    return [answer(row, tokens, tokenizer, config.eos_token_id) for row, tokens in zip(rows, found, strict=True)]


def with_end_tokens(generation, tokenizer, model):
    """A copy of the GenerationConfig with pad, BOS and every token that ends an answer filled in."""
    config, own = copy.deepcopy(generation), model.generation_config.eos_token_id
    given = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    ends = [given if isinstance(given, list) else [given], own if isinstance(own, list) else [own]]
    config.eos_token_id = sorted({token for part in ends for token in part} - {None})
    config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    return config


def answer(row, new: list[int], tokenizer, ends: list[int]) -> dict:
    """The entry of `generate` for a row and its new token ids, which may hold padding after the first of `ends`."""
    end = next((n for n, token in enumerate(new) if token in ends), None)
    stopped = end is not None
    new = new[: end + 1] if stopped else new
    return {
        "id": row["id"],
        "prediction": tokenizer.decode(new[:-1] if stopped else new, skip_special_tokens=True).strip(),
        "tokens": len(new),
        "stop": "eos" if stopped else "length",
        "prompt_tokens": len(row["prompt_ids"]),
        "cut_tokens": row["cut_tokens"],
    }


def unpadded(model, config) -> bool:
    """Whether prompts are decoded without padding: one beam, variable-length flash attention, rows that can be packed."""
    simple = (config.num_beams or 1) == 1 and not config.no_repeat_ngram_size
    return simple and has_varlen(model.device, model.dtype) and rows_stay_apart(model)


def fitting(model, lengths: list[int], config, flat: bool) -> int:
    """How many prompts of these lengths (tokens, longest first) to decode together.

    64 on a CPU; on a GPU as many as half of its free memory holds, at most 1,024.
    """
    if model.device.type != "cuda":
        return 64
    c = model.config.get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    token = 2 * 2 * c.num_hidden_layers * heads * width  # bytes of 16-bit keys and values
    left, size = weights.free_bytes(model.device) / 2, 0
    for length in lengths[:1024]:
        tokens = (length if flat else lengths[0]) + config.max_new_tokens
        left -= (config.num_beams or 1) * (tokens * token + 8 * c.vocab_size)
        if left < 0:
            break
        size += 1
    return max(1, size)


class SeededSampling(LogitsProcessor):
    """Turns taking the likeliest token into drawing one: temperature, top_p, then Gumbel noise from a generator for each row.

    `rows`: the numbers of the batch's rows. A row's draws depend on the seed and its number alone, not on the batch.
    """

    def __init__(self, config, rows: list[int], seed: int):
        self.warpers = LogitsProcessorList()
        if config.temperature not in (None, 1.0):
            self.warpers.append(TemperatureLogitsWarper(float(config.temperature)))
        if config.top_p not in (None, 1.0):
            self.warpers.append(TopPLogitsWarper(config.top_p))
        self.generators = [torch.Generator().manual_seed(hash((seed, row)) % 2**63) for row in rows]

    def __call__(self, input_ids, scores):
        """scores (rows, vocabulary) with noise added, whose largest entry is a draw from their softmax."""
        scores = self.warpers(input_ids, scores.float())
        noise = [torch.empty(scores.shape[1]).exponential_(generator=generator).log() for generator in self.generators]
        return scores - torch.stack(noise).to(scores.device)

    def keep(self, going: list[bool]):
        """Forget the rows that are finished."""
        self.generators = [g for g, stays in zip(self.generators, going, strict=True) if stays]


def _decode_padded(model, prompts: list[list[int]], config, numbers: list[int], seed: int, bar) -> list[list[int]]:
    """New token ids of each prompt, by transformers' `generate` on left-padded prompts; may hold padding after EOS."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    greedy, drawn = copy.deepcopy(config), LogitsProcessorList()
    if config.do_sample:
        drawn.append(SeededSampling(config, numbers, seed))
        greedy.do_sample, greedy.temperature, greedy.top_p, greedy.top_k = False, None, None, None
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=greedy,
        logits_processor=drawn,
    )
    return output[:, width:].tolist()


class _FlatLayer(DynamicLayer):
    """One layer's keys and values of all rows, end to end (1, kv heads, slots, d): a stretch of slots a row, no padding."""

    def __init__(self, slots: int):
        super().__init__()
        self.slots, self.new = slots, None  # `new`: the slots of the tokens of the coming forward pass

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            shape = (self.slots, key_states.shape[1], key_states.shape[3])  # as flash attention reads them
            self.stored = key_states.new_zeros(shape), value_states.new_zeros(shape)
            self.keys, self.values = (x.transpose(0, 1)[None] for x in self.stored)
            self.is_initialized = True
        for stored, states in zip(self.stored, (key_states, value_states), strict=True):
            stored.index_copy_(0, self.new, states[0].transpose(0, 1))
        return self.keys, self.values


class FlatCache(DynamicCache):
    """Keys and values of rows of different lengths without padding. `room` (rows,): the most tokens each row will hold.

    `stretch` gives attention what it needs to know. A row that is finished is left out of it and costs nothing any more;
    the others stay where they are.
    """

    def __init__(self, config, room: torch.Tensor):
        super().__init__()
        self.begin = F.pad(room.cumsum(0), (1, 0))  # (rows + 1,)
        self.layers = [_FlatLayer(int(room.sum())) for _ in range(config.get_text_config().num_hidden_layers)]

    def stretch(self, rows: torch.Tensor, used: torch.Tensor, new: torch.Tensor) -> dict:
        """Attention's arguments for `rows` (ascending) that hold `used` tokens each, with those about to be written at `new`."""
        for layer in self.layers:
            layer.new = new
        begin = torch.cat((self.begin[rows], self.begin[-1:]))
        return {"past_key_values": self, "use_cache": True, "cu_seq_lens_k": begin.int(), "seqused_k": used.int()}


def _decode_flat(model, prompts: list[list[int]], config, numbers: list[int], seed: int, bar) -> list[list[int]]:
    """New token ids of each prompt. No token of padding is computed, and no row after its EOS.

    In place of transformers' `generate`, which pads prompts and cache to the longest row and goes on with finished rows.
    """
    device, count = model.device, len(prompts)
    lengths = torch.tensor([len(p) for p in prompts])
    cache = FlatCache(model.config, (lengths + config.max_new_tokens).to(device))
    ends = torch.tensor(config.eos_token_id, device=device)
    drawn = SeededSampling(config, numbers, seed) if config.do_sample else None

    def allowed(logits, step):
        if step < (config.min_new_tokens or 0):
            logits[:, config.eos_token_id] = -torch.inf
        return logits

    def likeliest(logits):
        return (drawn(None, logits) if drawn else logits).argmax(-1)

    first, start = [], 0
    while start < count:
        stop = start + 1
        while stop < count and lengths[start : stop + 1].sum() <= PREFILL:
            stop += 1
        inputs = flat_rows([i for p in prompts[start:stop] for i in p], lengths[start:stop].tolist())
        inputs = send_to_device(inputs, device)
        own, rows = lengths[start:stop].to(device), torch.arange(start, stop, device=device)
        new = torch.repeat_interleave(cache.begin[rows], own) + inputs["position_ids"][0]
        last = inputs["cu_seq_lens_q"][1:].long() - 1
        logits = model(**inputs | cache.stretch(rows, own, new), logits_to_keep=last).logits[0]
        first.append(allowed(logits, 0))
        start = stop

    rows, used, tokens = torch.arange(count, device=device), lengths.to(device), likeliest(torch.cat(first))
    found = torch.full((count, config.max_new_tokens), config.pad_token_id, device=device)
    longest = int(lengths.max())
    for step in range(1, config.max_new_tokens + 1):
        found[rows, step - 1] = tokens
        going = torch.isin(tokens, ends, invert=True)
        rows, used, tokens = rows[going], used[going], tokens[going]
        bar.update(len(going) - len(rows))
        if not len(rows) or step == config.max_new_tokens:
            break
        if drawn:
            drawn.keep(going.tolist())
        each = torch.arange(len(rows) + 1, device=device, dtype=torch.int32)  # a query a row
        inputs = {"input_ids": tokens[None], "position_ids": used[None], "cu_seq_lens_q": each}
        inputs |= {"max_length_q": 1, "max_length_k": longest + step}
        inputs |= cache.stretch(rows, used + 1, cache.begin[rows] + used)
        tokens = likeliest(allowed(model(**inputs).logits[0], step))
        used = used + 1
    return found.tolist()
