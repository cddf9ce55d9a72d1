"""Loading: real 4-bit weights, the pad token, and errors that say what to do."""

import shutil
import types
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers

from src import experiments, modeling, planner, prompts
from src.experiments import Prompt


def experiment(tiny_model, **overrides):
    return experiments.load_experiment("demo", **{"base_model": str(tiny_model), "device": "cpu", **overrides})


def test_the_base_is_really_four_bit_and_frozen(tiny_model):
    e = experiment(tiny_model)
    model = modeling.load_base(e, modeling.load_tokenizer(e))
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and all(
        m.weight.dtype == torch.uint8 and m.weight.quant_state.quant_type == "nf4" for m in layers
    )
    assert not any(p.requires_grad for p in model.parameters())


def test_trainable_parameters_are_those_of_lora(tiny_model):
    # rank 4 on q_proj (64 -> 64) and v_proj (64 -> 32) of two layers: 2 * (4*(64+64) + 4*(64+32)) = 1,792
    e = experiment(tiny_model, **{"lora.rank": 4, "lora.target_modules": ["q_proj", "v_proj"]})
    model = modeling.add_adapter(modeling.load_base(e, modeling.load_tokenizer(e)), e)
    assert modeling.count_parameters(model)["trainable"] == 1792
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_fresh_adapter_changes_nothing(tiny_model):
    e = experiment(tiny_model)
    tokenizer = modeling.load_tokenizer(e)
    ids = torch.tensor([[1, 5, 9, 30]])
    base = modeling.load_base(e, tokenizer)
    before = base(input_ids=ids).logits
    torch.testing.assert_close(modeling.add_adapter(base, e).eval()(input_ids=ids).logits, before)


@pytest.mark.parametrize("double", [True, False])
def test_dequantized_weights_compute_the_same_function(tiny_model, double):
    e = experiment(tiny_model, **{"quantization.double": double})
    tokenizer = modeling.load_tokenizer(e)
    model = modeling.add_adapter(modeling.load_base(e, tokenizer), e).eval()
    ids = torch.tensor([[1, 5, 9, 30, 31, 32]])
    before = model(input_ids=ids).logits
    modeling.dequantize(model)
    assert not any(isinstance(m, bnb.nn.Linear4bit) and not hasattr(m, "base_layer") for m in model.modules())
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_same_after_a_generation_in_between(tiny_model):
    # On a CPU with AVX512-BF16, bitsandbytes' own layers lose their gradient at the first forward pass in eval mode.
    e = experiment(tiny_model)
    model = modeling.add_adapter(modeling.load_base(e, modeling.load_tokenizer(e)), e)
    ids = torch.tensor([[1, 5, 9, 30, 31, 32]])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.02)

    def gradients():
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    with torch.inference_mode():
        model.eval()(input_ids=ids)
    after = gradients()
    assert len(before) == 28 and all(g.abs().sum() > 0 for g in before.values())
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_sixteen_bits_means_no_quantisation(tiny_model):
    e = experiment(tiny_model, **{"quantization.bits": 16})
    model = modeling.load_base(e, modeling.load_tokenizer(e))
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())
    assert modeling.dequantize(model) is model  # nothing to do, and no error: 03 asks for it


def test_dequantising_twice_is_dequantising_once(tiny_model):
    e = experiment(tiny_model)
    model = modeling.dequantize(modeling.load_base(e, modeling.load_tokenizer(e)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in modeling.dequantize(model).named_parameters())


def test_padding_is_never_eos(tiny_model):
    assert modeling.load_tokenizer(experiment(tiny_model)).pad_token == "<unk>"
    added = modeling.load_tokenizer(experiment(tiny_model, pad_token="add"))
    assert added.pad_token == "[PAD]" and added.pad_token_id not in (added.eos_token_id, added.unk_token_id)


@pytest.mark.parametrize(("bos", "pad"), [("<s>", "<s>"), ("</s>", None)])
def test_without_unk_bos_is_the_pad_token_unless_it_is_eos(tiny_model, tmp_path, bos, pad):
    tokens = transformers.AutoTokenizer.from_pretrained(tiny_model).backend_tokenizer
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token=bos, eos_token="</s>").save_pretrained(
        shutil.copytree(tiny_model, tmp_path / "model")
    )
    if pad:
        assert modeling.load_tokenizer(experiment(tmp_path / "model")).pad_token == pad
    else:
        with pytest.raises(
            modeling.ModelError, match="no unk, pad or BOS token apart from EOS: set pad_token to 'add'"
        ):
            modeling.load_tokenizer(experiment(tmp_path / "model"))


