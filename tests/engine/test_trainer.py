"""Training: what a step computes, that runs go on where they stopped, and what happens when memory runs out."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
import transformers
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, EarlyStoppingCallback, GenerationConfig, Trainer, TrainingArguments

from src import runs
from src.engine import (
    FastTrainer,
    LogFile,
    Plan,
    PlanError,
    SampleAnswers,
    TimedCheckpoints,
    callbacks,
    decode,
    fuse,
    planning,
)
from src.engine import trainer as trainer_module
from src.engine.batches import StepSampler
from src.engine.callbacks import short_walks
from src.engine.faults import TrainingError
from src.engine.lora import Group
from src.engine.trainer import renew_adapter
from tests.engine.conftest import fill, pass_tokens, tiny, trainable, weights_of, with_adapter


class Killed(BaseException):
    """What ends a process in these tests."""


@pytest.fixture
def arguments(tmp_path):
    """arguments(**fields) -> TrainingArguments: steps of four of the twelve rows, two epochs of three steps."""

    def arguments(**fields):
        usual = {
            "output_dir": str(tmp_path / "checkpoints"), "num_train_epochs": 2, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 2,
            "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False,
            "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 11,
        }  # fmt: skip
        return TrainingArguments(**usual | fields)

    return arguments


@pytest.fixture
def trainer(load, arguments, rows, tokenizer):
    """trainer(passes=2, packed=False, ..., **TrainingArguments fields) -> a FastTrainer over a fresh model."""

    def trainer(passes=2, packed=False, model=None, evaluated=None, also=(), plan=None, **fields):
        args = arguments(**fields)
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        steps = args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * -(-12 // per_step))
        values = {"checkpointing": False, "dequantized": False, "fused": False, **(plan or {})}
        lengths = [len(ids) for ids in rows["input_ids"]]
        parts = StepSampler(lengths, per_step, passes, args.seed, packed)
        largest = max(pass_tokens([lengths[i] for i in part], packed) for part in parts)
        planned = Plan(12, per_step, steps, packed, passes, largest, gib=None, minutes=0.0, **values)
        evaluated = rows.select(range(2)) if evaluated is None else evaluated
        return FastTrainer(model or load(), args, rows, evaluated, tokenizer, planned, callbacks=list(also))

    return trainer


@pytest.fixture
def strange(rows):
    """One row whose answer training never rewards: the better the training rows are learnt, the worse its loss."""
    ids = [*rows[0]["prompt_ids"], 300, 301, 302, 2]
    labels = [-100] * len(rows[0]["prompt_ids"]) + [300, 301, 302, 2]
    return rows.select([0]).map(lambda row: {"input_ids": ids, "labels": labels})


def assert_same(found: dict, expected: dict, **tolerance):
    tolerance = tolerance or {"rtol": 1e-3, "atol": 1e-5}
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance)


def before_each_pass(monkeypatch, act):
    """Have act(trainer, inputs) called before the loss of every forward pass of training."""
    real = FastTrainer.compute_loss

    def compute_loss(self, model, inputs, **said):
        act(self, inputs)
        return real(self, model, inputs, **said)

    monkeypatch.setattr(FastTrainer, "compute_loss", compute_loss)


@torch.no_grad()
def mean_loss(model, row) -> float:
    """The loss of one row as transformers computes it."""
    model.eval()
    return model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.item()


def losses(trainer) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}


def evaluations(trainer) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}


# ---------------------------------------------------------------- what a step computes


@pytest.mark.parametrize(("packed", "passes"), [(False, 2), (False, 4), (True, 1), (True, 3)])
def test_the_passes_of_a_step_do_not_change_the_adapter(trainer, packed, passes):
    one, other = trainer(passes=1), trainer(passes=passes, packed=packed)
    one.train(), other.train()
    assert_same(weights_of(other.model), weights_of(one.model))
    assert losses(other) == pytest.approx(losses(one), rel=1e-4) and len(losses(one)) == 6


def test_a_plain_trainer_ends_with_the_same_adapter(trainer, arguments, load, rows, tokenizer):
    """All rows in each of three steps, so that neither trainer's order matters; the answers have different lengths."""
    asked = {"per_device_train_batch_size": 12, "num_train_epochs": 3, "logging_steps": 1}
    ours = trainer(passes=3, packed=True, plan={"fused": True, "dequantized": True}, **asked)
    ours.train()
    model = load()
    renew_adapter(model, seed=11)
    plain = Trainer(
        model, arguments(**asked), DataCollatorForSeq2Seq(tokenizer), rows, rows.select(range(2)), tokenizer
    )
    plain.train()
    assert_same(weights_of(ours.model), weights_of(model))
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-4) and len(losses(plain)) == 3
    assert losses(ours)[3] < losses(ours)[1] - 0.1


