"""torch.func's transforms: vmap over jacrev, jacfwd and grad."""

from __future__ import annotations

from collections.abc import Callable

import serve
import torch
from jobs import CLIP
from serve import Way, Ways, Work
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch_net import VERSIONS, Net, pictures


def weights(work: Work) -> Ways:
    net = Net(work)
    rows, parameters = _rows(net)
    return {"": Way(lambda: rows(parameters, net.x), lambda found: _canonical(net, found))}


def inputs(work: Work) -> Ways:
    net = Net(work)

    def way(mode):
        return Way(lambda: vmap(mode(_one(net)))(net.x), lambda found: [pictures(found)])

    ways = {"jacrev": way(jacrev)}
    if work.more_outputs_than_inputs:
        ways["jacfwd"] = way(jacfwd)
    return ways


def jacobian_norms(work: Work) -> Ways:
    net = Net(work)
    rows, parameters = _rows(net)

    def run():
        found = rows(parameters, net.x).values()
        return sum(part.square().flatten(1).sum(1) for part in found).sqrt()

    return {"": Way(run, lambda found: [found.numpy()])}


def gradients(work: Work) -> Ways:
    net = Net(work)
    run = _gradients(net)
    return {"": Way(run, lambda found: _canonical(net, found))}


def gradient_norms(work: Work) -> Ways:
    grads = _gradients(Net(work))
    return {"": Way(lambda: _norms(grads()), lambda found: [found.numpy()])}


def clipped_sum(work: Work) -> Ways:
    net = Net(work)
    grads = _gradients(net)

    def run():
        found = grads()
        share = (CLIP / _norms(found)).clamp(max=1)
        return {name: torch.tensordot(share, part, 1) for name, part in found.items()}

    return {"": Way(run, lambda found: _canonical(net, found))}


def ntk(work: Work) -> Ways:
    net = Net(work)
    rows, parameters = _rows(net)
    batch, outputs = len(net.x), work.about["outputs"]

    def run():
        found = rows(parameters, net.x).values()
        flat = [part.reshape(batch * outputs, -1) for part in found]
        return sum(part @ part.T for part in flat).reshape(batch, outputs, batch, outputs)

    return {"": Way(run, lambda found: [found.numpy()])}


def _parameters(net: Net) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in net.module.named_parameters()}


def _one(net: Net) -> Callable:
    """The outputs of one example."""
    parameters = _parameters(net)
    return lambda x: functional_call(net.module, parameters, (x[None],))[0]


def _rows(net: Net) -> tuple[Callable, dict[str, torch.Tensor]]:
    """One example's rows by every weight, over a batch."""

    def outputs(parameters, x):
        return functional_call(net.module, parameters, (x[None],))[0]

    return vmap(jacrev(outputs), (None, 0)), _parameters(net)


def _gradients(net: Net) -> Callable:
    """One example's gradient of the loss by every weight, over the batch."""

    def loss(parameters, x, y):
        logits = functional_call(net.module, parameters, (x[None],))
        return torch.nn.functional.cross_entropy(logits, y[None])

    parameters, mapped = _parameters(net), vmap(grad(loss), (None, 0, 0))
    return lambda: mapped(parameters, net.x, net.y)


def _norms(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(part.square().flatten(1).sum(1) for part in found.values()).sqrt()


def _canonical(net: Net, found: dict[str, torch.Tensor]):
    return net.canonical([found[name] for name in net.names])


JOBS = {
    job.__name__: job
    for job in (weights, inputs, jacobian_norms, gradients, gradient_norms, clipped_sum, ntk)
}

if __name__ == "__main__":
    serve.serve(JOBS, VERSIONS)
