"""Recipes: every hyperparameter as a checked field, one TOML file a recipe, and overrides on top.

`load("samsum", {"lora.r": 8})` reads src/recipes/samsum.toml. The fields of [quantization], [lora], [training] and
[generation] have the names that BitsAndBytesConfig, LoraConfig, TrainingArguments and GenerationConfig give them.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from src.refusals import closest, conflicts, like, shown

FOLDER = Path(__file__).parent / "recipes"
SCHEDULERS = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]  # fmt: skip
OPTIMIZERS = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "lion_8bit",
    "ademamix_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit", "adafactor", "sgd", "adagrad", "rmsprop",
]  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1, le=10**9)]
AtLeastZero = Annotated[float, Field(ge=0, le=10**9)]
Layer = Annotated[str, like(r"[\w.]+", "the name of a linear layer such as 'q_proj'")]
Names = Annotated[list[Layer], Field(min_length=1), AfterValidator(lambda names: sorted(set(names)))]
Text = Annotated[str, like(r"[^\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]*", "text without control characters")]
File = Annotated[str, like(r"[^\x00-\x1f\x7f\ud800-\udfff]+", "the path of a file")]
Revision = Annotated[str, like(r"\w[\w./-]*", "a branch, tag or commit")]
Device = Annotated[str, like(r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:<number>")]
Model = Annotated[
    str,
    like(
        r"(?:/|\.{1,2}/|data/|outputs/|[A-Za-z]:[\\/])[^\x00-\x1f\x7f\ud800-\udfff]+|\w[\w.-]*(?:/\w[\w.-]*)*",
        "a model id such as 'mistralai/Mistral-7B-v0.1', or a folder (one with blanks in its name as './my folder')",
    ),
]


class RecipeError(ValueError):
    """A recipe, a field or a combination of fields that cannot be run. The message names the field and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class Data(Section):
    dataset: Literal["demo", "mts_dialog", "samsum", "custom"] = "demo"  # custom: files of your own
    train_rows: Count | None = None  # use the first n training rows (after drop_leaked); None: all
    validation_rows: Count | None = None  # the first n rows for the validation loss; None: all
    drop_leaked: bool = False  # leave out training rows whose dialogue, or a near copy, is in validation or test
    train_file: File | None = None  # custom only: CSV, TSV, JSON(L), parquet with dialogue, summary (also id, section)
    validation_file: File | None = None  # custom only; without it and test_file, train_file is split by split_seed
    test_file: File | None = None  # custom only
    max_file_mb: Count = 512  # a larger file is refused unread: its rows take several times its size in memory
    split_seed: Seed = 42  # custom only: of that split; apart from seed, so that all seeds have the same test rows


class Prompt(Section):
    style: Literal["plain", "chat"] = "plain"  # plain: base models, our own template; chat: the tokenizer's template
    instruction: Text = "Summarize the following dialogue for section: {section}"  # {section} may be left out
    cue: Text = "Summary:"  # plain only: the line after the dialogue that the answer continues
    max_tokens: Annotated[int, Field(ge=32, le=10**6)] = 2048  # a longer prompt loses the end of its dialogue
    few_shot: Annotated[int, Field(ge=0, le=64)] = 0  # worked training examples before the dialogue, within max_tokens


class Quantization(Section):
    load_in_4bit: bool = True  # False: 16-bit weights, the "unquantised" control
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"  # nf4: 16 values placed for normally distributed weights
    bnb_4bit_use_double_quant: bool = True  # quantise the quantisation constants too: 0.37 bits a weight less
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: the device's best


class Lora(Section):
    r: Annotated[int, Field(ge=1, le=65536)] = 16  # columns of each low-rank factor: adapter size and memory grow
    lora_alpha: Annotated[int, Field(ge=1, le=10**6)] = 32  # the update is scaled by lora_alpha / r
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05  # share of the adapter's inputs zeroed in training
    target_modules: Names = LINEAR  # linear layers with an adapter, in any order; lm_head is allowed


