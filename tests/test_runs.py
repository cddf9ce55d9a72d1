"""Runs: what their names are made of, what is refused, locked and found again, and files that are written whole."""

import dataclasses
import gc
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import GenerationConfig

from src import data, engine, prompts, qlora, recipes, runs
from src.recipes import RecipeError
from src.runs import RunError, identity, measured
from tests.cells import BEAMS, CHANGED, SAMPLING, cell, demo_rows

OVERRIDES = {
    "base_model": "models/tiny", "device": "cpu", "training.max_steps": 2, "training.eval_steps": 1,
    "training.per_device_train_batch_size": 4, "generation.max_new_tokens": 4,
}  # fmt: skip
GREEDY = GenerationConfig(max_new_tokens=4)
ROOT = runs.ROOT


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_model):
    """A repository with the tiny model and the demo's first rows (12, 3 and 4), prepared as 01 does it."""
    root = tmp_path_factory.mktemp("repository")
    folder = shutil.copytree(tiny_model, root / "models" / "tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}{{ ':' }}"
    )
    tokenizer.save_pretrained(folder)
    demo_rows(root, {"train": 12, "validation": 3, "test": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "ROOT", root)
        assert data.prepare(recipes.load("demo"))["rows"] == {"train": 12, "validation": 3, "test": 4}
    return root


@pytest.fixture(scope="module", autouse=True)
def fast():
    """Skip the plan's timing of this machine, the walk over all imports when memory is freed, and threads."""
    gc.freeze()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tiny model gains nothing from more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.planning, "matmul_rate", lambda device, dtype: 1e11)
        yield
    torch.set_num_threads(threads)
    gc.unfreeze()


@pytest.fixture
def root(prepared, tmp_path, monkeypatch):
    """A copy of `prepared` that a test may change."""
    folder = shutil.copytree(prepared, tmp_path / "repository")
    monkeypatch.setattr(runs, "ROOT", folder)
    monkeypatch.chdir(folder)  # as the notebooks' first cell does
    yield folder
    for run in (folder / "outputs").glob("*"):
        runs.Run(run.name).unlock()


def opened(overrides=None, edits=None, rows=None, plain=False):
    """Execute 02's cells up to the run that they open. Returns their namespace.

    edits: {word in a cell: (pattern, replacement)}: what a reader changes there. rows: changes the rows by hand.
    plain: transformers' own Trainer over the same objects, instead of the engine's.
    """
    space = {"RECIPE": "demo", "OVERRIDES": OVERRIDES | (overrides or {}), "NUM_GPUS": 1, "EXAMPLE_ROW": 0}

    def execute(*words):
        source = cell("02_train_qlora", *words)
        for word, (pattern, replacement) in (edits or {}).items():
            if word in source:
                assert re.search(pattern, source), (word, pattern)
                source = re.sub(pattern, replacement, source, count=1)
        exec(source, space)

    execute("recipes.load(RECIPE")
    execute("qlora.load_tokenizer(recipe)")
    if rows:
        rows(space)
    for words in ("= BitsAndBytesConfig(", "= LoraConfig(", "= TrainingArguments(", "engine.plan("):
        execute(words)
    execute("AutoModelForCausalLM.from_pretrained(")
    execute("get_peft_model(base")
    space["generation"] = GREEDY
    if plain:
        space["trainer"] = transformers.Trainer(
            space["model"], space["arguments"],
            transformers.DataCollatorForSeq2Seq(space["tokenizer"]),
            space["rows"]["train"], space["rows"]["validation"], space["tokenizer"],
        )  # fmt: skip
        template = prompts.template(space["tokenizer"], space["recipe"].prompt)
        space["run"] = runs.open(space["recipe"], space["trainer"], template)
    else:
        execute("engine.FastTrainer(")
    return space


def finish(space, train=True):
    """Execute 02's training cell; without `train`, save the adapter as it is. Returns the run."""
    if train:
        exec(cell("02_train_qlora", "trainer.train("), space)
    else:
        space["run"].save(space["trainer"], space["tokenizer"], data.fingerprint(space["recipe"]))
    return space["run"]


def name(*args, **kwargs):
    return opened(*args, **kwargs)["run"].name


def scored(run, overrides=None, edit=None):
    """Execute 03's cells up to the evaluation that they open. Returns it."""
    recipe = run.recipe(overrides)
    tokenizer = qlora.load_tokenizer(recipe)
    records = data.load(recipe)
    rows = prompts.build_all(records["evaluation"], tokenizer, recipe.prompt, records["train"])
    space = {"recipe": recipe, "run": run, "rows": rows, "runs": runs, "GenerationConfig": GenerationConfig}
    space["REDO"] = False
    source = cell("03_evaluate", "= GenerationConfig(")
    exec(source.replace("GenerationConfig(\n", f"GenerationConfig(\n    {edit},\n", 1) if edit else source, space)
    return space["evaluation"]


