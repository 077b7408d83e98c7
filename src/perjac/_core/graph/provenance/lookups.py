"""Provenance of entries that are looked up, or put, by number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from perjac._core.graph.provenance.owners import Owners
from perjac._core.graph.provenance.registry import At, Found, rule


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
    columns = [_column(op.inputs[1], n, at) for n in range(depth)]
    # What is looked up by known numbers is moved, which the table's own owners tell.
    read = np.array([column is None for column in columns])
    indices = own.drop(range(lead, own.rank)).insert([lead]).masked(read)
    flat = own.reshaped(at.shape(op.outputs[0]), (math.prod(ids[:-1]), *table[depth:]))
    if all(column is None for column in columns):
        one = flat.over_perhaps([0], "GatherNd looks up entries by numbers in the data")
        return [one.drop([0]).insert(list(range(depth))), indices]
    lengths = [1 if c is None else n for c, n in zip(columns, table, strict=False)]
    whole = [np.zeros(math.prod(ids[:-1]), int) if c is None else c.ravel() for c in columns]
    places = np.ravel_multi_index([c % n for c, n in zip(whole, lengths, strict=True)], lengths)
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
