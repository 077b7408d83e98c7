"""Max-sensitivity: how much a map changes where the example hardly does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend.shapes import known
from perjac.engine import Engine
from perjac.errors import InputError, check_counts
from perjac.saliency._bound import takes_model
from perjac.saliency.attribution import Attribution
from perjac.saliency.metrics.subject import same_target


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """How far maps of nearby examples are from the example's own.

    Attributes
    ----------
    values : array (B,), or (B, C) for target "all"
        The largest distance found; a lower bound of the largest there is.
    average : array of the same shape
        The mean distance.
    standard_error : array of the same shape
        Of the mean distance.
    """

    values: np.ndarray
    average: np.ndarray
    standard_error: np.ndarray

    @property
    def mean(self) -> float:
        """The mean of `values` over examples."""
        return float(np.mean(self.values))


@takes_model
def max_sensitivity(
    engine: Engine,
    x: Any,
    method: Callable[..., Attribution],
    target: Any = "predicted",
    *,
    of: Any = None,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
    relative: bool = True,
    **options: Any,
) -> Sensitivity:
    """Draw examples nearby and return the largest ‖Φ(y) − Φ(x)‖, over ‖Φ(x)‖.

    Parameters
    ----------
    engine, x, target, of
        As in `gradient`; the output that is predicted at x is explained nearby too.
    method : callable
        Takes (engine, x, target, of=…), returns an Attribution.
    radius : float
        Each entry of real-valued inputs moves by at most this much.
    samples : int
        Examples drawn near each, at least 2.
    seed : int
        Of the draws. They are the same for each example, alone or among others.
    relative : bool
        Whether distances are over ‖Φ(x)‖, as in Captum; the paper's definition is without.
    **options
        For the method.

    Returns
    -------
    Sensitivity
        `values`, and the mean distance with its standard error, (B,); (B, C) for "all".

    Notes
    -----
    Costs `samples` + 1 runs of the method.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> engine = pj.Engine(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))
    >>> x = np.ones((2, 4), "float32")
    >>> pj.saliency.metrics.max_sensitivity(engine, x, pj.saliency.gradient).mean
    0.0

    References
    ----------
    Yeh et al. 2019, On the (In)fidelity and Sensitivity of Explanations, definition 2.2.
    """
    check_counts(2, samples=samples)
    if not radius >= 0:
        raise InputError(f"Expected radius= 0 or more. Received: {radius!r}.")
    there = method(engine, x, target, of=of, **options)
    fixed = same_target(there, target)
    batch = engine._traces.prepare(x)
    distances = []
    for number in range(samples):
        generator = np.random.default_rng([seed, number])
        moved = [_moved(t, radius, generator) for t in batch.tensors]
        near = tf.nest.pack_sequence_as(batch.structure, moved)
        distances.append(_distance(method(engine, near, fixed, of=of, **options), there))
    found = np.stack(distances)
    if relative:
        length = _distance(there, None)
        apart = np.broadcast_to(length, found.shape)
        found = np.divide(found, apart, out=np.where(found == 0, 0.0, np.inf), where=apart != 0)
    found = found if there.for_all else found[..., 0]
    error = found.std(0, ddof=1) / samples**0.5
    return Sensitivity(found.max(0, initial=0.0), found.mean(0), error)


def _moved(tensor: tf.Tensor, radius: float, generator: np.random.Generator) -> tf.Tensor:
    if not tensor.dtype.is_floating:
        return tensor
    move = generator.uniform(-radius, radius, known(tensor.shape[1:]))
    return tensor + tf.cast(move, tensor.dtype)


def _distance(one: Attribution, other: Attribution | None) -> np.ndarray:
    """Return the Euclidean distance of two answers' maps, or a map's length, (B, M)."""
    total = 0.0
    for name in one.inputs:
        apart = one.maps_of(name).astype("f8")
        if other is not None:
            apart = apart - other.maps_of(name)
        total = total + (apart**2).sum(tuple(range(2, apart.ndim)))
    return np.sqrt(total)
