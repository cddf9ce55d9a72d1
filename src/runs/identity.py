"""What a run and an evaluation depend on, read from the objects that really ran, and hashed into their names.

A number changed in a notebook's LoraConfig or TrainingArguments is therefore another run, and the same numbers are the
same run whether they come from a cell or from OVERRIDES. How a machine computes (device, memory, passes) is left out,
unless in 8 bits.
"""

import hashlib
import json
from dataclasses import fields
from pathlib import Path

from src import recipes, runs
from src.runs import files

MACHINE = (  # beginnings of TrainingArguments' names that say how a machine computes and reports, not what it trains
    "output_dir", "per_device_", "gradient_", "activation_", "auto_find_batch_size", "bf16", "fp16", "tf32", "use_cpu",
    "dataloader_num", "dataloader_p", "logging_", "log_", "save_", "report_to", "run_name", "remove_unused_columns",
    "accelerator_config", "restore_callback_states", "disable_tqdm", "ddp_", "local_rank", "torch_", "include_", "hub_",
    "push_to_hub", "do_", "eval_accumulation_steps", "skip_memory_metrics", "deepspeed", "fsdp", "project", "trackio",
)  # fmt: skip
GREEDY = {  # what decoding does where GenerationConfig leaves a field out
    "num_beams": 1, "do_sample": False, "temperature": 1, "top_p": 1, "top_k": 50, "length_penalty": 1,
    "no_repeat_ngram_size": 0, "early_stopping": False, "min_new_tokens": 0, "min_length": 0, "use_cache": True,
    "max_length": 20, "num_return_sequences": 1, "repetition_penalty": 1,
}  # fmt: skip
PLACE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type")


def name(prefix: str, values: dict) -> str:
    """The prefix plus the first 8 hex digits of the sha256 of the values: equal values, equal name."""
    return f"{prefix}-{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]}"


def of_run(trainer, recipe) -> dict:
    """What the weights of a run depend on beside `base`, in JSON's types.

    `trainer`: a transformers Trainer over a PeftModel, whose datasets have the columns id, input_ids and labels.
    Values that transformers and PEFT have by default are left out, so that the rest can be read.
    """
    model, args = trainer.model, trainer.args
    adapter = model.peft_config["default"]
    usual = {f.name: plain(f.default) for f in fields(args) if not f.name.startswith(MACHINE)}
    training = {key: plain(getattr(args, key)) for key in usual}
    training = {key: value for key, value in training.items() if value != usual[key] and value not in ({}, [])}
    lora = {key: value for key, value in adapter.to_dict().items() if key not in PLACE}
    lora = {key: value for key, value in lora.items() if value != getattr(type(adapter)(), key, None)}
    in_fp8 = {"frozen_products": "float8_e4m3fn"} if getattr(getattr(trainer, "plan", None), "fp8", False) else {}
    return plain(
        {
            "base_model": base_name(model),
            "pad_token": recipe.pad_token,
            "quantization": _quantization(model) | in_fp8,
            "lora": {**lora, "r": adapter.r, "lora_alpha": adapter.lora_alpha},
            "training": {**training, "rows_per_step": rows_per_step(trainer), "seed": args.seed},
            "early_stopping_patience": patience(trainer),
            "prompt": recipe.prompt.model_dump(),
            "rows": _digest(trainer.train_dataset, trainer.eval_dataset),
        }
    )


def of_evaluation(run, split: str, rows, generation, seed: int) -> dict:
    """What the answers of an evaluation depend on: the run, the prompts, the decoding and, if drawn, the seed."""
    prompts = hashlib.sha256("\n".join(map(str, rows["prompt_ids"])).encode()).hexdigest()
    decoding = {k: v for k, v in plain(generation.to_dict()).items() if v is not None and v != GREEDY.get(k)}
    for key in ("pad_token_id", "bos_token_id", "transformers_version"):
        decoding.pop(key, None)
    drawn = {"seed": seed} if generation.do_sample else {}
    return plain(
        {"run": run.name, "split": split, "rows": len(rows), "prompts": prompts, "generation": decoding, **drawn}
    )


def answers_depend_on(run) -> dict:
    """What the answers of an evaluation depend on beside its name: the adapter's weights, versions and the engine."""
    from src.runs import measured

    weights = run.manifest["sha256"]["adapter/adapter_model.safetensors"]
    versions = measured.versions(("torch", "transformers", "peft", "bitsandbytes"))
    return {"adapter": weights, "versions": versions, "code": code("engine/*.py", "qlora.py")}


def code(*patterns: str) -> str:
    """sha256 of the files of src that match, with their names."""
    found, src = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for path in sorted(path for pattern in patterns for path in src.glob(pattern)):
        found.update(f"{path.relative_to(src).as_posix()} {files.sha256_file(path)}\n".encode())
    return found.hexdigest()


