"""docs/coverage.md: what the zoo's tests found, a line for each model, written by the test run.

A run updates the lines of the models it tested and keeps the others.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable

import zoo
from zoo.entry import ENTRIES

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "coverage.md"
TITLES = {
    "applications": "keras.applications",
    "layers": "keras.layers, and ways to use a weight",
    "architectures": "Architectures written by hand",
}
HEAD = """# Coverage

Written by the tests of the zoo (`make test` runs a sample, `make more` the others, `make zoo` \
the larger members too), not by hand. Each model's Jacobian with respect to every trainable \
weight is compared with the oracle's, a loop of plain `tf.GradientTape` over examples and \
outputs. *Error* is the worst weight's relative error, rounded up to a power of a hundred. \
*Factored* counts the weights that take the factored path; the others take the tape path, for \
the reason given. *Independence* says how it is known that no example influences another: proved \
from the graph, for every batch, or probed on data where the graph does not tell.
"""


COLUMNS = ("model", "type", "factored", "error", "rules", "on the tape", "independence")


@dataclasses.dataclass(frozen=True)
class Line:
    """What a test found out about one model."""

    name: str
    dtype: str
    weights: int
    factored: int
    error: float
    reasons: tuple[str, ...]
    rules: tuple[str, ...]
    independence: str

    def __str__(self) -> str:
        cells = [
            self.name,
            self.dtype,
            f"{self.factored} of {self.weights}",
            rounded(self.error),
            ", ".join(self.rules),
            "; ".join(self.reasons),
            self.independence,
        ]
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rounded(error: float) -> str:
    """Return the next power of a hundred above: what rounding makes of it differs by machine."""
    bound = next(n for n in range(16, -1, -2) if error <= 10.0**-n or n == 0)
    return f"< 1e-{bound:02d}" if bound else f"{error:.0e}"


def update(found: Iterable[str]) -> None:
    """Write the page, with the lines (as JSON) that a test run found."""
    zoo.everything()
    lines = {line.name: str(line) for line in (_read(text) for text in found)}
    old = PAGE.read_text().splitlines() if PAGE.exists() else []
    kept = {line.split(" | ")[0].removeprefix("| "): line for line in old if line.startswith("| ")}
    lines = kept | lines
    text = HEAD
    for family, title in TITLES.items():
        mine = [lines[n] for n, e in ENTRIES.items() if e.family == family and n in lines]
        text += f"\n## {title}\n\n| {' | '.join(COLUMNS)} |\n"
        text += "|---" * len(COLUMNS) + "|\n" + "\n".join(mine) + "\n"
    PAGE.write_text(text)


def as_json(line: Line) -> str:
    return json.dumps(dataclasses.asdict(line))


def _read(text: str) -> Line:
    fields = json.loads(text)
    return Line(**fields | {key: tuple(fields[key]) for key in ("reasons", "rules")})
