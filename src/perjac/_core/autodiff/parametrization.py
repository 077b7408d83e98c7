"""Rows of ψ → rows of the variables it is made of: what lies between a weight and its site.

Most of it is entry by entry: a batch normalisation's scale is γ (σ² + ε)^-½, its shift β - μ·scale.
That goes back for all rows at once, by a product or a sum. The rest goes back by TensorFlow's own
gradient, in one vectorised map. Knows operations; must not know models, rules or factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend import host
from perjac._core.backend.shapes import known

Rows = tuple[tf.Tensor, tf.Tensor]  # ψ and its rows, (B, K, *ψ.shape)


def pull_back(
    parametrised: Sequence[Rows], values: Mapping[int, tf.Tensor]
) -> dict[int, tf.Tensor]:
    """Return the rows of each variable, (B, K, *shape), its contributions added up.

    Parameters
    ----------
    parametrised : sequence of (tensor, tensor)
        Each ψ, in the graph being built, and its rows.
    values : mapping of int to tensor
        The variables' values in that graph, by number; some ψ is made of each.
    """
    ends = {value.ref() for value in values.values()}
    reaching = _reaching([psi for psi, _ in parametrised], ends)
    rows: dict[Any, list[tf.Tensor]] = {}
    for psi, own in parametrised:
        rows.setdefault(psi.ref(), []).append(own)
    rest: list[Rows] = []
    for reference in reversed(reaching):  # each after all that is made of it
        if reference in ends or reference not in rows:
            continue
        tensor, found = reference.deref(), rows.pop(reference)
        own = found[0] if len(found) == 1 else tf.add_n(found)
        step = _STEPS.get(tensor.op.type) if _is_plain(tensor.op) else None
        if step is None:
            rest.append((tensor, own))
            continue
        for n, operand in enumerate(tensor.op.inputs):
            if operand.ref() in reaching:
                rows.setdefault(operand.ref(), []).append(step(tensor.op, n, own))
    for n, pulled in _by_gradient(rest, values).items():
        rows.setdefault(values[n].ref(), []).append(pulled)
    return {
        n: found[0] if len(found) == 1 else tf.add_n(found)
        for n, value in values.items()
        if (found := rows.get(value.ref()))
    }


def _reaching(psis: Sequence[tf.Tensor], ends: set[Any]) -> dict[Any, bool]:
    """Return the tensors between the ends and each ψ, both included, each after its operands."""
    reaches: dict[Any, bool] = {}
    stack = list(psis)
    while stack:
        tensor = stack[-1]
        reference = tensor.ref()
        if reference in reaches:
            stack.pop()
            continue
        operands = [] if reference in ends else list(tensor.op.inputs)
        waiting = [t for t in operands if t.ref() not in reaches]
        if waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        reaches[reference] = reference in ends or any(reaches[t.ref()] for t in operands)
    return {reference: True for reference, does in reaches.items() if does}


def _is_plain(op: Any) -> bool:
    """Tell whether an operation goes back as its type does, between tensors of known shapes."""
    known_shapes = all(t.shape.is_fully_defined() for t in [*op.inputs, *op.outputs])
    return known_shapes and op.outputs[0].dtype.is_floating and not host.goes_its_own_way(op)


def _reduced(op: Any, operand: int, rows: tf.Tensor) -> tf.Tensor:
    """Sum rows (B, K, *result) over the axes along which an operand is broadcast."""
    own, result = (known(t.shape) for t in (op.inputs[operand], op.outputs[0]))
    if own == result:
        return rows
    padded = [1] * (len(result) - len(own)) + list(own)
    axes = [n + 2 for n, (a, b) in enumerate(zip(padded, result, strict=True)) if a != b]
    axes += [n + 2 for n in range(len(result) - len(own)) if n + 2 not in axes]
    return _shaped(tf.reduce_sum(rows, axes, keepdims=True), own)


def _shaped(rows: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """Lay rows out as (B, K, *shape)."""
    lead = [-1 if n is None else n for n in rows.shape[:2]]
    if lead.count(-1) > 1 or 0 in shape:
        return tf.reshape(rows, tf.concat([tf.shape(rows)[:2], shape], 0))
    return tf.reshape(rows, [*lead, *shape])


def _relabelled(op: Any, operand: int, rows: tf.Tensor) -> tf.Tensor:
    return _shaped(rows, known(op.inputs[operand].shape))


def _subtracted(op: Any, operand: int, rows: tf.Tensor) -> tf.Tensor:
    return _reduced(op, operand, rows if operand == 0 else -rows)


def _multiplied(op: Any, operand: int, rows: tf.Tensor) -> tf.Tensor:
    return _reduced(op, operand, rows * op.inputs[1 - operand])


def _cast(op: Any, operand: int, rows: tf.Tensor) -> tf.Tensor:
    return tf.cast(rows, op.inputs[operand].dtype)


# How rows go back through operations on weights, from the result to an operand.
_STEPS: dict[str, Callable[[Any, int, tf.Tensor], tf.Tensor]] = {
    "Identity": lambda op, operand, rows: rows,
    "Reshape": _relabelled,
    "Squeeze": _relabelled,
    "ExpandDims": _relabelled,
    "Cast": _cast,
    "Neg": lambda op, operand, rows: -rows,
    "Add": _reduced,
    "AddV2": _reduced,
    "Sub": _subtracted,
    "Mul": _multiplied,
}


# pfor makes lists of lists of a loop's steps, which XLA does not know: rows go one after another.
_LOOPS = {"While", "StatelessWhile"}


def _between(psis: Sequence[tf.Tensor], values: Mapping[int, tf.Tensor]) -> list[Any]:
    """Return the operations between the variables and each ψ."""
    ends = {value.ref() for value in values.values()}
    return [reference.deref().op for reference in _reaching(psis, ends) if reference not in ends]


def _by_gradient(
    parametrised: Sequence[Rows], values: Mapping[int, tf.Tensor]
) -> dict[int, tf.Tensor]:
    """Pull rows back by TensorFlow's own gradient of ψ.

    All at once: 106 scales and shifts cost one vectorised map instead of 106, which took half of
    the whole tracing time.
    """
    if not parametrised:
        return {}
    psis = [psi for psi, _ in parametrised]
    lead = tf.unstack(tf.shape(parametrised[0][1])[:2])
    flat = [tf.reshape(rows, [-1, *known(psi.shape)]) for psi, rows in parametrised]
    reached: list[int] = []

    def pull(rows: list[tf.Tensor]) -> list[tf.Tensor]:
        gradients = tf.gradients(psis, list(values.values()), grad_ys=rows)
        reached[:] = [n for n, g in zip(values, gradients, strict=True) if g is not None]
        return [tf.convert_to_tensor(g) for g in gradients if g is not None] or [tf.zeros([])]

    if any(op.type in _LOOPS for op in _between(psis, values)):
        pull([tf.zeros(psi.shape, psi.dtype) for psi in psis])  # to see what is reached; pruned
        signature = [tf.TensorSpec(values[n].shape, values[n].dtype) for n in reached]
        pulled = tf.map_fn(pull, flat, fn_output_signature=signature) if reached else []
    else:
        pulled = tf.vectorized_map(pull, flat)
    return {
        n: tf.reshape(rows, [*lead, *known(values[n].shape)])
        for n, rows in zip(reached, pulled, strict=bool(reached))
    }
