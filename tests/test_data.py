"""Questions about data: each against a plain loop of tapes in float64, or a closed form."""

import contextlib
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf

import perjac as pj
from perjac.data import _batches, _products
from perjac.errors import (
    FileFormatError,
    InputError,
    NotFiniteError,
    OutOfRangeError,
    UnknownNameError,
)

pytestmark = pytest.mark.slow  # left out of `make check`

CLASSES = 3
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
EXACT = {"rtol": 1e-10, "atol": 1e-13}
EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "label_errors.py"


def dense_net(seed=1, **last):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [keras.Input((4,), dtype="float64"),
         keras.layers.Dense(5, activation="tanh", dtype="float64"),
         keras.layers.Dense(CLASSES, dtype="float64", name="top", **last)]
    )  # fmt: skip


def made_up(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 4)), rng.integers(0, CLASSES, count)


def loss_of(model, x, y):
    """The cross-entropy of examples, from first principles."""
    logits = model(x)
    own = tf.reduce_sum(logits * tf.one_hot(y, CLASSES, dtype=logits.dtype), 1)
    return tf.reduce_logsumexp(logits, 1) - own


def margin_of(model, x, y):
    """log p / (1 - p) of the labelled class, from first principles."""
    p = tf.reduce_sum(tf.nn.softmax(model(x)) * tf.one_hot(y, CLASSES, dtype="float64"), 1)
    return tf.math.log(p) - tf.math.log(1 - p)


def slow_rows(model, x, y, of=loss_of):
    """Each example's gradient, flat, one tape after another: (N, P)."""
    rows = []
    for n in range(len(x)):
        with tf.GradientTape() as tape:
            value = of(model, x[n : n + 1], y[n : n + 1])
        parts = tape.gradient(value, model.trainable_variables)
        rows.append(np.concatenate([np.ravel(part) for part in parts]))
    return np.array(rows)


@pytest.fixture(scope="module")
def net():
    """An engine, 17 examples with labels, and their gradients by the slow way."""
    model = dense_net()
    x, y = made_up(17)
    return pj.Engine(model), x, y, slow_rows(model, x, y)


@pytest.mark.parametrize("batch_size", [1, 5, 17, 64])
def test_hardest_are_those_of_the_largest_norms(net, batch_size):
    engine, x, y, rows = net
    norms = np.linalg.norm(rows, axis=1)
    found = pj.data.hardest(engine, x, y, 4, loss=LOGITS, batch_size=batch_size)
    np.testing.assert_allclose(found.scores, norms, **EXACT)
    np.testing.assert_allclose(found.losses, loss_of(engine.model, x, y), **EXACT)
    assert found.indices.tolist() == np.argsort(-norms)[:4].tolist()
    assert len(found) == 4


def test_hardest_by_loss_and_of_one_layer(net):
    engine, x, y, rows = net
    losses = np.asarray(loss_of(engine.model, x, y))
    found = pj.data.hardest(engine, x, y, 100, loss=LOGITS, by="loss")
    assert found.indices.tolist() == np.argsort(-losses).tolist()
    found = pj.data.hardest(engine, x, y, loss=LOGITS, wrt="top")
    np.testing.assert_allclose(found.scores, np.linalg.norm(rows[:, 25:], axis=1), **EXACT)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_typical_is_the_cosine_with_the_mean_gradient(net, batch_size):
    engine, x, y, rows = net
    mean = rows.mean(0)
    cosines = rows @ mean / np.linalg.norm(rows, axis=1) / np.linalg.norm(mean)
    found = pj.data.typical(engine, x, y, 6, loss=LOGITS, batch_size=batch_size)
    np.testing.assert_allclose(found.scores, cosines, **EXACT)
    assert found.indices.tolist() == np.argsort(-cosines)[:6].tolist()


def test_nothing_is_typical_where_the_mean_gradient_is_zero():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.set_weights([np.zeros((1, 1)), np.zeros(1)])
    with pytest.raises(InputError, match="mean gradient is zero"):
        pj.data.typical(model, np.ones((2, 1)), np.array([[1.0], [-1.0]]), loss="mse")


