"""Provenance of entries that are summed, multiplied, sorted or solved for together."""

from __future__ import annotations

import string
from typing import Any

import numpy as np

from perjac._core.graph.provenance.owners import Dims, Owners
from perjac._core.graph.provenance.registry import At, Found, Unclear, channels_first, rule


@rule(
    "Sum", "Mean", "Prod", "Max", "Min", "All", "Any", "EuclideanNorm", "ArgMax", "ArgMin",
    index=(1,),
)  # fmt: skip
def reduction(op: Any, outs: list[Owners], at: At) -> Found:
    """Everything along some axes made one."""
    rank = len(at.shape(op.inputs[0]))
    axes = [int(n) % rank for n in np.ravel(at.value(op.inputs[1]))] if rank else []
    keeps = "keep_dims" in op.node_def.attr and op.get_attr("keep_dims")
    return [outs[0] if keeps else outs[0].insert(axes), None]


@rule("L2Loss")
def total(op: Any, outs: list[Owners], at: At) -> Found:
    """Everything made one."""
    return [outs[0].whole(len(at.shape(op.inputs[0])))]


@rule("BiasAddGrad")
def all_but_channels(op: Any, outs: list[Owners], at: At) -> Found:
    """Summed over all axes but the channels'."""
    rank = len(at.shape(op.inputs[0]))
    kept = 1 if channels_first(op) else rank - 1
    return [outs[0].insert([n for n in range(rank) if n != kept])]


@rule("Cumsum", "Cumprod", "CumulativeLogsumexp", index=(1,))
def running(op: Any, outs: list[Owners], at: At) -> Found:
    """Running sums: an entry is in all those behind it."""
    axis = int(at.value(op.inputs[1])) % outs[0].rank
    return [outs[0].over([axis]), None]


@rule("Softmax", "LogSoftmax", "TopK", "TopKV2", "FFT", "IFFT", "RFFT", "IRFFT")
def along_last(op: Any, outs: list[Owners], at: At) -> Found:
    """Everything along the last axis meets."""
    own = outs[0]
    for other in outs[1:]:
        own = own | other
    return [own.over([own.rank - 1]), *[None] * (len(op.inputs) - 1)]


@rule("RandomShuffle")
def shuffle(op: Any, outs: list[Owners], at: At) -> Found:
    """Everything along the first axis meets."""
    return [outs[0].over([0])]


@rule("FFT2D", "IFFT2D", "RFFT2D", "IRFFT2D", "FFT3D", "IFFT3D", "RFFT3D", "IRFFT3D")
def along_many(op: Any, outs: list[Owners], at: At) -> Found:
    """Everything along the last two or three axes meets."""
    rank, count = outs[0].rank, int(op.type[-2])
    return [outs[0].over(range(rank - count, rank)), *[None] * (len(op.inputs) - 1)]


@rule("SparseSoftmaxCrossEntropyWithLogits", "SoftmaxCrossEntropyWithLogits")
def cross_entropy(op: Any, outs: list[Owners], at: At) -> Found:
    """A loss of each row, and its gradient."""
    loss, back = outs
    rows = loss.insert([1]) | back.over([1])
    labels = at.shape(op.inputs[1])
    return [
        rows.fit(at.shape(op.inputs[0])),
        rows.drop([1]) if len(labels) == 1 else rows.fit(labels),
    ]


