"""Train with clipped, noisy per-example gradients (DP-SGD) on scikit-learn's digits.

    python examples/dp_sgd.py
    python examples/dp_sgd.py --epochs 20 --noise 0 1 2 4

Each step draws a Poisson sample of the training set, clips every example's gradient to norm C, adds
them up, adds Gaussian noise of standard deviation σC, divides by the expected size of the sample,
and gives that to a Keras optimizer: Abadi et al. 2016, Deep learning with differential privacy,
algorithm 1. It prints the accuracy after each epoch, for several noise multipliers σ.

There is no privacy accounting here. How private a run is, an accountant has to work out, such as
Google's dp-accounting, from what is printed: the noise multiplier σ, the sampling rate q and the
number of steps, with a δ of yours; the clipping norm C does not matter to it. And a release that
has to be private needs noise from a generator made for cryptography, which NumPy's is not.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import time

import keras
import numpy as np
import tensorflow as tf

import perjac as pj


def clipped_sum(engine, x, y, loss, max_norm, physical=64):
    """Return Σ_b g_b · min(1, max_norm / ‖g_b‖), an array for each trainable weight.

    A Poisson sample is of another size each time. It is cut into batches of one size, and the last
    filled up with examples of weight zero, whose gradients are zero: so all is compiled once.
    """
    weights = engine.model.trainable_variables
    total = [np.zeros(v.shape, v.dtype) for v in weights]
    for start in range(0, len(x), physical):
        given = np.arange(start, min(start + physical, len(x)))
        filler = np.zeros(physical - len(given), int)  # the first example, counted zero times
        rows = np.concatenate([given, filler])
        counted = np.arange(physical) < len(given)
        grads = engine.gradients(
            x[rows], y[rows], loss=loss, sample_weight=counted.astype("float32")
        )
        part = grads.clipped_sum(max_norm)
        total = [t + np.asarray(part[v]) for t, v in zip(total, weights, strict=True)]
    return total


def private_gradient(engine, x, y, loss, max_norm, noise_multiplier, expected, rng):
    """Return clipped gradients, added up with noise and divided by the expected batch size."""
    return [
        (s + noise_multiplier * max_norm * rng.standard_normal(s.shape)) / expected
        for s in clipped_sum(engine, x, y, loss, max_norm)
    ]


def train(data, noise_multiplier, *, epochs=12, expected=96, max_norm=1.0, rate=1.0, seed=0):
    """Train a small network and print its accuracy on unseen digits; return that of each epoch."""
    (x, y), (x_test, y_test) = data
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="tanh"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="tanh"),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(rate)
    optimizer.build(model.trainable_variables)
    engine = pj.Engine(model)
    sampling_rate = expected / len(x)
    steps = round(1 / sampling_rate)  # an epoch sees each example once, in expectation
    print(
        f"Noise multiplier {noise_multiplier:g}, sampling rate {sampling_rate:.4f}, "
        f"{epochs * steps} steps, clipping norm {max_norm:g}"
    )
    accuracies = []
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        for _ in range(steps):
            drawn = np.flatnonzero(rng.random(len(x)) < sampling_rate)
            gradient = private_gradient(
                engine, x[drawn], y[drawn], loss, max_norm, noise_multiplier, expected, rng
            )
            optimizer.apply([tf.cast(g, "float32") for g in gradient], model.trainable_variables)
        took = time.perf_counter() - start
        predicted = np.asarray(model(x_test)).argmax(1)
        accuracies.append(float(np.mean(predicted == y_test)))
        print(f"  epoch {epoch:2}: {accuracies[-1]:.1%} of unseen digits right ({took:.1f} s)")
    return accuracies


def digits():
    """Return ((x, y), (x_test, y_test)), shuffled the same way every time."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    x, y = (found.images[order, :, :, None] / 16).astype("float32"), found.target[order]
    return (x[:-360], y[:-360]), (x[-360:], y[-360:])


def main(arguments=None):
    parser = argparse.ArgumentParser(description="DP-SGD with perjac on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--noise", type=float, nargs="+", default=[0, 1, 2, 4])
    options = parser.parse_args(arguments)
    data = digits()
    found = {noise: train(data, noise, epochs=options.epochs) for noise in options.noise}
    print("Accuracy after the last epoch, by noise multiplier:")
    for noise, accuracies in found.items():
        print(f"  {noise:g}: {accuracies[-1]:.1%}")
    return found


if __name__ == "__main__":
    main()
