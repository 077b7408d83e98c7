"""Which way each weight takes, and the compiled job that takes it; explains itself.

Binds sites to rules in a trial graph, sends what has no rule to the tape path, chooses how the rows
are swept, and builds one `tf.function` from inputs and seeds to factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core import rules
from perjac._core.autodiff.accumulation import Route
from perjac._core.autodiff.bottleneck import Routing
from perjac._core.autodiff.hessian_roots import ROOTS
from perjac._core.autodiff.parametrization import pull_back
from perjac._core.backend import host, xla
from perjac._core.backend.axis_layout import Relabelling
from perjac._core.backend.shapes import known, size
from perjac._core.factors import Explicit, Factor, Zero
from perjac._core.factors.combine import combine
from perjac._core.factors.reductions import THEMSELVES, Question
from perjac._core.graph import failures
from perjac._core.graph.program import Program
from perjac._core.graph.provenance import Order
from perjac._core.graph.sites import Flow, Site
from perjac._core.graph.walk import upstream
from perjac._core.model.variables import Source


@dataclasses.dataclass(frozen=True)
class Decision:
    """How one weight goes, and why.

    Attributes
    ----------
    source : Source
        The weight.
    sites : tuple of Site
        Where it meets the data on the way to the output.
    path : str
        "factored" or "tape".
    rules : tuple of str
        What each site becomes, for people to read.
    reason : str
        Why this path.
    entries : int or None
        Numbers held for one example.
    swept : int
        Numbers of its sites' cotangents for one example, all rows of them.
    formed : int
        Numbers made of one example on the way from there: windows laid out, rows pulled back.
    """

    source: Source
    sites: tuple[Site, ...]
    path: str
    rules: tuple[str, ...]
    reason: str
    entries: int | None
    swept: int = 0
    formed: int = 0


def decide(
    program: Program,
    flow: Flow,
    head: str,
    weights: Sequence[Source],
    count: int,
    refused: str,
    order: Order,
    compact: bool = True,
) -> list[Decision]:
    """Return how each weight goes.

    Parameters
    ----------
    program, flow : Program, Flow
        The trace.
    head : str
        The output's tensor.
    weights : sequence of Source
        Those asked for.
    count : int
        K.
    refused : str
        Why all of them go to the tape, or nothing.
    order : Order
        How examples lie in the tensors.
    compact : bool
        As in `Job`.
    """
    needed = upstream(program, [head])
    asked = {source.index for source in weights}
    live = [s for s in flow.sites if s.variables & asked and _reaches(program, s.operation, needed)]
    found, swept = ({}, {}) if refused else _rehearse(program, live, count, order, compact)
    mine = {w: tuple(s for s in live if w.index in s.variables) for w in weights}
    return [_decide_one(source, mine[source], found, swept, refused, count) for source in weights]


def _reaches(program: Program, operation: str, needed: set[str]) -> bool:
    """Tell whether the output depends on an operation, or on what it stands for."""
    there = program.graph.get_tensor_by_name(program.place_of(operation))
    return there.op.name in needed


def _decide_one(
    source: Source,
    sites: tuple[Site, ...],
    found: Mapping[Site, Factor | str],
    swept: Mapping[Site, tuple[int, int]],
    refused: str,
    count: int,
) -> Decision:
    formed = count * source.size  # of what is pulled back through a parametrisation, or taped
    if refused:
        return Decision(source, sites, "tape", (), refused, formed, formed=formed)
    without = {site: why for site in sites if isinstance(why := found[site], str)}
    if without:
        site, why = next(iter(without.items()))
        why = f"{why} (at {site.operation})"
        return Decision(source, sites, "tape", (), why, formed, formed=formed)
    if not sites:
        return Decision(source, sites, "factored", (), "the output does not depend on it", 0)
    factors: list[Any] = [found[site] for site in sites]
    described = tuple(describe(factor, site) for factor, site in zip(factors, sites, strict=True))
    held = [  # what is pulled back through a parametrisation is held as rows
        formed if s.layout is None else f.entries for f, s in zip(factors, sites, strict=True)
    ]
    reason = "every site has a rule" if len(sites) > 1 else "its site has a rule"
    return Decision(
        source,
        sites,
        "factored",
        described,
        reason,
        None if None in held else sum(held),
        sum(swept[site][0] for site in sites),
        sum(swept[site][1] + formed * (site.layout is None) for site in sites),
    )


def describe(factor: Factor, site: Site) -> str:
    """Return a rule and the factor it gives, in a few words: "MatMul → Outer T=1 I=784 O=256"."""
    kind = type(factor).__name__
    target = factor.layout.target
    names = {"Outer": "IO", "Grouped": "GIO", "Lookup": "VD"}.get(kind, "")
    sizes = [f"{n}={length}" for n, length in zip(names, target, strict=bool(names))]
    if names:
        sizes.insert(0, f"T={factor.delta.shape[2]}")  # type: ignore[attr-defined]
    pulled = "" if site.layout is not None else ", pulled back through its parametrisation"
    return " ".join([site.type, "→", kind, *sizes]) + pulled


def _rehearse(
    program: Program, sites: Sequence[Site], count: int, order: Order, compact: bool
) -> tuple[dict[Site, Factor | str], dict[Site, tuple[int, int]]]:
    """Try each site's rule on placeholders: its factor, or the reason why there is none.

    And how many numbers of one example its cotangents are, and what is laid out to multiply them.
    """
    found: dict[Site, Factor | str] = {}
    swept: dict[Site, tuple[int, int]] = {}

    @tf.function(autograph=False)
    def trial(*inputs):
        batch = tf.shape(inputs[0])[0]
        ops = program.replay(inputs, {}, [site.operation for site in sites])
        alike: dict[Any, tuple] = {}  # a network of many blocks has most sites many times
        for site in sites:
            try:
                bound = _bind(program, site, ops[site.operation], batch, order)
                kind = bound.kind
                if kind not in alike:
                    alike[kind] = _tried(bound, count, compact)
                found[site], swept[site] = alike[kind]
            except rules.NoRule as refusal:
                found[site] = str(refusal)

    trial.get_concrete_function(*program.specs)
    return found, swept


def _tried(
    bound: rules.BoundSite, count: int, compact: bool
) -> tuple[Factor | str, tuple[int, int]]:
    """Apply a site's rule to a placeholder: as `_rehearse`, of one site."""
    shape = [None, count, bound.fold, *bound.output.shape[1:]]
    try:
        factor = rules.apply(bound, tf.compat.v1.placeholder(bound.output.dtype, shape))
    except rules.NoRule as refusal:
        return str(refusal), (0, 0)
    return factor.compact() if compact else factor, (size(shape[1:]), factor.laid_out)


