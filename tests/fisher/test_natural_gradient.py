"""Natural gradients, consolidation and pruning scores are what NumPy makes of the oracle."""

from __future__ import annotations

import functools
import json

import keras
import numpy as np
import oracle
import pytest
import scipy.special
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from keras import layers
from models import floats, randomise

import perjac as pj
from perjac.errors import InputError, NotPositiveError, UnknownNameError
from perjac.fisher import ElasticWeightConsolidation, ElasticWeights
from perjac.fisher.information import Fisher

pytestmark = pytest.mark.slow  # left out of `make check`

EXACT = ["auto", "cg", "woodbury", "dense"]
APPROXIMATE = [m for m in ("diagonal", "kronecker", "eigenbasis") if hasattr(Fisher, m)]
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def near(found, expected, rtol: float = 1e-10) -> None:
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def flat(by_key) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(v)) for v in by_key.values()])


def half_squares(y, f):
    """Half the sum of squares: the negative log-likelihood at a variance of 1."""
    return 0.5 * tf.reduce_sum(tf.square(f - y), -1)


def yes_or_no(y, f):
    """The negative log-likelihood of labels 0 and 1, added up over outputs."""
    return tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(y, f.dtype), f), -1)


def linear(inputs: int, outputs: int, seed: int = 0, bias: bool = True) -> keras.Model:
    with floats("float64"):
        top = layers.Dense(outputs, use_bias=bias, name="top")
        model = keras.Sequential([keras.Input((inputs,)), top])
    randomise(model.weights, seed)
    return model


class Network:
    """A small network of three classes, its gradient and its Fisher information by the oracle."""

    def __init__(self):
        with floats("float64"):
            self.model = keras.Sequential(
                [
                    keras.Input((3,)),
                    layers.Dense(4, activation="tanh", name="low"),
                    layers.Dense(3, name="top"),
                ]
            )
        randomise(self.model.weights, seed=2)
        self.engine = pj.Engine(self.model)
        self.x, self.y = rng(1).standard_normal((12, 3)), rng(2).integers(0, 3, 12)
        self.theta = np.concatenate([np.ravel(v) for v in self.model.get_weights()])
        weights = self.model.trainable_variables
        rows = oracle.weight_rows(self.model, self.x, weights)
        rows = np.concatenate([r.reshape(*r.shape[:2], -1) for r in rows], 2)
        p = scipy.special.softmax(np.asarray(self.model(self.x)), -1)
        hessians = np.einsum("bk,kl->bkl", p, np.eye(3)) - np.einsum("bk,bl->bkl", p, p)
        self.information = np.einsum("bkp,bkl,blq->pq", rows, hessians, rows) / 12
        _, gradients = oracle.loss_rows(self.model, LOGITS, self.x, self.y, weights)
        self.gradients = np.concatenate([g.reshape(12, -1) for g in gradients], 1)
        self.gradient = self.engine.gradients(self.x, self.y, loss=LOGITS).mean()

    def fisher(self, **options) -> Fisher:
        return self.engine.fisher(self.x, likelihood="categorical", **options)


@functools.cache
def network() -> Network:
    return Network()


# Natural gradients


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("damping", [1e-3, 10.0])
def test_exact_methods_solve_with_the_matrix(method, damping):
    n = network()
    damped = n.information + damping * np.eye(len(n.theta))
    expected = np.linalg.solve(damped, n.gradients.mean(0))
    found = pj.fisher.natural_gradient(n.fisher(), n.gradient, damping, method)
    assert list(found) == n.engine.weight_names
    near(flat(found), expected, 1e-7 if method == "cg" else 1e-9)


@pytest.mark.parametrize("method", APPROXIMATE)
def test_approximate_methods_solve_with_their_own_matrix(method):
    n = network()
    own = getattr(n.fisher(), method)().to_numpy()
    expected = np.linalg.solve(own + 0.01 * np.eye(len(own)), n.gradients.mean(0))
    near(flat(pj.fisher.natural_gradient(n.fisher(), n.gradient, 0.01, method)), expected, 1e-9)


