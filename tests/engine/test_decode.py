"""Decoding: batches change nothing, stop reasons and token counts are right, prompts stay out of answers."""

import types

import pytest
import torch
import transformers
from transformers import GenerationConfig

from src.engine import decode, generate
from src.engine.attention import flat_rows
from tests.engine.conftest import fill, tiny

GREEDY = GenerationConfig(max_new_tokens=6, do_sample=False)
SAMPLED = GenerationConfig(max_new_tokens=6, do_sample=True, temperature=2.0, eos_token_id=list(range(100, 250)))


@pytest.fixture
def model(load):
    return load().eval()


@pytest.fixture
def rows(rows):
    """Three prompts of different lengths and a very short one."""
    return [*rows.select(range(3)), {**rows[0], "id": "short", "prompt_ids": rows[0]["prompt_ids"][:1]}]


@pytest.fixture
def answers(model, tokenizer, rows):
    """answers(config, **arguments) -> what `generate` returns for the rows."""

    def answers(config=GREEDY, given=rows, **arguments):
        return generate(model, tokenizer, given, config, progress=False, **arguments)

    return answers


@pytest.fixture
def flat(monkeypatch, model):
    """flat() -> from here on decode as on a recent GPU: prompts packed, a flat cache, finished rows dropped."""

    def flat():
        monkeypatch.setattr(decode, "has_varlen", lambda *_: True)
        monkeypatch.setattr(model, "generate", None)  # transformers' own is not called

    return flat


def greedy(model, row, steps, eos):
    """Greedy decoding written out: one row, no cache, no padding."""
    ids = list(row["prompt_ids"])
    for _ in range(steps):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == eos:
            break
    return ids[len(row["prompt_ids"]) :]


@pytest.mark.parametrize("way", ["padded", "flat"])
def test_answers_equal_greedy_decoding_one_by_one(model, tokenizer, rows, answers, flat, way):
    if way == "flat":
        flat()
    found = answers()
    assert [answer["id"] for answer in found] == [row["id"] for row in rows]  # input order, though decoded by length
    for answer, row in zip(found, rows, strict=True):
        new = greedy(model, row, 6, tokenizer.eos_token_id)
        assert answer["tokens"] == len(new) and answer["prompt_tokens"] == len(row["prompt_ids"])
        assert answer["prediction"] == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer["cut_tokens"] == 0


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_do_not_depend_on_the_batch(rows, answers, flat, config):
    """Neither on its size, which is chosen from free memory, nor on how it is computed (E12)."""
    together = answers(config, seed=3)
    assert len({answer["prediction"] for answer in together}) > 1
    assert config is GREEDY or len({answer["tokens"] for answer in together}) > 1  # some rows finish before others
    assert answers(config, seed=3, batch_size=1) == answers(config, seed=3, batch_size=2) == together
    flat()
    for size in (None, 1, 2):
        assert answers(config, seed=3, batch_size=size) == together


def test_decoding_without_padding_drops_rows_as_they_finish(model, tokenizer, rows, answers, flat, monkeypatch):
    said = [greedy(model, row, 6, None) for row in rows]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(said[0][2])  # some rows meet it early, others never
    late = GenerationConfig(max_new_tokens=6, min_new_tokens=4, do_sample=False)
    plain, later = answers(), answers(late)
    assert len({answer["tokens"] for answer in plain}) > 1 and {a["stop"] for a in plain} == {"eos", "length"}
    assert later != plain and all(answer["tokens"] >= 4 for answer in later)
    monkeypatch.setattr(decode, "PREFILL", 150)  # two forward passes
    flat()
    sizes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **said: sizes.append(said["input_ids"].shape[1]) or forward(**said))
    assert answers() == plain
    prompts = sum(len(row["prompt_ids"]) for row in rows)
    trial = 12 + 5 + 12  # of two short rows, by which it is known that packed rows stay apart
    assert len(sizes) > 5 and sum(sizes[3:5]) == prompts and min(sizes[3:5]) > 40
    # every token once: the prompts, then each row's answer without its last token
    assert sum(sizes) == trial + prompts + sum(answer["tokens"] - 1 for answer in plain)
    assert answers(late) == later


