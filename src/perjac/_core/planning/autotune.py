"""The fastest schedule of a sweep, found by trial and remembered for this machine.

Chooses among what it is given; must not know what is run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from perjac import progress
from perjac._core.backend import disk_cache, machine
from perjac._core.graph.program import Program
from perjac._core.planning.schedule import Schedule
from perjac._version import __version__

# A schedule that should take so many times as long as the best is not tried: what is foretold is
# wrong by less, and compiling takes seconds.
_HOPELESS = 4.0
# A trial's calls: so many at least, and for so many seconds.
_CALLS, _SECONDS = 3, 0.2


@dataclasses.dataclass(frozen=True)
class Trial:
    """What became of one schedule.

    Attributes
    ----------
    schedule : Schedule
        It.
    expected : float or None
        The seconds foretold.
    seconds : float or None
        The median measured; None if it was not tried, or failed.
    peak : int
        The bytes that TensorFlow's allocator gave out on the way, at most; not looked at where one
        call was slow enough to tell.
    note : str
        Why there are no seconds.
    """

    schedule: Schedule
    expected: float | None
    seconds: float | None = None
    peak: int = 0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The schedules of one job at one batch size, the fastest first."""

    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The fastest."""
        return self.trials[0]


def signature(program: Program, *about: Any) -> dict[str, Any]:
    """Return what tells a job on this machine from any other, for the cache.

    Weights' values are no part of it: they do not change how long anything takes.
    """
    graph = program.graph_def.SerializeToString(deterministic=True)
    dtype = tf.as_dtype(program.specs[0].dtype)
    return {
        **machine.key(dtype),
        "perjac": __version__,
        "keras": importlib.metadata.version("keras"),
        "program": hashlib.sha256(graph).hexdigest(),
        "about": [str(part) for part in about],
    }


def tune(
    key: dict[str, Any],
    schedules: Sequence[tuple[Schedule, float | None]],
    run: Callable[[Schedule], Callable[[], Any]],
    refused: tuple[type[Exception], ...],
) -> Tuned:
    """Try schedules, unless it is known already which is the fastest.

    Parameters
    ----------
    key : dict
        As `signature` makes it.
    schedules : sequence of (Schedule, float or None)
        Those there are, each with the seconds that it should take; the usual one first.
    run : callable
        A schedule → what runs it once.
    refused : tuple of exception types
        What a schedule may fail with.

    Returns
    -------
    Tuned
        The trials. The usual schedule is left only for one that is a twentieth faster.
    """
    known = disk_cache.recall("schedules", key)
    if known is not None and (found := _read(known)) is not None:
        return found
    best = min((e for _, e in schedules if e is not None), default=None)
    trials: list[Trial] = []
    for n, (schedule, expected) in enumerate(schedules):
        if n and best is not None and expected is not None and expected > _HOPELESS * best:
            trials.append(Trial(schedule, expected, note="should take too long to be tried"))
            continue
        fastest = min((t.seconds for t in trials if t.seconds is not None), default=math.inf)
        with progress.doing(f"trying {schedule}"):
            tried = run(schedule)
            trials.append(_try(schedule, expected, tried, 2 * fastest, refused if n else ()))
    usual, *rest = trials
    rest.sort(key=lambda trial: trial.seconds or float("inf"))
    faster = rest and rest[0].seconds and rest[0].seconds < 0.95 * (usual.seconds or 0)
    ordered = [rest[0], usual, *rest[1:]] if faster else [usual, *rest]
    tuned = Tuned(tuple(ordered))
    disk_cache.remember("schedules", key, {"trials": [dataclasses.asdict(t) for t in tuned.trials]})
    return tuned


def _try(
    schedule: Schedule,
    expected: float | None,
    run: Callable[[], Any],
    enough: float,
    refused: tuple[type[Exception], ...],
) -> Trial:
    try:
        seconds = statistics.median(machine.repeated(run, _CALLS, _SECONDS, enough))
    except refused as failure:
        text = str(failure).strip().partition("\n")[0][:200]
        return Trial(schedule, expected, note=f"{type(failure).__name__}: {text}")
    return Trial(schedule, expected, seconds, 0 if seconds > enough else machine.peak(run))


def _read(known: dict[str, Any]) -> Tuned | None:
    """Return trials as they were written, or None if the file says something else."""
    try:
        return Tuned(
            tuple(Trial(**{**t, "schedule": Schedule(**t["schedule"])}) for t in known["trials"])
        )
    except (KeyError, TypeError):
        return None
