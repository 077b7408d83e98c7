"""A pass over data that is stopped → a file beside the output, from which another run goes on."""

from __future__ import annotations

import dataclasses
import json
import zlib
from typing import Any

import numpy as np

from perjac._core.backend import host
from perjac.cli.fisher import Wanted
from perjac.errors import FileFormatError, InputError
from perjac.fisher import serialization
from perjac.fisher.blocks import BlockForm
from perjac.fisher.form import Form
from perjac.progress import Stopped

# Forms that are sums over the examples, in one pass: parts of them add up.
MERGED = ("diagonal", "kronecker", "blocks", "dense")
# What may differ between a run and the one that goes on from it.
_FREE = ("out", "damping", "top", "figures")


class Partial:
    """A form of the Fisher information, made in one run or several.

    Parameters
    ----------
    wanted : Wanted
        What a user asks for.
    fisher : Fisher
        Of the data.
    engine : Engine
        Of the model.
    data : tuple of arrays
        The examples, and the labels.

    Attributes
    ----------
    path : Path
        Where what is done is kept.
    done : int
        Of how many examples that is.
    """

    def __init__(self, wanted: Wanted, fisher: Any, engine: Any, data: Any):
        self._wanted, self._fisher, self._engine, self._data = wanted, fisher, engine, data
        self._before: BlockForm | None = None
        self.path = wanted.out.with_name(f"{wanted.out.stem}.partial.npz")

    @property
    def done(self) -> int:
        """Of how many examples there is something."""
        return 0 if self._before is None else self._before.examples

    def resume(self) -> None:
        """Take what an earlier run has kept, if there is something.

        Raises
        ------
        InputError
            If the form cannot be made of parts, or the run was of something else.
        """
        if self._wanted.form not in MERGED:
            raise InputError(
                f"--resume is for --form {', '.join(MERGED)}, which add up over examples. "
                f"Received: --form {self._wanted.form}."
            )
        if not self.path.exists():
            return
        before = serialization.load(self.path)
        with np.load(self.path, allow_pickle=False) as held:
            if "about/run" not in held.files:
                raise FileFormatError(f"{self.path} is no part of a run of perjac fisher.")
            theirs, mine = json.loads(str(held["about/run"])), self._run()
        other = [name for name in mine if theirs.get(name) != mine[name]]
        if other:
            named = {name: (theirs.get(name), mine[name]) for name in other if name != "data"}
            told = "; ".join(f"--{name} was {a}, is {b}" for name, (a, b) in named.items())
            raise InputError(
                f"{self.path} is of another run: {told or 'the weights or the data were others'}. "
                "Leave --resume out to start anew."
            )
        self._before = before

    def form(self) -> Form:
        """Return the form, of all examples.

        Raises
        ------
        Stopped
            If the work is; what is done is on disk then, if parts of the form add up.
        """
        if self._wanted.form == "spectrum":
            return self._fisher.exact()
        told = self._wanted.approximation
        how = {} if told is None else {"approximation": told}
        fisher = self._fisher.after(self.done) if self.done else self._fisher
        try:
            return self._whole(getattr(fisher, self._wanted.form)(**how))
        except Stopped:
            if fisher.partial is not None:
                self._before = self._whole(fisher.partial)
                run = {"run": json.dumps(self._run()), "of": self._fisher.examples}
                serialization.write(self.path, serialization.arrays(self._before), run)
            raise

    def stopped(self) -> str:
        """Return what to say of a run that was stopped."""
        out = self._wanted.out
        if self._wanted.form not in MERGED:
            return (
                f"Interrupted. Nothing is written to {out}: --form {self._wanted.form} cannot be "
                "made of parts."
            )
        if not self.done:
            return f"Interrupted. Nothing is written to {out}."
        return (
            f"Interrupted. Nothing is written to {out}; {self.done:,} of "
            f"{self._fisher.examples:,} examples are kept in {self.path}: --resume goes on."
        )

    def finish(self) -> None:
        """Take away what was kept of this run."""
        if self.done:
            self.path.unlink(missing_ok=True)

    def _whole(self, part: BlockForm) -> BlockForm:
        return part if self._before is None else self._before.merge(part)

    def _run(self) -> dict[str, Any]:
        """Return what has to be the same in a run that goes on."""
        asked = dataclasses.asdict(self._wanted)
        return {n: v for n, v in asked.items() if n not in _FREE} | {"data": self._digest()}

    def _digest(self) -> str:
        """Return a number that changes with the model's weights and with the data."""
        import tensorflow as tf

        found = [host.tf_variable(v).numpy() for v in self._engine._traces.weights.variables]
        held = [array for array in found if not np.issubdtype(array.dtype, np.integer)]
        digest = 0
        for array in [*held, *map(np.asarray, tf.nest.flatten(self._data))]:
            digest = zlib.crc32(repr(array.shape).encode(), digest)
            digest = zlib.crc32(array.tobytes(), digest)
        return f"{digest:08x}"
