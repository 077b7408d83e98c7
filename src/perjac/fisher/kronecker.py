"""Kronecker-factored blocks, one for each weight: KFAC, and EKFAC in its eigenbasis.

Made of the moments that rows give; must not know models, nor what rows are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import scipy.linalg
import tensorflow as tf

from perjac._core.backend import memory
from perjac._core.backend.axis_layout import Relabelling
from perjac._core.backend.shapes import known
from perjac._core.factors.reductions import SideMoments, Sides
from perjac._rows import Rows
from perjac.errors import InputError, PerjacWarning, warn
from perjac.fisher._sums import added
from perjac.fisher.blocks import Block

APPROXIMATIONS = ("expand", "reduce")
# Sides longer than that are kept as diagonals: 8,192² numbers are 0.5 GiB, and their eigenvectors
# take minutes.
_LONGEST = 8192


@dataclasses.dataclass(frozen=True, eq=False)
class Kronecker(Block):
    """A block A ⊗ B: a weight read as a matrix (I, O), A (I, I) and B (O, O).

    Attributes
    ----------
    left : np.ndarray
        A for each group, (G, I, I); or its diagonal, (G, I).
    right : np.ndarray
        B for each group, (G, O, O); or its diagonal, (G, O).
    count : np.ndarray
        Of how many terms A is the mean, (1,) or (G,): weights for merging.
    order : np.ndarray, optional
        Where each number of (G, I, O) is among the weight's own, (p,); as they come if left out.
    """

    left: np.ndarray
    right: np.ndarray
    count: np.ndarray
    order: np.ndarray | None = None

    @property
    def size(self) -> int:
        """p."""
        return self.left.shape[0] * self.left.shape[1] * self.right.shape[1]

    @functools.cached_property
    def basis(self) -> Eigenbasis:
        """The same by its eigenvectors, which are those of A and B."""
        (a, left), (b, right) = (_spectra(side) for side in (self.left, self.right))
        return Eigenbasis(left, right, a[:, :, None] * b[:, None], self.order)

    def products(self, v: np.ndarray) -> np.ndarray:
        """Return the block times v (p, m).

        By the eigenvectors, as solutions are: of sides summed in float32, eigenvalues that
        rounding has left below zero are zero in both.
        """
        return self.basis.products(v)

    def of_spectrum(self, function: Any, v: np.ndarray) -> np.ndarray:
        """Return U f(λ) Uᵀ v."""
        return self.basis.of_spectrum(function, v)

    def eigenvalues(self) -> np.ndarray:
        """Return the products of A's and B's eigenvalues."""
        return self.basis.eigenvalues()

    def eigenvectors(self, chosen: np.ndarray) -> np.ndarray:
        """Return some of their vectors."""
        return self.basis.eigenvectors(chosen)

    def diagonal(self) -> np.ndarray:
        """Return the products of A's and B's diagonals."""
        a, b = (_diagonal(side) for side in (self.left, self.right))
        return _vectors((a[:, :, None] * b[:, None])[None], self.order)[:, 0]

    def merged(self, other: Kronecker, mine: float, theirs: float) -> Kronecker:
        """Return the block of all examples together: the sums behind A and B add up."""
        count = self.count + other.count
        share = _beside(self.count / np.where(count, count, 1), self.left)
        left = share * self.left + (1 - share) * other.left
        right = mine * self.right + theirs * other.right
        return Kronecker(left, right, count, self.order)


@dataclasses.dataclass(frozen=True, eq=False)
class Eigenbasis(Block):
    """A block (U ⊗ V) diag(λ) (U ⊗ V)ᵀ: the eigenvectors of KFAC's two sides, and any values.

    Attributes
    ----------
    left : np.ndarray or None
        U for each group, (G, I, I), a vector in a column; None for unit vectors.
    right : np.ndarray or None
        V, (G, O, O).
    values : np.ndarray
        λ, (G, I, O).
    order : np.ndarray, optional
        As in `Kronecker`.
    """

    left: np.ndarray | None
    right: np.ndarray | None
    values: np.ndarray
    order: np.ndarray | None = None

    @property
    def size(self) -> int:
        """p."""
        return self.values.size

    def products(self, v: np.ndarray) -> np.ndarray:
        """Return the block times v (p, m)."""
        return self.of_spectrum(lambda values: values, v)

    def of_spectrum(self, function: Any, v: np.ndarray) -> np.ndarray:
        """Return (U ⊗ V) f(λ) (U ⊗ V)ᵀ v."""
        x = _matrices(v, self.order, self.values.shape)
        x = _between(_turned(self.left), x, self.right)
        return self._back(function(self.values) * x)

    def eigenvalues(self) -> np.ndarray:
        """Return λ."""
        return self.values.ravel()

    def eigenvectors(self, chosen: np.ndarray) -> np.ndarray:
        """Return products of a vector of either side."""
        units = np.zeros((len(chosen), self.size))
        units[np.arange(len(chosen)), chosen] = 1
        return self._back(units.reshape(len(chosen), *self.values.shape))

    def diagonal(self) -> np.ndarray:
        """Return the diagonal: of squared entries of the vectors, weighted by λ."""
        left, right = (None if side is None else np.square(side) for side in self._sides)
        return _vectors(_between(left, self.values[None], _turned(right)), self.order)[:, 0]

    def trace(self) -> float:
        """Return the sum of λ."""
        return float(self.values.sum())

    def merged(self, other: Eigenbasis, mine: float, theirs: float) -> Eigenbasis:
        """Return the weighted sum, which has a basis of this kind if both bases are the same.

        Raises
        ------
        InputError
            If they are not.
        """
        for one, another in zip(self._sides, other._sides, strict=True):
            if one is not another and not _equal(one, another):
                raise InputError(
                    "The eigenbases of two parts of the data are not the same, so that their sum "
                    "is diagonal in neither. Merge their kronecker() forms; or ask for the "
                    "eigenbasis of all the data at once, as a tf.data.Dataset."
                )
        values = mine * self.values + theirs * other.values
        return dataclasses.replace(self, values=values)

    @property
    def _sides(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        return self.left, self.right

    def _back(self, x: np.ndarray) -> np.ndarray:
        """Return (m, G, I, O) in the basis as vectors (p, m)."""
        return _vectors(_between(self.left, x, _turned(self.right)), self.order)


def asked(approximation: str) -> SideMoments:
    """Return what `SideSums` adds up, as a question about rows."""
    return SideMoments(approximation == "reduce", _LONGEST)


class SideSums:
    """Sums of both sides' moments over rows, of which KFAC's blocks are made.

    Parameters
    ----------
    memory_limit : int, str or None
        For the sides.
    """

    def __init__(self, memory_limit: int | str | None):
        self._memory_limit = memory_limit
        self._totals: dict[str, list[np.ndarray]] = {}
        self._layouts: dict[str, Relabelling] = {}

    def add(self, found: Mapping[str, Sides]) -> None:
        """Add the answers to `asked` of some rows of a square root.

        Raises
        ------
        TooLargeError
            If the sides do not fit.

        Warns
        -----
        PerjacWarning
            Where a side is so long that only its diagonal is kept.
        """
        readings = {key: sides.reading for key, sides in found.items()}
        moments = {key: (s.left, s.right, s.count) for key, s in found.items()}
        if not self._totals:
            self._layouts = readings
            _check_sides(found, self._memory_limit)
        elif self._layouts != readings:
            raise InputError("The weights meet the data in another way in a later batch. Give "
                             "batches of examples of one shape.")  # fmt: skip
        for key, three in moments.items():
            before = self._totals.get(key, [None] * 3)
            self._totals[key] = [added(*pair) for pair in zip(before, three, strict=True)]

    def blocks(self, scale: float) -> dict[tuple[str, ...], Kronecker]:
        """Return KFAC's block of each weight; `scale` is what Σ rowᵀ row is multiplied by.

        The sums are used up, one after another: of a large network they fill gigabytes.
        """
        found = {}
        for key in list(self._totals):
            left, right, count = self._totals.pop(key)
            found[(key,)] = Kronecker(
                np.divide(left, _beside(np.where(count, count, 1), left), dtype="f8"),
                np.multiply(right, scale, dtype="f8"),
                count.astype("f8"),
                _order(self._layouts[key]),
            )
        return found


def eigenbasis_blocks(
    parts: Iterable[Rows], blocks: Mapping[tuple[str, ...], Kronecker], scale: float
) -> dict[tuple[str, ...], Eigenbasis]:
    """Return EKFAC's block of each weight: KFAC's eigenvectors, and the exact diagonal there.

    Parameters
    ----------
    parts : iterable of Rows
        All rows, once more.
    blocks : mapping
        What `SideSums` made.
    scale : float
        What Σ rowᵀ row is multiplied by.
    """
    named = {key: block.basis for (key,), block in blocks.items()}
    bases: dict[str, dict[str, tf.Tensor]] = {}
    totals = {key: np.zeros(basis.values.shape) for key, basis in named.items()}
    for rows in parts:
        if not bases:
            bases = {key: _as_tensors(basis, rows.held) for key, basis in named.items()}
        for key, squares in rows.squares_along(bases).items():
            totals[key] += np.asarray(squares)
    return {
        (key,): dataclasses.replace(basis, values=scale * totals[key])
        for key, basis in named.items()
    }


def _as_tensors(basis: Eigenbasis, dtype: tf.DType) -> dict[str, tf.Tensor]:
    sides = {"left": basis.left, "right": basis.right}
    return {name: tf.cast(side, dtype) for name, side in sides.items() if side is not None}


def _check_sides(found: Mapping[str, Sides], memory_limit: int | str | None) -> None:
    """Raise where the sides are too large, and warn where only a diagonal of one is kept."""
    sides = {key: (both.left, both.right) for key, both in found.items()}
    numbers = sum(2 * side.shape.num_elements() for pair in sides.values() for side in pair)
    memory.check(
        8 * numbers, memory_limit, "KFAC's sides and their eigenvectors",
        "Choose diagonal(), or fewer weights with wrt=.",
    )  # fmt: skip
    long = [
        f"{key!r} as {found[key].reading.target}"
        for key, pair in sides.items()
        if any(len(side.shape) == 2 and known(side.shape)[1] > _LONGEST for side in pair)
    ]
    if long:
        warn(
            f"KFAC keeps only the diagonal of sides longer than {_LONGEST}: of {', '.join(long)}.",
            PerjacWarning,
        )


def _order(layout: Relabelling) -> np.ndarray | None:
    """Return where each number of a layout's target is in the weight; None where nothing moves."""
    if not any(kind == "transpose" for kind, *_ in layout.steps):
        return None
    numbers = np.arange(math.prod(layout.shape)).reshape(layout.shape)
    return np.ravel(np.asarray(layout.apply(tf.constant(numbers))))


