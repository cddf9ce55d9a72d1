"""Recipes: what a file and an override may hold, what is refused and how, and what the published recipes keep."""

import math
import re
import tomllib
import typing

import pytest
from pydantic_core import PydanticUndefined

from src import recipes
from src.recipes import RecipeError, load

SECTIONS = ("data", "prompt", "quantization", "lora", "training", "generation", "evaluation", "engine")


def toml(name):
    return tomllib.loads((recipes.FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def flat(values):
    """{"seed": 42, "lora.r": 8} of nested values."""
    parts = {key: value for key, value in values.items() if not isinstance(value, dict)}
    return parts | {f"{s}.{key}": v for s, part in values.items() if isinstance(part, dict) for key, v in part.items()}


def refusal(overrides, name="samsum"):
    with pytest.raises(RecipeError) as error:
        load(name, overrides)
    return str(error.value)


def test_every_recipe_loads():
    assert recipes.names() == (
        "custom",
        "demo",
        "mts_dialog",
        "mts_dialog_best",
        "mts_dialog_small",
        "samsum",
        "samsum_best",
        "samsum_small",
    )
    loaded = [load(name) for name in recipes.names()]
    assert [recipe.name for recipe in loaded] == list(recipes.names())
    assert len({recipe.model_dump_json(exclude={"name"}) for recipe in loaded}) == 8


@pytest.mark.parametrize("name", recipes.names())
def test_the_files_hold_known_fields_and_the_recipe_has_their_values(name):
    values, loaded = flat(toml(name)), flat(load(name).model_dump())
    assert set(values) <= set(loaded) - {"name"} and len(values) > 20
    for key, value in values.items():
        assert loaded[key] == (sorted(value) if isinstance(value, list) else value), key


def test_two_recipes_differ_as_their_files_differ():
    one, best = flat(toml("mts_dialog")), flat(toml("mts_dialog_best"))
    differing = {key for key in one.keys() | best.keys() if one.get(key) != best.get(key)}
    assert differing == {
        "data.drop_leaked", "quantization.bnb_4bit_use_double_quant", "lora.r", "lora.lora_alpha", "lora.lora_dropout",
        "lora.target_modules", "training.per_device_train_batch_size", "training.gradient_accumulation_steps",
        "training.learning_rate", "training.lr_scheduler_type", "training.warmup_steps", "training.max_grad_norm",
    }  # fmt: skip
    loaded = flat(load("mts_dialog").model_dump()), flat(load("mts_dialog_best").model_dump())
    assert {key for key in loaded[0] if loaded[0][key] != loaded[1][key]} == differing | {"name"}


def test_a_misspelt_file_is_refused_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    (tmp_path / "mine.toml").write_text('base_model = "a/b"\n[lora]\nrank = 8\n', encoding="utf-8")
    with pytest.raises(RecipeError, match=r"Unknown field 'lora.rank'. Did you mean 'lora.r'\?"):
        load("mine")
    (tmp_path / "mine.toml").write_text("seed = \n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"src/recipes/mine.toml cannot be read as TOML: .*line 1"):
        load("mine")


def test_overrides_have_the_names_of_hugging_face():
    overrides = {
        "lora.r": 8, "lora.target_modules": ["q_proj", "lm_head"], "training.num_train_epochs": 0.5,
        "training.per_device_train_batch_size": 2, "quantization.bnb_4bit_quant_type": "fp4",
        "generation.num_beams": 4, "data.train_rows": None, "seed": 7,
    }  # fmt: skip
    changed = flat(load("samsum", overrides).model_dump())
    assert {key: changed[key] for key in overrides} == overrides | {"lora.target_modules": ["lm_head", "q_proj"]}
    assert {key for key, value in flat(load("samsum").model_dump()).items() if changed[key] != value} == set(overrides)


@pytest.mark.parametrize("key", ["training.num_train_epochs", "training.max_grad_norm", "training.weight_decay"])
def test_a_whole_number_may_be_written_in_two_ways(key):
    value = 0 if key == "training.weight_decay" else 2
    one, other = load("demo", {key: value}), load("demo", {key: float(value)})
    assert one == other and type(flat(one.model_dump())[key]) is float


def test_the_order_of_target_modules_does_not_matter():
    ways = (["v_proj", "q_proj"], ("q_proj", "v_proj"), ["q_proj", "v_proj", "q_proj"])
    assert len({load("demo", {"lora.target_modules": way}).model_dump_json() for way in ways}) == 1


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lora.rank", "lora.r"),
        ("lora.rnk", "lora.r"),
        ("r", "lora.r"),
        ("lora.alpha", "lora.lora_alpha"),
        ("lora.dropout", "lora.lora_dropout"),
        ("lora.r ", "lora.r"),
        ("training.epochs", "training.num_train_epochs"),
        ("epochs", "training.num_train_epochs"),
        ("training.batch_size", "training.per_device_train_batch_size"),
        ("training.schedule", "training.lr_scheduler_type"),
        ("training.optimizer", "training.optim"),
        ("training.packing", "engine.packing"),
        ("generation.batch_size", "engine.batch_size"),
        ("quantization.double", "quantization.bnb_4bit_use_double_quant"),
        ("Seed", "seed"),
    ],
)
def test_old_and_misspelt_names_are_refused_with_the_field_that_was_meant(key, meant):
    assert refusal({key: 8}) == (f"Unknown override {key!r}. Did you mean {meant!r}? src/recipes.py lists all fields.")


@pytest.mark.parametrize("key", ["rank", "name", "", 5, None, ("lora", "r")])
def test_what_looks_like_no_field_is_refused_without_a_guess(key):
    assert refusal({key: 8}).startswith(f"Unknown override {key!r}. src/recipes.py lists all fields")


def test_a_whole_section_is_no_override():
    assert refusal({"lora": {}}).startswith("Unknown override 'lora'.")


def test_overrides_are_a_dictionary():
    with pytest.raises(RecipeError, match=r"OVERRIDES is \[\('seed', 1\)\]: expected a dictionary such as"):
        load("demo", [("seed", 1)])


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(RecipeError, match=r"'samsun': expected one of custom, demo, .*Did you mean 'samsum'\?"):
        load("samsun")


@pytest.mark.parametrize(  # how a refusal is worded, once for each kind; tests/test_values.py has the values
    ("overrides", "message"),
    [
        ({"lora.r": "8"}, r"^lora.r is '8' \(str\): input should be a valid integer"),
        ({"lora.r": True}, r"^lora.r is True \(bool\)"),
        ({"lora.r": 8.5}, r"^lora.r is 8.5 \(float\): input should be a valid integer"),
        ({"lora.r": None}, r"^lora.r is None"),
        ({"lora.r": 0}, r"^lora.r is 0 \(int\): input should be greater than or equal to 1"),
        ({"lora.r": 10**9}, r"^lora.r is 1000000000 .* less than or equal to 65536"),
        ({"lora.lora_dropout": 1.0}, r"^lora.lora_dropout is 1.0 \(float\): input should be less than 1"),
        ({"lora.lora_dropout": math.nan}, r"^lora.lora_dropout is nan \(float\): input should be a finite number"),
        ({"lora.target_modules": "qproj"}, r"^lora.target_modules is 'qproj' \(str\): input should be a valid list"),
        ({"lora.target_modules": []}, r"^lora.target_modules is \[\] \(list\): list should have at least 1 item"),
        ({"lora.target_modules": ["q_proj", 5]}, r"^lora.target_modules.1 is 5 \(int\): input should be a valid str"),
        ({"quantization.bnb_4bit_quant_type": "int8"}, r"quant_type is 'int8' .* 'nf4' or 'fp4'"),
        ({"quantization.load_in_4bit": 1}, r"^quantization.load_in_4bit is 1 \(int\): .* valid boolean"),
        ({"training.lr_scheduler_type": "cosin"}, r"'cosin' .*'inverse_sqrt'. Did you mean 'cosine'\?"),
        ({"training.optim": "paged_adamw"}, r"Did you mean 'paged_adamw_32bit'\?"),
        ({"training.num_train_epochs": 1e12}, r"^training.num_train_epochs is 1000000000000.0 .* equal to 1000"),
        ({"training.max_steps": 0}, r"^training.max_steps is 0: expected -1 \(by epochs\) or at least 1"),
        ({"training.learning_rate": "2e-4"}, r"^training.learning_rate is '2e-4' \(str\): input should be a valid num"),
        ({"seed": 2**32}, r"^seed is 4294967296 \(int\): input should be less than 4294967296"),
        ({"base_model": ""}, r"^base_model is '' \(str\): expected a model id .*folder'\)\.$"),
    ],
)
def test_what_cannot_run_is_refused_by_name(overrides, message):
    assert re.search(message, refusal(overrides))


def test_all_mistakes_are_told_at_once():
    message = refusal({"lora.r": 0, "training.optim": "adam", "seed": -1})
    assert len(message.splitlines()) == 3 and all(key in message for key in ("seed is", "lora.r is", "training.optim"))


def test_mts_dialog_is_scored_on_either_test_split():
    assert load("mts_dialog", {"evaluation.split": "test2"}).evaluation.split == "test2"
    assert "can be scored on validation, test1, test2" in refusal({"evaluation.split": "test"}, "mts_dialog")


def test_published_recipes_keep_their_hyperparameters():
    # recipe 1 and 2 as their notebooks have them, apart from the corrections that stand beside the fields in the files
    one, two = load("mts_dialog"), load("samsum")
    assert (one.lora.r, one.lora.lora_alpha, one.lora.lora_dropout) == (8, 32, 0.05)
    assert one.lora.target_modules == ["q_proj", "v_proj"]
    t = one.training
    assert t.per_device_train_batch_size * t.gradient_accumulation_steps == 16
    assert (t.num_train_epochs, t.learning_rate, t.lr_scheduler_type) == (3, 3e-4, "linear")
    assert (two.lora.r, two.lora.lora_alpha, two.lora.lora_dropout, two.data.train_rows) == (32, 64, 0.1, 7366)
    t = two.training
    assert t.per_device_train_batch_size * t.gradient_accumulation_steps == 3
    assert (t.num_train_epochs, t.learning_rate, t.warmup_steps, t.weight_decay) == (3, 3e-4, 50, 0.001)
    assert (t.max_grad_norm, t.eval_steps, t.optim) == (0.3, 500, "paged_adamw_32bit")


def test_a_recipe_cannot_be_changed_after_it_was_checked():
    recipe = load("demo")
    with pytest.raises(ValueError, match="frozen"):
        recipe.lora.r = 0


def test_every_field_says_what_it_means_where_it_is_defined():
    source = (recipes.FOLDER.parent / "recipes.py").read_text(encoding="utf-8")
    seen, undocumented = 0, []
    for section in (recipes.Recipe, *(recipes.Recipe.model_fields[name].annotation for name in SECTIONS)):
        body = source.split(f"class {section.__name__}(Section):")[1].split("\n\n\n")[0]
        for field in set(section.model_fields) - set(SECTIONS):
            seen += 1
            if not re.search(rf"^    {field}: .*  # \S", body, re.M):
                undocumented.append(f"{section.__name__}.{field}")
    assert (
        undocumented == [] and seen == len(flat(load("demo").model_dump())) == 67
    )  # 6 of its own + 9+5+4+4+16+10+3+10


def test_schedulers_and_optimizers_are_names_of_transformers():
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    schedulers, optimizers = typing.get_args(recipes.SCHEDULERS), typing.get_args(recipes.OPTIMIZERS)
    assert set(schedulers) < {member.value for member in SchedulerType} and len(set(schedulers)) == len(schedulers) == 7
    assert set(optimizers) < {member.value for member in OptimizerNames} and len(set(optimizers)) == len(optimizers)


@pytest.mark.parametrize("section", ["lora", "training", "quantization", "generation"])
def test_sections_have_the_field_names_of_the_objects_that_they_fill(section):
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, GenerationConfig, TrainingArguments

    kinds = {"lora": LoraConfig, "training": TrainingArguments}
    swallowing = {"quantization": BitsAndBytesConfig, "generation": GenerationConfig}  # they accept unknown names
    known = set(kinds[section].__dataclass_fields__) if section in kinds else set(vars(swallowing[section]()))
    ours = {"early_stopping_patience", "sample_rows", "keep_checkpoints"} if section == "training" else set()
    fields = set(recipes.Recipe.model_fields[section].annotation.model_fields)
    assert ours <= fields
    if section == "quantization":
        known |= {"load_in_4bit"}  # a property there
    assert fields - ours <= known


def test_a_printed_recipe_marks_what_was_overridden():
    plain = str(load("demo"))
    assert "overridden" not in plain and plain.startswith("base_model = 'data/demo/base'\nrevision = 'main'\n")
    lines = str(load("demo", {"lora.r": 8, "seed": 42, "data.train_rows": 5})).splitlines()
    marked = {line.split(" = ")[0]: line for line in lines if "overridden" in line}
    assert set(marked) == {"r", "train_rows"}  # the seed in the file is 42 too
    assert re.fullmatch(r"r = 8 +# overridden; 16 in the file", marked["r"])
    assert re.fullmatch(r"train_rows = 5 +# overridden; None in the file", marked["train_rows"])
    assert [line for line in lines if line.startswith("[")] == [f"[{name}]" for name in SECTIONS]
    assert len([line for line in lines if " = " in line]) == 66  # all fields but the name


def test_every_field_but_the_name_has_a_default():
    for section in (recipes.Recipe, *(recipes.Recipe.model_fields[name].annotation for name in SECTIONS)):
        needed = [name for name, field in section.model_fields.items() if field.default is PydanticUndefined]
        assert needed == (["name"] if section is recipes.Recipe else [])
