"""F = scale · GᵀG through the Gram matrix of its M rows, which has the same spectrum."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import scipy.linalg

from perjac.errors import InputError, NotPositiveError
from perjac.fisher._of_rows import OfRows
from perjac.fisher._products import pulled, pushed, row_count
from perjac.fisher.form import check_damping

# Eigenvalues of the Gram matrix below so much of the largest are its rounding, in float64.
_NOTHING = 1e-13


class LowRank(OfRows):
    """The exact Fisher information, with nothing of size (P, P) formed.

    With G (M, P) the rows and G Gᵀ = U diag(μ) Uᵀ their Gram matrix, F has the eigenvalues
    scale·μ, the vectors Gᵀ U / √μ, and P - M zeros.
    """

    @functools.cached_property
    def _spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """The nonzero eigenvalues of F, and the Gram matrix's vectors for them, (M, r)."""
        counts = self._counts
        ends = np.cumsum([0, *counts])
        gram = np.empty((ends[-1], ends[-1]))
        for i, mine in enumerate(self._rows):
            for j, theirs in enumerate(itertools.islice(self._rows, i + 1)):
                block = np.asarray(mine.gram(theirs), "f8").reshape(counts[i], counts[j])
                here, there = slice(ends[i], ends[i + 1]), slice(ends[j], ends[j + 1])
                gram[here, there], gram[there, here] = block, block.T
        values, vectors = scipy.linalg.eigh(gram, overwrite_a=True)
        rounding = max(_NOTHING, len(values) * np.finfo("f8").eps)
        kept = values > rounding * max(values.max(initial=0), np.finfo("f8").tiny)
        return self._scale * values[kept], vectors[:, kept]

    @property
    def _counts(self) -> list[int]:
        """How many rows each part has."""
        return [row_count(part) for part in self._rows]

    @property
    def rank(self) -> int:
        """How many eigenvalues are not zero."""
        return len(self._spectrum[0])

    def merge(self, other: LowRank) -> LowRank:
        """Return the form of both forms' examples together.

        Parameters
        ----------
        other : LowRank
            Of the same weights, kind and likelihood, on other examples.
        """
        total, mine, theirs = self._joined(other)
        if not math.isclose(mine * self._scale, theirs * other._scale, rel_tol=1e-12):
            raise InputError(
                "Expected the same kind and likelihood, whose rows count alike. Received: rows "
                f"that count {theirs * other._scale / (mine * self._scale):.6g} times as much."
            )
        rows = [*self._rows, *other._rows]
        return LowRank(self.columns, total, rows, mine * self._scale, self.reduction)

    def trace(self) -> float:
        """Return the sum of the eigenvalues."""
        return float(self._spectrum[0].sum())

    def logdet(self, damping: float = 0.0) -> float:
        """Return log det(F + damping·I)."""
        check_damping(damping)
        values = self._spectrum[0]
        zeros = self._zeros(damping)
        return float(np.log(values + damping).sum() + (zeros * np.log(damping) if zeros else 0))

    def eigenvalues(self) -> np.ndarray:
        """Return all P eigenvalues, the smallest first."""
        values = self._spectrum[0]
        return np.concatenate([np.zeros(self.columns.count - len(values)), values])

    def effective_dimension(self, damping: float) -> float:
        """Return Σ_i λ_i / (λ_i + damping)."""
        check_damping(damping, above=True)
        values = self._spectrum[0]
        return float(np.sum(values / (values + damping)))

    def eigsh(self, k: int = 6) -> tuple[np.ndarray, np.ndarray]:
        """Return the k largest eigenvalues, the largest first, and their vectors (P, k)."""
        values, vectors = self._spectrum
        if not 1 <= k <= len(values):
            raise InputError(
                f"Expected k= from 1 to {len(values)}, the rank that these rows give F. "
                f"Received: {k!r}."
            )
        chosen = np.argsort(values)[::-1][:k]
        found = self._pulled(vectors[:, chosen])
        return values[chosen], found / np.linalg.norm(found, axis=0)

    def _zeros(self, damping: float) -> int:
        """Return how many eigenvalues are zero; raise if some are and damping is too."""
        zeros = self.columns.count - self.rank
        if zeros and damping <= 0:
            raise NotPositiveError(
                f"F is singular: {self.rank} eigenvalues of {self.columns.count} are above zero. "
                "Choose damping above zero."
            )
        return zeros

    def _pushed(self, v: np.ndarray) -> np.ndarray:
        """Return G v, (M, m), for v (P, m)."""
        return np.concatenate([pushed(rows, v) for rows in self._rows])

    def _pulled(self, u: np.ndarray) -> np.ndarray:
        """Return Gᵀ u, (P, m), for u (M, m)."""
        ends = np.cumsum([0, *self._counts])
        found = np.zeros((self.columns.count, u.shape[1]))
        for n, rows in enumerate(self._rows):
            found += pulled(rows, u[ends[n] : ends[n + 1]], self.columns)
        return found

    def _along(self, v: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return Σ_i weights_i λ_i w_i w_iᵀ v, λ and w of F's nonzero eigenvalues.

        With w_i = Gᵀ u_i / √μ_i nothing is divided by a small λ_i.
        """
        vectors = self._spectrum[1]
        inside = weights[:, None] * (vectors.T @ self._pushed(v))  # (r, m)
        return self._scale * self._pulled(vectors @ inside)

    def _solved(self, v: np.ndarray, damping: float) -> np.ndarray:
        values = self._spectrum[0]
        if not damping and not self._zeros(0.0):
            return self._along(v, 1 / (values * (values + damping)))
        # 1/(λ + d) - 1/d, over λ
        return v / damping - self._along(v, 1 / (damping * (values + damping)))

    def _spread(self, z: np.ndarray, damping: float) -> np.ndarray:
        values = self._spectrum[0]
        roots, root = np.sqrt(values + damping), np.sqrt(damping)
        if not damping and not self._zeros(0.0):
            return self._along(z, 1 / (values * roots))
        # 1/√(λ + d) - 1/√d, over λ
        return z / root - self._along(z, 1 / (root * roots * (root + roots)))
