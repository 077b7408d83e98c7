"""Models of one fixed batch size: stateful recurrent layers, reshapes to a number of examples.

Such a model is traced at that size, and differentiated by one reverse pass for each example and
output, of the whole batch. What it remembers between batches is put back after every call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.autodiff import seeds
from perjac._core.autodiff.seeds import Seeds
from perjac._core.autodiff.tape import finder, looped
from perjac._core.backend import host, memory
from perjac._core.backend.dtypes import EPSILON
from perjac._core.backend.shapes import Dims, Extent, known
from perjac._core.factors.combine import held, held_in
from perjac._core.factors.reductions import THEMSELVES, Question, query
from perjac._core.graph import program as tracing
from perjac._core.graph.program import Callee, Program
from perjac._core.graph.undifferentiable import no_gradient
from perjac._core.model.inputs import Batch
from perjac._core.model.variables import Source, Weights
from perjac._core.planning.decisions import zero
from perjac._core.runtime.inspection import Plan, Spent
from perjac._core.runtime.traced_model import Traced
from perjac.errors import ExamplesMeetError, InputError, SlowPathWarning, warn, warn_disconnected


@dataclasses.dataclass(frozen=True)
class FixedProgram(Program):
    """A trace at one batch size.

    Attributes
    ----------
    batch : int
        The size.
    states : tuple of tf.Variable
        Variables that a call may write: those that are not trained.
    """

    batch: int = 0
    states: tuple[Any, ...] = ()

    @functools.cached_property
    def extents(self) -> dict[str, Extent]:
        """The extent of every tensor whose first axis has the batch's length."""
        tensors = [t for op in self.graph.get_operations() for t in op.outputs]
        whole = [t for t in tensors if t.shape.rank and t.shape.is_fully_defined()]
        return {t.name: Extent(1, known(t.shape[1:])) for t in whole if t.shape[0] == self.batch}

    @functools.cached_property
    def shapes(self) -> dict[str, tf.TensorShape]:
        """None: no axis is unknown."""
        return {}

    @property
    def counted(self) -> int:
        """Nothing: places are counted along axes of known length."""
        return 0

    @property
    def batches(self) -> tuple[int, int]:
        """The one size, twice."""
        return self.batch, self.batch

    def dims(self, batch: int) -> dict[str, Dims | None]:
        """Every tensor's shape, as traced."""
        tensors = [t for op in self.graph.get_operations() for t in op.outputs]
        return {t.name: None if t.shape.rank is None else tuple(t.shape) for t in tensors}


def trace(
    callee: Callee, specs: Sequence[tf.TensorSpec], structure: Any, weights: Weights, batch: int
) -> FixedProgram:
    """Trace a model at one batch size; as `trace.trace`, which does so at any."""
    sized = [tf.TensorSpec([batch, *spec.shape[1:]], spec.dtype) for spec in specs]
    concrete, taps = tracing.record(callee, sized, structure)
    weights.read_by(concrete)
    program = tracing.collect(concrete, len(sized), weights, taps)
    trained = {id(host.tf_variable(weights.variables[n])) for n in weights.trainable}
    states = tuple(v for v in concrete.variables if id(v) not in trained)
    fields = {f.name: getattr(program, f.name) for f in dataclasses.fields(program) if f.init}
    return FixedProgram(**fields, batch=batch, states=states)


