"""Projections: inner products kept on average, and the same numbers wherever they are drawn."""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from drawn_factors import Draw, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from models import floats, randomise
from relabellings import chains
from subjects import engine, subject

import perjac as pj
from perjac._core.backend.axis_layout import Relabelling
from perjac._core.factors import Explicit, Lookup, Outer, Sum, random_projection
from perjac.errors import InputError

pytestmark = pytest.mark.slow  # left out of `make check`

each_kind = pytest.mark.parametrize("kind", random_projection.KINDS)
DIM, SEEDS = 16, 200
# The standard deviation of ⟨Sr, Sr'⟩ over ‖r‖‖r'‖ / √dim, as `Rows.project` states it.
BOUNDS = {"gaussian": 3, "rademacher": 3, "sparse": 11**0.5}


def vector(draw: Draw) -> Explicit:
    """Return rows of a weight with one axis: a bias."""
    return Explicit(Relabelling.of((draw.i,)), draw.numbers(draw.batch, draw.count, draw.i))


def projected(factor, kind: str, dim: int = DIM, seed: int = 0) -> np.ndarray:
    drawn = random_projection.draw({"w": factor.sides}, dim, seed, kind, tf.float64)
    return factor.project(drawn["w"]).numpy()


# --- Inner products -------------------------------------------------------------------------

FACTORS = {
    "vector": vector,
    "rank one": lambda draw: draw.outer(),
    "positions": lambda draw: draw.outer_over_positions(),
    "groups": lambda draw: draw.grouped(),
    "table": lambda draw: draw.lookup(),
    "sum": lambda draw: draw.sum(),
}


@pytest.mark.parametrize("name", FACTORS)
@each_kind
def test_inner_products_are_kept_on_average_within_the_stated_deviation(kind, name):
    factor = FACTORS[name](Draw(3, (2, 2, 3, 2, 4, 5)))
    rows = np.asarray(factor.dense()).reshape(4, -1)
    found = []
    for seed in range(SEEDS):
        flat = projected(factor, kind, seed=seed).reshape(4, DIM)
        found.append(flat @ flat.T)
    mean, deviation = np.mean(found, 0), np.std(found, 0, ddof=1)
    assert np.all(np.abs(mean - rows @ rows.T) < 5 * deviation / SEEDS**0.5)
    lengths = np.linalg.norm(rows, axis=1)
    bound = BOUNDS[kind] * np.outer(lengths, lengths) / DIM**0.5
    assert np.all(deviation < 1.1 * bound)  # of 200 seeds
    assert np.all(deviation > 0.01 * bound)


@each_kind
def test_different_seeds_are_independent(kind):
    factor = Draw(0, (2, 2, 3, 2, 4, 5)).outer_over_positions()
    flat = np.array([projected(factor, kind, seed=seed).ravel() for seed in range(5)])
    for a in range(5):
        for b in range(a):
            assert not np.allclose(flat[a], flat[b])


@each_kind
def test_different_weights_of_one_shape_are_independent(kind):
    factor = Draw(0, (2, 2, 3, 2, 4, 5)).outer()
    drawn = random_projection.draw({"v": factor.sides, "w": factor.sides}, DIM, 0, kind, tf.float64)
    assert not np.allclose(factor.project(drawn["v"]), factor.project(drawn["w"]))


@each_kind
def test_projections_are_linear(kind):
    one, two = (Draw(seed, (3, 2, 3, 2, 4, 5)).explicit() for seed in (0, 1))
    mixed = Explicit(one.layout, 2 * one.jacobian - 3 * two.jacobian)
    right = 2 * projected(one, kind) - 3 * projected(two, kind)
    np.testing.assert_allclose(projected(mixed, kind), right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 3, 40])
@each_kind
def test_projections_have_the_dimension_asked_for(kind, dim):
    factor = Draw(0, (3, 2, 3, 2, 4, 5)).outer_over_positions()
    assert projected(factor, kind, dim).shape == (3, 2, dim)
    assert np.all(np.isfinite(projected(factor, kind, dim)))


# --- One weight at several sites ------------------------------------------------------------


def tied() -> tuple[Lookup, Outer]:
    """Return a lookup into a table (7, 5), and a matmul by its transpose."""
    draw = Draw(0, (3, 2, 4, 1, 7, 5))
    plain = Relabelling.of((7, 5))
    looked_up = draw.lookup()
    a, delta = draw.numbers(3, 1, 5), draw.numbers(3, 2, 1, 7)
    return Lookup(plain, looked_up.ids, looked_up.delta), Outer(plain.transpose((1, 0)), a, delta)


