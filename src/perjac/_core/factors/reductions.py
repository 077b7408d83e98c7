"""What is asked of factors, compiled; and what is asked of each weight's factor alone.

The latter are questions that are equal where they ask the same: such a one can be answered in the
program that makes the factors, where nothing is held of them. Must not know where factors come
from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import tensorflow as tf

from perjac._core.backend import host
from perjac._core.backend.axis_layout import Relabelling
from perjac._core.factors import Factor
from perjac._core.factors.combine import join_examples

Factors = Mapping[str, Factor]
Answers = dict[str, Any]


class Question(Protocol):
    """What is asked of each weight's factor alone; equal where it asks the same."""

    def __call__(self, factors: Factors) -> Answers:
        """Return the answers by key."""
        ...

    def joined(self, answers: Iterable[Answers], runs: Sequence[slice]) -> Answers:
        """Return one answer for all examples, of those for one run of them after another."""
        ...


@functools.cache
def query(
    question: Callable[..., Any], jit: bool = False, anew: bool = False, **options: Any
) -> Callable[..., Any]:
    """Return a question, a function of {key: factor} and more, as one compiled whole.

    `anew` is for one that has to know how many examples there are.
    """
    asked = functools.partial(question, **options)
    return host.compiled(asked, grows=not anew, jit_compile=jit or None)


@dataclasses.dataclass(frozen=True)
class Themselves:
    """The factors as they are."""

    def __call__(self, factors: Factors) -> dict[str, Factor]:
        """Return them."""
        return dict(factors)

    def joined(self, answers: Iterable[Answers], runs: Sequence[slice]) -> dict[str, Factor]:
        """Put them one after another."""
        return join_examples(answers, runs)


THEMSELVES = Themselves()


class Total:
    """Base of questions whose answers are sums over the examples."""

    def joined(self, answers: Iterable[Answers], runs: Sequence[slice]) -> Answers:
        """Add up, tensor by tensor: the sums of a large network fill gigabytes."""
        whole: Any = None
        total: list[Any] = []
        for answer in answers:
            parts = tf.nest.flatten(answer)
            whole, answer = whole or tf.nest.map_structure(lambda _: 0, answer), None
            for n in range(len(total)):
                total[n], parts[n] = total[n] + parts[n], None
            total = total or parts
        return tf.nest.pack_sequence_as(whole, total)


@dataclasses.dataclass(frozen=True)
class Squares(Total):
    """Σ over examples and rows of the squares, of the weight's shape."""

    def __call__(self, factors: Factors) -> dict[str, tf.Tensor]:
        """Return it by key."""
        return {key: factor.diagonal() for key, factor in factors.items()}


@dataclasses.dataclass(frozen=True)
class Sides:
    """Moments of both sides of a weight's rows, and how it was read for them. A nest of tensors.

    Attributes
    ----------
    reading : Relabelling
        From the weight to (G, I, O).
    left, right, count : tf.Tensor
        As in `factors.Moments`.
    """

    reading: Relabelling
    left: tf.Tensor
    right: tf.Tensor
    count: tf.Tensor

    def __tf_flatten__(self) -> tuple[tuple, tuple]:
        return (self.reading,), (self.left, self.right, self.count)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple, components: tuple) -> Sides:
        return cls(*metadata, *components)


@dataclasses.dataclass(frozen=True)
class SideMoments(Total):
    """Σ over examples and rows of both sides' outer products, a weight read as (G, I, O).

    Attributes
    ----------
    reduce : bool
        Whether positions are brought together before the products.
    most : int
        A side longer than that is summed on its diagonal alone.
    """

    reduce: bool
    most: int

    def __call__(self, factors: Factors) -> dict[str, Sides]:
        """Return it by key."""
        return {
            key: Sides(factor.reading, *factor.moments(self.reduce, self.most))
            for key, factor in factors.items()
        }
