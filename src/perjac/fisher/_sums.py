"""Running sums over the rows of a square root, of which forms made of blocks are made.

Each can be asked for its blocks at any time, once, so that a pass that is stopped is not lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perjac._rows import Rows
from perjac.fisher._products import second_moment
from perjac.fisher.blocks import Dense, Diagonal


class Matrices:
    """Σ rowᵀ row of the weights of each block.

    Parameters
    ----------
    groups : sequence of sequence of str
        Their keys.
    sizes : sequence of int
        How many numbers each block's weights have.
    """

    def __init__(self, groups: Sequence[tuple[str, ...]], sizes: Sequence[int]):
        self._totals = {
            keys: np.zeros((size, size)) for keys, size in zip(groups, sizes, strict=True)
        }

    def add(self, rows: Rows) -> None:
        """Add some rows."""
        for keys, total in self._totals.items():
            total += second_moment(rows, keys)

    def blocks(self, scale: float) -> dict[tuple[str, ...], Dense]:
        """Return the blocks; `scale` is what the sums are multiplied by."""
        return {keys: Dense(total * scale) for keys, total in self._totals.items()}


class Diagonals:
    """Σ row² of each weight."""

    def __init__(self):
        self._totals: dict[str, np.ndarray] = {}

    def add(self, squares: Mapping[str, Any]) -> None:
        """Add sums over some rows, by key."""
        for key, part in squares.items():
            self._totals[key] = added(self._totals.get(key), part)

    def blocks(self, scale: float) -> dict[tuple[str, ...], Diagonal]:
        """Return the blocks; `scale` is what the sums are multiplied by."""
        return {(key,): Diagonal(total, scale) for key, total in self._totals.items()}


def added(total: np.ndarray | None, part: Any) -> np.ndarray:
    """Return a total and another part, in float64. The first is kept as it is: often it is all."""
    part = np.asarray(part)
    if total is None:
        return part
    if total.dtype == np.float64 and total.flags.writeable:
        return np.add(total, part, out=total)
    return np.add(total, part, dtype="f8")
