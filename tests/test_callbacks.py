"""Gradient statistics in TensorBoard: right, read back from the files, and without a trace."""

import builtins

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import perjac as pj
from perjac.errors import InputError, MissingExtraError, OutOfRangeError, PerjacWarning

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
rng = np.random.default_rng(0)
X, Y = rng.uniform(size=(40, 6, 5, 1)).astype("float32"), rng.integers(0, 3, 40)


def plain(optimizer="sgd", **options):
    """Return a small model."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((6, 5, 1)), keras.layers.Flatten(), keras.layers.Dense(3)]
    model = keras.Sequential(layers)
    model.compile(optimizer, LOSS, **options)
    return model


def stateful():
    """Return a model with all that draws random numbers or keeps a state."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6, 5, 1)),
            keras.layers.Conv2D(3, 3, name="conv"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3, activity_regularizer="l2", name="top"),
        ],
        name="net",
    )
    model.compile("adam", LOSS, metrics=["accuracy"])
    return model


def read(folder):
    """Return what is in the event files: {tag: {step: array}}."""
    events = EventAccumulator(str(folder / "gradients"), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: {e.step: tf.make_ndarray(e.tensor_proto) for e in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
    }


def by_hand(model, x, y):
    """Return the gradient of each example's loss, {layer: (N, P)}, by plain tapes."""
    rows = []
    for n in range(len(x)):
        with tf.GradientTape() as tape:
            value = LOSS(y[n : n + 1], model(x[n : n + 1], training=False))
        rows.append(tape.gradient(value, model.trainable_variables))
    found = {}
    for number, variable in enumerate(model.trainable_variables):
        layer = variable.path.rpartition("/")[0]
        flat = np.array([np.ravel(row[number]) for row in rows], "float64")
        found[layer] = np.concatenate([found[layer], flat], 1) if layer in found else flat
    return found


def ratio(g):
    return np.sum(g.mean(0) ** 2) / np.trace(np.cov(g.T, bias=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two models trained alike, with and without the callback; and its folder."""
    folder = tmp_path_factory.mktemp("logs")
    logger = pj.callbacks.GradientStatistics(X, Y, folder, limit=23, batch_size=10, hardest=4)
    watched, alone = stateful(), stateful()
    keras.utils.set_random_seed(1)
    told = [watched.fit(X, Y, epochs=3, batch_size=16, verbose=0, callbacks=[logger])]
    keras.utils.set_random_seed(1)
    told += [alone.fit(X, Y, epochs=3, batch_size=16, verbose=0)]
    return watched, alone, told, folder


def test_training_goes_as_without(trained):
    watched, alone, told, _ = trained
    assert told[0].history == told[1].history
    for one, other in zip(alone.variables, watched.variables, strict=True):
        np.testing.assert_array_equal(one, other)
    pairs = zip(alone.optimizer.variables, watched.optimizer.variables, strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


def test_statistics_are_those_of_plain_tapes(trained):
    model, _, _, folder = trained
    logged = read(folder)
    gradients = by_hand(model, X[:23], Y[:23])
    everything = np.concatenate(list(gradients.values()), 1)
    norms = np.linalg.norm(everything, axis=1)
    assert logged["gradients/snr"].keys() == {0, 1, 2}
    np.testing.assert_allclose(logged["gradients/snr"][2], ratio(everything), rtol=1e-3)
    for layer, g in gradients.items():
        norm, snr = (logged[f"gradient_{what}/{layer}"][2] for what in ("norm", "snr"))
        np.testing.assert_allclose(norm, np.linalg.norm(g, axis=1).mean(), rtol=1e-4)
        np.testing.assert_allclose(snr, ratio(g), rtol=1e-3)
    histogram = logged["gradients/norms"][2]  # rows of (left, right, count)
    assert histogram[:, 2].sum() == 23
    np.testing.assert_allclose(
        [histogram[0, 0], histogram[-1, 1]], [norms.min(), norms.max()], 1e-4
    )
    table = logged["gradients/hardest"][2][()].decode().splitlines()[2:]
    order = np.argsort(-norms)[:4]
    assert [int(row.split("|")[1]) for row in table] == list(order)
    assert [int(row.split("|")[2]) for row in table] == list(Y[order])
    width, height, *pictures = logged["gradients/hardest_images"][2]
    assert (width, height, len(pictures)) == (b"5", b"6", 4)
    shown = tf.io.decode_png(pictures[0]).numpy() / 255
    np.testing.assert_allclose(shown, X[order[0]], atol=1 / 255)


def test_every_so_many_batches(tmp_path):
    model = plain(steps_per_execution=3)
    logger = pj.callbacks.GradientStatistics(X, Y, tmp_path, every=4, hardest=0)
    for _ in range(2):  # fits
        model.fit(X, Y, epochs=1, batch_size=8, verbose=0, callbacks=[logger])
    logged = read(tmp_path)
    # Keras counts in whole executions: 3 and 6 in each epoch, of five batches.
    assert list(logged["gradients/loss"]) == [6, 9, 12]
    assert "gradients/hardest" not in logged


def test_heads_inputs_and_weights(tmp_path):
    image, number = keras.Input((4, 4, 3), name="image"), keras.Input((2,), name="number")
    flat = keras.layers.Concatenate()([keras.layers.Flatten()(image), number])
    outputs = {n: keras.layers.Dense(k, name=n)(flat) for n, k in (("a", 3), ("b", 1))}
    model = keras.Model([image, number], outputs)
    model.compile("sgd", {"a": LOSS, "b": "mse"})
    x = {"image": rng.integers(0, 256, (9, 4, 4, 3)), "number": rng.normal(size=(9, 2))}
    y = {"a": rng.integers(0, 3, 9), "b": rng.normal(size=(9, 1))}
    weights = {name: np.arange(9.0) for name in "ab"}
    logger = pj.callbacks.GradientStatistics(x, y, tmp_path, sample_weight=weights)
    model.fit(x, y, verbose=0, callbacks=[logger])
    logged = read(tmp_path)
    grads = pj.Engine(model).gradients(x, y, sample_weight=weights)
    np.testing.assert_allclose(logged["gradients/loss"][0], np.mean(grads.losses), rtol=1e-5)
    assert len(logged["gradients/hardest_images"][0]) == 2 + 8
    row = logged["gradients/hardest"][0][()].decode().splitlines()[2]
    assert int(row.split("|")[1]) == int(np.argmax(grads.norms()))


def test_models_that_are_built_by_their_first_batch(tmp_path):
    class Late(keras.Model):
        def __init__(self):
            super().__init__()
            self.top = keras.layers.Dense(3)

        def call(self, x):
            return self.top(keras.ops.reshape(x, (-1, 30)))

    model = Late()
    model.compile("sgd", LOSS)
    logger = pj.callbacks.GradientStatistics(X, list(map(int, Y)), tmp_path)
    model.fit(X, Y, verbose=0, callbacks=[logger])
    assert np.isfinite(read(tmp_path)["gradients/snr"][0])


def test_diverging_does_not_stop_training(tmp_path):
    model = plain(keras.optimizers.SGD(np.inf))
    logger = pj.callbacks.GradientStatistics(X, Y, tmp_path)
    with pytest.warns(PerjacWarning, match="not logged, from step 0 on") as given:
        model.fit(X, Y, epochs=3, verbose=0, callbacks=[logger])
    assert sum(issubclass(w.category, PerjacWarning) for w in given) == 1


def test_alike_gradients_have_an_infinite_ratio(tmp_path):
    logger = pj.callbacks.GradientStatistics(X[[0] * 5], Y[[0] * 5], tmp_path)
    plain().fit(X, Y, verbose=0, callbacks=[logger])
    assert read(tmp_path)["gradients/snr"][0] == np.inf


def test_what_does_not_fit_is_said_before_training(tmp_path):
    for words, options in {
        "'x': [40], 'y': [3]": {"y": Y[:3]},
        "two at least": {"x": X[:1], "y": Y[:1]},
        "every= as 'epoch' or a number of batches. Received: 0": {"every": 0},
        "limit= as an int of 1 or more": {"limit": None},
        "hardest= as an int of 0 or more": {"hardest": -1},
        "Take a batch of it": {"x": tf.data.Dataset.from_tensor_slices(X)},
    }.items():
        with pytest.raises(InputError) as said:
            pj.callbacks.GradientStatistics(**{"x": X, "y": Y, "log_dir": tmp_path} | options)
        assert words in str(said.value)
    model = plain()
    before = model.get_weights()
    logger = pj.callbacks.GradientStatistics(X, Y + 1, tmp_path)
    with pytest.raises(OutOfRangeError, match="3 classes"):
        model.fit(X, Y, verbose=0, callbacks=[logger])
    assert all(np.array_equal(b, a) for b, a in zip(before, model.get_weights(), strict=True))


def test_without_tensorboard_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name == "tensorboard":
            raise ImportError("No module named 'tensorboard'", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtraError, match=r'pip install "perjac\[tensorboard\]"'):
        pj.callbacks.GradientStatistics(X, Y)
