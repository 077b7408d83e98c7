"""From the owners of an operation's results to those of its operands: one rule for each kind.

An operand's entry belongs to whoever owns an entry of the results that is computed from it. Rules
know operations, shapes and the values of indices; they see no data, and must not know models.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from perjac.owners import Dims, Owners


class Unclear(Exception):
    """Raised by a rule that cannot tell; the message is the reason."""


class At(Protocol):
    """What rules ask about a graph's tensors, for a batch of a given size."""

    def shape(self, tensor: Any) -> Dims:
        """Return a shape, all axes known, or raise Unclear."""
        ...

    def known(self, tensor: Any) -> np.ndarray | None:
        """Return what a tensor holds whatever the data, or None."""
        ...

    def value(self, tensor: Any) -> np.ndarray:
        """Return the same, or raise Unclear."""
        ...


Found = list[Owners | None]
Rule = Callable[[Any, list[Owners], At], Found]
RULES: dict[str, Rule] = {}
# Operands whose values rules ask for, counted from the end where negative.
INDICES: dict[str, tuple[int, ...]] = {}


def rule(*types: str, index: tuple[int, ...] = ()) -> Callable[[Rule], Rule]:
    """Register a rule for operations of these types, and which operands it reads."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(types, function))
        INDICES.update(dict.fromkeys(types, index))
        return function

    return register


# Entry by entry, operands broadcast against one another.
_ENTRYWISE = """
Abs Acos Acosh Add AddN AddV2 Angle ApproximateEqual AsString Asin Asinh Atan Atan2 Atanh BesselI0e
BesselI1e Betainc BiasAdd BiasAddV1 BitwiseAnd BitwiseOr BitwiseXor Bucketize Cast Ceil CheckNumerics
CheckNumericsV2 ClipByValue Complex ComplexAbs Conj Copy Cos Cosh DeepCopy Digamma Div DivNoNan Elu
EluGrad Equal Erf Erfc Erfinv Exp Expm1 FakeQuantWithMinMaxArgs FakeQuantWithMinMaxVars Floor
FloorDiv FloorMod Greater GreaterEqual Identity Igamma Igammac Imag Inv InvGrad Invert IsFinite IsInf
IsNan LeakyRelu LeakyReluGrad LeftShift Less LessEqual Lgamma Log Log1p LogicalAnd LogicalNot
LogicalOr Maximum Minimum Mod MulNoNan Ndtri Neg NextAfter NotEqual Polygamma Pow PreventGradient Real
RealDiv Reciprocal ReciprocalGrad Relu Relu6 Relu6Grad ReluGrad RightShift Rint Round Rsqrt RsqrtGrad
Selu SeluGrad Sigmoid SigmoidGrad Sign Sin Sinh Snapshot Softplus SoftplusGrad Softsign SoftsignGrad
Sqrt SqrtGrad Square SquaredDifference StaticRegexReplace StopGradient StringLower StringStrip
StringToHashBucket StringToHashBucketFast StringToHashBucketStrong StringToNumber StringUpper Sub Tan
Tanh TanhGrad TruncateDiv TruncateMod Xdivy Xlog1py Xlogy Zeta LookupTableFindV2
""".split()


@rule(*_ENTRYWISE)
def entrywise(op: Any, outs: list[Owners], at: At) -> Found:
    """y = f(x, …), entry by entry."""
    if op.type in ("BiasAdd", "BiasAddV1") and _channels_first(op):
        (own,) = outs
        return [own, own.drop([n for n in range(own.rank) if n != 1])]
    return [_fit(outs[0], t, at) for t in op.inputs]


def _fit(own: Owners, tensor: Any, at: At) -> Owners | None:
    if tensor.dtype.name == "variant":  # a list handed on
        return own
    return None if tensor.dtype.name == "resource" else own.fit(at.shape(tensor))


def _channels_first(op: Any) -> bool:
    if "data_format" not in op.node_def.attr:
        return False
    return op.get_attr("data_format") in (b"NCHW", b"NCDHW", b"NCW")


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
    axes = np.atleast_1d(at.value(op.inputs[1])) % max(outs[0].rank, 1)
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


@rule("GatherV2", "Gather", index=(1, 2))
def gather(op: Any, outs: list[Owners], at: At) -> Found:
    """Rows looked up by number; where the numbers are data, any row may be any entry's."""
    (own,) = outs
    table, ids = at.shape(op.inputs[0]), at.shape(op.inputs[1])
    lead = op.get_attr("batch_dims") if op.type == "GatherV2" else 0
    lead %= len(ids) + 1
    axis = int(at.value(op.inputs[2])) % len(table) if op.type == "GatherV2" else 0
    span = list(range(axis, axis + len(ids) - lead))
    others = [n for n in range(lead, own.rank) if n not in span]
    indices = own.drop(others)
    known = at.known(op.inputs[1]) if lead == 0 else None
    if known is not None:
        flat = own.reshaped(
            at.shape(op.outputs[0]), (*table[:axis], known.size, *table[axis + 1 :])
        )
        data = flat.moved(axis, known.ravel() % max(table[axis], 1), table[axis])
    else:
        why = f"{op.type} looks up rows by numbers in the data"
        data = own.over_perhaps(span, why).drop(span).insert([axis])
    return [data, indices, *[None] * (len(op.inputs) - 2)]


