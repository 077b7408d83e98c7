"""Every layer of keras.layers that has weights of its own, with the options that matter.

Importing this module enters them into `entry.ENTRIES`.
"""

from __future__ import annotations

import inspect

import keras
from keras import layers
from models import Floats, Ids

from zoo.stacks import enter_table

VECTOR = Floats((4,))
SEQUENCE = Floats((9, 3))
CHANNELS_BEFORE_TIME = Floats((3, 9))
IMAGE = Floats((7, 6, 4))
CHANNELS_BEFORE_IMAGE = Floats((4, 7, 6))
SMALL_IMAGE = Floats((4, 3, 3))
VOLUME = Floats((4, 5, 4, 2))
CHANNELS_BEFORE_VOLUME = Floats((2, 4, 5, 4))
IDS = Ids((5,), below=7)
FIRST = "channels_first"

# No functions of a tensor alone; other names of one; entered below by themselves.
NOT_HERE = (
    *("deserialize", "get", "serialize", "hard_swish", "swish"),
    *("glu", "threshold", "sparsemax"),
)
ACTIVATIONS = [
    name
    for name, thing in vars(keras.activations).items()
    if inspect.isfunction(thing) and name not in NOT_HERE
]


def activated(name: str):
    return lambda x: layers.Dense(4, activation=name)(x)


def einsum(equation: str, output, bias: str | None = None):
    return lambda x: layers.EinsumDense(equation, output_shape=output, bias_axes=bias)(x)


enter_table(
    {
        VECTOR: {
            **{f"dense {name}": activated(name) for name in ACTIVATIONS},
            "dense glu": lambda x: keras.activations.glu(layers.Dense(4)(x)),
            # Of logits far apart it is one-hot, and its derivative zero.
            "dense sparsemax": lambda x: layers.Activation("sparsemax")(0.1 * layers.Dense(4)(x)),
            "dense threshold": lambda x: keras.activations.threshold(layers.Dense(4)(x), 0.1, -1),
            "dense without bias": lambda x: layers.Dense(3, use_bias=False)(x),
            "dense to one unit": lambda x: layers.Dense(1)(x),
            "dense twice": lambda x: layers.Dense(3)(layers.Dense(5, activation="tanh")(x)),
            "einsumdense matrix": einsum("ab,bc->ac", 3, "c"),
            "einsumdense transposed kernel": einsum("ab,cb->ac", 3, "c"),
            "einsumdense heads from a vector": einsum("ab,bcd->acd", (2, 3), "cd"),
            "einsumdense scale": einsum("ab,b->ab", 4),
            "einsumdense inner product": einsum("ab,b->a", ()),
            "einsumdense outer product": einsum("ab,c->abc", (4, 3), "c"),
            "prelu of a vector": lambda x: layers.PReLU()(x),
            "batchnormalization of a vector": lambda x: layers.BatchNormalization()(x),
        },
        Floats((4, 3)): {
            "dense on sequences": lambda x: layers.Dense(2)(x),
            "einsumdense projection": einsum("abc,cd->abd", (4, 2), "d"),
            "einsumdense ellipsis": einsum("...x,xy->...y", 2, "y"),
            "einsumdense without bias": einsum("abc,cd->abd", (4, 2)),
            "einsumdense bias of two axes": einsum("abc,cd->abd", (4, 2), "bd"),
            "einsumdense bias of time": einsum("abc,cd->abd", (4, 2), "b"),
            "einsumdense output transposed": einsum("abc,cd->adb", (2, 4), "d"),
            "einsumdense heads": einsum("abc,cde->abde", (4, 2, 3), "de"),
            "einsumdense heads in front": einsum("abc,cde->adbe", (2, 4, 3), "de"),
            "einsumdense over time": einsum("abc,bd->adc", (2, 3), "d"),
            "einsumdense for each position": einsum("abc,bcd->abd", (4, 2), "bd"),
            "einsumdense for each channel": einsum("abc,bcd->acd", (3, 2), "cd"),
            "einsumdense everything": einsum("abc,bcd->ad", 2, "d"),
            "einsumdense sums an axis": einsum("abc,cd->ad", 2, "d"),
            "einsumdense scale of channels": einsum("abc,c->abc", (4, 3), "c"),
            "einsumdense scale of everything": einsum("abc,bc->abc", (4, 3)),
            "einsumdense of any length": lambda x: layers.GlobalAveragePooling1D()(
                layers.EinsumDense("abc,cd->abd", output_shape=(None, 2), bias_axes="d")(x)
            ),
        },
        Floats((3, 2, 4)): {
            "dense on images": lambda x: layers.Dense(2)(x),
            "einsumdense merge of heads": einsum("abcd,cde->abe", (3, 3), "e"),
            "einsumdense block diagonal": einsum("abcd,cde->abce", (3, 2, 3), "ce"),
            "einsumdense ellipsis in front": einsum("...cd,cde->...e", 3, "e"),
            "einsumdense ellipsis behind": einsum("ab...,bc->ac...", 2, "c"),
        },
        IDS: {
            "embedding": lambda ids: layers.Embedding(7, 3)(ids),
            "embedding mask_zero": lambda ids: layers.GlobalAveragePooling1D()(
                layers.Embedding(7, 3, mask_zero=True)(ids)
            ),
            "embedding of more rows than ids": lambda ids: layers.Embedding(20, 2)(ids),
        },
        Ids((), below=5): {"embedding of one id": lambda ids: layers.Embedding(5, 3)(ids)},
        Ids((2, 3), below=5): {"embedding of a grid": lambda ids: layers.Embedding(5, 3)(ids)},
    }
)


