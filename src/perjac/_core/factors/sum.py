"""Rows that are a sum of factors of different kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from perjac._core.backend.axis_layout import Relabelling
from perjac._core.factors.base import Explicit, Factor
from perjac._core.factors.random_projection import Side
from perjac._core.factors.way import Way


@dataclasses.dataclass(frozen=True, eq=False)
class Sum(Factor):
    """Contributions of different kinds to one weight, from the several places it is used at.

    Linear queries add up; a norm of a sum is not the sum of norms, so the others form the rows.
    """

    parts: tuple[Factor, ...]

    def rows(self) -> tf.Tensor:
        """Form and add, (B, K, *W.shape)."""
        return tf.add_n([part.dense() for part in self.parts])

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

    @property
    def sides(self) -> tuple[Side, ...]:
        """The parts' sides, where all run over the same axes; else those of the weight's own.

        Parts may run over the axes of a side in different orders: each is a side of its own.
        """
        if self._read_alike():
            return tuple(dict.fromkeys(side for part in self.parts for side in part.sides))
        return self._formed().sides

    def ways(self, question: str, dim: int = 1) -> list[Way]:
        """Return the parts' ways where they add up; else the rows have to be formed."""
        linear = question in ("jvp", "vjp", "mean", "gram", "cosine_similarity")
        if linear or (question == "project" and self._read_alike()):
            each = [part.ways(question, dim)[0] for part in self.parts]
            names = " + ".join(way.name for way in each)
            costs = sum(w.multiply_adds for w in each), sum(w.entries for w in each)
            return [Way(names, *costs)]
        return super().ways(question, dim)

    def project(self, drawn: Mapping[Side, Any]) -> tf.Tensor:
        """Add the parts' projections, which are by the same numbers for the same axes."""
        if self._read_alike():
            return tf.add_n([part.project(drawn) for part in self.parts])
        return self._formed().project(drawn)

    def _read_alike(self) -> bool:
        return len({frozenset(map(frozenset, part.sides)) for part in self.parts}) == 1

    def _formed(self) -> Explicit:
        return Explicit(Relabelling.of(self.layout.shape), self.rows())

    def _forming(self) -> int:
        return sum(part._forming() for part in self.parts)

    def _any_tensor(self) -> tf.Tensor:
        return self.parts[0]._any_tensor()

    def _example(self, b: tf.Tensor) -> Sum:
        return Sum(self.layout, tuple(part._example(b) for part in self.parts))
