"""Engines inside `tf.function`, `Dataset.map` and loops: right, or refused with a way out."""

from __future__ import annotations

import functools
import itertools
import warnings

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from keras import layers
from models import floats, randomise
from sampling import every

import perjac as pj
from perjac._core.backend import host
from perjac._core.model import inside_functions
from perjac.errors import ExamplesMeetError, InputError, InsideError, NotFiniteError
from perjac.saliency import METHODS

pytestmark = pytest.mark.slow  # left out of `make check`

RNG = np.random.default_rng(3)
X = RNG.normal(size=(4, 3))
Y = np.array([0, 1, 1, 0])
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def built(*inner, shape=(3,), dtype="float64"):
    with floats(dtype):
        model = keras.Sequential([keras.Input(shape), *(make() for make in inner)])
    randomise(model.weights)
    return model


def net(dtype="float64"):
    made = lambda: layers.Dense(4, "tanh"), lambda: layers.Dense(2)  # noqa: E731
    return built(*made, dtype=dtype)


def rows(model, x):
    """Return the oracle's rows of each weight, (B, K, *shape)."""
    return oracle.weight_rows(functools.partial(model, training=False), x, model.trainable_weights)


def agrees(model, x, engine=None, **options):
    """Assert that a Jacobian formed inside a tf.function is the oracle's."""
    engine = engine or pj.Engine(model)
    inside_it = tf.function(lambda t: dict(engine.jacobian(t).items()), **options)
    found = list(inside_it(tf.constant(x)).values())
    right = rows(model, x)
    found = [np.reshape(f, r.shape) for f, r in zip(found, right, strict=True)]
    oracle.assert_agree(found, right, str(np.asarray(x).dtype))


def lengths(model, x):
    return np.sqrt(sum((r.reshape(len(x), -1) ** 2).sum(1) for r in rows(model, x)))


def test_a_jacobian():
    agrees(net(), X)


@pytest.mark.parametrize(
    ("dtype", "path"),
    every(3, itertools.product(["float64", "float32"], ["auto", "tape"])),
)
def test_jacobians_of_other_models(dtype, path):
    for model, shape in (
        (net(dtype), (3,)),
        (built(lambda: layers.LSTM(3), lambda: layers.Dense(2), shape=(5, 2), dtype=dtype), (5, 2)),
        (
            built(lambda: layers.Conv2D(2, 3), layers.Flatten, shape=(5, 5, 1), dtype=dtype),
            (5, 5, 1),
        ),
        (built(lambda: layers.Conv1D(2, 2, dilation_rate=2), shape=(7, 2), dtype=dtype), (7, 2)),
    ):
        x = RNG.normal(size=(3, *shape)).astype(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            agrees(model, x, pj.Engine(model, path=path))


def test_every_query_is_what_it_is_outside():
    model = net()
    engine = pj.Engine(model)
    chosen, directions = tf.constant([0, 1, -1, 0]), tf.constant(RNG.normal(size=(4, 3, 2)))

    def asked(x, y, chosen, directions):
        jac, grads = engine.jacobian(x), engine.gradients(x, y, loss=LOSS)
        flat = tf.ones(26, tf.float64)
        return (
            jac.outputs, jac.matrix(), jac.gram(), jac.diagonal(), jac.project(5), jac.jvp(flat),
            jac.norms(per="row"), jac.vjp(tf.ones((4, 2))), jac[model.weights[0]],
            grads.losses, grads.norms(), grads.mean(), grads.variance(), grads.snr(),
            grads.clipped_sum(0.5), grads.cosine_similarity(), grads.norms(per="layer"),
            dict(engine.jacobian(x, wrt="inputs").items()),
            engine.jacobian(x, outputs=[1]).norms(),
            engine.jacobian(x, outputs=chosen).norms(),
            engine.jacobian(x, cotangents=directions).norms(),
            engine.gradients(x, y, loss=LOSS, sample_weight=x[:, 0]).norms(),
            engine.outputs(x), pj.saliency.gradient(engine, x).values,
            pj.saliency.gradient(engine, x, target=chosen).values,
        )  # fmt: skip

    data = (tf.constant(X), tf.constant(Y), chosen, directions)
    found, right = tf.function(asked)(*data), asked(*data)
    tf.nest.map_structure(lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-12), found, right)


def test_variables_are_read_when_the_function_runs():
    model = net()
    engine = pj.Engine(model)
    norms = tf.function(lambda x: engine.jacobian(x).norms())
    np.testing.assert_allclose(norms(tf.constant(X)), lengths(model, X), rtol=1e-10)
    for weight in model.weights:
        weight.assign(2 * weight + 0.1)
    np.testing.assert_allclose(norms(tf.constant(X)), lengths(model, X), rtol=1e-10)


