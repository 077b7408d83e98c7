"""A model turned into a Program: its graph with the batch unknown, and where everything is in it.

Knows models, graphs and variables; must not know rules, seeds or what will be asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend import host
from perjac._core.backend.shapes import Dims, Extent
from perjac._core.backend.watching import watching_calls
from perjac._core.graph.importing import import_graph
from perjac._core.graph.inline import CALLS, is_for_xla
from perjac._core.graph.thin_convolutions import quickened
from perjac._core.graph.while_loops import LOOPS
from perjac._core.model.variables import Activation, Weights
from perjac.errors import InputError, UnknownNameError, nearest

Taps = dict[str, list[tf.Tensor]]

# Operands that count places along axes.
_COUNTS = {"StridedSlice": (1, 2), "Slice": (1, 2), "Roll": (1,)}
_FEW = 32  # examples that are noted
_ENDLESS = 2**31 - 1  # stands for the end of an axis
_LONGEST_COUNT = 100


@dataclasses.dataclass(frozen=True)
class Callee:
    """What is differentiated: a function of a batch, and how to watch the layers inside it.

    Attributes
    ----------
    function : callable
        Takes the inputs in the user's own structure, returns the outputs.
    model : object or None
        The Keras model to watch the layers of.
    around : callable
        Returns a context to call the function in.
    """

    function: Callable[[Any], Any]
    model: Any = None
    around: Callable[[], Any] = contextlib.nullcontext

    def __call__(self, inputs: Any) -> tuple[dict[str, tf.Tensor], Taps]:
        """Return ({head: output}, {layer: its outputs, call by call}) for a batch of inputs."""
        taps: Taps = {}

        def seen(name: str, output: Any) -> None:
            tensors = [t for t in tf.nest.flatten(output) if isinstance(t, tf.Tensor)]
            if tensors:
                taps.setdefault(name, []).append(tensors[0])

        with self.around():
            if self.model is None:
                return self.heads(self.function(inputs)), taps
            with watching_calls(self.model, seen):
                outputs = self.function(inputs)
            return self.heads(outputs), taps

    def heads(self, outputs: Any) -> dict[str, tf.Tensor]:
        """Name the outputs: by dictionary key, by Keras's output names, or by number."""
        flat = [tf.convert_to_tensor(t) for t in tf.nest.flatten(outputs)]
        if isinstance(outputs, Mapping) and len(outputs) == len(flat):
            return dict(zip(sorted(outputs), flat, strict=True))
        names = list(getattr(self.model, "output_names", None) or [])
        if len(names) != len(flat) or len(set(names)) != len(flat):
            names = [f"output_{n}" for n in range(len(flat))] if len(flat) > 1 else ["output"]
        return dict(zip(names, flat, strict=True))


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced model. Tensors are known by their names in `graph`.

    Attributes
    ----------
    graph : tf.Graph
        The trace, every input's first axis unknown and all other axes fixed.
    inputs : tuple of str
        The input tensors, in the flattened order of the user's structure.
    heads : dict of str to str
        The output tensors by head name.
    taps : dict of str to list of str
        Layers' output tensors, one for each call; "" for a call inside a loop or nested function.
    handles, reads : dict of str to int
        Variable handles, and the values read from them: tensor name to variable number.
    constants : dict of str to tf.Tensor
        Everything else that the trace closes over.
    weights : Weights
        The variables.
    stand_ins : dict of str to str
        Operations that are not run but stand for others, and the tensors whose cotangents are
        those of their results.
    origin : Program or None
        The trace that this one was built from anew.
    """

    graph: Any
    inputs: tuple[str, ...]
    heads: dict[str, str]
    taps: dict[str, list[str]]
    handles: dict[str, int]
    reads: dict[str, int]
    constants: dict[str, tf.Tensor]
    weights: Weights
    stand_ins: dict[str, str] = dataclasses.field(default_factory=dict)
    origin: Program | None = None
    _sizes: dict[int, dict[str, Dims | None]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _examples: list[tf.Tensor] = dataclasses.field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def offer(self, examples: Sequence[tf.Tensor]) -> None:
        """Note examples that the model takes, for a model that takes no made-up ones."""
        self._examples[:] = [t[:_FEW] for t in examples]

    @functools.cached_property
    def graph_def(self) -> Any:
        """The trace as a GraphDef."""
        return self.graph.as_graph_def()

    @functools.cached_property
    def _quick(self) -> Any:
        """The trace as a GraphDef that says where a backward step of our own is quicker."""
        return quickened(self.graph, self.graph_def)

    @property
    def specs(self) -> list[tf.TensorSpec]:
        """The inputs' shapes, batch unknown, and dtypes."""
        tensors = [self.graph.get_tensor_by_name(name) for name in self.inputs]
        return [tf.TensorSpec(t.shape, t.dtype) for t in tensors]

    def head(self, of: str | int | None) -> str:
        """Return the tensor that `of` names: a head, or a hidden layer's output.

        Raises
        ------
        InputError
            If the model has several heads and `of` is None.
        UnknownNameError
            If there is no such head or layer.
        """
        names = list(self.heads)
        if of is None:
            if len(names) == 1:
                return self.heads[names[0]]
            raise InputError(
                f"The model has {len(names)} outputs: {', '.join(map(repr, names))}. "
                f"Choose one, for example of={names[0]!r}."
            )
        if isinstance(of, int):
            if not -len(names) <= of < len(names):
                raise UnknownNameError(
                    f"of={of}: the model has {len(names)} outputs, 0 to {len(names) - 1}."
                )
            return self.heads[names[of]]
        if of in self.heads:
            return self.heads[of]
        return self.tap(Activation(of), also=names)

    def called(self, tensor: str) -> str:
        """Return the name a user knows an output by: the head's or the layer's."""
        named = [(name, [there]) for name, there in self.heads.items()] + list(self.taps.items())
        return next((name for name, tensors in named if tensor in tensors), tensor)

    def layer_of(self, operation: str) -> str:
        """Return the innermost layer in whose scope an operation lies, or nothing."""
        scopes = [re.sub(r"_\d+$", "", scope) for scope in operation.split("/")[:-1]]
        layers = {re.sub(r"_\d+$", "", name): name for name in self.taps}
        return next((layers[scope] for scope in reversed(scopes) if scope in layers), "")

    def tap(self, activation: Activation, also: Sequence[str] = ()) -> str:
        """Return the tensor of a hidden layer's output."""
        calls = self.taps.get(activation.layer)
        if calls is None:
            raise UnknownNameError(
                f"There is no layer {activation.layer!r} in this model. "
                + nearest(activation.layer, [*also, *self.taps])
            )
        if activation.call is None and len(calls) > 1:
            raise UnknownNameError(
                f"Layer {activation.layer!r} is called {len(calls)} times; choose one with "
                f"pj.activation({activation.layer!r}, call=0) to call={len(calls) - 1}."
            )
        call = activation.call or 0
        if call >= len(calls):
            raise UnknownNameError(
                f"Layer {activation.layer!r} is called {len(calls)} times: there is no call={call}."
            )
        if not calls[call]:
            raise InputError(
                f"Layer {activation.layer!r} runs inside a loop or a nested tf.function, so its "
                "output is no tensor of the model's own graph. Choose a layer around it."
            )
        return calls[call]

    def replay(
        self,
        inputs: Sequence[Any],
        values: Mapping[int, Any],
        names: Sequence[str],
        instead: Mapping[str, Any] | None = None,
        quick: bool = False,
    ) -> dict[str, Any]:
        """Lay the traced operations into the graph being built, on other inputs and weights.

        Parameters
        ----------
        inputs : sequence of tensors
            In place of the program's inputs.
        values : mapping of int to tensor
            In place of reading variable n; variables left out are read.
        names : sequence of str
            Tensors ("a:0") and operations ("a") to return.
        instead : mapping of str to tensor, optional
            In place of other tensors of the trace.
        quick : bool
            Whether gradients shall take steps of our own, where TensorFlow's are slow.

        Returns
        -------
        dict
            Name to tensor or operation.
        """
        graph = tf.compat.v1.get_default_graph()
        feed = dict(zip(self.inputs, inputs, strict=True))
        feed |= {name: host.capture(graph, outer) for name, outer in self.constants.items()}
        variables = self.weights.variables
        for name, number in self.handles.items():
            feed[name] = host.capture(graph, host.handle(variables[number]))
        feed |= {name: values[n] for name, n in self.reads.items() if n in values}
        feed |= instead or {}
        calls = [op.name for op in self.graph.get_operations() if op.type in CALLS]
        found = import_program(self._quick if quick else self.graph_def, feed, [*names, *calls])
        for name in calls:
            host.carry_gradient(self.graph.get_operation_by_name(name), found[name])
        return {name: found[name] for name in names}

    def place_of(self, operation: str) -> str:
        """Return the tensor whose cotangent is that of an operation's result."""
        if operation in self.stand_ins:
            return self.stand_ins[operation]
        return self.graph.get_operation_by_name(operation).outputs[0].name

    def counterpart(self, tensor: str, other: Program) -> str:
        """Return a head's or layer's tensor in another form of the same trace."""
        here, there = (
            [*p.heads.values(), *(t for calls in p.taps.values() for t in calls)]
            for p in (self, other)
        )
        return there[here.index(tensor)]

    @functools.cached_property
    def stubborn(self) -> str:
        """Why pfor must not go through this graph, or nothing where it may.

        It does not convert loops, and prints thousands of lines before it gives up. Calls marked
        for XLA are Keras's grouped convolutions, which it converts wrongly: the kernel's gradient
        is silently off in float32, and the picture's fails.
        """
        functions = self.graph_def.library.function
        for node in [*self.graph_def.node, *(n for f in functions for n in f.node_def)]:
            if node.op in LOOPS:
                return f"pfor does not convert the loop {node.name!r}"
            if node.op in CALLS and is_for_xla(node):
                return f"pfor cannot be trusted with {node.name!r}, which is marked for XLA"
        return ""

    @functools.cached_property
    def suits_xla(self) -> bool:
        """Whether XLA runs this graph faster than TensorFlow, on a CPU.

        A loop's step is many tiny operations, which it fuses: an LSTM's 50 steps take 4.4 ms where
        TensorFlow takes 7 to 10. Its convolutions are slower than TensorFlow's.
        """
        return self.loops and not self.convolves

    @functools.cached_property
    def loops(self) -> bool:
        """Whether it has a loop."""
        return any(op.type in LOOPS for op in self.graph.get_operations())

    @functools.cached_property
    def convolves(self) -> bool:
        """Whether it has a convolution."""
        kinds = {op.type for op in self.graph.get_operations()}
        inside = {n.op for f in self.graph_def.library.function for n in f.node_def}
        return any("Conv" in kind for kind in kinds | inside)

    @functools.cached_property
    def counted(self) -> int:
        """The largest number by which the graph itself counts places along an unknown axis.

        A slice `x[:3]` along the batch is another thing for batches of two and of five.
        """
        numbers = [0]
        for op in self.graph.get_operations():
            for n in _COUNTS.get(op.type, ()):
                value, shape = tf.get_static_value(op.inputs[n]), op.inputs[0].shape
                if value is not None and (shape.rank is None or None in shape.as_list()):
                    numbers += [abs(int(v)) for v in value.ravel() if abs(int(v)) < _ENDLESS]
        return max(numbers)

    @functools.cached_property
    def batches(self) -> tuple[int, int]:
        """Two sizes of batch to look at the graph with, larger than any number it counts by."""
        least = max(3, min(self.counted, _LONGEST_COUNT))
        primes = [n for n in range(least + 1, 4 * least) if all(n % m for m in range(2, n))]
        return primes[0], primes[1]

    @functools.cached_property
    def extents(self) -> dict[str, Extent]:
        """The extent of every tensor that has the batch in front, all other axes known."""
        one, other = (self.dims(batch) for batch in self.batches)
        traced = {t.name: _dims(t) for op in self.graph.get_operations() for t in op.outputs}
        found = {
            name: Extent.of(dims, (one[name], other[name]), self.batches)
            for name, dims in traced.items()
        }
        return {name: extent for name, extent in found.items() if extent is not None}

    @functools.cached_property
    def shapes(self) -> dict[str, tf.TensorShape]:
        """The shape of every tensor that has the batch on one of its axes, unknown only there.

        Positions may be folded into that axis.
        """
        found = {}
        few, more = self.batches
        for name, one in self.dims(few).items():
            other = self.dims(more)[name]
            if one is None or other is None or len(one) != len(other) or None in one:
                continue
            moving = [n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
            if len(moving) == 1 and more * (one[moving[0]] or 0) == few * (other[moving[0]] or 0):
                dims = [None if n in moving else d for n, d in enumerate(one)]
                found[name] = tf.TensorShape(dims)
        return found

    def dims(self, batch: int) -> dict[str, Dims | None]:
        """Every tensor's shape for a batch of this size: one of `batches`."""
        if batch not in self._sizes:
            with host.lifted():  # where a function is being traced there are no numbers
                found = self._shapes(batch)
                vague = [name for name, dims in found.items() if dims is None or None in dims]
                if vague:  # a loop's results, say, and what follows from them
                    found |= self._measured(vague, batch)
            self._sizes[batch] = found
        return self._sizes[batch]

    def _measured(self, names: Sequence[str], batch: int) -> dict[str, Dims | None]:
        """The shapes that tensors have when the model runs on a batch of this size.

        On made-up data, or on the user's where the model does not take that. The data is different
        for each size, lest a shape that depends on it be taken for fixed.
        """
        tensors = [self.graph.get_tensor_by_name(name) for name in names]
        held = [t for t in tensors if t.dtype not in (tf.resource, tf.variant)]
        names = [t.name for t in held if t.op.name not in self.stand_ins]  # those never run

        @host.compiled
        def run(inputs):
            found = self.replay(inputs, {}, names)
            return [tf.shape(found[name]) for name in names]

        number = self.batches.index(batch)
        tried = [[_filled(spec, batch, number) for spec in self.specs]]
        given = (self.origin or self)._examples
        if given and given[0].shape[0]:
            which = (tf.range(batch) + number) % given[0].shape[0]
            tried.append([tf.gather(t, which) for t in given])
        for inputs in tried:
            try:
                shapes = [tuple(s.numpy().tolist()) for s in run(inputs)]
            except tf.errors.OpError:  # the model does not take such data
                continue
            return dict(zip(names, shapes, strict=True))
        return {}

    def _shapes(self, batch: int) -> dict[str, Dims | None]:
        """Every tensor's shape for a batch of this size, as far as inference can tell."""
        names = [t.name for op in self.graph.get_operations() for t in op.outputs]
        found: dict[str, Dims | None] = {}

        @tf.function(autograph=False)
        def inferred(*inputs):
            tensors = self.replay(inputs, {}, names)
            found.update({name: _dims(tensor) for name, tensor in tensors.items()})

        sized = [tf.TensorSpec([batch, *spec.shape[1:]], spec.dtype) for spec in self.specs]
        inferred.get_concrete_function(*sized)
        return found


def _filled(spec: tf.TensorSpec, batch: int, number: int) -> tf.Tensor:
    """Return a batch of zeros, or of ones; of empty texts, or of some of one word."""
    if spec.dtype == tf.string:
        return tf.fill([batch, *spec.shape[1:]], "word" if number else "")
    return tf.fill([batch, *spec.shape[1:]], tf.cast(number, spec.dtype))


def _dims(tensor: Any) -> Dims | None:
    return None if tensor.shape.rank is None else tuple(tensor.shape.as_list())


def import_program(
    graph_def: Any, feed: Mapping[str, tf.Tensor], names: Sequence[str]
) -> dict[str, Any]:
    """Import a graph with some tensors replaced, and return the tensors and operations named."""
    wanted = [name for name in dict.fromkeys(names) if name not in feed]
    # Placeholders that are fed would be left over, and XLA compiles no placeholder.
    replaced = {name.partition(":")[0] for name in feed}
    rest = type(graph_def)()
    rest.CopyFrom(graph_def)
    for n in reversed(range(len(rest.node))):
        if rest.node[n].op == "Placeholder" and rest.node[n].name in replaced:
            del rest.node[n]
    return import_graph(rest, feed, wanted, "perjac") | {n: feed[n] for n in names if n in feed}


def trace(callee: Callee, specs: Sequence[tf.TensorSpec], structure: Any, weights: Weights):
    """Trace a model once.

    Parameters
    ----------
    callee : Callee
        What to call.
    specs : sequence of tf.TensorSpec
        The flattened inputs, first axis None.
    structure : nested structure
        The user's structure of inputs, to pack them into.
    weights : Weights
        The variables to recognise.

    Returns
    -------
    Program
    """
    concrete, taps = record(callee, specs, structure)
    weights.read_by(concrete)
    return collect(concrete, len(specs), weights, taps)


def record(
    callee: Callee, specs: Sequence[tf.TensorSpec], structure: Any
) -> tuple[Any, dict[str, list[str]]]:
    """Return a model's concrete function, and the names of its layers' outputs there."""
    taps: Taps = {}

    @tf.function(autograph=False)
    def call(*flat):
        heads, seen = callee(tf.nest.pack_sequence_as(structure, list(flat)))
        taps.update(seen)
        return heads

    concrete = call.get_concrete_function(*specs)
    graph: Any = concrete.graph
    return concrete, {
        name: [t.name if t.graph is graph else "" for t in calls] for name, calls in taps.items()
    }


def collect(concrete: Any, inputs: int, weights: Weights, taps: dict[str, list[str]]) -> Program:
    """Return the Program of a traced function of so many inputs that returns its heads."""
    graph: Any = concrete.graph
    by_handle = {id(host.handle(v)): n for n, v in enumerate(weights.variables)}
    handles, constants = {}, {}
    for outer, inner in host.captures(graph):
        if id(outer) in by_handle:
            handles[inner.name] = by_handle[id(outer)]
        else:
            constants[inner.name] = outer
    reads = {
        op.outputs[0].name: handles[op.inputs[0].name]
        for op in graph.get_operations()
        if op.type == "ReadVariableOp" and op.inputs[0].name in handles
    }
    return Program(
        graph=graph,
        inputs=tuple(t.name for t in concrete.inputs[:inputs]),
        heads=_head_tensors(concrete, graph),
        taps=taps,
        handles=handles,
        reads=reads,
        constants=constants,
        weights=weights,
    )


def _head_tensors(concrete: Any, graph: Any) -> dict[str, str]:
    """Return each head's tensor by name; tf.function gives back a copy behind an Identity."""
    heads = concrete.structured_outputs
    return {name: graph.get_tensor_by_name(tensor.name).name for name, tensor in heads.items()}
