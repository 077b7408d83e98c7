"""A peer's process, as the orchestrator sees it: started, asked in lines of JSON, and ended."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import queue
import subprocess
import threading
from typing import Any

import environments
from peers import Peer

_WORKERS = pathlib.Path(__file__).resolve().parent / "workers"
_START_S = 180.0
# All on the processor: libraries that find a GPU would be compared with others that do not.
_ON_PROCESSOR = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
# Several processes share the card's memory; and float32 means float32, not TensorFloat-32.
_ON_CARD = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "NVIDIA_TF32_OVERRIDE": "0",
}


class LeftOut(Exception):
    """Why a peer, or one of its ways, has no figures."""


class Process:
    """A running worker.

    Parameters
    ----------
    name : str
        The peer's.
    peer : Peer
        Which worker, and where.
    work : pathlib.Path
        The work file.
    log : pathlib.Path
        A folder for what the worker prints.
    pythons : dict of str to str
        Pythons to take for environments, by name.
    limit_s : float
        How long an answer may take.
    threads : int
        For each library.
    card : bool
        Whether it may find a GPU.

    Raises
    ------
    LeftOut
        If it cannot be started.
    """

    def __init__(
        self,
        name: str,
        peer: Peer,
        work: pathlib.Path,
        log: pathlib.Path,
        pythons: dict[str, str],
        limit_s: float,
        threads: int,
        card: bool = False,
    ):
        self.name, self._limit_s = name, limit_s
        if peer.package and not importlib.util.find_spec(peer.package):
            raise LeftOut(f"the project's Python has no {peer.package}")
        try:
            command, variables = environments.found(peer.environment, pythons)
        except environments.NoEnvironment as failure:
            raise LeftOut(f"no environment: {failure}") from None
        self._log = log / f"{name}.log"
        variables |= _ON_CARD if card else _ON_PROCESSOR
        variables |= limited(threads)
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [*command, str(_WORKERS / peer.worker), str(work)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # Nothing is known from an earlier run: what choosing takes is part of a first call.
                env=os.environ | {"PERJAC_CACHE": "off"} | variables,
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @functools.cached_property
    def hello(self) -> dict[str, Any]:
        """What the worker says first: "jobs", "versions", "device", "idle_mb".

        Raises
        ------
        LeftOut
            If it does not come so far.
        """
        return self._answer(_START_S)

    def ask(self, do: str, **about: Any) -> dict[str, Any]:
        """Return the answer to a question.

        Raises
        ------
        LeftOut
            If the worker says that it failed, dies, or takes too long: then it is ended, and
            `alive` is False.
        """
        try:
            print(json.dumps({"do": do, **about}), file=self._process.stdin, flush=True)
        except OSError:
            raise LeftOut(self._last_words()) from None
        return self._answer(self._limit_s)

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def _answer(self, limit_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            self.end()
            raise LeftOut(f"took longer than {limit_s:.0f} s") from None
        if not line:
            self._process.wait()
            raise LeftOut(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise LeftOut(answer["error"])
        return answer

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["without a word"]
        return f"its process ended ({self._process.poll()}): {lines[-1][:160]}"


def limited(threads: int) -> dict[str, str]:
    """Return what keeps OpenMP's libraries, TensorFlow and XLA to so many threads."""
    number = str(threads)
    names = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "NPROC")
    variables = dict.fromkeys(names, number)
    if threads == 1:
        variables["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    return variables