def _bind(program: Program, site: Site, op: Any, batch: tf.Tensor, order: Order) -> rules.BoundSite:
    """Bind a site to an operation of the graph being built, or raise NoRule."""
    if site.type not in rules.RULES:
        raise rules.NoRule(f"no rule for {site.type}")
    traced = program.graph.get_operation_by_name(site.operation)
    if not traced.outputs[0].dtype.is_floating:
        raise rules.NoRule(f"its result is of type {traced.outputs[0].dtype.name}")
    name, place = traced.outputs[0].name, program.place_of(site.operation)
    if name not in program.extents:
        raise rules.NoRule("its result has no batch axis in front, or an unknown one behind")
    if why := order.why(place):
        raise rules.NoRule(f"how its rows belong to the examples is unclear: {why}")
    for tensor, there in zip(
        [*op.inputs, *op.outputs], [*traced.inputs, *traced.outputs], strict=True
    ):
        if there.name in program.extents:
            tensor.set_shape([None, *program.extents[there.name].rest])
    layout = site.layout
    if layout is None:
        shape = op.inputs[site.operand].shape
        if not shape.is_fully_defined():
            raise rules.NoRule("the shape of its parametrisation is unknown")
        layout = Relabelling.of(shape)
    fold = program.extents[name].fold
    return rules.BoundSite(op, site.operand, layout, fold, batch, place in order.inner)


