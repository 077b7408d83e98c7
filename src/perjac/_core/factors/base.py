"""What every factor answers, from its rows alone; and rows that are held as they are."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import tensorflow as tf

from perjac._core.backend.axis_layout import Relabelling
from perjac._core.backend.shapes import size
from perjac._core.factors.moments import Moments, no_moments, of_rows
from perjac._core.factors.patches import Patches
from perjac._core.factors.random_projection import Side
from perjac._core.factors.squares import sum_of_squares
from perjac._core.factors.way import Way

# Above so many entries for one example, rows that are only an intermediate are formed example by
# example: they then stay in the processor's cache, and a big layer's rows for a whole batch would
# be larger than the answer by orders.
FORM_AT_ONCE = 2**18
# Rows up to so many times larger than their factor are formed at once.
_HARDLY_LARGER = 1.25
# Relative error of a sum of squares in float64, and some more.
_ROUNDING = 2**-48
# Rows are multiplied with themselves in so many blocks, where there are so many rows so long:
# 1,280 rows of 1,152 numbers take 28 ms against 40; of 64 the mirroring takes as long as it saves.
_HALVES, _MANY_ROWS, _LONG_ROWS = 4, 512, 512


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """Base of all kinds: the queries, from `rows` alone.

    `rows()` has the factor's own axes, (B, K, *layout.target); `layout` leads there from the
    weight's. Norms and inner products do not change with the layout, so kinds compute those on
    their own axes. Being a nest (`__tf_flatten__`), a factor passes in and out of a `tf.function`.
    """

    layout: Relabelling = dataclasses.field(metadata={"static": True})

    def rows(self) -> tf.Tensor:
        """Form the rows, (B, K, *layout.target)."""
        raise NotImplementedError

    @property
    def entries(self) -> int | None:
        """Numbers held for one example, or None where a shape is unknown."""
        sizes = [t.shape[1:].num_elements() for t in tf.nest.flatten(self, expand_composites=True)]
        return None if None in sizes else sum(sizes)

    @property
    def laid_out(self) -> int:
        """Numbers that one example's sides become before they are multiplied."""
        return 0

    @property
    def rank_one(self) -> bool:
        """Whether forming the rows is a mere product of two vectors, which XLA does fastest."""
        return False

    @property
    def row_count(self) -> int | None:
        """K, where it is known."""
        return self._any_tensor().shape[1]

    @property
    def sides(self) -> tuple[Side, ...]:
        """The weight's axes, read as the two sides of a matrix: all but the last of ours, and it.

        One side where there is but one axis.
        """
        axes = self.layout.pieces()
        if len(axes) < 2:
            return (tuple(piece for axis in axes for piece in axis),)
        return tuple(piece for axis in axes[:-1] for piece in axis), axes[-1]

    @property
    def reading(self) -> Relabelling:
        """How the weight becomes matrices (G, I, O): one, of its two `sides`."""
        axes = self.layout.target
        return self.layout.reshape((1, size(axes[:-1]), size(axes[-1:])))

    def ways(self, question: str, dim: int = 1) -> list[Way]:
        """Return the ways to an answer that there are; the first is the one taken.

        `dim` is of a projection.
        """
        rows = (self.row_count or 1) * size(self.layout.target)
        return [Way("form the rows", self._forming(), rows, forms=True)]

    def dense(self) -> tf.Tensor:
        """Form the rows on the weight's axes, (B, K, *W.shape)."""
        return self.layout.invert(self.rows(), lead=2)

    def squared_norms(self) -> tf.Tensor:
        """Return ‖J[b,k]‖², (B, K)."""
        return self._each_example(lambda part: squared_lengths(part.rows()))

    def gram(self, other: Factor) -> tf.Tensor:
        """Return ⟨J[b,k], J'[b',k']⟩, (B, K, B', K')."""
        if type(self) is type(other) and self.layout == other.layout:
            return self._gram(other)
        return gram_of(self.dense(), other.dense())

    def _gram(self, other: Any) -> tf.Tensor:
        rows = self.rows()
        return gram_of(rows, rows if other is self else other.rows())

    def jvp(self, v: tf.Tensor) -> tf.Tensor:
        """Return ⟨J[b,k], v⟩, (B, K), for v of the weight's shape."""
        rows = self.rows()
        flat = tf.reshape(self.layout.apply(v), [-1])
        return tf.linalg.matvec(tf.reshape(rows, [*lead_of(rows), tf.size(flat)]), flat)

    def vjp(self, u: tf.Tensor, per_example: bool = False) -> tf.Tensor:
        """Return Σ_bk u[b,k] J[b,k], of the weight's shape; (B, *W.shape) if `per_example`."""
        rows = self.rows()
        if per_example:
            flat = tf.reshape(rows, [*lead_of(rows), size(self.layout.target)])
            pulled = tf.linalg.matvec(flat, u, transpose_a=True)
        else:
            flat = tf.reshape(rows, [-1, size(self.layout.target)])
            pulled = tf.matmul(tf.reshape(u, [1, -1]), flat)
        return self._back(pulled, per_example)

    def diagonal(self) -> tf.Tensor:
        """Return Σ_bk J[b,k]², of the weight's shape."""
        squares = self._over_examples(lambda part: sum_of_squares(part.rows(), [0, 1]))
        return self._back(squares, False)

    def moments(self, reduce: bool, most: int) -> Moments:
        """Return the sums that curvature is factored into: here Σ J Jᵀ and Σ JᵀJ, J (I, O).

        `reduce` is about positions; a side longer than `most` is summed on its diagonal alone.
        """
        nothing = no_moments(self.reading.target, most, self._any_tensor().dtype)
        return self._over_examples(lambda part: of_rows(part._matrices(), most), nothing)

    def squares_along(self, bases: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return Σ_bk (Uᵀ J V)², (G, I, O), with U (G, I, I) the "left" basis, V the "right".

        A basis left out is that of the unit vectors.
        """

        def ask(part: Factor) -> tf.Tensor:
            rows = part._matrices()
            if "left" in bases:
                rows = tf.matmul(bases["left"], rows, transpose_a=True)
            if "right" in bases:
                rows = tf.matmul(rows, bases["right"])
            return sum_of_squares(rows, [0, 1])

        start = tf.zeros(self.reading.target, self._any_tensor().dtype)
        return self._over_examples(ask, start)

    def squared_deviations(self) -> tf.Tensor:
        """Return Σ_bk (J[b,k] - J̄)², J̄ the mean over b and k, of the weight's shape."""
        mean = self.layout.apply(self._mean())
        spread = self._over_examples(lambda part: sum_of_squares(part.rows() - mean, [0, 1]))
        return self._back(spread, False)

    def project(self, drawn: Mapping[Side, Any]) -> tf.Tensor:
        """Return Σ_io J[b,k,i,o] r[i] q[o] for each of the numbers drawn, (B, K, dim)."""
        left, *right = (drawn[side] for side in self.sides)
        axes = self.layout.target
        shape = [size(axes[:-1]), axes[-1]] if right else [size(axes)]

        def sketched(part: Factor) -> tf.Tensor:
            rows = part.rows()
            rows = tf.reshape(rows, [*lead_of(rows), *shape])
            return left.finish(left.of_rows(rows, *right) if right else left.of(rows))

        between = min(shape) * left.dim if right else 0
        return self._each_example(sketched, between)

    def compact(self) -> Factor:
        """Return the rows themselves where they are hardly larger than the factor, or smaller.

        Whatever is asked then, it is asked of the smallest thing there is.
        """
        held, rows = self.entries, size(self.layout.target)
        count = self.row_count
        if held is None or count is None or rows * count > _HARDLY_LARGER * held:
            return self
        return Explicit(self.layout, self.rows())

    def cast(self, dtype: tf.DType) -> Self:
        """Return the same with its numbers in another floating type."""
        return tf.nest.map_structure(
            lambda t: tf.cast(t, dtype) if t.dtype.is_floating else t, self
        )

    def _forming(self) -> int:
        """The multiply-adds of forming one example's rows."""
        return 0

    def _mean(self) -> tf.Tensor:
        """The mean of all rows, of the weight's shape."""
        lead = tf.shape(self._any_tensor())[:2]
        u = tf.ones(lead, self._any_tensor().dtype)
        return self.vjp(u / tf.cast(tf.reduce_prod(lead), u.dtype))

    def _any_tensor(self) -> tf.Tensor:
        """A tensor (B, K, ...)."""
        return self.delta  # type: ignore[attr-defined]

    def _by_moments(self) -> tf.Tensor:
        """Σ J² - n J̄², in float64; zero where it is within the rounding of Σ J²."""
        wide = self.cast(tf.float64)
        count = tf.cast(tf.reduce_prod(tf.shape(self._any_tensor())[:2]), tf.float64)
        squares = wide.diagonal()
        spread = squares - count * tf.square(wide._mean())
        spread = tf.where(spread > _ROUNDING * squares, spread, tf.zeros_like(spread))
        return tf.cast(spread, self._any_tensor().dtype)

    def _large(self, between: int = 0) -> bool:
        entries = max(size(self.layout.target), between)
        return (self.row_count or 1) * entries > FORM_AT_ONCE

    def _each_example(self, ask: Callable[[Any], tf.Tensor], between: int = 0) -> tf.Tensor:
        """Ask all examples at once, or one after another where the rows would be large.

        `between` counts the numbers that one row becomes on the way to its answer.
        """
        if not self._large(between):
            return ask(self)
        batch = tf.shape(self._any_tensor())[0]
        return tf.map_fn(
            lambda b: ask(self._example(b))[0],
            tf.range(batch),
            fn_output_signature=self._any_tensor().dtype,
        )

    def _over_examples(self, ask: Callable[[Any], Any], start: Any = None) -> Any:
        """Ask all examples at once, or add up the answers of one after another.

        `start` is the sum over no examples, of the target's shape if left out.
        """
        if not self._large():
            return ask(self)
        if start is None:
            start = tf.zeros(self.layout.target, self._any_tensor().dtype)
        return self._one_by_one(ask, start)

    def _one_by_one(self, ask: Callable[[Any], Any], start: Any) -> Any:
        """Add up the answers of one example after another."""
        batch = tf.shape(self._any_tensor())[0]
        return tf.while_loop(
            lambda b, total: b < batch,
            lambda b, total: (b + 1, tf.nest.map_structure(tf.add, total, ask(self._example(b)))),
            (tf.constant(0), start),
        )[1]

    def _matrices(self) -> tf.Tensor:
        """Form the rows as matrices, (B, K, G, I, O)."""
        rows = self.rows()
        return tf.reshape(rows, [*lead_of(rows), *self.reading.target])

    def _example(self, b: tf.Tensor) -> Self:
        """Return one example's factor, its batch axis kept."""
        held = {name: getattr(self, name) for name in _fields(type(self))[1]}
        own: Any = {
            name: part.example(b) if isinstance(part, Patches) else part[b : b + 1]
            for name, part in held.items()
        }
        return dataclasses.replace(self, **own)

    def _back(self, pulled: tf.Tensor, per_example: bool) -> tf.Tensor:
        target = self.layout.target
        if not per_example:
            return self.layout.invert(tf.reshape(pulled, target))
        own = tf.reshape(pulled, tf.concat([tf.shape(pulled)[:1], target], 0))
        return self.layout.invert(own, lead=1)

    def __tf_flatten__(self) -> tuple[tuple, tuple]:
        static, moving = _fields(type(self))
        return tuple(getattr(self, n) for n in static), tuple(getattr(self, n) for n in moving)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple, components: tuple) -> Self:
        static, moving = _fields(cls)
        made = object.__new__(cls)  # a frozen dataclass sets its fields one by one, slowly
        made.__dict__.update(zip(static, metadata, strict=True))
        made.__dict__.update(zip(moving, components, strict=True))
        return made


