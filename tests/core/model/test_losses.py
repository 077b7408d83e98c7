"""Every loss: of each example, what Keras computes for a batch of that example alone."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from keras import layers, losses
from models import floats, randomise

import perjac as pj
from perjac.errors import (
    ExamplesMeetError,
    InputError,
    LossWarning,
    OutOfRangeError,
    UnknownNameError,
)

pytestmark = pytest.mark.slow  # left out of `make check`

RTOL = 1e-10


def random(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def whole(below: int, *shape: int, seed: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, shape)


def in_float64(build):
    """Build a model once for each of its arguments, in float64, with weights that hide nothing."""

    @functools.cache
    def made(*arguments) -> keras.Model:
        with floats("float64"):
            model = build(*arguments)
        randomise(model.weights)
        return model

    return made


@in_float64
def net(activation: str | None = None, outputs: int = 3):
    top = layers.Dense(outputs, activation, name="top")
    return keras.Sequential([keras.Input((4,)), layers.Dense(5, "tanh"), top])


@in_float64
def tokens(activation: str | None = None, masked: bool = False):
    """Return a model of (B, 4) ids, with 0 for padding, to (B, 4, 3)."""
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(6, 3, mask_zero=masked),
            layers.Dense(3, "tanh"),
            layers.Dense(3, activation, name="top"),
        ]
    )


@in_float64
def recurrent():
    steps = layers.LSTM(3, return_sequences=True)
    embedded = layers.Embedding(6, 3, mask_zero=True)
    return keras.Sequential(
        [keras.Input((4,), dtype="int32"), embedded, steps, layers.Dense(3, name="top")]
    )


@in_float64
def pictures(activation: str | None = None):
    top = layers.Conv2D(2, 2, padding="same", activation=activation, name="top")
    return keras.Sequential([keras.Input((3, 4, 1)), top])


@in_float64
def two_heads():
    x = keras.Input((4,))
    hidden = layers.Dense(5, "tanh")(x)
    heads = [layers.Dense(3, name="cats")(hidden), layers.Dense(2, name="dogs")(hidden)]
    return keras.Model(x, heads)


@functools.cache
def engine(model: Any) -> pj.Engine:
    return pj.Engine(model)


X = random(3, 4, seed=1)
IDS = np.array([[1, 2, 1, 3], [4, 5, 0, 0], [2, 0, 0, 0]], "int32")
IMAGES = random(3, 3, 4, 1, seed=2)


def agrees(model, x, y, loss, wanted=None, sample_weight=None, **asked):
    """Assert that losses and gradients are those of `wanted`, (y, weight, output) to a number.

    By default of `loss`, a Keras loss that computes in float64.
    """
    grads = engine(model).gradients(x, y, loss=loss, sample_weight=sample_weight, **asked)
    if wanted is None:

        def wanted(y, weight, output):
            return loss(y, output, sample_weight=weight)

    def alone(given, output):
        return tf.reduce_sum(wanted(given["y"], given.get("weight"), output))

    given = {"y": y} if sample_weight is None else {"y": y, "weight": sample_weight}
    with floats("float64"):
        values, rows = oracle.loss_rows(
            functools.partial(model, training=False), alone, x, given, model.trainable_variables
        )
    assert grads.losses.dtype == "float64"
    np.testing.assert_allclose(grads.losses, values, rtol=RTOL, atol=1e-12)
    oracle.assert_agree(list(grads.values()), rows, "float64", list(grads))
    return grads


def exact(kind: str, *given: Any, **options: Any) -> losses.Loss:
    """Return a loss of Keras that computes in float64, and so is its own oracle."""
    return getattr(losses, kind)(*given, dtype="float64", **options)


# --- Every loss of Keras --------------------------------------------------------------------

SIGNS = np.where(random(3, 3, seed=8) > 0, 1.0, -1.0)
HOT = np.eye(3)[[2, 0, 1]]
SOFT = np.abs(random(3, 3, seed=9))
SOFT /= SOFT.sum(1, keepdims=True)
ONES = (random(3, 3, seed=10) > 0).astype("float64")
FRACTIONS = np.random.default_rng(11).uniform(size=(3, 3))

# Loss, activation of the output, labels.
EVERY = {
    "MeanSquaredError": (exact("MeanSquaredError"), None, random(3, 3)),
    "MeanAbsoluteError": (exact("MeanAbsoluteError"), None, random(3, 3)),
    "MeanAbsolutePercentageError": (exact("MeanAbsolutePercentageError"), None, random(3, 3)),
    "MeanSquaredLogarithmicError": (exact("MeanSquaredLogarithmicError"), "softplus", SOFT),
    "CosineSimilarity": (exact("CosineSimilarity"), None, random(3, 3)),
    "Huber": (exact("Huber", delta=0.5), None, random(3, 3)),
    "LogCosh": (exact("LogCosh"), None, random(3, 3)),
    "Hinge": (exact("Hinge"), None, SIGNS),
    "SquaredHinge": (exact("SquaredHinge"), None, SIGNS),
    "CategoricalHinge": (exact("CategoricalHinge"), None, HOT),
    "KLDivergence": (exact("KLDivergence"), "softmax", SOFT),
    "Poisson": (exact("Poisson"), "softplus", np.round(3 * SOFT)),
    "BinaryCrossentropy": (exact("BinaryCrossentropy"), "sigmoid", ONES),
    "BinaryFocalCrossentropy": (
        exact("BinaryFocalCrossentropy", apply_class_balancing=True, gamma=1.5), "sigmoid", ONES,
    ),
    "CategoricalCrossentropy": (exact("CategoricalCrossentropy"), "softmax", SOFT),
    "CategoricalFocalCrossentropy": (exact("CategoricalFocalCrossentropy"), "softmax", HOT),
    "SparseCategoricalCrossentropy": (
        exact("SparseCategoricalCrossentropy"), "softmax", np.array([2, 0, 1]),
    ),
    "CategoricalGeneralizedCrossEntropy": (
        exact("CategoricalGeneralizedCrossEntropy", q=0.7), "softmax", np.array([2, 0, 1]),
    ),
    "Dice": (exact("Dice"), "sigmoid", ONES),
    "Tversky": (exact("Tversky", alpha=0.3, beta=0.6), "sigmoid", ONES),
}  # fmt: skip
ELSEWHERE = {"Loss", "CTC", "Circle"}  # tested on their own


def test_no_loss_of_keras_is_left_out():
    classes = {name for name, kind in vars(losses).items() if isinstance(kind, type)}
    assert classes <= set(EVERY) | ELSEWHERE


@pytest.mark.parametrize("name", EVERY)
def test_a_loss_is_kerass_on_a_batch_of_one(name):
    loss, activation, y = EVERY[name]
    agrees(net(activation), X, y, loss)


@pytest.mark.parametrize("name", ["CosineSimilarity", "Huber", "KLDivergence", "Dice"])
def test_a_loss_by_name_is_the_loss_with_no_options(name):
    loss, activation, y = EVERY[name]
    made, given = engine(net(activation)), loss.fn.__name__
    right = made.gradients(X, y, loss=getattr(losses, name)()).losses
    np.testing.assert_array_equal(made.gradients(X, y, loss=given).losses, right)


@pytest.mark.parametrize(
    ("kind", "options", "y"),
    [
        ("MeanSquaredError", {}, random(3, 4, 3)),
        ("SparseCategoricalCrossentropy", {"from_logits": True}, whole(3, 3, 4)),
        ("SparseCategoricalCrossentropy", {"from_logits": True}, whole(3, 3, 4, 1)),
        ("CategoricalCrossentropy", {"from_logits": True}, np.eye(3)[whole(3, 3, 4)]),
        ("Hinge", {}, np.sign(random(3, 4, 3))),
        ("Dice", {"axis": 2}, whole(2, 3, 4, 3)),
        ("Dice", {}, whole(2, 3, 4, 3)),
    ],
)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_a_loss_per_token_is_kerass_on_a_batch_of_one(kind, options, y, masked):
    agrees(tokens(None, masked), IDS, y, exact(kind, **options))
    if kind == "Dice":  # its one number counts for each token
        agrees(tokens(None, masked), IDS, y, exact(kind, reduction="sum", **options))


def test_a_loss_behind_a_masked_recurrence_is_kerass_on_a_batch_of_one():
    loss = exact("SparseCategoricalCrossentropy", from_logits=True)
    grads = agrees(recurrent(), IDS, whole(3, 3, 4), loss, sample_weight=WEIGHTS["(B, T)"])
    assert np.all(grads.norms() > 0)


def test_a_loss_along_the_tokens_is_kerass_on_a_batch_of_one():
    agrees(tokens(), IDS, random(3, 4, 3), exact("CosineSimilarity", axis=1))


def test_a_loss_over_pictures_is_kerass_on_a_batch_of_one():
    y = whole(2, 3, 3, 4, 2)
    agrees(pictures(), IMAGES, random(3, 3, 4, 2), exact("MeanSquaredError"))
    agrees(pictures("sigmoid"), IMAGES, y, exact("BinaryCrossentropy"))
    agrees(pictures("sigmoid"), IMAGES, y, exact("Dice", axis=(1, 2, 3)))
    agrees(pictures("sigmoid"), IMAGES, y, exact("Tversky"))
    sparse = exact("SparseCategoricalCrossentropy", from_logits=True)
    agrees(pictures(), IMAGES, whole(2, 3, 3, 4), sparse)


@pytest.mark.filterwarnings("ignore::perjac.errors.SlowPathWarning")
def test_ctc_is_kerass_on_a_batch_of_one():
    y, model = np.array([[1, 2], [2, 0], [1, 0]]), tokens()
    grads = engine(model).gradients(IDS, y, loss=losses.CTC())
    right, rows = oracle.loss_rows(model, losses.CTC(), IDS, y, model.trainable_variables)
    np.testing.assert_allclose(grads.losses, right, rtol=1e-5)  # TensorFlow's is in float32
    for found, expected in zip(grads.values(), rows, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["SparseCategoricalCrossentropy", "CategoricalGeneralizedCrossEntropy"]
)
def test_numbers_of_classes_may_have_a_last_axis_of_one(kind):
    agrees(net("softmax"), X, np.array([[2], [0], [1]]), exact(kind))


def test_a_loss_between_examples_is_refused():
    for loss in (losses.Circle(), "circle"):
        with pytest.raises(ExamplesMeetError, match="'circle'"):
            engine(net()).gradients(X, np.array([0, 1, 0]), loss=loss)


@pytest.mark.parametrize("kind", ["Hinge", "SquaredHinge"])
def test_hinges_tell_zeros_and_ones_by_the_example(kind):
    # One example's labels are 0 and 1, the others' -1 and 1; or what is neither.
    y = np.array([[0, 1, 1], [-1, 1, 1], [0.5, 1, 0]])
    agrees(net(), X, y, exact(kind))


@pytest.mark.parametrize("loss", [exact("MeanSquaredError"), exact("BinaryCrossentropy", True)])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_labels_with_and_without_a_last_axis_of_one(loss, shape):
    agrees(net(None, 1), X, whole(2, *shape), loss)


def test_an_output_without_an_axis():
    model = net(None, 1)

    def flat(x):
        return model(x)[:, 0]

    y = random(3)
    grads = pj.Engine(flat, variables=model.trainable_variables).gradients(X, y, loss="mse")
    right = engine(model).gradients(X, y, loss="mse")
    np.testing.assert_allclose(grads.losses, right.losses, rtol=RTOL)
    np.testing.assert_allclose(grads.matrix(), right.matrix(), rtol=RTOL)


# --- Options --------------------------------------------------------------------------------

BINARY, HOTS, NUMBERS = whole(2, 3, 3), np.eye(3)[[2, 0, 1]], np.array([2, 0, 1])


@pytest.mark.parametrize(
    ("logits", "options"),
    [(True, {}), (False, {"label_smoothing": 0.2}), (True, {"label_smoothing": 0.2})],
    ids=["logits", "smoothed", "logits, smoothed"],
)
@pytest.mark.parametrize(
    ("kind", "activation", "y"),
    [
        ("BinaryCrossentropy", "sigmoid", BINARY),
        ("BinaryFocalCrossentropy", "sigmoid", BINARY),
        ("CategoricalCrossentropy", "softmax", HOTS),
        ("CategoricalFocalCrossentropy", "softmax", HOTS),
    ],
)
def test_cross_entropies_of_logits_and_of_probabilities(kind, activation, y, logits, options):
    model = net(None if logits else activation)
    grads = agrees(model, X, y, exact(kind, from_logits=logits, **options))
    if kind == "CategoricalCrossentropy" and not options:
        same = exact("SparseCategoricalCrossentropy", from_logits=logits)
        sparse = agrees(model, X, NUMBERS, same)
        np.testing.assert_allclose(sparse.losses, grads.losses, rtol=RTOL)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_class_that_is_ignored_does_not_count(reduction):
    y = np.array([[0, 2, -1, 1], [-1, -1, 1, 0], [-1, -1, -1, -1]])
    loss = exact("SparseCategoricalCrossentropy", True, ignore_class=-1, reduction=reduction)
    grads = agrees(tokens(), IDS, y, loss)
    assert grads.losses[2] == 0
    agrees(tokens(None, True), IDS, y, loss)


REDUCTIONS = ["sum", "sum_over_batch_size", "mean_with_sample_weight", None]
WEIGHTS = {
    "none": None,
    "(B,)": np.array([0.5, 2.0, 0.0]),
    "(B, 1)": np.array([[0.5], [2.0], [3.0]]),
    "(B, T)": np.random.default_rng(4).uniform(size=(3, 4)).round(3),
}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("weight", ["none", "(B,)", "(B, T)"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_and_masks_are_reduced_as_keras_does_for_a_batch_of_one(reduction, weight, masked):
    loss, given = exact("MeanSquaredError", reduction=reduction), WEIGHTS[weight]
    y = random(3, 4, 3)
    of_examples = given is not None and given.size == 3
    if not (reduction == "mean_with_sample_weight" and of_examples):
        agrees(tokens(None, masked), IDS, y, loss, sample_weight=given)
        return

    # Keras divides a lone example's weight out again: here it multiplies what there is without.
    def wanted(y, weight, output):
        return loss(y, output) * tf.cast(tf.reshape(weight, []), "float64")

    agrees(tokens(None, masked), IDS, y, loss, wanted, given)


def test_reductions_of_two_names_are_the_same():
    made, y = engine(tokens(None, True)), random(3, 4, 3)
    for one, other in (("mean", "sum_over_batch_size"), ("none", None)):
        found, right = (
            made.gradients(IDS, y, loss=losses.MeanSquaredError(reduction=reduction)).losses
            for reduction in (one, other)
        )
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("given", [WEIGHTS["(B,)"], WEIGHTS["(B, 1)"], [1, 3, 2]], ids=str)
def test_weights_of_examples_multiply_their_losses(given):
    given, y = np.array(given), random(3, 3)
    agrees(net(), X, y, exact("MeanSquaredError"), sample_weight=given)
    plain = engine(net()).gradients(X, y, loss="mse")
    weighted = engine(net()).gradients(X, y, loss="mse", sample_weight=given)
    np.testing.assert_allclose(weighted.losses, plain.losses * np.ravel(given), rtol=RTOL)
    rows = plain.matrix() * np.reshape(given, (3, 1))
    np.testing.assert_allclose(weighted.matrix(), rows, rtol=RTOL, atol=1e-14)


@pytest.mark.parametrize("shape", [(3, 3), (3, 2), (3, 1, 2)])
def test_weights_that_do_not_fit_the_losses(shape):
    with pytest.raises(InputError, match=r"sample_weight of shape \(B, .*losses of shape \(B\)"):
        engine(net()).gradients(X, random(3, 3), loss="mse", sample_weight=np.ones(shape))
    with pytest.raises(InputError, match=r"sample_weight of shape .*losses of shape \(B, 4\)"):
        engine(tokens()).gradients(IDS, random(3, 4, 3), loss="mse", sample_weight=np.ones(shape))


CLASSES = {0: 0.5, 2: 3.0}


@pytest.mark.parametrize(
    ("loss", "y", "numbers"),
    [
        ("sparse_categorical_crossentropy", NUMBERS, NUMBERS),
        ("sparse_categorical_crossentropy", NUMBERS[:, None], NUMBERS),
        ("sparse_categorical_crossentropy", NUMBERS.astype("float32"), NUMBERS),
        ("categorical_crossentropy", HOTS, NUMBERS),
        ("categorical_crossentropy", HOTS.astype("int64"), NUMBERS),
        ("kl_divergence", HOTS, NUMBERS),
    ],
    ids=["sparse", "sparse (B, 1)", "floats", "one-hot", "one-hot ints", "another loss"],
)
def test_class_weights_multiply_the_losses_of_their_labels(loss, y, numbers):
    made, by_hand = engine(net("softmax")), np.array([CLASSES.get(n, 1.0) for n in numbers])
    found = made.gradients(X, y, loss=loss, class_weight=CLASSES)
    right = made.gradients(X, y, loss=loss, sample_weight=by_hand)
    np.testing.assert_allclose(found.losses, right.losses, rtol=RTOL)
    np.testing.assert_allclose(found.matrix(), right.matrix(), rtol=RTOL, atol=1e-14)
    assert not np.allclose(found.losses, made.gradients(X, y, loss=loss).losses)


@pytest.mark.parametrize("y", [whole(2, 3), whole(2, 3, 1), whole(2, 3) > 0], ids=str)
def test_class_weights_of_two_classes(y):
    made, by_hand = engine(net("sigmoid", 1)), np.where(np.ravel(y) == 0, 0.5, 1.0)
    found = made.gradients(X, y, loss="binary_crossentropy", class_weight=CLASSES)
    right = made.gradients(X, y, loss="binary_crossentropy", sample_weight=by_hand)
    np.testing.assert_allclose(found.losses, right.losses, rtol=RTOL)


@pytest.mark.parametrize("hot", [False, True], ids=["sparse", "one-hot"])
def test_class_weights_of_tokens(hot):
    made, y = engine(tokens("softmax", True)), whole(3, 3, 4)
    by_hand = np.vectorize(lambda n: CLASSES.get(n, 1.0))(y)
    loss = "categorical_crossentropy" if hot else "sparse_categorical_crossentropy"
    given = np.eye(3)[y] if hot else y
    found = made.gradients(IDS, given, loss=loss, class_weight=CLASSES)
    right = made.gradients(IDS, given, loss=loss, sample_weight=by_hand)
    np.testing.assert_allclose(found.losses, right.losses, rtol=RTOL)
    np.testing.assert_allclose(found.matrix(), right.matrix(), rtol=RTOL, atol=1e-14)


def test_class_weights_and_weights_multiply():
    made, w = engine(net("softmax")), np.array([2.0, 3.0, 0.5])
    asked = {"loss": "sparse_categorical_crossentropy", "class_weight": CLASSES}
    found = made.gradients(X, NUMBERS, **asked, sample_weight=w)
    np.testing.assert_allclose(found.losses, made.gradients(X, NUMBERS, **asked).losses * w, RTOL)


def test_class_weights_of_what_has_no_classes():
    with pytest.raises(InputError, match="class_weight.*two|class_weight.*cats.*dogs"):
        engine(two_heads()).gradients(X, [NUMBERS, random(3, 2)], loss="mse", class_weight={0: 1})
    with pytest.raises(InputError, match=r"class_weight.*\(B, 3, 4\).*\(B\)"):
        engine(pictures("sigmoid")).gradients(
            IMAGES, whole(2, 3, 3, 4, 2), loss=losses.Dice(axis=(1, 2, 3)), class_weight={0: 2}
        )
    for given in (3, {"cat": 2.0}):
        with pytest.raises(InputError, match=f"class_weight.*{given}"):
            engine(net()).gradients(X, random(3, 3), loss="mse", class_weight=given)


# --- How a loss is given --------------------------------------------------------------------


class Quartic(losses.Loss):
    """Somebody's own Keras loss."""

    def call(self, y, output):
        return tf.reduce_mean((y - output) ** 4, -1)


