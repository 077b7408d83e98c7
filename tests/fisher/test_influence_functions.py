"""Influence functions against the explicit curvature, and retraining without each example."""

from __future__ import annotations

import functools

import keras
import numpy as np
import oracle
import pytest
import scipy.optimize
import scipy.special
from models import floats, randomise

import perjac as pj
from perjac.errors import InputError, NotPositiveError, OutOfRangeError
from perjac.fisher import BlockForm, Influence
from perjac.fisher.blocks import Dense

pytestmark = pytest.mark.slow

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")
DAMPING = 0.05


def close(found, expected, rtol=1e-9):
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= rtol * np.linalg.norm(expected)


def network(*, last: str | None = None, dtype: str = "float64"):
    with floats(dtype):
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(4, activation="tanh"),
                keras.layers.Dense(3, activation=last),
            ]
        )
    randomise(model.weights)
    return model


def data(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3)), rng.integers(0, 3, count)


@functools.cache
def subject():
    """Return (model, engine, data, test data, everything as plain matrices), made once for all."""
    model, pair, test = network(), data(12), data(5, 1)
    return model, pj.Engine(model), pair, test, Explicit(model, *pair)


class Explicit:
    """Everything as plain matrices: the gradients (N, P), the rows (N, K, P), H (P, P)."""

    def __init__(self, model, x, y, damping=DAMPING):
        self.model = model
        self.gradients = self.of_losses(x, y)
        self.rows = self.of_outputs(x)
        p = scipy.special.softmax(np.asarray(model(x)), -1)
        curved = np.einsum("bk,kl->bkl", p, np.eye(3)) - np.einsum("bk,bl->bkl", p, p)
        each = np.einsum("bkp,bkl,blq->bpq", self.rows, curved, self.rows)
        self.own = each / len(x)
        self.hessian = each.mean(0) + damping * np.eye(self.rows.shape[2])

    def of_losses(self, x, y):
        call = functools.partial(self.model, training=False)
        found = oracle.loss_rows(call, LOSS, x, y, self.model.trainable_variables)[1]
        return np.concatenate([g.reshape(len(x), -1) for g in found], 1)

    def of_outputs(self, x):
        call = functools.partial(self.model, training=False)
        found = oracle.weight_rows(call, x, self.model.trainable_variables)
        return np.concatenate([r.reshape(*r.shape[:2], -1) for r in found], 2)


def joined(by_key):
    return np.concatenate([v.reshape(len(v), -1) for v in by_key.values()], 1)


@pytest.mark.parametrize("form", ["exact", "dense", "low_rank", "operator"])
def test_influence_is_the_definition(form):
    _, engine, (x, y), (x2, y2), plain = subject()
    rtol = 1e-8 if form == "operator" else 1e-9  # conjugate gradients stop at a residual of 1e-10
    found = Influence(engine, (x, y), loss=LOSS, form=form, damping=DAMPING)
    solved = np.linalg.solve(plain.hessian, plain.gradients.T)  # (P, N)
    close(found.on_losses(x2, y2), -(plain.of_losses(x2, y2) @ solved).T, rtol)
    close(found.on_outputs(x2), -np.einsum("tkp,pn->ntk", plain.of_outputs(x2), solved), rtol)
    close(found.on_outputs(x2, outputs=[2])[..., 0], found.on_outputs(x2)[..., 2], rtol)
    close(found.of_itself(), -np.sum(plain.gradients * solved.T, 1), rtol)
    close(joined(found.weights_without(range(12))), solved.T / 12, rtol)
    close(found.losses_without(x2, y2), -found.on_losses(x2, y2) / 12, rtol)


@pytest.mark.parametrize("form", ["blocks", "diagonal", "kronecker", "eigenbasis"])
def test_influence_by_an_approximation_is_that_of_its_matrix(form):
    _, engine, (x, y), (x2, y2), plain = subject()
    matrix = getattr(engine.fisher((x, y), likelihood=LOSS), form)().to_numpy()
    solved = np.linalg.solve(matrix + DAMPING * np.eye(len(matrix)), plain.gradients.T)
    found = Influence(engine, (x, y), loss=LOSS, form=form, damping=DAMPING)
    close(found.on_losses(x2, y2), -(plain.of_losses(x2, y2) @ solved).T)


def test_newton_step_leaves_out_the_examples_own_curvature():
    _, engine, (x, y), (x2, y2), plain = subject()
    moved = np.stack(
        [
            np.linalg.solve(plain.hessian - own, g) / 12
            for own, g in zip(plain.own, plain.gradients, strict=True)
        ]
    )
    found = Influence(engine, (x, y), loss=LOSS, damping=DAMPING)
    close(joined(found.weights_without([7, 0, 7], newton=True)), moved[[7, 0, 7]])
    close(found.losses_without(x2, y2, newton=True), moved @ plain.of_losses(x2, y2).T)


def test_result_does_not_depend_on_memory_or_the_reduction_of_the_form():
    model, plenty, (x, y), (x2, y2), _ = subject()
    whole = Influence(plenty, (x, y), loss=LOSS, damping=DAMPING)
    engine = pj.Engine(model, memory_limit="3KiB")
    total = plenty.fisher((x, y), likelihood=LOSS, reduction="sum").dense()
    little = Influence(engine, (x, y), loss=LOSS, form=total, damping=DAMPING)
    assert little._most(1) < 5
    close(little.on_losses(x2, y2), whole.on_losses(x2, y2))
    close(little.on_outputs(x2), whole.on_outputs(x2))
    close(little.of_itself(), whole.of_itself())
    for newton in (False, True):
        close(
            little.losses_without(x2, y2, newton=newton),
            whole.losses_without(x2, y2, newton=newton),
        )


