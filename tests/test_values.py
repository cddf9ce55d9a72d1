"""Bad values: each is refused before torch is loaded or, where only the base model can tell, before its weights are."""

import json
import math
import pickle
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, MistralConfig, TrainingArguments

from src import engine, recipes
from src.recipes import RecipeError

ROOT = Path(__file__).resolve().parents[1]
SAMPLING, LONG = {"generation.do_sample": True}, "9" * 300
CUSTOM = {"data.train_file": "a.csv"}


def fields():
    """{"lora.r": its annotation, ...}"""
    own = {name: field.annotation for name, field in recipes.Recipe.model_fields.items() if name != "name"}
    sections = {name: kind for name, kind in own.items() if hasattr(kind, "model_fields")}
    plain = {name: kind for name, kind in own.items() if name not in sections}
    parts = {f"{s}.{name}": f.annotation for s, kind in sections.items() for name, f in kind.model_fields.items()}
    return plain | parts


def of_no_type(annotation):
    """Values that a field of this annotation can never have."""
    kinds, optional = {annotation, *typing.get_args(annotation)}, type(None) in typing.get_args(annotation)
    kinds |= {typing.get_args(kind)[0] for kind in kinds if typing.get_args(kind)}
    values = [{}, {"r": 8}, b"16"] + ([] if optional else [None])
    values += [] if list in {typing.get_origin(kind) for kind in kinds} else [[], [16]]
    if float in kinds or int in kinds:
        values += ["16", True, math.nan, math.inf, -math.inf, 10**30, 10**5000, 1e300]
    if int in kinds and float not in kinds:
        values += [0.5, -(10**30)]
    if str in kinds or typing.get_origin(annotation) is typing.Literal:
        values += [16, 0.5, True, "\ud800"]
    if bool in kinds:
        values = [value for value in values if value is not True] + [0, 1, "true", "False", math.nan]
    return values