@pytest.mark.parametrize("name", ["dense", "blocks", "diagonal", "low_rank", "operator"])
def test_forms_solve_in_their_own_way(name):
    n = network()
    form = getattr(n.fisher(), name)()
    found = pj.fisher.natural_gradient(form, n.gradient, 0.1)
    own = form.to_numpy() + 0.1 * np.eye(len(n.theta))
    near(flat(found), np.linalg.solve(own, n.gradients.mean(0)), 1e-8)
    with pytest.raises(InputError, match="own way"):
        pj.fisher.natural_gradient(form, n.gradient, 0.1, "cg")


def test_a_gradient_comes_back_as_it_was_given():
    n = network()
    expected = pj.fisher.natural_gradient(n.fisher(), n.gradient, 0.1)
    near(expected["top/kernel"], expected[n.model.layers[1].kernel])
    listed = pj.fisher.natural_gradient(n.fisher(), list(n.gradient.values()), 0.1)
    assert isinstance(listed, list)
    for found, key in zip(listed, expected, strict=True):
        near(found, expected[key])
    near(pj.fisher.natural_gradient(n.fisher(), flat(n.gradient), 0.1), flat(expected))
    single = {key: tf.cast(g, tf.float32) for key, g in n.gradient.items()}
    found = pj.fisher.natural_gradient(n.fisher(), single, 0.1)
    assert {v.dtype for v in found.values()} == {np.dtype("float32")}
    near(flat(found), flat(expected), 1e-5)


def test_what_is_left_out_counts_as_zero():
    n = network()
    part = {"top/bias": np.asarray(n.gradient["top/bias"])}
    others = {key: np.zeros(g.shape) for key, g in n.gradient.items()}
    expected = pj.fisher.natural_gradient(n.fisher(), others | part, 0.1)
    near(flat(pj.fisher.natural_gradient(n.fisher(), part, 0.1)), flat(expected))
    listed = [None, None, None, part["top/bias"]]
    near(np.concatenate([np.ravel(v) for v in pj.fisher.natural_gradient(n.fisher(), listed, 0.1)]),
         flat(expected))  # fmt: skip


def test_gradients_of_a_tape_are_taken():
    with floats("float64"):
        table = layers.Embedding(5, 2, name="table")
        model = keras.Sequential([keras.Input((3,), dtype="int32"), table, layers.Flatten()])
    randomise(model.weights)
    engine, ids, y = pj.Engine(model), rng().integers(0, 5, (8, 3)), rng(1).random((8, 6))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(half_squares(y, model(ids)))
    gradient = tape.gradient(loss, [v.value for v in model.trainable_variables])
    assert isinstance(gradient[0], tf.IndexedSlices)
    fisher = engine.fisher(ids, likelihood="gaussian")
    found = pj.fisher.natural_gradient(fisher, gradient, 0.1)
    # Each row of the table answers for the outputs where its id stands.
    share = np.bincount(np.ravel(ids), minlength=5) / 8
    near(found[0], np.asarray(tf.convert_to_tensor(gradient[0])) / (share + 0.1)[:, None])


def test_short_names_keep_their_types():
    n = network()
    part = {"top/bias": np.ones(3, "float32")}
    found = pj.fisher.natural_gradient(n.fisher(), part, 0.1)
    assert found["top/bias"].dtype == np.float32
    assert found["low/bias"].dtype == np.float64


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("method", ["auto", "woodbury", "dense"])
def test_one_undamped_step_solves_a_linear_regression(outputs, method):
    model = linear(4, outputs)
    engine, x, y = pj.Engine(model), rng().standard_normal((30, 4)), rng(1).random((30, outputs))
    gradient = engine.gradients(x, y, loss=half_squares).mean()
    fisher = engine.fisher(x, likelihood="gaussian")
    pj.fisher.descend(engine, pj.fisher.natural_gradient(fisher, gradient, 0.0, method))
    best = np.linalg.lstsq(np.c_[x, np.ones(30)], y, rcond=None)[0]
    near(np.r_[model.layers[0].kernel, model.layers[0].bias[None]], best, 1e-9)


