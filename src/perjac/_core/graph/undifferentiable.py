"""Operations without a gradient on the way from what is asked about to the output, by name.

TensorFlow finds them while it goes back, and names the type alone, or a copy of the operation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from perjac._core.backend import host
from perjac._core.graph.program import Program
from perjac._core.model.variables import Source
from perjac.errors import NoGradientError

# TensorFlow's words for the type, on either path.
_TYPE = re.compile(r"\(op type: (\w+)\)|no entry for: (\w+)")


def no_gradient(
    program: Program, head: str, sources: Sequence[Source], failure: BaseException
) -> NoGradientError:
    """Return the error for an output that cannot be differentiated, from TensorFlow's own."""
    op = without_gradient(program, head, sources)
    output = program.called(head)
    if op is None:
        text = str(failure)
        found = _TYPE.search(text)
        kind = (found[1] or found[2]) if found else text.partition("\n")[0][:200]
        where, advice = "", _advice("", "")
    else:
        kind = op.type
        layer = program.layer_of(op.name)
        where = f" in layer {layer!r}" if layer else ""
        where += f" (operation {op.name!r})"
        needed = _upstream(op)
        taps = {name: calls[0] for name, calls in program.taps.items() if calls and calls[0]}
        graph = program.graph
        before = [n for n, t in taps.items() if graph.get_tensor_by_name(t).op.name in needed]
        behind = [n for n, t in taps.items() if op in _ops(graph.get_tensor_by_name(t))]
        advice = _advice((before or [""])[-1], (behind or [""])[0])
    return NoGradientError(
        f"TensorFlow has no gradient for {kind}, which the output {output!r} is computed "
        f"with{where}. {advice}"
    )


def without_gradient(program: Program, head: str, sources: Sequence[Source]) -> Any:
    """Return the first operation without a gradient between sources and an output, or None."""
    graph = program.graph
    moving = {t.name for source in sources for t in [*_tensors(program, source)]}
    needed = {op.name for op in _ops(graph.get_tensor_by_name(head))}
    for op in graph.get_operations():  # creation order is topological
        if op.name not in needed or not any(t.name in moving for t in op.inputs):
            continue
        carried = [t.name for t in op.outputs if _carries(t)]
        if carried and _has_none(op):
            return op
        moving.update(carried)
    return None


def _tensors(program: Program, source: Source) -> Iterable[Any]:
    """Return where a source enters the trace."""
    if source.kind == "weight":
        names = [n for n, number in program.handles.items() if number == source.index]
    else:
        names = [source.tensor or program.inputs[source.index]]
    return [program.graph.get_tensor_by_name(name) for name in names]


def _has_none(op: Any) -> bool:
    if op.type == "PreventGradient":
        return True
    try:
        host.gradient_function(op)
    except LookupError:
        return True
    return False


def _carries(tensor: Any) -> bool:
    return tensor.dtype.is_floating or tensor.dtype.is_complex or tensor.dtype.name == "variant"


def _ops(tensor: Any) -> set[Any]:
    """Return the operations that a tensor is computed with."""
    found: set[Any] = set()
    stack = [tensor.op]
    while stack:
        op = stack.pop()
        if op not in found:
            found.add(op)
            stack.extend(t.op for t in op.inputs)
    return found


def _upstream(op: Any) -> set[str]:
    return {above.name for t in op.inputs for above in _ops(t)}


def _advice(before: str, behind: str) -> str:
    of = f"of={before!r}" if before else "of= with the name of a layer"
    wrt = f"wrt=pj.activation({behind!r})" if behind else "wrt=pj.activation(name)"
    return f"Differentiate what comes before it, {of}, or by what comes behind it, {wrt}."
