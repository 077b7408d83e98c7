"""One job on one model: every peer's ways checked against perjac's answer, then timed in turn."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from jobs import Job
from peers import FLOORS, OURS
from process import LeftOut, Process

# What a way's repetitions may take, if that allows three; or one, where one takes longer.
_BUDGET_S = 5.0
_FEWEST = 3


@dataclasses.dataclass
class Timed:
    """What became of one way.

    Attributes
    ----------
    peer, way : str
        Whose, and which of theirs.
    left_out : str
        Why there are no times; empty if there are.
    first_ms : float
        The first call: tracing and compiling included.
    repeats_ms, cpu_ms : list of float
        Each repetition; what all the process's threads worked in it, which other load on the
        machine changes less.
    peak_mb, idle_mb : float
        The most memory that the process had in a repetition; what it had before any job.
    error : float
        How far the answer is from perjac's, relative to its norm; for answers made of other random
        numbers, one less their correlation.
    note : str
        What else to know.
    clock : {"wall", "cpu"}
        By which of the two times ways are compared.
    moved : int
        Bytes read and written, where memory is what is looked at.
    """

    peer: str
    way: str
    left_out: str = ""
    first_ms: float | None = None
    warm_ms: float | None = None
    repeats_ms: list[float] = dataclasses.field(default_factory=list)
    cpu_ms: list[float] = dataclasses.field(default_factory=list)
    peak_mb: float | None = None
    idle_mb: float | None = None
    error: float | None = None
    note: str = ""
    clock: str = "wall"
    moved: int = 0

    @property
    def median_ms(self) -> float | None:
        """The median of the repetitions."""
        return statistics.median(self.clocked_ms) if self.repeats_ms else None

    @property
    def clocked_ms(self) -> list[float]:
        """The repetitions by the clock that is looked at."""
        return self.repeats_ms if self.clock == "wall" else self.cpu_ms

    @property
    def floor(self) -> bool:
        """Whether it is none of a library's ways."""
        return self.peer == FLOORS

    @property
    def name(self) -> str:
        """Peer and way."""
        return f"{self.peer}: {self.way}" if self.way else self.peer


