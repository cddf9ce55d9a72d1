"""Training: which rows a step holds, what the loss counts, that runs are recorded, resumed and never mixed."""

import dataclasses
import json
import shutil

import pytest
import torch

from src import batching, experiments, modeling, prompts, training


@pytest.fixture
def setup(tiny_model, records, tmp_path, monkeypatch):
    """(experiment, tokenizer, encoded rows): 12 rows, a step of 4 rows in 2 passes, run folders under tmp_path."""
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    overrides = {
        "base_model": str(tiny_model),
        "training.epochs": 2,
        "training.batch_size": 4,
        "training.micro_batch_size": 2,
        "training.eval_steps": None,
    }
    experiment = experiments.load_experiment(
        "demo", **overrides, **{"generation.max_new_tokens": 4, "training.packing": "off"}
    )
    tokenizer = modeling.load_tokenizer(experiment)
    rows = [{**r, "id": f"{n}-{r['id']}"} for n in range(4) for r in records]
    return experiment, tokenizer, prompts.build_all(rows, tokenizer, experiment.prompt)


def fresh(experiment, tokenizer):
    return modeling.add_adapter(modeling.load_base(experiment, tokenizer), experiment)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_summed_loss_equals_a_plain_forward_row_by_row(setup):
    experiment, tokenizer, rows = setup
    model = fresh(experiment, tokenizer).eval()
    total = 0.0
    for row in rows[:3]:  # log-probabilities of the answer tokens, one row at a time, no padding, all logits
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        start = len(row.prompt_ids)
        total -= sum(logits[start + i - 1, token].item() for i, token in enumerate(row.answer_ids))
    loss, count = training.summed_loss(model, batching.pad(rows[:3], tokenizer.pad_token_id))
    assert count == sum(len(row.answer_ids) for row in rows[:3])
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_after_out_of_memory_the_run_goes_on_with_half_the_budget_and_the_same_steps(setup, monkeypatch, capsys):
    experiment, tokenizer, rows = setup
    experiment = dataclasses.replace(
        experiment, training=dataclasses.replace(experiment.training, micro_batch_size=None, max_steps=4)
    )
    whole = fresh(experiment, tokenizer)
    training.train(experiment, whole, tokenizer, rows, rows[:2])
    experiment.run_dir.rename(experiment.run_dir.with_name("whole"))
    real, calls = training.SummaryTrainer.compute_loss, {"n": 0}

    def too_large(self, model, inputs, **kwargs):
        calls["n"] += 1
        if calls["n"] > 1 and len(inputs["input_ids"]) > 1:  # the first step passes, the second does not
            raise torch.OutOfMemoryError("no memory")
        return real(self, model, inputs, **kwargs)

    monkeypatch.setattr(training.SummaryTrainer, "compute_loss", too_large)
    model = fresh(experiment, tokenizer)
    manifest = training.train(experiment, model, tokenizer, rows, rows[:2])
    assert [p["forward passes a step"] for p in manifest["plans_out_of_memory"]] == [1, 2]
    assert manifest["plan"]["forward passes a step"] == 4 and manifest["optimizer_steps"] == 4
    assert "Out of GPU memory: going on with" in capsys.readouterr().out
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-3, atol=1e-5)


def test_out_of_memory_with_nothing_left_to_shrink_is_an_error(setup, monkeypatch):
    experiment, tokenizer, rows = setup

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(training.SummaryTrainer, "compute_loss", fail)
    with pytest.raises(training.TrainingError, match="does not hold one training step.*Lower prompt.max_tokens"):
        training.train(experiment, fresh(experiment, tokenizer), tokenizer, rows, rows[:2])


