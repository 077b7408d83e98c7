"""Relevance carried from an output back to what is looked at, operation by operation, by a rule.

Knows the traced graph, so any kind of model will do; must not know which rule it is, nor what the
numbers that it carries mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend import host
from perjac._core.backend.shapes import size
from perjac._core.graph.custom_gradients import operands
from perjac._core.graph.names import before_link
from perjac._core.graph.program import Program
from perjac._core.graph.walk import upstream
from perjac._core.graph.while_loops import LOOPS
from perjac._core.runtime.traced_model import Traced
from perjac.errors import DisconnectedWarning, InputError, warn
from perjac.saliency._problem import Explained

# One for each output or operand, None where nothing arrives.
Parts = list[Any]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation between what is looked at and the output, in the graph being built.

    Attributes
    ----------
    op : tf.Operation
        With its operands.
    moving : tuple of int
        The operands that depend on what is looked at; the others are weights or constants.
    layer : str
        Whose output it helps to make, or its own name where no layer is known.
    reference : tf.Operation or None
        The same on the baseline, for rules that compare with one.
    """

    op: Any
    moving: tuple[int, ...]
    layer: str
    reference: Any = None

    @property
    def type(self) -> str:
        """What it computes: "MatMul"."""
        return self.op.type

    @property
    def operands(self) -> list[tf.Tensor]:
        """The operands that depend on what is looked at."""
        return [self.op.inputs[n] for n in self.moving]

    def vjp(self, dys: Parts, at: Any = None) -> Parts:
        """Return each moving operand's gradient, here or `at` another operation of the type."""
        op = at or self.op
        filled = [
            tf.zeros_like(t) if dy is None and t.dtype.is_floating else dy
            for dy, t in zip(dys, op.outputs, strict=True)
        ]
        gradient = host.gradient_function(op)
        if gradient is None:  # it stops here, by TensorFlow's own account
            return [None] * len(self.moving)
        found = gradient(op, *filled)
        found = list(found) if isinstance(found, (list, tuple)) else [found]
        return [found[n] for n in self.moving]

    def refused(self, method: str, why: str = "") -> InputError:
        """Return the error that there is no rule for this operation."""
        if not why and (self.type in LOOPS or self.type.startswith("TensorList")):
            why = "it belongs to a loop, which Keras's recurrent layers leave out with unroll=True"
        return InputError(
            f"{method} has no rule for the operation {self.type} of layer {self.layer!r} "
            f"({self.op.name!r}){why and ': ' + why}. Explain an earlier output, of=, or look at a "
            "later layer's, wrt=pj.activation(name), or take a method made of plain gradients."
        )


@dataclasses.dataclass(frozen=True)
class Pull:
    """How what arrives at an operation's outputs goes on.

    Attributes
    ----------
    into : list of tf.Tensor
        Where to.
    back : callable
        Takes what arrives at each output, None where nothing does; returns a part for each `into`.
    rule : str
        Its name.
    absorbed : callable or None
        Takes the same as `back`; returns what goes nowhere, by name: tensors, the batch in front.
    """

    into: list[tf.Tensor]
    back: Callable[[Parts], Parts]
    rule: str = "gradient"
    absorbed: Callable[[Parts], dict[str, tf.Tensor]] | None = None


class Route:
    """All operations between what is looked at and the output, laid into the graph being built.

    Parameters
    ----------
    program : Program
        Without calls.
    head : str
        The output's tensor.
    inputs : sequence of tf.Tensor
        The program's.
    places : sequence of int
        Which of them are looked at.
    baseline : sequence of tf.Tensor, optional
        Other values of the inputs, to lay the operations down for once more.

    Attributes
    ----------
    head : tf.Tensor
        The output.
    reference : tf.Tensor or None
        The output at the baseline.
    sources : list of tf.Tensor
        What is looked at.
    operations : list of Operation
        Each after those that it depends on.
    """

    def __init__(
        self,
        program: Program,
        head: str,
        inputs: Sequence[tf.Tensor],
        places: Sequence[int],
        baseline: Sequence[tf.Tensor] | None = None,
    ):
        layers = _layers(program)
        between = _between(program, head, [program.inputs[n] for n in places])
        names = [head, *between]
        found = program.replay(inputs, {}, names)
        other = program.replay(baseline, {}, names) if baseline is not None else {}
        self.head, self.reference = found[head], other.get(head)
        self.sources = [inputs[n] for n in places]
        self.operations = [
            Operation(found[name], moving, layers.get(name, name), other.get(name))
            for name, moving in between.items()
        ]
        self.made_by = {t.name: o for o in self.operations for t in o.op.outputs}
        self._uses: dict[str, int] = {}
        for operation in self.operations:
            for tensor in operation.operands:
                self._uses[tensor.name] = self._uses.get(tensor.name, 0) + 1

    def is_used_once(self, tensor: tf.Tensor) -> bool:
        """Tell whether one operation alone takes a tensor, and it is not the output."""
        return self._uses.get(tensor.name, 0) == 1 and tensor.name != self.head.name

    def pulls(self, rule: Callable[[Operation], Pull]) -> list[tuple[Operation, Pull]]:
        """Ask the rule about every operation that something arrives at, the last one first."""
        reached = {self.head.name}
        found = []
        for operation in reversed(self.operations):
            if any(t.name in reached for t in operation.op.outputs):
                pull = rule(operation)
                found.append((operation, pull))
                reached.update(t.name for t in pull.into)
        return found

    def carry(
        self, pulls: Sequence[tuple[Operation, Pull]], seed: tf.Tensor, account: Account | None
    ) -> list[tf.Tensor]:
        """Return what arrives at each source when `seed` arrives at the output."""
        arriving: dict[str, tf.Tensor] = {self.head.name: seed}
        for operation, pull in pulls:
            dys = [arriving.get(t.name) for t in operation.op.outputs]
            if all(dy is None for dy in dys):  # its only user gave it nothing
                continue
            parts = pull.back(dys)
            if account is not None:
                account.enter(self, operation, pull, dys, parts)
            for tensor, part in zip(pull.into, parts, strict=True):
                if part is not None:
                    there = arriving.get(tensor.name)
                    arriving[tensor.name] = part if there is None else there + part
        return [arriving.get(s.name, tf.zeros_like(s)) for s in self.sources]