def test_checkpointing_computes_layers_twice_and_changes_no_weight(trainer):
    trained, calls = [], []
    for checkpointing in (True, False):
        t = trainer(plan={"checkpointing": checkpointing}, max_steps=2)
        grads = []  # of every pass through the first layer: is a gradient recorded there?
        layer = t.model.get_base_model().model.layers[0].self_attn
        layer.register_forward_hook(lambda *_, grads=grads: grads.append(torch.is_grad_enabled()))
        t.train()
        trained.append(weights_of(t.model))
        calls.append(sum(grads))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in t.model.modules())
    assert calls[0] == 2 * calls[1] > 0
    assert_same(*trained, rtol=1e-4, atol=1e-6)


def test_dropout_acts_in_training(trainer, load):
    trained = []
    for share in (0.0, 0.5):
        t = trainer(model=load(lora_dropout=share), max_steps=3)
        t.train()
        trained.append(torch.cat([value.flatten() for value in weights_of(t.model).values()]))
    assert not torch.allclose(*trained, rtol=1e-2)


def test_the_first_weights_are_drawn_from_the_seed(load):
    """They are those of set_seed and get_peft_model, so that a plain Trainer starts from them as well."""
    model = fill(load())
    renew_adapter(model, seed=7)  # as `load` does
    assert_same(weights_of(model), weights_of(load()), rtol=0, atol=0)
    renew_adapter(model, seed=8)
    assert any(not torch.equal(value, weights_of(load())[name]) for name, value in weights_of(model).items())
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}


def test_training_again_starts_again(trainer):
    """A cell that is run twice: neither the trained adapter nor the optimizer's moments are left over."""
    t, trained = trainer(max_steps=2), []
    for _ in range(2):
        t.train()
        trained.append(weights_of(t.model))
    assert_same(*trained, rtol=0, atol=0)
    assert any(value.abs().max() > 0 for name, value in trained[0].items() if "lora_B" in name)


@pytest.mark.parametrize("packed", [False, True])
def test_the_evaluation_is_the_mean_over_supervised_tokens(trainer, rows, packed):
    """And not over passes: answers have different lengths, so a mean of means would differ."""
    t = trainer(packed=packed)
    fill(t.model, 0.3)
    alone = [(mean_loss(t.model, row), sum(label != -100 for label in row["labels"])) for row in rows]
    expected = sum(loss * n for loss, n in alone) / sum(n for _, n in alone)
    assert abs(sum(loss for loss, _ in alone) / len(alone) - expected) > 1e-3
    assert t.evaluate(rows) == {"eval_loss": pytest.approx(expected, rel=1e-5)}


def test_rows_that_would_mix_are_not_packed(trainer):
    base = tiny(transformers.MambaConfig, state_size=4)
    model = with_adapter(base, target_modules=["in_proj"])
    with pytest.raises(PlanError, match="Layers of MambaForCausalLM look across the rows.*set engine.packing to 'off'"):
        trainer(model=model, packed=True)
    trainer(model=model)


@pytest.mark.parametrize("target", [["lm_head"], ["q_proj", "lm_head"], ["q_proj", "down_proj"]], ids=str)
def test_a_trained_adapter_round_trips(trainer, load, rows, tmp_path, target):
    t = trainer(model=load(target_modules=target), max_steps=2, learning_rate=0.1)
    t.train()
    t.model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([rows[0]["input_ids"]])
    trained = t.model.eval()(input_ids=ids).logits
    again = PeftModel.from_pretrained(load().unload(), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, trained)
    with again.disable_adapter():
        base = again(input_ids=ids).logits
    torch.testing.assert_close(base, load().unload().eval()(input_ids=ids).logits)
    assert (base - trained).abs().max() > 1e-3


