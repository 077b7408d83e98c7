"""A batch → the rows of a square root of its Fisher information, F = Σ rowᵀ row.

The one place that knows which kind of information is asked for; forms are made of rows alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.autodiff import seeds
from perjac._core.autodiff.hessian_roots import ROOTS, column_count
from perjac._core.backend import host, memory
from perjac._core.factors.reductions import Question
from perjac._core.graph.names import before_link
from perjac._core.model.inputs import Batch
from perjac._core.model.losses import Objective, are_probabilities
from perjac._core.model.variables import Source
from perjac._rows import Rows
from perjac.errors import InputError, LossWarning, check_counts, check_one_of, warn
from perjac.fisher.likelihoods import LIKELIHOODS, chunks, hessians, root_of, sampled

KINDS = ("exact", "sampled", "empirical")
# Bytes asked for at a time, where memory does not set a lower limit.
_AT_ONCE = 2**30
# Fewer logits than these may lie between 0 and 1 by chance.
_TELLING = 8
# What the labels of a softmax or a sigmoid follow.
_OF_LINKS = {"Softmax": "categorical", "Sigmoid": "bernoulli"}
_INVERSE_LINKS = {"Softmax": tf.nn.softmax, "Sigmoid": tf.sigmoid}


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
        check_counts(least=0, seed=self.seed)
        self._is_loss = self.kind != "empirical" and self.likelihood not in LIKELIHOODS
        self._link, self._told = "", False
        if self.kind == "empirical":
            if self.of is not None:
                raise InputError(
                    "kind='empirical' is of the loss, which says itself what outputs it is of. "
                    f"Received: of={self.of!r}."
                )
        elif self.loss is not None:
            raise InputError(
                "loss= is for kind='empirical'; for the generalised Gauss-Newton matrix of a loss "
                f"give it as likelihood=. Received: loss={self.loss!r} with kind={self.kind!r}."
            )
        if self._is_loss and self.kind == "sampled":
            raise InputError(
                f"Labels can be drawn for likelihood= one of {LIKELIHOODS}. Received: "
                f"{self.likelihood!r}."
            )
        self._objective: Any = Objective(self.likelihood) if self._is_loss else None
        if isinstance(self.variance, bool) or not (
            isinstance(self.variance, (int, float, np.number)) and 0 < self.variance < np.inf
        ):
            raise InputError(
                f"Expected variance= above zero, or 'fitted'. Received: {self.variance!r}."
            )

    @property
    def has_variance(self) -> bool:
        """Whether there is a variance: the Gaussian's."""
        return self.kind != "empirical" and self.likelihood == "gaussian"

    def prepare(self, x: Batch, y: Any) -> list[Source]:
        """Settle the output and what is differentiated against, from a first few examples.

        Returns
        -------
        list of Source
            The weights.
        """
        if y is None and (self.kind == "empirical" or self._is_loss):
            asked = "" if self.kind == "empirical" else f" with likelihood={self.likelihood!r}"
            raise InputError(
                f"kind={self.kind!r}{asked} needs labels: give data as (x, y), or choose "
                f"likelihood= one of {LIKELIHOODS}."
            )
        if self.kind == "empirical":
            few = x.first(2), _first(y)
            sources = list(self.engine.gradients(*few, loss=self.loss, wrt=self.wrt).sources)
        else:
            self._settle(x)
            if self._is_loss:
                outputs, labels = self._traced(x.first(2), _first(y))
                doubt = self._objective.doubts(labels, lambda _: outputs)
                if doubt and not self._link:
                    warn(doubt, LossWarning)
            sources = self.engine._traces.of(x)[1].sources(self.wrt)
        strange = [source.key for source in sources if source.kind != "weight"]
        if strange:
            raise InputError(f"Expected wrt= as weights. Received: {', '.join(strange)}.")
        return sources

    def row_count(self, x: Batch) -> int:
        """Return K, the rows of each example."""
        if self.kind != "exact":
            return {"empirical": 1, "sampled": self.samples}[self.kind]
        traced, names = self.engine._traces.of(x)
        return column_count(self.likelihood, traced.row_shape(names.head(self.of)))

    def at_once(self, x: Batch, formed: int = 0) -> tuple[int, int]:
        """Return how many examples, and how many of their rows, fit into memory at a time.

        Parameters
        ----------
        x : Batch
            A few examples.
        formed : int
            Bytes that are made of each row, besides what it is held in.
        """
        limit = min(memory.limit(self.engine.memory_limit) or _AT_ONCE, _AT_ONCE)
        traced, names = self.engine._traces.of(x)
        heads = list(traced.program.heads.values())
        head = heads[0] if self.kind == "empirical" else names.head(self.of)
        rows = self.row_count(x)
        weights = [s for s in names.sources(self.wrt) if s.kind == "weight"]
        entries = [d.entries or d.source.size for d in traced.decisions(head, weights, rows)]
        held = sum(n * s.dtype.size for n, s in zip(entries, weights, strict=True))
        whole = 2 * traced.footprint(head)
        if self._is_loss:  # a Hessian in float64, its vectors, and what LAPACK works on
            hessian = 4 * 8 * rows**2
            memory.check(
                hessian, self.engine.memory_limit,
                f"The Hessian of a loss by an example's {rows} outputs",
                f"Choose likelihood= one of {LIKELIHOODS}, whose Hessians are known.",
            )  # fmt: skip
            whole += hessian
        each = whole + 2 * held + rows * formed
        if each <= limit:
            return max(1, limit // max(each, 1)), rows
        return 1, min(rows, max(1, int((limit - whole) / (2 * held / rows + formed))))

    def parts(self, x: Batch, y: Any, start: int, most: int) -> Iterator[Rows]:
        """Give the rows of a batch, at most so many of an example at a time."""
        if self.kind == "empirical":
            yield self.engine.gradients(x, y, loss=self.loss, wrt=self.wrt)
            return
        for asked in self._asked(x, y, start, most):
            yield self.engine.jacobian(x, wrt=self.wrt, of=self.of, **asked)

    def answers(
        self, question: Question, x: Batch, y: Any, start: int, most: int
    ) -> Iterator[dict[str, Any]]:
        """Give what a question makes of each of these parts, whose rows are not kept."""
        for asked in self._asked(x, y, start, most):
            yield self.engine._summed(question, x, wrt=self.wrt, of=self.of, **asked)

    def _asked(self, x: Batch, y: Any, start: int, most: int) -> Iterator[dict[str, Any]]:
        """Give what tells the engine which rows, at most so many of an example at a time."""
        if self.kind == "empirical":
            yield {"y": y, "loss": self.loss}
            return
        if self.kind == "exact" and not self._is_loss:
            traced, names = self.engine._traces.of(x)
            count = column_count(self.likelihood, traced.row_shape(names.head(self.of)))
            for columns in chunks(count, most):
                one_hot = self.likelihood not in ROOTS  # the Gaussian's root, but for its scale
                chosen = list(columns) if one_hot else seeds.of_root(self.likelihood, columns)
                yield {"outputs": chosen}
            return
        if self._is_loss:
            cotangents = self._roots(x, y, start)
        else:
            outputs = self.engine.outputs(x, of=self.of)
            cotangents = sampled(self.likelihood, outputs, self.samples, self.seed, start)
        for columns in chunks(cotangents.shape[1], most):
            yield {"cotangents": cotangents[:, columns.start : columns.stop]}

    @property
    def scale(self) -> float:
        """What F = Σ rowᵀ row is yet to be multiplied by."""
        return 1 / float(self.variance) if self.has_variance else 1.0

    def _roots(self, x: Batch, y: Any, start: int) -> np.ndarray:
        """Return the columns of S for each example, (B, K, *output_shape), of a loss."""
        name = _called(self.likelihood)
        outputs, labels = self._traced(x, y)
        roots = root_of(self._hessians(outputs, labels), start, name)
        if not np.any(roots) and not self._told:
            self._told = True
            warn(
                f"The loss {name!r} has no curvature by the output at any of examples {start} to "
                f"{start + len(roots) - 1}: their part of the generalised Gauss-Newton matrix is "
                "zero.",
                LossWarning,
            )
        return roots.reshape(*roots.shape[:2], *outputs.shape[1:])

    def _traced(self, x: Batch, y: Any) -> tuple[tf.Tensor, Any]:
        """Return outputs and labels, as the loss and its Hessian take them."""
        outputs = self.engine.outputs(x, of=self.of)
        labels = tf.nest.map_structure(tf.convert_to_tensor, y)
        self._hessians.get_concrete_function(outputs, labels)  # which settles what labels are
        self._objective.check_labels(labels)
        return outputs, labels

    @functools.cached_property
    def _hessians(self) -> Any:
        """Outputs and labels → the Hessian of each example's loss, (B, entries, entries)."""
        inverse = _INVERSE_LINKS.get(self._link, lambda z: z)

        def losses(z: tf.Tensor, labels: Any) -> tf.Tensor:
            p = inverse(z)  # Keras sees through it, and is exact where p is nearly 0 or 1
            return self._objective(p, {"output": p}, labels, ())

        return tf.function(functools.partial(hessians, losses), autograph=False)

    def _settle(self, x: Batch) -> None:
        """Find the output to differentiate: before the final softmax or sigmoid of the model."""
        wanted = _of_probabilities(self.likelihood) if self._is_loss else (self.likelihood,)
        traced, names = self.engine._traces.of(x)
        head = names.head(self.of)
        link = before_link(traced.program, head)[1]
        if _OF_LINKS.get(link) in wanted and self.of is None:
            self.of, self._link = "logits", link
        elif self.likelihood in _OF_LINKS.values():
            self._check_shape(link, traced.row_shape(head))
            key = ("looks like logits", head, self.likelihood)
            traced.once(key, lambda: self._check_logits(x))  # says so once

    def _check_shape(self, link: str, shape: tuple[int, ...]) -> None:
        """Raise where the output that was asked about cannot be logits."""
        if link in _OF_LINKS:
            raise InputError(
                f"likelihood={self.likelihood!r} is of logits, and the output ends with a {link}. "
                "Name what comes before it with of=."
            )
        if self.likelihood == "categorical" and (not shape or shape[-1] < 2):
            raise InputError(
                f"likelihood='categorical' needs a logit for each class. The output has shape "
                f"{('B', *shape)}: for a single one of yes or no choose 'bernoulli'."
            )

    def _check_logits(self, x: Batch) -> None:
        """Warn where the output that was asked about is hardly logits."""
        classes = self.likelihood == "categorical"
        outputs = np.asarray(self.engine.outputs(x, of=self.of))
        telling = classes or outputs.size >= _TELLING
        if outputs.size and telling and are_probabilities(outputs, classes):
            warn(
                f"likelihood={self.likelihood!r} takes the output for logits, and it looks like "
                "probabilities.",
                LossWarning,
            )


def _first(labels: Any) -> Any:
    """Return the labels of the first two examples."""
    return tf.nest.map_structure(lambda leaf: leaf[:2], labels)


def _called(loss: Any) -> str:
    """Return a loss as a user calls it."""
    return loss if isinstance(loss, str) else getattr(loss, "name", None) or repr(loss)


def _of_probabilities(loss: Any) -> tuple[str, ...]:
    """Return the likelihoods that a loss may be the logarithm of, where it takes probabilities."""
    fn = loss if isinstance(loss, (str, type)) else getattr(loss, "fn", loss)
    name = (fn if isinstance(fn, str) else getattr(fn, "__name__", "")).replace("_", "").lower()
    if hasattr(loss, "fn") and host.loss_options(loss).get("from_logits"):
        return ()
    if name in ("crossentropy", "ce"):
        return "categorical", "bernoulli"
    if not name.endswith("crossentropy") and name != "bce":
        return ()
    return ("bernoulli",) if name.startswith("b") else ("categorical",)
