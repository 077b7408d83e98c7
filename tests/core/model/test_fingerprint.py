"""An engine notices that its model has changed, and does not trace an unchanged one again."""

from __future__ import annotations

import timeit

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf

import perjac as pj
from perjac._core.model.fingerprint import Fingerprint
from perjac._core.runtime import session

L = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)).astype("float32")


class Scaled(L.Layer):
    """A layer that has what users' layers have: a number, a list of layers, a dict of them."""

    def __init__(self):
        super().__init__()
        self._scale, self.blocks = 2.0, [L.Dense(4, "tanh")]
        self.named = {"first": [L.Dense(4)]}

    def build(self, shape):
        for layer in [*self.blocks, *self.named["first"]]:
            layer.build(shape)
        self.w = self.add_weight(shape=(4,))

    def call(self, x):
        for layer in [*self.blocks, *self.named["first"]]:
            x = layer(x)
        return self._scale * x * self.w


class Subclassed(keras.Model):
    """A model by subclassing."""

    def __init__(self):
        super().__init__()
        self.inner, self.deep = L.Dense(4, "tanh"), True

    def call(self, x):
        x = self.inner(x)
        return keras.ops.tanh(x) if self.deep else x


class Module(tf.Module):
    """A plain module with another inside."""

    def __init__(self, inside=None):
        super().__init__()
        self.w = tf.Variable(tf.constant(RNG.normal(size=(4, 4)), tf.float32))
        self.activation, self.inside = tf.tanh, inside

    def __call__(self, x):
        y = self.activation(x @ self.w)
        return y if self.inside is None else self.inside(y)


def sequential():
    return keras.Sequential(
        [keras.Input((4,)), L.Dense(6, "tanh", name="a"), L.Dropout(0.5), L.Dense(2, name="b")]
    )


def functional():
    i = keras.Input((4,))
    norm = L.Normalization(name="norm")
    norm.adapt(X)
    return keras.Model(i, L.Dense(2, "tanh", name="b")(norm(i)))


def custom():
    return keras.Sequential([keras.Input((4,)), Scaled(), L.Dense(2)])


def built(model):
    model(X)
    return model


def activation(model):
    model.get_layer("a").activation = keras.activations.relu


def lora(model):
    model.get_layer("a").enable_lora(2)
    for weight in model.get_layer("a").trainable_variables:
        weight.assign(RNG.normal(size=weight.shape))


def frozen(model):
    model.get_layer("a").trainable = False


def frozen_variable(model):
    model.get_layer("b").kernel.trainable = False


def adapt(model):
    model.get_layer("norm").adapt(10 * X + 3)


def quantized(model):
    model.get_layer("b").quantize("int8")


def policy(model):
    model.get_layer("a").dtype_policy = "mixed_float16"


def without_bias(model):
    model.get_layer("b").use_bias = False


def scale(model):
    model.layers[0]._scale = 3.0


def appended(model):
    model.layers[0]._tracker.unlock()
    model.layers[0].blocks.append(built(L.Dense(4, "relu")))


def replaced_in_a_dict(model):
    model.layers[0]._tracker.unlock()
    model.layers[0].named["first"] = [built(L.Dense(4, "relu"))]


def new_variable(module):
    module.w = tf.Variable(tf.constant(RNG.normal(size=(4, 4)), tf.float32))


def nested_activation(module):
    module.inside.activation = tf.nn.relu


def flag(model):
    model.deep = False


def layer_of_a_model(model):
    model._tracker.unlock()
    model.inner = built(L.Dense(4, "relu"))