def _spectra(side: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return eigenvalues (G, n) of at least zero, and vectors (G, n, n): None for unit vectors."""
    if side.ndim == 2:
        return side, None
    found = [scipy.linalg.eigh(matrix) for matrix in side]
    values, vectors = zip(*found, strict=True)
    return np.maximum(np.stack(values), 0), np.stack(vectors)


def _beside(each: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Return numbers of groups, (1,) or (G,), in the rank of a side (G, ...)."""
    return each.reshape(-1, *[1] * (side.ndim - 1))


def _diagonal(side: np.ndarray) -> np.ndarray:
    return side if side.ndim == 2 else np.diagonal(side, axis1=1, axis2=2)


def _equal(one: np.ndarray | None, another: np.ndarray | None) -> bool:
    return one is not None and another is not None and np.array_equal(one, another)


def _turned(side: np.ndarray | None) -> np.ndarray | None:
    return None if side is None else side.transpose(0, 2, 1)


def _between(left: np.ndarray | None, x: np.ndarray, right: np.ndarray | None) -> np.ndarray:
    """Return left x right for x (m, G, I, O), each of them the identity where it is None."""
    x = x if left is None else left @ x
    return x if right is None else x @ right


def _matrices(v: np.ndarray, order: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """Return v (p, m) as (m, G, I, O)."""
    return (v if order is None else v[order]).T.reshape(v.shape[1], *shape)


def _vectors(x: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Return x (m, G, I, O) as (p, m)."""
    flat = x.reshape(len(x), math.prod(x.shape[1:])).T
    if order is None:
        return flat
    found = np.empty_like(flat)
    found[order] = flat
    return found