@rule("ResourceGather", "ResourceGatherNd")
def resource_gather(op: Any, outs: list[Owners], at: At) -> Found:
    """Rows of a variable."""
    ids = len(at.shape(op.inputs[1])) - (op.type == "ResourceGatherNd")
    indices = outs[0].drop(range(ids, outs[0].rank))
    return [None, indices.insert([ids]) if op.type == "ResourceGatherNd" else indices]


@rule("GatherNd", index=(1,))
def gather_nd(op: Any, outs: list[Owners], at: At) -> Found:
    """Entries looked up by several numbers; some of which may be known."""
    (own,) = outs
    table, ids = at.shape(op.inputs[0]), at.shape(op.inputs[1])
    lead, depth = len(ids) - 1, ids[-1]
    indices = own.drop(range(lead, own.rank)).insert([lead])
    flat = own.reshaped(
        at.shape(op.outputs[0]), (math.prod(ids[:-1]), *table[depth:])
    )
    columns = [_column(op.inputs[1], n, at) for n in range(depth)]
    if all(column is None for column in columns):
        one = flat.over_perhaps([0], "GatherNd looks up entries by numbers in the data")
        return [one.drop([0]).insert(list(range(depth))), indices]
    lengths = [1 if c is None else n for c, n in zip(columns, table, strict=False)]
    whole = [np.zeros(math.prod(ids[:-1]), int) if c is None else c.ravel() for c in columns]
    places = np.ravel_multi_index(
        [c % n for c, n in zip(whole, lengths, strict=True)], lengths
    )
    total = math.prod(lengths)
    moved = flat.moved(0, places, total).spread(0, total)
    rest = moved.first.shape[1:]
    return [moved.map(lambda a: a.reshape([*lengths, *rest])).compact(), indices]


def _column(indices: Any, n: int, at: At) -> np.ndarray | None:
    """Return one column of indices, where that is known, though the others may not be."""
    known = at.known(indices)
    if known is not None:
        return known[..., n]
    op = indices.op
    if op.type in ("Identity", "Cast"):
        return _column(op.inputs[0], n, at)
    if op.type == "Pack" and op.get_attr("axis") in (-1, len(at.shape(indices)) - 1):
        return at.known(op.inputs[n])
    if op.type == "ConcatV2":
        axis = at.known(op.inputs[-1])
        if axis is not None and int(axis) in (-1, len(at.shape(indices)) - 1):
            for part in op.inputs[:-1]:
                width = at.shape(part)[-1]
                if n < width:
                    known = at.known(part)
                    return None if known is None else known[..., n]
                n -= width
    return None


@rule("ScatterNd", "TensorScatterUpdate", "TensorScatterAdd", "TensorScatterSub",
      "TensorScatterMax", "TensorScatterMin", index=(0, 1))  # fmt: skip
