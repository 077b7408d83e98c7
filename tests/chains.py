"""Small models as chains of layers, and how each kernel's layer reads its input: for KFAC's tests.

Nothing here knows perjac.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
from keras import layers
from models import floats, randomise

BATCH = 5


@dataclasses.dataclass
class Chain:
    """Layers one after another, and how a layer's input is read as a (B, T, G, I)."""

    shape: tuple[int, ...]
    build: Callable[[], list[layers.Layer]]
    columns: dict[int, Callable[[np.ndarray], np.ndarray]]
    ids: bool = False


def flat_positions(x: np.ndarray) -> np.ndarray:
    """Read a dense layer's input: all axes but the last are positions."""
    return x.reshape(len(x), -1, 1, x.shape[-1])


def windows(size: int, stride: int, pads: tuple[int, int], groups: int = 1, deep: bool = False):
    """Cut out what each output position of a convolution sees, group by group."""

    def read(x: np.ndarray) -> np.ndarray:
        x = np.pad(x, [(0, 0), pads, pads, (0, 0)])
        found = []
        for top in range(0, x.shape[1] - size + 1, stride):
            for left in range(0, x.shape[2] - size + 1, stride):
                seen = x[:, top : top + size, left : left + size]
                parts = np.split(seen, x.shape[-1] if deep else groups, -1)
                found.append(np.stack([part.reshape(len(x), -1) for part in parts], 1))
        return np.stack(found, 1)

    return read


def one_hot(size: int):
    return lambda ids: np.eye(size)[ids].reshape(len(ids), -1, 1, size)


CHAINS = {
    "dense": Chain(
        (4,),
        lambda: [layers.Dense(5), layers.Activation("tanh"), layers.Dense(3)],
        {0: flat_positions, 2: flat_positions},
    ),
    "dense_on_sequences": Chain(
        (4, 3),
        lambda: [
            layers.Dense(5),
            layers.Activation("tanh"),
            layers.Dense(3, use_bias=False),
            layers.GlobalAveragePooling1D(),
        ],
        {0: flat_positions, 2: flat_positions},
    ),
    "conv": Chain(
        (7, 7, 2),
        lambda: [
            layers.Conv2D(4, 3, strides=2, padding="same"),
            layers.Activation("tanh"),
            layers.Conv2D(3, 2),
            layers.Flatten(),
            layers.Dense(2),
        ],
        {0: windows(3, 2, (1, 1)), 2: windows(2, 1, (0, 0)), 4: flat_positions},
    ),
    "conv_grouped": Chain(
        (5, 5, 4),
        lambda: [
            layers.Conv2D(6, 3, groups=2),
            layers.Activation("tanh"),
            layers.GlobalMaxPooling2D(),
        ],
        {0: windows(3, 1, (0, 0), groups=2)},
    ),
    "conv_depthwise": Chain(
        (5, 5, 3),
        lambda: [
            layers.DepthwiseConv2D(3, depth_multiplier=2),
            layers.Activation("tanh"),
            layers.GlobalAveragePooling2D(),
        ],
        {0: windows(3, 1, (0, 0), deep=True)},
    ),
    "embedding": Chain(
        (4,),
        lambda: [
            layers.Embedding(7, 3),
            layers.Activation("tanh"),
            layers.Flatten(),
            layers.Dense(3),
        ],
        {0: one_hot(7), 3: flat_positions},
        ids=True,
    ),
}


@functools.cache
def made(name: str):
    """Return a chain's model with a batch for it, in float64."""
    chain = CHAINS[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, *chain.shape))
    if chain.ids:
        x = rng.integers(0, 7, (BATCH, *chain.shape)).astype("int32")
    with floats("float64"):
        given = keras.Input(chain.shape, dtype="int32" if chain.ids else "float64")
        stack, out = chain.build(), given
        for layer in stack:
            out = layer(out)
        model = keras.Model(given, out)
    randomise(model.weights)
    return model, stack, x
