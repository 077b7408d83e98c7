"""Points asked of a model that works on batches of one size: each at its example's own place.

What such a model remembers between batches belongs to places in the batch, so that a point may
stand only where its example stands.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def rounds(owners: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Deal points out to batches of all examples in their order.

    Parameters
    ----------
    owners : array of int (N,)
        Which example each point belongs to.
    size : int
        B.

    Yields
    ------
    points : array of int (B,)
        A point for each example; -1 where none is left, for the example itself.
    where : array of int
        The examples that have one.

    Examples
    --------
    >>> [points.tolist() for points, _ in rounds(np.array([0, 0, 1]), 2)]
    [[0, 2], [1, -1]]
    """
    left = [list(np.flatnonzero(owners == b)) for b in range(size)]
    while any(left):
        points = np.array([mine.pop(0) if mine else -1 for mine in left])
        yield points, np.flatnonzero(points >= 0)
