"""F as an operator that is never formed: its products are Jᵀ(J v), batch by batch."""

from __future__ import annotations

import numpy as np

from perjac.errors import InputError
from perjac.fisher import stochastic
from perjac.fisher._of_rows import OfRows
from perjac.fisher.form import check_damping
from perjac.fisher.lanczos import conjugate_gradients, inverse_root, largest_of
from perjac.fisher.stochastic import Estimate, SpectralDensity

# A solution's residual, relative to what is solved for.
_RESIDUAL = 1e-10


class Implicit(OfRows):
    """The exact Fisher information, by products alone.

    Products, the trace, the diagonal, solutions and the largest eigenvalues are exact up to
    rounding; what asks for all eigenvalues is estimated, and tells how well.
    """

    def trace(self) -> float:
        """Return the sum of the eigenvalues, which is that of the rows' squared norms."""
        total = sum(np.sum(np.square(np.asarray(rows.norms(), "f8"))) for rows in self._rows)
        return float(self._scale * total)

    def eigsh(self, k: int = 6) -> tuple[np.ndarray, np.ndarray]:
        """Return the k largest eigenvalues, the largest first, and their vectors, by Lanczos.

        Raises
        ------
        NotConvergedError
            If it does not find them.
        """
        if not 1 <= k < self.columns.count:
            raise InputError(f"Expected k= from 1 to {self.columns.count - 1}. Received: {k!r}.")
        return largest_of(self, k)

    def eigenvalues(self) -> np.ndarray:
        """Refuse: products do not give all eigenvalues.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError(
            "An operator does not know all its eigenvalues: choose eigsh(k), spectral_density(), "
            "or another form."
        )

    def logdet(
        self, damping: float = 0.0, probes: int = 10, steps: int = 50, deflate: int = 0,
        seed: int = 0,
    ) -> Estimate:  # fmt: skip
        """Estimate log det(F + damping·I), as `estimates.stochastic_logdet` does.

        Raises
        ------
        InputError
            If damping is not above zero.
        """
        return stochastic.stochastic_logdet(self, damping, probes, steps, deflate, seed)

    def effective_dimension(
        self, damping: float, probes: int = 10, steps: int = 50, deflate: int = 0, seed: int = 0
    ) -> Estimate:
        """Estimate Σ_i λ_i / (λ_i + damping), as `estimates.stochastic_effective_dimension` does.

        Raises
        ------
        InputError
            If damping is not above zero.
        """
        return stochastic.stochastic_effective_dimension(
            self, damping, probes, steps, deflate, seed
        )

    def spectral_density(self, probes: int = 10, steps: int = 50, seed: int = 0) -> SpectralDensity:
        """Estimate how the eigenvalues are spread, as `estimates.spectral_density` does."""
        return stochastic.spectral_density(self, probes, steps, seed)

    def sample(self, count: int = 1, damping: float = 0.0, seed: int = 0) -> np.ndarray:
        """Return draws from the normal distribution N(0, (F + damping·I)⁻¹), (count, P).

        Each is (F + damping·I)^(-1/2) z by Lanczos, within 1e-8 of its length.

        Raises
        ------
        InputError
            If damping is not above zero.
        NotConvergedError
            If Lanczos takes more than 2,000 steps.
        """
        check_damping(damping, above=True)
        return super().sample(count, damping, seed)

    def _solved(self, v: np.ndarray, damping: float) -> np.ndarray:
        return conjugate_gradients(lambda x: self._products(x) + damping * x, v, _RESIDUAL)

    def _spread(self, z: np.ndarray, damping: float) -> np.ndarray:
        return np.stack([inverse_root(self, column, damping) for column in z.T], 1)