def test_natural_steps_are_newtons_for_a_logistic_regression():
    """Fisher scoring: it squares the error in each step."""
    model = linear(3, 1, seed=1)
    engine, x = pj.Engine(model), 2 * rng().standard_normal((60, 3))
    y = (rng(1).random((60, 1)) < 0.4).astype("float64")
    sizes = []
    for _ in range(8):
        gradient = engine.gradients(x, y, loss=yes_or_no).mean()
        sizes.append(np.linalg.norm(flat(gradient)))
        fisher = engine.fisher(x, likelihood="bernoulli")
        pj.fisher.descend(engine, pj.fisher.natural_gradient(fisher, gradient, 0.0))
    assert sizes[0] > 1e-2
    assert sizes[-1] < 1e-14


def test_steps_do_not_depend_on_the_parametrisation():
    """Weights of inputs ten times as large are a tenth; the outputs move as they did."""
    moved = []
    for scale in (1.0, 10.0):
        model = linear(3, 2, seed=1)
        model.layers[0].kernel.assign(model.layers[0].kernel / scale)
        engine, x = pj.Engine(model), scale * 2 * rng().standard_normal((20, 3))
        y, before = rng(1).integers(0, 2, (20, 2)), np.asarray(model(x))
        gradient = engine.gradients(x, y, loss=yes_or_no).mean()
        fisher = engine.fisher(x, likelihood="bernoulli")
        direction = pj.fisher.natural_gradient(fisher, gradient, 0.0)
        pj.fisher.descend(engine, direction, rate=0.1)
        moved.append(np.asarray(model(x)) - before)
    assert np.abs(moved[0]).max() > 0.01
    near(moved[1], moved[0], 1e-8)


def test_directions_move_the_weights():
    model = linear(3, 2)
    engine, before = pj.Engine(model), model.get_weights()
    steps = {"kernel": rng().random((3, 2)), "bias": np.ones(2, "float32")}
    pj.fisher.descend(engine, {"top/kernel": steps["kernel"]}, rate=0.5)
    near(model.layers[0].kernel, before[0] - 0.5 * steps["kernel"])
    near(model.layers[0].bias, before[1])
    pj.fisher.descend(engine, list(steps.values()), rate=2.0)
    near(model.layers[0].bias, before[1] - 2.0)


def test_optimisers_take_directions():
    model = linear(3, 2)
    engine, before = pj.Engine(model), model.get_weights()
    direction = {key: np.ones(v.shape) for key, v in zip(engine.weight_names, before, strict=True)}
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.apply_gradients(zip(direction.values(), model.trainable_variables, strict=True))
    for now, then in zip(model.get_weights(), before, strict=True):
        near(now, then - 0.1, 1e-7)


def test_directions_that_do_not_fit_are_refused():
    engine = pj.Engine(linear(3, 2))
    with pytest.raises(InputError, match="shape"):
        pj.fisher.descend(engine, {"top/kernel": np.ones((2, 3))})
    with pytest.raises(UnknownNameError, match="bottom"):
        pj.fisher.descend(engine, {"bottom": np.ones(2)})
    with pytest.raises(InputError, match="mapping"):
        pj.fisher.descend(engine, np.ones(8))
    n = network()
    with pytest.raises(InputError, match="gradient for each"):
        pj.fisher.natural_gradient(n.fisher(), [np.ones(2)])
    with pytest.raises(InputError, match="method="):
        pj.fisher.natural_gradient(n.fisher(), n.gradient, method="magic")
    with pytest.raises(InputError, match="one of its forms"):
        pj.fisher.natural_gradient(n.information, n.gradient)
    with pytest.raises(NotPositiveError):
        pj.fisher.natural_gradient(n.fisher(), n.gradient, damping=0.0)


# Elastic weight consolidation


def moved(model: keras.Model, seed: int = 7) -> np.ndarray:
    """Move all weights and return by how much."""
    steps = [0.1 * rng(seed).standard_normal(w.shape) for w in model.get_weights()]
    model.set_weights([w + s for w, s in zip(model.get_weights(), steps, strict=True)])
    return np.concatenate([np.ravel(s) for s in steps])


