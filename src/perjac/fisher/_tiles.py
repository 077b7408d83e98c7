"""An array on disk that is filled tile by tile, and goes on where it was cut short."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from perjac.errors import FileFormatError, missing_extra

Tile = tuple[tuple[slice, ...], np.ndarray]


class Tiles:
    """A Zarr array, with a count of the tiles that are whole.

    Parameters
    ----------
    path : path
        Where; it ends in .zarr.
    shape, chunks : tuple of int
        Of the array, and of a tile.
    dtype : dtype
        Of its numbers.
    about : str
        Says what is filled in: only an array with the same is gone on with.
    resume : bool
        Whether to go on; else what is there is overwritten.

    Attributes
    ----------
    array : zarr.Array
        As far as it is filled.
    done : int
        How many tiles are.

    Raises
    ------
    FileFormatError
        If the path does not end in .zarr, its folder does not exist, or something else is there.
    MissingExtraError
        Without the zarr package.
    """

    def __init__(
        self,
        path: Any,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: Any,
        about: str,
        resume: bool,
    ):
        try:
            import zarr
        except ImportError as failure:
            raise missing_extra("Writing .zarr", "store", failure) from failure
        path = pathlib.Path(path)
        if path.suffix != ".zarr":
            raise FileFormatError(f"Expected store= to end in .zarr. Received: {path}.")
        if not path.parent.is_dir():
            raise FileFormatError(f"There is no folder {path.parent} to write {path.name} to.")
        if resume and path.exists():
            self.array = _opened(zarr, path, about)
        else:
            self.array = zarr.create_array(
                str(path), shape=shape, chunks=chunks, dtype=np.dtype(dtype), overwrite=True,
                attributes={"about": about, "tiles": 0},
            )  # fmt: skip
        self.done = int(self.array.attrs["tiles"])  # type: ignore[arg-type]

    def put(self, parts: Iterable[Tile]) -> None:
        """Write the next tile, which may lie at several places, and count it."""
        for where, values in parts:
            self.array[where] = values
        self.done += 1
        self.array.attrs["tiles"] = self.done  # last: a tile that was cut short is made anew


def _opened(zarr: Any, path: pathlib.Path, about: str) -> Any:
    """Return the array that is there, to go on with."""
    otherwise = "Choose another store=, or overwrite it with resume=False."
    try:
        array = zarr.open_array(str(path), mode="r+")
    except Exception as failure:  # whatever zarr says of a folder that is not an array
        raise FileFormatError(f"{path} is no Zarr array. {otherwise}") from failure
    if array.attrs.get("about") != about:
        raise FileFormatError(
            f"{path} is not of the same model, weights, examples and options. {otherwise}"
        )
    return array
