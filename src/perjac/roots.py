"""Roots of a negative log-likelihood's Hessian by the output, H = S Sᵀ, a column at a time.

Knows outputs; must not know models. A column is a cotangent: with it the Jacobian's rows are those
of a square root of the Fisher information, F = Σ_b (J_b S_b)(J_b S_b)ᵀ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def categorical(logits: tf.Tensor, k: Any) -> tf.Tensor:
    """Return column k of S for classes along the last axis, shaped as `logits` (B, ..., C).

    H = diag(p) - p pᵀ = S Sᵀ with S_c = √p_c (e_c - p), at each position by itself.
    """
    p = tf.nn.softmax(logits)
    classes = logits.shape[-1]
    hot = tf.one_hot(k % classes, classes, dtype=p.dtype)
    column = tf.sqrt(tf.gather(p, k % classes, axis=-1))[..., None] * (hot - p)
    positions = p.shape[1:-1].num_elements()
    if positions == 1:
        return column
    here = tf.one_hot(k // classes, positions, dtype=p.dtype)
    return column * tf.reshape(here, [*p.shape[1:-1], 1])


def bernoulli(logits: tf.Tensor, k: Any) -> tf.Tensor:
    """Return column k of S for a yes or no at each entry: S = diag(√(p (1 - p)))."""
    p = tf.sigmoid(logits)
    entries = logits.shape[1:].num_elements()
    hot = tf.reshape(tf.one_hot(k, entries, dtype=p.dtype), p.shape[1:])
    return tf.sqrt(p * tf.sigmoid(-logits)) * hot


# Of these every column is known from the output alone, so the sweep makes them as it goes.
ROOTS: dict[str, Callable[[tf.Tensor, Any], tf.Tensor]] = {
    "categorical": categorical,
    "bernoulli": bernoulli,
}