def fresh() -> tuple[keras.Model, pj.Engine, Fisher]:
    n = network()
    model = keras.models.clone_model(n.model)
    model.set_weights(n.model.get_weights())
    engine = pj.Engine(model)
    return model, engine, engine.fisher(n.x)


def test_the_penalty_is_its_formula():
    model, engine, fisher = fresh()
    held = ElasticWeightConsolidation(engine, fisher, strength=3.0)
    assert float(held()) == 0
    steps, importance = moved(model), np.diag(network().information)
    assert float(held()) == pytest.approx(1.5 * np.sum(importance * steps**2), rel=1e-10)
    with tf.GradientTape() as tape:
        value = held()
    slopes = tape.gradient(value, [v.value for v in model.trainable_variables])
    near(np.concatenate([np.ravel(s) for s in slopes]), 3.0 * importance * steps)
    parts = held.regularizers()
    added = sum(float(parts[v.path](v)) for v in model.trainable_variables)
    assert added == pytest.approx(float(held()), rel=1e-12)


def test_the_penalty_follows_the_weights_inside_a_compiled_function():
    model, engine, fisher = fresh()
    held = ElasticWeightConsolidation(engine, fisher)
    compiled = tf.function(held)
    assert float(compiled()) == 0
    moved(model)
    assert float(compiled()) == pytest.approx(float(held()), rel=1e-12)
    assert float(held()) > 0


@pytest.mark.parametrize("name", ["dense", "blocks", "diagonal"])
def test_of_any_form_the_diagonal_counts(name):
    _, engine, fisher = fresh()
    held = ElasticWeightConsolidation(engine, getattr(fisher, name)())
    near(flat(held.importances), np.diag(network().information))


def test_attached_regularisers_are_in_the_models_losses():
    model, engine, fisher = fresh()
    own = keras.regularizers.L2(0.125)
    model.layers[0].kernel.regularizer = own
    held = ElasticWeightConsolidation(engine, fisher, 2.0)
    held.attach()
    moved(model)
    expected = float(held()) + 0.125 * np.sum(np.square(model.layers[0].kernel))
    assert float(tf.add_n(model.losses)) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(InputError, match="attached already"):
        held.attach()
    held.detach()
    assert model.layers[0].kernel.regularizer is own
    assert len(model.losses) == 1


def test_fit_counts_attached_regularisers():
    """One step of plain descent, against the same by hand."""
    n = network()
    model, engine, fisher = fresh()
    held = ElasticWeightConsolidation(engine, fisher, 5.0)
    held.attach()
    steps = moved(model)
    before = np.concatenate([np.ravel(w) for w in model.get_weights()])
    gradient = flat(engine.gradients(n.x, n.y, loss=LOGITS).mean())
    with floats("float64"):  # in which Keras adds regularisers up
        model.compile(keras.optimizers.SGD(0.1), LOGITS)
        model.fit(n.x, n.y, batch_size=12, verbose=0)
    after = np.concatenate([np.ravel(w) for w in model.get_weights()])
    penalty = 5.0 * np.diag(n.information) * steps
    near(after - before, -0.1 * (gradient + penalty), 1e-6)


def test_regularisers_survive_json():
    anchor, importance = rng().random((3, 2)).astype("float32"), rng(1).random((3, 2))
    held = ElasticWeights(anchor, importance, 3.0, also=keras.regularizers.L1(0.1))
    config = json.loads(json.dumps(keras.regularizers.serialize(held)))
    again = keras.regularizers.deserialize(config)
    assert isinstance(again, ElasticWeights)
    assert again.anchor.dtype == "float32"
    np.testing.assert_array_equal(again.anchor, anchor)
    np.testing.assert_array_equal(again.importance, importance)
    x = rng(2).random((3, 2))
    expected = 1.5 * np.sum(importance * (x - anchor) ** 2) + 0.1 * np.abs(x).sum()
    assert float(again(x)) == pytest.approx(expected, rel=1e-6)
    assert float(held(x)) == float(again(x))


