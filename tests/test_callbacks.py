"""Gradients and saliency in TensorBoard: right, read back from the files, and without a trace."""

import builtins

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import perjac as pj
from perjac.errors import (
    InputError,
    MissingExtraError,
    OutOfRangeError,
    PerjacWarning,
    UnknownNameError,
)
from perjac.saliency import _pictures

pytestmark = pytest.mark.slow  # left out of `make check`

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


def read(folder, kind="gradients"):
    """Return what is in the event files: {tag: {step: array}}."""
    events = EventAccumulator(str(folder / kind), size_guidance={"tensors": 0})
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
            value = LOSS(y[n : n + 1], model(x[n : n + 1], training=False)) + sum(model.losses)
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
    with pytest.raises(MissingExtraError, match=r'pip install "perjac\[tensorboard\]"'):
        pj.callbacks.SaliencyMaps(X)


def images(logged, name, step):
    """Return the pictures logged under a name, (B, height, width, 3) of 0 to 255."""
    return np.stack([tf.io.decode_png(p).numpy() for p in logged[name][step][2:]]).astype(int)


@pytest.mark.parametrize("make", [plain, stateful])
@pytest.mark.parametrize("method", ["gradient", "smoothgrad"])
def test_training_goes_as_without_maps(make, method, tmp_path):
    watched, alone, told = make(), make(), []
    for model in (watched, alone):
        keras.utils.set_random_seed(1)
        maps = pj.callbacks.SaliencyMaps(X, method, "all", tmp_path, every=2, limit=3)
        given = [maps] if model is watched else []
        told.append(model.fit(X, Y, epochs=2, batch_size=16, verbose=0, callbacks=given).history)
    assert told[0] == told[1]
    for one, other in zip(alone.variables, watched.variables, strict=True):
        np.testing.assert_array_equal(one, other)
    assert list(read(tmp_path, "saliency")[f"saliency/{method}"]) == [2, 4, 6]


def test_maps_are_logged_beside_the_inputs(tmp_path):
    model = plain()
    maps = pj.callbacks.SaliencyMaps(X, log_dir=tmp_path, limit=4, channels="sum")
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[maps])
    logged = read(tmp_path, "saliency")
    shown = images(logged, "saliency/gradient", 1)
    att = pj.saliency.gradient(pj.Engine(model), X[:4])
    times = 22  # pixels of 6 x 5, enlarged to 128 at least
    assert shown.shape == (4, 6 * times, 2 * 5 * times + 4, 3)
    assert shown[:, :, 5 * times : 5 * times + 4].min() == 255
    small = shown[:, ::times]
    np.testing.assert_allclose(small[:, :, : 5 * times : times, :1], X[:4] * 255, atol=1)
    values = att.reduce()
    for n in range(4):
        end = _pictures.limit(values[n])
        expected = _pictures.PALETTE[_pictures.numbers(values[n], end)].astype(int)
        found = small[n, :, 5 * times + 4 :: times]
        assert np.abs(found - expected).max() <= 4  # a colour next to it, where rounding falls so
    ends = [_pictures.limit(value) for value in values]
    np.testing.assert_allclose(logged["saliency_scale/gradient"][1], np.mean(ends), rtol=1e-4)
    assert not np.array_equal(images(logged, "saliency/gradient", 0), shown)  # it did learn


def test_maps_of_the_whole_zoo_of_inputs(tmp_path):
    image, row = keras.Input((4, 4, 3), name="image"), keras.Input((7,), name="row")
    volume, steps = keras.Input((3, 4, 4, 1), name="volume"), keras.Input((9, 2), name="steps")
    inputs = [image, row, volume, steps]
    flat = keras.layers.Concatenate()([keras.layers.Flatten()(i) for i in inputs])
    model = keras.Model(inputs, keras.layers.Dense(12)(flat))
    model.compile("sgd", LOSS)
    x = [rng.uniform(size=(5, *i.shape[1:])).astype("f4") for i in inputs]
    y = rng.integers(0, 12, 5)
    maps = pj.callbacks.SaliencyMaps(x, "input_x_gradient", "all", tmp_path, limit=2)
    model.fit(x, y, verbose=0, callbacks=[maps])
    logged = read(tmp_path, "saliency")
    for name in ("image", "row", "volume", "steps"):
        shown = images(logged, f"saliency/input_x_gradient/{name}", 0)
        assert len(shown) == 2
        assert min(shown.shape[1:3]) >= 16
        assert np.ptp(shown) > 100
    assert images(logged, "saliency/input_x_gradient/image", 0).shape[2] == 11 * 128 + 10 * 4


def test_maps_of_words_and_of_logits(tmp_path):
    ids = keras.Input((6,), dtype="int32")
    flat = keras.layers.Flatten()(keras.layers.Embedding(9, 4, name="embed")(ids))
    model = keras.Model(ids, keras.layers.Dense(3, activation="softmax")(flat))
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, y = rng.integers(0, 9, (5, 6)), rng.integers(0, 3, 5)
    maps = pj.callbacks.SaliencyMaps(
        x,
        target=[0, 2, 1, 0, 0],
        log_dir=tmp_path,
        limit=3,
        of="logits",
        wrt=pj.activation("embed"),
    )
    model.fit(x, y, verbose=0, callbacks=[maps])
    att = pj.saliency.gradient(
        pj.Engine(model), x[:3], [0, 2, 1], of="logits", wrt=pj.activation("embed")
    )
    ends = [_pictures.limit(value) for value in np.asarray(att.values)]
    scale = read(tmp_path, "saliency")["saliency_scale/gradient"][0]
    np.testing.assert_allclose(scale, np.mean(ends), rtol=1e-4)


def test_maps_of_a_diverging_model_do_not_stop_training(tmp_path):
    model = plain(keras.optimizers.SGD(np.inf))
    maps = pj.callbacks.SaliencyMaps(X, log_dir=tmp_path)
    with pytest.warns(PerjacWarning, match="Saliency maps are not logged, from step 0 on") as given:
        model.fit(X, Y, epochs=3, verbose=0, callbacks=[maps])
    assert sum(issubclass(w.category, PerjacWarning) for w in given) == 1


def test_maps_that_cannot_be_are_refused_before_training(tmp_path):
    for words, options in {
        "every= as 'epoch'": {"every": 0},
        "limit= as an int of 1": {"limit": 0},
        "Take a batch of it": {"x": tf.data.Dataset.from_tensor_slices(X)},
        "of one number. Received: [3, 8]": {"x": [X, X[:3]]},
        "'abs-max'": {"channels": "none"},
        "Received: 'max'": {"channels": "max"},
        "gradient does not take the option 'stairs'": {"stairs": 3},
    }.items():
        with pytest.raises(InputError) as said:
            pj.callbacks.SaliencyMaps(**{"x": X, "log_dir": tmp_path} | options)
        assert words in str(said.value)
    with pytest.raises(UnknownNameError, match="Nearest: 'gradient'"):
        pj.callbacks.SaliencyMaps(X, "gradints", log_dir=tmp_path)
    model = plain()
    maps = pj.callbacks.SaliencyMaps(X, target=7, log_dir=tmp_path)
    with pytest.raises(OutOfRangeError, match="0 to 2"):
        model.fit(X, Y, verbose=0, callbacks=[maps])
