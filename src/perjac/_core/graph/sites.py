"""Program → Sites: where each weight meets the data, and what lies between the weight and there.

Knows graphs; must not know which operations have rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import tensorflow as tf

from perjac._core.backend.axis_layout import Relabelling
from perjac._core.graph.custom_gradients import operands
from perjac._core.graph.program import Program


@dataclasses.dataclass(frozen=True)
class Site:
    """One operand of one operation through which weights reach the data.

    Attributes
    ----------
    operation, type : str
        The operation's name in the trace, and its type.
    operand : int
        Which of its inputs comes from weights alone.
    psi : str
        The tensor at that operand, ψ(W).
    variables : frozenset of int
        The variables that ψ is made of.
    layout : Relabelling or None
        From the variable to ψ, where ψ only relabels one variable; else None.
    through : tuple of str
        The types of the operations that ψ consists of, in their order in the trace.
    """

    operation: str
    type: str
    operand: int
    psi: str
    variables: frozenset[int]
    layout: Relabelling | None
    through: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Flow:
    """What each tensor of a program depends on, by tensor name.

    Attributes
    ----------
    data : set of str
        Depends on the inputs or on the batch size.
    values : set of str
        Depends on the inputs' values, not merely on their shapes.
    params : dict of str to frozenset of int
        Depends on these variables, and not on data.
    sites : tuple of Site
        Every place where one of the second kind meets one of the first.
    """

    data: set[str]
    values: set[str]
    params: dict[str, frozenset[int]]
    sites: tuple[Site, ...]


# Their outputs tell shapes, not values.
_SHAPES = {"Shape", "ShapeN", "Size", "Rank", "VariableShape"}


def flow(program: Program) -> Flow:
    """Classify every tensor of a program and collect its sites."""
    data, values, params, meetings = _walk(
        program.graph,
        program.inputs,
        {name: frozenset([n]) for name, n in program.handles.items()},
    )
    sites = [
        Site(
            op.name, op.type, i, name, params[name],
            _layout(op.inputs[i], program), _through(op.inputs[i], params),
        )
        for op, i, name in meetings
    ]  # fmt: skip
    return Flow(data, values, params, tuple(sites))


def kinds(graph: Any, inputs: Iterable[str], handles: Iterable[str]) -> tuple[set[str], set[str]]:
    """Return a graph's tensors that are made of weights alone, and those that depend on the data.

    Parameters
    ----------
    graph : tf.Graph
        May still be being built.
    inputs, handles : iterable of str
        The tensors of the data, and of the variables.
    """
    data, _, params, _ = _walk(graph, inputs, {name: frozenset() for name in handles})
    return set(params), data


def _walk(
    graph: Any, inputs: Iterable[str], handles: Mapping[str, frozenset[int]]
) -> tuple[set[str], set[str], dict[str, frozenset[int]], list[tuple[Any, int, str]]]:
    """Return data, values, params as in Flow, and (operation, operand, tensor) where they meet."""
    data, values = set(inputs), set(inputs)
    params = dict(handles)
    meetings: list[tuple[Any, int, str]] = []
    for op in graph.get_operations():  # creation order is topological
        names = [t.name for t in op.inputs]
        if any(name in data for name in names):
            if op.outputs:
                own = names[: operands(op)]
                meetings += [(op, i, name) for i, name in enumerate(own) if name in params]
            moving = [t.name for t in op.outputs if not _is_known(t)]
            data.update(moving)
            if op.type not in _SHAPES and any(name in values for name in names):
                values.update(moving)
        elif op.type != "StopGradient":  # nothing can be derived through that one
            reached = [params[name] for name in names if name in params]
            if reached:
                made_of = frozenset().union(*reached)
                params |= {t.name: made_of for t in op.outputs if _carries_derivative(t)}
    return data, values, params, meetings


def _is_known(tensor: Any) -> bool:
    """Tell whether a tensor of integers is fixed by the shapes alone, whatever the batch."""
    if not (tensor.dtype.is_integer or tensor.dtype.is_bool):
        return False
    return tf.get_static_value(tensor) is not None


def _carries_derivative(tensor: Any) -> bool:
    return tensor.dtype.is_floating or tensor.dtype.is_complex or tensor.dtype == tf.resource


def _through(psi: Any, params: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the types of the operations between variables and ψ, reading them left out."""
    found: dict[str, str] = {}

    def visit(tensor: Any) -> None:
        op = tensor.op
        if op.name in found or tensor.name not in params or op.type == "ReadVariableOp":
            return
        found[op.name] = ""
        for operand in op.inputs:
            visit(operand)
        del found[op.name]  # and back in, after what it is made of
        found[op.name] = op.type

    visit(psi)
    return tuple(kind for kind in found.values() if kind not in ("Identity", "Placeholder"))


def _layout(psi: Any, program: Program) -> Relabelling | None:
    """Return how ψ relabels the variable it is read from, or None where it does more."""
    op = psi.op
    if psi.name in program.handles:  # ResourceGather takes the variable itself
        variable = program.weights.variables[program.handles[psi.name]]
        return Relabelling.of(variable.shape)
    if psi.name in program.reads:
        return Relabelling.of(psi.shape)
    if op.type not in _RELABELS:
        return None
    before = _layout(op.inputs[0], program)
    return None if before is None else _RELABELS[op.type](op, before)


def _reshape(op: Any, before: Relabelling) -> Relabelling | None:
    shape = op.outputs[0].shape
    return before.reshape(shape) if shape.is_fully_defined() else None


def _transpose(op: Any, before: Relabelling) -> Relabelling | None:
    axes = tf.get_static_value(op.inputs[1])
    return None if axes is None else before.transpose(axes)


def _cast(op: Any, before: Relabelling) -> Relabelling | None:
    return before if op.outputs[0].dtype.is_floating else None  # types are no matter of layout


_RELABELS = {
    "Identity": lambda op, before: before,
    "Reshape": _reshape,
    "Squeeze": _reshape,
    "ExpandDims": _reshape,
    "Transpose": _transpose,
    "Cast": _cast,
}
