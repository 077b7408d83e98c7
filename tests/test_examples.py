"""The examples do what they say: their steps are right, and they run."""

import importlib.util
import pathlib

import keras
import numpy as np
import tensorflow as tf

import perjac as pj

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def load(name):
    """Import an example, which is no package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), dtype="float64"),
            keras.layers.Conv2D(3, 3, activation="tanh", dtype="float64"),
            keras.layers.Flatten(dtype="float64"),
            keras.layers.Dense(10, dtype="float64"),
        ]
    )


def clipped_by_hand(model, x, y, max_norm):
    """Clip the gradient of one example after another, by plain tapes."""
    total = [np.zeros(v.shape) for v in model.trainable_variables]
    shares = []
    for n in range(len(x)):
        with tf.GradientTape() as tape:
            # By TensorFlow's own: a Keras loss casts to float32.
            value = tf.nn.sparse_softmax_cross_entropy_with_logits(y[n], model(x[n : n + 1])[0])
        one = [g.numpy() for g in tape.gradient(value, model.trainable_variables)]
        norm = np.sqrt(sum(np.sum(g**2) for g in one))
        shares.append(min(1, max_norm / norm))
        total = [t + g * shares[-1] for t, g in zip(total, one, strict=True)]
    assert min(shares) < 1, "nothing was clipped"
    assert max(shares) == 1, "everything was clipped"
    return total


def test_dp_sgd_clips_as_by_hand():
    example = load("dp_sgd")
    (x, y), _ = example.digits()
    x, y = x[:21].astype("float64"), y[:21]
    model, loss = small_model(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    engine = pj.Engine(model)
    max_norm = float(np.median(engine.gradients(x, y, loss=loss).norms()))
    expected = clipped_by_hand(model, x, y, max_norm)
    for physical in (8, 64):  # with and without whole batches
        found = example.clipped_sum(engine, x, y, loss, max_norm, physical)
        for f, e in zip(found, expected, strict=True):
            np.testing.assert_allclose(f, e, rtol=1e-10, atol=1e-10 * np.abs(e).max())


def test_dp_sgd_adds_noise_of_the_right_size():
    example = load("dp_sgd")
    (x, y), _ = example.digits()
    model, loss = small_model(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    engine, rng = pj.Engine(model), np.random.default_rng(0)
    arguments = engine, x[:5].astype("float64"), y[:5], loss, 0.5
    plain = example.private_gradient(*arguments, 0.0, 10, rng)
    noisy = example.private_gradient(*arguments, 3.0, 10, rng)
    noise = np.concatenate([np.ravel(n - p) for n, p in zip(noisy, plain, strict=True)])
    assert abs(noise.mean()) < 0.02
    np.testing.assert_allclose(noise.std(), 3.0 * 0.5 / 10, rtol=0.05)  # 1120 numbers
    empty = example.private_gradient(engine, x[:0], y[:0], loss, 0.5, 0.0, 10, rng)
    assert not any(np.any(e) for e in empty)


def test_dp_sgd_runs(capsys):
    found = load("dp_sgd").main(["--epochs", "3", "--noise", "0", "2"])
    printed = capsys.readouterr().out
    assert "sampling rate 0.0668, 45 steps" in printed
    assert "Noise multiplier 2" in printed
    assert found[0][-1] > 0.6
    assert len(found[2]) == 3
