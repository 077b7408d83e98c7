"""Which examples the entries of a tensor belong to, as arrays that know nothing of TensorFlow.

An entry belongs to the examples whose outputs it reaches: to none, to one, or to several.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

Dims = tuple[int, ...]
_NOBODY = np.iinfo(np.int32).max  # the first owner of what belongs to nobody; its last one is -1


@dataclasses.dataclass(frozen=True)
class Owners:
    """The owners of a tensor's entries.

    Attributes
    ----------
    first, last : np.ndarray of int32
        The lowest and the highest number of an entry's owners. Along an axis on which they do not
        change, the arrays have length 1.
    unclear : str
        Why the entries may have further owners, or nothing where they have not.
    """

    first: np.ndarray
    last: np.ndarray
    unclear: str = ""

    @classmethod
    def nobody(cls, rank: int, unclear: str = "") -> Owners:
        """Return the owners of entries that reach no output."""
        ones = (1,) * rank
        return cls(np.full(ones, _NOBODY, np.int32), np.full(ones, -1, np.int32), unclear)

    @classmethod
    def rows(cls, count: int, rank: int) -> Owners:
        """Return the owners of (B, ...), each row being one example's."""
        own = np.arange(count, dtype=np.int32).reshape(count, *[1] * (rank - 1))
        return cls(own, own)

    @classmethod
    def entry(cls, shape: Dims, place: Dims) -> Owners:
        """Return the owners where one entry belongs to example 0, and the others to nobody."""
        first, last = np.full(shape, _NOBODY, np.int32), np.full(shape, -1, np.int32)
        first[place] = last[place] = 0
        return cls(first, last)

    @property
    def rank(self) -> int:
        """The tensor's rank."""
        return self.first.ndim

    @property
    def is_nobody(self) -> bool:
        """Whether no entry reaches an output, as far as is known."""
        return bool((self.last < 0).all())

    @property
    def is_shared(self) -> bool:
        """Whether some entry is known to belong to several examples."""
        return bool((self.first < self.last).any())

    def __or__(self, other: Owners) -> Owners:
        if self is other:
            return self
        first, last = np.minimum(self.first, other.first), np.maximum(self.last, other.last)
        return Owners(first, last, self.unclear or other.unclear).compact()

    def same(self, other: Owners) -> bool:
        """Tell whether these are the same owners."""
        return self.unclear == other.unclear and all(
            bool(np.equal(*np.broadcast_arrays(a, b)).all())
            for a, b in ((self.first, other.first), (self.last, other.last))
        )

    def compact(self) -> Owners:
        """Shorten axes along which nothing changes."""
        first, last = self.first, self.last
        for axis, length in enumerate(first.shape):
            if length > 1:
                head = (slice(None),) * axis + (slice(1),)
                if (first == first[head]).all() and (last == last[head]).all():
                    first, last = first[head], last[head]
        return self if first is self.first else Owners(first, last, self.unclear)

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> Owners:
        """Move the entries: `change` reshapes, transposes or picks."""
        return Owners(change(self.first), change(self.last), self.unclear)

    def varies(self, axis: int) -> bool:
        """Tell whether owners change along an axis."""
        return self.first.shape[axis] != 1

    def over(self, axes: Sequence[int]) -> Owners:
        """Give all entries along these axes the owners of all of them."""
        where = tuple(axis for axis in axes if self.first.shape[axis] != 1)
        if not where:
            return self
        first = self.first.min(where, keepdims=True, initial=_NOBODY)
        last = self.last.max(where, keepdims=True, initial=-1)
        return Owners(first, last, self.unclear)

    def over_perhaps(self, axes: Sequence[int], why: str) -> Owners:
        """Do the same where entries may have the owners of all of them, but need not."""
        united = self.over(axes)
        known = (self.first < self.last).any(tuple(axes), keepdims=True)
        new = (united.first < united.last) & ~known
        if not new.any():
            return united
        return dataclasses.replace(united.masked(~new), unclear=self.unclear or why)

    def perhaps(self, other: Owners, why: str) -> Owners:
        """Unite with other owners of what may, but need not, be the same entries."""
        both = self | other
        if both.is_shared and not (self.is_shared or other.is_shared):
            return Owners.nobody(self.rank, both.unclear or why)
        return both

    def whole(self, rank: int) -> Owners:
        """Return the owners of all entries together, for a tensor of some rank."""
        one = self.over(range(self.rank))
        return one.map(lambda a: a.reshape((1,) * rank))

    def drop(self, axes: Sequence[int]) -> Owners:
        """Leave axes out, along which entries then belong to all."""
        axes = tuple(axes)
        return self.over(axes).map(lambda a: a.squeeze(axes)) if axes else self

    def insert(self, axes: Sequence[int]) -> Owners:
        """Add axes, by their numbers afterwards, along which nothing changes."""
        return self.map(lambda a: np.expand_dims(a, tuple(axes))) if axes else self

    def fit(self, shape: Sequence[int | None]) -> Owners:
        """Return the owners of an operand that was broadcast to this."""
        lead = self.rank - len(shape)
        united = self.drop(range(lead)) if lead > 0 else self
        return united.over([axis for axis, length in enumerate(shape) if length == 1])

    def spread(self, axis: int, length: int) -> Owners:
        """Write an axis out in full."""
        if self.first.shape[axis] == length:
            return self
        return self.map(lambda a: np.repeat(a, length, axis))

    def moved(self, axis: int, places: np.ndarray, length: int) -> Owners:
        """Return the owners along an axis before entry n was taken from place places[n].

        A place may be taken several times, or never; -1 is none at all.
        """
        if len(places) == length and (places == np.arange(length)).all():
            return self
        own = self.spread(axis, len(places))
        kept = places >= 0
        shape = list(own.first.shape)
        shape[axis] = length

        def gathered(array: np.ndarray, empty: int, unite: np.ufunc) -> np.ndarray:
            result = np.full(shape, empty, np.int32)
            moved = np.moveaxis(array, axis, 0)[kept]
            unite.at(np.moveaxis(result, axis, 0), places[kept], moved)
            return result

        first = gathered(own.first, _NOBODY, np.minimum)
        last = gathered(own.last, -1, np.maximum)
        return Owners(first, last, self.unclear).compact()

    def picked(self, axis: int, places: np.ndarray) -> Owners:
        """Return the owners of the entries at these places; -1 is a place that nobody reaches."""
        if not self.varies(axis):
            return self
        taken = self.map(lambda a: np.take(a, np.maximum(places, 0), axis))
        missing = places < 0
        if not missing.any():
            return taken.compact()
        where = missing.reshape([-1 if n == axis else 1 for n in range(self.rank)])
        return taken.masked(~where)

    def masked(self, where: np.ndarray) -> Owners:
        """Keep the owners of some entries; the others belong to nobody."""
        first = np.where(where, self.first, np.int32(_NOBODY))
        return Owners(first, np.where(where, self.last, np.int32(-1)), self.unclear).compact()

    def reshaped(self, before: Dims, after: Dims) -> Owners:
        """Return the owners of what was reshaped from `after` to `before`, which is theirs.

        Axes are taken in the shortest groups that hold as many entries on both sides; a group along
        which nothing changes is not written out.
        """
        if math.prod(before) == 0:
            return Owners.nobody(len(after), self.unclear)
        own, shape = self, []
        for mine, theirs in _groups(before, after):
            if any(own.varies(axis) for axis in mine):
                for axis in mine:
                    own = own.spread(axis, before[axis])
                shape += [after[axis] for axis in theirs]
            else:
                shape += [1] * len(theirs)
        return own.map(lambda a: a.reshape(shape)).compact()


def _groups(before: Dims, after: Dims) -> list[tuple[list[int], list[int]]]:
    """Return the axes of two shapes in the shortest runs that hold as many entries."""
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        mine, theirs = list(range(i, len(before)))[:1], list(range(j, len(after)))[:1]
        while (have := math.prod(before[n] for n in mine)) != (
            want := math.prod(after[n] for n in theirs)
        ):
            if have < want:
                mine.append(mine[-1] + 1 if mine else i)
            else:
                theirs.append(theirs[-1] + 1 if theirs else j)
        i, j = i + len(mine), j + len(theirs)
        groups.append((mine, theirs))
    return groups
