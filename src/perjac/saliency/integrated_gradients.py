"""Integrals of the gradient along straight lines from a baseline, or from a background, to x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend.dtypes import EPSILON
from perjac._core.model import inside_functions
from perjac.engine import Engine
from perjac.errors import InputError, check_counts
from perjac.saliency._baselines import between, by_name, lacking, starts
from perjac.saliency._bound import takes_model
from perjac.saliency._moments import Moments, Sums, beside
from perjac.saliency._problem import Explained
from perjac.saliency._quadrature import quadrature
from perjac.saliency.attribution import Attribution
from perjac.saliency.presets import settle

# Steps after which a path is not refined any further.
_MOST_STEPS = 4096


@takes_model
def integrated_gradients(
    engine: Engine,
    x: Any,
    target: Any = "predicted",
    *,
    wrt: Any = "inputs",
    of: Any = None,
    baseline: Any = None,
    steps: int | None = None,
    rule: str | None = None,
    tolerance: float | None = None,
    convention: str | None = None,
) -> Attribution:
    """Return (x - x') times the gradient averaged on the line from the baseline x' to x.

    Parameters
    ----------
    engine, x, target, wrt, of
        As in `gradient`.
    baseline : number, array (*input_shape) or (B, *input_shape), or dict of these, optional
        x': where the line starts, for all examples or for each; by name for several inputs. 0 by
        default.
    steps : int, optional
        Places on the line; 50 by default.
    rule : str, optional
        "gausslegendre" by default; or "riemann_left", "riemann_right", "riemann_middle",
        "riemann_trapezoid", or PAIR's "endpoint_mean". All weigh the places by a sum of one.
    tolerance : float, optional
        Double the steps of the examples whose |delta| exceeds tolerance·|f(x) - f(x')| until none
        does, or up to 4096 steps.
    convention : {"captum", "xplique", "pair", "zennit"}, optional
        Another library's defaults, in place of ours; what is given explicitly wins.

    Returns
    -------
    Attribution
        `values` of shape (B, *input_shape), (B, C, *input_shape) for "all"; `delta`, their sum less
        f(x) - f(x'), (B,) or (B, C); `facts`: rule, and with a tolerance each example's steps (B,)
        and whether it converged (B,).

    Raises
    ------
    InputError
        If baseline, steps, rule or convention cannot be used.

    Notes
    -----
    Costs steps·B forward and backward passes, in chunks that fit into memory, and B forward ones.
    An example's values do not depend on the chunks or on the other examples, to rounding.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softplus")])
    >>> x = np.ones((2, 4), "float32")
    >>> att = pj.saliency.integrated_gradients(pj.Engine(model), x, target="all")
    >>> att.values.shape, att.delta.shape
    (TensorShape([2, 3, 4]), TensorShape([2, 3]))

    References
    ----------
    Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks, section 3.
    """
    method = "integrated_gradients"
    chosen = settle(method, convention, baseline=baseline, steps=steps, rule=rule)
    explained = Explained(engine, x, target, wrt, of)
    first = starts(chosen["baseline"], explained)
    line = _Line(explained, first, chosen["rule"])
    values, delta = line.values(np.arange(explained.size), chosen["steps"])
    facts = {"rule": chosen["rule"], "steps": chosen["steps"]}
    if tolerance is not None:
        values, delta, more = _refine(line, values, delta, chosen["steps"], tolerance)
        facts |= more
    return explained.attribution(method, values, delta=delta, facts=facts)


class _Line:
    """The straight lines from baselines to examples, and integrals along them."""

    def __init__(self, explained: Explained, first: list[tf.Tensor], rule: str):
        self._explained, self._first, self._rule = explained, first, rule
        self.start = explained.everywhere(first)

    def values(self, examples: np.ndarray, steps: int) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Return these examples' values (n, M, *shape) and delta (n, M), in float64."""
        explained = self._explained

        def gradients(owners: np.ndarray, alphas: np.ndarray) -> list[tf.Tensor]:
            points = [
                between(start, x, owners, alphas)
                for start, x in zip(self._first, explained.values, strict=True)
            ]
            return explained.at(points, owners)[1]

        means = integral(explained, examples, quadrature(self._rule, steps), gradients)
        values = []
        for mean, start, x in zip(means, self._first, explained.values, strict=True):
            apart = tf.cast(x, tf.float64) - tf.cast(start, tf.float64)
            values.append(mean * tf.expand_dims(tf.gather(apart, examples), 1))
        return values, lacking(values, self.rise(examples))

    def rise(self, examples: np.ndarray) -> tf.Tensor:
        """Return f(x) - f(x') of these examples, (n, M), in float64."""
        x, start = (tf.cast(f, tf.float64) for f in (self._explained.at_x, self.start))
        return tf.gather(x - start, examples)

    def floor(self) -> np.ndarray:
        """Return what |delta| cannot be expected to get below, for rounding, (B, M)."""
        largest = np.maximum(np.abs(self._explained.at_x), np.abs(self.start)).astype(float)
        return EPSILON[self.start.dtype] * largest


def _refine(
    line: _Line, values: list[tf.Tensor], delta: tf.Tensor, steps: int, tolerance: float
) -> tuple[list[tf.Tensor], tf.Tensor, dict[str, Any]]:
    """Double the steps of the examples that have not converged, until they have or to the cap."""
    size = len(delta)
    counts = np.full(size, steps)
    rise = np.abs(line.rise(np.arange(size)))
    allowed = tolerance * np.maximum(rise, line.floor())
    while True:
        converged = (np.abs(delta) <= allowed).all(1)
        todo = np.flatnonzero(~converged)
        if not len(todo) or steps * 2 > _MOST_STEPS:
            return values, delta, {"steps": counts, "converged": converged, "tolerance": tolerance}
        steps *= 2
        counts[todo] = steps
        finer, finer_delta = line.values(todo, steps)
        values = [
            tf.tensor_scatter_nd_update(old, todo[:, None], new)
            for old, new in zip(values, finer, strict=True)
        ]
        delta = tf.tensor_scatter_nd_update(delta, todo[:, None], finer_delta)


def integral(
    explained: Explained,
    examples: np.ndarray,
    rule: tuple[np.ndarray, np.ndarray],
    integrand: Callable[[np.ndarray, np.ndarray], list[tf.Tensor]],
) -> list[tf.Tensor]:
    """Return Σ_k w_k g(α_k) of these examples, each (n, ...), in float64.

    Parameters
    ----------
    explained : Explained
        For how many points fit into memory.
    examples : array of int (n,)
        Whose paths.
    rule : (nodes, weights)
        Arrays (K,) each.
    integrand : callable
        (owners (N,), alphas (N,)) -> [g (N, ...)].
    """
    nodes, weights = rule
    sums = Sums(len(examples))
    for numbers in explained.chunks(len(examples) * len(nodes)):
        local, k = np.divmod(numbers, len(nodes))
        terms = integrand(examples[local], nodes[k])
        sums.add(terms, local, weights[k])
    return sums.result()


@takes_model
def expected_gradients(
    engine: Engine,
    x: Any,
    target: Any = "predicted",
    *,
    wrt: Any = "inputs",
    of: Any = None,
    background: Any,
    samples: int | None = None,
    seed: int = 0,
    convention: str | None = None,
) -> Attribution:
    """Return integrated gradients in the mean over baselines drawn from a background.

    Parameters
    ----------
    engine, x, target, wrt, of
        As in `gradient`.
    background : array (n, *input_shape), or dict of these
        Baselines to draw from; by name for several inputs, whose rows belong together.
    samples : int, optional
        Draws of a baseline and of a place on the line from it; 200 by default.
    seed : int
        Of the draws. They depend on it and on the sample's number only: all examples share them,
        and an example's values are the same alone or among others.
    convention : {"shap", "captum"}, optional
        Another library's number of samples.

    Returns
    -------
    Attribution
        `values` of shape (B, *input_shape), (B, C, *input_shape) for "all"; `standard_error`, of
        the same shape; `delta`, their sum less f(x) - mean f(baseline) over the baselines drawn.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softplus")])
    >>> background = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
    >>> att = pj.saliency.expected_gradients(
    ...     pj.Engine(model), np.ones((2, 4), "float32"), target=0, background=background)
    >>> att.values.shape, att.standard_error.shape
    (TensorShape([2, 4]), TensorShape([2, 4]))

    References
    ----------
    Erion et al. 2021, Improving performance of deep learning models with axiomatic attribution
    priors and expected gradients, eq. 3.
    """
    inside_functions.refuse("expected_gradients()")
    count = settle("expected_gradients", convention, samples=samples)["samples"]
    explained = Explained(engine, x, target, wrt, of)
    rows = _rows(background, explained)
    drawn, alphas = _draws(seed, count, len(rows[0]))
    moments = Moments(explained.size)
    for numbers in explained.chunks(explained.size * count):
        owners, s = np.divmod(numbers, count)
        points, apart = [], []
        for row, value in zip(rows, explained.values, strict=True):
            start, end = tf.gather(row, drawn[s]), tf.gather(value, owners)
            points.append(start + beside(alphas[s], end) * (end - start))
            apart.append(tf.expand_dims(end - start, 1))
        gradients = explained.at(points, owners)[1]
        moments.add([g * d for g, d in zip(gradients, apart, strict=True)], owners)
    values = moments.means()
    start = _mean_start(explained, rows, drawn)
    delta = lacking(values, tf.cast(explained.at_x, tf.float64) - start)
    return explained.attribution(
        "expected_gradients",
        values,
        delta=delta,
        standard_error=moments.standard_errors(),
        facts={"samples": count, "seed": seed, "background": len(rows[0])},
    )


def _rows(background: Any, explained: Explained) -> list[tf.Tensor]:
    """Return the background for each input looked at, (n, *shape)."""
    rows = []
    given = by_name(background, explained, "background")
    for one, name, x in zip(given, explained.names, explained.values, strict=True):
        array = tf.cast(one, x.dtype)
        if (
            array.shape.rank != x.shape.rank
            or array.shape[1:] != x.shape[1:]
            or array.shape[0] == 0
        ):
            raise InputError(
                f"Expected background= of shape (n, {', '.join(map(str, x.shape[1:]))}) for input "
                f"{name!r}. Received: {tuple(array.shape)}."
            )
        rows.append(array)
    if len({len(r) for r in rows}) != 1:
        raise InputError(f"Expected backgrounds of one length. Received: {[len(r) for r in rows]}.")
    return rows


def _draws(seed: int, samples: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which row of the background each sample starts from, and α: arrays (samples,)."""
    check_counts(2, samples=samples)
    # Two numbers for each sample in turn: its draws are the same however many there are.
    places, alphas = np.random.Generator(np.random.Philox(seed)).random((samples, 2)).T
    return np.minimum((places * rows).astype(int), rows - 1), alphas


def _mean_start(explained: Explained, rows: list[tf.Tensor], drawn: np.ndarray) -> tf.Tensor:
    """Return the target's mean at the baselines drawn, (B, M), in float64."""
    different, counts = np.unique(drawn, return_counts=True)
    sums = Sums(explained.size)
    for numbers in explained.chunks(explained.size * len(different)):
        owners, k = np.divmod(numbers, len(different))
        points = [tf.gather(row, different[k]) for row in rows]
        sums.add([explained.forward(points, owners)], owners, counts[k] / len(drawn))
    return sums.result()[0]