def scatter_nd(op: Any, outs: list[Owners], at: At) -> Found:
    """Entries put, or added, where numbers say."""
    (own,) = outs
    plain = op.type == "ScatterNd"
    place, updates = (0, 1) if plain else (1, 2)
    ids, shape = at.shape(op.inputs[place]), at.shape(op.outputs[0])
    lead, depth = len(ids) - 1, ids[-1]
    known = at.known(op.inputs[place])
    total = math.prod(shape[:depth])
    flat = own.reshaped(shape, (total, *shape[depth:]))
    count = math.prod(ids[:-1])
    if known is None:
        taken = flat.over_perhaps([0], f"{op.type} puts entries where numbers in the data say")
    else:
        columns = [known[..., n].ravel() % max(shape[n], 1) for n in range(depth)]
        places = np.ravel_multi_index(columns, shape[:depth]) if depth else np.zeros(count, int)
        taken = flat.picked(0, places)
    moved = taken.spread(0, count) if taken.varies(0) else taken
    sent = moved.reshaped((count, *shape[depth:]), (*ids[:-1], *shape[depth:]))
    indices = sent.drop(range(lead, sent.rank)).insert([lead])
    found: Found = [indices, sent, None] if plain else [own, indices, sent]
    return found[: len(op.inputs)] if updates < len(op.inputs) else found


@rule("UnsortedSegmentSum", "UnsortedSegmentMax", "UnsortedSegmentMin", "UnsortedSegmentProd",
      "SegmentSum", "SegmentMean", "SegmentMax", "SegmentMin", index=(1,))  # fmt: skip
def segments(op: Any, outs: list[Owners], at: At) -> Found:
    """Rows added up by the number of their segment."""
    (own,) = outs
    ids = at.shape(op.inputs[1])
    known = at.known(op.inputs[1])
    if known is None:
        taken = own.over_perhaps([0], f"{op.type} adds up segments that are in the data")
        data = taken.drop([0]).insert(list(range(len(ids))))
    else:
        taken = own.picked(0, known.ravel())
        rest = at.shape(op.inputs[0])[len(ids) :]
        data = taken.reshaped((known.size, *rest), (*ids, *rest))
    indices = data.drop(range(len(ids), data.rank))
    return [data, indices, *[None] * (len(op.inputs) - 2)]


@rule("DynamicStitch", "ParallelDynamicStitch", index=tuple(range(32)))
def stitch(op: Any, outs: list[Owners], at: At) -> Found:
    """Rows put to where numbers say, each kind by its own numbers."""
    half = len(op.inputs) // 2
    found: Found = [None] * half
    for indices, data in zip(op.inputs[:half], op.inputs[half:], strict=True):
        places = at.value(indices)
        rest = at.shape(data)[places.ndim :]
        taken = outs[0].picked(0, places.ravel())
        found.append(taken.reshaped((places.size, *rest), (*places.shape, *rest)))
    return found


@rule("OneHot")
def one_hot(op: Any, outs: list[Owners], at: At) -> Found:
    """A number spread along a new axis."""
    axis = op.get_attr("axis") % outs[0].rank
    value = outs[0].whole(0)
    return [outs[0].drop([axis]), None, value, value]


@rule(
    "Sum", "Mean", "Prod", "Max", "Min", "All", "Any", "EuclideanNorm", "ArgMax", "ArgMin",
    index=(1,),
)  # fmt: skip
def reduction(op: Any, outs: list[Owners], at: At) -> Found:
    """Everything along some axes made one."""
    rank = len(at.shape(op.inputs[0]))
    axes = [int(n) % rank for n in np.ravel(at.value(op.inputs[1]))] if rank else []
    keeps = "keep_dims" in op.node_def.attr and op.get_attr("keep_dims")
    return [outs[0] if keeps else outs[0].insert(axes), None]


@rule("L2Loss")
def total(op: Any, outs: list[Owners], at: At) -> Found:
    """Everything made one."""
    return [outs[0].whole(len(at.shape(op.inputs[0])))]


@rule("BiasAddGrad")
def all_but_channels(op: Any, outs: list[Owners], at: At) -> Found:
    """Summed over all axes but the channels'."""
    rank = len(at.shape(op.inputs[0]))
    kept = 1 if _channels_first(op) else rank - 1
    return [outs[0].insert([n for n in range(rank) if n != kept])]


