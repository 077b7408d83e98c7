"""A batch → the rows of a square root of its Fisher information, F = Σ rowᵀ row.

The one place that knows which kind of information is asked for; forms are made of rows alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from perjac import memory, seeds
from perjac.errors import InputError, LossWarning, check_counts, check_one_of, warn
from perjac.fisher.likelihoods import LIKELIHOODS, chunks, root_of_hessian, sampled
from perjac.losses import Objective, are_probabilities, compiled
from perjac.naming import before_link
from perjac.roots import ROOTS
from perjac.rows import Rows
from perjac.shapes import size
from perjac.sources import Source

KINDS = ("exact", "sampled", "empirical")
# Bytes asked for at a time, where memory does not set a lower limit.
_AT_ONCE = 2**30
_LINKS = {"categorical": "Softmax", "bernoulli": "Sigmoid"}


@dataclasses.dataclass
class Root:
    """How rows are made.

    Attributes
    ----------
    engine : Engine
        Of the model.
    kind : str
        One of `KINDS`.
    likelihood : str, or a Keras loss or its name
        One of `LIKELIHOODS`, or a loss.
    variance : float
        The Gaussian's.
    loss : keras.Loss, str or callable, optional
        For kind "empirical".
    samples, seed : int
        For kind "sampled".
    wrt, of : as in `Engine.jacobian`
        The weights, and the output.
    """

    engine: Any
    kind: str
    likelihood: Any
    variance: float
    loss: Any
    samples: int
    seed: int
    wrt: Any
    of: Any

    def __post_init__(self):
        check_one_of(self.kind, KINDS, "kind")
        check_counts(samples=self.samples)
        self._is_loss = self.likelihood not in LIKELIHOODS
        if self.kind == "sampled" and self._is_loss:
            raise InputError(
                f"Labels can be drawn for likelihood= one of {LIKELIHOODS}. Received: "
                f"{self.likelihood!r}."
            )
        if not (isinstance(self.variance, (int, float)) and self.variance > 0):
            raise InputError(f"Expected variance= above zero. Received: {self.variance!r}.")

    def prepare(self, x: Any, y: Any) -> list[Source]:
        """Settle the output and what is differentiated against, from a first few examples.

        Returns
        -------
        list of Source
            The weights.
        """
        if y is None and (self.kind == "empirical" or self._is_loss):
            raise InputError(
                f"kind={self.kind!r} with likelihood={self.likelihood!r} needs labels: give data "
                "as (x, y)."
            )
        if self.kind == "empirical":
            self.loss = compiled(self.engine.model)[0] if self.loss is None else self.loss
            rows = self.engine.gradients(x, y, loss=self.loss, wrt=self.wrt)
            return list(rows.sources)
        self.of = self._logits(x)
        traced, names = self.engine.traces.of(self.engine.traces.prepare(x))
        sources = names.sources(self.wrt)
        strange = [source.key for source in sources if source.kind != "weight"]
        if strange:
            raise InputError(f"Expected wrt= as weights. Received: {', '.join(strange)}.")
        return sources

    def at_once(self, x: Any) -> tuple[int, int]:
        """Return how many examples, and how many of their rows, fit into memory at a time."""
        limit = min(memory.limit(self.engine.memory_limit) or _AT_ONCE, _AT_ONCE)
        batch = self.engine.traces.prepare(x)
        traced, names = self.engine.traces.of(batch)
        heads = list(traced.program.heads.values())
        head = heads[0] if self.kind == "empirical" else names.head(self.of)
        rows = {"empirical": 1, "sampled": self.samples}.get(self.kind)
        rows = rows or size(traced.row_shape(head))
        weights = [s for s in names.sources(self.wrt) if s.kind == "weight"]
        entries = [d.entries or d.source.size for d in traced.decisions(head, weights, rows)]
        held = sum(n * s.dtype.size for n, s in zip(entries, weights, strict=True))
        passed = 2 * traced.footprint(head)
        each = max((passed + 2 * held), 1)
        if each <= limit:
            return limit // each, rows
        return 1, max(1, int(rows * (limit - passed) / (2 * held)))

    def parts(self, x: Any, y: Any, start: int, most: int) -> Iterator[Rows]:
        """Give the rows of a batch, at most so many of an example at a time."""
        if self.kind == "empirical":
            yield self.engine.gradients(x, y, loss=self.loss, wrt=self.wrt)
            return
        if self.kind == "exact" and not self._is_loss:
            batch = self.engine.traces.prepare(x)
            traced, names = self.engine.traces.of(batch)
            count = size(traced.row_shape(names.head(self.of)))
            for columns in chunks(count, most):
                one_hot = self.likelihood not in ROOTS  # the Gaussian's root, but for its scale
                asked = list(columns) if one_hot else seeds.of_root(self.likelihood, columns)
                yield self._jacobian(x, outputs=asked)
            return
        outputs = self.engine.outputs(x, of=self.of)
        cotangents = self._cotangents(outputs, y, start)
        for columns in chunks(cotangents.shape[1], most):
            yield self._jacobian(x, cotangents=cotangents[:, columns.start : columns.stop])

    def _jacobian(self, x: Any, **asked: Any) -> Rows:
        return self.engine.jacobian(x, wrt=self.wrt, of=self.of, **asked)

    @property
    def scale(self) -> float:
        """What F = Σ rowᵀ row is yet to be multiplied by."""
        return 1 / self.variance if self.likelihood == "gaussian" else 1.0

    def _cotangents(self, outputs: tf.Tensor, y: Any, start: int) -> Any:
        """Return the columns of S for each example, (B, K, *output_shape)."""
        if self.kind == "sampled":
            return sampled(self.likelihood, outputs, self.samples, self.seed, start)
        objective = Objective(self.likelihood)
        return root_of_hessian(
            lambda z: objective(z, {"output": z}, y, ()), outputs, start, str(self.likelihood)
        )

    def _logits(self, x: Any) -> Any:
        """Return the output to differentiate: before the model's final softmax or sigmoid."""
        if self.likelihood not in _LINKS:
            return self.of
        batch = self.engine.traces.prepare(x)
        traced, names = self.engine.traces.of(batch)
        head = names.head(self.of)
        link = before_link(traced.program, head)[1]
        if link == _LINKS[self.likelihood] and self.of is None:
            return "logits"
        if link in _LINKS.values():
            raise InputError(
                f"likelihood={self.likelihood!r} is of logits, and the output ends with a {link}. "
                "Name what comes before it with of=."
            )
        shape = traced.row_shape(head)
        if self.likelihood == "categorical" and (not shape or shape[-1] < 2):
            raise InputError(
                f"likelihood='categorical' needs a logit for each class. The output has shape "
                f"{('B', *shape)}: for a single one of yes or no choose 'bernoulli'."
            )
        outputs = np.asarray(self.engine.outputs(x, of=self.of))
        if are_probabilities(outputs, self.likelihood == "categorical"):
            warn(
                f"likelihood={self.likelihood!r} takes the output for logits, and it looks like "
                "probabilities.",
                LossWarning,
            )
        return self.of
