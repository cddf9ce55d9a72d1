"""Batched decoding: one prediction row per test row, in the order of the rows."""

import sys

import torch
from tqdm import tqdm

from src import kernels, modeling


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
    size = experiment.generation.batch_size or batch_size(model, rows, experiment)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt_ids))
    results, start = [None] * len(rows), 0
    bar = tqdm(total=len(rows), desc=f"generate {label}".strip(), unit="row", disable=not progress, file=sys.stdout)
    while start < len(rows):
        chosen = order[start : start + size]
        try:
            decoded = _decode(model, tokenizer, [rows[i].prompt_ids for i in chosen], config, experiment.seed + start)
        except torch.OutOfMemoryError:
            decoded = None
        if decoded is None:  # outside of `except`, which still holds the failed batch's tensors
            if size == 1:
                raise modeling.ModelError(
                    f"The GPU's memory does not hold one prompt of {len(rows[chosen[0]].prompt_ids)} tokens and its answer. "
                    "Lower prompt.max_tokens or generation.max_new_tokens, set generation.dequantize to 'off', or free the GPU."
                )
            size = max(1, size // 2)
            print(f"Out of GPU memory: going on with {size} prompts a batch.")
            modeling.free_cuda()
            continue
        for i, new in zip(chosen, decoded, strict=True):
            stopped = tokenizer.eos_token_id in new
            new = new[: new.index(tokenizer.eos_token_id) + 1] if stopped else new
            results[i] = {
                "id": rows[i].id,
                "prediction": tokenizer.decode(new[:-1] if stopped else new, skip_special_tokens=True).strip(),
                "tokens": len(new),
                "stop": "eos" if stopped else "length",
                "prompt_tokens": len(rows[i].prompt_ids),
                "cut_tokens": rows[i].cut_tokens,
            }
        start += len(chosen)
        bar.update(len(chosen))
    bar.close()
    model.train(was_training)
    return results


def batch_size(model, rows, experiment) -> int:
    """Prompts decoded together: 64 on a CPU; on a GPU as many as half of its free memory holds with their caches, at most 256."""
    if model.device.type != "cuda":
        return 64
    c, g = model.config, experiment.generation
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    tokens = max(len(row.prompt_ids) for row in rows) + g.max_new_tokens
    cache = tokens * 2 * 2 * c.num_hidden_layers * heads * width  # 16-bit keys and values
    row = g.num_beams * (2 * cache + 8 * c.vocab_size)  # the cache is copied when it grows
    free = torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(min(256, max(1, free / 2 // row)))


def _decode(model, tokenizer, prompts: list[list[int]], config, seed: int) -> list[list[int]]:
    """New token ids of each prompt; may hold padding after EOS."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.random.fork_rng(enabled=config.do_sample):  # sampling must not move the random numbers of training
        if config.do_sample:
            torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
    return output[:, width:].tolist()


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
