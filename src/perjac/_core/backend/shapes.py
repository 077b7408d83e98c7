"""Shapes: their known numbers, and positions folded out of the batch axis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf


def known(shape: Iterable[Any]) -> tuple[int, ...]:
    """Return a shape, or part of one, that must be known, as plain numbers.

    Raises
    ------
    ValueError
        If an axis is unknown.
    """
    dims = tuple(shape)
    if None in dims:
        raise ValueError(f"Expected a shape whose axes are all known. Received: {dims}.")
    return tuple(int(n) for n in dims)


def size(shape: Iterable[Any]) -> int:
    """Return how many entries a known shape has."""
    return math.prod(known(shape))


def unfold(tensor: tf.Tensor, batch: Any, fold: int, inner: bool = False) -> tf.Tensor:
    """Split the leading axis: (B·F, ...) becomes (B, F, ...).

    `inner` says that the examples run fastest along that axis, (F·B, ...), as where TensorFlow
    moves the holes of a dilated convolution into the batch, or where time comes first.
    """
    if fold == 1:
        return tf.expand_dims(tensor, 1)
    lead = [fold, batch] if inner else [batch, fold]
    if not inner and tensor.shape[1:].is_fully_defined():
        return batched(tensor, batch, [fold, *known(tensor.shape[1:])])
    split = tf.reshape(tensor, tf.concat([lead, tf.shape(tensor)[1:]], 0))
    return tf.transpose(split, [1, 0, *range(2, len(split.shape))]) if inner else split


def batched(tensor: tf.Tensor, batch: Any, rest: Sequence[Any]) -> tf.Tensor:
    """Lay a tensor out as (B, *rest).

    A batch that is left for TensorFlow to count saves two operations in three, and a shape that
    is right already all of them: there are thousands in a network of a hundred layers.
    """
    rest = tuple(rest)
    if not all(isinstance(n, int) and n for n in rest):
        return tf.reshape(tensor, [batch, *rest])
    if tensor.shape.rank == 1 + len(rest) and tuple(tensor.shape[1:]) == rest:
        return tensor
    return tf.reshape(tensor, [-1, *rest])


def shown(tensor: tf.Tensor) -> str:
    """Return a tensor's shape for people, the batch as B."""
    dims = ["B" if n == 0 else str(d) for n, d in enumerate(tensor.shape)]
    return f"({', '.join(dims)})"


Dims = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Extent:
    """A tensor's shape, (B·fold, *rest): `fold` positions are folded into the batch axis."""

    fold: int
    rest: tuple[int, ...]

    @classmethod
    def of(
        cls,
        traced: Dims | None,
        shapes: tuple[Dims | None, Dims | None],
        batches: tuple[int, int],
    ) -> Extent | None:
        """Return it from the shape with the batch unknown, and with those two sizes of batch."""
        one, other = shapes
        if traced is None:
            traced = None if one is None else (None,) * len(one)
        if not traced or traced[0] is not None:
            return None
        one, other = one or traced, other or traced
        rest = tuple(
            known if known is not None else (a if a == b else None)
            for known, a, b in zip(traced[1:], one[1:], other[1:], strict=True)
        )
        if None in rest:
            return None
        rest = known(rest)
        if one[0] is None or other[0] is None:  # a loop's result, say: taken to be the batch alone,
            return cls(1, rest)  # which the owners of its rows confirm or not
        fold = one[0] // batches[0]
        folded = tuple(batch * fold for batch in batches)
        return cls(fold, rest) if (one[0], other[0]) == folded else None