# --- what a run's name is made of -------------------------------------------------------------------------------------

TRAINED = {k: v for k, v in CHANGED.items() if k.startswith(("quantization.", "lora.", "training."))}
TRAINED = {k: v for k, v in TRAINED.items() if k not in ("training.sample_rows", "training.keep_checkpoints")}
TRAINED |= {
    "prompt.style": "chat", "prompt.instruction": "Summarise: {section}", "prompt.cue": "Note:",
    "prompt.max_tokens": 600, "prompt.few_shot": 1, "pad_token": "add", "seed": 43,
    "data.train_rows": 11, "data.validation_rows": 2,
}  # fmt: skip
NOT_TRAINED = {key: value for key, value in CHANGED.items() if key.startswith(("generation.", "engine."))}
NOT_TRAINED |= {
    "evaluation.split": "validation",
    "evaluation.rows": 1,
    "device": "auto",
    "evaluation.bertscore_model": "some/model",
}
NOT_TRAINED |= {"training.sample_rows": 5, "training.keep_checkpoints": True}
TRAINED_ON_A_GPU = {"engine.fp8": NOT_TRAINED.pop("engine.fp8")}


def test_the_tables_here_cover_every_field():
    recipe = recipes.load("demo").model_dump()
    fields = {f"{s}.{key}" for s, part in recipe.items() if isinstance(part, dict) for key in part}
    left = {key for key in fields - {*TRAINED, *NOT_TRAINED, *TRAINED_ON_A_GPU} if not key.startswith("data.")}
    assert left == set() and not set(TRAINED) & set(NOT_TRAINED)  # of data, the rows themselves count


@pytest.fixture(scope="module")
def variants(prepared, tmp_path_factory):
    """{field: (name, recipe in config.json)} of the run that an override of that field opens; None: without one."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("variants") / "repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "ROOT", folder)
        found = {key: opened({key: value} if key else None)["run"] for key, value in {None: None, **TRAINED}.items()}
        return {key: (run.name, run.config["recipe"]) for key, run in found.items()}


@pytest.fixture
def usual(variants):
    """The name of the run without any change."""
    return variants[None][0]


def test_everything_that_training_depends_on_changes_the_name(variants, usual):
    assert re.fullmatch("demo-[0-9a-f]{8}", usual)
    assert [key for key in TRAINED if variants[key][0] == usual] == []
    assert len({run for run, _ in variants.values()}) == len(variants) == len(TRAINED) + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="device auto is another machine's there")
@pytest.mark.parametrize("excluded", [BEAMS, SAMPLING])  # beams and sampling exclude each other
def test_nothing_else_changes_the_name(root, usual, excluded):
    assert name({key: value for key, value in NOT_TRAINED.items() if key not in excluded}) == usual
    assert name() == usual


def test_products_in_8_bits_are_another_run(root, usual):
    space = opened()
    trainer = space["trainer"]
    trainer.plan = dataclasses.replace(trainer.plan, fp8=True)
    assert runs.open(space["recipe"], trainer, "").name != usual == space["run"].name


def test_rows_of_a_step_count_and_not_how_they_are_written(root, usual):
    once = {"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 2}
    assert name(once) == usual != name({"training.gradient_accumulation_steps": 2})


def without_a_row(space):
    space["rows"]["train"] = space["rows"]["train"].select(range(11))


def in_another_order(space):
    space["rows"]["train"] = space["rows"]["train"].select([1, 0, *range(2, 12)])


def with_another_word(space):
    records = [dict(record) for record in space["records"]["train"]]
    records[5]["dialogue"] += " Really."
    space["rows"]["train"] = prompts.build_all(records, space["tokenizer"], space["recipe"].prompt)


def with_another_summary(space):
    records = [dict(record) for record in space["records"]["validation"]]
    records[2]["summary"] = "Nothing."
    space["rows"]["validation"] = prompts.build_all(records, space["tokenizer"], space["recipe"].prompt)


def with_another_prompt(space):
    config = space["recipe"].prompt.model_copy(update={"instruction": "Something else."})
    space["rows"]["train"] = prompts.build_all(space["records"]["train"], space["tokenizer"], config)


BY_HAND = (without_a_row, in_another_order, with_another_word, with_another_summary, with_another_prompt)


def test_rows_and_prompts_changed_by_hand_are_another_run(root, usual):
    names = [usual, *(name(rows=change) for change in BY_HAND)]
    assert len(set(names)) == 6


EDITS = [key for key in TRAINED if key.startswith(("lora.", "training.", "quantization.", "seed"))]


def edit_of(key, value):
    """The edit of 02's own cell that sets a field of a recipe by hand."""
    section, _, field = key.rpartition(".")
    word = {"lora": "= LoraConfig(", "quantization": "= BitsAndBytesConfig("}.get(section, "= TrainingArguments(")
    if field == "early_stopping_patience":
        return {
            "EarlyStoppingCallback(": (r"if training[^\n]*\n(.*)training\.early\S+\)", rf"if True:\n\g<1>{value}))")
        }
    if field == "bnb_4bit_compute_dtype":
        return {word: (r"dtype = [^\n]+", f"dtype = torch.{value}")}
    if field == "eval_steps":  # checkpoints come with evaluations
        return {
            word: (r"eval_steps=.*\n(.*)\n *save_steps=.*", rf"eval_steps={value},\n\g<1>\n    save_steps={value},")
        }
    return {word: (rf"(?<=[ (]){field}=[^\n]*,(?= *(#|\n))", f"{field}={value!r},")}