class Towers(keras.Model):
    """A model of its own, with layers inside a layer."""

    def __init__(self):
        super().__init__()
        self.inner = keras.Sequential([layers.Dense(3, activation="tanh")])
        self.norm, self.head = layers.LayerNormalization(), layers.Dense(2)

    def call(self, x):
        return self.head(self.norm(self.inner(x)))


def every_layer() -> keras.Model:
    ids = keras.Input((4,), dtype="int32")
    x = layers.Conv1D(3, 2)(layers.LSTM(3, return_sequences=True)(layers.Embedding(5, 3)(ids)))
    x = layers.BatchNormalization()(layers.SeparableConv1D(3, 2)(x))
    return keras.Model(ids, layers.Dense(2)(layers.Flatten()(x)))


def test_attached_regularisers_are_saved_with_the_model(tmp_path):
    model = every_layer()
    x = rng().integers(0, 5, (6, 4))
    engine = pj.Engine(model)
    held = ElasticWeightConsolidation(engine, engine.fisher(x, likelihood="gaussian"))
    held.attach()
    moved(model)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert len(again.losses) == len(model.trainable_variables) == len(model.losses)
    assert float(tf.add_n(again.losses)) == pytest.approx(float(held()), rel=1e-5)
    assert float(held()) > 0


def test_models_of_their_own_are_held_too():
    model = Towers()
    x = rng().standard_normal((6, 4)).astype("float32")
    model(x)
    engine = pj.Engine(model)
    held = ElasticWeightConsolidation(engine, engine.fisher(x))
    held.attach()
    moved(model)
    assert float(tf.add_n(model.losses)) == pytest.approx(float(held()), rel=1e-5)


def test_where_the_information_is_diagonal_tasks_in_turn_are_tasks_together():
    """A linear regression on orthogonal inputs: the penalty is the old loss, up to a constant."""
    columns = np.linalg.qr(rng().standard_normal((8, 3)))[0] * [1.0, 2.0, 3.0]
    x, ys = columns, rng(1).standard_normal((2, 8, 1))
    model = linear(3, 1, bias=False)
    engine = pj.Engine(model)
    model.set_weights([np.linalg.lstsq(x, ys[0], rcond=None)[0]])
    fisher = engine.fisher(x, likelihood="gaussian", reduction="sum")
    held = ElasticWeightConsolidation(engine, fisher)
    model.set_weights([np.linalg.lstsq(np.r_[x, x], np.concatenate(ys), rcond=None)[0]])
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(half_squares(ys[1], model(x))) + held()
    slope = tape.gradient(total, model.trainable_variables[0].value)
    assert np.abs(slope).max() < 1e-12


def tasks() -> tuple[tuple, tuple]:
    """Two tasks of yes or no, which look at two inputs of their own each."""
    found = []
    for task in range(2):
        x = rng(task).standard_normal((200, 4))
        seen = x[:, 2 * task : 2 * task + 2]
        x[:, 2 - 2 * task : 4 - 2 * task] *= 0.3
        found.append((x.astype("float32"), (seen[:, :1] * seen[:, 1:] > 0).astype("float64")))
    return tuple(found)


def test_an_old_task_is_kept_better_with_it_than_without():
    old, new = tasks()
    accuracy = {}
    for strength in (0.0, 10.0):
        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [keras.Input((4,)), layers.Dense(16, activation="tanh"), layers.Dense(1)]
        )
        learnt = trained(model, old, old)
        engine = pj.Engine(model)
        fisher = engine.fisher(old[0], likelihood="bernoulli")
        ElasticWeightConsolidation(engine, fisher, strength).attach()
        accuracy[strength] = trained(model, new, old), trained(model, new, new, steps=0)
    assert learnt > 0.95
    assert accuracy[0.0][0] < 0.7  # forgotten
    assert accuracy[10.0][0] > 0.9  # kept
    assert accuracy[10.0][1] > 0.8  # and something learnt


