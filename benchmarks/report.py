"""What is written of a run: tables in Markdown, everything in JSON, and a chart of ratios.

    python benchmarks/report.py benchmarks/results/latest.json --page docs/performance.md

makes the page about it (see `page`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import charts
import summary
from compare import Timed
from jobs import JOBS
from peers import OURS
from summary import Standing, digits

_HEAD = (
    "| way | median, ms | range, ms | × perjac | first call, s | peak memory, MB | above idle, MB |"
    " difference |\n|---|---:|---:|---:|---:|---:|---:|---:|"
)


_CLOCKS = {"wall": "Time on the clock", "cpu": "Processor time of all of a process's threads"}


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return where a run is written: text, record, chart."""
    return [folder / f"latest.{kind}" for kind in ("md", "json", "png")]


def write(folder: pathlib.Path, results: list[dict], about: dict[str, Any]) -> None:
    """Write a run, as far as it has come."""
    folder.mkdir(parents=True, exist_ok=True)
    text, data, chart = files(folder)
    text.write_text(markdown(results, about))
    record = [{**r, "ways": [_record(timed) for timed in r["ways"]]} for r in results]
    data.write_text(json.dumps({"about": about, "results": record}, indent=1) + "\n")
    standings = [Standing.of(result) for result in results]
    try:
        charts.ratios(chart, standings, about["machine"])
    except ImportError as failure:  # where programs are carried to, there may be no matplotlib
        print(f"No chart: {failure}")


def read(record: pathlib.Path) -> tuple[list[dict], dict[str, Any]]:
    """Return the results of a run, and what is to be known of it."""
    kept = json.loads(record.read_text())
    names = {field.name for field in dataclasses.fields(Timed)}
    for result in kept["results"]:
        result["ways"] = [
            Timed(**{name: value for name, value in way.items() if name in names})
            for way in result["ways"]
        ]
    return kept["results"], kept["about"]


def _record(timed: Timed) -> dict[str, Any]:
    return {**dataclasses.asdict(timed), "median_ms": timed.median_ms}


def markdown(results: list[dict], about: dict[str, Any]) -> str:
    """Return a run's own page."""
    standings = [Standing.of(result) for result in results]
    parts = [
        "# perjac beside its peers",
        words(about),
        summary.text(standings),
        summary.bandwidths(standings),
        "![Ratios](latest.png)",
        "## Where another is quicker",
        summary.losses(standings),
        tables(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def tables(results: list[dict]) -> str:
    """Return the table of each job on each model, in Markdown."""
    parts = []
    for result in results:
        title = f"## {JOBS[result['job']].title}, {result['model']}, {result['examples']} examples"
        parts += [title, table(result)]
    return "\n\n".join(parts)


def words(about: dict[str, Any]) -> str:
    """Say on what, with what and how a run was made."""
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    lines = [
        f"{about['machine']}; Python {about['python']}; {versions}. "
        f"Load of the machine: {about['load'][0]} when the run began, {about['load'][1]} when it "
        f"ended.{_caution(about)}",
        f"{_CLOCKS[about['clock']]}: medians of up to {about['repeats']} repetitions, taken in "
        "turn: every process once, then every process again; slow ways fewer times. A repetition "
        "shorter than 20 ms is the mean of several in a row. All processes have the same weights, "
        f"inputs and labels, run on {_where(about)}, and gave the same answer before they "
        "were timed (`difference`, relative to its norm; for SmoothGrad, whose noise is each "
        "library's own, one less the correlation). Pictures are laid out as each library wants "
        "them before the clock starts. Compare only inside a table.",
    ]
    if about["absent"]:
        absent = "; ".join(f"{name}: {why}" for name, why in about["absent"].items())
        lines.append(f"Left out: {absent}.")
    return "\n\n".join(lines)


def _where(about: dict[str, Any]) -> str:
    processor = f"the processor, each library with {about['threads']} thread(s)"
    if not about.get("carried"):
        return processor
    programs = "perjac's exported programs through PJRT, without TensorFlow"
    if about["device"] == "cpu":
        return f"{processor} ({programs}; **no GPU was found**)"
    return (
        f"{about['device']} ({programs}; all in float32 without TensorFloat-32; memory is the "
        "card's: the compiler's count for perjac and JAX, the most allocated for torch)"
    )


def _caution(about: dict[str, Any]) -> str:
    """Tell that other work was in the way, where it was."""
    begun = about["load"][0]
    if begun is None or begun < 0.5 * about["cores"]:
        return ""
    return " **Other work ran on this machine: these figures are provisional.**"


def table(result: dict) -> str:
    """Return one job's table, in Markdown."""
    ours = _ours(result)
    return "\n".join([_HEAD, *(f"| {_cells(timed, ours)} |" for timed in result["ways"])])


def _cells(timed: Timed, ours: float | None) -> str:
    name = f"{timed.name} ({timed.note})" if timed.note else timed.name
    if timed.left_out:
        return f"{name} | left out: {timed.left_out.replace('|', '/')} | | | | | |"
    low, high = min(timed.clocked_ms), max(timed.clocked_ms)
    cells = [
        name,
        digits(timed.median_ms),
        f"{digits(low)}–{digits(high)}",
        f"{timed.median_ms / ours:.2f}" if ours else "",
        f"{timed.first_ms / 1e3:.1f}",
        f"{timed.peak_mb:.0f}",
        f"{timed.peak_mb - timed.idle_mb:.0f}",
        ""
        if timed.error is None or (timed.peer == OURS and not timed.error)
        else f"{timed.error:.0e}",
    ]
    return " | ".join(cells)


def _ours(result: dict) -> float | None:
    times = [t.median_ms for t in result["ways"] if t.peer == OURS and t.repeats_ms]
    return min(times, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=pathlib.Path, help="latest.json of a run")
    parser.add_argument("--page", type=pathlib.Path, required=True, metavar="FILE",
                        help="the page to write, its charts beside it")  # fmt: skip
    options = parser.parse_args()
    import page

    page.write(options.page, options.record)
    print(f"Written: {options.page}")


if __name__ == "__main__":
    main()
