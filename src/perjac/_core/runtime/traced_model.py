"""A model traced for one shape of example: its program, and everything compiled for it so far."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.autodiff.seeds import Seeds
from perjac._core.autodiff.tape import Tape, finder
from perjac._core.backend import host, machine, memory
from perjac._core.backend.xla import NotForXla, why_not
from perjac._core.factors import Factor
from perjac._core.factors.combine import held, held_in, join_rows, joined
from perjac._core.factors.reductions import THEMSELVES, Question, query
from perjac._core.graph import failures
from perjac._core.graph.program import Callee, Program
from perjac._core.graph.provenance import Order
from perjac._core.graph.text_tables import why_not_pfor
from perjac._core.graph.undifferentiable import no_gradient, without_gradient
from perjac._core.model import inside_functions
from perjac._core.model.inputs import Batch
from perjac._core.model.variables import Source
from perjac._core.planning.autotune import Trial, Tuned, signature, tune
from perjac._core.planning.decisions import Decision, Job, targets_of, zero
from perjac._core.planning.memory_model import MOST, Load, Pace
from perjac._core.planning.schedule import Schedule, alternatives, rows_at_once
from perjac._core.runtime.certificate import Certificates, Due, Rows, Uncertified
from perjac._core.runtime.examined import Examined
from perjac._core.runtime.failing import Failed, failing
from perjac._core.runtime.inspection import Plan, Spent
from perjac._core.runtime.jobs import Asked, Jobs
from perjac.errors import NotFiniteError, SlowPathWarning, warn, warn_disconnected


def _sealing(tape: Tape) -> Callable[..., Any]:
    return lambda inputs, seeds: inside_functions.sealed(tape(inputs, seeds))


@dataclasses.dataclass(frozen=True)
class _Task:
    """What a sweep is asked, and how it is run."""

    head: str
    decisions: Sequence[Decision]
    tensors: dict[Source, str]
    dtype: tf.DType
    question: Question
    schedule: Schedule
    load_of: Callable[[Schedule], Load]
    memory_limit: int | str | None
    batch: int

    @property
    def swept(self) -> list[Source]:
        """What goes the factored way."""
        return [*(d.source for d in self.decisions), *self.tensors]

    @functools.cached_property
    def load(self) -> Load:
        """What one example takes."""
        return self.load_of(self.schedule)

    @functools.cached_property
    def room(self) -> int:
        """Bytes that there are on the way."""
        return self.load.room(self.batch, self.memory_limit)


class Traced(Examined):
    """One shape of example. Nothing here is traced or compiled twice.

    Parameters
    ----------
    callee, program, structure, path : as in `Examined`
        The model and its trace.
    jit : bool
        Whether XLA may compile.
    whole : bool
        Whether it compiles all from inputs to factors, and not only where it is faster on a CPU.
    autotune, certify : bool, str
        Whether schedules are tried, and which calls are certified.
    """

    def __init__(
        self,
        callee: Callee,
        program: Program,
        structure: Any,
        path: str,
        jit: bool,
        whole: bool = False,
        autotune: bool = False,
        certify: str = "never",
    ):
        super().__init__(callee, program, structure, path)
        self._certificates = Certificates(callee, structure, program, lambda: self.plain, certify)
        self._uncertified = self._certificates.refused
        self._xla, self._whole = whole or (jit and program.suits_xla), whole
        self._may_xla, self._autotune = jit, autotune
        self._apart: set[Question] = set()  # questions that XLA does not compile
        self._jobs = Jobs(program)
        self._alone: dict[tuple, Job] = {}  # by all that they depend on, jobs that answer all

    @functools.cached_property
    def uncompacted(self) -> Traced:
        """The same trace, whose factors keep their two sides even where the rows are smaller."""
        other = copy.copy(self)
        other._compact, other._made = False, {}
        other._jobs, other._alone = Jobs(self.program, compact=False), {}
        return other

    def outputs(self, head: str, batch: Batch, memory_limit: int | str | None = None) -> tf.Tensor:
        """Return an output, (B, *output_shape)."""
        if batch.size == 0:  # which TensorFlow's own reshapes, of -1 by nothing, may get wrong
            return tf.zeros([0, *self.row_shape(head)], self.dtype(head))
        load = Load(1, True, self.footprint(head))
        room = load.room(batch.size, memory_limit)
        asked = Asked(head, (), (), ("all", 1), tf.float32, THEMSELVES)
        job = self._jobs.of(asked, Order(), Pace(batch.size, load, room, Schedule()))
        runs = load.runs(batch.size, room)
        nothing = tf.zeros([0], tf.int32)
        batches = [batch] if len(runs) == 1 else [batch.part(where) for where in runs]
        with failures.blamed(self.program, head, batch):
            found = [job.run(part.tensors, nothing) for part in batches]
        if inside_functions.is_inside():
            output = joined([part for part, _, _ in found])
            return inside_functions.sealed(output) if host.is_watched() else output
        if self._looks_up(head) and not all(fine.numpy().all() for _, _, fine in found):
            failures.check_ids(self.program, head, batch)
        output = joined([part for part, _, _ in found])
        return inside_functions.sealed(output) if host.is_watched() else output

    def _looks_up(self, head: str) -> bool:
        return self.once(("looks up", head), lambda: bool(failures.lookups(self.program, head)))

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
        key = self._key(head, sources, batch, chosen, memory_limit, question)
        turns = self._certificates.turns(head, key[1], chosen.signature, question, self._compact)
        due = batch.size * chosen.count > 0 and host.runs_at_once()
        due = due and not inside_functions.is_rehearsing() and self._certificates.due(turns)
        if not due and (known := self._alone.get(key)) is not None:
            with contextlib.suppress(tf.errors.OpError):  # the long way knows what to do
                output, answers, fine = self._jobs.run(known, batch, chosen)
                self._check_finite(head, batch, fine)
                return output, {s.key: answers[s.key] for s in sources}
        with host.lifted():  # what is found out about the graph is no part of a user's
            task, taped = self._task(head, sources, batch.size, chosen, memory_limit, question)
        nothing = functools.partial(zero, batch=batch.size, count=chosen.count, dtype=task.dtype)
        if batch.size == 0 or chosen.count == 0:
            answers = question({s.key: nothing(s) for s in sources})
            return self.outputs(head, batch, memory_limit), answers
        memory.check(
            batch.size * task.load.held, memory_limit,
            f"Even unformed, the Jacobian of {batch.size} examples × {chosen.count} outputs",
            "Give fewer examples at a time, or choose outputs=.",
        )  # fmt: skip
        last = (
            self._path == "factored" or taped == list(sources) or inside_functions.is_rehearsing()
        )
        outputs: list[tf.Tensor] = []
        lost: set[Source] = set()

        def run(where: slice) -> dict[str, Any]:
            whole = where == slice(0, batch.size)
            part = batch if whole else batch.part(where)
            seeds = chosen if whole else chosen.part(where)
            state = self._certificates.state() if due else []
            with failing(last):
                output, factors, fine = self._sweep(task, part, seeds, apart=due)
            self._check_finite(head, batch, fine)
            outputs.append(output)
            apart = due and question != THEMSELVES and factors
            answers = dict(query(question)(factors) if apart else factors)
            if taped:
                tape = self._tape(head, taped, seeds.kind)
                taking = tape if not host.is_watched() else _sealing(tape)
                try:
                    found = taking(part.tensors, seeds)
                except LookupError as failure:
                    raise no_gradient(self.program, head, taped, failure) from failure
                explicit = {
                    source.key: held(source, rows, task.dtype)
                    for source, rows in zip(taped, found, strict=True)
                }
                answers |= query(question)(explicit)
                factors = {**factors, **explicit}
                lost.update(tape.disconnected)
            if due and where.start == 0:
                apart = self._kept_apart.get(head)
                now = Due(turns, tuple(taped), state, apart is not None, apart == "proved")
                self._certificates.check(now, Rows(head, sources, part, seeds, output, factors))
            return answers

        try:
            if self._autotune and task.swept:
                with failing(last):
                    task = self._tuned(task, batch, chosen)[0]
            runs = task.load.runs(batch.size, task.room)
            answers = run(runs[0]) if len(runs) == 1 else question.joined(map(run, runs), runs)
        except Uncertified:
            return self.answers(head, sources, batch, chosen, memory_limit, question)
        except Failed as failed:
            if isinstance(failed.__cause__, LookupError) and (
                last or without_gradient(self.program, head, sources) is not None
            ):
                raise no_gradient(self.program, head, sources, failed.__cause__) from failed
            self._give_up(head, failed.__cause__)
            return self.answers(head, sources, batch, chosen, memory_limit, question)
        missing = [s for s in sources if s in lost or s.key not in answers]
        if missing:
            warn_disconnected(self.program.called(head), [s.key for s in missing])
            answers |= question({s.key: nothing(s) for s in missing if s.key not in answers})
        elif (
            not taped
            and not (due and question != THEMSELVES)  # then the factors were asked for first
            and runs == [slice(0, batch.size)]
            and self._asks_one(task, chosen)
        ):
            self._alone[key] = self._job(task, chosen.signature, batch.size)
        return joined(outputs), {s.key: answers[s.key] for s in sources}

    def uncertified(self) -> contextlib.AbstractContextManager[None]:
        """Answer without certificates inside the block."""
        return self._certificates.paused()

    def is_settled(self, *asked: Any) -> bool:
        """Tell whether one job has answered what `answers` is asked, and will again."""
        return self._key(*asked) in self._alone

    def _key(self, head: str, sources: Any, batch: Batch, chosen: Seeds, *asked: Any) -> tuple:
        refused = len(self._uncertified)
        return head, tuple(sources), batch.size, chosen.signature, asked, refused

    def _task(
        self,
        head: str,
        sources: Sequence[Source],
        examples: int,
        chosen: Seeds,
        memory_limit: int | str | None = None,
        question: Question = THEMSELVES,
    ) -> tuple[_Task, list[Source]]:
        """Return what is swept of so many examples, as usual, and the sources of the tape."""
        weights = [s for s in sources if s.kind == "weight"]
        decisions = self.decisions(head, weights, chosen.count)
        others = [s for s in sources if s.kind != "weight"]
        taped = [d.source for d in decisions if d.path == "tape"]
        taped += [s for s in others if s in self._uncertified]
        others = [s for s in others if s not in self._uncertified]
        if self._why_tape(head):
            taped, others = list(sources), []
        task = _Task(
            head,
            [d for d in decisions if d.path == "factored"],
            {s: s.tensor or self.program.inputs[s.index] for s in others},
            held_in([s.dtype for s in sources]),
            question,
            Schedule(xla=self._xla),
            functools.partial(
                self._load, head, decisions, others, chosen.count, question == THEMSELVES
            ),
            memory_limit,
            examples,
        )
        return task, taped

    def plan(
        self,
        head: str,
        sources: Sequence[Source],
        batch: Batch,
        examples: int,
        chosen: Seeds,
        memory_limit: int | str | None,
        measure: bool,
    ) -> Plan:
        """Return how weights' rows of so many examples would be swept; or, with `measure`, are.

        `batch` may be of fewer, which are repeated if anything is run.
        """
        task, taped = self._task(head, sources, examples, chosen, memory_limit)
        measured = None
        tunes = self._autotune and task.swept
        if measure or tunes:
            batch = batch.repeated(examples)
        if measure:
            run = functools.partial(self.answers, head, sources, batch, chosen, memory_limit)
            measured = Spent(statistics.median(machine.repeated(run, 3, 0.2)), machine.peak(run))
        if tunes:
            task, trial = self._tuned(task, batch, chosen)
            measured = measured or Spent(trial.seconds, trial.peak)
        load, schedule = task.load, task.schedule
        longest = load.runs(examples, task.room)[0].stop
        seconds = schedule.seconds(self.program, head, self._targets(task), chosen.count, examples)
        dense = examples * chosen.count * sum(s.size * s.dtype.size for s in sources)
        rates = machine.rates(task.dtype, self._may_xla)
        unrolled = schedule.unrolls(self.program, head, chosen.count)
        shown = dataclasses.replace(schedule, vectorised=not unrolled)
        return Plan(
            str(shown) if task.swept else "the tape path",
            longest,
            load.together(longest, task.room),
            Spent(None if taped else seconds, load.passing(longest, task.room)),
            measured,
            Spent(rates.call + dense / rates.fill, dense),
            self._certificates.said(head),
        )

    def body(
        self, head: str, sources: Sequence[Source], batch: Batch, chosen: Seeds
    ) -> Callable[[list[tf.Tensor], tf.Tensor], tuple[tf.Tensor, dict[str, Factor]]]:
        """Return a function of inputs and the seeds' payload to the output and the factors.

        It is to be part of another graph, and of factored weights alone.
        """
        task, _ = self._task(head, sources, batch.size, chosen)
        job = self._job(task, chosen.signature, batch.size, MOST)
        nothing = functools.partial(zero, batch=batch.size, count=chosen.count, dtype=task.dtype)

        def run(inputs: list[tf.Tensor], payload: tf.Tensor) -> tuple[tf.Tensor, dict[str, Factor]]:
            output, factors, _ = job.body(inputs, payload)
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

    def _sweep(self, task: _Task, batch: Batch, chosen: Seeds, apart: bool = False) -> tuple:
        """Run the job, over blocks of rows where they cannot all be compiled into one.

        With `apart` it gives the factors, whatever is asked of them.
        """
        blocks = self._blocks(chosen)
        question = task.question
        together = not apart and self._is_asked_along(task, len(blocks))
        asked = task if together else dataclasses.replace(task, question=THEMSELVES)
        answers = []
        for block in blocks:
            job = self._job(asked, block.signature, batch.size)
            try:
                answers.append(self._jobs.run(job, batch, block))
            except tf.errors.OpError as failure:
                if not job.jit:
                    raise
                if asked.question == THEMSELVES:
                    raise NotForXla(why_not(failure)) from failure
                self._apart.add(question)  # the factors may compile without it
                return self._sweep(task, batch, chosen)
        result, found, fine = answers[0]
        if len(blocks) > 1:
            found = join_rows([factors for _, factors, _ in answers])
        return result, found if together or apart else query(question)(found), fine

    def _blocks(self, chosen: Seeds) -> list[Seeds]:
        """Return the rows as jobs take them."""
        return chosen.blocks(rows_at_once(self.program, chosen.count))

    def _is_asked_along(self, task: _Task, blocks: int) -> bool:
        """Tell whether a question is answered in the program that sweeps."""
        question = task.question
        return question == THEMSELVES or (
            blocks == 1 and question not in self._apart and self._is_small(task.head)
        )

    def _asks_one(self, task: _Task, chosen: Seeds) -> bool:
        """Tell whether one job gives all answers, and will again, whatever memory is free."""
        blocks = len(self._blocks(chosen))
        steady = task.memory_limit is not None or task.load.is_small(task.batch)
        return blocks == 1 and steady and self._is_asked_along(task, blocks)

    def _job(
        self, task: _Task, signature: tuple[str, int], batch: int, room: int | None = None
    ) -> Job:
        pace = Pace(batch, task.load, room or task.room, task.schedule)
        tensors = tuple(task.tensors.items())
        asked = Asked(
            task.head, tuple(task.decisions), tensors, signature, task.dtype, task.question
        )
        with host.lifted():
            return self._jobs.of(asked, self.order(task.head), pace)

    def _tuned(self, task: _Task, batch: Batch, chosen: Seeds) -> tuple[_Task, Trial]:
        """Return a task on the schedule that is the fastest for such a batch, by trial."""
        program, head, count = self.program, task.head, chosen.count
        longest = task.load.runs(batch.size, task.room)[0].stop
        about = (
            head, [s.key for s in task.swept], chosen.signature, batch.size, longest,
            task.dtype.name, task.question, task.schedule, self._may_xla, self._compact,
        )  # fmt: skip

        def run(schedule: Schedule) -> Callable[[], tuple]:
            tried = dataclasses.replace(task, schedule=schedule)
            where = tried.load.runs(batch.size, tried.room)[0]
            part, seeds = batch.part(where), chosen.part(where)
            return lambda: self._sweep(tried, part, seeds)

        def tuned() -> Tuned:
            there = alternatives(program, head, count, task.schedule)
            there = [s for s in there if self._may_xla or not s.xla]
            targets = self._targets(task)
            expected = [s.seconds(program, head, targets, count, longest) for s in there]
            return tune(
                signature(program, *about),
                list(zip(there, expected, strict=True)),
                run,
                (NotForXla, tf.errors.OpError),
            )

        best = self.once(("tuned", *map(str, about)), tuned).best
        return dataclasses.replace(task, schedule=best.schedule), best

    def _targets(self, task: _Task) -> tuple[str, ...]:
        return targets_of(self.program, task.decisions, task.tensors.values())

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
                refused=(program.origin or program).stubborn or why_not_pfor(program),
                jit=self._whole,
            ),
        )

    def _check_finite(self, head: str, batch: Batch, fine: tf.Tensor) -> None:
        """Raise for an input or a variable that is not finite, where a sum over one was not.

        And for ids that a table has no row for.
        """
        if inside_functions.is_inside():
            return
        finite = fine.numpy()
        if finite.all():
            return
        batch.check_finite(finite[: len(batch.tensors)].tolist())
        weights = self.program.weights
        for key, variable in zip(weights.keys, weights.variables, strict=True):
            value = tf.convert_to_tensor(host.tf_variable(variable))
            if value.dtype.is_floating and not tf.reduce_all(tf.math.is_finite(value)):
                raise NotFiniteError(
                    f"Weight {key!r} has NaN or Inf. The model has probably diverged in "
                    "training: go back to an earlier checkpoint."
                )
        if self._looks_up(head):
            failures.check_ids(self.program, head, batch)