def test_a_tokenizer_beside_mistrals_own_file_is_hugging_faces(tiny_model, tmp_path, records):
    import mistral_common

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", folder / "tekken.json")
    tokenizer = modeling.load_tokenizer(experiment(folder))
    assert tokenizer.get_vocab() == modeling.load_tokenizer(experiment(tiny_model)).get_vocab()
    assert prompts.build_all(records, tokenizer, Prompt())


def test_an_attention_that_sdpa_does_not_compute_is_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    sizes = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, head_dim=16)).save_pretrained(folder)
    e = experiment(folder)
    with pytest.raises(modeling.ModelError, match="soft-capped scores.*choose another base_model"):
        modeling.load_base(e, modeling.load_tokenizer(e))


def test_a_model_without_linear_layers_is_refused_before_it_is_loaded(tmp_path):
    transformers.GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(modeling.ModelError, match="GPT2LMHeadModel. has no linear layers"):
        planner.shapes(experiment(tmp_path))


def test_an_unknown_target_module_names_the_known_ones(tiny_model):
    e = experiment(tiny_model, **{"lora.target_modules": ["query"]})
    with pytest.raises(modeling.ModelError, match="names query: .* has the linear layers down_proj, gate_proj"):
        modeling.add_adapter(modeling.load_base(e, modeling.load_tokenizer(e)), e)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_asked_for_and_absent_is_one_clear_error(name):
    with pytest.raises(modeling.ModelError, match=f"device is '{name}'.*0 CUDA device.*Set device to 'auto' or 'cpu'"):
        modeling.resolve_device(name)


def test_a_device_that_is_none_is_an_error():
    with pytest.raises(modeling.ModelError, match="expected auto, cpu, cuda"):
        modeling.resolve_device("gpu0")


def test_a_missing_folder_is_named(tiny_model):
    with pytest.raises(modeling.ModelError, match="base_model is 'data/none/base'.*config.json"):
        modeling.model_source(experiment(tiny_model, base_model="data/none/base"))


def raised(monkeypatch, error):
    from transformers import AutoTokenizer

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)


def hub_error(kind, message):
    response = types.SimpleNamespace(headers={}, request=None, status_code=403)
    return kind(message, response=response)


def test_an_unreachable_hub_is_explained(tiny_model):
    e = experiment(tiny_model, base_model="mistralai/Mistral-7B-v0.1")  # the tests run with HF_HUB_OFFLINE=1
    with pytest.raises(modeling.ModelError, match="Mistral-7B-v0.1.*not in the local cache.*Offline alternative"):
        modeling.load_tokenizer(e)


def test_a_gated_model_is_explained(tiny_model, monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    monkeypatch.delenv("HF_TOKEN", raising=False)
    raised(monkeypatch, hub_error(GatedRepoError, "gated"))
    with pytest.raises(modeling.ModelError, match="gated model.*HF_TOKEN is not set.*Accept the licence"):
        modeling.load_tokenizer(experiment(tiny_model, base_model="mistralai/Mistral-7B-v0.1"))


def test_an_unknown_model_is_explained(tiny_model, monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    raised(monkeypatch, hub_error(RepositoryNotFoundError, "404"))
    with pytest.raises(modeling.ModelError, match="hub knows no model 'nobody/nothing'"):
        modeling.load_tokenizer(experiment(tiny_model, base_model="nobody/nothing"))