MSE_AS = {
    "name": "mse",
    "long name": "mean_squared_error",
    "class name": "MeanSquaredError",
    "function": losses.mean_squared_error,
    "class": losses.MeanSquaredError,
    "object": losses.MeanSquaredError(),
    "config": {"class_name": "MeanSquaredError", "config": {"reduction": "sum"}},
    "serialised": losses.serialize(losses.MeanSquaredError()),
    "list": ["mse"],
    "dict": {"output": "mse"},
    "callable": lambda y, output: tf.reduce_mean((y - output) ** 2, -1),
    "callable in a dict": {"output": lambda y, output: tf.reduce_mean((y - output) ** 2, -1)},
}


@pytest.mark.parametrize("by", MSE_AS)
def test_a_loss_may_be_given_in_any_way(by):
    right = exact("MeanSquaredError")
    agrees(net(), X, random(3, 3), MSE_AS[by], lambda y, weight, output: right(y, output))


def test_a_loss_class_of_ones_own():
    agrees(net(), X, random(3, 3), Quartic(dtype="float64"))
    loss = Quartic(reduction="sum", dtype="float64")
    agrees(tokens(None, True), IDS, random(3, 4, 3), loss)


@pytest.mark.parametrize(
    ("activation", "outputs", "y", "meant"),
    [
        ("sigmoid", 1, np.array([1, 0, 1]), "binary_crossentropy"),
        ("softmax", 3, NUMBERS, "sparse_categorical_crossentropy"),
        ("softmax", 3, NUMBERS[:, None], "sparse_categorical_crossentropy"),
        ("softmax", 3, HOTS, "categorical_crossentropy"),
    ],
)
def test_crossentropy_is_the_one_that_fits_the_labels(activation, outputs, y, meant):
    made = engine(net(activation, outputs))
    right = made.gradients(X, y, loss=meant).losses
    for name in ("crossentropy", "CE"):
        np.testing.assert_array_equal(made.gradients(X, y, loss=name).losses, right)


