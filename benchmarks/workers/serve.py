"""What every peer's process does: read a question, answer it, time it, and say how it went.

Lines of JSON come in on standard input and go out on what was standard output; what libraries print
goes to standard error. Must not import anything heavy, nor know any peer.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pathlib
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

# A repetition lasts so long at least: short ones are the mean of several in a row.
_SHORTEST_MS = 20.0
_PROJECTIONS = 4


@dataclasses.dataclass
class Way:
    """A way to an answer.

    Attributes
    ----------
    run : callable
        Computes it, to the end.
    canonical : callable, optional
        Turns what `run` returned into arrays of the layout in `jobs`, or None for one that means
        something else by the library's own definition (`note` says so); left out where there is
        no answer to compare.
    note : str
        What the table should say of it.
    tolerance : float, optional
        How far it may be from perjac's answer, where the library defines it otherwise; `note` says
        how.
    """

    run: Callable[[], Any]
    canonical: Callable[[Any], Iterable[np.ndarray | None]] | None = None
    note: str = ""
    tolerance: float | None = None


Ways = dict[str, Way]


@dataclasses.dataclass
class Work:
    """The model's weights, in Keras's order and layout, and the data of a run."""

    about: dict[str, Any]
    weights: list[np.ndarray]
    x: np.ndarray
    y: np.ndarray

    @classmethod
    def read(cls, file: str) -> Work:
        """Read what the orchestrator has written."""
        with np.load(file) as kept:
            about = json.loads(str(kept["about"]))
            weights = [kept[f"w{n}"] for n in range(about["weights"])]
            return cls(about, weights, kept["x"], kept["y"])

    @property
    def more_outputs_than_inputs(self) -> bool:
        """Whether forward mode is worth trying."""
        return self.about["outputs"] > self.x[0].size

    def first(self, examples: int) -> Work:
        """Return the same with fewer examples."""
        return dataclasses.replace(self, x=self.x[:examples], y=self.y[:examples])


def serve(jobs: Mapping[str, Callable[[Work], Ways]], versions: Mapping[str, str]) -> None:
    """Answer the orchestrator's lines until there are none left.

    Parameters
    ----------
    jobs : mapping of str to callable
        By the job's name, what makes the peer's ways to it.
    versions : mapping of str to str
        Of the libraries that the figures depend on.
    """
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    work = Work.read(sys.argv[1])
    process = _Process(jobs, work)
    hello = {"jobs": list(jobs), "versions": dict(versions), "idle_mb": _resident_mb()}
    print(json.dumps(hello), file=lines)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(process, asked.pop("do"))(**asked)
        except Exception as failure:
            traceback.print_exc()
            words = str(failure).strip().splitlines() or [""]
            answer = {"error": f"{type(failure).__name__}: {words[0]}"[:200]}
        print(json.dumps(answer), file=lines)


class _Process:
    """The questions that the orchestrator may ask, by the names of the methods."""

    def __init__(self, jobs: Mapping[str, Callable[[Work], Ways]], work: Work):
        self._jobs, self._work = jobs, work
        self._ways: Ways = {}
        self._often: dict[str, int] = {}

    def prepare(self, job: str, examples: int) -> dict:
        """Make the ways to a job, in place of those of the job before."""
        self._ways, self._often = {}, {}
        gc.collect()
        self._ways = self._jobs[job](self._work.first(examples))
        return {"ways": list(self._ways)}

    def check(self, way: str, keep: str | None = None) -> dict:
        """Run a way for the first time, and say what came out, in few numbers.

        Parameters
        ----------
        way : str
            Which.
        keep : str, optional
            A file for the answer itself.
        """
        chosen = self._ways[way]
        first_ms, answer = _timed(chosen.run)
        sketch = None
        if chosen.canonical:
            arrays = list(chosen.canonical(answer))
            sketch = [None if array is None else sketched(np.asarray(array)) for array in arrays]
            if keep:
                np.savez(keep, *arrays)
            del arrays
        del answer
        again_ms, _ = _timed(chosen.run)
        self._often[way] = max(1, int(_SHORTEST_MS / max(again_ms, 1e-3)))
        return {
            "first_ms": first_ms,
            "warm_ms": again_ms,
            "sketch": sketch,
            "note": chosen.note,
            "tolerance": chosen.tolerance,
        }

    def time(self, way: str) -> dict:
        """Take one repetition's time, and all threads' together, in ms, and the memory it took."""
        run, often = self._ways[way].run, self._often[way]
        gc.collect()
        _forget_peak()
        if often > 1:
            run()  # another process had the caches
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(often):
            run()
        ms = 1e3 * (time.perf_counter() - start) / often
        cpu_ms = 1e3 * (time.process_time() - busy) / often
        return {"ms": ms, "cpu_ms": cpu_ms, "peak_mb": _peak_mb()}


def sketched(array: np.ndarray) -> dict:
    """Return an array's shape, norm and a few random projections with fixed numbers.

    A projection is the sum of the array times one random sign for each index of each axis: it needs
    no further array of this size, and changes if entries trade places.
    """
    rng = np.random.default_rng(7)
    signs = [rng.choice([-1.0, 1.0], (n, _PROJECTIONS)) for n in array.shape]
    square, total = 0.0, np.zeros(_PROJECTIONS)
    if not array.ndim:
        array, signs = array[None], [np.ones((1, _PROJECTIONS))]
    for part, sign in zip(array, signs[0], strict=True):
        wide = np.asarray(part, "f8")  # one example at a time, so that a GB does not become two
        square += float(np.vdot(wide, wide))
        total += sign * _projected(wide, signs[1:])
    return {"shape": array.shape, "norm": square**0.5, "projections": list(total)}


def _projected(part: np.ndarray, signs: list[np.ndarray]) -> np.ndarray:
    if not signs:
        return np.full(_PROJECTIONS, float(part))
    found = part @ signs[-1]
    for sign in reversed(signs[:-1]):
        found = np.einsum("...np,np->...p", found, sign)
    return found


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    answer = run()
    return 1e3 * (time.perf_counter() - start), answer


def _resident_mb() -> float:
    return _status("VmRSS:") or _peak_mb()


def _peak_mb() -> float:
    """The most memory that was resident since `_forget_peak`, or ever where that cannot be."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _forget_peak() -> None:
    """Let Linux count the peak anew; elsewhere it is the process's."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(name: str) -> float | None:
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name)), None
    )
