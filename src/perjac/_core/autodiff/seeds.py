"""Output directions: which K rows of the Jacobian are asked for, as cotangents of the output.

Knows the output's shape; must not know what is differentiated or how.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.autodiff.hessian_roots import ROOTS
from perjac._core.backend.shapes import known
from perjac._core.model import arrays
from perjac.errors import InputError, OutOfRangeError

# So many columns of a root are made one by one; more are vectorised, to keep graphs small.
_UNROLLED = 16


@dataclasses.dataclass(frozen=True)
class Seeds:
    """K directions for each example.

    Attributes
    ----------
    kind : str
        "all" outputs, "chosen" ones, one "each" example's own, given "cotangents", or the columns
        of a root by its name in `roots.ROOTS`.
    row_shape : tuple of int
        How the K rows are arranged.
    payload : tf.Tensor
        The numbers behind the kind: nothing; indices (K,); indices (B,); cotangents (B, K, *out);
        numbers of columns (K,).
    """

    kind: str
    row_shape: tuple[int, ...]
    payload: tf.Tensor

    @property
    def count(self) -> int:
        """K."""
        return math.prod(self.row_shape)

    @property
    def signature(self) -> tuple[str, int]:
        """What a compiled job depends on."""
        return self.kind, self.count

    def blocks(self, size: int) -> list[Seeds]:
        """Return the rows in blocks of at most `size`."""
        if self.count <= size:
            return [self]
        payload = tf.range(self.count) if self.kind == "all" else self.payload
        kind = "chosen" if self.kind == "all" else self.kind
        axis = 1 if kind == "cotangents" else 0
        sizes = [size] * (self.count // size) + [self.count % size] * (self.count % size > 0)
        return [
            Seeds(kind, (size,), part)
            for size, part in zip(sizes, tf.split(payload, sizes, axis), strict=True)
        ]

    def part(self, where: slice) -> Seeds:
        """Return the seeds of some of the examples."""
        if self.kind not in ("each", "cotangents"):  # the same for every example
            return self
        return dataclasses.replace(self, payload=self.payload[where])

    def repeated(self, count: int) -> Seeds:
        """Return the seeds of so many examples: these, from the first again after the last."""
        if self.kind not in ("each", "cotangents") or count == self.payload.shape[0]:
            return self
        which = tf.range(count) % tf.shape(self.payload)[0]
        return dataclasses.replace(self, payload=tf.gather(self.payload, which))


def row(kind: str, payload: tf.Tensor, k: Any, output: tf.Tensor) -> tf.Tensor:
    """Return row k of the seeds as a cotangent of `output`, (B, *output_shape).

    `k` is a number or a scalar tensor, so that rows can be unrolled or vectorised over.
    """
    if kind == "cotangents":
        return tf.reshape(payload[:, k], tf.shape(output))
    if kind in ROOTS:
        return ROOTS[kind](output, payload[k])
    entries = output.shape[1:].num_elements()
    index = {"all": lambda: k, "chosen": lambda: payload[k], "each": lambda: payload}[kind]()
    hot = tf.one_hot(index, entries, dtype=output.dtype)  # (entries,), or (B, entries)
    hot = tf.reshape(hot, tf.concat([[-1], tf.shape(output)[1:]], 0))
    return tf.broadcast_to(hot, tf.shape(output))


def rows(kind: str, payload: tf.Tensor, count: int, output: tf.Tensor) -> tf.Tensor:
    """Return all K rows as cotangents, (B, K, *output_shape); (1, K, ...) where they are alike."""
    shape = known(output.shape[1:])
    if kind == "cotangents":
        return payload
    if kind in ROOTS:
        if count <= _UNROLLED:
            return tf.stack([row(kind, payload, k, output) for k in range(count)], 1)
        columns = tf.vectorized_map(lambda k: row(kind, payload, k, output), tf.range(count))
        return tf.transpose(columns, [1, 0, *range(2, columns.shape.rank)])
    if kind == "all":
        return tf.reshape(tf.eye(count, dtype=output.dtype), [1, count, *shape])
    index = payload[None] if kind == "chosen" else payload[:, None]
    hot = tf.one_hot(index, math.prod(shape), dtype=output.dtype)
    return tf.reshape(hot, [-1, count, *shape])


def project(kind: str, payload: tf.Tensor, count: int, columns: tf.Tensor, output: tf.Tensor):
    """Return the K rows (B, K, D) of columns (B, D, *output_shape)."""
    entries = output.shape[1:].num_elements()
    flat = tf.reshape(columns, [-1, columns.shape[1], entries])
    if kind == "each":
        return tf.gather(flat, payload[:, None], axis=2, batch_dims=1)[..., 0][:, None]
    if kind in ("all", "chosen"):
        wanted = flat if kind == "all" else tf.gather(flat, payload, axis=2)
        return tf.transpose(wanted, [0, 2, 1])
    directions = tf.reshape(rows(kind, payload, count, output), [-1, count, entries])
    return tf.matmul(directions, flat, transpose_b=True)


def select(kind: str, payload: tf.Tensor, output: tf.Tensor) -> tf.Tensor:
    """Return the K numbers, for one example's output (*output_shape), that are differentiated."""
    flat = tf.reshape(output, [-1])
    if kind == "all":
        return flat
    if kind == "cotangents":
        return tf.linalg.matvec(tf.reshape(payload, [tf.shape(payload)[0], -1]), flat)
    if kind in ROOTS:
        fixed = tf.stop_gradient(output)[None]
        wanted = tf.unstack(payload)
        columns = tf.stack([tf.reshape(ROOTS[kind](fixed, k), [-1]) for k in wanted])
        return tf.linalg.matvec(columns, flat)
    return tf.gather(flat, tf.reshape(payload, [-1]))


