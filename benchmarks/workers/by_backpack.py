"""BackPACK: quantities that come along with a backward pass."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import serve
import torch
from backpack import backpack, extend, extensions
from jobs import CLIP
from serve import Way, Ways, Work
from torch_net import VERSIONS, Net, array, device


def gradients(work: Work) -> Ways:
    net, backward = _extended(work, "sum")
    run = _quantity(net, backward, extensions.BatchGrad(), "grad_batch")
    return {"": Way(run, net.canonical)}


def gradient_norms(work: Work) -> Ways:
    net, backward = _extended(work, "sum")
    squares = _quantity(net, backward, extensions.BatchL2Grad(), "batch_l2")
    return {"": Way(lambda: sum(squares()).sqrt(), lambda found: [array(found)])}


def clipped_sum(work: Work) -> Ways:
    net, backward = _extended(work, "sum")
    grads = _quantity(net, backward, extensions.BatchGrad(), "grad_batch")

    def run():
        found = grads()
        norms = sum(part.square().flatten(1).sum(1) for part in found).sqrt()
        share = (CLIP / norms).clamp(max=1)
        return [torch.tensordot(share, part, 1) for part in found]

    return {"": Way(run, net.canonical)}


def ggn_diagonal(work: Work) -> Ways:
    net, backward = _extended(work, "mean")
    run = _quantity(net, backward, extensions.DiagGGNExact(), "diag_ggn_exact")
    return {"": Way(run, net.canonical)}


def kfac(work: Work) -> Ways:
    net, backward = _extended(work, "mean")
    run = _quantity(net, backward, extensions.KFLR(), "kflr")

    convolutions = [isinstance(layer.module, torch.nn.Conv2d) for layer in net.layers]

    def canonical(found):
        """Without B of convolutions, and what rests on it: BackPACK's is another matrix."""
        arrays = net.factors([(a, b) for b, a in found[::2]])
        for n, other in enumerate(convolutions):
            if other:
                arrays[3 * n + 1 : 3 * n + 3] = [None, None]
        return arrays

    # Its convnd.py: positions are added up in the cotangents, where KFAC's papers add the products.
    note = "its own B of convolutions: not compared" if any(convolutions) else ""
    return {"": Way(run, canonical, note)}


def _extended(work: Work, reduction: str) -> tuple[Net, Callable]:
    """Return the network, and what runs its loss there and back."""
    net = Net(work)
    extend(net.module)
    loss = extend(torch.nn.CrossEntropyLoss(reduction=reduction))

    def backward():
        net.module.zero_grad()
        loss(net.module(net.x), net.y).backward()

    return net, backward


def _quantity(net: Net, backward: Callable, extension, attribute: str) -> Callable[[], list]:
    def run():
        with backpack(extension):
            backward()
        found = [getattr(p, attribute) for p in net.module.parameters()]
        for p in net.module.parameters():
            delattr(p, attribute)
        return found

    return run


JOBS = {job.__name__: job for job in (gradients, gradient_norms, clipped_sum, ggn_diagonal, kfac)}

if __name__ == "__main__":
    version = importlib.metadata.version("backpack-for-pytorch")
    serve.serve(JOBS, {"BackPACK": version, **VERSIONS}, device())
