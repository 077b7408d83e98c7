"""A trace examined: what its outputs are, whether examples meet, and how each weight goes.

Everything that is known of a trace before anything is computed with it; nothing is found out twice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from perjac import costs, independence, sites
from perjac.chunks import Load
from perjac.errors import InputError, PathError
from perjac.inputs import Batch
from perjac.normalise import flatten
from perjac.plan import Decision, decide
from perjac.schedules import Schedule, rows_at_once
from perjac.sources import Source
from perjac.tape import finder
from perjac.trace import Callee, Program

# Operations, at most, of a network whose rows are questioned in the program that sweeps. It saves a
# call, a millisecond; of a large network all answers would be held beside all that is swept (KFAC
# of ResNet50, 20 images at a time: 8.4 GiB against 5.4, and a tenth slower).
_ONE_PROGRAM = 500


class Examined:
    """One shape of example.

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
    """

    def __init__(self, callee: Callee, program: Program, structure: Any, path: str):
        self.program, self._callee, self._structure, self._path = program, callee, structure, path
        self._flow = sites.flow(program)
        self._checked: set[str] = set()  # heads whose shapes show no meeting
        self._probed: set[str] = set()  # tensors that the probe has watched
        self._order = independence.Order()
        self._made: dict[tuple, Any] = {}
        self._refused: dict[str, str] = {}  # heads that all goes to the tape for, and why
        self._uncertified: dict[Source, str] = {}  # sources that go to the tape, and why
        self._compact = True

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

    def dtype(self, head: str) -> tf.DType:
        """Return an output's type."""
        return self.once(("dtype", head), lambda: self.program.graph.get_tensor_by_name(head).dtype)

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
        made = [_taped(d, self._uncertified.get(d.source, "")) for d in made]
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
        return sum(self._sizes(head))

    def _sizes(self, head: str) -> list[int]:
        return self.once(("sizes", head), lambda: costs.sizes(self.program, head))

    def _load(
        self,
        head: str,
        decisions: Sequence[Decision],
        others: Sequence[Source],
        count: int,
        kept: bool,
        schedule: Schedule,
    ) -> Load:
        """Return what one example takes while it is swept."""
        about = (*(d.source for d in decisions), *others)
        rows = rows_at_once(self.program, count)
        return self.once(
            (
                "load",
                head,
                about,
                count,
                schedule,
                kept,
                self._why_tape(head),
                self._order,
                len(self._uncertified),
            ),
            lambda: Load.of(
                decisions,
                others,
                count,
                schedule.unrolls(self.program, head, rows),
                self._sizes(head),
                kept,
                self._is_small(head),
            ),
        )

    def _is_small(self, head: str) -> bool:
        made = ("operations", head)
        count = self.once(made, lambda: len(sites.upstream(self.program, [head])))
        return count <= _ONE_PROGRAM

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Return what `make` makes, made once for this key: a question about the graph."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _taped(decision: Decision, why: str) -> Decision:
    """Return a decision for the tape path, where there is a reason against the factored one."""
    if not why or decision.path == "tape":
        return decision
    formed = decision.formed or decision.source.size
    return dataclasses.replace(decision, path="tape", rules=(), reason=why, formed=formed)