def test_an_adapter_with_an_added_pad_token_round_trips(trainer, load, rows, tokenizer, tmp_path):
    """The token makes the embeddings larger, by rows that are drawn from the seed."""
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens([f"<more {n}>" for n in range(520 - len(tokenizer))])  # beyond the model's 512
    model = load()
    assert model.get_input_embeddings().num_embeddings == 520
    t = trainer(model=model, max_steps=2, learning_rate=0.1)
    t.train()
    t.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = PeftModel.from_pretrained(load().unload(), tmp_path / "adapter").eval()
    ids = torch.tensor([rows[0]["input_ids"]])
    torch.testing.assert_close(again(input_ids=ids).logits, t.model.eval()(input_ids=ids).logits)


# ---------------------------------------------------------------- the log


def test_the_log_file_holds_losses_evaluations_and_samples(trainer, rows, tokenizer, tmp_path, capsys):
    samples = SampleAnswers(rows.select([1]), tokenizer, GenerationConfig(max_new_tokens=4, do_sample=False))
    t = trainer(also=[samples])
    t.add_callback(LogFile(tmp_path / "log.jsonl"))
    t.train()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert log == t.state.log_history and not list(tmp_path.glob(".*"))
    trained = [row for row in log if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6] and trained[-1]["loss"] < trained[0]["loss"]
    assert [row["step"] for row in log if "eval_loss" in row] == [3, 6]
    each = sum(len(ids) for ids in rows["input_ids"])
    assert [row["tokens"] for row in log if "eval_loss" in row] == [each, 2 * each] == [
        trained[2]["tokens"], t.state.num_input_tokens_seen,
    ]  # fmt: skip
    seconds = [row["seconds"] for row in trained]
    assert seconds == sorted(seconds) and all(row["tokens_per_second"] > 0 for row in trained)
    shown = [row for row in log if "sample" in row]
    assert [(row["step"], row["id"], row["reference"]) for row in shown] == [
        (3, "0-1", "None."), (6, "0-1", "None."),
    ]  # fmt: skip
    assert f"step 6, row 0-1\n  reference: None.\n  generated: {shown[1]['sample']}" in capsys.readouterr().out
    assert not any("train_runtime" in row for row in log)


def test_the_best_adapter_can_be_the_one_whose_answers_score_best(trainer, rows, tokenizer, tmp_path, monkeypatch):
    seen, scores = [], iter([0.75, 0.25])  # the first evaluation is the better one, whatever the losses say

    def score(predictions, references):
        seen.append((len(predictions), references))
        return {"rougeL": next(scores)}

    samples = SampleAnswers(rows, tokenizer, GenerationConfig(max_new_tokens=2, do_sample=False), 1, score)
    t = trainer(also=[samples], metric_for_best_model="rougeL", greater_is_better=True)
    t.train()
    losses = [row["eval_loss"] for row in t.state.log_history if "eval_loss" in row]
    assert losses[1] < losses[0] and (t.state.best_metric, t.state.best_global_step) == (0.75, 3)
    assert [(row["step"], row["eval_rougeL"]) for row in t.state.log_history if "eval_rougeL" in row] == [
        (3, 0.75), (6, 0.25),
    ]  # fmt: skip
    assert seen == [(len(rows), list(rows["answer_text"]))] * 2
    assert len([row for row in t.state.log_history if "sample" in row]) == 2  # one shown at each


