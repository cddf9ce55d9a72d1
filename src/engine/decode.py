"""Batched decoding: one answer a row, in the order of the rows, the same whatever the batch."""

import copy
import itertools
import sys

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, send_to_device
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from src.engine import weights
from src.engine.attention import flat_rows, has_varlen, rows_stay_apart
from src.engine.fuse import available, fused

PREFILL = 16384  # prompt tokens read in one forward pass, about
SAMPLING = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}  # transformers' defaults
OTHERS = dict(num_beams=1, early_stopping=False, length_penalty=1.0, no_repeat_ngram_size=0, repetition_penalty=1.0)
# cuDNN's attention fails on hundreds of padded beams (H200, torch 2.11: "Expected mha_graph.execute(...)")
PADDED_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
FREE = {*SAMPLING, "max_new_tokens", "min_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id"}


@torch.inference_mode()
def generate(
    model, tokenizer, rows, generation, seed=0, batch_size=None, label="", progress=True, keep=None, rank=0, ranks=1
):
    """Answer every prompt of `rows`, as many at a time as memory holds, longest first.

    rows: a dataset with id, prompt_ids and cut_tokens. generation: a GenerationConfig. seed: of sampling. keep: where
    answers are kept (keep.found, {row number: answer}; keep.add(such) after every batch); these rows are not generated.
    rank, ranks: of the processes that all call this and share the rows; each returns all answers.

    Returns, in the order of `rows`: {"id", "prediction", "tokens", "stop", "prompt_tokens", "cut_tokens"}. `tokens`
    counts new tokens with EOS, `stop` is "eos" or "length" (max_new_tokens reached). Prompt ids are dropped before
    decoding, never searched for in the text. Raises RuntimeError when memory does not hold one prompt.
    """
    was_training, rows = model.training, list(rows)
    model.eval()
    config = complete(generation, tokenizer, model)
    flat = unpadded(model, config)
    decode = _decode_flat if flat else _decode_padded
    lengths, found = [len(row["prompt_ids"]) for row in rows], dict(keep.found) if keep else {}
    own = sorted(range(len(rows)), key=lambda i: -lengths[i])[rank::ranks]  # whatever is found: all share alike
    waiting, quiet = [i for i in own if i not in found], not progress or rank > 0
    shown = {"desc": f"generate {label}".strip(), "unit": "row", "disable": quiet, "file": sys.stdout}
    bar = tqdm(total=len(found) + len(waiting), initial=len(found), **shown)
    with bar, fused(model, available(model.device) and hasattr(model, "peft_config")):
        while waiting:
            size = batch_size or fitting(model, [lengths[i] for i in waiting], config, flat)
            chosen = waiting[:size]
            draw = SeededSampling(config, chosen, seed) if config.do_sample else None
            try:
                new = decode(model, [rows[i]["prompt_ids"] for i in chosen], config, draw, bar)
            except torch.OutOfMemoryError:
                new = None
            if new is not None:
                ends = config.eos_token_id
                new = {i: answer(rows[i], ids, tokenizer, ends) for i, ids in zip(chosen, new, strict=True)}
                found.update(new)
                if keep:
                    keep.add(new)
                waiting = waiting[size:]
                bar.update(len(found) - bar.n)
            elif len(chosen) > 1:  # outside of `except`, which still holds the failed batch's tensors
                batch_size = len(chosen) // 2
                print(f"Out of GPU memory: going on with {batch_size} prompts a batch.")
                weights.free_cuda()
            else:
                raise torch.OutOfMemoryError(  # in training, a smaller plan is tried
                    f"The GPU's memory does not hold one prompt of {lengths[chosen[0]]} tokens and its answer. Set "
                    "engine.dequantize to 'off' or free the GPU; else train with a lower prompt.max_tokens."
                )
    model.train(was_training)
    if ranks > 1:
        found = {i: answer for part in gather_object([found]) for i, answer in part.items()}
    return [found[i] for i in range(len(rows))]


def complete(generation, tokenizer, model):
    """A copy of the GenerationConfig in which transformers' defaults, not the model's own, fill what is left out."""
    config, own = copy.deepcopy(generation), model.generation_config.eos_token_id
    given = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    ends = [given if isinstance(given, list) else [given], own if isinstance(own, list) else [own]]
    config.eos_token_id = sorted({token for part in ends for token in part} - {None})  # a chat model has several
    config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    config.update(**SAMPLING, **OTHERS, defaults_only=True)
    return config


def answer(row, new: list[int], tokenizer, ends: list[int]) -> dict:
    """The entry of `generate` for a row and its new token ids, which may hold padding after the first of `ends`."""
    end = next((n for n, token in enumerate(new) if token in ends), None)
    text = new[:end]
    return {
        "id": row["id"], "prediction": tokenizer.decode(text, skip_special_tokens=True).strip(),
        "tokens": len(text) + (end is not None), "stop": "length" if end is None else "eos",
        "prompt_tokens": len(row["prompt_ids"]), "cut_tokens": row["cut_tokens"],
    }  # fmt: skip


def unpadded(model, config) -> bool:
    """Whether to decode without padding: flash attention over packed rows, and greedily or by sampling alone."""
    asked = config.to_diff_dict()
    simple = all(asked[name] == OTHERS.get(name) for name in asked.keys() - FREE - {"transformers_version"})
    return simple and has_varlen(model.device, model.dtype) and rows_stay_apart(model)


def fitting(model, lengths: list[int], config, flat: bool) -> int:
    """How many prompts, longest first, to decode together: 64, or up to 1,024 in half of a GPU's free memory."""
    if model.device.type != "cuda":
        return 64
    c = model.config.get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    token = 2 * 2 * c.num_hidden_layers * heads * width  # bytes of 16-bit keys and values
    left, size = weights.free_bytes(model.device) / 2, 0
    for length in lengths[:1024]:
        tokens = (length if flat else lengths[0]) + config.max_new_tokens
        left -= config.num_beams * (tokens * token + 8 * c.vocab_size)
        if left < 0:
            break
        size += 1
    return max(1, size)


