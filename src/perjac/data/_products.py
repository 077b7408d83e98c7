"""Two data sets → all inner products of their gradients, block by block, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from perjac._core.backend import memory
from perjac.data._batches import Examples, gradients
from perjac.engine import Engine
from perjac.gradients import Gradients

# Of what memory allows: for the gradients of one side that are kept while the other goes by.
_SHARE = 0.25

Block = tuple[slice, slice, np.ndarray]


def inner_products(
    engine: Engine,
    queries: Examples,
    others: Examples,
    *,
    batch_size: int,
    loss: Any,
    wrt: Any,
    cosine: bool = False,
) -> Iterator[Block]:
    """Give ⟨g_q, g_n⟩ of all pairs, or their cosines, as blocks (queries, others, products).

    As many batches of queries as fit a quarter of the memory that is free are kept as what their
    gradients are made of, and the others go by once for each such group.
    """
    options = {"loss": loss, "wrt": wrt}
    stream = gradients(engine, queries, batch_size, **options)
    for group in _groups(stream):
        sides = [(where, grads, _norms(grads) if cosine else None) for where, grads in group]
        for columns, other in gradients(engine, others, batch_size, **options):
            lengths = _norms(other) if cosine else None
            for rows, grads, own in sides:
                products = np.asarray(grads.gram(other))
                if own is not None and lengths is not None:
                    products = _over(products, own, lengths)
                yield rows, columns, products


def projected_products(
    engine: Engine,
    queries: Examples,
    others: Examples,
    *,
    batch_size: int,
    loss: Any,
    wrt: Any,
    dim: int,
    seed: int,
    cosine: bool = False,
) -> Iterator[Block]:
    """Give what `inner_products` does, of gradients projected to `dim` numbers."""
    options = {"loss": loss, "wrt": wrt}
    rows = np.concatenate(
        [
            np.asarray(g.project(dim, seed))
            for _, g in gradients(engine, queries, batch_size, **options)
        ]
    )
    own = np.linalg.norm(rows, axis=1)
    for columns, grads in gradients(engine, others, batch_size, **options):
        other = np.asarray(grads.project(dim, seed))
        products = rows @ other.T
        if cosine:
            products = _over(products, own, np.linalg.norm(other, axis=1))
        yield slice(0, queries.size), columns, products


def _groups(stream: Iterator[tuple[slice, Gradients]]) -> Iterator[list[tuple[slice, Gradients]]]:
    """Cut a stream into groups that may be kept at once: of one batch at least."""
    allowed = (memory.limit(None) or np.inf) * _SHARE
    group: list[tuple[slice, Gradients]] = []
    for where, grads in stream:
        group.append((where, grads))
        if (len(group) + 1) * grads.nbytes > allowed:
            yield group
            group = []
    if group:
        yield group


def _norms(grads: Gradients) -> np.ndarray:
    return np.asarray(grads.norms())


def _over(products: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the cosines of inner products; 0 beside a gradient of zero."""
    lengths = np.outer(rows, columns)
    cosines = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    return np.clip(cosines, -1, 1)
