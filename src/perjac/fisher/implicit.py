"""F as an operator that is never formed: its products are J ᵀ(J v), batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from scipy.sparse.linalg import LinearOperator, cg, eigsh

from perjac.errors import InputError, NotConvergedError
from perjac.fisher.columns import Columns
from perjac.fisher.form import Form
from perjac.rows import Rows

# A solution's residual, relative to what is solved for.
_RESIDUAL = 1e-10


class Implicit(Form):
    """The exact Fisher information, by products alone.

    Parameters
    ----------
    columns : Columns
        The weights.
    examples : int
        N.
    rows : callable
        Gives all rows, anew each time.
    scale : float
        What GᵀG is multiplied by.
    """

    def __init__(
        self, columns: Columns, examples: int, rows: Callable[[], Iterable[Rows]], scale: float
    ):
        super().__init__(columns, examples)
        self._rows, self._scale = rows, scale

    def trace(self) -> float:
        """Return the sum of the eigenvalues, which is that of the rows' squared norms."""
        total = sum(np.sum(np.square(np.asarray(rows.norms(), "f8"))) for rows in self._rows())
        return float(self._scale * total)

    def diagonal(self) -> np.ndarray:
        """Return the diagonal, (P,)."""
        found = np.zeros(self.columns.count)
        for rows in self._rows():
            found += self.columns.flat(rows.diagonal())
        return self._scale * found

    def eigsh(self, k: int = 6) -> tuple[np.ndarray, np.ndarray]:
        """Return the k largest eigenvalues, the largest first, and their vectors, by Lanczos."""
        if not 1 <= k < self.columns.count:
            raise InputError(f"Expected k= from 1 to {self.columns.count - 1}. Received: {k!r}.")
        values, vectors = eigsh(self, k=k)
        order = np.argsort(values)[::-1]
        return values[order], vectors[:, order]

    def _products(self, v: np.ndarray) -> np.ndarray:
        found = np.zeros_like(v)
        for rows in self._rows():
            for m in range(v.shape[1]):
                found[:, m] += self.columns.flat(rows.vjp(rows.jvp(v[:, m])))
        return self._scale * found

    def _solved(self, v: np.ndarray, damping: float) -> np.ndarray:
        damped = LinearOperator(
            self.shape, matvec=lambda x: self._matvec(x) + damping * np.ravel(x), dtype="f8"
        )
        found = np.empty_like(v)
        for m in range(v.shape[1]):
            found[:, m], failed = cg(damped, v[:, m], rtol=_RESIDUAL, atol=0)
            if failed:
                raise NotConvergedError(
                    f"Conjugate gradients did not reach a residual of {_RESIDUAL:g} in {failed} "
                    "steps: choose a larger damping, low_rank() or an approximate form."
                )
        return found
