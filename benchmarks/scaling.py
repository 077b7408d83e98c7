"""What perjac's answers cost as something grows: examples, rows, weights, positions.

    python benchmarks/scaling.py

measures time and memory in a process for each job and each thing that grows, fits a power to each,
and writes tables and a chart to benchmarks/results. All under a memory limit, which is checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import charts
import fit
from jobs import JOBS
from process import limited

_WORKER = pathlib.Path(__file__).resolve().parent / "workers" / "by_growth.py"
# Memory below this is what the allocator happens to keep, not what an answer needs.
_COUNTS_MB = 4.0


@dataclasses.dataclass(frozen=True)
class Axis:
    """Something that grows.

    Attributes
    ----------
    what : str
        In words.
    net : str
        What is differentiated, and what stays as it is.
    jobs : dict of str to list of int
        Those asked, and the sizes of each for the worker: numbers of it, or the width that decides
        it. What a call costs whatever the size is large beside small answers: they start higher.
    """

    what: str
    net: str
    jobs: dict[str, list[int]]


def _doubled(first: int, last: int) -> list[int]:
    return [first << n for n in range((last // first).bit_length())]


AXES = {
    "B": Axis(
        "examples B",
        "784-256-256-10",
        {
            "weights": _doubled(1, 128),
            "gradients": _doubled(4, 512),
            "gradient_norms": _doubled(64, 8192),
        },
    ),
    "K": Axis(
        "output rows K",
        "64-128-256, its first K outputs, 32 examples (512 for norms); for inputs 512-384-256, "
        "256 examples: more inputs than rows at every size",
        dict.fromkeys(("weights", "inputs", "jacobian_norms"), _doubled(2, 256)),
    ),
    "P": Axis(
        "weights P",
        "64-w-w-4, w from 32 to 1,024, 32 examples (512 for norms)",
        dict.fromkeys(("weights", "gradients", "gradient_norms"), _doubled(32, 1024)),
    ),
    "T": Axis(
        "positions T",
        "two one-dimensional convolutions of 32 filters, mean, 4 outputs; 16 examples",
        dict.fromkeys(("weights", "gradients", "gradient_norms"), _doubled(16, 2048)),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), metavar="AXIS",
                        help=", ".join(AXES))  # fmt: skip
    parser.add_argument("--jobs", nargs="+", choices=JOBS, metavar="JOB", help="of an axis's own")
    parser.add_argument("--points", type=int, help="only so many of the smallest sizes")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--limit", default="2GiB", help="the memory limit given to perjac")
    here = pathlib.Path(__file__).parent
    parser.add_argument("--out", type=pathlib.Path, default=here / "results", help="a folder")
    options = parser.parse_args()
    found: dict[str, Any] = {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}",
        "threads": options.threads,
        "clock": options.clock,
        "limit": options.limit,
        "series": [],
    }
    for name in options.axes:
        for job in AXES[name].jobs:
            if options.jobs and job not in options.jobs:
                continue
            print(f"{JOBS[job].title} against {AXES[name].what} …", flush=True)
            points = _measured(name, job, options)
            found["series"].append(fitted(name, job, points))
            write(options.out, found)  # a run cut short leaves what it has
    print(markdown(found))


def _measured(axis: str, job: str, options: argparse.Namespace) -> list[dict]:
    """Run a series in a process of its own."""
    sizes = AXES[axis].jobs[job][: options.points]
    asked = {"axis": axis, "job": job, "sizes": sizes, "repeats": options.repeats,
             "clock": options.clock, "limit": options.limit}  # fmt: skip
    variables = {"CUDA_VISIBLE_DEVICES": "-1", **limited(options.threads)}
    command = [sys.executable, str(_WORKER), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    if done.returncode:
        sys.exit(f"The series cannot be measured:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def fitted(axis: str, job: str, points: list[dict]) -> dict[str, Any]:
    """Return a series with the laws of its time and its memory, where there are enough points."""
    series: dict[str, Any] = {"axis": axis, "what": AXES[axis].what, "job": job, "points": points}
    for quantity, least in (("ms", 0.0), ("mb", _COUNTS_MB)):
        count = [point for point in points if point[quantity] > least]
        series[quantity] = None
        if len(count) >= 4:
            law = fit.power([p["size"] for p in count], [p[quantity] for p in count])
            series[quantity] = dataclasses.asdict(law)
    return series


def write(folder: pathlib.Path, found: dict[str, Any]) -> None:
    """Write what has been measured: record, tables, chart."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "scaling.md").write_text(markdown(found) + "\n")
    charts.scaling(folder / "scaling.png", found["series"])


def markdown(found: dict[str, Any]) -> str:
    """Return the tables."""
    clock = "time on the clock" if found["clock"] == "wall" else "processor time of all threads"
    lines = [
        f"{found['machine']}, {found['threads']} thread(s), {clock}, `memory_limit="
        f'"{found["limit"]}"`. ' + " ".join(f"{a}: {AXES[a].net}." for a in _axes(found)),
        "",
        "| job | against | from, to | time from, to, ms | exponent of time | a call's own, ms "
        "| peak above idle from, to, MB | exponent of memory | under the limit |",
        "|---|---|---|---|---:|---:|---|---:|---|",
    ]
    for series in found["series"]:
        first, last = series["points"][0], series["points"][-1]
        time = series["ms"]
        lines.append(
            f"| {JOBS[series['job']].title} | {series['what']} | {first['size']}, {last['size']} "
            f"| {first['ms']:.3g}, {last['ms']:.3g} | {_exponent(time)} "
            f"| {format(time['offset'], '.2g') if time else '–'} "
            f"| {first['mb']:.1f}, {last['mb']:.1f} | {_exponent(series['mb'])} "
            f"| {_kept(series)} |"
        )
    return "\n".join(lines)


def _axes(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(series["axis"] for series in found["series"]))


def _exponent(law: dict | None) -> str:
    return f"{law['exponent']:.2f} ± {law['error']:.2f}" if law else "–"


def _kept(series: dict[str, Any]) -> str:
    over = [p["size"] for p in series["points"] if p["mb"] * 1e6 > p["limit_bytes"]]
    return f"**not at {', '.join(map(str, over))}**" if over else "at every size"


if __name__ == "__main__":
    main()