def test_every_end_token_of_the_model_ends_an_answer(model, tokenizer, rows, answers, flat, monkeypatch):
    said = greedy(model, rows[0], 6, None)
    assert said[2] not in said[:2]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, said[2]])
    for way in (lambda: None, flat):
        way()
        found = answers(given=rows[:1])[0]
        assert (found["stop"], found["tokens"]) == ("eos", 3)
        assert found["prediction"] == tokenizer.decode(said[:2], skip_special_tokens=True).strip()


def test_the_models_own_preferences_do_not_change_what_was_asked(model, rows, answers, flat, monkeypatch):
    """Chat models come with sampling and penalties of their own, which transformers takes where nothing is said."""
    asked = GenerationConfig(max_new_tokens=6)  # greedy by transformers' defaults
    plain = answers(asked)
    own = model.generation_config
    for name, value in {"do_sample": True, "temperature": 3.0, "repetition_penalty": 9.0, "num_beams": 2}.items():
        monkeypatch.setattr(own, name, value)
    assert answers(asked) == plain
    flat()
    assert answers(asked) == plain


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"num_beams": 3, "early_stopping": True, "length_penalty": -5.0},
        {"suppress_tokens": list(range(3, 250))},
    ],
    ids=str,
)
def test_what_only_transformers_computes_is_left_to_it(model, tokenizer, rows, answers, monkeypatch, fields):
    asked, plain = GenerationConfig(max_new_tokens=6, do_sample=False, **fields), answers()
    found = answers(asked)
    if "suppress_tokens" in fields or "repetition_penalty" in fields:
        assert [a["prediction"] for a in found] != [a["prediction"] for a in plain]
    monkeypatch.setattr(decode, "has_varlen", lambda *_: True)
    assert answers(asked) == found
    # the same as transformers' generate on one prompt
    ids = torch.tensor([rows[1]["prompt_ids"]])
    own = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=asked, pad_token_id=0, eos_token_id=2
    )
    text = tokenizer.decode(own[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert answers(asked)[1]["prediction"] == text


def test_a_model_that_mixes_packed_rows_is_decoded_padded(model, tokenizer, monkeypatch):
    monkeypatch.setattr(decode, "has_varlen", lambda *_: True)
    mamba = tiny(transformers.MambaConfig, state_size=4)
    config = decode.complete(GREEDY, tokenizer, model)
    assert decode.unpadded(model, config) and not decode.unpadded(mamba, config)
    monkeypatch.setattr(decode, "has_varlen", lambda *_: False)
    assert not decode.unpadded(model, config)


def test_a_flat_cache_holds_what_each_row_alone_would(model, rows):
    prompts = [row["prompt_ids"] for row in rows[:3]]
    cache = decode.FlatCache(torch.tensor([len(p) + 6 for p in prompts]))
    own, numbers = torch.tensor([len(p) for p in prompts[1:]]), torch.tensor([1, 2])  # row 0 is left out
    inputs = flat_rows([i for p in prompts[1:] for i in p], own.tolist())
    new = torch.repeat_interleave(cache.begin[numbers], own) + inputs["position_ids"][0]
    with torch.inference_mode():
        model(**inputs | cache.stretch(numbers, own, new))
        alone = model(input_ids=torch.tensor([prompts[2]]), use_cache=True).past_key_values
    begin, n = int(cache.begin[2]), len(prompts[2])
    for number, single in enumerate(alone.layers):
        keys, values = cache.stored[number]  # (slots, heads, d)
        torch.testing.assert_close(keys[begin : begin + n].transpose(0, 1), single.keys[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values[begin : begin + n].transpose(0, 1), single.values[0], rtol=1e-4, atol=1e-5)
        assert not values[: cache.begin[1]].any() and not values[begin + n :].any() and len(values) == begin + n + 6


def test_a_batch_holds_what_half_of_the_free_memory_does(model, tokenizer, monkeypatch):
    c, config = model.config, decode.complete(GREEDY, tokenizer, model)
    token = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # bytes of 16-bit keys and values
    stand_in = types.SimpleNamespace(device=torch.device("cuda"), config=c)
    lengths, logits = [90, 40, 10, 10], 8 * c.vocab_size
    # flat: each prompt with its six new tokens; padded: as long as the longest
    for is_flat, needed in ((True, 96 + 46 + 16), (False, 96 * 3)):
        for spare, size in ((0, 3), (-1, 2)):
            free = 2 * (needed * token + 3 * logits + spare)
            monkeypatch.setattr(decode.weights, "free_bytes", lambda device, free=free: free)
            assert decode.fitting(stand_in, lengths, config, is_flat) == size
    monkeypatch.setattr(decode.weights, "free_bytes", lambda device: 0)
    assert decode.fitting(stand_in, lengths, config, True) == 1  # one is tried at least
    monkeypatch.setattr(decode.weights, "free_bytes", lambda device: 2**60)
    assert decode.fitting(stand_in, [10] * 5000, config, True) == 1024
    assert decode.fitting(model, lengths, config, False) == 64  # on a CPU


def test_after_out_of_memory_generation_goes_on_with_smaller_batches(model, answers, monkeypatch, capsys):
    plain, real, sizes = answers(SAMPLED), model.generate, []

    def too_large(input_ids, **said):
        sizes.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("no memory")
        return real(input_ids=input_ids, **said)

    monkeypatch.setattr(model, "generate", too_large)
    assert answers(SAMPLED) == plain and sizes == [4, 2, 1, 1, 1, 1]
    assert "going on with 2 prompts a batch" in capsys.readouterr().out


def test_a_prompt_that_memory_does_not_hold_is_an_error(model, rows, answers, monkeypatch):
    def too_large(**said):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(model, "generate", too_large)
    longest = max(len(row["prompt_ids"]) for row in rows)
    with pytest.raises(
        torch.OutOfMemoryError, match=f"does not hold one prompt of {longest} tokens.*engine.dequantize to 'off'"
    ):
        answers()


def test_stop_reason_and_token_count(model, tokenizer, rows, answers, monkeypatch):
    eos, word = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("a")
    # row 0 stops after one token, row 1 says nothing at all, row 2 is cut off at six tokens
    scripted = [[word, eos, 0, 0, 0, 0], [eos, 0, 0, 0, 0, 0], [word] * 6]
    by_prompt = {tuple(row["prompt_ids"]): new for row, new in zip(rows, scripted, strict=False)}

    def script(input_ids, attention_mask, **_):
        prompts = [tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask, strict=True)]
        return torch.cat([input_ids, torch.tensor([by_prompt[prompt] for prompt in prompts])], 1)

    monkeypatch.setattr(model, "generate", script)
    assert [(a["prediction"], a["tokens"], a["stop"]) for a in answers(given=rows[:3])] == [
        ("a", 2, "eos"),
        ("", 1, "eos"),
        ("aaaaaa", 6, "length"),
    ]


def test_a_disabled_adapter_answers_as_the_base_model(model, answers):
    plain = answers()  # a fresh adapter changes nothing
    fill(model, 0.5)
    with model.disable_adapter():
        assert answers() == plain
    assert [a["prediction"] for a in answers()] != [a["prediction"] for a in plain]
    model.train()
    answers()
    assert model.training


def test_sampling_is_seeded_and_leaves_other_random_numbers_alone(answers):
    torch.manual_seed(5)
    first = answers(SAMPLED)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert answers(SAMPLED) == first
    assert answers(SAMPLED, seed=1) != first and answers() != first


@pytest.mark.parametrize("fields", [{"top_p": 1e-6}, {"top_k": 1}, {"temperature": 1e-4}], ids=str)
def test_sampling_narrowed_to_the_likeliest_token_is_greedy(answers, fields):
    narrow = GenerationConfig(max_new_tokens=6, do_sample=True, **{"temperature": 2.0, **fields})
    assert answers(narrow) == answers()


def test_draws_have_the_models_probabilities():
    """top_k leaves two of four tokens. At temperature 2 their weights are the roots of 0.64 and 0.16: two to one."""
    config = GenerationConfig(do_sample=True, temperature=2.0, top_k=2, top_p=1.0)
    scores = torch.tensor([0.64, 0.16, 0.1, 0.1]).log().expand(3000, 4)
    drawn = decode.SeededSampling(config, range(3000), seed=0)(None, scores).argmax(-1)
    shares = drawn.bincount(minlength=4) / 3000
    assert shares[2:].sum() == 0 and shares[0].item() == pytest.approx(2 / 3, abs=0.03)  # 3.5 standard errors


def test_padded_prompts_never_meet_cudnns_attention(model, answers, monkeypatch):
    seen, whole = [], model.generate

    def generate(**arguments):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return whole(**arguments)

    monkeypatch.setattr(model, "generate", generate)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    answers()
    assert before and seen == [False] and torch.backends.cuda.cudnn_sdp_enabled()
