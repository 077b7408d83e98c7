"""Bad input: every argument is refused by its name, and what is only unusual is accepted."""

from __future__ import annotations

import copy
import pickle
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import perjac as pj
from perjac import errors
from perjac._core.backend import memory
from perjac.cli import main
from perjac.saliency import METHODS, metrics

NAN = float("nan")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape or (3, 4)).astype("float32")


@pytest.fixture(scope="module")
def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((4,), name="x"), layers.Dense(5, "tanh", name="first"), layers.Dense(3)]
    )


@pytest.fixture(scope="module")
def engine(model) -> pj.Engine:
    return pj.Engine(model)


@pytest.fixture(scope="module")
def jac(engine) -> pj.Jacobian:
    return engine.jacobian(data())


def words(*tail: layers.Layer, rows: int = 9) -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((6,), dtype="int32", name="ids"), layers.Embedding(rows, 4, name="table"),
         *(tail or [layers.GlobalAveragePooling1D()]), layers.Dense(3, name="top")]
    )  # fmt: skip


def refused(kind: type[Exception], *quoted: str):
    """Expect an error of perjac's whose message has all of these."""
    assert issubclass(kind, pj.PerjacError)
    every = "".join(f"(?=.*{re.escape(part)})" for part in quoted)
    return pytest.raises(kind, match=f"(?s){every}")


# --- Weights of losses, labels --------------------------------------------------------------


@pytest.mark.parametrize("weights", [{0: NAN}, {1: np.inf}, {1.5: 1.0}, {"cat": 1.0}, [1.0, 2.0]])
def test_class_weights_are_finite_and_of_whole_classes(engine, weights):
    with refused(errors.InputError, "class_weight="):
        engine.gradients(data(), [0, 1, 2], loss=LOSS, class_weight=weights)


@pytest.mark.parametrize("weights", [NAN, [NAN], {"output": np.inf}, "2", True, [[1.0]]])
def test_loss_weights_are_finite_numbers(engine, weights):
    with refused(errors.InputError, "loss_weights="):
        engine.gradients(data(), [0, 1, 2], loss=LOSS, loss_weights=weights)


def test_weights_of_numpy_are_weights(engine):
    given = engine.gradients(
        data(), [0, 1, 2], loss=LOSS, loss_weights=np.float32(2), class_weight={np.int64(1): 3}
    )
    right = engine.gradients(data(), [0, 1, 2], loss=LOSS).losses * [2.0, 6.0, 2.0]
    np.testing.assert_allclose(given.losses, right, rtol=1e-6)


@pytest.mark.parametrize(
    ("y", "quoted"),
    [
        ([0, 1.5, 2], ("1.5", "example 1", "whole")),
        (["a", "b", "c"], ("y", "text")),
        (np.array([0, 1j, 2]), ("y", "complex")),
        (np.ma.array([0, 1, 2], mask=[0, 1, 0]), ("y", "masked")),
        ([0, -1, 2], ("-1", "example 1")),
        ([None, 1, 2], ("y", "objects")),
    ],
)
def test_labels_that_are_no_classes(engine, y, quoted):
    with refused(errors.PerjacError, *quoted):
        engine.gradients(data(), y, loss=LOSS)


@pytest.mark.parametrize("y", [[0.0, 1.0, 2.0], np.array([0, 1, 2], "uint8"), ([0, 1, 2])])
def test_whole_numbers_of_any_type_are_classes(engine, y):
    right = engine.gradients(data(), np.array([0, 1, 2]), loss=LOSS).norms()
    np.testing.assert_allclose(engine.gradients(data(), y, loss=LOSS).norms(), right, rtol=1e-6)


def test_labels_of_true_and_false_are_zeros_and_ones(engine):
    found = engine.gradients(data(), np.array([True, False, True]), loss=LOSS).losses
    np.testing.assert_array_equal(found, engine.gradients(data(), [1, 0, 1], loss=LOSS).losses)


def test_sample_weights_are_finite(engine):
    with refused(errors.NotFiniteError, "sample_weight", "example 1"):
        engine.gradients(data(), [0, 1, 2], loss=LOSS, sample_weight=[1, NAN, 1])


# --- Vectors --------------------------------------------------------------------------------

BAD_VECTORS = [
    (lambda a: np.where(np.arange(a.size).reshape(a.shape) == 1, NAN, a), errors.NotFiniteError),
    (lambda a: a * np.inf, errors.NotFiniteError),
    (lambda a: a * 1j, errors.InputError),
    (lambda a: np.ma.array(a, mask=a > 0), errors.InputError),
    (lambda a: a.astype(object), errors.InputError),
    (lambda a: a > 0, errors.InputError),
    (lambda a: None, errors.InputError),
    (lambda a: "ones", errors.InputError),
]
each_bad_vector = pytest.mark.parametrize(("spoil", "kind"), BAD_VECTORS)


