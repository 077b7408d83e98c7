"""Text and lookup tables in a traced model: which ways around them there are not.

Knows graphs; must not know derivatives.
"""

from __future__ import annotations

import tensorflow as tf

from perjac._core.graph.program import Program

_TABLES = ("LookupTable", "HashTable", "MutableHashTable")


def why_not_xla(program: Program) -> str:
    """Return why XLA must not be asked to compile a program, or nothing where it may.

    Text among the arguments ends the process (`DataTypeCanUseMemcpy`, TensorFlow 2.21); for tables
    XLA has no kernels.
    """
    if any(spec.dtype == tf.string for spec in program.specs):
        return "it takes text, which XLA does not know"
    definition = program.graph_def
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    table = next((node.op for node in nodes if node.op.startswith(_TABLES)), "")
    return f"XLA has no kernel for {table}" if table else ""


def why_not_pfor(program: Program) -> str:
    """Return why pfor must not map a program over examples, or nothing where it may."""
    takes_text = any(spec.dtype == tf.string for spec in program.specs)
    return "pfor does not carry text" if takes_text else ""
