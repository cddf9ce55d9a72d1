"""Batches: which rows a step and a pass hold, and what the padded and packed tensors say."""

import pytest
import torch

from src.engine.batches import EVAL_ROWS, IGNORE, StepSampler, bins, pack, pad, runs, validation_batches
from src.engine.trainer import summed_loss
from tests.engine.conftest import fill, pass_tokens, random_rows, trainable

LENGTHS = [(7 * i) % 23 + 1 for i in range(22)]  # with 4 or 6 rows a step, the last step of an epoch is short
TWO = [{"input_ids": [1, 5, 6, 2], "labels": [IGNORE, IGNORE, 6, 2]}, {"input_ids": [1, 7], "labels": [IGNORE, 7]}]


def test_bins_are_balanced_and_hold_every_row_once():
    # longest first, each to the emptiest: 9, 7 and 5, then 4 to the bin of 5, 3 to that of 7, 1 to one of 9
    lengths = [5, 9, 1, 7, 3, 4]
    found = bins(lengths, 3)
    assert sorted(i for part in found for i in part) == [0, 1, 2, 3, 4, 5]
    assert sorted(sum(lengths[i] for i in part) for part in found) == [9, 10, 10]


def test_runs_hold_neighbours_in_length_and_differ_by_one_row_at_most():
    # sorted by length: rows 2 (1), 4 (3), 5 (4), 0 (5), 3 (7); five rows in two runs: two and three of them
    assert runs([5, 9, 1, 7, 3], 2) == [[2, 4], [0, 3, 1]]
    sizes = [len(part) for part in runs(LENGTHS, 5)]
    assert sum(sizes) == 22 and set(sizes) == {4, 5}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("per_step", "passes"), [(4, 1), (4, 2), (4, 4), (6, 3), (5, 4)])
def test_a_step_holds_exactly_its_rows(packed, per_step, passes):
    sampler = StepSampler(LENGTHS, per_step, passes, seed=1, packed=packed)
    found = list(sampler)
    assert len(found) == len(sampler) and all(found)
    assert sorted(i for part in found for i in part) == list(range(22))
    for step in range(22 // per_step):
        assert sum(map(len, found[step * passes : (step + 1) * passes])) == per_step
    sampler.set_epoch(1)
    assert list(sampler) != found  # shuffled by seed and epoch
    sampler.set_epoch(0)
    assert list(sampler) == found
    assert list(StepSampler(LENGTHS, per_step, passes, seed=2, packed=packed)) != found


def test_every_machine_puts_the_same_rows_into_a_step():
    """Packed on one GPU or padded in many passes on another: the steps of an epoch hold the same rows (E7)."""

    def steps(passes, packed):
        sampler = StepSampler(LENGTHS, 4, passes, seed=1, packed=packed)
        sampler.set_epoch(2)
        found, passes_of = list(sampler), [passes] * 5 + [min(passes, 2)]  # the last step has two rows
        return [sorted(sum((found.pop(0) for _ in range(n)), [])) for n in passes_of]

    expected = steps(1, False)
    assert [len(step) for step in expected] == [4, 4, 4, 4, 4, 2]
    for passes in (1, 2, 3, 4):
        for packed in (True, False):
            assert steps(passes, packed) == expected


def test_padded_passes_hold_rows_of_similar_length():
    lengths = [(37 * i) % 101 + 1 for i in range(256)]
    waste = {}
    for passes in (1, 4):
        parts = list(StepSampler(lengths, 16, passes, 0, packed=False))
        computed = sum(pass_tokens([lengths[i] for i in part], packed=False) for part in parts)
        waste[passes] = computed / sum(lengths) - 1
    # one pass a step is as long as its longest row, about twice the mean; four passes pad to their own quarter's
    assert waste[1] > 0.7 and waste[4] < 0.3


def test_a_padded_batch_is_masked_by_length_and_not_by_id():
    batch = pad([TWO[0], {"input_ids": [1, 0], "labels": [IGNORE, 0]}], pad_id=0)  # 0 is a token as well as padding
    assert batch["input_ids"].tolist() == [[1, 5, 6, 2], [1, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 2], [-100, 0, -100, -100]]
    # column i predicts token i + 1: columns 1 and 2 for the first row, column 0 for the second
    assert batch["positions"].tolist() == [0, 1, 2] and batch["targets"].tolist() == [[-100, 6, 2], [0, -100, -100]]
    assert (batch["supervised"], batch["tokens"]) == (3, 6)


def test_a_packed_batch_numbers_positions_by_row_and_predicts_no_rows_first_token():
    batch = pack([TWO[0], {"input_ids": [3, 7], "labels": [3, 7]}])
    assert batch["input_ids"].tolist() == [[1, 5, 6, 2, 3, 7]] and batch["position_ids"].tolist() == [
        [0, 1, 2, 3, 0, 1]
    ]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 4, 6]
    assert batch["max_length_q"] == batch["max_length_k"] == 4 and batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["labels"].tolist() == [[-100, -100, 6, 2, -100, 7]]  # 3 would be predicted by the other row's 2
    assert batch["positions"].tolist() == [1, 2, 4] and batch["targets"].tolist() == [[6, 2, 7]]
    assert (batch["supervised"], batch["tokens"]) == (3, 6)


