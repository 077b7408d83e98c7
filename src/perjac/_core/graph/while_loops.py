"""Loops opened: what weights do inside a while loop, laid out along time where rules can see it.

The loop is built anew. In every step a zero is added to the result of each operation at which a
weight meets the data, and the data there is kept. The gradient of the output with respect to the
zeros is that operation's cotangent, step by step, so one operation outside the loop, over the steps
laid one after another, stands in for the one inside: it is never run, it is the site that a rule
reads.

A step of TensorFlow's reverse loop is dozens of tiny operations, so what it need not do is kept out
of it. The zeros are popped off a list: a read by number has a gradient of four operations where a
pop has one. What is kept, and the weights that meet the data outside, pass through the loop as
integers of the same bits, which nobody differentiates. And where two tensors with the batch in
front are alike, their sum or product goes back without a search for broadcast axes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend import host
from perjac._core.backend.shapes import known
from perjac._core.graph.builder import Builder, alone
from perjac._core.graph.importing import node_of
from perjac._core.graph.inline import Body, canonical
from perjac._core.graph.trip_count import most_steps, through_identities

LOOPS = {"While", "StatelessWhile"}
_SUMS = {"Add", "AddV2", "BiasAdd", "Identity"}
_LIST_READS = {"TensorListGetItem", "TensorArrayReadV3"}
_SAME_SIZE = {1: tf.int8, 2: tf.int16, 4: tf.int32, 8: tf.int64}


@dataclasses.dataclass(frozen=True)
class Kinds:
    """Which tensors of the graph being built are made of weights alone, and which of the data."""

    params: set[str]
    data: set[str]


@dataclasses.dataclass(frozen=True)
class _Meeting:
    """An operation of the body at which weights meet the data.

    `data` are the inputs to be kept step by step, by number; `place` is a tensor that has the same
    cotangent as the result.
    """

    op: Any
    result: str
    inputs: list[str]
    data: dict[int, str]
    place: str


class Loop:
    """A while loop of the traced graph, and what happens inside it.

    Parameters
    ----------
    build : Builder
        The graph being built, in which the loop's inputs are.
    node : NodeDef
        The loop.
    body, condition : Body
        The functions it calls.
    kinds : Kinds
        Of the tensors outside.

    Notes
    -----
    What happens inside is found out on a copy of the body in a scratch graph. A tensor there is
    made of weights alone, varies (with the step or the data), or is a constant.
    """

    def __init__(self, build: Builder, node: Any, body: Body, condition: Body, kinds: Kinds):
        self._build, self._node, self._body, self._condition = build, node, body, condition
        self._outer = build.inputs(node)
        self._nodes = {node.name: node for node in body.nodes}
        self._moving = [n for n, result in enumerate(body.results) if not self._stays(n, result)]
        self._inside = self._scratch()
        self._pair = self._scratch(batch=2)
        staying = {r: t.name for r, t in self._staying().items()}
        self._made = {r for r, name in staying.items() if name in kinds.params}
        self._varying = {body.arguments[n] for n in self._moving}
        self._varying |= {r for r, name in staying.items() if name in kinds.data}
        self._ops = self._in_order()
        self._users = [(op, inputs, outputs) for op, inputs, outputs in self._ops if outputs]
        for op, inputs, outputs in self._ops:
            if _acts(op) or any(r in self._varying for r in inputs):
                self._varying.update(outputs)
            elif any(r in self._made for r in inputs):
                self._made.update(outputs)
        self._steps = most_steps(body, condition, self._outer)
        self._meetings, self._hidden = self._meet()

    def open(self, batch: tf.Tensor) -> tuple[list[tf.Tensor], dict[str, str]]:
        """Build the loop anew, with operations outside it that stand in for those inside.

        Parameters
        ----------
        batch : tf.Tensor
            B.

        Returns
        -------
        list of tf.Tensor
            The loop's results.
        dict of str to str
            By the standing-in operation's name, the tensor whose cotangent is that of the operation
            inside; empty where the number of steps is not known.
        """
        steps = self._steps or 0
        zeros = {
            r: tf.zeros([steps * batch, *self._rest(r)], self._inside[r].dtype)
            for r in dict.fromkeys(m.place for m in self._meetings)
        }
        lists = [_list_of(tf.reshape(z, [steps, batch, *z.shape[1:]])) for z in zeros.values()]
        kept = list(dict.fromkeys(r for m in self._meetings for r in self._needed(m)))
        arrays = [
            tf.TensorArray(_disguise(t), steps, element_shape=[None, *known(t.shape[1:])])
            for t in map(self._inside.__getitem__, kept)
        ]
        made = {r: self._outside[r] for r in self._frontier()}
        disguised = {r: tf.bitcast(made[r], _disguise(made[r])) for r in set(made) - self._hidden}

        def step(number: Any, lists: Any, arrays: Any, *moving: Any) -> tuple:
            popped = [_pop(rest, zero) for rest, zero in zip(lists, zeros.values(), strict=True)]
            feed = made | {r: tf.bitcast(t, made[r].dtype) for r, t in disguised.items()}
            feed |= {_zero(r): zero for r, (_, zero) in zip(zeros, popped, strict=True)}
            inner = self._inner(self._with_zeros(), self._arguments(self._body, moving) | feed)
            found = [inner[_summed(r) if r in zeros else r] for r in self._results()]
            data = [inner[_summed(r) if r in zeros else r] for r in kept]
            place = steps - 1 - number  # the last zero is popped first: so is the first step kept
            arrays = [
                array.write(place, tf.bitcast(t, _disguise(t)))
                for array, t in zip(arrays, data, strict=True)
            ]
            return (number + 1, [rest for rest, _ in popped], arrays, *found)

        def goes_on(number: Any, lists: Any, arrays: Any, *moving: Any) -> tf.Tensor:
            condition = self._condition
            return self._inner(condition.nodes, self._arguments(condition, moving))[
                condition.results[0]
            ]

        _, _, arrays, *ended = tf.while_loop(
            goes_on,
            step,
            (tf.constant(0), lists, arrays, *(self._outer[n] for n in self._moving)),
            shape_invariants=(
                tf.TensorShape([]),
                [tf.TensorShape([])] * len(lists),
                [tf.TensorShape([])] * len(arrays),
                *(self._shape(n) for n in self._moving),
            ),
            maximum_iterations=self._steps,
        )
        results = list(self._outer)
        for n, tensor in zip(self._moving, ended, strict=True):
            results[n] = tensor
        laid_out = {}
        for r, array in zip(kept, arrays, strict=True):
            steps_of_data = tf.bitcast(array.stack(), self._inside[r].dtype)
            laid_out[r] = tf.reshape(steps_of_data, [steps * batch, *self._rest(r)])
        return results, dict(self._stand_in(m, laid_out, zeros[m.place]) for m in self._meetings)

    def _stand_in(
        self, meeting: _Meeting, laid_out: Mapping[str, tf.Tensor], zero: tf.Tensor
    ) -> tuple[str, str]:
        operands = [
            laid_out.get(r, zero) if n in meeting.data else self._outside[r]
            for n, r in enumerate(meeting.inputs)
        ]
        (result,) = alone(self._nodes[node_of(meeting.result)], operands)
        return result.op.name, zero.name

    def _needed(self, meeting: _Meeting) -> list[str]:
        """Return the data that a rule can ask for: of sums none, where zeros stand in for it."""
        data = list(meeting.data.values())
        is_sum = meeting.op.type in _SUMS and self._are_alike(data[0], meeting.place)
        return [] if is_sum else data

    def _meet(self) -> tuple[list[_Meeting], set[str]]:
        """Return what can be stood in for, and what is made of weights and used in other ways."""
        found, hidden = [], {r for r in self._results() if r in self._made}
        for op, inputs, outputs in self._ops:
            made = {r for r in inputs if r in self._made}
            if not made or not any(r in self._varying for r in outputs):
                continue
            data = {n: r for n, r in enumerate(inputs) if r in self._varying}
            meeting = _Meeting(op, outputs[0], inputs, data, self._summed_up(outputs[0]))
            if self._steps and self._fits(meeting):
                found.append(meeting)
            else:
                hidden |= made
        return [m for m in found if not hidden & set(m.inputs)], hidden

    def _summed_up(self, reference: str) -> str:
        """Follow a tensor through the sums it is a mere term of: they have its cotangent.

        One zero then serves an LSTM's two products and its bias.
        """
        users = [
            result for _, inputs, [result, *_] in self._users for r in inputs if r == reference
        ]
        if len(users) != 1 or reference in self._results():
            return reference
        (result,) = users
        if self._nodes[node_of(result)].op not in _SUMS or not self._are_alike(reference, result):
            return reference
        return self._summed_up(result)

    def _fits(self, meeting: _Meeting) -> bool:
        """Tell whether the data and the result have the batch, and only that, as unknown axis."""
        op = meeting.op
        tensors = [*op.outputs, *(op.inputs[n] for n in meeting.data)]
        return (
            len(op.outputs) == 1
            and not _acts(op)
            and all(t.dtype not in (tf.resource, tf.variant) for t in op.inputs)
            and op.outputs[0].dtype.is_floating
            and all(t.shape.rank and t.shape[0] is None for t in tensors)
            and all(t.shape[1:].is_fully_defined() for t in tensors)
            # Positions folded into the batch lie between the steps, where no rule finds them.
            and all(self._pair[r].shape[0] == 2 for r in [meeting.result, *meeting.data.values()])
        )

    def _frontier(self) -> set[str]:
        """Return what is made of weights where it enters the varying part, siblings included."""
        entering = {
            r
            for op, inputs, outputs in self._ops
            if any(r in self._varying for r in outputs)
            for r in inputs
            if r in self._made and self._inside[r].dtype != tf.resource
        } | {r for r in self._results() if r in self._made}
        ops = {id(self._inside[r].op) for r in entering}
        siblings = {r for op, _, outputs in self._ops if id(op) in ops for r in outputs}
        return entering | siblings

    def _stays(self, n: int, result: str) -> bool:
        """Tell whether a loop variable leaves each step as it came."""
        return through_identities(self._nodes, result) == self._body.arguments[n]

    def _staying(self) -> dict[str, tf.Tensor]:
        """Return the arguments that stay as they are, as the tensors outside."""
        arguments = enumerate(self._body.arguments)
        return {r: self._outer[n] for n, r in arguments if n not in self._moving}

    def _scratch(self, batch: int | None = None) -> Builder:
        """Return the body built in a scratch graph, for a batch of unknown or of given size."""
        scratch = host.scratch_graph()
        with scratch.as_default():

            def stand_in(tensor: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
                dims = [batch, *shape[1:]] if shape.rank and shape[0] is None else shape
                return tf.compat.v1.placeholder(tensor.dtype, dims)

            feed = {}
            for r, tensor in self._staying().items():
                batched = batch and tensor.shape.rank and tensor.shape[0] is None
                outside = stand_in(tensor, tensor.shape) if batched else tensor
                feed[r] = host.capture(scratch, outside)
            for n in self._moving:
                feed[self._body.arguments[n]] = stand_in(self._outer[n], self._shape(n))
            if batch:  # what is read from a list has the batch in front, which the list forgets
                reads = [node.name for node in self._body.nodes if node.op in _LIST_READS]
                for r in (f"{name}:0" for name in reads):
                    feed[r] = stand_in(self._inside[r], self._inside[r].shape)
            inside = self._inner(self._body.nodes, feed)
            inside.build_all()
        return inside

    def _in_order(self) -> list[tuple[Any, list[str], list[str]]]:
        """Return the body's operations with their inputs and outputs, each after its inputs."""
        names = {id(tensor): r for r, tensor in self._inside.made.items()}
        return [
            (op, [names[id(t)] for t in op.inputs], [names[id(t)] for t in op.outputs])
            for op in self._inside.operations
        ]

    def _shape(self, n: int) -> tf.TensorShape:
        """Return the shape that loop variable n keeps."""
        tensor = self._outer[n]
        if tensor.dtype in (tf.variant, tf.resource):
            return tensor.shape
        return tf.TensorShape(self._node.attr["output_shapes"].list.shape[n])

    def _rest(self, reference: str) -> tuple[int, ...]:
        return known(self._inside[reference].shape[1:])

    def _results(self) -> list[str]:
        return [self._body.results[n] for n in self._moving]

    def _arguments(self, called: Body, moving: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
        """Return a function's arguments: the loop variables, and what stays outside."""
        values = dict(enumerate(self._outer)) | dict(zip(self._moving, moving, strict=True))
        return {r: values[n] for n, r in enumerate(called.arguments)}

    def _inner(self, nodes: Sequence[Any], feed: Mapping[str, tf.Tensor]) -> Builder:
        return self._build.another(nodes, feed)

    @functools.cached_property
    def _outside(self) -> Builder:
        """What stays the same in every step, built outside the loop."""
        return self._inner(self._body.nodes, self._staying())

    def _with_zeros(self) -> list[Any]:
        """Return the body's nodes with something added to each meeting's result."""
        met = dict.fromkeys(m.place for m in self._meetings)
        nodes = []
        for node in self._body.nodes:
            copy = type(node)()
            copy.CopyFrom(node)
            copy.input[:] = [_summed(r) if canonical(r) in met else r for r in node.input]
            gradient = self._gradient(node)
            if gradient:
                copy.attr["_gradient_op_type"].s = gradient.encode()
            nodes.append(copy)
        for place in met:
            plus = type(self._node)(name=_summed(place).removesuffix(":0"), op="AddV2")
            plus.input[:] = [place, _zero(place)]
            plus.attr["T"].type = self._inside[place].dtype.as_datatype_enum
            plus.attr["_gradient_op_type"].s = host.ALIKE["AddV2"].encode()
            nodes.append(plus)
        return nodes

    def _gradient(self, node: Any) -> str:
        """Return the name of a gradient that does less than TensorFlow's own, or nothing."""
        operands = [canonical(r) for r in node.input if not r.startswith("^")]
        if node.op in host.ALIKE and self._are_alike(*operands):
            return host.ALIKE[node.op]
        if node.op in host.FIRST and operands[1] in self._made - self._hidden:
            return host.FIRST[node.op]
        return ""

    def _are_alike(self, left: str, right: str) -> bool:
        """Tell whether both tensors vary and have the batch in front of the same known axes.

        With the batch unknown, an axis that varies and is no batch has lost its examples, and
        models in which examples meet are refused.
        """
        shapes = [self._inside[r].shape for r in (left, right)]
        return (
            {left, right} <= self._varying
            and all(s.rank and s[0] is None and s[1:].is_fully_defined() for s in shapes)
            and shapes[0].as_list() == shapes[1].as_list()
        )


def _summed(reference: str) -> str:
    return f"{node_of(reference)}/plus_zero:0"


def _zero(reference: str) -> str:
    return f"{node_of(reference)}/zero:0"


def _list_of(steps: tf.Tensor) -> tf.Tensor:
    return tf.raw_ops.TensorListFromTensor(tensor=steps, element_shape=_element(steps))


def _pop(held: tf.Tensor, like: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return a list without its last element, and that element, (B, ...) of (T·B, ...)."""
    popped = tf.raw_ops.TensorListPopBack(
        input_handle=held, element_shape=[-1, *known(like.shape[1:])], element_dtype=like.dtype
    )
    # A list forgets the rank of what it holds, and oneDNN's layout pass, which fuses a sum with the
    # convolution before it, ends the process where it finds none (TensorFlow 2.21).
    return popped.output_handle, tf.ensure_shape(popped.tensor, [None, *like.shape[1:]])


def _element(steps: tf.Tensor) -> list[int]:
    return [-1, *known(steps.shape[2:])]


def _disguise(tensor: tf.Tensor) -> tf.DType:
    """Return a type of the same size that has no derivative."""
    dtype = tensor.dtype
    return _SAME_SIZE[dtype.size] if dtype.is_floating else dtype


def _acts(op: Any) -> bool:
    """Tell whether an operation does more than compute: such are never moved out of a loop."""
    return op.op_def.is_stateful and op.type != "ReadVariableOp"
