"""Loading: real 4-bit weights, the pad token, errors that say what to do; and that every field of a recipe arrives."""

import shutil
import types
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers

from src import engine, prompts, qlora, recipes, runs, scoring
from src.recipes import Prompt
from tests.cells import BEAMS, CHANGED, SAMPLING, cell

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 5, 9, 30, 31, 32]])


def tiny(tiny_model, overrides=None):
    return recipes.load("demo", {"base_model": str(tiny_model), "device": "cpu", **(overrides or {})})


def base_of(recipe):
    return qlora.load_base(recipe, qlora.load_tokenizer(recipe), CPU)


def adapted(recipe):
    return qlora.load_adapted(recipe, qlora.load_tokenizer(recipe), CPU)


def four_bit_layers(model):
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


# --- the base model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("fp4", False)])
def test_the_base_is_really_four_bit_and_frozen(tiny_model, kind, double):
    fields = {"quantization.bnb_4bit_quant_type": kind, "quantization.bnb_4bit_use_double_quant": double}
    model = base_of(tiny(tiny_model, fields))
    layers = four_bit_layers(model)
    assert len(layers) == 14  # 7 linear layers in each of 2 decoder layers; lm_head stays as it is
    states = [layer.weight.quant_state for layer in layers]
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    assert {state.quant_type for state in states} == {kind} and {state.nested for state in states} == {double}
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == engine.ATTENTION


def test_sixteen_bits_means_no_quantisation(tiny_model):
    fields = {"quantization.load_in_4bit": False, "quantization.bnb_4bit_compute_dtype": "bfloat16"}
    model = base_of(tiny(tiny_model, fields))
    assert four_bit_layers(model) == [] and {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_trainable_parameters_are_those_of_lora(tiny_model):
    # rank 4 on q_proj (64 -> 64) and v_proj (64 -> 32) of two layers: 2 * (4*(64+64) + 4*(64+32)) = 1,792
    model = adapted(tiny(tiny_model, {"lora.r": 4, "lora.target_modules": ["q_proj", "v_proj"]}))
    assert model.get_nb_trainable_parameters()[0] == 1792
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_fresh_adapter_changes_nothing(tiny_model):
    recipe = tiny(tiny_model)
    before = base_of(recipe)(input_ids=IDS).logits
    torch.testing.assert_close(adapted(recipe).eval()(input_ids=IDS).logits, before)


def test_the_first_weights_of_an_adapter_are_the_seeds(tiny_model):
    models = [adapted(tiny(tiny_model, {"seed": seed})) for seed in (1, 1, 2)]
    one, again, other = (next(p for n, p in model.named_parameters() if "lora_A" in n) for model in models)
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_gradients_are_the_same_after_a_generation_in_between(tiny_model):
    # On a CPU with AVX512-BF16, bitsandbytes' own layers lose their gradient at the first forward pass in eval mode.
    model = adapted(tiny(tiny_model))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.02)

    def gradients():
        model.train().zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    with torch.inference_mode():
        model.eval()(input_ids=IDS)
    after = gradients()
    assert len(before) == 28 and all(g.abs().sum() > 0 for g in before.values())
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_layers_are_kept_from_repacking_their_weights(tiny_model, monkeypatch):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)  # the CPU of the test above, on any machine
    assert bnb.nn.Linear4bit(8, 8).support_avx512bf16_for_cpu
    assert not any(layer.support_avx512bf16_for_cpu for layer in four_bit_layers(base_of(tiny(tiny_model))))


