"""Short training steps as CUDA graphs, recorded once a size: no GPU waits for Python to launch its kernels."""

import torch


class StepGraphs:
    """graphs(inputs, items): the loss of a step divided by `items`, with its gradients in `p.grad` until the next one.

    loss: a function of the inputs (what `batches.pack_to` returns), which is recorded once for every shape of theirs.
    Where there is no stream (on a CPU), or recording has failed, which is said once, it runs again in every step.
    Of several `ranks`, each records its own share of a step; loss and gradients are summed over them. `refused`: why
    recording failed.
    """

    def __init__(self, model, loss, ranks: int = 1):
        self.loss, self.recorded, self.refused, self.ranks = loss, {}, None, ranks
        self.parameters, cuda = [p for p in model.parameters() if p.requires_grad], model.device.type == "cuda"
        sizes = [p.numel() for p in self.parameters]
        self.flat = torch.zeros(sum(sizes), device=model.device)  # float32, as the adapter: one sum for all
        self.gradients = [part.view_as(p) for part, p in zip(self.flat.split(sizes), self.parameters, strict=True)]
        self.stream = torch.cuda.Stream(model.device) if cuda else None
        self.pool = torch.cuda.graph_pool_handle() if cuda else 0

    def __call__(self, inputs: dict, items) -> torch.Tensor:
        tensors = {name: x for name, x in inputs.items() if torch.is_tensor(x)} | {"items": torch.as_tensor(items)}
        shapes = tuple(x.shape for x in tensors.values())
        if shapes not in self.recorded:
            held = {name: x.to(self.gradients[0].device, copy=True) for name, x in tensors.items()}
            self.recorded[shapes] = held, self._record(lambda: self._step(inputs | held))
        held, replay = self.recorded[shapes]
        for name, x in tensors.items():
            held[name].copy_(x)
        loss = replay()
        if self.ranks > 1:
            for sums in (self.flat, loss):
                torch.distributed.all_reduce(sums)
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        return loss

    def _step(self, inputs: dict) -> torch.Tensor:
        loss = self.loss({name: x for name, x in inputs.items() if name != "items"}) / inputs["items"]
        torch._foreach_copy_(self.gradients, torch.autograd.grad(loss, self.parameters))
        return loss.detach()

    def _record(self, step):
        """What launches all that step() launches. step() runs twice before, which compiles kernels."""
        if self.stream is None:
            return step
        usual, random = torch.cuda.current_stream(self.stream.device), torch.cuda.get_rng_state(self.stream.device)
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            step(), step()
        usual.wait_stream(self.stream)
        torch.cuda.set_rng_state(random, self.stream.device)  # the masks of dropout are those that come without a trial
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(usual)
            self.stream, self.refused = None, str(error).splitlines()[0]
            print(f"CUDA graphs cannot be recorded here, so kernels are launched one by one: {self.refused}")
            return step
        return lambda: (graph.replay(), result)[1]