def test_crossentropy_fits_each_call_anew():
    made = pj.Engine(net("softmax"))
    for y in (NUMBERS, HOTS, NUMBERS):
        found = made.gradients(X, y, loss="crossentropy").losses
        right = -np.log(net("softmax")(X).numpy()[range(3), NUMBERS])
        np.testing.assert_allclose(found, right, rtol=RTOL)
    with pytest.raises(OutOfRangeError):
        made.gradients(X, NUMBERS + 1, loss="crossentropy")


def test_losses_with_other_options_are_others():
    # Keras leaves delta out of a Huber loss's configuration.
    made, y = engine(net()), 3 * random(3, 3)
    for options in ({"delta": 0.5}, {"delta": 2.0}, {"reduction": "sum"}):
        loss = exact("Huber", **options)
        found = made.gradients(X, y, loss=loss).losses
        right = [loss(y[b : b + 1], net()(X[b : b + 1])) for b in range(3)]
        np.testing.assert_allclose(found, right, rtol=RTOL)


def test_functions_of_the_same_name_are_others():
    made = engine(net())
    for factor in (2.0, 3.0):

        def scaled(y, output):
            return factor * output[:, 0]  # noqa: B023

        found = made.gradients(X, loss=scaled).losses
        np.testing.assert_allclose(found, factor * net()(X)[:, 0], rtol=RTOL)