def test_a_training_step_with_clipped_gradients():
    model = net()
    engine, start = pj.Engine(model), [w.numpy() for w in model.weights]

    def step(x, y):
        clipped = engine.gradients(x, y, loss=LOSS).clipped_sum(0.5)
        for key, variable in zip(clipped, model.trainable_weights, strict=True):
            variable.assign_sub(0.1 * clipped[key])

    ends = []
    for run in (tf.function(step), step):
        for weight, value in zip(model.weights, start, strict=True):
            weight.assign(value)
        for _ in range(3):
            run(tf.constant(X), tf.constant(Y))
        ends.append([w.numpy() for w in model.weights])
    for graph, eager in zip(*ends, strict=True):
        np.testing.assert_allclose(graph, eager, rtol=1e-10)


def test_datasets_loops_and_maps():
    model = net()
    engine, right = pj.Engine(model), lengths(model, X)
    norms = lambda x: engine.jacobian(x).norms()  # noqa: E731
    pairs = tf.data.Dataset.from_tensor_slices(X).batch(2, drop_remainder=True)
    np.testing.assert_allclose(np.concatenate(list(pairs.map(norms))), right, rtol=1e-10)
    alone = lambda x: norms(x[None])[0]  # noqa: E731
    np.testing.assert_allclose(tf.function(lambda x: tf.map_fn(alone, x))(X), right, rtol=1e-10)
    np.testing.assert_allclose(tf.vectorized_map(alone, tf.constant(X)), right, rtol=1e-10)

    @tf.function
    def total(x):
        found = tf.zeros(4, tf.float64)
        for n in tf.range(3):
            found += norms(x * tf.cast(n, tf.float64))
        return found

    wanted = sum(lengths(model, X * n) for n in range(3))
    np.testing.assert_allclose(total(tf.constant(X)), wanted, rtol=1e-10)


def test_an_unknown_batch_is_refused():
    engine = pj.Engine(net())
    with pytest.raises(InsideError, match="drop_remainder=True.*outside"):
        tf.data.Dataset.from_tensor_slices(X).batch(2).map(lambda x: engine.jacobian(x).norms())
    for asked in (engine.outputs, lambda x: pj.saliency.gradient(engine, x, target=0).values):
        function = tf.function(asked, input_signature=[tf.TensorSpec([None, 3], tf.float64)])
        with pytest.raises(InsideError, match="set_shape"):
            function(X)
    known = tf.function(
        lambda x: engine.jacobian(tf.ensure_shape(x, [4, 3])).norms(),
        input_signature=[tf.TensorSpec([None, 3], tf.float64)],
    )
    np.testing.assert_allclose(known(X), lengths(engine.model, X), rtol=1e-10)


def test_xla():
    agrees(net("float32"), X.astype("float32"), jit_compile=True)
    engine = pj.Engine(net("float32"))
    asked = lambda x: engine.gradients(x, Y, loss=LOSS).clipped_sum()  # noqa: E731
    x = tf.constant(X, tf.float32)
    found, right = tf.function(asked, jit_compile=True)(x), asked(x)
    for key in right:
        np.testing.assert_allclose(found[key], right[key], rtol=1e-5)
    model = built(lambda: layers.LSTM(3), shape=(5, 2), dtype="float32")
    agrees(model, RNG.normal(size=(3, 5, 2)).astype("float32"), jit_compile=True)


