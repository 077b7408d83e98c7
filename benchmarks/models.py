"""The two networks that the figures in the docs are about, and a batch for them."""

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


MODELS = {"mlp": mlp, "cnn": cnn}


def batch(model: keras.Model, examples: int) -> np.ndarray:
    """Return random images of the shape that the model takes."""
    shape = (examples, *model.input_shape[1:])
    return np.random.default_rng(0).standard_normal(shape).astype("float32")
