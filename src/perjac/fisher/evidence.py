"""What the labels say: their log-likelihood at the weights, and the evidence for a prior.

Knows numbers alone: eigenvalues, sums over labels; must not know models or forms.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special

from perjac.errors import InputError

# Of the search for a bracket, in logarithms.
_STEP = math.log(16)


@dataclasses.dataclass(frozen=True)
class Fit:
    """How well outputs explain labels, added up over examples.

    Attributes
    ----------
    log_likelihood : float
        Σ log p(y|f) of classes; 0 for the Gaussian, which is made of the others.
    squares : float
        Σ (y - f)² for the Gaussian.
    count : int
        How many numbers were squared.
    """

    log_likelihood: float = 0.0
    squares: float = 0.0
    count: int = 0

    @classmethod
    def of(cls, likelihood: str, outputs: Any, y: Any, start: int = 0) -> Fit:
        """Return the fit of a batch.

        Parameters
        ----------
        likelihood : {"categorical", "bernoulli", "gaussian"}
            How labels spread.
        outputs : array (B, *output_shape)
            Logits, or means.
        y : array
            Numbers of classes (B, *output_shape[:-1]), or probabilities of each class; 0 or 1 for
            each entry; or numbers, of the outputs' shape.
        start : int
            The number of the first example, for messages.

        Raises
        ------
        InputError
            If the labels do not fit.
        """
        f, y = np.asarray(outputs, "f8"), np.asarray(y, "f8")
        if not np.isfinite(y).all():
            raise InputError(
                f"Expected labels without NaN or Inf in the batch that starts at example {start}."
            )
        if likelihood == "categorical":
            return cls(_of_classes(f, y, start))
        if y.size != f.size:
            raise _misfit(f.shape, y, start)
        y = y.reshape(f.shape)
        if likelihood == "gaussian":
            return cls(0.0, float(np.sum((y - f) ** 2)), y.size)
        if y.size and not (y.min() >= 0 and y.max() <= 1):
            raise InputError(
                f"Expected labels from 0 to 1 in the batch that starts at example {start}. "
                f"Received: {y.min():g} to {y.max():g}."
            )
        return cls(float(np.sum(y * f - np.logaddexp(0, f))))

    def __add__(self, other: Fit) -> Fit:
        return Fit(
            self.log_likelihood + other.log_likelihood,
            self.squares + other.squares,
            self.count + other.count,
        )

    def at(self, variance: float) -> float:
        """Return Σ log p(y|f), the Gaussian's with this variance."""
        if not self.count:
            return self.log_likelihood
        return -0.5 * (self.squares / variance + self.count * math.log(2 * math.pi * variance))


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The logarithm of the marginal likelihood, for any prior precision δ and noise variance σ².

    log p(y) = log p(y|θ*) - ½ (δ ‖θ* - μ‖² + Σ_i log(1 + λ_i / (σ² δ))), with λ the eigenvalues of
    the information at σ² = 1. It is concave in (log δ, log σ²), so there is one best pair. Where
    its slopes vanish, with γ = Σ_i λ_i / (λ_i + σ² δ), δ = γ / ‖θ* - μ‖² and
    σ² = Σ (y - f)² / (n - γ).

    Attributes
    ----------
    eigenvalues : array (P,)
        λ.
    distance : float
        ‖θ* - μ‖², μ the prior's mean.
    fit : Fit
        Of the labels.

    References
    ----------
    MacKay 1992, Bayesian interpolation, eq. 2.15 to 2.22.
    """

    eigenvalues: np.ndarray
    distance: float
    fit: Fit

    def at(self, precision: float, variance: float) -> float:
        """Return log p(y)."""
        ratio = float(np.log1p(self.eigenvalues / (variance * precision)).sum())
        return self.fit.at(variance) - 0.5 * (precision * self.distance + ratio)

    def determined(self, precision: float, variance: float) -> float:
        """Return γ, the number of parameters that the data determines."""
        return float(np.sum(self.eigenvalues / (self.eigenvalues + variance * precision)))

    def best(self, precision: float | None, variance: float | None) -> tuple[float, float]:
        """Return (δ, σ²) of the largest evidence, where what is given stays as it is.

        Raises
        ------
        InputError
            If the largest is at zero or infinity.
        """
        if variance is not None:
            return self._precision(variance) if precision is None else precision, variance
        if not self.fit.squares > 0:
            raise InputError("variance='fitted' is zero: the outputs are the labels.")

        def slope(log_variance: float) -> float:
            """n - γ - Σ (y - f)² / σ², which rises with σ²."""
            s = math.exp(log_variance)
            d = self._precision(s) if precision is None else precision
            return self.fit.count - self.determined(d, s) - self.fit.squares / s

        least = math.log(self.fit.squares / self.fit.count)
        variance = math.exp(_root(slope, least, _STEP))
        return self._precision(variance) if precision is None else precision, variance

    def _precision(self, variance: float) -> float:
        """Return the δ of the largest evidence for one σ²."""
        if not self.distance > 0:
            raise InputError(
                "prior_precision='fitted' is infinite: the weights are the prior's mean. Give a "
                "number, or train the model."
            )
        if not self.eigenvalues.max(initial=0) > 0:
            raise InputError(
                "prior_precision='fitted' is zero: the outputs do not depend on the weights at any "
                "example. Give a number."
            )

        def slope(log_precision: float) -> float:
            """δ ‖θ* - μ‖² - γ, which rises with δ."""
            d = math.exp(log_precision)
            return d * self.distance - self.determined(d, variance)

        most = math.log(len(self.eigenvalues) / self.distance)  # γ is at most P
        return math.exp(_root(slope, most, -_STEP))


def _root(slope: Any, start: float, step: float) -> float:
    """Return where a rising function is zero, in the direction of `step` from `start`."""
    start -= step  # at the start itself it may be zero, give or take its rounding
    while (slope(start + step) > 0) != (step > 0):  # both slopes change their sign somewhere
        start += step
    bracket = sorted((start, start + step))
    found = scipy.optimize.root_scalar(slope, bracket=bracket, xtol=1e-13, rtol=1e-14)
    return float(found.root)


def _of_classes(f: np.ndarray, y: np.ndarray, start: int) -> float:
    """Return Σ log softmax(f)[y], of numbers of classes or of their probabilities."""
    logp = scipy.special.log_softmax(f, -1)
    if y.shape == f.shape:
        return float(np.sum(y * logp))
    if y.size != f.size // f.shape[-1]:
        raise _misfit(f.shape[:-1], y, start)
    classes = y.reshape(f.shape[:-1])
    wrong = (classes < 0) | (classes >= f.shape[-1]) | (classes != np.floor(classes))
    if wrong.any():
        place = np.argwhere(wrong)[0]
        raise InputError(
            f"Expected labels as classes from 0 to {f.shape[-1] - 1}. Received: "
            f"{classes[tuple(place)]:g} at example {start + place[0]}."
        )
    chosen = np.take_along_axis(logp, classes.astype("i8")[..., None], -1)
    return float(chosen.sum())


def _misfit(shape: tuple[int, ...], y: np.ndarray, start: int) -> InputError:
    return InputError(
        f"Expected labels of shape {shape} in the batch that starts at example {start}. "
        f"Received: {y.shape}."
    )
