"""Pictures of maps: images, sequences and rows of features, on a scale centred on zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from perjac.errors import missing_extra

# The colour scale ends at this percentile of |values|, so that one pixel does not bleach the rest.
PERCENTILE = 99
_FEATURES, _COLUMNS = 15, 6
_COLOURS = "RdBu_r"


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib Figure that draws to files, in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as failure:
        raise missing_extra("Drawing pictures", "report", failure) from failure
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def limit(values: np.ndarray) -> float:
    """Return where a colour scale centred on zero ends."""
    return float(np.percentile(np.abs(values), PERCENTILE)) or float(np.abs(values).max()) or 1.0


def maps(x: np.ndarray, values: np.ndarray, titles: Sequence[str], title: str) -> Any:
    """Draw an input (*input_shape) beside its maps (M, *input_shape)."""
    draw = {1: _bars, 2: _sequence, 3: _images}.get(x.ndim, _bars)
    figure = draw(x, values, titles)
    note = "" if draw is _bars else f"; red raises, blue lowers, clipped at the {PERCENTILE}th "
    figure.suptitle(title + (f"{note}percentile" if note else ""), fontsize=9)
    return figure


def show(axes: Any, image: np.ndarray) -> None:
    """Show an input image (height, width, channels) on its own scale."""
    grey = image.shape[-1] not in (3, 4)
    picture = image.mean(-1) if grey else (image - image.min()) / (np.ptp(image) or 1)
    axes.imshow(picture, cmap="gray" if grey else None, interpolation="nearest")
    bare(axes)


def overlay(axes: Any, values: np.ndarray, end: float) -> Any:
    """Show a map (height, width, channels), channels summed, on a scale from -end to end."""
    drawn = axes.imshow(values.sum(-1), cmap=_COLOURS, vmin=-end, vmax=end, interpolation="nearest")
    bare(axes)
    return drawn


def bare(axes: Any) -> None:
    """Take the ticks and frame away."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _images(x: np.ndarray, values: np.ndarray, titles: Sequence[str]) -> Any:
    cells = len(values) + 1
    columns = min(cells, _COLUMNS)
    rows = -(-cells // columns)
    figure = new_figure(2.1 * columns + 0.6, 2.3 * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    show(grid[0], x)
    grid[0].set_title("input", fontsize=9)
    end, drawn = limit(values.sum(-1)), None
    for axes, one, name in zip(grid[1:], values, titles, strict=False):
        drawn = overlay(axes, one, end)
        axes.set_title(name, fontsize=9)
    for axes in grid[cells:]:
        axes.set_visible(False)
    figure.colorbar(drawn, ax=list(grid), shrink=0.8, pad=0.02)
    return figure


def _sequence(x: np.ndarray, values: np.ndarray, titles: Sequence[str]) -> Any:
    figure = new_figure(7, 1.6 * len(values) + 0.6)
    grid = figure.subplots(len(values), 1, squeeze=False).ravel()
    end, drawn = limit(values), None
    for axes, one, name in zip(grid, values, titles, strict=True):
        drawn = axes.imshow(one.T, cmap=_COLOURS, vmin=-end, vmax=end, aspect="auto")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("position", fontsize=8)
    figure.colorbar(drawn, ax=list(grid), pad=0.02)
    return figure


def _bars(x: np.ndarray, values: np.ndarray, titles: Sequence[str]) -> Any:
    flat = values.reshape(len(values), -1)
    figure = new_figure(6, (0.22 * min(flat.shape[1], _FEATURES) + 0.8) * len(flat))
    grid = figure.subplots(len(flat), 1, squeeze=False).ravel()
    for axes, one, name in zip(grid, flat, titles, strict=True):
        largest = np.argsort(-np.abs(one))[:_FEATURES][::-1]
        colours = ["#b2182b" if v > 0 else "#2166ac" for v in one[largest]]
        axes.barh([f"feature {n}" for n in largest], one[largest], color=colours)
        axes.axvline(0, color="0.4", linewidth=0.8)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
    return figure