class Fixed(Traced):
    """One shape of example, and one size of batch.

    Parameters
    ----------
    callee, program, structure, path
        As in `Traced`.
    why : str
        Why the number of examples cannot be left open.
    meeting : ExamplesMeetError, optional
        What the trace of an unknown size was refused for: it holds if the examples meet here too.
    """

    def __init__(
        self,
        callee: Callee,
        program: FixedProgram,
        structure: Any,
        path: str,
        why: str,
        meeting: ExamplesMeetError | None = None,
    ):
        super().__init__(callee, program, structure, path, jit=False)
        self.batch, self._states, self._meeting = program.batch, program.states, meeting
        self._why = f"the model works on batches of {self.batch} examples alone: {why}"

    @property
    def uncompacted(self) -> Fixed:
        """Itself: its factors are rows anyway."""
        return self

    def check_shapes(self, head: str) -> None:
        """Raise for an output without an example's row each."""
        if head not in self.program.extents:
            if self._meeting is not None:
                raise self._meeting
            self.row_shape(head)

    def check_graph(self, head: str) -> None:
        """Raise where the graph says that examples meet."""
        try:
            super().check_graph(head)
        except ExamplesMeetError:
            if self._meeting is not None:
                raise self._meeting from None
            raise

    def check_data(self, head: str, batch: Batch) -> None:
        """Find out on the data, once, whether an example's output moves with another's input.

        Raises
        ------
        ExamplesMeetError
            If it does.
        """
        if self._kept_apart.get(head) or batch.size < 2:
            return
        if not _alone_as_among_others(functools.partial(self._output, head), batch) or _leaks(
            self._loop(head, (), "probe", 1), batch
        ):
            raise self._meeting or ExamplesMeetError(
                f"Examples influence one another: the output {self.program.called(head)!r} of one "
                "moves with the input of another. A derivative of one example alone has no "
                'meaning there. independence="trust" skips this check.'
            )
        self._kept_apart[head] = "probed"

    def outputs(self, head: str, batch: Batch, memory_limit: int | str | None = None) -> tf.Tensor:
        """Return an output, (B, *output_shape); of fewer examples, others are repeated."""
        if batch.size == 0:
            return tf.zeros([0, *self.row_shape(head)], self.dtype(head))
        return self._output(head, batch.repeated(self.batch))[: batch.size]

    def answers(
        self,
        head: str,
        sources: Sequence[Source],
        batch: Batch,
        chosen: Seeds,
        memory_limit: int | str | None,
        question: Question = THEMSELVES,
    ) -> tuple[tf.Tensor, dict[str, Any]]:
        """Return the output and each source's answer, as `Traced.answers` does.

        Warns
        -----
        SlowPathWarning
            Always: there is a pass for each example and output.
        """
        dtype = held_in([s.dtype for s in sources])
        if chosen.count == 0:
            nothing = {s.key: zero(s, batch.size, 0, dtype) for s in sources}
            return self.outputs(head, batch), question(nothing)
        self.decisions(head, [s for s in sources if s.kind == "weight"], chosen.count)
        size = batch.size * chosen.count * sum(s.size * s.dtype.size for s in sources)
        memory.check(
            size, memory_limit, f"The Jacobian of {batch.size} examples × {chosen.count} outputs",
            "Choose outputs=.",
        )  # fmt: skip
        finite = [bool(tf.reduce_all(tf.math.is_finite(t))) if t.dtype.is_floating else True
                  for t in batch.tensors]  # fmt: skip
        batch.check_finite(finite)
        warn(f"One pass for each example and output, which is slow: {self._why}", SlowPathWarning)
        loop = self._loop(head, tuple(sources), chosen.kind, chosen.count)
        try:
            output, rows = loop(batch.tensors, chosen.payload)
        except LookupError as failure:
            raise no_gradient(self.program, head, sources, failure) from failure
        explicit = {s.key: held(s, r, dtype) for s, r in zip(sources, rows, strict=True)}
        if loop.disconnected:
            warn_disconnected(self.program.called(head), [s.key for s in loop.disconnected])
        return output, query(question)(explicit)

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
        """Return how rows are computed: one pass for each example and output."""
        dense = examples * chosen.count * sum(s.size * s.dtype.size for s in sources)
        spent = Spent(None, dense)
        return Plan("one pass for each example and output", self.batch, 1, spent, None, spent)

    def body(self, head: str, sources: Sequence[Source], batch: Batch, chosen: Seeds) -> Any:
        """Refuse: there are no factors to be part of another graph.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError(f"This cannot be compiled into one program: {self._why}.")

    @property
    def plain(self) -> Program:
        """Refuse: there is no reference for one example alone.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError(f"There is no plain loop to compare with: {self._why}.")

    def _why_tape(self, head: str) -> str:
        return self._why

    def _output(self, head: str, batch: Batch) -> tf.Tensor:
        run = self.once(("output", head), lambda: host.compiled(self.model(head)))
        with _put_back(self._states):
            return run(batch.tensors)

    def _loop(self, head: str, sources: tuple[Source, ...], kind: str, count: int) -> _Loop:
        return self.once(
            ("loop", head, sources, kind, count),
            lambda: _Loop(self, head, sources, kind, count),
        )


