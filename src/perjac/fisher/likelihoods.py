"""What is known about the labels given the outputs: their Hessians' roots, and draws of them.

Knows outputs (B, *output_shape); must not know models or weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.special
import tensorflow as tf

from perjac._core.backend.dtypes import at_least_float32
from perjac.errors import NotFiniteError, NotPositiveError

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
# A Hessian's negative eigenvalues up to so much of its largest are rounding.
_ROUNDING = 1e-5
_ZERO = tf.UnconnectedGradients.ZERO


def sampled(likelihood: str, outputs: tf.Tensor, samples: int, seed: int, start: int) -> np.ndarray:
    """Return ∂(-log p(ŷ|output))/∂output / √samples at ŷ drawn from the model, (B, S, *out).

    Parameters
    ----------
    likelihood : str
        One of `LIKELIHOODS`; the Gaussian has a variance of 1.
    outputs : tf.Tensor
        (B, *output_shape): logits, or means.
    samples : int
        S.
    seed, start : int
        Draws depend on the seed and on the example's number, which `start` counts from, alone.
    """
    found = np.asarray(outputs, "f8")
    draws = [np.random.default_rng([seed, start + n]) for n in range(len(found))]
    shape = (samples, *found.shape[1:])
    if likelihood == "gaussian":
        slopes = -np.stack([rng.standard_normal(shape) for rng in draws])
    elif likelihood == "bernoulli":
        p = scipy.special.expit(found)[:, None]
        slopes = p - (np.stack([rng.random(shape) for rng in draws]) < p)
    else:
        p = scipy.special.softmax(found, -1)[:, None]
        level = np.stack([rng.random((*shape[:-1], 1)) for rng in draws])
        drawn = np.argmax(np.cumsum(p, -1) > level * p.sum(-1, keepdims=True), -1)
        slopes = p - np.eye(p.shape[-1])[drawn]
    return slopes / math.sqrt(samples)


def hessians(losses: Callable, outputs: tf.Tensor, labels: Any) -> tf.Tensor:
    """Return the Hessian of each example's loss by its own output, (B, entries, entries).

    Parameters
    ----------
    losses : callable
        Outputs (B, *output_shape) and labels → the loss of each example (B,).
    outputs : tf.Tensor
        Where; in half precision it is widened.
    labels : nested structure of tensors
        The batch first.
    """
    shape = [-1, *outputs.shape[1:]]
    entries = outputs.shape[1:].num_elements()
    z = tf.cast(tf.reshape(outputs, [-1, entries]), at_least_float32(outputs.dtype))
    with tf.GradientTape() as outer:
        outer.watch(z)
        with tf.GradientTape() as inner:
            inner.watch(z)
            total = tf.reduce_sum(losses(tf.reshape(z, shape), labels))
        slopes = inner.gradient(total, z, unconnected_gradients=_ZERO)
    return outer.batch_jacobian(slopes, z, unconnected_gradients=_ZERO)


def root_of(hessians: Any, start: int, name: str) -> np.ndarray:
    """Return S (B, K, entries) with H_b = Σ_k S[b,k] S[b,k]ᵀ, in float64.

    Parameters
    ----------
    hessians : array (B, entries, entries)
        Of a loss.
    start : int
        The number of the first example, for messages.
    name : str
        The loss's, for messages.

    Raises
    ------
    NotFiniteError
        If there is a NaN or Inf.
    NotPositiveError
        If one has an eigenvalue below zero: the loss is not convex in the output there.
    """
    found = np.asarray(hessians, "f8")
    finite = np.isfinite(found).all((1, 2))
    if not finite.all():
        raise NotFiniteError(
            f"The Hessian of the loss {name!r} by the output is not finite at example "
            f"{start + np.argmin(finite)}: look at its input, its label and the model's output."
        )
    values, vectors = np.linalg.eigh((found + found.transpose(0, 2, 1)) / 2)
    largest = np.abs(values).max(1, initial=0)
    wrong = np.flatnonzero(values.min(1, initial=0) < -_ROUNDING * largest)
    if wrong.size:
        b = wrong[0]
        raise NotPositiveError(
            f"The loss {name!r} is not convex in the output at example {start + b}: its Hessian "
            f"there has eigenvalues from {values[b].min():.3g} to {values[b].max():.3g}. The "
            "generalised Gauss-Newton matrix needs a convex loss; kind='empirical' does not."
        )
    roots = vectors * np.sqrt(np.maximum(values, 0))[:, None]  # (B, entries, K)
    return roots.transpose(0, 2, 1)


def chunks(count: int, most: int) -> list[Sequence[int]]:
    """Return the numbers 0 to count - 1 in runs of at most `most`."""
    return [range(n, min(n + most, count)) for n in range(0, count, most)]
