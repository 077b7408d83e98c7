"""SavedModels: any signature of a folder agrees with the oracle on the model it came from."""

from __future__ import annotations

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from keras import layers
from models import randomise
from sampling import but

import perjac as pj
from perjac.errors import (
    FileFormatError,
    InputError,
    LostGradientWarning,
    SlowPathWarning,
    UnknownNameError,
)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype("float32")


def cnn() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 2), name="image"),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3),
            layers.Conv2D(4, 2, groups=2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )


def recurrent() -> keras.Model:
    ids = keras.Input((6,), dtype="int32", name="ids")
    x = layers.Embedding(9, 4, mask_zero=True)(ids)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    return keras.Model(ids, layers.Dense(2)(layers.GRU(3)(x)))


def attention() -> keras.Model:
    x = keras.Input((5, 4))
    attended = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 3)(x, x))
    return keras.Model(x, layers.Dense(2)(layers.GlobalAveragePooling1D()(attended)))


def two_inputs() -> keras.Model:
    number = keras.Input((4,), name="number")
    kind = keras.Input((3,), dtype="int32", name="kind")
    hidden = layers.Dense(5, activation="tanh")(number)
    looked_up = layers.Flatten()(layers.Embedding(6, 2)(kind))
    joined = layers.Concatenate()([hidden, looked_up])
    return keras.Model({"number": number, "kind": kind}, layers.Dense(2)(joined))


IDS = np.array([[1, 2, 3, 0, 0, 0], [4, 4, 4, 4, 0, 0], [8, 7, 6, 5, 4, 3]], "int32")
KERAS = {
    "cnn": (cnn, draw(3, 8, 8, 2)),
    "recurrent": (recurrent, IDS),
    "attention": (attention, draw(3, 5, 4)),
    "two_inputs": (two_inputs, {"number": draw(3, 4), "kind": IDS[:, :3] % 6}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", but({"recurrent"}, KERAS))
@pytest.mark.parametrize("way", ["export", pytest.param("save", marks=pytest.mark.more)])
def test_an_exported_keras_model_agrees_with_the_oracle(name, way, tmp_path):
    build, x = KERAS[name]
    model = build()
    randomise(model.weights)
    if way == "export":
        model.export(tmp_path, verbose=False)
    else:
        tf.saved_model.save(model, str(tmp_path))
    variables = model.trainable_variables
    right = oracle.weight_rows(lambda one: model(one, training=False), x, variables)
    engine = pj.Engine(tmp_path)
    if set(x if isinstance(x, dict) else ()) - set(engine.input_names):  # tf.saved_model's names
        with pytest.raises(InputError, match="takes the inputs 'inputs', 'inputs_1'"):
            engine.jacobian(x)
        x = {"inputs": x["kind"], "inputs_1": x["number"]}
    jac = engine.jacobian(x)
    theirs = {v.numpy().tobytes(): jac[v] for v in engine.model.trainable_variables}
    found = [theirs[v.value.numpy().tobytes()] for v in variables]
    oracle.assert_agree(found, right, "float32", [v.path for v in variables])
    assert len(jac) == len(variables)
    assert {row.path for row in engine.inspect().rows} == {"factored"}
    assert engine.verify(x).passed


class Several(tf.Module):
    """Two signatures, of two inputs and of one, and variables in a list."""

    def __init__(self):
        super().__init__()
        self.stack = [tf.Variable(draw(4, 4)), tf.Variable(2 * draw(4, 3))]
        self.unused = tf.Variable(draw(7))

    @tf.function(input_signature=[tf.TensorSpec([None, 4], name="features")])
    def embed(self, features):
        return {"hidden": tf.tanh(features @ self.stack[0])}

    @tf.function(input_signature=[tf.TensorSpec([None, 4]), tf.TensorSpec([None, 4])])
    def compare(self, left, right):
        left, right = (self.embed(x)["hidden"] @ self.stack[1] for x in (left, right))
        return {"difference": left - right, "product": left * right}


@pytest.fixture
def several(tmp_path) -> tuple[Several, str]:
    module = Several()
    signatures = {"embed": module.embed, "compare": module.compare}
    tf.saved_model.save(module, str(tmp_path), signatures=signatures)
    return module, str(tmp_path)


def test_each_signature_has_its_own_inputs_outputs_and_weights(several):
    module, path = several
    x = draw(2, 4)
    jac = pj.Engine(path, signature="embed").jacobian(x)
    right = oracle.weight_rows(lambda one: module.embed(one)["hidden"], x, module.stack[:1])
    oracle.assert_agree(list(jac.values()), right, "float32")

    pair = {"left": x, "right": x[::-1].copy()}
    engine = pj.Engine(path, signature="compare")
    jac = engine.jacobian(pair, of="product")
    right = oracle.weight_rows(lambda p: module.compare(**p)["product"], pair, module.stack)
    found = [jac[v] for v in engine.model.trainable_variables]
    found.sort(key=lambda rows: rows.shape[-1], reverse=True)
    oracle.assert_agree(found, right, "float32")
    assert list(engine.jacobian(pair, of="product", wrt="inputs")) == ["left", "right"]


def test_a_signature_has_to_be_chosen_among_several(several):
    with pytest.raises(InputError, match="2 signatures: 'compare', 'embed'"):
        pj.Engine(several[1])
    with pytest.raises(UnknownNameError, match="embed"):
        pj.Engine(several[1], signature="embeds")


def test_a_model_of_tensorflow_1(tmp_path):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, [None, 4], name="x")
        w = tf.compat.v1.get_variable("w", initializer=draw(4, 5))
        b = tf.compat.v1.get_variable("b", initializer=draw(5), use_resource=True)
        y = tf.tanh(tf.matmul(x, w) + b)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.saved_model.simple_save(session, str(tmp_path / "v1"), {"x": x}, {"y": y})
    mine = [tf.Variable(draw(4, 5)), tf.Variable(draw(5))]
    x = draw(3, 4)
    right = oracle.weight_rows(lambda one: tf.tanh(one @ mine[0] + mine[1]), x, mine)
    jac = pj.Engine(tmp_path / "v1").jacobian(x)
    oracle.assert_agree([jac["w"], jac["b"]], right, "float32")


def test_custom_gradients_that_were_not_saved_are_replaced_by_plain_ones(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, activation="silu")])
    randomise(model.weights)
    x, variables = draw(3, 4), model.trainable_variables
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(model, str(tmp_path), options=options)
    with pytest.warns(LostGradientWarning, match="without its . custom gradients"):
        engine = pj.Engine(tmp_path)
    jac = engine.jacobian(x)
    found = [jac[v] for v in engine.model.trainable_variables]
    oracle.assert_agree(found, oracle.weight_rows(model, x, variables), "float32")
    assert [row.path for row in engine.inspect().rows] == ["factored", "factored"]


