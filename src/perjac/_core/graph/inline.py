"""Calls of functions inlined: a graph's nodes as if no function had ever been called.

Nested tf.functions, SavedModel signatures and calls marked for XLA hide weights from whoever walks
the graph. Knows GraphDefs only; must not know variables, shapes or derivatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from perjac._core.backend import host
from perjac._core.graph.custom_gradients import carry, is_custom

# Operations that call a function once, with its name in the attribute "f".
CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_XLA = "_XlaMustCompile"


@dataclasses.dataclass(frozen=True)
class Body:
    """A function's nodes, inlined: its arguments and results as references into them."""

    nodes: list[Any]
    arguments: list[str]
    results: list[str]


class Flattener:
    """Inlines the calls of one graph.

    Parameters
    ----------
    graph : tf.Graph
        Knows the functions that the GraphDef calls.
    graph_def : GraphDef
        The nodes, and the library of functions.

    Attributes
    ----------
    compiled : set of str
        Nodes that come out of calls marked for XLA.
    """

    def __init__(self, graph: Any, graph_def: Any):
        self._graph = graph
        self._library = {f.signature.name: f for f in graph_def.library.function}
        self._alias: dict[str, str] = {}
        self._used: set[str] = {node.name for node in graph_def.node}
        self.compiled: set[str] = set()
        self.nodes = self._resolved(self._inlined(graph_def.node, graph, "", {}, False))

    def resolve(self, reference: str) -> str:
        """Return where a tensor of the original graph is: "call:1" may be "call/add:0"."""
        reference = canonical(reference)
        while reference in self._alias:
            reference = self._alias[reference]
        return reference

    def body(self, name: str, prefix: str) -> Body:
        """Return a function's body by itself, its arguments as placeholders, under a prefix."""
        prefix = self._unique(prefix)
        graph_def, arguments, results = self._function(name)
        graph = host.function_graph(self._graph, name)
        nodes = self._resolved(self._inlined(graph_def.node, graph, prefix, {}, False))
        return Body(
            nodes,
            [f"{prefix}{argument}:0" for argument in arguments],
            [self.resolve(prefix + result) for result in results],
        )

    def _function(self, name: str) -> tuple[Any, list[str], list[str]]:
        """Return a function's nodes, and its arguments' and results' names."""
        definition = self._library[name]
        with self._graph.as_default():
            graph_def, names = host.function_nodes(definition)
        arguments = [arg.name for arg in definition.signature.input_arg]
        returned = [definition.ret[out.name] for out in definition.signature.output_arg]
        return graph_def, arguments, [canonical(names[reference]) for reference in returned]

    def _inlined(
        self,
        nodes: Sequence[Any],
        graph: Any,
        prefix: str,
        arguments: Mapping[str, str],
        compiled: bool,
    ) -> list[Any]:
        """Return copies of a graph's nodes under a prefix, calls replaced by what they call."""
        flat = []
        for node in nodes:
            name = prefix + node.name
            if node.name in arguments:
                self._alias[f"{name}:0"] = arguments[node.name]
                continue
            inputs = [_under(prefix, reference) for reference in node.input]
            called = self._called(node)
            if called is not None:
                flat += self._call(called, name, inputs, compiled or is_for_xla(node))
                continue
            copy = type(node)()
            copy.CopyFrom(node)
            copy.name = name
            copy.input[:] = inputs
            for attribute in ("_class", _XLA):  # would name nodes of the function
                copy.attr.pop(attribute, None)
            if compiled:
                self.compiled.add(name)
            if is_custom(copy):
                carry(copy, graph, prefix)
            flat.append(copy)
        return flat

    def _call(self, function: str, name: str, inputs: list[str], compiled: bool) -> list[Any]:
        graph_def, arguments, results = self._function(function)
        prefix = self._unique(f"{name}/")
        data = [reference for reference in inputs if not reference.startswith("^")]
        before = [reference for reference in inputs if reference.startswith("^")]
        fed = dict(zip(arguments, map(canonical, data), strict=True))
        graph = host.function_graph(self._graph, function)
        nodes = self._inlined(graph_def.node, graph, prefix, fed, compiled)
        for node in nodes:
            node.input.extend(before)
        for n, result in enumerate(results):
            self._alias[f"{name}:{n}"] = prefix + result
        done = type(graph_def.node[0])(name=name, op="NoOp") if graph_def.node else None
        if done is not None:  # for whoever has to wait for the call
            done.input.extend(f"^{node.name}" for node in nodes)
            nodes.append(done)
        return nodes

    def _called(self, node: Any) -> str | None:
        """Return the name of the function that a node calls, if it is a call."""
        if node.op in CALLS:
            return node.attr["f"].func.name
        return node.op if node.op in self._library else None

    def _resolved(self, nodes: Sequence[Any]) -> list[Any]:
        """Let the nodes refer to what is there instead of to calls and arguments."""
        names = {node.name for node in nodes}
        for node in nodes:
            inputs = [r if r.startswith("^") else self.resolve(r) for r in node.input]
            node.input[:] = [r for r in inputs if not r.startswith("^") or r[1:] in names]
        return list(nodes)

    def _unique(self, prefix: str) -> str:
        stem, count = prefix.rstrip("/"), 0
        while prefix in self._used or any(name.startswith(prefix) for name in self._used):
            count += 1
            prefix = f"{stem}_{count}/"
        self._used.add(prefix)
        return prefix


def is_for_xla(node: Any) -> bool:
    """Tell whether a call must be compiled; merely to read an attribute would make it."""
    return _XLA in node.attr and node.attr[_XLA].b


def canonical(reference: str) -> str:
    """Return "name:0" for a tensor that a GraphDef calls "name"."""
    return reference if ":" in reference else f"{reference}:0"


def _under(prefix: str, reference: str) -> str:
    return f"^{prefix}{reference[1:]}" if reference.startswith("^") else prefix + reference
