"""Gradients that the engine is compared with: the live model's, one example and output at a time.

In float64 wherever the model runs in float64. Nothing here knows the engine's trace, sites, rules,
factors or plans.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend import dtypes, host
from perjac._core.graph.names import link_of
from perjac._core.graph.normal_form import flatten
from perjac._core.graph.program import Program, collect, import_program
from perjac._core.graph.walk import upstream
from perjac._core.model.variables import Weights
from perjac.errors import InputError

# How far outputs in float64 may be from the model's own, before they are those of another model.
_SAME = 0.05


@dataclasses.dataclass(frozen=True)
class Live:
    """A model as it is now, and what is differentiated of it.

    Attributes
    ----------
    call : callable
        Takes the flattened inputs to one output.
    layer : object or None
        The Keras model or layer behind it, if there is one.
    weights : Weights
        Its variables.
    chosen : sequence of int
        The numbers of those that gradients are taken of.
    logits : bool
        Whether to differentiate what the output's final softmax or sigmoid is taken of.
    """

    call: Callable[[Sequence[tf.Tensor]], tf.Tensor]
    layer: Any
    weights: Weights
    chosen: Sequence[int]
    logits: bool = False

    def outputs(self, inputs: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the output, and what of it is differentiated, in a graph being built."""
        output = self.call(inputs)
        wanted = before_link(output) if self.logits else output
        return output, tf.reshape(wanted, [-1])

    @property
    def variables(self) -> list[tf.Variable]:
        """Every variable."""
        return [host.tf_variable(v) for v in self.weights.variables]


@dataclasses.dataclass
class Reference:
    """Gradients of single entries of the output.

    Attributes
    ----------
    run : callable
        (inputs, number of the entry) to the model's output and each weight's gradient.
    copies : list of tf.Variable or None
        The values in float64 that it reads in place of the model's own.
    told : str
        What it is, in words.
    """

    run: Callable[..., tuple[tf.Tensor, list[tf.Tensor]]]
    copies: list[tf.Variable] | None
    told: str

    def __call__(self, inputs: Sequence[tf.Tensor], entry: int) -> list[np.ndarray]:
        """Return the gradient of one entry of the flat output in each weight, in float64."""
        gradients = self.run(list(inputs), tf.constant(entry))[1]
        return [np.asarray(tf.cast(g, tf.float64)) for g in gradients]

    def shaken(
        self, inputs: Sequence[tf.Tensor], entry: int, epsilon: float, seed: int
    ) -> list[np.ndarray]:
        """Return the same with every number off by up to ε of itself, as if rounded."""
        rng = np.random.default_rng(seed)

        def off(tensor: Any) -> Any:
            if not tensor.dtype.is_floating:
                return tensor
            wide = np.asarray(dtypes.widened(tensor))
            return tf.constant(wide * (1 + epsilon * rng.uniform(-1, 1, wide.shape)), tf.float64)

        exact = [tf.identity(copy) for copy in self.copies or []]
        try:
            for copy in self.copies or []:
                copy.assign(off(copy))
            return self([off(t) for t in inputs], entry)
        finally:
            for copy, value in zip(self.copies or [], exact, strict=True):
                copy.assign(value)


