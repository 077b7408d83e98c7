"""What the exact forms answer from their rows alone: F = scale · GᵀG, G (M, P)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from perjac._rows import Rows
from perjac.fisher._columns import Columns
from perjac.fisher._products import pulled, pushed
from perjac.fisher.form import Form


@dataclasses.dataclass(frozen=True)
class Passes:
    """Rows that are made anew each time they are gone through."""

    make: Callable[[], Iterator[Rows]]

    def __iter__(self) -> Iterator[Rows]:
        return self.make()


class OfRows(Form):
    """A Fisher information of which the rows are known, batch by batch.

    Parameters
    ----------
    columns : Columns
        The weights.
    examples : int
        N.
    rows : iterable of Rows
        All of them, as often as they are gone through: a list, or `Passes`.
    scale : float
        What GᵀG is multiplied by.
    reduction : {"mean", "sum"}
        Whether it was divided by N.
    """

    def __init__(
        self,
        columns: Columns,
        examples: int,
        rows: Iterable[Rows],
        scale: float,
        reduction: str = "mean",
    ):
        super().__init__(columns, examples, reduction)
        self._rows, self._scale = rows, scale

    def diagonal(self) -> np.ndarray:
        """Return the diagonal, (P,)."""
        found = np.zeros(self.columns.count)
        for rows in self._rows:
            found += self.columns.flat(rows.diagonal())
        return self._scale * found

    def _products(self, v: np.ndarray) -> np.ndarray:
        found = np.zeros_like(v)
        for rows in self._rows:
            found += pulled(rows, pushed(rows, v), self.columns)
        return self._scale * found