CHANGES = [
    (sequential, activation), (sequential, lora), (sequential, frozen),
    (sequential, frozen_variable), (sequential, quantized), (sequential, policy),
    (sequential, without_bias), (sequential, lambda m: m.add(L.Dense(3, name="c"))),
    (sequential, lambda m: m.pop()), (functional, adapt), (custom, scale), (custom, appended),
    (custom, replaced_in_a_dict), (lambda: built(Subclassed()), flag),
    (lambda: built(Subclassed()), layer_of_a_model), (Module, new_variable),
    (lambda: Module(Module()), nested_activation),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The output:perjac.errors.DisconnectedWarning")
@pytest.mark.parametrize(("make", "change"), CHANGES, ids=lambda f: f.__name__)
def test_a_change_is_noticed(make, change):
    model = make()
    engine = pj.Engine(model, certify="never")
    before = engine.jacobian(X)
    change(model)
    jac = engine.jacobian(X)
    weights = [v for v in model.trainable_variables if v.dtype in ("float32", tf.float32)]
    assert len(jac.keys()) == len(model.trainable_variables)
    np.testing.assert_allclose(engine.outputs(X), model(X), rtol=1e-3, atol=1e-3)
    right = oracle.weight_rows(model, X, weights)
    if change is policy:
        for weight, rows in zip(weights, right, strict=True):
            np.testing.assert_allclose(jac[weight], rows, rtol=0.02, atol=0.02)
    else:
        oracle.assert_agree([jac[v] for v in weights], right, "float32")
    for key in before:  # what was answered before stays as it was
        assert before[key].shape[0] == len(X)


def test_gradients_notice_too():
    model = sequential()
    model.compile("sgd", "mse")
    engine, y = pj.Engine(model, certify="never"), RNG.normal(size=(3, 2)).astype("float32")
    engine.gradients(X, y)
    model.pop()
    model.add(L.Dense(2, "sigmoid"))
    found = engine.gradients(X, y)
    loss = lambda y, p: tf.reduce_mean((y - p) ** 2)  # noqa: E731
    losses, right = oracle.loss_rows(model, loss, X, y, model.trainable_variables)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    oracle.assert_agree([found[v] for v in model.trainable_variables], right, "float32")
    engine.fisher(X, likelihood="gaussian").diagonal()


GLOBAL = L.Dense(2, "tanh")


@pytest.mark.parametrize("place", ["closure", "global", "method"])
def test_a_layer_that_a_function_mentions_is_watched(place):
    layer = GLOBAL if place == "global" else L.Dense(2, "tanh")
    layer.build((None, 4))
    functions = {
        "closure": lambda x: 2 * layer(x),
        "global": lambda x: 2 * GLOBAL(x),
        "method": layer.__call__,
    }
    function = functions[place]
    engine = pj.Engine(function, variables=layer.trainable_variables, certify="never")
    engine.jacobian(X)
    layer.activation = keras.activations.relu
    np.testing.assert_allclose(engine.outputs(X), function(X), rtol=1e-6)


@pytest.fixture
def traced(monkeypatch):
    """Count traces."""
    count, right = [], session.tracing.trace
    monkeypatch.setattr(session.tracing, "trace", lambda *a: count.append(1) or right(*a))
    return count


@pytest.mark.parametrize("make", [sequential, functional, custom, lambda: built(Subclassed())])
def test_an_unchanged_model_is_traced_once(make, traced, tmp_path):
    model = make()
    engine = pj.Engine(model, certify="always")
    y = np.zeros((3, model(X).shape[-1]), "float32")

    def saved():
        model.save(tmp_path / "model.keras")

    def loaded():
        model.save_weights(tmp_path / "w.weights.h5")
        model.load_weights(tmp_path / "w.weights.h5")

    between = [
        lambda: model(X, training=True), lambda: model.predict(X, verbose=0),
        lambda: model.compile("adam", "mse", metrics=["mae"]),
        lambda: model.fit(X, y, verbose=0), lambda: model.fit(X, y, verbose=0),
        lambda: model.evaluate(X, y, verbose=0), lambda: model.train_on_batch(X, y), loaded,
        lambda: model.set_weights(model.get_weights()), model.count_params, model.summary,
        lambda: tf.function(model)(X), lambda: pj.Engine(model).jacobian(X),
    ]  # fmt: skip
    if make is not custom:
        between.append(saved)
    if make in (sequential, functional):
        between += [lambda: keras.Model(model.inputs, model.layers[0].output), model.get_config]
    engine.jacobian(X)
    for step in between:
        step()
        before = len(traced)
        engine.jacobian(X)
        assert len(traced) == before, step
    assert len(engine._traces._made) == 1


def test_an_unchanged_module_is_traced_once(traced, tmp_path):
    module = Module(Module())
    engine = pj.Engine(module)
    engine.jacobian(X)
    tf.train.Checkpoint(module=module).save(tmp_path / "checkpoint")
    tf.saved_model.save(module, tmp_path / "saved")
    module.w.assign(2 * module.w)
    assert module.trainable_variables
    engine.jacobian(X)
    assert len(traced) == 1


def test_a_layer_that_counts_its_calls_is_traced_once(traced):
    class Counting(L.Layer):
        calls = 0

        def __init__(self):
            super().__init__()
            self.shapes = []

        def call(self, x):
            self.calls += 1
            self.shapes.append(x.shape)
            return 2 * x

    model = keras.Sequential([keras.Input((4,)), Counting(), L.Dense(2)])
    engine = pj.Engine(model, certify="always")
    for _ in range(3):
        engine.jacobian(X)
        model(X)
    assert len(traced) == 1


def test_what_has_changed_is_named():
    model = sequential()
    fingerprint = Fingerprint(model)
    assert fingerprint.changed() == ""
    model.get_layer("a").activation = keras.activations.relu
    assert fingerprint.changed() == "'activation' of Dense 'a'"
    assert fingerprint.renew() == 1 == fingerprint.renew()
    model.get_layer("a").units = 6 + 0  # the same
    model.get_layer("b").kernel.trainable = False
    assert "trainable" in fingerprint.changed()


def test_looking_is_quick():
    fingerprint = Fingerprint(keras.Sequential([keras.Input((4,)), L.Dense(2)]))
    best = min(timeit.repeat(fingerprint.renew, number=1000, repeat=9)) / 1000
    assert best < 20e-6, f"{1e6 * best:.1f} µs"