def of_root(kind: str, columns: range | Sequence[int]) -> Seeds:
    """Return some columns of a root, by its name in `roots.ROOTS`."""
    return Seeds(kind, (len(columns),), tf.constant(list(columns), tf.int32))


def make(outputs: Any, cotangents: Any, batch: int, shape: Sequence[int], dtype: tf.DType) -> Seeds:
    """Return the seeds that `outputs` or `cotangents` ask for.

    Parameters
    ----------
    outputs : None, int, sequence of int, array of int (B,), or Seeds
        Numbers of outputs, counted through the output's shape in C order. A list is n outputs
        for every example, an array or tensor of length B is one for each. Seeds stay as they are.
    cotangents : None or array (B, K, *output_shape)
        Directions.
    batch : int
        B.
    shape : sequence of int
        The output's, for one example.
    dtype : tf.DType
        The output's.

    Raises
    ------
    InputError
        If both are given, or shapes do not fit.
    OutOfRangeError
        If an output does not exist.
    """
    shape = tuple(shape)
    if isinstance(outputs, Seeds):
        return outputs
    if outputs is not None and cotangents is not None:
        raise InputError("Give outputs= or cotangents=, not both.")
    if cotangents is not None:
        return _directions(cotangents, batch, shape, dtype)
    if outputs is None:
        return Seeds("all", shape, _nothing())
    if tf.is_tensor(outputs) and not tf.executing_eagerly():
        return _no_numbers_yet(outputs, batch, math.prod(shape))
    outputs = arrays.array(outputs, "outputs=")
    each = not isinstance(outputs, (list, tuple, range)) and np.ndim(outputs) == 1
    chosen = np.atleast_1d(np.asarray(outputs))
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
        raise InputError(
            "Expected outputs= as an int, a list of ints, or one int for each example. "
            f"Received: {outputs!r}."
        )
    chosen = _in_range(chosen, shape)
    if not each:
        return Seeds("chosen", (len(chosen),), tf.constant(chosen, tf.int32))
    if len(chosen) != batch:
        raise InputError(
            f"outputs= as an array names one output for each example: expected {batch} of them. "
            f"Received: {len(chosen)}. For the same outputs of every example give a list."
        )
    return Seeds("each", (1,), tf.constant(chosen, tf.int32))


def _no_numbers_yet(outputs: tf.Tensor, batch: int, total: int) -> Seeds:
    """Return the seeds of outputs that are being computed by the graph being built."""
    if not outputs.dtype.is_integer or outputs.shape.rank not in (0, 1):
        raise InputError(
            "Expected outputs= as an int, a list of ints, or one int for each example. "
            f"Received: {outputs!r}."
        )
    chosen = tf.cast(outputs, tf.int32)
    chosen = tf.where(chosen < 0, chosen + total, chosen)
    if outputs.shape.rank == 0:
        return Seeds("chosen", (1,), chosen[None])
    if outputs.shape[0] != batch:
        raise InputError(
            f"outputs= as a tensor names one output for each example: expected {batch} of them. "
            f"Received: {outputs.shape[0]}. For the same outputs of every example give a list."
        )
    return Seeds("each", (1,), chosen)


@functools.cache
def _nothing() -> tf.Tensor:
    with tf.init_scope():
        return tf.zeros([0], tf.int32)


def _in_range(chosen: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    total = math.prod(shape)
    wrong = np.flatnonzero((chosen < -total) | (chosen >= total))
    if wrong.size:
        where = f" (at position {wrong[0]})" if len(chosen) > 1 else ""
        raise OutOfRangeError(
            f"There is no output {chosen[wrong[0]]}{where}: the output has shape {shape}, so its "
            f"entries are 0 to {total - 1}."
        )
    return np.where(chosen < 0, chosen + total, chosen)


def _directions(cotangents: Any, batch: int, shape: tuple[int, ...], dtype: tf.DType) -> Seeds:
    u = arrays.direction(cotangents, dtype, "cotangents=")
    if u.shape.rank != 2 + len(shape) or tuple(u.shape[2:]) != shape or u.shape[0] != batch:
        raise InputError(
            f"Expected cotangents of shape (B, K, *output_shape) = ({batch}, K, "
            f"{', '.join(map(str, shape))}). Received: {tuple(u.shape)}."
        )
    return Seeds("cotangents", known(u.shape[1:2]), u)


def weighted(kind: str, payload: tf.Tensor, r: tf.Tensor, output: tf.Tensor) -> tf.Tensor:
    """Return Σ_k r[b,k] · row k of the seeds, (B, *output_shape), for r (B, K).

    Without the rows where they have a single 1: those of 1,000 outputs are a million numbers.
    """
    r, shape = tf.cast(r, output.dtype), tf.shape(output)
    if kind == "all":
        return tf.reshape(r, shape)
    entries = output.shape[1:].num_elements()
    if kind == "chosen":
        summed = tf.math.unsorted_segment_sum(tf.transpose(r), payload, entries)
        return tf.reshape(tf.transpose(summed), shape)
    if kind == "each":
        return tf.reshape(r * tf.one_hot(payload, entries, dtype=r.dtype), shape)
    count = known(r.shape)[1]
    flat = tf.reshape(rows(kind, payload, count, output), [-1, count, entries])
    return tf.reshape(tf.matmul(r[:, None], flat), shape)
