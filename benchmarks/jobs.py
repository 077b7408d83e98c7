"""The jobs: each a set of ways to the same answer, as functions without arguments.

A way returns a list of tensors, all of them formed. Floors answer something else: filling memory of
the answer's size, and one ordinary gradient of the batch's mean loss, whose arithmetic every
per-example gradient needs.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

import perjac as pj

Ways = dict[str, Callable[[], list[tf.Tensor]]]
FLOOR = "floor: filling memory"
PLAIN = "floor: one batch gradient"
FLOORS = (FLOOR, PLAIN)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


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


def gradients(model: keras.Model, x: np.ndarray) -> Ways:
    """Each example's gradient of the loss, all formed."""
    engine, data, labels = pj.Engine(model), tf.constant(x), _labels(model, x)

    def perjac():
        grads = engine.gradients(data, labels, loss=LOSS)
        return [grads[key] for key in grads]

    sizes = [(len(x), *v.shape) for v in model.trainable_variables]
    return {
        "perjac": perjac,
        **_over_examples(_gradient_of(model), (data, labels)),
        PLAIN: _batch_gradient(model, data, labels),
        FLOOR: _fill(sizes),
    }


def gradient_norms(model: keras.Model, x: np.ndarray) -> Ways:
    """The norm of each example's gradient of the loss."""
    engine, data, labels = pj.Engine(model), tf.constant(x), _labels(model, x)
    gradient = _gradient_of(model)

    def norm(example):
        return [tf.linalg.global_norm(gradient(example))]

    return {
        "perjac": lambda: [engine.gradients(data, labels, loss=LOSS).norms()],
        **_over_examples(norm, (data, labels)),
        PLAIN: _batch_gradient(model, data, labels),
    }


def clipped_sum(model: keras.Model, x: np.ndarray) -> Ways:
    """The sum of the examples' gradients, each clipped to norm 1."""
    engine, data, labels = pj.Engine(model), tf.constant(x), _labels(model, x)
    gradient = _gradient_of(model)

    def perjac():
        return list(engine.gradients(data, labels, loss=LOSS).clipped_sum(1.0).values())

    def clipped():
        parts = tf.vectorized_map(
            lambda example: tf.clip_by_global_norm(gradient(example), 1.0)[0], (data, labels)
        )
        return [tf.reduce_sum(part, 0) for part in parts]

    return {
        "perjac": perjac,
        "vectorized_map": _compiled(clipped),
        PLAIN: _batch_gradient(model, data, labels),
    }


JOBS = {
    job.__name__: job for job in (weights, inputs, norms, gradients, gradient_norms, clipped_sum)
}


def _labels(model: keras.Model, x: np.ndarray) -> tf.Tensor:
    return tf.constant(np.random.default_rng(1).integers(0, model.output_shape[-1], len(x)))


def _gradient_of(model: keras.Model) -> Callable:
    """One example's gradient of the loss by every weight."""

    def gradient(example):
        with tf.GradientTape() as tape:
            loss = LOSS(example[1][None], model(example[0][None], training=False))
        found = tape.gradient(loss, model.trainable_variables)
        return [tf.convert_to_tensor(g) for g in found]

    return gradient


def _batch_gradient(model: keras.Model, x: tf.Tensor, labels: tf.Tensor) -> Callable:
    def plain():
        with tf.GradientTape() as tape:
            loss = LOSS(labels, model(x, training=False))
        return tape.gradient(loss, model.trainable_variables)

    return _compiled(plain)


def _over_examples(one: Callable, data: tf.Tensor | tuple[tf.Tensor, ...]) -> Ways:
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
