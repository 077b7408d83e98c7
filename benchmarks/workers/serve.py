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
SHORTEST_MS = 20.0
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
    needs_mb : callable, optional
        What it takes on a card, by the compiler's count: for libraries that cannot forget a peak.
    moved : int
        How many bytes it reads and writes, where that is what it is for.
    """

    run: Callable[[], Any]
    canonical: Callable[[Any], Iterable[np.ndarray | None]] | None = None
    note: str = ""
    tolerance: float | None = None
    needs_mb: Callable[[], float] | None = None
    moved: int = 0


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


@dataclasses.dataclass
class Device:
    """What a library runs on, and how its work is waited for and its memory counted.

    Attributes
    ----------
    name : str
        "cpu", or the card's.
    wait : callable
        Returns when all that was asked is done.
    forget : callable
        Lets the peak be counted anew.
    peak_mb, resident_mb : callable
        The most memory in use since, and what is in use now.
    """

    name: str = "cpu"
    wait: Callable[[], Any] = lambda: None
    forget: Callable[[], Any] = lambda: _forget_peak()
    peak_mb: Callable[[], float] = lambda: _peak_mb()
    resident_mb: Callable[[], float] = lambda: _resident_mb()


def serve(
    jobs: Mapping[str, Callable[[Work], Ways]],
    versions: Mapping[str, str],
    device: Device | None = None,
) -> None:
    """Answer the orchestrator's lines until there are none left.

    Parameters
    ----------
    jobs : mapping of str to callable
        By the job's name, what makes the peer's ways to it.
    versions : mapping of str to str
        Of the libraries that the figures depend on.
    device : Device, optional
        The processor by default.
    """
    device = device or Device()
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    work = Work.read(sys.argv[1])
    process = _Process(jobs, work, device)
    hello = {
        "jobs": list(jobs),
        "versions": dict(versions),
        "device": device.name,
        "idle_mb": device.resident_mb(),
    }
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

    def __init__(self, jobs: Mapping[str, Callable[[Work], Ways]], work: Work, device: Device):
        self._jobs, self._work, self._device = jobs, work, device
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
        first_ms, answer = self._timed(chosen.run)
        sketch = None
        if chosen.canonical:
            arrays = list(chosen.canonical(answer))
            sketch = [None if array is None else sketched(np.asarray(array)) for array in arrays]
            if keep:
                np.savez(keep, *arrays)
            del arrays
        del answer
        again_ms, _ = self._timed(chosen.run)
        self._often[way] = max(1, int(SHORTEST_MS / max(again_ms, 1e-3)))
        return {
            "first_ms": first_ms,
            "warm_ms": again_ms,
            "sketch": sketch,
            "note": chosen.note,
            "tolerance": chosen.tolerance,
            "moved": chosen.moved,
        }

    def time(self, way: str) -> dict:
        """Take one repetition's time, and all threads' together, in ms, and the memory it took."""
        run, often, device = self._ways[way].run, self._often[way], self._device
        gc.collect()
        device.forget()
        if often > 1:
            run()  # another process had the caches
            device.wait()
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(often):
            run()
            device.wait()
        ms = 1e3 * (time.perf_counter() - start) / often
        cpu_ms = 1e3 * (time.process_time() - busy) / often
        needs_mb = self._ways[way].needs_mb
        peak_mb = needs_mb() if needs_mb else device.peak_mb()
        return {"ms": ms, "cpu_ms": cpu_ms, "peak_mb": peak_mb}

    def _timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        answer = run()
        self._device.wait()
        return 1e3 * (time.perf_counter() - start), answer


def sketched(array: np.ndarray) -> dict:
    """Return an array's shape, norm and a few random projections with fixed numbers.

    A projection is the sum of the array times one random sign for each index of each axis: it needs
    no further array of this size, and changes if entries trade places.
    """
    rng = np.random.default_rng(7)
    signs = [rng.choice([-1.0, 1.0], (n, _PROJECTIONS)) for n in array.shape]
    square, total, size = 0.0, np.zeros(_PROJECTIONS), array.nbytes
    shape = array.shape
    if not array.ndim:
        array, signs = array[None], [np.ones((1, _PROJECTIONS))]
    for part, sign in zip(array, signs[0], strict=True):
        wide = np.asarray(part, "f8")  # one example at a time, so that a GB does not become two
        square += float(np.vdot(wide, wide))
        total += sign * _projected(wide, signs[1:])
    return {"shape": shape, "norm": square**0.5, "projections": list(total), "bytes": size}


def _projected(part: np.ndarray, signs: list[np.ndarray]) -> np.ndarray:
    if not signs:
        return np.full(_PROJECTIONS, float(part))
    found = part @ signs[-1]
    for sign in reversed(signs[:-1]):
        found = np.einsum("...np,np->...p", found, sign)
    return found


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
