"""A way to the answer of a query, and what it costs."""

from __future__ import annotations

import dataclasses

# What writing and reading back one number costs, in multiply-adds.
_TRAFFIC = 16


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to an answer, and what it costs for one example.

    Attributes
    ----------
    name : str
        For people: "form I×O", "T×T Gram".
    multiply_adds : int
        The arithmetic.
    entries : int
        Numbers formed on the way, beside the factor and the answer.
    forms : bool
        Whether it is by the rows themselves.
    """

    name: str
    multiply_adds: int
    entries: int
    forms: bool = False

    @property
    def cost(self) -> int:
        """The whole, in multiply-adds."""
        return self.multiply_adds + _TRAFFIC * self.entries
