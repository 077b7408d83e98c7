"""A traced graph built anew, piece by piece, with some of its operations replaced on the way.

Knows GraphDefs and tensors; must not know what is replaced or why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend import host
from perjac._core.graph.importing import import_graph, node_of
from perjac._core.graph.inline import canonical

Replacement = Callable[["Builder", Any], Sequence[tf.Tensor]]


class Builder:
    """Imports nodes into the graph being built, as far as somebody needs them.

    Parameters
    ----------
    nodes : sequence of NodeDef
        The graph, its functions inlined.
    library : FunctionDefLibrary
        The functions that control flow refers to.
    versions : VersionDef
        The graph's.
    feed : mapping of str to tf.Tensor
        What is there already, by reference.
    replacements : mapping of str to callable
        By node name, what makes the outputs of that node in its place.

    Attributes
    ----------
    made : dict of str to tf.Tensor
        What is there so far, by reference.
    operations : list of tf.Operation
        What was imported so far, each after its inputs.
    """

    def __init__(
        self,
        nodes: Iterable[Any],
        library: Any,
        versions: Any,
        feed: Mapping[str, tf.Tensor],
        replacements: Mapping[str, Replacement] | None = None,
    ):
        self._nodes = {node.name: node for node in nodes}
        self._library, self._versions = library, versions
        self.made: dict[str, tf.Tensor] = dict(feed)
        self._given = {reference.rpartition(":")[0] for reference in feed}
        self._replacements = dict(replacements or {})
        self.operations: list[Any] = []

    def another(self, nodes: Iterable[Any], feed: Mapping[str, tf.Tensor]) -> Builder:
        """Return a builder of other nodes that call the same functions."""
        return Builder(nodes, self._library, self._versions, feed)

    def __getitem__(self, reference: str) -> tf.Tensor:
        """Return a tensor, importing what it is made of."""
        self.build([reference])
        return self.made[canonical(reference)]

    def build_all(self) -> None:
        """Import every node that is left."""
        self._build(set(self._nodes))

    def build(self, references: Iterable[str]) -> None:
        """Import what the tensors are made of, and not what merely has to run before it."""
        missing = [r for r in map(canonical, references) if r not in self.made]
        self._build(self._ancestors(missing))

    def inputs(self, node: Any) -> list[tf.Tensor]:
        """Return a node's data inputs."""
        references = [r for r in node.input if not r.startswith("^")]
        self.build(references)
        return [self.made[canonical(r)] for r in references]

    def _ancestors(self, references: Iterable[str]) -> set[str]:
        found: set[str] = set()
        stack = [node_of(reference) for reference in references]
        while stack:
            name = stack.pop()
            if name in found or name in self._given or name not in self._nodes:
                continue
            found.add(name)
            stack.extend(node_of(r) for r in self._nodes[name].input if not r.startswith("^"))
        return found

    def _build(self, names: set[str]) -> None:
        """Import these nodes, which must include their ancestors, in the order of the graph."""
        waiting: list[Any] = []
        for name, node in self._in_order(names):
            if name in self._given:
                continue
            replace = self._replacements.get(name)
            if replace is None:
                waiting.append(node)
                continue
            self._import(waiting)
            waiting = []
            self._given.add(name)
            for n, tensor in enumerate(replace(self, node)):
                self.made[f"{name}:{n}"] = tensor
        self._import(waiting)

    def _in_order(self, names: set[str]) -> list[tuple[str, Any]]:
        """Return the nodes, each after those that it takes data from."""
        done: dict[str, Any] = {}
        opened: set[str] = set()
        for start in self._nodes:
            stack = [start] if start in names and start not in done else []
            while stack:
                name = stack[-1]
                before = [
                    m
                    for r in self._nodes[name].input
                    if (m := node_of(r)) in names and m not in done and not r.startswith("^")
                ]
                if before:
                    if name in opened:
                        raise ValueError(f"The graph goes in a circle at {name!r}.")
                    opened.add(name)
                    stack.extend(before)
                else:
                    done.setdefault(stack.pop(), self._nodes[name])
        return list(done.items())

    def _import(self, nodes: Sequence[Any]) -> None:
        nodes = [node for node in nodes if node.name not in self._given]
        if not nodes:
            return
        there = {node.name for node in nodes}
        graph_def = tf.compat.v1.GraphDef(versions=self._versions, library=self._library)
        used: set[str] = set()
        for node in nodes:
            copy = graph_def.node.add()
            copy.CopyFrom(node)
            copy.input[:] = [r for r in node.input if not r.startswith("^") or r[1:] in there]
            used.update(canonical(r) for r in copy.input if not r.startswith("^"))
        graph = tf.compat.v1.get_default_graph()
        feed = {r: host.capture(graph, self.made[r]) for r in used if node_of(r) not in there}
        names = [node.name for node in nodes]
        for name, op in import_graph(graph_def, feed, names, "").items():
            self._given.add(name)
            self.operations.append(op)
            self.made |= {f"{name}:{n}": tensor for n, tensor in enumerate(op.outputs)}


def alone(node: Any, inputs: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
    """Build one node by itself, on these inputs; return its outputs."""
    graph_def = tf.compat.v1.GraphDef()
    copy = graph_def.node.add()
    copy.CopyFrom(node)
    copy.input[:] = [f"operand_{n}" for n in range(len(inputs))]
    feed = {f"operand_{n}:0": tensor for n, tensor in enumerate(inputs)}
    return import_graph(graph_def, feed, [node.name], "")[node.name].outputs
