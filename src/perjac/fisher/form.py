"""What every form of the Fisher information answers. A SciPy operator, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator

from perjac._core.backend import memory
from perjac.errors import InputError, NotPositiveError, check_counts
from perjac.fisher._columns import Columns
from perjac.fisher.stochastic import SpectralDensity


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
    reduction : {"mean", "sum"}
        Whether it was divided by N.
    """

    def __init__(self, columns: Columns, examples: int, reduction: str = "mean"):
        self.columns, self.examples, self.reduction = columns, examples, reduction
        super().__init__(np.dtype("f8"), (columns.count, columns.count))

    @property
    def keys(self) -> tuple[str, ...]:
        """The weights, in the order of the P numbers."""
        return self.columns.keys

    def apply(self, v: Any, damping: float = 0.0) -> Any:
        """Return (F + damping·I) v, for v (P,) or (P, m), or a mapping of key to array."""
        check_damping(damping)
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
        """Return draws from the normal distribution N(0, (F + damping·I)⁻¹), (count, P).

        A draw is (F + damping·I)^(-1/2) z, so that one seed gives the same draws in every form of
        one matrix.
        """
        check_damping(damping)
        check_counts(count=count)
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
        check_damping(damping, above=True)
        values = np.maximum(self.eigenvalues(), 0)
        return float(np.sum(values / (values + damping)))

    def spectral_density(self) -> SpectralDensity:
        """Return how the eigenvalues are spread, all of them."""
        values = self.eigenvalues()[None]
        return SpectralDensity(values, np.full(values.shape, 1 / values.size), values.size)

    def to_numpy(self) -> np.ndarray:
        """Return the matrix, (P, P).

        Raises
        ------
        TooLargeError
            If that does not fit into memory.
        """
        count = self.columns.count
        memory.check(
            2 * 8 * count**2, None, f"The matrix ({count}, {count})",
            "Ask for products, solutions, eigenvalues or the diagonal.",
        )  # fmt: skip
        return self._products(np.eye(count))

    def _joined(self, other: Form) -> tuple[int, float, float]:
        """Return N of both forms, and what each counts for in their sum.

        Raises
        ------
        InputError
            If they are not of one kind, weights and reduction.
        """
        if type(other) is not type(self) or other.columns != self.columns:
            raise InputError(f"Expected the same form of the same weights. Received: {other!r}.")
        if other.reduction != self.reduction:
            raise InputError(
                f"Expected reduction={self.reduction!r}, as here. Received: a form with "
                f"{other.reduction!r}."
            )
        total = self.examples + other.examples
        if self.reduction == "sum":
            return total, 1.0, 1.0
        return total, self.examples / total, other.examples / total

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


def check_damping(damping: Any, above: bool = False) -> None:
    """Raise for what is no finite number of 0 or more, or `above` it."""
    number = isinstance(damping, (int, float, np.number)) and not isinstance(damping, bool)
    if not (number and 0 <= damping < np.inf and (damping or not above)):
        wanted = "above 0" if above else "of 0 or more"
        raise InputError(f"Expected damping= as a number {wanted}. Received: {damping!r}.")


def checked(values: np.ndarray, damping: float) -> np.ndarray:
    """Return eigenvalues plus damping.

    Raises
    ------
    NotPositiveError
        If one is not above the rounding of the largest.
    """
    largest = float(values.max(initial=0.0))
    shifted = np.maximum(values, 0) + damping
    rounding = len(values) * np.finfo("f8").eps * largest  # as in NumPy's matrix_rank
    if shifted.size and shifted.min() <= rounding:
        raise NotPositiveError(
            f"F + damping·I is singular: its eigenvalues go from {shifted.min():.3g} to "
            f"{largest + damping:.3g}. Choose damping above {10 * rounding + 1e-300:.1g}."
        )
    return shifted
