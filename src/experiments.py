"""What a run is: every hyperparameter with its unit and effect, the named experiments, the run id and where files lie.

`experiment = load_experiment("samsum", **{"lora.rank": 8})` is the first thing each notebook does. An experiment is a
tree of frozen dataclasses; its run id is the name plus a hash of all resolved values, so a changed hyperparameter is a
new run folder and the same parameters always find the same one.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # tests point it at a temporary copy

ATTENTION_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION_LINEAR, "gate_proj", "up_proj", "down_proj")


class ExperimentError(ValueError):
    """An experiment, a field or a combination of fields that cannot be run; the message names the field and the remedy."""


@dataclass(frozen=True)
class Data:
    dataset: str = "demo"  # demo | mts_dialog | samsum | custom
    eval_split: str = "test"  # the split 03 scores: validation or test; MTS-Dialog has test1 and test2
    train_rows: int | None = None  # use the first n training rows (after drop_leaked); None: all
    validation_rows: int | None = None  # the first n rows for the validation loss; None: all
    eval_rows: int | None = None  # the first n rows of eval_split; None: all
    drop_leaked: bool = False  # leave out training rows whose dialogue also occurs in validation or test
    train_file: str | None = None  # custom only: CSV or JSONL with dialogue, summary (optional: id, section)
    validation_file: str | None = None  # custom only; without it and test_file, train_file is split by split_seed
    test_file: str | None = None  # custom only
    split_seed: int = 42  # custom only: of that split; apart from seed, so that all seeds have the same test rows


@dataclass(frozen=True)
class Prompt:
    style: str = "plain"  # plain: base models, our own template; chat: the tokenizer's chat template
    instruction: str = "Summarize the following dialogue for section: {section}"  # {section} may be left out
    cue: str = "Summary:"  # plain only: the line after the dialogue that the answer continues
    max_tokens: int = 2048  # longer prompts lose the end of their dialogue, nothing else; answers are never cut
    few_shot: int = 0  # worked training examples put before the dialogue (they use prompt tokens)


@dataclass(frozen=True)
class Quantization:
    bits: int = 4  # 4: bitsandbytes; 16: no quantisation (the "unquantised weights" control)
    type: str = "nf4"  # nf4 | fp4
    double: bool = True  # quantise the quantisation constants too: 0.37 bits a weight less
    compute_dtype: str = "auto"  # auto: bfloat16 where the GPU has it, float16 on older ones, float32 on a CPU


@dataclass(frozen=True)
class Lora:
    rank: int = 16  # columns of each low-rank factor: adapter size and memory grow with it
    alpha: int = 32  # the update is scaled by alpha / rank
    dropout: float = 0.05  # share of the adapter's inputs zeroed in training; 0 is faster
    target_modules: tuple[str, ...] = ALL_LINEAR  # lm_head is allowed; the adapter then carries its weights


@dataclass(frozen=True)
class Training:
    epochs: float = 3  # passes over the training rows
    max_steps: int | None = None  # stop after n optimizer steps, whatever epochs says
    batch_size: int = 16  # rows per optimizer step, accumulation included
    micro_batch_size: int | None = None  # padded: rows per forward pass, divides batch_size; None: planned
    token_budget: int | None = None  # packed: tokens per forward pass; None: planned
    packing: str = "auto"  # on: whole rows, no padding | off: padded by length | auto: on where varlen attention runs
    kernels: str = "auto"  # auto: fused kernels on CUDA where they help | off
    checkpointing: str = "auto"  # of activations. auto: only if memory asks for it | on | off
    memory_gib: float | None = None  # plan for at most this much GPU memory; None: for what is free
    learning_rate: float = 2e-4  # the peak
    schedule: str = "linear"  # any transformers scheduler name: linear, cosine, constant_with_warmup, ...
    warmup_steps: float = 0  # optimizer steps; a value below 1 is a fraction of all steps
    weight_decay: float = 0.0  # decoupled (AdamW), on the adapter
    max_grad_norm: float = 1.0  # gradients of a step are scaled down to this 2-norm
    optimizer: str = "adamw_torch_fused"  # any transformers name, e.g. paged_adamw_32bit (CUDA)
    eval_steps: int | None = None  # validation loss and samples every n optimizer steps; None: every epoch
    early_stopping_patience: int | None = None  # stop after n evaluations without a better loss; None: never
    keep_best: bool = True  # the adapter with the lowest validation loss is kept, not the last
    sample_rows: int = 1  # validation dialogues summarised at each evaluation
    keep_checkpoints: bool = False  # keep outputs/<run>/checkpoints after success


@dataclass(frozen=True)
class Generation:
    max_new_tokens: int = 256  # an answer that reaches it is counted as cut off
    min_new_tokens: int = 0  # EOS is forbidden before
    num_beams: int = 1  # 1: greedy or sampling; more: beam search
    early_stopping: bool = False  # beams only: stop when num_beams answers are complete
    length_penalty: float = 1.0  # beams only: > 1 favours longer answers
    no_repeat_ngram_size: int = 0  # 0: off
    do_sample: bool = False  # draw tokens instead of taking the likeliest; seeded
    temperature: float = 1.0  # sampling only
    top_p: float = 1.0  # sampling only
    batch_size: int | None = None  # prompts decoded together; None: chosen from the free memory
    dequantize: str = "auto"  # on: NF4 to 16-bit weights once, same function, faster | off | auto: if memory allows


MACHINE = (  # fields that say how a machine computes, not what: they may change between training and evaluation
    "device",
    "training.memory_gib",
    "training.keep_checkpoints",
    "generation.batch_size",
    "generation.dequantize",
)


@dataclass(frozen=True)
class Experiment:
    name: str
    base_model: str = "data/demo/base"  # a Hugging Face model id or a folder (relative to the repository)
    revision: str = "main"  # branch, tag or commit on the hub; the commit it resolved to is recorded
    pad_token: str = "unk"  # unk: reuse it, else the own pad token, else BOS | add: a new [PAD]; new embeddings are saved with the adapter
    device: str = "auto"  # auto | cpu | cuda | cuda:1 ...
    seed: int = 42  # row order, adapter initialisation, dropout, sampling, bootstrap
    data: Data = field(default_factory=Data)
    prompt: Prompt = field(default_factory=Prompt)
    quantization: Quantization = field(default_factory=Quantization)
    lora: Lora = field(default_factory=Lora)
    training: Training = field(default_factory=Training)
    generation: Generation = field(default_factory=Generation)

    @property
    def run_id(self) -> str:
        """The name plus the first 8 hex digits of the sha256 of all resolved values but MACHINE's: same parameters, same run."""
        values = dataclasses.asdict(self)
        for key in MACHINE:
            part, _, name = key.rpartition(".")
            del (values[part] if part else values)[name]
        text = json.dumps(values, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def run_dir(self) -> Path:
        return ROOT / "outputs" / self.run_id

    @property
    def processed_dir(self) -> Path:
        return ROOT / "data" / "processed" / self.data.dataset


def _named() -> dict[str, Experiment]:
    """The experiments by name. Each differs from the defaults above only in what is written here."""
    mts_prompt = Prompt(
        instruction="Summarize the following dialogue for section: {section}", cue="Summary:", max_tokens=2048
    )
    sam_prompt = Prompt(style="chat", instruction="Summarize the following dialogue.", max_tokens=4096)
    mts_dialog = Experiment(
        name="mts_dialog",
        base_model="mistralai/Mistral-7B-v0.1",
        pad_token="unk",  # published: add
        data=Data(dataset="mts_dialog", eval_split="test1"),
        prompt=mts_prompt,
        quantization=Quantization(type="nf4", double=False),  # published: fp4 with fp32 compute
        lora=Lora(rank=8, alpha=32, dropout=0.05, target_modules=("q_proj", "v_proj")),
        training=Training(epochs=3, batch_size=16, learning_rate=3e-4),
        generation=Generation(max_new_tokens=400),  # published: 4 beams, 200 tokens, which cut 7% of the references
    )
    samsum = Experiment(
        name="samsum",
        base_model="mistralai/Mistral-7B-Instruct-v0.2",
        data=Data(dataset="samsum", train_rows=7366),
        prompt=sam_prompt,
        quantization=Quantization(double=False),
        lora=Lora(rank=32, alpha=64, dropout=0.1),  # published: lm_head as well
        training=Training(
            epochs=3,
            batch_size=3,
            learning_rate=3e-4,
            warmup_steps=50,
            weight_decay=0.001,
            max_grad_norm=0.3,
            optimizer="paged_adamw_32bit",
            eval_steps=500,
            keep_best=False,
        ),
    )
    best = dict(
        quantization=Quantization(double=True),
        lora=Lora(rank=32, alpha=64, dropout=0.0),
        training=Training(
            epochs=3,
            batch_size=16,
            learning_rate=2e-4,
            schedule="cosine",
            warmup_steps=0.03,
            max_grad_norm=0.3,
        ),
    )
    return {
        "demo": Experiment(
            name="demo",
            prompt=Prompt(max_tokens=512),
            lora=Lora(rank=16, alpha=32, dropout=0.0),
            training=Training(
                epochs=1,
                batch_size=8,
                learning_rate=3e-3,
                warmup_steps=0.05,
                schedule="cosine",
                eval_steps=50,
            ),
            generation=Generation(max_new_tokens=96),
        ),
        "mts_dialog": mts_dialog,
        "samsum": samsum,
        "mts_dialog_best": dataclasses.replace(
            mts_dialog,
            name="mts_dialog_best",
            data=dataclasses.replace(mts_dialog.data, drop_leaked=True),
            **best,
        ),
        "samsum_best": dataclasses.replace(
            samsum,
            name="samsum_best",
            data=dataclasses.replace(samsum.data, train_rows=None, drop_leaked=True),
            **best,
        ),
        "custom": Experiment(
            name="custom",
            base_model="mistralai/Mistral-7B-Instruct-v0.2",
            data=Data(dataset="custom", train_file="data/raw/custom.csv"),
            prompt=sam_prompt,
            **best,
        ),
    }


def names() -> tuple[str, ...]:
    """The experiments that `load_experiment` knows."""
    return tuple(_named())


def load_experiment(name: str, /, **overrides) -> Experiment:
    """The named experiment with fields replaced, e.g. `load_experiment("samsum", **{"lora.rank": 8, "seed": 1})`.

    Raises ExperimentError for an unknown name or field, a value of the wrong type, or fields that exclude each other.
    """
    experiments = _named()
    if name not in experiments:
        raise ExperimentError(
            f"Unknown experiment {name!r}: expected one of {', '.join(experiments)}.{_closest(name, experiments)}"
        )
    experiment = experiments[name]
    for key, value in overrides.items():
        experiment = _replace(experiment, key, value)
    _check(experiment)
    return experiment


def field_names(experiment: Experiment) -> list[str]:
    """Every key that OVERRIDES accepts, dotted: seed, lora.rank, ..."""
    keys = []
    for f in dataclasses.fields(experiment):
        value = getattr(experiment, f.name)
        if dataclasses.is_dataclass(value):
            keys += [f"{f.name}.{sub.name}" for sub in dataclasses.fields(value)]
        elif f.name != "name":
            keys.append(f.name)
    return keys


def _closest(word, choices) -> str:
    match = difflib.get_close_matches(word, list(choices), 1)
    return f" Did you mean {match[0]!r}?" if match else ""


def _replace(experiment: Experiment, key: str, value):
    known = field_names(experiment)
    if key not in known:
        raise ExperimentError(
            f"Unknown override {key!r} for experiment {experiment.name!r}: expected a field such as 'seed' or "
            f"'lora.rank'.{_closest(key, known)} All fields are listed with their meaning in src/experiments.py."
        )
    *parents, leaf = key.split(".")
    owner = getattr(experiment, parents[0]) if parents else experiment
    value = _coerce(key, value, typing.get_type_hints(type(owner))[leaf])
    if value == getattr(owner, leaf):  # 1 and 1.0 are one value, and shall be one run
        value = getattr(owner, leaf)
    owner = dataclasses.replace(owner, **{leaf: value})
    return dataclasses.replace(experiment, **{parents[0]: owner}) if parents else owner


def _coerce(key: str, value, hint):
    """JSON's types for Python's: a list becomes a tuple, an int is a float; anything else of the wrong type is refused."""
    options = typing.get_args(hint) if isinstance(hint, type(int | None)) else (hint,)
    for option in options:
        if (
            typing.get_origin(option) is tuple
            and isinstance(value, list | tuple)
            and all(isinstance(v, str) for v in value)
        ):
            return tuple(value)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return int(value) if float(value).is_integer() else value
        if isinstance(option, type) and isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return value
    expected = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint
    raise ExperimentError(f"Override {key!r} is {value!r} ({type(value).__name__}): expected {expected}.")


_CHOICES = {
    "data.dataset": ("demo", "mts_dialog", "samsum", "custom"),
    "prompt.style": ("plain", "chat"),
    "quantization.bits": (4, 16),
    "quantization.type": ("nf4", "fp4"),
    "quantization.compute_dtype": ("auto", "bfloat16", "float16", "float32"),
    "training.packing": ("auto", "on", "off"),
    "training.kernels": ("auto", "off"),
    "training.checkpointing": ("auto", "on", "off"),
    "generation.dequantize": ("auto", "on", "off"),
    "pad_token": ("unk", "add"),
}
_AT_LEAST = {  # the smallest value that makes sense; None is always allowed where the type allows it
    "data.train_rows": 1,
    "data.validation_rows": 1,
    "data.eval_rows": 1,
    "prompt.max_tokens": 32,
    "prompt.few_shot": 0,
    "lora.rank": 1,
    "lora.alpha": 1,
    "lora.dropout": 0,
    "training.max_steps": 1,
    "training.batch_size": 1,
    "training.micro_batch_size": 1,
    "training.token_budget": 1,
    "training.memory_gib": 1,
    "training.learning_rate": 0,
    "training.warmup_steps": 0,
    "training.max_grad_norm": 0,
    "training.eval_steps": 1,
    "training.early_stopping_patience": 1,
    "training.sample_rows": 0,
    "generation.max_new_tokens": 1,
    "generation.min_new_tokens": 0,
    "generation.num_beams": 1,
    "generation.no_repeat_ngram_size": 0,
    "generation.batch_size": 1,
}


def _check(e: Experiment):
    """Refuse what cannot be run, naming the field."""

    def value(key):
        return getattr(getattr(e, key.split(".")[0]), key.split(".")[1]) if "." in key else getattr(e, key)

    for key, choices in _CHOICES.items():
        if value(key) not in choices:
            raise ExperimentError(f"{key} is {value(key)!r}: expected one of {', '.join(map(repr, choices))}.")
    for key, least in _AT_LEAST.items():
        if value(key) is not None and value(key) < least:
            raise ExperimentError(f"{key} is {value(key)}: expected at least {least}.")
    t, g = e.training, e.generation
    conflicts = [
        (
            not e.lora.target_modules,
            "lora.target_modules is empty: name at least one linear layer, e.g. q_proj.",
        ),
        (t.epochs <= 0, f"training.epochs is {t.epochs}: expected more than 0."),
        (e.lora.dropout >= 1, f"lora.dropout is {e.lora.dropout}: expected a probability below 1."),
        (
            t.micro_batch_size is not None and t.batch_size % t.micro_batch_size != 0,
            f"training.micro_batch_size is {t.micro_batch_size}: expected a divisor of training.batch_size ({t.batch_size}).",
        ),
        (
            g.do_sample and g.num_beams > 1,
            "generation.do_sample and generation.num_beams > 1 exclude each other: choose one.",
        ),
        (
            not g.do_sample and (g.temperature != 1.0 or g.top_p != 1.0),
            "generation.temperature and generation.top_p only act when generation.do_sample is true: set it, or leave them at 1.",
        ),
        (
            g.num_beams == 1 and (g.early_stopping or g.length_penalty != 1.0),
            "generation.early_stopping and generation.length_penalty only act with generation.num_beams > 1.",
        ),
        (
            g.min_new_tokens > g.max_new_tokens,
            f"generation.min_new_tokens ({g.min_new_tokens}) exceeds generation.max_new_tokens ({g.max_new_tokens}).",
        ),
        (
            e.data.dataset != "custom" and any((e.data.train_file, e.data.validation_file, e.data.test_file)),
            f"data.train_file, validation_file and test_file belong to the custom dataset; data.dataset is {e.data.dataset!r}.",
        ),
        (
            e.data.dataset == "custom" and not e.data.train_file,
            "data.train_file is missing: expected the path of a CSV or JSONL file with the columns dialogue and summary.",
        ),
        (
            e.data.eval_split not in splits(e.data.dataset) or e.data.eval_split == "train",
            f"data.eval_split is {e.data.eval_split!r}: {e.data.dataset} can be scored on {', '.join(splits(e.data.dataset)[1:])}.",
        ),
    ]
    for broken, message in conflicts:
        if broken:
            raise ExperimentError(message)


def splits(dataset: str) -> tuple[str, ...]:
    """The names of a dataset's splits, train first."""
    return ("train", "validation", "test1", "test2") if dataset == "mts_dialog" else ("train", "validation", "test")


def write_atomic(path: Path, text: str) -> Path:
    """Write UTF-8 text under a temporary name and rename, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)
    return path


def write_json(path: Path, value) -> Path:
    return write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows) -> Path:
    return write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path, made_by: str):
    """Parse a JSON file that an earlier notebook wrote; a missing file is an error that names that notebook."""
    return json.loads(_read(path, made_by))


def read_jsonl(path: Path, made_by: str) -> list[dict]:
    """The rows of a JSONL file that an earlier notebook wrote; a missing file is an error that names that notebook."""
    return [json.loads(line) for line in _read(path, made_by).split("\n") if line]


def _read(path: Path, made_by: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"{relative(path)} is missing: run notebooks/{made_by}.ipynb first, with the same EXPERIMENT and OVERRIDES."
        )
    return path.read_text(encoding="utf-8")


def relative(path: Path) -> str:
    """The path as a user of the repository writes it: relative to the root, with forward slashes."""
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_config(experiment: Experiment, inputs: dict | None = None) -> Path:
    """Write the resolved experiment, and the checksums of what the run reads, to outputs/<run>/config.json."""
    config = {"run_id": experiment.run_id, **dataclasses.asdict(experiment), "inputs": inputs or {}}
    return write_json(experiment.run_dir / "config.json", config)
