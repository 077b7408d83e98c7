"""Where a path starts: a baseline as users give it, for each example and input looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from perjac.errors import InputError
from perjac.saliency._moments import beside
from perjac.saliency._problem import Explained


def by_name(given: Any, explained: Explained, what: str) -> list[Any]:
    """Return one entry of `given` for each input looked at: its own by name, or the same.

    Raises
    ------
    InputError
        If a mapping lacks one or has another.
    """
    if not isinstance(given, Mapping):
        return [given] * len(explained.names)
    if set(given) != set(explained.names):
        raise InputError(
            f"Expected {what}= by name, for {explained.names}. Received: {sorted(given)}."
        )
    return [given[name] for name in explained.names]


def starts(baseline: Any, explained: Explained) -> list[tf.Tensor]:
    """Return the baseline of each example, (B, *shape), for each input looked at.

    Parameters
    ----------
    baseline : number, array (*shape) or (B, *shape), or a mapping of name to one of these
        As the user gave it.
    explained : Explained
        What is explained.

    Raises
    ------
    InputError
        If it has another shape.
    """
    return [
        _start(one, name, x)
        for one, name, x in zip(
            by_name(baseline, explained, "baseline"),
            explained.names,
            explained.values,
            strict=True,
        )
    ]


def _start(baseline: Any, name: str, x: tf.Tensor) -> tf.Tensor:
    array = tf.cast(baseline, x.dtype)
    if array.shape not in ([], x.shape[1:], x.shape):
        raise InputError(
            f"Expected baseline= a number, or of shape {tuple(x.shape[1:])} or {tuple(x.shape)}, "
            f"for input {name!r}. Received: shape {tuple(array.shape)}."
        )
    return tf.broadcast_to(array, x.shape)


def between(start: tf.Tensor, end: tf.Tensor, owners: np.ndarray, alphas: np.ndarray) -> tf.Tensor:
    """Return points (N, *shape) on the straight lines start + α (end - start) of `owners` (N,)."""
    first = tf.gather(start, owners)
    return first + beside(alphas, first) * (tf.gather(end, owners) - first)


def lacking(values: list[tf.Tensor], rise: tf.Tensor) -> tf.Tensor:
    """Return delta (B, M): the sum of values (B, M, *shape) less the rise f(x) - f(x'), (B, M)."""
    sums = [tf.reduce_sum(tf.cast(v, tf.float64), range(2, v.shape.rank)) for v in values]
    return tf.add_n(sums) - tf.cast(rise, tf.float64)