# --- Functions ------------------------------------------------------------------------------


def test_a_function_of_labels_and_outputs():
    def chosen(y, output):
        return tf.gather(output, y, batch_dims=1) ** 2

    grads = engine(net()).gradients(X, NUMBERS, loss=chosen)
    np.testing.assert_allclose(grads.losses, net()(X).numpy()[range(3), NUMBERS] ** 2, rtol=RTOL)
    agrees(net(), X, NUMBERS, chosen, lambda y, weight, output: chosen(y, output))
    weighted = engine(net()).gradients(X, NUMBERS, loss=chosen, sample_weight=[1.0, 0.0, 2.0])
    np.testing.assert_allclose(weighted.losses, grads.losses * [1.0, 0.0, 2.0], rtol=RTOL)


def test_a_function_without_labels():
    def energy(y, output):
        assert y is None
        return tf.reduce_logsumexp(output, -1)

    agrees(net(), X, X, lambda y, output: tf.reduce_logsumexp(output, -1),
           lambda y, weight, output: tf.reduce_logsumexp(output, -1))  # fmt: skip
    found = engine(net()).gradients(X, loss=energy)
    np.testing.assert_allclose(found.losses, tf.reduce_logsumexp(net()(X), -1), rtol=RTOL)


def test_a_function_of_structured_labels():
    def interval(y, output):
        return tf.reduce_sum(tf.nn.relu(y["low"] - output) + tf.nn.relu(output - y["high"]), -1)

    y = {"low": random(3, 3) - 0.1, "high": random(3, 3) + 0.1}
    agrees(net(), X, y, interval, lambda y, weight, output: interval(y, output))


