"""What a function computes with besides its arguments: the values that it closes over.

A traced function keeps the numbers that it saw. Two functions that are equal here compute the same,
so that one trace serves both; one whose values have changed since is another function.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

# Methods of methods, and objects within objects, are followed so far.
_DEPTH = 6
# Arrays of up to so many bytes are kept as they are, others by a digest.
_LITTLE = 1024
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_FOREIGN = ("tensorflow", "keras", "tf_keras", "numpy")


class _Same:
    """Something that is equal to itself alone, and stays alive, so that its id is no other's."""

    def __init__(self, thing: Any):
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._thing is self._thing

    def __hash__(self) -> int:
        return id(self._thing)


class Key:
    """Something to look up by whose parts are hashed once."""

    __slots__ = ("_hash", "parts")

    def __init__(self, *parts: Hashable):
        self.parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Key) and (self._hash, self.parts) == (other._hash, other.parts)


def identity(function: Any) -> Hashable:
    """Return what a function is known by: its code, and all values that the code refers to.

    Numbers, texts and arrays count by what they are now; variables, whose values are read when the
    function runs, and other objects by which they are. Of an object whose attributes the code
    names, those count too.

    Parameters
    ----------
    function : callable
        A function, method, partial or callable object.

    Examples
    --------
    >>> scale = 2.0
    >>> loss = lambda y, output: scale * (y - output) ** 2
    >>> before = identity(loss)
    >>> before == identity(loss)
    True
    """
    return _Reader().of(function, (), 0)


class _Reader:
    """One reading of a function; what refers to itself is read once."""

    def __init__(self) -> None:
        self._inside: set[int] = set()
        self._read: dict[int, Hashable] = {}  # by ids of functions, which live as long as this

    def of(self, thing: Any, names: tuple[str, ...], depth: int) -> Hashable:
        """Return what a thing is known by to code that names these attributes."""
        if isinstance(thing, _PLAIN):  # -0.0 and 0.0, and 1 and True, are not the same
            return type(thing), repr(thing) if isinstance(thing, (float, complex)) else thing
        if isinstance(thing, (np.ndarray, np.generic)):
            if thing.dtype.hasobject:
                return _Same(thing)
            return "array", thing.dtype.str, thing.shape, _content(thing)
        if depth > _DEPTH or id(thing) in self._inside:
            return _Same(thing)
        self._inside.add(id(thing))
        try:
            return self._compound(thing, names, depth + 1)
        finally:
            self._inside.discard(id(thing))

    def _compound(self, thing: Any, names: tuple[str, ...], depth: int) -> Hashable:
        if isinstance(thing, types.FunctionType):
            return self._function(thing, depth)
        if isinstance(thing, types.MethodType):
            within = _names_of(thing.__func__)
            parts = self.of(thing.__func__, (), depth), self.of(thing.__self__, within, depth)
            return ("method", *parts)
        if isinstance(thing, functools.partial):
            parts = (thing.func, thing.args, thing.keywords)
            return ("partial", *(self.of(part, (), depth) for part in parts))
        if isinstance(thing, (list, tuple, set, frozenset)):
            return (type(thing), *(self.of(part, names, depth) for part in thing))
        if isinstance(thing, Mapping):
            pairs = [(self.of(k, (), depth), self.of(v, names, depth)) for k, v in thing.items()]
            return (type(thing), *pairs)
        return self._object(thing, names, depth)

    def _function(self, function: types.FunctionType, depth: int) -> Hashable:
        if (function.__module__ or "").partition(".")[0] in _FOREIGN:
            return _Same(function)
        if id(function) not in self._read:
            self._read[id(function)] = self._code(function, depth)
        return self._read[id(function)]

    def _code(self, function: types.FunctionType, depth: int) -> Hashable:
        names, around = _names(function.__code__), function.__globals__
        cells = [self._cell(cell, names, depth) for cell in function.__closure__ or ()]
        outer = [self.of(around[name], names, depth) for name in names if name in around]
        defaults = self.of((function.__defaults__, function.__kwdefaults__), (), depth)
        return (_Same(function.__code__), _Same(around), defaults, *cells, *outer)

    def _cell(self, cell: Any, names: tuple[str, ...], depth: int) -> Hashable:
        try:
            return self.of(cell.cell_contents, names, depth)
        except ValueError:  # not filled yet
            return "empty"

    def _object(self, thing: Any, names: tuple[str, ...], depth: int) -> Hashable:
        """Return which object it is, and what those of its attributes are that the code names."""
        kind = thing if isinstance(thing, type) else type(thing)
        module = getattr(kind, "__module__", "") or ""
        if isinstance(thing, types.ModuleType) or module.partition(".")[0] in _FOREIGN:
            return _Same(thing)
        held, reached = getattr(thing, "__dict__", {}), list(names)
        if callable(thing) and not isinstance(thing, type):
            reached += _names_of(getattr(kind, "__call__", None))  # noqa: B004
        for name in reached:  # which grows: what its methods name, and theirs
            if name not in held:
                reached += [n for n in _names_of(getattr(kind, name, None)) if n not in reached]
        asked = tuple(dict.fromkeys(reached))
        named = [(name, self.of(held[name], asked, depth)) for name in asked if name in held]
        helpers = [getattr(kind, name, None) for name in asked if name not in held]
        methods = [self.of(h, (), depth) for h in helpers if isinstance(h, types.FunctionType)]
        return (_Same(thing), *named, *methods)


def _content(array: np.ndarray | np.generic) -> bytes:
    data = array.tobytes()
    return data if len(data) <= _LITTLE else hashlib.blake2b(data).digest()


def _names_of(function: Any) -> tuple[str, ...]:
    return _names(function.__code__) if isinstance(function, types.FunctionType) else ()


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals and attributes that code refers to, functions in it included."""
    inside = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    found = [*code.co_names, *(name for c in inside for name in _names(c))]
    return tuple(dict.fromkeys(found))
