"""Provenance of entries that are moved, copied, or computed one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from perjac._core.graph.provenance.owners import Dims, Owners
from perjac._core.graph.provenance.registry import At, Found, Unclear, channels_first, rule

# Entry by entry, operands broadcast against one another.
_ENTRYWISE = (
    "Abs", "Acos", "Acosh", "Add", "AddN", "AddV2", "Angle", "ApproximateEqual", "AsString", "Asin",
    "Asinh", "Atan", "Atan2", "Atanh", "BesselI0e", "BesselI1e", "Betainc", "BiasAdd", "BiasAddV1",
    "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Bucketize", "Cast", "Ceil", "CheckNumerics",
    "CheckNumericsV2", "ClipByValue", "Complex", "ComplexAbs", "Conj", "Copy", "Cos", "Cosh",
    "DeepCopy", "Digamma", "Div", "DivNoNan", "Elu", "EluGrad", "Equal", "Erf", "Erfc", "Erfinv",
    "Exp", "Expm1", "FakeQuantWithMinMaxArgs", "FakeQuantWithMinMaxVars", "Floor", "FloorDiv",
    "FloorMod", "Greater", "GreaterEqual", "Identity", "Igamma", "Igammac", "Imag", "Inv",
    "InvGrad", "Invert", "IsFinite", "IsInf", "IsNan", "LeakyRelu", "LeakyReluGrad", "LeftShift",
    "Less", "LessEqual", "Lgamma", "Log", "Log1p", "LogicalAnd", "LogicalNot", "LogicalOr",
    "LookupTableFindV2", "Maximum", "Minimum", "Mod", "MulNoNan", "Ndtri", "Neg", "NextAfter",
    "NotEqual", "Polygamma", "Pow", "PreventGradient", "Real", "RealDiv", "Reciprocal",
    "ReciprocalGrad", "Relu", "Relu6", "Relu6Grad", "ReluGrad", "RightShift", "Rint", "Round",
    "Rsqrt", "RsqrtGrad", "Selu", "SeluGrad", "Sigmoid", "SigmoidGrad", "Sign", "Sin", "Sinh",
    "Snapshot", "Softplus", "SoftplusGrad", "Softsign", "SoftsignGrad", "Sqrt", "SqrtGrad",
    "Square", "SquaredDifference", "StaticRegexReplace", "StopGradient", "StringLower",
    "StringStrip", "StringToHashBucket", "StringToHashBucketFast", "StringToHashBucketStrong",
    "StringToNumber", "StringUpper", "Sub", "Tan", "Tanh", "TanhGrad", "TruncateDiv", "TruncateMod",
    "Xdivy", "Xlog1py", "Xlogy", "Zeta",
)  # fmt: skip


@rule(*_ENTRYWISE)
def entrywise(op: Any, outs: list[Owners], at: At) -> Found:
    """y = f(x, …), entry by entry."""
    if op.type in ("BiasAdd", "BiasAddV1") and channels_first(op):
        (own,) = outs
        return [own, own.drop([n for n in range(own.rank) if n != 1])]
    return [_fit(outs[0], t, at) for t in op.inputs]


def _fit(own: Owners, tensor: Any, at: At) -> Owners | None:
    if tensor.dtype.name == "variant":  # a list handed on
        return own
    return None if tensor.dtype.name == "resource" else own.fit(at.shape(tensor))


@rule("Mul", "SelectV2", index=(0, 1, 2))
def masking(op: Any, outs: list[Owners], at: At) -> Found:
    """y = x · m, or one of two by m: where m is known to shut x out, x reaches nothing."""
    (own,) = outs
    if op.type == "Mul":
        shut = [_nonzero(at.known(t)) for t in op.inputs]
        passes: list[Any] = [shut[1], shut[0]]
    else:
        chosen = at.known(op.inputs[0])
        chosen = None if chosen is None else chosen.astype(bool)
        passes = [None, chosen, None if chosen is None else ~chosen]
    return [
        _fit(own if where is None or where.all() else _shut(own, where), t, at)
        for t, where in zip(op.inputs, passes, strict=True)
    ]


def _nonzero(value: np.ndarray | None) -> np.ndarray | None:
    return None if value is None or value.dtype.kind not in "biufc" else value != 0


def _shut(own: Owners, where: np.ndarray) -> Owners:
    where = where.reshape((1,) * (own.rank - where.ndim) + where.shape)
    return own.masked(where)


@rule("Select")
def select(op: Any, outs: list[Owners], at: At) -> Found:
    """The first version: a vector of conditions picks whole rows."""
    (own,) = outs
    rank = len(at.shape(op.inputs[0]))
    condition = own.drop(range(rank, own.rank)) if rank else own.whole(0)
    return [condition, own, own]


@rule("IdentityN")
def identities(op: Any, outs: list[Owners], at: At) -> Found:
    """Each as it came; what a custom gradient carries along is looked at apart."""
    return [*outs, *[None] * (len(op.inputs) - len(outs))]


@rule(
    "Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike", "BroadcastGradientArgs",
    "BroadcastArgs", "TensorListLength", "TensorListElementShape", "Assert", "NoOp",
    "RandomUniform", "RandomStandardNormal", "TruncatedNormal", "RandomUniformInt",
    "StatelessRandomUniformV2", "StatelessRandomNormalV2", "StatelessTruncatedNormalV2",
    "StatelessRandomUniform", "StatelessRandomNormal", "StatelessTruncatedNormal",
    "StatelessRandomGetKeyCounter", "StatelessRandomGetAlg", "StatelessRandomUniformIntV2",
    "StatelessRandomUniformFullIntV2", "TensorListReserve", "EmptyTensorList",
)  # fmt: skip
def of_shapes(op: Any, outs: list[Owners], at: At) -> Found:
    """What knows its operands' shapes only."""
    return [None] * len(op.inputs)


