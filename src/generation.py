"""Batched decoding: one prediction row per test row, in the order of the rows."""

import sys

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from src import batching, kernels, modeling

PREFILL = 16384  # prompt tokens read in one forward pass


def generation_config(experiment, tokenizer, model):
    """The experiment's decoding settings as a transformers GenerationConfig.

    Of the model's own only the tokens that end an answer are kept: chat models often have several, and their tokenizer names one.
    """
    from transformers import GenerationConfig

    g, own = experiment.generation, model.generation_config.eos_token_id
    return GenerationConfig(
        max_new_tokens=g.max_new_tokens,
        min_new_tokens=g.min_new_tokens or None,
        num_beams=g.num_beams,
        early_stopping=g.early_stopping,
        length_penalty=g.length_penalty if g.num_beams > 1 else None,
        no_repeat_ngram_size=g.no_repeat_ngram_size,
        do_sample=g.do_sample,
        temperature=g.temperature if g.do_sample else None,
        top_p=g.top_p if g.do_sample else None,
        eos_token_id=sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


@torch.inference_mode()
def generate(model, tokenizer, rows, experiment, label: str = "", progress: bool = True) -> list[dict]:
    """Answer every prompt of `rows` (prompts.Encoded), as many at a time as memory holds, longest first.

    Returns, in the order of `rows`: {"id", "prediction", "tokens", "stop", "prompt_tokens", "cut_tokens"}; `tokens` counts
    new tokens with EOS, `stop` is "eos" or "length" (max_new_tokens reached). The answer starts at a token position:
    prompt ids are dropped before decoding, never searched for in the text.
    """
    was_training = model.training
    model.eval()
    config = generation_config(experiment, tokenizer, model)
    decode = _decode_flat if flat(model, experiment) else _decode
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt_ids))
    results, start, most = [None] * len(rows), 0, experiment.generation.batch_size
    bar = tqdm(total=len(rows), desc=f"generate {label}".strip(), unit="row", disable=not progress, file=sys.stdout)
    while start < len(rows):
        size = most or batch_size(model, [len(rows[i].prompt_ids) for i in order[start:]], experiment)
        chosen = order[start : start + size]
        try:
            decoded = decode(model, [rows[i].prompt_ids for i in chosen], config, experiment.seed + start, bar)
        except torch.OutOfMemoryError:
            decoded = None
        if decoded is None:  # outside of `except`, which still holds the failed batch's tensors
            if len(chosen) == 1:
                raise modeling.ModelError(
                    f"The GPU's memory does not hold one prompt of {len(rows[chosen[0]].prompt_ids)} tokens and its answer. "
                    "Set generation.dequantize to 'off' or free the GPU; else train with a lower prompt.max_tokens or generation.max_new_tokens."
                )
            most = len(chosen) // 2
            print(f"Out of GPU memory: going on with {most} prompts a batch.")
            modeling.free_cuda()
            continue
        for i, new in zip(chosen, decoded, strict=True):
            results[i] = answer(rows[i], new, tokenizer, config.eos_token_id)
        start += len(chosen)
        bar.update(start - bar.n)
    bar.close()
    model.train(was_training)
    return results


def answer(row, new: list[int], tokenizer, ends: list[int]) -> dict:
    """The entry of `generate` for a row and its new token ids, which may hold padding after the first of `ends`."""
    end = next((n for n, token in enumerate(new) if token in ends), None)
    stopped = end is not None
    new = new[: end + 1] if stopped else new
    return {
        "id": row.id,
        "prediction": tokenizer.decode(new[:-1] if stopped else new, skip_special_tokens=True).strip(),
        "tokens": len(new),
        "stop": "eos" if stopped else "length",
        "prompt_tokens": len(row.prompt_ids),
        "cut_tokens": row.cut_tokens,
    }


def flat(model, experiment) -> bool:
    """Whether prompts are decoded without padding (`_decode_flat`): greedily, where variable-length flash attention runs, and rows can be packed."""
    g = experiment.generation
    greedy = g.num_beams == 1 and not g.do_sample and not g.no_repeat_ngram_size
    fast = kernels.has_varlen(model.device, modeling.compute_dtype(experiment, model.device))
    return greedy and fast and batching.rows_stay_apart(model)


def batch_size(model, lengths: list[int], experiment) -> int:
    """How many of the prompts, in tokens and longest first, to decode together: 64 on a CPU; what half of a GPU's free memory holds, at most 1,024."""
    if model.device.type != "cuda":
        return 64
    c, g = model.config.get_text_config(), experiment.generation
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    token = 2 * 2 * c.num_hidden_layers * heads * width  # bytes of 16-bit keys and values
    left, size, padded = modeling.free_bytes(model.device) / 2, 0, not flat(model, experiment)
    for length in lengths[:1024]:
        tokens = (lengths[0] if padded else length) + g.max_new_tokens
        left -= g.num_beams * (tokens * token + 8 * c.vocab_size)
        if left < 0:
            break
        size += 1
    return max(1, size)