def test_an_added_pad_token_gets_the_same_embedding_every_time(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(size)
    model.save_pretrained(folder)
    models = [base_of(tiny(folder, {"pad_token": "add", "seed": seed})) for seed in (1, 1, 2)]
    weights = [model.get_input_embeddings().weight for model in models]
    assert len(weights[0]) == size + 1 and models[0].config.pad_token_id == size
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not any(p.requires_grad for p in models[0].parameters())


def test_an_attention_that_sdpa_does_not_compute_is_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    sizes = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, head_dim=16)).save_pretrained(folder)
    with pytest.raises(qlora.ModelError, match="soft-capped scores.*choose another base_model"):
        base_of(tiny(folder))


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_padding_is_never_eos(tiny_model):
    assert qlora.load_tokenizer(tiny(tiny_model)).pad_token == "<unk>"
    added = qlora.load_tokenizer(tiny(tiny_model, {"pad_token": "add"}))
    assert added.pad_token == "[PAD]" and added.pad_token_id not in (added.eos_token_id, added.unk_token_id)


@pytest.mark.parametrize(
    ("named", "pad"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
        ({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}, "<unk>"),
        ({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}, "<s>"),
        ({"bos_token": "</s>", "eos_token": "</s>"}, None),
    ],
)
def test_without_unk_the_own_pad_token_or_bos_pads_unless_it_is_eos(tiny_model, tmp_path, named, pad):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tokens = transformers.AutoTokenizer.from_pretrained(tiny_model).backend_tokenizer
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, **named).save_pretrained(folder)
    if pad:
        assert qlora.load_tokenizer(tiny(folder)).pad_token == pad
    else:
        with pytest.raises(qlora.ModelError, match="no unk, pad or BOS token apart from EOS: set pad_token to 'add'"):
            qlora.load_tokenizer(tiny(folder))


def test_a_tokenizer_without_eos_is_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tokens = transformers.AutoTokenizer.from_pretrained(tiny_model).backend_tokenizer
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>").save_pretrained(folder)
    with pytest.raises(qlora.ModelError, match="has no EOS token.*choose another base_model"):
        qlora.load_tokenizer(tiny(folder))


def test_a_tokenizer_beside_mistrals_own_file_is_hugging_faces(tiny_model, tmp_path, records):
    import mistral_common

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", folder / "tekken.json")
    tokenizer = qlora.load_tokenizer(tiny(folder))
    assert tokenizer.get_vocab() == qlora.load_tokenizer(tiny(tiny_model)).get_vocab()
    assert len(prompts.build_all(records, tokenizer, Prompt())) == 3


# --- devices, dtypes, optimizers --------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "cuda:7"])
def test_cuda_asked_for_and_absent_is_one_clear_error(name):
    with pytest.raises(qlora.ModelError, match=f"device is '{name}'.*0 CUDA device.*Set device to 'auto' or 'cpu'"):
        qlora.resolve_device(name)


@pytest.mark.parametrize("name", ["mps", "gpu0", "cuda:x", "cuda:-1", "meta", "xpu:0", "", "CPU "])
def test_another_device_is_one_clear_error(name):
    with pytest.raises(qlora.ModelError, match=f"device is '{name}': expected auto, cpu, cuda or cuda:<number>"):
        qlora.resolve_device(name)


