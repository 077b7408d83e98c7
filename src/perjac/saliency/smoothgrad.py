"""Statistics of the gradient about each example, under Gaussian noise.

The noise of sample s is a function of the seed and of s alone, times the example's σ: all examples
share the draws, so that an example's map is the same alone or among others, in any chunk, and the
first 20 of 50 samples are those that 20 samples would take.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend import host
from perjac._core.backend.shapes import known, size
from perjac.engine import Engine
from perjac.errors import InputError, check_counts, check_one_of
from perjac.saliency._bound import takes_model
from perjac.saliency._moments import Moments
from perjac.saliency._problem import Explained
from perjac.saliency.attribution import Attribution
from perjac.saliency.presets import settle

_EACH = {"signed": tf.identity, "absolute": tf.abs, "squared": tf.square}


@takes_model
def smoothgrad(
    engine: Engine,
    x: Any,
    target: Any = "predicted",
    *,
    wrt: Any = "inputs",
    of: Any = None,
    samples: int | None = None,
    sigma: float | None = None,
    relative: bool | None = None,
    each: str | None = None,
    seed: int = 0,
    convention: str | None = None,
) -> Attribution:
    """Return the gradient's mean over inputs with Gaussian noise.

    Parameters
    ----------
    engine, x, target, wrt, of
        As in `gradient`.
    samples : int, optional
        Draws for each example; 50 by default.
    sigma : float, optional
        The noise's standard deviation; 0.15 by default.
    relative : bool, optional
        Whether sigma is a share of each example's max - min, for each input; it is by default.
    each : {"signed", "absolute", "squared"}, optional
        What is averaged; "signed" by default.
    seed : int
        Of the draws. Sample s takes the same draw in every example, in any chunk and however many
        samples there are.
    convention : {"captum", "xplique", "pair", "tf-keras-vis", "zennit"}, optional
        Another library's defaults, in place of ours; what is given explicitly wins.

    Returns
    -------
    Attribution
        `values` of shape (B, *input_shape), (B, C, *input_shape) for "all"; `standard_error`, of
        the same shape.

    Raises
    ------
    InputError
        If an option cannot be used.

    Notes
    -----
    Costs samples·B forward and backward passes, in chunks that fit into memory; "all" shares the
    forward ones, and the draws, among the outputs.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softplus")])
    >>> x = np.arange(8, dtype="float32").reshape(2, 4)
    >>> att = pj.saliency.smoothgrad(pj.Engine(model), x, target="all", samples=10)
    >>> att.values.shape, att.standard_error.shape
    (TensorShape([2, 3, 4]), TensorShape([2, 3, 4]))

    References
    ----------
    Smilkov et al. 2017, SmoothGrad: removing noise by adding noise, section 3.
    """
    given = {"samples": samples, "sigma": sigma, "relative": relative, "each": each}
    chosen = settle("smoothgrad", convention, **given)
    return _mean("smoothgrad", Explained(engine, x, target, wrt, of), chosen, seed)


@takes_model
def smoothgrad_squared(
    engine: Engine,
    x: Any,
    target: Any = "predicted",
    *,
    wrt: Any = "inputs",
    of: Any = None,
    samples: int | None = None,
    sigma: float | None = None,
    relative: bool | None = None,
    seed: int = 0,
    convention: str | None = None,
) -> Attribution:
    """Return the mean of the squared gradient over inputs with Gaussian noise.

    Parameters
    ----------
    engine, x, target, wrt, of, samples, sigma, relative, seed, convention
        As in `smoothgrad`.

    Returns
    -------
    Attribution
        `values` of shape (B, *input_shape), (B, C, *input_shape) for "all"; `standard_error`, of
        the same shape.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softplus")])
    >>> x = np.arange(8, dtype="float32").reshape(2, 4)
    >>> pj.saliency.smoothgrad_squared(pj.Engine(model), x, samples=10).values.shape
    TensorShape([2, 4])

    References
    ----------
    Hooker et al. 2019, A Benchmark for Interpretability Methods in Deep Neural Networks.
    """
    method = "smoothgrad_squared"
    given = {"samples": samples, "sigma": sigma, "relative": relative}
    chosen = settle(method, convention, **given) | {"each": "squared"}
    return _mean(method, Explained(engine, x, target, wrt, of), chosen, seed)


@takes_model
def vargrad(
    engine: Engine,
    x: Any,
    target: Any = "predicted",
    *,
    wrt: Any = "inputs",
    of: Any = None,
    samples: int | None = None,
    sigma: float | None = None,
    relative: bool | None = None,
    seed: int = 0,
    convention: str | None = None,
) -> Attribution:
    """Return the gradient's variance over inputs with Gaussian noise: unbiased, never negative.

    Parameters
    ----------
    engine, x, target, wrt, of, samples, sigma, relative, seed, convention
        As in `smoothgrad`.

    Returns
    -------
    Attribution
        `values` of shape (B, *input_shape), (B, C, *input_shape) for "all".

    Notes
    -----
    Σ(g - mean)² / (n - 1), as Adebayo et al. have it; Captum and Xplique divide by n.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softplus")])
    >>> x = np.arange(8, dtype="float32").reshape(2, 4)
    >>> pj.saliency.vargrad(pj.Engine(model), x, samples=10).values.shape
    TensorShape([2, 4])

    References
    ----------
    Adebayo et al. 2018, Sanity Checks for Saliency Maps, appendix A.
    """
    given = {"samples": samples, "sigma": sigma, "relative": relative}
    chosen = settle("vargrad", convention, **given)
    check_counts(2, samples=chosen["samples"])
    explained = Explained(engine, x, target, wrt, of)
    moments = _moments(explained, chosen | {"each": "signed"}, seed)
    return explained.attribution("vargrad", moments.variances(), facts=chosen | {"seed": seed})


def _mean(method: str, explained: Explained, chosen: dict[str, Any], seed: int) -> Attribution:
    """Return the answer of a method that averages."""
    moments = _moments(explained, chosen, seed)
    errors = moments.standard_errors() if chosen["samples"] > 1 else None
    return explained.attribution(
        method,
        moments.means(),
        standard_error=errors,
        facts=chosen | {"seed": seed},
    )


def _moments(explained: Explained, chosen: dict[str, Any], seed: int) -> Moments:
    """Return mean and variance of the gradient, or of what is made of it, (B, M, *shape) each."""
    samples = _checked(chosen)
    make = _EACH[chosen["each"]]
    scales = [_scale(x, chosen) for x in explained.values]
    shapes = [known(x.shape[1:]) for x in explained.values]
    moments = Moments(explained.size)
    for numbers in explained.chunks(explained.size * samples):
        s, owners = np.divmod(numbers, explained.size)
        there, local = np.unique(s, return_inverse=True)
        points = [
            tf.gather(x, owners) + tf.gather(scale, owners) * tf.cast(tf.gather(z, local), x.dtype)
            for x, scale, z in zip(
                explained.values, scales, draws(seed, there, shapes), strict=True
            )
        ]
        moments.add([make(g) for g in explained.at(points, owners)[1]], owners)
    return moments


def draws(seed: int, samples: np.ndarray, shapes: list[tuple[int, ...]]) -> list[tf.Tensor]:
    """Return the standard normal noise of these samples, (n, *shape) for each input."""
    if not len(samples):
        return [tf.zeros([0, *shape]) for shape in shapes]
    sizes = [size(shape) for shape in shapes]
    keys = np.stack(np.broadcast_arrays(np.int64(seed), samples), 1)
    flat = _normal(tf.constant(keys), tf.constant(sum(sizes)))
    return [
        tf.reshape(part, [-1, *shape])
        for part, shape in zip(tf.split(flat, sizes, axis=1), shapes, strict=True)
    ]


@host.compiled
def _normal(keys: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Return normal numbers (n, count) in float32, a row for each of keys (n, 2)."""
    return tf.map_fn(  # 50 calls one by one take 15 ms, this takes 2
        lambda key: tf.random.stateless_normal(tf.reshape(count, [1]), key),
        keys,
        fn_output_signature=tf.TensorSpec([None], tf.float32),
    )


def _scale(x: tf.Tensor, chosen: dict[str, Any]) -> tf.Tensor:
    """Return each example's σ, shaped to multiply its noise."""
    axes = list(range(1, x.shape.rank))
    sigma = tf.constant(chosen["sigma"], x.dtype)
    spread = tf.reduce_max(x, axes, keepdims=True) - tf.reduce_min(x, axes, keepdims=True)
    return sigma * spread if chosen["relative"] else sigma * tf.ones_like(spread)


def _checked(chosen: dict[str, Any]) -> int:
    """Return how many samples, after a look at the options."""
    check_counts(samples=chosen["samples"])
    if not chosen["sigma"] >= 0:
        raise InputError(f"Expected sigma= 0 or more. Received: {chosen['sigma']!r}.")
    check_one_of(chosen["each"], tuple(_EACH), "each")
    return int(chosen["samples"])