def test_a_function_that_returns_one_number():
    def averaged(y, output):
        return tf.reduce_mean((y - output) ** 2)

    with pytest.raises(InputError, match=r"'averaged'.*\(B,\)"):
        engine(net()).gradients(X, random(3, 3), loss=averaged)


@pytest.mark.parametrize(
    "mix",
    [
        lambda y, output: tf.nn.softmax(output, 0)[:, 0],
        lambda y, output: output[:, 0] - tf.reduce_mean(output),
        lambda y, output: tf.linalg.diag_part(tf.matmul(output, output[::-1], transpose_b=True)),
        lambda y, output: output[:, 0] * tf.reduce_sum(y),
    ],
    ids=["softmax", "centred", "pairs", "labels"],
)
def test_a_function_that_mixes_examples_is_refused(mix):
    with pytest.raises(ExamplesMeetError):
        engine(net()).gradients(X, random(3, 3), loss=mix)


def test_a_function_of_a_plain_functions_outputs():
    w = tf.Variable(random(4, 2))
    made = pj.Engine(lambda x: tf.tanh(x @ w), variables=[w])
    y = random(3, 2)
    found = made.gradients(X, y, loss="mse")
    output = np.tanh(X @ w.numpy())
    np.testing.assert_allclose(found.losses, np.mean((output - y) ** 2, 1), rtol=RTOL)
    right = np.einsum("bi,bo->bio", X, (output - y) * (1 - output**2))
    np.testing.assert_allclose(found.matrix(), right.reshape(3, -1), rtol=RTOL)


# --- Several heads --------------------------------------------------------------------------

Y = [whole(3, 3), random(3, 2)]
TWO = [exact("SparseCategoricalCrossentropy", from_logits=True), exact("MeanSquaredError")]


