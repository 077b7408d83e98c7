"""Rows that are a sum over positions of outer products: dense layers and convolutions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from perjac._core.backend.axis_layout import Relabelling
from perjac._core.backend.shapes import size
from perjac._core.factors.base import FORM_AT_ONCE, Factor, gram_of
from perjac._core.factors.moments import Moments, grouped_moment, moment
from perjac._core.factors.patches import Patches
from perjac._core.factors.random_projection import Side
from perjac._core.factors.squares import sum_of_squares
from perjac._core.factors.way import Way

# Rows of both sides of a Gram matrix, formed a block of a weight's inputs at a time.
_BLOCK = 2**25


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
    def laid_out(self) -> int:
        """The windows of a convolution; nothing where the left side is a tensor."""
        return self.a.entries if isinstance(self.a, Patches) else 0

    @property
    def rank_one(self) -> bool:
        """Whether T = 1."""
        return self.positions == 1 and not isinstance(self.a, Patches)

    def ways(self, question: str, dim: int = 1) -> list[Way]:
        """Return the ways to an answer, the cheapest first."""
        t, (i, o), k = self.positions or 1, self.layout.target, self.row_count or 1
        form = Way("form I×O", self._forming(), k * i * o, forms=True)
        if question in ("norms", "clipped_sum"):
            if self.rank_one:
                return [Way("‖a‖²‖δ‖²", i + k * o, 0), form]
            products = Way("T×T Gram", t * t * (i + k * o), (1 + k) * t * t)
            return sorted([form, products], key=lambda way: way.cost)
        if question in ("diagonal", "variance", "snr"):
            return [Way("(a²)ᵀδ²", i * k * o, 0), form] if self.rank_one else [form]
        if question in ("gram", "cosine_similarity"):
            return [Way("(A Aᵀ)∘(Δ Δᵀ)", i + k * o, 0), form] if self.rank_one else [form]
        if question in ("jvp", "vjp", "mean"):
            return [Way("contract a and δ", t * i * o + k * t * o, t * o)]
        if question == "project":
            sketch = Way("sketch a and δ", t * dim * (i + k * o), t * dim * (1 + k))
            rest = k * dim * (i * o + min(i, o))
            work, formed = form.multiply_adds + rest, form.entries + k * dim
            after = Way("form and sketch I×O", work, formed, forms=True)
            return sorted([sketch, after], key=lambda way: way.cost)
        return [form]

    def rows(self) -> tf.Tensor:
        """Form (B, K, I, O): a broadcast product for T = 1, else a matmul over the positions."""
        if self.rank_one:
            return self.a[:, :, :, None] * self.delta
        if isinstance(self.a, Patches):
            return self.a.rows(self.delta)
        return tf.matmul(self.a[:, None], self.delta, transpose_a=True)

    def squared_norms(self) -> tf.Tensor:
        """Return ‖a‖²‖δ‖² for T = 1, else the cheaper of forming I×O and the two T×T Grams.

        Σ_ts (a_t·a_s)(δ_t·δ_s) costs T²(I + K·O) multiply-adds, forming K·T·I·O.
        """
        if self.rank_one:
            lengths = sum_of_squares(self.a, [2])  # (B, 1)
            return lengths * sum_of_squares(self.delta, [2, 3])
        if self.ways("norms")[0].forms:
            return super().squared_norms()
        a = self.columns
        similar = tf.matmul(a, a, transpose_b=True)[:, None]  # (B, 1, T, T)
        squared = tf.reduce_sum(
            similar * tf.matmul(self.delta, self.delta, transpose_b=True), [2, 3]
        )
        return tf.maximum(squared, 0)  # rounding may leave a tiny negative

    def _gram(self, other: Outer) -> tf.Tensor:
        """(A A'ᵀ) ∘ (Δ Δ'ᵀ) for T = 1, else over the formed rows, a block of inputs at a time."""
        if self.rank_one and other.rank_one:
            inputs = tf.matmul(self.a[:, 0], other.a[:, 0], transpose_b=True)  # (B, B')
            return inputs[:, None, :, None] * gram_of(self.delta, other.delta)
        inputs, outputs = self.layout.target
        sides = (self,) if other is self else (self, other)
        rows = sum((f.delta.shape[0] or 1) * (f.row_count or 1) for f in sides)
        blocks = math.ceil(rows * inputs * outputs / _BLOCK)
        width = math.ceil(inputs / blocks) if blocks else inputs
        columns = [(f.columns[:, None], f.delta) for f in sides]
        products = []
        for n in range(0, inputs, max(width, 1)):
            formed = [tf.matmul(a[:, :, :, n : n + width], d, transpose_a=True) for a, d in columns]
            products.append(gram_of(formed[0], formed[-1]))
        return tf.add_n(products)

    def jvp(self, v: tf.Tensor) -> tf.Tensor:
        """Return Σ_t a_tᵀ V δ_t: T·I·O + K·T·O multiply-adds an example."""
        moved = tf.einsum("bti,io->bto", self.columns, self.layout.apply(v))
        return tf.einsum("bto,bkto->bk", moved, self.delta)

    def vjp(self, u: tf.Tensor, per_example: bool = False) -> tf.Tensor:
        """Return Σ_bkt u a_tᵀ δ_t: the K cotangents are summed before the product."""
        delta = weighted(self.delta, u)
        if per_example:
            return self._back(tf.matmul(self.columns, delta, transpose_a=True), True)
        if isinstance(self.a, Patches) and self.a.backward:
            return self._back(self.a.summed(delta), False)
        inputs, outputs = self.layout.target
        flat = tf.reshape(self.columns, [-1, inputs])
        return self._back(
            tf.matmul(flat, tf.reshape(delta, [-1, outputs]), transpose_a=True), False
        )

    def diagonal(self) -> tf.Tensor:
        """Return (a²)ᵀ(Σ_k δ²) for T = 1; else form, square and add."""
        if not self.rank_one:
            return super().diagonal()
        delta = sum_of_squares(self.delta[:, :, 0], [1])
        return self._back(tf.matmul(tf.square(self.a[:, 0]), delta, transpose_a=True), False)

    def moments(self, reduce: bool, most: int) -> Moments:
        """Return Σ a aᵀ over b and t, Σ δ δᵀ over b, k and t, and B·T.

        With `reduce`, of the mean of a over t and the sum of δ over t, and B.
        """
        a, delta = self._left(reduce, most), self.delta
        if reduce:
            delta = tf.reduce_sum(delta, 2)
        terms = tf.shape(self.delta)[0] * (1 if reduce else tf.shape(self.delta)[2])
        return Moments(a, moment(delta, most), tf.cast([terms], delta.dtype))

    def _left(self, reduce: bool, most: int) -> tf.Tensor:
        """Return the left side's moments, with no more windows laid out at a time than fit."""
        inputs = self.layout.target[0]

        def ask(part: Outer) -> tf.Tensor:
            a = tf.reduce_mean(part.columns, 1) if reduce else part.columns
            return moment(a, most)

        if not isinstance(self.a, Patches) or (self.positions or 1) * inputs <= FORM_AT_ONCE:
            return ask(self)
        start = tf.zeros([1, inputs] if inputs > most else [1, inputs, inputs], self.delta.dtype)
        return self._one_by_one(ask, start)

    def squares_along(self, bases: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return Σ_bk (Uᵀ J V)², (1, I, O): the diagonal of Σ_t (Uᵀ a_t)(Vᵀ δ_t)ᵀ."""
        own = Relabelling.of(self.layout.target)
        if not bases:
            return Outer(own, self.a, self.delta).diagonal()[None]
        a, delta = self.columns, self.delta
        if "left" in bases:
            a = tf.tensordot(a, bases["left"][0], 1)
        if "right" in bases:
            delta = tf.tensordot(delta, bases["right"][0], 1)
        return Outer(own, a, delta).diagonal()[None]

    def squared_deviations(self) -> tf.Tensor:
        """Return Σ (J - J̄)²: by moments in float64 for T = 1, where no row is formed."""
        return self._by_moments() if self.rank_one else super().squared_deviations()

    def project(self, drawn: Mapping[Side, Any]) -> tf.Tensor:
        """Return Σ_t (r·a_t)(q·δ_t), (B, K, dim): T·dim·(I + K·O) multiply-adds an example.

        Where there are more positions than that is worth, of the rows.
        """
        left, right = (drawn[side] for side in self.sides)
        if self.ways("project", left.dim)[0].forms:
            return super().project(drawn)
        a, delta = left.of(self.columns), right.of(self.delta)  # (B, T, dim), (B, K, T, dim)
        return left.finish(tf.reduce_sum(a[:, None] * delta, 2))

    def _forming(self) -> int:
        inputs, outputs = self.layout.target
        return (self.row_count or 1) * (self.positions or 1) * inputs * outputs


@dataclasses.dataclass(frozen=True, eq=False)
class Grouped(Factor):
    """J[b,k,g,i,o] = Σ_t a[b,t,g,i] δ[b,k,t,g,o]: an Outer for each group g."""

    a: tf.Tensor  # (B, T, G, I)
    delta: tf.Tensor  # (B, K, T, G, O)

    @property
    def reading(self) -> Relabelling:
        """How the weight becomes matrices (G, I, O): as here."""
        return self.layout

    def rows(self) -> tf.Tensor:
        """Form (B, K, G, I, O)."""
        return tf.einsum("btgi,bktgo->bkgio", self.a, self.delta)

    def jvp(self, v: tf.Tensor) -> tf.Tensor:
        """Return Σ_tg a_tgᵀ V_g δ_tg."""
        moved = tf.einsum("btgi,gio->btgo", self.a, self.layout.apply(v))
        return tf.einsum("btgo,bktgo->bk", moved, self.delta)

    def vjp(self, u: tf.Tensor, per_example: bool = False) -> tf.Tensor:
        """Return Σ_bkt u a_tgᵀ δ_tg."""
        equation = "btgi,btgo->bgio" if per_example else "btgi,btgo->gio"
        return self._back(tf.einsum(equation, self.a, weighted(self.delta, u)), per_example)

    def moments(self, reduce: bool, most: int) -> Moments:
        """Return the same as an Outer's for each group."""
        a, delta = self.a, self.delta
        terms = tf.shape(delta)[0] * (1 if reduce else tf.shape(delta)[2])
        if reduce:
            a, delta = tf.reduce_mean(a, 1), tf.reduce_sum(delta, 2)
        count = tf.cast([terms], delta.dtype)
        return Moments(grouped_moment(a, most), grouped_moment(delta, most), count)

    def squares_along(self, bases: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return Σ_bk (U_gᵀ J_g V_g)², (G, I, O)."""
        a, delta = self.a, self.delta
        if "left" in bases:
            a = tf.einsum("btgi,gij->btgj", a, bases["left"])
        if "right" in bases:
            delta = tf.einsum("bktgo,gop->bktgp", delta, bases["right"])
        return Grouped(Relabelling.of(self.layout.target), a, delta).diagonal()

    def project(self, drawn: Mapping[Side, Any]) -> tf.Tensor:
        """Return Σ_tg (r_g·a_tg)(q·δ_tg), (B, K, dim)."""
        left, right = (drawn[side] for side in self.sides)
        a, delta = left.of_groups(self.a), right.of(self.delta)  # (B, [K,] T, G, dim)
        return left.finish(tf.reduce_sum(a[:, None] * delta, [2, 3]))

    def _forming(self) -> int:
        return (self.row_count or 1) * (self.delta.shape[2] or 1) * size(self.layout.target)


def weighted(delta: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
    """Return Σ_k u[b,k] δ[b,k,...], (B, ...): without a sum where there is one row."""
    ones, count = [1] * (delta.shape.rank - 2), delta.shape[1]
    if count == 1:
        return tf.squeeze(delta, 1) * tf.reshape(u, [-1, *ones])
    shape = [-1, count, *ones] if count else tf.concat([tf.shape(u), ones], 0)
    spread = tf.reshape(u, shape)
    return tf.reduce_sum(delta * spread, 1)
