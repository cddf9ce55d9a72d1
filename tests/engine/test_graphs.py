"""Steps padded to a few sizes, and run from held tensors as a CUDA graph is, train what plain steps do."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from src.engine import batches, graphs
from src.engine.trainer import summed_loss
from tests.engine.conftest import fill, random_rows, trainable, weights_of
from tests.engine.test_fuse import assert_close, gradients
from tests.engine.test_trainer import arguments, assert_same, losses, trainer  # noqa: F401  fixtures


@pytest.mark.parametrize("lengths", [[7, 12, 5], [7, 20], [3], [10, 9, 8]])
def test_a_padded_step_has_the_shapes_of_others_and_the_loss_and_gradients_of_its_rows(load, lengths):
    rows, model = random_rows(lengths), fill(load())
    plain, padded = batches.pack(rows), batches.pack_to(rows, 16, 4, 12)
    assert padded["input_ids"].shape == (1, 32 if sum(lengths) > 13 else 16) and len(padded["cu_seq_lens_q"]) == 5
    assert padded["cu_seq_lens_q"].diff().min() > 0 and padded["cu_seq_lens_q"][-1] == padded["input_ids"].numel()
    assert padded["positions"].shape == (12,) and padded["targets"].shape == (1, 12)
    assert padded["tokens"] == sum(lengths) and padded["supervised"] == plain["supervised"] > 0
    loss, expected = gradients(model, plain)
    again, found = gradients(model, padded)
    assert again == pytest.approx(loss, rel=1e-5)
    assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_graph_a_shape_holds_inputs_and_gradients_of_the_newest_step(load):
    model, replayed = fill(load()).train(), []
    steps = graphs.StepGraphs(model, lambda inputs: replayed.append(1) or summed_loss(model, inputs)[0])
    for seed, lengths in enumerate([[7, 12], [20, 3], [8, 11], [5, 5], [30, 12]]):
        batch = batches.pack_to(random_rows(lengths, seed=seed), 16, 3, 20)
        loss, expected = gradients(model, dict(batch))
        model.zero_grad()
        found = steps(batch, torch.tensor(4))
        assert found.item() == pytest.approx(loss / 4, rel=1e-5) and found.grad_fn is None
        own = {name: parameter.grad * 4 for name, parameter in trainable(model).items()}
        assert_close(own, expected, rtol=1e-4, atol=1e-6)
    assert len(replayed) == 5 and len(steps.recorded) == 3  # 32, 16 and 48 tokens


def test_several_processes_sum_loss_and_gradients_of_their_shares(load, monkeypatch):
    model, shares = fill(load()).train(), [random_rows([7, 12]), random_rows([20], seed=1)]
    whole, expected = gradients(model, batches.pack([row for rows in shares for row in rows]))
    sums = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: sums.append(x.clone()))
    steps = graphs.StepGraphs(model, lambda inputs: summed_loss(model, inputs)[0], ranks=2)
    for rows in shares:
        steps(batches.pack_to(rows, 16, 3, 20), torch.tensor(4))
    first, second = sums[:2], sums[2:]  # what each process hands in: gradients and loss
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.add_(first.pop(0)))
    loss = steps(batches.pack_to(shares[1], 16, 3, 20), torch.tensor(4))
    assert loss.item() == pytest.approx(whole / 4, rel=1e-5) and not first and len(second) == 2
    assert_close({name: p.grad * 4 for name, p in trainable(model).items()}, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_training_of_recorded_steps_ends_with_the_adapter_of_a_plain_one(trainer, load, dropout):  # noqa: F811
    def trained(**plan):
        found = trainer(passes=1, packed=True, model=load(lora_dropout=dropout), plan={"fused": True, **plan})
        found.train()
        return found

    plain, recorded = trained(), trained(graphs=True)
    assert recorded.recorded >= 1 and plain.recorded == 0 and recorded.graphs is None
    assert_same(weights_of(recorded.model), weights_of(plain.model))
    assert losses(recorded) == pytest.approx(losses(plain), rel=1e-4) and len(losses(plain)) == 6
    assert recorded.state.num_input_tokens_seen == plain.state.num_input_tokens_seen


class Streams:
    """Stands in for torch.cuda: `graph` fails, as where a kernel waits for the GPU while it is recorded."""

    def __init__(self, error=None):
        self.error, self.entered, self.left = error, 0, []

    def Stream(self, device):  # noqa: N802
        return SimpleNamespace(device=device, wait_stream=lambda other: None)

    current_stream, graph_pool_handle, CUDAGraph = Stream, lambda self: 0, lambda self: SimpleNamespace(replay=None)
    get_rng_state = staticmethod(lambda device: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device: torch.set_rng_state(state))
    stream = staticmethod(lambda stream: nullcontext())

    def set_stream(self, stream):
        self.left.append(stream)

    @contextmanager
    def graph(self, *_, **__):
        self.entered += 1
        yield
        if self.error:
            raise self.error


def steps_on(cuda, monkeypatch, load):
    """StepGraphs of a model on a CPU that records on `cuda`."""
    steps = graphs.StepGraphs(fill(load()), None)
    steps.stream = cuda.Stream("cuda")
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=cuda, OutOfMemoryError=torch.OutOfMemoryError))
    return steps


def test_where_a_step_cannot_be_recorded_it_runs_as_it_is_and_that_is_said_once(load, monkeypatch, capsys):
    cuda, ran = Streams(RuntimeError("operation not permitted\nwhen stream is capturing")), []
    steps = steps_on(cuda, monkeypatch, load)
    torch.manual_seed(1)
    first = torch.rand(1)
    torch.manual_seed(1)

    def step():
        ran.append(torch.rand(1))
        return len(ran)

    for _ in range(3):
        assert steps._record(step) is step
    assert cuda.entered == 1 and len(cuda.left) == 1 and len(ran) == 3  # twice before, once in vain
    assert torch.equal(ran[2], first)  # what is drawn before is put back
    said = "CUDA graphs cannot be recorded here, so kernels are launched one by one: operation not permitted\n"
    assert capsys.readouterr().out == said


def test_a_step_too_large_to_be_recorded_ran_out_of_memory(load, monkeypatch):
    steps = steps_on(Streams(torch.OutOfMemoryError("no memory")), monkeypatch, load)
    with pytest.raises(torch.OutOfMemoryError):  # by which a smaller plan is found
        steps._record(lambda: 1)
    assert steps.stream