@rule("Cumsum", "Cumprod", "CumulativeLogsumexp", index=(1,))
def running(op: Any, outs: list[Owners], at: At) -> Found:
    """Running sums: an entry is in all those behind it."""
    axis = int(at.value(op.inputs[1])) % outs[0].rank
    return [outs[0].over([axis]), None]


@rule("Softmax", "LogSoftmax", "TopK", "TopKV2", "FFT", "IFFT", "RFFT", "IRFFT", "DenseBincount",
      "RandomShuffle", "InTopKV2", "Multinomial", "StatelessMultinomial", "NthElement")  # fmt: skip
def along_last(op: Any, outs: list[Owners], at: At) -> Found:
    """Everything along the last axis meets; a shuffle's along the first."""
    data = op.inputs[0]
    rank = len(at.shape(data))
    own = outs[0]
    for other in outs[1:]:
        own = own | other
    if op.type == "RandomShuffle":
        return [own.over([0])]
    if op.type == "NthElement":
        return [own.insert([rank - 1]), None]
    if op.type == "DenseBincount" and rank == 1:
        return [own.whole(1), *[own.whole(len(at.shape(t))) for t in op.inputs[1:]]]
    if op.type == "InTopKV2":
        return [own.insert([1]), own, None]
    return [own.over([rank - 1]), *[None] * (len(op.inputs) - 1)]


@rule("FFT2D", "IFFT2D", "RFFT2D", "IRFFT2D", "FFT3D", "IFFT3D", "RFFT3D", "IRFFT3D")
def along_many(op: Any, outs: list[Owners], at: At) -> Found:
    """Everything along the last two or three axes meets."""
    rank, count = outs[0].rank, int(op.type[-2])
    return [outs[0].over(range(rank - count, rank)), *[None] * (len(op.inputs) - 1)]


@rule("SparseSoftmaxCrossEntropyWithLogits", "SoftmaxCrossEntropyWithLogits")
def cross_entropy(op: Any, outs: list[Owners], at: At) -> Found:
    """A loss of each row, and its gradient."""
    loss, back = outs
    rows = loss.insert([1]) | back.over([1])
    labels = at.shape(op.inputs[1])
    return [
        rows.fit(at.shape(op.inputs[0])),
        rows.drop([1]) if len(labels) == 1 else rows.fit(labels),
    ]


