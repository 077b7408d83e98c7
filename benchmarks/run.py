"""perjac beside its peers on this machine: each in its own process, checked first, timed in turn.

    python benchmarks/run.py --jobs weights inputs --models cnn --repeats 9

prints tables, and writes them, every single time and a chart to benchmarks/results. The peers'
environments are made by benchmarks/environments.py. Absolute times are worth little from machine to
machine: compare only inside a job.

    python benchmarks/run.py --carried FOLDER

runs what benchmarks/carry.py wrote, without TensorFlow, on the GPU that JAX finds or else on the
processor.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import report
from compare import Cell
from jobs import JOBS
from models import MODELS
from peers import CARRIED, OURS, PEERS
from process import LeftOut, Process

# "tiny" is for the harness's own tests.
_DEFAULT_MODELS = [name for name in MODELS if name != "tiny"]


def main() -> None:
    options = _options()
    results: list[dict] = []
    about: dict[str, Any] = {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}",
        "cores": os.cpu_count(),
        "threads": options.threads,
        "clock": options.clock,
        "load": [_load(), None],
        "python": platform.python_version(),
        "repeats": options.repeats,
        "versions": {},
        "absent": {},
        "carried": bool(options.carried),
        "device": "",
    }
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            crew = Crew(name, options, pathlib.Path(folder))
            about["versions"] |= crew.versions
            about["absent"] |= crew.absent
            about["device"] = about["device"] or crew.device
            try:
                for result in _model(name, crew, options):
                    results.append(result)
                    about["load"][1] = _load()
                    report.write(options.out, results, about)  # a run cut short leaves what it has
            finally:
                crew.end()
    print(f"Written: {', '.join(str(file) for file in report.files(options.out))}")


def _model(name: str, crew: Crew, options: argparse.Namespace) -> Iterator[dict]:
    """Run every job that is asked of a model."""
    for job in options.jobs:
        model, about, expected = MODELS[name], JOBS[job], None
        if options.carried:
            if job not in crew.carried["jobs"]:
                continue
            examples = crew.carried["jobs"][job]["examples"]
            expected = crew.carried["jobs"][job]["expected"]
        elif not model.asks(job) or (model.tokens and job == "inputs"):
            continue
        else:
            examples = min(options.batch or about.examples or model.examples, crew.examples)
        print(f"{about.title}, {name}, {examples} examples …", flush=True)
        about = dataclasses.replace(about, tolerance=max(about.tolerance, model.tolerance))
        cell = Cell(job, about, examples, crew.folder, options.clock, expected)
        crew.work_on(cell)
        cell.time(crew.processes, options.repeats)
        result = {
            "job": job,
            "model": name,
            "examples": examples,
            "bytes": cell.answer_bytes,
            "ways": cell.timed,
        }
        print(report.table(result), "\n", flush=True)
        yield result


class Crew:
    """The processes of all peers for one model, and who is absent."""

    def __init__(self, model: str, options: argparse.Namespace, folder: pathlib.Path):
        self.folder, self._options = folder, options
        self._peers = CARRIED if options.carried else PEERS
        self.carried: dict[str, Any] = {}
        self.processes: dict[str, Process] = {}
        self.versions: dict[str, str] = {}
        self.absent: dict[str, str] = {}
        self.device = ""
        if options.carried:
            place = options.carried / model
            self.carried = json.loads((place / "carried.json").read_text())
            self._work, self.examples = place / "work.npz", self.carried["examples"]
        else:
            self._work, self.examples = folder / "work.npz", options.batch or MODELS[model].examples
            _write_work(self._work, model, self.examples)
        self._start([name for name in self._peers if name in (OURS, *options.peers)])

    def _start(self, names: list[str]) -> None:
        """Start processes, all of them before the first is waited for."""
        for name in names:
            try:
                self.processes[name] = Process(
                    name,
                    self._peers[name],
                    self._work,
                    self.folder,
                    self._options.python,
                    self._options.limit,
                    self._options.threads,
                    card=bool(self._options.carried),
                )
            except LeftOut as failure:
                self._miss(name, failure)
        for name in names:
            if name not in self.processes:
                continue
            try:
                hello = self.processes[name].hello
                self.versions |= hello["versions"]
                self.device = hello["device"] if name == OURS else self.device
            except LeftOut as failure:
                self.processes.pop(name).end()
                self._miss(name, failure)

    def _miss(self, name: str, failure: LeftOut) -> None:
        self.absent[name] = str(failure)
        print(f"{name} is left out: {failure}", flush=True)

    def work_on(self, cell: Cell) -> None:
        """Have every peer's ways checked; a process that was lost is started anew."""
        for name in list(self.processes):
            if not self.processes[name].alive:
                self._restart(name)
            while name in self.processes and not cell.check(self.processes[name]):
                self._restart(name)

    def _restart(self, name: str) -> None:
        self.processes.pop(name).end()
        self._start([name])

    def end(self) -> None:
        """End all processes."""
        for process in self.processes.values():
            process.end()
        self.processes.clear()


def _write_work(file: pathlib.Path, model: str, examples: int) -> None:
    """Write weights, inputs and labels, which every process reads."""
    writer = pathlib.Path(__file__).parent / "workers" / "write_work.py"
    command = [sys.executable, str(writer), model, str(examples), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"The model {model} cannot be made:\n{done.stderr}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="JOB",
                        help=", ".join(JOBS))  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL",
                        help=", ".join(MODELS))  # fmt: skip
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), metavar="PEER",
                        help=f"{', '.join(PEERS)}; {OURS} always takes part")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, help="examples, in place of each model's number")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each library")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu, with --threads 1, where the machine has other work")  # fmt: skip
    parser.add_argument("--limit", type=float, default=60, help="seconds that a call may take")
    parser.add_argument("--carried", type=pathlib.Path, metavar="FOLDER",
                        help="run the programs in it, which carry.py wrote")  # fmt: skip
    parser.add_argument("--python", nargs="*", default=[], metavar="NAME=PATH", type=_pair,
                        help="a Python to take for an environment")  # fmt: skip
    here = pathlib.Path(__file__).parent
    parser.add_argument("--out", type=pathlib.Path, default=here / "results", help="a folder")
    options = parser.parse_args()
    options.python = dict(options.python)
    if options.carried:
        there = [file.parent.name for file in sorted(options.carried.glob("*/carried.json"))]
        if not there:
            parser.error(f"There is nothing of carry.py's in {options.carried}.")
        options.models = [name for name in options.models or there if name in there]
        if "torch" not in options.python and importlib.util.find_spec("torch"):
            options.python["torch"] = sys.executable  # a machine with one Python for everything
    options.models = options.models or _DEFAULT_MODELS
    return options


def _pair(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"Expected NAME=PATH. Received: {text!r}.")
    return name, path


def _load() -> float | None:
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


if __name__ == "__main__":
    main()
