"""Sums of squares in one pass. Must not know factors."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from perjac._core.backend import xla


def sum_of_squares(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Return Σ x² over some axes.

    By TensorFlow's Euclidean norm: where the squares themselves are written and read again, it
    takes three times as long (22.6 ms against 72.7 for 1 GB). XLA has no kernel for it.

    Examples
    --------
    >>> float(sum_of_squares(tf.constant([3.0, 4.0]), [0]))
    25.0
    """
    if xla.is_for_xla():
        return tf.reduce_sum(tf.square(x), axes)
    return tf.square(tf.math.reduce_euclidean_norm(x, axes))
