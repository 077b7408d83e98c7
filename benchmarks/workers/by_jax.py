"""JAX: vmap over jacrev, jacfwd and grad, jitted."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import serve
from jax import lax
from jobs import CLIP
from serve import Way, Ways, Work


def weights(work: Work) -> Ways:
    forward, given = _forward(work), _weights(work)
    return {"": _way(jax.vmap(jax.jacrev(forward), (None, 0)), given, jnp.asarray(work.x))}


def inputs(work: Work) -> Ways:
    forward, given, x = _forward(work), _weights(work), jnp.asarray(work.x)
    ways = {"jacrev": _way(jax.vmap(jax.jacrev(forward, 1), (None, 0)), given, x)}
    if work.more_outputs_than_inputs:
        ways["jacfwd"] = _way(jax.vmap(jax.jacfwd(forward, 1), (None, 0)), given, x)
    return ways


def jacobian_norms(work: Work) -> Ways:
    forward, given, x = _forward(work), _weights(work), jnp.asarray(work.x)

    def norm(weights, one):
        return _norm(jax.jacrev(forward)(weights, one))

    return {"": _way(jax.vmap(norm, (None, 0)), given, x)}


def gradients(work: Work) -> Ways:
    gradient = jax.grad(_loss(work))
    return {"": _way(jax.vmap(gradient, (None, 0, 0)), *_labelled(work))}


def gradient_norms(work: Work) -> Ways:
    gradient = jax.grad(_loss(work))

    def norm(*given):
        return _norm(gradient(*given))

    return {"": _way(jax.vmap(norm, (None, 0, 0)), *_labelled(work))}


def clipped_sum(work: Work) -> Ways:
    gradient = jax.grad(_loss(work))

    def clipped(*given):
        found = gradient(*given)
        share = jnp.minimum(1, CLIP / _norm(found))
        return [share * part for part in found]

    def summed(*given):
        return [part.sum(0) for part in jax.vmap(clipped, (None, 0, 0))(*given)]

    return {"": _way(summed, *_labelled(work))}


def ntk(work: Work) -> Ways:
    rows = jax.vmap(jax.jacrev(_forward(work)), (None, 0))

    def contraction(weights, x):
        found = rows(weights, x)
        shape = found[0].shape[:2]
        flat = [part.reshape(shape[0] * shape[1], -1) for part in found]
        return sum(part @ part.T for part in flat).reshape(*shape, *shape)

    return {"": _way(contraction, _weights(work), jnp.asarray(work.x))}


def _forward(work: Work) -> Callable:
    """The outputs of one example."""
    if not work.about["layers"]:
        raise NotImplementedError("this model is written in Keras only")
    plain = {"relu": jax.nn.relu, "tanh": jnp.tanh, "flatten": lambda x: x.reshape(1, -1)}

    def forward(weights, x):
        left, x = iter(weights), x[None]
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
        return x[0]

    return forward


def _loss(work: Work) -> Callable:
    forward = _forward(work)
    return lambda weights, x, y: -jax.nn.log_softmax(forward(weights, x))[y]


def _weights(work: Work) -> list[jax.Array]:
    return [jnp.asarray(w) for w in work.weights]


def _labelled(work: Work) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    return _weights(work), jnp.asarray(work.x), jnp.asarray(work.y)


def _norm(found: list[jax.Array]) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(part**2) for part in found))


def _way(function: Callable, *given) -> Way:
    compiled = jax.jit(function)

    def canonical(found):
        return [np.asarray(part) for part in jax.tree.leaves(found)]

    return Way(lambda: jax.block_until_ready(compiled(*given)), canonical)


JOBS = {
    job.__name__: job
    for job in (weights, inputs, jacobian_norms, gradients, gradient_norms, clipped_sum, ntk)
}

if __name__ == "__main__":
    serve.serve(JOBS, {"jax": jax.__version__})
