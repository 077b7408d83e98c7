"""A data set, batch by batch, for as many passes as are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from perjac import progress
from perjac.errors import InputError


@dataclasses.dataclass(frozen=True)
class Stream:
    """Examples with or without labels: arrays, or a batched data set.

    Attributes
    ----------
    data : tf.data.Dataset or tuple
        Of (x,) or (x, y).
    size : int or None
        N, where it is known beforehand.
    """

    data: Any
    size: int | None

    @classmethod
    def of(cls, data: Any) -> Stream:
        """Return the user's data: x, (x, y), or a batched `tf.data.Dataset` of either.

        Raises
        ------
        InputError
            If it is something else, or there are no examples.
        """
        if isinstance(data, tf.data.Dataset):
            return cls(data, None)
        if isinstance(data, Iterator):
            raise InputError(
                "An iterator is used up by the first pass, and some questions take several. Give "
                "a batched tf.data.Dataset, which starts anew."
            )
        pair = _pair(data)
        sizes = {len(leaf) for part in pair for leaf in tf.nest.flatten(part)}
        if len(sizes) != 1:
            raise InputError(f"Expected as many labels as examples. Received: {sorted(sizes)}.")
        if sizes == {0}:
            raise InputError("Expected at least one example. Received: none.")
        return cls(pair, sizes.pop())

    def first(self) -> tuple[Any, Any]:
        """Return (x, y) of a few examples; y is None where there are no labels."""
        for x, y in self._elements():
            return _part(x, slice(0, 2)), _part(y, slice(0, 2))
        raise InputError("Expected at least one example. Received an empty data set.")

    def batches(self, most: int) -> Iterator[tuple[int, Any, Any]]:
        """Give (number of the first example, x, y) for at most so many examples at a time."""
        done = 0
        for x, y in self._elements():
            count = len(tf.nest.flatten(x)[0])
            if not count:
                continue
            pieces = -(-count // most)  # of nearly one size
            for piece in np.array_split(np.arange(count), pieces):
                where = slice(int(piece[0]), int(piece[-1]) + 1)
                yield done, _part(x, where), _part(y, where)
                done += len(piece)
                progress.tell(done, self.size or done)

    def _elements(self) -> Iterator[tuple[Any, Any]]:
        if not isinstance(self.data, tf.data.Dataset):
            yield (*self.data, None)[:2]
            return
        for element in self.data:
            yield (*_pair(element), None)[:2]


def _pair(data: Any) -> tuple:
    """Return (x,) or (x, y), as Keras reads them: a tuple is a pair, a list several inputs."""
    if not isinstance(data, tuple):
        pair = (data,)
    elif len(data) in (1, 2):
        pair = data if len(data) == 1 or data[1] is not None else data[:1]
    else:
        raise InputError(
            f"Expected data as x or (x, y). Received a tuple of {len(data)}: several inputs are "
            "given as a list, and weights of examples are not taken."
        )
    return tuple(_arrays(part) for part in pair)


def _arrays(part: Any) -> Any:
    """Return lists of numbers as an array, and everything else as it is."""
    leaves = tf.nest.flatten(part)
    if all(hasattr(leaf, "shape") for leaf in leaves):
        if any(len(leaf.shape) == 0 for leaf in leaves):
            raise InputError("Expected data as batches of examples. Received single numbers.")
        return part
    return np.asarray(part)


def _part(data: Any, where: slice) -> Any:
    return None if data is None else tf.nest.map_structure(lambda leaf: leaf[where], data)
