"""Factors: Jacobian rows (B, K, *W.shape) of one weight, held without forming them.

Every kind answers the same queries; only `dense` forms the rows. They know no operation names.
B examples, K rows, T positions, I and O the two sides of a weight, G groups, D a width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from perjac.layout import Relabelling
from perjac.patches import Patches
from perjac.shapes import size

# Above so many entries for one example, rows that are only an intermediate are formed example by
# example: a big layer's rows for a whole batch would be larger than the answer by orders.
_FORM_AT_ONCE = 2**20
# Rows up to so many times larger than their factor are formed at once.
_HARDLY_LARGER = 1.25


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
    def rank_one(self) -> bool:
        """Whether forming the rows is a mere product of two vectors, which XLA does fastest."""
        return False

    def dense(self) -> tf.Tensor:
        """Form the rows on the weight's axes, (B, K, *W.shape)."""
        return self.layout.invert(self.rows(), lead=2)

    def squared_norms(self) -> tf.Tensor:
        """Return ‖J[b,k]‖², (B, K)."""
        return _sum_of_squares(self.rows())

    def gram(self, other: Factor) -> tf.Tensor:
        """Return ⟨J[b,k], J'[b',k']⟩, (B, K, B', K')."""
        if type(self) is type(other) and self.layout == other.layout:
            return self._gram(other)
        return _gram(self.dense(), other.dense())

    def _gram(self, other: Any) -> tf.Tensor:
        return _gram(self.rows(), other.rows())

    def jvp(self, v: tf.Tensor) -> tf.Tensor:
        """Return ⟨J[b,k], v⟩, (B, K), for v of the weight's shape."""
        rows = self.rows()
        flat = tf.reshape(self.layout.apply(v), [-1])
        return tf.linalg.matvec(tf.reshape(rows, [*_lead(rows), tf.size(flat)]), flat)

    def vjp(self, u: tf.Tensor, per_example: bool = False) -> tf.Tensor:
        """Return Σ_bk u[b,k] J[b,k], of the weight's shape; (B, *W.shape) if `per_example`."""
        rows = self.rows()
        flat = tf.reshape(rows, [*_lead(rows), size(self.layout.target)])
        if per_example:
            pulled = tf.linalg.matvec(flat, u, transpose_a=True)
        else:
            pulled = tf.einsum("bkp,bk->p", flat, u)
        return self._back(pulled, per_example)

    def diagonal(self) -> tf.Tensor:
        """Return Σ_bk J[b,k]², of the weight's shape."""
        return self._back(tf.reduce_sum(tf.square(self.rows()), [0, 1]), False)

    def compact(self) -> Factor:
        """Return the rows themselves where they are hardly larger than the factor, or smaller.

        Whatever is asked then, it is asked of the smallest thing there is.
        """
        held, rows = self.entries, size(self.layout.target)
        count = self.row_count
        if held is None or count is None or rows * count > _HARDLY_LARGER * held:
            return self
        return Explicit(Relabelling.of(self.layout.shape), self.dense())

    def cast(self, dtype: tf.DType) -> Factor:
        """Return the same with its numbers in another floating type."""
        return tf.nest.map_structure(
            lambda t: tf.cast(t, dtype) if t.dtype.is_floating else t, self
        )

    @property
    def row_count(self) -> int | None:
        """K, where it is known."""
        return self.delta.shape[1]  # type: ignore[attr-defined]

    def _back(self, pulled: tf.Tensor, per_example: bool) -> tf.Tensor:
        lead = 1 if per_example else 0
        own = tf.reshape(pulled, tf.concat([tf.shape(pulled)[:lead], self.layout.target], 0))
        return self.layout.invert(own, lead=lead)

    def __tf_flatten__(self) -> tuple[tuple, tuple]:
        static, moving = _fields(type(self))
        return tuple(getattr(self, n) for n in static), tuple(getattr(self, n) for n in moving)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple, components: tuple) -> Factor:
        static, moving = _fields(cls)
        named = dict(zip(static, metadata, strict=True)) | dict(
            zip(moving, components, strict=True)
        )
        return cls(**named)


