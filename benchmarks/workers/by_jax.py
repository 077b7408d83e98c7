"""JAX: vmap over jacrev, jacfwd and grad, jitted; models of Keras on its JAX backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import serve
from jax import lax
from jobs import CLIP
from serve import Device, Way, Ways, Work
from stateless import stateless

_first = jax.devices()[0]
DEVICE = Device() if _first.platform == "cpu" else Device(_first.device_kind)
VERSIONS = {"jax": jax.__version__}


def weights(work: Work) -> Ways:
    return {"": way(jax.vmap(jax.jacrev(_one(work)), (None, 0)), *_examples(work))}


def inputs(work: Work) -> Ways:
    one, examples = _one(work), _examples(work)
    ways = {"jacrev": way(jax.vmap(jax.jacrev(one, 1), (None, 0)), *examples)}
    if work.more_outputs_than_inputs:
        ways["jacfwd"] = way(jax.vmap(jax.jacfwd(one, 1), (None, 0)), *examples)
    return ways


def jacobian_norms(work: Work) -> Ways:
    rows = jax.jacrev(_one(work))

    def norm(weights, x):
        return _norm(rows(weights, x))

    return {"": way(jax.vmap(norm, (None, 0)), *_examples(work))}


def gradients(work: Work) -> Ways:
    gradient = jax.grad(loss(work))
    return {"": way(jax.vmap(gradient, (None, 0, 0)), *labelled(work))}


def gradient_norms(work: Work) -> Ways:
    gradient = jax.grad(loss(work))

    def norm(*given):
        return _norm(gradient(*given))

    return {"": way(jax.vmap(norm, (None, 0, 0)), *labelled(work))}


def clipped_sum(work: Work) -> Ways:
    gradient = jax.grad(loss(work))

    def clipped(*given):
        found = gradient(*given)
        share = jnp.minimum(1, CLIP / _norm(found))
        return [share * part for part in found]

    def summed(*given):
        return [part.sum(0) for part in jax.vmap(clipped, (None, 0, 0))(*given)]

    return {"": way(summed, *labelled(work))}


def ntk(work: Work) -> Ways:
    rows = jax.vmap(jax.jacrev(_one(work)), (None, 0))

    def contraction(weights, x):
        found = rows(weights, x)
        shape = found[0].shape[:2]
        flat = [part.reshape(shape[0] * shape[1], -1) for part in found]
        return sum(part @ part.T for part in flat).reshape(*shape, *shape)

    return {"": way(contraction, *_examples(work))}


def forward(work: Work) -> Callable:
    """Return (weights, batch) -> outputs."""
    if not work.about["layers"]:
        return stateless(work, "jax")[0]
    plain = {"relu": jax.nn.relu, "tanh": jnp.tanh, "flatten": lambda x: x.reshape(len(x), -1)}

    def outputs(weights, x):
        left = iter(weights)
        for kind, *args in work.about["layers"]:
            if kind == "dense":
                x = x @ next(left) + next(left)
            elif kind == "conv":
                x = lax.conv_general_dilated(
                    x, next(left), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                x = x + next(left)
            elif kind == "pool":
                window = (1, args[0], args[0], 1)
                x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
            else:
                x = plain[kind](x)
        return x

    return outputs


def given(work: Work) -> list[jax.Array]:
    """Return the weights that are trained."""
    if not work.about["layers"]:
        return stateless(work, "jax")[1]
    return [jnp.asarray(w) for w in work.weights]


def loss(work: Work) -> Callable:
    """Return (weights, example, label) -> its loss."""
    one = _one(work)
    return lambda weights, x, y: -jax.nn.log_softmax(one(weights, x))[y]


def labelled(work: Work) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Return weights, examples and labels."""
    return *_examples(work), jnp.asarray(work.y)


def _one(work: Work) -> Callable:
    """The outputs of one example."""
    outputs = forward(work)
    return lambda weights, x: outputs(weights, x[None])[0]


def _examples(work: Work) -> tuple[list[jax.Array], jax.Array]:
    return given(work), jnp.asarray(work.x)


def _norm(found: list[jax.Array]) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(part**2) for part in found))


def way(function: Callable, *given: Any, canonical: bool = True, moved: int = 0) -> Way:
    """Return the way that a jitted function of arrays on the device is."""
    compiled = jax.jit(function)

    def arrays(found):
        return [np.asarray(part) for part in jax.tree.leaves(found)]

    @functools.cache
    def needs_mb():
        return needed_mb(compiled.lower(*given).compile().memory_analysis())

    def run():
        return jax.block_until_ready(compiled(*given))

    on_card = DEVICE.name != "cpu"
    return Way(
        run,
        arrays if canonical else None,
        needs_mb=needs_mb if on_card else None,
        moved=moved,
    )


def needed_mb(counted: Any) -> float:
    """Return what a compiled program's arguments, results and temporaries take."""
    parts = (
        counted.argument_size_in_bytes,
        counted.output_size_in_bytes,
        counted.temp_size_in_bytes,
    )
    return sum(parts) / 1e6


JOBS = {
    job.__name__: job
    for job in (weights, inputs, jacobian_norms, gradients, gradient_norms, clipped_sum, ntk)
}

if __name__ == "__main__":
    serve.serve(JOBS, VERSIONS, DEVICE)
