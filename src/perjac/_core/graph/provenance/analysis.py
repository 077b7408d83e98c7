"""Which example each entry of a traced graph belongs to: derived from the graph, never from data.

The output's row b belongs to example b. Walking back from there, an operand's entry belongs to
whoever owns an entry that is computed from it. Examples are independent if each input entry belongs
to its own example alone; and at the places where weights meet the data, the owners tell in which
order the examples lie. Both are worked out for two sizes of batch, and hold for every batch alike.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import perjac._core.graph.provenance.lists
import perjac._core.graph.provenance.lookups
import perjac._core.graph.provenance.movement
import perjac._core.graph.provenance.pictures
import perjac._core.graph.provenance.sums  # noqa: F401 (these enter their rules)
from perjac._core.backend.host import goes_its_own_way
from perjac._core.graph.custom_gradients import is_carried
from perjac._core.graph.program import Program
from perjac._core.graph.provenance.frames import CALLS, Frame, frame, gradient_frame
from perjac._core.graph.provenance.owners import Owners
from perjac._core.graph.provenance.registry import RULES, Found, Unclear
from perjac._core.graph.sites import Flow
from perjac._core.graph.walk import upstream

_ITERATIONS = 30  # of a loop's owners, at most, before they no longer change


@dataclasses.dataclass(frozen=True)
class Order:
    """How examples lie along the tensors' first axes, where it is not one after another.

    Attributes
    ----------
    inner : frozenset of str
        Tensors (F·B, ...) in which the examples run fastest.
    astray : frozenset of (str, str)
        Tensors in which they lie in some other way, or nobody can tell, and why.
    """

    inner: frozenset[str] = frozenset()
    astray: frozenset[tuple[str, str]] = frozenset()

    def why(self, tensor: str) -> str:
        """Return why rows of a tensor cannot be told apart, or nothing where they can."""
        return next((why for name, why in self.astray if name == tensor), "")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What the graph says about the examples behind one output.

    Attributes
    ----------
    order : Order
        Of the tensors watched.
    meeting : tuple of str or None
        A tensor and the type of its operation, where examples meet for certain.
    unclear : str
        Why it cannot be told whether they meet, or nothing where it is proved that they do not.
    """

    order: Order
    meeting: tuple[str, str] | None = None
    unclear: str = ""


def analyse(program: Program, flow: Flow, head: str, watched: Iterable[str]) -> Provenance:
    """Return what the graph says of the examples behind an output.

    Parameters
    ----------
    program, flow : Program, Flow
        The trace.
    head : str
        The output's tensor.
    watched : iterable of str
        Tensors whose order is asked for.
    """
    return _Analysis(program, flow, head).result(watched)


