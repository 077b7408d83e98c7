"""A data set → its gradients, batch by batch, in the memory of one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from perjac.engine import Engine
from perjac.errors import InputError, PerjacError, check_counts
from perjac.gradients import Gradients


@dataclasses.dataclass(frozen=True)
class Examples:
    """N examples with their labels, as the user holds them.

    Attributes
    ----------
    x, y : array, or list, tuple or dict of arrays
        The examples in front; `y` may be None.
    size : int
        N.
    """

    x: Any
    y: Any
    size: int

    @classmethod
    def of(cls, x: Any, y: Any, called: str = "") -> Examples:
        """Return the user's data, or raise where it is not N examples with N labels.

        `called` is what the arguments end with, for the message: "_train" of `x_train`.
        """
        x, y = _arrays(x), _arrays(y)
        sizes = {
            name: sorted({_length(leaf, name) for leaf in tf.nest.flatten(part)})
            for name, part in (("x" + called, x), ("y" + called, y))
            if part is not None
        }
        found = sorted({size for each in sizes.values() for size in each})
        if len(found) != 1:
            raise InputError(f"Expected the same number of examples in all. Received: {sizes}.")
        if found[0] == 0:
            raise InputError(f"Expected at least one example in x{called}. Received: none.")
        return cls(x, y, found[0])

    def part(self, chosen: slice | np.ndarray) -> Examples:
        """Return some of the examples: a slice, or their numbers."""
        x, y = (
            part if part is None else tf.nest.map_structure(lambda leaf: _rows(leaf, chosen), part)
            for part in (self.x, self.y)
        )
        size = len(chosen) if isinstance(chosen, np.ndarray) else len(range(self.size)[chosen])
        return Examples(x, y, size)

    def batches(self, batch_size: int) -> Iterator[tuple[slice, Examples]]:
        """Give each batch with the examples that it holds."""
        check_counts(batch_size=batch_size)
        for start in range(0, self.size, batch_size):
            where = slice(start, min(start + batch_size, self.size))
            yield where, self.part(where)


def gradients(
    engine: Engine, examples: Examples, batch_size: int, *, loss: Any, wrt: Any
) -> Iterator[tuple[slice, Gradients]]:
    """Give the gradients of each batch with the examples that it holds."""
    for where, batch in examples.batches(batch_size):
        try:
            grads = engine.gradients(batch.x, batch.y, loss=loss, wrt=wrt)
        except PerjacError as failure:
            if where.start:
                failure.add_note(f"Examples are counted from number {where.start}.")
            raise
        yield where, grads


def engine_of(model: Any) -> Engine:
    """Return an engine as it is, or one of a model."""
    return model if isinstance(model, Engine) else Engine(model)


def _arrays(data: Any) -> Any:
    """Return nested lists of numbers as one array, and everything else as it is."""
    if data is None or any(hasattr(leaf, "shape") for leaf in tf.nest.flatten(data)):
        return data
    return np.asarray(data)


def _length(leaf: Any, name: str) -> int:
    if not len(getattr(leaf, "shape", ())):
        raise InputError(f"Expected {name} as arrays of examples. Received: {leaf!r:.100}.")
    return int(leaf.shape[0])


def _rows(leaf: Any, chosen: slice | np.ndarray) -> Any:
    if isinstance(chosen, np.ndarray) and isinstance(leaf, tf.Tensor):
        return tf.gather(leaf, chosen)
    return leaf[chosen]
