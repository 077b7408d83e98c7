"""Empty figures: matplotlib, imported late and without a window."""

from __future__ import annotations

from typing import Any

from perjac.errors import missing_extra


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
