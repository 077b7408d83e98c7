"""A Program in normal form: calls inlined, loops opened, custom gradients made to travel.

Only what needs it is built anew; most models pass as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import tensorflow as tf

from perjac._core.backend import host
from perjac._core.graph.batch_axis import TURNED, elsewhere, turn
from perjac._core.graph.builder import Builder, Replacement
from perjac._core.graph.custom_gradients import is_custom
from perjac._core.graph.inline import CALLS, Flattener
from perjac._core.graph.lower_convolutions import CONVOLUTIONS, lower
from perjac._core.graph.program import Program, collect
from perjac._core.graph.sites import kinds
from perjac._core.graph.while_loops import LOOPS, Kinds, Loop
from perjac.errors import SlowPathWarning, warn


def normalise(program: Program) -> Program:
    """Return a program that computes the same, with every weight's site where it can be seen.

    Parameters
    ----------
    program : Program
        The trace.

    Returns
    -------
    Program
        With `origin` the trace itself.

    Warns
    -----
    SlowPathWarning
        Where the graph cannot be built anew: it is used as it was traced.
    """
    return _built_anew(program, for_rules=True)


def flatten(program: Program) -> Program:
    """Return a program that computes the same without calls; its loops stay as they are.

    Each operation is the model's own, so it can serve as a reference, in any float type.
    """
    return _built_anew(program, for_rules=False)


def _built_anew(program: Program, for_rules: bool) -> Program:
    unwanted = CALLS | LOOPS if for_rules else CALLS
    nodes = program.graph_def.node
    plain = not any(node.op in unwanted or is_custom(node) for node in nodes)
    if plain and not (for_rules and elsewhere(program.graph, program.shapes)):
        return program
    try:
        return _rebuilt(program, for_rules)
    except Exception as failure:  # TensorFlow raises whatever an unforeseen graph runs into
        warn(
            f"The model's nested functions and loops could not be looked into "
            f"({type(failure).__name__}: {str(failure).splitlines()[0][:200]}): their weights go "
            "to the tape path.",
            SlowPathWarning,
        )
        return program


def _rebuilt(program: Program, for_rules: bool) -> Program:
    flat = Flattener(program.graph, program.graph_def)
    turning = _turning(program, flat) if for_rules else {}
    stand_ins: dict[str, str] = {}
    taps: dict[str, list[str]] = {}

    @tf.function(autograph=False)
    def rebuild(*inputs):
        graph = tf.compat.v1.get_default_graph()
        handles = {
            name: host.capture(graph, host.handle(program.weights.variables[n]))
            for name, n in program.handles.items()
        }
        constants = {name: host.capture(graph, outer) for name, outer in program.constants.items()}
        feed = dict(zip(program.inputs, inputs, strict=True)) | handles | constants
        batch = tf.shape(inputs[0])[0]

        def lowered(build: Builder, node: Any) -> Any:
            outputs, made = lower(build, node, for_rules)
            stand_ins.update(made)
            return outputs

        def opened(build: Builder, node: Any) -> Any:
            body, condition = (
                flat.body(node.attr[name].func.name, "step/") for name in ("body", "cond")
            )
            build.inputs(node)
            params, data = kinds(
                graph, [t.name for t in inputs], [t.name for t in handles.values()]
            )
            with tf.name_scope(node.name):
                loop = Loop(build, node, body, condition, Kinds(params, data))
                outputs, made = loop.open(batch)
            stand_ins.update(made)
            return outputs

        replacements = dict(turning)
        if for_rules:
            replacements |= {node.name: opened for node in flat.nodes if node.op in LOOPS}
        replacements |= {
            node.name: lowered
            for node in flat.nodes
            if node.op in CONVOLUTIONS and node.name in flat.compiled
        }
        definition = program.graph_def
        build = Builder(flat.nodes, definition.library, definition.versions, feed, replacements)
        build.build_all()
        taps.update(
            {
                layer: [name and build[flat.resolve(name)].name for name in calls]
                for layer, calls in program.taps.items()
            }
        )
        return {head: build[flat.resolve(name)] for head, name in program.heads.items()}

    concrete = rebuild.get_concrete_function(*program.specs)
    found = collect(concrete, len(program.specs), program.weights, taps)
    return dataclasses.replace(found, stand_ins=stand_ins, origin=program)


def _turning(program: Program, flat: Flattener) -> dict[str, Replacement]:
    """Return what turns operations with the batch elsewhere; of functions' nodes only it knows."""
    there = {op.name for op in program.graph.get_operations()}
    wanted = elsewhere(program.graph, program.shapes)
    turning = functools.partial(
        turn, {flat.resolve(name): shape for name, shape in program.shapes.items()}
    )
    return {
        node.name: turning
        for node in flat.nodes
        if node.op in TURNED and (node.name in wanted or node.name not in there)
    }
