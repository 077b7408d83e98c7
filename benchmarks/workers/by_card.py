"""Floors on the device that JAX finds: memory filled and copied, and one ordinary gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import serve
from by_jax import DEVICE, VERSIONS, forward, given, labelled, way
from jobs import COPY, FILL, PLAIN
from serve import Ways, Work

# Large enough to leave every cache: of a card, and of a processor.
_COPIED = 2**30 if DEVICE.name != "cpu" else 2**28


def weights(work: Work) -> Ways:
    rows = (len(work.x), work.about["outputs"])
    return _memory([(*rows, *w.shape) for w in given(work)])


def inputs(work: Work) -> Ways:
    return _memory([(len(work.x), work.about["outputs"], *work.x.shape[1:])])


def gradients(work: Work) -> Ways:
    sizes = [(len(work.x), *w.shape) for w in given(work)]
    return {**_memory(sizes), **gradient(work)}


def gradient(work: Work) -> Ways:
    outputs = forward(work)

    def mean(weights, x, y):
        logs = jax.nn.log_softmax(outputs(weights, x))
        return -jnp.take_along_axis(logs, y[:, None], 1).mean()

    return {PLAIN: way(jax.grad(mean), *labelled(work), canonical=False)}


def _memory(sizes: list[tuple[int, ...]]) -> Ways:
    def filled():
        return [jnp.ones(size, "float32") for size in sizes]

    source = jnp.zeros(_COPIED // 4, "float32")
    copied = way(lambda a: a + 1, source, canonical=False, moved=2 * _COPIED)
    return {FILL: way(filled, canonical=False), COPY: copied}


JOBS = {"weights": weights, "inputs": inputs, "gradients": gradients, "gradient_norms": gradient}

if __name__ == "__main__":
    serve.serve(JOBS, VERSIONS, DEVICE)
