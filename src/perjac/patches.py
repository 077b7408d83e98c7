"""The windows that a convolution sees, held as the picture they are cut from."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from perjac.shapes import size


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
        """Return the windows laid out, (B, T, window·channels).

        Shifted views laid side by side beat TensorFlow's patch extraction (4.6 ms against 11.4 at
        (128, 28, 28, 1)) until the views are strided (32 against 11 at stride 2).
        """
        if len(self.window) == 2 and max(self.strides) > 1 and max(self.window) > 1:
            sizes, strides, rates = (
                [1, *n, 1] for n in (self.window, self.strides, self.dilations)
            )
            windows = tf.image.extract_patches(self.x, sizes, strides, rates, "VALID")
        else:
            windows = tf.concat(list(self._views()), -1)
        entries = math.prod(self.window) * size(self.x.shape[-1:])
        return tf.reshape(windows, [-1, self.fold * math.prod(self.output), entries])

    def example(self, b: Any) -> Patches:
        """Return one example's, its batch axis kept."""
        own = self.x[b * self.fold : (b + 1) * self.fold]
        return dataclasses.replace(self, x=own)

    @property
    def backward(self) -> bool:
        """Whether TensorFlow has a backward pass of its own for these windows."""
        return len(self.window) == 2 and set(self.dilations) == {1}

    def summed(self, delta: tf.Tensor) -> tf.Tensor:
        """Return Σ_bt a[b,t,i] δ[b,t,o], (window·channels, O), by the ordinary backward pass.

        It needs no windows laid out: an ordinary batch gradient is nothing else.
        """
        channels, outputs = size(self.x.shape[-1:]), size(delta.shape[-1:])
        strides, rates = ([1, *n, 1] for n in (self.strides, self.dilations))
        kernel = tf.raw_ops.Conv2DBackpropFilter(
            input=self.x,
            filter_sizes=[*self.window, channels, outputs],
            out_backprop=tf.reshape(delta, [-1, *self.output, outputs]),
            strides=strides,
            padding="VALID",
            dilations=rates,
        )
        return tf.reshape(kernel, [-1, outputs])

    def _views(self) -> Iterator[tf.Tensor]:
        """Yield, for each window offset in C order, what it sees: (N, *output, channels)."""
        for offset in itertools.product(*(range(length) for length in self.window)):
            cut = [slice(None)]
            for place, stride, dilation, count in zip(
                offset, self.strides, self.dilations, self.output, strict=True
            ):
                start = place * dilation
                cut.append(slice(start, start + (count - 1) * stride + 1, stride))
            yield self.x[tuple(cut)]

    def __tf_flatten__(self) -> tuple[tuple, tuple]:
        return (self.window, self.strides, self.dilations, self.output, self.fold), (self.x,)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple, components: tuple) -> Patches:
        return cls(*components, *metadata)
