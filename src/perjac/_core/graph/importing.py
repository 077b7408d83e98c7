"""A GraphDef brought into the graph being built, without what holds only where it was traced.

Knows GraphDefs; must not know models, loops or derivatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

# Where TensorFlow wants an operation to be placed: beside another one of the traced graph, often a
# placeholder, which a copy replaces. `tf.nn.embedding_lookup` asks for the place of its table.
_PLACE = "_class"


def node_of(reference: str) -> str:
    """Return the name of the node that a reference leads to: of "a:0", "a:y:1" and "^a" it is a."""
    return reference.removeprefix("^").partition(":")[0]


def import_graph(
    graph_def: Any, feed: Mapping[str, tf.Tensor], wanted: Sequence[str], name: str
) -> dict[str, Any]:
    """Import a GraphDef into the graph being built.

    Parameters
    ----------
    graph_def : GraphDef
        What is imported; operations that ask for the place of another one lose that wish.
    feed : mapping of str to tf.Tensor
        What stands in for tensors of the GraphDef, by reference; those that it does not use are
        left out.
    wanted : sequence of str
        Tensors ("a:0") and operations ("a") to return.
    name : str
        Put before the operations' names, or nothing.

    Returns
    -------
    dict
        Name to tensor or operation.
    """
    for node in graph_def.node:
        if _PLACE in node.attr:
            graph_def = _without_places(graph_def)
            break
    used = {r if ":" in r else f"{r}:0" for node in graph_def.node for r in node.input}
    found = tf.graph_util.import_graph_def(
        graph_def,
        input_map={reference: t for reference, t in feed.items() if reference in used},
        return_elements=list(wanted),
        name=name,
    )
    return dict(zip(wanted, found or [], strict=True))


def _without_places(graph_def: Any) -> Any:
    copy = type(graph_def)()
    copy.CopyFrom(graph_def)
    for node in copy.node:
        node.attr.pop(_PLACE, None)
    return copy