def both(weights=(1.0, 1.0)):
    def wanted(y, weight, outputs):
        y = list(y.values()) if isinstance(y, dict) else y
        weight = weight if isinstance(weight, list) else [weight, weight]
        parts = zip(weights, TWO, y, outputs, weight, strict=True)
        return tf.add_n([w * loss(labels, out, own) for w, loss, labels, out, own in parts])

    return wanted


def by_name(pair) -> dict:
    return dict(zip(("cats", "dogs"), pair, strict=True))


@pytest.mark.parametrize("y", [Y, tuple(Y), by_name(Y)], ids=["list", "tuple", "dict"])
@pytest.mark.parametrize("loss", [TWO, by_name(TWO)], ids=["list", "dict"])
def test_several_losses_add_up(loss, y):
    agrees(two_heads(), X, y, loss, both())


@pytest.mark.parametrize(
    "weights", [[0.3, 2.0], (0.3, 2.0), {"cats": 0.3, "dogs": 2}, {"cats": 0.3}, 0.3], ids=str
)
def test_loss_weights_multiply_the_losses_of_their_heads(weights):
    given = {"cats": 1, "dogs": 1} | weights if isinstance(weights, dict) else weights
    each = (0.3, 0.3) if given == 0.3 else tuple(given.values() if weights is not given else given)
    agrees(two_heads(), X, Y, TWO, both(each), loss_weights=weights)


def test_a_loss_weight_of_one_head():
    y = random(3, 3)
    plain = engine(net()).gradients(X, y, loss="mse").losses
    for weights in (0.5, [0.5], {"output": 0.5}):
        found = engine(net()).gradients(X, y, loss="mse", loss_weights=weights).losses
        np.testing.assert_allclose(found, 0.5 * plain, rtol=RTOL)


def test_one_loss_for_all_heads():
    y = [random(3, 3), random(3, 2)]
    right = exact("Huber")

    def wanted(y, weight, outputs):
        return right(y[0], outputs[0]) + right(y[1], outputs[1])

    for loss in ("huber", losses.Huber(), losses.huber):
        agrees(two_heads(), X, y, loss, wanted)


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        ([None, "mse"], Y),
        ([None, "mse"], Y[1:]),
        ({"dogs": "mse"}, Y[1]),
        ({"dogs": "mse"}, {"dogs": Y[1]}),
        ({"cats": None, "dogs": "mse"}, by_name(Y)),
    ],
    ids=["lists", "list of one", "one", "dicts of one", "dicts"],
)
@pytest.mark.filterwarnings("ignore::perjac.errors.DisconnectedWarning")
def test_a_head_without_a_loss_does_not_count(loss, y):
    found = engine(two_heads()).gradients(X, y, loss=loss)
    right = np.mean((two_heads()(X)[1] - Y[1]) ** 2, 1)
    np.testing.assert_allclose(found.losses, right, rtol=RTOL)
    assert not np.any(found["cats/kernel"])
    assert np.all(found.norms() > 0)


@pytest.mark.parametrize("weights", [[[0.5, 0, 2], [1, 3, 0]], [0.5, 0.0, 2.0]], ids=["two", "one"])
def test_weights_of_examples_for_several_heads(weights):
    pair = [np.array(w, "float64") for w in weights] if isinstance(weights[0], list) else None
    given = np.array(weights) if pair is None else pair
    agrees(two_heads(), X, Y, TWO, both(), given)
    if pair:
        agrees(two_heads(), X, Y, TWO, both(), pair)
        found = engine(two_heads()).gradients(X, Y, loss=TWO, sample_weight=by_name(pair))
        right = engine(two_heads()).gradients(X, Y, loss=TWO, sample_weight=pair)
        np.testing.assert_array_equal(found.losses, right.losses)


def test_weights_of_one_head_alone():
    found = engine(two_heads()).gradients(X, Y, loss=TWO, sample_weight={"dogs": np.zeros(3)})
    right = [TWO[0](Y[0][b : b + 1], two_heads()(X)[0][b : b + 1]) for b in range(3)]
    np.testing.assert_allclose(found.losses, right, rtol=RTOL)


def test_a_function_of_all_outputs():
    def together(y, outputs):
        cats, dogs = outputs
        return tf.reduce_sum(cats, 1) * tf.reduce_sum(dogs * y, 1)

    y = random(3, 2)
    agrees(two_heads(), X, y, together, lambda y, weight, outputs: together(y, outputs))
    halved = engine(two_heads()).gradients(X, y, loss=together, loss_weights=0.5)
    plain = engine(two_heads()).gradients(X, y, loss=together)
    np.testing.assert_allclose(halved.losses, 0.5 * plain.losses, rtol=RTOL)
    with pytest.raises(InputError, match="one loss_weights"):
        engine(two_heads()).gradients(X, y, loss=together, loss_weights=[1, 2])
    with pytest.raises(InputError, match="one sample_weight"):
        engine(two_heads()).gradients(X, y, loss=together, sample_weight=by_name(random(2, 3)))