class _Analysis:
    """The owners of everything behind one output, for both sizes of batch."""

    def __init__(self, program: Program, flow: Flow, head: str):
        self._program, self._flow, self._head = program, flow, head
        needed = upstream(program, [head])
        self._ops = [op for op in program.graph.get_operations() if op.name in needed]
        self._frames = [frame(program, flow, self._ops, batch) for batch in program.batches]
        self._found = [self._owners(here, batch) for here, batch in self._pairs]

    @property
    def _pairs(self) -> list[tuple[Frame, int]]:
        return list(zip(self._frames, self._program.batches, strict=True))

    def _owners(self, here: Frame, batch: int) -> dict[str, Owners]:
        dims = here.dims.get(self._head)
        rank = len(dims) if dims is not None else 1
        if not dims or dims[0] != batch:
            why = f"the output has shape {dims} for {batch} examples"
            return settled(here, {self._head: Owners.nobody(rank, why)})
        return settled(here, {self._head: Owners.rows(batch, rank)})

    def result(self, watched: Iterable[str]) -> Provenance:
        if self._program.counted > self._program.batches[0]:
            why = f"the graph counts places up to {self._program.counted} along an unknown axis"
            return Provenance(Order(astray=frozenset((name, why) for name in watched)), None, why)
        order = self._order(dict.fromkeys(watched))
        inputs, unclear = self._program.inputs, ""
        for (_, batch), found in zip(self._pairs, self._found, strict=True):
            for name in inputs:
                own = found.get(name)
                if own is None:
                    continue
                if not _is_own(own, batch):
                    return Provenance(order, self._meeting())
                unclear = unclear or own.unclear
        if unclear:
            return Provenance(order, None, unclear)
        few, more = self._frames
        return Provenance(order, *_counted_in(few, more, self._program.batches))

    def _order(self, watched: Iterable[str]) -> Order:
        inner, astray = set(), set()
        for name in watched:
            ways = [
                _way(found.get(name), here.dims.get(name), batch)
                for (here, batch), found in zip(self._pairs, self._found, strict=True)
            ]
            if all(way is not None and "outer" in way for way in ways):
                continue
            if all(way is not None and "inner" in way for way in ways):
                inner.add(name)
                continue
            whys = [own.unclear for found in self._found if (own := found.get(name)) is not None]
            why = next((w for w in whys if w), "its rows are not in the order of the examples")
            astray.add((name, why))
        return Order(frozenset(inner), frozenset(astray))

    def _meeting(self) -> tuple[str, str]:
        """Return the first tensor that is made of several examples, and its operation's type."""
        here, batch = self._pairs[0]
        found = self._found[0]
        shared = [
            (op, t)
            for op in self._ops
            for t in op.outputs
            if t.name in self._flow.values and t.name in found and found[t.name].is_shared
        ]
        low, high = 0, len(shared)
        while low < high:  # what lies behind a meeting is made of several as well
            middle = (low + high) // 2
            if self._is_made_of_several(here, batch, shared[middle][1], found):
                high = middle
            else:
                low = middle + 1
        if low < len(shared):
            op, tensor = shared[low]
            return tensor.name, op.type
        for op in self._ops:  # nothing is shared, but an example reaches another's output
            fine = all(_is_own(found[t.name], batch) for t in op.outputs if t.name in found)
            data = [t for t in op.inputs if t.name in self._flow.values and t.name in found]
            if fine and op.outputs and any(not _is_own(found[t.name], batch) for t in data):
                return op.outputs[0].name, op.type
        return self._head, "output"

    def _is_made_of_several(
        self, here: Frame, batch: int, tensor: Any, found: Mapping[str, Owners]
    ) -> bool:
        own, dims = found[tensor.name], here.dims.get(tensor.name)
        if dims is None or None in dims:
            return False
        shared = np.broadcast_to(own.first < own.last, dims)
        place = tuple(int(n) for n in np.unravel_index(int(np.argmax(shared)), dims))
        behind = owners_behind(
            dataclasses.replace(here, found={}), {tensor.name: Owners.entry(dims, place)}
        )
        for name in self._program.inputs:
            rows = behind.get(name)
            if rows is not None and rows.varies(0) is False and not rows.is_nobody:
                return batch > 1
            if rows is not None:
                used = rows.last.max(tuple(range(1, rows.rank)), initial=-1) >= 0
                if used.sum() > 1:
                    return True
        return False


def _counted_in(
    few: Frame, more: Frame, batches: tuple[int, int]
) -> tuple[tuple[str, str] | None, str]:
    """Return what brings the number of examples, or their places, into an output; or why unclear.

    What is made of shapes and computed with must hold the same for every example, in batches of
    both sizes; and nothing in it may be cut off at some number of examples.
    """
    for tensor, op in few.counting:
        parts: list[np.ndarray] = []
        for here, batch in zip((few, more), batches, strict=True):
            own = here.found.get(tensor.name)
            if own is None or (own.is_nobody and not own.unclear):
                continue
            value = here.known(tensor)
            if value is None or own.unclear:
                return None, own.unclear or f"{tensor.name} depends on the number of examples"
            parts += _by_owner(own, value, batch)
        if any(not _same(parts[0], part) for part in parts):
            return (op.outputs[0].name, op.type), ""
        if parts and tensor.name in few.counts[1]:
            return None, f"{tensor.name} compares the number of examples, or cuts it off"
    for name, inside in few.inner.items():
        for pair in zip(inside, more.inner[name], strict=True):
            meeting, unclear = _counted_in(*pair, batches)
            if meeting or unclear:
                return meeting, unclear
    return None, ""


def _is_own(own: Owners, batch: int) -> bool:
    """Tell whether the row of each example belongs to nobody else, as far as is known."""
    if own.rank == 0 or own.first.shape[0] not in (1, batch):
        return own.is_nobody
    mine = Owners.rows(batch, own.rank)
    return bool((((own.first == mine.first) & (own.last == mine.last)) | (own.last < 0)).all())


def _way(own: Owners | None, dims: Any, batch: int) -> set[str] | None:
    """Return the orders in which examples may lie along a tensor's first axis; None if unclear."""
    if own is None or (own.is_nobody and not own.unclear):
        return {"outer", "inner"}
    if own.unclear or not dims or own.rank != len(dims) or not dims[0] or dims[0] % batch:
        return None
    rows = own.drop(range(1, own.rank)).spread(0, dims[0])
    place, single = np.arange(dims[0]), rows.first == rows.last
    free = rows.last < 0

    def fits(owner: np.ndarray) -> bool:
        return bool((free | (single & (rows.first == owner))).all())

    ways = {"outer": place // (dims[0] // batch), "inner": place % batch}
    return {way for way, owner in ways.items() if fits(owner)}


def _by_owner(own: Owners, value: np.ndarray, batch: int) -> list[np.ndarray]:
    """Return the entries that each example owns."""
    first, last = (np.broadcast_to(side, value.shape) for side in (own.first, own.last))
    return [value[(first <= b) & (b <= last)] for b in range(batch)]


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))