class Training(Section):
    num_train_epochs: Annotated[float, Field(gt=0, le=1000)] = 3.0  # passes over the training rows
    max_steps: Annotated[int, Field(ge=-1, le=10**6)] = -1  # stop after n optimizer steps; -1: by epochs
    per_device_train_batch_size: Count = 16  # times gradient_accumulation_steps: the rows of an optimizer step,
    gradient_accumulation_steps: Count = 1  # which the engine regroups into forward passes that fit
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 2e-4  # the peak
    lr_scheduler_type: SCHEDULERS = "linear"  # how the rate falls after the peak
    warmup_steps: AtLeastZero = 0.0  # optimizer steps; a value below 1 is a share of all steps
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decoupled (AdamW), on the adapter
    max_grad_norm: AtLeastZero = 1.0  # gradients of a step are scaled down to this 2-norm
    optim: OPTIMIZERS = "adamw_torch_fused"  # one that needs CUDA becomes adamw_torch on a CPU
    eval_steps: Count | None = None  # validation loss, samples and a checkpoint every n steps; None: every epoch
    early_stopping_patience: Count | None = None  # stop after n evaluations that are no better; None: never
    load_best_model_at_end: bool = True  # keep the adapter of the best evaluation, not the last
    metric_for_best_model: Literal["loss", "rougeL"] = "loss"  # rougeL: of generated answers to all validation rows
    sample_rows: Annotated[int, Field(ge=0, le=10**9)] = 3  # validation dialogues summarised at each evaluation
    keep_checkpoints: bool = False  # keep outputs/<run>/checkpoints after success

    def arguments(self) -> dict:
        """The fields that TrainingArguments takes as they are; when to evaluate, and optim by the device, are not."""
        ours = {"eval_steps", "early_stopping_patience", "sample_rows", "keep_checkpoints", "optim"}
        return self.model_dump(exclude=ours)


class Generation(Section):
    max_new_tokens: Annotated[int, Field(ge=1, le=10**5)] = 256  # an answer that reaches it is counted as cut off
    min_new_tokens: Annotated[int, Field(ge=0, le=10**5)] = 0  # EOS is forbidden before
    num_beams: Annotated[int, Field(ge=1, le=64)] = 1  # 1: greedy or sampling; more: beam search
    early_stopping: bool = False  # beams only: stop when num_beams answers are complete
    length_penalty: Annotated[float, Field(ge=-100, le=100)] = 1.0  # beams only: > 1 favours longer answers
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1000)] = 0  # of prompt and answer together; 0: off
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0  # > 1: tokens of prompt and answer less likely
    do_sample: bool = False  # draw tokens instead of taking the likeliest; seeded by row, whatever the batch
    temperature: Annotated[float, Field(ge=0.001, le=100)] = 1.0  # sampling only
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # sampling only


class Evaluation(Section):
    split: str = "test"  # the split that 03 scores: validation or test; MTS-Dialog has test1 and test2
    rows: Count | None = None  # the first n rows of it; None: all
    # MEDIQA-Chat's is microsoft/deberta-xlarge-mnli; its ranks are the mean of ROUGE-1, BERTScore and BLEURT-20, which
    # is not computed here.
    bertscore_model: Model | None = None  # a hub id; None: BERTScore is not computed


class Engine(Section):  # how a machine computes: never changes which run it is (but fp8), nor the rows of a step
    packing: Literal["auto", "on", "off"] = "auto"  # whole rows without padding; auto: on where varlen attention runs
    fused: Literal["auto", "off"] = "auto"  # fused LoRA layers; auto: on CUDA where they fit
    checkpointing: Literal["auto", "on", "off"] = "auto"  # of activations; auto: only if memory asks for it
    memory_gib: Annotated[float, Field(gt=0, le=10**5)] | None = None  # plan for at most this; None: for what is free
    tokens_per_pass: Count | None = None  # at most, in a forward pass of training; None: planned
    fp8: Literal["on", "off"] = "off"  # frozen products of training in 8 bits: faster from an H100 on, and another run
    graphs: Literal["auto", "on", "off"] = "auto"  # CUDA graphs of steps; auto: if launching takes twice the computing
    checkpoint_minutes: Annotated[float, Field(gt=0, le=10**5)] = 5.0  # 02: so much is lost by a kill, at most
    dequantize: Literal["auto", "on", "off"] = "auto"  # 03: NF4 to 16-bit weights once, same function, faster
    batch_size: Count | None = None  # prompts decoded together; None: chosen from the free memory

    def limits(self) -> dict:
        """The fields that `engine.plan` takes."""
        return self.model_dump(exclude={"dequantize", "batch_size", "checkpoint_minutes"})