@each_bad_vector
def test_vectors_are_finite_numbers(jac, spoil, kind):
    size = jac.shape[-1]
    with refused(kind, "v"):
        jac.jvp(spoil(np.ones(size)))
    with refused(kind, "v['first/bias']"):
        jac.jvp({"first/bias": spoil(np.ones(5))})
    with refused(kind, "u"):
        jac.vjp(spoil(np.ones((3, 3))))


@each_bad_vector
def test_cotangents_are_finite_numbers(engine, spoil, kind):
    if (spoiled := spoil(np.ones((3, 2, 3)))) is not None:
        with refused(kind, "cotangents="):
            engine.jacobian(data(), cotangents=spoiled)


def test_vectors_of_integers_lists_and_large_numbers_are_vectors(engine, jac):
    right = jac.jvp(np.ones(43, "float32"))
    for v in (np.ones(43, int), [1] * 43, tf.ones([43], tf.float64), Framed(np.ones(43))):
        np.testing.assert_allclose(jac.jvp(v), right, rtol=1e-6)
    large = np.full((3, 3), 3e38, "float32")  # their sum overflows
    assert set(jac.vjp(large)) == set(jac)
    assert engine.jacobian(data(), cotangents=np.ones((3, 2, 3), int)).shape == (3, 2, 43)


# --- Data -----------------------------------------------------------------------------------


class Framed:
    """What NumPy takes for an array, like a data frame or a tensor of another framework."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array

    def __len__(self):
        return len(self.array)

    def __iter__(self):
        return iter(self.array)


class Tracked(Framed):
    """A tensor of another framework that must not be looked into."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("call detach() first")


class Loader:
    """What a data loader looks like."""

    def __len__(self):
        return 2

    def __iter__(self):
        return iter([data()])


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return data()


SETS = {
    "Dataset": lambda: tf.data.Dataset.from_tensor_slices(data()).batch(2),
    "PyDataset": Sequence,
    "generator": lambda: (x for x in [data()]),
    "iterator": lambda: iter([data()]),
    "loader": Loader,
}


@pytest.mark.parametrize("name", SETS)
def test_a_data_set_is_no_batch(engine, name):
    make = SETS[name]
    for ask in (
        engine.jacobian, engine.outputs, engine.verify,
        lambda x: engine.gradients(x, loss=LOSS),
        lambda x: pj.saliency.gradient(engine, x),
    ):  # fmt: skip
        with refused(errors.InputError, "x as one batch", "Loop over it", "engine.fisher"):
            ask(make())
    with refused(errors.InputError, "y as one batch"):
        engine.gradients(data(), make(), loss=LOSS)


@pytest.mark.parametrize(
    ("x", "quoted"),
    [
        (None, ("x", "None")),
        (data() * 1j, ("'x'", "complex", "float32")),
        (np.ma.array(data(), mask=data() > 0), ("'x'", "masked", "filled")),
        (data().astype(object), ("'x'", "object", "astype")),
        ([[1, 2, 3, 4], [1, 2]], ("no array",)),
        (Tracked(data()), ("'x'", "detach")),
        (len, ("'x'",)),
    ],
)
def test_what_is_no_batch_of_numbers(engine, x, quoted):
    with refused(errors.InputError, *quoted):
        engine.jacobian(x)


def test_nothing_for_one_of_two_inputs():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    two = pj.Engine(keras.Model({"a": a, "b": b}, layers.Dense(2)(a + b)))
    with refused(errors.InputError, "'b'", "None"):
        two.jacobian({"a": data(), "b": None})


READ_ONLY = data()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "x",
    [
        data().astype("float64"), np.asfortranarray(data()), data()[::1], READ_ONLY,
        data().tolist(), Framed(data()), Framed(data().astype("float64")),
        np.ma.array(data()), tf.constant(data()), tf.Variable(data()),
    ],
)  # fmt: skip
def test_batches_in_other_forms_are_batches(engine, jac, x):
    np.testing.assert_allclose(engine.jacobian(x).matrix(), jac.matrix(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "uint8", "int64", "bool"])
def test_numbers_of_other_types_are_numbers(engine, dtype):
    x = np.abs(data()).astype(dtype)
    right = engine.jacobian(x.astype("float32")).matrix()
    np.testing.assert_allclose(engine.jacobian(x).matrix(), right, rtol=1e-6)


# --- Ids ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [2**32 + 1, -(2**31) - 1, 1.5, NAN, np.inf, 1j])
def test_ids_are_not_changed_in_silence(ids):
    with refused(errors.InputError, "'ids'", "int32"):
        pj.Engine(words()).jacobian(np.full((2, 6), ids))


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float32", "float64", "bool"])
def test_ids_of_any_type_that_holds_them(dtype):
    ids, made = np.array([[0, 1, 1, 0, 1, 0]] * 2), pj.Engine(words())
    right = made.jacobian(ids.astype("int32")).matrix()
    np.testing.assert_array_equal(made.jacobian(ids.astype(dtype)).matrix(), right)


