"""Operations with the batch on another axis than the first, done with the batch in front.

Rules read the examples along the first axis. Where a weight meets data whose batch lies elsewhere
(time first, say, or a step of a larger Einstein sum), the data is turned, and the result turned
back. Knows GraphDefs and shapes; must not know rules or which tensors are weights.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend.shapes import known
from perjac._core.graph.builder import Builder, alone
from perjac._core.graph.inline import canonical

_TRANSPOSES = {
    "MatMul": ("transpose_a", "transpose_b"),
    "BatchMatMulV2": ("adj_x", "adj_y"),
    "BatchMatMulV3": ("adj_x", "adj_y"),
}
_PRODUCTS = {"Einsum", *_TRANSPOSES}
_BINARY = {"Add", "AddV2", "Sub", "Mul", "RealDiv", "Maximum", "Minimum", "SquaredDifference"}
TURNED = _PRODUCTS | _BINARY | {"Tile"}


def place(shape: tf.TensorShape) -> int | None:
    """Return the batch's axis: the only one that is unknown."""
    unknown = [n for n, dim in enumerate(shape) if dim is None] if shape.rank else []
    return unknown[0] if len(unknown) == 1 else None


def elsewhere(graph: Any, shapes: Mapping[str, tf.TensorShape]) -> set[str]:
    """Return the operations of the traced graph that have their batch on another axis.

    `shapes` are those of the tensors that have a batch, unknown only there.
    """
    return {
        op.name
        for op in graph.get_operations()
        if op.type in TURNED
        and any(t.name in shapes and place(shapes[t.name]) for t in [*op.inputs, *op.outputs])
    }


def turn(shapes: Mapping[str, tf.TensorShape], build: Builder, node: Any) -> Sequence[tf.Tensor]:
    """Build an operation with the batch in front, where it has one operand of known shape."""
    operands = build.inputs(node)
    if node.op == "Tile":
        return _tiled(node, operands, shapes.get(f"{node.name}:0"))
    for reference, tensor in zip(node.input, operands, strict=False):
        if canonical(reference) in shapes:
            tensor.set_shape(shapes[canonical(reference)])
    ranks = [t.shape.rank for t in operands]
    if len(ranks) != 2 or None in ranks or not any(t.shape.is_fully_defined() for t in operands):
        return alone(node, operands)
    x, y = operands
    if node.op in _PRODUCTS:
        return _product(node, x, y)
    return _binary(node, x, y)


def _product(node: Any, x: tf.Tensor, y: tf.Tensor) -> Sequence[tf.Tensor]:
    equation = _equation(node, x, y)
    data = next((t for t in (x, y) if place(t.shape) is not None), None)
    if data is None or "..." in equation:
        return alone(node, [x, y])
    inputs, out = equation.split("->")
    terms = dict(zip(("x", "y"), inputs.split(","), strict=True))
    key = "x" if data is x else "y"
    batch = terms[key][place(data.shape) or 0]
    if batch not in out or (terms[key][0] == batch and out[0] == batch):
        return alone(node, [x, y])
    turned, terms[key] = _turned(data, terms[key], batch)
    front = batch + out.replace(batch, "")
    operands = [turned, y] if key == "x" else [x, turned]
    result = tf.raw_ops.Einsum(inputs=operands, equation=f"{terms['x']},{terms['y']}->{front}")
    return [_turned(result, front, order=out)[0]]


def _equation(node: Any, x: tf.Tensor, y: tf.Tensor) -> str:
    """Return what a product computes, an axis a letter; with "..." where axes are broadcast."""
    if node.op == "Einsum":
        return node.attr["equation"].s.decode().replace(" ", "")
    lead = string.ascii_uppercase[: max(x.shape.rank, y.shape.rank) - 2]
    sides = []
    flags = _TRANSPOSES[node.op]
    for tensor, flag, plain, swapped in ((x, flags[0], "ni", "in"), (y, flags[1], "io", "oi")):
        own = lead[len(lead) - (tensor.shape.rank - 2) :]
        if 1 in tensor.shape[: len(own)]:
            return "..."
        sides.append(own + (swapped if node.attr[flag].b else plain))
    return f"{sides[0]},{sides[1]}->{lead}no"


def _turned(tensor: tf.Tensor, term: str, batch: str = "", order: str = "") -> tuple[Any, str]:
    """Return a tensor with its axes in another order, or the batch in front, and the order."""
    order = order or batch + term.replace(batch, "")
    if order == term:
        return tensor, order
    return tf.transpose(tensor, [term.index(c) for c in order]), order


def _tiled(
    node: Any, operands: Sequence[tf.Tensor], shape: tf.TensorShape | None
) -> Sequence[tf.Tensor]:
    """Repeat something of known shape along the batch, which comes in front."""
    part, copies = operands
    axis = None if shape is None else place(shape)
    if shape is None or not axis or not part.shape.is_fully_defined():
        return alone(node, operands)
    order = [axis, *(n for n in range(shape.rank) if n != axis)]
    turned = tf.tile(tf.transpose(part, order), tf.gather(copies, order))
    return [tf.transpose(turned, sorted(range(shape.rank), key=order.__getitem__))]


def _binary(node: Any, x: tf.Tensor, y: tf.Tensor) -> Sequence[tf.Tensor]:
    data, other = (y, x) if x.shape.is_fully_defined() else (x, y)
    axis, rank = place(data.shape), data.shape.rank
    if not axis or other.shape.rank > rank:
        return alone(node, [x, y])
    order = [axis, *(n for n in range(rank) if n != axis)]
    full = tf.reshape(other, [1] * (rank - other.shape.rank) + list(known(other.shape)))
    turned = {id(data): tf.transpose(data, order), id(other): tf.transpose(full, order)}
    (result,) = alone(node, [turned[id(x)], turned[id(y)]])
    return [tf.transpose(result, sorted(range(rank), key=order.__getitem__))]
