"""Answers as a defect has them: asked, padded, merged or teacher-forced the wrong way."""

import torch
import transformers
from peft import PeftModel
from torch.nn.attention import sdpa_kernel

from src import engine, prompts, qlora
from src.engine import batches, decode

BATCH = 64  # prompts decoded together where they are padded on the right


def answer(defect, model, recipe, tokenizer, rows: list) -> list[dict]:
    """The entries of `engine.generate` for the evaluation rows, asked and answered as the defect has it."""
    asked = prompts.dataset([defect.ask(row) for row in rows])
    if defect.teacher_forced:
        return teacher_forced(model, tokenizer, asked)
    if defect.merged:
        whole = recipe.quantization.model_copy(update={"load_in_4bit": False})
        recipe = recipe.model_copy(update={"quantization": whole})
        model = merged(model, qlora.load_base(recipe, tokenizer, model.device))
    generation = qlora.generation_config(recipe)
    if defect.right_padded:
        return generate_right_padded(model, tokenizer, asked, generation)
    size = recipe.engine.batch_size
    return engine.generate(model, tokenizer, asked, generation, batch_size=size, progress=False)


def merged(model, base):
    """An unquantised base model with the adapter of `model` merged into its weights."""
    other = PeftModel(base, model.peft_config["default"])
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    return other.merge_and_unload().eval()


@torch.inference_mode()
def generate_right_padded(model, tokenizer, rows, generation) -> list[dict]:
    """`engine.generate` with at least one pad token between every prompt and its answer."""
    config = decode.complete(generation, tokenizer, model)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of right padding, rightly
    model.eval()
    found, prompt_ids = [], list(rows["prompt_ids"])
    for part in (prompt_ids[start : start + BATCH] for start in range(0, len(prompt_ids), BATCH)):
        width = max(map(len, part)) + 1
        ids = torch.tensor([p + [tokenizer.pad_token_id] * (width - len(p)) for p in part], device=model.device)
        mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in part], device=model.device)
        with sdpa_kernel(decode.PADDED_ATTENTION):
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        found += output[:, width:].tolist()
    transformers.logging.set_verbosity(verbosity)
    return [decode.answer(row, new, tokenizer, config.eos_token_id) for row, new in zip(rows, found, strict=True)]


@torch.inference_mode()
def teacher_forced(model, tokenizer, rows) -> list[dict]:
    """What a Trainer's compute_metrics calls predictions: the likeliest token after each of the reference's own.

    An entry as of `engine.generate` for every row; each has exactly the reference's number of tokens, EOS included.
    """
    model.eval()
    found, rows = [], list(rows)
    for part in (rows[start : start + 16] for start in range(0, len(rows), 16)):
        inputs = batches.pad(part, tokenizer.pad_token_id)
        supervised = inputs["targets"] != prompts.IGNORE
        ids, mask, kept = (inputs[k].to(model.device) for k in ("input_ids", "attention_mask", "positions"))
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits
        for row, tokens, own in zip(part, logits.argmax(-1).cpu(), supervised, strict=True):
            text = tokenizer.decode(tokens[own].tolist(), skip_special_tokens=True).strip()
            found.append({"id": row["id"], "prediction": text, "stop": "reference", "tokens": int(own.sum())})
    return found
