"""What the engine's tests share: a tiny model with an adapter, twelve rows, tiny models of other architectures."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from src import engine, prompts, qlora, recipes

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tiny tensors gain nothing from more threads, which wait for each other on a busy machine: 26 s for 0.4 s."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokenizer(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = "<unk>"
    return tokenizer


@pytest.fixture
def rows(records, tokenizer):
    """Twelve rows: id, input_ids, labels, prompt_ids, prompt_text, answer_text, cut_tokens."""
    named = [{**record, "id": f"{n}-{record['id']}"} for n in range(4) for record in records]
    return prompts.build_all(named, tokenizer, recipes.Prompt())


@pytest.fixture
def quantization():
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


@pytest.fixture
def load(tiny_model, tokenizer, quantization):
    """load(**LoraConfig fields) -> the tiny Mistral in 4 bits with a fresh adapter, the same one every time."""

    def load(**fields):
        base = AutoModelForCausalLM.from_pretrained(
            tiny_model, quantization_config=quantization, dtype=torch.float32, attn_implementation=engine.ATTENTION
        )
        torch.manual_seed(7)
        return with_adapter(qlora.prepare(base, tokenizer, seed=7), **fields)

    return load


def tiny(config_class, **fields):
    """A tiny model of another architecture with random weights, on the engine's attention."""
    names = config_class().to_dict()
    sizes = {name: value for name, value in {**SIZES, **fields}.items() if name in names or name in fields}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**sizes), attn_implementation=engine.ATTENTION)


def with_adapter(base, **fields):
    """A PeftModel with a LoRA adapter on all seven projections, unless `fields` say otherwise."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **fields}
    return get_peft_model(base, LoraConfig(**settings))


def fill(model, scale: float = 0.05, seed: int = 3):
    """Give the adapter random weights and return the model. In a fresh one B is zero, and hides what can go wrong."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def weights_of(model) -> dict[str, torch.Tensor]:
    """Copies of the adapter's weights by name."""
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def pass_tokens(lengths: list[int], packed: bool) -> int:
    """Tokens that a forward pass over rows of these lengths computes, padding included."""
    return sum(lengths) if packed else max(lengths) * len(lengths)


def random_rows(lengths: list[int], vocabulary: int = 64, seed: int = 5) -> list[dict]:
    """Rows of random tokens, the last third of each supervised."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n in lengths:
        ids = torch.randint(3, vocabulary, (n,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100 if i < 2 * n // 3 else t for i, t in enumerate(ids)]})
    return found
