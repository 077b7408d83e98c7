"""A trace examined: what its outputs are, whether examples meet, and how each weight goes.

Everything that is known of a trace before anything is computed with it; nothing is found out twice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.autodiff.tape import finder
from perjac._core.graph import costs, independence, provenance, sites, walk
from perjac._core.graph.normal_form import flatten
from perjac._core.graph.program import Callee, Program
from perjac._core.model.inputs import Batch
from perjac._core.model.variables import Source
from perjac._core.planning.decisions import Decision, decide
from perjac._core.planning.memory_model import Load
from perjac._core.planning.schedule import Schedule, rows_at_once
from perjac.errors import InputError, PathError

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
        # Heads whose examples stay apart, and how that is known.
        self._kept_apart: dict[str, str] = {}
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
        if self.dtype(head).is_complex:
            raise InputError(
                f"The output {self.program.called(head)!r} is complex. perjac differentiates real "
                "numbers: return its real and imaginary parts, or its absolute value."
            )
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

    def provenance(self, head: str) -> provenance.Provenance:
        """Return what the graph says of the examples behind an output."""
        return self.once(("provenance", head), lambda: self._analysed(head))

    def _analysed(self, head: str) -> provenance.Provenance:
        program = self.program
        needed = walk.upstream(program, [head])
        places = [program.place_of(s.operation) for s in self._flow.sites]
        taps = [t for calls in program.taps.values() for t in calls if t]
        watched = [*places, *taps]
        there = [t for t in watched if t.partition(":")[0] in needed]
        return provenance.analyse(program, self._flow, head, there)

    def order(self, head: str) -> provenance.Order:
        """Return how the examples behind an output lie in the tensors."""
        return self.provenance(head).order

    def check_shapes(self, head: str) -> None:
        """Raise ExamplesMeetError where the batch axis is lost on the way to an output."""
        self.once(
            ("shapes", head),
            lambda: independence.check_shapes(self.program, self._flow, head),
        )

    def check_graph(self, head: str) -> None:
        """Raise ExamplesMeetError where the graph says that examples influence one another."""
        if head in self._kept_apart:
            return
        found = self.provenance(head)
        if found.meeting is not None:
            raise independence.meeting(self.program, *found.meeting)
        self._kept_apart[head] = "" if found.unclear else "proved"

    def check_data(self, head: str, batch: Batch) -> None:
        """Probe, once, whether examples influence one another, where the graph does not say.

        Raises
        ------
        ExamplesMeetError
            If they do.
        """
        if self._kept_apart.get(head) or batch.size < 1:
            return
        batches = independence.batches_of(batch.tensors)
        decided = independence.probe(self.program, self._flow, head, batches)
        self._kept_apart[head] = "probed" if decided else "not decided"

    def check_sources(self, head: str, sources: Sequence[Source]) -> None:
        """Raise InputError for a hidden layer whose output's rows are not one for each example."""
        if not any(s.tensor for s in sources):
            return
        order = self.order(head)
        for source in sources:
            if source.tensor and (source.tensor in order.inner or order.why(source.tensor)):
                raise InputError(
                    f"The output of layer {source.key!r} does not keep the examples apart along "
                    "its first axis, so a derivative with respect to it cannot be given per "
                    f"example. {order.why(source.tensor)}".strip()
                )

    def independence(self, head: str) -> str:
        """Return how it is known that the examples behind an output stay apart, in a few words."""
        found = self.provenance(head)
        if found.meeting is not None:
            return "trusted, against what the graph says"
        if not found.unclear:
            return "proved from the graph"
        ways = {"probed": "probed on data", "not decided": "not decided by a probe on data"}
        way = ways.get(self._kept_apart.get(head, ""), "not proved, and not probed yet")
        return f"{way}, as the graph does not tell: {found.unclear}"

    def decisions(self, head: str, weights: Sequence[Source], count: int) -> list[Decision]:
        """Return how each weight goes, for K = count rows.

        Raises
        ------
        PathError
            For `path="factored"` where one needs the tape.
        """
        refused = self._why_tape(head)
        made = self.once(
            ("decisions", head, tuple(weights), count, refused),
            lambda: decide(
                self.program,
                self._flow,
                head,
                weights,
                count,
                refused,
                self.order(head),
                self._compact,
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

    def refuse(self, head: str, why: str) -> None:
        """Let everything go to the tape for an output, from here on."""
        self._refused[head] = why

    def _why_tape(self, head: str) -> str:
        """Return why everything goes to the tape, or nothing where it does not."""
        if self._path == "tape":
            return "path='tape' was asked for"
        return self._refused.get(head, "")

    @property
    def layer(self) -> Any:
        """The Keras model or layer that is called, or None."""
        return self._callee.model

    def has_output(self, head: str) -> bool:
        """Tell whether a tensor is a head or a layer's output, which `model` can return."""
        program = self.program
        return head in program.heads.values() or any(head in t for t in program.taps.values())

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
                len(self._uncertified),
            ),  # fmt: skip
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
        count = self.once(made, lambda: len(walk.upstream(self.program, [head])))
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
