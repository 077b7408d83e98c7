"""Integrals of the gradient as blurred images come into focus."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend.shapes import known
from perjac.engine import Engine
from perjac.errors import InputError, check_one_of
from perjac.saliency._baselines import lacking
from perjac.saliency._bound import takes_model
from perjac.saliency._moments import beside
from perjac.saliency._problem import Explained
from perjac.saliency._quadrature import quadrature
from perjac.saliency.attribution import Attribution
from perjac.saliency.integrated_gradients import integral
from perjac.saliency.presets import settle

# By default the widest blur is this share of an image's longest side: 56 of 224.
_SHARE = 0.25


@takes_model
def blur_ig(
    engine: Engine,
    x: Any,
    target: Any = "predicted",
    *,
    wrt: Any = "inputs",
    of: Any = None,
    steps: int | None = None,
    max_sigma: float | None = None,
    rule: str | None = None,
    spacing: str | None = None,
    convention: str | None = None,
) -> Attribution:
    """Return the gradient integrated as the example goes from blurred to sharp.

    With L(σ) the example blurred by a Gaussian of standard deviation σ, the values are
    -∫₀^max_sigma ∂f/∂x(L(σ)) · dL/dσ dσ, and add up to f(x) - f(L(max_sigma)).

    Parameters
    ----------
    engine : Engine
        The model.
    x : array (B, *spatial, channels), or list, tuple or dict of arrays
        Sequences, images or volumes, channels last.
    target, wrt, of
        As in `gradient`.
    steps : int, optional
        Places on the path; 50 by default.
    max_sigma : float, optional
        In pixels; by default a quarter of the longest side.
    rule : str, optional
        As in `integrated_gradients`, "gausslegendre" by default.
    spacing : {"square", "linear"}, optional
        σ = max_sigma·u², which looks more closely where the image is nearly sharp, by default; or
        max_sigma·u, for u from 0 to 1.
    convention : "pair", optional
        That library's 100 left steps, linearly up to σ = 50; it also differs by less than 1 % in
        its kernels, cut off at 4σ, and in taking differences for dL/dσ.

    Returns
    -------
    Attribution
        `values` of shape (B, *input_shape), (B, C, *input_shape) for "all"; `delta`, (B,) or
        (B, C).

    Raises
    ------
    InputError
        If an input has not one to three spatial axes and channels, or an option cannot be used.

    Notes
    -----
    The kernel is exp(-d²/2σ²) over its sum on all integers d, without a cut; beyond its edge an
    image is 0. dL/dσ is exact.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([
    ...     keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, activation="tanh"),
    ...     keras.layers.Flatten(), keras.layers.Dense(5)])
    >>> pj.saliency.blur_ig(pj.Engine(model), np.ones((2, 8, 8, 3), "float32")).values.shape
    TensorShape([2, 8, 8, 3])

    References
    ----------
    Xu et al. 2020, Attribution in Scale and Space, eq. 7.
    """
    given = {"steps": steps, "max_sigma": max_sigma, "rule": rule, "spacing": spacing}
    chosen = settle("blur_ig", convention, **given)
    check_one_of(chosen["spacing"], ("square", "linear"), "spacing")
    if chosen["max_sigma"] is not None and not chosen["max_sigma"] > 0:
        raise InputError(f"Expected max_sigma= above 0. Received: {chosen['max_sigma']!r}.")
    explained = Explained(engine, x, target, wrt, of)
    for name, value in zip(explained.names, explained.values, strict=True):
        if not 3 <= value.shape.rank <= 5:
            raise InputError(
                f"Expected input {name!r} of shape (B, *spatial, channels), with one to three "
                f"spatial axes. Received: {tuple(value.shape)}. Choose others by wrt=."
            )
    widest = [
        chosen["max_sigma"] or _SHARE * max(known(value.shape[1:-1])) for value in explained.values
    ]
    square = chosen["spacing"] == "square"

    def focus(owners: np.ndarray, u: np.ndarray) -> list[tf.Tensor]:
        points, rates = [], []
        different, local = np.unique(u, return_inverse=True)
        for value, end in zip(explained.values, widest, strict=True):
            sigmas = end * (different**2 if square else different)
            pace = end * (2 * u if square else np.ones_like(u))  # dσ/du
            blurred, rate = _blur(tf.gather(value, owners), sigmas, local)
            points.append(blurred)
            rates.append(rate * beside(pace, rate))
        gradients = explained.at(points, owners)[1]
        return [-g * tf.expand_dims(r, 1) for g, r in zip(gradients, rates, strict=True)]

    examples = np.arange(explained.size)
    values = integral(explained, examples, quadrature(chosen["rule"], chosen["steps"]), focus)
    start = [
        _blur(value, np.array([end]), np.zeros(explained.size, int))[0]
        for value, end in zip(explained.values, widest, strict=True)
    ]
    return explained.attribution(
        "blur_ig",
        values,
        delta=lacking(values, explained.rise(start)),
        facts=chosen | {"max_sigma": widest[0] if len(widest) == 1 else widest},
    )


def _blur(x: tf.Tensor, sigmas: np.ndarray, which: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
    """Return x (N, *spatial, channels) blurred by σ = sigmas[which], and its derivative in σ.

    Axis by axis, by the product rule: (v, v') becomes (K v, K' v + K v').
    """
    value, rate = x, tf.zeros_like(x)
    for axis, length in enumerate(known(x.shape[1:-1]), 1):
        both = _kernels(length, sigmas)
        kernels, slopes = (tf.gather(tf.constant(k, x.dtype), which) for k in both)
        rate = _apply(slopes, value, axis) + _apply(kernels, rate, axis)
        value = _apply(kernels, value, axis)
    return value, rate


def _apply(matrices: tf.Tensor, x: tf.Tensor, axis: int) -> tf.Tensor:
    """Return Σ_j K[n, i, j] x[n, …, j, …] along an axis."""
    letters = "abcdefgh"[: x.shape.rank]
    j = letters[axis]
    return tf.einsum(f"{letters[0]}z{j},{letters}->{letters.replace(j, 'z')}", matrices, x)


def _kernels(length: int, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return K (n, length, length), K_ij = exp(-(i - j)²/2σ²) / Σ_d exp(-d²/2σ²), and dK/dσ."""
    apart = np.subtract.outer(np.arange(length), np.arange(length)) ** 2
    kernels, slopes = (np.zeros((len(sigmas), length, length)) for _ in range(2))
    for n, sigma in enumerate(sigmas):
        if sigma < 0.02:  # exp(-1/2σ²) is 0 in float64: nothing is blurred
            kernels[n] = np.eye(length)
            continue
        d2 = np.arange(-int(40 * sigma) - 2, int(40 * sigma) + 3) ** 2
        all_weights = np.exp(-d2 / (2 * sigma**2))
        weights = np.exp(-apart / (2 * sigma**2)) / all_weights.sum()
        kernels[n] = weights
        slopes[n] = weights * (apart - (all_weights @ d2) / all_weights.sum()) / sigma**3
    return kernels, slopes
