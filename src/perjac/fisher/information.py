"""Fisher: the information that a data set holds about a model's weights, in any form."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac import memory
from perjac.errors import InputError, check_one_of
from perjac.fisher.blocks import Block, BlockForm, Dense, Diagonal
from perjac.fisher.columns import Columns
from perjac.fisher.form import Form
from perjac.fisher.implicit import Implicit
from perjac.fisher.low_rank import LowRank
from perjac.fisher.root import Root
from perjac.fisher.stream import Stream
from perjac.rows import Rows

_REDUCTIONS = ("mean", "sum")
# Up to so many numbers the exact questions are answered by the matrix itself.
_SMALL = 1024
# Up to so many rows, by their Gram matrix: 8,192² numbers are 0.5 GiB, their eigenvalues a minute.
_GRAM = 8192


class Fisher:
    """The Fisher information of a data set about a model's weights; made by `Engine.fisher`.

    Nothing is computed until a form is asked for. Each form reads the data once, in memory that
    does not grow with the number of examples, but for `low_rank` and what rests on it.

    Attributes
    ----------
    columns : Columns
        The weights, in the order of the P numbers.
    shape : tuple of int
        (P, P).

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
    >>> F = pj.Engine(model).fisher(np.ones((8, 4), "float32"), likelihood="categorical")
    >>> F.diagonal().traces().keys(), F.dense().shape
    (dict_keys(['top/kernel', 'top/bias']), (15, 15))
    """

    def __init__(self, root: Root, data: Any, reduction: str, variance: Any = 1.0):
        check_one_of(reduction, _REDUCTIONS, "reduction")
        self._root, self._stream, self.reduction = root, Stream.of(data), reduction
        x, y = self._stream.first()
        sources = root.prepare(x, y)
        self._at_once, self._rows_at_once = root.at_once(x)
        self.columns = Columns(tuple(s.key for s in sources), tuple(s.shape for s in sources))
        if variance == "fitted":
            root.variance = self._residual_variance()

    def __repr__(self) -> str:
        root = self._root
        return (
            f"Fisher(kind={root.kind!r}, likelihood={root.likelihood!r}, shape={self.shape}, "
            f"reduction={self.reduction!r})"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.columns.count, self.columns.count

    @property
    def keys(self) -> tuple[str, ...]:
        """The weights, in the order of the P numbers."""
        return self.columns.keys

    @property
    def explained(self) -> str:
        """The output that it is about, "logits" where the model's own softmax was left out."""
        return str(self._root.of or "output")

    @functools.cached_property
    def examples(self) -> int:
        """N."""
        if self._stream.size is not None:
            return self._stream.size
        return sum(len(tf.nest.flatten(x)[0]) for _, x, _ in self._stream.batches(2**62))

    def rows(self) -> Iterator[Rows]:
        """Give the rows of a square root of N·F, batch by batch: N·F = scale · Σ rowᵀ row."""
        for start, x, y in self._stream.batches(self._at_once):
            yield from self._root.parts(x, y, start, self._rows_at_once)

    # Forms

    def dense(self) -> BlockForm:
        """Return all of it, as a matrix (P, P).

        Raises
        ------
        TooLargeError
            If it does not fit into the memory limit.
        """
        return self.blocks([self.keys])

    def blocks(self, groups: Sequence[Sequence[str]] | None = None) -> BlockForm:
        """Return the blocks on the diagonal, one for each layer.

        Parameters
        ----------
        groups : sequence of sequence of str, optional
            Keys of the weights of each block, in place of the layers.
        """
        found = [tuple(keys) for keys in groups or self.columns.layers()]
        if sorted(key for keys in found for key in keys) != sorted(self.keys):
            raise InputError(f"Expected groups= of all of {self.keys}, once. Received: {groups!r}.")
        sizes = [self.columns.only(keys).count for keys in found]
        memory.check(
            8 * sum(size**2 for size in sizes), self._root.engine.memory_limit,
            f"Fisher information as {'a matrix' if len(sizes) == 1 else 'blocks'} of {sizes} rows",
            "Choose diagonal(), kronecker(), low_rank() or operator(), or fewer weights with wrt=.",
        )  # fmt: skip
        totals = [np.zeros((size, size)) for size in sizes]
        for rows in self.rows():
            for keys, total in zip(found, totals, strict=True):
                total += _second_moment(rows, keys)
        scale = self._scale
        return self._form({k: Dense(t * scale) for k, t in zip(found, totals, strict=True)})

    def diagonal(self) -> BlockForm:
        """Return the diagonal, without forming the rest."""
        totals = {k: np.zeros(s) for k, s in zip(self.keys, self.columns.shapes, strict=True)}
        for rows in self.rows():
            for key, squares in rows.diagonal().items():
                totals[key] += np.asarray(squares, "f8")
        scale = self._scale
        return self._form({(key,): Diagonal(np.ravel(t) * scale) for key, t in totals.items()})

    def low_rank(self) -> LowRank:
        """Return F by the Gram matrix of its N·K rows: exact, and small where N·K is below P.

        The rows' factors of all examples are held.

        Raises
        ------
        TooLargeError
            If the Gram matrix or the factors do not fit into the memory limit.
        """
        return LowRank(self.columns, self.examples, self._held(), self._scale)

    def operator(self) -> Implicit:
        """Return F as an operator that is never formed: each product is a pass over the data.

        The rows' factors are held where they fit into the memory limit.
        """
        limit = (memory.limit(self._root.engine.memory_limit) or 2**32) // 2
        held: list[Rows] | None = []
        for rows in self.rows():
            held.append(rows)
            if sum(part.nbytes for part in held) > limit:
                held = None
                break
        return Implicit(
            self.columns, self.examples, self.rows if held is None else (lambda: held), self._scale
        )

    # Questions about the exact matrix, answered by the form that is cheapest

    def exact(self) -> Form:
        """Return the exact form that is cheapest: a matrix, the Gram matrix or an operator."""
        return self._exact

    @functools.cached_property
    def _exact(self) -> Form:
        count = self.columns.count
        if count <= _SMALL:
            return self.dense()
        rows = self.examples * self._rows_at_once
        return self.low_rank() if rows <= _GRAM else self.operator()

    def apply(self, v: Any, damping: float = 0.0) -> Any:
        """Return (F + damping·I) v, for v (P,) or (P, m), or a mapping of key to array."""
        return self._exact.apply(v, damping)

    def solve(self, v: Any, damping: float = 1e-3) -> Any:
        """Return (F + damping·I)⁻¹ v, for v (P,) or (P, m), or a mapping of key to array."""
        return self._exact.solve(v, damping)

    def eigsh(self, k: int = 6) -> tuple[np.ndarray, np.ndarray]:
        """Return the k largest eigenvalues, the largest first, and their vectors (P, k)."""
        return self._exact.eigsh(k)

    def trace(self) -> float:
        """Return the sum of the eigenvalues: of the squared norms of all rows, in one pass."""
        total = 0.0
        for rows in self.rows():
            total += float(np.sum(np.square(np.asarray(rows.norms(), "f8"))))
        return total * self._scale

    def logdet(self, damping: float = 1e-3) -> float:
        """Return log det(F + damping·I)."""
        return self._exact.logdet(damping)

    def effective_dimension(self, damping: float = 1e-3) -> float:
        """Return Σ_i λ_i / (λ_i + damping): how many directions the data determines."""
        return self._exact.effective_dimension(damping)

    @property
    def _scale(self) -> float:
        """What Σ rowᵀ row is multiplied by."""
        return self._root.scale / (self.examples if self.reduction == "mean" else 1)

    def _form(self, blocks: dict[tuple[str, ...], Block]) -> BlockForm:
        return BlockForm(self.columns, self.examples, blocks, self.reduction)

    def _held(self) -> list[Rows]:
        held: list[Rows] = []
        for rows in self.rows():
            held.append(rows)
            memory.check(
                sum(part.nbytes for part in held), self._root.engine.memory_limit,
                "The rows' factors of all examples", "Choose operator(), or fewer examples.",
            )  # fmt: skip
        return held

    def _residual_variance(self) -> float:
        """The mean of (y - f)², over all examples and outputs."""
        total, count = 0.0, 0
        for start, x, y in self._stream.batches(self._at_once):
            if y is None:
                raise InputError("variance='fitted' needs labels: give data as (x, y).")
            f = np.asarray(self._root.engine.outputs(x, of=self._root.of), "f8")
            y = np.asarray(y, "f8")
            if y.size != f.size:
                raise InputError(
                    f"Expected labels of shape {f.shape} in the batch that starts at example "
                    f"{start}. Received: {y.shape}."
                )
            total, count = total + float(np.sum((y.reshape(f.shape) - f) ** 2)), count + f.size
        if total == 0:
            raise InputError("variance='fitted' is zero: the outputs are the labels.")
        return total / count


def _second_moment(rows: Rows, keys: Sequence[str]) -> np.ndarray:
    """Return Σ rowᵀ row of some weights, (p, p), in float64."""
    sizes = {source.key: source.size for source in rows.sources}
    flat = tf.concat([tf.reshape(rows[key], [-1, sizes[key]]) for key in keys], 1)
    return np.asarray(tf.matmul(flat, flat, transpose_a=True), "f8")
