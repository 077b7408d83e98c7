"""A folder of saliency maps: a picture for each example, values.npz, and a page of them all."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from perjac.errors import UnknownNameError, nearest
from perjac.report.page import picture, render
from perjac.saliency import METHODS
from perjac.saliency.figures import PERCENTILE


def write(
    engine: Any,
    data: Any,
    out: pathlib.Path,
    method: str,
    target: Any,
    starts: Iterable[int],
    batch_size: int,
) -> int:
    """Explain examples batch by batch; return how many pictures were written.

    Parameters
    ----------
    engine : Engine
        The model.
    data : files.Data
        The examples.
    out : Path
        An existing folder.
    method, target : str, and as in `perjac.saliency`
        What is asked.
    starts : iterable of int
        Where each batch starts.
    batch_size : int
        Examples at a time.

    Raises
    ------
    UnknownNameError
        If there is no such method.
    """
    if method not in METHODS:
        raise UnknownNameError(f"There is no method {method!r}. {nearest(method, METHODS)}")
    cards, values, outputs = [], [], []
    try:
        for start in starts:
            names = data.names[start : start + batch_size]
            found = METHODS[method](engine, data.part(start, start + len(names)), target=target)
            for n, name in enumerate(names):
                path = out / _file_name(name, start + n, data.names)
                drawn = picture(found.figure(n), path)
                told = f"{', '.join(found.titles(n)) if target != 'all' else 'every output'}"
                title = f"example {name}" if name.isdigit() else name
                cards.append({"name": title, "picture": drawn, "told": told})
            values.append(np.asarray(found.values))
            outputs.append(np.asarray(found.outputs))
    finally:  # what is finished is kept, also when interrupted
        if values:
            done = data.names[: sum(map(len, values))]
            np.savez(
                out / "values.npz",
                values=np.concatenate(values),
                outputs=np.concatenate(outputs),
                names=np.array(done),
            )
            page = render(
                "gallery.html",
                cards=cards,
                method=method,
                percentile=PERCENTILE,
                wide=target == "all",
            )
            (out / "index.html").write_text(page, encoding="utf-8")
    return len(cards)


def _file_name(name: str, number: int, names: list[str]) -> str:
    """Return a picture's file name: the example's own, or with its number where two would clash."""
    stem = pathlib.Path(name).stem
    clash = sum(pathlib.Path(other).stem == stem for other in names) > 1
    if stem.isdigit():
        stem = f"example_{stem}"
    return f"{stem}_{number}.png" if clash else f"{stem}.png"
