"""A data set, batch by batch, for as many passes as are asked for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from perjac import progress
from perjac.errors import InputError


@dataclasses.dataclass
class Stream:
    """Examples with or without labels: arrays, or a batched data set.

    Attributes
    ----------
    data : tf.data.Dataset or tuple
        Of (x,) or (x, y).
    size : int or None
        N, where it is known: of a data set once it was read to its end.
    """

    data: Any
    size: int | None
    _begun: Any = None  # what the look at the first examples has read, and the rest after it
    _least: int = 0  # how many examples were seen in a pass, be it to the end or not

    @classmethod
    def of(cls, data: Any) -> Stream:
        """Return the user's data: x, (x, y), or a batched `tf.data.Dataset` of either.

        Raises
        ------
        InputError
            If it is something else, or there are no examples.
        """
        if isinstance(data, tf.data.Dataset):
            if data.cardinality() == tf.data.INFINITE_CARDINALITY:
                raise InputError(
                    "Expected data that ends. Received a Dataset that repeats for ever."
                )
            return cls(data, None)
        if isinstance(data, Iterator):
            raise InputError(
                "An iterator is used up by the first pass, and some questions take several. Give "
                "a batched tf.data.Dataset, which starts anew."
            )
        pair = _pair(data)
        size = _count(*pair)
        if not size:
            raise InputError("Expected at least one example. Received: none.")
        return cls(pair, size)

    def first(self, count: int = 2) -> tuple[Any, Any]:
        """Return (x, y) of the first few examples; y is None where there are no labels.

        What is read for it is not read again: the first pass goes on from there.
        """
        elements = self._elements()
        for x, y in elements:
            if _count(x):
                self._begun = itertools.chain([(x, y)], elements)
                return _part(x, slice(0, count)), _part(y, slice(0, count))
        raise InputError("Expected at least one example. Received an empty data set.")

    def batches(self, most: int, start: int = 0) -> Iterator[tuple[int, Any, Any]]:
        """Give (number of the first example, x, y) for at most so many examples at a time.

        Those before number `start` are left out.

        Raises
        ------
        InputError
            If there are not as many examples as in the last pass.
        """
        done = 0
        for x, y in self._elements():
            count = _count(x) if y is None else _count(x, y)
            if not count:
                continue
            skipped = min(max(start - done, 0), count)
            done += skipped
            pieces = -(-(count - skipped) // most)  # of nearly one size
            for piece in np.array_split(np.arange(skipped, count), max(pieces, 1)):
                if not len(piece):
                    continue
                where = slice(int(piece[0]), int(piece[-1]) + 1)
                whole = len(piece) == count
                yield done, x if whole else _part(x, where), y if whole else _part(y, where)
                done += len(piece)
                self._least = max(self._least, done)
                progress.tell(done, self.size or done)
        if done != (self.size or max(done, self._least)):
            raise InputError(
                f"Expected the same examples in each pass over the data. Received: {self._least} "
                f"the last time, {done} now. Does the Dataset stand on a generator that is used up?"
            )
        self.size = done

    def _elements(self) -> Iterator[tuple[Any, Any]]:
        if self._begun is not None:
            begun, self._begun = self._begun, None
            return begun
        whole = not isinstance(self.data, tf.data.Dataset)
        pairs = [self.data] if whole else map(_pair, self.data)
        return ((pair[0], pair[1] if len(pair) > 1 else None) for pair in pairs)


def _count(*parts: Any) -> int:
    """Return how many examples there are in x, or in x and y alike."""
    sizes = {len(leaf) for part in parts for leaf in tf.nest.flatten(part)}
    if len(sizes) != 1:
        raise InputError(f"Expected as many labels as examples. Received: {sorted(sizes)}.")
    return sizes.pop()


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
