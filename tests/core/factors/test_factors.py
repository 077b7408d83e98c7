"""Factors: every query of every kind agrees with the same computed from the formed rows."""

import numpy as np
import pytest
import tensorflow as tf
from drawn_factors import KINDS, SHAPES, Draw, by_kind, close, plain, rows_of
from hypothesis import settings

from perjac._core.factors import Explicit, Outer, Way, random_projection
from perjac._core.factors.combine import combine, join_rows
from perjac._core.factors.explain import Explanation


@by_kind
@SHAPES
def test_dense_is_the_formula(kind, seed, sizes):
    factor, rows = plain(kind, Draw(seed, sizes))
    close(factor.dense(), rows)


@by_kind
@SHAPES
def test_squared_norms_agree_with_dense(kind, seed, sizes):
    factor, rows = plain(kind, Draw(seed, sizes))
    close(factor.squared_norms(), np.sum(rows**2, axis=tuple(range(2, rows.ndim))))


@by_kind
@SHAPES
def test_jvp_agrees_with_dense(kind, seed, sizes):
    draw = Draw(seed, sizes)
    factor, rows = plain(kind, draw)
    v = draw.numbers(*rows.shape[2:])
    close(factor.jvp(v), np.tensordot(rows, v, rows.ndim - 2))


@by_kind
@SHAPES
def test_vjp_agrees_with_dense(kind, seed, sizes):
    draw = Draw(seed, sizes)
    factor, rows = plain(kind, draw)
    u = draw.numbers(*rows.shape[:2])
    close(factor.vjp(u), np.tensordot(u, rows, 2))
    close(factor.vjp(u, per_example=True), np.einsum("bk,bk...->b...", u, rows))


@by_kind
@SHAPES
def test_diagonal_agrees_with_dense(kind, seed, sizes):
    factor, rows = plain(kind, Draw(seed, sizes))
    close(factor.diagonal(), np.sum(rows**2, (0, 1)))