@pytest.mark.parametrize("config", [{"do_sample": False}, {"do_sample": True, "temperature": 2.0}], ids=str)
def test_samples_change_nothing_and_leave_fused_layers_fused(trainer, rows, tokenizer, monkeypatch, config):
    """Generation enters `fused` as well; and dropout of later steps must not depend on what was sampled."""
    monkeypatch.setattr(decode, "available", lambda device: True)
    samples = SampleAnswers(rows.select([1]), tokenizer, GenerationConfig(max_new_tokens=4, **config))
    trained, calls, project = [], Counter(), Group.project

    def counted(self, x, u):
        if t.model.training:
            calls[t.state.global_step] += 1
        return project(self, x, u)

    monkeypatch.setattr(Group, "project", counted)
    for also in ([], [samples]):
        t = trainer(also=also, plan={"fused": True}, eval_strategy="steps", eval_steps=2, save_strategy="no",
                    load_best_model_at_end=False)  # fmt: skip
        calls.clear()
        t.train()
        assert dict(calls) == {step: 2 * 2 * 4 for step in range(6)}  # passes, layers, products
        trained.append(weights_of(t.model))
    assert_same(*trained, rtol=0, atol=0)
    assert not any("forward" in vars(module) for module in t.model.modules())


@pytest.mark.parametrize(("steps", "every"), [(2, 1), (100, 2), (500, 10)])
def test_a_run_logs_about_fifty_losses(trainer, steps, every):
    assert trainer(max_steps=steps).args.logging_steps == every


@pytest.mark.parametrize(("steps", "every"), [(2, 2), (100, 5), (500, 10)])
def test_on_a_gpu_every_run_logs_a_loss_however_short(trainer, monkeypatch, steps, every):
    """A log waits for the GPU, so there are five steps at least between two, if there are five."""
    asked = {}
    monkeypatch.setattr(Trainer, "__init__", lambda self, model, args, *rest, **said: asked.update(args=args))
    monkeypatch.setattr(PeftModel, "device", torch.device("cuda"), raising=False)
    trainer(max_steps=steps)
    assert asked["args"].logging_steps == every and asked["args"].accelerator_config.non_blocking


# ---------------------------------------------------------------- going on


def test_an_interrupted_run_goes_on_and_ends_like_an_uninterrupted_one(trainer, monkeypatch):
    whole = trainer()
    whole.train()
    shutil.rmtree(whole.args.output_dir)
    passes = Counter()

    def kill(self, inputs):
        passes["n"] += 1
        if passes["n"] == 9:  # three steps of two passes an epoch: pass 9 lies in step 5
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_each_pass(patch, kill)
        trainer().train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert_same(weights_of(resumed.model), weights_of(whole.model), rtol=0, atol=0)
    assert losses(resumed) == losses(whole) and list(losses(resumed)) == [1, 2, 3, 4, 5, 6]  # none twice
    assert evaluations(resumed) == evaluations(whole)
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    seconds = [row["seconds"] for row in resumed.state.log_history]
    assert seconds == sorted(seconds) and resumed.seconds == pytest.approx(seconds[-1], abs=1e-3)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_checkpoint_by_time_changes_nothing_and_is_gone_on_from_bit_for_bit(trainer, passes):
    """A log every second step: the first checkpoint by time holds half of what the next log means."""

    def started(minutes):
        made = trainer(passes=passes, also=[TimedCheckpoints(minutes)] if minutes else [], save_total_limit=None)
        made.args.logging_steps = made.state.logging_steps = 2
        return made

    whole = started(None)
    whole.train()
    saved = sorted(path.name for path in Path(whole.args.output_dir).iterdir())
    assert saved == ["checkpoint-3", "checkpoint-6"]
    shutil.rmtree(whole.args.output_dir)
    seldom = started(1000)
    seldom.train()
    assert sorted(path.name for path in Path(whole.args.output_dir).iterdir()) == saved
    shutil.rmtree(whole.args.output_dir)
    often = started(1e-9)
    often.train()
    saved = sorted(path.name for path in Path(whole.args.output_dir).iterdir())
    assert saved == [f"checkpoint-{n}" for n in range(1, 7)]
    assert_same(weights_of(often.model), weights_of(whole.model), rtol=0, atol=0)
    assert losses(often) == losses(whole) and list(losses(whole)) == [2, 4, 6]
    for step in (1, 2, 4, 5):
        resumed = started(None)
        resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-{step}")
        assert_same(weights_of(resumed.model), weights_of(whole.model), rtol=0, atol=0)
        assert losses(resumed) == losses(whole) and evaluations(resumed) == evaluations(whole)
        for name in ("best_metric", "best_global_step", "num_input_tokens_seen"):
            assert getattr(resumed.state, name) == getattr(whole.state, name)
        seconds = [row["seconds"] for row in resumed.state.log_history]
        assert seconds == sorted(seconds)


