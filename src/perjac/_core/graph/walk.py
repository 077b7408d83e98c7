"""Walks through a program's graph: what a tensor depends on, and what lies between two.

Knows graphs; must not know derivatives or weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from perjac._core.graph.program import Program


def upstream(program: Program, tensors: Iterable[str]) -> set[str]:
    """Return the names of the operations that the tensors depend on."""
    found: set[str] = set()
    stack = [program.graph.get_tensor_by_name(name).op for name in tensors]
    while stack:
        op = stack.pop()
        if op.name not in found:
            found.add(op.name)
            stack.extend(t.op for t in op.inputs)
    return found


def between(program: Program, top: str, bottoms: Sequence[str]) -> list[tuple[Any, int]]:
    """Return (operation, operand) of all that lies on a way from the bottoms to the top."""
    below, wanted = set(bottoms), {top}
    up = []
    for op in program.graph.get_operations():  # creation order is topological
        if op.type != "StopGradient" and any(t.name in below for t in op.inputs):
            up.append((op, [n for n, t in enumerate(op.inputs) if t.name in below]))
            below.update(t.name for t in op.outputs)
    steps = []
    for op, operands in reversed(up):
        if any(t.name in wanted for t in op.outputs):
            moving = [n for n in operands if _can_move(op.inputs[n])]
            steps += [(op, n) for n in moving]
            wanted.update(op.inputs[n].name for n in moving)
    return steps[::-1]


def _can_move(tensor: Any) -> bool:
    """Tell whether derivatives go through a tensor: of numbers, or of a list of them."""
    return not (tensor.dtype.is_integer or tensor.dtype.is_bool)
