"""What layers add to the compiled loss, against Keras on one example at a time."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from models import floats, randomise

import perjac as pj
from perjac.errors import ExamplesMeetError, InputError, PathError, SlowPathWarning

pytestmark = pytest.mark.slow  # left out of `make check`

RTOL = {"float64": 1e-10, "float32": 1e-4}


def random(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def compiled(model, *how, dtype="float64", **more):
    """Compile a model whose loss Keras computes in a type."""
    with floats(dtype):
        model.compile(*how, **more)


def wanted(model, x, y, sources, left_out=lambda: 0.0, **weights):
    """Return each example's loss and its gradients, by Keras on a batch of it alone."""

    def alone(nest, b):
        if nest is None:
            return None
        return tf.nest.map_structure(lambda t: tf.convert_to_tensor(t[b : b + 1]), nest)

    @tf.function(autograph=False)
    def value(one, labels, weight):
        output = model(one, training=False)
        loss = model.compute_loss(one, labels, output, **weight)
        return loss - tf.cast(left_out(), loss.dtype)

    losses, rows = [], []
    for b in range(len(tf.nest.flatten(x)[0])):
        with tf.GradientTape() as tape:
            loss = value(alone(x, b), alone(y, b), alone(weights, b))
        found = tape.gradient(loss, [s.value for s in sources])
        losses.append(float(loss))
        rows.append(
            [
                np.zeros(s.shape) if g is None else tf.convert_to_tensor(g).numpy()
                for g, s in zip(found, sources, strict=True)
            ]
        )
    return np.array(losses), [np.array(of_source) for of_source in zip(*rows, strict=True)]


def agrees(model, x, y=None, dtype="float64", left_out=lambda: 0.0, path="auto", **weights):
    """Assert that losses and gradients are Keras's; return the gradients."""
    with floats(dtype):
        losses, rows = wanted(model, x, y, model.trainable_variables, left_out, **weights)
        grads = pj.Engine(model, path=path).gradients(x, y, **weights)
    np.testing.assert_allclose(grads.losses, losses, rtol=RTOL[dtype])
    floor = RTOL[dtype] * max(np.abs(r).max() for r in rows)
    for variable, row in zip(model.trainable_variables, rows, strict=True):
        np.testing.assert_allclose(grads[variable], row, rtol=RTOL[dtype], atol=floor)
    return grads


class Adds(layers.Layer):
    """Adds what a function makes of its input, which it returns; alpha is a weight of its own."""

    def __init__(self, function, **options):
        super().__init__(**options)
        self.function = function
        self.alpha = self.add_weight(shape=(), initializer="ones", name="alpha")

    def call(self, x):
        self.add_loss(self.function(x))
        return x + 0 * self.alpha


class Learned(Adds):
    """Multiplies what it adds by its weight, after the examples met."""

    def call(self, x):
        self.add_loss(self.alpha * self.function(x))
        return x * self.alpha


def kl(x):
    mu, lv = ops.split(x, 2, -1)
    return ops.mean(-0.5 * ops.sum(1 + lv - mu**2 - ops.exp(lv), -1))


@tf.function
def called(x):
    return tf.reduce_mean(tf.square(x))


def balance(x):
    """Return a mixture of experts' load balance: a product of means over the batch."""
    shares = tf.nn.softmax(x)
    chosen = tf.one_hot(tf.argmax(shares, -1), x.shape[-1], dtype=x.dtype)
    return 4 * tf.reduce_sum(tf.reduce_mean(shares, 0) * tf.reduce_mean(chosen, 0))


ADDED = {
    "kl": kl,
    "mean": lambda x: tf.reduce_mean(tf.square(x)),
    "sum": lambda x: tf.reduce_sum(tf.square(x)),
    "of_each": lambda x: tf.reduce_sum(tf.abs(x), -1),
    "divided_by_the_batch": lambda x: tf.nn.l2_loss(x) / tf.cast(tf.shape(x)[0], x.dtype),
    "times_the_batch": lambda x: tf.reduce_mean(x**2) * tf.cast(tf.shape(x)[0], x.dtype),
    "folded": lambda x: tf.reduce_max(tf.reduce_mean(tf.reshape(x, [-1, 2]) ** 2, 0)),
    "product_of_means": balance,
    "not_linear": lambda x: tf.sqrt(tf.reduce_mean(tf.exp(x)) + 1),
    "transposed": lambda x: tf.reduce_mean(tf.transpose(x)[1] * tf.transpose(x)[0]),
    "gram": lambda x: tf.reduce_sum(tf.matmul(x, x, transpose_b=True)),
    "a_function": called,
    "several": lambda x: [tf.reduce_mean(x**2), tf.reduce_sum(tf.tanh(x))],
    "cast": lambda x: tf.cast(tf.reduce_mean(tf.cast(x, tf.float16) ** 2), x.dtype),
    "of_all": lambda x: tf.reduce_sum(x * tf.cast(tf.size(x), x.dtype)),
    "where": lambda x: tf.reduce_mean(tf.where(x > 0, x, 2 * x**2)),
    "means_of_rows": lambda x: tf.reduce_sum(x**2 / tf.cast(tf.shape(x)[0], x.dtype)),
    "counts": lambda x: tf.reduce_sum(tf.cast(x > 0, tf.int32)),
    "norm": lambda x: tf.norm(x),
    "first": lambda x: x[0, 1] ** 2,
}