def test_outputs_in_a_dict():
    with floats("float64"):
        x = keras.Input((4,))
        model = keras.Model(x, {"b": layers.Dense(3)(x), "a": layers.Dense(2)(x)})
    y = {"b": random(3, 3), "a": random(3, 2)}
    found = pj.Engine(model).gradients(X, y, loss={"a": "mse", "b": "mae"})
    outputs = model(X)
    right = np.mean((outputs["a"] - y["a"]) ** 2, 1) + np.mean(np.abs(outputs["b"] - y["b"]), 1)
    np.testing.assert_allclose(found.losses, right, rtol=RTOL)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"loss": {"cast": "mse"}, "y": Y}, UnknownNameError, "'cast'.*'cats'"),
        ({"loss": TWO, "y": {"cats": Y[0], "dosg": Y[1]}}, UnknownNameError, "'dosg'.*y.*'dogs'"),
        ({"loss": TWO, "y": {"cats": Y[0]}}, InputError, "nothing for the output 'dogs'"),
        ({"loss": TWO, "y": Y[0]}, InputError, "list or dict.*cats.*dogs"),
        ({"loss": [*TWO, "mse"], "y": Y}, InputError, "loss for 2 outputs.*Received: 3"),
        ({"loss": TWO, "y": [*Y, Y[0]]}, InputError, "y for 2 outputs.*Received: 3"),
        ({"loss": {}, "y": Y}, InputError, "No output has a loss.*cats"),
        ({"loss": [None, None], "y": Y}, InputError, "No output has a loss.*cats"),
        ({"loss": TWO, "y": Y, "loss_weights": [1, 2, 3]}, InputError, "loss_weights for 2"),
        ({"loss": TWO, "y": Y, "loss_weights": {"dgos": 2}}, UnknownNameError, "'dgos'.*'dogs'"),
        (
            {"loss": TWO, "y": Y, "sample_weight": {"dgos": np.ones(3)}},
            UnknownNameError,
            "'dgos'.*sample_weight.*'dogs'",
        ),
    ],
    ids=lambda value: None,
)
def test_what_does_not_fit_the_heads(asked, error, message):
    with pytest.raises(error, match=message):
        engine(two_heads()).gradients(X, **asked)


# --- The compiled loss ----------------------------------------------------------------------


def fresh() -> keras.Model:
    return keras.models.clone_model(net())


def test_the_compiled_loss_is_the_default():
    model, y = fresh(), random(3, 3)
    model.compile(loss="huber")
    found = pj.Engine(model).gradients(X, y)
    right = pj.Engine(model).gradients(X, y, loss="huber")
    np.testing.assert_array_equal(found.losses, right.losses)
    other = pj.Engine(model).gradients(X, y, loss="mse")
    assert not np.allclose(found.losses, other.losses)


def test_the_compiled_losses_and_their_weights():
    model = two_heads()
    model.compile(loss=by_name(TWO), loss_weights=by_name([0.3, 2.0]))
    agrees(model, X, Y, None, both((0.3, 2.0)))
    agrees(model, X, Y, None, both((1.0, 4.0)), loss_weights=[1.0, 4.0])


def test_a_compiled_function_gets_what_keras_gives_it():
    def squares(y, output):
        assert y.dtype == output.dtype
        return (y - output) ** 2

    right = exact("MeanSquaredError")
    for masked in (False, True):
        model, y = tokens(None, masked), whole(5, 3, 4, 3)  # integers
        model.compile(loss=squares)
        agrees(model, IDS, y, None, lambda y, weight, output: right(y, output))


def test_a_compiled_function_for_several_heads_is_each_ones_loss():
    model = two_heads()
    model.compile(loss=lambda y, output: tf.reduce_sum(tf.abs(y - output), -1))
    y = [random(3, 3), random(3, 2)]
    found = engine(model).gradients(X, y)
    right = sum(np.abs(own - out).sum(1) for own, out in zip(y, model(X), strict=True))
    np.testing.assert_allclose(found.losses, right, rtol=RTOL)


def test_a_model_compiled_again():
    model, y = fresh(), random(3, 3)
    made = pj.Engine(model)
    for loss in ("mse", "mae", lambda y, o: tf.abs(y - o) ** 3, lambda y, o: tf.abs(y - o) ** 5):
        model.compile(loss=loss)
        function = losses.get(loss) if isinstance(loss, str) else loss
        right = np.reshape(function(tf.constant(y), model(X)), (3, -1)).mean(1)
        np.testing.assert_allclose(made.gradients(X, y).losses, right, rtol=1e-9)


# --- What does not fit ----------------------------------------------------------------------


def test_no_loss_and_none_compiled():
    with pytest.raises(InputError, match='not compiled.*loss="mse"'):
        pj.Engine(fresh()).gradients(X, random(3, 3))
    w = tf.Variable(random(4, 2))
    with pytest.raises(InputError, match="not compiled"):
        pj.Engine(lambda x: x @ w, variables=[w]).gradients(X, random(3, 2))


@pytest.mark.parametrize(
    ("name", "near"),
    [("mean_squared_eror", "mean_squared_error"), ("MeanSquaredEror", "MeanSquaredError")],
)
def test_an_unknown_loss_brings_the_nearest(name, near):
    with pytest.raises(UnknownNameError, match=f"'{name}'.*'{near}'"):
        engine(net()).gradients(X, random(3, 3), loss=name)


@pytest.mark.parametrize("loss", [3.5, np.ones(3), object()], ids=["number", "array", "object"])
def test_what_is_no_loss(loss):
    with pytest.raises(InputError, match="Expected loss="):
        engine(net()).gradients(X, random(3, 3), loss=loss)


def test_labels_are_needed():
    for loss in ("mse", losses.CategoricalCrossentropy(from_logits=True)):
        with pytest.raises(InputError, match="needs labels: give y"):
            engine(net()).gradients(X, loss=loss)
    with pytest.raises(InputError, match="needs labels: give y"):
        engine(two_heads()).gradients(X, loss=TWO)