@pytest.mark.parametrize("batch_size", [2, 5, 64])
@pytest.mark.parametrize("measure", ["cosine", "dot"])
@pytest.mark.parametrize("share", [_products._SHARE, 1e-12], ids=["together", "one by one"])
def test_similar_keeps_the_nearest_of_all_products(net, monkeypatch, batch_size, measure, share):
    monkeypatch.setattr(_products, "_SHARE", share)
    engine, x, y, rows = net
    queries, labels = made_up(6, seed=3)
    own = slow_rows(engine.model, queries, labels)
    expected = own @ rows.T
    if measure == "cosine":
        expected /= np.linalg.norm(own, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
    options = {"measure": measure, "loss": LOGITS, "batch_size": batch_size}
    found = pj.data.similar(engine, queries, labels, x, y, 4, **options)
    best = np.argsort(-expected, axis=1)[:, :4]
    np.testing.assert_array_equal(found.indices, best)
    np.testing.assert_allclose(found.scores, np.take_along_axis(expected, best, 1), **EXACT)


def test_of_equally_similar_examples_the_first_comes_first(net):
    engine, x, y, _ = net
    twice, labels = np.concatenate([x[:6], x[:6]]), np.concatenate([y[:6], y[:6]])
    for batch_size in (4, 5):
        found = pj.data.similar(
            engine, x[:3], y[:3], twice, labels, 100, loss=LOGITS, batch_size=batch_size
        )
        assert found.indices.shape == (3, 12)
        assert found.indices[:, :2].tolist() == [[0, 6], [1, 7], [2, 8]]


@pytest.mark.parametrize("measure", ["cosine", "dot"])
def test_similar_by_projections_compares_the_projections(net, measure):
    engine, x, y, rows = net
    projected = np.asarray(engine.gradients(x, y, loss=LOGITS).project(2000, seed=3))
    exact, expected = rows[:4] @ rows.T, projected[:4] @ projected.T
    if measure == "cosine":
        lengths = np.linalg.norm(projected, axis=1)
        expected = expected / lengths[:4, None] / lengths
        exact = exact / np.linalg.norm(rows, axis=1)[:4, None] / np.linalg.norm(rows, axis=1)
    options = {"measure": measure, "loss": LOGITS, "dim": 2000, "seed": 3, "batch_size": 5}
    found = pj.data.similar(engine, x[:4], y[:4], x, y, 17, **options)
    in_order = np.take_along_axis(expected, found.indices, 1)
    np.testing.assert_allclose(found.scores, in_order, rtol=1e-9, atol=1e-12)
    assert np.all(np.diff(found.scores) <= 0)
    assert np.abs(expected - exact).max() < 0.2 * np.abs(exact).max()


def checkpoints(count=3):
    return [dense_net(seed).get_weights() for seed in range(10, 10 + count)]


@pytest.mark.parametrize("batch_size", [4, 64])
def test_tracin_is_the_sum_over_checkpoints(net, batch_size):
    engine, x, y, _ = net
    own, saved, rates = engine.model.get_weights(), checkpoints(), [0.1, 0.05, 0.2]
    expected, other = np.zeros((17, 5)), dense_net()
    for rate, weights in zip(rates, saved, strict=True):
        other.set_weights(weights)
        rows = slow_rows(other, x, y)
        expected += rate * rows @ rows[:5].T
    options = {"learning_rates": rates, "loss": LOGITS, "batch_size": batch_size}
    scores = pj.data.tracin(engine, saved, x, y, x[:5], y[:5], **options)
    np.testing.assert_allclose(scores, expected, **EXACT)
    for now, before in zip(engine.model.get_weights(), own, strict=True):
        np.testing.assert_array_equal(now, before)


def test_tracin_reads_files_and_takes_a_model(net, tmp_path):
    engine, x, y, _ = net
    saved, paths = checkpoints(2), [tmp_path / "a.weights.h5", tmp_path / "b.keras"]
    for weights, path in zip(saved, paths, strict=True):
        other = dense_net()
        other.set_weights(weights)
        (other.save_weights if path.suffix == ".h5" else other.save)(path)
    expected = pj.data.tracin(engine, saved, x, y, x[:2], y[:2], loss=LOGITS)
    model = dense_net()
    found = pj.data.tracin(model, [paths[0], str(paths[1])], x, y, x[:2], y[:2], loss=LOGITS)
    np.testing.assert_allclose(found, expected, **EXACT)


def test_the_model_keeps_its_weights_whatever_happens(net, tmp_path):
    engine, x, y, _ = net
    own, good = engine.model.get_weights(), checkpoints(1)[0]
    foreign = tmp_path / "foreign.weights.h5"
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]).save_weights(foreign)
    (tmp_path / "text.weights.h5").write_text("no weights")
    wrong = {
        "does not fit": [w[:1] for w in good],
        "There is no file": tmp_path / "missing.weights.h5",
        "foreign.weights.h5 does not hold weights": foreign,
        "text.weights.h5 does not hold weights": tmp_path / "text.weights.h5",
        "Expected each checkpoint": good[0],
    }
    for message, checkpoint in wrong.items():
        with pytest.raises((InputError, FileFormatError), match=message):
            pj.data.tracin(engine, [good, checkpoint], x, y, x, y, loss=LOGITS)
        np.testing.assert_array_equal(engine.model.get_weights()[0], own[0])
    with pytest.raises(UnknownNameError):
        pj.data.tracin(engine, [good], x, y, x, y, loss="no such loss")
    np.testing.assert_array_equal(engine.model.get_weights()[0], own[0])
    with contextlib.closing(pj.data.at_checkpoints(engine, [good])) as stages:
        np.testing.assert_array_equal(next(stages).model.get_weights()[0], good[0])
    np.testing.assert_array_equal(engine.model.get_weights()[0], own[0])


