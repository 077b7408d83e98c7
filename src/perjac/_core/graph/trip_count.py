"""How often a while loop runs, where that is a number: read off its counter and its condition.

Knows functions' nodes; must not know what a loop computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.graph.importing import node_of
from perjac._core.graph.inline import Body, canonical

# Comparisons that end a loop, and the same seen from the other side.
_MIRRORED = {
    "Less": "Greater",
    "LessEqual": "GreaterEqual",
    "Greater": "Less",
    "GreaterEqual": "LessEqual",
}


def through_identities(nodes: Mapping[str, Any], reference: str) -> str:
    """Return what a tensor is a copy of."""
    while (node := nodes.get(node_of(reference))) is not None and node.op == "Identity":
        reference = canonical(node.input[0])
    return reference


def most_steps(body: Body, condition: Body, outer: Sequence[tf.Tensor]) -> int | None:
    """Return the most steps that a loop can take, or None where that is no number.

    Parameters
    ----------
    body, condition : Body
        The functions that the loop calls.
    outer : sequence of tf.Tensor
        The loop variables' first values.
    """
    nodes = {node.name: node for node in condition.nodes}
    bounds = []
    conditions = list(condition.results)  # all of which must hold to go on
    while conditions:
        node = nodes.get(node_of(conditions.pop()))
        if node is None:
            continue
        operands = [canonical(r) for r in node.input if not r.startswith("^")]
        if node.op in ("LogicalAnd", "Identity"):
            conditions += operands
        elif node.op in _MIRRORED:
            left, right = operands
            bounds.append(_bound(node.op, left, right, body, condition, outer))
    return min((bound for bound in bounds if bound is not None), default=None)


def _bound(
    comparison: str,
    counter: str,
    limit: str,
    body: Body,
    condition: Body,
    outer: Sequence[tf.Tensor],
) -> int | None:
    """Return how often in a row a comparison of a counter with a limit can hold."""
    for left, right, kind in (
        (counter, limit, comparison),
        (limit, counter, _MIRRORED[comparison]),
    ):
        if left not in condition.arguments:
            continue
        n = condition.arguments.index(left)
        start, stride = _number(outer[n]), _stride(body, n, outer)
        end = _staying(condition, body, right, outer)
        if start is None or end is None or not stride:
            continue
        if stride < 0:
            start, stride, end, kind = -start, -stride, -end, _MIRRORED[kind]
        if kind.startswith("Less"):
            return max(0, -((start - end - kind.endswith("Equal")) // stride))
    return None


def _stride(body: Body, n: int, outer: Sequence[tf.Tensor]) -> int | None:
    """Return what each step adds to loop variable n, or None where that is no number."""
    nodes = {node.name: node for node in body.nodes}
    node = nodes.get(node_of(through_identities(nodes, body.results[n])))
    if node is None or node.op not in ("Add", "AddV2", "Sub"):
        return None
    left, right = (through_identities(nodes, canonical(r)) for r in node.input[:2])
    if right == body.arguments[n] and node.op != "Sub":
        left, right = right, left
    added = _staying(body, body, right, outer)
    if left != body.arguments[n] or added is None:
        return None
    return -added if node.op == "Sub" else added


def _staying(function: Body, body: Body, reference: str, outer: Sequence[tf.Tensor]) -> int | None:
    """Return what a tensor of the body or the condition is, where that is a number that stays."""
    nodes = {node.name: node for node in function.nodes}
    reference = through_identities(nodes, reference)
    if reference not in function.arguments:
        return _constant(nodes, reference)
    n = function.arguments.index(reference)
    stays = through_identities({x.name: x for x in body.nodes}, body.results[n])
    return _number(outer[n]) if stays == body.arguments[n] else None


def _constant(nodes: Mapping[str, Any], reference: str) -> int | None:
    node = nodes.get(node_of(reference))
    if node is None or node.op != "Const":
        return None
    value = tf.make_ndarray(node.attr["value"].tensor)
    return int(value) if value.ndim == 0 and value.dtype.kind in "iu" else None


def _number(tensor: tf.Tensor) -> int | None:
    """Return a whole number's value, if it is known in the graph being built."""
    if tensor.shape.rank != 0 or not tensor.dtype.is_integer:
        return None
    value = tf.get_static_value(tensor)
    if value is not None:
        return int(value)
    # Shape inference works out what the shapes of the data say, constant folding does not.
    return tf.zeros(tf.reshape(tensor, [1])).shape[0]
