"""Certificates: a plan's rows, summed with random numbers, beside a gradient of the live model.

For any r (B, K), Σ r[b,k] J[b,k] is the gradient of Σ r[b,k] ⟨seed[b,k], y[b]⟩, one backward pass.
With r random, rows that are wrong give another sum, whatever made them wrong: a rule, the order of
the examples, a parametrisation, the trace. Knows factors and the live model; must not know plans.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.autodiff.seeds import Seeds, weighted
from perjac._core.backend import dtypes
from perjac._core.backend.shapes import known
from perjac._core.factors import Factor
from perjac._core.factors.combine import held_in
from perjac._core.graph.program import Callee, Program
from perjac._core.graph.rounding import rounding
from perjac._core.graph.walk import upstream
from perjac._core.model.inputs import Batch
from perjac._core.model.variables import Source
from perjac._core.runtime.batch_padding import within
from perjac._core.runtime.reference import OtherShape, Reference, Unreachable, put_back, written
from perjac.errors import CertificateError, CertificateWarning, warn

SCHEDULES = ("schedule", "always", "never")
# The relative error allowed, by the narrowest type that the model computes in. Of 60 random float32
# models right weights were off by 1e-7 to 4e-6, wrong ones by 0.2 to 3. In half precision a kink
# (relu, a pooled maximum) falls to the other side in one entry of a thousand.
_ALLOWED = {tf.float64: 1e-7, tf.float32: 2e-3, tf.float16: 5e-2, tf.bfloat16: 1e-1}
_FLOAT8 = (tf.dtypes.experimental.float8_e4m3fn, tf.dtypes.experimental.float8_e5m2)
_ALLOWED |= dict.fromkeys(_FLOAT8, 0.5)
_EPSILON = {**dtypes.EPSILON, **dict.fromkeys(_FLOAT8, 2**-2)}
# Of rounding that the largest weight's gradient allows the others: one whose exact gradient is zero
# (attention's key bias) has noise divided by noise for a relative error.
_SLACK = 10
# A difference up to so many times what float64 changes is taken for rounding.
_NOISE = 10
# After the first batch of a plan so many examples are looked at: with 16, six certificates took a
# CNN 11 % of a hundred gradients at B = 128; with 4, 2 %.
_FEW = 4
# After a plan's second call, each is certified whose number is so many times the last one's. With
# 2, an mlp's gradient norms took 39 % longer over a hundred calls at B = 128, half of it in Keras.
_SPARSER = 8
# What seems wrong is looked at one example at a time, for so many of them.
_ONE_BY_ONE = 32
# Rows compared each by itself, where the live model's backward pass is not linear.
_ROWS = 8


class Turns:
    """Which calls of a plan are certified: numbers 1, 2, 16, 128, ...; or all, or none.

    >>> turns = Turns("schedule")
    >>> [n for n in range(1, 200) if turns.due() and not turns.done()]
    [1, 2, 16, 128]
    """

    def __init__(self, when: str):
        self._always, self._next = when == "always", 1 if when != "never" else float("inf")
        self.calls = 0

    def due(self) -> bool:
        """Count a call, and tell whether it is to be certified."""
        self.calls += 1
        return self.calls >= self._next

    @property
    def is_first(self) -> bool:
        """Whether none was certified yet."""
        return self._next == 1

    def done(self) -> None:
        """Take note that this call was certified, as far as it could be."""
        self._next = self.calls + 1
        if not self._always and self.calls > 1:
            self._next = 2
            while self._next <= self.calls:
                self._next *= _SPARSER


@dataclasses.dataclass(frozen=True)
class Due:
    """A call that is to be certified.

    Attributes
    ----------
    turns : Turns
        How often its plan was asked.
    taped : tuple of Source
        The sources that the tape path answers.
    state : sequence of tf.Tensor
        What `Certificates.state` was before the call.
    checked : bool
        Whether it was made sure that no example influences another.
    proved : bool
        Whether the graph proves it.
    """

    turns: Turns
    taped: tuple[Source, ...]
    state: Sequence[tf.Tensor]
    checked: bool
    proved: bool


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a call, and what they are of.

    Attributes
    ----------
    head : str
        The output's tensor.
    sources : sequence of Source
        What was differentiated against.
    batch, seeds : Batch, Seeds
        The examples and seeds that the rows are of.
    output : tf.Tensor
        The output for these examples, as the trace has it.
    answers : mapping of str to Factor
        The rows by key; those of a source that is left out are zero.
    """

    head: str
    sources: Sequence[Source]
    batch: Batch
    seeds: Seeds
    output: tf.Tensor
    answers: Mapping[str, Factor]

    def summed(self, r: tf.Tensor) -> list[tf.Tensor]:
        """Return Σ r · J by each source, for r (B, K), as the live gradient is shaped."""
        return [_summed(self.answers.get(s.key), s, r) for s in self.sources]

    def cotangent(self, r: tf.Tensor) -> tf.Tensor:
        """Return what comes back at the output for r."""
        return weighted(self.seeds.kind, self.seeds.payload, r, self.output)

    def part(self, where: slice) -> Rows:
        """Return the rows of some of the examples."""
        size = self.batch.size
        output, answers = within((self.output, dict(self.answers)), where, size)
        batch = dataclasses.replace(self.batch, tensors=within(self.batch.tensors, where, size))
        return Rows(self.head, self.sources, batch, self.seeds.part(where), output, answers)


