"""The jobs: each a set of ways to the same answer, as functions without arguments.

A way returns a list of tensors, all of them formed. The floor forms nothing but memory of the
answer's size; its values mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

import perjac as pj

Ways = dict[str, Callable[[], list[tf.Tensor]]]
FLOOR = "floor: filling memory"


def weights(model: keras.Model, x: np.ndarray) -> Ways:
    """Every output with respect to every weight, all rows formed."""
    engine, data = pj.Engine(model), tf.constant(x)

    def perjac():
        jac = engine.jacobian(data)
        return [jac[key] for key in jac]

    def rows(example):
        with tf.GradientTape() as tape:
            output = model(example[None], training=False)[0]
        return tape.jacobian(output, model.trainable_variables)

    shape = (len(x), model.output_shape[-1])
    sizes = [(*shape, *v.shape) for v in model.trainable_variables]
    return {"perjac": perjac, **_over_examples(rows, data), FLOOR: _fill(sizes)}


def inputs(model: keras.Model, x: np.ndarray) -> Ways:
    """Every output with respect to the input: a saliency map for every class."""
    engine, data = pj.Engine(model), tf.constant(x)

    def batch_jacobian():
        with tf.GradientTape() as tape:
            tape.watch(data)
            output = model(data, training=False)
        return [tape.batch_jacobian(output, data)]

    return {
        "perjac": lambda: [engine.jacobian(data, wrt="inputs")["inputs"]],
        "batch_jacobian": _compiled(batch_jacobian),
        "batch_jacobian, XLA": _compiled(batch_jacobian, jit=True),
        FLOOR: _fill([(len(x), model.output_shape[-1], *x.shape[1:])]),
    }


def norms(model: keras.Model, x: np.ndarray) -> Ways:
    """The Frobenius norm of each example's weight Jacobian."""
    engine, data = pj.Engine(model), tf.constant(x)

    def norm(example):
        with tf.GradientTape() as tape:
            output = model(example[None], training=False)[0]
        rows = tape.jacobian(output, model.trainable_variables)
        return [tf.sqrt(tf.add_n([tf.reduce_sum(r**2) for r in rows]))]

    return {
        "perjac": lambda: [engine.jacobian(data).norms()],
        **_over_examples(norm, data),
        FLOOR: _fill([(len(x),)]),
    }


JOBS = {"weights": weights, "inputs": inputs, "norms": norms}


def _over_examples(one: Callable, data: tf.Tensor) -> Ways:
    """TensorFlow's own ways for a function of one example: vectorised, in one graph, warm."""

    def mapped():
        return tf.vectorized_map(one, data)

    return {
        "vectorized_map": _compiled(mapped),
        "vectorized_map, XLA": _compiled(mapped, jit=True),
    }


def _compiled(way: Callable, jit: bool | None = None) -> Callable:
    return tf.function(way, autograph=False, jit_compile=jit)


def _fill(shapes: list[tuple[int, ...]]) -> Callable[[], list[tf.Tensor]]:
    return lambda: [tf.fill(shape, 1.0) for shape in shapes]
