"""Convolutions that TensorFlow runs on a CPU only under XLA, from operations that run anywhere.

Keras marks grouped convolutions, and three-dimensional ones with the channels first, for XLA: pfor
mistakes their gradients and float64 references cannot run them. What stands in for one computes the
same; the operation itself stays in the graph, not run, as the site for its weight's rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend.shapes import known
from perjac._core.graph.builder import Builder, alone

CONVOLUTIONS = {"Conv2D", "Conv3D"}


def lower(build: Builder, node: Any, for_rules: bool) -> tuple[Sequence[tf.Tensor], dict[str, str]]:
    """Build a convolution from plain ones; return its result and what stands in for it.

    `for_rules` says that the weight meets the data at the operation itself and nowhere else.
    """
    x, kernel = build.inputs(node)
    asked = {key: node.attr[key] for key in ("data_format", "padding")}
    first = asked["data_format"].s in (b"NCHW", b"NCDHW")
    rank = x.shape.rank
    last = [0, *range(2, rank), 1] if first else list(range(rank))
    x_last = _moved(x, last)
    options = {
        name: [list(node.attr[name].list.i)[axis] for axis in last]
        for name in ("strides", "dilations")
        if name in node.attr and node.attr[name].list.i
    }
    explicit = list(node.attr["explicit_paddings"].list.i) if node.op == "Conv2D" else []
    if explicit:
        pairs = list(zip(explicit[::2], explicit[1::2], strict=True))
        x_last = tf.pad(x_last, [pairs[axis] for axis in last])
    padding = "VALID" if explicit else asked["padding"].s.decode()
    groups = known(x_last.shape[-1:])[0] // known(kernel.shape[-2:-1])[0]
    if _is_depthwise(kernel, groups, options):
        *window, _, outputs = known(kernel.shape)
        split = tf.reshape(kernel, [*window, groups, outputs // groups])
        y = tf.raw_ops.DepthwiseConv2dNative(
            input=x_last, filter=split, padding=padding, strides=options["strides"]
        )
        return [_back(y, last)], {}
    run = getattr(tf.raw_ops, node.op)
    constant = tf.stop_gradient(kernel) if for_rules else kernel
    parts = zip(tf.split(x_last, groups, -1), tf.split(constant, groups, -1), strict=True)
    y = tf.concat([run(input=a, filter=w, padding=padding, **options) for a, w in parts], -1)
    y = _back(y, last)
    if not for_rules:
        return [y], {}
    (site,) = alone(node, [x, kernel])
    return [y], {site.op.name: y.name}


def _is_depthwise(kernel: Any, groups: int, options: dict[str, list[int]]) -> bool:
    strides, dilations = options["strides"], options.get("dilations", [1])
    return (
        kernel.shape.rank == 4
        and known(kernel.shape)[2] == 1
        and groups > 1
        and strides[1] == strides[2]
        and set(dilations) == {1}
    )


def _moved(tensor: tf.Tensor, axes: list[int]) -> tf.Tensor:
    return tensor if axes == sorted(axes) else tf.transpose(tensor, axes)


def _back(y: tf.Tensor, last: list[int]) -> tf.Tensor:
    """Undo the transposition that put the channels last."""
    return _moved(y, sorted(range(len(last)), key=last.__getitem__))
