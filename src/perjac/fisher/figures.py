"""Pictures of Fisher information: its spectrum, its trace by layer, its diagonal by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perjac._drawing import new_figure
from perjac.errors import InputError
from perjac.fisher.form import Form

# The colours of the maps: blue for what there is, red for what is pointed at.
_RED, _BLUE, _PALE, _INK, _SOFT = "#b2182b", "#2166ac", "#92b4d4", "#1c2430", "#5b6675"
_LAYERS, _PANELS, _COLUMNS = 30, 24, 3
# Percent of the entries, the smallest, that share a histogram's first bar.
_TAIL = 0.1


def spectrum(
    information: Any, damping: float | None = None, complete: bool = True, title: str = ""
) -> Any:
    """Draw eigenvalues, and the effective dimension against the damping.

    Parameters
    ----------
    information : Form, or array (P,) or (k,)
        Or eigenvalues in any order: all of them, or the largest.
    damping : float, optional
        Is marked.
    complete : bool
        Whether they are all. Of a part no effective dimension is drawn.
    title : str
        Above the figure.

    Returns
    -------
    matplotlib Figure
        `savefig` writes it as .png, .pdf or .svg.

    Examples
    --------
    >>> import io
    >>> from perjac.fisher import figures
    >>> drawn = figures.spectrum([3.0, 0.5, 1e-4], damping=1e-2)
    >>> drawn.savefig(io.BytesIO(), format="pdf")
    """
    is_form = isinstance(information, Form)
    given = information.eigenvalues() if is_form else information
    values = np.sort(np.ravel(np.asarray(given, "f8")))[::-1]
    # What rounding leaves of the zeros is no part of the picture.
    positive = values[values > values.max(initial=0) * values.size * np.finfo("f8").eps]
    if not positive.size:
        raise InputError("Expected eigenvalues, at least one of them above zero.")
    figure = new_figure(8.4 if complete else 4.6, 3.1)
    panels = figure.subplots(1, 2 if complete else 1, squeeze=False)[0]
    ranks = np.arange(1, len(positive) + 1)
    few = len(positive) <= 40
    panels[0].plot(ranks, positive, color=_BLUE, linewidth=1.8, marker="o" if few else None, ms=4)
    panels[0].set_yscale("log")
    panels[0].set_xlabel(_counted(len(positive), len(values), complete))
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("eigenvalue")
    if damping:
        _threshold(panels[0], positive, damping)
    if complete:
        _dimension(panels[1], positive, damping)
    for axes in panels:
        _plain(axes)
    return _titled(figure, title)


def traces(information: Form | Mapping[str, Any], title: str = "") -> Any:
    """Draw the trace of each layer as a bar, with its share of the whole.

    Parameters
    ----------
    information : Form, or mapping of str to number or array
        Of layers to traces, or to entries of the diagonal, in the order of the layers. Of more
        than 30 the largest are drawn.
    title : str
        Above the figure.

    Returns
    -------
    matplotlib Figure
        `savefig` writes it as .png, .pdf or .svg.
    """
    found = {name: float(np.sum(part)) for name, part in by_layer(information).items()}
    names, sizes = list(found), np.array(list(found.values()))
    whole = float(sizes.sum())
    shown = np.sort(np.argsort(-sizes, kind="stable")[:_LAYERS])
    labels, lengths = _short([names[n] for n in shown], 34), sizes[shown]
    figure = new_figure(6.4, 0.27 * len(shown) + 0.95)
    axes = figure.subplots()
    drawn = axes.barh(range(len(shown)), lengths, height=0.68, color=_BLUE)
    told = [f"{_figure(size)}  ({_share(size, whole)})" for size in lengths]
    axes.bar_label(drawn, told, padding=4, fontsize=8.5, color=_INK)
    axes.set_yticks(range(len(shown)), labels, parse_math=False)
    axes.set_ylim(len(shown) - 0.45, -0.55)  # the first layer on top
    axes.set_xlim(0, 1.32 * lengths.max() or 1)  # room for what is written beside the bars
    others = len(names) - len(shown)
    rest = _share(whole - float(lengths.sum()), whole)
    axes.set_xlabel(
        "trace (share of the whole)" + (f"; {others} other layers: {rest}" if others else "")
    )
    _plain(axes, "left")
    axes.tick_params(axis="y", length=0)
    return _titled(figure, title)


def diagonal(information: Form | Mapping[str, Any], title: str = "") -> Any:
    """Draw the logarithms of the diagonal's entries as a histogram for each layer.

    Parameters
    ----------
    information : Form, or mapping of str to array
        Of layers to entries of the diagonal, of any shape, in the order of the layers. Of more than
        24 those with the largest sums are drawn.
    title : str
        Above the figure.

    Returns
    -------
    matplotlib Figure
        `savefig` writes it as .png, .pdf or .svg.
    """
    entries = {name: np.ravel(np.asarray(v, "f8")) for name, v in by_layer(information).items()}
    left_out = len(entries) - _PANELS
    if left_out > 0:
        largest = set(sorted(entries, key=lambda name: -entries[name].sum())[:_PANELS])
        entries = {name: values for name, values in entries.items() if name in largest}
        title += f"\n{left_out} layers with smaller traces are left out"
    logs = {name: np.log10(values[values > 0]) for name, values in entries.items()}
    every = np.concatenate(list(logs.values()))
    if not every.size:
        raise InputError("Expected entries above zero. Received zeros alone.")
    low, high = np.floor(np.percentile(every, _TAIL)), np.ceil(every.max())
    bins = np.linspace(low, max(high, low + 1), 49)
    below = " (first bar: all below, too)" if every.min() < low else ""
    columns = 2 if len(entries) == 4 else min(len(entries), _COLUMNS)
    rows = -(-len(entries) // columns)
    figure = new_figure(max(2.75 * columns, 4.2), 1.55 * rows + 0.75)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    labels = _short(list(entries), 28)
    for axes, label, (name, found) in zip(grid, labels, logs.items(), strict=False):
        axes.hist(np.maximum(found, low), bins, color=_PALE, edgecolor=_BLUE, linewidth=0.4)
        if found.size:
            axes.axvline(np.median(found), ymax=0.74, color=_RED, linewidth=1.4)
        zeros = len(entries[name]) - len(found)
        told = f"\n{_share(zeros, len(entries[name]))} zero" if zeros else ""
        axes.set_title(label, fontsize=9, parse_math=False)
        axes.text(
            0.02, 0.97, f"{len(entries[name]):,} weights{told}",
            transform=axes.transAxes, ha="left", va="top", fontsize=8, color=_SOFT,
        )  # fmt: skip
        axes.margins(y=0.45)  # room for that text
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
        _plain(axes)
    for axes in grid[len(entries) :]:
        axes.set_visible(False)
    for axes in grid[max(len(entries) - columns, 0) : len(entries)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel(f"log₁₀ of the diagonal's entries{below}; red: median", fontsize=9)
    figure.supylabel("weights", fontsize=9)
    return _titled(figure, title.strip())


def by_layer(information: Form | Mapping[str, Any]) -> dict[str, Any]:
    """Return the diagonal's entries of each layer, flat; a mapping as it is.

    Raises
    ------
    InputError
        If there is none.
    """
    if isinstance(information, Mapping):
        if not information:
            raise InputError("Expected at least one layer. Received: {}.")
        return dict(information)
    columns = information.columns
    entries = columns.by_key(information.diagonal())
    return {
        keys[0].rpartition("/")[0] or keys[0]: np.concatenate([entries[k].ravel() for k in keys])
        for keys in columns.layers()
    }


def _dimension(axes: Any, values: np.ndarray, damping: float | None) -> None:
    """Draw how many directions are determined, over the dampings where that changes."""
    first, last = np.log10([values.min(), values.max()]) + [-1, 2]
    if damping:  # with room to its right, above the curve, for what is written there
        first = min(first, np.log10(damping) - 0.5)
        last = max(last, np.log10(damping) + 0.5 * (np.log10(damping) - first))
    dampings = np.logspace(first, last, 200)
    counts = [np.sum(values / (values + one)) for one in dampings]
    axes.plot(dampings, counts, color=_BLUE, linewidth=1.8)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.08 * len(values))
    axes.set_xlabel("damping")
    axes.set_ylabel("effective dimension")
    if damping:
        there = float(np.sum(values / (values + damping)))
        axes.axvline(damping, color=_RED, linewidth=1.2, linestyle="--")
        axes.plot([damping], [there], "o", color=_RED, ms=5)
        _pointed(axes, f"{_figure(there)} at {damping:g}", (damping, there), (7, 4), "left", "data")


def _threshold(axes: Any, values: np.ndarray, damping: float) -> None:
    """Mark the damping, with its name where the falling curve leaves room."""
    axes.axhline(damping, color=_RED, linewidth=1.2, linestyle="--")
    crossing = np.interp(-np.log(damping), -np.log(values), np.linspace(0, 1, len(values)))
    told, where = f"damping {damping:g}", axes.get_yaxis_transform()
    if crossing < 0.5:
        _pointed(axes, told, (1, damping), (-2, 3), "right", where)
    else:
        _pointed(axes, told, (0, damping), (4, -10), "left", where)
    axes.margins(y=0.12)


def _pointed(axes: Any, text: str, place: Any, offset: Any, ha: str, where: Any) -> None:
    axes.annotate(
        text, place, offset, xycoords=where, textcoords="offset points", ha=ha, fontsize=8.5,
        color=_RED,
    )  # fmt: skip


def _counted(positive: int, count: int, complete: bool) -> str:
    if not complete:
        return f"rank, of the {count:,} largest"
    if positive == count:
        return f"rank, of {count:,}"
    return f"rank; {count - positive:,} of {count:,} are zero"


def _plain(axes: Any, *more: str) -> None:
    axes.tick_params(labelsize=8.5)
    axes.xaxis.label.set_size(9)
    axes.yaxis.label.set_size(9)
    for side in ("top", "right", *more):
        axes.spines[side].set_visible(False)


def _titled(figure: Any, title: str) -> Any:
    if title:
        figure.suptitle(title, fontsize=9.5, parse_math=False)
    return figure


def _share(part: float, whole: float) -> str:
    share = 100 * part / whole if whole else 0.0
    return f"{share:.0f} %" if share >= 1 or not part else "<1 %"


def _figure(number: float) -> str:
    return f"{number:,.0f}" if 1e3 <= number < 1e6 else f"{number:.3g}"


def _short(names: Sequence[str], letters: int) -> list[str]:
    """Return layers' names without what all begin with, and without the middle of long ones."""
    parts = [name.split("/") for name in names]
    while len(parts) > 1 and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    joined = ["/".join(p) for p in parts]
    cut = letters // 3
    return [n if len(n) <= letters else f"{n[:cut]}…{n[cut + 1 - letters :]}" for n in joined]
