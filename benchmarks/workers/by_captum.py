"""Captum: attributions, in one pass or cut into batches."""

from __future__ import annotations

import time

import captum
import serve
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from jobs import SAMPLES, SIGMA, STEPS
from serve import Way, Ways, Work
from torch_net import VERSIONS, Net, pictures

_SIZES = (64, 128, 256, 512, 1024)
_AT_ONCE = (1, 2, 5, 10, 25)


def integrated_gradients(work: Work) -> Ways:
    net = Net(work)
    method = IntegratedGradients(net.module)

    def run(size=None):
        return method.attribute(net.x, target=net.y, n_steps=STEPS, internal_batch_size=size)

    return {"": Way(run, _canonical), **_best(run, _SIZES, "internal_batch_size")}


def smoothgrad(work: Work) -> Ways:
    net = Net(work)
    method = NoiseTunnel(Saliency(net.module))

    def run(size=None):
        return method.attribute(
            net.x, nt_samples=SAMPLES, nt_samples_batch_size=size, stdevs=SIGMA, target=net.y,
            abs=False,
        )  # fmt: skip

    return {"": Way(run, _canonical), **_best(run, _AT_ONCE, "nt_samples_batch_size")}


def _best(run, sizes: tuple[int, ...], name: str) -> Ways:
    """The way with the size that is quickest here."""
    taken = {}
    for size in sizes:
        run(size)
        start = time.perf_counter()
        run(size)
        taken[size] = time.perf_counter() - start
    best = min(taken, key=taken.get)
    return {f"best {name}": Way(lambda: run(best), _canonical, note=str(best))}


def _canonical(found):
    return [pictures(found, found[0])]


JOBS = {job.__name__: job for job in (integrated_gradients, smoothgrad)}

if __name__ == "__main__":
    serve.serve(JOBS, {"Captum": captum.__version__, **VERSIONS})
