"""The base model in 4 bits and its tokenizer, loaded in one way on CUDA and a CPU; the hub's errors in plain words."""

import logging
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from src import data, engine, prompts, runs
from src.runs import identity


class ModelError(RuntimeError):
    """A model, tokenizer or device that cannot be had. The message names it and the remedy."""


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` as a torch device; each process of torchrun has a GPU of its own.

    Raises ModelError when the GPU asked for is not there.
    """
    own = int(os.environ.get("LOCAL_RANK", 0))
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ModelError(f"device is {name!r}: expected auto, cpu, cuda or cuda:<number>.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = own if device.index is None else device.index
    if device.type == "cuda" and index >= count:
        asked = f"cuda:{index}" if own else name  # a process of torchrun takes the GPU of its own number
        raise ModelError(
            f"device is {asked!r}, and this machine shows torch {count} CUDA device(s). Set device to 'auto' or 'cpu', "
            f"or install a CUDA build of torch (this is {torch.__version__}) and check that nvidia-smi lists the GPU."
        )
    if device.type == "cpu":
        return device
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # passes differ in size: less fragmentation
    return torch.device("cuda", index)


def compute_dtype(recipe, device: torch.device) -> torch.dtype:
    """The dtype of activations and matrix products: the recipe's, or what the device computes best in."""
    name = recipe.quantization.bnb_4bit_compute_dtype
    return identity.usual_dtype(device) if name == "auto" else getattr(torch, name)


def optimizer(recipe, device: torch.device) -> str:
    """The recipe's optimiser; one that needs CUDA becomes plain AdamW on a CPU, and the run records which ran."""
    return identity.usable_optimizer(recipe.training.optim, device)


def find_model(name: str) -> str:
    """The folder of a local base model, or the hub id as it stands. Raises ModelError where there is no such folder."""
    folder = runs.ROOT / name
    if (folder / "config.json").is_file():
        return str(folder)
    is_path = Path(name).is_absolute() or name.startswith((".", "data/", "outputs/"))
    if name in data.packaged():
        raise ModelError(f"The base model {name} is not there yet: run notebooks/01_prepare_data.ipynb first.")
    if folder.is_dir() or is_path or name.count("/") != 1:
        raise ModelError(
            f"base_model is {name!r}: expected a folder with config.json and safetensors weights at that path "
            "(relative to the repository), or a model id such as 'mistralai/Mistral-7B-v0.1'."
        )
    return name


def load_tokenizer(recipe):
    """The base model's tokenizer with a pad token that is not EOS (`pad_token`: one it has, or a new [PAD]).

    Nothing here reads a label from padding. But the tokenizer is saved with the adapter, and in transformers' own
    collator a pad that is EOS hides every EOS from the loss.
    """
    with hub_errors(recipe.base_model, recipe.revision, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            find_model(recipe.base_model), revision=recipe.revision, mistral_format=False
        )
    if recipe.revision == "main" and not Path(find_model(recipe.base_model)).is_dir():
        print(
            f"Warning: revision is 'main' of {recipe.base_model!r}, which may be another model tomorrow: set it to a "
            "commit of its page.",
            file=sys.stderr,
        )
    tokenizer.model_max_length = 10**9  # prompts are cut by recipe.prompt.max_tokens, and counted
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{recipe.base_model!r} has no EOS token, so no summary could end: choose another base_model.")
    if recipe.pad_token == "add":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        return tokenizer
    for token in (tokenizer.unk_token, tokenizer.pad_token, tokenizer.bos_token):
        if token not in (None, tokenizer.eos_token):
            tokenizer.pad_token = token
            return tokenizer
    raise ModelError(
        f"pad_token is 'unk', and the tokenizer of {recipe.base_model!r} has no unk, pad or BOS token apart from EOS: "
        "set pad_token to 'add'."
    )


def load_config(recipe):
    """The base model's configuration, without its weights."""
    with hub_errors(recipe.base_model, recipe.revision, "configuration"):
        return AutoConfig.from_pretrained(find_model(recipe.base_model), revision=recipe.revision)


def load_base(recipe, tokenizer, device: torch.device, quantization: BitsAndBytesConfig | None = None):
    """The frozen base model, quantised while it loads, ready for an adapter. 02 does the same in its cells.

    `quantization`: the recipe's where it is left out.
    """
    quantization = quantization or quantization_config(recipe, device)
    with hub_errors(recipe.base_model, recipe.revision, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            find_model(recipe.base_model),
            revision=recipe.revision,
            quantization_config=quantization if quantization.load_in_4bit else None,
            dtype=quantization.bnb_4bit_compute_dtype,
            device_map={"": device},
            attn_implementation=engine.ATTENTION,
            use_safetensors=True,
        )
    return prepare(model, tokenizer, recipe.seed)


def load_adapted(recipe, tokenizer, device: torch.device) -> PeftModel:
    """The base model with a fresh adapter, whose first weights are drawn from the recipe's seed."""
    transformers.set_seed(recipe.seed)
    lora = LoraConfig(task_type="CAUSAL_LM", **recipe.lora.model_dump())
    return get_peft_model(load_base(recipe, tokenizer, device), lora)


def training_arguments(recipe, device: torch.device, **settings) -> transformers.TrainingArguments:
    """The recipe's [training], and other settings, as transformers' TrainingArguments; 02 writes them out."""
    dtype = compute_dtype(recipe, device)
    return transformers.TrainingArguments(
        output_dir="outputs", seed=recipe.seed, optim=optimizer(recipe, device), disable_tqdm=True,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=device.type == "cpu",
        **recipe.training.arguments(), **settings,
    )  # fmt: skip


def quantization_config(recipe, device: torch.device) -> BitsAndBytesConfig:
    """The recipe's [quantization] as transformers' BitsAndBytesConfig; load_in_4bit=False means no quantisation."""
    dtype = {"bnb_4bit_compute_dtype": compute_dtype(recipe, device)}
    return BitsAndBytesConfig(**recipe.quantization.model_dump() | dtype)


def generation_config(recipe) -> GenerationConfig:
    """The recipe's [generation] as transformers' GenerationConfig; 03 writes the same out."""
    settings = recipe.generation.model_dump()
    unused = () if settings["do_sample"] else ("temperature", "top_p")
    unused += () if settings["num_beams"] > 1 else ("length_penalty",)
    return GenerationConfig(**{key: None if key in unused else value for key, value in settings.items()})


def prepare(model, tokenizer, seed: int):
    """Freeze a loaded base model, and make room for the tokenizer's added tokens. Returns the model.

    Raises ModelError for an attention that torch's sdpa does not compute.
    """
    if not model._supports_sdpa or getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        raise ModelError(
            f"{model.config._name_or_path} ({type(model).__name__}) has an attention of its own (sinks or soft-capped "
            "scores), which torch's sdpa does not compute: choose another base_model."
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        torch.manual_seed(seed)  # the new rows are drawn from the old rows' mean and covariance
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Where a CPU has AVX512-BF16, bitsandbytes repacks a layer's weights for good at its first use in eval
            # mode: 16-bit results from then on, and no gradient through the layer, so training after a generation
            # goes wrong.
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    return model


def load_finetuned(run, recipe, tokenizer):
    """The run's base model with its trained adapter. `with model.disable_adapter():` gives the base model.

    Raises RunError, before weights are loaded, when the adapter's files, the data or the base model are not the run's.
    """
    adapter, values, manifest = run.check().adapter, run.config["identity"], run.manifest
    train, processed = data.train_rows(recipe), data.fingerprint(recipe)
    load_config(recipe)  # from here on it is in the cache, by which a hub model's commit is known
    first = prompts.build_all(train[:1], tokenizer, recipe.prompt, train)[0]
    compared = {  # what: (found, expected)
        "processed data": (processed, manifest["data"] or processed),
        "training rows": (identity.ids(row["id"] for row in train), values["rows"]["ids"]),
        "prompt": (identity.ids([first["input_ids"], first["labels"]]), values["rows"]["first"]),
        "base model": (identity.base(recipe.base_model, recipe.revision), values["base"]),
    }
    for what, (found, expected) in compared.items():
        if found != expected:
            raise runs.RunError(
                f"{run.name} was trained with another {what}: found {found}, expected {expected}. Put the files back "
                "and run 01 again. Rows and prompts that were changed by hand in 02 cannot be found again here: set "
                "them in OVERRIDES there."
            )
    base = load_base(recipe, tokenizer, resolve_device(recipe.device))
    return PeftModel.from_pretrained(base, adapter).eval()


def quiet():
    """Silence what a notebook does not need: progress bars of weights, and two warnings about what is handled here."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft asks by transformers' old name
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # asks for a package `prepare` avoids


@contextmanager
def hub_errors(name: str, revision: str = "main", what: str = "model"):
    """Turn the hub's errors into one paragraph: which id, which variable, what to do without a network."""
    from huggingface_hub import errors as hub

    try:
        yield
    except (OSError, ValueError, hub.HfHubHTTPError) as error:
        chain = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)

        def caused_by(*kinds):
            return any(isinstance(e, kinds) for e in chain)

        unreachable = caused_by(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)
        if caused_by(hub.GatedRepoError) or "gated repo" in str(error):
            token = "is set, so its account lacks access" if os.environ.get("HF_TOKEN") else "is not set"
            message = (
                f"{name!r} is a gated model and the hub refused its {what}; HF_TOKEN {token}. Accept the licence on "
                "the model's page, set HF_TOKEN to a read token, run again."
            )
        elif caused_by(hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError):
            message = (
                f"The hub knows no model {name!r} at revision {revision!r} (or it is private): check base_model and "
                "revision, and HF_TOKEN if it is private."
            )
        elif unreachable or "couldn't connect" in str(error).lower():
            message = (
                f"The {what} of {name!r} (revision {revision!r}) is not in the local cache and the model hub cannot be "
                "reached. Check the network and HF_HUB_OFFLINE, run again."
            )
        else:
            raise
        raise ModelError(
            f"{message} Offline alternative: put the model's files in a folder and set base_model to it "
            '(OVERRIDES = {"base_model": "data/demo/base"} is in the repository).'
        ) from error
