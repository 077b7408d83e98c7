"""Which size of batch a program of XLA's runs at: it is compiled for each size anew.

A batch that is shorter than one that was compiled for, the last of a data set above all, is filled
up with examples that are there already, and what comes of these is cut off. Must not know what is
run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf


@dataclasses.dataclass
class Sizes:
    """The sizes that one program was compiled for.

    Filling up wastes time at every call, compiling takes long once. Nobody knows how often a size
    will come again, so it is compiled for as soon as what was wasted on it comes to what compiling
    took: never more than twice as long as the better of the two (renting or buying skis).

    Attributes
    ----------
    compiled : dict of int to float
        Sizes, and the seconds that the first call took.
    wasted : dict of int to float
        Sizes that were filled up, and the seconds that went into what was cut off.

    Examples
    --------
    >>> sizes = Sizes({512: 8.0})
    >>> sizes.of(600), sizes.of(100), sizes.of(512)
    (600, 512, 512)
    >>> sizes.ran(100, 512, 10.0), sizes.of(100)
    (None, 100)
    """

    compiled: dict[int, float] = dataclasses.field(default_factory=dict)
    wasted: dict[int, float] = dataclasses.field(default_factory=dict)

    def of(self, size: int) -> int:
        """Return the size to run a batch at."""
        longer = [known for known in self.compiled if known >= size]
        if not longer:
            return size
        best = min(longer)
        return size if self.wasted.get(size, 0.0) >= self.compiled[best] else best

    def ran(self, size: int, at: int, seconds: float) -> None:
        """Take note of a call for a batch of one size, run at another."""
        if at not in self.compiled:
            self.compiled[at] = seconds
        elif at > size:
            self.wasted[size] = self.wasted.get(size, 0.0) + seconds * (1 - size / at)


def within(answers: Any, where: slice, of: int) -> Any:
    """Return what belongs to some of the examples of a nest of tensors, as `first` does.

    As it stands, past `tf.nest` and Python's own slices: these take ten times as long.
    """
    edges: dict[tuple[int, int], tuple[tf.Tensor, tf.Tensor]] = {}

    def cut(thing: Any) -> Any:
        if hasattr(thing, "__tf_flatten__"):
            static, moving = thing.__tf_flatten__()
            return type(thing).__tf_unflatten__(static, tuple(map(cut, moving)))
        if isinstance(thing, dict):
            return {name: cut(part) for name, part in thing.items()}
        if isinstance(thing, (list, tuple)):
            return type(thing)(map(cut, thing))
        kind = positions, rest = thing.shape[0] // of, thing.shape.rank - 1
        if kind not in edges:
            begin, length = where.start * positions, (where.stop - where.start) * positions
            edges[kind] = tf.constant([begin, *[0] * rest]), tf.constant([length, *[-1] * rest])
        begin, length = edges[kind]
        return tf.raw_ops.Slice(input=thing, begin=begin, size=length)

    return cut(answers)


def first(answers: Any, count: int, of: int) -> Any:
    """Return what belongs to the first examples of a nest of tensors, all with examples in front.

    Parameters
    ----------
    answers : nest of tf.Tensor
        (of · F, ...) each, F positions for each example.
    count, of : int
        Examples that are kept, and that there are.
    """
    return tf.nest.map_structure(lambda t: t[: len(t) // of * count], answers)
