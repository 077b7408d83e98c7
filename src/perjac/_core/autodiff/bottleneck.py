"""Which way a derivative is accumulated on: the one of the fewest multiply-adds.

Knows the trace and what its operations cost; must not know rules, factors or seeds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from perjac._core.autodiff.accumulation import Leg, Route
from perjac._core.autodiff.batched import ENTRY_BY_ENTRY, Passage, is_plain
from perjac._core.graph.costs import entries_of, multiply_adds
from perjac._core.graph.program import Program
from perjac._core.graph.walk import between

# Another way than rows must promise so much fewer multiply-adds: it has costs of its own.
_GAIN = 1.5
# So many tensors are tried, the narrowest: each is a walk through all steps.
_TRIED = 32
# Bytes of the widest step that rows may fold into, if it is wider than what is asked for.
_FOLDED_BYTES = 2**28
# Operations whose gradients TensorFlow differentiates rightly by the cotangent, all of them tested.
# Max-pooling is none: where windows overlap, the gradient of its gradient is wrong (2.21).
TWICE = {
    *(set(ENTRY_BY_ENTRY) - {"Softsign"}), "Add", "AddV2", "AvgPool", "BatchMatMulV2", "BiasAdd",
    "ConcatV2", "Conv2D", "Conv2DBackpropInput", "DepthwiseConv2dNative", "Einsum", "ExpandDims",
    "Identity", "LogSoftmax", "MatMul", "Maximum", "Mean", "Minimum", "Mul", "Neg", "Pack", "Pad",
    "RealDiv", "Reshape", "Softmax", "SquaredDifference", "Squeeze", "StridedSlice", "Sub", "Sum",
    "Transpose",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cut:
    """A tensor through which all that lies below it reaches the output.

    Attributes
    ----------
    tensor : str
        It.
    entries : int
        Of one example.
    above, below : tuple of str
        The targets above it, and below.
    work : int
        Multiply-adds of the way across it, for one example.
    """

    tensor: str
    entries: int
    above: tuple[str, ...]
    below: tuple[str, ...]
    work: int


@dataclasses.dataclass(frozen=True)
class Routing:
    """The ways from an output down to targets.

    Attributes
    ----------
    program : Program
        The trace.
    head : str
        The output's tensor.
    targets : tuple of str
        The tensors whose cotangents are wanted.
    count, batch : int
        K and B.
    room : int
        Bytes that there are on the way.
    chunk_of : callable
        (tensor, rows) → how many rows to sweep together from there down.
    straight : bool
        Whether to go by rows anyway.
    """

    program: Program
    head: str
    targets: tuple[str, ...]
    count: int
    batch: int
    room: int
    chunk_of: Callable[[str, int], int]
    straight: bool = False

    def best(self) -> Route:
        """Return the way to take."""
        names = [] if self.straight else self._narrow()
        cuts = [cut for name in names if (cut := self._cut(name)) is not None]
        for cut in sorted(cuts, key=lambda cut: cut.work):
            if cut.work * _GAIN > self.count * self._work(self._steps):
                break
            route = self._across(cut)
            if route is not None:
                return route
        return Route(self.targets, self._leg(self.head, self.targets, self.count))

    @functools.cached_property
    def _steps(self) -> list[tuple[Any, int]]:
        """(operation, operand) of all between the output and the targets."""
        return between(self.program, self.head, self.targets)

    def _narrow(self) -> list[str]:
        """Return the narrowest tensors on the way, the examples along their axis."""
        names = [*self.targets, *(op.inputs[n].name for op, n in self._steps)]
        extents = self.program.extents
        found = [n for n in dict.fromkeys(names) if n in extents and extents[n].fold == 1]
        found = [n for n in found if 0 < self._entries(n) < self.count]
        return sorted(found, key=self._entries)[:_TRIED]

    def _cut(self, name: str) -> Cut | None:
        """Return what a tensor parts, or None if there are ways around it."""
        above, below = self._reach(self.head, stop=name), self._reach(name)
        apart = set(self.targets) - {name}
        if name not in above or above & below & apart or not apart <= above | below:
            return None
        near = tuple(t for t in self.targets if t in above and t != name)
        far = tuple(t for t in self.targets if t in below and t != name)
        entries, rows = self._entries(name), self.count
        upper = [step for step in self._steps if step[0].outputs[0].name in above - {name}]
        lower = [step for step in self._steps if step[0].outputs[0].name in below]
        work = (rows if near else entries) * self._work(upper) + entries * self._work(lower)
        work += entries * rows * sum(map(self._entries, far))
        return Cut(name, entries, near, far, work)

    def _across(self, cut: Cut) -> Route | None:
        """Return the way across a cut, if there is one that is known to be right."""
        columns = not cut.above
        count = cut.entries if columns else self.count
        upper = self._leg(self.head, (cut.tensor, *cut.above), count)
        # Other tensors than those asked for have not been probed for how the examples lie in them.
        probed = cut.tensor in self.targets and columns
        if upper.passage is None and not (probed and self._twice(upper)):
            return None
        lower = self._leg(cut.tensor, cut.below, cut.entries) if cut.below else None
        return Route(self.targets, upper, cut.tensor, columns, lower)

    def _twice(self, leg: Leg) -> bool:
        steps = between(self.program, leg.top, leg.bottoms)
        return len(leg.bottoms) == 1 and all(op.type in TWICE and is_plain(op) for op, _ in steps)

    def _leg(self, top: str, bottoms: tuple[str, ...], count: int) -> Leg:
        """Return a stretch, folded where that is possible and not too large."""
        passage = Passage.of(self.program, top, bottoms)
        if passage is not None:
            widest = max((self._entries(step.below) for step in passage.steps), default=0)
            asked = max(map(self._entries, bottoms), default=0)
            held = self.batch * count * widest * self._itemsize
            if not count or (widest > asked and held > min(_FOLDED_BYTES, self.room)):
                passage = None
        return Leg(top, bottoms, passage, self.chunk_of(top, count))

    @property
    def _itemsize(self) -> int:
        return self.program.graph.get_tensor_by_name(self.head).dtype.size

    def _reach(self, top: str, stop: str = "") -> set[str]:
        """Return the tensors that a tensor depends on, it included, not looking past another."""
        reached = {top}
        for op, n in reversed(self._steps):
            if any(t.name in reached and t.name != stop for t in op.outputs):
                reached.add(op.inputs[n].name)
        return reached

    def _entries(self, name: str) -> int:
        return entries_of(self.program, name)

    def _work(self, steps: Sequence[tuple[Any, int]]) -> int:
        """Return the multiply-adds that one row takes through these steps, for one example."""
        return sum(multiply_adds(self.program, op) for op, _ in steps)
