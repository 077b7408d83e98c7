"""The schedules of a sweep: what may be run in several ways that all give the same rows.

Says which there are and how long each should take; must not run any.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import tensorflow as tf

from perjac._core.backend import machine
from perjac._core.graph.costs import backward, forward
from perjac._core.graph.program import Program
from perjac._core.graph.walk import upstream

# Unrolled, every row adds its own backward pass to the graph: quick to run (35 ms against 83 for
# pfor on a small CNN), slow to trace (7.5 s against 2.5 for ten rows of ResNet50). Above this many
# operations in all, rows are vectorised.
_UNROLLED_OPERATIONS = 2500
# Rows that one job unrolls in a graph that pfor cannot go through; more run the job again.
_UNROLLED_ROWS = 16
# Rows · examples that a vectorised sweep takes at a time, and the rows that it takes at least.
_ROWS_TOGETHER, _ROWS_AT_LEAST = 256, 8
# Unrolled rows add a backward pass each to the graph, all of which takes time to trace, and more to
# compile (ten rows of a four-block transformer take XLA 20 s): with more operations than these, for
# TensorFlow and for XLA, a schedule is not tried.
_MOST_OPERATIONS, _MOST_COMPILED = 20_000, 2_000
# XLA reads and writes once what TensorFlow's steps read and write one after another.
_FUSED = 0.5


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A way to run a sweep.

    Attributes
    ----------
    vectorised : bool or None
        Whether rows are swept together, or one after another; None for what `unrolls` says of each
        stretch of the way, some of which may have fewer rows.
    xla : bool
        Whether XLA compiles all from inputs to factors, for each batch size.
    """

    vectorised: bool | None = None
    xla: bool = False

    def __str__(self) -> str:
        how = {None: "rows as usual", True: "rows together", False: "rows one after another"}
        return how[self.vectorised] + (", all of it compiled by XLA" if self.xla else "")

    def unrolls(self, program: Program, top: str, count: int) -> bool:
        """Tell whether so many rows are swept one after another, from a tensor down."""
        if self.vectorised is None or count == 1 or program.stubborn:
            return unrolls(program, top, count)
        return not self.vectorised

    def seconds(
        self, program: Program, head: str, targets: Sequence[str], count: int, examples: int
    ) -> float | None:
        """Return how long a sweep should take, or None where a loop runs nobody knows how often.

        Parameters
        ----------
        program, head : Program, str
            The trace, and the output's tensor.
        targets : sequence of str
            The tensors whose cotangents are wanted.
        count, examples : int
            K and B.
        """
        if program.loops:
            return None
        dtype = program.graph.get_tensor_by_name(head).dtype
        rates, unrolled = machine.rates(dtype, self.xla), self.unrolls(program, head, count)
        back = backward(program, head, targets, tiled=not unrolled)
        cost = forward(program, head) + back.times(count, count if unrolled else 1)
        if self.xla:
            cost = dataclasses.replace(cost, moved=_FUSED * cost.moved, started=0.0)
        return rates.call + cost.seconds(rates, examples)


def rows_at_once(program: Program, count: int) -> int:
    """Return how many rows one job takes: all, or few where they have to be unrolled."""
    return min(count, _UNROLLED_ROWS) if program.stubborn else count


def unrolls(program: Program, head: str, count: int) -> bool:
    """Tell whether rows are swept one after another, over one forward pass."""
    operations = len(upstream(program, [head]))
    return count == 1 or bool(program.stubborn) or count * operations <= _UNROLLED_OPERATIONS


def rows_together(count: int, batch: int, room: float) -> int:
    """Return how many rows a vectorised sweep takes at a time: a power of two, or less, or all.

    Chunks of one size are swept over the end, where rows are thrown away: ten rows go as two times
    five, not eight.

    `room` is for how many examples' rows there is memory.
    """
    batch = max(batch, 1)
    least = max(1, min(_ROWS_AT_LEAST, room // batch))
    together = max(min(_ROWS_TOGETHER, room) // batch, least)
    most = max(2, min(count, 2 ** int(math.log2(together))))
    return max(2, math.ceil(count / math.ceil(count / most)))


def alternatives(program: Program, head: str, count: int, usual: Schedule) -> list[Schedule]:
    """Return the schedules that there are for K rows, those of the usual one's rows first.

    Under XLA or without stay loops, as TensorFlow does not let two graphs define their functions
    under the same names, and convolutions on a CPU: XLA's take 2 to 10 times as long as
    TensorFlow's, and up to 20 s to compile.
    """
    unrolled = usual.unrolls(program, head, count)
    ways: list[tuple[bool | None, bool]] = [(None, unrolled)]
    if count > 1 and not program.stubborn:
        ways.append((unrolled, not unrolled))  # the other way: together, if usually one by one
    stays = program.loops or (program.convolves and not tf.config.list_physical_devices("GPU"))
    steps = len(program.graph.get_operations())
    found = [
        Schedule(vectorised, xla)
        for vectorised, one_by_one in ways
        for xla in ([usual.xla] if stays else [usual.xla, not usual.xla])
        if steps * (count if one_by_one else 1) <= (_MOST_COMPILED if xla else _MOST_OPERATIONS)
    ]
    return [usual, *(schedule for schedule in found if schedule != usual)]