@pytest.mark.parametrize("stopped", ["by max_steps", "early"])
def test_a_run_killed_after_its_last_checkpoint_takes_no_further_step(trainer, strange, monkeypatch, stopped):
    """Its last step lies inside an epoch, the learning rate is constant and no best adapter is looked for (F1)."""
    asked = {"lr_scheduler_type": "constant", "load_best_model_at_end": False, "eval_steps": 2, "save_steps": 2}
    asked |= {"eval_strategy": "steps", "save_strategy": "steps"}
    also, evaluated = [], None
    if stopped == "early":
        also, evaluated = [EarlyStoppingCallback(1)], strange
        asked |= {"load_best_model_at_end": True, "num_train_epochs": 20, "learning_rate": 0.02}
    else:
        asked["max_steps"] = 4
    whole = trainer(also=also, evaluated=evaluated, **asked)
    whole.train()
    last = whole.state.global_step
    assert last % 3 != 0 and (last == 4 or stopped == "early")
    again = trainer(also=also, evaluated=evaluated, **asked)
    fill(again.model)
    monkeypatch.setattr(FastTrainer, "compute_loss", None)
    assert again.train(resume_from_checkpoint=f"{again.args.output_dir}/checkpoint-{last}") is None
    assert_same(weights_of(again.model), weights_of(whole.model), rtol=0, atol=0)
    assert again.state.log_history == whole.state.log_history and again.state.global_step == last
    assert again.state.best_global_step == whole.state.best_global_step
    assert again.seconds == pytest.approx(whole.seconds, abs=1e-3) and again.seconds > 0