@dataclasses.dataclass(frozen=True, eq=False)
class Explicit(Factor):
    """The rows themselves, (B, K, *layout.target)."""

    jacobian: tf.Tensor

    def rows(self) -> tf.Tensor:
        """Return what is held."""
        return self.jacobian

    @property
    def row_count(self) -> int | None:
        """K."""
        return self.jacobian.shape[1]

    def compact(self) -> Factor:
        """Return itself: nothing is smaller."""
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class Zero(Factor):
    """Rows that are all zero: what was asked does not depend on this weight."""

    delta: tf.Tensor  # (B, K, 0): carries B, K and the dtype

    def rows(self) -> tf.Tensor:
        """Form the zeros."""
        return tf.zeros([*_lead(self.delta), *self.layout.target], self.delta.dtype)

    def squared_norms(self) -> tf.Tensor:
        """Return zeros, (B, K)."""
        return tf.zeros(tf.shape(self.delta)[:2], self.delta.dtype)

    def compact(self) -> Factor:
        """Return itself: nothing is smaller."""
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class Outer(Factor):
    """J[b,k,i,o] = Σ_t a[b,t,i] δ[b,k,t,o], with a (B, T, I) or Patches of one, δ (B, K, T, O)."""

    a: Any
    delta: tf.Tensor

    @property
    def columns(self) -> tf.Tensor:
        """The left side as a tensor, (B, T, I)."""
        return self.a.columns() if isinstance(self.a, Patches) else self.a

    @property
    def positions(self) -> int | None:
        """T, where it is known."""
        return self.delta.shape[2]

    @property
    def rank_one(self) -> bool:
        """Whether T = 1."""
        return self.positions == 1 and not isinstance(self.a, Patches)

    def rows(self) -> tf.Tensor:
        """Form (B, K, I, O): a broadcast product for T = 1, else a matmul over the positions."""
        if self.rank_one:
            return self.a[:, :, :, None] * self.delta
        return tf.matmul(self.columns[:, None], self.delta, transpose_a=True)

    def squared_norms(self) -> tf.Tensor:
        """Return ‖a‖²‖δ‖² for T = 1, else the cheaper of forming I×O and the two T×T Grams.

        Σ_ts (a_t·a_s)(δ_t·δ_s) costs T²(I + K·O) multiply-adds, forming K·T·I·O.
        """
        if self.rank_one:
            lengths = tf.reduce_sum(tf.square(self.a), 2)  # (B, 1)
            return lengths * tf.reduce_sum(tf.square(self.delta), [2, 3])
        if not self._gram_is_cheaper():
            return self._each_example(lambda part: _sum_of_squares(part.rows()))
        a = self.columns
        similar = tf.matmul(a, a, transpose_b=True)[:, None]  # (B, 1, T, T)
        squared = tf.reduce_sum(
            similar * tf.matmul(self.delta, self.delta, transpose_b=True), [2, 3]
        )
        return tf.maximum(squared, 0)  # rounding may leave a tiny negative

    def _gram(self, other: Outer) -> tf.Tensor:
        """(A A'ᵀ) ∘ (Δ Δ'ᵀ) for T = 1, else over the formed rows, a block of examples a time."""
        if self.rank_one and other.rank_one:
            inputs = tf.matmul(self.a[:, 0], other.a[:, 0], transpose_b=True)  # (B, B')
            return inputs[:, None, :, None] * _gram(self.delta, other.delta)
        right = other.rows()
        return self._each_example(lambda part: _gram(part.rows(), right))

    def jvp(self, v: tf.Tensor) -> tf.Tensor:
        """Return Σ_t a_tᵀ V δ_t: T·I·O + K·T·O multiply-adds an example."""
        moved = tf.einsum("bti,io->bto", self.columns, self.layout.apply(v))
        return tf.einsum("bto,bkto->bk", moved, self.delta)

    def vjp(self, u: tf.Tensor, per_example: bool = False) -> tf.Tensor:
        """Return Σ_bkt u a_tᵀ δ_t: the K cotangents are summed before the product."""
        delta = tf.einsum("bkto,bk->bto", self.delta, u)
        equation = "bti,bto->bio" if per_example else "bti,bto->io"
        return self._back(tf.einsum(equation, self.columns, delta), per_example)

    def diagonal(self) -> tf.Tensor:
        """Return (a²)ᵀ(Σ_k δ²) for T = 1; else form, square and add, example by example."""
        if self.rank_one:
            delta = tf.reduce_sum(tf.square(self.delta[:, :, 0]), 1)
            squares = tf.matmul(tf.square(self.a[:, 0]), delta, transpose_a=True)
        else:
            squares = self._each_example(lambda part: tf.reduce_sum(tf.square(part.rows()), 1))
            squares = tf.reduce_sum(squares, 0)
        return self._back(squares, False)

    def _gram_is_cheaper(self) -> bool:
        count, positions, width = self.row_count, self.positions, self.delta.shape[3]
        inputs = self.layout.target[0]
        if count is None or positions is None or width is None:
            return False
        return positions * (inputs + count * width) < count * inputs * width

    def _each_example(self, ask: Callable[[Outer], tf.Tensor]) -> tf.Tensor:
        """Ask all examples at once, or one after another where the rows would be large."""
        if (self.row_count or 1) * size(self.layout.target) <= _FORM_AT_ONCE:
            return ask(self)

        def one(parts: Any) -> tf.Tensor:
            a, delta = tf.nest.map_structure(lambda t: t[None], parts)
            return ask(Outer(self.layout, a, delta))[0]

        return tf.map_fn(one, (self.a, self.delta), fn_output_signature=self.delta.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Grouped(Factor):
    """J[b,k,g,i,o] = Σ_t a[b,t,g,i] δ[b,k,t,g,o]: an Outer for each group g."""

    a: tf.Tensor  # (B, T, G, I)
    delta: tf.Tensor  # (B, K, T, G, O)

    def rows(self) -> tf.Tensor:
        """Form (B, K, G, I, O)."""
        return tf.einsum("btgi,bktgo->bkgio", self.a, self.delta)

    def jvp(self, v: tf.Tensor) -> tf.Tensor:
        """Return Σ_tg a_tgᵀ V_g δ_tg."""
        moved = tf.einsum("btgi,gio->btgo", self.a, self.layout.apply(v))
        return tf.einsum("btgo,bktgo->bk", moved, self.delta)

    def vjp(self, u: tf.Tensor, per_example: bool = False) -> tf.Tensor:
        """Return Σ_bkt u a_tgᵀ δ_tg."""
        delta = tf.einsum("bktgo,bk->btgo", self.delta, u)
        equation = "btgi,btgo->bgio" if per_example else "btgi,btgo->gio"
        return self._back(tf.einsum(equation, self.a, delta), per_example)


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup(Factor):
    """J[b,k,v,d] = Σ_t [ids[b,t] = v] δ[b,k,t,d]: rows of δ, added at the ids of a table (V, D)."""

    ids: tf.Tensor  # (B, T)
    delta: tf.Tensor  # (B, K, T, D)

    def rows(self) -> tf.Tensor:
        """Form (B, K, V, D)."""
        return self._scatter(self.ids, self.layout.target[0])

    def squared_norms(self) -> tf.Tensor:
        """Return the norms of the added rows: an id that repeats is added up before squaring."""
        return _sum_of_squares(self._merged())

    def _gram(self, other: Lookup) -> tf.Tensor:
        """Inner products over the ids that occur, not over the whole table."""
        both = tf.concat([tf.reshape(self.ids, [-1]), tf.reshape(other.ids, [-1])], 0)
        used, places = tf.unique(both)
        mine, theirs = tf.split(places, [tf.size(self.ids), tf.size(other.ids)])
        left = self._scatter(tf.reshape(mine, tf.shape(self.ids)), tf.size(used))
        right = other._scatter(tf.reshape(theirs, tf.shape(other.ids)), tf.size(used))
        return _gram(left, right)

    def jvp(self, v: tf.Tensor) -> tf.Tensor:
        """Return Σ_t V[ids_t]·δ_t."""
        looked_up = tf.gather(self.layout.apply(v), self.ids)  # (B, T, D)
        return tf.einsum("btd,bktd->bk", looked_up, self.delta)

    def vjp(self, u: tf.Tensor, per_example: bool = False) -> tf.Tensor:
        """Return Σ_bkt u δ_t, added at ids_t."""
        delta = tf.einsum("bktd,bk->btd", self.delta, u)
        table, width = self.layout.target
        if per_example:
            alone = Lookup(self.layout, self.ids, delta[:, None])
            return self._back(alone.rows()[:, 0], True)
        flat = tf.reshape(delta, [-1, width])
        return self._back(
            tf.math.unsorted_segment_sum(flat, tf.reshape(self.ids, [-1]), table), False
        )

    def diagonal(self) -> tf.Tensor:
        """Return Σ_bk of the added rows' squares, added at their ids."""
        squares = tf.reduce_sum(tf.square(self._merged()), 1)  # (B, T, D)
        flat = tf.reshape(squares, [-1, self.layout.target[1]])
        ids = tf.reshape(self.ids, [-1])
        return self._back(tf.math.unsorted_segment_sum(flat, ids, self.layout.target[0]), False)

    def _merged(self) -> tf.Tensor:
        """Add each id's δ at its first occurrence in the example and leave zeros elsewhere."""
        same = tf.equal(self.ids[:, :, None], self.ids[:, None, :])  # (B, T, T)
        first = tf.argmax(same, axis=2, output_type=tf.int32)
        return self._scatter(first, tf.shape(self.ids)[1])

    def _scatter(self, places: tf.Tensor, table: Any) -> tf.Tensor:
        """Add δ (B, K, T, D) at places (B, T) of a fresh (B, K, table, D)."""
        batch, count = _lead(self.delta)
        width = self.layout.target[1]
        start = tf.reshape(tf.range(batch * count) * table, [batch, count, 1])
        segments = start + tf.cast(places, tf.int32)[:, None]
        added = tf.math.unsorted_segment_sum(
            tf.reshape(self.delta, [-1, width]), tf.reshape(segments, [-1]), batch * count * table
        )
        return tf.reshape(added, [batch, count, table, width])


@dataclasses.dataclass(frozen=True, eq=False)
class Sum(Factor):
    """Contributions of different kinds to one weight, from the several places it is used at.

    Linear queries add up; a norm of a sum is not the sum of norms, so the others form the rows.
    """

    parts: tuple[Factor, ...]

    def rows(self) -> tf.Tensor:
        """Form and add, (B, K, *W.shape)."""
        return tf.add_n([part.dense() for part in self.parts])

    @property
    def row_count(self) -> int | None:
        """K."""
        return self.parts[0].row_count

    def gram(self, other: Factor) -> tf.Tensor:
        """Add the inner products of all pairs of parts."""
        others = other.parts if isinstance(other, Sum) else (other,)
        return tf.add_n([mine.gram(theirs) for mine in self.parts for theirs in others])

    def jvp(self, v: tf.Tensor) -> tf.Tensor:
        """Add the parts' answers."""
        return tf.add_n([part.jvp(v) for part in self.parts])

    def vjp(self, u: tf.Tensor, per_example: bool = False) -> tf.Tensor:
        """Add the parts' answers."""
        return tf.add_n([part.vjp(u, per_example) for part in self.parts])


def _fields(cls: type) -> tuple[list[str], list[str]]:
    """Return the names of the static fields and of those that hold tensors."""
    static = [f.name for f in dataclasses.fields(cls) if f.metadata.get("static")]
    return static, [f.name for f in dataclasses.fields(cls) if f.name not in static]


def _lead(rows: tf.Tensor) -> tuple[Any, Any]:
    """B and K of a tensor (B, K, ...), as numbers where they are known."""
    shape = tf.shape(rows)
    return rows.shape[0] or shape[0], rows.shape[1] or shape[1]


def _sum_of_squares(rows: tf.Tensor) -> tf.Tensor:
    """Sum over all axes but the first two."""
    return tf.reduce_sum(tf.square(rows), list(range(2, rows.shape.rank)))


def _gram(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Inner products of rows: (B, K, ...) with (B', K', ...) to (B, K, B', K')."""
    entries = left.shape[2:].num_elements()
    entries = tf.reduce_prod(tf.shape(left)[2:]) if entries is None else entries
    flat_left, flat_right = (
        tf.reshape(rows, [math.prod(_lead(rows)), entries]) for rows in (left, right)
    )
    products = tf.matmul(flat_left, flat_right, transpose_b=True)
    return tf.reshape(products, [*_lead(left), *_lead(right)])
