"""The base model in 4 bits, its tokenizer, and the adapter on top: loaded the same way on CUDA and on the CPU."""

import gc
import logging
import os
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from src import data, experiments, kernels

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft asks transformers by its old name
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # asks for a package that `load_base` avoids


class ModelError(RuntimeError):
    """A model, tokenizer or device that cannot be had; the message names it and the remedy."""


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` as a torch device. Raises ModelError when the GPU asked for is not there."""
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device is {name!r}: expected auto, cpu, cuda or cuda:<number>.") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ModelError(
            f"device is {name!r}, and this machine shows torch {count} CUDA device(s). Set device to 'auto' or 'cpu', or install a CUDA "
            f"build of torch (this one is {torch.__version__}) and check that nvidia-smi lists the GPU."
        )
    if device.type != "cuda":
        return device
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # passes differ in size: less fragmentation
    return torch.device("cuda", device.index or 0)


def compute_dtype(experiment, device: torch.device) -> torch.dtype:
    """The dtype of activations and matrix products: bfloat16 from compute capability 8.0, float16 below, float32 on a CPU."""
    if experiment.quantization.compute_dtype != "auto":
        return getattr(torch, experiment.quantization.compute_dtype)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def model_source(experiment) -> str:
    """The folder of a local base model, or the hub id as it stands. Raises ModelError for a folder that is not there."""
    name = experiment.base_model
    folder = experiments.ROOT / name
    if folder.is_dir():
        return str(folder)
    if Path(name).is_absolute() or name.startswith((".", "data/", "outputs/")) or name.count("/") > 1:
        raise ModelError(
            f"base_model is {name!r}: expected a folder with config.json and safetensors weights at that path (relative to the repository), "
            "or a model id such as 'mistralai/Mistral-7B-v0.1'."
        )
    return name


def fingerprint(experiment) -> dict[str, str]:
    """sha256 of a local base model's weight files; empty for a hub model, whose commit is recorded instead."""
    folder = experiments.ROOT / experiment.base_model
    return (
        {file.name: experiments.sha256_file(file) for file in sorted(folder.glob("*.safetensors"))}
        if folder.is_dir()
        else {}
    )


def load_tokenizer(experiment):
    """The base model's tokenizer with a pad token that is not EOS (`pad_token`: one it has, or a new [PAD]).

    Nothing here reads a label from padding; but the tokenizer is saved with the adapter, and in transformers' own collator a pad
    that is EOS hides every EOS from the loss.
    """
    from transformers import AutoTokenizer

    with hub_errors(experiment, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            model_source(experiment), revision=experiment.revision, mistral_format=False
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of {experiment.base_model!r} has no EOS token, so no summary could ever end: choose another base_model."
        )
    if experiment.pad_token == "add":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        return tokenizer
    for token in (tokenizer.unk_token, tokenizer.pad_token, tokenizer.bos_token):
        if token not in (None, tokenizer.eos_token):
            tokenizer.pad_token = token
            return tokenizer
    raise ModelError(
        f"pad_token is 'unk', and the tokenizer of {experiment.base_model!r} has no unk, pad or BOS token apart from EOS: set pad_token to 'add'."
    )


def load_base(experiment, tokenizer, device: torch.device | None = None):
    """The frozen base model, quantised while it loads (bitsandbytes NF4 or FP4) and placed on the experiment's device.

    Attention is `kernels.varlen_attention`, which is torch's sdpa wherever rows are not packed. `model.base_commit` holds
    the hub commit it came from (None for a folder).
    """
    import transformers
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = device or resolve_device(experiment.device)
    kernels.register()
    dtype = compute_dtype(experiment, device)
    q = experiment.quantization
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=q.type,
        bnb_4bit_use_double_quant=q.double,
        bnb_4bit_compute_dtype=dtype,
    )
    transformers.utils.logging.disable_progress_bar()  # of the weights, a line a notebook does not need
    with hub_errors(experiment, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            model_source(experiment),
            revision=experiment.revision,
            quantization_config=config if q.bits == 4 else None,
            device_map={"": device},
            dtype=dtype,
            attn_implementation=kernels.NAME,
            use_safetensors=True,
        )
    if not model._supports_sdpa or getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        raise ModelError(
            f"{experiment.base_model} ({type(model).__name__}) has an attention of its own (sinks or soft-capped scores), which torch's sdpa "
            "does not compute: choose another base_model."
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        torch.manual_seed(experiment.seed)  # the new rows are drawn from the old rows' mean and covariance
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Where a CPU has AVX512-BF16, bitsandbytes repacks a layer's weights for good at its first use in eval mode:
            # 16-bit results from then on, and no gradient through the layer, so training after a generation goes wrong.
            module.support_avx512bf16_for_cpu = False
    model.base_commit = getattr(model.config, "_commit_hash", None)
    model.requires_grad_(False)
    return model


def add_adapter(model, experiment):
    """A fresh LoRA adapter on the experiment's target modules: float32 weights, B = 0, so nothing changes before training."""
    from peft import LoraConfig, get_peft_model

    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = [name for name in experiment.lora.target_modules if name not in names]
    if unknown:
        raise ModelError(
            f"lora.target_modules names {', '.join(unknown)}: {experiment.base_model} has the linear layers {', '.join(sorted(names))}."
        )
    torch.manual_seed(experiment.seed)
    config = LoraConfig(
        r=experiment.lora.rank,
        lora_alpha=experiment.lora.alpha,
        lora_dropout=experiment.lora.dropout,
        target_modules=list(experiment.lora.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.run_id = experiment.run_id  # training refuses to file it under another run
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # what training starts from, however often its cell is run
    model.untrained = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    return model


def load_finetuned(experiment, tokenizer):
    """Base model with the run's trained adapter, for generation. `with model.disable_adapter():` gives the base model.

    Raises FileNotFoundError naming notebook 02 when there is no adapter, ModelError when data or base model are no longer those
    that it was trained on, or the hub now serves another commit of the base model.
    """
    from peft import PeftModel

    manifest = experiments.read_json(experiment.run_dir / "manifest.json", "02_train_qlora")
    inputs = manifest["inputs"] and {"data": data.fingerprint(experiment), "base_model": fingerprint(experiment)}
    if inputs != manifest["inputs"]:
        raise ModelError(
            f"The adapter in {experiments.relative(experiment.run_dir)} was trained on other data or another base model: found {inputs}, "
            f"expected {manifest['inputs']}. Put the files back, or delete the folder and train again."
        )
    base = load_base(experiment, tokenizer)
    commit = base.base_commit
    if commit != manifest["base_commit"]:
        raise ModelError(
            f"The adapter in {experiments.relative(experiment.run_dir)} was trained on commit {manifest['base_commit']} of {experiment.base_model}, "
            f"and revision {experiment.revision!r} is now {commit}: delete the folder and train again, with revision set to a commit."
        )
    model = PeftModel.from_pretrained(base, experiment.run_dir / "adapter")
    model.base_commit = commit
    return model.eval()


@torch.no_grad()
def dequantize(model):
    """Replace every 4-bit layer by a plain linear layer holding exactly the values it computes with, in the compute dtype.

    The same function at four times the memory; spares the dequantisation at every step of generation. Works in place.
    """
    import bitsandbytes as bnb

    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit) and not hasattr(module, "base_layer")
    ]
    for name, module in layers:
        parent, _, child = name.rpartition(".")
        weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(module.compute_dtype or weight.dtype), requires_grad=False)
        linear.bias = module.bias
        setattr(model.get_submodule(parent), child, linear)
    layers = module = None
    free_cuda()  # a 4-bit weight and its layer refer to each other: without this its memory would stay taken
    return model


def dequantized_fits(model) -> bool:
    """Whether the 16-bit weights of `dequantize` would take at most 60% of what the device has free (always on a CPU)."""
    if model.device.type != "cuda":
        return True
    states = (getattr(p, "quant_state", None) for p in model.parameters())
    need = sum(2 * state.shape.numel() for state in states if state is not None)
    return need <= 0.6 * free_bytes(model.device)


def free_bytes(device: torch.device) -> float:
    """What this process can still use of a GPU's memory, its own unused reserve included."""
    free, total = torch.cuda.mem_get_info(device)
    limit = total * torch.cuda.get_per_process_memory_fraction(device) - torch.cuda.memory_reserved(device)
    return min(free, limit) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_cuda():
    """Give memory that nothing holds any more back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def count_parameters(model) -> dict[str, int]:
    """Trainable and total parameters; a 4-bit tensor counts the weights it stands for."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return {"trainable": trainable, "total": total}


@contextmanager
def hub_errors(experiment, what: str):
    """Turn the hub's errors into one paragraph: which id, which variable, what to do without a network."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    name = experiment.base_model
    offline = 'Offline alternative: put the model\'s files in a folder and set base_model to it (OVERRIDES = {"base_model": "data/demo/base"} is in the repository).'
    try:
        yield
    except (OSError, ValueError, HfHubHTTPError) as error:
        chain, cause = [], error
        while cause is not None:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        if any(isinstance(e, GatedRepoError) for e in chain) or "gated repo" in str(error):
            token = "is set, so its account lacks access" if os.environ.get("HF_TOKEN") else "is not set"
            raise ModelError(
                f"{name!r} is a gated model and the hub refused its {what}; HF_TOKEN {token}. Accept the licence on the model's page, set HF_TOKEN to a "
                f"read token, run again. {offline}"
            ) from error
        if any(isinstance(e, RepositoryNotFoundError) for e in chain) or "not a valid model identifier" in str(error):
            raise ModelError(
                f"The hub knows no model {name!r} at revision {experiment.revision!r} (or it is private): check base_model and revision, and HF_TOKEN if it is private. {offline}"
            ) from error
        if (
            any(isinstance(e, LocalEntryNotFoundError | OfflineModeIsEnabled) for e in chain)
            or "couldn't connect" in str(error).lower()
        ):
            raise ModelError(
                f"The {what} of {name!r} (revision {experiment.revision!r}) is not in the local cache and the model hub cannot be reached. "
                f"Check the network and HF_HUB_OFFLINE, run again. {offline}"
            ) from error
        raise
