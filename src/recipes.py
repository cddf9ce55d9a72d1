"""Recipes: every hyperparameter as a checked field, one TOML file a recipe, and overrides on top.

`recipe = load("samsum", {"lora.r": 8})` reads src/recipes/samsum.toml. The fields of [quantization], [lora], [training] and
[generation] have the names of BitsAndBytesConfig, LoraConfig, TrainingArguments and GenerationConfig.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

FOLDER = Path(__file__).parent / "recipes"
SCHEDULERS = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]  # fmt: skip
OPTIMIZERS = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "adafactor", "sgd", "adagrad", "rmsprop",
]  # fmt: skip
Count = Annotated[int, Field(ge=1, le=10**9)]
AtLeastZero = Annotated[float, Field(ge=0, le=10**9)]


class RecipeError(ValueError):
    """A recipe, a field or a combination of fields that cannot be run. The message names the field and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Data(Section):
    dataset: Literal["demo", "mts_dialog", "samsum", "custom"] = "demo"
    train_rows: Count | None = None  # use the first n training rows (after drop_leaked); None: all
    validation_rows: Count | None = None  # the first n rows for the validation loss; None: all
    drop_leaked: bool = False  # leave out training rows whose dialogue, or a near copy, is in validation or test
    train_file: str | None = None  # custom only: CSV or JSONL with dialogue, summary (optional: id, section)
    validation_file: str | None = None  # custom only; without it and test_file, train_file is split by split_seed
    test_file: str | None = None  # custom only
    split_seed: int = 42  # custom only: of that split; apart from seed, so that all seeds have the same test rows


class Prompt(Section):
    style: Literal["plain", "chat"] = "plain"  # plain: base models, our own template; chat: the tokenizer's template
    instruction: str = "Summarize the following dialogue for section: {section}"  # {section} may be left out
    cue: str = "Summary:"  # plain only: the line after the dialogue that the answer continues
    max_tokens: Annotated[int, Field(ge=32, le=10**6)] = 2048  # a longer prompt loses the end of its dialogue
    few_shot: Annotated[int, Field(ge=0, le=64)] = 0  # worked training examples before the dialogue, within max_tokens


class Quantization(Section):
    load_in_4bit: bool = True  # False: 16-bit weights, the "unquantised" control
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True  # quantise the quantisation constants too: 0.37 bits a weight less
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = (
        "auto"  # auto: what the device does best
    )


class Lora(Section):
    r: Annotated[int, Field(ge=1, le=65536)] = 16  # columns of each low-rank factor: adapter size and memory grow
    lora_alpha: Annotated[int, Field(ge=1, le=10**6)] = 32  # the update is scaled by lora_alpha / r
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05  # share of the adapter's inputs zeroed in training
    target_modules: Annotated[list[str], Field(min_length=1)] = [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # linear layers with an adapter; lm_head is allowed, the adapter then carries its weights  # fmt: skip


class Training(Section):
    num_train_epochs: Annotated[float, Field(gt=0, le=10**4)] = 3.0  # passes over the training rows
    max_steps: Annotated[int, Field(ge=-1, le=10**7)] = -1  # stop after n optimizer steps; -1: by epochs
    per_device_train_batch_size: Count = 16  # times gradient_accumulation_steps: the rows of an optimizer step;
    gradient_accumulation_steps: Count = 1  # the engine regroups them into forward passes that fit
    learning_rate: AtLeastZero = 2e-4  # the peak
    lr_scheduler_type: SCHEDULERS = "linear"
    warmup_steps: AtLeastZero = 0.0  # optimizer steps; a value below 1 is a share of all steps
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decoupled (AdamW), on the adapter
    max_grad_norm: AtLeastZero = 1.0  # gradients of a step are scaled down to this 2-norm
    optim: OPTIMIZERS = "adamw_torch_fused"  # one that needs CUDA becomes adamw_torch on a CPU
    eval_steps: Count | None = None  # validation loss, samples and a checkpoint every n steps; None: every epoch
    early_stopping_patience: Count | None = None  # stop after n evaluations without a better loss; None: never
    load_best_model_at_end: bool = True  # keep the adapter with the lowest validation loss, not the last
    sample_rows: Annotated[int, Field(ge=0)] = 1  # validation dialogues summarised at each evaluation
    keep_checkpoints: bool = False  # keep outputs/<run>/checkpoints after success


class Generation(Section):
    max_new_tokens: Count = 256  # an answer that reaches it is counted as cut off
    min_new_tokens: Annotated[int, Field(ge=0)] = 0  # EOS is forbidden before
    num_beams: Annotated[int, Field(ge=1, le=64)] = 1  # 1: greedy or sampling; more: beam search
    early_stopping: bool = False  # beams only: stop when num_beams answers are complete
    length_penalty: Annotated[float, Field(ge=-100, le=100)] = 1.0  # beams only: > 1 favours longer answers
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1000)] = 0  # 0: off
    do_sample: bool = False  # draw tokens instead of taking the likeliest; seeded by row, whatever the batch
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0  # sampling only
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # sampling only


