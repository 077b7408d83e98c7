"""Opacus: per-sample gradients by hooks, and ghost clipping, which never forms them."""

from __future__ import annotations

import serve
import torch
from jobs import CLIP
from opacus import GradSampleModule, __version__
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from serve import Way, Ways, Work
from torch.nn.functional import cross_entropy
from torch_net import VERSIONS, Net, array, device


def gradients(work: Work) -> Ways:
    net, run = _sampled(work)
    return {"": Way(run, net.canonical)}


def gradient_norms(work: Work) -> Ways:
    _, grads = _sampled(work)
    net, ghost = _ghost(work)

    def by_ghost():
        cross_entropy(ghost(net.x), net.y, reduction="sum").backward()
        norms = ghost.get_norm_sample()
        ghost.zero_grad(set_to_none=True)
        return norms

    return {
        "": Way(lambda: _norms(grads()), lambda found: [array(found)]),
        "ghost": Way(by_ghost, lambda found: [array(found)]),
    }


def clipped_sum(work: Work) -> Ways:
    first, grads = _sampled(work)
    net, ghost = _ghost(work)

    def formed():
        found = grads()
        share = (CLIP / _norms(found)).clamp(max=1)
        return [torch.tensordot(share, part, 1) for part in found]

    def by_ghost():
        losses = cross_entropy(ghost(net.x), net.y, reduction="none")
        losses.sum().backward(retain_graph=True)
        share = ghost.get_clipping_coef()
        ghost.zero_grad(set_to_none=True)
        ghost.disable_hooks()
        (share * losses).sum().backward()
        ghost.enable_hooks()
        found = [p.grad for p in net.module.parameters()]
        ghost.zero_grad(set_to_none=True)
        return found

    return {"": Way(formed, first.canonical), "ghost": Way(by_ghost, net.canonical)}


def _sampled(work: Work):
    """Return the network, and what gives its per-sample gradients."""
    net = Net(work)
    module = GradSampleModule(net.module, loss_reduction="sum")

    def run():
        cross_entropy(module(net.x), net.y, reduction="sum").backward()
        found = [p.grad_sample for p in net.module.parameters()]
        module.zero_grad(set_to_none=True)
        return found

    return net, run


def _ghost(work: Work):
    net = Net(work)
    module = GradSampleModuleFastGradientClipping(
        net.module, max_grad_norm=CLIP, use_ghost_clipping=True, loss_reduction="sum"
    )
    return net, module


def _norms(found: list[torch.Tensor]) -> torch.Tensor:
    return sum(part.square().flatten(1).sum(1) for part in found).sqrt()


JOBS = {job.__name__: job for job in (gradients, gradient_norms, clipped_sum)}

if __name__ == "__main__":
    serve.serve(JOBS, {"Opacus": __version__, **VERSIONS}, device())
