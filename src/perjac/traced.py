"""A model traced for one shape of example: its program, and everything compiled for it so far."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from perjac import host, independence, memory, sites
from perjac.chunks import MOST, Load, Pace
from perjac.combination import held_in, join_rows, joined
from perjac.compiling import NotForXla, why_not
from perjac.errors import (
    InputError,
    NotFiniteError,
    PathError,
    SlowPathWarning,
    warn,
    warn_disconnected,
)
from perjac.factors import Explicit, Factor
from perjac.inputs import Batch
from perjac.jobs import Asked, Jobs
from perjac.layout import Relabelling
from perjac.normalise import flatten
from perjac.plan import Decision, Job, decide, rows_at_once, unrolls, zero
from perjac.questions import THEMSELVES, Question, query
from perjac.seeds import Seeds
from perjac.shapes import size
from perjac.sources import Source
from perjac.tape import Tape, finder
from perjac.trace import Callee, Program

# Operations whose result lies in the memory of their operand.
_VIEWS = ("Reshape", "Identity", "Squeeze", "ExpandDims", "StopGradient")
# Operations, at most, of a network whose rows are questioned in the program that sweeps. It saves a
# call, a millisecond; of a large network all answers would be held beside all that is swept (KFAC
# of ResNet50, 20 images at a time: 8.4 GiB against 5.4, and a tenth slower).
_ONE_PROGRAM = 500


class _Failed(Exception):
    """Raised where the factored path fails; its cause tells how."""


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
    whole : bool
        Whether it compiles all from inputs to factors, and not only where it is faster on a CPU.
    """

    def __init__(
        self,
        callee: Callee,
        program: Program,
        structure: Any,
        path: str,
        jit: bool,
        whole: bool = False,
    ):
        self._jit, self._whole = whole or (jit and program.suits_xla), whole
        self._apart: set[Question] = set()  # questions that XLA does not compile
        self.program, self._callee, self._structure, self._path = program, callee, structure, path
        self._flow = sites.flow(program)
        self._checked: set[str] = set()  # heads whose shapes show no meeting
        self._probed: set[str] = set()  # tensors that the probe has watched
        self._order = independence.Order()
        self._made: dict[tuple, Any] = {}
        self._refused: dict[str, str] = {}  # heads that all goes to the tape for, and why
        self._compact = True
        self._jobs = Jobs(program, self._jit)

    @functools.cached_property
    def uncompacted(self) -> Traced:
        """The same trace, whose factors keep their two sides even where the rows are smaller."""
        other = copy.copy(self)
        other._compact, other._made = False, {}
        other._jobs = Jobs(self.program, self._jit, compact=False)
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
        find = finder(self.program, head)

        def call(inputs: Sequence[tf.Tensor]) -> tf.Tensor:
            return find(*self._callee(tf.nest.pack_sequence_as(self._structure, list(inputs))))

        return call

    def footprint(self, head: str) -> int:
        """Return the bytes that all tensors on the way to an output take for one example."""
        return self.once(("footprint", head), lambda: self._footprint(head))

    def _footprint(self, head: str) -> int:
        graph, extents = self.program.graph, self.program.extents
        needed = sites.upstream(self.program, [head])
        operations = [op for op in graph.get_operations() if op.name in needed]
        tensors = [t for op in operations if op.type not in _VIEWS for t in op.outputs]
        return sum(
            extents[t.name].fold * size(extents[t.name].rest) * t.dtype.size
            for t in tensors
            if t.name in extents
        )

    def outputs(self, head: str, batch: Batch, memory_limit: int | str | None = None) -> tf.Tensor:
        """Return an output, (B, *output_shape)."""
        if batch.size == 0:  # which TensorFlow's own reshapes, of -1 by nothing, may get wrong
            dtype = self.program.graph.get_tensor_by_name(head).dtype
            return tf.zeros([0, *self.row_shape(head)], dtype)
        load = Load(1, True, self.footprint(head))
        room = load.room(batch.size, memory_limit)
        job = self._job(head, [], {}, ("all", 1), Pace(batch.size, load, room), tf.float32)
        runs = load.runs(batch.size, room)
        nothing = tf.zeros([0], tf.int32)
        batches = [batch] if len(runs) == 1 else [batch.part(where) for where in runs]
        parts = [job.run(part.tensors, nothing)[0] for part in batches]
        return joined(parts)

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
            answers = question({s.key: nothing(s) for s in sources})
            return self.outputs(head, batch, memory_limit), answers
        weights = [s for s in sources if s.kind == "weight"]
        decisions = self.decisions(head, weights, chosen.count)
        others = [s for s in sources if s.kind != "weight"]
        load = self._load(head, decisions, others, chosen.count, question == THEMSELVES)
        memory.check(
            batch.size * load.held, memory_limit,
            f"Even unformed, the Jacobian of {batch.size} examples × {chosen.count} outputs",
            "Give fewer examples at a time, or choose outputs=.",
        )  # fmt: skip
        room = load.room(batch.size, memory_limit)
        factored = [d for d in decisions if d.path == "factored"]
        taped = [d.source for d in decisions if d.path == "tape"]
        if self._why_tape(head):
            taped, others = list(sources), []
        outputs: list[tf.Tensor] = []
        lost: set[Source] = set()

        def run(where: slice) -> dict[str, Any]:
            whole = where == slice(0, batch.size)
            part = batch if whole else batch.part(where)
            seeds = chosen if whole else chosen.part(where)
            try:
                output, answers, *fine = self._sweep(
                    head, factored, others, part, seeds, dtype, question, load, room
                )
            except (NotForXla, tf.errors.ResourceExhaustedError):
                raise
            except Exception as failure:  # TensorFlow raises whatever an odd graph runs into
                if self._path == "factored" or taped == list(sources):
                    raise
                raise _Failed from failure
            batch.check_finite(fine[0].numpy())
            self._check_variables(bool(fine[1].numpy().all()))
            outputs.append(output)
            if taped:
                tape = self._tape(head, taped, seeds.kind)
                explicit = {
                    source.key: Explicit(Relabelling.of(source.shape), rows).cast(dtype)
                    for source, rows in zip(taped, tape(part.tensors, seeds), strict=True)
                }
                answers |= query(question)(explicit)
                lost.update(tape.disconnected)
            return answers

        try:
            runs = load.runs(batch.size, room)
            answers = run(runs[0]) if len(runs) == 1 else question.joined(map(run, runs), runs)
        except _Failed as failed:
            self._give_up(head, failed.__cause__)
            return self.answers(head, sources, batch, chosen, memory_limit, question)
        missing = [s for s in sources if s in lost or s.key not in answers]
        if missing:
            warn_disconnected(self.program.called(head), [s.key for s in missing])
            answers |= question({s.key: nothing(s) for s in missing if s.key not in answers})
        return joined(outputs), {s.key: answers[s.key] for s in sources}

    def _load(
        self,
        head: str,
        decisions: Sequence[Decision],
        others: Sequence[Source],
        count: int,
        kept: bool = True,
    ) -> Load:
        """Return what one example takes while it is swept."""
        about = (*(d.source for d in decisions), *others)
        return self.once(
            ("load", head, about, count, kept, self._why_tape(head), self._order),
            lambda: Load.of(
                decisions,
                others,
                count,
                unrolls(self.program, head, rows_at_once(self.program, count)),
                self.footprint(head),
                kept,
                self._is_small(head),
            ),
        )

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
        pace = Pace(batch.size, self._load(head, decisions, tuple(tensors), chosen.count), MOST)
        job = self._job(head, decisions, tensors, chosen.signature, pace, dtype)
        nothing = functools.partial(zero, batch=batch.size, count=chosen.count, dtype=dtype)

        def run(inputs: list[tf.Tensor], payload: tf.Tensor) -> tuple[tf.Tensor, dict[str, Factor]]:
            output, factors, *_ = job.body(inputs, payload)
            return output, {s.key: factors.get(s.key) or nothing(s) for s in sources}

        return run

    def _give_up(self, head: str, failure: BaseException | None) -> None:
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
        load: Load,
        room: int,
    ) -> tuple:
        """Run the job, over blocks of rows where they cannot all be compiled into one."""
        tensors = {s: s.tensor or self.program.inputs[s.index] for s in others}
        blocks = list(chosen.blocks(rows_at_once(self.program, chosen.count)))
        together = len(blocks) == 1 and question not in self._apart and self._is_small(head)
        asked = question if together else THEMSELVES
        answers = []
        for block in blocks:
            pace = Pace(batch.size, load, room)
            job = self._job(head, decisions, tensors, block.signature, pace, dtype, asked)
            try:
                answers.append(self._jobs.run(job, batch, block))
            except tf.errors.OpError as failure:
                if not self._jit:
                    raise
                if asked == THEMSELVES:
                    raise NotForXla(why_not(failure)) from failure
                self._apart.add(question)  # the factors may compile without it
                return self._sweep(
                    head, decisions, others, batch, chosen, dtype, question, load, room
                )
        result, found, *fine = answers[0]
        if len(blocks) > 1:
            found = join_rows([factors for _, factors, *_ in answers])
        return result, found if together else query(question)(found), *fine

    def _is_small(self, head: str) -> bool:
        made = ("operations", head)
        count = self.once(made, lambda: len(sites.upstream(self.program, [head])))
        return count <= _ONE_PROGRAM

    def _job(
        self,
        head: str,
        decisions: Sequence[Decision],
        tensors: dict[Source, str],
        signature: tuple[str, int],
        pace: Pace,
        dtype: tf.DType,
        question: Question = THEMSELVES,
    ) -> Job:
        asked = Asked(head, tuple(decisions), tuple(tensors.items()), signature, dtype, question)
        return self._jobs.of(asked, self._order, pace)

    def _tape(self, head: str, sources: Sequence[Source], kind: str) -> Tape:
        program = self.program
        return self.once(
            ("tape", head, tuple(sources), kind),
            lambda: Tape(
                self._callee,
                self._structure,
                finder(program, head),
                {s: finder(program, s.tensor) for s in sources if s.tensor},
                program.weights.variables,
                sources,
                kind,
                refused=(program.origin or program).stubborn,
                jit=self._whole,
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
