"""What is written of a run: tables in Markdown, everything in JSON, and a chart of ratios."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from compare import Timed
from jobs import JOBS
from peers import OURS

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
    text.write_text(_markdown(results, about))
    record = [{**r, "ways": [_record(timed) for timed in r["ways"]]} for r in results]
    data.write_text(json.dumps({"about": about, "results": record}, indent=1) + "\n")
    _chart(chart, results, about)


def _record(timed: Timed) -> dict[str, Any]:
    return {**dataclasses.asdict(timed), "median_ms": timed.median_ms}


def _markdown(results: list[dict], about: dict[str, Any]) -> str:
    parts = [_words(about), _summary(results), "![Ratios](latest.png)"]
    for result in results:
        title = f"## {JOBS[result['job']].title}, {result['model']}, {result['examples']} examples"
        parts += [title, table(result)]
    return "\n\n".join(parts) + "\n"


def _words(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    lines = [
        f"# perjac beside its peers\n\n{about['machine']}; Python {about['python']}; {versions}. "
        f"Load of the machine: {about['load'][0]} when the run began, {about['load'][1]} when it "
        f"ended.{_caution(about)}",
        f"{_CLOCKS[about['clock']]}: medians of up to {about['repeats']} repetitions, taken in "
        "turn: every process once, then every process again; slow ways fewer times. A repetition "
        "shorter than 20 ms is the mean of several in a row. All processes have the same weights, "
        "inputs and labels, run on the processor, each library with "
        f"{about['threads']} thread(s), and gave the same answer before they "
        "were timed (`difference`, relative to its norm; for SmoothGrad, whose noise is each "
        "library's own, one less the correlation). Pictures are laid out as each library wants "
        "them before the clock starts. Compare only inside a table.",
    ]
    if about["absent"]:
        absent = "; ".join(f"{name}: {why}" for name, why in about["absent"].items())
        lines.append(f"Left out: {absent}.")
    return "\n\n".join(lines)


def _caution(about: dict[str, Any]) -> str:
    """Tell that other work was in the way, where it was."""
    begun = about["load"][0]
    if begun is None or begun < 0.5 * about["cores"]:
        return ""
    return " **Other work ran on this machine: these figures are provisional.**"


def _summary(results: list[dict]) -> str:
    """One line for each job and model: perjac, the best of every peer's ways, and the floors."""
    lines = [
        "| job | model | perjac, ms | others, × perjac (the best way of each) | floors, ms |",
        "|---|---|---:|---|---|",
    ]
    for result in results:
        ours = _ours(result)
        others = best(result)
        ratios = ", ".join(f"{t.peer} {t.median_ms / ours:.2f}" for t in others) if ours else ""
        floors = ", ".join(f"{t.way} {_digits(t.median_ms)}" for t in result["ways"]
                           if t.floor and t.repeats_ms)  # fmt: skip
        shown = _digits(ours) if ours else ""
        lines.append(
            f"| {JOBS[result['job']].title} | {result['model']}, {result['examples']} | {shown} "
            f"| {ratios or '–'} | {floors or '–'} |"
        )
    return "\n".join(lines)


def best(result: dict) -> list[Timed]:
    """Return the quickest way of each peer but perjac, the quickest peer first."""
    found: dict[str, Timed] = {}
    for timed in result["ways"]:
        if timed.peer == OURS or timed.floor or timed.left_out or not timed.repeats_ms:
            continue
        known = found.get(timed.peer)
        if known is None or timed.median_ms < known.median_ms:
            found[timed.peer] = timed
    return sorted(found.values(), key=lambda timed: timed.median_ms)


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
        _digits(timed.median_ms),
        f"{_digits(low)}–{_digits(high)}",
        f"{timed.median_ms / ours:.2f}" if ours else "",
        f"{timed.first_ms / 1e3:.1f}",
        f"{timed.peak_mb:.0f}",
        f"{timed.peak_mb - timed.idle_mb:.0f}",
        "" if timed.error is None or timed.peer == OURS else f"{timed.error:.0e}",
    ]
    return " | ".join(cells)


def _digits(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 1 else f"{ms:.3f}"


def _ours(result: dict) -> float | None:
    return next((t.median_ms for t in result["ways"] if t.peer == OURS), None)


def _chart(file: pathlib.Path, results: list[dict], about: dict[str, Any]) -> None:
    """Draw each peer's best way, in times of perjac's, on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [(result, best(result)) for result in results if _ours(result)]
    rows = [(result, others) for result, others in rows if others]
    peers = sorted({timed.peer for _, others in rows for timed in others})
    height = sum(len(others) + 1.2 for _, others in rows)
    figure = Figure(figsize=(9, 1.5 + 0.22 * height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    place, ticks, names = 0.0, [], []
    for result, others in rows:
        ours = _ours(result)
        ticks.append(place + (len(others) - 1) / 2)
        names.append(f"{JOBS[result['job']].title}\n{result['model']}")
        for timed in others:
            ratio = timed.median_ms / ours
            color = f"C{peers.index(timed.peer) % 10}"
            axes.barh(place, ratio - 1, left=1, height=0.9, color=color)
            axes.annotate(f" {timed.peer} {ratio:.1f} ", (ratio, place), va="center", fontsize=7,
                          ha="left" if ratio >= 1 else "right")  # fmt: skip
            place += 1
        place += 1.2
    axes.set_xscale("log")
    axes.set_yticks(ticks, names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time, × perjac (right of the line: perjac is quicker)")
    axes.set_title(f"Each library's best way, {about['machine']}", fontsize=9)
    figure.savefig(file, dpi=110)
