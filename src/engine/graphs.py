"""CUDA graphs: what Python launches kernel by kernel is recorded once and launched whole, so no GPU waits for Python.

Without a stream to record on, the same function runs again in place of a replay: the plain twin.
"""

import torch

refused = []  # why graphs cannot be recorded on this machine, once that was tried


def record(step, stream, pool):
    """A function that launches what step() launched, reads the same tensors, and returns step's result anew.

    step: has no effect that may not be repeated. It runs twice before, which compiles kernels and draws no random
    numbers from those to come. Where recording fails, that is said once, and step itself is returned.
    """
    if stream is None or refused:
        return step
    usual, random = torch.cuda.current_stream(stream.device), torch.cuda.get_rng_state(stream.device)
    stream.wait_stream(usual)
    with torch.cuda.stream(stream):
        step(), step()
    usual.wait_stream(stream)
    torch.cuda.set_rng_state(random, stream.device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            result = step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.set_stream(usual)
        refused.append(str(error).splitlines()[0])
        print(f"CUDA graphs cannot be recorded here, so kernels are launched one by one: {refused[0]}")
        return step

    def replay():
        graph.replay()
        return result

    return replay


class StepGraphs:
    """graphs(inputs, items): the loss of a step divided by `items`, with its gradients in `p.grad` until the next one.

    loss: a function of the inputs (what `batches.pack_to` returns), which is recorded once for every shape of theirs.
    """

    def __init__(self, model, loss):
        self.loss, self.recorded, self.parameters = loss, {}, [p for p in model.parameters() if p.requires_grad]
        self.gradients, cuda = [torch.zeros_like(p) for p in self.parameters], model.device.type == "cuda"
        self.on = (torch.cuda.Stream(model.device), torch.cuda.graph_pool_handle()) if cuda else (None, None)

    def __call__(self, inputs: dict, items) -> torch.Tensor:
        tensors = {name: x for name, x in inputs.items() if torch.is_tensor(x)} | {"items": torch.as_tensor(items)}
        shapes = tuple(x.shape for x in tensors.values())
        if shapes not in self.recorded:
            held = {name: x.to(self.gradients[0].device, copy=True) for name, x in tensors.items()}
            self.recorded[shapes] = held, record(lambda: self._step(inputs | held), *self.on)
        held, replay = self.recorded[shapes]
        for name, x in tensors.items():
            held[name].copy_(x)
        loss = replay()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        return loss

    def _step(self, inputs: dict) -> torch.Tensor:
        inputs = dict(inputs)
        items = inputs.pop("items")
        loss = self.loss(inputs) / items
        torch._foreach_copy_(self.gradients, torch.autograd.grad(loss, self.parameters))
        return loss.detach()
