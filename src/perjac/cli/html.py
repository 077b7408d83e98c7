"""Templates filled in, with everything escaped and every picture inside the page."""

from __future__ import annotations

import base64
import io
import pathlib
from typing import Any

from perjac.errors import missing_extra


def render(template: str, **values: Any) -> str:
    """Fill in a template of this folder; text is escaped."""
    try:
        import jinja2
    except ImportError as failure:
        raise missing_extra("Writing pages", "report", failure) from failure
    folder = jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=folder, autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**values)


def picture(figure: Any, path: pathlib.Path | None = None, dpi: int = 150) -> str:
    """Return a figure as a data: address; also write it to a file if a path is given."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, facecolor="white")
    if path is not None:
        path.write_bytes(drawn.getvalue())
    return "data:image/png;base64," + base64.b64encode(drawn.getvalue()).decode()
