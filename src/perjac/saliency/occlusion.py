"""Occlusion: what the output loses where a window of the input is covered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend.shapes import known
from perjac.engine import Engine
from perjac.errors import InputError
from perjac.saliency._baselines import starts
from perjac.saliency._bound import takes_model
from perjac.saliency._problem import Explained
from perjac.saliency.attribution import Attribution

# How many windows lie along an axis where none is given.
_ALONG = 8


@takes_model
def occlusion(
    engine: Engine,
    x: Any,
    target: Any = "predicted",
    *,
    of: Any = None,
    wrt: Any = "inputs",
    window: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    baseline: Any = 0.0,
) -> Attribution:
    """Return what the target loses where a window is covered, f(x) − f(covered).

    Each entry's value is the mean over the windows that cover it, and 0 where none does.

    Parameters
    ----------
    engine, x, target, of
        As in `gradient`.
    wrt : str, Activation, or list of str
        What is covered; of several inputs one at a time, the others as they are.
    window : int or sequence of int, optional
        Its lengths: one for each axis of the input; or for each but the last, the channels, which
        are then covered together; or one for all axes but the channels (an input of one axis has
        none). By default an eighth of each axis.
    stride : int or sequence of int, optional
        How far it moves, as `window`; by default by its own length, so that windows tile the
        input. The last along an axis is cut off at the input's end, so that every entry is covered.
    baseline : number, array (*input_shape) or (B, *input_shape), or dict of these
        What is put in place; by name for several inputs.

    Returns
    -------
    Attribution
        `values` of shape (B, *input_shape); (B, C, *input_shape) for "all", from the same runs.

    Raises
    ------
    InputError
        If lengths do not fit the input.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential(
    ...     [keras.Input((6, 6, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    >>> x = np.ones((4, 6, 6, 3), "float32")
    >>> pj.saliency.occlusion(pj.Engine(model), x, target="all", window=2).values.shape
    TensorShape([4, 2, 6, 6, 3])

    References
    ----------
    Zeiler and Fergus 2014, Visualizing and Understanding Convolutional Networks, section 4.2.
    """
    explained = Explained(engine, x, target, wrt, of)
    covers, found, facts = starts(baseline, explained), [], {}
    for place, name in enumerate(explained.names):
        shape = known(explained.values[place].shape[1:])
        windows = Windows.of(shape, window, stride)
        facts[name] = {"window": windows.lengths, "stride": windows.strides}
        found.append(_occluded(explained, place, windows, covers[place]))
    facts = facts[explained.names[0]] if len(found) == 1 else facts
    return explained.attribution("occlusion", found, facts=facts)


class Windows:
    """Where a window stands: on a grid, cut off at the end of each axis.

    Parameters
    ----------
    shape, lengths, strides : tuple of int
        Of the input, the window, and its moves, axis by axis.
    """

    def __init__(self, shape: tuple[int, ...], lengths: tuple[int, ...], strides: tuple[int, ...]):
        self.shape, self.lengths, self.strides = shape, lengths, strides
        axes = zip(shape, lengths, strides, strict=True)
        # One matrix for each axis: whether window n covers position i, (windows, length).
        self.covers = [_intervals(*axis) for axis in axes]
        self.grid = tuple(len(c) for c in self.covers)

    @classmethod
    def of(cls, shape: tuple[int, ...], window: Any, stride: Any) -> Windows:
        """Return the windows that the options mean for an input (*shape)."""
        together = len(shape) > 1
        free = shape[:-1] if together else shape
        if window is None:
            window = tuple(-(-n // _ALONG) for n in free)
        lengths = _lengths(window, shape, "window", shape[-1])
        strides = lengths if stride is None else _lengths(stride, shape, "stride", lengths[-1])
        return cls(shape, tuple(map(min, lengths, shape)), strides)

    @property
    def count(self) -> int:
        """How many there are."""
        return math.prod(self.grid)

    def masks(self, numbers: np.ndarray) -> np.ndarray:
        """Return what windows `numbers` (N,) cover, as bool (N, *shape)."""
        mask = np.ones([len(numbers)] + [1] * len(self.shape), bool)
        at = np.unravel_index(numbers, self.grid)
        for axis, (covers, n) in enumerate(zip(self.covers, at, strict=True)):
            mask = mask & np.expand_dims(
                covers[n], [a + 1 for a in range(mask.ndim - 1) if a != axis]
            )
        return mask

    def spread(self, each: tf.Tensor) -> tf.Tensor:
        """Return the mean over the windows that cover an entry: (..., windows) to (..., *shape)."""
        lead = known(each.shape[:-1])
        means = tf.reshape(each, [math.prod(lead), *self.grid])
        for covers in self.covers:
            share = covers / np.maximum(covers.sum(0), 1)
            means = tf.tensordot(means, tf.cast(share, each.dtype), [[1], [0]])
        return tf.reshape(means, [*lead, *self.shape])


def _intervals(length: int, window: int, stride: int) -> np.ndarray:
    starts = np.arange(0, max(length - window, 0) + stride, stride)
    starts = starts[starts < length]
    positions = np.arange(length)
    return (positions >= starts[:, None]) & (positions < starts[:, None] + window)


def _lengths(given: Any, shape: tuple[int, ...], called: str, channels: int) -> tuple[int, ...]:
    """Return one length for each axis of the input."""
    free = max(len(shape) - 1, 1)
    lengths = (given,) * free if np.ndim(given) == 0 else tuple(given)
    if len(lengths) == len(shape) - 1:
        lengths = (*lengths, channels)
    whole = all(isinstance(n, (int, np.integer)) and n > 0 for n in lengths)
    if len(lengths) != len(shape) or not whole:
        raise InputError(
            f"Expected {called}= a positive int, or one for each axis of an input of shape {shape} "
            f"(the last may be left out). Received: {given!r}."
        )
    return tuple(int(n) for n in lengths)


def _occluded(explained: Explained, place: int, windows: Windows, cover: tf.Tensor) -> tf.Tensor:
    """Return the values of one of the inputs, (B, M, *shape)."""
    x = explained.values[place]
    size, count = explained.size, windows.count
    found = []
    for points in explained.chunks(size * count):
        owners = points // count
        masks = windows.masks(points % count)
        given = [tf.gather(value, owners) for value in explained.values]
        given[place] = tf.where(masks, tf.gather(cover, owners), given[place])
        found.append(explained.forward(given, owners))
    covered = tf.reshape(tf.concat(found, 0), [size, count, explained.target.count])
    lost = explained.at_x[:, :, None] - tf.transpose(covered, [0, 2, 1])
    return windows.spread(tf.cast(lost, x.dtype))