WRONG = [({key: value}, key, "") for key, kind in fields().items() for value in of_no_type(kind)]
OUT_OF_RANGE = {  # field: values, each refused beside what else it takes to act
    "seed": [-1, 2**32],
    "data.split_seed": [-1, 2**32],
    "device": ["mps", "gpu", "CPU", "", " cpu", "cuda:", "cuda:-1", "cuda:x", "cuda:1234", "cuda 1", "meta", "cpu\0"],
    "base_model": [
        "", " ", "a b/c", "mistralai/Mistral 7B", "a/b\n", "a/b\0", "https://host/a/b", "~/model", "a//b", "/", "a/",
        "-a/b", "a/b?", "\u202ea/b", "a:b/c:d", "a" + "\x1b[31m/b",
    ],
    "revision": ["", " main", "main ", "../main", "a b", "-x", "main\0", "main~1", "@"],
    "pad_token": ["", "eos", "UNK", "[PAD]"],
    "data.dataset": ["", "xsum", "Demo", "samsum ", "mts-dialog"],
    "data.train_file": ["", "a\0b", "a\nb", "\x1b[31m"],
    "data.train_rows": [0, -1, 10**9 + 1],
    "data.validation_rows": [0, -5],
    "data.max_file_mb": [0, -1],
    "prompt.style": ["", "Plain", "instruct", "chatml"],
    "prompt.instruction": [
        "a\0b", "\x1b[31mred", "{sectoin}", "{Section}", "{dialogue}", "{section} {sections}", "{sect}",
    ],
    "prompt.cue": ["\0", "a\rb", "\x7f"],
    "prompt.max_tokens": [0, 31, -1, 10**6 + 1],
    "prompt.few_shot": [-1, 65],
    "quantization.bnb_4bit_quant_type": ["", "NF4", "int8", "nf8"],
    "quantization.bnb_4bit_compute_dtype": ["fp16", "bf16", "float64", "torch.bfloat16", "int8"],
    "lora.r": [0, -8, 65537],
    "lora.lora_alpha": [0, -1, 10**6 + 1],
    "lora.lora_dropout": [1, 1.0, 1.5, -0.1],
    "lora.target_modules": [
        [], [""], ["q_proj "], ["all-linear"], ["q_proj", None], ["q_proj", 1], [["q_proj"]], "q_proj", "all-linear",
        [".*"], ["q_proj,v_proj"], ["q\0"], {"q_proj": 1},
    ],
    "training.num_train_epochs": [0, -1, 1001, -0.0],
    "training.max_steps": [0, -2, 10**6 + 1],
    "training.per_device_train_batch_size": [0, -1, 10**9 + 1],
    "training.gradient_accumulation_steps": [0, -1],
    "training.learning_rate": [-1e-9, 11],
    "training.lr_scheduler_type": [
        "", "cosin", "Linear", "reduce_lr_on_plateau", "cosine_with_min_lr", "warmup_stable_decay", "greedy", "cosine ",
    ],
    "training.warmup_steps": [-0.1, -1, 10**9 + 1, 1.5, 50.25],
    "training.weight_decay": [-0.1, 1],
    "training.max_grad_norm": [-1],
    "training.optim": ["", "adam", "adamw", "AdamW", "adamw_fast", "adamw_torch_xla", "lomo", "galore_adamw", "sgd "],
    "training.eval_steps": [0, -1],
    "training.early_stopping_patience": [0, -1],
    "training.metric_for_best_model": ["", "eval_loss", "rouge", "accuracy"],
    "training.sample_rows": [-1],
    "generation.max_new_tokens": [0, -1, 10**5 + 1],
    "generation.min_new_tokens": [-1, 257],
    "generation.num_beams": [0, -1, 65],
    "generation.length_penalty": [-101, 101],
    "generation.no_repeat_ngram_size": [-1, 1001],
    "generation.repetition_penalty": [0, -1, 1e-300, 101],
    "generation.temperature": [0, -1, 1e-300, 101],
    "generation.top_p": [0, -0.5, 1.5, 7],
    "evaluation.split": ["", "train", "Test", "test1", "validation "],
    "evaluation.rows": [0, -1],
    "evaluation.bertscore_model": ["", "a b", "microsoft/deberta xlarge"],
    "engine.packing": ["", "yes", "ON"],
    "engine.fused": ["on", "off "],
    "engine.checkpointing": ["", "true"],
    "engine.memory_gib": [0, -1, 10**6],
    "engine.tokens_per_pass": [0, -1],
    "engine.checkpoint_minutes": [0, -1, 10**6],
    "engine.dequantize": ["", "4bit"],
    "engine.batch_size": [0, -1],
}  # fmt: skip
NEEDED = {"generation.temperature": SAMPLING, "generation.top_p": SAMPLING, "generation.length_penalty": {}}
RANGE = [
    (NEEDED.get(key, {}) | {key: value}, key, "") for key, values in OUT_OF_RANGE.items() for value in values
]  # fmt: skip
TOGETHER = [  # overrides of samsum, the field that is named, what else the message says
    (SAMPLING | {"generation.num_beams": 4}, "generation.do_sample", "exclude each other"),
    ({"generation.temperature": 0.5}, "generation.temperature", "set it too"),
    ({"generation.top_p": 0.5}, "top_p", "set it too"),
    ({"generation.length_penalty": 2.0}, "length_penalty", "num_beams > 1"),
    ({"generation.early_stopping": True}, "generation.early_stopping", "num_beams > 1"),
    ({"generation.min_new_tokens": 9, "generation.max_new_tokens": 8}, "generation.min_new_tokens (9)", "(8)"),
    ({"training.max_steps": 50}, "training.warmup_steps (50)", "takes all of training.max_steps (50)"),
    ({"training.max_steps": 4, "training.warmup_steps": 9}, "training.warmup_steps (9)", "(4)"),
    ({"training.lr_scheduler_type": "constant"}, "training.warmup_steps", "'constant_with_warmup'"),
    (
        {"training.lr_scheduler_type": "polynomial", "training.learning_rate": 1e-8},
        "training.learning_rate is 1e-08",
        "expected more than 1e-7",
    ),
    (
        {"training.per_device_train_batch_size": 10**6, "training.gradient_accumulation_steps": 10**6},
        "training.per_device_train_batch_size x gradient_accumulation_steps is 1000000000000",
        "expected at most 65536",
    ),
    ({"device": "cpu", "quantization.bnb_4bit_compute_dtype": "float16"}, "compute_dtype is 'float16'", "'auto'"),
    ({"prompt.cue": "Note:"}, "prompt.cue", "prompt.style 'plain'"),
    ({"data.train_rows": 3, "prompt.few_shot": 3}, "prompt.few_shot is 3", "expected less than data.train_rows (3)"),
    ({"data.dataset": "custom"}, "data.train_file is missing", "expected a file of your own"),
    ({"data.dataset": "samsum", "data.train_file": "a.csv"}, "data.train_file", "for the custom dataset, not 'samsum'"),
    ({"data.dataset": "mts_dialog"}, "evaluation.split is 'test'", "can be scored on validation, test1, test2"),
    (CUSTOM | {"data.dataset": "custom", "data.test_file": "b"}, "data.validation_file", "give both, or neither"),
    (
        CUSTOM | {"data.dataset": "custom", "data.validation_file": "b", "data.test_file": "a.csv"},
        "data.train_file, validation_file and test_file name a file twice",
        "a.csv",
    ),
]
NAMES = [  # a key of OVERRIDES, the field that was meant
    ("lora.rank", "lora.r"), ("lora.R", "lora.r"), ("lr", None), ("learning_rate", "training.learning_rate"),
    ("training.lr", "training.lr_scheduler_type"), ("training.batchsize", "training.per_device_train_batch_size"),
    ("lora.targets", "lora.target_modules"), ("lora.target_module", "lora.target_modules"),
    ("trainin.optim", "training.optim"), ("Training.optim", "training.optim"), ("lora.r\0", "lora.r"),
    ("training_optim", "training.optim"), ("quantization.4bit", "quantization.load_in_4bit"),
    ("dataset", "data.dataset"),
    ("generation.beams", "generation.num_beams"), ("generation.top_k", "generation.top_p"), ("lora.r.r", None),
    ("__class__", None), ("name", None), ("lora", None), ("x" * 10**5, None), ("\u202elora.r", "lora.r"), (None, None),
]  # fmt: skip
NAMED = [({key: 8}, "Unknown override", f"Did you mean {meant!r}?" if meant else "") for key, meant in NAMES]
BAD = WRONG + RANGE + TOGETHER + NAMED


