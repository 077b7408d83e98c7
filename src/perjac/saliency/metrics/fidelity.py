"""Whether a map foretells what the model does: completeness, and infidelity."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from perjac.engine import Engine
from perjac.errors import InputError, check_counts
from perjac.saliency._baselines import starts
from perjac.saliency._bound import takes_model
from perjac.saliency.attribution import Attribution
from perjac.saliency.metrics.subject import Subject, in_rows

# Methods whose values are slopes, output per unit of input; those of the others are outputs.
SLOPES = {
    "gradient",
    "smoothgrad",
    "smoothgrad_squared",
    "vargrad",
    "guided_backprop",
    "deconvnet",
}


@dataclasses.dataclass(frozen=True)
class Completeness:
    """What the values of a map lack of the target's rise.

    Attributes
    ----------
    values : array (B,), or (B, C) for target "all"
        Σ values − (f(x) − f(baseline)).
    rise : array of the same shape
        f(x) − f(baseline).
    relative : array of the same shape
        |values| / |rise|; 0 where nothing lacks, infinite where only the rise is 0.
    """

    values: np.ndarray
    rise: np.ndarray

    @property
    def relative(self) -> np.ndarray:
        """|values| / |rise|."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.values == 0, 0.0, np.abs(self.values) / np.abs(self.rise))

    @property
    def mean(self) -> float:
        """The mean of |values|."""
        return float(np.mean(np.abs(self.values)))


@takes_model
def completeness(
    engine: Engine,
    x: Any,
    attribution: Attribution,
    *,
    of: Any = None,
    wrt: Any = "inputs",
    baseline: Any = 0.0,
) -> Completeness:
    """Compare the sum of a map with what the target rises from the baseline to the example.

    Parameters
    ----------
    engine, x, attribution, of, wrt
        As in `deletion`.
    baseline : number, array (*input_shape) or (B, *input_shape), or dict of these
        Where the target is 0 of the rise.

    Returns
    -------
    Completeness
        `values` and `rise`, (B,), or (B, C) for target "all".

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> engine = pj.Engine(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))
    >>> x = np.ones((2, 4), "float32")
    >>> found = pj.saliency.metrics.completeness(
    ...     engine, x, pj.saliency.input_x_gradient(engine, x))
    >>> bool(found.relative.max() < 1e-5)
    True

    References
    ----------
    Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks, section 3.
    """
    subject = Subject(engine, x, attribution, of, wrt)
    explained = subject.explained
    rise = np.asarray(explained.rise(starts(baseline, explained)))
    sums = sum(maps.sum(tuple(range(2, maps.ndim))) for maps in subject.maps)
    return Completeness(subject.shown(sums - rise), subject.shown(rise))


@dataclasses.dataclass(frozen=True)
class Infidelity:
    """How far a map is from foretelling what perturbations do.

    Attributes
    ----------
    values : array (B,), or (B, C) for target "all"
        The mean, over perturbations, of the squared error.
    standard_error : array of the same shape
        Of these means.
    scale : array of the same shape
        What the map was multiplied by.
    """

    values: np.ndarray
    standard_error: np.ndarray
    scale: np.ndarray

    @property
    def mean(self) -> float:
        """The mean over examples."""
        return float(np.mean(self.values))