@rule("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
def matmul(op: Any, outs: list[Owners], at: At) -> Found:
    """y[…, n, o] = Σ_i x[…, n, i] w[…, i, o]."""
    plain = op.type == "MatMul"
    flags = [
        op.get_attr(f) for f in (("transpose_a", "transpose_b") if plain else ("adj_x", "adj_y"))
    ]
    (own,) = outs
    found = []
    for tensor, flag, kept in zip(op.inputs, flags, (-2, -1), strict=True):
        # What is summed along belongs to all that it goes into; the other operand's axis to all.
        side = own.over([own.rank + (-1 if kept == -2 else -2)])
        side = side.map(lambda a: a.swapaxes(-1, -2)) if flag else side
        found.append(side.fit(at.shape(tensor)))
    return found


@rule("Einsum")
def einsum(op: Any, outs: list[Owners], at: At) -> Found:
    """A sum of products, an axis a letter."""
    equation = op.get_attr("equation").decode().replace(" ", "")
    terms, result = equation.split("->")
    free = [c for c in string.ascii_letters if c not in equation]
    shapes = [at.shape(t) for t in op.inputs]
    counts = [
        len(shape) - len(term.replace("...", "")) if "..." in term else 0
        for shape, term in zip(shapes, terms.split(","), strict=True)
    ]
    dots = "".join(free[: max(counts)])
    result = result.replace("...", dots)
    return [
        _of_letters(outs[0], result, term.replace("...", dots[len(dots) - n :]), shape)
        for term, n, shape in zip(terms.split(","), counts, shapes, strict=True)
    ]


def _of_letters(own: Owners, result: str, term: str, shape: Dims) -> Owners:
    """Return the owners of an operand with these axes, in a sum with those axes."""
    if len(set(term)) < len(term) or len(set(result)) < len(result):
        raise Unclear("an Einsum that takes diagonals")
    own = own.drop([n for n, c in enumerate(result) if c not in term])
    kept = [c for c in result if c in term]
    order = sorted(range(len(kept)), key=lambda n: term.index(kept[n]))
    own = own.map(lambda a: a.transpose(order))
    return own.insert([n for n, c in enumerate(term) if c not in kept]).fit(shape)


@rule("MatrixSolve", "MatrixTriangularSolve", "MatrixSolveLs", "BandedTriangularSolve")
def solve(op: Any, outs: list[Owners], at: At) -> Found:
    """A x = y for each column of y by itself: rows of a column meet, columns do not."""
    own = outs[0].over([outs[0].rank - 2])
    columns, matrix = own.fit(at.shape(op.inputs[1])), own.over([own.rank - 1])
    return [matrix.fit(at.shape(op.inputs[0])), columns, *[None] * (len(op.inputs) - 2)]


@rule(
    "Cholesky", "CholeskyGrad", "Inverse", "LogMatrixDeterminant", "LU", "MatrixBandPart",
    "MatrixDeterminant", "MatrixDiag", "MatrixDiagPart", "MatrixDiagPartV2", "MatrixDiagPartV3",
    "MatrixDiagV2", "MatrixDiagV3", "MatrixExponential", "MatrixInverse", "MatrixLogarithm",
    "MatrixSetDiag", "MatrixSetDiagV3", "MatrixSquareRoot",
    "Qr", "SelfAdjointEigV2", "Svd", "Eig",
    index=(1,),
)  # fmt: skip
def matrices(op: Any, outs: list[Owners], at: At) -> Found:
    """One small matrix after another, the last axes of each meeting."""
    core = 1 if op.type in ("MatrixDiag", "MatrixDiagV2", "MatrixDiagV3") else 2
    shapes = [at.shape(t) for t in op.inputs]
    if op.type == "MatrixDiagPartV3":
        offset = at.known(op.inputs[1])
        if offset is not None and not offset.any() and shapes[0][-1] == shapes[0][-2]:
            diagonal = np.eye(shapes[0][-1], dtype=bool)
            return [outs[0].insert([outs[0].rank - 1]).masked(diagonal), None, None]
    lead = max(len(shape) - core for shape in shapes)
    own = None
    for out in outs:
        behind = range(lead, out.rank)
        one = out.over_perhaps(behind, f"{op.type} of a matrix of several examples").drop(behind)
        own = one if own is None else own | one
    assert own is not None
    found: Found = []
    for tensor, shape in zip(op.inputs, shapes, strict=True):
        if tensor.dtype.is_integer or len(shape) < core:  # an option
            found.append(None)
            continue
        front = own.fit(shape[: len(shape) - core])
        found.append(front.insert(list(range(front.rank, len(shape)))))
    return found
