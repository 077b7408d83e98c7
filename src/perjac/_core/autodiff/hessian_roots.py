"""Roots of a negative log-likelihood's Hessian by the output, H = S Sᵀ, a column at a time.

Knows outputs; must not know models. A column is a cotangent: with it the Jacobian's rows are those
of a square root of the Fisher information, F = Σ_b (J_b S_b)(J_b S_b)ᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend.shapes import known


def categorical(logits: tf.Tensor, k: Any) -> tf.Tensor:
    """Return column k of S for classes along the last axis, shaped as `logits` (B, ..., C).

    H = diag(p) - p pᵀ at each position by itself has rank C - 1, and a triangular root of as many
    columns (Tanabe and Sagae 1992): with r_c = Σ_{i>c} p_i,

        S_cc = √(p_c r_c / (p_c + r_c)),    S_ic = -p_i √(p_c / (r_c (p_c + r_c))) for i > c.
    """
    p = tf.nn.softmax(logits)
    (classes,) = known(logits.shape[-1:])
    c = k % (classes - 1)
    mine = tf.gather(p, c, axis=-1)[..., None]
    after = p * tf.cast(tf.range(classes) > c, p.dtype)
    rest = tf.reduce_sum(after, -1, keepdims=True)
    down = tf.sqrt(tf.math.divide_no_nan(mine, rest * (mine + rest)))
    column = rest * down * tf.one_hot(c, classes, dtype=p.dtype) - after * down
    positions = p.shape[1:-1].num_elements()
    if positions == 1:
        return column
    here = tf.one_hot(k // (classes - 1), positions, dtype=p.dtype)
    return column * tf.reshape(here, [*p.shape[1:-1], 1])


def bernoulli(logits: tf.Tensor, k: Any) -> tf.Tensor:
    """Return column k of S for a yes or no at each entry: S = diag(√(p (1 - p)))."""
    p = tf.sigmoid(logits)
    entries = logits.shape[1:].num_elements()
    hot = tf.reshape(tf.one_hot(k, entries, dtype=p.dtype), p.shape[1:])
    return tf.sqrt(p * tf.sigmoid(-logits)) * hot


def column_count(kind: str, shape: Sequence[int]) -> int:
    """Return how many columns a root has for an output's shape, for one example."""
    entries = math.prod(shape)
    return entries - entries // shape[-1] if kind == "categorical" else entries


# Of these every column is known from the output alone, so the sweep makes them as it goes.
ROOTS: dict[str, Callable[[tf.Tensor, Any], tf.Tensor]] = {
    "categorical": categorical,
    "bernoulli": bernoulli,
}