def refusal(overrides):
    name = "custom" if "data.train_file" in overrides and "data.dataset" not in overrides else "samsum"
    with pytest.raises(RecipeError) as error:
        recipes.load(name, overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "field", "words"), BAD, ids=[f"{n}-{case[1][:40]}" for n, case in enumerate(BAD)]
)
def test_a_bad_value_is_refused_by_name(overrides, field, words):
    message = refusal(overrides)
    assert field in message and words in message and len(message) < 900
    if field in overrides and not words:  # what was found, and what was expected
        assert re.search(f"{field}(\\.\\d+)? (is|holds) ", message) or field == "generation.min_new_tokens"
        assert re.search("should|expected|can be scored on|exceeds", message)
    assert "mean ''" not in message
    assert message.isprintable() or "\n" in message  # no control character of the value


def test_there_are_enough_cases():
    seen = {field for _, field, _ in WRONG}
    assert seen == set(fields()) and len(WRONG) >= 400 and len(RANGE) >= 150 and len(TOGETHER) + len(NAMED) >= 40


def test_they_are_refused_before_torch_is_loaded():
    code = (
        "import pickle, sys\nfrom src import recipes\n"
        "for overrides in pickle.load(sys.stdin.buffer):\n"
        "    name = 'custom' if 'data.train_file' in overrides and 'data.dataset' not in overrides else 'samsum'\n"
        "    try:\n        recipes.load(name, overrides)\n        print('accepted', overrides)\n"
        "    except recipes.RecipeError:\n        pass\n"
        "print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    cases = pickle.dumps([overrides for overrides, _, _ in BAD])
    done = subprocess.run([sys.executable, "-c", code], input=cases, capture_output=True, cwd=ROOT, timeout=120)
    assert (done.stdout.decode(), done.stderr) == ("set()\n", b"")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"), ("", "is not JSON"), ("{'lora.r': 8}", "is not JSON"), ("[1]", "expected a dictionary"),
        ('"lora.r"', "expected a dictionary"), ("8", "expected a dictionary"), ("[" * 10**5, "is not JSON"),
        ('{"seed": 1' + "0" * 5000 + "}", "is not JSON"), ('{"seed": 1, "seed": 2}', "a field more than once"),
        ('{"seed": NaN}', "seed is nan"), ('{"lora.lora_dropout": -Infinity}', "lora.lora_dropout is -inf"),
        ('{"seed": 1}}', "is not JSON"), ("\x1b[31m", "is not JSON"), ('{"lora": {"r": 8}}', "Unknown override 'lora'"),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_overrides_on_a_command_line_are_refused_in_one_paragraph(text, words, capsys):
    from src import run

    assert run.main(["demo", text]) == 1
    said = capsys.readouterr().err
    assert words in said and len(said) < 600 and said.strip().isprintable()


CONFIG = MistralConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
ROWS = {"input_ids": [[5] * 20] * 8, "labels": [[-100] * 15 + [5] * 5] * 8}  # 8 rows: 3 epochs of 8 are 3 steps
LAYERS = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


def plan(overrides):
    """What 02 does before it loads the model, with a base of which there is a configuration alone."""
    recipe = recipes.load("demo", {"training.per_device_train_batch_size": 8, **overrides})
    t = recipe.training
    arguments = TrainingArguments(
        output_dir="unused", num_train_epochs=t.num_train_epochs, max_steps=t.max_steps, use_cpu=True, optim=t.optim,
        per_device_train_batch_size=t.per_device_train_batch_size, warmup_steps=t.warmup_steps,
        gradient_accumulation_steps=t.gradient_accumulation_steps, lr_scheduler_type=t.lr_scheduler_type,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", **recipe.lora.model_dump())
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return engine.plan(CONFIG, lora, quantization, arguments, ROWS, torch.device("cpu"))


@pytest.mark.parametrize(
    ("overrides", "field", "words"),
    [
        *(
            ({"lora.target_modules": names}, f"target_modules names {wrong}:", f"the linear layers {LAYERS}")
            for names, wrong in (
                (["qproj"], "qproj"), (["q_proj", "w1"], "w1"), (["model"], "model"), (["layers"], "layers"),
                (["embed_tokens"], "embed_tokens"), (["norm", "v_proj"], "norm"), (["proj"], "proj"),
                (["layers.9.self_attn.q_proj"], "layers.9.self_attn.q_proj"), (["Q_PROJ"], "Q_PROJ"),
                (["query_key_value", "c_attn"], "c_attn, query_key_value"), (["all_linear"], "all_linear"),
            )
        ),
        ({"lora.r": 65}, "lora.r is 65", "a rank of at most 64"),
        ({"lora.r": 65536}, "lora.r is 65536", "a rank of at most 64"),
        ({"lora.r": 33, "lora.target_modules": ["k_proj"]}, "lora.r is 33", "a rank of at most 32"),
        ({"training.warmup_steps": 3, "training.num_train_epochs": 3}, "training.warmup_steps is 3", "3 optimizer"),
        ({"training.warmup_steps": 100}, "training.warmup_steps is 100", "or train longer"),
    ],
    ids=str,
)  # fmt: skip
def test_what_only_the_base_model_and_the_rows_can_tell_is_refused_without_weights(overrides, field, words):
    with pytest.raises(engine.PlanError) as error:
        plan(overrides)
    assert field in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        {"lora.r": 1}, {"lora.r": 64}, {"lora.target_modules": ["q_proj", "lm_head"]}, {"lora.lora_dropout": 0.999},
        {"training.num_train_epochs": 1e-9}, {"training.num_train_epochs": 1000}, {"training.max_steps": 1},
        {"training.per_device_train_batch_size": 65536}, {"training.warmup_steps": 0.999},
        {"training.warmup_steps": 2, "training.max_steps": 3}, {"lora.target_modules": ["layers.1.mlp.down_proj"]},
        {"training.lr_scheduler_type": "constant", "training.warmup_steps": 0}, {"training.learning_rate": 0},
    ],
    ids=str,
)  # fmt: skip
def test_edge_values_that_can_train_are_planned(overrides):
    assert plan(overrides).steps >= 1


