"""Batched decoding: one prediction row per test row, in the order of the rows."""

import sys

import torch
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from src import batching, kernels, modeling

PREFILL = 16384  # prompt tokens read in one forward pass


def generation_config(experiment, tokenizer):
    """The experiment's decoding settings as a transformers GenerationConfig; nothing is inherited from the model's own."""
    from transformers import GenerationConfig

    g = experiment.generation
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
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


@torch.inference_mode()
def generate(model, tokenizer, rows, experiment, label: str = "", progress: bool = True) -> list[dict]:
    """Answer every prompt of `rows` (prompts.Encoded). Sorted by length, left-padded, so that little is padding.

    Returns, in the order of `rows`: {"id", "prediction", "tokens", "stop", "prompt_tokens", "cut_tokens"}; `tokens` counts
    new tokens with EOS, `stop` is "eos" or "length" (max_new_tokens reached). The answer starts at a token position:
    prompt ids are dropped before decoding, never searched for in the text.
    """
    was_training = model.training
    model.eval()
    config = generation_config(experiment, tokenizer)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt_ids))
    results, start, most = [None] * len(rows), 0, experiment.generation.batch_size
    bar = tqdm(total=len(rows), desc=f"generate {label}".strip(), unit="row", disable=not progress, file=sys.stdout)
    while start < len(rows):
        size = most or batch_size(model, len(rows[order[start]].prompt_ids), experiment)
        chosen = order[start : start + size]
        try:
            decoded = _decode(model, tokenizer, [rows[i].prompt_ids for i in chosen], config, experiment.seed + start)
        except torch.OutOfMemoryError:
            decoded = None
        if decoded is None:  # outside of `except`, which still holds the failed batch's tensors
            if len(chosen) == 1:
                raise modeling.ModelError(
                    f"The GPU's memory does not hold one prompt of {len(rows[chosen[0]].prompt_ids)} tokens and its answer. "
                    "Lower prompt.max_tokens or generation.max_new_tokens, set generation.dequantize to 'off', or free the GPU."
                )
            most = len(chosen) // 2
            print(f"Out of GPU memory: going on with {most} prompts a batch.")
            modeling.free_cuda()
            continue
        for i, new in zip(chosen, decoded, strict=True):
            results[i] = answer(rows[i], new, tokenizer)
        start += len(chosen)
        bar.update(len(chosen))
    bar.close()
    model.train(was_training)
    return results


def answer(row, new: list[int], tokenizer) -> dict:
    """The entry of `generate` for a row and its new token ids, which may hold padding after EOS."""
    stopped = tokenizer.eos_token_id in new
    new = new[: new.index(tokenizer.eos_token_id) + 1] if stopped else new
    return {
        "id": row.id,
        "prediction": tokenizer.decode(new[:-1] if stopped else new, skip_special_tokens=True).strip(),
        "tokens": len(new),
        "stop": "eos" if stopped else "length",
        "prompt_tokens": len(row.prompt_ids),
        "cut_tokens": row.cut_tokens,
    }


def batch_size(model, longest: int, experiment) -> int:
    """Prompts of at most `longest` tokens decoded together: 64 on a CPU, on a GPU what half of its free memory holds, at most 512."""
    if model.device.type != "cuda":
        return 64
    c, g = model.config, experiment.generation
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    cache = (longest + g.max_new_tokens) * 2 * 2 * c.num_hidden_layers * heads * width  # 16-bit keys and values
    return int(min(512, max(1, modeling.free_bytes(model.device) / 2 // (g.num_beams * (cache + 8 * c.vocab_size)))))


def _decode(model, tokenizer, prompts: list[list[int]], config, seed: int) -> list[list[int]]:
    """New token ids of each prompt; may hold padding after EOS."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    cache = {}
    if config.num_beams == 1 and kernels.has_varlen(model.device):
        cache["past_key_values"] = prefill(model, prompts, width, config.max_new_tokens)
    with torch.random.fork_rng(enabled=config.do_sample):  # sampling must not move the random numbers of training
        if config.do_sample:
            torch.manual_seed(seed)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **cache)
    return output[:, width:].tolist()


class _RoomyLayer(DynamicLayer):
    """A cache layer that grows into memory set aside for it; transformers' own copies everything at every token."""

    def reserve(self, keys, values, used: int):
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.reserved = keys, values
        self.keys, self.values = keys[:, :, :used], values[:, :, :used]

    def update(self, key_states, value_states, *args, **kwargs):
        used = self.keys.shape[2]
        new = slice(used, used + key_states.shape[2])
        keys, values = self.reserved
        keys[:, :, new], values[:, :, new] = key_states, value_states
        self.keys, self.values = keys[:, :, : new.stop], values[:, :, : new.stop]
        return self.keys, self.values


@torch.no_grad()
def prefill(model, prompts: list[list[int]], width: int, max_new_tokens: int) -> DynamicCache:
    """The cache of all prompt tokens but the last, left-padded to width - 1, computed on packed prompts without any padding."""
    decoder, filled, count = model.get_base_model().base_model, DynamicCache(), len(prompts)
    start = 0
    while start < count:
        stop, tokens = start, 0
        while stop < count and (stop == start or tokens + len(prompts[stop]) <= PREFILL):
            tokens += len(prompts[stop])
            stop += 1
        lengths = [len(p) - 1 for p in prompts[start:stop]]
        flat = [i for p in prompts[start:stop] for i in p[:-1]]
        part = DynamicCache()
        if flat:
            inputs = batching.flat_rows(flat, [n for n in lengths if n])
            inputs = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in inputs.items()}
            decoder(**inputs, past_key_values=part, use_cache=True)
        row = torch.repeat_interleave(torch.arange(start, stop), torch.tensor(lengths)).to(model.device)
        column = torch.cat([torch.arange(width - 1 - n, width - 1) for n in lengths]).to(model.device)
        for number, layer in enumerate(part.layers):
            if start == 0:
                shape = (count, layer.keys.shape[1], width + max_new_tokens + 8, layer.keys.shape[3])
                filled.layers.append(_RoomyLayer())
                filled.layers[-1].reserve(layer.keys.new_zeros(shape), layer.values.new_zeros(shape), width - 1)
            keys, values = filled.layers[number].reserved
            keys[row, :, column] = layer.keys[0].transpose(0, 1)
            values[row, :, column] = layer.values[0].transpose(0, 1)
        start = stop
    return filled


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