class Uncertified(Exception):
    """Raised where rows of the factored path are wrong; they have been refused."""


class Certificates:
    """All certificates of one trace.

    Parameters
    ----------
    callee : Callee
        The live model.
    structure : nested structure
        The user's structure of inputs.
    program : Program
        The trace.
    plain : callable
        Returns a form of the trace that runs in any other graph.
    when : {"schedule", "always", "never"}
        As `Engine(certify=...)`.

    Attributes
    ----------
    refused : dict of Source to str
        What the tape path has to answer from now on, and why.
    """

    def __init__(
        self,
        callee: Callee,
        structure: Any,
        program: Program,
        plain: Callable[[], Program],
        when: str,
    ):
        self._callee, self._structure, self._program = callee, structure, program
        self._plain, self._when = plain, when
        self._turns: dict[tuple, Turns] = {}
        self._references: dict[tuple, Reference] = {}
        self._types: dict[str, set[tf.DType]] = {}
        self._certified: dict[str, int] = {}  # by output: how many calls
        self._undecided: dict[str, str] = {}  # by output: why the last call could not be
        self._written: list[tf.Variable] | None = None  # what a call changes
        self._rng = np.random.default_rng(0)
        self.refused: dict[Source, str] = {}
        self._paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Certify nothing inside the block: what is wrong there shall be seen."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def due(self, turns: Turns) -> bool:
        """Count a call of a plan, and tell whether it is to be certified."""
        return not self._paused and turns.due()

    def turns(self, *plan: Any) -> Turns:
        """Return the count of a plan's calls."""
        found = self._turns.get(plan)
        if found is None:
            found = self._turns[plan] = Turns(self._when)
        return found

    def state(self) -> list[tf.Tensor]:
        """Return what the variables hold that a call of the model changes."""
        if self._written is None:
            self._written = written(self._program)
        return [tf.convert_to_tensor(v) for v in self._written]

    def said(self, head: str) -> str:
        """Return what is known of an output's rows, in a sentence."""
        if self._when == "never":
            return "Not certified: certify='never'."
        count, why = self._certified.get(head, 0), self._undecided.get(head, "")
        if why:
            return f"Not certified: {why}."
        if not count:
            return "Not certified yet: nothing has been asked."
        return f"Certified on {count} call{'s' * (count > 1)}."

    def check(self, due: Due, rows: Rows) -> None:
        """Compare the rows of a call with the live model's gradient.

        Raises
        ------
        Uncertified
            If rows of the factored path are wrong: `refused` has them now.
        CertificateError
            If rows of the tape path are.
        """
        rows = dataclasses.replace(rows, sources=[s for s in rows.sources if s.dtype.is_floating])
        always = self._when == "always"
        doubted = always or any(s in self.refused for s in rows.sources)
        if not doubted and set(rows.sources) <= set(due.taped):  # the tape is the live model
            return due.turns.done()
        if not due.turns.is_first and not always:
            rows = self._some(rows, _FEW)
        try:
            wrong = self._wrong(due, rows)
        except OtherShape as failure:
            raise CertificateError(
                f"The output {self._program.called(rows.head)!r} has shape {failure}. When the "
                f"model was traced, its shape was {tuple(rows.output.shape)}: the model has "
                "changed. Make a new Engine."
            ) from None
        except Exception as failure:  # the user's model raises whatever it likes
            text = f"{failure}".strip().partition("\n")[0][:150]
            named = (
                text if isinstance(failure, Unreachable) else f"{type(failure).__name__}: {text}"
            )
            why = f"the live model cannot be differentiated here ({named})"
            self._undecided[rows.head] = why
            return due.turns.done()
        if wrong:
            still = self._again(due, self._some(rows, _ONE_BY_ONE))
            wrong = {s: why for s, why in wrong.items() if s in still}
        if not wrong:
            return due.turns.done()
        return self._refuse(rows.head, wrong, due)

    def _again(self, due: Due, rows: Rows) -> set[Source]:
        """Return the sources that are wrong beside gradients of one example at a time, too.

        Where a batch's numbers differ from those of its examples alone (kinks at zero, kernels
        that add up in another order), these are what is asked for. If examples are proved not to
        meet, that difference is rounding, as is what compiling the model changes, and what the
        last digit of its inputs does.
        """
        head, sources, batch = rows.head, rows.sources, rows.batch
        r = self._drawn(batch.size, rows.seeds.count)
        live = self._reference(head, sources)
        cotangent = rows.cotangent(r)
        with put_back(self._written or (), due.state) as once_more:

            def again(tensors: list[tf.Tensor], r: tf.Tensor, compiled: bool = False) -> Any:
                once_more()
                return live(tensors, r, compiled)

            double = [2 * t for t in again(batch.tensors, cotangent)]
            twice = again(batch.tensors, 2 * cotangent)
            off, scale = self._compared(head, sources, twice, double, 2 * cotangent)
            if np.any(off > scale):  # as where a custom gradient clips what comes back
                still = self._wrong_rows(rows, again)
                self._certified[head] = self._certified.get(head, 0) + (not still)
                return still
            others = [again(batch.tensors, cotangent, compiled) for compiled in (False, True)]
            others.append(again([self._nudged(t) for t in batch.tensors], cotangent))
            alone = [
                again([t[b : b + 1] for t in batch.tensors], cotangent[b : b + 1])
                for b in range(batch.size)
            ]
        right = [
            tf.add_n(parts) if s.kind == "weight" else tf.concat(parts, 0)
            for s, parts in zip(sources, zip(*alone, strict=True), strict=True)
        ]
        off, scale = self._compared(head, sources, rows.summed(r), right, cotangent)
        if due.proved:
            for other in others:
                noise, _ = self._compared(head, sources, other, right, cotangent)
                scale = np.maximum(scale, _NOISE * noise)
        still = _beyond(sources, off, scale)
        if not still:
            self._undecided[head] = "the numbers are mostly rounding on this data"
        return still

    def _wrong_rows(self, rows: Rows, live: Callable[..., Any]) -> set[Source]:
        """Return the sources of which single rows, drawn at random, are not the live model's."""
        still: set[Source] = set()
        for _ in range(_ROWS):
            b, k = (int(self._rng.integers(0, n)) for n in (rows.batch.size, rows.seeds.count))
            one = rows.part(slice(b, b + 1))
            r = tf.one_hot([k], rows.seeds.count)
            cotangent = one.cotangent(r)
            right = live(one.batch.tensors, cotangent)
            off, scale = self._compared(rows.head, rows.sources, one.summed(r), right, cotangent)
            still |= _beyond(rows.sources, off, scale)
        return still

    def _refuse(self, head: str, wrong: Mapping[Source, str], due: Due) -> None:
        named = ", ".join(f"{s.key!r} ({why})" for s, why in [*wrong.items()][:5])
        named += f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        output = self._program.called(head)
        if wrong.keys() & set(due.taped):
            raise CertificateError(
                f"The derivative of {output!r} by {named} does not agree with tf.GradientTape on "
                "the model itself, and neither does the tape path of one example at a time. The "
                "output of an example probably depends on the rest of its batch, or on something "
                'that changes between two calls. certify="never" skips this check.'
            )
        self.refused |= {s: f"certificate failed: {why}" for s, why in wrong.items()}
        warn(
            f"The derivative of {output!r} by {named} did not agree with tf.GradientTape on the "
            "model itself. The tape path, which is slow, computes it from now on. This is a fault "
            "of perjac's: please report the model.",
            CertificateWarning,
        )
        raise Uncertified

    def _nudged(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return an input with its last digits changed."""
        if not tensor.dtype.is_floating:
            return tensor
        noise = self._rng.standard_normal((2, *known(tensor.shape)))
        step = _EPSILON[tensor.dtype] * (np.asarray(tensor, "float64") * noise[0] + 0.1 * noise[1])
        return tensor + tf.cast(step, tensor.dtype)

    def _some(self, rows: Rows, count: int) -> Rows:
        """Return the rows of a random run of so many examples."""
        size = rows.batch.size
        if size <= count or self._program.specs[0].shape[0] is not None:
            return rows
        start = int(self._rng.integers(0, size - count + 1))
        return rows.part(slice(start, start + count))

    def _wrong(self, due: Due, rows: Rows) -> dict[Source, str]:
        """Return the sources whose rows are wrong, and by how much."""
        head, sources, batch = rows.head, rows.sources, rows.batch
        r = self._drawn(batch.size, rows.seeds.count)
        ours = rows.summed(r)
        live = self._reference(head, sources)
        compiled = self._when == "always" and not due.turns.is_first
        with put_back(self._written or (), due.state) as once_more:
            cotangent = rows.cotangent(r)
            right = live(batch.tensors, cotangent, compiled)
            off, scale = self._compared(head, sources, ours, right, cotangent)
            suspect = [n for n in range(len(sources)) if not off[n] <= scale[n]]
            if suspect:
                once_more()
                again = live(batch.tensors, cotangent, compiled)
                meeting = not due.checked and live.meets(batch.tensors, self._allowed(head))
        self._undecided.pop(head, None)
        if suspect and meeting:  # as the user trusts
            self._undecided[head] = "the output of an example depends on the rest of its batch"
            return {}
        if suspect and np.any(np.greater(*self._compared(head, sources, again, right, cotangent))):
            self._undecided[head] = "the model is random"
            return {}
        unknown = [n for n in suspect if not np.isfinite(scale[n])]
        if unknown:
            self._undecided[head] = "the live model's gradient is not finite"
            suspect = [n for n in suspect if n not in unknown]
        if suspect:
            noise = self._noise(head, sources, batch, cotangent)
            # Where one weight's gradient is rounding, those of the weights before it are as well.
            known = [n for n in range(len(sources)) if scale[n] > 0 and np.isfinite(scale[n])]
            worst = max((noise[n] / scale[n] for n in known), default=0.0)
            blurred = [n for n in suspect if off[n] <= _NOISE * max(noise[n], worst * scale[n])]
            if blurred:
                self._undecided[head] = "the numbers are mostly rounding on this data"
            suspect = [n for n in suspect if n not in blurred]
        if not suspect and head not in self._undecided:
            self._certified[head] = self._certified.get(head, 0) + 1
        errors = self._allowed(head) * off / np.maximum(scale, np.finfo(scale.dtype).tiny)
        return {sources[n]: f"relative error {errors[n]:.1e}" for n in suspect}

    def _drawn(self, batch: int, count: int) -> tf.Tensor:
        """Return r (B, K): ±4/8 to ±12/8, which half precision holds and multiplies exactly."""
        size = (batch, count)
        sign = self._rng.choice([-1, 1], size)
        return tf.constant(sign * self._rng.integers(4, 13, size) / 8, tf.float32)

    def _reference(self, head: str, sources: Sequence[Source]) -> Reference:
        key = head, tuple(sources)
        if key not in self._references:
            self._references[key] = Reference(
                self._callee, self._structure, self._program, head, sources
            )
        return self._references[key]

    def _compared(
        self,
        head: str,
        sources: Sequence[Source],
        found: Sequence[tf.Tensor],
        right: Sequence[tf.Tensor],
        cotangent: tf.Tensor,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return for each source the norm of the difference, and the most that it may be."""
        wide = held_in([t.dtype for t in found])
        squares = []
        for pair in zip(found, right, strict=True):
            a, b = (t if t.dtype == wide else tf.cast(t, wide) for t in pair)
            squares += [tf.raw_ops.L2Loss(t=tf.raw_ops.Sub(x=a, y=b)), tf.raw_ops.L2Loss(t=b)]
        off, norms = np.sqrt(2 * tf.raw_ops.Pack(values=squares).numpy().reshape(-1, 2)).T
        weights = np.array([s.kind == "weight" for s in sources])
        largest = norms[weights & np.isfinite(norms)].max(initial=0)
        if not weights.any():  # what goes back from the output is of the size of what goes in there
            largest = float(tf.norm(cotangent))
        slack = _SLACK * max(map(_EPSILON.__getitem__, self._computed_in(head))) * largest
        return off, self._allowed(head) * norms + slack

    def _allowed(self, head: str) -> float:
        return max(_ALLOWED[t] for t in self._computed_in(head))

    def _computed_in(self, head: str) -> set[tf.DType]:
        """Return the floating types that an output is computed in."""
        if head not in self._types:
            graph, needed = self._program.graph, upstream(self._program, [head])
            ops = [op for op in graph.get_operations() if op.name in needed]
            found = {t.dtype for op in ops for t in op.outputs if t.dtype in _ALLOWED}
            self._types[head] = found or {tf.float32}
        return self._types[head]

    def _noise(
        self, head: str, sources: Sequence[Source], batch: Batch, cotangent: tf.Tensor
    ) -> list[float]:
        """Return how much of each source's gradient is rounding; nothing where that is unknown."""
        plain = self._plain()
        unknown = [0.0] * len(sources)
        if any(s.tensor for s in sources):
            return unknown
        try:
            there = self._program.counterpart(head, plain)
        except ValueError:
            return unknown
        return rounding(plain, there, sources, batch.tensors, cotangent) or unknown


def _beyond(sources: Sequence[Source], off: np.ndarray, scale: np.ndarray) -> set[Source]:
    return {s for s, o, most in zip(sources, off, scale, strict=True) if not o <= most}


def _summed(factor: Factor | None, source: Source, r: tf.Tensor) -> tf.Tensor:
    """Return Σ r · J by a source, as the live gradient is shaped."""
    alone = source.kind != "weight"
    if factor is None:
        dtype = tf.float64 if source.dtype == tf.float64 else tf.float32
        return tf.zeros([*([r.shape[0]] if alone else []), *source.shape], dtype)
    return factor.vjp(tf.cast(r, factor._any_tensor().dtype), per_example=alone)