def there_and_back(**options):
    def function(ids):
        table = layers.ReversibleEmbedding(7, 3, **options)
        return table(layers.Dense(3, activation="tanh")(table(ids)), reverse=True)

    return function


enter_table(
    {
        IDS: {
            "reversibleembedding tied": there_and_back(),
            "reversibleembedding untied": there_and_back(tie_weights=False),
            "reversibleembedding mask_zero": there_and_back(mask_zero=True),
            "reversibleembedding soft cap": there_and_back(logit_soft_cap=1.5),
            "reversibleembedding forwards only": lambda x: layers.ReversibleEmbedding(7, 3)(x),
        },
        Floats((4, 3)): {
            "reversibleembedding backwards only": lambda x: layers.ReversibleEmbedding(5, 3)(
                x, reverse=True
            ),
        },
    }
)


# TensorFlow's CPU runs channels_first only where Keras asks XLA to, or transposes: not the plain
# convolutions of one and two axes, nor any transposed one. Nor does it dilate a transposed one.
def of(kind: type, *arguments, **options):
    """Return for a table what puts a new layer of this kind on the input."""
    return lambda x: kind(*arguments, **options)(x)


enter_table(
    {
        SEQUENCE: {
            "conv1d": of(layers.Conv1D, 4, 3),
            "conv1d same strided": of(layers.Conv1D, 4, 3, strides=2, padding="same"),
            "conv1d causal dilated": of(layers.Conv1D, 4, 3, padding="causal", dilation_rate=2),
            "conv1d valid dilated": of(layers.Conv1D, 2, 2, dilation_rate=3),
            "conv1d pointwise": of(layers.Conv1D, 4, 1, use_bias=False),
            "conv1d grouped": of(layers.Conv1D, 6, 3, groups=3, strides=2),
            "conv1d grouped dilated": of(layers.Conv1D, 3, 2, groups=3, dilation_rate=2),
            "conv1dtranspose": of(layers.Conv1DTranspose, 2, 3),
            "conv1dtranspose same strided": of(
                layers.Conv1DTranspose, 2, 3, strides=2, padding="same"
            ),
            "conv1dtranspose output_padding": of(
                layers.Conv1DTranspose, 2, 3, strides=3, output_padding=1
            ),
            "depthwiseconv1d": of(layers.DepthwiseConv1D, 3),
            "depthwiseconv1d same strided multiplied": of(
                layers.DepthwiseConv1D, 3, strides=2, padding="same", depth_multiplier=2
            ),
            "depthwiseconv1d dilated": of(layers.DepthwiseConv1D, 2, dilation_rate=2),
            "depthwiseconv1d strided and dilated": of(
                layers.DepthwiseConv1D, 2, strides=2, dilation_rate=2, padding="same"
            ),
            "separableconv1d": of(layers.SeparableConv1D, 4, 3),
            "separableconv1d same strided multiplied": of(
                layers.SeparableConv1D, 2, 3, strides=2, padding="same", depth_multiplier=2
            ),
            "separableconv1d dilated": of(layers.SeparableConv1D, 2, 3, dilation_rate=2),
        },
        CHANNELS_BEFORE_TIME: {
            "conv1d channels_first grouped": of(layers.Conv1D, 3, 3, groups=3, data_format=FIRST),
            "depthwiseconv1d channels_first": of(layers.DepthwiseConv1D, 3, data_format=FIRST),
            "separableconv1d channels_first": of(layers.SeparableConv1D, 2, 3, data_format=FIRST),
        },
        IMAGE: {
            "conv2d": of(layers.Conv2D, 3, (3, 2)),
            "conv2d same": of(layers.Conv2D, 3, 3, padding="same"),
            "conv2d strided valid": of(layers.Conv2D, 3, (3, 2), strides=(2, 1)),
            "conv2d strided same": of(layers.Conv2D, 3, 3, strides=2, padding="same"),
            "conv2d strides larger than kernel": of(layers.Conv2D, 3, 2, strides=3),
            "conv2d dilated same": of(layers.Conv2D, 3, 3, dilation_rate=(2, 3), padding="same"),
            "conv2d dilated valid": of(layers.Conv2D, 3, 2, dilation_rate=2, use_bias=False),
            "conv2d pointwise": of(layers.Conv2D, 3, 1),
            "conv2d pointwise strided": of(layers.Conv2D, 3, 1, strides=2, use_bias=False),
            "conv2d of the whole image": of(layers.Conv2D, 3, (7, 6)),
            "conv2d even kernel same": of(layers.Conv2D, 3, (2, 4), padding="same"),
            "conv2d grouped": of(layers.Conv2D, 6, 3, groups=2),
            "conv2d grouped same strided": of(
                layers.Conv2D, 4, 3, groups=2, strides=2, padding="same"
            ),
            "conv2d grouped dilated": of(layers.Conv2D, 4, 2, groups=2, dilation_rate=2),
            "conv2d a group for each channel": of(layers.Conv2D, 8, 3, groups=4),
            "conv2d relu": of(layers.Conv2D, 3, 3, activation="relu"),
            "depthwiseconv2d": of(layers.DepthwiseConv2D, (3, 2)),
            "depthwiseconv2d same strided multiplied": of(
                layers.DepthwiseConv2D, 3, strides=2, padding="same", depth_multiplier=2
            ),
            "depthwiseconv2d dilated": of(layers.DepthwiseConv2D, 2, dilation_rate=2),
            "depthwiseconv2d dilated same": of(
                layers.DepthwiseConv2D, 3, dilation_rate=2, padding="same", use_bias=False
            ),
            "depthwiseconv2d strided and dilated": of(
                layers.DepthwiseConv2D, 2, strides=2, dilation_rate=2
            ),
            "depthwiseconv2d pointwise": of(layers.DepthwiseConv2D, 1, depth_multiplier=3),
            "separableconv2d": of(layers.SeparableConv2D, 3, 3),
            "separableconv2d same strided multiplied": of(
                layers.SeparableConv2D, 3, 3, strides=2, padding="same", depth_multiplier=2
            ),
            "separableconv2d dilated": of(layers.SeparableConv2D, 3, 2, dilation_rate=2),
            "separableconv2d strided and dilated": of(
                layers.SeparableConv2D, 3, 2, strides=2, dilation_rate=2, padding="same"
            ),
        },
        CHANNELS_BEFORE_IMAGE: {
            "conv2d channels_first grouped": of(layers.Conv2D, 4, 3, groups=2, data_format=FIRST),
            "depthwiseconv2d channels_first": of(layers.DepthwiseConv2D, 3, data_format=FIRST),
            "separableconv2d channels_first": of(layers.SeparableConv2D, 3, 3, data_format=FIRST),
        },
        SMALL_IMAGE: {
            "conv2dtranspose": of(layers.Conv2DTranspose, 2, 3),
            "conv2dtranspose strided": of(layers.Conv2DTranspose, 2, (3, 2), strides=(2, 1)),
            "conv2dtranspose same strided": of(
                layers.Conv2DTranspose, 2, 3, strides=2, padding="same"
            ),
            "conv2dtranspose output_padding": of(
                layers.Conv2DTranspose, 2, 3, strides=2, padding="same", output_padding=1
            ),
            "conv2dtranspose strides larger than kernel": of(
                layers.Conv2DTranspose, 2, 2, strides=3, use_bias=False
            ),
            "conv2dtranspose pointwise": of(layers.Conv2DTranspose, 2, 1),
        },
        VOLUME: {
            "conv3d": of(layers.Conv3D, 3, 2),
            "conv3d same strided": of(layers.Conv3D, 3, 3, strides=2, padding="same"),
            "conv3d dilated": of(layers.Conv3D, 3, 2, dilation_rate=(1, 2, 2)),
            "conv3d pointwise": of(layers.Conv3D, 3, 1, use_bias=False),
            "conv3d grouped": of(layers.Conv3D, 4, 2, groups=2),
            "conv3dtranspose": of(layers.Conv3DTranspose, 2, 2),
            "conv3dtranspose same strided": of(
                layers.Conv3DTranspose, 1, 3, strides=2, padding="same"
            ),
            "conv3dtranspose output_padding": of(
                layers.Conv3DTranspose, 1, 2, strides=2, output_padding=1
            ),
        },
        CHANNELS_BEFORE_VOLUME: {
            "conv3d channels_first": of(layers.Conv3D, 3, 2, data_format=FIRST),
            "conv3d channels_first grouped": of(layers.Conv3D, 4, 2, groups=2, data_format=FIRST),
        },
    }
)
