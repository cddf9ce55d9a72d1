"""Generation: batches change nothing, stop reasons and token counts are right, prompts stay out of answers."""

import dataclasses
import types

import pytest
import torch

from src import batching, experiments, generation, modeling, prompts


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


def test_decoding_without_padding_gives_the_same_answers(setup, monkeypatch):
    """The GPU's way (packed prompts, a flat cache, finished rows dropped) against transformers' own, on the CPU."""
    e, tokenizer, model, _, rows = setup
    rows = [*rows, dataclasses.replace(rows[0], id="short", prompt_ids=rows[0].prompt_ids[:1])]
    said = [greedy(model, row, 6, tokenizer.eos_token_id) for row in rows]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(said[0][2])  # some rows meet it early, others never
    least = dataclasses.replace(e, generation=dataclasses.replace(e.generation, min_new_tokens=3))
    plain, late = (generation.generate(model, tokenizer, rows, x, progress=False) for x in (e, least))
    assert len({a["tokens"] for a in plain}) > 1 and {a["stop"] for a in plain} == {"eos", "length"} and late != plain
    monkeypatch.setattr(generation, "PREFILL", 150)  # two forward passes
    monkeypatch.setattr(generation.kernels, "has_varlen", lambda *_: True)
    monkeypatch.setattr(model, "generate", None)
    assert generation.generate(model, tokenizer, rows, e, progress=False) == plain
    assert generation.generate(model, tokenizer, rows, least, progress=False) == late


def test_every_end_token_of_the_model_ends_an_answer(setup, monkeypatch):
    e, tokenizer, model, _, rows = setup
    said = greedy(model, rows[0], 6, None)
    assert said[2] not in said[:2]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, said[2]])
    for unpadded in (False, True):
        monkeypatch.setattr(generation.kernels, "has_varlen", lambda *_, unpadded=unpadded: unpadded)
        found = generation.generate(model, tokenizer, rows[:1], e, progress=False)[0]
        assert (found["stop"], found["tokens"]) == ("eos", 3)
        assert found["prediction"] == tokenizer.decode(said[:2], skip_special_tokens=True).strip()


def test_a_model_that_mixes_packed_rows_is_decoded_padded(setup, monkeypatch):
    from transformers import MambaConfig, MambaForCausalLM

    e, _, model, *_ = setup
    monkeypatch.setattr(generation.kernels, "has_varlen", lambda *_: True)
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    )
    assert generation.flat(model, e) and not generation.flat(mamba, e)


def test_a_flat_cache_holds_what_each_row_alone_would(setup):
    _, _, model, _, rows = setup
    prompts_ = [row.prompt_ids for row in rows]
    cache = generation.FlatCache(model.config, torch.tensor([len(p) + 6 for p in prompts_]))
    own = torch.tensor([len(p) for p in prompts_[1:]])
    inputs = batching.flat_rows([i for p in prompts_[1:] for i in p], own.tolist())
    rows_ = torch.arange(1, len(prompts_))
    new = torch.repeat_interleave(cache.begin[rows_], own) + inputs["position_ids"][0]
    with torch.inference_mode():
        model(**inputs | cache.stretch(rows_, own, new))
        alone = model(input_ids=torch.tensor([prompts_[2]]), use_cache=True).past_key_values
    begin, n = cache.begin[2], len(prompts_[2])
    for layer, single in zip(cache.layers, alone.layers, strict=True):
        torch.testing.assert_close(layer.keys[:, :, begin : begin + n], single.keys, rtol=1e-4, atol=1e-5)
        assert (
            not layer.values[:, :, : cache.begin[1]].any() and not layer.values[:, :, begin + n : begin + n + 6].any()
        )


def test_a_batch_holds_what_half_of_the_free_memory_does(setup, monkeypatch):
    e, _, model, *_ = setup
    c = model.config
    token = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    stand_in = types.SimpleNamespace(device=torch.device("cuda"), config=c, packs_rows=True)
    lengths, logits = [90, 40, 10, 10], 8 * c.vocab_size
    monkeypatch.setattr(generation.modeling, "compute_dtype", lambda *_: torch.bfloat16)
    for is_flat, needed in ((True, 96 + 46 + 16), (False, 96 * 3)):
        monkeypatch.setattr(generation.kernels, "has_varlen", lambda *_, is_flat=is_flat: is_flat)
        for spare, size in ((0, 3), (-1, 2)):
            free = 2 * (needed * token + 3 * logits + spare)
            monkeypatch.setattr(generation.modeling, "free_bytes", lambda device, free=free: free)
            assert generation.batch_size(stand_in, lengths, e) == size
    monkeypatch.setattr(generation.modeling, "free_bytes", lambda device: 0)
    assert generation.batch_size(stand_in, lengths, e) == 1


def test_after_out_of_memory_generation_goes_on_with_smaller_batches(setup, monkeypatch, capsys):
    e, tokenizer, model, _, rows = setup
    plain = generation.generate(model, tokenizer, rows, e, progress=False)
    real = generation._decode

    def too_large(model, chosen, *rest):
        if len(chosen) > 1:
            raise torch.OutOfMemoryError("no memory")
        return real(model, chosen, *rest)

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
    monkeypatch.setattr(generation, "_decode", lambda model, chosen, *rest: [scripted[len(p)] for p in chosen])
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
    e, tokenizer, model, *_ = setup
    g = dataclasses.replace(
        e.generation,
        num_beams=4,
        early_stopping=True,
        length_penalty=0.8,
        no_repeat_ngram_size=2,
        min_new_tokens=3,
    )
    config = generation.generation_config(dataclasses.replace(e, generation=g), tokenizer, model)
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
