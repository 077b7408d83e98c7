"""The networks that the figures in the docs are about, and a batch for them."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers


def mlp() -> keras.Model:
    """784-256-256-10: 269,322 weights, nearly all in two large matrices."""
    return keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(256, activation="relu"),
            layers.Dense(256, activation="relu"),
            layers.Dense(10),
        ]
    )


def cnn() -> keras.Model:
    """Two convolutions and two dense layers on 28×28×1: 56,714 weights."""
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


def transformer() -> keras.Model:
    """Four blocks of width 256 over 128 tokens of 1,000: 3.4 million weights."""
    ids = keras.Input((128,), dtype="int32")
    x = layers.Embedding(1000, 256)(ids)
    for _ in range(4):
        attended = layers.MultiHeadAttention(num_heads=4, key_dim=64)(x, x)
        x = layers.LayerNormalization()(x + attended)
        hidden = layers.Dense(1024, activation="gelu")(x)
        x = layers.LayerNormalization()(x + layers.Dense(256)(hidden))
    return keras.Model(ids, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


MODELS = {"mlp": mlp, "cnn": cnn, "transformer": transformer}
# Examples in a batch, where it is not the usual 128.
EXAMPLES = {"transformer": 16}


def batch(model: keras.Model, examples: int) -> np.ndarray:
    """Return random images, or tokens, of the shape that the model takes."""
    shape = (examples, *model.input_shape[1:])
    rng = np.random.default_rng(0)
    if model.inputs[0].dtype == "int32":
        return rng.integers(0, 1000, shape).astype("int32")
    return rng.standard_normal(shape).astype("float32")