class Cell:
    """A job on a model, over processes that stay.

    Parameters
    ----------
    job : str
        Its name.
    about : Job
        What is said of it in `jobs`.
    examples : int
        How many.
    folder : pathlib.Path
        For answers that are compared as a whole.
    clock : {"wall", "cpu"}
        As in `Timed`.
    expected : list of dict, optional
        Sketches of the answer, where perjac's has been computed elsewhere; otherwise the first one
        of perjac's here is what all others must be.
    """

    def __init__(
        self,
        job: str,
        about: Job,
        examples: int,
        folder: pathlib.Path,
        clock: str = "wall",
        expected: list[dict] | None = None,
    ):
        self._job, self._about, self._examples, self._folder = job, about, examples, folder
        self._clock = clock
        self._fatal: set[tuple[str, str]] = set()
        self._reference = expected
        self.timed: list[Timed] = []

    @property
    def answer_bytes(self) -> int | None:
        """How large the answer is."""
        return self._reference and sum(array["bytes"] for array in self._reference)

    def check(self, process: Process) -> bool:
        """Run each of a peer's ways once, and compare.

        Returns
        -------
        bool
            False if a way took the process along. Ask again with a new one: that way is passed
            over, the others are checked.
        """
        if self._job not in process.hello["jobs"]:
            return True
        mine = process.name
        self.timed = [t for t in self.timed if t.peer != mine or (mine, t.way) in self._fatal]
        try:
            ways = process.ask("prepare", job=self._job, examples=self._examples)["ways"]
        except LeftOut as failure:
            self.timed.append(Timed(mine, "", left_out=str(failure)))
            return True
        for way in ways:
            if (mine, way) in self._fatal:
                continue
            idle_mb = process.hello["idle_mb"]
            timed = Timed(mine, way, idle_mb=idle_mb, clock=self._clock)
            self.timed.append(timed)
            self._check(process, timed)
            if not process.alive:
                self._fatal.add((mine, way))
                return False
        return True

    def _check(self, process: Process, timed: Timed) -> None:
        keep = str(self._file(timed)) if self._about.correlation else None
        try:
            said = process.ask("check", way=timed.way, keep=keep)
        except LeftOut as failure:
            timed.left_out = str(failure)
            return
        timed.first_ms, timed.warm_ms, timed.note = said["first_ms"], said["warm_ms"], said["note"]
        timed.moved = said["moved"]
        sketch = said["sketch"]
        if sketch is None:
            return
        if self._reference is None and timed.peer != OURS:
            timed.left_out = "there is no answer of perjac's to compare with"
        elif self._reference is None:
            self._reference, timed.error = sketch, 0.0
        else:
            timed.error, timed.left_out = self._compared(timed, sketch, said["tolerance"])

    def _compared(
        self, timed: Timed, sketch: list[dict], tolerance: float | None
    ) -> tuple[float | None, str]:
        """Return how far an answer is off, and what is wrong with it."""
        ours, theirs = ([a and list(a["shape"]) for a in s] for s in (self._reference, sketch))
        same = len(ours) == len(theirs)
        if not same or any(t not in (None, o) for o, t in zip(ours, theirs, strict=True)):
            return None, f"wrong answer: shapes {theirs}, expected {ours}"[:200]
        if not any(sketch):
            return None, "nothing of its answer can be compared"
        if self._about.correlation:
            error = 1 - self._correlation(timed)
            allowed = 1 - self._about.correlation
        else:
            error = difference(self._reference, sketch)
            allowed = tolerance or self._about.tolerance
        if error <= allowed:
            return error, ""
        return error, f"wrong answer: {error:.1e} from perjac's, allowed {allowed:.1e}"

    def _correlation(self, timed: Timed) -> float:
        first = next(t for t in self.timed if t.peer == OURS)
        flat = []
        for one in (first, timed):
            with np.load(self._file(one)) as kept:
                flat.append(np.concatenate([kept[key].ravel() for key in kept]))
        return float(np.corrcoef(*flat)[0, 1])

    def _file(self, timed: Timed) -> pathlib.Path:
        return self._folder / f"{self._job}-{timed.name.replace('/', '-')}.npz"

    def time(self, processes: Mapping[str, Process], repeats: int) -> None:
        """Ask every way that has a right answer for a repetition, one after another, over again."""
        left = {id(t): _repeats(t, repeats) for t in self.timed if not t.left_out}
        for _ in range(repeats):
            for timed in self.timed:
                if timed.left_out or not left[id(timed)]:
                    continue
                left[id(timed)] -= 1
                self._repetition(processes[timed.peer], timed)
                time.sleep(0.03)  # until the threads of the one before have gone to sleep

    def _repetition(self, process: Process, timed: Timed) -> None:
        try:
            said = process.ask("time", way=timed.way)
        except LeftOut as failure:
            timed.left_out = str(failure)
            return
        timed.repeats_ms.append(said["ms"])
        timed.cpu_ms.append(said["cpu_ms"])
        timed.peak_mb = max(timed.peak_mb or 0, said["peak_mb"])


def difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any] | None]) -> float:
    """Return how far an answer is from ours, by their projections, relative to our norm.

    Each array counts by itself, but for those that are next to nothing beside the largest: a key's
    bias in attention has a gradient of rounding errors only. None of theirs is not compared.
    """
    largest = max(array["norm"] for array in ours)
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        if other is None:
            continue
        apart = np.subtract(mine["projections"], other["projections"])
        size = max(mine["norm"], 1e-3 * largest, np.finfo("f4").tiny)
        error = float(np.sqrt(np.mean(np.square(apart)))) / size
        worst = max(worst, error) if np.isfinite(error) else np.inf
    return worst


def _repeats(timed: Timed, repeats: int) -> int:
    """Return how often a way is timed: all the times, or fewer if it is slow."""
    warm_s = max(timed.warm_ms or 0.0, 1e-3) / 1e3
    fewest = 1 if warm_s > _BUDGET_S else _FEWEST
    return min(repeats, max(fewest, int(_BUDGET_S / warm_s)))
