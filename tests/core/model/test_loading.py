"""Models that were refused or crashed although they can be served, against a plain loop."""

from __future__ import annotations

import functools
import subprocess
import sys

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from keras import layers
from models import randomise

import perjac as pj
from perjac._core.backend import host
from perjac.errors import (
    ExamplesMeetError,
    InputError,
    IntegerInputError,
    NoGradientError,
    SlowPathWarning,
)
from perjac.saliency._slots import rounds

pytestmark = pytest.mark.slow  # left out of `make check`

RNG = np.random.default_rng(0)
SINGLE, DOUBLE = "float32", "float64"


def draw(*shape: int, dtype: str = SINGLE) -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def check_rows(engine, x, call, variables, dtype=SINGLE):
    """Compare an engine's rows, in the order of its keys, with a loop on a function."""
    jac = engine.jacobian(x)
    assert len(jac) == len(variables)
    found = [jac[v] for v in variables]
    right = oracle.weight_rows(call, x, [host.tf_variable(v) for v in variables])
    found = [np.reshape(f, r.shape) for f, r in zip(found, right, strict=True)]
    oracle.assert_agree(found, right, dtype)


# ---- functions bring their weights


def small() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, activation="tanh", name="hidden"),
            layers.BatchNormalization(),
            layers.Dense(2, name="top"),
        ]
    )
    randomise(model.weights)
    return model


class Module(tf.Module):
    """Weights, something that nobody reads, and a state that is not trained."""

    def __init__(self):
        super().__init__()
        self.w, self.unread = tf.Variable(draw(3, 2), name="w"), tf.Variable(1.0)
        self.scale = tf.Variable(2.0, trainable=False)

    @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    def __call__(self, x):
        return tf.tanh(x @ self.w) * self.scale

    def forward(self, x):
        return tf.sin(x @ self.w) * self.scale


