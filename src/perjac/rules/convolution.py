"""Convolutions: a weight meets a window of the data at every output position."""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf

from perjac.factors import Explicit, Factor, Grouped, Outer
from perjac.patches import Patches
from perjac.rules.bound import BoundSite, NoRule
from perjac.rules.registry import rule
from perjac.shapes import known


@rule("Conv2D")
def convolution(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y[t] = Σ_w x[t+w] W[w], so J[w,i,o] = Σ_t x[t+w,i] δ[t,o]: an Outer over patches of x."""
    _only_kernel(site)
    *window, inputs, outputs = known(site.weight.shape)
    x, delta, out = _channels_last(site, delta)
    strides, dilations = _spatial(site, "strides"), _spatial(site, "dilations")
    x = _padded(site, x, window, strides, dilations)
    patches = Patches(x, tuple(window), strides, dilations, tuple(out), site.fold)
    t = site.fold * math.prod(patches.output)
    count = delta.shape[1] or tf.shape(delta)[1]
    groups = known(x.shape[1:])[-1] // inputs
    if groups == 1:
        layout = site.layout.reshape([math.prod(window) * inputs, outputs])
        delta = tf.reshape(delta, [site.batch, count, t, outputs])
        if math.prod(window) == 1:
            return Outer(layout, patches.columns(), delta)
        return Outer(layout, patches, delta)
    # Channels come as (group, channel of the group), on both sides.
    w, share = math.prod(window), outputs // groups
    columns = tf.reshape(patches.columns(), [site.batch, t, w, groups, inputs])
    columns = tf.reshape(
        tf.transpose(columns, [0, 1, 3, 2, 4]), [site.batch, t, groups, w * inputs]
    )
    layout = site.layout.reshape([w * inputs, groups, share]).transpose([1, 0, 2])
    return Grouped(layout, columns, tf.reshape(delta, [site.batch, count, t, groups, share]))


@rule("DepthwiseConv2dNative")
def depthwise(site: BoundSite, delta: tf.Tensor) -> Factor:
    """Each channel has kernels of its own: the rows are few, so they are formed at once.

    The batch, the rows and the folded positions go into the channels of one ordinary backward
    pass, (1, H, W, B·K·F·C): 2.2 ms where a patch for every position takes 63 (48×48×96, B = 8).
    """
    _only_kernel(site)
    if set(site.attr("dilations")) != {1}:
        raise NoRule("a dilated depthwise convolution")
    height, width, channels, multiplier = known(site.weight.shape)
    x, delta, out = _channels_last(site, delta)
    strides = _spatial(site, "strides")
    x = _padded(site, x, [height, width], strides, (1, 1))
    count = delta.shape[1] or tf.shape(delta)[1]
    maps = site.batch * count * site.fold
    # x (B·F, H, W, C) once for each row: (H, W, B, K, F, C).
    seen = tf.reshape(x, [site.batch, 1, site.fold, *x.shape[1:]])
    seen = tf.transpose(tf.repeat(seen, count, 1), [3, 4, 0, 1, 2, 5])
    seen = tf.reshape(seen, [1, *known(x.shape[1:3]), maps * channels])
    delta = tf.reshape(delta, [site.batch, count, site.fold, *out, channels * multiplier])
    delta = tf.transpose(delta, [3, 4, 0, 1, 2, 5])
    rows = tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
        input=seen,
        filter_sizes=[height, width, maps * channels, multiplier],
        out_backprop=tf.reshape(delta, [1, *out, maps * channels * multiplier]),
        strides=[1, *strides, 1],
        padding="VALID",
    )
    rows = tf.reshape(rows, [height, width, site.batch, count, site.fold, channels, multiplier])
    rows = tf.transpose(tf.reduce_sum(rows, 4), [2, 3, 0, 1, 4, 5])
    return Explicit(site.layout, rows)


def _only_kernel(site: BoundSite) -> None:
    if site.operand != 1:
        raise NoRule("the weight is the picture, not the kernel")
    if (
        not site.output.shape[1:].is_fully_defined()
        or not site.op.inputs[0].shape[1:].is_fully_defined()
    ):
        raise NoRule("the picture's size is unknown")


def _channels_last(site: BoundSite, delta: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, list[int]]:
    """Return x, δ and the output's spatial size with the channels as the last axis."""
    x, out = site.stacked(0), list(known(site.output.shape[1:]))
    if site.attr("data_format") == "NHWC":
        return x, delta, out[:-1]
    return tf.transpose(x, [0, 2, 3, 1]), tf.transpose(delta, [0, 1, 2, 4, 5, 3]), out[1:]


def _spatial(site: BoundSite, name: str) -> tuple[int, int]:
    """Return an attribute that has an entry for each axis, along the spatial axes only."""
    values = list(site.attr(name))
    return tuple(values[1:3] if site.attr("data_format") == "NHWC" else values[2:4])  # type: ignore


def _padded(
    site: BoundSite,
    x: tf.Tensor,
    window: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tf.Tensor:
    """Pad x (N, H, W, C) with the zeros that the operation's padding stands for."""
    padding = site.attr("padding")
    if padding == "VALID":
        return x
    if padding == "EXPLICIT":
        pairs = list(site.attr("explicit_paddings"))
        start = 2 if site.attr("data_format") == "NHWC" else 4
        spatial = [pairs[start : start + 2], pairs[start + 2 : start + 4]]
    else:
        spatial = []
        for length, size, stride, dilation in zip(
            known(x.shape[1:3]), window, strides, dilations, strict=True
        ):
            reach = (size - 1) * dilation + 1
            total = max((-(-length // stride) - 1) * stride + reach - length, 0)
            spatial.append([total // 2, total - total // 2])
    return tf.pad(x, [[0, 0], *spatial, [0, 0]])