@by_kind
@SHAPES
def test_squared_deviations_agree_with_dense(kind, seed, sizes):
    factor, rows = plain(kind, Draw(seed, sizes))
    close(factor.squared_deviations(), np.square(rows - rows.mean((0, 1))).sum((0, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_all_the_same_do_not_deviate(kind):
    factor = Draw(0, (1, 1, 3, 2, 3, 4)).factor(kind)
    many = join_rows([{"w": factor}] * 5)["w"]
    scale = np.max(np.square(factor.dense()))
    np.testing.assert_allclose(many.squared_deviations(), 0, atol=1e-14 * scale)
    assert not np.any(np.asarray(factor.squared_deviations()) > 1e-30 * scale)


@by_kind
@SHAPES
@pytest.mark.parametrize("sketched", random_projection.KINDS)
def test_projections_are_those_of_the_rows(sketched, kind, seed, sizes):
    factor, rows = plain(kind, Draw(seed, sizes))
    drawn = random_projection.draw({"w": factor.sides}, 6, seed, sketched, tf.float64)["w"]
    found = factor.project(drawn)
    lead, laid_out = rows.shape[:2], factor.layout.apply(tf.constant(rows), lead=2).numpy()
    close(found, Explicit(factor.layout, tf.constant(laid_out)).project(drawn))
    if len(factor.sides) == 2:
        matrix = laid_out.reshape(*lead, -1, laid_out.shape[-1])
        close(found, by_formula(matrix, *(drawn[side] for side in factor.sides)))


def by_formula(rows: np.ndarray, left, right) -> np.ndarray:
    """Project matrices (B, K, I, O): rᵀ J q / √dim; or signed sums of what falls into a bucket."""
    if isinstance(left, random_projection.Normal):
        products = np.einsum("bkio,im,om->bkm", rows, left.matrix, right.matrix)
        return products / np.sqrt(products.shape[-1])
    buckets = np.add.outer(left.buckets.numpy(), right.buckets.numpy()) % left.dim
    signs = np.multiply.outer(left.signs.numpy(), right.signs.numpy())
    found = np.zeros((*rows.shape[:2], left.dim))
    for (i, o), bucket in np.ndenumerate(buckets):
        found[..., bucket] += signs[i, o] * rows[..., i, o]
    return found


@settings(max_examples=10, deadline=None)
@SHAPES
def test_slices_are_the_rows_that_were_looked_up(seed, sizes):
    factor, rows = plain("lookup", Draw(seed, sizes))
    ids, found, used = (np.asarray(part) for part in factor.slices())
    assert used.sum() == len(ids) == len(found)
    for b, looked_up in enumerate(np.asarray(factor.ids)):
        own = slice(used[:b].sum(), used[: b + 1].sum())
        np.testing.assert_array_equal(ids[own], np.unique(looked_up))
        close(found[own], rows[b].transpose(1, 0, 2)[np.unique(looked_up)])


QUESTIONS = ("norms", "clipped_sum", "gram", "diagonal", "variance", "snr", "project", "nothing")


@pytest.mark.parametrize("question", [*QUESTIONS, "jvp", "vjp", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_way_taken_is_told_and_is_the_cheapest(kind, question):
    for sizes in ((3, 1, 2, 2, 3, 4), (3, 2, 40, 2, 3, 4), (2, 3, 4, 2, 40, 30)):
        factor = Draw(0, sizes).factor(kind)
        ways = factor.ways(question)
        assert all(isinstance(way, Way) and way.multiply_adds >= 0 for way in ways)
        if question in QUESTIONS:
            assert ways[0].cost == min(way.cost for way in ways)
        shown = str(Explanation.of(question, {"the/weight": factor}, 3, 1))
        line = next(line for line in shown.splitlines() if line.startswith("the/weight"))
        assert line.split("  ")[2].startswith(ways[0].name)
        assert all(way.name in line for way in ways[1:])


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_gram_agrees_with_dense_between_any_two_kinds(kind, other):
    left, right = Draw(0, (3, 2, 2, 1, 3, 4)), Draw(1, (2, 2, 2, 1, 3, 4))
    (factor, rows), (factor2, rows2) = plain(kind, left), plain(other, right)
    if rows.shape[2:] != rows2.shape[2:]:
        return  # factors of weights of different shapes never meet
    flat, flat2 = rows.reshape(6, -1), rows2.reshape(4, -1)
    close(factor.gram(factor2), (flat @ flat2.T).reshape(3, 2, 2, 2))


@by_kind
@SHAPES
def test_compact_keeps_the_rows(kind, seed, sizes):
    factor, rows = plain(kind, Draw(seed, sizes))
    close(factor.compact().dense(), rows)


@by_kind
@SHAPES
def test_join_rows_lays_rows_one_after_another(kind, seed, sizes):
    first = Draw(seed, sizes).factor(kind)
    joined = join_rows([{"w": first}, {"w": first}])["w"]
    close(joined.dense(), np.concatenate([first.dense()] * 2, 1))


@pytest.mark.parametrize(
    "kinds",
    [["outer", "outer"], ["outer", "outer_over_positions"], ["grouped", "grouped"],
     ["lookup", "lookup"], ["explicit", "explicit"], ["lookup", "explicit", "lookup"]],
)  # fmt: skip
def test_combine_adds_a_weights_contributions(kinds):
    draw = Draw(0, (3, 2, 3, 2, 4, 5))
    factors = [draw.factor(kind) for kind in kinds]
    whole = combine(factors)
    rows = sum(rows_of(factor) for factor in factors)
    close(whole.dense(), rows)
    # The norm of a sum is not the sum of the norms: this is where the peers go wrong.
    close(whole.squared_norms(), np.sum(rows**2, tuple(range(2, rows.ndim))))


def test_the_two_ways_to_a_norm_over_positions_agree(monkeypatch):
    factor = Draw(0, (3, 2, 6, 1, 5, 4)).outer_over_positions()
    found = []
    for forms in (False, True):
        way = Way("a way", 1, 1, forms)
        monkeypatch.setattr(Outer, "ways", lambda self, question, way=way: [way])
        found.append(factor.squared_norms())
    close(*found)


def test_large_rows_are_formed_example_by_example_with_the_same_answers(monkeypatch):
    factor = Draw(0, (3, 2, 6, 1, 5, 4)).outer_over_positions()
    patches = Draw(1, (3, 2, 2, 1, 3, 4)).patches()
    at_once = [(f.squared_norms(), f.diagonal(), f.gram(f)) for f in (factor, patches)]
    monkeypatch.setattr("perjac._core.factors.base.FORM_AT_ONCE", 0)
    monkeypatch.setattr(Outer, "ways", lambda self, question: [Way("form I×O", 1, 1, True)])
    one_by_one = [(f.squared_norms(), f.diagonal(), f.gram(f)) for f in (factor, patches)]
    for a, b in zip(tf.nest.flatten(at_once), tf.nest.flatten(one_by_one), strict=True):
        close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_pass_through_a_function_unchanged(kind):
    factor = Draw(0, (3, 2, 2, 2, 3, 4)).factor(kind)
    back = tf.function(lambda f: {"same": f})(factor)["same"]
    assert type(back) is type(factor)
    assert back.layout == factor.layout
    close(back.dense(), factor.dense())