class Held:
    """A plain object that holds a model."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return self.model(x) * 2


FUNCTIONS = {
    "lambda": lambda m: lambda x: m(x) * 2,
    "__call__": lambda m: m.__call__,
    "method": lambda m: m.call,
    "object": Held,
    "partial": lambda m: functools.partial(m, training=False),
    "tf.function": lambda m: tf.function(lambda x: m(x)),
    "concrete": lambda m: tf.function(lambda x: m(x) * 3).get_concrete_function(
        tf.TensorSpec([None, 3])
    ),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_function_brings_the_weights_it_reads_under_their_paths(kind):
    model = small()
    function = FUNCTIONS[kind](model)
    engine = pj.Engine(function)
    check_rows(engine, draw(5, 3), function, model.trainable_variables)
    assert set(engine.jacobian(draw(5, 3))) == {v.path for v in model.trainable_variables}


def test_frozen_layers_of_a_function_are_left_out():
    model = small()
    model.layers[0].trainable = False
    jac = pj.Engine(lambda x: model(x)).jacobian(draw(5, 3))
    assert set(jac) == {v.path for v in model.trainable_variables}


def test_data_takes_the_type_of_the_weights_that_a_function_holds():
    module = Module()
    rows = pj.Engine(module.forward).jacobian(draw(4, 3, dtype=DOUBLE))["w"]
    assert rows.dtype == tf.float32


def test_methods_of_a_module_read_the_weights_they_read():
    module, x = Module(), draw(4, 3)
    engine = pj.Engine(module.forward)
    check_rows(engine, x, module.forward, [module.w])
    assert engine.weight_names == ["w"]
    assert pj.Engine(module.forward, variables=[module.unread, module.w]).weight_names != ["w"]


def test_another_shape_of_data_may_bring_further_weights():
    narrow, wide = tf.Variable(draw(3, 2), name="n"), tf.Variable(draw(5, 2), name="w")
    engine = pj.Engine(lambda x: x @ (narrow if x.shape[1] == 3 else wide))
    assert list(engine.jacobian(draw(2, 3))) == ["n"]
    jac = engine.jacobian(draw(2, 5), wrt="w")
    np.testing.assert_allclose(jac["w"][0, 0, :, 1], 0)


@pytest.mark.parametrize("way", ["module", "export"])
def test_what_a_saved_model_loads_as_is_an_engine(way, tmp_path):
    x = draw(4, 3)
    if way == "module":
        tf.saved_model.save(Module(), str(tmp_path))
        loaded = tf.saved_model.load(str(tmp_path))
        check_rows(pj.Engine(loaded), x, loaded, [loaded.w])
        return
    model = small()
    model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(str(tmp_path))
    right = oracle.weight_rows(model, x, [v.value for v in model.trainable_variables])
    for function in (loaded, loaded.serve, loaded.signatures["serving_default"]):
        jac = pj.Engine(function).jacobian(x)
        found = [jac[v.path] for v in model.trainable_variables]
        oracle.assert_agree(found, right, SINGLE)


# ---- lookups in plain variables

TABLE, OTHER = tf.Variable(draw(7, 4, dtype=DOUBLE)), tf.Variable(draw(5, 4, dtype=DOUBLE))


def sparse(ids):
    found = tf.sparse.from_dense(ids + 1)
    return tf.sparse.SparseTensor(found.indices, found.values - 1, found.dense_shape)


LOOKUPS = {
    "two": lambda i: tf.reduce_sum(
        tf.nn.embedding_lookup(TABLE, i) * tf.nn.embedding_lookup(OTHER, i), 1
    ),
    "scalars": lambda i: tf.tanh(tf.nn.embedding_lookup(TABLE, i[:, 0])),
    "rank 3": lambda i: tf.reduce_sum(
        tf.nn.embedding_lookup(TABLE, tf.reshape(i, [-1, 2, 3])), [1, 2]
    ),
    "max_norm": lambda i: tf.reduce_sum(tf.nn.embedding_lookup(TABLE, i, max_norm=1.0), 1),
    "nested": tf.function(lambda i: tf.reduce_sum(tf.nn.embedding_lookup(TABLE, i), 1)),
    "sparse": lambda i: tf.nn.embedding_lookup_sparse(TABLE, sparse(i), None, combiner="mean"),
    "safe": lambda i: tf.nn.safe_embedding_lookup_sparse(TABLE, sparse(i), combiner="sum"),
}


@pytest.mark.filterwarnings("ignore::perjac.errors.SlowPathWarning")
@pytest.mark.parametrize(
    "kind", [k if k != "safe" else pytest.param(k, marks=pytest.mark.more) for k in LOOKUPS]
)
def test_lookups_in_plain_variables(kind):
    variables = [TABLE, OTHER] if kind == "two" else [TABLE]
    ids = RNG.integers(0, 5, (4, 6))
    engine = pj.Engine(LOOKUPS[kind])
    check_rows(engine, ids, LOOKUPS[kind], variables, DOUBLE)
    assert engine.verify(ids).passed


# ---- text and tables

WORDS = np.array([["a", "b", "zz"], ["c", "a", "a"], ["b", "", "c"]])
NUMBERS = np.array([[1, 2, 3], [4, 5, 1], [7, 8, 9]])


def looked_up(rows: int):
    return lambda h: layers.Dense(2)(layers.Flatten()(layers.Embedding(rows, 4, name="emb")(h)))


def dense(h):
    return layers.Dense(2)(layers.Dense(3, activation="tanh")(h))


def steps(h):
    return layers.Dense(2)(layers.LSTM(3)(layers.Embedding(5, 4, name="emb")(h)))


LETTERS = ["a", "b", "c"]
PREPARED = {
    "StringLookup": (lambda: layers.StringLookup(vocabulary=LETTERS), looked_up(4), WORDS),
    "bytes": (lambda: layers.StringLookup(vocabulary=LETTERS), looked_up(4), WORDS.astype("S")),
    "objects": (lambda: layers.StringLookup(vocabulary=LETTERS), looked_up(4), WORDS.astype("O")),
    "no place for others": (
        lambda: layers.StringLookup(vocabulary=[*LETTERS, "zz", ""], num_oov_indices=0),
        looked_up(6),
        WORDS,
    ),
    "counts": (
        lambda: layers.StringLookup(vocabulary=LETTERS, output_mode="count"), dense, WORDS
    ),
    "Hashing": (lambda: layers.Hashing(5), looked_up(5), WORDS),
    "IntegerLookup": (lambda: layers.IntegerLookup(vocabulary=[1, 2, 3]), looked_up(4), NUMBERS),
    "a loop behind a table": (lambda: layers.IntegerLookup(vocabulary=[1, 2]), steps, NUMBERS),
    "CategoryEncoding": (lambda: layers.CategoryEncoding(10, "multi_hot"), dense, NUMBERS),
    "Discretization": (
        lambda: layers.Discretization(bin_boundaries=[-1.0, 0.0, 1.0]), looked_up(4), draw(3, 3)
    ),
}  # fmt: skip


def prepared(kind: str) -> tuple[keras.Model, np.ndarray]:
    make, behind, x = PREPARED[kind]
    dtype = {"i": "int64", "f": "float32"}.get(x.dtype.kind, "string")
    i = keras.Input(x.shape[1:], dtype=dtype)
    return keras.Model(i, behind(make()(i))), x


@pytest.mark.parametrize("kind", PREPARED)
def test_preparation_inside_the_model(kind):
    model, x = prepared(kind)
    engine = pj.Engine(model)
    check_rows(engine, x, model, model.trainable_variables)
    assert {row.path for row in engine.inspect().rows} == {"factored"}
    assert engine.verify(x).passed
    if "emb" in {layer.name for layer in model.layers}:
        assert engine.jacobian(x, wrt=pj.activation("emb")).shape == (3, 2, 12)


def test_text_vectorised_inside_the_model():
    prepare = layers.TextVectorization(max_tokens=50, output_sequence_length=6)
    prepare.adapt(["what a lovely film", "a bad film it was"])
    i = keras.Input((1,), dtype="string")
    model = keras.Model(i, looked_up(50)(prepare(i)))
    x = tf.constant([["what a lovely film"], ["a bad film"]])
    with pytest.warns(SlowPathWarning, match="text"):
        check_rows(pj.Engine(model, path="tape"), x, model, model.trainable_variables)
    with pytest.warns(SlowPathWarning, match="takes text, which XLA does not know"):
        check_rows(pj.Engine(model, jit=True), x, model, model.trainable_variables)
    engine = pj.Engine(model)
    losses = engine.gradients(x, np.zeros((2, 2), "float32"), loss="mse").losses
    np.testing.assert_allclose(losses, np.mean(np.square(model(x)), 1), rtol=1e-5)
    values = pj.saliency.integrated_gradients(engine, x, target=0, wrt=pj.activation("emb")).values
    assert values.shape == (2, 6, 4)
    assert engine.made_up(3).dtype == tf.string


def test_text_beside_numbers():
    number, word = keras.Input((2,), name="n"), keras.Input((), dtype="string", name="w")
    crossed = keras.Input((), dtype="int64", name="c")
    text = layers.HashedCrossing(6, output_mode="one_hot")((word, crossed))
    hidden = layers.Dense(3, activation="tanh")(layers.Concatenate()([number, text]))
    model = keras.Model({"n": number, "w": word, "c": crossed}, layers.Dense(2)(hidden))
    x = {"n": draw(3, 2), "w": ["u", "v", "w"], "c": np.array([1, 2, 3])}
    given = {key: tf.constant(value) for key, value in x.items()}
    engine = pj.Engine(model)
    (right,) = oracle.input_rows(model, given)
    oracle.assert_agree([engine.jacobian(x, wrt="n")["n"]], [right], SINGLE)
    values = pj.saliency.gradient(engine, x, target=1).values
    np.testing.assert_allclose(values, right[:, 1], rtol=1e-5)
    with pytest.raises(IntegerInputError, match="respect to text"):
        engine.jacobian(x, wrt="w")


def test_a_table_in_a_function():
    entries = tf.lookup.KeyValueTensorInitializer(LETTERS, [1, 2, 3], value_dtype=tf.int32)
    table, weight = tf.lookup.StaticHashTable(entries, 0), tf.Variable(draw(4, 2, dtype=DOUBLE))

    def call(words):
        return tf.reduce_sum(tf.tanh(tf.gather(weight, table.lookup(words))), 1)

    check_rows(pj.Engine(call), WORDS, call, [weight], DOUBLE)
    assert pj.Engine(call).verify(WORDS).passed


def test_text_for_numbers_and_numbers_for_text_are_refused(tmp_path):
    model = small()
    with pytest.raises(InputError, match="holds text. Expected numbers"):
        pj.Engine(model).jacobian(WORDS)
    with pytest.raises(InputError, match="holds numbers. Expected text"):
        pj.Engine(prepared("StringLookup")[0]).jacobian(NUMBERS)
    weight = tf.Variable(draw(3, 2))
    with pytest.raises(InputError, match="does not take this text"):
        pj.Engine(lambda x: x @ weight).jacobian(WORDS)
    text, x = prepared("StringLookup")
    with pytest.raises(InputError, match="cannot be exported"):
        pj.Engine(text).export(tmp_path / "program", x)


# ---- complex weights, and weights of another type than the output


def complexes(*shape: int, dtype: str = "complex128") -> np.ndarray:
    return (RNG.normal(size=shape) + 1j * RNG.normal(size=shape)).astype(dtype)


def as_real(rows: np.ndarray) -> np.ndarray:
    """Return rows (B, K, ...) as (B, K, P), real and imaginary parts side by side."""
    if np.iscomplexobj(rows):
        rows = np.stack([rows.real, rows.imag], -1)
    return rows.reshape(*rows.shape[:2], -1)


@pytest.mark.filterwarnings("ignore::perjac.errors.DisconnectedWarning")
@pytest.mark.parametrize("path", ["auto", "tape"])
def test_complex_weights_count_as_two_real_ones(path):
    w, b = tf.Variable(complexes(4)), tf.Variable(draw(6, dtype=DOUBLE))
    unused = tf.Variable(complexes(2))
    x = draw(3, 6, dtype=DOUBLE)

    def call(x):
        return tf.signal.irfft(tf.signal.rfft(x) * w) + b

    engine = pj.Engine(call, variables=[w, b, unused], path=path)
    jac = engine.jacobian(x)
    right = oracle.weight_rows(call, x, [w, b])
    for variable, rows in zip([w, b], right, strict=True):
        np.testing.assert_allclose(jac[variable], rows, atol=1e-12)
    assert jac[unused].dtype == tf.complex128
    flat = np.concatenate([as_real(rows) for rows in right], -1)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    close(jac.norms(per="row"), np.linalg.norm(flat, axis=-1))
    close(jac.gram(), np.einsum("bkp,clp->bkcl", flat, flat))
    v, u = complexes(4), RNG.normal(size=(3, 6))
    key = jac.sources[0].key
    close(jac.jvp({key: v}), np.real(right[0] @ v.conj()))
    close(jac.vjp(u)[key], np.einsum("bk,bki->i", u, right[0]))
    close(jac.diagonal()[key], np.sum(np.abs(right[0]) ** 2, (0, 1)))
    assert jac.matrix().dtype == tf.complex128
    assert engine.verify(x).passed
    grads = engine.gradients(x, x, loss=lambda y, out: tf.reduce_sum((y - out) ** 2, -1))
    close(grads.variance()[key], np.var(grads[key].numpy(), 0))
    assert np.all(np.isfinite(grads.snr()[key]))


def test_a_filter_of_a_fourier_layer_in_single_precision():
    w = tf.Variable(complexes(4, 3, 2, dtype="complex64"))

    def call(x):
        modes = tf.signal.rfft(tf.transpose(x, [0, 2, 1]))
        return tf.reduce_sum(tf.tanh(tf.signal.irfft(tf.einsum("bix,xio->box", modes, w))), -1)

    x = draw(3, 6, 3)
    engine = pj.Engine(call)
    right = oracle.weight_rows(call, x, [w])[0]
    np.testing.assert_allclose(engine.jacobian(x)[w], right, rtol=1e-4, atol=1e-5)
    assert engine.verify(x).passed


def test_a_complex_output_is_refused():
    w = tf.Variable(complexes(3))
    with pytest.raises(InputError, match="output 'output' is complex"):
        pj.Engine(lambda x: tf.cast(x, tf.complex128) * w).jacobian(draw(2, 3, dtype=DOUBLE))


@pytest.mark.filterwarnings("ignore::perjac.errors.SlowPathWarning")
def test_weights_of_another_type_than_the_output_in_a_loop():
    w = tf.Variable(draw(4, 4) * 0.3)

    def call(x):
        def step(y, n):
            far = tf.reduce_sum(y * y, -1, keepdims=True) > 0.05
            return tf.where(far, y * 0.7 + 0.1 * tf.tanh(y @ w), y), n + 1

        def goes_on(y, n):
            return tf.reduce_any(tf.reduce_sum(y * y, -1) > 0.05) & (n < 30)

        return tf.cast(tf.while_loop(goes_on, step, (x, 0))[0], tf.float64)

    check_rows(pj.Engine(call), draw(3, 4), call, [w])


# ---- operations without a gradient


class Boxes(layers.Layer):
    """Scores of the boxes that are left of overlapping ones."""

    def call(self, boxes, scores):
        found = tf.image.combined_non_max_suppression(boxes, scores, 5, 10, clip_boxes=False)
        return found.nmsed_scores


def detector() -> keras.Model:
    i = keras.Input((8, 10, 3))
    h = layers.Conv2D(8, 3, 2, activation="relu")(i)
    boxes = layers.Reshape((-1, 1, 4))(layers.Conv2D(4, 1, activation="sigmoid")(h))
    scores = layers.Reshape((-1, 3), name="scores")(layers.Conv2D(3, 1, activation="sigmoid")(h))
    return keras.Model(i, layers.Dense(2, name="top")(Boxes(name="boxes")(boxes, scores)))


@pytest.mark.parametrize("path", ["auto", "tape"])
def test_an_operation_without_a_gradient_is_named_with_a_way_out(path):
    engine, x = pj.Engine(detector(), path=path), draw(2, 8, 10, 3)
    for ask in (
        lambda: engine.jacobian(x),
        lambda: engine.jacobian(x, wrt="inputs"),
        lambda: engine.gradients(x, np.zeros((2, 2), "float32"), loss="mse"),
        lambda: pj.saliency.gradient(engine, x, target=0),
    ):
        with pytest.raises(NoGradientError, match="CombinedNonMax.*layer 'boxes'.*of='scores'"):
            ask()
    assert engine.jacobian(x, wrt="top").shape == (2, 2, 22)
    assert engine.jacobian(x, of="scores", outputs=0, wrt="inputs").shape == (2, 1, 240)


@pytest.mark.filterwarnings("ignore::perjac.errors.SlowPathWarning")
def test_an_operation_without_a_gradient_inside_a_loop_is_named_by_its_type():
    w = tf.Variable(2.0)

    def call(x):
        shapes = (tf.TensorShape([]), tf.TensorShape([None, 2, 2, 1]))

        def step(n, a):
            return n + 1, tf.raw_ops.ResizeArea(images=a * w, size=[2, 2])

        return tf.while_loop(lambda n, a: n < 3, step, (0, x), shapes)[1][:, :, 0, 0]

    with pytest.raises(NoGradientError, match="ResizeArea"):
        pj.Engine(call).jacobian(draw(2, 2, 2, 1))


# ---- models of one batch size


def whole_rows(call, x, sources, put_back=lambda: None) -> list[np.ndarray]:
    """Return Jacobians (B, K, *shape) by a pass of the whole batch for each entry."""
    y = call(x)
    put_back()
    rows = []
    for n in range(y.shape.num_elements()):
        with tf.GradientTape() as tape:
            entry = tf.reshape(call(x), [-1])[n]
        put_back()
        rows.append([oracle._dense(g, s) for g, s in
                     zip(tape.gradient(entry, sources), sources, strict=True)])  # fmt: skip
    return [np.reshape(r, (*y.shape, *np.shape(r)[1:])) for r in zip(*rows, strict=True)]


def stateful(cell) -> tuple[keras.Model, list]:
    model = keras.Sequential(
        [keras.Input((4, 2), batch_size=3), cell(3, stateful=True, name="cell"), layers.Dense(2)]
    )
    states = tf.nest.flatten(model.layers[0].states)
    for state in states:
        state.assign(draw(*state.shape))
    return model, states


@pytest.mark.filterwarnings("ignore::perjac.errors.SlowPathWarning")
@pytest.mark.parametrize(
    ("cell", "as_function"),
    [
        (layers.LSTM, False),
        pytest.param(layers.GRU, True, marks=pytest.mark.more),
        pytest.param(layers.GRU, False, marks=pytest.mark.more),
        pytest.param(layers.SimpleRNN, False, marks=pytest.mark.more),
        pytest.param(layers.LSTM, True, marks=pytest.mark.more),
    ],
)
def test_stateful_layers_keep_their_states(cell, as_function):
    model, states = stateful(cell)
    before = [s.numpy() for s in states]

    def put_back():
        for state, value in zip(states, before, strict=True):
            state.assign(value)

    x = draw(3, 4, 2)
    right = whole_rows(model, x, [v.value for v in model.trainable_variables], put_back)
    outputs = model(x)
    put_back()
    engine = pj.Engine((lambda x: model(x)) if as_function else model)
    jac = engine.jacobian(x)
    oracle.assert_agree([jac[v] for v in model.trainable_variables], right, SINGLE)
    np.testing.assert_allclose(jac.outputs, outputs, rtol=1e-6)
    np.testing.assert_allclose(engine.outputs(x), outputs, rtol=1e-6)
    for state, value in zip(states, before, strict=True):
        np.testing.assert_array_equal(state, value)
    losses = engine.gradients(x, np.zeros((3, 2), "float32"), loss="mse").losses
    np.testing.assert_allclose(losses, np.mean(np.square(outputs), 1), rtol=1e-5)


@pytest.mark.filterwarnings("ignore::perjac.errors.SlowPathWarning")
def test_inputs_activations_and_attributions_at_one_batch_size():
    model, states = stateful(layers.LSTM)
    before = [s.numpy() for s in states]
    x = tf.constant(draw(3, 4, 2))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(model(x)[:, 1])  # examples do not meet
    right = tape.gradient(y, x)
    for state, value in zip(states, before, strict=True):
        state.assign(value)
    engine = pj.Engine(model)
    found = engine.jacobian(x, wrt="inputs")["inputs"][:, 1]
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-7)
    kernel = model.layers[-1].kernel.numpy().T
    hidden = engine.jacobian(x, wrt=pj.activation("cell"))["cell"]
    np.testing.assert_allclose(hidden, np.tile(kernel, (3, 1, 1)), rtol=1e-5)
    np.testing.assert_allclose(pj.saliency.gradient(engine, x, target=1).values, right, rtol=1e-4,
                               atol=1e-7)  # fmt: skip
    att = pj.saliency.integrated_gradients(engine, x, target=1)
    assert att.values.shape == (3, 4, 2)
    assert np.max(np.abs(att.delta)) < 1e-2
    for state, value in zip(states, before, strict=True):
        np.testing.assert_array_equal(state, value)


def folded(size: int | None) -> keras.Model:
    i = keras.Input((6, 1), batch_size=size)
    h = layers.Lambda(lambda t: tf.reshape(t, [4, 8]))(layers.Conv1D(2, 3)(i))
    return keras.Model(i, layers.Dense(2)(h))


@pytest.mark.filterwarnings("ignore::perjac.errors.SlowPathWarning")
@pytest.mark.parametrize("declared", [4, None])
def test_a_reshape_to_a_number_of_examples(declared):
    model, x = folded(declared), draw(4, 6, 1)
    engine = pj.Engine(model)
    right = whole_rows(model, x, [v.value for v in model.trainable_variables])
    oracle.assert_agree(list(engine.jacobian(x).values()), right, SINGLE)
    assert {row.path for row in engine.inspect(x=x).rows} == {"tape"}
    assert "batches of 4 examples alone" in engine.inspect(x=x).rows[0].reason
    with pytest.raises(InputError, match="batches of"):
        engine.jacobian(x[:3])
    assert engine.verify(x).passed


def test_a_declared_size_that_the_model_does_not_need_is_no_matter():
    i = keras.Input((6, 1), batch_size=4)
    model = keras.Model(i, layers.Dense(2)(layers.Flatten()(layers.Conv1D(2, 3)(i))))
    engine = pj.Engine(model)
    check_rows(engine, draw(3, 6, 1), model, model.trainable_variables)
    assert {row.path for row in engine.inspect().rows} == {"factored"}


@pytest.mark.parametrize(
    "mix",
    [
        lambda t: tf.reshape(t - tf.reduce_mean(t, 0), [4, 6]),
        lambda t: tf.reshape(tf.transpose(tf.reshape(t, [4, 6])), [4, 6]),
        lambda t: tf.reshape(tf.cumsum(t), [4, 6]),
    ],
)
def test_examples_that_meet_at_one_batch_size_are_refused(mix):
    i = keras.Input((6,), batch_size=4)
    model = keras.Model(i, layers.Dense(2)(layers.Lambda(mix)(i)))
    with pytest.raises(ExamplesMeetError):
        pj.Engine(model).jacobian(draw(4, 6))


def test_examples_of_ids_that_meet_at_one_batch_size_are_refused():
    i = keras.Input((3,), batch_size=4, dtype="int32")
    mixed = layers.Lambda(lambda t: tf.reshape(tf.cumsum(t) % 7, [4, 3]))(i)
    model = keras.Model(i, looked_up(7)(mixed))
    with pytest.raises(ExamplesMeetError):
        pj.Engine(model).jacobian(np.arange(12).reshape(4, 3) % 5)


def test_points_are_dealt_out_to_their_examples_places():
    dealt = [(p.tolist(), w.tolist()) for p, w in rounds(np.array([1, 0, 1, 1]), 3)]
    assert dealt == [([1, 0, -1], [0, 1]), ([-1, 2, -1], [1]), ([-1, 3, -1], [1])]


# ---- convolutions in recurrent loops


@pytest.mark.parametrize("rank", [2, pytest.param(1, marks=pytest.mark.more),
                                  pytest.param(3, marks=pytest.mark.more)])  # fmt: skip
def test_convolutional_lstms_in_single_precision_do_not_end_the_process(rank):
    program = f"""
import keras, numpy as np, perjac as pj, tensorflow as tf
shape = (3, *[5] * {rank}, 2)
layer = keras.layers.ConvLSTM{rank}D(3, 3, padding="same")
model = keras.Sequential([keras.Input(shape), layer, keras.layers.Flatten(), keras.layers.Dense(1)])
x = np.random.default_rng(0).normal(size=(2, *shape)).astype("float32")
engine = pj.Engine(model, path="factored")
variables = [v.value for v in model.trainable_variables]
with tf.GradientTape() as tape:
    y = tf.reduce_sum(model(x))
for v, right in zip(model.trainable_variables, tape.gradient(y, variables)):
    found = tf.reduce_sum(engine.jacobian(x)[v], [0, 1])
    assert np.allclose(found, right, rtol=1e-3, atol=1e-5), v.path
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