@rule("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
def matmul(op: Any, outs: list[Owners], at: At) -> Found:
    """y[…, n, o] = Σ_i x[…, n, i] w[…, i, o]."""
    plain = op.type == "MatMul"
    flags = [op.get_attr(f) for f in (("transpose_a", "transpose_b") if plain else ("adj_x", "adj_y"))]
    (own,) = outs
    found = []
    for tensor, flag, kept in zip(op.inputs, flags, (-2, -1), strict=True):
        # What is summed along belongs to all that it goes into; the other operand's axis to all.
        side = own.over([own.rank + (-1 if kept == -2 else -2)])
        side = side.map(lambda a: a.swapaxes(-1, -2)) if flag else side
        found.append(side.fit(at.shape(tensor)))
    return found


@rule("Einsum")
def einsum(op: Any, outs: list[Owners], at: At) -> Found:
    """A sum of products, an axis a letter."""
    equation = op.get_attr("equation").decode().replace(" ", "")
    terms, result = equation.split("->")
    free = [c for c in string.ascii_letters if c not in equation]
    shapes = [at.shape(t) for t in op.inputs]
    counts = [
        len(shape) - len(term.replace("...", "")) if "..." in term else 0
        for shape, term in zip(shapes, terms.split(","), strict=True)
    ]
    dots = "".join(free[: max(counts)])
    result = result.replace("...", dots)
    return [
        _of_letters(outs[0], result, term.replace("...", dots[len(dots) - n :]), shape)
        for term, n, shape in zip(terms.split(","), counts, shapes, strict=True)
    ]


def _of_letters(own: Owners, result: str, term: str, shape: Dims) -> Owners:
    """Return the owners of an operand with these axes, in a sum with those axes."""
    if len(set(term)) < len(term) or len(set(result)) < len(result):
        raise Unclear("an Einsum that takes diagonals")
    own = own.drop([n for n, c in enumerate(result) if c not in term])
    kept = [c for c in result if c in term]
    order = sorted(range(len(kept)), key=lambda n: term.index(kept[n]))
    own = own.map(lambda a: a.transpose(order))
    return own.insert([n for n, c in enumerate(term) if c not in kept]).fit(shape)


@rule("MatrixSolve", "MatrixTriangularSolve", "MatrixSolveLs", "BandedTriangularSolve")
def solve(op: Any, outs: list[Owners], at: At) -> Found:
    """A x = y for each column of y by itself: rows of a column meet, columns do not."""
    own = outs[0].over([outs[0].rank - 2])
    columns, matrix = own.fit(at.shape(op.inputs[1])), own.over([own.rank - 1])
    return [matrix.fit(at.shape(op.inputs[0])), columns, *[None] * (len(op.inputs) - 2)]


@rule(
    "Cholesky", "CholeskyGrad", "Inverse", "LogMatrixDeterminant", "LU", "MatrixBandPart",
    "MatrixDeterminant", "MatrixDiag", "MatrixDiagPart", "MatrixDiagPartV2", "MatrixDiagPartV3",
    "MatrixDiagV2", "MatrixDiagV3", "MatrixExponential", "MatrixInverse", "MatrixLogarithm",
    "MatrixSetDiag", "MatrixSetDiagV3", "MatrixSquareRoot",
    "Qr", "SelfAdjointEigV2", "Svd", "Eig",
    index=(1,),
)  # fmt: skip
def matrices(op: Any, outs: list[Owners], at: At) -> Found:
    """One small matrix after another, the last axes of each meeting."""
    core = 1 if op.type in ("MatrixDiag", "MatrixDiagV2", "MatrixDiagV3") else 2
    shapes = [at.shape(t) for t in op.inputs]
    if op.type == "MatrixDiagPartV3":
        offset = at.known(op.inputs[1])
        if offset is not None and not offset.any() and shapes[0][-1] == shapes[0][-2]:
            diagonal = np.eye(shapes[0][-1], dtype=bool)
            return [outs[0].insert([outs[0].rank - 1]).masked(diagonal), None, None]
    lead = max(len(shape) - core for shape in shapes)
    own = None
    for out in outs:
        behind = range(lead, out.rank)
        one = out.over_perhaps(behind, f"{op.type} of a matrix of several examples").drop(behind)
        own = one if own is None else own | one
    assert own is not None
    found: Found = []
    for tensor, shape in zip(op.inputs, shapes, strict=True):
        if tensor.dtype.is_integer or len(shape) < core:  # an option
            found.append(None)
            continue
        front = own.fit(shape[: len(shape) - core])
        found.append(front.insert(list(range(front.rank, len(shape)))))
    return found


# The operand that is a batch of pictures, and those that all pictures share.
_PICTURES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        ("Conv2D", "Conv3D", "Conv", "DepthwiseConv2dNative", "MaxPool", "MaxPoolV2", "MaxPool3D",
         "AvgPool", "AvgPool3D", "FractionalMaxPool", "FractionalAvgPool", "Dilation2D", "LRN",
         "ResizeBilinear", "ResizeBicubic", "ResizeNearestNeighbor", "ResizeArea",
         "ScaleAndTranslate", "ExtractImagePatches", "ExtractVolumePatches", "DepthToSpace",
         "SpaceToDepth", "MaxPoolWithArgmax", "AdjustContrastv2", "AdjustHue", "AdjustSaturation",
         "HSVToRGB", "RGBToHSV"), (0,),
    ),
    **dict.fromkeys(
        ("Conv2DBackpropInput", "Conv3DBackpropInputV2", "DepthwiseConv2dNativeBackpropInput"),
        (2,),
    ),
    **dict.fromkeys(("AvgPoolGrad", "AvgPool3DGrad"), (1,)),
    **dict.fromkeys(("ResizeBilinearGrad", "ResizeNearestNeighborGrad", "ResizeBicubicGrad"), (0,)),
    **dict.fromkeys(("MaxPoolGrad", "MaxPool3DGrad", "LRNGrad"), (0, 1, 2)),
    "ImageProjectiveTransformV3": (0, 1), "ImageProjectiveTransformV2": (0, 1),
}  # fmt: skip


