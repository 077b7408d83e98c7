"""The losses that an engine was asked about: each known once, and what they are given checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perjac._core.backend.dtypes import at_least_float32
from perjac._core.graph.added_losses import BEHIND
from perjac._core.model import inside_functions
from perjac._core.model.closures import Key
from perjac._core.model.compiled_loss import CompiledLoss
from perjac._core.model.inputs import Batch, beside
from perjac._core.model.losses import Objective
from perjac._core.runtime.session import Traces
from perjac.errors import LossWarning, warn

# Examples whose outputs are looked at, to tell whether they are what the loss takes them for.
_FEW = 32


class Objectives:
    """The objectives of one model.

    Parameters
    ----------
    model : keras.Model or callable
        For the loss that it was compiled with.
    traces : Traces
        Of it.
    """

    def __init__(self, model: Any, traces: Traces):
        self._model, self._traces = model, traces
        self._known: dict[Key, Objective] = {}
        self._doubted: set[Key] = set()  # those whose outputs were looked at
        self._generation = 0  # of the model that these are of

    def of(
        self, loss: Any, loss_weights: Any, class_weight: Mapping[int, float] | None
    ) -> Objective:
        """Return the objective of a loss, the compiled one for None; the same for equal ones."""
        if self._generation != self._traces.refresh():  # the model has changed, so has its output
            self._generation = self._traces.refresh()
            self._known.clear()
            self._doubted.clear()
        if loss is None:
            new: Objective = CompiledLoss(self._model, loss_weights, class_weight)
        else:
            new = Objective(loss, loss_weights, class_weight)
        return self._known.setdefault(new.key, new)

    def labelled(self, objective: Objective, x: Any, y: Any, sample_weight: Any) -> Batch:
        """Return a batch of examples with their labels, checked."""
        given, wide = self._traces.prepare(x), at_least_float32(self._traces.floating)
        batch = beside(given, wide, y=y, sample_weight=sample_weight)
        self.check(objective, batch)
        return batch

    def check(
        self,
        objective: Objective,
        batch: Batch,
    ) -> None:
        """Raise for labels that cannot be, and warn, once, of outputs that are no probabilities.

        Parameters
        ----------
        objective : Objective
            What is asked about.
        batch : Batch
            The examples with their labels.
        """
        if inside_functions.is_inside():
            inside_functions.check(batch)
            made_up = inside_functions.stand_in(batch)
            with inside_functions.outside("The loss"):
                self.check(objective, made_up)
            return
        traced, names = self._traces.of(batch, objective)
        if batch.size == 0:
            return
        objective.check_labels(batch.y)
        if objective.key in self._doubted:
            return
        self._doubted.add(objective.key)
        few = batch.first(_FEW)
        doubt = objective.doubts(
            batch.y, lambda head: traced.outputs(names.head(BEHIND.format(head)), few)
        )
        if doubt:
            warn(doubt, LossWarning)
