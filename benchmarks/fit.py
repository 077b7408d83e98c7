"""How a cost grows with a size: cost = offset + factor · size^exponent."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# An offset this small beside the smallest cost is none: without it, the exponent is known better.
_NOTHING = 1e-3


@dataclasses.dataclass(frozen=True)
class Power:
    """A fitted law.

    Attributes
    ----------
    offset, factor, exponent : float
        Of cost = offset + factor · size^exponent.
    error : float
        The exponent's standard error.
    """

    offset: float
    factor: float
    exponent: float
    error: float

    def __call__(self, sizes: Any) -> np.ndarray:
        """Return the costs that it expects."""
        return self.offset + self.factor * np.asarray(sizes, float) ** self.exponent


def power(sizes: Any, costs: Any) -> Power:
    """Fit by least squares of the logarithms of costs: relative errors count, not absolute ones.

    The offset is what a call costs whatever the size; it cannot be negative. The standard error
    is the usual one, from the curvature at the fit and the scatter about it.

    Parameters
    ----------
    sizes, costs : array (N,)
        Above zero; at least four.
    """
    from scipy.optimize import least_squares

    sizes, logs = np.asarray(sizes, float), np.log(np.asarray(costs, float))
    if len(sizes) < 4:
        raise ValueError(f"Expected at least four sizes. Received: {len(sizes)}.")
    middle = np.exp(np.log(sizes).mean())  # so that factor and exponent do not hang together
    unit = np.exp(logs.min())

    def scatter(found):
        offset, factor, exponent = found if len(found) == 3 else (0.0, *found)
        return np.log(offset + np.exp(factor) * (sizes / middle) ** exponent) - logs + np.log(unit)

    slope, level = np.polyfit(np.log(sizes / middle), logs - np.log(unit), 1)
    without = least_squares(scatter, [level, slope])
    start = [0.5, level, max(slope, 0.1)]
    below = [0.0, -np.inf, -np.inf]
    fitted = least_squares(scatter, start, bounds=(below, np.inf), xtol=1e-12, ftol=1e-12)
    if fitted.x[0] < _NOTHING or fitted.cost > 0.999 * without.cost:
        fitted = without
    offset, level, exponent = fitted.x if len(fitted.x) == 3 else (0.0, *fitted.x)
    free = max(len(sizes) - len(fitted.x), 1)
    spread = np.linalg.pinv(fitted.jac.T @ fitted.jac) * (2 * fitted.cost / free)
    return Power(
        float(offset * unit),
        float(np.exp(level) * unit / middle**exponent),
        float(exponent),
        float(np.sqrt(spread[-1, -1])),
    )