@pytest.mark.parametrize("packing", ["on", "off"])
def test_packed_training_ends_like_padded_training_of_the_same_rows(setup, packing):
    """One step over all rows: packed in three passes or padded in one, the adapter moves alike."""
    experiment, tokenizer, rows = setup
    trained = []
    for mode, budget in ((packing, None), ("on", 100)):
        t = dataclasses.replace(
            experiment.training, micro_batch_size=None, batch_size=12, epochs=1, packing=mode, token_budget=budget
        )
        e = dataclasses.replace(experiment, training=t)
        model = fresh(e, tokenizer)
        manifest = training.train(e, model, tokenizer, rows, rows[:2])
        trained.append((manifest["plan"]["forward passes a step"], weights(model)))
    assert trained[0][0] == 1 and trained[1][0] > 3
    for name, value in trained[0][1].items():
        torch.testing.assert_close(trained[1][1][name], value, rtol=1e-3, atol=1e-5)


def test_checkpointing_computes_layers_twice_and_changes_no_weight(setup):
    experiment, tokenizer, rows = setup
    trained, calls = [], []
    for mode in ("on", "off"):
        e = dataclasses.replace(
            experiment, training=dataclasses.replace(experiment.training, checkpointing=mode, max_steps=2)
        )
        model = fresh(e, tokenizer)
        grads = []  # of every pass through the first layer: is a gradient recorded there?
        model.get_base_model().base_model.layers[0].self_attn.register_forward_hook(
            lambda *_, grads=grads: grads.append(torch.is_grad_enabled())
        )
        training.train(e, model, tokenizer, rows, rows[:2])
        trained.append(weights(model))
        calls.append(sum(grads))
    assert calls[0] == 2 * calls[1] > 0
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-6)


def test_dropout_acts_in_training(setup):
    experiment, tokenizer, rows = setup
    trained = []
    for share in (0.0, 0.5):
        e = dataclasses.replace(experiment, lora=dataclasses.replace(experiment.lora, dropout=share))
        e = dataclasses.replace(e, training=dataclasses.replace(e.training, max_steps=3))
        model = fresh(e, tokenizer)
        training.train(e, model, tokenizer, rows, rows[:2])
        trained.append(torch.cat([p.flatten() for p in weights(model).values()]))
    assert not torch.allclose(*trained, rtol=1e-2)


def test_accumulation_does_not_change_the_adapter(setup):
    experiment, tokenizer, rows = setup
    trained = []
    for micro in (1, 2, 4):
        e = dataclasses.replace(
            experiment, training=dataclasses.replace(experiment.training, micro_batch_size=micro, max_steps=3)
        )
        model = fresh(e, tokenizer)
        training.train(e, model, tokenizer, rows, rows[:2])
        trained.append(weights(model))
    for other in trained[1:]:
        for name, value in trained[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


def test_a_finished_run_is_recorded_and_found_again(setup):
    experiment, tokenizer, rows = setup
    model = fresh(experiment, tokenizer)
    manifest = training.train(experiment, model, tokenizer, rows, rows[:2], rows[:1], {"data": "a"})
    run = experiment.run_dir
    assert sorted(p.name for p in run.iterdir()) == [
        "adapter",
        "config.json",
        "manifest.json",
        "train_log.jsonl",
    ]
    assert manifest["optimizer_steps"] == 6 and manifest["train_tokens"] == 2 * sum(len(r.input_ids) for r in rows)
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["step"] for r in log if "eval_loss" in r] == [3, 6] and sum("sample" in r for r in log) == 2
    first = [r["loss"] for r in log if "loss" in r]
    assert first[-1] < first[0]
    again = fresh(experiment, tokenizer)
    assert (
        training.train(experiment, again, tokenizer, rows, rows[:2], (), {"data": "a"}) == manifest
    )  # loaded, not trained
    for name, value in weights(model).items():
        assert torch.equal(weights(again)[name], value)
    with pytest.raises(training.TrainingError, match="begun with other data.*Delete the folder"):
        training.train(experiment, again, tokenizer, rows, rows[:2], (), {"data": "b"})


def test_the_saved_adapter_answers_like_the_trained_model(setup):
    experiment, tokenizer, rows = setup
    model = fresh(experiment, tokenizer)
    training.train(experiment, model, tokenizer, rows, rows[:2])
    loaded = modeling.load_finetuned(experiment, tokenizer)
    batch = {"input_ids": torch.tensor([rows[0].input_ids])}
    trained = model.eval()(**batch).logits
    torch.testing.assert_close(loaded(**batch).logits, trained)
    with loaded.disable_adapter():
        base = loaded(**batch).logits
    torch.testing.assert_close(base, modeling.load_base(experiment, tokenizer)(**batch).logits)
    assert (base - trained).abs().max() > 1e-3