def owners_behind(here: Frame, seeds: Mapping[str, Owners]) -> dict[str, Owners]:
    """Return the owners of all that the seeds are computed from, by tensor, and note them down."""
    owners = here.found = dict(seeds)
    for op in reversed(here.ops):
        if not any(t.name in owners for t in op.outputs):
            continue
        if not any(t.name in here.depends for t in op.inputs):
            continue
        outs = [
            found if (found := owners.get(t.name)) is not None else Owners.nobody(here.rank(t))
            for t in op.outputs
        ]
        for tensor, own in zip(op.inputs, _behind(op, outs, here), strict=True):
            if own is not None and tensor.name in here.depends:
                before = owners.get(tensor.name)
                owners[tensor.name] = own if before is None else _united(tensor, before, own)
    return owners


def _behind(op: Any, outs: list[Owners], here: Frame) -> Found:
    """Return the owners of an operation's operands."""
    try:
        for tensor, own in zip(op.outputs, outs, strict=True):
            if not _is_list(tensor) and not here.has_rank(tensor, own.rank):
                raise Unclear(f"the shape of {tensor.name} is unknown")
        if op.type in CALLS and op.name not in here.inner:
            raise Unclear(f"what {op.type} calls cannot be looked into")
        if op.type in CALLS:
            found = _FLOW[op.type](op, outs, here)
        elif op.type in RULES:
            found = RULES[op.type](op, outs, here)
        else:
            return _all_alike(op, outs, here, f"no provenance rule for {op.type}")
    except Unclear as reason:
        return _all_alike(op, outs, here, f"{reason} (at {op.name})")
    found += [None] * (len(op.inputs) - len(found))
    for n, (tensor, own) in enumerate(zip(op.inputs, found, strict=True)):
        if own is None and op.type not in _BLIND and _reaches(tensor, here):
            why = f"an index or a shape of {op.type} depends on the data (at {op.name})"
            found[n] = _all_alike(op, outs, here, why)[n]
        elif own is not None and own.rank != here.rank(tensor) and not _is_list(tensor):
            raise AssertionError(f"{op.type} {op.name}: operand {n} has rank {here.rank(tensor)}")
    return found


def _reaches(tensor: Any, here: Frame) -> bool:
    """Tell whether what a tensor holds depends on the data, lists of tensors left out."""
    return tensor.name in here.valued and not _is_list(tensor)


# What looks at shapes, or at nothing, whatever its operands hold.
_BLIND = {"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike", "IdentityN", "NoOp"}


def _all_alike(op: Any, outs: Sequence[Owners], here: Frame, why: str) -> Found:
    """Return the owners where every operand's entries may reach everything that comes out."""
    whole = [own.whole(0) for own in outs]
    one = functools.reduce(lambda a, b: a | b, whole, Owners.nobody(0))
    if one.is_shared or one.unclear:
        one = Owners.nobody(0, one.unclear or why)
    return [one.whole(here.rank(t)) for t in op.inputs]


def _united(tensor: Any, a: Owners, b: Owners) -> Owners:
    if a.rank != b.rank:  # a list that nothing was read from, or a shape that is not known
        if a.is_nobody and not a.unclear:
            return b
        if b.is_nobody and not b.unclear:
            return a
        why = f"the shape of {tensor.name} is unknown"
        return Owners.nobody(a.rank, a.unclear or b.unclear or why)
    return a.perhaps(b, "the elements of a list are examples'") if _is_list(tensor) else a | b


def _is_list(tensor: Any) -> bool:
    return tensor.dtype in (tf.variant, tf.resource)


def _loop(op: Any, outs: list[Owners], here: Frame) -> Found:
    """Return the owners of what a loop starts from: those that no step changes any more."""
    body, condition = here.inner[op.name]
    for tensor, argument, result in zip(op.inputs, body.arguments, body.results, strict=True):
        if not _is_list(tensor) and body.dims.get(argument) != body.dims.get(result):
            raise Unclear(f"the shape of {tensor.name} changes from step to step")
    owners = list(outs)
    for _ in range(_ITERATIONS):
        before = list(owners)
        seeds: dict[str, Owners] = {}
        for result, own in zip(body.results, owners, strict=True):
            seeds[result] = own if result not in seeds else seeds[result] | own
        found = settled(body, seeds)
        for n, (tensor, argument) in enumerate(zip(op.inputs, body.arguments, strict=True)):
            if argument in found:
                owners[n] = _united(tensor, owners[n], found[argument])
        if all(a.rank == b.rank and a.same(b) for a, b in zip(owners, before, strict=True)):
            break
    else:
        raise Unclear("the owners of a loop's tensors keep changing")
    why = f"how often a loop runs depends on the data or on the number of examples ({op.name})"
    going = owners_behind(condition, {condition.results[0]: Owners.nobody(0, why)})
    for n, argument in enumerate(condition.arguments):
        if argument in going and argument in condition.depends:
            owners[n] = owners[n] | Owners.nobody(owners[n].rank, why)
    return list(owners)


