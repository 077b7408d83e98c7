"""Every error: its two types, the value it quotes, the place it names, and what to do instead."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import perjac as pj
from perjac import errors


def net(name: str = "net") -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, activation="tanh", name="first"),
            layers.Dense(3, name="second"),
        ],
        name=name,
    )


def words() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(9, 4, name="embedding"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3),
        ]
    )


def two_heads() -> keras.Model:
    x = keras.Input((4,))
    hidden = layers.Dense(5, name="hidden")(x)
    heads = [layers.Dense(2, name="cats")(hidden), layers.Dense(3, name="dogs")(hidden)]
    return keras.Model(x, heads)


def data(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape or (3, 4)).astype("float32")


def expect(error: type[Exception], builtin: type[Exception], *quoted: str):
    """Expect a PerjacError of this kind that is also the built-in and whose message has these."""
    assert issubclass(error, pj.PerjacError)
    assert issubclass(error, builtin)
    every = "".join(f"(?=.*{re.escape(part)})" for part in quoted)
    return pytest.raises(error, match=f"(?s){every}")


# --- What is bound --------------------------------------------------------------------------


def test_a_model_that_is_not_built():
    bare = keras.Sequential([layers.Dense(3)], name="bare")
    with expect(errors.NotBuiltError, ValueError, "'bare'", "keras.Input"):
        pj.Engine(bare)


@pytest.mark.parametrize("thing", [3.5, None, np.zeros(3), {"a": 1}], ids=repr)
def test_what_is_no_model(thing):
    with expect(errors.PerjacError, Exception, type(thing).__name__) as caught:
        pj.Engine(thing)
    assert isinstance(caught.value, (TypeError, ValueError))


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [
        ("path", "fast", ("auto", "factored", "tape")),
        ("jit", "yes", ("auto", "True", "False")),
        ("independence", "maybe", ("check", "trust")),
        ("memory_limit", "much", ("GiB",)),
        ("memory_limit", -5, ("-5",)),
    ],
)
def test_an_option_that_does_not_exist(option, value, choices):
    with expect(errors.InputError, ValueError, str(value), *choices):
        pj.Engine(net(), **{option: value})


# --- Examples that meet ---------------------------------------------------------------------


def normalised() -> keras.Model:
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(5), layers.BatchNormalization(name="whiten")]
    )


@pytest.mark.parametrize("path", ["auto", "tape"])
def test_batch_normalisation_in_training_mode(path):
    with expect(errors.ExamplesMeetError, ValueError, "whiten", "training=False"):
        pj.Engine(normalised(), training=True, path=path).jacobian(data())


def test_batch_normalisation_at_inference_is_fine():
    assert pj.Engine(normalised()).jacobian(data()).shape[:2] == (3, 5)


MIXERS = {
    "softmax over examples": lambda x: tf.nn.softmax(x, axis=0),
    "minus the mean": lambda x: x - tf.reduce_mean(x, axis=0),
    "over the maximum": lambda x: x / tf.reduce_max(tf.abs(x)),
    "reversed": lambda x: tf.reverse(x, [0]),
    "rolled": lambda x: tf.roll(x, 1, axis=0),
    "similarities": lambda x: tf.matmul(tf.matmul(x, x, transpose_b=True), x),
    "cumulative sum": lambda x: tf.cumsum(x, axis=0),
    "sorted": lambda x: tf.sort(x, axis=0),
    "first example's": lambda x: x + x[:1],
    "reshaped over examples": lambda x: tf.reshape(tf.transpose(x), tf.shape(x)),
    "a single number": tf.reduce_sum,
}


@pytest.mark.parametrize("mix", MIXERS.values(), ids=MIXERS)
@pytest.mark.parametrize("wrt", ["weights", "inputs"])
def test_other_ways_for_examples_to_meet(mix, wrt):
    weight = tf.Variable(data(4, 4))
    engine = pj.Engine(lambda x: mix(tf.matmul(x, weight)), variables=[weight])
    with expect(errors.ExamplesMeetError, ValueError):
        engine.jacobian(data(), wrt=wrt)


class Centred(layers.Layer):
    def call(self, x):
        return x - tf.reduce_mean(x, axis=0, keepdims=True)


def test_the_layer_where_examples_meet_is_named():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5), Centred(name="centred")])
    with expect(errors.ExamplesMeetError, ValueError, "centred"):
        pj.Engine(model).jacobian(data())


def test_the_check_can_be_left_out():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5), Centred()])
    jac = pj.Engine(model, independence="trust").jacobian(data())
    assert jac.shape[:2] == (3, 5)


# --- What is asked --------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [3, -4, [0, 7], np.array([0, 1, 9])], ids=str)
def test_an_output_out_of_range_is_named_with_the_range(outputs):
    worst = str({3: 3, -4: -4}[outputs] if isinstance(outputs, int) else max(outputs))
    with expect(errors.OutOfRangeError, IndexError, worst, "2"):
        pj.Engine(net()).jacobian(data(), outputs=outputs)


@pytest.mark.parametrize("outputs", [1.5, "first", [[0, 1]]], ids=repr)
def test_outputs_that_are_no_indices(outputs):
    with expect(errors.PerjacError, Exception, str(outputs)):
        pj.Engine(net()).jacobian(data(), outputs=outputs)


def test_outputs_for_another_number_of_examples():
    with expect(errors.InputError, ValueError, "3", "4"):
        pj.Engine(net()).jacobian(data(), outputs=np.array([0, 1, 2, 0]))


@pytest.mark.parametrize("shape", [(3, 2, 4), (2, 2, 3), (3, 5), (3,)])
def test_cotangents_of_the_wrong_shape(shape):
    with expect(errors.InputError, ValueError, str(shape), "3"):
        pj.Engine(net()).jacobian(data(), cotangents=np.ones(shape, "float32"))


def test_outputs_and_cotangents_together():
    with expect(errors.InputError, ValueError, "outputs", "cotangents"):
        pj.Engine(net()).jacobian(data(), outputs=0, cotangents=np.ones((3, 1, 3)))


@pytest.mark.parametrize("shape", [(3, 5), (4,), (3, 4, 1), ()])
def test_inputs_of_the_wrong_shape(shape):
    with expect(errors.InputError, ValueError, "4", str(shape)):
        pj.Engine(net()).jacobian(data(3, 5) if shape == (3, 5) else np.ones(shape, "float32"))


def test_a_missing_batch_axis_is_pointed_out():
    with expect(errors.InputError, ValueError, "(4,)", "batch"):
        pj.Engine(net()).jacobian(data()[0])


def test_inputs_of_different_batch_sizes():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    model = keras.Model([a, b], layers.Dense(2)(a + b))
    with expect(errors.InputError, ValueError, "3", "2"):
        pj.Engine(model).jacobian([data(3, 4), data(2, 4)])


def test_too_few_inputs():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    model = keras.Model([a, b], layers.Dense(2)(a + b))
    with expect(errors.InputError, ValueError, "2", "'a'", "'b'", "1"):
        pj.Engine(model).jacobian(data())


@pytest.mark.parametrize("wrt", ["frist", "first/kernal", pj.activation("frist")], ids=str)
def test_an_unknown_name_brings_the_nearest(wrt):
    name = wrt if isinstance(wrt, str) else wrt.layer
    with expect(errors.UnknownNameError, KeyError, repr(name), "first"):
        pj.Engine(net()).jacobian(data(), wrt=wrt)


def test_an_unknown_head_or_layer_brings_the_nearest():
    with expect(errors.UnknownNameError, KeyError, "'secnod'", "second"):
        pj.Engine(net()).jacobian(data(), of="secnod")


def test_an_unknown_key_brings_the_nearest():
    jac = pj.Engine(net()).jacobian(data())
    with expect(errors.UnknownNameError, KeyError, "'frist/kernel'", "first/kernel"):
        jac["frist/kernel"]


def test_a_variable_of_another_model():
    stranger = net("stranger").trainable_variables[0]
    with expect(errors.UnknownNameError, KeyError, "stranger"):
        pj.Engine(net()).jacobian(data(), wrt=stranger)
    with expect(errors.UnknownNameError, KeyError, "stranger"):
        pj.Engine(net()).jacobian(data())[stranger]


@pytest.mark.parametrize("wrt", [17, [], object()], ids=["int", "empty list", "object"])
def test_nothing_that_can_be_differentiated_against(wrt):
    with expect(errors.InputError, ValueError, "wrt"):
        pj.Engine(net()).jacobian(data(), wrt=wrt)


def test_several_heads_have_to_be_told_apart():
    with expect(errors.InputError, ValueError, "cats", "dogs", "of="):
        pj.Engine(two_heads()).jacobian(data())


@pytest.mark.parametrize("of", [2, -3])
def test_a_head_number_out_of_range(of):
    with expect(errors.PerjacError, Exception, str(of), "0 to 1") as caught:
        pj.Engine(two_heads()).jacobian(data(), of=of)
    assert isinstance(caught.value, LookupError)


@pytest.mark.parametrize("per", ["example", 3])
def test_norms_per_something_else(per):
    with expect(errors.InputError, ValueError, repr(per), "row", "source"):
        pj.Engine(net()).jacobian(data()).norms(per=per)


@pytest.mark.parametrize("query", ["jvp", "vjp"])
def test_directions_of_the_wrong_shape(query):
    jac = pj.Engine(net()).jacobian(data())
    with expect(
        errors.InputError, ValueError, "(2, 9)", str(jac.shape[2 if query == "jvp" else 1])
    ):
        getattr(jac, query)(np.ones((2, 9), "float32"))


def test_a_direction_for_an_unknown_name():
    jac = pj.Engine(net()).jacobian(data())
    with expect(errors.UnknownNameError, KeyError, "'third/bias'"):
        jac.jvp({"third/bias": np.ones(3, "float32")})


def test_gram_of_different_things():
    engine = pj.Engine(net())
    with expect(errors.InputError, ValueError, "first"):
        engine.jacobian(data()).gram(engine.jacobian(data(), wrt="second"))


# --- Integers -------------------------------------------------------------------------------


def test_an_integer_input_has_no_derivative_and_the_embedding_is_the_way_out():
    engine, ids = pj.Engine(words()), np.ones((2, 6), "int32")
    with expect(errors.IntegerInputError, TypeError, "int32", "activation('embedding')"):
        engine.jacobian(ids, wrt="inputs")
    way_out = engine.jacobian(ids, wrt=pj.activation("embedding"))
    assert way_out["embedding"].shape == (2, 3, 6, 4)


# --- NaN and Inf ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["auto", "tape"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_in_an_input_is_named(value, path):
    x, engine = data(), pj.Engine(net(), path=path)
    engine.jacobian(x)
    x[1, 2] = value
    for asked in (engine, pj.Engine(net(), path=path)):  # a later call, and the first one
        with expect(errors.NotFiniteError, ValueError, "example 1"):
            asked.jacobian(x)


@pytest.mark.parametrize("path", ["auto", "tape"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_in_a_weight_is_named(value, path):
    model = net()
    bias, engine = model.get_layer("second").bias, pj.Engine(model, path=path)
    engine.jacobian(data())
    bias.assign([0.0, value, 1.0])
    for asked in (engine, pj.Engine(model, path=path)):
        with expect(errors.NotFiniteError, ValueError, "second/bias"):
            asked.jacobian(data())


def test_large_inputs_whose_sum_overflows_are_finite():
    x = np.full((2, 4), 3e38, "float32")
    weight = tf.Variable(np.full((4, 2), 1e-30, "float32"))
    jac = pj.Engine(lambda x: tf.matmul(x, weight), variables=[weight]).jacobian(x, wrt="inputs")
    np.testing.assert_allclose(jac["inputs"], np.full((2, 2, 4), 1e-30), rtol=1e-5)


# --- Memory ---------------------------------------------------------------------------------


def test_a_result_that_is_too_large_tells_its_size_and_a_way_out():
    model = keras.Sequential([keras.Input((300,)), layers.Dense(400), layers.Dense(8)])
    limited = pj.Engine(model, memory_limit="1MiB")
    x = data(16, 300)
    jac = limited.jacobian(x)
    assert jac.shape == (16, 8, 300 * 400 + 400 + 400 * 8 + 8)
    size = f"{4 * np.prod(jac.shape) / 2**20:.1f} MiB"
    with expect(errors.TooLargeError, MemoryError, size, "1.0 MiB", "norms"):
        jac.matrix()
    with expect(errors.TooLargeError, MemoryError, "kernel", "norms"):
        jac[model.trainable_variables[0]]
    right = np.linalg.norm(pj.Engine(model).jacobian(x).matrix(), axis=(1, 2))
    np.testing.assert_allclose(jac.norms(), right, rtol=1e-4)


def test_a_memory_limit_in_bytes():
    jac = pj.Engine(net(), memory_limit=1200).jacobian(data())  # (3, 3, 43) floats
    with expect(errors.TooLargeError, MemoryError, "norms"):
        jac.matrix()


# --- Outputs that do not depend -------------------------------------------------------------


@pytest.mark.parametrize("path", ["auto", "tape"])
def test_a_disconnected_weight_is_zero_and_named_in_a_warning(path):
    engine = pj.Engine(two_heads(), path=path)
    with pytest.warns(errors.DisconnectedWarning, match="cats/kernel") as caught:
        jac = engine.jacobian(data(), of="dogs")
    assert caught[0].filename == __file__
    assert jac["cats/kernel"].shape == (3, 3, 5, 2)
    assert not np.any(jac["cats/kernel"])
    assert np.any(jac["dogs/kernel"])
    assert not np.any(jac.norms(per="source")[next(k for k in jac if "cats/kernel" in k)])


def test_a_disconnected_input_is_zero_and_named_in_a_warning():
    a, b = keras.Input((4,), name="used"), keras.Input((4,), name="ignored")
    model = keras.Model([a, b], layers.Dense(2)(a) + 0 * tf_free(b))
    with pytest.warns(errors.DisconnectedWarning, match="ignored"):
        jac = pj.Engine(model).jacobian([data(), data()], wrt="inputs")
    assert not np.any(jac["ignored"])
    assert np.any(jac["used"])


def tf_free(b):
    """Return something of b's that has no gradient."""
    return layers.Lambda(lambda t: tf.stop_gradient(t[:, :2]))(b)


def test_every_error_is_exported_and_documented():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)]
    assert all(k.__doc__ for k in kinds)
    raised = [k for k in kinds if not issubclass(k, Warning)]
    assert all(issubclass(k, pj.PerjacError) for k in raised)
    beyond = [k for k in raised if k is not pj.PerjacError]
    assert all(len(k.__mro__) > len(pj.PerjacError.__mro__) for k in beyond)


def test_numbers_that_depend_on_the_number_of_examples():
    w = tf.Variable(np.ones((4, 3), "float32"))

    def averaged(x):
        return tf.tanh(x @ w) / tf.cast(tf.shape(x)[0], "float32")

    with pytest.raises(pj.errors.ExamplesMeetError, match="outside of any layer, tensor 'truediv"):
        pj.Engine(averaged, variables=[w]).jacobian(np.ones((4, 4), "float32"))


@pytest.mark.parametrize("option", ["path", "jit", "autotune", "independence"])
def test_an_option_that_there_is_not_is_refused(option):
    with pytest.raises(errors.InputError, match=f"{option}.*'nonsense'"):
        pj.Engine(keras.Sequential([keras.Input((2,)), layers.Dense(1)]), **{option: "nonsense"})
