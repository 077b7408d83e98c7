"""curvlinops: KFAC's factors behind its linear operator."""

from __future__ import annotations

import importlib.metadata

import serve
import torch
from curvlinops import FisherType, KFACLinearOperator
from serve import Way, Ways, Work
from torch_net import VERSIONS, Net


def kfac(work: Work) -> Ways:
    net = Net(work)
    loss = torch.nn.CrossEntropyLoss()

    def run():
        operator = KFACLinearOperator(
            net.module, loss, list(net.module.parameters()), [(net.x, net.y)],
            fisher_type=FisherType.TYPE2, check_deterministic=False, num_data=len(net.x),
            num_per_example_loss_terms=1,
        )  # fmt: skip
        operator.compute_kronecker_factors()
        return operator.state_dict()

    def canonical(found):
        a, b = found["input_covariances"], found["gradient_covariances"]
        return net.factors([(a[layer.name], b[layer.name]) for layer in net.layers])

    return {"": Way(run, canonical)}


JOBS = {"kfac": kfac}

if __name__ == "__main__":
    version = importlib.metadata.version("curvlinops-for-pytorch")
    serve.serve(JOBS, {"curvlinops": version, **VERSIONS})