def trained(model: keras.Model, task: tuple, other: tuple, steps: int = 80) -> float:
    """Train on a task, all of it in each step, and return the accuracy on another."""
    if steps:
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.05), loss)
        x, y = (np.tile(part, (steps, 1)) for part in task)  # an epoch costs more than its steps
        model.fit(x, y, batch_size=len(task[0]), shuffle=False, verbose=0)
    return float(np.mean((np.asarray(model(other[0])) > 0) == other[1]))


def test_penalties_of_several_tasks_add_up():
    model, engine, fisher = fresh()
    first = ElasticWeightConsolidation(engine, fisher, 2.0)
    first.attach()
    moved(model)
    second = ElasticWeightConsolidation(engine, engine.fisher(network().x[:4]))
    second.attach()
    moved(model, seed=8)
    total = float(first()) + float(second())
    assert float(tf.add_n(model.losses)) == pytest.approx(total, rel=1e-10)


def test_penalties_that_do_not_fit_are_refused():
    n = network()
    with pytest.raises(InputError, match="weights of this model"):
        ElasticWeightConsolidation(pj.Engine(linear(3, 2)), n.fisher().diagonal())
    with pytest.raises(InputError, match="importance="):
        ElasticWeights(np.ones(3), np.ones(2))
    with pytest.raises(InputError, match="strength="):
        ElasticWeights(np.ones(3), np.ones(3), -1.0)
    with pytest.raises(InputError, match="weight of shape"):
        ElasticWeights(np.ones(3), np.ones(3))(np.ones(2))
    w = tf.Variable(np.ones((3, 2)))
    engine = pj.Engine(lambda x: tf.matmul(x, w), variables=[w])
    held = ElasticWeightConsolidation(engine, engine.fisher(n.x))
    with pytest.raises(InputError, match="plain TensorFlow variable"):
        held.attach()
    w.assign_add(np.ones((3, 2)))
    assert float(held()) > 0


# Pruning


def test_brain_damage_is_half_the_curvature():
    n = network()
    found = pj.fisher.optimal_brain_damage(n.engine, n.fisher())
    near(flat(found), 0.5 * n.theta**2 * np.diag(n.information))
    assert found["top/kernel"].shape == (4, 3)
    near(flat(pj.fisher.optimal_brain_damage(n.engine, n.fisher().dense())), flat(found))


def test_of_the_empirical_kind_it_is_fisher_pruning():
    n = network()
    fisher = n.engine.fisher((n.x, n.y), kind="empirical", loss=LOGITS)
    expected = 0.5 * n.theta**2 * np.mean(n.gradients**2, 0)
    near(flat(pj.fisher.optimal_brain_damage(n.engine, fisher)), expected)


