"""Rows folded into the batch: a backward pass for all K at once, through operations that allow it.

TensorFlow's own gradients want a row as large as the operation's data, so K rows are K passes. Here
a linear layer takes all rows in one product, and an elementwise step multiplies them by its slope,
which all rows of an example share: nothing is tiled, stacked or transposed, and while the rows are
the same for all examples they are held once. Every step is known both ways, so columns go through
forward as well. Knows operations; must not know models, weights or what is asked.

Letters: b is B, or 1 while all examples have the same rows; F positions folded into the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend import host
from perjac._core.backend.shapes import Extent, known
from perjac._core.graph.program import Program
from perjac._core.graph.walk import between

# Axes of an example, at most: rows, folds and the batch come in front, and TensorFlow broadcasts
# no more than so many together.
_AXES = 3


@dataclasses.dataclass(frozen=True)
class Step:
    """One operand of one operation on the way.

    Attributes
    ----------
    operation : str
        Its name in the trace.
    operand : int
        The input that is differentiated by.
    below, above : str
        The tensors there, and of the result.
    source, target : Extent
        Of the two.
    other : tuple or None
        The shape of the other operand, where there are two and it is known.
    """

    operation: str
    operand: int
    below: str
    above: str
    source: Extent
    target: Extent
    other: tuple[int | None, ...] | None


Rule = tuple[
    Callable[[Any, Step], bool],  # whether it covers an operation of the trace
    Callable[[Any, Step, tf.Tensor], tf.Tensor],  # back: (b, K, F, *target) to (b, K, F', *source)
    Callable[[Any, Step, tf.Tensor], tf.Tensor],  # ahead, the other way round
]


@dataclasses.dataclass(frozen=True)
class Passage:
    """All steps between an output and the tensors below it, in the order of the trace."""

    top: str
    bottoms: tuple[str, ...]
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, program: Program, top: str, bottoms: Sequence[str]) -> Passage | None:
        """Return the way from one tensor of a trace down to others, or None without a rule."""
        steps = []
        for op, operand in between(program, top, bottoms):
            below, above = op.inputs[operand].name, op.outputs[0].name
            if not {below, above} <= program.extents.keys() or op.type not in RULES:
                return None
            ends = program.extents[below], program.extents[above]
            if max(len(end.rest) for end in ends) > _AXES:
                return None
            step = Step(op.name, operand, below, above, *ends, _other(op, operand))
            if not is_plain(op) or not RULES[op.type][0](op, step):
                return None
            steps.append(step)
        return cls(top, tuple(bottoms), tuple(steps))

    @property
    def operations(self) -> list[str]:
        """The names of the operations that are needed in the graph being built."""
        return [step.operation for step in self.steps]

    def rows(self, found: Mapping[str, Any], seeds: tf.Tensor) -> list[tf.Tensor | None]:
        """Return the cotangents of the bottoms, (b, K, F, ...), for seeds (b, K, 1, *top)."""
        arrived: dict[str, list[tf.Tensor]] = {self.top: [seeds]}
        for step in reversed(self.steps):
            if step.above in arrived:
                delta = _total(arrived[step.above])
                arrived[step.above] = [delta]
                op = found[step.operation]
                back = RULES[op.type][1]
                arrived.setdefault(step.below, []).append(back(op, step, delta))
        return [_total(arrived[name]) if name in arrived else None for name in self.bottoms]

    def columns(self, found: Mapping[str, Any], tangents: tf.Tensor) -> tf.Tensor | None:
        """Return the tangents of the top, (b, D, 1, *top), for those of the one bottom."""
        arrived: dict[str, list[tf.Tensor]] = {self.bottoms[0]: [tangents]}
        for step in self.steps:
            if step.below in arrived:
                op = found[step.operation]
                ahead = RULES[op.type][2]
                tangent = ahead(op, step, _total(arrived[step.below]))
                arrived.setdefault(step.above, []).append(tangent)
        return _total(arrived[self.top]) if self.top in arrived else None


def is_plain(op: Any) -> bool:
    """Tell whether an operation is of real numbers, and goes back in the way that its type says."""
    return op.outputs[0].dtype.is_floating and not host.goes_its_own_way(op)


def _total(parts: list[tf.Tensor]) -> tf.Tensor:
    """Add up what arrives by several ways; some may be the same for all examples."""
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def _alike(op: Any, step: Step) -> bool:
    return step.source == step.target


def _unchanged(op: Any, step: Step, delta: tf.Tensor) -> tf.Tensor:
    return delta


def _negated(op: Any, step: Step, delta: tf.Tensor) -> tf.Tensor:
    return -delta if op.type == "Neg" or step.operand == 1 else delta


def _sloped(op: Any, step: Step, delta: tf.Tensor) -> tf.Tensor:
    """y = f(x) entry by entry: J is a diagonal, f's own gradient of ones."""
    (slope,) = tf.gradients(op.outputs[0], op.inputs[0])
    return delta * _beside_rows(slope, step.target)


def _other(op: Any, operand: int) -> tuple[int | None, ...] | None:
    shape = op.inputs[1 - operand].shape if len(op.inputs) == 2 and operand < 2 else None
    return None if shape is None or shape.rank is None else tuple(shape.as_list())


