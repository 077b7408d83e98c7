"""Arrays of a batch's length that a loss closes over: seen in the graph, where they meet the data.

The batch is unknown in a trace, so an operation that takes data of unknown length and an array of n
rows, and whose result has n rows, has brought the two together example by example.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from perjac.errors import InputError


def check(operations: Iterable[Any], data: Iterable[tf.Tensor], loss: str) -> None:
    """Raise where examples meet rows that are no part of the batch.

    Parameters
    ----------
    operations : iterable of tf.Operation
        Those of the loss, in the order they were made.
    data : iterable of tf.Tensor
        Outputs, labels and weights, their first axis unknown.
    loss : str
        What to call the loss.

    Raises
    ------
    InputError
        Naming what to use instead.
    """
    known = {t.name for t in data}
    for op in operations:
        mine = [t for t in op.inputs if t.name in known]
        if not mine:
            continue
        known.update(t.name for t in op.outputs)
        rows = _met(op, mine, [t for t in op.inputs if t.name not in known])
        if rows:
            raise refusal(loss, rows)


def refusal(loss: str, rows: int) -> InputError:
    """Return what is raised for a loss that closes over so many rows."""
    return InputError(
        f"The loss {loss!r} closes over an array of {rows} rows, one for each example of a batch. "
        "What is traced for this batch would keep them for the next one. Give weights of the "
        "examples as sample_weight=, and anything else of each example within y=, which a loss "
        "function gets as it is, for example y=(labels, advantages)."
    )


def _met(op: Any, data: list[tf.Tensor], others: list[tf.Tensor]) -> int:
    """Return how many rows meet examples at an operation, or 0."""
    if op.type == "Reshape":  # whose second operand holds lengths, not rows
        return 0
    unknown = {t.shape.rank for t in data if t.shape.rank and t.shape[0] is None}
    results = {t.shape[0] for t in op.outputs if t.shape.rank}
    for other in others:
        rows = other.shape[0] if other.shape.rank else None
        if rows not in (None, 0, 1) and rows in results and other.shape.rank in unknown:
            return rows
    return 0