def slow_trak(models, x, y, tests, labels, ridge):
    """The formula of the docstring, step by step, without projections."""
    held, doubt = [], []
    for model in models:
        phi, wanted = (slow_rows(model, *d, of=margin_of) for d in ((x, y), (tests, labels)))
        square = phi.T @ phi
        square += ridge * np.trace(square) / len(square) * np.eye(len(square))
        held.append(phi @ np.linalg.inv(square) @ wanted.T)
        p = scipy.special.softmax(np.asarray(model(x)), axis=1)[np.arange(len(y)), y]
        doubt.append(1 - p)
    return np.mean(held, 0) * np.mean(doubt, 0)[:, None]


@pytest.mark.parametrize("batch_size", [7, 64])
def test_trak_is_its_formula(batch_size):
    models = [dense_net(seed) for seed in (1, 2)]
    (x, y), (tests, labels) = made_up(20), made_up(4, seed=5)
    expected = slow_trak(models, x, y, tests, labels, ridge=0.1)
    asked = {"dim": None, "ridge": 0.1, "batch_size": batch_size}
    scores = pj.data.trak(models, x, y, tests, labels, **asked)
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-12)
    one = pj.Engine(dense_net())
    stages = pj.data.at_checkpoints(one, [model.get_weights() for model in models])
    np.testing.assert_allclose(
        pj.data.trak(stages, x, y, tests, labels, **asked), expected, rtol=1e-9, atol=1e-12
    )


def test_trak_projects_each_model_with_its_own_seed():
    models, (x, y) = [dense_net(seed) for seed in (1, 2)], made_up(20)
    one, two = (
        pj.data.trak(model, x, y, x, y, dim=8, seed=seed, ridge=0.1)
        for model, seed in zip(models, (4, 5), strict=True)
    )
    both = pj.data.trak(models, x, y, x, y, dim=8, seed=4, ridge=0.1)
    doubt = [
        1 - scipy.special.softmax(np.asarray(m(x)), axis=1)[np.arange(20), y][:, None]
        for m in models
    ]
    expected = (one / doubt[0] + two / doubt[1]) / 2 * (doubt[0] + doubt[1]) / 2
    np.testing.assert_allclose(both, expected, rtol=1e-8, atol=1e-12)


def test_many_projections_come_near_no_projection():
    model, (x, y), (tests, labels) = dense_net(), made_up(30), made_up(8, seed=5)
    exact = pj.data.trak(model, x, y, tests, labels, dim=None, ridge=0.3)
    near = [
        np.corrcoef(
            pj.data.trak(model, x, y, tests, labels, dim=dim, ridge=0.3 * dim / 43).ravel(),
            exact.ravel(),
        )[0, 1]
        for dim in (43, 1000)
    ]
    assert near[1] > 0.95
    assert near[1] > near[0]


