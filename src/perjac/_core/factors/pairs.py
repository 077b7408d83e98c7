"""Rows of complex numbers: a complex weight counts as two real ones.

TensorFlow's gradient of a real output by w = a + ib is ∂/∂a + i ∂/∂b. Held as the pairs of the two,
every query is one on real numbers: norms add |.|², inner products are the real part of ⟨r, r'⟩.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import tensorflow as tf

from perjac._core.backend.axis_layout import Relabelling
from perjac._core.backend.shapes import known
from perjac._core.factors.base import Explicit


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs(Explicit):
    """Rows of real and imaginary parts, (B, K, *W.shape, 2)."""

    @classmethod
    def of(cls, rows: tf.Tensor) -> Self:
        """Return complex rows (B, K, *W.shape) as pairs."""
        return cls(Relabelling.of((*known(rows.shape[2:]), 2)), _pairs(rows))

    def dense(self) -> tf.Tensor:
        """Form the complex rows, (B, K, *W.shape)."""
        return _complex(super().dense())

    def jvp(self, v: tf.Tensor) -> tf.Tensor:
        """Return Re⟨J[b,k], v⟩, (B, K), for a complex v of the weight's shape."""
        return super().jvp(tf.cast(_pairs(v), self.jacobian.dtype))

    def vjp(self, u: tf.Tensor, per_example: bool = False) -> tf.Tensor:
        """Return Σ_bk u[b,k] J[b,k], complex, for real u."""
        return _complex(super().vjp(u, per_example))

    def diagonal(self) -> tf.Tensor:
        """Return Σ_bk |J[b,k]|², of the weight's shape."""
        return tf.reduce_sum(super().diagonal(), -1)

    def squared_deviations(self) -> tf.Tensor:
        """Return Σ_bk |J[b,k] - J̄|², of the weight's shape."""
        return tf.reduce_sum(super().squared_deviations(), -1)

    def _mean(self) -> tf.Tensor:
        return _pairs(super()._mean())


def _pairs(values: tf.Tensor) -> tf.Tensor:
    return tf.stack([tf.math.real(values), tf.math.imag(values)], -1)


def _complex(pairs: tf.Tensor) -> tf.Tensor:
    return tf.complex(*tf.unstack(pairs, axis=-1))
