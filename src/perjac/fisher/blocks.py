"""Blocks on the diagonal of a Fisher information, and the form that is made of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import scipy.linalg

from perjac.errors import InputError
from perjac.fisher._columns import Columns
from perjac.fisher.form import Form, check_damping, checked

# Damping above so much of the trace, times P, leaves nothing singular: no eigenvalue is asked for.
_CLEARLY = 2**-48


class Block:
    """A symmetric positive semi-definite matrix (p, p) of some weights' numbers."""

    @property
    def size(self) -> int:
        """p."""
        raise NotImplementedError

    def products(self, v: np.ndarray) -> np.ndarray:
        """Return the block times v (p, m)."""
        raise NotImplementedError

    def of_spectrum(self, function: Any, v: np.ndarray) -> np.ndarray:
        """Return U f(λ) Uᵀ v for v (p, m): a function of the matrix, by its eigenvalues (p,)."""
        raise NotImplementedError

    def solved(self, v: np.ndarray, damping: float) -> np.ndarray:
        """Return (block + damping·I)⁻¹ v for v (p, m), of a sum that is not singular."""
        return self.of_spectrum(lambda x: 1 / (np.maximum(x, 0) + damping), v)

    def eigenvalues(self) -> np.ndarray:
        """Return all eigenvalues (p,), in no order."""
        raise NotImplementedError

    def eigenvectors(self, chosen: np.ndarray) -> np.ndarray:
        """Return the vectors of some of `eigenvalues()`, by number, (p, n)."""
        raise NotImplementedError

    def diagonal(self) -> np.ndarray:
        """Return the diagonal (p,)."""
        raise NotImplementedError

    def trace(self) -> float:
        """Return the sum of the diagonal."""
        return float(self.diagonal().sum())

    def merged(self, other: Self, mine: float, theirs: float) -> Self:
        """Return mine·self + theirs·other, as the block of all examples together."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Block):
    """A block as it is."""

    matrix: np.ndarray

    @property
    def size(self) -> int:
        """p."""
        return len(self.matrix)

    @functools.cached_property
    def _spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        return scipy.linalg.eigh(self.matrix)

    def products(self, v: np.ndarray) -> np.ndarray:
        """Return the block times v (p, m)."""
        return self.matrix @ v

    def solved(self, v: np.ndarray, damping: float) -> np.ndarray:
        """Return (block + damping·I)⁻¹ v: by Cholesky, while the spectrum is not known yet.

        Of 2,000 numbers that takes a tenth of the time or less.
        """
        if "_spectrum" in self.__dict__:
            return super().solved(v, damping)
        damped = self.matrix + damping * np.eye(self.size)
        return scipy.linalg.cho_solve(scipy.linalg.cho_factor(damped, overwrite_a=True), v)

    def of_spectrum(self, function: Any, v: np.ndarray) -> np.ndarray:
        """Return U f(λ) Uᵀ v."""
        values, vectors = self._spectrum
        return vectors @ (function(values)[:, None] * (vectors.T @ v))

    def eigenvalues(self) -> np.ndarray:
        """Return all eigenvalues."""
        return self._spectrum[0]

    def eigenvectors(self, chosen: np.ndarray) -> np.ndarray:
        """Return some of their vectors."""
        return self._spectrum[1][:, chosen]

    def diagonal(self) -> np.ndarray:
        """Return the diagonal."""
        return np.diagonal(self.matrix).copy()

    def merged(self, other: Dense, mine: float, theirs: float) -> Dense:
        """Return the weighted sum."""
        return Dense(mine * self.matrix + theirs * other.matrix)


@dataclasses.dataclass(frozen=True, eq=False)
class Diagonal(Block):
    """A block that is zero beside its diagonal: `scale` times `numbers`, in any shape and type."""

    numbers: np.ndarray
    scale: float = 1.0

    @functools.cached_property
    def entries(self) -> np.ndarray:
        """The diagonal (p,), in float64: made when it is first asked for."""
        return np.multiply(np.ravel(self.numbers), self.scale, dtype="f8")

    @property
    def size(self) -> int:
        """p."""
        return self.numbers.size

    def products(self, v: np.ndarray) -> np.ndarray:
        """Return the block times v (p, m)."""
        return self.entries[:, None] * v

    def of_spectrum(self, function: Any, v: np.ndarray) -> np.ndarray:
        """Return f(entries) v."""
        return function(self.entries)[:, None] * v

    def eigenvalues(self) -> np.ndarray:
        """Return the entries."""
        return self.entries

    def eigenvectors(self, chosen: np.ndarray) -> np.ndarray:
        """Return unit vectors."""
        found = np.zeros((self.size, len(chosen)))
        found[chosen, np.arange(len(chosen))] = 1
        return found

    def diagonal(self) -> np.ndarray:
        """Return the entries."""
        return self.entries

    def merged(self, other: Diagonal, mine: float, theirs: float) -> Diagonal:
        """Return the weighted sum."""
        return Diagonal(mine * self.entries + theirs * other.entries)


class BlockForm(Form):
    """A Fisher information of blocks along the diagonal, zero between them.

    Parameters
    ----------
    columns : Columns
        The weights.
    examples : int
        N.
    blocks : mapping of tuple of str to Block
        By the weights that each is about, which together are all of them.
    reduction : {"mean", "sum"}
        Whether it was divided by N.
    """

    def __init__(
        self,
        columns: Columns,
        examples: int,
        blocks: Mapping[tuple[str, ...], Block],
        reduction: str = "mean",
    ):
        super().__init__(columns, examples, reduction)
        self.blocks = dict(blocks)

    @functools.cached_property
    def _places(self) -> dict[tuple[str, ...], slice | np.ndarray]:
        """Where each block's numbers are in a vector of all."""
        slices = self.columns.slices
        return {
            keys: slices[keys[0]]
            if len(keys) == 1
            else np.concatenate([np.r_[slices[key]] for key in keys])
            for keys in self.blocks
        }

    def merge(self, other: BlockForm) -> BlockForm:
        """Return the form of both forms' examples together.

        Parameters
        ----------
        other : BlockForm
            The same form of the same weights, on other examples.
        """
        total, mine, theirs = self._joined(other)
        kinds, others = ({k: type(b) for k, b in f.blocks.items()} for f in (self, other))
        if kinds != others:
            raise InputError(f"Expected the same blocks of the same weights. Received: {other!r}.")
        blocks = {k: b.merged(other.blocks[k], mine, theirs) for k, b in self.blocks.items()}
        return BlockForm(self.columns, total, blocks, self.reduction)

    def trace(self) -> float:
        """Return the sum of the eigenvalues."""
        return sum(block.trace() for block in self.blocks.values())

    def traces(self) -> dict[str, float]:
        """Return the trace of each block, by its weights or their layer."""
        return {_name(keys): block.trace() for keys, block in self.blocks.items()}

    def logdet(self, damping: float = 0.0) -> float:
        """Return log det(F + damping·I)."""
        check_damping(damping)
        return float(np.log(checked(self.eigenvalues(), damping)).sum())

    def diagonal(self) -> np.ndarray:
        """Return the diagonal, (P,)."""
        found = np.zeros(self.columns.count)
        for keys, block in self.blocks.items():
            found[self._places[keys]] = block.diagonal()
        return found

    def eigenvalues(self) -> np.ndarray:
        """Return all P eigenvalues, the smallest first."""
        return np.sort(np.concatenate([block.eigenvalues() for block in self.blocks.values()]))

    def eigsh(self, k: int = 6) -> tuple[np.ndarray, np.ndarray]:
        """Return the k largest eigenvalues, the largest first, and their vectors (P, k)."""
        if not 1 <= k <= self.columns.count:
            raise InputError(f"Expected k= from 1 to {self.columns.count}. Received: {k!r}.")
        found = [block.eigenvalues() for block in self.blocks.values()]
        every = np.concatenate(found)
        order = np.argsort(every)[::-1][:k]
        ends = np.cumsum([len(values) for values in found])
        owners = np.searchsorted(ends, order, side="right")
        vectors = np.zeros((self.columns.count, k))
        for n, (keys, block) in enumerate(self.blocks.items()):
            mine = np.flatnonzero(owners == n)
            there = order[mine] - (ends[n] - len(found[n]))
            part = np.zeros((self.columns.count, len(mine)))
            part[self._places[keys]] = block.eigenvectors(there)
            vectors[:, mine] = part
        return every[order], vectors

    def _products(self, v: np.ndarray) -> np.ndarray:
        return self._each(lambda block, part: block.products(part), v)

    def _solved(self, v: np.ndarray, damping: float) -> np.ndarray:
        if damping <= self.columns.count * _CLEARLY * self.trace():
            checked(self.eigenvalues(), damping)
        return self._each(lambda block, part: block.solved(part, damping), v)

    def _spread(self, z: np.ndarray, damping: float) -> np.ndarray:
        checked(self.eigenvalues(), damping)
        return self._each(
            lambda block, part: block.of_spectrum(
                lambda x: 1 / np.sqrt(np.maximum(x, 0) + damping), part
            ),
            z,
        )

    def _each(self, ask: Any, v: np.ndarray) -> np.ndarray:
        found = np.empty_like(v)
        for keys, block in self.blocks.items():
            found[self._places[keys]] = ask(block, v[self._places[keys]])
        return found


def _name(keys: tuple[str, ...]) -> str:
    """Return what a block is called: its weight, its weights' layer, or the first and last one."""
    if len(keys) == 1:
        return keys[0]
    layers = list(dict.fromkeys(key.rpartition("/")[0] or key for key in keys))
    return layers[0] if len(layers) == 1 else f"{layers[0]} … {layers[-1]}"