class Evaluation(Section):
    split: str = "test"  # the split that 03 scores: validation or test; MTS-Dialog has test1 and test2
    rows: Count | None = None  # the first n rows of it; None: all


class Engine(Section):
    """How this machine computes, not what: these fields never change which run it is, nor the rows of a step."""

    packing: Literal["auto", "on", "off"] = "auto"  # whole rows without padding; auto: on where varlen attention runs
    fused: Literal["auto", "off"] = "auto"  # fused LoRA layers; auto: on CUDA where they fit
    checkpointing: Literal["auto", "on", "off"] = "auto"  # of activations; auto: only if memory asks for it
    memory_gib: Annotated[float, Field(gt=0, le=10**5)] | None = None  # plan for at most this; None: for what is free
    tokens_per_pass: Count | None = None  # at most, in a forward pass of training; None: planned
    dequantize: Literal["auto", "on", "off"] = "auto"  # 03: NF4 to 16-bit weights once, same function, faster
    batch_size: Count | None = None  # prompts decoded together; None: chosen from the free memory


class Recipe(Section):
    name: str
    base_model: Annotated[str, Field(min_length=1)] = "data/demo/base"  # a hub id, or a folder of this repository
    revision: str = "main"  # branch, tag or commit on the hub; the commit it resolved to is recorded
    pad_token: Literal["unk", "add"] = "unk"  # unk: reuse it, else the own pad token, else BOS; add: a new [PAD]
    device: str = "auto"  # auto | cpu | cuda | cuda:1 ...
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42  # row order, adapter initialisation, dropout, sampling, bootstrap
    data: Data = Data()
    prompt: Prompt = Prompt()
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    training: Training = Training()
    generation: Generation = Generation()
    evaluation: Evaluation = Evaluation()
    engine: Engine = Engine()
    _overridden: dict = PrivateAttr(default_factory=dict)  # {key: value in the file}

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, in however many forward passes."""
        return self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps

    @model_validator(mode="after")
    def _check(self):
        d, g, files = self.data, self.generation, (self.data.validation_file, self.data.test_file)
        scored = splits(d.dataset)[1:]
        conflicts = {
            "training.max_steps is 0: expected -1 (by epochs) or at least 1.": self.training.max_steps == 0,
            "generation.do_sample and generation.num_beams > 1 exclude each other: choose one.": g.do_sample
            and g.num_beams > 1,
            "generation.temperature and generation.top_p only act when generation.do_sample is true: set it, or leave "
            "them at 1.": not g.do_sample and (g.temperature, g.top_p) != (1, 1),
            "generation.early_stopping and generation.length_penalty only act with generation.num_beams > 1.": (
                g.num_beams == 1 and (g.early_stopping or g.length_penalty != 1)
            ),
            f"generation.min_new_tokens ({g.min_new_tokens}) exceeds generation.max_new_tokens ({g.max_new_tokens}).": (
                g.min_new_tokens > g.max_new_tokens
            ),
            "data.train_file, validation_file and test_file belong to the custom dataset; data.dataset is "
            f"{d.dataset!r}.": d.dataset != "custom" and any((d.train_file, *files)),
            "data.train_file is missing: expected the path of a CSV or JSONL file with the columns dialogue and "
            "summary.": d.dataset == "custom" and not d.train_file,
            f"evaluation.split is {self.evaluation.split!r}: {d.dataset} can be scored on {', '.join(scored)}.": (
                self.evaluation.split not in scored
            ),
        }
        broken = [message for message, is_broken in conflicts.items() if is_broken]
        if broken:
            raise ValueError(" ".join(broken))
        return self

    def __str__(self) -> str:
        """The recipe as TOML, with overridden fields marked."""
        lines, values = [], self.model_dump()
        for key, value in values.items():
            if isinstance(value, dict):
                lines += ["", f"[{key}]", *(self._line(f"{key}.{name}", value[name]) for name in value)]
            elif key != "name":
                lines.append(self._line(key, value))
        return "\n".join(lines)

    def _line(self, key: str, value) -> str:
        text = f"{key.rpartition('.')[2]} = {value!r}"
        return f"{text:<48}# overridden; {self._overridden[key]!r} in the file" if key in self._overridden else text


def names() -> tuple[str, ...]:
    """The recipes that `load` knows: the files of src/recipes."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def splits(dataset: str) -> tuple[str, ...]:
    """The names of a dataset's splits, train first."""
    return ("train", "validation", "test1", "test2") if dataset == "mts_dialog" else ("train", "validation", "test")


