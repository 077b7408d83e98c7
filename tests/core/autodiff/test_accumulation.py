"""Rows, columns, folded rows and narrow places: every way gives the oracle's Jacobian."""

from __future__ import annotations

import functools
import math

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from keras import layers
from models import floats, randomise
from oracle import assert_agree

import perjac as pj
from perjac._core.autodiff import seeds
from perjac._core.autodiff.batched import ENTRY_BY_ENTRY, RULES
from perjac._core.autodiff.bottleneck import TWICE

pytestmark = pytest.mark.slow  # left out of `make check`

BATCH = 3
RNG = np.random.default_rng(0)


def numbers(*shape: int) -> tf.Tensor:
    return tf.constant(np.random.default_rng(math.prod(shape)).uniform(0.2, 0.9, shape))


def way(engine: pj.Engine, x) -> tuple[str, bool, bool]:
    """Return (cut, by columns, folded above) of the last way that was chosen."""
    jobs = engine._traces.of(engine._traces.prepare(x))[0]._jobs
    route = list(jobs._by_route.values())[-1]._route
    return route.cut, route.columns, route.upper.passage is not None


def check_inputs(call, x, **options) -> pj.Engine:
    """Compare the rows of every input with the oracle's."""
    engine = pj.Engine(call, **options)
    jac = engine.jacobian(x, wrt="inputs")
    expected = oracle.input_rows(call, x)
    found = [np.reshape(jac[key], rows.shape) for key, rows in zip(jac, expected, strict=True)]
    assert_agree(found, expected, "float64")
    return engine


def made(given, *stack) -> keras.Model:
    """Return a float64 model of layers, which are made by functions."""
    with floats("float64"):
        inputs = keras.Input(given) if isinstance(given, tuple) else given()
        out = inputs
        for make in stack:
            out = make()(out)
        model = keras.Model(inputs, out)
    randomise(model.weights)
    return model


def dense(units: int, activation=None):
    return lambda: layers.Dense(units, activation=activation)


# By operation: x (B, 2, 3), between 0.2 and 0.9, to something else, through that one.
STEPS = {
    "Add": lambda x: tf.raw_ops.Add(x=x, y=numbers(3)),
    "AddV2": lambda x: x + numbers(2, 3),
    "BiasAdd": lambda x: tf.nn.bias_add(x, numbers(3)),
    "Identity": tf.identity,
    "Sub": lambda x: numbers(3) - x,
    "Neg": tf.negative,
    "Mul": lambda x: x * numbers(1, 2, 3) * tf.sin(x),
    "RealDiv": lambda x: x / numbers(3),
    "Reshape": lambda x: tf.reshape(x, [-1, 6]),
    "Squeeze": lambda x: tf.squeeze(tf.reshape(x, [-1, 1, 6]), 1),
    "ExpandDims": lambda x: tf.expand_dims(x, 2),
    "MatMul": lambda x: tf.matmul(tf.reshape(x, [-1, 3]), numbers(4, 3), transpose_b=True),
    "Softmax": tf.nn.softmax,
    "LogSoftmax": tf.nn.log_softmax,
    "AvgPool": lambda x: tf.nn.avg_pool2d(x[..., None], (1, 2), 1, "VALID"),
    "BatchMatMulV2": lambda x: tf.matmul(x, tf.sin(x), transpose_b=True),
    "ConcatV2": lambda x: tf.concat([x, tf.square(x)], 1),
    "Conv2D": lambda x: tf.nn.conv2d(x[..., None], numbers(2, 2, 1, 3), 1, "SAME"),
    "Conv2DBackpropInput": lambda x: tf.nn.conv2d_transpose(
        x[:, :, None], numbers(2, 2, 4, 3), [tf.shape(x)[0], 4, 2, 4], 2, "SAME"
    ),
    "DepthwiseConv2dNative": lambda x: tf.nn.depthwise_conv2d(
        x[:, :, None], numbers(2, 1, 3, 2), (1, 1, 1, 1), "SAME"
    ),
    "Einsum": lambda x: tf.einsum("bij,bkj->bik", x, tf.exp(x)),
    "Maximum": lambda x: tf.maximum(x, numbers(2, 3)),
    "Minimum": lambda x: tf.minimum(x, tf.square(x) + 0.2),
    "Mean": lambda x: tf.reduce_mean(x, 1),
    "Sum": lambda x: tf.reduce_sum(x, 2, keepdims=True),
    "Pack": lambda x: tf.stack([x, tf.sqrt(x)], 1),
    "Pad": lambda x: tf.pad(x, [[0, 0], [1, 0], [0, 2]]),
    "SquaredDifference": lambda x: tf.math.squared_difference(x, numbers(3)),
    "StridedSlice": lambda x: x[:, ::-1, 1:],
    "Transpose": lambda x: tf.transpose(x, [0, 2, 1]),
    **{name: lambda x, name=name: unary(name, x) for name in ENTRY_BY_ENTRY},
}


