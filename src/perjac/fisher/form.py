"""What every form of the Fisher information answers. A SciPy operator, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator

from perjac.errors import InputError, NotPositiveError
from perjac.fisher.columns import Columns


class Form(LinearOperator):
    """A symmetric positive semi-definite matrix F, (P, P), in one of its forms.

    Every form is a `scipy.sparse.linalg.LinearOperator`: `F @ v`, `F.matvec(v)`, and any of SciPy's
    solvers take it. Vectors are flat, (P,), in the order of `keys`; `solve` and `apply` also take,
    and then return, a mapping of key to array.

    Attributes
    ----------
    columns : Columns
        Which number belongs to which weight.
    examples : int
        N, of how many examples it is made.
    """

    def __init__(self, columns: Columns, examples: int):
        self.columns, self.examples = columns, examples
        super().__init__(np.dtype("f8"), (columns.count, columns.count))

    @property
    def keys(self) -> tuple[str, ...]:
        """The weights, in the order of the P numbers."""
        return self.columns.keys

    def apply(self, v: Any, damping: float = 0.0) -> Any:
        """Return (F + damping·I) v, for v (P,) or (P, m), or a mapping of key to array."""
        flat = self.columns.flat(v)
        found = self._products(flat.reshape(len(flat), -1)).reshape(flat.shape) + damping * flat
        return self.columns.like(found, v)

    def solve(self, v: Any, damping: float = 0.0) -> Any:
        """Return (F + damping·I)⁻¹ v.

        Parameters
        ----------
        v : array (P,) or (P, m), or mapping of key to array
            What is solved for; names left out of a mapping count as zero.
        damping : float
            Added to every eigenvalue.

        Raises
        ------
        NotPositiveError
            If F + damping·I is singular, or damping is negative.
        """
        check_damping(damping)
        flat = self.columns.flat(v)
        found = self._solved(flat.reshape(len(flat), -1), float(damping)).reshape(flat.shape)
        return self.columns.like(found, v)

    def sample(self, count: int = 1, damping: float = 0.0, seed: int = 0) -> np.ndarray:
        """Return draws from the normal distribution N(0, (F + damping·I)⁻¹), (count, P)."""
        check_damping(damping)
        z = np.random.default_rng(seed).standard_normal((count, self.columns.count))
        return self._spread(z.T, float(damping)).T

    def trace(self) -> float:
        """Return the sum of the eigenvalues."""
        raise NotImplementedError

    def logdet(self, damping: float = 0.0) -> float:
        """Return log det(F + damping·I).

        Raises
        ------
        NotPositiveError
            If that is singular.
        """
        raise NotImplementedError

    def diagonal(self) -> np.ndarray:
        """Return the diagonal, (P,)."""
        raise NotImplementedError

    def eigenvalues(self) -> np.ndarray:
        """Return all P eigenvalues, the smallest first."""
        raise NotImplementedError

    def eigsh(self, k: int = 6) -> tuple[np.ndarray, np.ndarray]:
        """Return the k largest eigenvalues, the largest first, and their vectors (P, k)."""
        raise NotImplementedError

    def effective_dimension(self, damping: float) -> float:
        """Return Σ_i λ_i / (λ_i + damping): how many directions the data determines.

        References
        ----------
        MacKay 1992, Bayesian interpolation: γ, the number of well-determined parameters.
        """
        check_damping(damping, least=np.finfo("f8").tiny)
        values = np.maximum(self.eigenvalues(), 0)
        return float(np.sum(values / (values + damping)))

    def to_numpy(self) -> np.ndarray:
        """Return the matrix, (P, P)."""
        return self._products(np.eye(self.columns.count))

    def _products(self, v: np.ndarray) -> np.ndarray:
        """Return F v for v (P, m)."""
        raise NotImplementedError

    def _solved(self, v: np.ndarray, damping: float) -> np.ndarray:
        """Return (F + damping·I)⁻¹ v for v (P, m)."""
        raise NotImplementedError

    def _spread(self, z: np.ndarray, damping: float) -> np.ndarray:
        """Return R z for z (P, m), with R Rᵀ = (F + damping·I)⁻¹."""
        raise NotImplementedError

    def _matvec(self, v: np.ndarray) -> np.ndarray:
        return self._products(np.asarray(v, "f8").reshape(-1, 1))[:, 0]

    def _matmat(self, v: np.ndarray) -> np.ndarray:
        return self._products(np.asarray(v, "f8"))

    def _adjoint(self) -> Form:
        return self


def check_damping(damping: Any, least: float = 0.0) -> None:
    """Raise for what is no number of at least `least`."""
    if not isinstance(damping, (int, float, np.number)) or not damping >= least:
        raise InputError(f"Expected damping= as a number of 0 or more. Received: {damping!r}.")


def checked(values: np.ndarray, damping: float) -> np.ndarray:
    """Return eigenvalues plus damping.

    Raises
    ------
    NotPositiveError
        If one is not above the rounding of the largest.
    """
    largest = float(values.max(initial=0.0))
    shifted = np.maximum(values, 0) + damping
    if shifted.size and shifted.min() <= 4 * np.finfo("f8").eps * largest:
        raise NotPositiveError(
            f"F + damping·I is singular: its eigenvalues go from {shifted.min():.3g} to "
            f"{largest + damping:.3g}. Choose damping above {1e-12 * largest + 1e-300:.1g}."
        )
    return shifted
