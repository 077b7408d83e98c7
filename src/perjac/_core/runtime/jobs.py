"""Every job compiled for one trace: each way is made once, and run.

Chooses the way to what is asked for; must not know what becomes of the answers.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import tensorflow as tf

from perjac import progress
from perjac._core.autodiff.accumulation import Route
from perjac._core.autodiff.seeds import Seeds
from perjac._core.backend import host
from perjac._core.factors.reductions import Question
from perjac._core.graph.program import Program
from perjac._core.graph.provenance import Order
from perjac._core.model import inside_functions
from perjac._core.model.inputs import Batch
from perjac._core.model.variables import Source
from perjac._core.planning.decisions import Decision, Job, route_of
from perjac._core.planning.memory_model import Pace
from perjac._core.runtime.batch_padding import Sizes, first


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a job is to answer.

    Attributes
    ----------
    head : str
        The output's tensor.
    decisions : tuple of Decision
        The weights that go the factored way.
    tensors : tuple of (Source, str)
        The inputs and activations, and their tensors.
    signature : tuple of str and int
        The seeds' kind and count.
    dtype : tf.DType
        What factors are held in.
    question : Question
        What is asked of them.
    """

    head: str
    decisions: tuple[Decision, ...]
    tensors: tuple[tuple[Source, str], ...]
    signature: tuple[str, int]
    dtype: tf.DType
    question: Question

    @property
    def key(self) -> tuple:
        """What tells it from others: decisions follow from their sources."""
        weights = tuple(d.source for d in self.decisions)
        return self.head, weights, self.tensors, self.signature, self.dtype, self.question


class Jobs:
    """The jobs of a trace.

    Parameters
    ----------
    program : Program
        The trace.
    compact : bool
        As in `Job`.
    """

    def __init__(self, program: Program, compact: bool = True):
        self._program, self._compact = program, compact
        self._by_pace: dict[tuple, Job] = {}
        self._by_route: dict[tuple, Job] = {}
        self._ran: set[tuple] = set()  # jobs, and the batch sizes that XLA has compiled them for
        self._sizes: dict[Job, Sizes] = {}

    def of(self, asked: Asked, order: Order, pace: Pace) -> Job:
        """Return the job for batches of a size: the same one for all that go one way."""
        key = (asked.key, order, pace.key)
        if key not in self._by_pace:
            self._by_pace[key] = self._on(self._route(asked, pace), asked, order, pace)
        return self._by_pace[key]

    def run(self, job: Job, batch: Batch, chosen: Seeds) -> tuple:
        """Run a job; of its first time, which takes long, whoever reads is told."""
        if job.jit and job.of_examples and not inside_functions.is_inside():
            return self._filled_up(job, batch, chosen)
        return self._run(job, batch, chosen)

    def _filled_up(self, job: Job, batch: Batch, chosen: Seeds) -> tuple:
        """Run a job that XLA compiles for each size of batch, at a size that it may know."""
        sizes = self._sizes.setdefault(job, Sizes())
        at = sizes.of(batch.size)
        began = time.perf_counter()
        output, answers, fine = self._run(job, batch.repeated(at), chosen.repeated(at))
        if at > batch.size or at not in sizes.compiled:
            fine.numpy()  # a card answers before it is done
            sizes.ran(batch.size, at, time.perf_counter() - began)
        if at > batch.size:
            output, answers = first((output, answers), batch.size, at)
        return output, answers, fine

    def _run(self, job: Job, batch: Batch, chosen: Seeds) -> tuple:
        if host.is_watched():
            return inside_functions.sealed(job.run(batch.tensors, chosen.payload))
        known = job, batch.size if job.jit else None
        if known in self._ran:
            return job.run(batch.tensors, chosen.payload)
        size = f" for batches of {batch.size}" if job.jit else ""
        with progress.doing(f"compiling the sweep{size}"):
            self._ran.add(known)
            return job.run(batch.tensors, chosen.payload)

    def _on(self, route: Route, asked: Asked, order: Order, pace: Pace) -> Job:
        key = (asked.key, order, route.key, pace.schedule.xla)
        if key not in self._by_route:
            wanted = bool(asked.decisions or asked.tensors)
            self._by_route[key] = Job(
                self._program,
                asked.head,
                asked.decisions,
                dict(asked.tensors),
                asked.signature,
                route,
                order,
                asked.dtype,
                pace.schedule.xla and wanted,
                self._compact,
                asked.question,
            )
        return self._by_route[key]

    def _route(self, asked: Asked, pace: Pace) -> Route:
        rows: Any = functools.partial(pace.rows, self._program)
        names = [name for _, name in asked.tensors]
        count = asked.signature[1]
        return route_of(
            self._program, asked.head, asked.decisions, names, count, pace.batch, pace.room, rows
        )
