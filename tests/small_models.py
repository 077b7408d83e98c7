"""Small models, one property each: a kind of layer, a kind of input, a way to use a weight.

Importing this module enters them into `models.MODELS`.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from models import Floats, Ids, case, variable


def sequential(shape: tuple[int, ...], *stack: layers.Layer) -> keras.Model:
    return keras.Sequential([keras.Input(shape), *stack, layers.Flatten(), layers.Dense(2)])


@case(Floats((9, 3)))
def conv1d():
    return sequential((9, 3), layers.Conv1D(4, 3, strides=2, padding="same", activation="tanh"))


@case(Floats((9, 3)))
def conv1d_causal():
    return sequential((9, 3), layers.Conv1D(4, 3, padding="causal", dilation_rate=2))


@case(Floats((7, 6, 2)))
def conv2d_valid_strided():
    return sequential((7, 6, 2), layers.Conv2D(3, (3, 2), strides=(2, 1), activation="tanh"))


@case(Floats((7, 6, 2)))
def conv2d_same_strided():
    return sequential((7, 6, 2), layers.Conv2D(3, 3, strides=2, padding="same"))


@case(Floats((9, 8, 2)))
def conv2d_dilated():
    return sequential((9, 8, 2), layers.Conv2D(3, 3, dilation_rate=(2, 3), padding="same"))


@case(Floats((6, 6, 3)))
def conv2d_pointwise():
    return sequential((6, 6, 3), layers.Conv2D(4, 1, strides=2, use_bias=False))


@case(Floats((6, 6, 4)))
def conv2d_grouped():
    return sequential((6, 6, 4), layers.Conv2D(6, 3, groups=2, activation="tanh"))


@case(Floats((4, 5, 3)))
def conv2d_transpose():
    return sequential((4, 5, 3), layers.Conv2DTranspose(2, 3, strides=2, padding="same"))


@case(Floats((4, 5, 4, 2)))
def conv3d():
    return sequential((4, 5, 4, 2), layers.Conv3D(3, 2, activation="tanh"))


@case(Floats((7, 6, 3)))
def separable_conv2d():
    return sequential((7, 6, 3), layers.SeparableConv2D(4, 3, depth_multiplier=2, padding="same"))


@case(Floats((7, 6, 3)))
def depthwise_valid():
    return sequential((7, 6, 3), layers.DepthwiseConv2D((3, 2), activation="tanh"))


@case(Floats((7, 7, 3)))
def depthwise_same_strided():
    return sequential(
        (7, 7, 3), layers.DepthwiseConv2D(3, strides=2, depth_multiplier=2, padding="same")
    )


@case(Floats((9, 3)))
def depthwise_conv1d():
    return sequential((9, 3), layers.DepthwiseConv1D(3, padding="same"))


def einsum_dense(shape: tuple[int, ...], equation: str, output, bias) -> keras.Model:
    layer = layers.EinsumDense(equation, output_shape=output, bias_axes=bias, activation="tanh")
    return sequential(shape, layer)


@case(Floats((3,)))
def einsum_dense_matrix():
    return einsum_dense((3,), "bi,io->bo", 4, "o")


@case(Floats((4, 3)))
def einsum_dense_heads():
    return einsum_dense((4, 3), "btd,dhk->bthk", (4, 2, 5), "hk")


@case(Floats((4, 3, 2)))
def einsum_dense_merge():
    return einsum_dense((4, 3, 2), "bthk,hkd->btd", (4, 5), "d")


@case(Floats((4, 3)))
def einsum_dense_over_time():
    return einsum_dense((4, 3), "btd,ts->bsd", (5, 3), "d")


@case(Floats((4, 3)))
def einsum_dense_per_position():
    return einsum_dense((4, 3), "btd,tde->bte", (4, 2), "te")


@case(Floats((5, 3)))
def dense_on_sequences():
    return keras.Sequential([keras.Input((5, 3)), layers.Dense(4, activation="tanh")])


@case(Floats((5, 5, 3)))
def batch_normalization():
    return sequential(
        (5, 5, 3), layers.Conv2D(4, 2), layers.BatchNormalization(), layers.Activation("tanh")
    )


@case(Floats((4, 4, 6)))
def group_normalization():
    return sequential((4, 4, 6), layers.GroupNormalization(3), layers.Activation("tanh"))


@case(Floats((4, 3)))
def layer_normalization():
    return sequential((4, 3), layers.LayerNormalization(axis=[1, 2]), layers.RMSNormalization())


@case(Floats((4, 4, 3)))
def prelu():
    return sequential((4, 4, 3), layers.Conv2D(3, 2), layers.PReLU(shared_axes=[1, 2]))


@case(Floats((4, 3)))
def rescaling_and_normalization():
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(2).normal(2.0, 3.0, (50, 4, 3)))
    return sequential((4, 3), layers.Rescaling(0.5, offset=0.1), normalization)


@case({"image": Floats((4, 4, 1)), "text": Ids((3,), below=5)})
def inputs_by_name():
    image = keras.Input((4, 4, 1), name="image")
    text = keras.Input((3,), dtype="int32", name="text")
    seen = layers.Flatten()(layers.Conv2D(2, 3)(image))
    read = layers.Flatten()(layers.Embedding(5, 3)(text))
    joined = layers.Concatenate()([seen, read])
    return keras.Model({"image": image, "text": text}, layers.Dense(3, activation="tanh")(joined))


@case([Floats((3,)), Floats((2, 3))])
def inputs_in_a_list():
    query, memory = keras.Input((3,)), keras.Input((2, 3))
    scores = layers.Dot(axes=(1, 2))([layers.Dense(3)(query), layers.Dense(3)(memory)])
    return keras.Model([query, memory], layers.Dense(2)(scores))


class Subclassed(keras.Model):
    """Its own call, with a loop, a batch-sized constant and a layer used thrice."""

    def __init__(self):
        super().__init__()
        self.step = layers.Dense(4, activation="tanh")
        self.head = layers.Dense(2)

    def call(self, x):
        state = tf.zeros((tf.shape(x)[0], 4), x.dtype)
        for _ in range(3):
            state = self.step(state + x)
        return self.head(state)


@case(Floats((4,)))
def subclassed():
    model = Subclassed()
    model(np.zeros((1, 4)))
    return model


@case(Floats((5,)))
def frozen_layer():
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(4, activation="tanh"),
            layers.Dense(4, activation="tanh", name="frozen"),
            layers.BatchNormalization(),
            layers.Dense(2),
        ]
    )
    model.get_layer("frozen").trainable = False
    return model


@case(Floats((5, 3)))
def unrolled_lstm():
    return sequential((5, 3), layers.LSTM(4, unroll=True))


@case(Floats((5, 3)))
def lstm():
    return sequential((5, 3), layers.LSTM(4))


@case(Floats((5, 3)))
def gru():
    return sequential((5, 3), layers.GRU(4))


class Weighted(layers.Layer):
    """A layer whose `weight_shape` and `apply` its subclass states."""

    weight_shape: tuple[int, ...]

    def build(self, _):
        self.weight = self.add_weight(shape=self.weight_shape, name="kernel")


class TimeMajorDense(Weighted):
    """The rows of its matmul come time first: folding them as (B, T) would mix examples."""

    weight_shape = (2, 4)

    def call(self, x):
        steps, width = x.shape[1:]
        rows = tf.reshape(tf.transpose(x, (1, 0, 2)), (-1, width))
        back = tf.reshape(tf.matmul(rows, self.weight.value), (steps, -1, 4))
        return tf.tanh(tf.transpose(back, (1, 0, 2)))


@case(Floats((3, 2)))
def time_major():
    return sequential((3, 2), TimeMajorDense())


class SlicedPositions(Weighted):
    """Adds the first rows of a position table that is longer than the sequence."""

    weight_shape = (10, 3)

    def call(self, x):
        return x + self.weight.value[: x.shape[1]]


@case(Floats((4, 3)))
def sliced_positions():
    return sequential((4, 3), SlicedPositions(), layers.LayerNormalization())


class ClassToken(Weighted):
    """Puts one learned vector, broadcast over the batch, before each sequence."""

    weight_shape = (1, 1, 3)

    def call(self, x):
        token = tf.broadcast_to(self.weight.value, (tf.shape(x)[0], 1, 3))
        return tf.concat([token, x], axis=1)


@case(Floats((4, 3)))
def class_token():
    return sequential((4, 3), ClassToken(), layers.Dense(3, activation="tanh"))


class LowRankUpdate(Weighted):
    """W + A B: three weights in one matmul, each the pull-back of the same Jacobian."""

    weight_shape = (4, 5)

    def build(self, shape):
        super().build(shape)
        self.down = self.add_weight(shape=(4, 2), name="down")
        self.up = self.add_weight(shape=(2, 5), name="up")

    def call(self, x):
        return tf.tanh(tf.matmul(x, self.weight.value + tf.matmul(self.down.value, self.up.value)))


@case(Floats((4,)))
def low_rank_update():
    return sequential((4,), LowRankUpdate())


class NormalisedWeight(Weighted):
    """A matmul by W over its norm, and then by W itself: two parametrisations of one weight."""

    weight_shape = (4, 4)

    def call(self, x):
        weight = self.weight.value
        hidden = tf.tanh(tf.matmul(x, weight / tf.norm(weight, axis=0)))
        return tf.matmul(hidden, weight, transpose_b=True)


@case(Floats((4,)))
def normalised_weight():
    return sequential((4,), NormalisedWeight())


class Temperature(Weighted):
    """A learned number that divides, shifts and bends the data."""

    weight_shape = ()

    def call(self, x):
        return tf.nn.softmax(x / (1.0 + self.weight.value**2)) - self.weight.value * x**2


@case(Floats((4,)))
def temperature():
    return sequential((4,), Temperature())


class PairwiseDistances(Weighted):
    """Squared distances to learned centres: the weight meets the data in a subtraction."""

    weight_shape = (5, 3)

    def call(self, x):
        return tf.reduce_sum((x[:, None, :] - self.weight.value) ** 2, axis=-1)


@case(Floats((3,)))
def pairwise_distances():
    return sequential((3,), PairwiseDistances())


@case(Floats((3,)))
def plain_function():
    w, b = variable(3, 4), variable(4)
    return lambda x: tf.tanh(tf.matmul(x, w) + b), [w, b]


class Cubic(tf.Module):
    """A tf.Module, whose variables perjac finds itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = variable(3), variable(3, 2)

    def __call__(self, x):
        return tf.einsum("bi,io->bo", self.a * x**3, self.b)


@case(Floats((3,)))
def module():
    return Cubic()
