"""The way on which a derivative is accumulated: by rows, by columns, or across a narrow place.

The Jacobian of K outputs by D inputs is a product of the steps' Jacobians, which may be multiplied
in any order. Rows, from the outputs back, take K sweeps. Where all that is asked for reaches the
output through a narrower tensor z, J = (∂y/∂z) (∂z/∂x) takes as many as z has entries; and if z is
what is asked for, this is forward mode, D columns. Must not know rules or factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from perjac._core.autodiff import seeds
from perjac._core.autodiff.batched import Passage
from perjac._core.autodiff.sweep import cotangents, tangents
from perjac._core.backend.shapes import known, size

Unfold = Callable[[tf.Tensor], tf.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Leg:
    """A stretch of the way, from a tensor down to others.

    Attributes
    ----------
    top : str
        Where it begins.
    bottoms : tuple of str
        Where it ends.
    passage : Passage or None
        Its steps, where rows fold into the batch in all of them.
    chunk : int
        Rows swept together where they do not.
    """

    top: str
    bottoms: tuple[str, ...]
    passage: Passage | None
    chunk: int

    def rows(
        self,
        found: Mapping[str, Any],
        unfolds: Mapping[str, Unfold],
        kind: str,
        payload: tf.Tensor,
        count: int,
    ) -> list[tf.Tensor | None]:
        """Return the cotangents of the bottoms, (B, K, F, ...), or (1, K, F, ...) if all alike."""
        top = found[self.top]
        if self.passage is not None:
            return self.passage.rows(found, seeds.rows(kind, payload, count, top)[:, :, None])
        return cotangents(
            top,
            [found[name] for name in self.bottoms],
            [unfolds[name] for name in self.bottoms],
            lambda k: seeds.row(kind, payload, k, top),
            count,
            self.chunk,
        )

    def columns(self, found: Mapping[str, Any]) -> tf.Tensor | None:
        """Return the tangents of the top, (B, D, *top), for each entry of the one bottom."""
        top, bottom = found[self.top], found[self.bottoms[0]]
        count, nothing = size(bottom.shape[1:]), tf.zeros([0], tf.int32)
        if self.passage is None:
            return tangents(
                top, bottom, lambda d: seeds.row("all", nothing, d, bottom), count, self.chunk
            )
        unit = seeds.rows("all", nothing, count, bottom)
        moved = self.passage.columns(found, unit[:, :, None])
        return None if moved is None else _spread(moved[:, :, 0], tf.shape(top)[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
    """How the cotangents of a program's tensors are come by.

    Attributes
    ----------
    targets : tuple of str
        The tensors whose cotangents are wanted.
    upper : Leg
        From the output down: to the targets, or to the cut and the targets above it.
    cut : str
        The narrow tensor at which the way is taken apart, which may be a target; or nothing.
    columns : bool
        Whether the way between the output and the cut is taken by columns.
    lower : Leg or None
        By rows from the cut to the targets below it, one for each of its entries.
    """

    targets: tuple[str, ...]
    upper: Leg
    cut: str = ""
    columns: bool = False
    lower: Leg | None = None

    @property
    def _legs(self) -> list[Leg]:
        return [leg for leg in (self.upper, self.lower) if leg is not None]

    @property
    def places(self) -> list[str]:
        """The tensors where a leg begins or ends."""
        return [name for leg in self._legs for name in (leg.top, *leg.bottoms)]

    @property
    def names(self) -> list[str]:
        """All that is to be found in the graph being built."""
        operations = [name for leg in self._legs if leg.passage for name in leg.passage.operations]
        return [*self.places, *operations]

    @property
    def key(self) -> tuple:
        """What tells it from other ways between the same tensors."""
        how = [(leg.top, leg.bottoms, leg.passage is None, leg.chunk) for leg in self._legs]
        return self.targets, self.cut, self.columns, *how

    def cotangents(
        self,
        found: Mapping[str, Any],
        unfolds: Mapping[str, Unfold],
        kind: str,
        payload: tf.Tensor,
        count: int,
    ) -> list[tf.Tensor | None]:
        """Return the cotangents of the targets, (B, K, F, ...).

        Parameters
        ----------
        found : mapping of str to tensor or operation
            What the names stand for in the graph being built.
        unfolds : mapping of str to callable
            How each target's batch axis is folded out, (B·F, ...) to (B, F, ...).
        kind, payload, count : str, tf.Tensor, int
            The seeds, and K.

        Returns
        -------
        list of tf.Tensor or None
            None for a target that the output does not depend on.
        """
        if self.cut:
            unfolds = {self.cut: lambda g: tf.expand_dims(g, 1), **unfolds}
        if self.columns:
            arrived = {self.cut: self._by_columns(found, kind, payload, count)}
        else:
            swept = self.upper.rows(found, unfolds, kind, payload, count)
            arrived = dict(zip(self.upper.bottoms, swept, strict=True))
        if self.lower is not None:
            arrived |= self._beyond(self.lower, found, unfolds, arrived[self.cut])
        batch = tf.shape(found[self.upper.top])[0]
        return [None if (r := arrived[t]) is None else _spread(r, batch) for t in self.targets]

    def _by_columns(
        self, found: Mapping[str, Any], kind: str, payload: tf.Tensor, count: int
    ) -> tf.Tensor | None:
        """Return the cotangent of the cut, the rows asked for taken from its columns."""
        columns = self.upper.columns(found)
        if columns is None:
            return None
        rows = seeds.project(kind, payload, count, columns, found[self.upper.top])
        return tf.reshape(rows, [-1, count, 1, *known(found[self.cut].shape[1:])])

    def _beyond(
        self, lower: Leg, found: Mapping[str, Any], unfolds: Mapping[str, Unfold], across: Any
    ) -> dict[str, tf.Tensor | None]:
        """Return the cotangents of what lies below the cut: (∂y/∂z) (∂z/∂x), for each example."""
        if across is None:
            return dict.fromkeys(lower.bottoms)
        entries, count = size(found[self.cut].shape[1:]), across.shape[1]
        across = tf.reshape(across, [-1, count, entries])
        below = lower.rows(found, unfolds, "all", tf.zeros([0], tf.int32), entries)
        result: dict[str, tf.Tensor | None] = {}
        for name, rows in zip(lower.bottoms, below, strict=True):
            if rows is None:
                result[name] = None
                continue
            shape = known(rows.shape[2:])
            product = tf.matmul(across, tf.reshape(rows, [-1, entries, size(shape)]))
            result[name] = tf.reshape(product, [-1, count, *shape])
        return result


def _spread(rows: tf.Tensor, batch: tf.Tensor) -> tf.Tensor:
    """Give each example its own copy of rows that were the same for all."""
    if rows.shape[0] != 1:
        return rows
    return tf.broadcast_to(rows, tf.concat([[batch], tf.shape(rows)[1:]], 0))