class Account:
    """What each layer receives, hands on, and keeps, by example: the sums of what is carried.

    Attributes
    ----------
    entries : dict of (str, str) to tf.Tensor
        By layer and "arriving", "leaving", or whatever its pulls absorb, each (B,).
    """

    def __init__(self, batch: tf.Tensor):
        self._batch = batch
        self.entries: dict[tuple[str, str], tf.Tensor] = {}

    def enter(
        self, route: Route, operation: Operation, pull: Pull, dys: Parts, parts: Parts
    ) -> None:
        """Write down what one operation does; what stays inside its layer cancels out."""
        own = operation.layer
        for tensor, dy in zip(operation.op.outputs, dys, strict=True):
            if dy is not None and tensor.name == route.head.name:
                self._add(own, "arriving", dy)
        for tensor, part in zip(pull.into, parts, strict=True):
            if part is None:
                continue
            maker = route.made_by.get(tensor.name)
            if maker is None or maker.layer != own:
                self._add(own, "leaving", part)
                if maker is not None:
                    self._add(maker.layer, "arriving", part)
        for name, kept in (pull.absorbed(dys) if pull.absorbed else {}).items():
            self._add(own, name, kept)

    def _add(self, layer: str, name: str, amount: tf.Tensor) -> None:
        total = tf.reduce_sum(tf.reshape(amount, [self._batch, -1]), 1)
        key = layer, name
        self.entries[key] = self.entries[key] + total if key in self.entries else total


@dataclasses.dataclass(frozen=True)
class Carried:
    """What `explain` finds.

    Attributes
    ----------
    values : list of tf.Tensor
        What arrives, (B, M, *shape), for each of `explained.names`.
    account : dict of str to dict of str to tf.Tensor
        As in `Account`, by layer, each (B, M); empty without `relevance`.
    rules : list of (layer, type of operation, rule)
        In the order of the way back.
    """

    values: list[tf.Tensor]
    account: dict[str, dict[str, tf.Tensor]]
    rules: list[tuple[str, str, str]]


def explain(
    explained: Explained,
    key: Hashable,
    rule: Callable[[Route], Callable[[Operation], Pull]],
    *,
    baseline: Sequence[tf.Tensor] | None = None,
    relevance: bool = False,
) -> Carried:
    """Carry each target back to what is looked at; the forward pass is run once for all targets.

    Parameters
    ----------
    explained : Explained
        Model, examples and targets.
    key : hashable
        What the rule depends on, to compile it once.
    rule : callable
        Takes the route, returns what to do at each operation of it.
    baseline : sequence of tf.Tensor, optional
        Other values (B, *shape) of what is looked at.
    relevance : bool
        Whether the outputs' values are carried, with an account, and not the number 1.
    """
    traced, head, batch, places = explained.trace()
    every = explained.target.kind == "all"
    carrier: _Carrier = traced.once(
        ("carrier", key, head, tuple(places), every, relevance),
        lambda: _Carrier(traced, head, places, rule, every, relevance, baseline is not None),
    )
    if carrier.disconnected:
        warn(
            f"The output does not depend on {', '.join(map(repr, explained.names))}: the maps "
            "are zero.",
            DisconnectedWarning,
        )
    if explained.size == 0:
        shapes = [[0, explained.target.count, *v.shape[1:]] for v in explained.values]
        return Carried([tf.zeros(s, explained.outputs.dtype) for s in shapes], {}, [])
    found = []
    for owners in explained.chunks(explained.size):
        inputs = [tf.gather(t, owners) for t in batch.tensors]
        other = list(inputs)
        for place, value in zip(places, baseline or [], strict=False):
            other[place] = tf.gather(value, owners)
        found.append(carrier.run(inputs, other, _seeds(explained, owners)))
    values = [tf.concat(parts, 0) for parts in zip(*(v for v, _ in found), strict=True)]
    account: dict[str, dict[str, tf.Tensor]] = {}
    sums = tf.unstack(tf.concat([part for _, part in found], 0), axis=2)
    for (layer, name), total in zip(carrier.entries, sums, strict=True):
        account.setdefault(layer, {})[name] = total
    return Carried(values, account, carrier.rules)