def field_names() -> list[str]:
    """Every key that OVERRIDES accepts, dotted: seed, lora.r, ..."""
    keys = []
    for name, field in Recipe.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, Section):
            keys += [f"{name}.{sub}" for sub in part.model_fields]
        elif name != "name":
            keys.append(name)
    return keys


def load(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read src/recipes/<name>.toml and replace fields, e.g. `load("samsum", {"lora.r": 8, "seed": 1})`.

    Raises RecipeError for an unknown recipe or field, a wrong type or value, or fields that exclude each other.
    """
    if name not in names():
        raise RecipeError(f"Unknown recipe {name!r}: expected one of {', '.join(names())}.{closest(name, names())}")
    values = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    return build({**values, "name": name}, overrides)


def build(values: dict, overrides: dict[str, Any] | None = None) -> Recipe:
    """A recipe from a nested dictionary of fields, with dotted overrides. Raises RecipeError as `load` does."""
    plain = _validated(values)
    given, known = overrides or {}, field_names()
    if not isinstance(given, dict):
        raise RecipeError(f'OVERRIDES is {given!r}: expected a dictionary such as {{"lora.r": 8}}.')
    changed = plain.model_dump()
    for key, value in given.items():
        if key not in known:
            raise RecipeError(
                f"Unknown override {key!r} for recipe {plain.name!r}: expected a field such as 'seed' or 'lora.r'."
                f"{closest(key, known)} src/recipes.py lists all fields with their meaning."
            )
        section, _, field = key.rpartition(".")
        target = changed[section] if section else changed
        target[field] = list(value) if isinstance(value, tuple) else value
    recipe = _validated(changed)
    before, after = _flat(plain), _flat(recipe)
    recipe._overridden.update({key: before[key] for key in given if before[key] != after[key]})
    return recipe


def get(recipe: Recipe, key: str):
    """The value of a dotted field, e.g. `get(recipe, "lora.r")`."""
    return _flat(recipe)[key]


def _flat(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump()
    return {
        key: values[key] if "." not in key else values[key.split(".")[0]][key.split(".")[1]] for key in field_names()
    }


def _validated(values: dict) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(_sentence(problem) for problem in error.errors())) from None


def _sentence(problem: dict) -> str:
    """One pydantic error as `field is value (type): what was expected`."""
    key = ".".join(str(part) for part in problem["loc"] if isinstance(part, int) or str(part).islower())
    found, what = problem["input"], problem["msg"].removeprefix("Value error, ")
    if not key:
        return what
    if problem["type"] == "extra_forbidden":
        return f"Unknown field {key!r}.{closest(key, field_names())} src/recipes.py lists all fields."
    hint = closest(found, problem.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ").split(", "))
    return f"{key} is {found!r} ({type(found).__name__}): {what[0].lower() + what[1:]}.{hint}"


def closest(word, choices) -> str:
    """` Did you mean 'x'?` for the choice that looks most like the word, or nothing."""
    match = difflib.get_close_matches(str(word), list(choices), 1)
    return f" Did you mean {match[0]!r}?" if match else ""