def test_a_half_written_checkpoint_is_passed_over(trainer, tmp_path, monkeypatch):
    """Nor does a half-written log matter: it is written again from the state of the checkpoint (E6)."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    run = runs.Run("demo-00000000")
    assert run.checkpoint() is None
    whole = trainer(output_dir=str(run.checkpoints))
    whole.add_callback(LogFile(run.folder / "train_log.jsonl"))
    runs.checkpoints.seal(whole)  # as runs.open does
    whole.train()
    log = (run.folder / "train_log.jsonl").read_text(encoding="utf-8")
    (run.folder / "train_log.jsonl").write_text(log[:-20], encoding="utf-8")
    state = run.checkpoints / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert run.checkpoint().endswith("checkpoint-3")
    resumed = trainer(output_dir=str(run.checkpoints))
    resumed.add_callback(LogFile(run.folder / "train_log.jsonl"))
    resumed.train(resume_from_checkpoint=run.checkpoint())
    assert_same(weights_of(resumed.model), weights_of(whole.model), rtol=0, atol=0)
    assert [row["step"] for row in run.log if "loss" in row] == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(run.checkpoints / "checkpoint-3")
    state.unlink()
    assert run.checkpoint() is None and not state.parent.exists()


def test_the_best_adapter_is_kept_and_early_stopping_stops(trainer, strange):
    t = trainer(
        evaluated=strange, also=[EarlyStoppingCallback(1)], num_train_epochs=20, learning_rate=0.02,
        lr_scheduler_type="constant",
    )  # fmt: skip
    t.train()
    found = evaluations(t)
    best = min(found, key=found.get)
    assert t.state.best_global_step == best and list(found) == list(range(3, best + 4, 3))  # one evaluation after it
    kept = mean_loss(t.model, strange[0])
    assert kept == pytest.approx(found[best], rel=1e-5)
    assert all(kept < 0.999 * loss for step, loss in found.items() if step != best) and len(found) > 1


def test_a_resumed_run_goes_on_waiting_and_counting_where_it_was(trainer, strange, monkeypatch):
    asked = {"num_train_epochs": 20, "learning_rate": 0.02, "lr_scheduler_type": "constant"}

    def started():
        return trainer(evaluated=strange, also=[EarlyStoppingCallback(2)], **asked)

    whole = started()
    whole.train()
    steps = whole.state.global_step
    shutil.rmtree(whole.args.output_dir)
    passes = Counter()

    def kill(self, inputs):
        passes["n"] += 1
        if passes["n"] == 2 * steps:  # before the last evaluation
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_each_pass(patch, kill)
        started().train()
    resumed = started()
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-{steps - 3}")
    for name in ("global_step", "best_global_step", "num_input_tokens_seen"):
        assert getattr(resumed.state, name) == getattr(whole.state, name)
    assert_same(weights_of(resumed.model), weights_of(whole.model), rtol=0, atol=0)


# ---------------------------------------------------------------- memory


def test_after_out_of_memory_training_goes_on_with_the_same_steps(trainer, monkeypatch, capsys, tmp_path):
    whole = trainer(passes=1)
    whole.train()
    passes = Counter()

    def too_large(self, inputs):
        passes["n"] += 1
        if passes["n"] > 1 and len(inputs["input_ids"]) > 1:  # the first step passes, the second does not
            raise torch.OutOfMemoryError("no memory")

    before_each_pass(monkeypatch, too_large)
    # the folder is not there yet, as in a run that has not saved a checkpoint
    t = trainer(passes=1, output_dir=str(tmp_path / "other"))
    t.args.output_dir = str(tmp_path / "new")
    t.train()
    assert [p.passes for p in t.failed_plans] == [1, 2] and t.plan.passes == 4 and t.state.global_step == 6
    said = capsys.readouterr().out
    assert f"Out of GPU memory: going on with {t.plan.tokens} tokens a forward pass, 4 passes a step of 4 rows" in said
    assert_same(weights_of(t.model), weights_of(whole.model))
    assert losses(t) == pytest.approx(losses(whole), rel=1e-4) and list(losses(t)) == [1, 2, 3, 4, 5, 6]
    assert t.state.num_input_tokens_seen == whole.state.num_input_tokens_seen


def test_a_retry_goes_on_from_a_checkpoint_of_its_own_training(trainer, monkeypatch):
    """One that another training left in the same folder is not taken for it."""
    old = trainer(passes=1, learning_rate=1.0)
    old.train()
    whole = trainer(passes=1, save_strategy="no", load_best_model_at_end=False)
    whole.train()
    passes = Counter()

    def out_of_memory(self, inputs):
        passes["n"] += 1
        if passes["n"] in (2, 10):  # in the second step, before any checkpoint; then in the fourth, after one
            raise torch.OutOfMemoryError("no memory")

    before_each_pass(monkeypatch, out_of_memory)
    t = trainer(passes=1, load_best_model_at_end=False)
    t.train()
    # one pass and one that fails; three steps of two passes, and a step whose second one fails; three steps of four
    assert passes["n"] == 2 + 3 * 2 + 2 + 3 * 4 and [p.passes for p in t.failed_plans] == [1, 2]
    assert_same(weights_of(t.model), weights_of(whole.model))


def test_memory_is_saved_by_smaller_passes_then_4_bit_weights_then_checkpointing(trainer, monkeypatch):
    seen = []

    def only_the_smallest_fits(self, inputs):
        layers = self.model.get_base_model().model.layers
        four_bit = sum(isinstance(module, bnb.nn.Linear4bit) for module in self.model.modules())
        now = (self.plan.passes, four_bit, layers[0].gradient_checkpointing)
        seen.append(now)
        if now != (4, 14, True):
            raise torch.OutOfMemoryError("no memory")

    asked = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    whole = trainer(passes=1, **asked)
    whole.train()
    before_each_pass(monkeypatch, only_the_smallest_fits)
    t = trainer(passes=1, plan={"dequantized": True}, **asked)
    t.train()
    # steps of four rows: 16-bit weights in one, two and four passes, then all 14 layers in 4 bits again
    assert list(dict.fromkeys(seen)) == [(1, 0, False), (2, 0, False), (4, 0, False), (4, 14, False), (4, 14, True)]
    assert (t.plan.dequantized, t.plan.checkpointing) == (False, True) and len(t.failed_plans) == 4
    assert_same(weights_of(t.model), weights_of(whole.model))


def test_out_of_memory_with_nothing_left_to_shrink_is_an_error(trainer, monkeypatch):
    def out_of_memory(self, inputs):
        raise torch.OutOfMemoryError("no memory")

    before_each_pass(monkeypatch, out_of_memory)
    with pytest.raises(PlanError, match="does not hold one training step.*4-bit weights and checkpointing.*max_tokens"):
        trainer(plan={"dequantized": True}).train()


@pytest.mark.parametrize("every", [1, 2])
def test_seconds_are_those_of_the_steps_that_count(trainer, rows, tokenizer, monkeypatch, every):
    """A pass takes a second and an answer a hundred. Steps that are repeated after running out of memory count once."""
    now, passes = Counter(), Counter()
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now["s"])

    def tick(self, inputs):
        now["s"] += 1
        passes["n"] += 1
        if passes["n"] == 5:  # in the fifth step
            raise torch.OutOfMemoryError("no memory")

    before_each_pass(monkeypatch, tick)
    answer = decode.generate

    def slow(*args, **said):
        now["s"] += 100
        return answer(*args, **said)

    monkeypatch.setattr(callbacks.decode, "generate", slow)
    samples = SampleAnswers(rows.select([1]), tokenizer, GenerationConfig(max_new_tokens=1))
    t = trainer(passes=1, also=[samples])
    t.args.logging_steps = every
    t.train()
    assert passes["n"] == 5 + 3 * 2  # the second epoch again, in two passes a step
    assert t.seconds == 3 * 1 + 3 * 2
    assert {row["step"]: row["seconds"] for row in t.state.log_history if "eval_loss" in row} == {3: 3.0, 6: 9.0}


def test_short_walks_meet_the_trainable_parameters_and_leave_no_trace(load):
    model = load()
    everything, adapter = list(model.parameters()), list(trainable(model).values())
    assert model.training and not all(module.training for module in model.modules())  # as the Trainer gets it
    with short_walks(model):
        found = list(model.parameters())
        assert len(found) == len(adapter) and all(a is b for a, b in zip(found, adapter, strict=True))
        assert model.train() is model and all(module.training for module in model.modules())
        assert model.eval() is model and not any(module.training for module in model.modules())
        for parameter in adapter:
            parameter.grad = torch.ones_like(parameter)
        model.zero_grad()
        assert all(parameter.grad is None for parameter in adapter)
    assert len(list(model.parameters())) == len(everything) > len(adapter)
    assert not {"parameters", "zero_grad", "train"} & set(vars(model))


def test_an_interrupt_leaves_the_model_as_it_was(trainer, monkeypatch):
    def kill(self, inputs):
        raise Killed

    before_each_pass(monkeypatch, kill)
    t = trainer(plan={"fused": True, "checkpointing": True})
    with pytest.raises(Killed):
        t.train()
    assert not any("forward" in vars(module) for module in t.model.modules())
    assert not {"parameters", "zero_grad", "train"} & set(vars(t.model))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in t.model.modules())


def test_the_plan_of_a_cpu_trains(load, arguments, rows, tokenizer, quantization):
    """From plan to adapter as 02 does it."""
    model, args = load(), arguments(max_steps=1)
    lora = model.peft_config["default"]
    planned = planning.plan(model.config, lora, quantization, args, rows, model.device)
    t = FastTrainer(model, args, rows, rows.select([0]), tokenizer, planned)
    t.train()
    assert t.plan == planned and replace(planned, fused=True) != planned and not fuse.available(model.device)
    assert t.rows_per_step == 4 and t.peak_gib is None and t.state.global_step == 1


@pytest.mark.parametrize("where", ["validation", "sample"])
def test_out_of_memory_beside_the_steps_goes_on_with_a_smaller_plan(trainer, rows, tokenizer, monkeypatch, where):
    def samples():
        return [SampleAnswers(rows.select([1]), tokenizer, GenerationConfig(max_new_tokens=2))]

    whole = trainer(passes=1, also=samples())
    whole.train()
    module, name = (trainer_module, "summed_loss") if where == "validation" else (callbacks.decode, "generate")
    real, calls = getattr(module, name), Counter()

    def too_large(model, *args, **said):
        calls["n"] += where == "sample" or not model.training
        if calls["n"] == 1:
            calls["n"] += 1
            raise torch.OutOfMemoryError("no memory")
        return real(model, *args, **said)

    monkeypatch.setattr(module, name, too_large)
    t = trainer(passes=1, also=samples())
    t.train()
    assert [p.passes for p in t.failed_plans] == [1] and t.plan.passes == 2 and calls["n"] > 2
    assert_same(weights_of(t.model), weights_of(whole.model))
    assert [row["step"] for row in t.state.log_history if "eval_loss" in row] == [3, 6]


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError])
def test_an_error_of_cuda_names_the_step_and_the_last_checkpoint(trainer, monkeypatch, error):
    passes = Counter()

    def fail(self, inputs):
        passes["n"] += 1
        if passes["n"] == 5:
            raise error("CUDA error: an illegal memory access was encountered\nmore lines")

    before_each_pass(monkeypatch, fail)
    message = r"failed in step 5: CUDA error: an illegal memory access was encountered\. .*checkpoint-3\. Restart the"
    with pytest.raises(TrainingError, match=message):
        trainer(passes=1).train()
    passes["n"] = 4
    with pytest.raises(TrainingError, match="none: it was the start"):
        trainer(passes=1).train()


def test_other_errors_stay_as_they_are(trainer, monkeypatch):
    def fail(self, inputs):
        raise RuntimeError("expected scalar type")

    before_each_pass(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="^expected scalar type$"):
        trainer(passes=1).train()


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_no_checkpoint_keeps_a_training_that_has_diverged(trainer, monkeypatch, what):
    """Between two logs a loss is not looked at; what is saved there must not be what the same command goes on from."""
    whole = trainer(passes=1)
    whole.train()
    shutil.rmtree(whole.args.output_dir)  # its last checkpoints would be kept, and the first ones below deleted
    steps = Counter()

    def diverge(self, inputs):
        steps["n"] += 1
        if steps["n"] == 5:
            next(iter(trainable(self.model).values())).data.mul_(float("nan"))

    with monkeypatch.context() as patch:
        if what == "loss":
            before_each_pass(patch, diverge)
        t = trainer(passes=1, also=[callbacks.TimedCheckpoints(0.0)])
        t.args.logging_steps = 100
        if what == "weights":

            class Poison(transformers.TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    if state.global_step == 5:
                        next(iter(trainable(t.model).values())).data.mul_(float("nan"))

            t.add_callback(Poison())
        message = rf"The {'loss' if what == 'loss' else 'sum of the'}.* is nan at step 5: .*is \S*checkpoint-4\. Lower"
        with pytest.raises(TrainingError, match=message):
            t.train()
    again = trainer(passes=1)
    again.train(t.progress.checkpoint)
    assert_same(weights_of(again.model), weights_of(whole.model), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("logs", "fp16", "message"),
    [
        ({"loss": float("nan")}, False, "loss is nan at step 7: .*The last good checkpoint is c-5"),
        ({"eval_loss": float("inf")}, True, "eval_loss is inf at step 7: training has diverged, or float16"),
        ({"loss": 1.0, "grad_norm": float("inf")}, False, "grad_norm is inf"),
    ],
)  # fmt: skip
def test_a_loss_that_is_no_number_stops_and_names_the_last_checkpoint(logs, fp16, message):
    state, progress = SimpleNamespace(global_step=7), SimpleNamespace(checkpoint="c-5")
    args = SimpleNamespace(fp16=fp16, seed=0)
    stand_in = SimpleNamespace(args=args, state=state, progress=progress, lengths=[5, 6], rows_per_step=1)
    with pytest.raises(TrainingError, match=message):
        FastTrainer.log(stand_in, logs)
