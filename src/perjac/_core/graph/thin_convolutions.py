"""Backward steps of our own, for operations whose TensorFlow kernels are slow at it on a CPU.

Knows operations; must not know models, rows or what is asked. Which operation gets which is marked
in a GraphDef, where `tf.gradients` looks first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from perjac._core.backend.shapes import known, size

# Above this many input channels oneDNN's convolutions are as fast backward as a product of
# matrices: measured at 1 channel 3 to 6 times slower, at 4 channels 1.4 times, at 8 faster.
_THIN = 4


def quickened(graph: Any, graph_def: Any) -> Any:
    """Return a copy of a graph's GraphDef that says where a backward step of ours is quicker.

    Parameters
    ----------
    graph : tf.Graph
        For the shapes.
    graph_def : GraphDef
        Of it; not changed.

    Returns
    -------
    GraphDef
        The same one if there is nothing to gain, as on a GPU, for which all this is not measured.
    """
    if tf.config.list_physical_devices("GPU"):
        return graph_def
    chosen = {}
    for node in graph_def.node:
        if node.op in _STEPS and "_gradient_op_type" not in node.attr:
            name, suits, _ = _STEPS[node.op]
            if suits(graph.get_operation_by_name(node.name)):
                chosen[node.name] = name.encode()
    if not chosen:
        return graph_def
    copy = type(graph_def)()
    copy.CopyFrom(graph_def)
    for node in copy.node:
        if node.name in chosen:
            node.attr["_gradient_op_type"].s = chosen[node.name]
    return copy


def laid_out(op: Any) -> int:
    """Return the numbers that a step of ours lays out for each position of a result, if any does.

    Every entry of the kernel times every position, as made and as moved.
    """
    if op.type not in _STEPS or not _STEPS[op.type][1](op):
        return 0
    return 2 * size(op.inputs[1].shape[:-1])


def _is_thin(op: Any) -> bool:
    """Tell whether a convolution takes every position, of few channels."""
    x, kernel = (tensor.shape for tensor in op.inputs)
    return (
        op.get_attr("data_format") == b"NHWC"
        and x[1:].is_fully_defined()
        and kernel.is_fully_defined()
        and set(op.get_attr("strides")) == set(op.get_attr("dilations")) == {1}
        and x[-1] == kernel[-2] <= _THIN
        and kernel[-1] > kernel[-2]
    )


def _thin_convolution(op: Any, dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the cotangents of a convolution's input, and of its kernel.

    Every entry of the kernel times every position, by one product of matrices, then moved to where
    they belong and added: along the rows first, then along the columns.
    """
    x, kernel = op.inputs
    height, width, channels, features = known(kernel.shape)
    rows, columns = known(dy.shape[1:-1])
    by_entry = tf.matmul(
        tf.reshape(kernel, [-1, features]), tf.reshape(dy, [-1, features]), transpose_b=True
    )
    moved = tf.reshape(by_entry, [height, width, channels, -1, rows, columns])
    moved = tf.add_n([_shifted(moved[n], height, n, 3) for n in range(height)])
    moved = tf.add_n([_shifted(moved[n], width, n, 3) for n in range(width)])
    top, left = _before(op)
    rows, columns = known(x.shape[1:-1])
    moved = moved[:, :, top : top + rows, left : left + columns]
    dx = tf.transpose(moved, [1, 2, 3, 0])
    dw = tf.raw_ops.Conv2DBackpropFilter(
        input=x,
        filter_sizes=known(kernel.shape),
        out_backprop=dy,
        **{name: op.get_attr(name) for name in ("strides", "padding", "explicit_paddings")},
    )
    return dx, dw


def _shifted(part: tf.Tensor, window: int, by: int, axis: int) -> tf.Tensor:
    """Return a tensor with zeros about it along an axis, where a window's n-th entry belongs."""
    pads = [[0, 0]] * part.shape.rank
    pads[axis] = [by, window - 1 - by]
    return tf.pad(part, pads)


def _before(op: Any) -> tuple[int, int]:
    """Return how many rows and columns of padding a convolution without strides puts in front."""
    padding = op.get_attr("padding")
    if padding == b"VALID":
        return 0, 0
    if padding == b"EXPLICIT":
        explicit = op.get_attr("explicit_paddings")
        return explicit[2], explicit[4]
    height, width = known(op.inputs[1].shape[:2])
    return (height - 1) // 2, (width - 1) // 2


# By operation: the name that TensorFlow knows our step by, whether it suits one, and the step.
_STEPS: dict[str, tuple[str, Callable[[Any], bool], Callable[..., Any]]] = {
    "Conv2D": ("PerjacThinConvolution", _is_thin, _thin_convolution),
}
for _name, _, _step in _STEPS.values():
    tf.RegisterGradient(_name)(_step)