@pytest.mark.parametrize("key", EDITS)
def test_a_value_in_a_cell_is_the_run_that_the_same_override_is(root, variants, key):
    overridden, recorded = variants[key]
    run = opened(edits=edit_of(key, TRAINED[key]))["run"]
    assert run.name == overridden
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps")
    found = run.config["recipe"]
    if key == "training.gradient_accumulation_steps":  # 4 rows in 6 passes are recorded as 24 rows in one
        assert [[part["training"].pop(size) for size in sizes] for part in (recorded, found)] == [[4, 6], [24, 1]]
    else:
        section, _, field = key.rpartition(".")
        assert (found[section] if section else found)[field] == TRAINED[key]
    assert found == recorded


@pytest.mark.parametrize(
    "argument",
    ["adam_beta2=0.95", "neftune_noise_alpha=5", "label_smoothing_factor=0.1", "lr_scheduler_kwargs={'x': 1}",
     "optim_args='x=1'", "dataloader_drop_last=True", "eval_delay=1", "train_sampling_strategy='sequential'"],
)  # fmt: skip
def test_training_arguments_that_a_recipe_does_not_have_count_too(root, usual, argument):
    run = opened(edits={"= TrainingArguments(": (r"output_dir=", f"{argument}, output_dir=")})["run"]
    key, _, value = argument.partition("=")
    assert run.name != usual and str(run.config["identity"]["training"][key]).strip("'") == value.strip("'")


@pytest.mark.parametrize(
    "argument",
    ["logging_steps=7", "save_total_limit=9", "run_name='x'", "per_device_eval_batch_size=3", "report_to='none'",
     "dataloader_num_workers=1", "dataloader_pin_memory=False", "disable_tqdm=True", "log_level='error'"],
)  # fmt: skip
def test_training_arguments_that_say_how_a_machine_works_do_not_count(root, usual, argument):
    key = argument.partition("=")[0]
    edit = (r"output_dir=", f"{argument}, output_dir=")
    if key in cell("02_train_qlora", "= TrainingArguments("):
        edit = (rf"{key}=[^\n]+", f"{argument},")
    assert name(edits={"= TrainingArguments(": edit}) == usual


@pytest.mark.parametrize("argument", ["use_rslora=True", "init_lora_weights='gaussian'", "bias='lora_only'"])
def test_lora_settings_that_a_recipe_does_not_have_count_too(root, usual, argument):
    assert name(edits={"= LoraConfig(": (r"task_type=", f"{argument}, task_type=")}) != usual


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_that_changes_the_base_is_refused(root, kind):
    with pytest.raises(RunError, match=f"init_lora_weights is '{kind}', which changes the base.*True or 'gaussian'"):
        edit = {"= LoraConfig(": (r"task_type=", f"init_lora_weights={kind!r}, task_type=")}
        opened({"quantization.load_in_4bit": False}, edit)
    assert not list((root / "outputs").glob("*"))


def test_a_value_that_no_recipe_can_record_is_refused_by_name(root):
    with pytest.raises(RecipeError, match="lora.target_modules is '.*q_proj'"):
        opened(edits={"= LoraConfig(": (r"target_modules=[^\n]+", "target_modules='.*q_proj',")})


def test_another_base_model_is_another_run_and_its_weights_are_what_counts(root, usual):
    folder = shutil.copytree(root / "models" / "tiny", root / "models" / "other")
    assert name({"base_model": "models/other"}) != usual
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1
    model.save_pretrained(root / "models" / "tiny")
    assert name() != usual


