"""Provenance of lists of tensors, which loops read from and write to.

A list has the owners of its elements, which all share them: which element is meant is not known.
"""

from __future__ import annotations

from typing import Any

from perjac._core.graph.provenance.owners import Owners
from perjac._core.graph.provenance.registry import At, Found, rule


@rule("TensorListFromTensor")
def list_of(op: Any, outs: list[Owners], at: At) -> Found:
    """A list of a tensor's rows. A list's owners are those of its elements, which all share."""
    rank = len(at.shape(op.inputs[0])) - 1
    return [_sized(outs[0], rank).insert([0]), None]


@rule("TensorListStack")
def stacked(op: Any, outs: list[Owners], at: At) -> Found:
    """A list's elements in one tensor."""
    return [outs[0].over_perhaps([0], _LISTS).drop([0]), *[None] * (len(op.inputs) - 1)]


_LISTS = "the elements of a list are examples'"


@rule("TensorListGetItem")
def read(op: Any, outs: list[Owners], at: At) -> Found:
    """An element of a list."""
    return [outs[0], None, None]


@rule("TensorListSetItem")
def written(op: Any, outs: list[Owners], at: At) -> Found:
    """A list with another element."""
    return [outs[0], None, _sized(outs[0], len(at.shape(op.inputs[2])))]


@rule("TensorListPushBack")
def pushed(op: Any, outs: list[Owners], at: At) -> Found:
    """A list with one more element."""
    return [outs[0], _sized(outs[0], len(at.shape(op.inputs[1])))]


def _sized(own: Owners, rank: int) -> Owners:
    """Return a list's owners for an element of a rank; of a list that nobody read, nobody's."""
    if own.rank == rank:
        return own
    return Owners.nobody(rank, own.unclear or ("" if own.is_nobody else _LISTS))


@rule("TensorListPopBack")
def popped(op: Any, outs: list[Owners], at: At) -> Found:
    """A list without its last element, and that element."""
    rest, last = outs
    if rest.rank == last.rank:
        return [rest.perhaps(last, _LISTS), None]
    return [last if rest.is_nobody else rest, None]
