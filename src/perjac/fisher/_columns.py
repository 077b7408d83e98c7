"""Which number of a flat vector belongs to which weight: vectors as users hold them, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perjac._core.backend.shapes import size
from perjac._core.model.variables import ByKey, match
from perjac.errors import InputError, UnknownNameError


@dataclasses.dataclass(frozen=True)
class Columns:
    """The P numbers differentiated against, weight by weight.

    Attributes
    ----------
    keys : tuple of str
        The weights, in the order of the numbers.
    shapes : tuple of tuple of int
        Theirs.
    """

    keys: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """P."""
        return sum(size(shape) for shape in self.shapes)

    @property
    def slices(self) -> dict[str, slice]:
        """Where each weight's numbers are."""
        ends = np.cumsum([0, *(size(shape) for shape in self.shapes)]).tolist()
        pairs = zip(ends[:-1], ends[1:], strict=True)
        return {key: slice(*pair) for key, pair in zip(self.keys, pairs, strict=True)}

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a weight's shape."""
        return self.shapes[self.keys.index(key)]

    def only(self, keys: Sequence[str]) -> Columns:
        """Return some of the weights, as an order of their own."""
        return Columns(tuple(keys), tuple(self.shape(key) for key in keys))

    def layers(self) -> list[tuple[str, ...]]:
        """Return the weights layer by layer: a layer is a key without its last name."""
        groups: dict[str, list[str]] = {}
        for key in self.keys:
            groups.setdefault(key.rpartition("/")[0] or key, []).append(key)
        return [tuple(keys) for keys in groups.values()]

    def flat(self, vector: Any) -> np.ndarray:
        """Return a vector (P,) or (P, m), or a mapping of key to array, as an array in float64.

        Raises
        ------
        InputError
            If it does not fit.
        """
        if not isinstance(vector, Mapping):
            array = np.asarray(vector, "f8")
            if array.ndim not in (1, 2) or len(array) != self.count:
                raise InputError(
                    f"Expected a vector of shape ({self.count},) or ({self.count}, m). "
                    f"Received: {array.shape}."
                )
            return array
        found = np.zeros(self.count)
        for key, value in vector.items():
            key = self.find(key)
            if tuple(np.shape(value)) != self.shape(key):
                raise InputError(
                    f"Expected v[{key!r}] of shape {self.shape(key)}. Received: {np.shape(value)}."
                )
            found[self.slices[key]] = np.ravel(value)
        return found

    def like(self, flat: np.ndarray, given: Any) -> Any:
        """Return a flat vector (P,) as what was given: an array, or a mapping."""
        return self.by_key(flat) if isinstance(given, Mapping) else flat

    def by_key(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Return a flat vector (P,) as {key: array of the weight's shape}.

        Short names find it too, where they fit but one.
        """
        slices = self.slices
        parts = {key: flat[slices[key]].reshape(self.shape(key)) for key in self.keys}
        return ByKey(parts, self.find)

    def find(self, name: Any) -> str:
        """Return the key that a user's name means.

        Raises
        ------
        UnknownNameError
            If none or several do.
        """
        if not isinstance(name, str):
            raise UnknownNameError(f"Expected the name of a weight. Received: {name!r}.")
        return match(name, self.keys, "weight")