def test_an_interrupted_run_goes_on_and_ends_like_an_uninterrupted_one(setup, monkeypatch):
    experiment, tokenizer, rows = setup
    whole = fresh(experiment, tokenizer)
    training.train(experiment, whole, tokenizer, rows, rows[:2])
    losses = [
        json.loads(line) for line in (experiment.run_dir / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    experiment.run_dir.rename(experiment.run_dir.with_name("whole"))

    steps = {"n": 0}
    real = training.SummaryTrainer.compute_loss

    def stop_in_the_second_epoch(self, *args, **kwargs):
        steps["n"] += 1
        if steps["n"] == 9:  # 3 steps of 2 passes an epoch: pass 9 lies in step 5
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(training.SummaryTrainer, "compute_loss", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        training.train(experiment, fresh(experiment, tokenizer), tokenizer, rows, rows[:2])
    assert not (experiment.run_dir / "manifest.json").exists() and (experiment.run_dir / "checkpoints").is_dir()
    monkeypatch.setattr(training.SummaryTrainer, "compute_loss", real)
    resumed = fresh(experiment, tokenizer)
    manifest = training.train(experiment, resumed, tokenizer, rows, rows[:2])
    assert manifest["resumed_from_step"] == 3
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=1e-4, atol=1e-6)
    log = [
        json.loads(line) for line in (experiment.run_dir / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4, 5, 6]  # none twice
    seconds = [r["seconds"] for r in log if "loss" in r]
    assert seconds == sorted(seconds) and manifest["train_tokens"] == losses[-2]["tokens"] == log[-2]["tokens"]
    first_resumed = next(r for r in log[::-1] if r["step"] == 4 and "loss" in r)
    assert first_resumed["loss"] == pytest.approx(
        next(r["loss"] for r in losses if r["step"] == 4 and "loss" in r), rel=1e-4
    )


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step in (4, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-4" / training.PROGRESS).write_text("{}", encoding="utf-8")
    assert training.last_checkpoint(tmp_path).endswith("checkpoint-4")
    assert training.last_checkpoint(tmp_path / "none") is None


def test_the_training_cell_run_again_starts_from_a_fresh_adapter(setup):
    experiment, tokenizer, rows = setup
    experiment = dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, max_steps=2))
    model = fresh(experiment, tokenizer)
    trained = []
    for _ in range(2):
        training.train(experiment, model, tokenizer, rows, rows[:2])
        trained.append(weights(model))
        shutil.rmtree(experiment.run_dir)  # as the message of a finished run says
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_an_adapter_made_for_other_parameters_is_refused(setup):
    experiment, tokenizer, rows = setup
    model = fresh(experiment, tokenizer)
    other = dataclasses.replace(experiment, lora=dataclasses.replace(experiment.lora, rank=2))
    with pytest.raises(training.TrainingError, match="made for run .* run the cell that loads the model again"):
        training.train(other, model, tokenizer, rows, rows[:2])
    assert not other.run_dir.exists()
    other = dataclasses.replace(other, training=dataclasses.replace(other.training, max_steps=1))
    training.train(other, fresh(other, tokenizer), tokenizer, rows, rows[:2])
    with pytest.raises(training.TrainingError, match="made for run"):  # nor is a finished adapter loaded into it
        training.train(other, model, tokenizer, rows, rows[:2])


def test_rows_that_would_mix_are_not_packed(setup):
    experiment, tokenizer, rows = setup
    experiment = dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, packing="on"))
    model = fresh(experiment, tokenizer)
    assert batching.rows_stay_apart(model)
    model.packs_rows = False
    with pytest.raises(training.TrainingError, match="look across the rows .* set training.packing to 'off'"):
        training.train(experiment, model, tokenizer, rows, rows[:2])


