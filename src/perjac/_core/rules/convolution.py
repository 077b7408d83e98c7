"""Convolutions: a weight meets a window of the data at every output position."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import tensorflow as tf

from perjac._core.backend.shapes import batched, known
from perjac._core.factors import Explicit, Factor, Grouped, Outer
from perjac._core.factors.patches import Patches
from perjac._core.rules.bound import BoundSite, NoRule
from perjac._core.rules.registry import rule


@rule("Conv2D", "Conv3D")
def convolution(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y[t] = Σ_w x[t+w] W[w], so J[w,i,o] = Σ_t x[t+w,i] δ[t,o]: an Outer over patches of x."""
    _only_kernel(site, data=0)
    *window, inputs, outputs = known(site.weight.shape)
    form = _Form.of(site)
    x, delta = form.channels_last(site.stacked(0), 1), form.channels_last(delta, 3)
    out = known(delta.shape[3:-1])
    patches = form.patches(x, window, out, site.fold)
    t = site.fold * math.prod(out)
    count = delta.shape[1] or tf.shape(delta)[1]
    groups = known(x.shape[1:])[-1] // inputs
    if groups == 1:
        layout = site.layout.reshape([math.prod(window) * inputs, outputs])
        delta = batched(delta, site.batch, [count, t, outputs])
        if math.prod(window) == 1:
            return Outer(layout, patches.columns(), delta)
        return Outer(layout, patches, delta)
    # Channels come as (group, channel of the group), on both sides.
    w, share = math.prod(window), outputs // groups
    columns = batched(patches.columns(), site.batch, [t, w, groups, inputs])
    columns = batched(tf.transpose(columns, [0, 1, 3, 2, 4]), site.batch, [t, groups, w * inputs])
    layout = site.layout.reshape([w * inputs, groups, share]).transpose([1, 0, 2])
    return Grouped(layout, columns, batched(delta, site.batch, [count, t, groups, share]))


@rule("Conv2DBackpropInput", "Conv3DBackpropInputV2")
def transposed_convolution(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y[t+w] = Σ_t W[w] x[t], so J[w,i,o] = Σ_t δ[t+w,i] x[t,o]: the data and δ change places."""
    _only_kernel(site, data=2)
    *window, inputs, outputs = known(site.weight.shape)
    form = _Form.of(site)
    x, delta = form.channels_last(site.stacked(2), 1), form.channels_last(delta, 3)
    positions = known(x.shape[1:-1])
    t = site.fold * math.prod(positions)
    count = delta.shape[1] or tf.shape(delta)[1]
    pictures = tf.reshape(delta, [-1, *delta.shape[3:]])
    seen = form.patches(pictures, window, positions, site.fold).columns()
    columns = math.prod(window) * inputs
    return Outer(
        site.layout.reshape([columns, outputs]).transpose([1, 0]),
        batched(x, site.batch, [t, outputs]),
        batched(seen, site.batch, [count, t, columns]),
    )


@rule("DepthwiseConv2dNative")
def depthwise(site: BoundSite, delta: tf.Tensor) -> Factor:
    """Each channel has kernels of its own: the rows are few, so they are formed at once.

    The batch, the rows and the folded positions go into the channels of one ordinary backward
    pass, (1, H, W, B·K·F·C): 2.2 ms where a patch for every position takes 63 (48×48×96, B = 8).
    """
    _only_kernel(site, data=0)
    height, width, channels, multiplier = known(site.weight.shape)
    form = _Form.of(site)
    if set(form.dilations) != {1}:
        raise NoRule("a dilated depthwise convolution")
    x, delta = form.channels_last(site.stacked(0), 1), form.channels_last(delta, 3)
    out = known(delta.shape[3:-1])
    x = form.padded(x, [height, width])
    count = delta.shape[1] or tf.shape(delta)[1]
    maps = site.batch * count * site.fold
    # x (B·F, H, W, C) once for each row: (H, W, B, K, F, C).
    seen = batched(x, site.batch, [1, site.fold, *known(x.shape[1:])])
    seen = tf.transpose(tf.repeat(seen, count, 1), [3, 4, 0, 1, 2, 5])
    seen = tf.reshape(seen, [1, *known(x.shape[1:3]), maps * channels])
    delta = batched(delta, site.batch, [count, site.fold, *out, channels * multiplier])
    delta = tf.transpose(delta, [3, 4, 0, 1, 2, 5])
    rows = tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
        input=seen,
        filter_sizes=[height, width, maps * channels, multiplier],
        out_backprop=tf.reshape(delta, [1, *out, maps * channels * multiplier]),
        strides=[1, *form.strides, 1],
        padding="VALID",
    )
    rows = tf.reshape(rows, [height, width, site.batch, count, site.fold, channels, multiplier])
    rows = tf.transpose(tf.reduce_sum(rows, 4), [2, 3, 0, 1, 4, 5])
    return Explicit(site.layout, rows, groups=2)


def _only_kernel(site: BoundSite, data: int) -> None:
    if site.operand != 1:
        raise NoRule("the weight is the picture, not the kernel")
    pictures = [site.output, site.op.inputs[data]]
    if not all(picture.shape[1:].is_fully_defined() for picture in pictures):
        raise NoRule("the picture's size is unknown")


@dataclasses.dataclass(frozen=True)
class _Form:
    """A convolution's attributes, along the spatial axes only.

    `padding` is "VALID", "SAME", or (before, after) for each axis.
    """

    channels_first: bool
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, site: BoundSite) -> _Form:
        first = site.attr("data_format") in ("NCHW", "NCDHW")
        spatial = slice(2, None) if first else slice(1, -1)
        padding = site.attr("padding")
        if padding == "EXPLICIT":
            ends = list(site.attr("explicit_paddings"))
            padding = tuple(zip(ends[::2], ends[1::2], strict=True))[spatial]
        strides, dilations = (tuple(site.attr(n))[spatial] for n in ("strides", "dilations"))
        return cls(first, strides, dilations, padding)

    def channels_last(self, tensor: tf.Tensor, lead: int) -> tf.Tensor:
        """Return (*lead, *spatial, channels)."""
        if not self.channels_first:
            return tensor
        rank = len(tensor.shape)
        return tf.transpose(tensor, [*range(lead), *range(lead + 1, rank), lead])

    def padded(self, x: tf.Tensor, window: Sequence[int]) -> tf.Tensor:
        """Pad x (N, *spatial, channels) with the zeros that the padding stands for."""
        if self.padding == "VALID":
            return x
        ends = self.padding if isinstance(self.padding, tuple) else self._same(x, window)
        return tf.pad(x, [[0, 0], *ends, [0, 0]])

    def _same(self, x: tf.Tensor, window: Sequence[int]) -> list[tuple[int, int]]:
        ends = []
        for length, size, stride, dilation in zip(
            known(x.shape[1:-1]), window, self.strides, self.dilations, strict=True
        ):
            reach = (size - 1) * dilation + 1
            total = max((-(-length // stride) - 1) * stride + reach - length, 0)
            ends.append((total // 2, total - total // 2))
        return ends

    def patches(
        self, x: tf.Tensor, window: Sequence[int], out: Sequence[int], fold: int
    ) -> Patches:
        """Return what each of `out` positions sees of x (N·fold, *spatial, channels)."""
        padded = self.padded(x, window)
        return Patches(padded, tuple(window), self.strides, self.dilations, tuple(out), fold)
