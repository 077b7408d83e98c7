"""Random directions for projections: the same for the same seed, weight and axes, everywhere.

A weight's row is read as a matrix with two sides; each side is drawn for the weight's own axes that
it runs over, so that a table and its transpose, at two sites of one weight, meet the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend import host, memory
from perjac._core.backend.axis_layout import Piece
from perjac._core.backend.shapes import known
from perjac.errors import TooLargeError

KINDS = ("gaussian", "rademacher", "sparse")
# What TensorFlow's kernels number entries by.
_COUNTED = 2**31
Side = tuple[Piece, ...]  # of a weight's axes


@dataclasses.dataclass(frozen=True, eq=False)
class Normal:
    """A matrix of independent numbers (n, dim) for one side: x ↦ x @ matrix."""

    matrix: tf.Tensor

    @property
    def dim(self) -> int:
        """How many numbers a projection has."""
        return known(self.matrix.shape)[1]

    def of(self, x: tf.Tensor) -> tf.Tensor:
        """Map (..., n) to (..., dim)."""
        return tf.tensordot(x, self.matrix, 1)

    def of_groups(self, x: tf.Tensor) -> tf.Tensor:
        """Map (..., G, n / G), the groups of entries kept apart, to (..., G, dim)."""
        matrix = tf.reshape(self.matrix, [x.shape[-2], x.shape[-1], -1])
        return tf.einsum("...gi,gim->...gm", x, matrix)

    def at(self, ids: tf.Tensor) -> tf.Tensor:
        """Return what the entries numbered `ids` (...) map to, (..., dim)."""
        return tf.gather(self.matrix, ids)

    def of_rows(self, rows: tf.Tensor, other: Normal) -> tf.Tensor:
        """Map matrices (..., n, m), the second side by `other`, to (..., dim), unfinished."""
        n, m = known(rows.shape[-2:])
        if n < m:  # the longer side first leaves less in between
            return tf.reduce_sum(other.of(rows) * self.matrix, -2)
        half = tf.einsum("...io,im->...om", rows, self.matrix)
        return tf.reduce_sum(half * other.matrix, -2)

    def finish(self, products: tf.Tensor) -> tf.Tensor:
        """Scale the products of two sides."""
        return products / math.sqrt(self.dim)

    def __tf_flatten__(self) -> tuple[tuple, tuple]:
        return (), (self.matrix,)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple, components: tuple) -> Normal:
        return cls(*components)


@dataclasses.dataclass(frozen=True, eq=False)
class Count:
    """A count sketch of one side: entry i is added to bucket h(i) with sign s(i).

    In the Fourier domain, where the sketch of a product is the product of sketches.
    """

    buckets: tf.Tensor  # (n,)
    signs: tf.Tensor  # (n,)
    dim: int

    def of(self, x: tf.Tensor) -> tf.Tensor:
        """Map (..., n) to (..., dim // 2 + 1) complex numbers."""
        return tf.squeeze(self.of_groups(tf.expand_dims(x, -2)), -2)

    def of_groups(self, x: tf.Tensor) -> tf.Tensor:
        """Map (..., G, n / G) to (..., G, dim // 2 + 1)."""
        groups, entries = known(x.shape[-2:])
        flat = tf.reshape(x, [-1, groups * entries]) * self.signs
        own = tf.repeat(tf.range(groups) * self.dim, entries) + self.buckets
        added = tf.math.unsorted_segment_sum(tf.transpose(flat), own, groups * self.dim)
        shape = tf.concat([tf.shape(x)[:-1], [self.dim]], 0)
        return tf.signal.rfft(tf.reshape(tf.transpose(added), shape))

    def at(self, ids: tf.Tensor) -> tf.Tensor:
        """Return what the entries numbered `ids` (...) map to."""
        hot = tf.one_hot(tf.gather(self.buckets, ids), self.dim, dtype=self.signs.dtype)
        return tf.signal.rfft(hot * tf.gather(self.signs, ids)[..., None])

    def of_rows(self, rows: tf.Tensor, other: Count) -> tf.Tensor:
        """Map matrices (..., n, m), the second side by `other`, to (..., dim // 2 + 1)."""
        n, m = known(rows.shape[-2:])
        both = Count(
            tf.reshape(tf.math.floormod(self.buckets[:, None] + other.buckets, self.dim), [-1]),
            tf.reshape(self.signs[:, None] * other.signs, [-1]),
            self.dim,
        )
        return both.of(tf.reshape(rows, tf.concat([tf.shape(rows)[:-2], [n * m]], 0)))

    def finish(self, products: tf.Tensor) -> tf.Tensor:
        """Leave the Fourier domain."""
        return tf.signal.irfft(products, [self.dim])

    def __tf_flatten__(self) -> tuple[tuple, tuple]:
        return (self.dim,), (self.buckets, self.signs)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple, components: tuple) -> Count:
        return cls(*components, *metadata)