@pytest.mark.parametrize(("steps", "logging"), [(2, 2), (100, 5), (500, 10)])
def test_on_a_gpu_every_run_logs_a_loss_however_short(setup, monkeypatch, steps, logging):
    experiment, *_ = setup
    monkeypatch.setattr(modeling, "compute_dtype", lambda *_: torch.float32)
    plan = {"forward passes a step": 1, "optimizer steps": steps}
    assert training.arguments(experiment, torch.device("cuda"), plan).logging_steps == logging


@pytest.mark.parametrize("gone", ["train_log.jsonl", "adapter/adapter_model.safetensors"])
def test_a_finished_run_without_one_of_its_files_says_what_to_do(setup, gone):
    experiment, tokenizer, rows = setup
    experiment = dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, max_steps=1))
    model = fresh(experiment, tokenizer)
    training.train(experiment, model, tokenizer, rows, rows[:2])
    (experiment.run_dir / gone).unlink()
    with pytest.raises(training.TrainingError, match=f"its {gone} is gone: delete the folder"):
        training.train(experiment, model, tokenizer, rows, rows[:2])


def test_validation_passes_are_no_larger_than_training_passes(setup):
    _, _, rows = setup
    longest = max(len(row.input_ids) for row in rows)
    for tokens in (1, longest, 3 * longest, 10**6):
        batches = training.validation_batches(rows, tokens)
        assert sorted(row.id for batch in batches for row in batch) == sorted(row.id for row in rows)
        assert all(len(b) == 1 or len(b) * max(len(r.input_ids) for r in b) <= tokens for b in batches)
        assert max(map(len, batches)) <= training.EVAL_BATCH


def test_a_machine_without_git_records_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert training.environment(torch.device("cpu"))["git_commit"] is None


