"""The engine against a plain loop: one example, one output, one reverse pass at a time, in float64.

The reference knows nothing of sites, rules, factors or plans.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac import host, precision
from perjac.inputs import Batch
from perjac.sites import upstream
from perjac.sources import Source
from perjac.trace import Program, import_program

# By the narrowest type that the model computes in.
_RTOL = {tf.float64: 1e-10, tf.float32: 1e-4, tf.float16: 1e-2, tf.bfloat16: 5e-2}
# More rows than these are sampled evenly: the reference takes a pass for each.
_ROWS, _EXAMPLES = 10, 8
# Of rounding that the largest weight's Jacobian allows the others: a weight whose exact gradient is
# zero (attention's key bias) has noise divided by noise for a relative error.
_SLACK = 10


@dataclasses.dataclass(frozen=True)
class Verification:
    """What a comparison with the plain loop found.

    Attributes
    ----------
    passed : bool
        Whether every weight's error is at most `rtol`.
    errors : dict of str to float
        For each weight ‖J - R‖ / (‖R‖ + 10 ε/rtol · max over weights ‖R‖), R the reference.
    rtol : float
        The error allowed.
    dtype : str
        The reference's type.
    examples, rows : list of int
        Which examples and outputs were compared.
    note : str
        Why the reference is not in float64, where it is not.
    """

    passed: bool
    errors: dict[str, float]
    rtol: float
    dtype: str
    examples: list[int]
    rows: list[int]
    note: str = ""

    @property
    def worst(self) -> tuple[str, float]:
        """The weight with the largest error, and that error."""
        name = max(self.errors, key=lambda key: _order(self.errors[key]))
        return name, self.errors[name]

    def __str__(self) -> str:
        name, error = self.worst
        verdict = "passed" if self.passed else "FAILED"
        lines = [
            f"Verification {verdict}: {len(self.errors)} weights, {len(self.examples)} examples × "
            f"{len(self.rows)} outputs against a plain {self.dtype} loop. Worst relative error "
            f"{error:.1e} ({name}); allowed {self.rtol:.0e}."
        ]
        failed = {key: e for key, e in self.errors.items() if not e <= self.rtol}
        lines += [f"  {key}: {e:.1e}" for key, e in failed.items()]
        return "\n".join([*lines, self.note] if self.note else lines)


def verify(
    program: Program,
    head: str,
    model: Callable[..., tf.Tensor],
    batch: Batch,
    weights: Sequence[Source],
    jacobian: Callable[[Any, list[int]], Mapping[str, tf.Tensor]],
    rtol: float | None,
) -> Verification:
    """Compare `jacobian(x, rows)` with the loop, on up to 8 examples and 10 outputs.

    Parameters
    ----------
    program, head : Program, str
        The trace, and the output's tensor.
    model : callable
        The model itself: takes the inputs to that output. For where the trace cannot be raised.
    batch : Batch
        Examples.
    weights : sequence of Source
        What to compare.
    jacobian : callable
        The engine's answer: takes a batch and the outputs to differentiate.
    rtol : float or None
        The error allowed.

    Returns
    -------
    Verification
    """
    output = program.graph.get_tensor_by_name(head)
    total = int(np.prod(program.extents[head].rest))
    rows = _evenly(total, _ROWS)
    examples = list(range(min(batch.size, _EXAMPLES)))
    few = [t[: len(examples)] for t in batch.tensors]
    ours = jacobian(tf.nest.pack_sequence_as(batch.structure, few), rows)
    note = ""
    try:
        loop = _raised_reference(program, head, weights)
        first = loop([t[:1] for t in few], rows[0])
    except Exception as failure:  # an operation without a float64 kernel, in whatever words
        note = (
            f"The reference is in {output.dtype.name}: the graph does not run in float64 "
            f"({str(failure).splitlines()[0][:150]})."
        )
        loop = _reference(
            model, [host.tf_variable(program.weights.variables[s.index]) for s in weights]
        )
        first = loop([t[:1] for t in few], rows[0])
    dtype = first[0].dtype.name if first else output.dtype.name
    squares = np.zeros((2, len(weights)))  # of the difference, of the reference
    for b in examples:
        for n, row in enumerate(rows):
            expected = loop([t[b : b + 1] for t in few], row)
            for w, (source, right) in enumerate(zip(weights, expected, strict=True)):
                got = tf.cast(ours[source.key][b, n], right.dtype)
                squares[0, w] += float(tf.reduce_sum(tf.square(tf.abs(got - right))))
                squares[1, w] += float(tf.reduce_sum(tf.square(tf.abs(right))))
    difference, norms = np.sqrt(squares)
    narrowest = max(_types(program, output), key=_RTOL.__getitem__)
    rtol = _RTOL[narrowest] if rtol is None else rtol
    slack = _SLACK * precision.EPSILON[narrowest] / rtol * norms.max(initial=0)
    scale = norms + slack
    errors = np.divide(difference, scale, out=difference.copy(), where=scale > 0)
    named = {s.key: float(e) for s, e in zip(weights, errors, strict=True)}
    return Verification(bool(np.all(errors <= rtol)), named, rtol, dtype, examples, rows, note)


def _types(program: Program, output: tf.Tensor) -> set[tf.DType]:
    """Return the floating types that the output is computed in."""
    needed = upstream(program, [output.name])
    ops = [op for op in program.graph.get_operations() if op.name in needed]
    return {t.dtype for op in ops for t in op.outputs if t.dtype in _RTOL} | {output.dtype}


def _reference(
    model: Callable[..., tf.Tensor], variables: Sequence[tf.Variable]
) -> Callable[..., list[tf.Tensor]]:
    """Return the loop's body: one example (1, ...) and one output to each weight's gradient."""

    @functools.partial(host.compiled, reduce_retracing=True)
    def gradient(example: list[tf.Tensor], row: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(variables)
            entry = tf.reshape(model(example), [-1])[row]
        gradients = tape.gradient(entry, variables)
        return [_or_zeros(g, v) for g, v in zip(gradients, variables, strict=True)]

    return lambda example, row: gradient(example, tf.constant(row))


def _raised_reference(
    program: Program, head: str, weights: Sequence[Source]
) -> Callable[..., list[tf.Tensor]]:
    """Return the same with the traced graph's float types raised to float64."""
    values = [host.tf_variable(v) for v in program.weights.variables]
    variables = [tf.Variable(precision.widened(v)) if v.dtype.is_floating else v for v in values]
    graph_def = precision.raised(program.graph_def)

    @functools.partial(host.compiled, reduce_retracing=True)
    def gradient(example: list[tf.Tensor], row: tf.Tensor) -> list[tf.Tensor]:
        read = {n: tf.convert_to_tensor(v) for n, v in enumerate(variables)}
        output = _raised(program, graph_def, variables, example, read, [head])[head]
        entry = tf.reshape(output, [-1])[row]
        graph = tf.compat.v1.get_default_graph()
        # Through the handles, so that values read inside a loop count as well; all in one pass.
        handles = [host.capture(graph, variables[source.index].handle) for source in weights]
        gradients = tf.gradients(entry, handles)
        return [
            _or_zeros(g, read[source.index]) for source, g in zip(weights, gradients, strict=True)
        ]

    return lambda example, row: gradient(example, tf.constant(row))


def _raised(
    program: Program,
    graph_def: Any,
    variables: Sequence[tf.Variable],
    inputs: Sequence[tf.Tensor],
    values: Mapping[int, tf.Tensor],
    names: Sequence[str],
) -> dict[str, Any]:
    """Replay the program from its raised graph, on inputs, constants and variables in float64."""
    graph = tf.compat.v1.get_default_graph()
    feed = dict(zip(program.inputs, map(precision.widened, inputs), strict=True))
    for name, outer in program.constants.items():
        floating = outer.dtype.is_floating
        feed[name] = precision.widened(outer) if floating else host.capture(graph, outer)
    for name, number in program.handles.items():
        feed[name] = host.capture(graph, variables[number].handle)
    feed |= {name: values[number] for name, number in program.reads.items()}
    return import_program(graph_def, feed, names)


def _or_zeros(gradient: Any, like: tf.Tensor) -> tf.Tensor:
    return tf.zeros_like(like) if gradient is None else tf.convert_to_tensor(gradient)


def _evenly(total: int, most: int) -> list[int]:
    if total <= most:
        return list(range(total))
    return sorted({round(n) for n in np.linspace(0, total - 1, most)})


def _order(error: float) -> float:
    return np.inf if np.isnan(error) else error