def tail(name: str) -> list[layers.Layer]:
    return [layers.LSTM(3)] if name == "recurrent" else []


@pytest.mark.parametrize(
    ("wrong", "name", "jit"),
    [
        (9, "pooled", "auto"),
        (-10, "pooled", True),
        pytest.param(1000, "recurrent", "auto", marks=pytest.mark.slow),
    ],
)
def test_ids_without_a_row_are_named_whatever_runs(wrong, name, jit):
    made, ids = pj.Engine(words(*tail(name)), jit=jit), np.zeros((3, 6), "int32")
    bad = ids.copy()
    bad[2, 4] = wrong
    right = made.jacobian(ids).matrix()
    for ask in (
        made.jacobian,
        made.outputs,
        lambda x: made.gradients(x, [0, 1, 2], loss=LOSS),
        lambda x: made.jacobian(x, wrt="top"),
        pj.Engine(words(*tail(name)), jit=jit, path="tape").jacobian,
        pj.Engine(words(*tail(name)), jit=jit).jacobian,  # its first call
    ):
        with refused(errors.OutOfRangeError, str(wrong), "xample 2", "'ids'", "table", "0 to 8"):
            ask(bad)
    np.testing.assert_array_equal(made.jacobian(ids).matrix(), right)  # as fast as before
    assert all(row.path == "factored" for row in made.inspect().rows)


def test_ids_of_frozen_tables_and_of_plain_variables():
    frozen = words()
    frozen.layers[0].trainable = False
    table = tf.Variable(data(9, 4))
    weight = tf.Variable(data(4, 2))

    def function(ids):
        return tf.reduce_sum(tf.gather(table, ids), 1) @ weight

    bad = np.full((2, 6), 9, "int32")
    for made in (pj.Engine(frozen), pj.Engine(function, variables=[weight, table])):
        with refused(errors.OutOfRangeError, "9", "9 rows"):
            made.jacobian(bad)


def test_other_indices_out_of_range_are_told_in_tensorflows_words():
    weight = tf.Variable(data(4, 3))

    def loss(y, output):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(y, tf.int32), output)

    made = pj.Engine(lambda x: x @ weight, variables=[weight])
    with refused(errors.OutOfRangeError, "7"):
        made.gradients(data(), np.array([0, 7, 1]), loss=loss)


# --- Options --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["no", "True", 0, 1, None])
@pytest.mark.parametrize("option", ["training", "jit", "autotune"])
def test_options_that_are_true_or_false_are_nothing_else(model, option, value):
    with refused(errors.InputError, f"{option}=", repr(value)):
        pj.Engine(model, **{option: value})


@pytest.mark.parametrize("value", [np.ones(3), ["auto"], b"auto", 1])
def test_options_that_are_words_are_nothing_else(model, value):
    with refused(errors.InputError, "path="):
        pj.Engine(model, path=value)


@pytest.mark.parametrize(
    "limit", [True, False, "1.2.3GiB", "", ".", "4 4", b"4", 4e9 + 0.5, NAN, np.inf, -1, 0, [4]]
)
def test_memory_limits_that_are_none(model, limit):
    with refused(errors.InputError, "memory_limit"):
        pj.Engine(model, memory_limit=limit)


@pytest.mark.parametrize(
    ("limit", "size"),
    [
        (np.int64(4_000_000_000), 4_000_000_000), (np.uint32(4000), 4000), (4e9, 4_000_000_000),
        (np.float64(4e9), 4_000_000_000), ("1.5KiB", 1536), (".5M", 2**19), ("4 GB", 2**32),
    ],
)  # fmt: skip
def test_memory_limits_of_every_kind(model, limit, size):
    assert memory.limit(limit) == size
    made = pj.Engine(model, memory_limit=limit)
    assert made.jacobian(data()).norms().shape == (3,)


@pytest.mark.parametrize("outputs", [[], True, 1.0, [1.0], "a", [True], np.ma.masked_equal([1], 1)])
def test_outputs_are_whole_numbers(engine, outputs):
    with refused(errors.InputError, "outputs="):
        engine.jacobian(data(), outputs=outputs)


@pytest.mark.parametrize("of", [True, 1.0, [0], {}])
def test_of_is_a_name_or_a_number(engine, of):
    with refused(errors.InputError, "of=", repr(of)):
        engine.jacobian(data(), of=of)
    assert engine.jacobian(data(), of=np.int64(0)).shape == (3, 3, 43)


@pytest.mark.parametrize("rtol", [NAN, -1, 0, True, "small", np.inf])
def test_rtol_is_above_zero(engine, rtol):
    with refused(errors.InputError, "rtol="):
        engine.verify(data(), rtol=rtol)


