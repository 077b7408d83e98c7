"""One backward pass of the live model: the gradient of ⟨cotangent, output⟩ by its sources.

Calls the model itself, as the user would; must not know the rules, factors or plans that the
result is compared with.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.autodiff.tape import finder
from perjac._core.backend import host
from perjac._core.graph.names import before_link
from perjac._core.graph.program import Callee, Program
from perjac._core.model.variables import Source

# Operations by which a call changes variables: moving averages, states, random numbers.
_WRITES = re.compile("Assign|ResourceScatter|ResourceApply|^Rng|^Stateful(?!PartitionedCall)")


class Unreachable(Exception):
    """Raised where the live model does not give the output that is asked about."""


class OtherShape(Exception):
    """Raised where the live model's output has another shape than the traced one."""


class Reference:
    """The live gradients for one output and some sources.

    Parameters
    ----------
    callee : Callee
        The model.
    structure : nested structure
        The user's structure of inputs.
    program : Program
        The trace, for names alone.
    head : str
        The output's tensor.
    sources : sequence of Source
        What is differentiated against.
    """

    def __init__(
        self,
        callee: Callee,
        structure: Any,
        program: Program,
        head: str,
        sources: Sequence[Source],
    ):
        self._callee, self._structure = callee, structure
        self._find = _found(program, head)
        self._sources = list(sources)
        self._watches = head not in program.heads.values() or any(s.tensor for s in sources)
        self._taps = {s: finder(program, s.tensor) for s in sources if s.tensor}
        self._weights = {
            s: host.tf_variable(program.weights.variables[s.index])
            for s in sources
            if s.kind == "weight"
        }
        self._compiled = host.compiled(self._run, reduce_retracing=True)

    def __call__(
        self, inputs: Sequence[tf.Tensor], cotangent: tf.Tensor, compiled: bool = False
    ) -> list[tf.Tensor]:
        """Return the gradient of ⟨cotangent, output⟩ by each source.

        By a weight of its shape; by an input or activation (B, *shape).
        """
        return list((self._compiled if compiled else self._run)(list(inputs), cotangent))

    def meets(self, inputs: Sequence[tf.Tensor], allowed: float) -> bool:
        """Tell whether the first example's output is another one where that example is alone."""
        both = []
        for given in (list(inputs), [t[:1] for t in inputs]):
            output = self._find(*self._call(given))
            both.append(tf.cast(output[:1], tf.float64))  # type: ignore[index]
        return bool(tf.norm(both[0] - both[1]) > allowed * tf.norm(both[0]))

    def _run(self, inputs: list[tf.Tensor], cotangent: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(list(self._weights.values()))
            if len(self._weights) < len(self._sources):
                tape.watch([t for t in inputs if t.dtype.is_floating])
            heads, taps = self._call(inputs)
            output = self._find(heads, taps)
        if output is None:
            raise Unreachable("the live model does not show this output")
        if not output.shape.is_compatible_with(cotangent.shape):
            raise OtherShape(tuple(output.shape))
        against = [self._tensor(source, inputs, taps) for source in self._sources]
        gradients = tape.gradient(output, against, output_gradients=cotangent)  # type: ignore
        return [
            tf.zeros(tf.shape(a), a.dtype) if g is None else tf.convert_to_tensor(g)
            for a, g in zip(against, gradients, strict=True)
        ]

    def _call(self, inputs: Sequence[tf.Tensor]) -> tuple[dict[str, tf.Tensor], Any]:
        given = tf.nest.pack_sequence_as(self._structure, inputs)
        if self._watches:
            return self._callee(given)
        with self._callee.around():
            return self._callee.heads(self._callee.function(given)), {}

    def _tensor(self, source: Source, inputs: list[tf.Tensor], taps: Any) -> Any:
        if source.kind == "weight":
            return self._weights[source]
        return inputs[source.index] if source.kind == "input" else self._taps[source]({}, taps)


@contextlib.contextmanager
def put_back(
    variables: Sequence[tf.Variable], values: Sequence[tf.Tensor]
) -> Iterator[Callable[[], None]]:
    """Have variables hold these values inside the block, and what they hold now after it.

    Yields what gives them the values once more, but for the states of random numbers: a model of
    which two calls then differ is a random one.
    """
    now = [tf.convert_to_tensor(v) for v in variables]

    def assign(whole: bool) -> None:
        for variable, value in zip(variables, values, strict=True):
            if whole or value.dtype.is_floating:
                variable.assign(value)

    try:
        assign(whole=True)
        yield lambda: assign(whole=False)
    finally:
        for variable, value in zip(variables, now, strict=True):
            variable.assign(value)


def written(program: Program) -> list[tf.Variable]:
    """Return the variables that a call of the model may change: none, or all, if it changes any."""
    traced = program.origin or program
    nodes = [*traced.graph_def.node, *(n for f in traced.graph_def.library.function
                                       for n in f.node_def)]  # fmt: skip
    if not any(_WRITES.search(node.op) for node in nodes):
        return []
    known = map(host.tf_variable, traced.weights.variables)
    found = {id(v): v for v in [*known, *getattr(traced.graph, "variables", ())]}
    return list(found.values())


def _found(program: Program, head: str) -> Callable[..., tf.Tensor | None]:
    """Return how an output is found among those of a live call; logits as Keras keeps them."""
    try:
        return finder(program, head)
    except KeyError:
        for name, tensor in program.heads.items():
            if before_link(program, tensor)[0] == head:
                return lambda heads, taps: host.logits_of(heads[name])
        return lambda heads, taps: None