class Recipe(Section):
    name: str  # of the file in src/recipes
    base_model: Model = "data/demo/base"  # a hub id, or a folder of this repository
    revision: Revision = "main"  # branch, tag or commit of base_model on the hub; another base_model has main
    pad_token: Literal["unk", "add"] = "unk"  # unk: reuse it, else the own pad token, else BOS; add: a new [PAD]
    device: Device = "auto"  # auto | cpu | cuda | cuda:1 ...
    seed: Seed = 42  # row order, adapter initialisation, dropout, sampling, bootstrap
    data: Data = Data()
    prompt: Prompt = Prompt()
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    training: Training = Training()
    generation: Generation = Generation()
    evaluation: Evaluation = Evaluation()
    engine: Engine = Engine()
    _overridden: dict = PrivateAttr(default_factory=dict)  # {key: value in the file}

    @model_validator(mode="after")
    def _check(self):
        broken = conflicts(self, splits(self.data.dataset)[1:])
        if broken:
            raise ValueError(" ".join(broken))
        return self

    def __str__(self) -> str:
        """The recipe in the order of its file, with overridden fields marked."""
        lines, section = [], ""
        for key, value in flat(self.model_dump()).items():
            text = f"{key.rpartition('.')[2]} = {value!r}"
            if key.rpartition(".")[0] != section:
                section = key.rpartition(".")[0]
                lines += ["", f"[{section}]"]
            was = f"  # overridden; {self._overridden[key]!r} in the file" if key in self._overridden else ""
            lines.append(f"{text:<46}{was}".rstrip())
        return "\n".join(lines)


def names() -> tuple[str, ...]:
    """The recipes that `load` knows: the files of src/recipes."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def splits(dataset: str) -> tuple[str, ...]:
    """The names of a dataset's splits, train first."""
    return ("train", "validation", "test1", "test2") if dataset == "mts_dialog" else ("train", "validation", "test")


def load(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read src/recipes/<name>.toml and replace fields, e.g. `load("samsum", {"lora.r": 8, "seed": 1})`.

    Raises RecipeError for an unknown recipe or field, a wrong type or value, or fields that exclude each other.
    """
    if name not in names():
        raise RecipeError(
            f"Unknown recipe {shown(name)}: expected one of {', '.join(names())}.{closest(name, names())}"
        )
    try:
        values = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"src/recipes/{name}.toml cannot be read as TOML: {error}.") from None
    return build({**values, "name": name}, overrides)


def build(values: dict, overrides: dict[str, Any] | None = None) -> Recipe:
    """A recipe from a nested dictionary of fields, with dotted overrides. Raises RecipeError as `load` does."""
    before, given = _validated(values), {} if overrides is None else overrides
    if not isinstance(given, dict):
        raise RecipeError(f'OVERRIDES is {shown(given)}: expected a dictionary such as {{"lora.r": 8}}.')
    changed, known = before.model_dump(), flat(before.model_dump())
    if given.get("base_model", before.base_model) != before.base_model:
        changed["revision"] = Recipe.model_fields["revision"].default  # the file's is a commit of its own base model
    for key, value in given.items():
        if key not in known:
            raise RecipeError(f"Unknown override {shown(key)}.{closest(key, known)} src/recipes.py lists all fields.")
        section, _, field = key.rpartition(".")
        target = changed[section] if section else changed
        target[field] = list(value) if isinstance(value, tuple) else value
    recipe = _validated(changed)
    after = flat(recipe.model_dump())
    recipe._overridden.update({key: known[key] for key in given if known[key] != after[key]})
    return recipe


def flat(recipe: dict) -> dict[str, Any]:
    """{"seed": 42, "lora.r": 8, ...} of a recipe as a nested dictionary: every field that OVERRIDES accepts."""
    values = {}
    for key, value in recipe.items():
        values |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return {key: value for key, value in values.items() if key != "name"}


def _validated(values: dict) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(_sentence(problem) for problem in error.errors())) from None


def _sentence(problem: dict) -> str:
    """One pydantic error as `field is value (type): what was expected`."""
    key, found, what = ".".join(map(str, problem["loc"])), problem["input"], problem["msg"]
    if not key:
        return what.removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = flat(Recipe(name="").model_dump())
        return f"Unknown field {key!r}.{closest(key, known)} src/recipes.py lists all fields."
    choices = problem.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ").split(", ")
    what = what.removeprefix("Value error, ")
    return f"{key} is {shown(found)} ({type(found).__name__}): {what[0].lower() + what[1:]}.{closest(found, choices)}"
