"""Rows pulled back from ψ to its variables: as TensorFlow's own Jacobian of ψ would have it."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from perjac._core.autodiff import parametrization

RNG = np.random.default_rng(0)


def numbers(*shape):
    return tf.constant(RNG.normal(size=shape))


@tf.custom_gradient
def tripled(w):
    return tf.identity(w), lambda dy: 3 * dy


def to_the_fourth(a):
    return tf.while_loop(lambda n, p: n < 3, lambda n, p: (n + 1, p * a), (0, a))[1]


C, D, E = numbers(4), numbers(3, 2, 4), numbers(5, 1, 4)
# What is made of a (4,) and b (2, 4): entry by entry, not so, and a mixture of both.
PSIS = {
    "scale and shift": lambda a, b: [a * tf.math.rsqrt(C * C + 1), b - C * (a * C)],
    "broadcast": lambda a, b: [a + b, tf.reshape(a, [4, 1]) - a, a[None] * b * a],
    "relabelled": lambda a, b: [tf.squeeze(tf.reshape(b, [1, 8, 1])), tf.expand_dims(-a, 0)],
    "constants spread": lambda a, b: [a * D, b - E],
    "cast": lambda a, b: [tf.cast(tf.cast(a, tf.float32) * 2, tf.float64), b * b],
    "products and roots": lambda a, b: [tf.matmul(b, b, transpose_b=True) + 1, tf.sqrt(a * a) * C],
    "used twice": lambda a, b: [a, a, b * a, tf.exp(a)],
    "a gradient of its own": lambda a, b: [tripled(a) * C, b],
    "a loop": lambda a, b: [to_the_fourth(a) * C, b],
    "of one alone": lambda a, b: [-a],
}


@pytest.mark.parametrize("made", PSIS)
@pytest.mark.parametrize("lead", [[None, 3], [None, None]])
def test_rows_are_those_of_the_jacobian(made, lead):
    a, b = numbers(4), numbers(2, 4)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([a, b])
        psis = PSIS[made](a, b)
    jacobians = [[tape.jacobian(psi, v) for v in (a, b)] for psi in psis]
    rows = [numbers(2, 3, *psi.shape) for psi in psis]
    right = {}
    for own, pair in zip(rows, jacobians, strict=True):
        for n, jacobian in enumerate(pair):
            if jacobian is not None:
                axes = jacobian.shape.rank - (a, b)[n].shape.rank
                right[n] = right.get(n, 0) + np.tensordot(own, jacobian, axes)

    signature = [tf.TensorSpec([*lead, *psi.shape], tf.float64) for psi in psis]

    @tf.function(autograph=False, input_signature=[signature])
    def pulled(given):
        values = {0: tf.identity(a), 1: tf.identity(b)}
        pairs = list(zip(PSIS[made](*values.values()), given, strict=True))
        return {str(n): rows for n, rows in parametrization.pull_back(pairs, values).items()}

    found = {int(n): r for n, r in pulled(rows).items()}
    assert found.keys() == right.keys()
    for n, r in right.items():
        np.testing.assert_allclose(found[n], r, rtol=0, atol=1e-5 if made == "cast" else 1e-12)


def test_what_is_entry_by_entry_needs_no_vectorised_map(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a vectorised map")

    monkeypatch.setattr(tf, "vectorized_map", refuse)

    @tf.function(autograph=False)
    def pulled(a, b, *rows):
        return parametrization.pull_back(
            list(zip(PSIS["scale and shift"](a, b), rows, strict=True)), {0: a, 1: b}
        )

    found = pulled(numbers(4), numbers(2, 4), numbers(5, 3, 4), numbers(5, 3, 2, 4))
    assert [tuple(rows.shape) for rows in found.values()] == [(5, 3, 4), (5, 3, 2, 4)]
