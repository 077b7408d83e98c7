"""The plan as a table that people read: each weight, its sites, rule, path, why, and the cost."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence

from perjac._core.backend.memory import readable
from perjac._core.planning.decisions import Decision

_HEADERS = [
    "weight", "shape", "meets the data at", "parametrisation", "rule → factor", "path", "why",
    "held", "rows",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight.

    Attributes
    ----------
    weight : str
        Its key.
    shape : tuple of int
        Its shape.
    sites : tuple of str
        The operations at which it meets the data.
    parametrisation : tuple of str
        For each site, the operations between the weight and there; "–" for the weight itself.
    rule : str
        What the rules make of them.
    factor : tuple of str
        The factor at each site.
    path : str
        "factored" or "tape".
    reason : str
        Why this path.
    held_bytes, dense_bytes : int or None
        Memory of the factor, and of the rows once formed, for the batch.
    """

    weight: str
    shape: tuple[int, ...]
    sites: tuple[str, ...]
    parametrisation: tuple[str, ...]
    rule: str
    factor: tuple[str, ...]
    path: str
    reason: str
    held_bytes: int | None
    dense_bytes: int


@dataclasses.dataclass(frozen=True)
class Spent:
    """What something takes.

    Attributes
    ----------
    seconds : float or None
        Time; None where it is not foretold.
    bytes : int
        Memory, at most.
    """

    seconds: float | None
    bytes: int

    def __str__(self) -> str:
        time = "unknown time" if self.seconds is None else f"{1e3 * self.seconds:,.3g} ms"
        # What is below a quarter of a megabyte, TensorFlow's allocator does not count.
        return f"{time}, {readable(self.bytes) if self.bytes else 'too little memory to count'}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How all weights' rows are swept.

    Attributes
    ----------
    schedule : str
        Rows together or one after another, and whether XLA compiles all of it.
    examples, rows : int
        How many examples, and rows of each, are in the works at a time.
    expected : Spent
        Of the sweep, up to factors, by this machine's measured rates.
    measured : Spent or None
        The same as it was measured, where it was.
    forming : Spent
        Of all rows, expected, where they are formed.
    certificate : str
        Whether the rows were compared with the live model's gradient.
    """

    schedule: str
    examples: int
    rows: int
    expected: Spent
    measured: Spent | None
    forming: Spent
    certificate: str = ""

    def __str__(self) -> str:
        measured = f"; measured {self.measured}" if self.measured else ""
        each = f" and {self.rows} rows of each" if self.rows > 1 else ""
        return (
            f"Sweep: {self.schedule}; examples at a time: {self.examples}{each}; expected "
            f"{self.expected}{measured}. Forming all rows: expected {self.forming}."
            f"{' ' * bool(self.certificate)}{self.certificate}"
        )


@dataclasses.dataclass(frozen=True)
class Inspection:
    """How each trainable weight goes; print it, or read `rows` and `plan`.

    Attributes
    ----------
    rows : list of Row
        One for each weight.
    batch_size, outputs : int
        B and K, for which memory and work are given.
    plan : Plan
        How they are swept.
    independence : str
        How it is known that no example influences another.
    """

    rows: list[Row]
    batch_size: int
    outputs: int
    plan: Plan
    independence: str

    @classmethod
    def of(
        cls,
        decisions: Sequence[Decision],
        batch_size: int,
        outputs: int,
        plan: Plan,
        independence: str,
    ) -> Inspection:
        """Return the table of a plan's decisions."""
        rows = [_row(d, batch_size, outputs) for d in decisions]
        return cls(rows, batch_size, outputs, plan, independence)

    @property
    def columns(self) -> list[str]:
        """The table's headers."""
        return list(_HEADERS)

    def cells(self) -> list[list[str]]:
        """Return the table's text, a list for each weight."""
        return [
            [
                row.weight,
                "×".join(map(str, row.shape)) or "scalar",
                "\n".join(row.sites) or "–",
                "\n".join(row.parametrisation) or "–",
                row.rule,
                row.path,
                row.reason,
                "?" if row.held_bytes is None else readable(row.held_bytes),
                readable(row.dense_bytes),
            ]
            for row in self.rows
        ]

    @property
    def summary(self) -> str:
        """One sentence on the whole."""
        factored = sum(row.path == "factored" for row in self.rows)
        held = sum(row.held_bytes or 0 for row in self.rows)
        dense = sum(row.dense_bytes for row in self.rows)
        return (
            f"{factored} of {len(self.rows)} weights factored. For {self.batch_size} examples × "
            f"{self.outputs} outputs: {readable(held)} held, {readable(dense)} if all rows are "
            f"formed. {self.plan} Examples do not influence one another: {self.independence}."
        )

    def __str__(self) -> str:
        table = [self.columns, *([c.replace("\n", "; ") for c in row] for row in self.cells())]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        lines.insert(1, "  ".join("─" * w for w in widths))
        return "\n".join([*lines, self.summary])

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            inside = "".join(
                f"<{tag}>{html.escape(c).replace(chr(10), '<br>')}</{tag}>" for c in cells
            )
            return f"<tr>{inside}</tr>"

        rows = "".join(line(cells, "td") for cells in self.cells())
        head = line(self.columns, "th")
        return f"<table>{head}{rows}</table><p>{html.escape(self.summary)}</p>"


def _row(decision: Decision, batch_size: int, outputs: int) -> Row:
    source = decision.source
    unit = batch_size * source.dtype.size
    rules = "; ".join(decision.rules)
    return Row(
        weight=source.key,
        shape=source.shape,
        sites=tuple(f"{site.type} {site.operation}" for site in decision.sites),
        parametrisation=tuple(" → ".join(site.through) or "–" for site in decision.sites),
        rule=rules or ("tape.jacobian" if decision.path == "tape" else "–"),
        factor=tuple(rule.partition("→ ")[2] for rule in decision.rules),
        path=decision.path,
        reason=decision.reason,
        held_bytes=None if decision.entries is None else unit * decision.entries
        if decision.path == "factored" else unit * outputs * source.size,
        dense_bytes=unit * outputs * source.size,
    )  # fmt: skip