def test_influence_in_float32_is_near_that_in_float64():
    (x, y), (x2, y2) = data(12), data(5, 1)
    x, x2 = x.astype("float32"), x2.astype("float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    narrow = Influence(pj.Engine(network(dtype="float32")), (x, y), loss=loss, damping=DAMPING)
    wide = Influence(subject()[1], (x.astype("f8"), y), loss=LOSS, damping=DAMPING)
    close(narrow.on_losses(x2, y2), wide.on_losses(x2.astype("f8"), y2), 1e-4)
    close(narrow.of_itself(), wide.of_itself(), 1e-4)


def test_a_form_too_rough_for_a_newton_step_is_refused():
    _, engine, pair, _, _ = subject()
    exact = engine.fisher(pair, likelihood=LOSS).dense()
    little = BlockForm(exact.columns, 12, {exact.keys: Dense(0.01 * exact.to_numpy())}, "mean")
    found = Influence(engine, pair, loss=LOSS, form=little, damping=1e-4)
    found.weights_without(0)
    with pytest.raises(NotPositiveError, match="newton"):
        found.weights_without(range(12), newton=True)


def test_probabilities_and_a_compiled_loss_are_as_good_as_logits():
    _, engine, (x, y), (x2, y2), _ = subject()
    model = network(last="softmax")
    model.compile(loss="sparse_categorical_crossentropy")
    found = Influence(pj.Engine(model), (x, y), damping=DAMPING)
    logits = Influence(engine, (x, y), loss=LOSS, damping=DAMPING)
    close(found.on_losses(x2, y2), logits.on_losses(x2, y2), 1e-6)  # Keras clips at 1e-7


# Against retraining: logistic regression with a weight decay, where the Gauss-Newton matrix is the
# Hessian.


def objective(flat, x, y, total):
    """Return (1/total) Σ ℓ + ½ DAMPING ‖θ‖² and its gradient; θ is a kernel (3, 3) and a bias."""
    w, b = flat[:9].reshape(3, 3), flat[9:]
    logits = x @ w + b
    rest = scipy.special.softmax(logits, -1) - np.eye(3)[y]
    losses = scipy.special.logsumexp(logits, -1) - logits[np.arange(len(y)), y]
    slope = np.concatenate([np.ravel(x.T @ rest), rest.sum(0)]) / total + DAMPING * flat
    return losses.sum() / total + DAMPING / 2 * flat @ flat, slope


def trained(x, y, total, start):
    """Return the optimum: a strictly convex objective has one, where its slope is zero.

    By the slope, as values of the objective are all alike within 1e-8 of it.
    """

    def slope(flat):
        return objective(flat, x, y, total)[1]

    found = scipy.optimize.root(slope, start, tol=1e-12)
    assert np.abs(slope(found.x)).max() < 1e-10
    return found.x


@functools.cache
def retrained():
    """Return (model, data, test data, weights without each, their change of test losses)."""
    (x, y), (x2, y2) = data(150), data(8, 1)
    best = trained(x, y, 150, np.zeros(12))
    with floats("float64"):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
    model.set_weights([best[:9].reshape(3, 3), best[9:]])

    def losses(flat):
        logits = x2 @ flat[:9].reshape(3, 3) + flat[9:]
        return scipy.special.logsumexp(logits, -1) - logits[np.arange(8), y2]

    without = [trained(np.delete(x, n, 0), np.delete(y, n), 150, best) for n in range(150)]
    changes = np.array([losses(flat) - losses(best) for flat in without])
    return model, (x, y), (x2, y2), np.array(without) - best, changes


@pytest.mark.parametrize(("newton", "error"), [(False, 0.05), (True, 0.02)])
def test_influence_predicts_retraining_without_each_example(newton, error):
    model, pair, (x2, y2), moved, changes = retrained()
    found = Influence(pj.Engine(model), pair, loss=LOSS, damping=DAMPING)
    weights = joined(found.weights_without(range(150), newton=newton))
    losses = found.losses_without(x2, y2, newton=newton)
    for predicted, true in ((weights, moved), (losses, changes)):
        assert np.corrcoef(np.ravel(predicted), np.ravel(true))[0, 1] > 0.99
        assert np.linalg.norm(predicted - true) < error * np.linalg.norm(true)


def test_what_does_not_fit_is_refused():
    model, engine, (x, y), _, _ = subject()
    with pytest.raises(InputError, match="labels"):
        Influence(engine, x, loss=LOSS)
    with pytest.raises(InputError, match="form="):
        Influence(engine, (x, y), loss=LOSS, form="full")
    with pytest.raises(InputError, match="damping="):
        Influence(engine, (x, y), loss=LOSS, damping=-1)
    with pytest.raises(InputError, match="compiled"):
        Influence(engine, (x, y))
    part = engine.fisher((x, y), likelihood=LOSS, wrt=model.layers[0]).dense()
    with pytest.raises(InputError, match="about"):
        Influence(engine, (x, y), loss=LOSS, form=part)
    with pytest.raises(OutOfRangeError, match="examples="):
        Influence(engine, (x, y), loss=LOSS).weights_without(12)