@dataclasses.dataclass(frozen=True, eq=False)
class Explicit(Factor):
    """The rows themselves, (B, K, *layout.target)."""

    jacobian: tf.Tensor
    # The target's axis of groups that do not meet, if there is one: a matrix for each.
    groups: int | None = dataclasses.field(default=None, metadata={"static": True})

    def rows(self) -> tf.Tensor:
        """Return what is held."""
        return self.jacobian

    @property
    def reading(self) -> Relabelling:
        """How the weight becomes matrices (G, I, O)."""
        if self.groups is None:
            return super().reading
        front = self._groups_first()
        groups, *inputs, outputs = (self.layout.target[axis] for axis in front)
        return self.layout.transpose(front).reshape((groups, size(inputs), outputs))

    def _matrices(self) -> tf.Tensor:
        rows = self.jacobian
        if self.groups is not None:
            rows = tf.transpose(rows, [0, 1, *(axis + 2 for axis in self._groups_first())])
        return tf.reshape(rows, [*lead_of(rows), *self.reading.target])

    def _groups_first(self) -> list[int]:
        assert self.groups is not None
        others = [n for n in range(len(self.layout.target)) if n != self.groups]
        return [self.groups, *others]

    def ways(self, question: str, dim: int = 1) -> list[Way]:
        """Return the only one: the rows are there."""
        return [Way("the rows are held", 0, 0)]

    def compact(self) -> Factor:
        """Return itself: nothing is smaller."""
        return self

    def _any_tensor(self) -> tf.Tensor:
        return self.jacobian