@each_kind
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_table_and_its_transpose_meet_the_same_numbers(kind, order):
    parts = [tied()[n] for n in order]
    whole = Sum(Relabelling.of((7, 5)), tuple(parts))
    rows = sum(np.asarray(part.dense()) for part in parts)
    formed = Explicit(Relabelling.of((7, 5)), tf.constant(rows))
    np.testing.assert_allclose(
        projected(whole, kind), projected(formed, kind), rtol=1e-10, atol=1e-12
    )
    for part in parts:
        formed = Explicit(Relabelling.of((7, 5)), part.dense())
        np.testing.assert_allclose(
            projected(part, kind), projected(formed, kind), rtol=1e-10, atol=1e-12
        )


@each_kind
def test_parts_that_read_a_weight_in_different_ways_are_formed(kind):
    draw = Draw(0, (3, 2, 4, 1, 6, 4))
    plain = Relabelling.of((6, 4))
    tall = Outer(plain, draw.numbers(3, 1, 6), draw.numbers(3, 2, 1, 4))
    split = Outer(plain.reshape((12, 2)), draw.numbers(3, 1, 12), draw.numbers(3, 2, 1, 2))
    across = Outer(plain.reshape((3, 8)), draw.numbers(3, 1, 3), draw.numbers(3, 2, 1, 8))
    for parts in ((tall, split), (split, tall), (tall, across), (across, split)):
        whole = Sum(plain, parts)
        formed = Explicit(plain, tf.constant(sum(np.asarray(part.dense()) for part in parts)))
        np.testing.assert_allclose(
            projected(whole, kind), projected(formed, kind), rtol=1e-10, atol=1e-12
        )


@each_kind
def test_parts_that_run_over_a_sides_axes_in_other_orders_meet_the_same_numbers(kind):
    draw = Draw(0, (3, 2, 4, 1, 6, 4))
    plain = Relabelling.of((2, 3, 4))
    layouts = plain.reshape((6, 4)), plain.transpose((1, 0, 2)).reshape((6, 4))
    parts = tuple(
        Outer(layout, draw.numbers(3, 1, 6), draw.numbers(3, 2, 1, 4)) for layout in layouts
    )
    rows = tf.add_n([tf.reshape(part.dense(), [3, 2, 6, 4]) for part in parts])
    right = projected(Explicit(plain.reshape((6, 4)), rows), kind)
    for whole in (Sum(plain, parts), Sum(plain, parts[::-1])):
        np.testing.assert_allclose(projected(whole, kind), right, rtol=1e-10, atol=1e-12)


@each_kind
def test_a_tied_embeddings_projections_are_those_of_its_rows(kind):
    built = subject("tied_embedding", "float64")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found, formed = (  # the tape path holds the rows themselves
        engine("tied_embedding", "float64", path)
        .gradients(built.x, np.array([1, 5, 2]), loss=loss, wrt=built.trainable[0])
        .project(DIM, 4, kind)
        for path in ("auto", "tape")
    )
    np.testing.assert_allclose(found, formed, rtol=1e-9, atol=1e-12)


# --- The same everywhere --------------------------------------------------------------------

MODELS = ["mlp", "conv2d_valid_strided", "depthwise_same_strided", "tied_embedding"]


@functools.cache
def labels(name: str) -> np.ndarray:
    built = subject(name, "float64")
    return np.random.default_rng(7).standard_normal(built.call(built.x).shape)