@rule("Fill")
def fill(op: Any, outs: list[Owners], at: At) -> Found:
    """One number everywhere."""
    return [None, outs[0].whole(0)]


@rule("Reshape", "Squeeze", "ExpandDims", "EnsureShape", "Bitcast")
def reshape(op: Any, outs: list[Owners], at: At) -> Found:
    """The same entries in the same order."""
    before, after = at.shape(op.outputs[0]), at.shape(op.inputs[0])
    if math.prod(before) != math.prod(after):
        raise Unclear(f"{op.type} between types of different sizes")
    return [outs[0].reshaped(before, after), *[None] * (len(op.inputs) - 1)]


@rule("Transpose", index=(1,))
def transpose(op: Any, outs: list[Owners], at: At) -> Found:
    """Axes in another order."""
    back = np.argsort(at.value(op.inputs[1]))
    return [outs[0].map(lambda a: a.transpose(back)), None]


@rule("BroadcastTo")
def broadcast(op: Any, outs: list[Owners], at: At) -> Found:
    """Copies along axes of length 1, and along new ones."""
    return [_fit(outs[0], op.inputs[0], at), None]


@rule("Tile", index=(1,))
def tile(op: Any, outs: list[Owners], at: At) -> Found:
    """Copies one after another."""
    own = outs[0]
    for axis, (length, _) in enumerate(_pairs(op, at)):
        total = at.shape(op.outputs[0])[axis]
        own = own.moved(axis, np.arange(total) % max(length, 1), length)
    return [own, None]


def _pairs(op: Any, at: At) -> list[tuple[int, int]]:
    lengths = at.shape(op.inputs[0])
    return list(zip(lengths, at.value(op.inputs[1]).tolist(), strict=True))


@rule("Concat", "ConcatV2", index=(0, -1))
def concat(op: Any, outs: list[Owners], at: At) -> Found:
    """One after another."""
    axis_first = op.type == "Concat"
    parts = list(op.inputs[1:] if axis_first else op.inputs[:-1])
    axis = int(at.value(op.inputs[0 if axis_first else -1])) % outs[0].rank
    found, start = [], 0
    for part in parts:
        length = at.shape(part)[axis]
        found.append(outs[0].picked(axis, np.arange(start, start + length)))
        start += length
    return [None, *found] if axis_first else [*found, None]


@rule("Pack")
def pack(op: Any, outs: list[Owners], at: At) -> Found:
    """Stacked along a new axis."""
    axis = op.get_attr("axis") % outs[0].rank
    return [outs[0].picked(axis, np.array([n])).drop([axis]) for n in range(len(op.inputs))]


@rule("Split", "SplitV", index=(0, 2))
def split(op: Any, outs: list[Owners], at: At) -> Found:
    """Cut into pieces."""
    data, axis = (1, 0) if op.type == "Split" else (0, 2)
    place = int(at.value(op.inputs[axis])) % outs[0].rank
    found: Found = [None] * len(op.inputs)
    found[data] = _joined(outs, [at.shape(t)[place] for t in op.outputs], place)
    return found


