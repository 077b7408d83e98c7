"""Deletion and insertion: how fast the target falls, or rises, along a map's order."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.integrate
import tensorflow as tf

from perjac._core.backend.shapes import known
from perjac._drawing import new_figure
from perjac.engine import Engine
from perjac.errors import check_counts
from perjac.saliency import _pictures
from perjac.saliency._baselines import starts
from perjac.saliency._bound import takes_model
from perjac.saliency.attribution import Attribution
from perjac.saliency.metrics.subject import Subject, in_rows


@dataclasses.dataclass(frozen=True)
class Curve:
    """The target along the order of a map.

    Attributes
    ----------
    metric, method : str
        "deletion" or "insertion", of whose maps.
    fractions : array (S + 1,)
        How much is removed, or put back: 0 to 1.
    curves : array (B, S + 1), or (B, C, S + 1) for target "all"
        The target.
    auc : array (B,), or (B, C)
        The areas under the curves, by trapezoids.
    """

    metric: str
    method: str
    fractions: np.ndarray
    curves: np.ndarray
    auc: np.ndarray

    @property
    def mean(self) -> float:
        """The mean area."""
        return float(np.mean(self.auc))

    def figure(self) -> Any:
        """Draw the examples' curves and their mean; return a matplotlib Figure."""
        figure = new_figure(4.5, 3.2)
        axes = figure.subplots()
        flat = self.curves.reshape(-1, len(self.fractions))
        axes.plot(self.fractions, flat[:64].T, color="0.8", linewidth=0.7)
        axes.plot(self.fractions, flat.mean(0), color="#2166ac", linewidth=2)
        axes.set_xlabel("removed" if self.metric == "deletion" else "put back")
        axes.set_ylabel("target")
        axes.set_title(f"{self.metric}, {self.method}: {self.mean:.4g}", fontsize=9)
        return figure


@takes_model
def deletion(
    engine: Engine,
    x: Any,
    attribution: Attribution,
    *,
    of: Any = None,
    wrt: Any = "inputs",
    baseline: Any = 0.0,
    steps: int = 50,
    data_format: str | None = None,
) -> Curve:
    """Remove what a map says matters most, first to last, and follow the target.

    A good map makes it fall fast: a small area under the curve.

    Parameters
    ----------
    engine, x
        As the method got them.
    attribution : Attribution
        Its answer, for any target but directions.
    of, wrt
        As the method got them; `of="logits"` is remembered.
    baseline : number, array (*input_shape) or (B, *input_shape), or dict of these
        What entries become when they are removed.
    steps : int
        S, the steps from nothing to everything; no more than there are positions.
    data_format : str, optional
        "channels_last" or "channels_first"; found out by the shape if left out. A position's
        channels go together, ordered by their sum; a row of features has none.

    Returns
    -------
    Curve
        `curves` (B, S + 1) and `auc` (B,); (B, C, S + 1) and (B, C) for target "all", each output
        along its own map.

    Notes
    -----
    Costs B·(S + 1) runs of the model, times C for target "all". Positions of equal value keep their
    order in the input.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> engine = pj.Engine(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))
    >>> x = np.ones((2, 4), "float32")
    >>> att = pj.saliency.input_x_gradient(engine, x)
    >>> pj.saliency.metrics.deletion(engine, x, att).curves.shape
    (2, 5)

    References
    ----------
    Petsiuk et al. 2018, RISE: Randomized Input Sampling for Explanation, section 4.2.
    """
    subject = Subject(engine, x, attribution, of, wrt)
    return _along("deletion", subject, baseline, steps, data_format)


@takes_model
def insertion(
    engine: Engine,
    x: Any,
    attribution: Attribution,
    *,
    of: Any = None,
    wrt: Any = "inputs",
    baseline: Any = 0.0,
    steps: int = 50,
    data_format: str | None = None,
) -> Curve:
    """Start from the baseline, put back what a map says matters most, and follow the target.

    A good map makes it rise fast: a large area under the curve. The paper starts images from
    themselves, blurred: give those as `baseline`.

    Parameters
    ----------
    engine, x, attribution, of, wrt, baseline, steps, data_format
        As in `deletion`.

    Returns
    -------
    Curve
        As of `deletion`.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> engine = pj.Engine(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))
    >>> x = np.ones((2, 4), "float32")
    >>> att = pj.saliency.input_x_gradient(engine, x, target="all")
    >>> pj.saliency.metrics.insertion(engine, x, att).auc.shape
    (2, 3)

    References
    ----------
    Petsiuk et al. 2018, RISE: Randomized Input Sampling for Explanation, section 4.2.
    """
    subject = Subject(engine, x, attribution, of, wrt)
    return _along("insertion", subject, baseline, steps, data_format)


def _along(
    metric: str, subject: Subject, baseline: Any, steps: int, data_format: str | None
) -> Curve:
    check_counts(steps=steps)
    explained = subject.explained
    axes = [_pictures.channel_axis(known(v.shape[1:]), data_format) for v in explained.values]
    scores = [
        in_rows(maps if axis is None else maps.sum(axis))
        for maps, axis in zip(subject.maps, axes, strict=True)
    ]
    cuts = np.cumsum([s.shape[2] for s in scores])
    ranks = _ranks(np.concatenate(scores, 2))  # (B, M, positions)
    steps = min(steps, int(cuts[-1]))
    touched = np.round(np.linspace(0, cuts[-1], steps + 1)).astype(int)
    size, count = ranks.shape[:2]
    first = starts(baseline, explained)
    found = []
    for points in explained.chunks(size * count * (steps + 1)):
        owners, number, step = np.unravel_index(points, (size, count, steps + 1))
        first_ones = ranks[owners, number] < touched[step][:, None]
        moved = []
        for mask, axis, x, start in zip(
            np.split(first_ones, cuts[:-1], 1), axes, explained.values, first, strict=True
        ):
            mask = _spread(mask if metric == "insertion" else ~mask, known(x.shape[1:]), axis)
            moved.append(tf.where(mask, tf.gather(x, owners), tf.gather(start, owners)))
        found.append(subject.of_map(explained.forward(moved, owners), number))
    curves = np.concatenate(found).reshape(size, count, steps + 1)
    fractions = touched / cuts[-1]
    return Curve(
        metric,
        subject.attribution.method,
        fractions,
        subject.shown(curves),
        subject.shown(scipy.integrate.trapezoid(curves, fractions, axis=-1)),
    )


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Return each position's place, the largest score first."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(scores.shape[-1]), -1)
    return ranks


def _spread(mask: np.ndarray, shape: tuple[int, ...], axis: int | None) -> np.ndarray:
    """Return a mask of positions (N, positions), to broadcast over inputs (N, *shape)."""
    grid = list(shape)
    if axis is not None:
        grid[axis] = 1
    return mask.reshape(len(mask), *grid)
