"""Sums and moments for each example of what comes in chunks, in float64.

The order within an example is that of its points, so that an example's result is the same alone
and among others, and whatever the chunks are, to rounding in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from perjac._core.model import inside_functions


class Sums:
    """Σ of what belongs to each of `size` examples, for each of several inputs."""

    def __init__(self, size: int):
        self._size = size
        self._totals: list[tf.Variable] = []

    def add(
        self, terms: Sequence[tf.Tensor], owners: np.ndarray, weights: np.ndarray | None = None
    ) -> None:
        """Add terms, each (N, ...), times weights (N,), to the sums of examples `owners` (N,)."""
        there, local = np.unique(owners, return_inverse=True)
        rows = tf.constant(there)
        self._totals = self._totals or _zeros(self._size, terms)
        for total, term in zip(self._totals, terms, strict=True):
            term = tf.cast(term, tf.float64)
            term = term if weights is None else term * beside(weights, term)
            total.scatter_add(
                tf.IndexedSlices(tf.math.unsorted_segment_sum(term, local, len(there)), rows)
            )

    def result(self) -> list[tf.Tensor]:
        """Return the sums, each (size, ...), in float64."""
        return [tf.convert_to_tensor(total) for total in self._totals]


class Moments:
    """Mean and variance of what belongs to each of `size` examples: Welford 1962, Chan 1979.

    With n earlier values of mean m and Σ(x - m)² = S, and k new ones of mean m', S':
    mean ← m + (m' - m) k/(n + k), S ← S + S' + (m' - m)² nk/(n + k), which is never negative.
    """

    def __init__(self, size: int):
        self._size = size
        self._seen = np.zeros(size)
        self._means: list[tf.Variable] = []
        self._squares: list[tf.Variable] = []

    def add(self, terms: Sequence[tf.Tensor], owners: np.ndarray) -> None:
        """Take in terms, each (N, ...), of examples `owners` (N,)."""
        if not self._means:
            self._means, self._squares = (_zeros(self._size, terms) for _ in range(2))
        there, local, new = np.unique(owners, return_inverse=True, return_counts=True)
        rows = tf.constant(there)
        before = self._seen[there]
        self._seen[there] += new
        for mean, square, term in zip(self._means, self._squares, terms, strict=True):
            term = tf.cast(term, tf.float64)
            k, n = (beside(c, term) for c in (new, before))
            local_mean = tf.math.unsorted_segment_sum(term, local, len(there)) / k
            spread = tf.square(term - tf.gather(local_mean, local))
            apart = local_mean - tf.gather(mean, there)
            mean.scatter_add(tf.IndexedSlices(apart * k / (n + k), rows))
            grown = tf.math.unsorted_segment_sum(spread, local, len(there))
            grown += tf.square(apart) * n * k / (n + k)
            square.scatter_add(tf.IndexedSlices(grown, rows))

    def means(self) -> list[tf.Tensor]:
        """Return the means, each (size, ...), in float64."""
        return [tf.convert_to_tensor(mean) for mean in self._means]

    def variances(self) -> list[tf.Tensor]:
        """Return the unbiased variances, Σ(x - mean)² / (n - 1)."""
        return [square / beside(self._seen - 1, square) for square in self._squares]

    def standard_errors(self) -> list[tf.Tensor]:
        """Return those of the means, √(variance / n)."""
        return [tf.sqrt(v / beside(self._seen, v)) for v in self.variances()]


def _zeros(size: int, terms: Sequence[tf.Tensor]) -> list[tf.Variable]:
    """Return what sums of terms (N, ...) start from, each (size, ...), in float64."""
    inside_functions.refuse("A sum over many points of each example")
    shapes = [[size, *t.shape[1:]] for t in terms]
    return [tf.Variable(tf.zeros(shape, tf.float64), trainable=False) for shape in shapes]


def beside(numbers: np.ndarray, tensor: tf.Tensor) -> tf.Tensor:
    """Return numbers (N,), shaped and typed to multiply a tensor (N, ...)."""
    return tf.reshape(tf.constant(numbers, tensor.dtype), [-1] + [1] * (tensor.shape.rank - 1))