class _Carrier:
    """A route and its pulls, compiled for batches of any size."""

    def __init__(
        self,
        traced: Traced,
        head: str,
        places: Sequence[int],
        rule: Callable[[Route], Callable[[Operation], Pull]],
        every: bool,
        relevance: bool,
        compares: bool,
    ):
        program, head = traced.plain, _in_plain(traced, head)
        sources = [program.inputs[n] for n in places]
        self.disconnected = head not in sources and not _between(program, head, sources)
        output = program.graph.get_tensor_by_name(head)
        self.rules: list[tuple[str, str, str]] = []
        self.entries: list[tuple[str, str]] = []

        def run(inputs, baseline, directions):
            route = Route(program, head, inputs, places, baseline if compares else None)
            pulls = route.pulls(rule(route))
            self.rules = [(o.layer, o.type, p.rule) for o, p in pulls]

            def one(seed: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
                seed = tf.broadcast_to(seed, tf.shape(route.head))
                account = Account(tf.shape(inputs[0])[0])
                start = seed * route.head if relevance else seed
                values = route.carry(pulls, start, account if relevance else None)
                sums = [tf.cast(t, seed.dtype) for t in account.entries.values()]
                self.entries = list(account.entries)
                return values, tf.stack(sums) if sums else tf.zeros([0, 0], seed.dtype)

            if not every:
                values, sums = tf.nest.map_structure(lambda t: t[None], one(directions[0]))
            else:  # one after another: as many at once would need as much memory as all together
                types = [s.dtype for s in route.sources], route.head.dtype
                values, sums = tf.map_fn(one, directions, fn_output_signature=types)
            return [_example_first(v) for v in values], tf.transpose(sums, [2, 0, 1])

        specs = program.specs
        seed = tf.TensorSpec([None, None, *output.shape[1:]], output.dtype)
        self.run = host.compiled(run, input_signature=[specs, specs, seed])


def _example_first(tensor: tf.Tensor) -> tf.Tensor:
    """(M, B, ...) → (B, M, ...)."""
    rank = tensor.shape.rank or 2
    return tf.transpose(tensor, [1, 0, *range(2, rank)])


def _seeds(explained: Explained, owners: np.ndarray) -> tf.Tensor:
    """Return the targets as cotangents of the output, (M, B, *output_shape), B = 1 if all alike."""
    target, outputs = explained.target, explained.outputs
    if target.kind == "directions":
        return tf.gather(target.chosen, owners)[None]
    if target.kind == "all":
        return tf.reshape(tf.eye(target.count, dtype=outputs.dtype), [-1, 1, *target.shape])
    chosen = target.chosen[owners] if target.kind == "each" else [target.chosen]
    hot = tf.one_hot(chosen, size(target.shape), dtype=outputs.dtype)
    return tf.reshape(hot, [1, -1, *target.shape])


def _in_plain(traced: Traced, head: str) -> str:
    """Return an output's tensor in the trace without calls."""
    program, plain = traced.program, traced.plain
    if head in program.heads.values() or any(head in calls for calls in program.taps.values()):
        return program.counterpart(head, plain)
    return before_link(plain, plain.head(None))[0]  # logits have no name


def _between(program: Program, head: str, sources: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the operations that lead from the sources to the head, with their moving operands."""
    needed = upstream(program, [head])
    moving, found = set(sources), {}
    for op in program.graph.get_operations():  # creation order is topological
        own = range(operands(op))
        places = tuple(n for n in own if op.inputs[n].name in moving)
        if places and op.name in needed:
            found[op.name] = places
            moving.update(t.name for t in op.outputs if _carries(t.dtype))
    return {
        name: places
        for name, places in found.items()
        if any(t.name in moving for t in program.graph.get_operation_by_name(name).outputs)
    }


def _carries(dtype: tf.DType) -> bool:
    """Tell whether tensors of a type can depend smoothly on others; lists of tensors do."""
    return dtype.is_floating or dtype.is_complex or dtype == tf.variant


def _layers(program: Program) -> dict[str, str]:
    """Return, for each operation, the layer that it belongs to.

    That is the first one whose output it is needed for, of nested layers the innermost; or the one
    that it comes after, where none follows.
    """
    made = {}
    for layer, calls in program.taps.items():
        for tensor in calls:
            if tensor:
                made.setdefault(program.graph.get_tensor_by_name(tensor).op.name, layer)
    found: dict[str, str] = {}
    for op in reversed(program.graph.get_operations()):
        if op.name in made:
            found[op.name] = made[op.name]
        if op.name in found:
            for tensor in op.inputs:
                found[tensor.op.name] = found[op.name]
    for op in program.graph.get_operations():
        before = [found[t.op.name] for t in op.inputs if t.op.name in found]
        if before and op.name not in found:
            found[op.name] = before[0]
    return found
