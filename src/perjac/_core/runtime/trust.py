"""What an engine says of itself: how each weight goes, whether it is right, and a file to run."""

from __future__ import annotations

import dataclasses
import math
import numbers
import pathlib
import warnings
from typing import Any

from perjac._core.autodiff import seeds
from perjac._core.backend.dtypes import at_least_float32
from perjac._core.backend.shapes import size
from perjac._core.graph.added_losses import LOSS
from perjac._core.model import inputs, inside_functions
from perjac._core.runtime import export
from perjac._core.runtime.inspection import Inspection
from perjac._core.runtime.live_model import Live
from perjac._core.runtime.objectives import Objectives
from perjac._core.runtime.session import Traces
from perjac._core.runtime.verification import Verification, verify
from perjac.errors import (
    DisconnectedWarning,
    InputError,
    NotPicklableError,
    PerjacError,
    check_counts,
    check_one_of,
)


class Trust:
    """The part of an engine that is about the engine.

    Attributes
    ----------
    traces : Traces
        Every trace of the model.
    """

    traces: Traces
    memory_limit: int | str | None
    _check: bool
    _objectives: Objectives

    def jacobian(self, x: Any, *, of: Any = None, outputs: Any = None) -> Any:
        """Differentiate each example's outputs."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotPicklableError(
            "An engine cannot be pickled or copied: it holds compiled programs. Pickle the model, "
            "or the path of its file, and make the Engine anew there."
        )

    def inspect(
        self, batch_size: int = 32, *, x: Any = None, of: Any = None, measure: bool = False
    ) -> Inspection:
        """Return how each trainable weight goes: its sites, rules, path, why, and the cost.

        Parameters
        ----------
        batch_size : int
            For the time and memory expected.
        x : array, optional
            An example batch, for a model that does not declare the shapes of its inputs.
        of : str, int or layer, optional
            As in `jacobian`.
        measure : bool
            Whether to run it, and tell the time and memory that it took; an engine with
            `autotune=True` does anyway.

        Returns
        -------
        Inspection
            A table: print it, or read its `rows` and `plan`.

        Notes
        -----
        The time expected is counted work over the machine's rates, which are measured the first
        time (half a second) and remembered. It is wrong by up to a factor of three where one
        kernel is much slower than its kind.
        """
        check_counts(batch_size=batch_size)
        inside_functions.refuse("inspect()")
        batch = self.traces.prepare(self.traces.example() if x is None else x)
        traced, names, head = self.traces.asked(batch, of, check=self._check)
        count = size(traced.row_shape(head))
        sources = names.sources("weights")
        chosen = seeds.make(None, None, batch_size, traced.row_shape(head), traced.dtype(head))
        plan = traced.plan(head, sources, batch, batch_size, chosen, self.memory_limit, measure)
        decisions = traced.decisions(head, sources, count)
        return Inspection.of(decisions, batch_size, count, plan, traced.independence(head))

    def verify(self, x: Any, *, of: Any = None, rtol: float | None = None) -> Verification:
        """Compare with a plain loop over examples and outputs, in float64.

        Parameters
        ----------
        x : array, or list, tuple or dict of arrays
            A few examples; the first 8 are looked at, and up to 10 outputs.
        of : str, int or layer, optional
            As in `jacobian`.
        rtol : float, optional
            The relative error allowed; by default 1e-10 in float64, 1e-4 in float32, 1e-2 below.

        Returns
        -------
        Verification
            With `verdict`, `passed` and the error of each weight.

        Notes
        -----
        The reference is the model itself, not perjac's trace of it: its layers computing in
        float64, a fresh trace of it in float64, or, where neither runs, a tape in its own type.
        Where outputs are saturated, so that plain TensorFlow loses their gradients to rounding, the
        comparison is made before the final softmax or sigmoid, and the note says so. Where that
        does not help, the verdict is "undecided" and `passed` is False.
        """
        inside_functions.refuse("verify()")
        if not (rtol is None or _is_positive(rtol)):
            raise InputError(f"Expected rtol= as a number above zero. Received: {rtol!r}.")
        batch = self.traces.prepare(x)
        if batch.size == 0:
            raise InputError("Expected at least one example to verify on. Received: none.")
        found = self._compared(batch, of, rtol)
        if found.verdict == "undecided" and of is None and self._has_logits(batch):
            before = self._compared(batch, "logits", rtol)
            if before.verdict != "undecided":
                note = "The outputs are saturated: compared before the final softmax or sigmoid."
                return dataclasses.replace(before, note=f"{note} {before.note}".strip())
        return found

    def _has_logits(self, batch: inputs.Batch) -> bool:
        try:
            self.traces.of(batch)[1].head("logits")
        except PerjacError:
            return False
        return True

    def _compared(self, batch: inputs.Batch, of: Any, rtol: float | None) -> Verification:
        """Compare the Jacobian of one output with the live model's."""
        traced, names = self.traces.of(batch)
        head, sources = names.head(of), names.sources("weights")
        logits = not traced.has_output(head)  # then it lies before the only output's end
        live = Live(
            traced.model(names.head(None) if logits else head),
            traced.layer,
            traced.program.weights,
            [s.index for s in sources],
            logits,
        )

        def jacobian(part: Any, rows: list[int]) -> Any:
            # The report names what is zero, and what a certificate would leave to the tape.
            with warnings.catch_warnings(), traced.uncertified():
                warnings.simplefilter("ignore", DisconnectedWarning)
                return self.jacobian(part, of=of, outputs=rows)

        return verify(live, batch, sources, size(traced.row_shape(head)), jacobian, rtol)

    def export(
        self,
        path: str | pathlib.Path,
        x: Any,
        y: Any = None,
        *,
        job: str = "jacobian",
        wrt: Any = "weights",
        of: Any = None,
        outputs: Any = None,
        loss: Any = None,
    ) -> pathlib.Path:
        """Write a compiled program for batches of one size, to be run without TensorFlow.

        Parameters
        ----------
        path : str or path
            Of the program, in StableHLO; beside it go a manifest of its arguments, `.json`, and
            the variables' values, `.npz`.
        x, y : as in `jacobian` and `gradients`
            Examples of the shapes, types and batch size that the program is for.
        job : {"jacobian", "diagonal", "gradients", "norms"}
            Rows of the Jacobian; Σ of their squares; gradients of each example's loss; their norms.
        wrt, of, outputs : as in `jacobian`
            `wrt="inputs"` gives the Jacobian by the inputs.
        loss : as in `gradients`
            For the last two jobs.

        Returns
        -------
        pathlib.Path
            Of the program. `perjac.pjrt.load` runs it.

        Raises
        ------
        PathError
            If some weight would need the tape path.
        InputError
            If XLA cannot compile it.
        """
        check_one_of(job, list(export.JOBS), "job")
        inside_functions.refuse("export()")
        batch, objective = self.traces.prepare(x), None
        if export.JOBS[job][1]:
            objective = self._objectives.of(loss, None, None)
            wide = at_least_float32(self.traces.floating)
            batch = inputs.beside(batch, wide, y=y, sample_weight=None)
        traced, names = self.traces.of(batch, objective)
        head, sources = names.head(of if objective is None else LOSS), names.sources(wrt)
        if self._check:
            traced.check_graph(head)
            traced.check_data(head, batch)
        traced.check_sources(head, sources)
        chosen = seeds.make(outputs, None, batch.size, traced.row_shape(head), traced.dtype(head))
        return export.write(path, job, traced, head, sources, batch, chosen)


def _is_positive(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and 0 < float(value) < math.inf