class Job:
    """One compiled way from inputs and seeds to factors, or to what is asked of them.

    Parameters
    ----------
    program : Program
        The trace.
    head : str
        The output's tensor.
    decisions : sequence of Decision
        The weights that go the factored way.
    tensors : mapping of Source to str
        The inputs and activations asked for, and their tensors.
    signature : tuple of str and int
        The seeds' kind and count.
    route : Route
        How the cotangents are come by, as of `route_of`.
    order : Order
        How examples lie in the tensors.
    dtype : tf.DType
        What the factors are held in.
    jit : bool
        Whether XLA compiles it, anew for each batch size.
    compact : bool
        Whether factors become rows where those are smaller; their two sides are lost with it.
    question : Question
        What is asked of the factors, and given in their place.

    Attributes
    ----------
    of_examples : bool
        Whether every answer has the examples in front, so that some of them can be cut off.
    """

    def __init__(
        self,
        program: Program,
        head: str,
        decisions: Sequence[Decision],
        tensors: Mapping[Source, str],
        signature: tuple[str, int],
        route: Route,
        order: Order,
        dtype: tf.DType,
        jit: bool,
        compact: bool = True,
        question: Question = THEMSELVES,
    ):
        self._order, self._dtype, self._compact, self.jit = order, dtype, compact, jit
        self._question, self.of_examples = question, question == THEMSELVES
        self._program, self._head, self._tensors = program, head, dict(tensors)
        (self._kind, self._count), self._route = signature, route
        self._wanted = {d.source.index: d.source for d in decisions}
        self._sites = sites_of(decisions)
        self._lookups = failures.lookups(program, head)
        self.run = host.compiled(
            self._for_xla if jit else self.body,
            input_signature=self._signature(),
            jit_compile=jit or None,
        )

    def _signature(self) -> list:
        program, output = self._program, self._program.graph.get_tensor_by_name(self._head)
        rest = program.extents[self._head].rest
        payload = {
            **{kind: tf.TensorSpec([self._count], tf.int32) for kind in ("chosen", *ROOTS)},
            "all": tf.TensorSpec([0], tf.int32),
            "each": tf.TensorSpec([None], tf.int32),
            "cotangents": tf.TensorSpec([None, self._count, *rest], output.dtype),
        }[self._kind]
        return [program.specs, payload]

    def _for_xla(self, inputs: list[tf.Tensor], payload: tf.Tensor) -> Any:
        with xla.for_xla():
            return self.body(inputs, payload)

    def body(self, inputs: list[tf.Tensor], payload: tf.Tensor) -> Any:
        """Return (output, the answers by key, which inputs and variables are finite).

        And after these which lookups have rows for all of their ids.
        """
        program = self._program
        numbers = sorted(set(program.reads.values()) | set(self._wanted))
        values = {
            n: tf.convert_to_tensor(host.tf_variable(program.weights.variables[n])) for n in numbers
        }
        places = [program.place_of(s.operation) for s in self._sites]
        operations = [s.operation for s in self._sites]
        ids = [one.ids for one in self._lookups]
        names = [self._head, *operations, *places, *self._route.names, *ids]
        found = program.replay(inputs, values, names, quick=True)
        output, batch = found[self._head], tf.shape(inputs[0])[0]
        for name in {self._head, *self._route.places} & program.extents.keys():
            found[name].set_shape([None, *program.extents[name].rest])
        bound = [_bind(program, s, found[s.operation], batch, self._order) for s in self._sites]
        unfolds = {name: site.unfold for name, site in zip(places, bound, strict=True)}
        unfolds |= {name: lambda g: tf.expand_dims(g, 1) for name in self._tensors.values()}
        swept: dict[str, Any] = {}
        if self._route.targets:
            rows = self._route.cotangents(found, unfolds, self._kind, payload, self._count)
            swept = dict(zip(self._route.targets, rows, strict=True))
        factors = {
            source.key: Explicit(Relabelling.of(source.shape), tf.squeeze(delta, 2)).cast(
                self._dtype
            )
            for source, name in self._tensors.items()
            if (delta := swept[name]) is not None
        }
        factors |= self._weights(bound, [swept[name] for name in places], values)
        answers = self._question(factors)
        fine = _finite([*inputs, *values.values()])
        if self._lookups:  # which a card and XLA do not look at
            fine = tf.concat([fine, failures.within(self._lookups, found)], 0)
        return output, answers, fine

    def _weights(
        self,
        bound: Sequence[rules.BoundSite],
        deltas: Sequence[Any],
        values: Mapping[int, tf.Tensor],
    ) -> dict[str, Factor]:
        """Apply the rules, pull parametrised rows back to their variables, add up each weight's."""
        parts: dict[int, list[Factor]] = {}
        parametrised: list[tuple[tf.Tensor, tf.Tensor]] = []  # ψ, rows
        for site, place, delta in zip(self._sites, bound, deltas, strict=True):
            if delta is None:
                continue
            factor = rules.apply(place, delta)
            if site.layout is None:
                parametrised.append((place.weight, factor.dense()))
            else:
                (number,) = site.variables
                factor = factor.cast(self._dtype)
                parts.setdefault(number, []).append(factor.compact() if self._compact else factor)
        asked = {n: values[n] for s in self._sites if s.layout is None for n in s.variables}
        asked = {n: value for n, value in asked.items() if n in self._wanted}
        for number, rows in pull_back(parametrised, asked).items():
            pulled = Explicit(Relabelling.of(known(values[number].shape)), rows)
            parts.setdefault(number, []).append(pulled.cast(self._dtype))
        return {self._wanted[n].key: combine(made) for n, made in parts.items()}


