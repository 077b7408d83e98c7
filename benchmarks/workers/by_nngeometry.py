"""nngeometry: Jacobians, kernels and Fisher matrices of a data loader."""

from __future__ import annotations

import importlib.metadata

import serve
from nngeometry.gram import GramMatrix
from nngeometry.jacobian import Jacobian
from nngeometry.metrics import FIM
from nngeometry.object import FMatDense, PFMapDense, PMatDiag, PMatKFAC
from serve import Way, Ways, Work
from torch.utils.data import DataLoader, TensorDataset
from torch_net import VERSIONS, Net


def weights(work: Work) -> Ways:
    net, loader = _loaded(work)

    def run():
        return Jacobian(net.module, loader, lambda x, _: net.module(x), PFMapDense).to_torch()

    # (C, B, P)
    return {"": Way(run, lambda found: net.canonical(net.split(found.transpose(0, 1))))}


def ggn_diagonal(work: Work) -> Ways:
    net, loader = _loaded(work)

    def run():
        return FIM(net.module, loader, PMatDiag, variant="classif_logits").get_diag()

    return {"": Way(run, lambda found: net.canonical(net.split(found)))}


def kfac(work: Work) -> Ways:
    net, loader = _loaded(work)

    def run():
        return FIM(net.module, loader, PMatKFAC, variant="classif_logits").data

    def canonical(found):
        """Without A's last row and column, which are the bias's."""
        return net.factors([(a[:-1, :-1], b) for a, b in found.values()])

    return {"": Way(run, canonical)}


def ntk(work: Work) -> Ways:
    net, loader = _loaded(work)

    def run():
        return GramMatrix(net.module, loader, lambda x, _: net.module(x), FMatDense).to_torch()

    # (C, B, C, B)
    return {"": Way(run, lambda found: [found.permute(1, 0, 3, 2).numpy()])}


def _loaded(work: Work):
    net = Net(work)
    return net, DataLoader(TensorDataset(net.x, net.y), batch_size=len(net.x))


JOBS = {job.__name__: job for job in (weights, ggn_diagonal, kfac, ntk)}

if __name__ == "__main__":
    serve.serve(JOBS, {"nngeometry": importlib.metadata.version("nngeometry"), **VERSIONS})
