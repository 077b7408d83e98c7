"""The charts of a run: the peers' times beside perjac's, and cost against size."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from fit import Power
from jobs import JOBS
from summary import Standing


def ratios(file: pathlib.Path, standings: list[Standing], where: str) -> None:
    """Draw each peer's best way, in times of perjac's, on a logarithmic axis."""
    rows = [standing for standing in standings if standing.ours and standing.others]
    peers = sorted({timed.peer for standing in rows for timed in standing.others})
    height = sum(len(standing.others) + 1.2 for standing in rows)
    with _drawn(file, (9, 1.5 + 0.22 * height)) as figure:
        axes = figure.add_subplot()
        place, ticks, names = 0.0, [], []
        for standing in rows:
            ticks.append(place + (len(standing.others) - 1) / 2)
            names.append(f"{JOBS[standing.job].title}\n{standing.model}")
            for timed in standing.others:
                ratio = standing.ratio(timed)
                color = f"C{peers.index(timed.peer) % 10}"
                axes.barh(place, ratio - 1, left=1, height=0.9, color=color)
                times = f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"
                axes.annotate(f" {timed.peer} {times} ", (ratio, place), va="center",
                              fontsize=7, ha="left" if ratio >= 1 else "right")  # fmt: skip
                place += 1
            place += 1.2
        axes.set_xscale("log")
        axes.set_yticks(ticks, names, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.2, y=0.005)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xlabel("time, × perjac (right of the line: perjac is quicker)")
        axes.set_title(f"Each library's best way, {where}", fontsize=9)


def scaling(file: pathlib.Path, series: list[dict[str, Any]]) -> None:
    """Draw time and memory against size, a column for each thing that grows, with the fits."""
    axes_of = list(dict.fromkeys(each["axis"] for each in series))
    with _drawn(file, (3.2 * len(axes_of), 7)) as figure:
        grid = figure.subplots(2, len(axes_of), squeeze=False)
        for column, axis in zip(grid.T, axes_of, strict=True):
            of_axis = [each for each in series if each["axis"] == axis]
            for n, each in enumerate(of_axis):
                sizes = np.array([point["size"] for point in each["points"]])
                title = JOBS[each["job"]].title
                for axes, quantity in zip(column, ("ms", "mb"), strict=True):
                    axes.plot(sizes, [p[quantity] for p in each["points"]], f"C{n}o", ms=4)
                    power, name = each[quantity], title
                    if power:
                        name = f"{title}: {power['exponent']:.2f} ± {power['error']:.2f}"
                        axes.plot(sizes, Power(**power)(sizes), f"C{n}-", lw=1)
                    axes.plot([], [], f"C{n}o-", ms=4, label=name)
            for axes, label in zip(column, ("time, ms", "memory above idle, MB"), strict=True):
                axes.set(xscale="log", yscale="log", xlabel=of_axis[0]["what"], ylabel=label)
                axes.legend(
                    fontsize=6,
                    title="exponent",
                    title_fontsize=6,
                    loc="lower left",
                    bbox_to_anchor=(0, 1),
                    frameon=False,
                )  # above: no point lies under it
                axes.tick_params(labelsize=7)


@contextmanager
def _drawn(file: pathlib.Path, size: tuple[float, float]) -> Iterator[Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    figure.savefig(file, dpi=110)
