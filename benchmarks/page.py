"""docs/performance.md: words from performance_template.md, figures from records of runs.

Beside the record of the peers' run, scaling.json and carried/latest.json are looked for.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import string

import report
import scaling
import summary
from peers import FLOORS, OURS, PEERS
from summary import Standing

_TEMPLATE = pathlib.Path(__file__).resolve().parent / "performance_template.md"


def write(file: pathlib.Path, record: pathlib.Path) -> None:
    """Write the page and its charts."""
    results, about = report.read(record)
    standings = [Standing.of(result) for result in results]
    parts = {
        "summary": summary.text(standings),
        "losses": summary.losses(standings),
        "run": report.words(about),
        "chart": _chart(file, record.parent / "latest.png", "ratios", "Ratios to perjac's time"),
        "tables": report.tables(results).replace("## ", "### "),
        "specialists": _listed(special=True),
        "general": _listed(special=False),
        "scaling": _scaling(file, record.parent),
        "carried": _carried(record.parent / "carried" / "latest.json"),
    }
    # A place without its part, or a part without a place, is an error.
    file.write_text(string.Template(_TEMPLATE.read_text()).substitute(parts))


def _listed(special: bool) -> str:
    names = [n for n, peer in PEERS.items() if peer.special == special and n not in (OURS, FLOORS)]
    return ", ".join(names)


def _scaling(file: pathlib.Path, folder: pathlib.Path) -> str:
    record = folder / "scaling.json"
    if not record.exists():
        return "Not measured for this page: `make bench-scaling`."
    found = json.loads(record.read_text())
    chart = _chart(file, folder / "scaling.png", "scaling", "Time and memory against size")
    return f"{scaling.markdown(found)}\n\n{chart}"


def _carried(record: pathlib.Path) -> str:
    if not record.exists():
        return "Not measured for this page: `make bench-gpu`."
    results, about = report.read(record)
    standings = [Standing.of(result) for result in results]
    parts = [
        report.words(about),
        summary.text(standings),
        summary.bandwidths(standings),
        summary.losses(standings),
        report.tables(results).replace("## ", "### "),
    ]
    return "\n\n".join(part for part in parts if part)


def _chart(file: pathlib.Path, drawn: pathlib.Path, name: str, words: str) -> str:
    """Copy a chart beside the page, and return what shows it there."""
    if not drawn.exists():
        return ""
    beside = file.with_name(f"{file.stem}_{name}.png")
    shutil.copy(drawn, beside)
    return f"![{words}]({beside.name})"