def _branches(op: Any, outs: list[Owners], here: Frame) -> Found:
    """Return the owners over all branches, and of what decides between them."""
    owners: Found = [None] * (len(op.inputs) - 1)
    branches = here.inner[op.name]
    chosen = here.known(op.inputs[0]) if here.is_constant(op.inputs[0]) else None
    if chosen is not None:  # whatever the batch: the others are not taken
        number = int(chosen) if "Case" in op.type else 1 - bool(chosen)
        branches = branches[min(number, len(branches) - 1) :][:1]
    for branch in branches:
        for n, own in enumerate(_called(branch, outs, op.inputs[1:])):
            if own is not None:
                before = owners[n]
                owners[n] = own if before is None else _united(op.inputs[1 + n], before, own)
    if chosen is not None:
        return [None, *owners]
    why = f"a branch depends on several examples, or on how many there are ({op.name})"
    return [_all_alike(op, outs, here, why)[0], *owners]


def _call(op: Any, outs: list[Owners], here: Frame) -> Found:
    return _called(here.inner[op.name][0], outs, op.inputs)


def _called(inside: Frame, outs: Sequence[Owners], operands: Sequence[Any]) -> Found:
    seeds: dict[str, Owners] = {}
    for result, own in zip(inside.results, outs, strict=True):
        seeds[result] = own if result not in seeds else seeds[result] | own
    found = settled(inside, seeds)
    return [found.get(argument) for argument, _ in zip(inside.arguments, operands, strict=True)]


def _in_gradients(here: Frame, found: Mapping[str, Owners]) -> dict[str, Owners]:
    """Return the owners that tensors have because custom gradients take them.

    The gradient by an example's entries must be made of that example's cotangent; where it is not,
    these entries belong to all whose cotangents it is made of.
    """
    more: dict[str, Owners] = {}
    for op in here.ops:
        if op.type != "IdentityN" or not goes_its_own_way(op):
            continue
        if not any(t.name in found for t in op.outputs):
            continue
        for tensor, own in _in_gradient(op, here, found):
            before = more.get(tensor.name)
            more[tensor.name] = own if before is None else _united(tensor, before, own)
    return more


def _in_gradient(op: Any, here: Frame, found: Mapping[str, Owners]) -> list[tuple[Any, Owners]]:
    if not is_carried(op):
        why = "a custom gradient that cannot be looked into"
        return [(t, Owners.nobody(here.rank(t), why)) for t in op.inputs]
    inside, cotangents, carried = gradient_frame(op, here)
    own = [found.get(t.name, Owners.nobody(here.rank(t))) for t in op.inputs]
    seeds: dict[str, Owners] = {}
    for result, mine in zip(inside.results, own, strict=False):
        if result:
            seeds[result] = mine if result not in seeds else seeds[result] | mine
    behind = settled(inside, seeds)
    more = [
        (t, behind[name])
        for t, name in zip(op.inputs[len(cotangents) :], carried, strict=True)
        if name in behind
    ]
    counting = {t.name for t, _ in inside.counting} & behind.keys() & inside.counts[0]
    counts = any(not behind[name].is_nobody for name in counting)
    for tensor, name in zip(op.outputs, cotangents, strict=False):
        used, given = behind.get(name), found.get(tensor.name)
        if used is None or (used.is_nobody and not used.unclear):
            continue
        given = Owners.nobody(used.rank) if given is None else given
        if used.unclear:
            whole = Owners.nobody(0, used.unclear)
        elif counts or not (used | given).same(given):
            whole = (used | given).whole(0)
        else:
            continue
        more += [(t, whole.whole(here.rank(t))) for t in op.inputs[: len(cotangents)]]
    return more


def settled(here: Frame, seeds: Mapping[str, Owners]) -> dict[str, Owners]:
    """Return `owners_behind`, with what custom gradients take."""
    more: dict[str, Owners] = {}
    for _ in range(_ITERATIONS):
        found = owners_behind(here, {**seeds, **more})
        again = _in_gradients(here, found)
        if again.keys() == more.keys() and all(again[name].same(more[name]) for name in more):
            return found
        more = again
    raise Unclear("the owners of what custom gradients take keep changing")


_FLOW = {
    **dict.fromkeys(("While", "StatelessWhile"), _loop),
    **dict.fromkeys(("If", "StatelessIf", "Case", "StatelessCase"), _branches),
    **dict.fromkeys(("PartitionedCall", "StatefulPartitionedCall"), _call),
}
