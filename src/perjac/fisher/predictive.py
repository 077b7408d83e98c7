"""What a Laplace approximation says about new examples. Knows outputs and their variances alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.special

from perjac.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Predictive:
    """The predictive distribution of a linearised model, at B examples.

    The outputs f are normal about the model's own, with a variance that the weights' spread
    gives them; labels spread about the outputs as the likelihood says.

    Attributes
    ----------
    likelihood : str
        "categorical", "bernoulli" or "gaussian".
    outputs : array (B, *output_shape)
        The mean of f: what the model gives. Logits of classes.
    variance : array (B, *output_shape)
        The variance of f.
    noise : float
        The Gaussian's variance of labels about f; 0 for classes.
    covariance : array (B, K, K) or None
        Of all K entries of an example's f, where it was asked for.
    """

    likelihood: str
    outputs: np.ndarray
    variance: np.ndarray
    noise: float = 0.0
    covariance: np.ndarray | None = None

    @property
    def mean(self) -> np.ndarray:
        """The labels' mean, (B, *output_shape): the outputs, or the classes' probabilities."""
        return self.outputs if self.likelihood == "gaussian" else self.probabilities

    @property
    def probabilities(self) -> np.ndarray:
        """The probabilities of classes, (B, *output_shape), the weights' spread averaged over.

        The logits are divided by √(1 + π/8 · variance) ahead of the softmax or sigmoid, as a
        probit in place of the sigmoid would be.

        Raises
        ------
        InputError
            If the labels are no classes.

        References
        ----------
        Spiegelhalter and Lauritzen 1990; MacKay 1992, The evidence framework applied to
        classification networks, eq. 10; Lu et al. 2020 for several classes.
        """
        if self.likelihood == "gaussian":
            raise InputError("A Gaussian likelihood has no probabilities of classes: see mean.")
        logits = self.outputs / np.sqrt(1 + np.pi / 8 * self.variance)
        if self.likelihood == "bernoulli":
            return scipy.special.expit(logits)
        return scipy.special.softmax(logits, -1)

    @property
    def label_variance(self) -> np.ndarray:
        """The labels' variance, (B, *output_shape): variance + noise, or p (1 - p) of classes."""
        if self.likelihood == "gaussian":
            return self.variance + self.noise
        p = self.probabilities
        return p * (1 - p)
