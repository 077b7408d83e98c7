"""Rows G (M, P) of a batch, times flat vectors: G v, Gᵀ u and GᵀG.

Knows rows and flat vectors; must not know what information they are of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from perjac._rows import Rows
from perjac.fisher._columns import Columns

# Bytes of rows that are formed at once.
_FORMED = 2**28
# From so many vectors on, rows are formed where that is allowed: a query costs a millisecond more.
_MANY = 8


def pushed(rows: Rows, v: np.ndarray) -> np.ndarray:
    """Return G v, (M, m), for v (P, m)."""
    if _to_be_formed(rows, v.shape[1]):
        return _flat(rows, list(rows)) @ v
    found = [np.ravel(np.asarray(rows.jvp(column), "f8")) for column in v.T]
    return np.stack(found, 1) if found else np.zeros((row_count(rows), 0))


def pulled(rows: Rows, u: np.ndarray, columns: Columns) -> np.ndarray:
    """Return Gᵀ u, (P, m), for u (M, m)."""
    if _to_be_formed(rows, u.shape[1]):
        return _flat(rows, list(rows)).T @ u
    found = [columns.flat(rows.vjp(column.reshape(rows.shape[:-1]))) for column in u.T]
    return np.stack(found, 1) if found else np.zeros((columns.count, 0))


def second_moment(rows: Rows, keys: Sequence[str]) -> np.ndarray:
    """Return GᵀG of some weights, (p, p): their rows are formed."""
    flat = _flat(rows, keys)
    return flat.T @ flat


def _to_be_formed(rows: Rows, vectors: int) -> bool:
    return vectors >= _MANY and 2 * 8 * math.prod(rows.shape) <= _FORMED


def _flat(rows: Rows, keys: Sequence[str]) -> np.ndarray:
    """Form the rows of some weights, (M, p)."""
    sizes = {source.key: source.size for source in rows.sources}
    parts = [np.asarray(rows[key], "f8").reshape(-1, sizes[key]) for key in keys]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, 1)


def row_count(rows: Rows) -> int:
    """Return M, the rows of all examples."""
    return math.prod(rows.shape[:-1])