@takes_model
def infidelity(
    engine: Engine,
    x: Any,
    attribution: Attribution,
    *,
    of: Any = None,
    wrt: Any = "inputs",
    perturbation: str | Callable[..., Any] = "noise",
    sigma: float = 0.1,
    baseline: Any = 0.0,
    samples: int = 100,
    seed: int = 0,
    scaled: bool = False,
    slopes: bool | None = None,
) -> Infidelity:
    """Compare what a map foretells of perturbations with what they do: E[(IᵀΦ − (f(x)−f(x−I)))²].

    Parameters
    ----------
    engine, x, attribution, of, wrt
        As in `deletion`.
    perturbation : "noise", "removal" or callable
        I: normal numbers; or x − baseline at a random half of the entries, 0 elsewhere; or a
        function of (x, generator), an example (*shape) and a numpy Generator, that returns I.
    sigma : float
        Of the noise, times the range of each example's values.
    baseline : number, array (*input_shape) or (B, *input_shape), or dict of these
        Where removed entries go, and where maps of outputs are reckoned from.
    samples : int
        Perturbations of each example, at least 2.
    seed : int
        Of the draws. They are the same for each example, alone or among others.
    scaled : bool
        Whether to multiply the map by the number that makes the error smallest: for methods whose
        scale means nothing, Grad-CAM for one.
    slopes : bool, optional
        Whether Φ is slopes, output per unit of input, as of `gradient`; otherwise it is in units of
        the output, as of `integrated_gradients`, and is divided by x − baseline first. Told by the
        method's name if left out.

    Returns
    -------
    Infidelity
        `values`, `standard_error` and `scale`, (B,), or (B, C) for target "all".

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> engine = pj.Engine(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))
    >>> x = np.arange(8, dtype="float32").reshape(2, 4)
    >>> found = pj.saliency.metrics.infidelity(engine, x, pj.saliency.gradient(engine, x))
    >>> bool(found.mean < 1e-8)
    True

    References
    ----------
    Yeh et al. 2019, On the (In)fidelity and Sensitivity of Explanations, definition 2.1.
    """
    check_counts(2, samples=samples)
    draw = _perturbation(perturbation, sigma)
    subject = Subject(engine, x, attribution, of, wrt)
    explained = subject.explained
    first = starts(baseline, explained)
    away = [np.asarray(v - s, "f8") for v, s in zip(explained.values, first, strict=True)]
    if slopes is None:
        slopes = attribution.method in SLOPES
    phi = [m if slopes else _per_unit(m, a) for m, a in zip(subject.maps, away, strict=True)]
    whole = np.asarray(explained.at_x, "f8")
    values = [np.asarray(v) for v in explained.values]
    told, seen = [], []
    for points in explained.chunks(explained.size * samples):
        owners, number = np.divmod(points, samples)
        generators = [np.random.default_rng([seed, n]) for n in number]
        moved, foretold = [], np.zeros([len(points), whole.shape[1]])
        for x_here, a, p in zip(values, away, phi, strict=True):
            i = [draw(x_here[o], a[o], g) for o, g in zip(owners, generators, strict=True)]
            i = np.reshape(i, [len(points), *x_here.shape[1:]]).astype(x_here.dtype)
            moved.append(tf.constant(x_here[owners] - i))
            for o in np.unique(owners):
                mine = i[owners == o].reshape(-1, i[0].size).astype("f8")
                foretold[owners == o] += mine @ in_rows(p[o : o + 1])[0].T
        told.append(foretold)
        seen.append(whole[owners] - np.asarray(explained.forward(moved, owners), "f8"))
    foretold, done = (
        np.concatenate(parts).reshape(explained.size, samples, whole.shape[1])
        for parts in (told, seen)
    )
    scale = np.ones(whole.shape)
    if scaled:
        squares = (foretold**2).sum(1)
        scale = (foretold * done).sum(1) / np.where(squares == 0, 1, squares)
    errors = (scale[:, None] * foretold - done) ** 2
    spread = errors.std(1, ddof=1) / samples**0.5
    return Infidelity(*map(subject.shown, (errors.mean(1), spread, scale)))


def _per_unit(maps: np.ndarray, away: np.ndarray) -> np.ndarray:
    """Return Φ / (x − baseline), 0 where the example is the baseline."""
    apart = away[:, None]
    return np.divide(maps, apart, out=np.zeros(maps.shape), where=apart != 0)


def _perturbation(given: Any, sigma: float) -> Callable[..., np.ndarray]:
    """Return a function of (x, x − baseline, generator) that draws I."""
    if callable(given):
        return lambda x, away, generator: np.asarray(given(x, generator))
    if given == "noise":
        return lambda x, away, generator: generator.normal(0, sigma * np.ptp(x), x.shape)
    if given == "removal":
        return lambda x, away, generator: away * (generator.random(x.shape) < 0.5)
    raise InputError(
        "Expected perturbation= 'noise', 'removal', or a function of (x, generator). "
        f"Received: {given!r}."
    )
