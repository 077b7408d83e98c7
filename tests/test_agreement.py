"""Every model's Jacobians against the oracle: weights, inputs, activations, on either path."""

from __future__ import annotations

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from keras import layers
from models import MODELS, floats, randomise
from sampling import but
from subjects import EVERY_MODEL, chosen, engine, expected, flat_rows, names, subject

import perjac as pj

# The zoo has it as well.
ALSO_ELSEWHERE = ("mobilenet_v2",)


def each(wanted):
    """Parametrise over models, those that take long marked as slow."""
    long = {n for n in wanted if MODELS[n].slow or n.startswith("transformer")}
    marks = {n: [pytest.mark.slow] if n in long else [] for n in wanted}
    marks |= {n: [pytest.mark.more] for n in ALSO_ELSEWHERE if n in wanted}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks[n]) for n in wanted])


every_model = each(EVERY_MODEL)


def weight_rows(name: str, dtype: str, path: str = "auto") -> list[np.ndarray]:
    jac = engine(name, dtype, path).jacobian(subject(name, dtype).x, outputs=chosen(name))
    return [flat_rows(jac, jac[v]) for v in subject(name, dtype).trainable]


@pytest.mark.parametrize("dtype", but({"float32"}, ["float64", "float32"]))
@every_model
def test_weight_jacobians_agree_with_the_oracle(name, dtype):
    found = weight_rows(name, dtype)
    oracle.assert_agree(found, expected(name), dtype, names(subject(name, dtype).trainable))


@every_model
def test_no_weight_takes_the_tape_path(name):
    x = subject(name, "float32").x
    rows = engine(name, "float32", "auto").inspect(batch_size=4, x=x).rows
    assert len(rows) == len(subject(name, "float32").trainable)
    assert {row.weight: row.reason for row in rows if row.path != "factored"} == {}


ON_THE_TAPE = [
    "seed", "lenet", "transformer", "tied_embedding", "shared_dense", "depthwise_valid",
    "conv2d_grouped", "inputs_by_name", "frozen_layer", "subclassed", "lstm", "plain_function",
]  # fmt: skip


@pytest.mark.slow
@each(ON_THE_TAPE)
@pytest.mark.filterwarnings("ignore::perjac.errors.SlowPathWarning")  # loops go one by one
def test_tape_path_agrees_with_the_oracle(name):
    found = weight_rows(name, "float64", path="tape")
    oracle.assert_agree(found, expected(name), "float64")


@each(["mlp", "cnn", "transformer_per_token", "lstm"])
def test_tape_path_says_so_for_every_weight(name):
    rows = engine(name, "float64", "tape").inspect().rows
    assert {row.path for row in rows} == {"tape"}


@each(["seed", "cnn", "batch_normalization", "dense_on_sequences", "subclassed"])
def test_input_jacobian_agrees_with_batch_jacobian(name):
    built, outputs = subject(name, "float64"), chosen(name)
    x = tf.constant(built.x)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = tf.reshape(built.call(x), (len(x), -1))
        y = y if outputs is None else tf.gather(y, outputs, axis=1)
    right = tape.batch_jacobian(y, x, experimental_use_pfor=False).numpy()
    jac = engine(name, "float64", "auto").jacobian(built.x, wrt="inputs", outputs=outputs)
    assert len(jac) == 1
    oracle.assert_agree([flat_rows(jac, jac["inputs"])], [right], "float64")


@each(["shared_dense", "inputs_in_a_list"])
def test_jacobians_of_several_inputs_agree_with_the_oracle(name):
    built = subject(name, "float64")
    jac = engine(name, "float64", "auto").jacobian(built.x, wrt="inputs")
    found = [flat_rows(jac, rows) for rows in jac.values()]
    oracle.assert_agree(found, oracle.input_rows(built.call, built.x), "float64")


def test_one_input_of_several_is_asked_for_by_name():
    built = subject("inputs_by_name", "float64")
    jac = engine("inputs_by_name", "float64", "auto").jacobian(built.x, wrt="image")
    oracle.assert_agree([jac["image"]], oracle.input_rows(built.call, built.x), "float64")


def tapped(model: keras.Model, name: str):
    """Return a function of a batch that gives the model's output and a hidden layer's."""
    both = keras.Model(model.inputs, [model.outputs[0], model.get_layer(name).output])

    def call(x):
        output, hidden = both(x, training=False)
        return output, [hidden]

    return call


HIDDEN = [  # model, the class of a hidden layer in it
    ("cnn", layers.MaxPooling2D),
    ("transformer", layers.Embedding),
    ("transformer_per_token", layers.LayerNormalization),
    ("batch_normalization", layers.BatchNormalization),
]


def hidden_layer(model: keras.Model, kind: type) -> str:
    return next(layer.name for layer in model.layers if isinstance(layer, kind))


@pytest.mark.parametrize(("name", "kind"), HIDDEN)
def test_activation_jacobian_agrees_with_the_oracle(name, kind):
    built, outputs = subject(name, "float64"), chosen(name)
    layer = hidden_layer(built.target, kind)
    right = oracle.hidden_rows(tapped(built.target, layer), built.x, outputs)
    jac = engine(name, "float64", "auto").jacobian(
        built.x, wrt=pj.activation(layer), outputs=outputs
    )
    oracle.assert_agree([flat_rows(jac, jac[layer])], right, "float64")


