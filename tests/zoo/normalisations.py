"""The normalisations of keras.layers, behind and before what learns, and PReLU.

Importing this module enters them into `entry.ENTRIES`.
"""

from __future__ import annotations

import keras
from keras import layers, ops
from models import Floats, Ids

from zoo.stacks import enter_table

SEQUENCE = Floats((4, 3))
IMAGE = Floats((5, 4, 6))
VOLUME = Floats((3, 2, 3, 4))


def after_convolution(kind: type, *arguments, **options):
    """Return a convolution, and this layer, whose input so depends on weights."""
    return lambda x: kind(*arguments, **options)(layers.Conv2D(6, 2)(x))


def after_dense(kind: type, *arguments, **options):
    return lambda x: kind(*arguments, **options)(layers.Dense(4)(x))


def spectral(layer, **options):
    return lambda x: layers.SpectralNormalization(layer(), **options)(x)


def frozen(x):
    norm = layers.BatchNormalization()
    norm.trainable = False
    return norm(layers.Dense(3)(x))


enter_table(
    {
        IMAGE: {
            "batchnormalization": after_convolution(layers.BatchNormalization),
            "batchnormalization without scale": after_convolution(
                layers.BatchNormalization, scale=False
            ),
            "batchnormalization without center": after_convolution(
                layers.BatchNormalization, center=False
            ),
            "batchnormalization of neither": after_convolution(
                layers.BatchNormalization, center=False, scale=False
            ),
            "batchnormalization axis 1": after_convolution(layers.BatchNormalization, axis=1),
            "batchnormalization axis 2": after_convolution(layers.BatchNormalization, axis=2),
            "batchnormalization first": lambda x: layers.Conv2D(2, 2)(
                layers.BatchNormalization()(x)
            ),
            "batchnormalization renorm": after_convolution(layers.BatchNormalization, renorm=True),
            "layernormalization of images": after_convolution(layers.LayerNormalization),
            "layernormalization of three axes": after_convolution(
                layers.LayerNormalization, axis=[1, 2, 3]
            ),
            "layernormalization of two axes": after_convolution(
                layers.LayerNormalization, axis=[1, 3]
            ),
            "layernormalization axis 1": after_convolution(layers.LayerNormalization, axis=1),
            "groupnormalization": after_convolution(layers.GroupNormalization, groups=3),
            "groupnormalization of channels": after_convolution(
                layers.GroupNormalization, groups=-1
            ),
            "groupnormalization one group": after_convolution(layers.GroupNormalization, groups=1),
            "groupnormalization axis 1": after_convolution(
                layers.GroupNormalization, groups=2, axis=1
            ),
            "groupnormalization without scale": after_convolution(
                layers.GroupNormalization, groups=2, scale=False
            ),
            "groupnormalization without center": after_convolution(
                layers.GroupNormalization, groups=2, center=False
            ),
            "rmsnormalization of images": after_convolution(layers.RMSNormalization),
            "unitnormalization of images": after_convolution(layers.UnitNormalization, axis=[1, 2]),
            "prelu": after_convolution(layers.PReLU),
            "prelu shared over pixels": after_convolution(layers.PReLU, shared_axes=[1, 2]),
            "prelu shared over columns": after_convolution(layers.PReLU, shared_axes=[2]),
            "prelu shared over everything": after_convolution(layers.PReLU, shared_axes=[1, 2, 3]),
            "spectralnormalization conv2d": spectral(lambda: layers.Conv2D(3, 2)),
            "spectralnormalization depthwise-like": spectral(lambda: layers.Conv2D(6, 2, groups=6)),
        },
        SEQUENCE: {
            "batchnormalization of sequences": after_dense(layers.BatchNormalization),
            "batchnormalization frozen": frozen,
            "layernormalization": after_dense(layers.LayerNormalization),
            "layernormalization without scale": after_dense(layers.LayerNormalization, scale=False),
            "layernormalization without center": after_dense(
                layers.LayerNormalization, center=False
            ),
            "layernormalization of neither": after_dense(
                layers.LayerNormalization, center=False, scale=False
            ),
            "layernormalization of both axes": after_dense(layers.LayerNormalization, axis=[1, 2]),
            "rmsnormalization": after_dense(layers.RMSNormalization),
            "rmsnormalization of both axes": after_dense(layers.RMSNormalization, axis=[1, 2]),
            "unitnormalization": after_dense(layers.UnitNormalization),
            "unitnormalization between": lambda x: layers.Dense(2)(
                layers.UnitNormalization()(layers.Dense(4)(x))
            ),
            "groupnormalization of sequences": after_dense(layers.GroupNormalization, groups=2),
            "spectralnormalization dense": spectral(lambda: layers.Dense(4)),
            "spectralnormalization two iterations": spectral(
                lambda: layers.Dense(4), power_iterations=2
            ),
            "spectralnormalization einsumdense": spectral(
                lambda: layers.EinsumDense("abc,cde->abde", output_shape=(4, 2, 3))
            ),
            "spectralnormalization conv1d": spectral(lambda: layers.Conv1D(3, 2)),
        },
        VOLUME: {
            "batchnormalization of volumes": lambda x: layers.BatchNormalization()(x),
            "layernormalization of volumes": lambda x: layers.LayerNormalization(axis=[2, -1])(x),
        },
        Ids((5,), below=6): {
            # Of the type of its input is what it gives: integers for integers.
            "spectralnormalization embedding": lambda ids: layers.SpectralNormalization(
                layers.Embedding(6, 3)
            )(ops.cast(ids, keras.config.floatx())),
        },
    }
)
