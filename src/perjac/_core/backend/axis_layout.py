"""Ways to lay the same numbers out anew: how a weight's axes become the axes a rule works with.

A Relabelling is linear and loses nothing, so it carries vectors forth and Jacobian rows back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import tensorflow as tf

Step = tuple[str, tuple, tuple]
Piece = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Relabelling:
    """A chain of reshapes and transpositions, from `shape` to `target`.

    Examples
    --------
    >>> kernel = Relabelling.of((2, 3, 4)).transpose((2, 0, 1)).reshape((4, 6))
    >>> kernel.apply(tf.ones((2, 3, 4))).shape
    TensorShape([4, 6])
    >>> kernel.invert(tf.ones((7, 4, 6)), lead=1).shape
    TensorShape([7, 2, 3, 4])
    """

    shape: tuple[int, ...]
    target: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    @classmethod
    def of(cls, shape: Sequence[int]) -> Relabelling:
        """Return the relabelling that changes nothing."""
        return cls(tuple(shape), tuple(shape))

    def reshape(self, target: Sequence[int]) -> Relabelling:
        """Follow with a reshape."""
        target = tuple(int(n) for n in target)
        if math.prod(target) != math.prod(self.target):
            raise ValueError(f"Expected {math.prod(self.target)} entries. Received: {target}.")
        steps, before = self.steps, self.target
        if steps and steps[-1][0] == "reshape":  # two reshapes are one
            steps, before = steps[:-1], steps[-1][1]
        if before != target:
            steps = (*steps, ("reshape", before, target))
        return Relabelling(self.shape, target, steps)

    def transpose(self, axes: Sequence[int]) -> Relabelling:
        """Follow with a transposition."""
        axes = tuple(int(a) for a in axes)
        if axes == tuple(range(len(axes))):
            return self
        target = tuple(self.target[a] for a in axes)
        backwards = tuple(sorted(range(len(axes)), key=axes.__getitem__))
        return Relabelling(self.shape, target, (*self.steps, ("transpose", backwards, axes)))

    def apply(self, tensor: tf.Tensor, lead: int = 0) -> tf.Tensor:
        """Lay out (*lead, *shape) as (*lead, *target)."""
        for kind, _, after in self.steps:
            tensor = _take(kind, after, tensor, lead)
        return tensor

    def invert(self, tensor: tf.Tensor, lead: int = 0) -> tf.Tensor:
        """Lay out (*lead, *target) as (*lead, *shape)."""
        for kind, before, _ in reversed(self.steps):
            tensor = _take(kind, before, tensor, lead)
        return tensor

    def pieces(self) -> list[tuple[Piece, ...]]:
        """Return which pieces of the weight's axes each target axis runs over, in C order.

        A piece is (axis, length, stride): a whole axis has stride 1; a reshape may split one. Where
        a reshape cuts across axes, a target axis is a piece of its own, its number negative.
        """
        axes: list[tuple[Piece, ...]] = [((n, size, 1),) for n, size in enumerate(self.shape)]
        for kind, _, after in self.steps:
            if kind == "transpose":
                axes = [axes[a] for a in after]
            else:
                try:
                    axes = _regrouped([p for axis in axes for p in axis if p[1] != 1], after)
                except ValueError:
                    return self._own_pieces()
        return [tuple(p for p in axis if p[1] != 1) for axis in axes]

    def _own_pieces(self) -> list[tuple[Piece, ...]]:
        """Return a piece for each target axis that no other chain of steps has."""
        digest = hashlib.blake2b(repr(self.steps).encode(), digest_size=6).digest()
        first = int.from_bytes(digest) * len(self.target) + 1
        return [((-first - n, size, 1),) if size > 1 else () for n, size in enumerate(self.target)]


def _regrouped(pieces: list[Piece], lengths: Sequence[int]) -> list[tuple[Piece, ...]]:
    """Deal pieces out to axes of the given lengths, splitting one where it is too long."""
    left = list(pieces)
    axes = []
    for length in lengths:
        mine: list[Piece] = []
        while (have := math.prod(p[1] for p in mine)) < length:
            axis, size, stride = left.pop(0)
            need = length // have
            if length % have or (size > need and size % need):
                raise ValueError(f"{pieces} do not fall into axes of {tuple(lengths)}")
            if size > need:
                left.insert(0, (axis, size // need, stride))
                stride, size = stride * (size // need), need
            mine.append((axis, size, stride))
        axes.append(tuple(mine))
    return axes


def _take(kind: str, to: tuple, tensor: tf.Tensor, lead: int) -> tf.Tensor:
    if kind == "reshape":
        unknown = [n for n, dim in enumerate(tensor.shape[:lead]) if dim is None]
        if len(unknown) <= 1 and math.prod(to):  # one axis is counted by TensorFlow
            return tf.reshape(tensor, [-1 if n is None else n for n in [*tensor.shape[:lead], *to]])
        return tf.reshape(tensor, tf.concat([tf.shape(tensor)[:lead], to], 0))
    return tf.transpose(tensor, [*range(lead), *(axis + lead for axis in to)])