@pytest.mark.parametrize("name", MODELS)
@each_kind
def test_projections_do_not_depend_on_the_batch(kind, name):
    x, y, made = subject(name, "float64").x, labels(name), engine(name, "float64", "auto")

    def project(rows):
        grads = made.gradients(np.asarray(x)[rows], y[rows], loss="mse")
        return grads.project(DIM, 3, kind).numpy()

    right = project([0, 1, 2])
    np.testing.assert_allclose(project([1]), right[[1]], rtol=1e-9, atol=1e-12)
    many = [2, 0, 1] * 13
    np.testing.assert_allclose(project(many), right[many], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_projections_do_not_depend_on_the_other_rows(name):
    x, made = subject(name, "float64").x, engine(name, "float64", "auto")
    every = made.jacobian(x).project(DIM, 3).numpy()
    for k in (0, 1):
        one = made.jacobian(x, outputs=[k]).project(DIM, 3)
        np.testing.assert_allclose(one, every[:, k : k + 1], rtol=1e-9, atol=1e-12)


def test_large_rows_are_projected_example_by_example_with_the_same_result(monkeypatch):
    draws = [Draw(0, (3, 2, 6, 2, 5, 4)) for _ in range(4)]
    kinds = ("explicit", "outer_over_positions", "grouped", "patches")
    factors = [draw.factor(kind) for draw, kind in zip(draws, kinds, strict=True)]
    at_once = [projected(factor, "gaussian") for factor in factors]
    monkeypatch.setattr("perjac._core.factors.base.FORM_AT_ONCE", 0)
    for factor, right in zip(factors, at_once, strict=True):
        np.testing.assert_allclose(projected(factor, "gaussian"), right, rtol=1e-10)


def named_model() -> keras.Model:
    with floats("float64"):
        model = keras.Sequential(
            [keras.Input((6, 6, 1)), layers.Conv2D(3, 3, activation="tanh", name="seen"),
             layers.Flatten(name="flat"), layers.Dense(4, name="top")],
            name="net",
        )  # fmt: skip
    randomise(model.weights)
    return model


def numbers() -> list[float]:
    """Return a few numbers of projections of each kind."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 6, 6, 1)), rng.standard_normal((2, 4))
    grads = pj.Engine(named_model()).gradients(x, y, loss="mse")
    return [
        float(n) for kind in random_projection.KINDS for n in np.ravel(grads.project(4, 11, kind))
    ]


def test_projections_are_the_same_in_another_process():
    here = pathlib.Path(__file__)
    path = [str(here.parent), str(here.parents[2])]
    code = (
        f"import sys; sys.path[:0] = {path!r}\n"
        "import test_random_projection as test; print(test.numbers())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "77"},
    )  # fmt: skip
    there = [float(n) for n in done.stdout.strip().splitlines()[-1].strip("[]").split(",")]
    np.testing.assert_allclose(numbers(), there, rtol=1e-6)


@pytest.mark.parametrize("options", [{"dim": 0}, {"dim": 2.5}, {"dim": 4, "kind": "dense"}])
def test_projections_that_there_are_not(options):
    x = subject("mlp", "float64").x
    with pytest.raises(InputError, match=f"{list(options)[-1]}=.*{list(options.values())[-1]}"):
        engine("mlp", "float64", "auto").jacobian(x).project(**options)


def test_a_dimension_may_be_a_number_of_numpys():
    jac = engine("mlp", "float64", "auto").jacobian(subject("mlp", "float64").x)
    for kind in random_projection.KINDS:
        np.testing.assert_array_equal(jac.project(np.int64(4), 0, kind), jac.project(4, 0, kind))


# --- How a weight is read -------------------------------------------------------------------


@st.composite
def cutting_chains(draw):
    """A chain that may merge and split axes anywhere."""
    layout = draw(chains())
    entries = int(np.prod(layout.target))
    divisors = [n for n in range(1, entries + 1) if entries % n == 0]
    first = draw(st.sampled_from(divisors))
    return layout.reshape((first, entries // first))


@settings(max_examples=150, deadline=None)
@given(layout=st.one_of(chains(), cutting_chains()))
def test_pieces_tell_where_entries_come_from(layout):
    places = np.arange(np.prod(layout.shape)).reshape(layout.shape)
    target = layout.apply(tf.constant(places)).numpy()
    pieces = layout.pieces()
    assert [int(np.prod([length for _, length, _ in axis])) for axis in pieces] == list(
        layout.target
    )
    if any(axis < 0 for side in pieces for axis, _, _ in side):
        return  # cuts across axes
    for at in np.ndindex(*layout.target):
        source = [0] * len(layout.shape)
        for n, side in zip(at, pieces, strict=True):
            digits = np.unravel_index(n, [length for _, length, _ in side]) if side else ()
            for digit, (axis, _, stride) in zip(digits, side, strict=True):
                source[axis] += int(digit) * stride
        assert target[at] == places[tuple(source)]


def test_chains_that_cut_across_axes_have_pieces_of_their_own():
    plain = Relabelling.of((4, 6))
    cut, other = plain.reshape((6, 4)), plain.transpose((1, 0)).reshape((4, 6))
    assert all(axis < 0 for side in cut.pieces() for axis, _, _ in side)
    assert not {*cut.pieces()} & {*other.pieces()}
    assert cut.pieces() == plain.reshape((6, 4)).pieces()
    assert all(axis >= 0 for side in plain.reshape((2, 12)).pieces() for axis, _, _ in side)


def test_a_weight_that_is_cut_across_its_axes_projects():
    draw = Draw(0, (3, 2, 1, 1, 6, 4))
    factor = Outer(Relabelling.of((4, 6)).reshape((6, 4)), draw.outer().a, draw.outer().delta)
    rows = rows_of(Outer(Relabelling.of((6, 4)), factor.a, factor.delta)).reshape(6, -1)
    found = [projected(factor, "gaussian", 64, seed).reshape(6, -1) for seed in range(50)]
    gram = np.mean([flat @ flat.T for flat in found], 0)
    lengths = np.linalg.norm(rows, axis=1)
    assert np.all(np.abs(gram - rows @ rows.T) < np.outer(lengths, lengths) * 5 * 3 / 3200**0.5)