def _has_factor(op: Any, step: Step) -> bool:
    """Tell whether the other operand is spread over the batch, or has it in front as well."""
    if (
        step.source != step.target
        or step.other is None
        or (op.type, step.operand) == ("RealDiv", 1)
    ):
        return False
    rank = len(step.target.rest)
    if None not in step.other:
        return len(step.other) <= rank or (len(step.other) == 1 + rank and step.other[0] == 1)
    return len(step.other) == 1 + rank and step.other[0] is None and None not in step.other[1:]


def _scaled(op: Any, step: Step, delta: tf.Tensor) -> tf.Tensor:
    """y = x · c or x / c: c may be data as well."""
    factor = op.inputs[1 - step.operand]
    assert step.other is not None
    if len(step.other) > len(step.target.rest):
        one, rest = step.other[0] == 1, known(step.other[1:])
        factor = tf.reshape(factor, rest if one else [-1, 1, step.target.fold, *rest])
    return delta / factor if op.type == "RealDiv" else delta * factor


def _by_weights(op: Any, step: Step) -> bool:
    return step.operand == 0 and not op.get_attr("transpose_a") and op.inputs[1].shape.rank == 2


def _matmul_back(op: Any, step: Step, delta: tf.Tensor) -> tf.Tensor:
    """y = x W: δ Wᵀ."""
    return _multiplied(delta, op.inputs[1], not op.get_attr("transpose_b"), step.source)


def _matmul_ahead(op: Any, step: Step, tangent: tf.Tensor) -> tf.Tensor:
    """y = x W: ẋ W."""
    return _multiplied(tangent, op.inputs[1], op.get_attr("transpose_b"), step.target)


def _multiplied(rows: tf.Tensor, w: tf.Tensor, transposed: bool, extent: Extent) -> tf.Tensor:
    flat = tf.reshape(rows, [-1, rows.shape[-1]])
    product = tf.matmul(flat, w, transpose_b=transposed)
    return tf.reshape(product, [-1, rows.shape[1], extent.fold, *extent.rest])


def _is_static(op: Any, step: Step) -> bool:
    return step.operand == 0


def _reshaped_back(op: Any, step: Step, delta: tf.Tensor) -> tf.Tensor:
    return tf.reshape(delta, [-1, delta.shape[1], step.source.fold, *step.source.rest])


def _reshaped_ahead(op: Any, step: Step, tangent: tf.Tensor) -> tf.Tensor:
    return tf.reshape(tangent, [-1, tangent.shape[1], step.target.fold, *step.target.rest])


def _along_last(op: Any, step: Step) -> bool:
    return step.source == step.target and len(step.target.rest) > 0


def _softmax(op: Any, step: Step, delta: tf.Tensor) -> tf.Tensor:
    """p = softmax(x): J = diag(p) - p pᵀ, its own transpose."""
    p = _beside_rows(op.outputs[0], step.target)
    weighted = delta * p
    return weighted - p * tf.reduce_sum(weighted, -1, keepdims=True)


def _log_softmax_back(op: Any, step: Step, delta: tf.Tensor) -> tf.Tensor:
    """y = log softmax(x): J = 1 - 1 pᵀ."""
    p = tf.exp(_beside_rows(op.outputs[0], step.target))
    return delta - p * tf.reduce_sum(delta, -1, keepdims=True)


def _log_softmax_ahead(op: Any, step: Step, tangent: tf.Tensor) -> tf.Tensor:
    p = tf.exp(_beside_rows(op.outputs[0], step.target))
    return tangent - tf.reduce_sum(tangent * p, -1, keepdims=True)


def _beside_rows(tensor: tf.Tensor, extent: Extent) -> tf.Tensor:
    """Give a tensor (B·F, ...) an axis that all rows share, (B, 1, F, ...)."""
    return tf.reshape(tensor, [-1, 1, extent.fold, *extent.rest])


_RELABELS = ("Reshape", "Squeeze", "ExpandDims")
_SUMS = ("Add", "AddV2", "BiasAdd", "Identity")
ENTRY_BY_ENTRY = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cos", "Cosh", "Elu", "Erf", "Erfc",
    "Exp", "Expm1", "LeakyRelu", "Log", "Log1p", "Reciprocal", "Relu", "Relu6", "Rsqrt", "Selu",
    "Sigmoid", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Square", "Tan", "Tanh",
)  # fmt: skip
_RESHAPED = (_is_static, _reshaped_back, _reshaped_ahead)
RULES: dict[str, Rule] = {
    **dict.fromkeys(ENTRY_BY_ENTRY, (_alike, _sloped, _sloped)),
    **dict.fromkeys(_SUMS, (_alike, _unchanged, _unchanged)),
    **dict.fromkeys(("Neg", "Sub"), (_alike, _negated, _negated)),
    **dict.fromkeys(("Mul", "RealDiv"), (_has_factor, _scaled, _scaled)),
    **dict.fromkeys(_RELABELS, _RESHAPED),
    "MatMul": (_by_weights, _matmul_back, _matmul_ahead),
    "Softmax": (_along_last, _softmax, _softmax),
    "LogSoftmax": (_along_last, _log_softmax_back, _log_softmax_ahead),
}
