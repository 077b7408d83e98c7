"""Which way each weight takes to the answer of a query, as a table that people read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from perjac._core.backend.memory import readable
from perjac._core.factors import Factor, Way


@dataclasses.dataclass(frozen=True)
class Reason:
    """One weight: its key, its factor, and the ways there are, the first of them taken."""

    weight: str
    factor: str
    ways: tuple[Way, ...]

    def __str__(self) -> str:
        taken, *others = self.ways
        costs = [f"{w.name}: {w.multiply_adds:,} multiply-adds, {w.entries:,} numbers" for w in
                 self.ways]  # fmt: skip
        chosen = costs[0] if taken.cost else taken.name
        against = f" (against {'; '.join(costs[1:])})" if others else ""
        return f"{self.weight}  {self.factor}  {chosen}{against}"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a query is answered; print it, or read `rows`. Costs are for one example.

    Attributes
    ----------
    question : str
        The query.
    rows : list of Reason
        One for each weight.
    """

    question: str
    rows: list[Reason]
    batch_size: int

    @classmethod
    def of(
        cls, question: str, factors: Mapping[str, Factor], batch_size: int, dim: int
    ) -> Explanation:
        """Return the table for some factors."""
        rows = [
            Reason(key, _described(factor), tuple(factor.ways(question, dim)))
            for key, factor in factors.items()
        ]
        return cls(question, rows, batch_size)

    def __str__(self) -> str:
        work = sum(row.ways[0].multiply_adds for row in self.rows)
        formed = sum(row.ways[0].entries for row in self.rows)
        return "\n".join(
            [
                f"{self.question}, for one example:",
                *map(str, self.rows),
                f"In all {work:,} multiply-adds and {formed:,} numbers formed for one example; "
                f"{readable(4 * formed * self.batch_size)} for {self.batch_size}, in float32.",
            ]
        )


def _described(factor: Factor) -> str:
    kind, target = type(factor).__name__, factor.layout.target
    sizes = "×".join(map(str, target)) or "scalar"
    positions = getattr(factor, "positions", None)
    return f"{kind} {sizes}" + (f" T={positions}" if positions else "")
