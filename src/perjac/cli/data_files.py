"""Files → arrays: .npy, .npz, .csv and images."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from typing import Any

import numpy as np

from perjac.errors import FileFormatError, InputError, missing_extra

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


@dataclasses.dataclass(frozen=True)
class Data:
    """Examples read from files.

    Attributes
    ----------
    inputs : array, or dict of str to array
        The batch; a dict where the file names several inputs.
    names : list of str
        One for each example: the picture's file name, or its number.
    notes : list of str
        What was done to the data, and which files were left out.
    """

    inputs: Any
    names: list[str]
    notes: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def told(self, count: int) -> dict[str, list[str]]:
        """Return the first names, where they are more than numbers, as a fact to write down."""
        numbers = self.names[0] == "0"
        return {} if numbers else {"names": self.names[:count]}

    def part(self, start: int, stop: int) -> Any:
        """Return the inputs of some of the examples."""
        if isinstance(self.inputs, dict):
            return {name: array[start:stop] for name, array in self.inputs.items()}
        return self.inputs[start:stop]


def load_data(path: str | pathlib.Path, expected: Any = (), scale: float = 1 / 255) -> Data:
    """Read a batch of examples.

    Parameters
    ----------
    path : str or Path
        An .npy, .npz or .csv file, an image, or a folder of images.
    expected : sequence of inputs.Expected
        What the model declares: images are brought to its size and channels.
    scale : float
        What the 0 to 255 of images is multiplied by.

    Raises
    ------
    FileFormatError
        If a file cannot be read, naming it and the place.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileFormatError(f"There is no file or folder {path}.")
    if path.is_dir():
        return _images(sorted(p for p in path.iterdir() if p.is_file()), path, expected, scale)
    kind = path.suffix.lower()
    if kind in _IMAGES:
        return _images([path], path, expected, scale)
    if kind not in _READERS:
        raise FileFormatError(
            f"Expected .npy, .npz, .csv, an image or a folder of images. Received: {path}."
        )
    inputs = _READERS[kind](path)
    return Data(inputs, _numbered(inputs, path, "examples"), [])


def load_labels(path: str | pathlib.Path) -> Data:
    r"""Read the labels of a batch of examples.

    Parameters
    ----------
    path : str or Path
        An .npy or .npz file, or a .csv of numbers with or without a header. The arrays of an .npz
        are those of a model's outputs, by name; of a single column, labels are (N,).

    Returns
    -------
    Data
        Its `inputs` are the labels: an array, or a dict of these. Whole numbers of a .csv are
        integers.

    Raises
    ------
    FileFormatError
        If the file cannot be read, or holds no numbers.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from perjac.cli import data_files as files
    >>> path = pathlib.Path(tempfile.mkdtemp(), "y.csv")
    >>> _ = path.write_text("digit\n3\n1\n")
    >>> files.load_labels(path).inputs
    array([3, 1])
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileFormatError(f"There is no file {path}.")
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise FileFormatError(f"Expected labels as .npy, .npz or .csv. Received: {path}.")
    labels = _csv_labels(path) if kind == ".csv" else _READERS[kind](path)
    for array in labels.values() if isinstance(labels, dict) else [labels]:
        if array.dtype.kind not in "biuf":
            raise FileFormatError(
                f"Expected labels as numbers, classes counted from 0. {path} holds {array.dtype}."
            )
    return Data(labels, _numbered(labels, path, "labels"), [])


def _csv_labels(path: pathlib.Path) -> np.ndarray:
    labels = _csv(path, "float64")
    if np.isfinite(labels).all() and (labels == np.rint(labels)).all():
        labels = labels.astype("int64")
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _numbered(arrays: Any, path: pathlib.Path, what: str) -> list[str]:
    """Return the number of each example, after a look at the arrays' lengths."""
    named = arrays if isinstance(arrays, dict) else {"": arrays}
    for name, array in named.items():
        if array.ndim == 0 or len(array) == 0:
            where = f"{path}, {name!r}," if name else path
            raise FileFormatError(f"{where} holds no {what}: its shape is {array.shape}.")
    lengths = {name: len(array) for name, array in named.items()}
    if len(set(lengths.values())) > 1:
        raise FileFormatError(f"Expected arrays of one length. {path} holds {lengths}.")
    return [str(n) for n in range(next(iter(lengths.values())))]


def _npy(path: pathlib.Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as failure:
        raise FileFormatError(f"Cannot read {path}: {failure}") from failure


def _npz(path: pathlib.Path) -> Any:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as failure:  # a bad zip file, a pickle, a truncated array
        raise FileFormatError(f"Cannot read {path}: {failure}") from failure
    if not arrays:
        raise FileFormatError(f"{path} holds no arrays.")
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _csv(path: pathlib.Path, dtype: str = "float32") -> np.ndarray:
    rows: list[list[float]] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        for line, cells in enumerate(csv.reader(file), 1):
            if not any(cell.strip() for cell in cells):
                continue
            try:
                rows.append([float(cell) for cell in cells])
            except ValueError:
                if not rows and line == 1:
                    continue  # a header
                column = next(n for n, cell in enumerate(cells, 1) if not _is_number(cell))
                raise FileFormatError(
                    f"{path}, line {line}, column {column}: {cells[column - 1]!r} is no number."
                ) from None
            if len(rows[-1]) != len(rows[0]):
                raise FileFormatError(
                    f"{path}, line {line}: {len(rows[-1])} numbers, where the first row has "
                    f"{len(rows[0])}."
                )
    return np.array(rows, dtype)


_READERS = {".npy": _npy, ".npz": _npz, ".csv": _csv}


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _images(paths: list[pathlib.Path], where: pathlib.Path, expected: Any, scale: float) -> Data:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as failure:
        raise missing_extra("Reading images", "report", failure) from failure
    if len(expected) > 1:
        raise InputError(f"The model has {len(expected)} inputs; give them in one .npz file.")
    shape = tuple(expected[0].shape[1:]) if expected else (None, None, 3)
    if len(shape) != 3 or shape[2] not in (None, 1, 3, 4):
        raise InputError(f"The model's input {shape} is no image (height, width, channels).")
    arrays, names, notes = [], [], []
    mode = {1: "L", 4: "RGBA"}.get(shape[2] or 3, "RGB")
    for path in paths:
        try:
            with Image.open(path) as opened:
                picture = opened.convert(mode)
        except (UnidentifiedImageError, OSError) as failure:
            notes.append(f"Left out {path.name}: {type(failure).__name__}, no image.")
            continue
        height, width = shape[0] or picture.height, shape[1] or picture.width
        if picture.size != (width, height):
            notes.append(f"{path.name}: resized from {picture.size} to {(width, height)}.")
            picture = picture.resize((width, height))
        array = np.asarray(picture, "float32") * scale
        arrays.append(array[..., None] if mode == "L" else array)
        names.append(path.name)
    if not arrays:
        raise FileFormatError(f"No image could be read from {where}.")
    if len({array.shape for array in arrays}) > 1:
        raise InputError(f"The images in {where} differ in size, and the model fixes none.")
    notes.append(f"{len(arrays)} images, 0 to 255 multiplied by {scale:.4g}.")
    return Data(np.stack(arrays), names, notes)