def as_trained(recipe, trainer):
    """The recipe with the values of the objects that train, which a cell may have changed.

    What the recipe leaves to the device ("auto", an optimiser that needs CUDA) stays as the recipe says it.
    """
    model, args, rows = trainer.model, trainer.args, rows_per_step(trainer)
    adapter, quantized = model.peft_config["default"], _quantization(model)
    changed = recipe.model_dump()
    changed["seed"], changed["base_model"] = args.seed, base_name(model)
    changed["lora"] = {key: plain(getattr(adapter, key)) for key in changed["lora"]}
    changed["quantization"] |= quantized
    training = changed["training"]
    training |= {key: plain(getattr(args, key)) for key in training if hasattr(args, key)}
    training["eval_steps"] = int(args.eval_steps) if args.eval_strategy == "steps" else None
    training["early_stopping_patience"] = patience(trainer)
    if training["optim"] == usable_optimizer(recipe.training.optim, model.device):
        training["optim"] = recipe.training.optim  # manifest.json says which ran
    size, passes = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
    size, passes = (size, passes) if size * passes == rows else (rows, 1)
    training |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
    return recipes.build(changed)


def published(recipe) -> dict:
    """The recipe as a dictionary in which own files outside of the repository have their names alone."""
    values = recipe.model_dump()
    own = {key: files.public(path) for key, path in values["data"].items() if key.endswith("_file") and path}
    twice = len({*own.values()}) < len(own)
    values["data"] |= {key: f"{key}/{name}" if twice else name for key, name in own.items()}
    return values


def rows_per_step(trainer) -> int:
    """Rows of an optimizer step. The engine's trainer, which regroups passes, says so itself."""
    args = trainer.args
    return getattr(trainer, "rows_per_step", args.per_device_train_batch_size * args.gradient_accumulation_steps)


def patience(trainer) -> int | None:
    """Evaluations without a better loss after which training stops; None for never."""
    waits = [getattr(callback, "early_stopping_patience", None) for callback in trainer.callback_handler.callbacks]
    return next((n for n in waits if n), None)


def usual_dtype(device):
    """The dtype that a device computes best in: bfloat16 (compute capability 8.0 or more), float16, float32 (CPU)."""
    import torch

    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def usable_optimizer(name: str, device) -> str:
    """The optimiser of that name, or plain AdamW where the device is no GPU and the optimiser needs one."""
    needs_cuda = any(word in name for word in ("8bit", "paged", "lion", "ademamix"))
    return "adamw_torch" if needs_cuda and device.type != "cuda" else name


def _quantization(model) -> dict:
    """How the base model was quantised; the dtype it computes in only where that is not the device's usual one."""
    config = getattr(model.config, "quantization_config", None)
    found, dtype = {"load_in_4bit": False}, model.get_input_embeddings().weight.dtype
    if config is not None:
        values = config if isinstance(config, dict) else config.to_dict()
        keys = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        found = {key: values[key] for key in keys if key != "load_in_8bit" or values[key]}
        dtype = values["bnb_4bit_compute_dtype"]
    usual = plain(dtype) == plain(usual_dtype(model.device))
    return found if usual else found | {"bnb_4bit_compute_dtype": plain(dtype)}


def _digest(train, validation) -> dict:
    """Counts of the rows; sha256 of all tokens and labels, of the training rows' ids, and of the first row alone."""
    found = hashlib.sha256()
    for rows in (train, validation):
        for tokens, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            found.update(f"{tokens}{labels}\n".encode())
    first = ids([train[0]["input_ids"], train[0]["labels"]])
    counts = {"train": len(train), "validation": len(validation)}
    return counts | {"sha256": found.hexdigest(), "ids": ids(train["id"]), "first": first}


def ids(values) -> str:
    """sha256 of ids (of rows or tokens), in order."""
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()


def base_name(model) -> str:
    """The base model as a recipe names it: a hub id, or a folder relative to the repository."""
    where = model.config._name_or_path
    return files.relative(Path(where)) if Path(where).is_dir() else where


def base(base_model: str, revision: str) -> str | dict[str, str]:
    """What tells the weights of a loaded base model from others: its hub commit, or sha256 of its folder's files."""
    from huggingface_hub import try_to_load_from_cache

    folder = runs.ROOT / base_model
    if folder.is_dir():
        return {file.name: files.sha256_file(file) for file in sorted(folder.glob("*.safetensors"))}
    return Path(try_to_load_from_cache(base_model, "config.json", revision=revision)).parent.name


def plain(value):
    """The value in JSON's types: sets sorted, enums and dtypes as text, 50.0 as 50."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(part) for part in value)
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    value = getattr(value, "value", value)
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    return str(value).removeprefix("torch.")
