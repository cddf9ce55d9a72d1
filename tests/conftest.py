"""Shared fixtures: a throwaway Mistral of a few thousand parameters, the official Mistral tokenizer."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the default tests use no network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORDS = [
    {
        "id": "0",
        "section": "ALLERGY",
        "dialogue": "Doctor: Any allergies?\nPatient: Yes, to penicillin.",
        "summary": "Allergic to penicillin.",
    },
    {
        "id": "1",
        "section": "MEDICATIONS",
        "dialogue": "Doctor: Do you take anything?\nPatient: No, nothing at all.",
        "summary": "None.",
    },
    {
        "id": "2",
        "section": "CC",
        "dialogue": "Doctor: What brings you in?\nPatient: My left knee hurts.\nDoctor: Since?\nPatient: Two days.",
        "summary": "Left knee pain for two days.",
    },
]


@pytest.fixture
def records():
    return [dict(record) for record in RECORDS]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a randomly initialised two-layer Mistral and a byte-level BPE tokenizer trained on RECORDS."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [" ".join(r.values()) for r in RECORDS], vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def official():
    """mistral-common's official v1 tokenizer, the one of Mistral-7B-v0.1 and Instruct-v0.2."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.v1()


@pytest.fixture(scope="session", params=["always", "first"])
def mistral_tokenizer(request):
    from src import published

    return published.official_tokenizer(request.param)