def _decode(model, prompts: list[list[int]], config, seed: int, bar) -> list[list[int]]:
    """New token ids of each prompt, by transformers' `generate` on left-padded prompts; may hold padding after EOS."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    with torch.random.fork_rng(enabled=config.do_sample):  # sampling must not move the random numbers of training
        if config.do_sample:
            torch.manual_seed(seed)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return output[:, width:].tolist()


class _FlatLayer(DynamicLayer):
    """One layer's keys and values of all rows, laid end to end (1, kv heads, slots, d): a stretch of slots for each row, no padding."""

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
        """The attention arguments for `rows` (ascending) that hold `used` tokens each with those at the slots `new`, which are written."""
        for layer in self.layers:
            layer.new = new
        begin = torch.cat((self.begin[rows], self.begin[-1:]))
        return {"past_key_values": self, "use_cache": True, "cu_seq_lens_k": begin.int(), "seqused_k": used.int()}


def _decode_flat(model, prompts: list[list[int]], config, seed: int, bar) -> list[list[int]]:
    """New token ids of each prompt, the likeliest at every step. No token of padding is computed, and no row after its EOS.

    In place of transformers' `generate`, which pads prompts and cache to the longest row and goes on with finished rows.
    """
    device, count = model.device, len(prompts)
    lengths = torch.tensor([len(p) for p in prompts])
    cache = FlatCache(model.config, (lengths + config.max_new_tokens).to(device))
    ends = torch.tensor(config.eos_token_id, device=device)

    def likeliest(step, **inputs):
        logits = model(**inputs).logits[0]
        if step < (config.min_new_tokens or 0):
            logits[:, config.eos_token_id] = -torch.inf
        return logits.argmax(-1)

    first, start = [], 0
    while start < count:
        stop = start + 1
        while stop < count and lengths[start : stop + 1].sum() <= PREFILL:
            stop += 1
        inputs = batching.flat_rows([i for p in prompts[start:stop] for i in p], lengths[start:stop].tolist())
        inputs = send_to_device(inputs, device)
        own, rows = lengths[start:stop].to(device), torch.arange(start, stop, device=device)
        new = torch.repeat_interleave(cache.begin[rows], own) + inputs["position_ids"][0]
        last = inputs["cu_seq_lens_q"][1:].long() - 1
        first.append(likeliest(0, **inputs | cache.stretch(rows, own, new), logits_to_keep=last))
        start = stop

    rows, used, tokens = torch.arange(count, device=device), lengths.to(device), torch.cat(first)
    found = torch.full((count, config.max_new_tokens), config.pad_token_id, device=device)
    longest = int(lengths.max())
    for step in range(1, config.max_new_tokens + 1):
        found[rows, step - 1] = tokens
        going = torch.isin(tokens, ends, invert=True)
        rows, used, tokens = rows[going], used[going], tokens[going]
        bar.update(len(going) - len(rows))
        if not len(rows) or step == config.max_new_tokens:
            break
        each = torch.arange(len(rows) + 1, device=device, dtype=torch.int32)  # a query a row
        tokens = likeliest(
            step,
            input_ids=tokens[None],
            position_ids=used[None],
            cu_seq_lens_q=each,
            max_length_q=1,
            max_length_k=longest + step,
            **cache.stretch(rows, used + 1, cache.begin[rows] + used),
        )
        used = used + 1
    return found.tolist()


def predict(model, tokenizer, records, rows, experiment) -> dict[str, list[dict]]:
    """Base and fine-tuned answers to the same prompts from one model: the adapter disabled, then enabled.

    `records` and `rows` are the evaluation rows and their `prompts.build_all`. Returns {"base": [...], "finetuned": [...]},
    each row with id, section, dialogue, reference and the fields of `generate`.
    """
    g, device = experiment.generation, model.device
    if g.dequantize == "on" or (g.dequantize == "auto" and modeling.dequantized_fits(model)):
        modeling.dequantize(model)
    with model.disable_adapter():
        base = generate(model, tokenizer, rows, experiment, "base")
    with kernels.fused(model, kernels.wanted(experiment, device)):
        finetuned = generate(model, tokenizer, rows, experiment, "fine-tuned")
    shared = [
        {"id": r["id"], "section": r["section"], "dialogue": r["dialogue"], "reference": r["summary"]} for r in records
    ]
    return {
        "base": [{**a, **b} for a, b in zip(shared, base, strict=True)],
        "finetuned": [{**a, **b} for a, b in zip(shared, finetuned, strict=True)],
    }
