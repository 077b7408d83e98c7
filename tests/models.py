"""The models that the tests run over: a builder each, and weights that hide nothing.

A builder makes its model in Keras's current float type, so that one builder serves float32 and
float64. `MODELS` maps names to cases; nothing here knows perjac.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops


@dataclasses.dataclass(frozen=True)
class Floats:
    """An input of standard normal numbers: the shape of one example."""

    shape: tuple[int, ...]

    def draw(self, rng: np.random.Generator, batch: int, dtype: str) -> np.ndarray:
        return rng.standard_normal((batch, *self.shape)).astype("float32").astype(dtype)


@dataclasses.dataclass(frozen=True)
class Ids:
    """An input of integers below `below`: the shape of one example. Ids repeat within it."""

    shape: tuple[int, ...]
    below: int

    def draw(self, rng: np.random.Generator, batch: int, dtype: str) -> np.ndarray:
        return rng.integers(0, self.below, (batch, *self.shape)).astype("int32")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to test, no weight of which may take the tape path: how it is built, what it eats."""

    name: str
    build: Callable[[], Any]  # a keras.Model, a tf.Module, or (function, variables)
    example: Any  # Floats or Ids, nested like the model's input
    outputs: tuple[int, ...] | None  # the few outputs to look at where all would be dear
    slow: bool

    def make(self, dtype: str = "float64", batch: int = 3) -> Subject:
        """Build the model and draw a batch for it; every float type gets the same numbers."""
        with floats(dtype):
            subject = Subject.of(self.build())
        randomise(subject.weights)
        rng = np.random.default_rng(1)
        subject.x = tf.nest.map_structure(lambda leaf: leaf.draw(rng, batch, dtype), self.example)
        return subject


@dataclasses.dataclass
class Subject:
    """A built model: what an engine takes, and what the oracle needs to know of it."""

    target: Any  # what a user would hand to the engine
    call: Callable[[Any], Any]  # a batch in, the output out, as at inference
    trainable: list[Any]
    weights: list[Any]  # the frozen ones too
    options: dict[str, Any]  # what the engine must be told besides
    x: Any = None

    @classmethod
    def of(cls, built: Any) -> Subject:
        if isinstance(built, keras.Model):
            call = functools.partial(built, training=False)
            return cls(built, call, built.trainable_variables, built.weights, {})
        if isinstance(built, tf.Module):
            return cls(built, built, list(built.trainable_variables), list(built.variables), {})
        fn, variables = built
        return cls(fn, fn, variables, variables, {"variables": variables})


@contextlib.contextmanager
def floats(dtype: str) -> Iterator[None]:
    """Make `dtype` Keras's float type, for layers and for constants, and put the old one back."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


def randomise(weights: list[Any], seed: int = 0) -> None:
    """Give every weight values that hide nothing: no zeros, no ones, and of a sane size.

    The values are exact in float32, so that a float32 and a float64 model can share them.
    """
    rng = np.random.default_rng(seed)
    for weight in weights:
        if not tf.as_dtype(weight.dtype).is_floating:
            continue  # the state of a random generator, a counter
        shape, name = tuple(weight.shape), weight.name
        if any(part in name for part in ("gamma", "variance", "alpha")):
            values = rng.uniform(0.5, 1.5, shape)
        elif len(shape) < 2:
            values = 0.3 * rng.standard_normal(shape)
        else:
            fan_in = math.prod(shape[:2] if "depthwise" in name else shape[:-1])
            values = rng.standard_normal(shape) * math.sqrt(2 / fan_in)
        weight.assign(values.astype("float32"))


MODELS: dict[str, Case] = {}


def case(example: Any, *, outputs=None, slow: bool = False):
    """Enter the decorated builder into MODELS under its own name."""

    def enter(build: Callable[[], Any]) -> Callable[[], Any]:
        MODELS[build.__name__] = Case(build.__name__, build, example, outputs, slow)
        return build

    return enter


def variable(*shape: int) -> tf.Variable:
    return tf.Variable(tf.zeros(shape, keras.config.floatx()))


@case(Floats((8,)))
def seed():
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(12, activation="relu"),
            layers.Dense(8, activation="relu"),
            layers.Dense(1, activation="sigmoid"),
        ]
    )


@case(Floats((6,)))
def mlp():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(7, activation="gelu"),
            layers.Dropout(0.5),
            layers.Dense(5, activation="tanh", use_bias=False),
            layers.Dense(4),
        ]
    )


@case(Floats((28, 28, 1)), outputs=(0, 4, 9))
def lenet():
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(6, 5, padding="same", activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Conv2D(16, 5, activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(120, activation="tanh"),
            layers.Dense(84, activation="tanh"),
            layers.Dense(10, activation="softmax"),
        ]
    )


@case(Floats((784,)), outputs=(2, 7))
def mlp_784():
    return keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(256, activation="relu"),
            layers.Dense(256, activation="relu"),
            layers.Dense(10),
        ]
    )


@case(Floats((28, 28, 1)), outputs=(1, 8))
def cnn():
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


@case(Floats((64, 64, 3)), outputs=(2,), slow=True)
def mobilenet_v2():
    return keras.applications.MobileNetV2(
        input_shape=(64, 64, 3), weights=None, classes=3, classifier_activation=None
    )


@case(Floats((64, 64, 3)), outputs=(1,), slow=True)
def resnet50():
    return keras.applications.ResNet50(
        input_shape=(64, 64, 3), weights=None, classes=3, classifier_activation=None
    )


class Positions(layers.Layer):
    """Adds an embedding of the position, looked up by a constant range."""

    def build(self, shape):
        self.embedding = layers.Embedding(shape[1], shape[2], name="table")
        self.embedding.build(None)

    def call(self, x):
        return x + self.embedding(ops.arange(x.shape[1]))


def encoder(x, blocks: int, width: int):
    for _ in range(blocks):
        attended = layers.MultiHeadAttention(num_heads=2, key_dim=width // 2)(x, x)
        x = layers.LayerNormalization()(x + attended)
        hidden = layers.Dense(2 * width, activation="gelu")(x)
        x = layers.LayerNormalization()(x + layers.Dense(width)(hidden))
    return x


@case(Ids((5,), below=9))
def transformer():
    ids = keras.Input((5,), dtype="int32")
    x = Positions(name="positions")(layers.Embedding(9, 8)(ids))
    x = layers.GlobalAveragePooling1D()(encoder(x, blocks=2, width=8))
    return keras.Model(ids, layers.Dense(3)(x))


@case(Ids((4,), below=6))
def transformer_per_token():
    ids = keras.Input((4,), dtype="int32")
    x = Positions(name="positions")(layers.Embedding(6, 4)(ids))
    return keras.Model(ids, layers.Dense(2)(encoder(x, blocks=2, width=4)))


class TiedLanguageModel(keras.Model):
    """The embedding table is also, transposed, the projection onto the vocabulary."""

    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(7, 5)
        self.hidden = layers.Dense(5, activation="tanh")

    def call(self, ids):
        hidden = self.hidden(self.embedding(ids))
        return ops.matmul(hidden[:, -1], ops.transpose(self.embedding.embeddings))


@case(Ids((4,), below=7))
def tied_embedding():
    model = TiedLanguageModel()
    model(np.zeros((1, 4), "int32"))
    return model


@case([Floats((4,)), Floats((4,))])
def shared_dense():
    left, right = keras.Input((4,)), keras.Input((4,))
    shared = layers.Dense(6, activation="tanh", name="shared")
    return keras.Model([left, right], layers.Dense(2)(shared(left) * shared(right) + shared(left)))
