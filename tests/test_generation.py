"""Generation: batches change nothing, stop reasons and token counts are right, prompts stay out of answers."""

import dataclasses

import pytest
import torch

from src import experiments, generation, modeling, prompts


@pytest.fixture
def setup(tiny_model, records):
    e = experiments.load_experiment(
        "demo", **{"base_model": str(tiny_model), "device": "cpu", "generation.max_new_tokens": 6}
    )
    tokenizer = modeling.load_tokenizer(e)
    model = modeling.add_adapter(modeling.load_base(e, tokenizer), e).eval()
    return e, tokenizer, model, records, prompts.build_all(records, tokenizer, e.prompt)


def greedy(model, row, steps, eos):
    """Greedy decoding written out: one row, no cache, no padding."""
    ids = list(row.prompt_ids)
    for _ in range(steps):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == eos:
            break
    return ids[len(row.prompt_ids) :]


def test_batched_left_padded_answers_equal_greedy_decoding_one_by_one(setup):
    e, tokenizer, model, _, rows = setup
    answers = generation.generate(model, tokenizer, rows, e, progress=False)
    assert [a["id"] for a in answers] == [r.id for r in rows]  # input order, though decoded by length
    for answer, row in zip(answers, rows, strict=True):
        new = greedy(model, row, 6, tokenizer.eos_token_id)
        assert answer["tokens"] == len(new) and answer["prompt_tokens"] == len(row.prompt_ids)
        assert answer["prediction"] == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_batch_size_does_not_change_answers(setup):
    e, tokenizer, model, _, rows = setup
    one = dataclasses.replace(e, generation=dataclasses.replace(e.generation, batch_size=1))
    assert generation.generate(model, tokenizer, rows, e, progress=False) == generation.generate(
        model, tokenizer, rows, one, progress=False
    )


def test_prompts_read_without_padding_give_the_same_answers(setup, monkeypatch):
    """The GPU's way (packed prefill, a cache set aside) against transformers' own, on the CPU."""
    e, tokenizer, model, _, rows = setup
    rows = [*rows, dataclasses.replace(rows[0], id="short", prompt_ids=rows[0].prompt_ids[:1])]
    plain = generation.generate(model, tokenizer, rows, e, progress=False)
    calls = []
    monkeypatch.setattr(generation.kernels, "has_varlen", lambda device: calls.append(device) or True)
    monkeypatch.setattr(generation, "PREFILL", 150)  # two forward passes
    assert generation.generate(model, tokenizer, rows, e, progress=False) == plain and calls
    with torch.no_grad():
        cache = generation.prefill(model, [r.prompt_ids for r in rows[:2]], 200, 6)
        alone = model(input_ids=torch.tensor([rows[1].prompt_ids[:-1]]), use_cache=True).past_key_values
    n = len(rows[1].prompt_ids) - 1
    for filled, layer in zip(cache.layers, alone.layers, strict=True):
        torch.testing.assert_close(filled.keys[1, :, 199 - n : 199], layer.keys[0], rtol=1e-4, atol=1e-5)
        assert filled.keys.shape[2] == 199 and not filled.keys[1, :, : 199 - n].any()


def test_after_out_of_memory_generation_goes_on_with_smaller_batches(setup, monkeypatch, capsys):
    e, tokenizer, model, _, rows = setup
    plain = generation.generate(model, tokenizer, rows, e, progress=False)
    real = generation._decode

    def too_large(model, tokenizer, chosen, *rest):
        if len(chosen) > 1:
            raise torch.OutOfMemoryError("no memory")
        return real(model, tokenizer, chosen, *rest)

    monkeypatch.setattr(generation, "_decode", too_large)
    assert generation.generate(model, tokenizer, rows, e, progress=False) == plain
    assert "going on with 1 prompts a batch" in capsys.readouterr().out


def test_stop_reason_and_token_count(setup, monkeypatch):
    e, tokenizer, model, _, rows = setup
    eos, word = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("a")
    # row 0 stops after one token, row 1 says nothing at all, row 2 is cut off at six tokens
    scripted = {
        len(rows[0].prompt_ids): [word, eos, 0, 0, 0, 0],
        len(rows[1].prompt_ids): [eos, 0, 0, 0, 0, 0],
        len(rows[2].prompt_ids): [word] * 6,
    }
    monkeypatch.setattr(
        generation, "_decode", lambda model, tokenizer, chosen, *rest: [scripted[len(p)] for p in chosen]
    )
    answers = generation.generate(model, tokenizer, rows, e, progress=False)
    assert [(a["prediction"], a["tokens"], a["stop"]) for a in answers] == [
        ("a", 2, "eos"),
        ("", 1, "eos"),
        ("aaaaaa", 6, "length"),
    ]


def test_base_answers_ignore_the_adapter_and_finetuned_answers_do_not(setup):
    e, tokenizer, model, records, rows = setup
    plain = generation.generate(model, tokenizer, rows, e, progress=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    predictions = generation.predict(model, tokenizer, records, rows, e)
    assert [a["prediction"] for a in predictions["base"]] == [a["prediction"] for a in plain]
    assert [a["prediction"] for a in predictions["finetuned"]] != [a["prediction"] for a in plain]
    assert (
        predictions["base"][0]["reference"] == "Allergic to penicillin."
        and predictions["base"][0]["dialogue"] == records[0]["dialogue"]
    )


def test_sampling_is_seeded_and_leaves_other_random_numbers_alone(setup):
    e, tokenizer, model, _, rows = setup
    e = dataclasses.replace(e, generation=dataclasses.replace(e.generation, do_sample=True, temperature=2.0))
    torch.manual_seed(5)
    first = generation.generate(model, tokenizer, rows, e, progress=False)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert generation.generate(model, tokenizer, rows, e, progress=False) == first
    other = generation.generate(model, tokenizer, rows, dataclasses.replace(e, seed=1), progress=False)
    assert other != first


def test_decoding_settings_reach_transformers(setup):
    e, tokenizer, *_ = setup
    g = dataclasses.replace(
        e.generation,
        num_beams=4,
        early_stopping=True,
        length_penalty=0.8,
        no_repeat_ngram_size=2,
        min_new_tokens=3,
    )
    config = generation.generation_config(dataclasses.replace(e, generation=g), tokenizer)
    assert (
        config.num_beams,
        config.early_stopping,
        config.length_penalty,
        config.no_repeat_ngram_size,
        config.min_new_tokens,
    ) == (
        4,
        True,
        0.8,
        2,
        3,
    )
    assert config.pad_token_id != config.eos_token_id