class SeededSampling(LogitsProcessor):
    """Turns taking the likeliest token into drawing one, from the seed and each row's number, whatever the batch."""

    def __init__(self, config, rows: list[int], seed: int):
        self.warpers = LogitsProcessorList([logits_process.TemperatureLogitsWarper(float(config.temperature))])
        self.warpers += [logits_process.TopKLogitsWarper(config.top_k)] if config.top_k else []
        self.warpers += [logits_process.TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []
        self.generators = [torch.Generator().manual_seed(hash((seed, row)) % 2**63) for row in rows]

    def __call__(self, input_ids, scores):
        """scores (rows, vocabulary) with Gumbel noise, whose largest entry is a draw from their softmax."""
        scores = self.warpers(input_ids, scores.float())
        noise = [torch.empty(scores.shape[1]).exponential_(generator=generator).log() for generator in self.generators]
        return scores - torch.stack(noise).to(scores.device)


def _decode_padded(model, prompts: list[list[int]], config, draw, bar) -> list[list[int]]:
    """New token ids of each prompt, by transformers' `generate` on left-padded prompts; may hold padding after EOS."""
    ids = [torch.tensor(prompt) for prompt in prompts]
    mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, "left").to(model.device)
    ids = pad_sequence(ids, True, config.pad_token_id, "left").to(model.device)
    greedy = copy.deepcopy(config)
    greedy.update(**SAMPLING)
    drawn = LogitsProcessorList([draw] if draw else [])
    with sdpa_kernel(PADDED_ATTENTION):
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, logits_processor=drawn)
    return output[:, ids.shape[1] :].tolist()


class FlatCache(DynamicCache):
    """Keys and values of rows of different lengths without padding. `room` (rows,): the most tokens each will hold."""

    def __init__(self, room: torch.Tensor):
        super().__init__()
        self.begin = F.pad(room.cumsum(0), (1, 0))  # (rows + 1,): the first slot of each row
        self.new, self.stored = None, {}  # the slots of the coming tokens; by layer, keys and values (slots, heads, d)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Store (1, heads, T, d) of the new tokens. Return the keys and values (1, heads, slots, d) of all rows."""
        news = [states[0].transpose(0, 1) for states in (key_states, value_states)]
        if layer_idx not in self.stored:
            self.stored[layer_idx] = [new.new_zeros(int(self.begin[-1]), *new.shape[1:]) for new in news]
        for stored, new in zip(self.stored[layer_idx], news, strict=True):
            stored.index_copy_(0, self.new, new)
        return tuple(stored.transpose(0, 1)[None] for stored in self.stored[layer_idx])

    def stretch(self, rows: torch.Tensor, used: torch.Tensor, new: torch.Tensor) -> dict:
        """Attention's arguments for the `rows` that go on, of `used` tokens each with those to be written at `new`."""
        self.new, begin = new, torch.cat((self.begin[rows], self.begin[-1:]))
        return {"past_key_values": self, "use_cache": True, "cu_seq_lens_k": begin.int(), "seqused_k": used.int()}


def _decode_flat(model, prompts: list[list[int]], config, draw, bar) -> list[list[int]]:
    """New token ids of each prompt. Unlike transformers' `generate`, computes no padding, and no row after its EOS."""
    device, count = model.device, len(prompts)
    lengths = torch.tensor([len(p) for p in prompts])
    cache = FlatCache((lengths + config.max_new_tokens).to(device))
    ends = torch.tensor(config.eos_token_id, device=device)

    def next_tokens(logits, step):
        if step < (config.min_new_tokens or 0):
            logits[:, config.eos_token_id] = -torch.inf
        return (draw(None, logits) if draw else logits).argmax(-1)

    first, passes = [], torch.unique_consecutive(lengths.cumsum(0) // PREFILL, return_counts=True)[1]
    for rows in torch.arange(count).split(passes.tolist()):
        inputs = flat_rows([i for row in rows for i in prompts[row]], lengths[rows].tolist())
        inputs, own, rows = send_to_device((inputs, lengths[rows], rows), device)
        new = torch.repeat_interleave(cache.begin[rows], own) + inputs["position_ids"][0]
        last = inputs["cu_seq_lens_q"][1:].long() - 1
        first.append(model(**inputs | cache.stretch(rows, own, new), logits_to_keep=last).logits[0])

    rows, used, tokens = torch.arange(count, device=device), lengths.to(device), next_tokens(torch.cat(first), 0)
    found = torch.full((count, config.max_new_tokens), config.pad_token_id, device=device)
    longest = int(lengths.max())
    for step in range(1, config.max_new_tokens + 1):
        found[rows, step - 1] = tokens
        going = torch.isin(tokens, ends, invert=True)
        rows, used, tokens = rows[going], used[going], tokens[going]
        bar.update(len(going) - len(rows))
        if not len(rows) or step == config.max_new_tokens:
            break
        if draw:
            draw.generators = list(itertools.compress(draw.generators, going.tolist()))
        each = torch.arange(len(rows) + 1, device=device, dtype=torch.int32)  # a query a row
        inputs = {"input_ids": tokens[None], "position_ids": used[None], "cu_seq_lens_q": each}
        inputs |= {"max_length_q": 1, "max_length_k": longest + step}
        inputs |= cache.stretch(rows, used + 1, cache.begin[rows] + used)
        tokens = next_tokens(model(**inputs).logits[0], step)
        used = used + 1
    return found.tolist()
