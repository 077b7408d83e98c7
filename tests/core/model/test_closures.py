"""Losses that close over values: kept while those are the same, and over no batch's rows."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import perjac as pj
from perjac._core.model.closures import identity
from perjac.errors import InputError

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(6, 4)).astype("float32"), RNG.normal(size=(6, 2)).astype("float32")
ROWS = RNG.normal(size=6).astype("float32")
scale = 1.0


@functools.cache
def engine() -> pj.Engine:
    keras.utils.set_random_seed(0)
    return pj.Engine(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))


def plain(y, output):
    return tf.reduce_mean((y - output) ** 2, -1)


def helper(loss):
    return scale * loss


def by_a_global(y, output):
    return helper(plain(y, output))


class Trainer:
    def __init__(self):
        self.beta, self.model = 1.0, engine().model

    def factor(self):
        return self.beta

    def loss(self, y, output):
        return self.factor() * plain(y, output)

    def __call__(self, y, output):
        return self.beta * plain(y, output)


class OfKeras(keras.losses.Loss):
    def __init__(self):
        super().__init__()
        self.beta = 1.0

    def call(self, y, output):
        return self.beta * plain(y, output)


def global_scale():
    def change(value):
        globals()["scale"] = value

    return by_a_global, change


def in_a_cell():
    kept = 1.0

    def change(value):
        nonlocal kept
        kept = value

    return lambda y, output: kept * plain(y, output), change


def in_an_array():
    kept = np.ones(1, "float32")

    def change(value):
        kept[0] = value

    return lambda y, output: kept * plain(y, output), change


def in_a_list_of_dicts():
    kept = [{"beta": 1.0}]
    return lambda y, output: kept[0]["beta"] * plain(y, output), lambda v: kept[0].update(beta=v)


def attribute(trainer, loss):
    return loss, functools.partial(setattr, trainer, "beta")


def in_a_variable():
    kept = tf.Variable(1.0)
    return lambda y, output: kept * plain(y, output), kept.assign


def of_an_object():
    trainer = Trainer()
    return attribute(trainer, trainer.loss)


def of_a_captured_object():
    trainer = Trainer()
    return attribute(trainer, lambda y, output: trainer(y, output))


def of_a_callable_object():
    trainer = Trainer()
    return attribute(trainer, trainer)


def of_a_keras_loss():
    loss = OfKeras()
    return attribute(loss, loss)


CHANGING = [
    global_scale, in_a_cell, in_an_array, in_a_list_of_dicts, in_a_variable,
    of_an_object, of_a_captured_object, of_a_callable_object, of_a_keras_loss,
]  # fmt: skip


@pytest.mark.parametrize("made", CHANGING)
def test_a_value_that_changes_is_seen(made):
    loss, change = made()
    change(1.0)
    before = np.asarray(engine().gradients(X, Y, loss=loss).losses)
    np.testing.assert_allclose(before, plain(Y, engine().model(X)), rtol=1e-5)
    change(3.0)
    grads = engine().gradients(X, Y, loss=loss)
    np.testing.assert_allclose(grads.losses, 3 * before, rtol=1e-5)
    change(1.0)


def test_functions_of_the_same_values_are_traced_once():
    def made(factor):
        return lambda y, output: factor * plain(y, output)

    assert identity(made(2.0)) == identity(made(2.0)) != identity(made(3.0))
    assert identity(lambda y: y) != identity(lambda y: y + 1)
    kept = tf.constant(2.0)
    assert identity(made(kept)) == identity(made(kept)) != identity(made(tf.constant(2.0)))
    big = np.ones(1000)
    same = identity(made(big))
    big[7] = 2
    assert identity(made(big)) != same
    assert identity(functools.partial(plain, 1)) != identity(functools.partial(plain, 2))
    assert identity(made(True)) != identity(made(1))


def recursive(n):
    return n and recursive(n - 1)


def test_what_refers_to_itself_is_read_once():
    assert identity(recursive) == identity(recursive)


REFUSED = {
    "weights": lambda y, output: ROWS * plain(y, output),
    "weights_of_a_variable": lambda y, output: tf.constant(ROWS) * plain(y, output),
    "weights_of_positions": lambda y, output: tf.reduce_mean(ROWS[:, None] * (y - output) ** 2, -1),
    "a_choice": lambda y, output: tf.where(ROWS > 0, plain(y, output), 0.0),
    "labels": lambda y, output: plain(Y, output),
    "behind_a_reshape": lambda y, output: tf.reshape(ROWS * plain(y, output), tf.shape(y)[:1]),
    "an_axis_more": lambda y, output: tf.reduce_sum(tf.concat([output, Y], -1), -1),
    "a_function": tf.function(lambda y, output: ROWS * plain(y, output)),
    "nothing_else": lambda y, output: tf.constant(ROWS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_of_one_batch_are_refused(name):
    with pytest.raises(InputError, match="sample_weight="):
        engine().gradients(X, Y, loss=REFUSED[name])


def test_what_a_loss_may_close_over():
    of_classes, one = np.array([0.5, 2.0], "float32"), np.array([3.0], "float32")
    wide = engine().gradients(X, Y, loss=lambda y, output: one * plain(y, of_classes * output))
    want = 3 * np.mean((Y - of_classes * np.asarray(engine().model(X))) ** 2, -1)
    np.testing.assert_allclose(wide.losses, want, rtol=1e-5)
    table = np.ones((6, 6), "float32")  # as long as the batch, along other axes
    ids = np.arange(6) % 3
    found = engine().gradients(X, ids, loss=lambda y, out: tf.gather(table, y)[:, 0] * out[:, 0])
    np.testing.assert_allclose(found.losses, engine().model(X)[:, 0], rtol=1e-5)


def test_rows_go_with_the_labels():
    def loss(y, output):
        labels, advantage = y
        return advantage * plain(labels, output)

    found = engine().gradients(X, (Y, ROWS), loss=loss)
    want = engine().gradients(X, Y, loss=plain, sample_weight=ROWS)
    np.testing.assert_allclose(found.losses, want.losses, rtol=1e-5)
    np.testing.assert_allclose(found.norms(), want.norms(), rtol=1e-5)