@pytest.mark.parametrize(("name", "kind"), HIDDEN[2:])
def test_jacobian_of_a_hidden_layer_agrees_with_the_oracle(name, kind):
    built = subject(name, "float64")
    layer = hidden_layer(built.target, kind)
    hidden = keras.Model(built.target.inputs, built.target.get_layer(layer).output)
    outputs = [0, 1, 5]
    right = oracle.weight_rows(hidden, built.x, hidden.trainable_variables, outputs)
    jac = engine(name, "float64", "auto").jacobian(
        built.x, of=layer, wrt=hidden.trainable_variables, outputs=outputs
    )
    oracle.assert_agree([jac[v] for v in hidden.trainable_variables], right, "float64")


def test_several_things_at_once_are_the_same_as_one_by_one():
    built, made = subject("cnn", "float64"), engine("cnn", "float64", "auto")
    first, pool = built.target.layers[0], hidden_layer(built.target, layers.MaxPooling2D)
    asked = [first, "inputs", pj.activation(pool), built.trainable[-1]]
    together = made.jacobian(built.x, wrt=asked, outputs=[3, 7])
    assert len(together) == 5  # a kernel, a bias, the input, an activation, a bias
    for one in asked:
        for key, rows in made.jacobian(built.x, wrt=one, outputs=[3, 7]).items():
            np.testing.assert_allclose(together[key], rows, rtol=1e-12, atol=1e-12)


def two_heads() -> keras.Model:
    with floats("float64"):
        x = keras.Input((4,))
        hidden = layers.Dense(5, activation="tanh", name="hidden")(x)
        left = layers.Dense(2, name="left")(hidden)
        right = layers.Dense(3, name="right")(left * 2)
        model = keras.Model(x, [left, right])
    randomise(model.weights)
    return model


@pytest.mark.parametrize(("of", "number"), [("left", 0), ("right", 1), (0, 0), (1, 1)])
def test_each_head_agrees_with_the_oracle(of, number):
    model, x = two_heads(), np.random.default_rng(3).standard_normal((3, 4))
    hidden = model.get_layer("hidden").trainable_variables
    right = oracle.weight_rows(lambda one: model(one)[number], x, hidden)
    jac = pj.Engine(model).jacobian(x, of=of, wrt="hidden")
    oracle.assert_agree([jac[v] for v in hidden], right, "float64")


ALONE = ["cnn", "transformer", "tied_embedding", "batch_normalization", "time_major", "lstm"]


@each([*ALONE, "shared_dense", "class_token"])
def test_an_example_alone_is_the_same_as_among_others(name):
    built, made = subject(name, "float64"), engine(name, "float64", "auto")
    among = made.jacobian(built.x, outputs=chosen(name)).matrix()
    for b in range(3):
        one = tf.nest.map_structure(lambda t, b=b: t[b : b + 1], built.x)
        alone = made.jacobian(one, outputs=chosen(name)).matrix()
        np.testing.assert_allclose(alone[0], among[b], rtol=1e-10, atol=1e-12)


@each([*ALONE, "inputs_by_name"])
def test_an_empty_batch_has_an_empty_jacobian(name):
    built, made = subject(name, "float64"), engine(name, "float64", "auto")
    nobody = tf.nest.map_structure(lambda t: t[:0], built.x)
    jac = made.jacobian(nobody)
    size = sum(int(np.prod(v.shape)) for v in built.trainable)
    assert jac.shape == (0, int(np.prod(jac.row_shape)), size)
    assert jac.matrix().shape == jac.shape
    first = built.trainable[0]
    assert jac[first].shape == (0, *jac.row_shape, *first.shape)
    assert jac.norms().shape == (0,)


@pytest.mark.slow
@each(["lenet", "tied_embedding", "shared_dense", "lstm", "plain_function", "conv2d_transpose"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_verify_passes(name, dtype):
    report = engine(name, dtype, "auto").verify(subject(name, dtype).x)
    assert report.passed, str(report)
    assert len(report.errors) == len(subject(name, dtype).trainable)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["transformer", pytest.param("mobilenet_v2", marks=pytest.mark.more)]
)
def test_verify_passes_for_large_models(name):
    report = engine(name, "float32", "auto").verify(subject(name, "float32").x[:1])
    assert report.passed, str(report)


class Doubling(layers.Layer):
    """The identity, whose gradient doubles on purpose."""

    def call(self, x):
        @tf.custom_gradient
        def doubled(x):
            return x, lambda upstream: 2 * upstream

        return doubled(x)


def test_custom_gradients_are_those_of_the_tape():
    with floats("float64"):
        model = keras.Sequential([keras.Input((3,)), layers.Dense(4), Doubling(), layers.Dense(2)])
    randomise(model.weights)
    x = np.random.default_rng(0).standard_normal((2, 3))
    right = oracle.weight_rows(model, x, model.trainable_variables)
    jac = pj.Engine(model).jacobian(x)
    oracle.assert_agree([jac[v] for v in model.trainable_variables], right, "float64")