# --- What cannot be done --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sparse"])
@pytest.mark.parametrize("dim", [10**9, np.int64(10**9), 10**30])
def test_projections_are_held_against_the_memory_limit(engine, jac, kind, dim):
    grads = engine.gradients(data(), [0, 1, 2], loss=LOSS)
    for rows in (jac, grads):
        with refused(errors.TooLargeError, "Projecting", "dim="):
            rows.project(dim, kind=kind)
    small = pj.Engine(engine.model, memory_limit="20KiB").jacobian(data())
    assert small.project(4, kind=kind).shape == (3, 3, 4)
    with refused(errors.TooLargeError, "20.0 KiB"):
        small.project(4000, kind=kind)


@pytest.mark.parametrize("do", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_engine_is_not_pickled(engine, do):
    with refused(errors.NotPicklableError, "pickled", "model", "anew") as caught:
        do(engine)
    assert isinstance(caught.value, TypeError)


class Boxes(layers.Layer):
    def call(self, boxes, scores):
        found = tf.image.combined_non_max_suppression(boxes, scores, 5, 10, clip_boxes=False)
        return found.nmsed_scores


def test_an_operation_without_a_gradient_is_named_with_its_layer():
    x = keras.Input((6, 4))
    scores = layers.Dense(3, activation="sigmoid", name="scores")(x)
    boxes = layers.Reshape((6, 1, 4), name="boxes")(layers.Dense(4)(x))
    made = pj.Engine(keras.Model(x, Boxes(name="chosen")(boxes, scores)))
    for ask in (
        made.jacobian, lambda x: made.jacobian(x, wrt="inputs"), made.verify,
        lambda x: pj.saliency.gradient(made, x, target=0),
    ):  # fmt: skip
        with refused(errors.NoGradientError, "CombinedNonMaxSuppression", "'chosen'", "of="):
            ask(data(2, 6, 4))
    assert made.jacobian(data(2, 6, 4), of="scores", wrt="scores").shape == (2, 18, 15)


# --- Arrays of results ----------------------------------------------------------------------


def test_an_array_of_a_jacobian_is_its_matrix(engine, jac):
    grads = engine.gradients(data(), [0, 1, 2], loss=LOSS)
    for rows in (jac, grads):
        right = rows.matrix().numpy()
        for found in (np.asarray(rows), np.array(rows), tf.convert_to_tensor(rows)):
            np.testing.assert_array_equal(found, right)
        assert np.asarray(rows, "float64").dtype == "float64"
        assert np.allclose(rows, right)
        with pytest.raises(ValueError, match="copy=False"):
            np.asarray(rows, copy=False)
        assert list(rows) == list(dict(rows))  # and a mapping all the same
        assert len(tf.nest.flatten(rows)) == 4


def test_an_array_too_large_to_form_is_refused(model):
    rows = pj.Engine(model, memory_limit=1200).jacobian(data())
    with refused(errors.TooLargeError, "norms"):
        np.asarray(rows)


# --- Models in place of engines -------------------------------------------------------------


def test_saliency_takes_a_model(model, engine):
    for method in (pj.saliency.gradient, pj.saliency.integrated_gradients):
        found = method(model, data(), target=1).values
        np.testing.assert_allclose(found, method(engine, data(), target=1).values, rtol=1e-5)
    assert pj.saliency.gradient(engine=model, x=data()).values.shape == (3, 4)
    assert pj.saliency.gradient(lambda x: x**2, data(), target=1).values.shape == (3, 4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_is_no_model(name):
    with refused(errors.NotAModelError, "ndarray"):
        METHODS[name](data(), data())


@pytest.mark.parametrize("name", metrics.__all__)
def test_every_metric_says_what_is_no_model(name):
    if not isinstance(getattr(metrics, name), type):
        with refused(errors.NotAModelError, "ndarray"):
            getattr(metrics, name)(data(), data())


# --- The command line -----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["verify", "jacobian", "gradients", "saliency"])
def test_commands_end_with_one_line_and_status_2(monkeypatch, capfd, tmp_path, command):
    words().save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", np.full((3, 6), 9))
    np.save(tmp_path / "y.npy", [0, 1, 2])
    arguments = {
        "verify": [],
        "jacobian": ["-o", "j.npz"],
        "gradients": [
            "-o",
            "g.npz",
            "--labels",
            "y.npy",
            "--loss",
            "sparse_categorical_crossentropy",
            "--from-logits",
        ],
        "saliency": ["-o", "maps", "--wrt", "table"],
    }[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["perjac", command, "model.keras", "x.npy", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    complaint = capfd.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in complaint
    assert "id 9" in complaint
    assert complaint.startswith("Error: ")
    assert len(complaint.strip().splitlines()) == 1
