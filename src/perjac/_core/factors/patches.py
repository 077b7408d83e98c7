"""The windows that a convolution sees, held as the picture they are cut from."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend import xla
from perjac._core.backend.shapes import batched, known, size

# For one row and so many channels, a backward pass with a group of channels for each example beats
# laying the windows out: 3.8 ms against 5.6 at (128, 13, 13, 16), but 2.1 against 3.9 with one
# channel, and 217 against 62 at (16, 10, 10, 512).
_GROUPED_CHANNELS = range(4, 65)


@dataclasses.dataclass(frozen=True, eq=False)
class Patches:
    """a[b, t, i]: t runs over output positions, i over (window offset, channel).

    Attributes
    ----------
    x : tf.Tensor
        (N, *spatial, channels), padded so that every window lies inside. N = B·F, where `fold` F
        counts the positions folded into the batch axis.
    window, strides, dilations, output : tuple of int
        Sizes along the spatial axes; `output` counts the windows.
    """

    x: tf.Tensor
    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    output: tuple[int, ...]
    fold: int

    def columns(self) -> tf.Tensor:
        """Return the windows laid out, (B, T, window·channels)."""
        windows = tf.concat(list(self._views(self.x, front=0)), -1)
        return tf.reshape(windows, [-1, self.fold * math.prod(self.output), self._entries])

    def rows(self, delta: tf.Tensor) -> tf.Tensor:
        """Return Σ_t a[b,t,i] δ[b,k,t,o], (B, K, window·channels, O), for δ (B, K, T, O).

        Windows are laid out with the positions last, so that whole lines are copied: 7.1 ms against
        10.7 for ten rows at (128, 28, 28, 1), 19.4 against 21.7 with 16 channels.
        """
        if math.prod(self.window) == 1 or self.fold > 1:
            return tf.matmul(self.columns()[:, None], delta, transpose_a=True)
        few = delta.shape[1] == 1 and size(self.x.shape[-1:]) in _GROUPED_CHANNELS
        # XLA's backward pass for groups is slow: 303 ms against 11 for windows laid out (gradients
        # of the benchmarks' CNN, 32 examples).
        plain = max(self.strides) == 1 and self.backward and not xla.is_for_xla()
        if few and plain and _groups_run(delta.dtype):
            return self._grouped(delta)
        return tf.matmul(self._turned()[:, None], delta)

    def summed(self, delta: tf.Tensor) -> tf.Tensor:
        """Return Σ_bt a[b,t,i] δ[b,t,o], (window·channels, O), by the ordinary backward pass.

        It needs no windows laid out: an ordinary batch gradient is nothing else.
        """
        return tf.reshape(
            self._backward(self.x, tf.reshape(delta, [-1, *self.output, *delta.shape[-1:]])),
            [self._entries, -1],
        )

    @property
    def backward(self) -> bool:
        """Whether TensorFlow has a backward pass of its own for these windows."""
        return len(self.window) == 2 and set(self.dilations) == {1}

    @property
    def entries(self) -> int:
        """How many numbers one example's windows are, laid out."""
        return self.fold * math.prod(self.output) * self._entries

    def example(self, b: Any) -> Patches:
        """Return one example's, its batch axis kept."""
        return dataclasses.replace(self, x=self.x[b * self.fold : (b + 1) * self.fold])

    @property
    def _entries(self) -> int:
        return math.prod(self.window) * size(self.x.shape[-1:])

    def _turned(self) -> tf.Tensor:
        """Return the windows as (B, window·channels, T), for F = 1."""
        rank = len(self.window)
        x = tf.transpose(self.x, [0, rank + 1, *range(1, rank + 1)])
        windows = tf.stack(list(self._views(x, front=1)), 1)
        return tf.reshape(windows, [-1, self._entries, math.prod(self.output)])

    def _views(self, x: tf.Tensor, front: int) -> Iterator[tf.Tensor]:
        """Yield, for each window offset in C order, what it sees: x cut to `output`.

        `front` counts the axes between the batch and the spatial ones. A strided view copies number
        by number; so the picture is sorted into strides² interleaved ones first, of which the views
        are plain blocks: 12 ms against 37 at (16, 33, 33, 64), stride 2.
        """
        x = _interleaved(x, front, self.strides)
        for offset in itertools.product(*(range(length) for length in self.window)):
            starts = [n * dilation for n, dilation in zip(offset, self.dilations, strict=True)]
            cuts = list(zip(starts, self.strides, self.output, strict=True))
            phases = [start % stride for start, stride, _ in cuts if stride > 1]
            block = [slice(n // stride, n // stride + count) for n, stride, count in cuts]
            yield x[(slice(None), *phases, *[slice(None)] * front, *block)]

    def _grouped(self, delta: tf.Tensor) -> tf.Tensor:
        """Form the rows with the batch folded into groups of channels, one backward pass for all.

        x becomes (1, H, W, B·C), δ (1, h, w, B·K·O): a group of channels for each example.
        """
        batch, count = tf.shape(delta)[0], delta.shape[1] or tf.shape(delta)[1]
        outputs = size(delta.shape[-1:])
        pictures = tf.transpose(self.x, [1, 2, 0, 3])
        pictures = tf.reshape(pictures, [1, *self.x.shape[1:3], batch * size(self.x.shape[3:])])
        delta = batched(delta, batch, [count, *self.output, outputs])
        delta = tf.transpose(delta, [2, 3, 0, 1, 4])
        delta = tf.reshape(delta, [1, *self.output, batch * count * outputs])
        rows = self._backward(pictures, delta)
        rows = tf.reshape(rows, [self._entries, batch, count, outputs])
        return tf.transpose(rows, [1, 2, 0, 3])

    def _backward(self, pictures: tf.Tensor, delta: tf.Tensor) -> tf.Tensor:
        return tf.raw_ops.Conv2DBackpropFilter(
            input=pictures,
            filter_sizes=[*self.window, *known(self.x.shape[3:]), tf.shape(delta)[3]],
            out_backprop=delta,
            strides=[1, *self.strides, 1],
            padding="VALID",
        )

    def __tf_flatten__(self) -> tuple[tuple, tuple]:
        return (self.window, self.strides, self.dilations, self.output, self.fold), (self.x,)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple, components: tuple) -> Patches:
        return cls(*components, *metadata)


def _interleaved(x: tf.Tensor, front: int, strides: Sequence[int]) -> tf.Tensor:
    """Sort (N, …, *spatial, …) into (N, *phases, …, *spatial / strides, …), padded with zeros.

    Axes that are not strided have no phase; with none at all, x stays as it is.
    """
    if max(strides) == 1:
        return x
    lengths = known(x.shape[1:])
    steps = [*[1] * front, *strides, *[1] * (len(lengths) - front - len(strides))]
    ends = [-length % step for length, step in zip(lengths, steps, strict=True)]
    x = tf.pad(x, [(0, 0), *((0, end) for end in ends)])
    split, phases, others = [-1], [], [0]
    for length, end, step in zip(lengths, ends, steps, strict=True):
        others.append(len(split))
        split.append((length + end) // step)
        if step > 1:
            phases.append(len(split))
            split.append(step)
    return tf.transpose(tf.reshape(x, split), [0, *phases, *others[1:]])


@functools.cache
def _groups_run(dtype: tf.DType) -> bool:
    """Tell whether this TensorFlow's backward pass takes groups of channels, by trying.

    On a CPU only oneDNN's does, in float32; the others raise.
    """
    with tf.init_scope():
        x = tf.reshape(tf.range(2 * 3 * 3 * 2, dtype=tf.float32), [2, 3, 3, 2])
        delta = tf.reshape(tf.range(2 * 2 * 2 * 3, dtype=tf.float32), [2, 1, 4, 3])
        tried = Patches(tf.cast(x, dtype), (2, 2), (1, 1), (1, 1), (2, 2), 1)
        delta = tf.cast(delta, dtype)
        try:
            found = tried._grouped(delta)
        except (tf.errors.OpError, ValueError):
            return False
        right = tf.matmul(tried.columns()[:, None], delta, transpose_a=True)
        return np.allclose(found, right, rtol=1e-4)