@rule("Unpack")
def unpack(op: Any, outs: list[Owners], at: At) -> Found:
    """Cut into slices."""
    axis = op.get_attr("axis") % (outs[0].rank + 1)
    return [_joined([own.insert([axis]) for own in outs], [1] * len(outs), axis)]


def _joined(parts: list[Owners], lengths: Sequence[int], axis: int) -> Owners:
    """Return the owners of what was cut along an axis."""
    if all(not own.varies(axis) and own.same(parts[0]) for own in parts):
        return parts[0]
    rest = np.broadcast_shapes(
        *(own.first.shape[:axis] + (1,) + own.first.shape[axis + 1 :] for own in parts)
    )

    def whole(own: Owners, length: int) -> Owners:
        shape = (*rest[:axis], length, *rest[axis + 1 :])
        return own.spread(axis, length).map(lambda a: np.broadcast_to(a, shape))

    full = [whole(own, length) for own, length in zip(parts, lengths, strict=True)]
    unclear = next((own.unclear for own in parts if own.unclear), "")
    first, last = (
        np.concatenate([getattr(own, side) for own in full], axis) for side in ("first", "last")
    )
    return Owners(first, last, unclear).compact()


@rule("Pad", "PadV2", "MirrorPad", index=(1,))
def pad(op: Any, outs: list[Owners], at: At) -> Found:
    """Something put before and behind, or a reflection of the entries themselves."""
    own, mode = outs[0], ""
    if op.type == "MirrorPad":
        mode = op.get_attr("mode").decode().lower()
    for axis, (before, after) in enumerate(at.value(op.inputs[1]).tolist()):
        length = at.shape(op.inputs[0])[axis]
        places = np.arange(length)
        if mode:
            places = np.pad(places, (before, after), mode)  # type: ignore[call-overload]
        else:
            places = np.pad(places, (before, after), constant_values=-1)
        own = own.moved(axis, places, length)
    return [own, *[outs[0].whole(0) if n == 2 else None for n in range(1, len(op.inputs))]]


@rule("Slice", index=(1, 2))
def cut(op: Any, outs: list[Owners], at: At) -> Found:
    """A piece."""
    own = outs[0]
    starts = at.value(op.inputs[1]).tolist()
    for axis, (start, length) in enumerate(zip(starts, at.shape(op.outputs[0]), strict=True)):
        own = own.moved(axis, start + np.arange(length), at.shape(op.inputs[0])[axis])
    return [own, None, None]


@rule("StridedSlice", index=(1, 2, 3))
def strided_slice(op: Any, outs: list[Owners], at: At) -> Found:
    """x[a:b:c, …, None, n]."""
    shape = at.shape(op.inputs[0])
    own = outs[0]
    for axis, places, kind in _strides(op, op.inputs[1:4], shape, at):
        if kind == "new":
            own = own.drop([axis])
        else:
            own = own.insert([axis]) if kind == "single" else own
            own = own.moved(axis, places, shape[axis])
    return [own, None, None, None]


@rule("StridedSliceGrad", index=(1, 2, 3))
def strided_slice_gradient(op: Any, outs: list[Owners], at: At) -> Found:
    """Put back to where x[a:b:c, …] was taken from."""
    own = outs[0]
    later: list[tuple[int, str]] = []
    for axis, places, kind in _strides(op, op.inputs[1:4], at.shape(op.outputs[0]), at):
        if kind != "new":
            own = own.picked(axis, places)
        later.append((axis, kind))
    for axis, kind in sorted(later, reverse=True):
        own = own.drop([axis]) if kind == "single" else own
    new = [axis for axis, kind in later if kind == "new"]
    if new and any(kind == "single" for _, kind in later):
        raise Unclear("the gradient of a slice with new axes and single places")
    return [None, None, None, None, own.insert(new) if new else own]