def test_an_adapter_names_a_base_outside_of_the_repository_without_its_path(root, tmp_path):
    folder = shutil.copytree(root / "models" / "tiny", tmp_path / "home" / "ann" / "tiny")
    run = finish(opened({"base_model": str(folder)}), train=False)
    for path in run.adapter.iterdir():  # what a person publishes
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    assert (
        json.loads((run.adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        == "tiny"
    )
    recipe = run.recipe()
    assert qlora.load_finetuned(run, recipe, qlora.load_tokenizer(recipe)) is not None


@pytest.fixture
def hub(root, monkeypatch):
    """A hub cache with the model someone/tiny: returns a function that points its branch main at a new commit."""
    import huggingface_hub.constants

    cache = root / "cache"
    repository = cache / "models--someone--tiny"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def commit(digit):
        snapshot = repository / "snapshots" / (digit * 40)
        shutil.copytree(root / "models" / "tiny", snapshot)
        model = transformers.AutoModelForCausalLM.from_pretrained(snapshot)
        with torch.no_grad():
            model.get_input_embeddings().weight[7] += int(digit)
        model.save_pretrained(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(digit * 40, encoding="utf-8")

    return commit


def test_a_hub_model_is_named_and_loaded_by_its_commit(hub):
    hub("1")
    overrides = {"base_model": "someone/tiny"}
    run = finish(opened(overrides), train=False)
    assert run.config["identity"]["base"] == run.manifest["base_commit"] == "1" * 40
    settings = json.loads((run.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("someone/tiny", "1" * 40)
    hub("2")  # the branch moves on
    assert name(overrides) != run.name == name({**overrides, "revision": "1" * 40})
    recipe = run.recipe({"revision": "main"})
    assert recipe.revision == "1" * 40
    loaded = qlora.load_finetuned(run, recipe, qlora.load_tokenizer(recipe))
    for revision, same in {"1" * 40: True, "main": False}.items():
        base = transformers.AutoModelForCausalLM.from_pretrained("someone/tiny", revision=revision)
        weights = [model.get_input_embeddings().weight for model in (base, loaded)]
        assert torch.equal(*weights) is same


def test_an_optimizer_that_needs_cuda_is_recorded_as_asked_and_named_after_what_ran(root):
    space = opened({"training.optim": "paged_adamw_32bit"})
    assert space["run"].name == name({"training.optim": "adamw_torch"})
    run = finish(opened({"training.optim": "paged_adamw_32bit"}), train=False)
    assert run.manifest["optim"] == "adamw_torch"
    assert run.recipe({"training.optim": "paged_adamw_32bit"}).training.optim == "paged_adamw_32bit"


# --- a finished run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(prepared, tmp_path_factory):
    """`prepared` with one run, trained on a CPU in two steps."""
    folder = tmp_path_factory.mktemp("done") / "repository"
    shutil.copytree(prepared, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "ROOT", folder)
        patch.chdir(folder)
        run = finish(opened())
    return folder, run


@pytest.fixture
def finished(done, tmp_path, monkeypatch):
    """The finished run of `done`, in a copy that a test may change."""
    folder, run = done
    monkeypatch.setattr(runs, "ROOT", shutil.copytree(folder, tmp_path / "repository"))
    monkeypatch.chdir(runs.ROOT)
    return run


def test_a_finished_run_explains_itself(finished):
    files = sorted(path.name for path in finished.folder.iterdir() if not path.name.startswith("."))
    assert files == ["adapter", "config.json", "manifest.json", "train_log.jsonl"]
    assert not (finished.folder / ".lock.json").exists()
    manifest, config = finished.manifest, finished.config
    assert manifest["run"] == config["run"] == finished.name and manifest["steps"] == 2
    assert manifest["rows"] == {"train": 12, "validation": 3} and manifest["device"].startswith("CPU, ")
    # rank 16 on the seven layers of two blocks: q, o 64 -> 64; k, v 64 -> 32; gate, up 64 -> 128; down 128 -> 64
    assert manifest["parameters"]["trainable"] == 2 * 16 * (2 * 128 + 2 * 96 + 3 * 192)
    assert manifest["data"] == data.fingerprint(recipes.load("demo"))
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["optim"] == "adamw_torch_fused"
    written = {f"adapter/{p.name}" for p in finished.adapter.iterdir()} | {"config.json", "train_log.jsonl"}
    assert set(manifest["sha256"]) == written
    evaluations = {row["step"]: row["eval_loss"] for row in finished.log if "eval_loss" in row}
    assert sorted(evaluations) == [1, 2] and manifest["best_step"] == min(evaluations, key=evaluations.get)
    assert config["prompt_template"]["prompt"].startswith("<s>Summarize the following dialogue for section: {section}")
    assert runs.read_json(finished.adapter / "prompt_template.json", "02") == config["prompt_template"]


def test_no_file_of_a_run_names_a_folder_of_this_machine(finished, done):
    visited = 0
    for path in finished.folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8", errors="replace")
            assert str(done[0]) not in text and str(runs.ROOT) not in text and str(Path.home()) not in text, path
            visited += 1
    assert visited >= 8
    settings = json.loads((finished.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == "models/tiny"
    assert finished.config["recipe"]["base_model"] == "models/tiny"


def test_a_run_keeps_the_name_alone_of_a_file_outside_the_repository(root, tmp_path_factory):
    home = tmp_path_factory.mktemp("alice")
    own = {"data.dataset": "custom"}
    for split in ("train", "validation", "test"):
        (home / split).mkdir()
        shutil.copy(root / "data" / "demo" / f"{split}.csv", home / split / "part.csv")
        own[f"data.{split}_file"] = str(home / split / "part.csv")
    data.prepare(recipes.load("demo", own))
    run = finish(opened(own), train=False)
    assert opened(own)["run"] == run and runs.find("demo", "latest", OVERRIDES | own) == run
    assert run.config["recipe"]["data"]["test_file"] == "test_file/part.csv"
    for path in [*run.folder.rglob("*.json*"), *(root / "data" / "processed").rglob("*.json*")]:
        assert "alice" not in path.read_text(encoding="utf-8"), path
    given = run.recipe(own)  # as 03 is told
    assert given.data.train_file == own["data.train_file"] and len(data.load_split(given, "test")) == 4
    shutil.rmtree(home)
    assert len(data.load_split(run.recipe(), "test")) == 4  # the prepared rows are those of this file
    with pytest.raises(RunError, match="data.test_file is 'test_file/part.csv' in run"):
        run.recipe({"data.test_file": str(home / "other.csv")})


def test_the_training_cell_loads_a_finished_run(finished, capsys):
    space = opened()
    assert space["run"] == finished
    before = finished.manifest
    finish(space)
    assert f"outputs/{finished.name} holds this run, finished" in capsys.readouterr().out
    assert finished.manifest == before and finished.manifest["steps"] == 2
    from safetensors.torch import load_file

    saved = load_file(finished.adapter / "adapter_model.safetensors")
    state = {name.replace(".default", ""): p for name, p in space["model"].named_parameters()}
    assert len(saved) == 28 and all(torch.equal(value, state[key]) for key, value in saved.items())


@pytest.mark.parametrize(
    "overrides",
    [{}, {"lora.target_modules": ["lm_head"]}, {"lora.target_modules": ["q_proj", "lm_head"]}, {"pad_token": "add"}],
)
def test_the_saved_adapter_answers_as_the_trained_model(root, overrides):
    folder = root / "models" / "tiny"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(transformers.AutoTokenizer.from_pretrained(folder)))  # no row free for a [PAD]
    model.save_pretrained(folder)
    space = opened(overrides)
    run = finish(space)
    recipe = run.recipe()
    loaded = qlora.load_finetuned(run, recipe, space["tokenizer"])
    ids = torch.tensor([space["rows"]["train"][0]["input_ids"]])
    trained = space["model"].eval()(input_ids=ids).logits
    torch.testing.assert_close(loaded(input_ids=ids).logits, trained)
    with loaded.disable_adapter():
        base = loaded(input_ids=ids).logits
    again = qlora.load_base(recipe, space["tokenizer"], torch.device("cpu"))
    torch.testing.assert_close(base, again(input_ids=ids).logits)
    assert (base - trained).abs().max() > 1e-3


@pytest.mark.parametrize("change", ["lost", "replaced", "zeroed"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "prompt_template.json"])
def test_an_adapter_that_is_not_the_one_that_was_trained_is_refused(finished, file, change):
    path = finished.adapter / file
    if change == "lost":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(bytes(len(content)) if change == "zeroed" else content + b" ")
    name = f"outputs/{finished.name}"
    message = rf"{name}/adapter/{file} is not the file that was written: found .*, expected sha256 [0-9a-f]{{64}}\. "
    message += rf"{name} was set aside, whole, as {name}\.damaged-1: put the right file back and rename the folder"
    recipe = finished.recipe()
    with pytest.raises(RunError, match=message):
        qlora.load_finetuned(finished, recipe, qlora.load_tokenizer(recipe))
    aside = finished.folder.with_name(f"{finished.name}.damaged-1") / "adapter" / file
    assert aside.is_file() == (change != "lost") and not finished.folder.exists() and runs.finished() == []


def test_a_plain_trainer_makes_the_same_run(root, usual):
    space = opened(plain=True)
    assert space["run"].name == usual
    space["trainer"].train()
    run = finish(space, train=False)
    manifest = run.manifest
    assert manifest["steps"] == 2 and manifest["plan"] is None
    assert [manifest[key] for key in ("train_tokens", "train_seconds", "peak_gib")] == [None, None, None]
    assert runs.find("demo") == run and [row["step"] for row in run.log if "eval_loss" in row] == [1, 2]
    assert qlora.load_finetuned(run, run.recipe(), space["tokenizer"]) is not None


def test_objects_of_another_run_are_not_saved_or_loaded_into_this_one(finished):
    space, other = opened({"lora.r": 2}), opened()
    with pytest.raises(
        RunError, match=rf"makes {space['run'].name}, not {finished.name}: run the cell with `runs.open`"
    ):
        finished.save(space["trainer"], space["tokenizer"])
    with pytest.raises(RunError, match=f"not {finished.name}"):
        finished.load_adapter(space["trainer"])
    finished.load_adapter(other["trainer"])


def test_checkpoints_go_after_success_unless_they_are_kept(root):
    assert not finish(opened()).checkpoints.exists()
    shutil.rmtree(root / "outputs")
    kept = finish(opened({"training.keep_checkpoints": True})).checkpoints
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoint-1", "checkpoint-2"]


# --- interrupted ------------------------------------------------------------------------------------------------------


class Stop(transformers.TrainerCallback):
    """Stands for Ctrl-C at the start of the third step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_torn_log_or_checkpoint_does_not_keep_a_run_from_going_on(root):
    space = opened({"training.max_steps": 4})
    space["trainer"].add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        finish(space)
    run, log = space["run"], space["run"].folder / "train_log.jsonl"
    assert not run.finished and run.checkpoint().endswith("checkpoint-2")
    log.write_text(log.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    torn = shutil.copytree(run.checkpoints / "checkpoint-2", run.checkpoints / "checkpoint-3")
    (torn / "trainer_state.json").write_text('{"global_st', encoding="utf-8")
    half = run.checkpoints / "checkpoint-10"
    half.mkdir()
    assert run.checkpoint().endswith("checkpoint-2") and not torn.exists() and not half.exists()
    assert (run.folder / "checkpoint-3.damaged-1" / "trainer_state.json").read_text(encoding="utf-8") == '{"global_st'
    again = finish(opened({"training.max_steps": 4}))
    assert again == run and run.finished and run.manifest["steps"] == 4
    assert [row["step"] for row in run.log if "eval_loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in run.log if "loss" in row] == [1, 2, 3, 4]


def test_a_run_without_checkpoints_starts_at_the_beginning(root):
    assert opened()["run"].checkpoint() is None


# --- found again ------------------------------------------------------------------------------------------------------


def test_runs_are_found_by_name_as_the_latest_and_by_what_they_were_trained_with(finished):
    other = finish(opened({"lora.r": 2, "seed": 1}), train=False)
    assert runs.finished() == [finished, other] == runs.finished("demo") and runs.finished("samsum") == []
    assert runs.find("demo") == other and runs.find("demo", finished.name) == finished
    assert runs.find("demo", overrides={"lora.r": 16}) == finished
    assert runs.find("demo", overrides={"lora.r": 2, "evaluation.rows": 1, "engine.batch_size": 3}) == other
    assert runs.find("demo", overrides={"lora.target_modules": other.recipe().lora.target_modules[::-1]}) == other
    opened()
    assert runs.find("demo") == finished  # the latest is the one that 02 opened last
    known = f"run notebooks/02_train_qlora.ipynb first. Found: {other.name}, {finished.name}."
    for wanted, words in {
        ("demo", "demo-00000000"): "No finished run named 'demo-00000000' under outputs/: ",
        ("samsum", "latest"): "No finished run of recipe 'samsum' under outputs/: ",
    }.items():
        with pytest.raises(RunError) as error:
            runs.find(*wanted)
        assert str(error.value) == words + known
    with pytest.raises(RunError, match="of recipe 'demo' with {'lora.r': 3} under outputs/"):
        runs.find("demo", overrides={"lora.r": 3})
    with pytest.raises(RecipeError, match="Did you mean 'lora.r'"):
        runs.find("demo", overrides={"lora.rank": 3})


def test_where_no_run_is_the_error_says_so(root):
    with pytest.raises(RunError, match="run notebooks/02_train_qlora.ipynb first. Found: none."):
        runs.find("demo")
    opened()  # begun, not finished
    with pytest.raises(RunError, match="Found: none."):
        runs.find("demo")


def test_folders_of_others_under_outputs_are_passed_over(finished):
    for folder, config in {"older": {"experiment": {}}, "demo-1a2b3c4d.damaged-1": {}, "other": None}.items():
        (runs.ROOT / "outputs" / folder).mkdir()
        runs.write_json(runs.ROOT / "outputs" / folder / "manifest.json", {"optimizer_steps": 2})
        if config:
            runs.write_json(runs.ROOT / "outputs" / folder / "config.json", config)
    assert runs.finished() == [finished] == [runs.find("demo")]


def test_a_run_keeps_what_it_was_trained_with(finished):
    accepted = {"evaluation.split": "validation", "generation.num_beams": 4, "engine.batch_size": 2, "device": "auto"}
    recipe = finished.recipe({**accepted, "lora.r": 16, "training.max_steps": 2, "prompt.cue": "Summary:"})
    assert (recipe.evaluation.split, recipe.generation.num_beams, recipe.engine.batch_size) == ("validation", 4, 2)
    assert recipe.training == finished.recipe().training and recipe.base_model == "models/tiny"
    for key, value in {"lora.r": 8, "prompt.cue": "Note:", "seed": 7, "data.train_rows": 3}.items():
        with pytest.raises(
            RunError, match=f"{key} is .* in run {finished.name} and .* in OVERRIDES. To score a run with"
        ):
            finished.recipe({key: value})
    with pytest.raises(RecipeError, match="generation.num_beams is 0"):
        finished.recipe({"generation.num_beams": 0})


# --- evaluations ------------------------------------------------------------------------------------------------------


def test_other_splits_rows_and_decoding_are_other_evaluations_of_the_same_run(finished):
    first = scored(finished)
    assert re.fullmatch("test-[0-9a-f]{8}", first.name) and scored(finished) == first
    changes = [
        {"evaluation.split": "validation"}, {"evaluation.rows": 2}, {"generation.max_new_tokens": 5},
        {"generation.num_beams": 2}, {"generation.num_beams": 2, "generation.length_penalty": 0.5},
        {"generation.do_sample": True}, {"generation.do_sample": True, "generation.top_p": 0.5},
        {"generation.no_repeat_ngram_size": 3}, {"generation.min_new_tokens": 2},
        {"generation.repetition_penalty": 1.2},
    ]  # fmt: skip
    others = [scored(finished, change) for change in changes]
    assert len({first.name, *(other.name for other in others)}) == len(changes) + 1
    assert {evaluation.run for evaluation in (first, *others)} == {finished} == set(runs.finished())
    assert first.folder == finished.folder / "evaluations" / first.name
    config = first.config
    assert (config["run"], config["split"], config["rows"], config["limit"]) == (finished.name, "test", 4, None)
    assert config["generation"] == {"max_new_tokens": 4}
    assert scored(finished, {"engine.batch_size": 1, "engine.dequantize": "off", "device": "auto"}) == first


@pytest.mark.parametrize("edit", ["top_k=50", "min_length=0", "use_cache=True", "num_return_sequences=1"])
def test_defaults_written_out_are_the_same_evaluation(finished, edit):
    assert scored(finished, edit=edit) == scored(finished)


@pytest.mark.parametrize(
    "edit", ["encoder_repetition_penalty=1.2", "eos_token_id=5", "suppress_tokens=[7]", "stop_strings=['x']"]
)
def test_decoding_that_a_recipe_does_not_have_counts_too(finished, edit):
    assert scored(finished, edit=edit) != scored(finished)


def test_the_seed_counts_where_tokens_are_drawn(finished):
    rows = Dataset.from_dict({"prompt_ids": [[1, 2]]})

    def named(seed, **decoding):
        recipe = finished.recipe().model_copy(update={"seed": seed})
        return runs.open_evaluation(finished, recipe, rows, GenerationConfig(max_new_tokens=4, **decoding)).name

    assert named(1) == named(2)
    assert named(1, do_sample=True) == named(1, do_sample=True, temperature=1.0) != named(2, do_sample=True)


def test_evaluations_are_found_once_they_are_scored(finished):
    first, second = scored(finished), scored(finished, {"evaluation.split": "validation"})
    with pytest.raises(RunError, match=f"Run {finished.name} has no evaluation: run notebooks/03.*Found: none."):
        runs.find_evaluation(finished)
    records = list(data.evaluation_rows(finished.recipe()))
    answers = [
        {"prediction": f"p{n}", "tokens": 2, "stop": "eos", "prompt_tokens": 9, "cut_tokens": 0} for n in range(4)
    ]
    first.keep("base").add({n: {"id": records[n]["id"], **answer} for n, answer in enumerate(answers)})
    with pytest.raises(KeyError):  # the other system has not answered yet
        first.save_predictions(records)
    assert not first.answered
    first.keep("finetuned").add({n: {"id": records[n]["id"], **a} for n, a in enumerate(answers[::-1])})
    saved = first.save_predictions(records)
    assert first.answered
    assert first.predictions == saved and list(saved["base"][0]) == [
        "id", "section", "dialogue", "reference", "prediction", "tokens", "stop", "prompt_tokens", "cut_tokens",
    ]  # fmt: skip
    assert saved["finetuned"][0]["prediction"] == "p3" and saved["base"][3]["reference"] == records[3]["summary"]
    second.save_metrics({"n": 3})
    first.save_metrics({"n": 4})
    assert {"run": finished.name, "evaluation": first.name, "n": 4}.items() <= first.metrics.items()
    assert runs.evaluations(finished) == [first, second]  # in the order in which 03 opened them
    assert runs.find_evaluation(finished) == second and runs.find_evaluation(finished, first.name) == first
    with pytest.raises(RunError, match=rf"no evaluation named 'test-0': .*Found: {first.name}, {second.name}\."):
        runs.find_evaluation(finished, "test-0")


# --- an adapter is scored on its own data, prompt and base ------------------------------------------------------------


def refused(run):
    recipe = run.recipe()
    with pytest.raises(RunError) as error:
        qlora.load_finetuned(run, recipe, qlora.load_tokenizer(recipe))
    return str(error.value)


def test_other_processed_data_is_refused(finished):
    path = runs.ROOT / "data" / "demo" / "test.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("Doctor:", "Dr:", 1), encoding="utf-8")
    data.prepare(recipes.load("demo"))
    assert refused(finished).startswith(f"{finished.name} was trained with another processed data: found ")


@pytest.mark.parametrize(
    ("change", "what"),
    [(without_a_row, "training rows"), (in_another_order, "training rows"), (with_another_prompt, "prompt")],
)
def test_rows_and_prompts_that_were_changed_by_hand_are_refused(root, change, what):
    run = finish(opened(rows=change), train=False)
    message = refused(run)
    assert message.startswith(f"{run.name} was trained with another {what}: found ")
    assert "set them in OVERRIDES there" in message


def test_rows_and_prompts_that_were_changed_in_overrides_are_accepted(root):
    run = finish(opened({"data.train_rows": 11, "prompt.instruction": "Something else."}), train=False)
    assert qlora.load_finetuned(run, run.recipe(), qlora.load_tokenizer(run.recipe())) is not None


def test_another_base_model_is_refused_before_it_is_loaded(finished, monkeypatch):
    monkeypatch.setattr(qlora, "load_base", lambda *args: pytest.fail("weights were loaded"))
    folder = runs.ROOT / "models" / "tiny"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1
    model.save_pretrained(folder)
    assert refused(finished).startswith(f"{finished.name} was trained with another base model: found ")


# --- what a run ran on ------------------------------------------------------------------------------------------------


def git(*command):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=runs.ROOT, check=True, capture_output=True
    )


def test_the_commit_is_recorded_with_whether_files_were_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert measured.environment(torch.device("cpu"))["git"] is None  # no repository
    git("init", "-q")
    (tmp_path / "a.py").write_text("1", encoding="utf-8")
    git("add", ".")
    git("commit", "-qm", "a")
    commit = measured.environment(torch.device("cpu"))["git"]
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "a.py").write_text("2", encoding="utf-8")
    assert measured.environment(torch.device("cpu"))["git"] == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert measured.environment(torch.device("cpu"))["git"] is None  # no git


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = runs.write_json(tmp_path / "a.json", {"x": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "x": "é"\n}\n'

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        runs.write_json(path, {"x": "new"})
    assert runs.read_json(path, "01")["x"] == "é" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_text_that_cannot_be_written_leaves_no_part_of_it(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        runs.write_jsonl(tmp_path / "a.jsonl", [{"x": "\ud800"}])
    assert list(tmp_path.iterdir()) == []


def test_jsonl_keeps_line_separators_inside_strings(tmp_path):
    rows = [{"text": "a\u2028b\nc\r\nd\x85"}, {"text": ""}]
    assert runs.read_jsonl(runs.write_jsonl(tmp_path / "b" / "a.jsonl", rows), "01") == rows


def test_a_missing_file_names_the_notebook_that_writes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    with pytest.raises(
        FileNotFoundError, match="^outputs/x/manifest.json is missing: run notebooks/02_train_qlora.ipynb"
    ):
        print(runs.Run("x").manifest)
    assert runs.relative(Path("/elsewhere/file")) == "/elsewhere/file"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"b", "a"}, ["a", "b"]), (50.0, 50), (0.5, 0.5), (True, True), (None, None), (torch.bfloat16, "bfloat16"),
        (transformers.SchedulerType.COSINE, "cosine"), ({1: (2.0, {"x"})}, {"1": [2, ["x"]]}),
    ],
)  # fmt: skip
def test_values_are_compared_in_jsons_types(value, found):
    assert identity.plain(value) == found and type(identity.plain(value)) is type(found)


def test_equal_values_have_equal_names_in_any_order():
    assert identity.name("demo", {"a": 1, "b": 2}) == identity.name("demo", {"b": 2, "a": 1})
    assert identity.name("demo", {"a": 1}) != identity.name("demo", {"a": 2})
    assert identity.name("demo", {}) == "demo-44136fa3"  # the sha256 of "{}" starts so