def draw(
    sides: Mapping[str, Sequence[Side]], dim: int, seed: int, kind: str, dtype: tf.DType
) -> dict[str, dict[Side, Normal | Count]]:
    """Return what is drawn for every side of every weight, by the weight's key."""
    wanted = tuple((key, tuple(found)) for key, found in sides.items())
    with host.lifted():  # they outlive a function that is being traced
        return _drawn(wanted, dim, seed, kind, dtype)


def check(
    sides: Mapping[str, Sequence[Side]],
    dim: int,
    kind: str,
    rows: int,
    dtype: tf.DType,
    memory_limit: Any,
) -> None:
    """Raise for projections of so many rows that do not fit, before anything is drawn.

    Raises
    ------
    TooLargeError
        If what is drawn, each weight's projection and their sum take more than the limit, or have
        more numbers than TensorFlow counts in 32 bits, beyond which it ends the process.
    """
    lengths = [math.prod(n for _, n, _ in side) for found in sides.values() for side in found]
    each = 3 if kind == "sparse" else 1  # a count sketch is laid out and transformed
    numbers = rows * dim * (1 + each * len(sides)) + sum(lengths) * (2 if kind == "sparse" else dim)
    what, instead = f"Projecting {rows} rows to {dim:,} numbers", "Choose a smaller dim=."
    memory.check(numbers * dtype.size, memory_limit, what, instead)
    if max(rows, *lengths, 1) * dim >= _COUNTED:
        raise TooLargeError(f"{what} is more than TensorFlow can count at once. {instead}")


@functools.lru_cache(maxsize=1)  # a data set is projected batch by batch with the same numbers
def _drawn(
    wanted: tuple, dim: int, seed: int, kind: str, dtype: tf.DType
) -> dict[str, dict[Side, Any]]:
    return {
        key: {side: _side(key, side, dim, seed, kind, dtype) for side in found}
        for key, found in wanted
    }


def _side(key: str, side: Side, dim: int, seed: int, kind: str, dtype: tf.DType) -> Normal | Count:
    # Drawn in the order of the weight's axes, then laid out in the side's own order.
    ordered = sorted(side, key=lambda piece: (piece[0], -piece[2]))
    lengths = [length for _, length, _ in ordered]
    place = np.arange(math.prod(lengths)).reshape(lengths)
    place = place.transpose([ordered.index(piece) for piece in side]).reshape(-1)
    name = f"{key}/{kind}/{ordered}"
    if kind == "sparse":
        bits = _bits(seed, name, 2 * len(place)).reshape(2, -1)
        buckets = (bits[0] % np.uint64(dim)).astype("int32")[place]
        return Count(tf.constant(buckets), tf.cast(_signs(bits[1])[place], dtype), dim)
    bits = _bits(seed, name, len(place) * dim)
    numbers = _signs(bits) if kind == "rademacher" else _normal(seed, name, bits)
    return Normal(tf.constant(numbers.reshape(len(place), dim)[place], dtype))


def _bits(seed: int, name: str, count: int) -> np.ndarray:
    """Return random 64-bit integers, which are the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(digest, "<u8"))
    return np.asarray(generator.random_raw(count), "uint64")


def _signs(bits: np.ndarray) -> np.ndarray:
    return np.where(bits >> np.uint64(63), 1.0, -1.0)


def _normal(seed: int, name: str, bits: np.ndarray) -> np.ndarray:
    """Return standard normal numbers, by Box and Muller 1958."""
    other = _bits(seed, name + "/angle", len(bits))
    radius = np.sqrt(-2 * np.log1p((bits >> np.uint64(11)) * -(2.0**-53)))
    return radius * np.cos((other >> np.uint64(11)) * (2 * np.pi * 2.0**-53))