def net(adds, dtype="float64"):
    with floats(dtype):
        i = keras.Input((5,))
        m = keras.Model(i, layers.Dense(3)(adds(layers.Dense(4, "tanh")(i))))
    randomise(m.weights)
    compiled(m, "sgd", "mse", dtype=dtype)
    return m


SOME = ("kl", "divided_by_the_batch", "product_of_means", "a_function", "means_of_rows")


@pytest.mark.parametrize(
    "name", [n if n in SOME else pytest.param(n, marks=pytest.mark.more) for n in ADDED]
)
def test_whatever_a_layer_adds(name):
    with floats("float64"):
        layer = Adds(ADDED[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        agrees(net(layer), random(4, 5), random(4, 3))


def test_a_weight_behind_the_meeting():
    with floats("float64"):
        layer = Learned(kl)
    grads = agrees(net(layer), random(4, 5), random(4, 3))
    assert np.abs(grads["alpha"]).min() > 0


def repeated(x):
    step = (lambda n, v: n < 3), (lambda n, v: (n + 1, tf.sin(v)))
    return tf.while_loop(*step, (0, tf.reduce_mean(x)))[1]


def masked(x):
    return tf.reduce_sum(tf.boolean_mask(x, x > 0))


@pytest.mark.parametrize("function", [repeated, masked])
def test_what_cannot_be_cut_is_computed_for_each_example_alone_and_says_so(function):
    with floats("float64"):
        layer = Adds(function)
    with pytest.warns(SlowPathWarning):
        agrees(net(layer), random(4, 5), random(4, 3))
    with pytest.raises(PathError, match="for each example alone"):
        pj.Engine(net(layer), path="factored").gradients(random(4, 5), random(4, 3))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("path", ["auto", "tape"])
def test_activity_regularisers_and_layers_that_add(dtype, path):
    with floats(dtype):
        i = keras.Input((5,))
        h = layers.Dense(4, activity_regularizer="l2")(i)
        m = keras.Model(i, layers.Dense(5, activity_regularizer="l1")(Adds(kl)(h)))
    randomise(m.weights)
    compiled(m, "sgd", "mse", dtype=dtype)
    x = random(4, 5).astype(dtype)
    agrees(m, x, x, dtype, path=path)


def test_activity_regularisers_of_pictures_and_sequences():
    with floats("float64"):
        i = keras.Input((6, 6, 2))
        h = layers.Conv2D(
            3, 3, dilation_rate=2, activity_regularizer=keras.regularizers.L1L2(0.1, 0.2)
        )(i)
        h = layers.Reshape((-1, 3))(h)
        m = keras.Model(i, layers.LSTM(2, activity_regularizer="l2")(h))
    randomise(m.weights)
    compiled(m, "sgd", "mae")
    agrees(m, random(3, 6, 6, 2), random(3, 2))


def test_a_layer_over_time():
    with floats("float64"):
        inside = layers.Dense(2, activity_regularizer="l2")
        m = keras.Sequential([keras.Input((4, 3)), layers.TimeDistributed(inside)])
    compiled(m, "sgd", "mse")
    agrees(m, random(2, 4, 3), random(2, 4, 2))


def test_nested_and_shared_layers():
    with floats("float64"):
        inner = keras.Sequential(
            [keras.Input((4,)), layers.Dense(4, "tanh", activity_regularizer="l2"), Adds(balance)]
        )
        i = keras.Input((4,))
        m = keras.Model(i, layers.Dense(2)(inner(inner(i))))
    randomise(m.weights)
    compiled(m, "sgd", "mse")
    agrees(m, random(4, 4), random(4, 2))


class Endpoint(layers.Layer):
    """The loss as a layer, of predictions and labels."""

    def call(self, logits, labels):
        self.add_loss(keras.losses.mean_squared_error(labels, logits))
        return logits


@pytest.mark.parametrize("compiles", [True, False])
def test_labels_as_an_input_and_no_other_loss(compiles):
    with floats("float64"):
        i, labels = keras.Input((4,)), keras.Input((3,))
        m = keras.Model([i, labels], Endpoint()(layers.Dense(3, activation="tanh")(i), labels))
        m.build([(None, 4), (None, 3)])
    randomise(m.weights)
    if compiles:
        compiled(m, "sgd")
    x = [random(5, 4), random(5, 3, seed=2)]
    with floats("float64"):
        m2 = m
        if not compiles:  # Keras itself computes a loss of compiled models alone
            m2 = keras.Model(m.inputs, m.outputs[0])
            compiled(m2, "sgd")
        losses, rows = wanted(m2, x, None, m.trainable_variables)
    grads = pj.Engine(m).gradients(x)
    np.testing.assert_allclose(grads.losses, losses, rtol=1e-10)
    np.testing.assert_allclose(grads[m.trainable_variables[0]], rows[0], rtol=1e-10)
    with pytest.raises(InputError, match="takes no y"):
        pj.Engine(m).gradients(x, random(5, 3))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(4, "tanh", activity_regularizer="l2", kernel_regularizer="l2")
        self.top = layers.Dense(2)

    def call(self, x):
        h = self.hidden(x)
        self.add_loss(0.1 * tf.reduce_mean(tf.reduce_sum(h**2, -1)))
        y = self.top(h)
        self.add_loss(tf.reduce_sum(tf.square(y)))
        self.add_loss(tf.reduce_sum(tf.square(self.top.kernel)))  # of no example
        return y


def test_subclassed_models_and_regularisers_of_weights():
    with floats("float64"):
        m = Subclassed()
        m(np.zeros((1, 3)))
    randomise(m.weights)
    compiled(m, "sgd", "mse")

    def left_out():
        regularised = m.hidden.kernel_regularizer(m.hidden.kernel)
        return regularised + tf.reduce_sum(tf.square(m.top.kernel))

    agrees(m, random(4, 3), random(4, 2), left_out=left_out)


def test_the_weights_of_outputs_and_examples_are_for_the_compiled_part():
    with floats("float64"):
        i = keras.Input((4,))
        h = layers.Dense(5, "tanh", activity_regularizer="l2")(i)
        m = keras.Model(i, [layers.Dense(3, name="a")(h), layers.Dense(2, name="b")(h)])
    randomise(m.weights)
    compiled(m, "sgd", ["mse", "mae"], loss_weights=[0.3, 2.0])
    y = [random(4, 3), random(4, 2)]
    agrees(m, random(4, 4), y)
    with floats("float64"):
        i = keras.Input((4,))
        one = keras.Model(i, layers.Dense(3, activity_regularizer="l2")(i))
    compiled(one, "sgd", "mse")
    agrees(one, random(4, 4), random(4, 3), sample_weight=np.array([1.0, 0.0, 3.0, 0.5]))


def test_a_loss_that_is_given_is_the_whole_loss():
    with floats("float64"):
        m = net(Adds(kl))
    x, y = random(4, 5), random(4, 3)
    np.testing.assert_allclose(
        pj.Engine(m).gradients(x, y, loss="mse").losses,
        tf.reduce_mean((m(x) - y) ** 2, -1),
        rtol=1e-10,
    )


def test_by_inputs_and_queries_and_sizes():
    with floats("float64"):
        m = net(Adds(kl))
    engine, x, y = pj.Engine(m), random(7, 5), random(7, 3)
    whole = engine.gradients(x, y)
    for b in range(3):
        one = engine.gradients(x[b : b + 1], y[b : b + 1])
        np.testing.assert_allclose(one.losses[0], whole.losses[b], rtol=1e-10)
        np.testing.assert_allclose(one.norms()[0], whole.norms()[b], rtol=1e-10)
    inputs = engine.gradients(x, y, wrt="inputs")
    (rows,) = [inputs[key] for key in inputs]
    t = tf.Variable(x)
    with floats("float64"), tf.GradientTape() as tape:
        total = tf.add_n([m.compute_loss(None, y[b:][:1], m(t[b : b + 1])) for b in range(7)])
    np.testing.assert_allclose(rows, tape.gradient(total, t), rtol=1e-8, atol=1e-12)


def test_examples_that_meet_before_are_refused():
    centred = Adds(lambda x: tf.reduce_mean(tf.square(x - tf.reduce_mean(x, 0))))
    with pytest.raises(ExamplesMeetError):
        pj.Engine(net(centred, "float32")).gradients(random(4, 5), random(4, 3))


def test_losses_that_cannot_be_told():
    class Own(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return tf.reduce_mean(y_pred)

    i = keras.Input((3,))
    m = Own(i, layers.Dense(2)(i))
    compiled(m, "sgd", "mse")
    with pytest.raises(InputError, match=r"compute_loss\(\) of its own"):
        pj.Engine(m).gradients(random(2, 3), random(2, 2))
    assert pj.Engine(m).gradients(random(2, 3), random(2, 2), loss="mse").shape == (2, 8)
    plain = keras.Model(i, layers.Dense(2, kernel_regularizer="l2")(i))
    with pytest.raises(InputError, match="not compiled with a loss"):
        pj.Engine(plain).gradients(random(2, 3))
