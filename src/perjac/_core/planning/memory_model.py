"""How many examples are swept at a time, so that what a sweep makes on the way fits into memory.

Knows what a plan's decisions say of one example; must not know what is computed of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from perjac._core.backend import memory
from perjac._core.factors.base import FORM_AT_ONCE
from perjac._core.graph.program import Program
from perjac._core.model.variables import Source
from perjac._core.planning.decisions import Decision
from perjac._core.planning.schedule import Schedule, rows_together

# Bytes made on the way at a time, however much memory there is: larger chunks are no faster. But
# kernels want a few examples at a time to keep all cores at work (eight pictures of ResNet50 take
# 0.35 s together and 0.70 one by one), whatever these take, up to so much of what is free.
MOST = 2**30
_FEW, _SHARE = 16, 0.75
# Copies of all rows' cotangents that there are at a time: row by row, and side by side; where rows
# are swept together also in the order of rows, before that of examples. Of rows that are all swept
# together, rules use up a site's cotangents before the next site has any.
_UNROLLED, _VECTORISED, _AT_ONCE = 2, 3, 1
# Tensors that a row swept together with others holds at a time: what lies behind is given back.
_LIVE = 10
# For what the allocator keeps, and what is not counted.
_SPARE = 1.25


@dataclasses.dataclass(frozen=True)
class Load:
    """What one example takes while it is swept, in bytes.

    Attributes
    ----------
    count : int
        K.
    unrolled : bool
        Whether rows are swept one after another.
    forward : int
        All tensors on the way to the output.
    swept : int
        The cotangents of all rows, as far as they are used.
    formed : int
        What is made of these.
    held : int
        What is left at the end.
    live : int or None
        What one row holds at a time where rows are swept together; None for all on the way.
    """

    count: int
    unrolled: bool
    forward: int
    swept: int = 0
    formed: int = 0
    held: int = 0
    live: int | None = None

    @classmethod
    def of(
        cls,
        decisions: Sequence[Decision],
        others: Sequence[Source],
        count: int,
        unrolled: bool,
        sizes: Sequence[int],
        kept: bool,
        together: bool = True,
    ) -> Load:
        """Return the load of a plan: decisions about weights, other sources, K rows.

        `sizes` are the bytes of each tensor on the way to the output, the largest first.
        `kept` tells whether factors are, or only what is asked of them, which is of no example;
        `together` whether it is asked while they are swept.
        """
        rows = sum(count * s.size * s.dtype.size for s in others)
        swept = rows + sum(d.swept * d.source.dtype.size for d in decisions)
        formed = sum(d.formed * d.source.dtype.size for d in decisions)
        held = rows + sum((d.entries or 0) * d.source.dtype.size for d in decisions)
        forward, live = sum(sizes), sum(sizes[:_LIVE])
        if kept:
            return cls(count, unrolled, forward, swept, formed, held, live)
        asked = together * sum(
            min(count * d.source.size, FORM_AT_ONCE) * d.source.dtype.size for d in decisions
        )
        return cls(count, unrolled, forward, swept, formed + held + asked, live=live)

    def together(self, batch: int, room: int) -> int:
        """Return how many rows of a batch to sweep together, in so many bytes; 1 is to unroll."""
        if self.unrolled:
            return 1
        return self.rows(self.count, batch, room)

    def rows(self, count: int, batch: int, room: int) -> int:
        """Return how many of so many rows of a batch to sweep together, in so many bytes."""
        return rows_together(count, batch, room / max(2 * self._each, 1))

    @property
    def _each(self) -> int:
        """What one row holds at a time."""
        return self.forward if self.unrolled or self.live is None else self.live

    def passing(self, batch: int, room: int) -> int:
        """Return the bytes that a batch takes on the way to its answer."""
        together = self.together(batch, room)
        copies = _UNROLLED if self.unrolled else _AT_ONCE if together >= self.count else _VECTORISED
        sweeping = self.forward + self._each * together
        made = copies * self.swept + self.formed + self.held  # which is then joined to the others
        return int(_SPARE * batch * (sweeping + made))

    def is_small(self, batch: int) -> bool:
        """Tell whether a batch takes so little that nobody asks how much is free."""
        return self.passing(batch, MOST) <= memory.SMALL

    def room(self, batch: int, setting: int | str | None) -> int:
        """Return the bytes that there are on the way, where the answers of a batch are held."""
        if setting is None and self.is_small(batch):
            return MOST
        allowed = max((memory.limit(setting) or math.inf) - batch * self.held, 1)
        # What is free is never the same twice. Runs should be, as XLA compiles them for their size.
        share = _SHARE * allowed
        share = 2.0 ** (math.floor(2 * math.log2(share)) / 2) if share < math.inf else share
        few = min(self.passing(min(batch, _FEW), MOST), share)
        return int(min(allowed, max(MOST, few)))

    def runs(self, batch: int, room: int) -> list[slice]:
        """Cut a batch into runs of examples that fit, all but the last of one size."""
        fitting = batch
        while fitting > 1 and (passing := self.passing(fitting, room)) > room:
            fitting = max(1, min(fitting - 1, fitting * room // passing))
        pieces = math.ceil(batch / fitting)
        length = math.ceil(batch / pieces)
        starts = range(0, batch, length)
        return [slice(start, min(start + length, batch)) for start in starts]


@dataclasses.dataclass(frozen=True)
class Pace:
    """How much of a batch may be in the works at a time.

    Attributes
    ----------
    batch : int
        B.
    load : Load
        Of an example.
    room : int
        Bytes that there are on the way.
    schedule : Schedule
        How it is run.
    """

    batch: int
    load: Load
    room: int
    schedule: Schedule

    @property
    def key(self) -> tuple:
        """What a job depends on of it."""
        return self.batch, self.load.together(self.batch, self.room), self.schedule

    def rows(self, program: Program, top: str, count: int) -> int:
        """Return how many of so many rows to sweep together from a tensor down; 1 is to unroll."""
        if self.schedule.unrolls(program, top, count):
            return 1
        return self.load.rows(count, self.batch, self.room)