class Fixed(tf.Module):
    """Signatures of one batch size, of text, and those that perjac cannot take."""

    def __init__(self):
        super().__init__()
        self.w = tf.Variable(1.0)

    @tf.function(input_signature=[tf.TensorSpec([1, 4])])
    def one(self, x):
        return x * self.w

    @tf.function(input_signature=[tf.TensorSpec([None, 4]), tf.TensorSpec([])])
    def scaled(self, x, by):
        return x * by * self.w

    @tf.function(input_signature=[tf.TensorSpec([None, 4])])
    def frozen(self, x):
        return 2 * x

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def text(self, x):
        return self.w * tf.cast(tf.strings.length(x), tf.float32)[:, None]

    @tf.function(input_signature=[tf.TensorSpec([2, 4])])
    def two(self, x):
        return tf.tanh(tf.reshape(x, [2, 4]) * self.w)


@pytest.mark.parametrize(
    ("signature", "why"),
    [
        ("scaled", "a single number, 'by'"),
        ("frozen", "no variables"),
    ],
)
def test_a_signature_that_cannot_be_taken_is_refused(signature, why, tmp_path):
    module = Fixed()
    signatures = {signature: getattr(module, signature)}
    tf.saved_model.save(module, str(tmp_path), signatures=signatures)
    with pytest.raises(InputError, match=why):
        pj.Engine(tmp_path)


def test_a_signature_of_one_batch_size_is_served_at_that_size(tmp_path):
    module, x = Fixed(), draw(2, 4)
    tf.saved_model.save(module, str(tmp_path), signatures={"two": module.two})
    engine = pj.Engine(tmp_path)
    with pytest.warns(SlowPathWarning, match="batches of 2 examples alone"):
        (rows,) = engine.jacobian(x).values()
    oracle.assert_agree([rows], [x / np.cosh(x) ** 2], "float32")
    with pytest.raises(InputError, match="batches of 2 examples"):
        engine.jacobian(draw(3, 4))


def test_a_signature_of_text_is_served(tmp_path):
    module = Fixed()
    tf.saved_model.save(module, str(tmp_path), signatures={"text": module.text})
    (rows,) = pj.Engine(tmp_path).jacobian(np.array(["a", "four"])).values()
    assert rows.numpy().ravel().tolist() == [1, 4]


def test_what_is_no_saved_model_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"without a saved_model\.pb"):
        pj.Engine(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"nonsense")
    with pytest.raises(FileFormatError, match="Cannot read"):
        pj.Engine(tmp_path)
    with pytest.raises(InputError, match="signature"):
        pj.Engine(lambda x: x, signature="serving_default")
