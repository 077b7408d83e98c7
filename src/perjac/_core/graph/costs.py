"""What a sweep costs before it is run: multiply-adds, bytes moved, operations started.

Counts what the trace says, for one example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from perjac._core.backend.machine import Rates
from perjac._core.backend.shapes import size
from perjac._core.graph.program import Program
from perjac._core.graph.thin_convolutions import laid_out
from perjac._core.graph.walk import between, upstream

# Operations whose result lies in the memory of their operand.
VIEWS = ("Reshape", "Identity", "Squeeze", "ExpandDims", "StopGradient")
# What TensorFlow starts to go back through one operand: its gradient, a shape or a reduction.
_STARTED_BACK = 2
# Poolings go back by a search through their windows, one number after another; rows swept together
# miss oneDNN's kernel, which keeps where the largest were.
_SEARCHES, _SEARCHED, _SEARCHED_AGAIN = ("MaxPool", "MaxPool3D"), 16, 128


@dataclasses.dataclass(frozen=True)
class Cost:
    """Work, of one example but for what is started.

    Attributes
    ----------
    products, convolutions : float
        Multiply-adds in matrix products, and in convolutions.
    moved : float
        Bytes that all other steps read and write.
    started : float
        Operations, whatever the number of examples.
    """

    products: float = 0.0
    convolutions: float = 0.0
    moved: float = 0.0
    started: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(_parts(self), _parts(other), strict=True)))

    def times(self, work: float, started: float) -> Cost:
        """Return so many times the work, started so many times."""
        return Cost(
            work * self.products, work * self.convolutions, work * self.moved,
            started * self.started,
        )  # fmt: skip

    def seconds(self, rates: Rates, examples: int) -> float:
        """Return how long this takes a machine for so many examples.

        Examples
        --------
        >>> from perjac._core.backend.machine import Rates
        >>> rates = Rates(1e9, 1e9, 1e9, 1e9, 1e-6, 1e-4)
        >>> round(Cost(products=1e6, started=100).seconds(rates, 10), 6)
        0.0101
        """
        work = self.products / rates.product + self.convolutions / rates.convolution
        return examples * (work + self.moved / rates.traffic) + self.started * rates.start


def _parts(cost: Cost) -> tuple[float, ...]:
    return cost.products, cost.convolutions, cost.moved, cost.started


def multiply_adds(program: Program, op: Any) -> int:
    """Return the multiply-adds of an operation, or of one row back through it, for one example."""
    entries = entries_of(program, op.outputs[0].name)
    if not is_product(op):
        return entries
    other = op.inputs[1].shape
    if other.is_fully_defined():  # a kernel, whose last axis is the result's
        return entries * size(other[:-1])
    return entries * (op.inputs[0].shape[-1] or 1)


def is_product(op: Any) -> bool:
    """Tell whether an operation is a matrix product or a convolution."""
    return any(kind in op.type for kind in ("MatMul", "Conv"))


def entries_of(program: Program, tensor: str) -> int:
    """Return the numbers that a tensor has for one example; none if it has no batch in front."""
    extent = program.extents.get(tensor)
    return 0 if extent is None else extent.fold * size(extent.rest)


def sizes(program: Program, head: str) -> list[int]:
    """Return the bytes of each tensor on the way to an output for one example, largest first.

    With what backward steps of ours lay out.
    """
    needed = upstream(program, [head])
    operations = [op for op in program.graph.get_operations() if op.name in needed]
    tensors = [t for op in operations if op.type not in VIEWS for t in op.outputs]
    found = [entries_of(program, t.name) * t.dtype.size for t in tensors]
    for op in operations:
        if each := laid_out(op):
            y = op.outputs[0]
            positions = entries_of(program, y.name) // (y.shape[-1] or 1)
            found.append(positions * each * y.dtype.size)
    return sorted(found, reverse=True)


def forward(program: Program, head: str) -> Cost:
    """Return what an output costs."""
    needed = upstream(program, [head])
    operations = [op for op in program.graph.get_operations() if op.name in needed]
    return _total(program, ((op, _moved(program, op)) for op in operations), 1)


def backward(program: Program, head: str, targets: Sequence[str], tiled: bool = False) -> Cost:
    """Return what one row costs, from an output back to these tensors.

    `tiled` is for rows swept together, which copy what they need of the forward pass.
    """
    steps = []
    for op, operand in between(program, head, targets):
        search = 1
        if op.type in _SEARCHES:
            search = _SEARCHED_AGAIN if tiled else _SEARCHED
        below = entries_of(program, op.inputs[operand].name) * op.inputs[operand].dtype.size
        steps.append((op, search * (_moved(program, op) + below * (1 + tiled))))
    return _total(program, steps, _STARTED_BACK)


def _moved(program: Program, op: Any) -> int:
    """Return the bytes that an operation reads and writes for one example."""
    made = sum(entries_of(program, t.name) for t in op.outputs)
    if op.type in ("Placeholder", *VIEWS) or not made:  # a shape is told without a look inside
        return 0
    tensors = [*op.inputs, *op.outputs]
    return sum(entries_of(program, t.name) * t.dtype.size for t in tensors)


def _total(program: Program, steps: Iterable[tuple[Any, int]], started: int) -> Cost:
    whole = Cost()
    for op, moved in steps:
        work = multiply_adds(program, op) if is_product(op) else 0
        convolution = "Conv" in op.type
        whole += Cost(
            0 if convolution else work,
            work if convolution else 0,
            0 if work else moved,
            started if entries_of(program, op.outputs[0].name) else 0,
        )
    return whole
