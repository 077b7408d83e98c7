"""Second moments of the two sides of a weight's rows, of which Kronecker factors are made.

Knows tensors alone; factors say what their sides are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from perjac._core.backend.shapes import known
from perjac._core.factors.squares import sum_of_squares


class Moments(NamedTuple):
    """Sums over a batch of both sides' outer products: Σ JᵀJ ≈ (left / count) ⊗ right.

    Attributes
    ----------
    left : tf.Tensor
        (G, I, I), or its diagonal (G, I).
    right : tf.Tensor
        (G, O, O), or its diagonal (G, O).
    count : tf.Tensor
        How many terms `left` is the sum of, (1,); of rows that are no outer products, Σ ‖J‖² for
        each group, (G,).
    """

    left: tf.Tensor
    right: tf.Tensor
    count: tf.Tensor


def moment(x: tf.Tensor, most: int) -> tf.Tensor:
    """Return Σ x xᵀ over all axes of x (..., n) but the last, (1, n, n).

    Where n is above `most`, its diagonal, (1, n).
    """
    return grouped_moment(tf.expand_dims(x, -2), most)


def grouped_moment(x: tf.Tensor, most: int) -> tf.Tensor:
    """Return Σ x_g x_gᵀ for each group of x (..., G, n), (G, n, n); or the diagonals, (G, n)."""
    groups, n = known(x.shape[-2:])
    flat = tf.reshape(x, [-1, groups, n])
    if n > most:
        return sum_of_squares(flat, [0])
    if groups == 1:
        flat = flat[:, 0]
        return tf.matmul(flat, flat, transpose_a=True)[None]
    flat = tf.transpose(flat, [1, 2, 0])
    return tf.matmul(flat, flat, transpose_b=True)


def of_rows(rows: tf.Tensor, most: int) -> Moments:
    """Return Σ J Jᵀ, Σ JᵀJ and their trace for each group, of rows (B, K, G, I, O)."""
    groups, inputs, outputs = known(rows.shape[2:])
    traces = sum_of_squares(rows, [0, 1, 3, 4])
    alone = tf.reshape(traces, [groups, 1, 1])  # of a side of one entry
    left = right = alone
    if inputs > 1:
        left = grouped_moment(tf.transpose(rows, [0, 1, 4, 2, 3]), most)
    if outputs > 1:
        right = grouped_moment(tf.transpose(rows, [0, 1, 3, 2, 4]), most)
    return Moments(left, right, traces)


def no_moments(shape: Sequence[int], most: int, dtype: tf.DType) -> Moments:
    """Return the moments of no rows, for a weight read as (G, I, O)."""
    groups, *sides = shape
    left, right = ([groups, n] if n > most else [groups, n, n] for n in sides)
    return Moments(tf.zeros(left, dtype), tf.zeros(right, dtype), tf.zeros([groups], dtype))
