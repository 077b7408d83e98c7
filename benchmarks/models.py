"""The networks that the figures are about.

Chains of simple layers are written down once, as names and sizes, and every framework builds them
from that; a model that only Keras can say is built by a function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Layers = tuple[tuple[Any, ...], ...]
_GRADIENTS = ("gradients", "gradient_norms", "clipped_sum")


@dataclasses.dataclass(frozen=True)
class Model:
    """A network, and what it is asked.

    Attributes
    ----------
    shape : tuple of int
        Of an example.
    layers : tuple
        ("dense", units), ("conv", filters, size), ("pool", size), ("flatten",), ("relu",),
        ("tanh",), one after another; empty where `build` says it.
    build : callable, optional
        Makes the Keras model.
    examples : int
        In a batch.
    jobs : tuple of str
        Those asked of it; all if empty.
    tokens : int
        How many kinds of token an input of integers has.
    tolerance : float
        How far libraries' answers may be apart, where that is further than a job's own.
    """

    shape: tuple[int, ...]
    layers: Layers = ()
    build: Callable[[], Any] | None = None
    examples: int = 128
    jobs: tuple[str, ...] = ()
    tokens: int = 0
    tolerance: float = 0.0

    def keras(self) -> Any:
        """Build it in Keras."""
        return self.build() if self.build else _chain(self.shape, self.layers)

    def asks(self, job: str) -> bool:
        """Tell whether a job is asked of it."""
        return not self.jobs or job in self.jobs

    def batch(self, examples: int) -> np.ndarray:
        """Return random examples: normal numbers, or tokens."""
        rng, shape = np.random.default_rng(0), (examples, *self.shape)
        if self.tokens:
            return rng.integers(0, self.tokens, shape).astype("int32")
        return rng.standard_normal(shape).astype("float32")


def _chain(shape: tuple[int, ...], chain: Layers) -> Any:
    import keras
    from keras import layers

    make = {
        "dense": layers.Dense,
        "conv": layers.Conv2D,
        "pool": layers.MaxPooling2D,
        "flatten": layers.Flatten,
        "relu": lambda: layers.Activation("relu"),
        "tanh": lambda: layers.Activation("tanh"),
    }
    return keras.Sequential([keras.Input(shape), *(make[kind](*args) for kind, *args in chain)])


def _transformer() -> Any:
    """Four blocks of width 256 over 128 tokens of 1,000: 3.4 million weights."""
    import keras
    from keras import layers

    ids = keras.Input((128,), dtype="int32")
    x = layers.Embedding(1000, 256)(ids)
    for _ in range(4):
        attended = layers.MultiHeadAttention(num_heads=4, key_dim=64)(x, x)
        x = layers.LayerNormalization()(x + attended)
        hidden = layers.Dense(1024, activation="gelu")(x)
        x = layers.LayerNormalization()(x + layers.Dense(256)(hidden))
    return keras.Model(ids, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


def _resnet50() -> Any:
    """ResNet50 for ten classes at 64×64: 23.5 million weights."""
    import keras

    first = keras.config.image_data_format() == "channels_first"
    shape = (3, 64, 64) if first else (64, 64, 3)
    return keras.applications.ResNet50(
        weights=None, input_shape=shape, classes=10, classifier_activation=None
    )


def _lstm() -> Any:
    """One LSTM of 64 over 50 steps of 32 numbers: Keras runs it as a while loop."""
    import keras
    from keras import layers

    return keras.Sequential([keras.Input((50, 32)), layers.LSTM(64), layers.Dense(10)])


_CONVOLUTIONS: Layers = (
    ("conv", 16, 3), ("relu",), ("pool", 2), ("conv", 32, 3), ("relu",), ("pool", 2), ("flatten",),
)  # fmt: skip
MODELS = {
    # 784-256-256-10: 269,322 weights, nearly all in two large matrices.
    "mlp": Model((784,), (("dense", 256), ("relu",), ("dense", 256), ("relu",), ("dense", 10))),
    # 56,714 weights.
    "cnn": Model((28, 28, 1), (*_CONVOLUTIONS, ("dense", 64), ("relu",), ("dense", 10))),
    # Few inputs, many outputs: forward mode's case.
    "regression": Model(
        (8,),
        (("dense", 64), ("tanh",), ("dense", 64), ("tanh",), ("dense", 256)),
        examples=32,
        jobs=("weights", "inputs", "jacobian_norms"),
    ),
    # As many classes as ImageNet has: what goes through every output is dear.
    "classes": Model(
        (28, 28, 1),
        (*_CONVOLUTIONS, ("dense", 64), ("relu",), ("dense", 1000)),
        examples=16,
        jobs=("inputs", *_GRADIENTS, "ggn_diagonal", "kfac"),
    ),
    "transformer": Model(
        (128,), build=_transformer, examples=16, jobs=("weights", *_GRADIENTS), tokens=1000
    ),
    # Of millions of rectifiers, some have an argument of rounding, and are on in one library and
    # off in another: of eight examples seven are 1e-6 off the answer in float64, in JAX and here
    # alike, and one 4e-3.
    "resnet50": Model(
        (64, 64, 3),
        build=_resnet50,
        examples=8,
        jobs=("inputs", *_GRADIENTS),
        tolerance=2e-2,
    ),
    "lstm": Model((50, 32), build=_lstm, examples=32, jobs=("inputs", *_GRADIENTS)),
    # For the harness's own tests.
    "tiny": Model((6,), (("dense", 5), ("tanh",), ("dense", 3)), examples=4),
}