@pytest.mark.parametrize(
    "overrides",
    [
        {"seed": 0}, {"seed": 2**32 - 1}, {"prompt.instruction": ""}, {"prompt.instruction": "{{.Prompt}} {x} {0}"},
        {"prompt.instruction": 'As {"json": 1}\n\t{section}'},
        {"prompt.cue": ""}, {"prompt.instruction": "\u202e</s>"}, {"device": "cuda"}, {"device": "cuda:7"},
        {"base_model": "/a b/c"}, {"base_model": "./my model"}, {"base_model": "C:\\models\\x"},
        {"base_model": "gpt2"},
        {"base_model": "../models/tiny"}, {"base_model": "models/tiny"}, {"revision": "refs/pr/1"},
        {"revision": "a" * 40},
        {"generation.max_new_tokens": 1}, {**SAMPLING, "generation.temperature": 0.001, "generation.top_p": 1e-9},
        {"generation.min_new_tokens": 96}, {"generation.num_beams": 2, "generation.length_penalty": -1.0},
        {"data.train_rows": 1}, {"data.train_rows": 10**9}, {"prompt.few_shot": 64, "prompt.max_tokens": 10**6},
        {"training.weight_decay": 0.999}, {"training.max_grad_norm": 0}, {"evaluation.split": "validation"}, {},
    ],
    ids=str,
)  # fmt: skip
def test_edge_values_are_accepted_and_kept(overrides):
    kept = recipes.load("demo", overrides).model_dump()
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        assert (kept[section] if section else kept)[name] == value
    json.dumps(kept)


def test_transformers_makes_every_optimiser_and_every_schedule_that_a_recipe_may_name():
    from transformers import Trainer, get_scheduler

    from src.runs import identity

    for name in typing.get_args(recipes.SCHEDULERS):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
        assert get_scheduler(name, optimizer, 1, 3).get_last_lr()[0] >= 0
    for name in typing.get_args(recipes.OPTIMIZERS):
        for asked in {name, identity.usable_optimizer(name, torch.device("cpu"))}:
            arguments = TrainingArguments(output_dir="unused", optim=asked, use_cpu=True)
            make, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        make([torch.nn.Parameter(torch.ones(1))], **settings)  # the one that runs on a CPU