def test_a_gpu_beyond_the_last_one_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    found = {name: str(qlora.resolve_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")}
    assert found == {"auto": "cuda:0", "cpu": "cpu", "cuda": "cuda:0", "cuda:1": "cuda:1"}
    with pytest.raises(qlora.ModelError, match="device is 'cuda:7', and this machine shows torch 2 CUDA device"):
        qlora.resolve_device("cuda:7")


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_the_compute_dtype_is_the_devices_best_or_the_recipes(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert qlora.compute_dtype(recipes.load("demo"), torch.device("cuda:0")) == dtype
    assert qlora.compute_dtype(recipes.load("demo"), CPU) == torch.float32
    asked = recipes.load("demo", {"quantization.bnb_4bit_compute_dtype": "float16"})
    assert qlora.compute_dtype(asked, CPU) == torch.float16


def test_optimizers_that_need_cuda_become_adamw_on_a_cpu_and_the_others_stay():
    names = recipes.OPTIMIZERS.__args__
    found = {name: qlora.optimizer(recipes.load("demo", {"training.optim": name}), CPU) for name in names}
    plain = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    assert {name for name in names if found[name] == name} == plain
    assert {found[name] for name in set(names) - plain} == {"adamw_torch"}
    on_gpu = {
        name: qlora.optimizer(recipes.load("demo", {"training.optim": name}), torch.device("cuda")) for name in names
    }
    assert all(name == used for name, used in on_gpu.items())


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_the_optimizers_that_stay_on_a_cpu_can_be_built_there(name):
    args = transformers.TrainingArguments(output_dir="unused", optim=name, use_cpu=True)
    weight = torch.nn.Parameter(torch.ones(4, 4))
    kind, settings = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    weight.sum().backward()
    kind([weight], **settings).step()
    assert (weight != 1).all()


# --- where a base model comes from, and the hub's errors --------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "data/none/base", "outputs/none", "/nowhere/model", "./model", "mistral", "a/b/c"]
)
def test_what_is_neither_folder_nor_model_id_is_named(name):
    with pytest.raises(qlora.ModelError, match=f"base_model is '{name}': expected a folder with config.json"):
        qlora.find_model(name)


def test_a_folder_without_a_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    with pytest.raises(qlora.ModelError, match="base_model is 'mine/model': expected a folder with config.json"):
        qlora.find_model("mine/model")
    (tmp_path / "mine" / "model" / "config.json").write_text("{}", encoding="utf-8")
    assert qlora.find_model("mine/model") == str(tmp_path / "mine" / "model")
    assert qlora.find_model("mistralai/Mistral-7B-v0.1") == "mistralai/Mistral-7B-v0.1"
    assert qlora.find_model("a b/c") == "a b/c"  # has the shape of an id: the hub says what it thinks of it


def load_model(recipe):
    return qlora.load_base(recipe, None, CPU)


LOADERS = {"tokenizer": qlora.load_tokenizer, "configuration": qlora.load_config, "model": load_model}


@pytest.mark.parametrize("what", LOADERS)
def test_an_unreachable_hub_is_explained(what):  # the tests run with HF_HUB_OFFLINE=1
    recipe = recipes.load("demo", {"base_model": "mistralai/Mistral-7B-v0.1", "device": "cpu"})
    with pytest.raises(
        qlora.ModelError, match=f"The {what} of 'mistralai/Mistral-7B-v0.1' .*not in the local cache"
    ) as e:
        LOADERS[what](recipe)
    assert (
        "Offline alternative: put the model's files in a folder and set base_model to it (OVERRIDES = {\"base"
        in str(e.value)
    )


def hub_error(name):
    import huggingface_hub.errors

    response = types.SimpleNamespace(headers={}, request=None, status_code=403)
    return getattr(huggingface_hub.errors, name)("from the hub", response=response)


@pytest.mark.parametrize(
    ("error", "token", "message"),
    [
        ("GatedRepoError", None, "'a/b' is a gated model .*tokenizer; HF_TOKEN is not set. Accept the licence"),
        ("GatedRepoError", "secret", "HF_TOKEN is set, so its account lacks access. Accept the licence"),
        ("RepositoryNotFoundError", None, "hub knows no model 'a/b' at revision 'v2' .*check base_model and revision"),
        ("RevisionNotFoundError", None, "hub knows no model 'a/b' at revision 'v2' .*check base_model and revision"),
    ],
)
def test_what_the_hub_refuses_is_explained(monkeypatch, error, token, message):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(qlora.ModelError, match=message) as refused:
        with qlora.hub_errors("a/b", "v2", "tokenizer"):
            try:
                raise hub_error(error)
            except Exception as cause:
                raise OSError("as transformers raises it") from cause
    assert "secret" not in str(refused.value)


def test_other_errors_pass_through():
    with pytest.raises(OSError, match="^disk full$"), qlora.hub_errors("a/b"):
        raise OSError("disk full")


def test_an_id_that_the_hub_does_not_accept_is_explained():
    with pytest.raises(qlora.ModelError, match="hub knows no model 'a--b/c'.*check base_model"):
        qlora.load_config(recipes.load("demo", {"base_model": "a--b/c"}))


# --- follow every field: the notebooks' own cells ---------------------------------------------------------------------

KEPT_BY_RUNS = {"training.keep_checkpoints"}  # `Run.save` reads it from the recipe


class Recorder:
    """Stands for engine and runs in a cell: keeps the arguments of each call by the function's name."""

    ATTENTION = engine.ATTENTION

    def __init__(self):
        self.calls = {}

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls[name] = (args, kwargs)
            return types.SimpleNamespace(name="a run", minutes=0, folder=Path("."), add_callback=lambda callback: None)

        return call


def executed(recipe):
    """Namespace after the cells of 02 and 03 that turn a recipe into objects; calls of engine and runs are recorded."""
    no_hub = types.SimpleNamespace(**{**vars(qlora), "load_config": lambda recipe: None})
    rows = {"train": ["row"], "validation": types.SimpleNamespace(take=lambda n: f"{n} rows")}
    space = {
        "recipe": recipe,
        "qlora": no_hub,
        "torch": torch,
        "device": CPU,
        "transformers": transformers,
        "REDO": False,
        "NUM_GPUS": 1,
    }
    space |= {"training": recipe.training, "scoring": scoring}
    space |= {
        "engine": Recorder(),
        "runs": Recorder(),
        "prompts": Recorder(),
        "rows": rows,
        "LoraConfig": peft.LoraConfig,
    }
    classes = ("BitsAndBytesConfig", "TrainingArguments", "GenerationConfig")
    space |= {name: getattr(transformers, name) for name in classes}
    space |= dict.fromkeys(("tokenizer", "model", "generation", "plan", "run"))
    for name in ("BitsAndBytesConfig(", "LoraConfig(", "TrainingArguments("):
        exec(cell("02_train_qlora", f"= {name}"), space)
    exec(cell("02_train_qlora", "engine.FastTrainer("), space)
    exec(cell("02_train_qlora", "engine.plan("), space)
    exec(cell("03_evaluate", "= GenerationConfig("), space)
    return space


def arrived(recipe) -> dict:
    """{field: value under its own name in the object that it fills} of a recipe, as the notebooks' cells fill them."""
    space = executed(recipe)
    objects = {"quantization": space["quantization"], "lora": space["lora"], "training": space["arguments"]}
    objects["generation"] = space["generation"]
    plan, trainer = space["engine"].calls["plan"][1], space["engine"].calls["FastTrainer"][1]
    found = {}
    for section in objects:
        for key in getattr(recipe, section).model_dump():
            if hasattr(objects[section], key):
                found[f"{section}.{key}"] = runs.identity.plain(getattr(objects[section], key))
    found |= {f"engine.{key}": value for key, value in plan.items() if key != "ranks"}  # NUM_GPUS
    (found["engine.checkpoint_minutes"],) = space["engine"].calls["TimedCheckpoints"][0]
    taken, _, _, found["training.sample_rows"], score = space["engine"].calls["SampleAnswers"][0]
    if recipe.training.metric_for_best_model == "rougeL":  # then all validation rows are answered and scored
        assert taken is space["rows"]["validation"] and score is scoring.rouge_l
    else:
        assert taken == f"{recipe.training.sample_rows} rows" and score is None
    waiting = [c for c in trainer["callbacks"] if isinstance(c, transformers.EarlyStoppingCallback)]
    found["training.early_stopping_patience"] = waiting[0].early_stopping_patience if waiting else None
    assert trainer["args"] is space["arguments"] and plan["ranks"] == 1
    assert set(plan) <= {"ranks", *type(recipe.engine).model_fields}
    return found


def expected(recipe) -> dict:
    """What should arrive: each field's value, but for the exceptions that the comments give."""
    found = {
        f"{s}.{k}": v for s, part in recipe.model_dump().items() if isinstance(part, dict) for k, v in part.items()
    }
    kept = ("quantization.", "lora.", "training.", "generation.", "engine.")
    found = {key: value for key, value in found.items() if key.startswith(kept) and key not in KEPT_BY_RUNS}
    del found["engine.dequantize"], found["engine.batch_size"]  # 03: tested below
    if found["quantization.bnb_4bit_compute_dtype"] == "auto":
        found["quantization.bnb_4bit_compute_dtype"] = "float32"  # what a CPU does best
    if found["training.optim"] == "paged_adamw_32bit":
        found["training.optim"] = "adamw_torch"  # needs CUDA
    if not found["generation.do_sample"]:  # these act in sampling alone, and transformers warns of them
        found["generation.temperature"] = found["generation.top_p"] = None
    if found["generation.num_beams"] == 1:
        found["generation.length_penalty"] = None  # acts with beams alone
    found["generation.min_new_tokens"] = found["generation.min_new_tokens"] or None  # 0 is none
    return runs.identity.plain(found)


def test_the_changed_values_cover_every_field_and_are_no_default():
    recipe = recipes.load("demo")
    sections = ("quantization", "lora", "training", "generation", "engine")
    defaults = {f"{s}.{key}": value for s in sections for key, value in getattr(recipe, s).model_dump().items()}
    assert set(CHANGED) == set(defaults) and not [key for key in CHANGED if CHANGED[key] == defaults[key]]


@pytest.mark.parametrize("name", recipes.names())
def test_every_field_of_a_recipe_arrives_under_its_own_name(name):
    recipe = recipes.load(name)
    found = arrived(recipe)
    assert found == expected(recipe) and len(found) == 4 + 4 + 15 + 10 + 8


@pytest.mark.parametrize("excluded", [BEAMS, SAMPLING])  # beams and sampling exclude each other
def test_every_override_arrives_under_its_own_name(excluded):
    recipe = recipes.load("demo", {key: value for key, value in CHANGED.items() if key not in excluded})
    found, wanted = arrived(recipe), expected(recipe)
    assert found == wanted
    tested = {key for key in found if found[key] == runs.identity.plain(CHANGED[key])}
    assert tested == set(CHANGED) - set(excluded) - KEPT_BY_RUNS - {"engine.dequantize", "engine.batch_size"}


@pytest.mark.parametrize(("steps", "when"), [(None, "epoch"), (9, "steps")])
def test_evaluations_and_checkpoints_come_together(steps, when):
    recipe = recipes.load("demo", {"training.eval_steps": steps, "seed": 7, "training.max_steps": 20})
    arguments = executed(recipe)["arguments"]
    assert (arguments.eval_strategy, arguments.save_strategy, arguments.eval_steps) == (when, when, steps)
    assert steps is None or arguments.save_steps == steps
    assert arguments.seed == 7 and arguments.save_total_limit == 2 and not (arguments.bf16 or arguments.fp16)
    assert arguments.load_best_model_at_end and arguments.metric_for_best_model in ("loss", "eval_loss")
    assert arguments.greater_is_better is False and arguments.report_to in ("none", [])
    rouge = recipes.load("demo", {"training.metric_for_best_model": "rougeL"})
    assert executed(rouge)["arguments"].greater_is_better is True


def test_the_generation_settings_of_src_are_those_of_03s_cell():
    changed = {key: value for key, value in CHANGED.items() if key.startswith("generation.")}
    for excluded in (BEAMS, SAMPLING, changed):  # beams, sampling, and neither
        recipe = recipes.load("demo", {key: value for key, value in changed.items() if key not in excluded})
        own, cells = (g.to_dict() for g in (qlora.generation_config(recipe), executed(recipe)["generation"]))
        assert {k: v or None for k, v in own.items()} == {k: v or None for k, v in cells.items()}


@pytest.mark.parametrize(("dtype", "flags"), [("bfloat16", (True, False)), ("float16", (False, True))])
def test_mixed_precision_follows_the_compute_dtype(dtype, flags):
    space = executed(recipes.load("demo", {"quantization.bnb_4bit_compute_dtype": dtype}))
    assert (space["arguments"].bf16, space["arguments"].fp16) == flags
    assert space["quantization"].bnb_4bit_compute_dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("wanted", "fits", "done"),
    [("on", False, True), ("off", True, False), ("auto", True, True), ("auto", False, False)],
)
def test_how_03_decodes_follows_the_engine_section(wanted, fits, done):
    calls, answers = [], []
    fake = types.SimpleNamespace(dequantized_fits=lambda model: fits, dequantize=calls.append)
    fake.generate = lambda *args, **settings: answers.append(settings) or []
    model = types.SimpleNamespace(disable_adapter=lambda: __import__("contextlib").nullcontext())
    loader = types.SimpleNamespace(load_finetuned=lambda *args: model)
    recipe = recipes.load("demo", {"engine.dequantize": wanted, "engine.batch_size": 13, "seed": 5})
    space = {"qlora": loader, "engine": fake, "recipe": recipe, "run": None, "tokenizer": None, "rows": None}
    space |= {"generation": None, "records": {"evaluation": []}, "NUM_GPUS": 1}
    space["evaluation"] = types.SimpleNamespace(
        answered=False, keep=lambda system: system, save_predictions=lambda *args: None
    )
    exec(cell("03_evaluate", "engine.dequantize(model)"), space)
    exec(cell("03_evaluate", "disable_adapter"), space)
    assert calls == ([model] if done else [])
    assert [(a["seed"], a["batch_size"]) for a in answers] == [(5, 13), (5, 13)]


@pytest.mark.parametrize("four_bit", [True, False])
def test_the_cells_of_02_load_the_model_that_03_loads(tiny_model, four_bit):
    recipe = tiny(tiny_model, {"quantization.load_in_4bit": four_bit})
    space = executed(recipe)
    space |= {"AutoModelForCausalLM": transformers.AutoModelForCausalLM, "tokenizer": qlora.load_tokenizer(recipe)}
    space |= {"get_peft_model": peft.get_peft_model}
    exec(cell("02_train_qlora", "AutoModelForCausalLM.from_pretrained("), space)
    loaded, again = space["base"], base_of(recipe)
    assert len(four_bit_layers(loaded)) == (14 if four_bit else 0)
    assert loaded.config.to_dict() == again.config.to_dict()
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), again.parameters(), strict=True))
    exec(cell("02_train_qlora", "get_peft_model(base"), space)
    assert space["model"].peft_config["default"] is space["lora"]


def test_the_hub_is_asked_for_the_recipes_model_and_revision(monkeypatch):
    asked = []

    def fail(name, **settings):
        asked.append((name, settings["revision"]))
        raise OSError("stop here")

    for kind in ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", fail)
    recipe = recipes.load("demo", {"base_model": "a/b", "revision": "v2", "device": "cpu"})
    space = executed_until_model(recipe)
    for load in (*LOADERS.values(), lambda _: exec(cell("02_train_qlora", "AutoModelForCausalLM.from_pre"), space)):
        with pytest.raises(OSError, match="stop here"):
            load(recipe)
    assert asked == [("a/b", "v2")] * 4


def executed_until_model(recipe):
    space = {"recipe": recipe, "qlora": qlora, "torch": torch, "device": CPU, "engine": Recorder(), "tokenizer": None}
    space |= {"BitsAndBytesConfig": transformers.BitsAndBytesConfig}
    space |= {"AutoModelForCausalLM": transformers.AutoModelForCausalLM}
    exec(cell("02_train_qlora", "= BitsAndBytesConfig("), space)
    return space
