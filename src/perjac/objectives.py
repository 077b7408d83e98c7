"""The losses that an engine was asked about: each known once, and what they are given checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perjac.errors import LossWarning, warn
from perjac.inputs import Batch
from perjac.losses import Objective, compiled
from perjac.traces import BEHIND, Traces

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
        self._known: dict[tuple, Objective] = {}
        self._generation = 0  # of the model that these are of
        self._doubted: set[tuple] = set()  # those whose outputs were looked at

    def of(
        self, loss: Any, loss_weights: Any, class_weight: Mapping[int, float] | None
    ) -> Objective:
        """Return the objective of a loss, the compiled one for None; the same for equal ones."""
        if self._generation != self._traces.refresh():  # the model has changed, so has its output
            self._generation = self._traces.refresh()
            self._known.clear()
            self._doubted.clear()
        if loss is None:
            loss, weights = compiled(self._model)
            loss_weights = weights if loss_weights is None else loss_weights
        new = Objective(loss, loss_weights, class_weight)
        return self._known.setdefault(new.key, new)

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
