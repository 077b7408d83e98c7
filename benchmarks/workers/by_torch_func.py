"""torch.func's transforms: vmap over jacrev, jacfwd and grad; models of Keras on its backend."""

from __future__ import annotations

from collections.abc import Callable

import serve
import torch
import torch_net
from jobs import CLIP
from serve import Way, Ways, Work
from torch.func import grad, jacfwd, jacrev, vmap
from torch_net import VERSIONS, KerasNet, Net, array, pictures


def weights(work: Work) -> Ways:
    net = torch_net.net(work)
    rows = _rows(net)
    return {"": Way(lambda: rows(net.parameters, net.x), lambda found: _canonical(net, found))}


def inputs(work: Work) -> Ways:
    net = torch_net.net(work)
    parameters = net.parameters

    def one(x):
        return net.outputs(parameters, x[None])[0]

    def way(mode):
        return Way(lambda: vmap(mode(one))(net.x), lambda found: [pictures(found, net.x[0])])

    ways = {"jacrev": way(jacrev)}
    if work.more_outputs_than_inputs:
        ways["jacfwd"] = way(jacfwd)
    return ways


def jacobian_norms(work: Work) -> Ways:
    net = torch_net.net(work)
    rows = _rows(net)
    return {"": Way(lambda: _norms(rows(net.parameters, net.x)), lambda found: [array(found)])}


def gradients(work: Work) -> Ways:
    net = torch_net.net(work)
    return {"": Way(_gradients(net), lambda found: _canonical(net, found))}


def gradient_norms(work: Work) -> Ways:
    grads = _gradients(torch_net.net(work))
    return {"": Way(lambda: _norms(grads()), lambda found: [array(found)])}


def clipped_sum(work: Work) -> Ways:
    net = torch_net.net(work)
    grads = _gradients(net)

    def run():
        found = grads()
        share = (CLIP / _norms(found)).clamp(max=1)
        return {name: torch.tensordot(share, part, 1) for name, part in found.items()}

    return {"": Way(run, lambda found: _canonical(net, found))}


def ntk(work: Work) -> Ways:
    net = torch_net.net(work)
    rows = _rows(net)
    batch, outputs = len(net.x), work.about["outputs"]

    def run():
        found = rows(net.parameters, net.x).values()
        flat = [part.reshape(batch * outputs, -1) for part in found]
        return sum(part @ part.T for part in flat).reshape(batch, outputs, batch, outputs)

    return {"": Way(run, lambda found: [array(found)])}


def _rows(net: Net | KerasNet) -> Callable:
    """One example's rows by every weight, over a batch."""

    def outputs(parameters, x):
        return net.outputs(parameters, x[None])[0]

    return vmap(jacrev(outputs), (None, 0))


def _gradients(net: Net | KerasNet) -> Callable:
    """One example's gradient of the loss by every weight, over the batch."""

    def loss(parameters, x, y):
        logits = net.outputs(parameters, x[None])
        return torch.nn.functional.cross_entropy(logits, y[None])

    parameters, mapped = net.parameters, vmap(grad(loss), (None, 0, 0))
    return lambda: mapped(parameters, net.x, net.y)


def _norms(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(part.square().flatten(1).sum(1) for part in found.values()).sqrt()


def _canonical(net: Net | KerasNet, found: dict[str, torch.Tensor]):
    return net.canonical([found[name] for name in net.parameters])


JOBS = {
    job.__name__: job
    for job in (weights, inputs, jacobian_norms, gradients, gradient_norms, clipped_sum, ntk)
}

if __name__ == "__main__":
    serve.serve(JOBS, VERSIONS, torch_net.device())