def _finite(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Tell for each tensor whether its sum is finite: one pass, and wrong only on the safe side."""
    floating = [t.dtype for t in tensors if t.dtype.is_floating]
    if not floating:
        return tf.ones([len(tensors)], tf.bool)
    wide = tf.float64 if tf.float64 in floating else tf.float32
    # Their axes once for each rank, and one question in the end: two operations in three saved.
    axes = {t.shape.rank: tf.constant(list(range(t.shape.rank)), tf.int32) for t in tensors}
    sums = [
        tf.cast(tf.reduce_sum(t, axes[t.shape.rank]), wide)
        if t.dtype.is_floating
        else tf.zeros([], wide)
        for t in tensors
    ]
    return tf.math.is_finite(tf.stack(sums))


def sites_of(decisions: Sequence[Decision]) -> list[Site]:
    """Return the sites of all these weights, each once."""
    return list(dict.fromkeys(s for d in decisions for s in d.sites))


def targets_of(
    program: Program, decisions: Sequence[Decision], tensors: Iterable[str]
) -> tuple[str, ...]:
    """Return the tensors whose cotangents are wanted: these, and those at the weights' sites."""
    places = [program.place_of(site.operation) for site in sites_of(decisions)]
    return tuple(dict.fromkeys([*tensors, *places]))


def route_of(
    program: Program,
    head: str,
    decisions: Sequence[Decision],
    tensors: Iterable[str],
    count: int,
    batch: int,
    room: int,
    chunk_of: Callable[[str, int], int],
) -> Route:
    """Return how the cotangents of tensors, and of the weights' sites, are come by.

    Parameters
    ----------
    program, head : Program, str
        The trace, and the output's tensor.
    decisions : sequence of Decision
        The weights that go the factored way.
    tensors : iterable of str
        The inputs and activations asked for.
    count, batch : int
        K and B.
    room : int
        Bytes that there are on the way.
    chunk_of : callable
        (tensor, rows) → how many rows to sweep together from there down; 1 is to unroll them.
    """
    targets = targets_of(program, decisions, tensors)
    # With weights, the way across a narrow place takes as long (a CNN of 1,000 classes: its GGN
    # and KFAC), and half as long again to trace.
    straight = bool(decisions)
    return Routing(program, head, targets, count, batch, room, chunk_of, straight).best()


def zero(source: Source, batch: int, count: int, dtype: tf.DType) -> Zero:
    """Return the rows of something the output does not depend on."""
    return Zero(Relabelling.of(source.shape), tf.zeros([batch, count, 0], dtype))
