"""Arrays on disk, batch by batch: .zarr, or .npz for what fits into memory."""

from __future__ import annotations

import contextlib
import functools
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from perjac.errors import FileFormatError, missing_extra

_CHUNK = 2**16  # numbers: a file of its own for every 32 norms would be slow to read


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[Any]:
    """Open a store to add batches to; what was added as a whole is kept however the block ends.

    Raises
    ------
    FileFormatError
        If the path ends in neither .npz nor .zarr, or its folder does not exist.
    """
    kinds = {".npz": _Npz, ".zarr": _Zarr}
    if path.suffix not in kinds:
        raise FileFormatError(f"Expected -o to end in .npz or .zarr. Received: {path}.")
    if not path.parent.is_dir():
        raise FileFormatError(f"There is no folder {path.parent} to write {path.name} to.")
    store = kinds[path.suffix](path)
    try:
        yield store
    finally:
        store.close()


class _Npz:
    def __init__(self, path: pathlib.Path):
        self._path = path
        self._batches: list[dict[str, np.ndarray]] = []
        self._facts: dict[str, Any] = {}

    def add(self, arrays: Mapping[str, Any]) -> None:
        """Add a batch: the same keys each time, the examples first."""
        self._batches.append({key: np.asarray(arrays[key]) for key in arrays})

    def describe(self, **facts: Any) -> None:
        """Keep facts as arrays of their own, "about/…"."""
        self._facts.update({f"about/{name}": np.asarray(fact) for name, fact in facts.items()})

    def close(self) -> None:
        if self._batches:
            joined = {
                key: np.concatenate([batch[key] for batch in self._batches])
                for key in self._batches[0]
            }
            with self._path.open("wb") as file:
                np.savez(file, **joined, **self._facts)  # type: ignore[arg-type]


class _Zarr:
    def __init__(self, path: pathlib.Path):
        try:
            import zarr
        except ImportError as failure:
            raise missing_extra("Writing .zarr", "store", failure) from failure
        # What was there before is overwritten with the first batch, not by a wrong call.
        self._make = functools.cache(lambda: zarr.open_group(str(path), mode="w"))
        self._arrays: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._whole = 0  # examples of batches that were added to every array

    def add(self, arrays: Mapping[str, Any]) -> None:
        """Add a batch: the same keys each time, the examples first."""
        count = 0
        for key in arrays:
            rows = np.asarray(arrays[key])
            count = len(rows)
            if key in self._arrays:
                self._arrays[key].append(rows)
                continue
            fitting = max(count, _CHUNK // max(1, math.prod(rows.shape[1:])))
            made = self._make().create_array(
                key, shape=rows.shape, dtype=rows.dtype, chunks=(fitting, *rows.shape[1:])
            )
            self._arrays[key] = made
            made[:] = rows
        self._whole += count

    def describe(self, **facts: Any) -> None:
        """Keep facts as attributes."""
        self._facts.update(facts)

    def close(self) -> None:
        """Every batch is on disk already; the part of one that was cut short is taken off."""
        for array in self._arrays.values():
            if array.shape[0] > self._whole:
                array.resize((self._whole, *array.shape[1:]))
        if self._arrays:
            self._make().attrs.update(self._facts)
