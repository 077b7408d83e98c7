"""Custom gradients that travel: what a `tf.custom_gradient` closes over becomes operands.

TensorFlow keeps a custom gradient as a Python function over tensors of the one graph that it was
traced in. Here it is traced once more, as a graph of its own, and its IdentityN gets what that
graph needs from outside as further operands, so that a copy anywhere can be differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import tensorflow as tf

from perjac._core.backend import dtypes, host
from perjac._core.graph.importing import import_graph

_GRADIENT = "_gradient_op_type"
# On an IdentityN: how many of its operands it had before.
_OPERANDS = "_perjac_operands"
_numbers = itertools.count()


def is_custom(node: Any) -> bool:
    """Tell whether a node is what TensorFlow makes of a custom gradient."""
    return node.op == "IdentityN" and _GRADIENT in node.attr and _OPERANDS not in node.attr


def operands(op: Any) -> int:
    """Return how many of an operation's operands are its own, not carried along."""
    if op.type != "IdentityN" or _OPERANDS not in op.node_def.attr:
        return len(op.inputs)
    return op.get_attr(_OPERANDS)


def is_carried(op: Any) -> bool:
    """Tell whether an operation's custom gradient travels with it."""
    return op.type == "IdentityN" and _OPERANDS in op.node_def.attr


def gradient_of(op: Any) -> _Gradient:
    """Return the custom gradient that an operation carries."""
    return host.registered_gradient(op.get_attr(_GRADIENT))  # type: ignore[return-value]


def carry(node: Any, graph: Any, prefix: str) -> None:
    """Rewrite an IdentityN so that it can be copied.

    Parameters
    ----------
    node : NodeDef
        To be changed; it stands under the prefix.
    graph : tf.Graph
        Where it was traced, without the prefix.
    prefix : str
        Put before the names of tensors.
    """
    op = graph.get_operation_by_name(node.name.removeprefix(prefix))
    gradient = _Gradient.of(op)
    node.attr[_OPERANDS].i = len(op.inputs)
    for tensor in gradient.inner:
        node.input.append(prefix + tensor.name)
        node.attr["T"].list.type.append(tensor.dtype.as_datatype_enum)
    name = f"PerjacCustomGradient{next(_numbers)}"
    tf.RegisterGradient(name)(gradient)
    node.attr[_GRADIENT].s = name.encode()


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """A custom gradient as a graph.

    Attributes
    ----------
    graph : tf.Graph
        Where it was traced.
    graph_def : GraphDef
        From `dys` and what it closes over to `dxs`.
    dys : list of tf.Tensor or None
        Its placeholders for the cotangents of what has one.
    dxs : list of str or None
        The gradient for each operand.
    inner : list of tf.Tensor
        What it closes over in the graph of the operation.
    names : list of str
        The placeholders for these.
    outer : dict of str to tf.Tensor
        Placeholders for what lies outside of all graphs: variables, constants.
    """

    graph: Any
    graph_def: Any
    dys: list[tf.Tensor | None]
    dxs: list[str | None]
    inner: list[tf.Tensor]
    names: list[str]
    outer: dict[str, tf.Tensor]

    @classmethod
    def of(cls, op: Any) -> _Gradient:
        with op.graph.as_default():
            scratch = host.scratch_graph()
        with scratch.as_default():
            dys = [
                tf.compat.v1.placeholder(t.dtype, t.shape)
                if t.dtype.is_floating or t.dtype.is_complex
                else None
                for t in op.outputs
            ]
            found = host.registered_gradient(op.get_attr(_GRADIENT))(op, *dys)
            dxs = [None if dx is None else tf.convert_to_tensor(dx).name for dx in found]
        captured = [(outer, inner.name) for outer, inner in host.captures(scratch)]
        inside = [(t, name) for t, name in captured if getattr(t, "graph", None) is op.graph]
        outside = {name: t for t, name in captured if hasattr(t, "numpy") or _is_handle(t)}
        if len(inside) + len(outside) < len(captured):
            raise ValueError(f"the custom gradient {op.name!r} reaches into several graphs")
        return cls(
            scratch, _free(scratch.as_graph_def()), dys, dxs, [t for t, _ in inside],
            [n for _, n in inside], outside,
        )  # fmt: skip

    def __call__(self, op: Any, *dys: Any) -> list[tf.Tensor | None]:
        graph = tf.compat.v1.get_default_graph()
        pairs = [(own, dy) for own, dy in zip(self.dys, dys, strict=False) if own is not None]
        feed = {own.name: dy for own, dy in pairs} | self.outer
        feed |= dict(zip(self.names, op.inputs[len(self.dys) :], strict=True))
        feed = {name: host.capture(graph, tensor) for name, tensor in feed.items()}
        raised = any(dy.dtype != own.dtype for own, dy in pairs)
        wanted = [name for name in dict.fromkeys(self.dxs) if name is not None]
        made = [name for name in wanted if name not in feed]
        definition = self._raised if raised else self.graph_def
        tensors = import_graph(definition, feed, made, "custom") | feed
        given = [None if name is None else tensors[name] for name in self.dxs]
        return given + [None] * len(self.inner)

    @functools.cached_property
    def _raised(self) -> Any:
        return dtypes.raised(self.graph_def)


def _free(graph_def: Any) -> Any:
    """Leave placeholders out, all of which are fed: XLA has no kernel for what is left of them."""
    waited = {f"^{node.name}" for node in graph_def.node if node.op == "Placeholder"}
    for n in reversed(range(len(graph_def.node))):
        if graph_def.node[n].op == "Placeholder":
            del graph_def.node[n]
    for node in graph_def.node:
        node.input[:] = [reference for reference in node.input if reference not in waited]
    return graph_def


def _is_handle(tensor: Any) -> bool:
    return tensor.dtype == tf.resource