def test_the_best_adapter_is_kept_and_early_stopping_stops(setup):
    experiment, tokenizer, rows = setup
    changed = dataclasses.replace(
        experiment.training, epochs=20, learning_rate=0.02, schedule="constant", early_stopping_patience=1
    )
    experiment = dataclasses.replace(experiment, training=changed)
    # answers of tokens that training never rewards: the better the training rows are learnt, the worse these become
    other = [dataclasses.replace(rows[0], answer_ids=[300, 301, 302, tokenizer.eos_token_id])]
    model = fresh(experiment, tokenizer)
    manifest = training.train(experiment, model, tokenizer, rows, other)
    log = [
        json.loads(line) for line in (experiment.run_dir / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    evaluations = {r["step"]: r["eval_loss"] for r in log if "eval_loss" in r}
    assert manifest["best_step"] == min(evaluations, key=evaluations.get)
    assert manifest["best_step"] < manifest["optimizer_steps"] < 60  # stopped one evaluation after the best, of twenty
    again = training.validation_loss(model, [batching.pad(other, tokenizer.pad_token_id)])
    assert again == pytest.approx(min(evaluations.values()), rel=1e-4)


def test_a_resumed_run_goes_on_waiting_and_counting_where_it_was(setup, monkeypatch):
    experiment, tokenizer, rows = setup
    changed = dataclasses.replace(
        experiment.training, epochs=20, learning_rate=0.02, schedule="constant", early_stopping_patience=2
    )
    experiment = dataclasses.replace(experiment, training=changed)
    other = [dataclasses.replace(rows[0], answer_ids=[300, 301, 302, tokenizer.eos_token_id])]
    arguments = training.arguments
    monkeypatch.setattr(training, "arguments", lambda *args: dataclasses.replace(arguments(*args), logging_steps=5))
    whole = training.train(experiment, fresh(experiment, tokenizer), tokenizer, rows, other)
    shutil.rmtree(experiment.run_dir)
    real, steps = training.SummaryTrainer.training_step, {"n": 0}

    def stop_before_the_last_evaluation(self, *args, **kwargs):
        steps["n"] += 1
        if steps["n"] == 2 * whole["optimizer_steps"]:  # 2 passes a step
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(training.SummaryTrainer, "training_step", stop_before_the_last_evaluation)
    with pytest.raises(KeyboardInterrupt):
        training.train(experiment, fresh(experiment, tokenizer), tokenizer, rows, other)
    resumed = training.train(experiment, fresh(experiment, tokenizer), tokenizer, rows, other)
    assert resumed["resumed_from_step"] == whole["optimizer_steps"] - 3
    assert all(resumed[key] == whole[key] for key in ("optimizer_steps", "best_step", "train_tokens"))


@pytest.mark.parametrize("target", [("lm_head",), ("q_proj", "lm_head")])
def test_lm_head_as_a_target_round_trips(setup, target):
    experiment, tokenizer, rows = setup
    experiment = dataclasses.replace(
        experiment,
        lora=dataclasses.replace(experiment.lora, target_modules=target),
        training=dataclasses.replace(experiment.training, max_steps=2),
    )
    model = fresh(experiment, tokenizer)
    training.train(experiment, model, tokenizer, rows, rows[:2])
    batch = {"input_ids": torch.tensor([rows[0].input_ids])}
    torch.testing.assert_close(
        modeling.load_finetuned(experiment, tokenizer)(**batch).logits, model.eval()(**batch).logits
    )


def test_an_added_pad_token_round_trips(setup, records):
    experiment, _, _ = setup
    experiment = dataclasses.replace(
        experiment, pad_token="add", training=dataclasses.replace(experiment.training, max_steps=2)
    )
    tokenizer = modeling.load_tokenizer(experiment)
    assert tokenizer.pad_token == "[PAD]"
    rows = prompts.build_all(records, tokenizer, experiment.prompt)
    model = fresh(experiment, tokenizer)
    training.train(experiment, model, tokenizer, rows, rows[:2])
    batch = {"input_ids": torch.tensor([rows[0].input_ids])}
    torch.testing.assert_close(
        modeling.load_finetuned(experiment, tokenizer)(**batch).logits, model.eval()(**batch).logits
    )


def test_a_cuda_optimizer_falls_back_on_the_cpu_and_the_manifest_says_so(setup):
    experiment, tokenizer, rows = setup
    experiment = dataclasses.replace(
        experiment,
        device="cpu",
        training=dataclasses.replace(experiment.training, optimizer="paged_adamw_32bit", max_steps=1),
    )
    manifest = training.train(experiment, fresh(experiment, tokenizer), tokenizer, rows, rows[:2])
    assert manifest["optimizer"] == "adamw_torch"


def test_short_walks_meet_the_trainable_parameters_and_leave_no_trace(tiny_model):
    e = experiments.load_experiment("demo", **{"base_model": str(tiny_model), "device": "cpu"})
    model = modeling.add_adapter(modeling.load_base(e, modeling.load_tokenizer(e)), e)
    everything, adapter = list(model.parameters()), [p for p in model.parameters() if p.requires_grad]
    assert model.training and not all(module.training for module in model.modules())  # as the Trainer gets it
    with training.short_walks(model):
        found = list(model.parameters())
        assert len(found) == len(adapter) and all(a is b for a, b in zip(found, adapter, strict=True))
        assert model.train() is model and all(module.training for module in model.modules())
        assert model.eval() is model and not any(module.training for module in model.modules())
        for p in adapter:
            p.grad = torch.ones_like(p)
        model.zero_grad()
        assert all(p.grad is None for p in adapter)
    assert len(list(model.parameters())) == len(everything) > len(adapter)
    assert not {"parameters", "zero_grad", "train"} & set(vars(model))


def test_an_adapter_is_not_scored_on_other_data(setup, monkeypatch):
    experiment, tokenizer, rows = setup
    experiment = dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, max_steps=1))
    inputs = {"data": {"train": "a"}, "base_model": modeling.fingerprint(experiment)}
    training.train(experiment, fresh(experiment, tokenizer), tokenizer, rows, rows[:2], inputs=inputs)
    monkeypatch.setattr(modeling.data, "fingerprint", lambda e: {"train": "a"})
    assert modeling.load_finetuned(experiment, tokenizer) is not None
    monkeypatch.setattr(modeling.data, "fingerprint", lambda e: {"train": "b"})
    with pytest.raises(modeling.ModelError, match="was trained on other data.*delete the folder and train again"):
        modeling.load_finetuned(experiment, tokenizer)
