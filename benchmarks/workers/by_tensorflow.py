"""TensorFlow's own ways: its tape's Jacobians, and vectorised maps over examples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import serve
import tensorflow as tf
from jobs import CLIP
from keras_net import LOSS, VERSIONS, device, done, net
from serve import Way, Ways, Work


def weights(work: Work) -> Ways:
    model, x = net(work), tf.constant(work.x)

    def all_at_once():
        with tf.GradientTape() as tape:
            output = model(x, training=False)
        # A loop over B·C rows, as pfor takes B·C times the memory of a backward pass.
        return tape.jacobian(output, model.trainable_variables, experimental_use_pfor=False)

    return {**_mapped(_rows(model), x), "jacobian": _way(all_at_once)}


def inputs(work: Work) -> Ways:
    model, x = net(work), tf.constant(work.x)

    def rows():
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = model(x, training=False)
        return [tape.batch_jacobian(output, x)]

    if _loops(work):
        return {"batch_jacobian, no pfor": _way(_looped_rows(model, x))}
    return {"batch_jacobian": _way(rows), "batch_jacobian, XLA": _way(rows, jit=True)}


def jacobian_norms(work: Work) -> Ways:
    rows = _rows(net(work))

    def norm(example):
        return [tf.sqrt(tf.add_n([tf.reduce_sum(r**2) for r in rows(example)]))]

    return _mapped(norm, work.x)


def gradients(work: Work) -> Ways:
    return _examples(work, _gradient(net(work)))


def gradient_norms(work: Work) -> Ways:
    gradient = _gradient(net(work))
    return _examples(work, lambda example: [tf.linalg.global_norm(gradient(example))])


def clipped_sum(work: Work) -> Ways:
    gradient = _gradient(net(work))

    def clipped(example):
        return tf.clip_by_global_norm(gradient(example), CLIP)[0]

    return _examples(work, clipped, lambda parts: [tf.reduce_sum(part, 0) for part in parts])


def ntk(work: Work) -> Ways:
    rows, x = _rows(net(work)), tf.constant(work.x)

    def contraction():
        parts = tf.vectorized_map(rows, x)
        flat = tf.concat([tf.reshape(r, (x.shape[0] * r.shape[1], -1)) for r in parts], 1)
        shape = (x.shape[0], parts[0].shape[1]) * 2
        return [tf.reshape(tf.matmul(flat, flat, transpose_b=True), shape)]

    return {"vectorized_map": _way(contraction)}


def _rows(model) -> Callable:
    """One example's rows by every weight."""

    def rows(example):
        with tf.GradientTape() as tape:
            output = model(example[None], training=False)[0]
        return tape.jacobian(output, model.trainable_variables)

    return rows


def _gradient(model) -> Callable:
    """One example's gradient of the loss by every weight."""

    def gradient(example):
        x, y = example
        with tf.GradientTape() as tape:
            loss = LOSS(y[None], model(x[None], training=False))
        found = tape.gradient(loss, model.trainable_variables)
        return [tf.convert_to_tensor(part) for part in found]

    return gradient


def _looped_rows(model, x) -> Callable:
    """Every output in turn, the whole batch's at once: what is left where pfor fails."""

    def rows():
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            outputs = tf.unstack(model(x, training=False), axis=1)
        return [tf.stack([tape.gradient(output, x) for output in outputs], 1)]

    return rows


def _examples(work: Work, one: Callable, after: Callable = list) -> Ways:
    """Ways over examples with labels: vectorised; one by one where the model has a loop."""
    data = (tf.constant(work.x), tf.constant(work.y))
    if not _loops(work):
        return _mapped(one, data, after)

    def in_turn():
        found = [one((x, y)) for x, y in zip(*map(tf.unstack, data), strict=True)]
        return after([tf.stack(parts) for parts in zip(*found, strict=True)])

    return {"one by one": _way(in_turn)}


def _mapped(one: Callable, data, after: Callable = list) -> Ways:
    data = tf.nest.map_structure(tf.constant, data)

    def mapped():
        return after(tf.vectorized_map(one, data))

    return {"vectorized_map": _way(mapped), "vectorized_map, XLA": _way(mapped, jit=True)}


def _loops(work: Work) -> bool:
    """Tell whether Keras builds a while loop: pfor fails on it."""
    return any(type(layer).__name__ in ("LSTM", "GRU") for layer in net(work).layers)


def _way(run: Callable, jit: bool | None = None) -> Way:
    compiled = tf.function(run, autograph=False, jit_compile=jit)
    return Way(lambda: done(compiled()), lambda answer: [np.asarray(part) for part in answer])


JOBS = {
    job.__name__: job
    for job in (weights, inputs, jacobian_norms, gradients, gradient_norms, clipped_sum, ntk)
}

if __name__ == "__main__":
    serve.serve(JOBS, VERSIONS, device())
