"""CUDA graphs: what Python launches kernel by kernel is recorded once and launched whole, so no GPU waits for Python.

Without a stream to record on, the same function runs again in place of a replay: the plain twin.
"""

import functools

import torch

stream = functools.cache(torch.cuda.Stream)  # one a device: each has workspaces of its own
refused = []  # why graphs cannot be recorded on this machine, once that was tried


def record(step, on, pool):
    """A function that launches what step() launched, reads the same tensors, and returns step's result anew.

    step: has no effect that may not be repeated: it runs twice before, which compiles kernels, and then draws the
    same random numbers again. on: a stream. Where recording fails, that is said once, and step itself is returned.
    """
    if on is None or refused:
        return step
    usual, random = torch.cuda.current_stream(on.device), torch.cuda.get_rng_state(on.device)
    on.wait_stream(usual)
    with torch.cuda.stream(on):
        step(), step()
    usual.wait_stream(on)
    torch.cuda.set_rng_state(random, on.device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool, on, capture_error_mode="thread_local"):
            result = step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.set_stream(usual)
        refused.append(str(error).splitlines()[0])
        print(f"CUDA graphs cannot be recorded here, so kernels are launched one by one: {refused[0]}")
        return step
    return lambda: (graph.replay(), result)[1]


class StepGraphs:
    """graphs(inputs, items): the loss of a step divided by `items`, with its gradients in `p.grad` until the next one.

    loss: a function of the inputs (what `batches.pack_to` returns), which is recorded once for every shape of theirs.
    """

    def __init__(self, model, loss):
        self.loss, self.recorded, self.parameters = loss, {}, [p for p in model.parameters() if p.requires_grad]
        self.gradients, cuda = [torch.zeros_like(p) for p in self.parameters], model.device.type == "cuda"
        self.on = (stream(model.device), torch.cuda.graph_pool_handle()) if cuda else (None, None)

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
        loss = self.loss({name: x for name, x in inputs.items() if name != "items"}) / inputs["items"]
        torch._foreach_copy_(self.gradients, torch.autograd.grad(loss, self.parameters))
        return loss.detach()