def _strides(
    op: Any, spec: Sequence[Any], shape: Dims, at: At
) -> list[tuple[int, np.ndarray, str]]:
    """Return (axis, places taken, kind) for each part of a slice; new axes first, backwards."""
    begin, end, stride = (at.value(t).tolist() for t in spec)
    masks = {
        name: op.get_attr(f"{name}_mask")
        for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }

    def has(name: str, n: int) -> bool:
        return bool(masks[name] >> n & 1)

    count = sum(not has("new_axis", n) and not has("ellipsis", n) for n in range(len(begin)))
    new, found, axis, place = [], [], 0, 0
    for n in range(len(begin)):
        if has("ellipsis", n):
            axis, place = axis + len(shape) - count, place + len(shape) - count
        elif has("new_axis", n):
            new.append((place, np.zeros(1, int), "new"))
            place += 1
        elif has("shrink_axis", n):
            at_place = begin[n] % shape[axis] if shape[axis] else 0
            found.append((axis, np.array([at_place]), "single"))
            axis += 1
        else:
            start = None if has("begin", n) else begin[n]
            stop = None if has("end", n) else end[n]
            found.append((axis, np.arange(shape[axis])[start : stop : stride[n]], "range"))
            axis, place = axis + 1, place + 1
    return [*new[::-1], *found]


@rule("ReverseV2", index=(1,))
def reverse(op: Any, outs: list[Owners], at: At) -> Found:
    """Backwards along axes."""
    axes = tuple(int(n) % outs[0].rank for n in np.ravel(at.value(op.inputs[1])))
    return [outs[0].map(lambda a: np.flip(a, axes)), None]


@rule("Roll", index=(1, 2))
def roll(op: Any, outs: list[Owners], at: At) -> Found:
    """Moved along axes, from the end to the front."""
    shifts, axes = (np.atleast_1d(at.value(t)) for t in op.inputs[1:])
    own = outs[0]
    for shift, axis in zip(shifts.tolist(), axes.tolist(), strict=True):
        place = axis % own.rank
        own = own.map(lambda a, s=shift, p=place: np.roll(a, -s, p) if a.shape[p] > 1 else a)
    return [own, None, None]


@rule("ReverseSequence")
def reverse_sequence(op: Any, outs: list[Owners], at: At) -> Found:
    """The first entries backwards, as many as are told for each row."""
    (own,) = outs
    time, batch = op.get_attr("seq_dim"), op.get_attr("batch_dim")
    lengths = own.drop([n for n in range(own.rank) if n != batch])
    return [own.over_perhaps([time], "steps are reversed by lengths in the data"), lengths]


@rule("SpaceToBatchND", "BatchToSpaceND", index=(1, 2))
def space_and_batch(op: Any, outs: list[Owners], at: At) -> Found:
    """Holes of a dilated convolution moved into the batch, in front of the examples, or back."""
    blocks, margins = at.value(op.inputs[1]).tolist(), at.value(op.inputs[2]).tolist()
    count, total = len(blocks), math.prod(blocks)
    before, after = at.shape(op.outputs[0]), at.shape(op.inputs[0])
    own = outs[0]
    for axis in range(1 + count):
        own = own.spread(axis, before[axis])
    rest = list(own.first.shape[1 + count :])
    middle = [2 * n + 1 for n in range(count)]
    if op.type == "SpaceToBatchND":
        # (blocks · B, space / block, …) to (B, space, …), margins cut off.
        split = [*blocks, before[0] // total, *before[1 : 1 + count]]
        order = [count]
        for n in range(count):
            order += [count + 1 + n, n]
        order += list(range(2 * count + 1, 2 * count + 1 + len(rest)))
        padded = [b * n for b, n in zip(blocks, before[1 : 1 + count], strict=True)]

        def back(a: np.ndarray) -> np.ndarray:
            a = a.reshape(split + rest).transpose(order).reshape([split[count], *padded, *rest])
            pieces = [slice(m[0], m[0] + n) for m, n in zip(margins, after[1:], strict=False)]
            return a[(slice(None), *pieces)]

        return [own.map(back).compact(), None, None]
    # (B, space, …) to (blocks · B, space / block, …), what was cropped being nobody's.
    for axis, (low, _) in enumerate(margins, start=1):
        length = blocks[axis - 1] * after[axis]
        own = own.moved(axis, low + np.arange(before[axis]), length)
    for axis in range(1 + count):
        own = own.spread(axis, blocks[axis - 1] * after[axis] if axis else before[0])
    rest = list(own.first.shape[1 + count :])
    split = [before[0], *(n for pair in zip(after[1:], blocks, strict=False) for n in pair)]
    order = [n + 1 for n in middle] + [0] + middle
    order += list(range(2 * count + 1, 2 * count + 1 + len(rest)))
    shape = [*after[: 1 + count], *rest]
    moved = own.map(lambda a: a.reshape(split + rest).transpose(order).reshape(shape))
    return [moved.compact(), None, None]