@rule(*_PICTURES)
def pictures(op: Any, outs: list[Owners], at: At) -> Found:
    """Each picture by itself, whatever happens within it."""
    own = None
    for out in outs:
        one = out.over_perhaps(range(1, out.rank), f"{op.type} within what several examples share")
        one = one.drop(range(1, out.rank))
        own = one if own is None else own | one
    assert own is not None
    return [
        own.insert(list(range(1, len(at.shape(t)))))
        if n in _PICTURES[op.type]
        else None if t.dtype.is_integer else own.whole(len(at.shape(t)))
        for n, t in enumerate(op.inputs)
    ]  # fmt: skip


@rule("Conv2DBackpropFilter", "Conv3DBackpropFilterV2", "DepthwiseConv2dNativeBackpropFilter")
def kernels(op: Any, outs: list[Owners], at: At) -> Found:
    """Summed over all pictures."""
    return [
        None if t.dtype.is_integer else outs[0].whole(len(at.shape(t))) for t in op.inputs
    ]


@rule("CropAndResize", index=(2,))
def crop(op: Any, outs: list[Owners], at: At) -> Found:
    """Boxes, each out of the picture whose number it has."""
    rows = outs[0].over_perhaps(range(1, 4), "CropAndResize within what several examples share")
    boxes = rows.drop([2, 3])
    known = at.known(op.inputs[2])
    if known is None:
        picture = rows.over_perhaps([0], "CropAndResize takes pictures by numbers in the data")
    else:
        picture = rows.moved(0, known, at.shape(op.inputs[0])[0])
    return [picture, boxes, boxes.drop([1]), None]


@rule("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
def batch_normalisation(op: Any, outs: list[Owners], at: At) -> Found:
    """In training mode, all entries of a channel meet."""
    own = outs[0]
    channels = 1 if _channels_first(op) else own.rank - 1
    others = [n for n in range(own.rank) if n != channels]
    if op.get_attr("is_training"):
        own = own.over(others)
    return [own, *[outs[0].drop(others) for _ in op.inputs[1:]]]


@rule("TensorListFromTensor")
def list_of(op: Any, outs: list[Owners], at: At) -> Found:
    """A list of a tensor's rows. A list's owners are those of its elements, which all share."""
    rank = len(at.shape(op.inputs[0])) - 1
    return [_sized(outs[0], rank).insert([0]), None]


@rule("TensorListStack", "TensorListConcatV2")
def stacked(op: Any, outs: list[Owners], at: At) -> Found:
    """A list's elements in one tensor."""
    own = outs[0]
    if op.type == "TensorListConcatV2":
        raise Unclear("lists of tensors laid end to end")
    return [own.over_perhaps([0], _LISTS).drop([0]), *[None] * (len(op.inputs) - 1)]


_LISTS = "the elements of a list are examples'"


@rule("TensorListGetItem")
def read(op: Any, outs: list[Owners], at: At) -> Found:
    """An element of a list."""
    return [outs[0], None, None]


@rule("TensorListSetItem")
def written(op: Any, outs: list[Owners], at: At) -> Found:
    """A list with another element."""
    return [outs[0], None, _sized(outs[0], len(at.shape(op.inputs[2])))]


@rule("TensorListPushBack")
def pushed(op: Any, outs: list[Owners], at: At) -> Found:
    """A list with one more element."""
    return [outs[0], _sized(outs[0], len(at.shape(op.inputs[1])))]


def _sized(own: Owners, rank: int) -> Owners:
    """Return a list's owners for an element of a rank; of a list that nobody read, nobody's."""
    if own.rank == rank:
        return own
    return Owners.nobody(rank, own.unclear or ("" if own.is_nobody else _LISTS))


@rule("TensorListPopBack")
def popped(op: Any, outs: list[Owners], at: At) -> Found:
    """A list without its last element, and that element."""
    rest, last = outs
    if rest.rank == last.rank:
        return [rest.perhaps(last, _LISTS), None]
    return [last if rest.is_nobody else rest, None]
