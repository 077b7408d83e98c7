"""Integrals of the gradient along a path that goes where the gradient is small first."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend.shapes import size
from perjac._core.model import inside_functions
from perjac.engine import Engine
from perjac.errors import InputError, check_counts
from perjac.saliency._baselines import lacking, starts
from perjac.saliency._bound import takes_model
from perjac.saliency._problem import Explained
from perjac.saliency.attribution import Attribution
from perjac.saliency.presets import settle

# A path is where it should be when its distance is off by no more than this share of the whole.
_CLOSE = 1e-9


@takes_model
def guided_ig(
    engine: Engine,
    x: Any,
    target: Any = "predicted",
    *,
    wrt: Any = "inputs",
    of: Any = None,
    baseline: Any = None,
    steps: int | None = None,
    fraction: float | None = None,
    max_dist: float | None = None,
    convention: str | None = None,
) -> Attribution:
    """Return integrated gradients on a path that moves the entries of small gradient first.

    Parameters
    ----------
    engine, x, target, wrt, of, baseline
        As in `integrated_gradients`.
    steps : int, optional
        After step k the path has come k/steps of its way, in L1 distance; 200 by default.
    fraction : float, optional
        The share of the entries, those of smallest |gradient|, that move at a time; 0.25 by
        default.
    max_dist : float, optional
        How far an entry's α may be from that of the straight line; 0.02 by default. 0 is the
        straight line, 1 is no limit.
    convention : "pair", optional
        That library's defaults, which are ours.

    Returns
    -------
    Attribution
        `values` of shape (B, *input_shape), (B, C, *input_shape) for "all", where each output has
        a path of its own; `delta`, (B,) or (B, C).

    Raises
    ------
    InputError
        If an option cannot be used.

    Notes
    -----
    Costs steps passes of B examples, B·C for "all", one after the other. The gradient is that at
    the step's beginning. Entries of several inputs are ranked together.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softplus")])
    >>> x = np.ones((2, 4), "float32")
    >>> pj.saliency.guided_ig(pj.Engine(model), x, target=0, steps=20).values.shape
    TensorShape([2, 4])

    References
    ----------
    Kapishnikov et al. 2021, Guided Integrated Gradients: an Adaptive Path Method for Removing
    Noise, algorithm 1 and section 4.3.
    """
    given = {"baseline": baseline, "steps": steps, "fraction": fraction, "max_dist": max_dist}
    inside_functions.refuse("guided_ig()")
    chosen = settle("guided_ig", convention, **given)
    check_counts(steps=chosen["steps"])
    for name in ("fraction", "max_dist"):
        if not 0 <= chosen[name] <= 1:
            raise InputError(f"Expected {name}= from 0 to 1. Received: {chosen[name]!r}.")
    explained = Explained(engine, x, target, wrt, of)
    first = starts(chosen["baseline"], explained)
    count = explained.target.count
    if explained.target.kind != "all":
        flat = _guided(explained, first, chosen)
    else:  # each output's path side by side
        batch = engine._traces.prepare(x)
        again = tf.nest.map_structure(lambda t: tf.repeat(t, count, 0), batch.packed)
        outputs = np.tile(np.arange(count), explained.size)
        every = Explained(engine, again, outputs, wrt, of)
        flat = _guided(every, [tf.repeat(f, count, 0) for f in first], chosen)
    flat = flat.reshape(explained.size, count, flat.shape[1])
    values = _split(flat, explained)
    return explained.attribution(
        "guided_ig",
        values,
        delta=lacking(values, explained.rise(first)),
        facts={name: value for name, value in chosen.items() if name != "baseline"},
    )


def _guided(explained: Explained, first: list[tf.Tensor], chosen: dict[str, Any]) -> np.ndarray:
    """Return the values of one target for each example, (B, D), D entries of all inputs."""
    end, start = (_flat(t) for t in (explained.values, first))
    here, values = start.copy(), np.zeros_like(end)
    steps, reach = int(chosen["steps"]), chosen["max_dist"]
    whole = np.abs(end - start).sum(1)
    for step in range(1, steps + 1):
        gradient = _gradient(explained, here)
        alpha = step / steps
        behind, ahead = max(alpha - reach, 0.0), min(alpha + reach, 1.0)
        before = here.copy()
        _move(
            here,
            np.abs(gradient),
            start + behind * (end - start),
            start + ahead * (end - start),
            end,
            whole,
            alpha,
            chosen["fraction"],
        )
        values += gradient * (here - before)
    return values


def _move(
    here: np.ndarray,
    steepness: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    end: np.ndarray,
    whole: np.ndarray,
    alpha: float,
    fraction: float,
) -> None:
    """Move each path, here (B, D), until it is (1 - alpha)·whole from its end, in L1 distance.

    What is behind `low` catches up; then the entries of least steepness go on towards `high`, as
    far as they can or as is needed, and once they are there, the next ones.
    """
    np.copyto(here, low, where=np.abs(end - here) > np.abs(end - low))
    wanted = (1 - alpha) * whole
    moving = np.arange(len(here))
    rank = int(fraction * (here.shape[1] - 1))
    while True:
        missing = np.abs(end[moving] - here[moving]).sum(1) - wanted[moving]
        late = missing > _CLOSE * whole[moving]
        moving, missing = moving[late], missing[late]
        if not len(moving):
            return
        at, to = here[moving], high[moving]
        steep = np.where(at == to, np.inf, steepness[moving])
        threshold = np.partition(steep, rank, axis=1)[:, rank, None]
        chosen = (steep <= threshold) & np.isfinite(steep)
        room = (np.abs(to - at) * chosen).sum(1)
        stuck = room == 0
        share = np.where(stuck, 0.0, missing / np.where(stuck, 1.0, room))
        whole_way = (share >= 1)[:, None]
        moved = np.where(whole_way, to, at + share[:, None] * (to - at))
        here[moving] = np.where(chosen, moved, at)
        moving = moving[~stuck]


def _gradient(explained: Explained, here: np.ndarray) -> np.ndarray:
    """Return the target's gradient at the paths' places (B, D), in float64."""
    parts = []
    for owners in explained.chunks(len(here)):
        points = [
            tf.cast(p[:, 0], x.dtype)
            for p, x in zip(_split(here[owners, None], explained), explained.values, strict=True)
        ]
        parts.append(_flat([g[:, 0] for g in explained.at(points, owners)[1]]))
    return np.concatenate(parts)


def _flat(tensors: list[tf.Tensor]) -> np.ndarray:
    """Return tensors (B, *shape) side by side, (B, D), in float64."""
    flat = [np.reshape(t, [len(t), size(t.shape[1:])]).astype(float) for t in tensors]
    return np.concatenate(flat, 1)


def _split(flat: np.ndarray, explained: Explained) -> list[tf.Tensor]:
    """Return (N, M, D) as the inputs looked at, each (N, M, *shape), in float64."""
    sizes = [size(x.shape[1:]) for x in explained.values]
    parts = np.split(flat, np.cumsum(sizes)[:-1], axis=2)
    return [
        tf.reshape(tf.constant(p), [*flat.shape[:2], *x.shape[1:]])
        for p, x in zip(parts, explained.values, strict=True)
    ]
