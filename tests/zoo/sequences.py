"""Architectures that go step by step: recurrent ones, state spaces and differential equations.

Importing this module enters them into `entry.ENTRIES`.
"""

from __future__ import annotations

import functools

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from models import Floats, Ids

from zoo.entry import enter
from zoo.parts import Learned, vocabulary

WIDTH = 5


def text_reader() -> keras.Model:
    """The columns of an image's features are steps, read both ways."""
    image = keras.Input((8, 8, 1))
    x = layers.Conv2D(3, 3, padding="same", activation="relu")(image)
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(layers.MaxPooling2D((2, 1))(x))
    x = layers.MaxPooling2D(2)(x)
    x = ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (-1, 4, 8))
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    return keras.Model(image, layers.Dense(4, activation="softmax")(x))


enter("architectures", "CRNN", text_reader, Floats((8, 8, 1)), outputs=(0, 6, 15))


def translator() -> keras.Model:
    source, target = keras.Input((5,), dtype="int32"), keras.Input((4,), dtype="int32")
    _, *state = layers.LSTM(WIDTH, return_state=True)(layers.Embedding(6, 4)(source))
    x = layers.Embedding(7, 4)(target)
    x = layers.LSTM(WIDTH, return_sequences=True)(x, initial_state=state)
    return keras.Model([source, target], layers.Dense(7)(x))


enter(
    "architectures",
    "seq2seq: the decoder starts in the encoder's state",
    translator,
    [Ids((5,), below=6), Ids((4,), below=7)],
    outputs=(0, 13, 27),
)


def attentive() -> keras.Model:
    """Additive attention of the last state to all of them."""
    series = keras.Input((6, 3))
    states, last, _ = layers.LSTM(WIDTH, return_sequences=True, return_state=True)(series)
    query = layers.Dense(4, use_bias=False)(last)[:, None]
    scores = layers.Dense(1)(ops.tanh(layers.Dense(4)(states) + query))
    context = ops.sum(ops.softmax(scores, axis=1) * states, axis=1)
    return keras.Model(series, layers.Dense(3)(layers.Concatenate()([context, last])))


enter("architectures", "attention over the states of an LSTM", attentive, Floats((6, 3)))


def tagger() -> keras.Model:
    """Ids of 0 are padding: the GRUs, forth and back, pass over them."""
    ids = keras.Input((6,), dtype="int32")
    x = layers.Embedding(4, WIDTH, mask_zero=True)(ids)
    x = layers.Bidirectional(layers.GRU(4, return_sequences=True))(x)
    return keras.Model(ids, layers.TimeDistributed(layers.Dense(3))(x))


enter(
    "architectures",
    "tagger: GRUs both ways, masked",
    tagger,
    Ids((6,), below=4),
    outputs=(0, 7, 17),
)


def language_model() -> keras.Model:
    ids = keras.Input((5,), dtype="int32")
    words = Learned(vocabulary, table=(7, WIDTH))
    x = words(ids)
    for _ in range(2):
        x = layers.LSTM(WIDTH, return_sequences=True)(x)
    return keras.Model(ids, words(x))


enter(
    "architectures",
    "language model: LSTMs, tied embedding",
    language_model,
    Ids((5,), below=7),
    outputs=(0, 17, 34),
)


def echo_state() -> keras.Model:
    """What enters the reservoir and what is read from it learn; the reservoir does not."""
    series = keras.Input((6, 2))
    x = layers.Dense(3, activation="tanh")(series)
    x = layers.SimpleRNN(6, return_sequences=True, trainable=False)(x)
    return keras.Model(series, layers.Dense(2)(layers.Concatenate()([x[:, -1], x[:, 2]])))


enter("architectures", "echo state: a frozen reservoir", echo_state, Floats((6, 2)))


def scanned(decay, driven):
    """h[t] = decay h[t - 1] + driven[t], all t at once by a tree of pairs."""

    def after(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    decays = decay * ops.ones_like(driven)
    states = ops.associative_scan(after, (decays, driven), axis=1)[1]
    return ops.reshape(states, (-1, *driven.shape[1:]))  # it comes without a shape


def unrolled(decay, driven):
    states = [driven[:, 0]]
    for t in range(1, driven.shape[1]):
        states.append(decay * states[-1] + driven[:, t])
    return ops.stack(states, axis=1)


def state_space(run) -> keras.Model:
    def recur(x, rate, enters, leaves, passes):
        states = run(ops.exp(-ops.softplus(rate)), ops.matmul(x, enters))
        return ops.matmul(states, leaves) + passes * x

    x = series = keras.Input((6, 4))
    for _ in range(2):
        shapes = {"rate": (5,), "enters": (4, 5), "leaves": (5, 4), "passes": (4,)}
        found = Learned(recur, **shapes)(layers.LayerNormalization()(x))
        x = x + ops.gelu(found)
    return keras.Model(series, layers.Dense(2)(x[:, -1]))


for words, run in [("associative scan", scanned), ("unrolled", unrolled)]:
    enter(
        "architectures",
        f"state space, diagonal: {words}",
        functools.partial(state_space, run),
        Floats((6, 4)),
    )


class DifferentialEquation(keras.Model):
    """x' = f(x), followed from 0 to 1 by a method, and read at the end."""

    def __init__(self, follow):
        super().__init__()
        self.follow = follow
        self.hidden = layers.Dense(6, activation="tanh")
        self.slope = layers.Dense(3)
        self.head = layers.Dense(2)

    def call(self, x):
        return self.head(self.follow(lambda x: self.slope(self.hidden(x)), x))


def runge_kutta(f, x, steps: int = 3):
    h = 1 / steps
    for _ in range(steps):
        k1 = f(x)
        k2 = f(x + h / 2 * k1)
        k3 = f(x + h / 2 * k2)
        k4 = f(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def euler(f, x, steps: int = 4):
    return tf.while_loop(
        lambda n, x: n < steps, lambda n, x: (n + 1, x + f(x) / steps), (tf.constant(0), x)
    )[1]


def differential_equation(follow) -> keras.Model:
    model = DifferentialEquation(follow)
    model(np.zeros((1, 3)))
    return model


for words, follow in [("Runge-Kutta in Python", runge_kutta), ("Euler by tf.while_loop", euler)]:
    enter(
        "architectures",
        f"neural ODE: {words}",
        functools.partial(differential_equation, follow),
        Floats((3,)),
    )