@pytest.mark.parametrize("wrong", [3, -1])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
@pytest.mark.parametrize(
    "loss",
    [losses.SparseCategoricalCrossentropy(), losses.CategoricalGeneralizedCrossEntropy()],
    ids=["crossentropy", "generalised"],
)
def test_a_label_out_of_range_is_named(loss, shape, wrong):
    y = np.array([0, 2, wrong]).reshape(shape)
    with pytest.raises(
        OutOfRangeError, match=f"Label {wrong} of example 2.*'output'.*3 classes, 0 to"
    ):
        engine(net("softmax")).gradients(X, y, loss=loss)


def test_a_tokens_label_out_of_range_is_named():
    y = whole(3, 3, 4)
    y[1, 3] = 7
    loss = losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    with pytest.raises(OutOfRangeError, match="Label 7 of example 1"):
        engine(tokens()).gradients(IDS, y, loss=loss)
    y[1, 3] = -1
    engine(tokens()).gradients(IDS, y, loss=loss)
    y[1, 3] = -2
    with pytest.raises(OutOfRangeError, match="Label -2 of example 1"):
        engine(tokens()).gradients(IDS, y, loss=loss)


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        ("mse", (3, 2)),
        ("mse", (3,)),
        ("mse", (3, 3, 3)),
        ("huber", (3,)),
        (losses.CategoricalCrossentropy(from_logits=True), (3,)),
        (losses.CategoricalCrossentropy(from_logits=True), (3, 1)),
        (losses.CategoricalCrossentropy(from_logits=True), (3, 4)),
        (losses.SparseCategoricalCrossentropy(from_logits=True), (3, 3)),
        (losses.BinaryCrossentropy(from_logits=True), (3,)),
    ],
)
def test_labels_of_the_wrong_shape(loss, shape):
    shown = ", ".join(["B", *map(str, shape[1:])])
    with pytest.raises(InputError, match=rf"labels of shape \({shown}\).*output of shape \(B, 3\)"):
        engine(net()).gradients(X, np.zeros(shape), loss=loss)


def test_labels_of_tokens_without_their_axis():
    with pytest.raises(InputError, match=r"labels of shape \(B, 3\).*output of shape \(B, 4, 3\)"):
        engine(tokens()).gradients(IDS, random(3, 3), loss="mse")


def test_another_number_of_labels_than_examples():
    with pytest.raises(InputError, match="one batch size.*3.*'y': 4"):
        engine(net()).gradients(X, random(4, 3), loss="mse")
    with pytest.raises(InputError, match="one batch size.*'sample_weight': 2"):
        engine(net()).gradients(X, random(3, 3), loss="mse", sample_weight=np.ones(2))


def test_labels_that_are_words():
    with pytest.raises(InputError, match="Array 'y' holds text.*classes counted from 0"):
        engine(net()).gradients(X, ["cat", "dog", "cat"], loss="mse")


def test_labels_that_are_not_finite():
    y = random(3, 3)
    y[1, 0] = np.nan
    with pytest.raises(pj.errors.NotFiniteError, match="Array 'y'.*example 1"):
        engine(net()).gradients(X, y, loss="mse")


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        ("sparse_categorical_crossentropy", NUMBERS),
        ("categorical_crossentropy", HOTS),
        ("binary_crossentropy", BINARY),
        (losses.CategoricalFocalCrossentropy(), HOTS),
    ],
)
def test_logits_given_for_probabilities_are_doubted_once(loss, y):
    made = pj.Engine(net())
    with pytest.warns(LossWarning, match="'output' for probabilities.*from_logits=True") as caught:
        made.gradients(X, y, loss=loss)
    assert caught[0].filename == __file__
    made.gradients(X, y, loss=loss)  # a warning would be an error
    made.gradients(X[:2], y[:2], loss=loss)


def test_probabilities_and_what_is_told_to_be_logits_are_not_doubted():
    pj.Engine(net("softmax")).gradients(X, NUMBERS, loss="sparse_categorical_crossentropy")
    pj.Engine(net("sigmoid")).gradients(X, BINARY, loss="binary_crossentropy")
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    pj.Engine(net()).gradients(X, NUMBERS, loss=loss)


# --- Half precision -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "loss"),
    [("mixed_float16", "mse"), ("mixed_bfloat16", "mse"), ("float16", "mse"),
     ("mixed_float16", "callable"), ("float16", "callable"), ("float16", "sparse")],
)  # fmt: skip
def test_half_precision_models_have_losses_in_float32(policy, loss):
    keras.config.set_dtype_policy(policy)
    try:
        model = keras.Sequential([keras.Input((4,)), layers.Dense(5, "tanh"), layers.Dense(3)])
    finally:
        keras.config.set_dtype_policy("float32")
    randomise(model.weights)
    x, y = X.astype("float32"), 1e5 + random(3, 3)  # beyond float16
    given = {
        "mse": "mse",
        "callable": lambda y, output: tf.reduce_mean(tf.square(y - output), -1),
        "sparse": losses.SparseCategoricalCrossentropy(from_logits=True),
    }[loss]
    y = NUMBERS if loss == "sparse" else y
    grads = pj.Engine(model).gradients(x, y, loss=given)
    assert grads.losses.dtype == "float32"
    output = np.asarray(model(x), "float64")
    if loss == "sparse":
        right = np.log(np.exp(output).sum(1)) - output[range(3), NUMBERS]
    else:
        right = np.mean((y - output) ** 2, 1)
    rtol = 1e-2 if policy == "mixed_bfloat16" else 1e-3  # of the outputs
    np.testing.assert_allclose(grads.losses, right, rtol=rtol)
