"""Rows of a table that is looked up by ids: embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from perjac._core.backend.axis_layout import Relabelling
from perjac._core.factors.base import Factor, gram_of, lead_of, squared_lengths
from perjac._core.factors.moments import Moments, moment
from perjac._core.factors.outer import weighted
from perjac._core.factors.random_projection import Side
from perjac._core.factors.squares import sum_of_squares
from perjac._core.factors.way import Way


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup(Factor):
    """J[b,k,v,d] = Σ_t [ids[b,t] = v] δ[b,k,t,d]: rows of δ, added at the ids of a table (V, D)."""

    ids: tf.Tensor  # (B, T)
    delta: tf.Tensor  # (B, K, T, D)

    def ways(self, question: str, dim: int = 1) -> list[Way]:
        """Return the ways to an answer: over the ids that occur, never the whole table."""
        held = (self.entries or 0) - (self.ids.shape[1] or 0)
        if question in ("jvp", "vjp", "mean", "project"):
            return [Way("at the ids", held, 0)]
        return [Way("at the ids, repeated ones added up", held, held)]

    def rows(self) -> tf.Tensor:
        """Form (B, K, V, D)."""
        return self._scatter(self.ids, self.layout.target[0])

    def squared_norms(self) -> tf.Tensor:
        """Return the norms of the added rows: an id that repeats is added up before squaring."""
        return squared_lengths(self._merged())

    def _gram(self, other: Lookup) -> tf.Tensor:
        """Inner products over the ids that occur, not over the whole table."""
        both = tf.concat([tf.cast(tf.reshape(f.ids, [-1]), tf.int32) for f in (self, other)], 0)
        used, places = tf.unique(both)
        mine, theirs = tf.split(places, [tf.size(self.ids), tf.size(other.ids)])
        left = self._scatter(tf.reshape(mine, tf.shape(self.ids)), tf.size(used))
        right = other._scatter(tf.reshape(theirs, tf.shape(other.ids)), tf.size(used))
        return gram_of(left, right)

    def jvp(self, v: tf.Tensor) -> tf.Tensor:
        """Return Σ_t V[ids_t]·δ_t."""
        looked_up = tf.gather(self.layout.apply(v), self.ids)  # (B, T, D)
        return tf.einsum("btd,bktd->bk", looked_up, self.delta)

    def vjp(self, u: tf.Tensor, per_example: bool = False) -> tf.Tensor:
        """Return Σ_bkt u δ_t, added at ids_t."""
        delta = weighted(self.delta, u)
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
        squares = sum_of_squares(self._merged(), [1])  # (B, T, D)
        flat = tf.reshape(squares, [-1, self.layout.target[1]])
        ids = tf.reshape(self.ids, [-1])
        return self._back(tf.math.unsorted_segment_sum(flat, ids, self.layout.target[0]), False)

    def moments(self, reduce: bool, most: int) -> Moments:
        """Return how often each id occurs, (1, V), Σ δ δᵀ and B·T: a is one 1 among zeros.

        With `reduce`, the sum of its squared shares of an example's ids, the diagonal of what an
        Outer's left side would be.
        """
        delta, ids = self.delta, tf.reshape(self.ids, [-1])
        batch, positions = tf.unstack(tf.cast(tf.shape(self.ids), delta.dtype))
        weights, terms = tf.ones(tf.shape(ids), delta.dtype), batch * positions
        if reduce:
            same = tf.equal(self.ids[:, :, None], self.ids[:, None, :])
            often = tf.reduce_sum(tf.cast(same, delta.dtype), 2) / positions**2
            weights, terms, delta = tf.reshape(often, [-1]), batch, tf.reduce_sum(delta, 2)
        left = tf.math.unsorted_segment_sum(weights, ids, self.layout.target[0])
        return Moments(left[None], moment(delta, most), terms[None])

    def squares_along(self, bases: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return Σ_bk (J V)², (1, V, D): the left side's basis is that of the unit vectors."""
        delta = tf.tensordot(self.delta, bases["right"][0], 1) if "right" in bases else self.delta
        return Lookup(Relabelling.of(self.layout.target), self.ids, delta).diagonal()[None]

    def squared_deviations(self) -> tf.Tensor:
        """Return Σ (J - J̄)², by moments: most rows of the table are zero."""
        return self._by_moments()

    def project(self, drawn: Mapping[Side, Any]) -> tf.Tensor:
        """Return Σ_t r[ids_t] (q·δ_t), (B, K, dim)."""
        left, right = (drawn[side] for side in self.sides)
        return left.finish(tf.reduce_sum(left.at(self.ids)[:, None] * right.of(self.delta), 2))

    def slices(self) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return the rows that are not left out, one example after another.

        Returns
        -------
        ids : tf.Tensor
            (n,), increasing within an example, each once in it.
        rows : tf.Tensor
            (n, K, D).
        used : tf.Tensor
            (B,): how many of them are each example's.
        """
        batch, table = tf.shape(self.ids)[0], self.layout.target[0]
        example = tf.repeat(tf.range(batch, dtype=tf.int64), tf.shape(self.ids)[1])
        places = example * table + tf.cast(tf.reshape(self.ids, [-1]), tf.int64)
        used, where = tf.unique(places)
        order = tf.argsort(used)
        delta = tf.transpose(self.delta, [0, 2, 1, 3])  # (B, T, K, D)
        flat = tf.reshape(delta, tf.concat([[-1], tf.shape(delta)[2:]], 0))
        rows = tf.math.unsorted_segment_sum(flat, where, tf.size(used))
        counts = tf.math.bincount(
            tf.cast(used // table, tf.int32), minlength=batch, maxlength=batch
        )
        used = tf.gather(used, order)
        return tf.cast(used % table, self.ids.dtype), tf.gather(rows, order), counts

    def _merged(self) -> tf.Tensor:
        """Add each id's δ at its first occurrence in the example and leave zeros elsewhere."""
        same = tf.equal(self.ids[:, :, None], self.ids[:, None, :])  # (B, T, T)
        first = tf.argmax(same, axis=2, output_type=tf.int32)
        return self._scatter(first, tf.shape(self.ids)[1])

    def _scatter(self, places: tf.Tensor, table: Any) -> tf.Tensor:
        """Add δ (B, K, T, D) at places (B, T) of a fresh (B, K, table, D)."""
        batch, count = lead_of(self.delta)
        width = self.layout.target[1]
        start = tf.reshape(tf.range(batch * count) * table, [batch, count, 1])
        segments = start + tf.cast(places, tf.int32)[:, None]
        added = tf.math.unsorted_segment_sum(
            tf.reshape(self.delta, [-1, width]), tf.reshape(segments, [-1]), batch * count * table
        )
        return tf.reshape(added, [batch, count, table, width])