def test_padded_and_packed_batches_supervise_the_same_tokens():
    """Also those of a row whose first label is not hidden: the Trainer divides by the labels that it counts."""
    rows = [{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}, *TWO]
    padded, packed = pad(rows, 0), pack(rows)
    for batch in (padded, packed):
        assert batch["supervised"] == 2 + 2 + 1 == int((batch["labels"] != IGNORE).sum())


def test_the_summed_loss_equals_a_plain_forward_row_by_row(load, tokenizer, rows):
    model, rows = load().eval(), list(rows)[:3]
    total = 0.0
    for row in rows:  # log-probabilities of the answer tokens, one row at a time, no padding, all logits
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        total -= sum(logits[i - 1, label].item() for i, label in enumerate(row["labels"]) if label != IGNORE)
    for batch in (pad(rows, tokenizer.pad_token_id), pack(rows)):
        loss, count = summed_loss(model, batch)
        assert count == sum(len(row["input_ids"]) - len(row["prompt_ids"]) for row in rows)
        assert loss.item() == pytest.approx(total, rel=1e-5)


def gradients(model, batched):
    model.zero_grad()
    losses = [summed_loss(model, batch) for batch in batched]
    sum(loss for loss, _ in losses).backward()
    return losses, {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def test_packed_rows_get_the_loss_and_gradients_that_they_get_alone(load, tokenizer, rows):
    model, rows = fill(load()), list(rows)[:3]
    alone, expected = gradients(model, [pad([row], tokenizer.pad_token_id) for row in rows])
    packed, found = gradients(model, [pack(rows)])
    assert packed[0][1] == sum(n for _, n in alone)
    assert packed[0][0].item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-5)
    assert len(expected) == 28  # A and B of seven projections in two layers
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_packed_row_does_not_see_its_neighbour(load, rows):
    model, rows = load(), list(rows)

    def loss_of_last(first):
        both, own = (summed_loss(model, pack(part))[0].item() for part in ([first, rows[2]], [first]))
        return both - own

    assert loss_of_last(rows[0]) == pytest.approx(loss_of_last(rows[1]), rel=1e-4)


@pytest.mark.parametrize("tokens", [1, 40, 130, 10**6])
def test_validation_passes_are_no_larger_than_training_passes(tokens):
    rows = [{"n": n, **row} for n, row in enumerate(random_rows([10 + (7 * i) % 31 for i in range(50)]))]
    found = validation_batches(rows, tokens)
    assert sorted(row["n"] for part in found for row in part) == list(range(50))
    assert all(len(part) == 1 or len(part) * max(len(r["input_ids"]) for r in part) <= tokens for part in found)
    assert max(map(len, found)) <= EVAL_ROWS