class _Loop:
    """One reverse pass of the whole batch for each example and row.

    Without sources, kind "probe": by how much each example's output moves with others' inputs.
    """

    def __init__(self, fixed: Fixed, head: str, sources: Sequence[Source], kind: str, count: int):
        program: Any = fixed.program
        self._callee, self._structure, self._states = (
            fixed._callee, fixed._structure, program.states,
        )  # fmt: skip
        self._batch, self._kind, self._count = program.batch, kind, count
        self._variables = program.weights.variables
        self._head, self._sources = finder(program, head), list(sources)
        self._taps: Mapping[Source, Any] = {
            s: finder(program, s.tensor) for s in sources if s.tensor
        }
        self.disconnected: list[Source] = []  # known after the first call
        self._run = host.compiled(self._probed if kind == "probe" else self._rows)

    def __call__(self, tensors: Sequence[tf.Tensor], payload: Any) -> Any:
        with _put_back(self._states):
            return self._run(list(tensors), payload)

    def _rows(self, inputs: list[tf.Tensor], payload: tf.Tensor) -> Any:
        hidden = any(s.kind == "activation" for s in self._sources)
        with tf.GradientTape(persistent=True, watch_accessed_variables=hidden) as tape:
            tape.watch([t for t in inputs if hidden and t.dtype.is_floating])
            tape.watch([self._tensor(s, inputs, {}) for s in self._sources if not s.tensor])
            heads, taps = self._callee(tf.nest.pack_sequence_as(self._structure, inputs))
            output = self._head(heads, taps)
        output.set_shape([self._batch, *output.shape[1:]])
        against = [self._tensor(source, inputs, taps) for source in self._sources]
        directions = seeds.rows(self._kind, payload, self._count, output)
        directions = tf.broadcast_to(directions, [self._batch, *directions.shape[1:]])
        total = self._batch * self._count

        def row(n: Any) -> list[Any]:
            b, k = n // self._count, n % self._count
            here = tf.one_hot(b, self._batch, dtype=output.dtype)
            here = tf.reshape(here, [-1] + [1] * (output.shape.rank - 1))
            found = tape.gradient(output, against, output_gradients=here * directions[b, k])
            return [
                g if g is None or s.kind == "weight" else tf.convert_to_tensor(g)[b]
                for g, s in zip(found, self._sources, strict=True)
            ]

        rows = looped(row, total, total)
        self.disconnected = [s for s, r in zip(self._sources, rows, strict=True) if r is None]
        return output, [
            tf.zeros([self._batch, self._count, *s.shape], s.dtype)
            if r is None
            else tf.reshape(r, [self._batch, self._count, *s.shape])
            for s, r in zip(self._sources, rows, strict=True)
        ]

    def _probed(self, inputs: list[tf.Tensor], payload: tf.Tensor) -> list[tf.Tensor]:
        """Return the largest derivative by each example's own inputs and by others', (B, 2)."""
        floating = [t for t in inputs if t.dtype.is_floating]
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(floating)
            heads, taps = self._callee(tf.nest.pack_sequence_as(self._structure, inputs))
            output = self._head(heads, taps)
        direction = tf.random.stateless_normal(tf.shape(output), (0, 0), dtype=output.dtype)

        def row(b: Any) -> list[Any]:
            here = tf.one_hot(b, self._batch, dtype=output.dtype)
            here = tf.reshape(here, [-1] + [1] * (output.shape.rank - 1))
            found: Any = tape.gradient([output], floating, output_gradients=[here * direction])
            moved = [
                tf.cast(
                    tf.reduce_max(
                        tf.reshape(tf.abs(tf.convert_to_tensor(g)), [self._batch, -1]), 1
                    ),
                    tf.float64,
                )
                for g in found
                if g is not None
            ]
            each = tf.add_n([tf.zeros([self._batch], tf.float64), *moved])
            own = tf.one_hot(b, self._batch, dtype=tf.float64)
            return [tf.stack([tf.reduce_max(each * own), tf.reduce_max(each * (1 - own))])]

        return looped(row, self._batch, self._batch)

    def _tensor(self, source: Source, inputs: list[tf.Tensor], taps: Any) -> Any:
        if source.kind == "weight":
            return host.tf_variable(self._variables[source.index])
        return inputs[source.index] if source.kind == "input" else self._taps[source]({}, taps)


@contextlib.contextmanager
def _put_back(states: Sequence[Any]) -> Iterator[None]:
    """Give variables the values back that they have now, whatever happens inside the block."""
    before = [tf.identity(v) for v in states]
    try:
        yield
    finally:
        for variable, value in zip(states, before, strict=True):
            variable.assign(value)


def _alone_as_among_others(output: Any, batch: Batch) -> bool:
    """Tell whether each example's output is the same in a batch of copies of that example.

    True where the model is random, so that two runs cannot be compared.
    """
    whole = output(batch).numpy()
    if not _same(whole, output(batch).numpy()):
        return True
    for b in range(batch.size):
        copies = [tf.repeat(t[b : b + 1], batch.size, 0) for t in batch.tensors]
        if not _same(whole[b], output(dataclasses.replace(batch, tensors=copies)).numpy()[b]):
            return False
    return True


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    tolerance = 1000 * EPSILON.get(tf.as_dtype(a.dtype), 0)
    a, b = a.astype(np.float64), b.astype(np.float64)
    scale = np.max(np.abs(a), initial=0)
    return np.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)


def _leaks(probe: _Loop, batch: Batch) -> bool:
    """Tell whether an example's output has a derivative by another's input."""
    (moved,) = probe(batch.tensors, tf.zeros([0]))
    own, others = tf.reduce_max(moved, 0).numpy()
    return bool(others > 1e-6 * own)
