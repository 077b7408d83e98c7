"""Convolutional architectures, written by hand: for images, video and sound, and heads for them.

Importing this module enters them into `entry.ENTRIES`.
"""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from models import Floats

from zoo.entry import enter
from zoo.parts import Learned

IMAGE = (8, 8, 3)


def conv(x: Any, filters: int, side=3, **options: Any) -> Any:
    return layers.Conv2D(filters, side, padding="same", **options)(x)


def normed(x: Any, activation: str = "relu") -> Any:
    return layers.Activation(activation)(layers.BatchNormalization()(x))


def pooled(x: Any, classes: int = 3) -> Any:
    """Classify what a convolutional body sees, on the average."""
    return layers.Dense(classes)(layers.GlobalAveragePooling2D()(x))


def unet(grow) -> keras.Model:
    """Down twice and up twice, each floor beside the one of its size on the way down."""
    x = image = keras.Input((8, 8, 2))
    skipped = []
    for filters in (4, 6):
        x = conv(x, filters, activation="relu")
        skipped.append(x)
        x = layers.MaxPooling2D()(x)
    x = conv(x, 8, activation="relu")
    for skip in reversed(skipped):
        filters = skip.shape[-1]
        x = layers.Concatenate()([grow(x, filters), skip])
        x = conv(x, filters, activation="relu")
    return keras.Model(image, conv(x, 1, 1, activation="sigmoid"))


for words, grow in [
    ("transposed convolutions", lambda x, n: layers.Conv2DTranspose(n, 2, strides=2)(x)),
    ("upsampling", lambda x, n: conv(layers.UpSampling2D(interpolation="bilinear")(x), n, 2)),
]:
    enter(
        "architectures",
        f"U-Net: {words}",
        functools.partial(unet, grow),
        Floats((8, 8, 2)),
        outputs=(0, 27, 63),
    )


def resnet() -> keras.Model:
    """Normalisation and activation come before each convolution (ResNet v2)."""
    image = keras.Input(IMAGE)
    x = conv(image, 4)
    for filters, stride in [(4, 1), (6, 2)]:
        before = normed(x)
        same = filters == x.shape[-1]
        skip = x if same else conv(before, filters, 1, strides=stride, use_bias=False)
        x = conv(before, filters, strides=stride, use_bias=False)
        x = skip + conv(normed(x), filters)
    return keras.Model(image, pooled(normed(x)))


enter("architectures", "ResNet, pre-activation", resnet, Floats(IMAGE))


def densenet() -> keras.Model:
    image = keras.Input(IMAGE)
    x = conv(image, 4)
    for _ in range(2):
        for _ in range(2):  # what each layer finds lies beside all that was found before
            x = layers.Concatenate()([x, conv(normed(conv(normed(x), 6, 1)), 3)])
        x = layers.AveragePooling2D(2)(conv(normed(x), 5, 1))
    return keras.Model(image, pooled(normed(x)))


enter("architectures", "DenseNet", densenet, Floats(IMAGE))


