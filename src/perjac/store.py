"""Jacobians on disk, batch by batch: .zarr, or .npz for what fits into memory."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from perjac.errors import FileFormatError, missing_extra


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[Any]:
    """Open a store to add Jacobians to; what was added is kept however the block ends.

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
        self._path, self._parts = path, {}

    def add(self, jacobian: Mapping[str, Any]) -> None:
        for key in jacobian:
            self._parts.setdefault(key, []).append(np.asarray(jacobian[key]))

    def describe(self, **facts: str) -> None:
        """An .npz has no place for facts."""

    def close(self) -> None:
        if self._parts:
            joined = {key: np.concatenate(parts) for key, parts in self._parts.items()}
            with self._path.open("wb") as file:
                np.savez(file, **joined)  # type: ignore[arg-type]


class _Zarr:
    def __init__(self, path: pathlib.Path):
        try:
            import zarr
        except ImportError as failure:
            raise missing_extra("Writing .zarr", "store", failure) from failure
        self._root = zarr.open_group(str(path), mode="w")

    def add(self, jacobian: Mapping[str, Any]) -> None:
        for key in jacobian:
            rows = np.asarray(jacobian[key])
            if key in self._root:
                self._root[key].append(rows)  # type: ignore[union-attr]
            else:
                array = self._root.create_array(
                    key, shape=rows.shape, dtype=rows.dtype, chunks=rows.shape
                )
                array[:] = rows

    def describe(self, **facts: str) -> None:
        self._root.attrs.update(facts)

    def close(self) -> None:
        """Every batch is on disk already."""