def plain(live: Live) -> Reference:
    """Return what a user would write: a tape around the live model, in its own types."""
    variables = [live.variables[n] for n in live.chosen]

    def gradient(inputs: list[tf.Tensor], entry: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            tape.watch(variables)
            output, wanted = live.outputs(inputs)
            number = wanted[entry]
        gradients = tape.gradient(number, variables)
        return output, [_or_zeros(g, v) for g, v in zip(gradients, variables, strict=True)]

    kinds = sorted({variable.dtype.name for variable in variables})
    return Reference(host.compiled(gradient), None, f"the model itself, in {', '.join(kinds)}")


def in_float64(live: Live, program: Program) -> Iterator[Reference]:
    """Yield the ways to run the live model in float64, the most direct one first.

    Whether a way works for this model shows only when it runs. `program` is a fresh trace.
    """
    if all(host.is_keras_variable(v) for v in live.weights.variables) and live.layer is not None:
        yield _widened_layers(live)
    yield _widened_graph(live, program)


def own_types(program: Program) -> set[tf.DType]:
    """Return the floating types that a fresh trace's output is computed in."""
    head = program.graph.get_tensor_by_name(program.heads["output"])
    needed = upstream(program, [head.name])
    ops = [op for op in program.graph.get_operations() if op.name in needed]
    known = dtypes.EPSILON
    return {t.dtype for op in ops for t in op.outputs if t.dtype in known} | {head.dtype}


def fresh(live: Live, inputs: Sequence[tf.Tensor]) -> Program:
    """Trace the live model now, apart from any trace that an engine holds."""
    specs = [tf.TensorSpec(t.shape, t.dtype) for t in inputs]

    @tf.function(autograph=False)
    def call(*flat):
        return {"output": live.call(list(flat))}

    program = collect(call.get_concrete_function(*specs), len(specs), live.weights, {})
    with warnings.catch_warnings():  # of weights that take the tape path, which this is not about
        warnings.simplefilter("ignore")
        return flatten(program)


def checked(reference: Reference, inputs: Sequence[tf.Tensor], output: tf.Tensor) -> None:
    """Run a reference once, and raise where it does not compute the model's own output.

    Raises
    ------
    ValueError
        If the outputs differ by more than rounding.
    """
    wide = reference.run(list(inputs), tf.constant(0))[0]
    mine, own = (np.asarray(tf.cast(t, tf.float64)).ravel() for t in (wide, output))
    if not np.isfinite(own).all():
        return  # of a model that overflows, float64 may have more to say
    if mine.shape != own.shape or not _close(mine, own):
        raise ValueError("its outputs in float64 are not those of the model")


def _close(mine: np.ndarray, own: np.ndarray) -> bool:
    off = np.linalg.norm(mine - own)
    return bool(off <= _SAME * np.linalg.norm(own) or off <= 1e-3 * _SAME)


def _copies(live: Live) -> list[tf.Variable]:
    values = live.variables
    return [
        tf.Variable(dtypes.widened(v), trainable=False) if v.dtype.is_floating else v
        for v in values
    ]


def _floating(copies: Sequence[tf.Variable]) -> list[tf.Variable]:
    return [copy for copy in copies if copy.dtype.is_floating]


def _widened_layers(live: Live) -> Reference:
    """Return the live Keras model, each of its layers told to compute in float64."""
    copies = _copies(live)
    sources = [copies[n] for n in live.chosen]
    pairs = list(zip(live.weights.variables, copies, strict=True))

    def gradient(inputs: list[tf.Tensor], entry: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            tape.watch(sources)
            values = [(v, tf.convert_to_tensor(copy)) for v, copy in pairs]
            with host.computing_in_float64(live.layer, values):
                output, wanted = live.outputs([dtypes.widened(t) for t in inputs])
            if wanted.dtype != tf.float64:
                raise TypeError(f"a layer insists on {wanted.dtype.name}")
            number = wanted[entry]
        gradients = tape.gradient(number, sources)
        return output, [_or_zeros(g, v) for g, v in zip(gradients, sources, strict=True)]

    told = "the model itself, its layers computing in float64"
    return Reference(host.compiled(gradient), _floating(copies), told)


def _widened_graph(live: Live, program: Program) -> Reference:
    """Return the graph of a fresh trace of the live model, its floating types made float64."""
    copies = _copies(live)
    graph_def = dtypes.raised(program.graph_def)
    heads = [program.heads["output"]] * 2
    if live.logits:
        heads[1] = before_link(program.graph.get_tensor_by_name(heads[0])).name

    def gradient(inputs: list[tf.Tensor], entry: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        read = [tf.convert_to_tensor(copy) for copy in copies]
        found = _replayed(program, graph_def, copies, inputs, read, heads)
        output, wanted = found[heads[0]], tf.reshape(found[heads[1]], [-1])
        graph = tf.compat.v1.get_default_graph()
        # Through the handles, so that values read inside a loop count as well; all in one pass.
        handles = [host.capture(graph, copies[n].handle) for n in live.chosen]
        gradients = tf.gradients(wanted[entry], handles)
        pairs = zip(live.chosen, gradients, strict=True)
        return output, [_or_zeros(g, read[n]) for n, g in pairs]

    told = "a fresh trace of the model, its graph in float64"
    return Reference(host.compiled(gradient), _floating(copies), told)


def _replayed(
    program: Program,
    graph_def: Any,
    copies: Sequence[tf.Variable],
    inputs: Sequence[tf.Tensor],
    values: Sequence[tf.Tensor],
    names: Sequence[str],
) -> dict[str, Any]:
    """Run the widened graph on inputs, constants and variables in float64."""
    graph = tf.compat.v1.get_default_graph()
    feed = dict(zip(program.inputs, map(dtypes.widened, inputs), strict=True))
    for name, outer in program.constants.items():
        floating = outer.dtype.is_floating
        feed[name] = dtypes.widened(outer) if floating else host.capture(graph, outer)
    for name, number in program.handles.items():
        feed[name] = host.capture(graph, copies[number].handle)
    feed |= {name: values[number] for name, number in program.reads.items()}
    return import_program(graph_def, feed, names)


def before_link(output: Any) -> Any:
    """Return what an output's final softmax or sigmoid is taken of.

    Raises
    ------
    InputError
        If it is not in the graph itself.
    """
    before, _ = link_of(output)
    if before is None:
        raise InputError(
            "The final softmax or sigmoid lies inside a function, where what comes before it "
            "cannot be compared: name a layer or output with of=."
        )
    return before


def _or_zeros(gradient: Any, like: Any) -> tf.Tensor:
    if gradient is None:
        return tf.zeros(like.shape, like.dtype)
    return tf.convert_to_tensor(gradient)