def test_brain_surgery_is_by_the_inverse():
    n = network()
    inverse = np.linalg.inv(n.information + 0.01 * np.eye(len(n.theta)))
    found = flat(pj.fisher.optimal_brain_surgeon(n.engine, n.fisher(), 0.01))
    near(found, 0.5 * n.theta**2 / np.diag(inverse), 1e-8)
    damage = 0.5 * n.theta**2 * (np.diag(n.information) + 0.01)
    assert (found <= damage * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", ["blocks", "diagonal", "low_rank"])
def test_brain_surgery_is_by_the_inverse_of_any_form(name, monkeypatch):
    monkeypatch.setattr("perjac.fisher.pruning._AT_ONCE", 5)  # several rounds, and a rest
    n = network()
    form = getattr(n.fisher(), name)()
    inverse = np.linalg.inv(form.to_numpy() + 0.1 * np.eye(len(n.theta)))
    found = pj.fisher.optimal_brain_surgeon(n.engine, form, 0.1)
    near(flat(found), 0.5 * n.theta**2 / np.diag(inverse), 1e-7)


class Quadratic:
    """A linear regression at its best: the loss is what both scores take every loss for."""

    def __init__(self):
        self.model = linear(4, 1, bias=False)
        self.engine = pj.Engine(self.model)
        self.x, self.y = rng().standard_normal((20, 4)), rng(1).standard_normal((20, 1))
        self.best = np.linalg.lstsq(self.x, self.y, rcond=None)[0]
        self.model.set_weights([self.best])
        self.fisher = self.engine.fisher(self.x, likelihood="gaussian", reduction="sum")

    def rise(self, theta: np.ndarray) -> float:
        losses = [0.5 * np.sum((self.x @ t - self.y) ** 2) for t in (theta, self.best)]
        return losses[0] - losses[1]


def test_brain_damage_is_how_much_a_quadratic_loss_rises():
    q = Quadratic()
    found = pj.fisher.optimal_brain_damage(q.engine, q.fisher)["top/kernel"]
    for n in range(4):
        without = q.best.copy()
        without[n] = 0
        assert q.rise(without) == pytest.approx(found[n, 0], rel=1e-9)


def test_brain_surgery_is_how_little_a_quadratic_loss_can_rise():
    q = Quadratic()
    found = pj.fisher.optimal_brain_surgeon(q.engine, q.fisher, damping=0.0)["top/kernel"]
    for n in range(4):
        others = [m for m in range(4) if m != n]
        without = np.zeros((4, 1))
        without[others] = np.linalg.lstsq(q.x[:, others], q.y, rcond=None)[0]
        assert q.rise(without) == pytest.approx(found[n, 0], rel=1e-9)


def test_taylor_scores_are_squared_products():
    n = network()
    found = pj.fisher.taylor(n.engine, n.gradient)
    near(flat(found), (n.gradients.mean(0) * n.theta) ** 2)
    short = pj.fisher.taylor(n.engine, {"top/bias": np.ones(3)})
    assert list(short) == [n.engine.weight_names[-1]]
    near(short["top/bias"], np.square(n.model.get_weights()[-1]))
    with pytest.raises(InputError, match="by key"):
        pj.fisher.taylor(n.engine, np.ones(31))
    with pytest.raises(InputError, match="shape"):
        pj.fisher.taylor(n.engine, {"top/bias": np.ones(2)})


shapes = st.lists(st.lists(st.integers(0, 3), max_size=2).map(tuple), min_size=1, max_size=3)


@given(shapes=shapes, share=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_lowest_are_below_all_others(shapes, share, seed):
    draw = rng(seed)
    scores = {f"w{n}": draw.integers(0, 4, shape) for n, shape in enumerate(shapes)}
    masks = pj.fisher.lowest(scores, share)
    assert {k: m.shape for k, m in masks.items()} == {k: s.shape for k, s in scores.items()}
    chosen, values = flat(masks), flat(scores)
    assert chosen.dtype == bool
    assert chosen.sum() == round(share * len(values))
    if 0 < chosen.sum() < len(values):
        assert values[chosen].max() <= values[~chosen].min()


def test_of_equal_scores_the_first_are_lowest():
    scores = {"a": rng().integers(0, 3, 300), "b": rng(1).integers(0, 3, (10, 20))}
    values = flat(scores)
    first = sorted(range(500), key=lambda n: (values[n], n))[:250]
    np.testing.assert_array_equal(
        np.flatnonzero(flat(pj.fisher.lowest(scores, 0.5))), sorted(first)
    )


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="share="):
        pj.fisher.lowest({"a": np.ones(3)}, 1.5)
    with pytest.raises(InputError, match="finite"):
        pj.fisher.lowest({"a": np.array([np.nan, 1.0])}, 0.5)
    n = network()
    with pytest.raises(NotPositiveError):
        pj.fisher.optimal_brain_surgeon(n.engine, n.fisher(), damping=0.0)


def test_pruning_the_lowest_hurts_less_than_pruning_others():
    n = network()
    scores = pj.fisher.optimal_brain_damage(n.engine, n.fisher())
    model, masks = keras.models.clone_model(n.model), pj.fisher.lowest(scores, 0.3)
    before = np.asarray(n.model(n.x))

    def change(masks) -> float:
        kept = zip(n.model.get_weights(), masks.values(), strict=True)
        model.set_weights([np.where(m, 0, w) for w, m in kept])
        return float(np.linalg.norm(np.asarray(model(n.x)) - before))

    opposite = pj.fisher.lowest({key: -s for key, s in scores.items()}, 0.3)
    assert change(masks) < 0.2 * change(opposite)
