"""From the owners of an operation's results to those of its operands: one rule for each kind.

An operand's entry belongs to whoever owns an entry of the results that is computed from it. Rules
know operations, shapes and the values of indices; they see no data, and must not know models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from perjac._core.graph.provenance.owners import Dims, Owners


class Unclear(Exception):
    """Raised by a rule that cannot tell; the message is the reason."""


class At(Protocol):
    """What rules ask about a graph's tensors, for a batch of a given size."""

    def shape(self, tensor: Any) -> Dims:
        """Return a shape, all axes known, or raise Unclear."""
        ...

    def known(self, tensor: Any) -> np.ndarray | None:
        """Return what a tensor holds whatever the data, or None."""
        ...

    def value(self, tensor: Any) -> np.ndarray:
        """Return the same, or raise Unclear."""
        ...


Found = list[Owners | None]
Rule = Callable[[Any, list[Owners], At], Found]
RULES: dict[str, Rule] = {}
# Operands whose values rules ask for, counted from the end where negative.
INDICES: dict[str, tuple[int, ...]] = {}


def rule(*types: str, index: tuple[int, ...] = ()) -> Callable[[Rule], Rule]:
    """Register a rule for operations of these types, and which operands it reads."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(types, function))
        INDICES.update(dict.fromkeys(types, index))
        return function

    return register


def channels_first(op: Any) -> bool:
    """Tell whether an operation has its channels on the second axis."""
    if "data_format" not in op.node_def.attr:
        return False
    return op.get_attr("data_format") in (b"NCHW", b"NCDHW", b"NCW")
