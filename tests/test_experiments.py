"""Experiments: what an override may be, when a run id changes, which combinations are refused."""

import dataclasses
import re

import pytest

from src import experiments
from src.experiments import ExperimentError, load_experiment


def test_every_named_experiment_loads():
    assert experiments.names() == ("demo", "mts_dialog", "samsum", "mts_dialog_best", "samsum_best", "custom")
    assert len({load_experiment(name).run_id for name in experiments.names()}) == 6


def test_run_id_depends_on_values_alone():
    plain = load_experiment("samsum")
    assert load_experiment("samsum", **{"lora.rank": plain.lora.rank}).run_id == plain.run_id
    assert load_experiment("samsum", **{"lora.rank": 8}).run_id != plain.run_id
    assert re.fullmatch(r"samsum-[0-9a-f]{8}", plain.run_id)
    machine = {
        "device": "cpu",
        "training.memory_gib": 15,
        "training.keep_checkpoints": True,
        "generation.batch_size": 2,
        "generation.dequantize": "off",
    }
    assert set(machine) == set(experiments.MACHINE)
    assert load_experiment("samsum", **machine).run_id == plain.run_id


def test_overrides_reach_their_field_and_json_types_are_accepted():
    e = load_experiment(
        "samsum",
        **{
            "lora.target_modules": ["q_proj", "lm_head"],
            "lora.dropout": 0,
            "data.train_rows": None,
            "seed": 7,
        },
    )
    assert (
        e.lora.target_modules == ("q_proj", "lm_head")
        and e.lora.dropout == 0
        and e.data.train_rows is None
        and e.seed == 7
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lora.rnk": 8}, r"Unknown override 'lora.rnk'.*Did you mean 'lora.rank'"),
        ({"rank": 8}, r"Unknown override 'rank'"),
        ({"lora": {}}, r"Unknown override 'lora'"),
        ({"lora.rank": "8"}, r"'lora.rank' is '8' \(str\): expected int"),
        ({"lora.rank": True}, r"'lora.rank' is True \(bool\)"),
        ({"lora.target_modules": "q_proj"}, r"expected tuple"),
        ({"lora.rank": 0}, r"lora.rank is 0: expected at least 1"),
        ({"lora.dropout": 1.0}, r"lora.dropout is 1: expected"),
        ({"lora.target_modules": []}, r"lora.target_modules is empty"),
        ({"quantization.type": "int8"}, r"quantization.type is 'int8': expected one of 'nf4', 'fp4'"),
        (
            {"training.micro_batch_size": 2},
            r"micro_batch_size is 2: expected a divisor of training.batch_size \(3\)",
        ),
        ({"generation.do_sample": True, "generation.num_beams": 4}, r"exclude each other"),
        ({"generation.temperature": 0.5}, r"only act when generation.do_sample"),
        ({"generation.length_penalty": 0.8}, r"only act with generation.num_beams > 1"),
        ({"generation.min_new_tokens": 999}, r"exceeds generation.max_new_tokens"),
        ({"data.eval_split": "test1"}, r"samsum can be scored on validation, test"),
        ({"data.train_file": "x.csv"}, r"belong to the custom dataset"),
    ],
)
def test_what_cannot_run_is_refused_by_name(overrides, message):
    with pytest.raises(ExperimentError, match=message):
        load_experiment("samsum", **overrides)


def test_an_unknown_experiment_names_the_known_ones():
    with pytest.raises(
        ExperimentError, match=r"Unknown experiment 'samsun': expected one of demo.*Did you mean 'samsum'"
    ):
        load_experiment("samsun")


def test_published_recipes_keep_their_hyperparameters():
    # published_recipes: recipe 1 and 2 as their notebooks have them, apart from the corrections documented beside the fields
    one, two = load_experiment("mts_dialog"), load_experiment("samsum")
    assert (one.lora.rank, one.lora.alpha, one.lora.dropout, one.lora.target_modules) == (
        8,
        32,
        0.05,
        ("q_proj", "v_proj"),
    )
    assert (one.training.epochs, one.training.batch_size, one.training.learning_rate) == (3, 16, 3e-4)
    assert (two.lora.rank, two.lora.alpha, two.lora.dropout, two.data.train_rows) == (32, 64, 0.1, 7366)
    t = two.training
    assert (
        t.epochs,
        t.batch_size,
        t.learning_rate,
        t.warmup_steps,
        t.weight_decay,
        t.max_grad_norm,
        t.eval_steps,
    ) == (
        3,
        3,
        3e-4,
        50,
        0.001,
        0.3,
        500,
    )


def test_every_field_is_documented():
    source = (experiments.ROOT / "src" / "experiments.py").read_text(encoding="utf-8")
    undocumented = []
    for concern in ("Data", "Prompt", "Quantization", "Lora", "Training", "Generation", "Experiment"):
        body = source.split(f"class {concern}:")[1].split("\n\n\n")[0]
        for field in dataclasses.fields(getattr(experiments, concern)):
            line = re.search(rf"^    {field.name}: .*$", body, re.M).group()
            if "#" not in line and "default_factory" not in line and field.name != "name":
                undocumented.append(f"{concern}.{field.name}")
    assert undocumented == []


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = experiments.write_json(tmp_path / "a.json", {"x": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "x": "é"\n}\n'

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        experiments.write_json(path, {"x": "new"})
    assert experiments.read_json(path, "01")["x"] == "é"


def test_jsonl_keeps_line_separators_inside_strings(tmp_path):
    rows = [{"text": "a\u2028b\nc"}, {"text": ""}]
    assert experiments.read_jsonl(experiments.write_jsonl(tmp_path / "a.jsonl", rows), "01") == rows


def test_a_missing_file_names_the_notebook_that_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebooks/02_train_qlora.ipynb first"):
        experiments.read_json(tmp_path / "manifest.json", "02_train_qlora")


def test_one_value_written_in_two_ways_is_one_run():
    for key, ways in {
        "training.epochs": (2, 2.0),
        "training.max_grad_norm": (1, 1.0),
        "training.weight_decay": (0, 0.0),
    }.items():
        ids = {experiments.load_experiment("demo", **{key: way}).run_id for way in ways}
        assert len(ids) == 1, key
    assert (
        experiments.load_experiment("demo", **{"training.max_grad_norm": 1}).run_id
        == experiments.load_experiment("demo").run_id
    )
