"""A model traced for one shape of example: its program, and everything compiled for it so far."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from perjac import host, independence, memory, sites
from perjac.combination import held_in, join_rows
from perjac.errors import (
    DisconnectedWarning,
    InputError,
    NotFiniteError,
    PathError,
    SlowPathWarning,
    warn,
)
from perjac.factors import Explicit, Factor
from perjac.inputs import Batch
from perjac.layout import Relabelling
from perjac.normalise import flatten
from perjac.plan import Decision, Job, decide, route_of, rows_at_once, zero
from perjac.questions import THEMSELVES, Question, query
from perjac.route import Route
from perjac.seeds import Seeds
from perjac.shapes import size
from perjac.sources import Source
from perjac.tape import Tape
from perjac.trace import Callee, Program


class NotForXla(Exception):
    """Raised where XLA cannot compile a model; it has to be traced anew to go without."""


class Traced:
    """One shape of example. Nothing here is traced or compiled twice.

    Parameters
    ----------
    callee : Callee
        The model.
    program : Program
        Its trace.
    structure : nested structure
        The user's structure of inputs.
    path : str
        "auto", "factored" or "tape".
    jit : bool
        Whether XLA may compile.
    """

    def __init__(self, callee: Callee, program: Program, structure: Any, path: str, jit: bool):
        self._jit = jit and program.suits_xla
        self.program, self._callee, self._structure, self._path = program, callee, structure, path
        self._flow = sites.flow(program)
        self._checked: set[str] = set()  # heads whose shapes show no meeting
        self._probed: set[str] = set()  # tensors that the probe has watched
        self._order = independence.Order()
        self._made: dict[tuple, Any] = {}
        self._refused: dict[str, str] = {}  # heads that all goes to the tape for, and why
        self._compact = True

    @functools.cached_property
    def uncompacted(self) -> Traced:
        """The same trace, whose factors keep their two sides even where the rows are smaller."""
        other = copy.copy(self)
        other._compact, other._made = False, {}
        other._probed = set(self._probed)  # each knows the order of what it has probed itself
        return other

    @functools.cached_property
    def plain(self) -> Program:
        """The trace without calls, its loops closed: what can be run in any other graph."""
        return flatten(self.program.origin or self.program)

    def row_shape(self, head: str) -> tuple[int, ...]:
        """Return an output's shape for one example.

        Raises
        ------
        InputError
            If it has no batch axis in front.
        """
        extent = self.program.extents.get(head)
        if extent is None or extent.fold != 1:
            shape = self.program.graph.get_tensor_by_name(head).shape
            name = self.program.called(head)
            raise InputError(
                f"The output {name!r} has shape {shape}. Expected one row for each example, with "
                "all other axes known."
            )
        return extent.rest

    def check_shapes(self, head: str) -> None:
        """Raise ExamplesMeetError where the trace shows that examples influence one another."""
        if head not in self._checked:
            independence.check_shapes(self.program, self._flow, head)
            self._checked.add(head)

    def check_data(self, head: str, sources: Sequence[Source], batch: Batch) -> None:
        """Probe on the data, once, whether examples influence one another.

        Raises
        ------
        ExamplesMeetError
            If they do.
        InputError
            If a source's tensor does not keep the examples apart along its first axis.
        """
        asked = {head, *(s.tensor for s in sources if s.tensor)}
        if batch.size < 2 or asked <= self._probed:
            return
        program = self.program
        needed = sites.upstream(program, [head])
        places = [program.stand_in(s.operation) for s in self._flow.sites]
        watched = asked | {p.ordered for p in places if p.cotangent.partition(":")[0] in needed}
        order = independence.probe(program, self._flow, head, sorted(watched), batch.tensors)
        astray = [s.key for s in sources if s.tensor in order.inner | order.mixed]
        if astray:
            raise InputError(
                f"The output of layer {astray[0]!r} does not keep the examples apart along its "
                "first axis, so a derivative with respect to it cannot be given per example."
            )
        self._order |= order
        self._probed |= watched

    def decisions(self, head: str, weights: Sequence[Source], count: int) -> list[Decision]:
        """Return how each weight goes, for K = count rows.

        Raises
        ------
        PathError
            For `path="factored"` where one needs the tape.
        """
        refused = self._why_tape(head)
        made = self.once(
            ("decisions", head, tuple(weights), count, refused, self._order),
            lambda: decide(
                self.program, self._flow, head, weights, count, refused, self._order, self._compact
            ),
        )
        for decision in made:
            if self._path == "factored" and decision.path == "tape":
                raise PathError(
                    f"path='factored', but weight {decision.source.key!r} needs the tape path: "
                    f"{decision.reason}. Use path='auto'."
                )
        return made

    def _why_tape(self, head: str) -> str:
        """Return why everything goes to the tape, or nothing where it does not."""
        if self._path == "tape":
            return "path='tape' was asked for"
        return self._refused.get(head, "")

    def model(self, head: str) -> Callable[..., tf.Tensor]:
        """Return the model itself, as a function of the flattened inputs to one output."""
        find = _finder(self.program, head)

        def call(inputs: Sequence[tf.Tensor]) -> tf.Tensor:
            return find(*self._callee(tf.nest.pack_sequence_as(self._structure, list(inputs))))

        return call

    def footprint(self, head: str) -> int:
        """Return the bytes that all tensors on the way to an output take for one example."""
        return self.once(("footprint", head), lambda: self._footprint(head))

    def _footprint(self, head: str) -> int:
        graph, extents = self.program.graph, self.program.extents
        needed = sites.upstream(self.program, [head])
        tensors = [t for op in graph.get_operations() if op.name in needed for t in op.outputs]
        return sum(
            extents[t.name].fold * size(extents[t.name].rest) * t.dtype.size
            for t in tensors
            if t.name in extents
        )

    def outputs(self, head: str, batch: Batch) -> tf.Tensor:
        """Return an output, (B, *output_shape)."""
        if batch.size == 0:  # which TensorFlow's own reshapes, of -1 by nothing, may get wrong
            dtype = self.program.graph.get_tensor_by_name(head).dtype
            return tf.zeros([0, *self.row_shape(head)], dtype)
        job = self._job(head, [], {}, ("all", 1), 1, tf.float32)
        return job.run(batch.tensors, tf.zeros([0], tf.int32))[0]

    def answers(
        self,
        head: str,
        sources: Sequence[Source],
        batch: Batch,
        chosen: Seeds,
        memory_limit: int | str | None,
        question: Question = THEMSELVES,
    ) -> tuple[tf.Tensor, dict[str, Any]]:
        """Return the output, and the answer of each source's factor: by default the factor itself.

        Raises
        ------
        TooLargeError
            If even the factors do not fit into the memory limit.
        NotFiniteError
            If inputs or weights have NaN or Inf.

        Warns
        -----
        DisconnectedWarning
            For sources that the output does not depend on.
        """
        dtype = held_in([s.dtype for s in sources])
        nothing = functools.partial(zero, batch=batch.size, count=chosen.count, dtype=dtype)
        if batch.size == 0 or chosen.count == 0:
            return self.outputs(head, batch), question({s.key: nothing(s) for s in sources})
        weights = [s for s in sources if s.kind == "weight"]
        decisions = self.decisions(head, weights, chosen.count)
        others = [s for s in sources if s.kind != "weight"]
        _check_memory(decisions, others, batch.size, chosen.count, memory_limit)
        taped = [d.source for d in decisions if d.path == "tape"]
        if self._why_tape(head):
            taped, others = list(sources), []
        try:
            result, answers, fine, fine_variables = self._sweep(
                head,
                [d for d in decisions if d.path == "factored"],
                others,
                batch,
                chosen,
                dtype,
                question,
            )
        except (NotForXla, tf.errors.ResourceExhaustedError):
            raise
        except Exception as failure:  # TensorFlow raises whatever an unforeseen graph runs into
            if self._path == "factored" or taped == list(sources):
                raise
            self._give_up(head, failure)
            return self.answers(head, sources, batch, chosen, memory_limit, question)
        batch.check_finite(fine.numpy())
        self._check_variables(bool(fine_variables.numpy().all()))
        lost: set[Source] = set()
        if taped:
            tape = self._tape(head, taped, chosen.kind)
            explicit = {
                source.key: Explicit(Relabelling.of(source.shape), rows).cast(dtype)
                for source, rows in zip(taped, tape(batch.tensors, chosen), strict=True)
            }
            answers |= query(question)(explicit)
            lost = tape.disconnected
        missing = [s for s in sources if s in lost or s.key not in answers]
        if missing:
            _warn_disconnected(self.program.called(head), missing)
            answers |= question({s.key: nothing(s) for s in missing if s.key not in answers})
        return result, {s.key: answers[s.key] for s in sources}

    def body(
        self, head: str, sources: Sequence[Source], batch: Batch, chosen: Seeds
    ) -> Callable[[list[tf.Tensor], tf.Tensor], tuple[tf.Tensor, dict[str, Factor]]]:
        """Return a function of inputs and the seeds' payload to the output and the factors.

        It is to be part of another graph, and of factored weights alone.
        """
        dtype = held_in([s.dtype for s in sources])
        weights = [s for s in sources if s.kind == "weight"]
        decisions = self.decisions(head, weights, chosen.count)
        tensors = {
            s: s.tensor or self.program.inputs[s.index] for s in sources if s.kind != "weight"
        }
        job = self._job(head, decisions, tensors, chosen.signature, batch.size, dtype)
        nothing = functools.partial(zero, batch=batch.size, count=chosen.count, dtype=dtype)

        def run(inputs: list[tf.Tensor], payload: tf.Tensor) -> tuple[tf.Tensor, dict[str, Factor]]:
            output, factors, *_ = job.body(inputs, payload)
            return output, {s.key: factors.get(s.key) or nothing(s) for s in sources}

        return run

    def _give_up(self, head: str, failure: Exception) -> None:
        """Let everything go to the tape from here on, and say so."""
        text = f"{failure}".strip().partition("\n")[0][:200]
        self._refused[head] = f"the factored path fails with {type(failure).__name__}: {text}"
        warn(
            f"The output {self.program.called(head)!r} goes to the tape path, which is slow: "
            f"{self._refused[head]}",
            SlowPathWarning,
        )

    def _sweep(
        self,
        head: str,
        decisions: Sequence[Decision],
        others: Sequence[Source],
        batch: Batch,
        chosen: Seeds,
        dtype: tf.DType,
        question: Question,
    ) -> tuple:
        """Run the job, over blocks of rows where they cannot all be compiled into one."""
        tensors = {s: s.tensor or self.program.inputs[s.index] for s in others}
        blocks = list(chosen.blocks(rows_at_once(self.program, chosen.count)))
        asked = question if len(blocks) == 1 else THEMSELVES
        answers = []
        for block in blocks:
            job = self._job(head, decisions, tensors, block.signature, batch.size, dtype, asked)
            try:
                answers.append(job.run(batch.tensors, block.payload))
            except tf.errors.OpError as failure:
                if not self._jit:
                    raise
                raise NotForXla from failure
        result, found, *fine = answers[0]
        if len(blocks) > 1:
            found = query(question)(join_rows([factors for _, factors, *_ in answers]))
        return result, found, *fine

    def _job(
        self,
        head: str,
        decisions: Sequence[Decision],
        tensors: dict[Source, str],
        signature: tuple[str, int],
        batch: int,
        dtype: tf.DType,
        question: Question = THEMSELVES,
    ) -> Job:
        wanted = tuple(d.source for d in decisions), tuple(tensors)
        asked = (head, wanted, signature, self._order, dtype, question)

        def make() -> Job:
            route = self._route(head, decisions, tensors, signature[1], batch)
            how = (signature, route, self._order, dtype, self._jit and any(wanted))
            return self.once(
                ("job", *asked, route),
                lambda: Job(
                    self.program, head, decisions, tensors, *how, self._compact, question=question
                ),
            )

        return self.once(("job for", *asked, batch), make)

    def _route(
        self,
        head: str,
        decisions: Sequence[Decision],
        tensors: dict[Source, str],
        count: int,
        batch: int,
    ) -> Route:
        """Return a way; the same one for all batches that go it, so that they share a job."""
        found = route_of(self.program, head, decisions, tensors.values(), count, batch)
        return self.once(("route", found.key), lambda: found)

    def _tape(self, head: str, sources: Sequence[Source], kind: str) -> Tape:
        program = self.program
        return self.once(
            ("tape", head, tuple(sources), kind),
            lambda: Tape(
                self._callee,
                self._structure,
                _finder(program, head),
                {s: _finder(program, s.tensor) for s in sources if s.tensor},
                program.weights.variables,
                sources,
                kind,
                refused=(program.origin or program).stubborn,
            ),
        )

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Return what `make` makes, made once for this key: a question about the graph."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _check_variables(self, fine: bool) -> None:
        """Name the variable that is not finite, where a sum over one was not."""
        if fine:
            return
        weights = self.program.weights
        for key, variable in zip(weights.keys, weights.variables, strict=True):
            value = tf.convert_to_tensor(host.tf_variable(variable))
            if value.dtype.is_floating and not tf.reduce_all(tf.math.is_finite(value)):
                raise NotFiniteError(
                    f"Weight {key!r} has NaN or Inf. The model has probably diverged in "
                    "training: go back to an earlier checkpoint."
                )


def _check_memory(
    decisions: Sequence[Decision],
    others: Sequence[Source],
    batch: int,
    count: int,
    memory_limit: int | str | None,
) -> None:
    held = sum((d.entries or 0) * d.source.dtype.size for d in decisions)
    held += sum(count * source.size * source.dtype.size for source in others)
    memory.check(
        batch * held,
        memory_limit,
        f"Even unformed, the Jacobian of {batch} examples × {count} outputs",
        "Give fewer examples at a time, or choose outputs=.",
    )


def _finder(program: Program, name: str) -> Callable[..., tf.Tensor]:
    """Return how the tape finds a traced tensor again: by its head, or its layer and call."""
    for head, tensor in program.heads.items():
        if tensor == name:
            return lambda heads, taps: heads[head]
    for layer, calls in program.taps.items():
        if name in calls:
            call = calls.index(name)
            return lambda heads, taps: taps[layer][call]
    raise KeyError(name)


def _warn_disconnected(output: str, sources: Sequence[Source]) -> None:
    names = ", ".join(repr(source.key) for source in sources[:8])
    more = f" and {len(sources) - 8} more" if len(sources) > 8 else ""
    warn(
        f"The output {output!r} does not depend on {names}{more}: the Jacobian is zero there.",
        DisconnectedWarning,
    )