def excited(x):
    """Scale each channel by what all of them are on the average."""
    channels = x.shape[-1]
    squeezed = layers.GlobalAveragePooling2D(keepdims=True)(x)
    hidden = layers.Dense(channels // 2, activation="gelu")(squeezed)
    return x * layers.Dense(channels, activation="sigmoid")(hidden)


def squeeze_and_excitation() -> keras.Model:
    image = keras.Input(IMAGE)
    x = conv(image, 6)
    for _ in range(2):
        x = ops.relu(x + excited(conv(normed(conv(x, 6)), 6)))
    return keras.Model(image, pooled(x))


enter("architectures", "squeeze-and-excitation", squeeze_and_excitation, Floats(IMAGE))


def convmixer() -> keras.Model:
    """Depthwise convolutions mix places, beside a shortcut; pointwise ones mix channels."""
    image = keras.Input(IMAGE)
    x = layers.BatchNormalization()(layers.Conv2D(6, 2, strides=2, activation="gelu")(image))
    for _ in range(2):
        mixed = layers.DepthwiseConv2D(3, padding="same", activation="gelu")(x)
        x = x + layers.BatchNormalization()(mixed)
        x = layers.BatchNormalization()(conv(x, 6, 1, activation="gelu"))
    return keras.Model(image, pooled(x))


enter("architectures", "ConvMixer", convmixer, Floats(IMAGE))


def inception() -> keras.Model:
    image = keras.Input(IMAGE)
    x = image
    for _ in range(2):
        relu = functools.partial(conv, activation="relu")
        branches = [
            relu(x, 2, 1),
            relu(relu(x, 3, 1), 3, 3),
            relu(relu(relu(x, 2, 1), 3, (1, 3)), 3, (3, 1)),
            relu(layers.MaxPooling2D(3, strides=1, padding="same")(x), 2, 1),
        ]
        x = layers.Concatenate()(branches)
    return keras.Model(image, pooled(x))


enter("architectures", "Inception", inception, Floats(IMAGE))


def video() -> keras.Model:
    """Each block looks in space, then in time."""
    x = clip = keras.Input((4, 8, 8, 2))
    for filters in (3, 5):
        x = layers.Conv3D(filters, (1, 3, 3), strides=(1, 2, 2), padding="same")(x)
        x = layers.Conv3D(filters, (3, 1, 1), padding="same", use_bias=False)(x)
        x = normed(x)
    return keras.Model(clip, layers.Dense(3)(layers.GlobalAveragePooling3D()(x)))


enter("architectures", "video: convolutions in space and in time", video, Floats((4, 8, 8, 2)))


def squash(x):
    squared = ops.sum(ops.square(x), -1, keepdims=True)
    return x * ops.sqrt(squared + 1e-7) / (1 + squared)


def routed(capsules, kernel):
    """Let capsules (B, i, d) vote on (B, j, e): the more they agree, the more they count."""
    votes = ops.einsum("bid,ijde->bije", capsules, kernel)
    logits = ops.zeros_like(votes[..., 0])
    for _ in range(3):
        found = squash(ops.einsum("bij,bije->bje", ops.softmax(logits), votes))
        logits = logits + ops.einsum("bije,bje->bij", votes, found)
    return ops.norm(found, axis=-1)


def capsules() -> keras.Model:
    image = keras.Input(IMAGE)
    x = layers.Conv2D(6, 3, activation="relu")(image)
    x = layers.Conv2D(8, 3, strides=2)(x)
    primary = squash(ops.reshape(x, (-1, 8, 4)))
    return keras.Model(image, Learned(routed, kernel=(8, 3, 4, 5))(primary))


enter("architectures", "capsules, routing by agreement", capsules, Floats(IMAGE))


def conditioned() -> keras.Model:
    """A second input scales and shifts every channel (FiLM)."""
    image, condition = keras.Input(IMAGE), keras.Input((3,))
    hidden = layers.Dense(6, activation="tanh")(condition)
    x = image
    for filters in (4, 5):
        scale, shift = (layers.Dense(filters)(hidden)[:, None, None] for _ in range(2))
        x = ops.tanh((1 + scale) * conv(x, filters) + shift)
    return keras.Model([image, condition], pooled(x))


enter(
    "architectures", "FiLM: a condition bends a convnet", conditioned, [Floats(IMAGE), Floats((3,))]
)


def detector() -> keras.Model:
    """Heads shared by two scales: for each of 20 anchors a box, and logits of three classes."""
    image = keras.Input(IMAGE)
    fine = conv(image, 6, strides=2, activation="relu")
    coarse = conv(fine, 6, strides=2, activation="relu")
    fine = conv(fine, 6, 1) + layers.UpSampling2D()(coarse)
    outputs = []
    for entries in (4, 3):
        tower = layers.Conv2D(5, 3, padding="same", activation="relu")
        head = layers.Conv2D(entries, 3, padding="same")
        maps = [ops.reshape(head(tower(x)), (-1, x.shape[1] ** 2, entries)) for x in (fine, coarse)]
        outputs.append(layers.Concatenate(axis=1)(maps))
    return keras.Model(image, outputs)


enter(
    "architectures",
    "object detector: boxes and classes over two scales",
    detector,
    Floats(IMAGE),
    heads=(0, 1),
    outputs=(0, 31, 59),
)


def keypoints() -> keras.Model:
    """A heat map for each of two points, and where it is on the average: {name: output}."""
    image = keras.Input(IMAGE)
    x = normed(conv(normed(conv(image, 5, strides=2)), 5))
    maps = layers.Conv2DTranspose(2, 4, strides=2, padding="same")(x)
    weights = ops.softmax(ops.reshape(maps, (-1, 64, 2)), axis=1)
    places = np.stack(np.meshgrid(np.linspace(0, 1, 8), np.linspace(0, 1, 8)), -1).reshape(64, 2)
    points = ops.einsum("btk,tc->bkc", weights, ops.cast(places, weights.dtype))
    return keras.Model(image, {"maps": maps, "points": points})


enter(
    "architectures",
    "key points: heat maps and their means",
    keypoints,
    Floats(IMAGE),
    heads=("maps", "points"),
    outputs=(0, 1, 3),
)


def autoencoder() -> keras.Model:
    x = image = keras.Input(IMAGE)
    for filters in (4, 6):
        x = conv(x, filters, strides=2, activation="relu")
    x = layers.Dense(3, name="code")(layers.Flatten()(x))
    x = layers.Reshape((2, 2, 6))(layers.Dense(24, activation="relu")(x))
    for filters in (4, 3):
        x = layers.Conv2DTranspose(filters, 3, strides=2, padding="same", activation="tanh")(x)
    return keras.Model(image, x)


enter(
    "architectures",
    "autoencoder, convolutional",
    autoencoder,
    Floats(IMAGE),
    outputs=(0, 100, 191),
)


def wavenet() -> keras.Model:
    """Causal convolutions, ever more dilated, whose gates sum up beside a shortcut."""
    sound = keras.Input((8, 2))
    x, skips = layers.Conv1D(6, 2, padding="causal")(sound), []
    for dilation in (1, 2, 4):
        pair = [
            layers.Conv1D(6, 2, padding="causal", dilation_rate=dilation, activation=activation)(x)
            for activation in ("tanh", "sigmoid")
        ]
        gated = layers.Multiply()(pair)
        skips.append(layers.Conv1D(5, 1)(gated))
        x = x + layers.Conv1D(6, 1)(gated)
    x = layers.Conv1D(5, 1, activation="relu")(ops.relu(layers.Add()(skips)))
    return keras.Model(sound, layers.Conv1D(4, 1, activation="softmax")(x))


enter("architectures", "WaveNet", wavenet, Floats((8, 2)), outputs=(0, 17, 31))


def causal_conv(x, dilation: int):
    """A dilated convolution of the past, its kernel given by direction and length."""

    def use(x, kernel, gamma, bias):
        length = ops.sqrt(ops.sum(ops.square(kernel), (0, 1), keepdims=True))
        x = ops.pad(x, [[0, 0], [2 * dilation, 0], [0, 0]])
        return ops.relu(ops.conv(x, kernel * (gamma / length), dilation_rate=dilation) + bias)

    return Learned(use, kernel=(3, x.shape[-1], 5), gamma=(5,), bias=(5,))(x)


def temporal_convolutions() -> keras.Model:
    x = series = keras.Input((8, 3))
    for dilation in (1, 2):
        found = causal_conv(causal_conv(x, dilation), dilation)
        x = ops.relu(found + layers.Dense(5)(x))
    return keras.Model(series, layers.Dense(2)(x[:, -1]))


enter("architectures", "TCN, weights normalised", temporal_convolutions, Floats((8, 3)))