def unary(name: str, x: tf.Tensor) -> tf.Tensor:
    argument = {"LeakyRelu": "features", "Softplus": "features", "Softsign": "features"}
    argument |= dict.fromkeys(("Elu", "Relu", "Relu6", "Selu"), "features")
    # Both sides of a rectifier's bend; the inverse hyperbolic cosine begins at 1.
    shifts = dict.fromkeys(("Abs", "Elu", "LeakyRelu", "Relu", "Relu6", "Selu"), -0.5)
    x += {"Acosh": 1.0, **shifts}.get(name, 0.0)
    return getattr(tf.raw_ops, name)(**{argument.get(name, "x"): x})


def mixed(name: str, outputs: int, turned: bool):
    """Return a function of (B, 2, 3) to so many outputs, through an operation."""
    entries = int(tf.size(STEPS[name](numbers(BATCH, 2, 3)))) // BATCH
    weights = tf.sin(numbers(entries, outputs) * 9)

    def call(x):
        y = tf.matmul(tf.reshape(STEPS[name](x), [-1, entries]), weights)
        # Transpositions do not fold: TensorFlow's own gradients are asked then.
        return tf.transpose(tf.reshape(y, [-1, outputs // 2, 2]), [0, 2, 1]) if turned else y

    return call


# These are many and alike: they are added up, and one derivative is of all.
ALL_ENTRY_BY_ENTRY = "entry by entry"
ALIKE = sorted(TWICE & {*ENTRY_BY_ENTRY})
STEPS[ALL_ENTRY_BY_ENTRY] = lambda x: functools.reduce(
    tf.add, [STEPS[name](x) * tf.sin(numbers(n + 1, 2, 3)[n]) for n, name in enumerate(ALIKE)]
)
OTHERS = {*STEPS} - {*ENTRY_BY_ENTRY}


def test_every_operation_has_its_case():
    assert STEPS.keys() - {ALL_ENTRY_BY_ENTRY} == TWICE | RULES.keys()


@pytest.mark.parametrize("name", sorted(OTHERS & {*TWICE, ALL_ENTRY_BY_ENTRY}))
def test_columns_by_the_gradients_gradient(name):
    engine = check_inputs(mixed(name, 20, True), numbers(BATCH, 2, 3), variables=[])
    assert way(engine, numbers(BATCH, 2, 3))[1:] == (True, False)


@pytest.mark.parametrize("outputs", [2, 20])
@pytest.mark.parametrize("name", sorted(OTHERS & {*RULES, ALL_ENTRY_BY_ENTRY} | {"Softsign"}))
def test_rows_and_columns_fold(name, outputs):
    engine = check_inputs(mixed(name, outputs, False), numbers(BATCH, 2, 3), variables=[])
    assert way(engine, numbers(BATCH, 2, 3))[1:] == (outputs == 20, True)


def test_what_meets_itself_and_what_has_no_derivative_fold():
    def call(x):
        z = x * tf.matmul(x, numbers(3, 3)) - x
        z += tf.stop_gradient(z) * tf.cast(x > 0.5, x.dtype)
        return tf.matmul(z / (x + z), numbers(3, 2))

    check_inputs(call, numbers(BATCH, 3), variables=[])


def decoder():
    return made(
        (2,), dense(12, "relu"), lambda: layers.Reshape((2, 2, 3)),
        lambda: layers.Conv2DTranspose(2, 3, strides=2, activation="tanh"),
    )  # fmt: skip


def attention():
    def build(x):
        return layers.MultiHeadAttention(2, 3)(x, x)

    with floats("float64"):
        given = keras.Input((2, 2))
        x = layers.Dense(6)(given)
        model = keras.Model(given, layers.Dense(9)(layers.LayerNormalization()(x + build(x))))
    randomise(model.weights)
    return model


def pooled():
    return made(
        (2, 2, 1), lambda: layers.Conv2D(3, 2, padding="same"), lambda: layers.MaxPooling2D(2),
        layers.Flatten, dense(9, "silu"),
    )  # fmt: skip


def recurrent():
    return made((2, 2), lambda: layers.LSTM(3), dense(11))


def bottleneck():
    return made(
        (5, 4), lambda: layers.Conv1D(6, 2, activation="tanh"), lambda: layers.MaxPooling1D(2),
        layers.Flatten, dense(2, "tanh"), dense(7, "relu"), dense(13, "softmax"),
    )  # fmt: skip


def perceptron():
    return made((9,), dense(7, "relu"), dense(6, "gelu"), dense(3, "softmax"))


def widening():
    return made((2,), dense(7, "tanh"), dense(11))


def skipping():
    """Two numbers that most work lies below, and a way around them."""
    with floats("float64"):
        given = keras.Input((6,))
        z = layers.Dense(30, "tanh")(layers.Dense(30, "tanh")(given))
        z = layers.Dense(2, "tanh")(z)
        model = keras.Model(given, layers.Dense(20)(z) + layers.Dense(20)(given))
    randomise(model.weights)
    return model


def narrow():
    return made((1,), dense(4, "sigmoid"), dense(2))


def square():
    return made((3,), dense(4, "elu"), dense(3))


# By model: whether its inputs' rows are made of columns; and whether they fold.
WAYS = {
    decoder: (True, False),
    attention: (True, False),
    pooled: (False, False),
    recurrent: (True, True),  # across the last state, three numbers
    bottleneck: (True, True),
    perceptron: (False, True),
    widening: (True, True),
    skipping: (True, True),
    narrow: (True, True),
    square: (False, True),
}


def batch_for(model, size: int = BATCH) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((size, *model.inputs[0].shape[1:]))


@pytest.mark.parametrize("build", WAYS, ids=lambda build: build.__name__)
def test_inputs_rows(build):
    model = build()
    engine = check_inputs(model, batch_for(model))
    assert way(engine, batch_for(model))[1:] == WAYS[build]


@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("build", [bottleneck, perceptron, widening, decoder])
def test_any_batch(build, size):
    model = build()
    engine, x = pj.Engine(model), batch_for(model)
    every = engine.jacobian(x, wrt="inputs")["inputs"]
    some = engine.jacobian(x[:size], wrt="inputs")["inputs"]
    np.testing.assert_allclose(some, every[:size], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("build", [bottleneck, perceptron, widening, decoder])
def test_rows_asked_for(build):
    model = build()
    engine, x = pj.Engine(model), batch_for(model)
    count = int(tf.size(model(x[:1])))
    every = np.asarray(engine.jacobian(x, wrt="inputs")["inputs"])
    every = every.reshape(BATCH, count, *x.shape[1:])
    chosen = list(range(count))[::-1] + [0]
    each = np.arange(BATCH) % count
    u = np.random.default_rng(2).standard_normal((BATCH, count + 2, *model.output_shape[1:]))
    flat = u.reshape(BATCH, count + 2, count)
    for asked, expected in (
        ({"outputs": chosen}, every[:, chosen]),
        ({"outputs": 1}, every[:, [1]]),
        ({"outputs": each}, every[np.arange(BATCH), each][:, None]),
        ({"cotangents": u}, np.einsum("bkc,bc...->bk...", flat, every)),
    ):
        found = engine.jacobian(x, wrt="inputs", **asked)["inputs"]
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("build", [bottleneck, perceptron, widening])
def test_weights_and_inputs_together(build):
    model = build()
    x = batch_for(model)
    jac = pj.Engine(model).jacobian(x, wrt=["inputs", "weights"])
    expected = oracle.input_rows(model, x) + oracle.weight_rows(model, x, model.trainable_weights)
    assert_agree([jac[key] for key in jac], expected, "float64", names=list(jac))


def test_activations():
    model = bottleneck()
    layer = model.layers[4]
    inner = keras.Model(model.inputs, [layer.output, model.output])

    def call(one):
        hidden = inner(one)[0]
        rest = hidden
        for later in model.layers[5:]:
            rest = later(rest)
        return rest, [hidden]

    x = batch_for(model)
    source = pj.activation(layer.name)
    found = pj.Engine(model).jacobian(x, wrt=source)
    assert_agree([found[key] for key in found], oracle.hidden_rows(call, x), "float64")


def test_embedded_tokens():
    model = made(
        lambda: keras.Input((2,), dtype="int32"), lambda: layers.Embedding(5, 2, name="table"),
        layers.Flatten, dense(9, "tanh"), dense(8),
    )  # fmt: skip
    table, *rest = model.layers[1:]

    def call(one):
        hidden = out = table(one)
        for layer in rest:
            out = layer(out)
        return out, [hidden]

    ids = np.array([[0, 4], [3, 3], [1, 2]], "int32")
    engine = pj.Engine(model)
    found = engine.jacobian(ids, wrt=pj.activation("table"))
    assert_agree([found[key] for key in found], oracle.hidden_rows(call, ids), "float64")
    assert way(engine, ids)[1:] == (True, True)


def test_one_of_two_inputs():
    with floats("float64"):
        a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
        hidden = layers.Dense(5, activation="tanh")(layers.Concatenate()([a, b]))
        model = keras.Model([a, b], layers.Dense(7)(hidden))
    randomise(model.weights)
    x = [RNG.standard_normal((BATCH, 2)), RNG.standard_normal((BATCH, 3))]
    engine = pj.Engine(model)
    expected = oracle.input_rows(model, x)
    for key, rows in zip(engine.jacobian(x, wrt="inputs"), expected, strict=True):
        assert_agree([engine.jacobian(x, wrt=key)[key]], [rows], "float64")


@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "cotangents", "each", "chosen"])
def test_all_rows_at_once_are_the_single_ones(kind):
    output = tf.constant(RNG.standard_normal((BATCH, 2, 10)))
    count = {"each": 1, "categorical": 18, "bernoulli": 20}.get(kind, 4)
    payload = {
        "each": tf.constant([0, 19, 7]),
        "cotangents": tf.constant(RNG.standard_normal((BATCH, count, 2, 10))),
        "chosen": tf.constant([4, 0, 19, 4]),
    }.get(kind, tf.range(count))
    single = tf.stack([seeds.row(kind, payload, k, output) for k in range(count)], 1)
    together = tf.broadcast_to(seeds.rows(kind, payload, count, output), single.shape)
    np.testing.assert_allclose(together, single, rtol=1e-12, atol=1e-14)
    columns = tf.constant(RNG.standard_normal((BATCH, 5, 2, 10)))
    found = seeds.project(kind, payload, count, columns, output)
    expected = tf.einsum("bkij,bdij->bkd", single, columns)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@hypothesis.settings(max_examples=5)
@hypothesis.given(
    st.lists(st.integers(1, 6), min_size=2, max_size=5),
    st.sampled_from(["relu", "softsign", "softmax", "linear"]),
    st.booleans(),
)
def test_dense_chains_of_any_widths(widths, activation, positions):
    first, *rest = widths
    model = made((2, first) if positions else (first,), *(dense(n, activation) for n in rest))
    check_inputs(model, batch_for(model))
