"""Moments of factors' two sides, and squares in other bases: by kind, from the formed rows."""

import numpy as np
import pytest
import tensorflow as tf
from drawn_factors import KINDS, SHAPES, Draw, by_kind, close

from perjac._core.backend.axis_layout import Relabelling
from perjac._core.factors import Explicit, Grouped, Lookup, Outer, base, outer

WITH_SIDES = (Outer, Grouped, Lookup)


def matrices(factor) -> np.ndarray:
    """Return the rows as matrices (B, K, G, I, O)."""
    rows = np.asarray(factor.dense())
    lead = rows.shape[:2]
    return np.asarray(factor.reading.apply(tf.constant(rows), lead=2)).reshape(
        *lead, *factor.reading.target
    )


def sides(factor) -> tuple[np.ndarray, np.ndarray]:
    """Return a (B, T, G, I) and δ (B, K, T, G, O) of a factor that holds them."""
    delta = np.asarray(factor.delta)
    if isinstance(factor, Grouped):
        return np.asarray(factor.a), delta
    if isinstance(factor, Lookup):
        a = np.eye(factor.layout.target[0])[np.asarray(factor.ids)]
    else:
        a = np.asarray(factor.columns)
    return a[:, :, None], delta[:, :, :, None]


def expected_moments(factor, reduce: bool):
    """Return Σ over the left side, over the right side, and the count, by the definitions."""
    if not isinstance(factor, WITH_SIDES):
        rows = matrices(factor)
        left = np.einsum("bkgio,bkgjo->gij", rows, rows)
        return left, np.einsum("bkgio,bkgip->gop", rows, rows), np.einsum("gii->g", left)
    a, delta = sides(factor)
    if reduce:
        a, delta = a.mean(1, keepdims=True), delta.sum(2, keepdims=True)
    left = np.einsum("btgi,btgj->gij", a, a)
    if isinstance(factor, Lookup):
        left = np.einsum("gii->gi", left)
    return left, np.einsum("bktgo,bktgp->gop", delta, delta), [a.shape[0] * a.shape[1]]


def orthogonal(rng: np.random.Generator, groups: int, n: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((groups, n, n)))[0]


def depthwise(draw: Draw) -> Explicit:
    """Return rows of kernels (I, G, O), whose second axis is of channels that do not meet."""
    shape = (draw.i, draw.g, draw.o)
    rows = draw.numbers(draw.batch, draw.count, *shape)
    return Explicit(Relabelling.of(shape), rows, groups=1)


@pytest.mark.parametrize("reduce", [False, True])
@by_kind
@SHAPES
def test_moments_are_the_sums(reduce, kind, seed, sizes):
    factor = Draw(seed, sizes).factor(kind)
    for found, expected in zip(
        factor.moments(reduce, 100), expected_moments(factor, reduce), strict=True
    ):
        close(found, expected)


@by_kind
@SHAPES
def test_long_sides_are_summed_on_the_diagonal(kind, seed, sizes):
    factor = Draw(seed, sizes).factor(kind)
    *whole, count = factor.moments(False, 100)
    *some, same = factor.moments(False, 2)
    close(same, count)
    for side, full in zip(some, whole, strict=True):
        full = np.asarray(full)
        short = full.ndim == 2 or full.shape[1] <= 2
        close(side, full if short else np.einsum("gii->gi", full))


@by_kind
@SHAPES
def test_squares_along_bases_are_those_of_turned_rows(kind, seed, sizes):
    draw = Draw(seed, sizes)
    factor = draw.factor(kind)
    groups, inputs, outputs = factor.reading.target
    left, right = (orthogonal(draw.rng, groups, n) for n in (inputs, outputs))
    for bases in ({"left": left, "right": right}, {"right": right}, {}):
        if isinstance(factor, Lookup) and "left" in bases:
            continue  # its left side is a diagonal, whose basis is left out
        rows = matrices(factor)
        if "left" in bases:
            rows = np.einsum("gij,bkgio->bkgjo", left, rows)
        if "right" in bases:
            rows = np.einsum("gop,bkgio->bkgip", right, rows)
        asked = {name: tf.constant(basis) for name, basis in bases.items()}
        close(factor.squares_along(asked), np.sum(rows**2, (0, 1)))


@SHAPES
def test_groups_of_explicit_rows_do_not_meet(seed, sizes):
    draw = Draw(seed, sizes)
    factor = depthwise(draw)
    rows = np.asarray(factor.jacobian).transpose(0, 1, 3, 2, 4)
    left, right, count = factor.moments(False, 100)
    close(left, np.einsum("bkgio,bkgjo->gij", rows, rows))
    close(right, np.einsum("bkgio,bkgip->gop", rows, rows))
    close(count, np.sum(rows**2, (0, 1, 3, 4)))
    close(factor.squares_along({}), np.sum(rows**2, (0, 1)))


@pytest.mark.parametrize("kind", [*KINDS, "depthwise"])
def test_one_example_after_another_gives_the_same(kind, monkeypatch):
    draw = Draw(0, (4, 3, 3, 2, 4, 3))
    factor = depthwise(draw) if kind == "depthwise" else draw.factor(kind)
    asked = {"right": tf.constant(orthogonal(draw.rng, *np.array(factor.reading.target)[[0, 2]]))}
    expected = *factor.moments(False, 100), factor.squares_along(asked)
    for module in (base, outer):
        monkeypatch.setattr(module, "FORM_AT_ONCE", 1)
    for found, whole in zip(
        (*factor.moments(False, 100), factor.squares_along(asked)), expected, strict=True
    ):
        close(found, whole)
