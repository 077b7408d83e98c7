"""What is known about the labels given the outputs: their Hessians' roots, and draws of them.

Knows outputs (B, *output_shape); must not know models or weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.special
import tensorflow as tf

from perjac.errors import NotPositiveError

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
# A Hessian's negative eigenvalues up to so much of its largest are rounding.
_ROUNDING = 1e-5


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


def root_of_hessian(losses: Any, outputs: tf.Tensor, start: int, name: str) -> tf.Tensor:
    """Return S (B, K, *output_shape) with H_b = Σ_k S[b,k] S[b,k]ᵀ, of a loss's Hessians.

    Parameters
    ----------
    losses : callable
        Outputs (B, *output_shape) → the loss of each example (B,).
    outputs : tf.Tensor
        Where.
    start : int
        The number of the first example, for messages.
    name : str
        The loss's, for messages.

    Raises
    ------
    NotPositiveError
        If a Hessian has an eigenvalue below zero: the loss is not convex in the output there.
    """
    hessians = np.asarray(_hessians(losses, outputs), "f8")
    hessians = (hessians + hessians.transpose(0, 2, 1)) / 2
    values, vectors = np.linalg.eigh(hessians)
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
    return tf.cast(
        tf.reshape(roots.transpose(0, 2, 1), [len(roots), -1, *outputs.shape[1:]]), outputs.dtype
    )


def _hessians(losses: Any, outputs: tf.Tensor) -> tf.Tensor:
    """Return the Hessian of each example's loss by its own output, (B, entries, entries)."""
    entries = outputs.shape[1:].num_elements()
    flat = tf.reshape(outputs, [-1, entries])

    @tf.function(autograph=False)
    def second(z: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as outer:
            outer.watch(z)
            with tf.GradientTape() as inner:
                inner.watch(z)
                total = tf.reduce_sum(losses(tf.reshape(z, [-1, *outputs.shape[1:]])))
            slopes = inner.gradient(total, z, unconnected_gradients="zero")
        return outer.batch_jacobian(slopes, z, unconnected_gradients="zero")

    return second(flat)


def chunks(count: int, most: int) -> list[Sequence[int]]:
    """Return the numbers 0 to count - 1 in runs of at most `most`."""
    return [range(n, min(n + most, count)) for n in range(0, count, most)]
