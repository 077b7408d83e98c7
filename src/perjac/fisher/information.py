"""Fisher: the information that a data set holds about a model's weights, in any form."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend import memory
from perjac._core.factors.reductions import Question, Squares
from perjac._rows import Rows
from perjac.errors import InputError, PerjacError, TooLargeError, check_one_of
from perjac.fisher._columns import Columns
from perjac.fisher._of_rows import Passes
from perjac.fisher._products import row_count
from perjac.fisher._rows_of import Root
from perjac.fisher._stream import Stream
from perjac.fisher._sums import Diagonals, Matrices
from perjac.fisher.blocks import Block, BlockForm
from perjac.fisher.form import Form
from perjac.fisher.kronecker import APPROXIMATIONS, SideSums, asked, eigenbasis_blocks
from perjac.fisher.low_rank import LowRank
from perjac.fisher.matrix_free import Implicit
from perjac.progress import Stopped

_REDUCTIONS = ("mean", "sum")
# Examples that the outputs are looked at of, to tell what they are.
_FEW = 32
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
    partial : BlockForm or None
        Of the examples that were done when the last pass was stopped (`progress.stoppable`), for
        the forms that merge: `dense`, `blocks`, `diagonal` and `kronecker`.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
    >>> F = pj.Engine(model).fisher(np.ones((8, 4), "float32"), likelihood="categorical")
    >>> len(F.diagonal().traces()), F.dense().shape
    (2, (15, 15))
    """

    def __init__(self, root: Root, data: Any, reduction: str, variance: Any = 1.0):
        check_one_of(reduction, _REDUCTIONS, "reduction")
        self._root, self._stream, self.reduction = root, Stream.of(data), reduction
        self._start = 0
        self.partial: BlockForm | None = None
        if variance != 1.0 and not root.has_variance:
            raise InputError(f"variance= is of likelihood='gaussian'. Received: {variance!r}.")
        x, y = self._stream.first(_FEW)
        self._few = root.engine._traces.prepare(x)
        sources = root.prepare(self._few, y)
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

    def after(self, done: int) -> Fisher:
        """Return the Fisher information of the examples from number `done` on.

        Its forms merge with those of the examples before into those of all: an example keeps its
        number, and with it what is drawn for it.
        """
        if not 0 <= done < self.examples:
            raise InputError(
                f"Expected a number of examples from 0 to {self.examples - 1}. Received: {done!r}."
            )
        other = copy.copy(self)
        other._start = self._start + done
        other.partial = None
        other.__dict__.pop("_exact", None)
        other.__dict__["examples"] = self.examples - done
        return other

    def rows(self, formed: int = 0) -> Iterator[Rows]:
        """Give the rows of a square root of N·F, batch by batch: N·F = scale · Σ rowᵀ row.

        Parameters
        ----------
        formed : int
            Bytes that are made of each row, besides what it is held in.
        """
        examples, most = self._root.at_once(self._few, formed)
        return self._passed(self._root.parts, examples, most)

    def _answers(self, root: Root, question: Question) -> Iterator[dict[str, Any]]:
        """Give what a question makes of the rows of each batch, by key."""
        ask = functools.partial(root.answers, question)
        return self._passed(ask, *root.at_once(self._few))

    def _passed(self, ask: Callable[..., Iterator[Any]], examples: int, most: int) -> Iterator[Any]:
        """Give what is asked of each batch, at most so many examples and rows at a time."""
        self._done = 0
        for start, x, y in self._stream.batches(examples, self._start):
            try:
                yield from ask(self._root.engine._traces.prepare(x), y, start, most)
            except PerjacError as failure:
                if start:
                    failure.add_note(f"Examples are counted from number {start}.")
                raise
            self._done = start + len(tf.nest.flatten(x)[0]) - self._start

    def _made(self, sums: Any, parts: Iterable[Any]) -> BlockForm:
        """Return the form of sums over all parts; where the pass is stopped, keep what is done."""
        self.partial = None
        try:
            for part in parts:
                sums.add(part)
        except Stopped:
            done = copy.copy(self)
            done.__dict__["examples"] = self._done
            self.partial = done._form(sums.blocks(done._scale))
            raise
        return self._form(sums.blocks(self._scale))

    def _wide_rows(self, formed: int = 0) -> Iterator[Rows]:
        """Give the rows in float64.

        The information squares them: in float32 what is below 1e-7 of its largest eigenvalue, or
        3e-4 of the largest singular value of the rows, would be rounding.
        """
        return (rows.widened() for rows in self.rows(formed))

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
        return self._made(Matrices(found, sizes), self._wide_rows(2 * 8 * max(sizes)))

    def diagonal(self) -> BlockForm:
        """Return the diagonal, without forming the rest."""
        return self._made(Diagonals(), self._answers(self._root, Squares()))

    def kronecker(self, approximation: str = "expand") -> BlockForm:
        """Return KFAC: for each weight a block A ⊗ B, of what comes in and what goes back.

        A weight is read as the matrix (I, O) that meets the data, J[b,k] = Σ_t a[b,t] δ[b,k,t]ᵀ
        over positions t, and A (I, I) and B (O, O) are made in one pass. Solutions with damping
        are exact, by the eigenvectors of A and B.

        Parameters
        ----------
        approximation : {"expand", "reduce"}
            "expand" takes positions for examples: A = mean_bt a aᵀ, B = mean_b Σ_kt δ δᵀ.
            "reduce" brings them together before: A = mean_b ā āᵀ with ā = mean_t a, and
            B = mean_b Σ_k (Σ_t δ)(Σ_t δ)ᵀ. Without positions they are the same.

        Returns
        -------
        BlockForm
            With a `Kronecker` for each weight: `left` is A, `right` is B.

        Raises
        ------
        TooLargeError
            If the sides do not fit into the memory limit.

        Warns
        -----
        PerjacWarning
            Where a side is longer than 8,192: of it only the diagonal is kept.

        Notes
        -----
        Exact for one example of one position; where δ does not depend on the data, as in a
        linear model of one weight with a Gaussian likelihood ("expand" if every position has an
        output of its own, "reduce" if the output is their sum or mean); and for weights of one
        axis. A grouped convolution has an A and a B for each group, and a depthwise one for each
        channel. A of an embedding is the diagonal of how often ids occur. A weight whose rows
        are not held as a and δ (one that is used in several ways, pulled back through a
        parametrisation, or on the tape path) gets (Σ J Jᵀ) ⊗ (Σ JᵀJ) / Σ ‖J‖², which keeps the
        trace.

        References
        ----------
        Martens and Grosse 2015, Optimizing neural networks with Kronecker-factored approximate
        curvature; Grosse and Martens 2016 (convolutions); Eschenhagen et al. 2023,
        Kronecker-factored approximate curvature for modern neural network architectures.

        Examples
        --------
        >>> import keras, numpy as np, perjac as pj
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
        >>> x = np.random.default_rng(0).normal(size=(50, 4)).astype("float32")
        >>> kfac = pj.Engine(model).fisher(x).kronecker()
        >>> kfac.solve({"top/kernel": np.ones((4, 3))}, damping=1e-3)["top/kernel"].shape
        (4, 3)
        >>> block = kfac.blocks[kfac.keys[0],]
        >>> block.left.shape, block.right.shape
        ((1, 4, 4), (1, 3, 3))
        """
        check_one_of(approximation, APPROXIMATIONS, "approximation")
        sums = SideSums(self._root.engine.memory_limit)
        return self._made(sums, self._answers(self._sided(), asked(approximation)))

    def eigenbasis(self, approximation: str = "expand") -> BlockForm:
        """Return EKFAC: KFAC's eigenvectors, and F's own diagonal in their basis.

        In a second pass over the data, Λ = mean_b Σ_k (U_Aᵀ J U_B)². Of all matrices that are
        diagonal in that basis, it is the nearest to F's blocks of single weights.

        Parameters
        ----------
        approximation : {"expand", "reduce"}
            As in `kronecker`.

        Returns
        -------
        BlockForm
            With an `Eigenbasis` for each weight. Two of them merge only if they are of one basis.

        Raises
        ------
        TooLargeError
            As `kronecker`.

        References
        ----------
        George et al. 2018, Fast approximate natural gradient descent in a Kronecker-factored
        eigenbasis.

        Examples
        --------
        >>> import keras, numpy as np, perjac as pj
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
        >>> F = pj.Engine(model).fisher(np.ones((50, 4), "float32"))
        >>> bool(np.isclose(F.eigenbasis().trace(), F.trace()))
        True
        """
        check_one_of(approximation, APPROXIMATIONS, "approximation")
        sums = SideSums(self._root.engine.memory_limit)
        for sides in self._answers(self._sided(), asked(approximation)):
            sums.add(sides)
        blocks = sums.blocks(self._scale)
        root = self._sided()
        rows = self._passed(root.parts, *root.at_once(self._few))
        return self._form(eigenbasis_blocks(rows, blocks, self._scale))

    def low_rank(self) -> LowRank:
        """Return F by the Gram matrix of its N·K rows: exact, and small where N·K is below P.

        The rows' factors of all examples are held.

        Raises
        ------
        TooLargeError
            If the Gram matrix or the factors do not fit into the memory limit.
        """
        held = self._held()
        return LowRank(self.columns, self.examples, held, self._scale, self.reduction)

    def operator(self) -> Implicit:
        """Return F as an operator that is never formed: each product is a pass over the data.

        The rows' factors are held where they fit into the memory limit.
        """
        limit = (memory.limit(self._root.engine.memory_limit) or 2**32) // 2
        held: list[Rows] | None = []
        size = 0
        for rows in self._wide_rows():
            held.append(rows)
            size += rows.nbytes
            if size > limit:
                held = None
                break
        again = Passes(self._wide_rows) if held is None else held
        return Implicit(self.columns, self.examples, again, self._scale, self.reduction)

    # Questions about the exact matrix, answered by the form that is cheapest

    def exact(self) -> Form:
        """Return the exact form that is cheapest: a matrix, the Gram matrix or an operator."""
        return self._exact

    @functools.cached_property
    def _exact(self) -> Form:
        count = self.columns.count
        if count <= _SMALL:
            return self.dense()
        try:
            if self.examples * self._root.row_count(self._few) <= _GRAM:
                return self.low_rank()
            if count <= _GRAM:
                return self.dense()
        except TooLargeError:
            pass
        return self.operator()

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
        """Return log det(F + damping·I).

        An `Estimate`, which knows its error, where neither P nor the number of rows is below 8,193.
        """
        return self._exact.logdet(damping)

    def effective_dimension(self, damping: float = 1e-3) -> float:
        """Return Σ_i λ_i / (λ_i + damping): how many directions the data determines.

        An `Estimate`, as in `logdet`.
        """
        return self._exact.effective_dimension(damping)

    @property
    def _scale(self) -> float:
        """What Σ rowᵀ row is multiplied by."""
        return self._root.scale / (self.examples if self.reduction == "mean" else 1)

    def _form(self, blocks: Mapping[tuple[str, ...], Block]) -> BlockForm:
        return BlockForm(self.columns, self.examples, blocks, self.reduction)

    def _sided(self) -> Root:
        """Return what makes the rows, of factors that keep their sides a and δ."""
        return dataclasses.replace(self._root, engine=self._root.engine._sided())

    def _held(self) -> list[Rows]:
        held: list[Rows] = []
        size = 0
        for rows in self._wide_rows():
            held.append(rows)
            size += rows.nbytes
            memory.check(
                size, self._root.engine.memory_limit,
                "The rows' factors of all examples", "Choose operator(), or fewer examples.",
            )  # fmt: skip
        count = sum(row_count(part) for part in held)
        memory.check(
            2 * 8 * count**2, self._root.engine.memory_limit,
            f"The Gram matrix of {count} rows", "Choose operator(), or fewer examples.",
        )  # fmt: skip
        return held

    def _residual_variance(self) -> float:
        """The mean of (y - f)², over all examples and outputs."""
        total, count = 0.0, 0
        for start, x, y in self._stream.batches(self._root.at_once(self._few)[0]):
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
