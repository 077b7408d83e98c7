"""A linear operation, with all that scales and shifts its result, as one unit of relevance.

Relevance rules are written for z = Σ x w + b. In a trace that is several operations: the product, a
bias, batch normalisation's factor and shift, reshapes between them. Here they are one again, so
that normalisation is merged into the weights before it as the literature asks
(Guillemot et al. 2020, Breaking Batch Normalization for better explainability).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.graph.builder import alone
from perjac.saliency._propagation import Operation, Route

# Products of what moves with weights.
WEIGHTED = {
    "MatMul", "BatchMatMul", "BatchMatMulV2", "Einsum", "Conv2D", "Conv3D",
    "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3DBackpropInputV2",
}  # fmt: skip
# Sums of what moves alone, whose shares are in proportion.
SUMS = {
    "AddV2", "Add", "AddN", "Sub", "Neg", "Sum", "Mean", "AvgPool", "AvgPool3D", "ResizeBilinear",
    "ResizeBicubic",
}  # fmt: skip
# What only moves, copies or selects entries, so that relevance moves with them.
MOVES = {
    "Identity", "EnsureShape", "CheckNumerics", "Snapshot", "PreventGradient", "Cast", "Reshape",
    "Squeeze", "ExpandDims", "Transpose", "ConcatV2", "Pack", "Unpack", "Split", "SplitV", "Pad",
    "PadV2", "MirrorPad", "Slice", "StridedSlice", "Gather", "GatherV2", "GatherNd", "Tile",
    "BroadcastTo", "ReverseV2", "Roll", "SpaceToBatchND", "BatchToSpaceND", "SpaceToDepth",
    "DepthToSpace", "ResizeNearestNeighbor", "MatrixDiagPart",
}  # fmt: skip
# Elementwise, with one operand that moves: result = operand · factor + shift.
_SCALES, _SHIFTS = {"Mul", "RealDiv", "Neg"}, {"BiasAdd", "AddV2", "Add", "Sub"}
_RESHAPES = {"Identity", "Reshape", "Squeeze", "ExpandDims"}


def follows(operation: Operation) -> bool:
    """Tell whether an operation scales, shifts or reshapes what moves, and no more."""
    if len(operation.moving) != 1:
        return False
    if operation.type in _RESHAPES:
        return True
    if operation.type in ("RealDiv", "BiasAdd") and operation.moving != (0,):
        return False
    before, after = operation.operands[0].shape, operation.op.outputs[0].shape
    alike = before.rank is not None and before.rank == after.rank  # and nothing broadcast
    return operation.type in _SCALES | _SHIFTS and alike and before.as_list() == after.as_list()


@dataclasses.dataclass(frozen=True)
class Affine:
    """z = c ⊙ (x ∘ W) + b, in the shape of x ∘ W.

    Attributes
    ----------
    core : Operation or None
        x ∘ W; None where only scales and shifts follow one another: x itself.
    x : tf.Tensor
        What moves.
    w : tf.Tensor or None
        The weights.
    c, b, z : tf.Tensor
        Factor, shift and result.
    scaled : bool
        Whether c may be other than 1.
    first : bool
        Whether it is the first with weights after what is looked at.
    back : callable
        Brings what arrives at the unit's end into the shape of z, with no factor.
    layers : tuple of str
        The layers that its operations are of.
    """

    core: Operation | None
    x: tf.Tensor
    w: tf.Tensor | None
    c: tf.Tensor
    b: tf.Tensor
    z: tf.Tensor
    scaled: bool
    first: bool
    back: Callable[[tf.Tensor], tf.Tensor]
    layers: tuple[str, ...]

    @property
    def type(self) -> str:
        """The type of the operation at its core: "Conv2D"; "" where there is none."""
        return self.core.type if self.core else ""

    def product(
        self, x: tf.Tensor, w: tf.Tensor | None
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        """Return x ∘ w, and its transpose, which takes cotangents of it to cotangents of x."""
        core = self.core
        if core is None:
            return x, lambda dy: dy
        if x is self.x and w is self.w:
            return core.op.outputs[0], lambda dy: core.vjp([dy])[0]
        operands = list(core.op.inputs)
        operands[core.moving[0]] = x
        if w is not None:
            operands[1 - core.moving[0] if len(operands) == 2 else 1] = w
        made = alone(core.op.node_def, operands)[0].op
        return made.outputs[0], lambda dy: core.vjp([dy], made)[0]


def unit(route: Route, last: Operation, weighted: set[str]) -> Affine | None:
    """Return the longest unit that ends with an operation; None where it is only reshaped.

    Parameters
    ----------
    route : Route
        Where it lies.
    last : Operation
        Any.
    weighted : set of str
        The tensors that come after some weights.
    """
    chain: list[Operation] = []
    at: Operation | None = last
    while at is not None and follows(at):
        chain.append(at)
        before = at.operands[0]
        at = route.made_by.get(before.name) if route.is_used_once(before) else None
    core = at if at is not None and is_product(at) else None
    while core is None and chain and chain[-1].type in _RESHAPES:
        chain.pop()
    if core is None and not chain:
        return None
    start = core.op.outputs[0] if core else chain[-1].operands[0]
    x = core.operands[0] if core else start

    def back(dy: tf.Tensor) -> tf.Tensor:
        return _through(chain, dy, scaled=False)

    shift = tf.zeros_like(start)
    for operation in reversed(chain):
        operands = list(operation.op.inputs)
        operands[operation.moving[0]] = shift
        shift = alone(operation.op.node_def, operands)[0]
    return Affine(
        core=core,
        x=x,
        w=_weights(core),
        c=_through(chain, tf.ones_like(last.op.outputs[0]), scaled=True),
        b=back(shift),
        z=back(last.op.outputs[0]),
        scaled=any(o.type in _SCALES | {"Sub"} for o in chain),
        first=core is not None and x.name not in weighted,
        back=back,
        layers=tuple(o.layer for o in [*chain, *([core] if core else [])]),
    )


def is_product(operation: Operation) -> bool:
    """Tell whether an operation multiplies what moves by weights and sums."""
    return operation.type in WEIGHTED and len(operation.moving) == 1


def after_weights(route: Route) -> set[str]:
    """Return the tensors that come after some product with weights."""
    found: set[str] = set()
    for operation in route.operations:
        if is_product(operation) or any(t.name in found for t in operation.operands):
            found.update(t.name for t in operation.op.outputs)
    return found


def _through(chain: Sequence[Operation], dy: Any, *, scaled: bool) -> tf.Tensor:
    """Bring a cotangent from the end of a chain to its start, with or without its factors."""
    for operation in chain:
        if scaled or operation.type in _RESHAPES:
            dy = operation.vjp([dy])[0]
    return dy


def _weights(core: Operation | None) -> tf.Tensor | None:
    """The operand of a product that does not move: floating, unlike sizes."""
    if core is None:
        return None
    (w,) = [t for n, t in enumerate(core.op.inputs) if n not in core.moving and t.dtype.is_floating]
    return w