@dataclasses.dataclass(frozen=True, eq=False)
class Zero(Factor):
    """Rows that are all zero: what was asked does not depend on this weight."""

    delta: tf.Tensor  # (B, K, 0): carries B, K and the dtype

    def rows(self) -> tf.Tensor:
        """Form the zeros."""
        return tf.zeros([*lead_of(self.delta), *self.layout.target], self.delta.dtype)

    def ways(self, question: str, dim: int = 1) -> list[Way]:
        """Return the only one."""
        return [Way("zero", 0, 0)]

    def squared_norms(self) -> tf.Tensor:
        """Return zeros, (B, K)."""
        return self._zeros(lead_of(self.delta))

    def gram(self, other: Factor) -> tf.Tensor:
        """Return zeros, (B, K, B', K')."""
        return self._zeros([*lead_of(self.delta), *lead_of(other._any_tensor())])

    def jvp(self, v: tf.Tensor) -> tf.Tensor:
        """Return zeros, (B, K)."""
        return self.squared_norms()

    def vjp(self, u: tf.Tensor, per_example: bool = False) -> tf.Tensor:
        """Return zeros, of the weight's shape; (B, *W.shape) if `per_example`."""
        return self._zeros([*lead_of(self.delta)[:per_example], *self.layout.shape])

    def diagonal(self) -> tf.Tensor:
        """Return zeros, of the weight's shape."""
        return self._zeros(self.layout.shape)

    def squared_deviations(self) -> tf.Tensor:
        """Return zeros, of the weight's shape."""
        return self._zeros(self.layout.shape)

    def moments(self, reduce: bool, most: int) -> Moments:
        """Return zeros."""
        return no_moments(self.reading.target, most, self.delta.dtype)

    def squares_along(self, bases: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return zeros, (1, I, O)."""
        return self._zeros(self.reading.target)

    def project(self, drawn: Mapping[Side, Any]) -> tf.Tensor:
        """Return zeros, (B, K, dim)."""
        return self._zeros([*lead_of(self.delta), drawn[self.sides[0]].dim])

    def _zeros(self, shape: Sequence[Any]) -> tf.Tensor:
        return tf.zeros([*shape], self.delta.dtype)

    def compact(self) -> Factor:
        """Return itself: nothing is smaller."""
        return self


@functools.cache
def _fields(cls: type) -> tuple[list[str], list[str]]:
    """Return the names of the static fields and of those that hold tensors."""
    static = [f.name for f in dataclasses.fields(cls) if f.metadata.get("static")]
    return static, [f.name for f in dataclasses.fields(cls) if f.name not in static]


def lead_of(rows: tf.Tensor) -> tuple[Any, Any]:
    """B and K of a tensor (B, K, ...), as numbers where they are known."""
    shape = tf.shape(rows)
    return rows.shape[0] or shape[0], rows.shape[1] or shape[1]


def squared_lengths(rows: tf.Tensor) -> tf.Tensor:
    """Sum squares over all axes but the first two."""
    return sum_of_squares(rows, list(range(2, rows.shape.rank)))


def gram_of(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Inner products of rows: (B, K, ...) with (B', K', ...) to (B, K, B', K')."""
    entries = left.shape[2:].num_elements()
    entries = tf.reduce_prod(tf.shape(left)[2:]) if entries is None else entries
    flat_left, flat_right = (
        tf.reshape(rows, [math.prod(lead_of(rows)), entries]) for rows in (left, right)
    )
    if left is right:
        products = _with_itself(flat_left)
    else:
        products = tf.matmul(flat_left, flat_right, transpose_b=True)
    return tf.reshape(products, [*lead_of(left), *lead_of(right)])


def _with_itself(rows: tf.Tensor) -> tf.Tensor:
    """Return rows rowsᵀ, (M, M), of rows (M, n): the blocks below the diagonal, and their mirror.

    Four blocks of rows take 10 of 16 products.
    """
    count, entries = rows.shape
    if count is None or count < _MANY_ROWS or entries is None or entries < _LONG_ROWS:
        return tf.matmul(rows, rows, transpose_b=True)
    ends = [count * n // _HALVES for n in range(_HALVES + 1)]
    cuts = [slice(*pair) for pair in itertools.pairwise(ends)]
    below = [tf.matmul(rows[cut], rows[: cut.stop], transpose_b=True) for cut in cuts]
    whole = [
        tf.concat([part, *(tf.transpose(later[:, cut]) for later in below[n + 1 :])], 1)
        for n, (cut, part) in enumerate(zip(cuts, below, strict=True))
    ]
    return tf.concat(whole, 0)
