"""How much of a gradient is rounding: the traced graph's own, beside the same in float64.

Says nothing about what is right: where numbers are mostly rounding, nothing can be told by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend import dtypes, host
from perjac._core.graph.program import Program, import_program
from perjac._core.model.variables import Source


def rounding(
    program: Program,
    head: str,
    sources: Sequence[Source],
    inputs: Sequence[tf.Tensor],
    cotangent: tf.Tensor,
) -> list[float] | None:
    """Return ‖g - g'‖ by each source: g from the trace, g' with its float types raised to float64.

    Parameters
    ----------
    program : Program
        A trace that can be run in any other graph.
    head : str
        The output's tensor.
    sources : sequence of Source
        What is differentiated against.
    inputs : sequence of tf.Tensor
        A batch.
    cotangent : tf.Tensor
        Of the output.

    Returns
    -------
    list of float, or None
        None where the graph does not run in float64.
    """
    values = [host.tf_variable(v) for v in program.weights.variables]
    try:
        wide = [tf.Variable(dtypes.widened(v)) if v.dtype.is_floating else v for v in values]
        plain = _gradients(program, program.graph_def, values, False, head, sources)
        raised = _gradients(program, dtypes.raised(program.graph_def), wide, True, head, sources)
        pairs = zip(plain(inputs, cotangent), raised(inputs, cotangent), strict=True)
        return [float(tf.norm(dtypes.widened(a) - dtypes.widened(b))) for a, b in pairs]
    except Exception:  # an operation without a float64 kernel, in whatever words
        return None


def _gradients(
    program: Program,
    graph_def: Any,
    variables: Sequence[tf.Variable],
    raise_types: bool,
    head: str,
    sources: Sequence[Source],
) -> Any:
    """Return a function of inputs and cotangent to the gradients by each source."""
    widen: Any = dtypes.widened if raise_types else tf.convert_to_tensor

    @host.compiled
    def run(inputs: list[tf.Tensor], cotangent: tf.Tensor) -> list[tf.Tensor]:
        graph = tf.compat.v1.get_default_graph()
        given = [widen(t) for t in inputs]
        feed = dict(zip(program.inputs, given, strict=True))
        for name, outer in program.constants.items():
            feed[name] = widen(outer) if outer.dtype.is_floating else host.capture(graph, outer)
        handles = [host.capture(graph, v.handle) for v in variables]
        feed |= {name: handles[number] for name, number in program.handles.items()}
        names = [head, *(s.tensor for s in sources if s.tensor)]
        found = import_program(graph_def, feed, names)
        against = [
            handles[s.index]  # so that values read inside a loop count as well
            if s.kind == "weight"
            else given[s.index]
            if s.kind == "input"
            else found[s.tensor]
            for s in sources
        ]
        gradients = tf.gradients(found[head], against, grad_ys=widen(cotangent))
        return [tf.zeros([]) if g is None else tf.convert_to_tensor(g) for g in gradients]

    return run