@pytest.mark.parametrize("form", ["probabilities", "one-hot", "column", "head"])
def test_margins_do_not_depend_on_how_a_model_says_them(form):
    (x, y), model = made_up(20), dense_net()
    expected = pj.data.trak(model, x, y, x[:3], y[:3], dim=None)
    labels, asked = y, {}
    if form == "probabilities":
        model = dense_net(activation="softmax")
    elif form == "one-hot":
        labels = np.eye(CLASSES)[y]
    elif form == "column":
        labels = y[:, None]
    else:
        (logits,) = model.outputs
        model = keras.Model(model.inputs, {"class": logits, "other": logits * 2})
        asked = {"of": "class"}
    found = pj.data.trak(model, x, labels, x[:3], labels[:3], dim=None, **asked)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_a_single_output_is_class_one_against_class_zero(activation):
    x, y = made_up(20)[0], np.random.default_rng(2).integers(0, 2, 20)
    w = np.random.default_rng(3).standard_normal((4, 1))
    one = keras.Sequential(
        [keras.Input((4,), dtype="float64"),
         keras.layers.Dense(1, activation, use_bias=False, dtype="float64")]
    )  # fmt: skip
    one.set_weights([w])
    found = pj.data.trak(
        one, x, y[:, None], x, y, dim=None, ridge=0, from_logits=activation is None
    )
    sign = 2 * y - 1
    phi = sign[:, None] * x
    expected = (
        phi @ np.linalg.solve(x.T @ x, phi.T) * scipy.special.expit(-sign * (x @ w)[:, 0])[:, None]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def linear_regression(seed=0, count=25):
    """Data, the least-squares weights, and a model that has them."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((count, 4)), rng.standard_normal((count, 1))
    model = keras.Sequential(
        [keras.Input((4,), dtype="float64"), keras.layers.Dense(1, use_bias=False, dtype="float64")]
    )
    model.set_weights([np.linalg.lstsq(x, y, rcond=None)[0]])
    return x, y, model


def test_trak_of_linear_regression_is_leaving_one_out():
    """Without n, f(x) falls by τ(x, n) / (1 - h_n), h_n the leverage (Cook 1977)."""
    x, y, model = linear_regression()
    tests = np.random.default_rng(1).standard_normal((3, 4))
    asked = {"task": "regression", "dim": None, "ridge": 0}
    scores = pj.data.trak(model, x, y, tests, np.zeros(3), **asked)
    leverage = np.einsum("np,pq,nq->n", x, np.linalg.inv(x.T @ x), x)
    before = (tests @ model.get_weights()[0])[:, 0]
    for n in range(len(x)):
        kept = np.arange(len(x)) != n
        after = (tests @ np.linalg.lstsq(x[kept], y[kept], rcond=None)[0])[:, 0]
        np.testing.assert_allclose(scores[n] / (1 - leverage[n]), before - after, **EXACT)


def test_trak_tells_what_leaving_out_half_of_the_examples_does():
    """The linear datamodelling score of logistic regression (Park et al. 2023, definition 2.3)."""
    from scipy.optimize import minimize
    from scipy.stats import spearmanr

    rng = np.random.default_rng(1)
    x, tests, true = (
        rng.standard_normal((80, 4)),
        rng.standard_normal((20, 4)),
        rng.standard_normal(4),
    )
    y = (x @ true + 1.5 * rng.standard_normal(80) > 0).astype(int)
    labels = (tests @ true > 0).astype(int)

    def fitted(kept):
        signed = x[kept] * (2 * y[kept] - 1)[:, None]
        return minimize(
            lambda w: np.logaddexp(0, -signed @ w).sum() + 0.05 * w @ w,
            np.zeros(4),
            jac=lambda w: -signed.T @ scipy.special.expit(-signed @ w) + 0.1 * w,
        ).x

    model = keras.Sequential(
        [keras.Input((4,), dtype="float64"), keras.layers.Dense(1, use_bias=False, dtype="float64")]
    )
    model.set_weights([fitted(np.arange(80))[:, None]])
    scores = pj.data.trak(model, x, y, tests, labels, dim=None, from_logits=True)
    halves = np.array([rng.permutation(80) < 40 for _ in range(60)])
    margins = np.array([tests @ fitted(half) * (2 * labels - 1) for half in halves])
    told = halves @ scores
    assert np.mean([spearmanr(told[:, t], margins[:, t])[0] for t in range(20)]) > 0.7


def blobs(count=40, wrong=(3, 17, 30), seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 2
    x = rng.standard_normal((count, 4)) + np.where(y, 2.0, -2.0)[:, None]
    y[list(wrong)] = 1 - y[list(wrong)]
    return x, y


def test_label_errors_are_judged_by_models_that_have_not_seen_them():
    x, y = blobs()
    seen = []

    def fit(given, labels):
        """Nearest class means, as a linear model: no training."""
        seen.append(given[:, 0])
        means = np.stack([given[labels == c].mean(0) for c in (0, 1)])
        model = keras.Sequential(
            [keras.Input((4,), dtype="float64"), keras.layers.Dense(2, dtype="float64")]
        )
        model.set_weights([means.T, -(means**2).sum(1) / 2])
        return model if len(seen) % 2 else pj.Engine(model)

    found = pj.data.label_errors(fit, x, y, loss=LOGITS, folds=4, seed=1, batch_size=7)
    assert sorted(found.indices[:3].tolist()) == [3, 17, 30]
    assert len(found) == 40
    assert found.outputs.shape == (40, 2)
    assert found.outputs[[3, 17, 30]].argmax(1).tolist() == (1 - y[[3, 17, 30]]).tolist()
    assert sorted(np.concatenate(seen)) == sorted(np.tile(x[:, 0], 3))
    for fold in seen.copy():
        held = ~np.isin(x[:, 0], fold)
        model = fit(x[~held], y[~held])
        engine = model if isinstance(model, pj.Engine) else pj.Engine(model)
        norms = engine.gradients(x[held], y[held], loss=LOGITS).norms()
        np.testing.assert_allclose(found.scores[held], norms, **EXACT)
        np.testing.assert_allclose(found.outputs[held], engine.outputs(x[held]), **EXACT)


def test_label_errors_by_a_trained_model(net):
    engine, x, y, rows = net
    found = pj.data.label_errors(engine, x, y, 5, loss=LOGITS, batch_size=4)
    hard = pj.data.hardest(engine, x, y, 5, loss=LOGITS)
    np.testing.assert_array_equal(found.indices, hard.indices)
    np.testing.assert_allclose(found.scores, np.linalg.norm(rows, axis=1), **EXACT)
    np.testing.assert_allclose(found.outputs, engine.outputs(x), **EXACT)
    # p - e_y is the gradient by the last bias: "EL2N".
    error = scipy.special.softmax(found.outputs, axis=1) - np.eye(CLASSES)[y]
    found = pj.data.label_errors(engine, x, y, loss=LOGITS, wrt="top/bias")
    np.testing.assert_allclose(found.scores, np.linalg.norm(error, axis=1), **EXACT)


@pytest.mark.slow
def test_changed_digits_are_found(tmp_path):
    """The example as a user runs it, smaller: four in five of the changed labels, at least."""
    picture = tmp_path / "found.png"
    asked = ["--epochs", "8", "--folds", "3", "--out", str(picture)]
    told = subprocess.run(
        [sys.executable, EXAMPLE, *asked], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    (line,) = [line for line in told.splitlines() if "(10%)" in line and "found" in line]
    by_norm, by_loss, by_chance = (float(n) for n in re.findall(r"([\d.]+)% found", line))
    assert by_norm >= 80
    assert by_loss >= 80
    assert by_chance < 30
    assert picture.stat().st_size > 20_000


FORMS = {
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "dict": lambda a, b: {"a": a, "b": b},
    "tensors": lambda a, b: [tf.constant(a), tf.constant(b)],
    "call": lambda a, b: pj.call([a, b]),
}


@pytest.mark.parametrize("form", FORMS)
def test_data_of_several_arrays_is_cut_alike(form):
    a = keras.Input((2,), name="a", dtype="float64")
    b = keras.Input((3,), name="b", dtype="float64")
    top = keras.layers.Dense(1, dtype="float64")
    model = keras.Model([a, b], top(keras.layers.Concatenate(dtype="float64")([a, b])))
    rng = np.random.default_rng(0)
    left, right, y = (rng.standard_normal((7, n)) for n in (2, 3, 1))
    residual = model.predict_on_batch([left, right]) - y
    expected = 2 * np.abs(residual[:, 0]) * np.sqrt(1 + (left**2).sum(1) + (right**2).sum(1))
    x = FORMS[form](left, right)
    found = pj.data.hardest(model, x, y, loss="mse", batch_size=3)
    np.testing.assert_allclose(found.scores, expected, **EXACT)
    found = pj.data.label_errors(lambda *_: model, x, y, loss="mse", folds=3, batch_size=3)
    np.testing.assert_allclose(found.scores, expected, **EXACT)


def test_nested_lists_of_numbers_are_one_array(net):
    engine, x, y, _ = net
    found = pj.data.hardest(engine, x.tolist(), y.tolist(), 3, loss=LOGITS, batch_size=2)
    expected = pj.data.hardest(engine, x, y, 3, loss=LOGITS).indices
    np.testing.assert_array_equal(found.indices, expected)


WRONG = {
    "by": (lambda e, x, y: pj.data.hardest(e, x, y, by="size"), "'size'"),
    "count": (lambda e, x, y: pj.data.hardest(e, x, y, count=0), "count= as an int of 1 or more"),
    "batch": (lambda e, x, y: pj.data.typical(e, x, y, batch_size=2.5), "batch_size=.*2.5"),
    "sizes": (lambda e, x, y: pj.data.hardest(e, x, y[:5]), "same number.*17.*5"),
    "none": (lambda e, x, y: pj.data.hardest(e, x[:0], y[:0]), "at least one example"),
    "number": (lambda e, x, y: pj.data.hardest(e, 3.0, y), "x as arrays of examples"),
    "train": (lambda e, x, y: pj.data.similar(e, x, y, x, y[:5]), "x_train.*17.*y_train.*5"),
    "measure": (lambda e, x, y: pj.data.similar(e, x, y, x, y, measure="l2"), "'l2'"),
    "dim": (lambda e, x, y: pj.data.similar(e, x, y, x, y, dim=0), "dim=.*0"),
    "folds": (lambda e, x, y: pj.data.label_errors(dense_net, x, y, folds=99), "from 2 to 17.*99"),
    "fit": (lambda e, x, y: pj.data.label_errors(lambda *_: None, x, y), "returns the model.*None"),
    "rates": (
        lambda e, x, y: pj.data.tracin(e, checkpoints(2), x, y, x, y, learning_rates=[0.1]),
        "each of 2 checkpoints",
    ),
    "checkpoints": (lambda e, x, y: pj.data.tracin(e, [], x, y, x, y), "at least one checkpoint"),
    "task": (lambda e, x, y: pj.data.trak(e, x, y, x, y, task="ranking"), "'ranking'"),
    "ridge": (lambda e, x, y: pj.data.trak(e, x, y, x, y, ridge=-1), "ridge=.*-1"),
    "models": (lambda e, x, y: pj.data.trak([], x, y, x, y), "at least one model"),
    "regression": (
        lambda e, x, y: pj.data.trak(e, x, y, x, y, task="regression"),
        r"one number for each.*\(B, 3\)",
    ),
    "labels": (lambda e, x, y: pj.data.trak(e, x, x, x, y), r"y_train.*one-hot.*\(17, 4\)"),
    "singular": (
        lambda e, x, y: pj.data.trak(e, 0 * x, y, x, y, dim=4, ridge=0),
        "do not span the 4 directions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(net, case):
    engine, x, y, _ = net
    ask, message = WRONG[case]
    with pytest.raises(InputError, match=f"(?s){message}"):
        ask(engine, x, y)


def test_labels_that_there_are_not_and_scores_that_are_no_numbers(net):
    engine, x, y, _ = net
    with pytest.raises(OutOfRangeError, match=r"y_test\[2\] is 7, but there are 3 classes"):
        pj.data.trak(engine, x, y, x[:3], [0, 1, 7])
    with pytest.raises(NotFiniteError, match="score of example 4 is nan"):
        pj.data.hardest(engine, x, np.arange(17.0), loss=_nothing_for_four, by="loss")


def _nothing_for_four(y, output):
    return tf.where(tf.equal(y, 4), tf.constant(np.nan, output.dtype), output[:, 0])


def test_an_error_says_from_where_examples_are_counted(net):
    engine, x, y, _ = net
    bad = x.copy()
    bad[9] = np.nan
    with pytest.raises(NotFiniteError) as caught:
        pj.data.hardest(engine, bad, y, loss=LOGITS, batch_size=8)
    assert "example 1" in str(caught.value)
    assert caught.value.__notes__ == ["Examples are counted from number 8."]


def test_batches_hold_every_example_once():
    examples = _batches.Examples.of({"a": np.arange(7)}, None)
    parts = [(where, batch) for where, batch in examples.batches(3)]
    assert [batch.size for _, batch in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([b.x["a"] for _, b in parts]), np.arange(7))
