"""Examples → the empirical neural tangent kernel of a model, J J'ᵀ, tile by tile."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac import progress
from perjac._core.backend import memory
from perjac._core.backend.shapes import size
from perjac._core.model.variables import Source
from perjac.errors import InputError
from perjac.fisher._stream import Stream
from perjac.fisher._tiles import Tile, Tiles
from perjac.jacobian import Jacobian

# Bytes asked for at a time, where memory does not set a lower limit.
_AT_ONCE = 2**30
# Rows of a tile's side: products of 4,096 rows run at full speed, and fill 64 MiB in float32.
_ROWS = 4096


def ntk(
    engine: Any,
    x: Any,
    x2: Any = None,
    *,
    outputs: int | Sequence[int] | None = None,
    of: Any = None,
    wrt: Any = "weights",
    trace: bool = False,
    store: Any = None,
    resume: bool = True,
) -> Any:
    """Return the empirical neural tangent kernel, the inner products of all rows of Jacobians.

    Parameters
    ----------
    engine : Engine
        Of the model.
    x : array, or list or dict of arrays
        N examples. A tuple is a pair of examples and labels, as elsewhere here, and not taken.
    x2 : array, or list or dict of arrays, optional
        N' others; `x` itself if left out, and then half of the kernel is computed.
    outputs : int or list of int, optional
        Which K entries of the output, counted in C order; all if left out.
    of : str, int or layer, optional
        Which output, as in `Engine.jacobian`.
    wrt : as in `Engine.jacobian`
        Weights by default.
    trace : bool
        Whether to sum over outputs, Σ_k K[n, k, n', k], which takes one K-th of the products, and
        a pass back through the model for each output.
    store : path, optional
        Of a .zarr array to fill instead, for kernels larger than memory. The rows of two tiles are
        held at a time.
    resume : bool
        Whether to go on with a store that was cut short; else it is overwritten.

    Returns
    -------
    np.ndarray or zarr.Array
        (N, K, N', K'), or (N, N') for `trace`, in the type of the weights.

    Raises
    ------
    TooLargeError
        If it does not fit into the engine's memory limit, and there is no store.
    FileFormatError
        If the store is of another model, other weights, examples or options.
    PerjacError
        As `Engine.jacobian`.

    Notes
    -----
    N·K·N'·K'·P multiply-adds at most: a weight that meets one vector of I numbers per example, as
    in dense layers, takes N·N'·I + N·K·N'·K'·O in place of N·K·N'·K'·I·O. As many rows as fit half
    of the memory limit are kept for the next tiles; the others are computed anew.

    The empirical kernel is of the network at its weights as they are, not of infinite width.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> from perjac.fisher import ntk
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
    >>> engine = pj.Engine(model)
    >>> ntk(engine, np.ones((5, 4), "float32")).shape
    (5, 3, 5, 3)
    >>> ntk(engine, np.ones((5, 4), "float32"), np.ones((2, 4), "float32"), trace=True).shape
    (5, 2)

    References
    ----------
    Jacot et al. 2018, Neural Tangent Kernel: convergence and generalization in neural networks.
    """
    x, x2 = _examples(x, "x"), None if x2 is None else _examples(x2, "x2")
    asked = _Asked.of_first(engine, x, outputs, of, wrt, trace)
    mine = _Side(asked, x)
    theirs = mine if x2 is None else _Side(asked, x2)
    shape, tile = (
        tuple(n for side in (mine, theirs) for n in asked.lead(getattr(side, what)))
        for what in ("size", "block")
    )
    if store is not None:
        about = _fingerprint(asked, x, x2)
        tiles = Tiles(store, shape, tile, asked.dtype.as_numpy_dtype, about, resume)
        # A store that is gone on with keeps its tiles, also where memory would do for others now.
        mine.block, theirs.block = tiles.array.chunks[0], tiles.array.chunks[len(tile) // 2]
        for parts in _tiles(asked, mine, theirs, tiles.done):
            tiles.put(parts)
        return tiles.array
    memory.check(
        size(shape) * asked.dtype.size, engine.memory_limit, f"The kernel, {shape},",
        "Fill it on disk with store=, or choose trace=True, fewer outputs= or fewer examples.",
    )  # fmt: skip
    whole = np.empty(shape, asked.dtype.as_numpy_dtype)
    for parts in _tiles(asked, mine, theirs, 0):
        for where, values in parts:
            whole[where] = values
    return whole


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Whose kernel it is, and what an example takes.

    Attributes
    ----------
    engine : Engine
        Of the model.
    outputs : list of int
        K of them.
    every : bool
        Whether they are all that there are.
    of, wrt : as in `Engine.jacobian`
        The output, and what is differentiated against.
    trace : bool
        Whether to sum over the outputs.
    sources : list of Source
        What `wrt` means.
    passed, held : int
        Bytes that an example takes on the way to its outputs, and that its K rows are held in.
    """

    engine: Any
    outputs: list[int]
    every: bool
    of: Any
    wrt: Any
    trace: bool
    sources: list[Source]
    passed: int
    held: int

    @classmethod
    def of_first(cls, engine: Any, x: Any, outputs: Any, of: Any, wrt: Any, trace: bool) -> _Asked:
        """Settle it by the first example."""
        traced, names = engine._traces.of(engine._traces.prepare(_part(x, slice(0, 1))))
        head, sources = names.head(of), names.sources(wrt)
        count = size(traced.row_shape(head))
        chosen = _chosen(outputs, count)
        weights = [source for source in sources if source.kind == "weight"]
        entries = {
            decision.source.key: decision.entries
            for decision in traced.decisions(head, weights, len(chosen))
        }
        held = sum((entries.get(s.key) or len(chosen) * s.size) * s.dtype.size for s in sources)
        passed, every = 2 * traced.footprint(head), chosen == list(range(count))
        return cls(engine, chosen, every, of, wrt, trace, sources, passed, held)

    @property
    def dtype(self) -> tf.DType:
        """Of the kernel."""
        return max((source.dtype for source in self.sources), key=lambda dtype: dtype.size)

    @property
    def limit(self) -> int:
        """Bytes that may be held."""
        return min(memory.limit(self.engine.memory_limit) or _AT_ONCE, _AT_ONCE)

    @property
    def block(self) -> int:
        """How many examples fit that: two sides' rows, and the tile, b·each + b²·pair ≤ limit."""
        each = self.passed + 2 * self.held
        pair = 2 * size(self.lead(1)) ** 2 * self.dtype.size
        return int((math.sqrt(each**2 + 4 * pair * self.limit) - each) / (2 * pair))

    def lead(self, examples: int) -> tuple[int, ...]:
        """Return the shape of so many examples' rows in the kernel."""
        return (examples,) if self.trace else (examples, len(self.outputs))

    def rows(self, x: Any) -> list[Jacobian]:
        """Return the rows of some examples, so many outputs at a time as can be or are wanted."""
        count = len(self.outputs)
        room = (self.limit - self.passed) * count // (2 * self.held)
        most = 1 if self.trace else max(1, min(room, count))
        if most == count and self.every:
            return [self.engine.jacobian(x, wrt=self.wrt, of=self.of)]
        return [
            self.engine.jacobian(x, wrt=self.wrt, of=self.of, outputs=self.outputs[n : n + most])
            for n in range(0, count, most)
        ]

    def products(self, mine: list[Jacobian], theirs: list[Jacobian]) -> np.ndarray:
        """Return a tile, (b, K, b', K') or (b, b')."""
        if self.trace:
            pairs = zip(mine, theirs, strict=True)
            return sum(_gram(left, right)[:, 0, :, 0] for left, right in pairs)  # type: ignore
        if len(mine) == len(theirs) == 1:
            return _gram(mine[0], theirs[0])
        bands = [np.concatenate([_gram(left, right) for right in theirs], 3) for left in mine]
        return np.concatenate(bands, 1)


class _Side:
    """The examples along one side of the kernel, in blocks whose rows are kept while there is room.

    Attributes
    ----------
    size, block : int
        How many examples there are, and how many make a block.
    """

    def __init__(self, asked: _Asked, x: Any):
        self._asked, self._x = asked, x
        self.size = len(tf.nest.flatten(x)[0])
        most = min(asked.block, _ROWS // size(asked.lead(1)), self.size)
        self.block = -(-self.size // -(-self.size // max(most, 1)))  # of nearly one size
        self._kept: dict[int, list[Jacobian]] = {}
        self._room = asked.limit // 2

    def __len__(self) -> int:
        return -(-self.size // self.block)

    def where(self, n: int) -> slice:
        """Return which examples block n is of."""
        return slice(n * self.block, min((n + 1) * self.block, self.size))

    def rows(self, n: int, keep: bool = True) -> list[Jacobian]:
        """Return the rows of block n, and keep them if there is room."""
        if n in self._kept:
            return self._kept[n]
        rows = self._asked.rows(_part(self._x, self.where(n)))
        taken = sum(jacobian.nbytes for jacobian in rows)
        if keep and taken <= self._room:
            self._room -= taken
            self._kept[n] = rows
        return rows


def _tiles(asked: _Asked, mine: _Side, theirs: _Side, done: int) -> Iterator[list[Tile]]:
    """Give every tile but the first so many: its place and its numbers, and those of its mirror."""
    own = mine is theirs
    places = [(i, j) for i in range(len(mine)) for j in range(i + 1 if own else len(theirs))]
    for number in range(done, len(places)):
        i, j = places[number]
        if number == done or j == 0:
            rows = mine.rows(i, keep=own)
        across = rows if own and i == j else theirs.rows(j)
        tile = asked.products(rows, across)
        axes = range(len(asked.lead(1)))
        here, there = (
            (side, *(slice(None) for _ in axes[1:])) for side in (mine.where(i), theirs.where(j))
        )
        parts = [((*here, *there), tile)]
        if own and i != j:
            mirror = np.transpose(tile, [*(len(axes) + n for n in axes), *axes])
            parts.append(((*there, *here), mirror))
        yield parts
        progress.tell(number + 1, len(places))


def _gram(left: Jacobian, right: Jacobian) -> np.ndarray:
    return np.asarray(left.gram() if left is right else left.gram(right))


def _chosen(outputs: Any, count: int) -> list[int]:
    """Return the outputs asked for, as a list."""
    if outputs is None:
        return list(range(count))
    chosen: Any = [outputs] if isinstance(outputs, (int, np.integer)) else outputs
    if not isinstance(chosen, (list, tuple, range)) or not len(chosen):
        raise InputError(f"Expected outputs= as an int or a list of int. Received: {outputs!r}.")
    return list(chosen)


def _examples(x: Any, name: str) -> Any:
    """Return the user's examples, which can be read from anywhere, as arrays."""
    stream = Stream.of(x)
    if stream.size is None or len(stream.data) != 1:
        raise InputError(
            f"Expected {name} as an array, or as a list or dict of arrays. "
            f"Received: {type(x).__name__}."
        )
    return stream.data[0]


def _part(x: Any, where: slice) -> Any:
    return tf.nest.map_structure(lambda leaf: leaf[where], x)


def _fingerprint(asked: _Asked, x: Any, x2: Any) -> str:
    """Return what tells this kernel from others: its options, and a digest of all numbers."""
    digest = hashlib.sha256()
    for leaf in [*asked.engine._traces.weights.variables, *tf.nest.flatten((x, x2))]:
        if leaf is not None:
            array = np.ascontiguousarray(leaf)
            texts = array.dtype == object  # whose bytes are addresses
            numbers = repr(array.tolist()).encode() if texts else array.tobytes()
            digest.update(f"{array.shape} {array.dtype}".encode() + numbers)
    keys = [source.key for source in asked.sources]
    digest.update(repr((keys, asked.of, asked.outputs, asked.trace, x2 is None)).encode())
    return digest.hexdigest()