def test_what_xla_does_not_compile_is_told():
    def f(x):
        return tf.matmul(tf.numpy_function(lambda t: t, [x], tf.float32), w)

    w = tf.Variable(np.ones((3, 2), "float32"))
    engine = pj.Engine(f, variables=[w], path="tape", independence="trust")
    asked = tf.function(lambda x: engine.jacobian(x).norms(), jit_compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(pj.PerjacError):
            asked(tf.constant(X, tf.float32))


def test_results_cannot_be_differentiated_again():
    engine, x = pj.Engine(net()), tf.constant(X)

    def again(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(engine.jacobian(x).norms())
        return tape.gradient(total, x)

    for asked in (again, tf.function(again)):
        with pytest.raises(InsideError, match="differentiated again"):
            asked(x)
    both = tf.function(lambda x: (tf.reduce_sum(x**2), engine.jacobian(x).norms()))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        square, norms = both(x)
    np.testing.assert_allclose(tape.gradient(square, x), 2 * X)  # which is of no result of ours
    with pytest.raises((tf.errors.InvalidArgumentError, InsideError), match="differentiated again"):
        tape.gradient(norms, x)


def test_an_outer_tape_sees_no_derivative_of_a_stopped_result():
    engine, x = pj.Engine(net()), tf.constant(X)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            weight = tf.stop_gradient(engine.jacobian(x).norms())
            total = tf.reduce_sum(weight[:, None] * x**2)
        return tape.gradient(total, x), weight

    found, weight = step(x)
    np.testing.assert_allclose(found, 2 * X * np.asarray(weight)[:, None], rtol=1e-10)


def test_models_with_tapes_inside_are_traced_with_them():
    w = tf.Variable(RNG.normal(size=(3, 1)))

    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.tanh(tf.matmul(x, w)) ** 2
        return tape.gradient(y, x)

    engine = pj.Engine(slope, variables=[w])
    found = tf.function(lambda x: engine.jacobian(x)[w])(tf.constant(X))
    right = oracle.weight_rows(slope, X, [w])
    oracle.assert_agree([np.reshape(found, right[0].shape)], right, "float64")


def test_examples_that_meet_are_found_without_numbers():
    with floats("float64"):
        model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    engine = pj.Engine(model, training=True)
    with pytest.raises(ExamplesMeetError):
        tf.function(lambda x: engine.jacobian(x).norms())(tf.constant(X))


@pytest.mark.parametrize("what", ["verify", "inspect", "export", "fisher", "wrong"])
def test_what_needs_numbers_says_so(what, tmp_path):
    engine = pj.Engine(net())
    asked = {
        "verify": engine.verify,
        "inspect": lambda x: engine.inspect(batch_size=4),
        "export": lambda x: engine.export(tmp_path / "f", x),
        "fisher": lambda x: engine.fisher(x).dense(),
        "wrong": lambda x: engine.jacobian(x[:, 0]).norms(),
    }[what]
    error = InputError if what == "wrong" else InsideError

    def function(x):
        asked(x)
        return x

    with pytest.raises(error):
        tf.function(function)(tf.constant(X))


class Picky(layers.Layer):
    """Takes no negative numbers."""

    def call(self, x):
        with tf.control_dependencies([tf.debugging.assert_non_negative(x)]):
            return tf.identity(x)


def test_a_model_that_takes_no_made_up_examples():
    engine = pj.Engine(built(Picky, lambda: layers.Dense(2)))
    x = tf.constant(np.abs(X))
    asked = tf.function(lambda x: engine.jacobian(x).norms())
    with pytest.raises(InsideError, match="made-up examples.*once outside"):
        asked(x)
    right = engine.jacobian(x).norms()
    np.testing.assert_allclose(asked(x), right)


@pytest.mark.parametrize("name", METHODS)
def test_saliency_is_what_it_is_outside_or_refused(name):
    model = built(
        lambda: layers.Conv2D(3, 3, activation="relu"), layers.Flatten, lambda: layers.Dense(2),
        shape=(8, 8, 1), dtype="float32",
    )  # fmt: skip
    engine, x = pj.Engine(model), tf.constant(RNG.normal(size=(2, 8, 8, 1)), tf.float32)
    more = {
        "internal_influence": {"layer": model.layers[0].name},
        "layer_conductance": {"layer": model.layers[0].name},
        "expected_gradients": {"background": np.zeros((2, 8, 8, 1), "float32")},
    }.get(name, {})
    try:
        found = tf.function(lambda x: METHODS[name](engine, x, target=1, **more).values)(x)
    except InsideError:
        assert name not in ("gradient", "input_x_gradient", "gradcam", "occlusion", "lrp")
        return
    right = METHODS[name](engine, x, target=1, **more).values
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)


@pytest.fixture
def eagerly():
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def test_functions_that_run_eagerly(eagerly):
    model = net()
    engine, x = pj.Engine(model), tf.constant(X)
    np.testing.assert_allclose(engine.jacobian(x).norms(), lengths(model, X), rtol=1e-10)
    agrees(model, X)
    agrees(model, X, pj.Engine(model, path="tape"))
    with tf.GradientTape() as tape:
        tape.watch(x)
        norms = engine.jacobian(x).norms()
    np.testing.assert_allclose(norms, lengths(model, X), rtol=1e-10)
    assert engine.gradients(x, Y, loss=LOSS).clipped_sum()
    assert tf.config.functions_run_eagerly()


def test_functions_that_run_eagerly_for_whatever_else(eagerly):
    engine, x = pj.Engine(net()), tf.constant(X)
    pj.saliency.integrated_gradients(engine, x, target=1, steps=4)
    engine.fisher(x).kronecker()
    assert engine.verify(x).passed
    model = built(lambda: layers.LSTM(3), shape=(5, 2))
    agrees(model, RNG.normal(size=(3, 5, 2)))


def test_numbers_are_still_looked_at_outside():
    engine = pj.Engine(net())
    tf.function(lambda x: engine.jacobian(x).norms())(tf.constant(X))
    bad = X.copy()
    bad[1, 1] = np.nan
    with pytest.raises(NotFiniteError):
        engine.jacobian(bad).norms()
    assert not inside_functions.is_inside()
    assert not host.is_watched()
