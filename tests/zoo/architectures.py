"""Small architectures, written by hand, of neither images nor sequences: sets, graphs, policies…

Importing this module enters them into `entry.ENTRIES`.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from models import Floats, Ids

from zoo.entry import enter
from zoo.parts import Learned


def dense(x, *widths: int):
    for width in widths:
        x = layers.Dense(width, activation="tanh")(x)
    return x


def undirected(links):
    """Make links (B, N, N) go both ways, and from each node to itself."""
    both = ops.maximum(links, ops.transpose(links, (0, 2, 1)))
    return ops.maximum(both, ops.eye(links.shape[1], dtype=links.dtype))


def graph_convolution() -> keras.Model:
    """Each node takes the mean of its neighbours, weighted by both degrees (Kipf and Welling)."""
    x = nodes = keras.Input((5, 3))
    links = keras.Input((5, 5), dtype="int32")
    weights = ops.cast(undirected(links), nodes.dtype)
    scale = ops.rsqrt(ops.sum(weights, axis=-1, keepdims=True))
    weights = weights * scale * ops.transpose(scale, (0, 2, 1))
    for width in (6, 4):
        x = ops.tanh(ops.matmul(weights, layers.Dense(width)(x)))
    return keras.Model([nodes, links], layers.Dense(2)(ops.mean(x, axis=1)))


def attend_to_neighbours(values, links, source, target):
    """Mix values (B, N, H, size) of linked nodes by additive attention."""
    scores = ops.einsum("bnhk,hk->bnh", values, target)[:, :, None]
    scores = ops.leaky_relu(scores + ops.einsum("bmhk,hk->bmh", values, source)[:, None])
    weights = ops.softmax(ops.where(links[..., None] > 0, scores, -1e9), axis=2)
    return ops.einsum("bnmh,bmhk->bnhk", weights, values)


def graph_attention() -> keras.Model:
    x = nodes = keras.Input((5, 3))
    links = keras.Input((5, 5), dtype="int32")
    for _ in range(2):
        values = ops.reshape(layers.Dense(6, use_bias=False)(x), (-1, 5, 2, 3))
        mixed = Learned(attend_to_neighbours, source=(2, 3), target=(2, 3))
        x = ops.elu(ops.reshape(mixed(values, undirected(links)), (-1, 5, 6)))
    return keras.Model([nodes, links], layers.Dense(2)(x))


GRAPH = [Floats((5, 3)), Ids((5, 5), below=2)]
enter("architectures", "graph convolution", graph_convolution, GRAPH)
enter("architectures", "graph attention", graph_attention, GRAPH, outputs=(0, 4, 9))


def pointnet() -> keras.Model:
    """A first net sees the cloud and turns it, a second one classifies it."""
    points = keras.Input((7, 3))
    turn = layers.Dense(9)(ops.max(dense(points, 5, 6), axis=1))
    turned = ops.matmul(points, ops.reshape(turn, (-1, 3, 3)) + np.eye(3, dtype=points.dtype))
    found = ops.max(dense(turned, 6, 8), axis=1)
    return keras.Model(points, layers.Dense(3)(dense(found, 5)))


def deep_sets() -> keras.Model:
    items = keras.Input((6, 3))
    return keras.Model(items, layers.Dense(2)(dense(ops.sum(dense(items, 6, 5), axis=1), 4)))


enter("architectures", "PointNet, with a learned turn", pointnet, Floats((7, 3)))
enter("architectures", "DeepSets", deep_sets, Floats((6, 3)))


def siamese() -> keras.Model:
    left, right = keras.Input((5,)), keras.Input((5,))
    tower = keras.Sequential([layers.Dense(n, activation="tanh") for n in (6, 4)])
    same = layers.Dense(1, activation="sigmoid")(ops.abs(tower(left) - tower(right)))
    return keras.Model([left, right], same)


def triplet() -> keras.Model:
    """How much more a user likes one item than another: a number for each example."""
    user, more, less = (keras.Input((), dtype="int32") for _ in range(3))
    wishes = layers.Embedding(4, 5)(user)
    items, appeal = layers.Embedding(9, 5), layers.Embedding(9, 1)
    tower = layers.Dense(5, activation="tanh")
    scores = [ops.sum(wishes * tower(items(n)), -1) + appeal(n)[:, 0] for n in (more, less)]
    return keras.Model([user, more, less], scores[0] - scores[1])


enter("architectures", "Siamese: distance of two towers", siamese, [Floats((5,)), Floats((5,))])
enter(
    "architectures",
    "recommender of triplets: dot products of embeddings",
    triplet,
    [Ids((), below=4), Ids((), below=9), Ids((), below=9)],
)


def wide_and_deep() -> keras.Model:
    """A linear model, products of pairs (factorisation machine) and a deep net, summed."""
    fields, numbers = keras.Input((3,), dtype="int32"), keras.Input((4,))
    ids = fields + np.array([0, 5, 10], "int32")  # a row for each value of each field
    wide = ops.sum(layers.Embedding(15, 1)(ids), axis=1) + layers.Dense(1)(numbers)
    factors = layers.Embedding(15, 4)(ids)
    pairs = ops.square(ops.sum(factors, axis=1)) - ops.sum(ops.square(factors), axis=1)
    deep = dense(layers.Concatenate()([layers.Flatten()(factors), numbers]), 8, 6)
    score = wide + ops.sum(pairs, axis=-1, keepdims=True) / 2 + layers.Dense(1)(deep)
    return keras.Model([fields, numbers], ops.sigmoid(score))


enter(
    "architectures",
    "Wide & Deep with factorisation machine",
    wide_and_deep,
    [Ids((3,), below=5), Floats((4,))],
)


class Sample(layers.Layer):
    """Draw from a normal distribution, of which inference takes the mean."""

    def __init__(self):
        super().__init__()
        self.seed = keras.random.SeedGenerator(0)

    def call(self, mean, log_variance, training=False):
        if not training:
            return mean
        noise = keras.random.normal(ops.shape(mean), dtype=mean.dtype, seed=self.seed)
        return mean + ops.exp(log_variance / 2) * noise


def variational() -> keras.Model:
    x = keras.Input((6,))
    hidden = dense(x, 7)
    mean, log_variance = layers.Dense(3)(hidden), layers.Dense(3)(hidden)
    decoded = layers.Dense(6, activation="sigmoid")(dense(Sample()(mean, log_variance), 5))
    return keras.Model(x, [mean, log_variance, decoded])


def autoencoder() -> keras.Model:
    """What leads back is the transpose of what led there."""

    def there_and_back(x, kernel, bias, back):
        code = ops.tanh(ops.matmul(x, kernel) + bias)
        return ops.matmul(code, ops.transpose(kernel)) + back

    x = keras.Input((6,))
    return keras.Model(x, Learned(there_and_back, kernel=(6, 3), bias=(3,), back=(6,))(x))


enter("architectures", "variational autoencoder", variational, Floats((6,)), heads=(0, 1, 2))
enter("architectures", "autoencoder, tied", autoencoder, Floats((6,)))


def coupling_flow() -> keras.Model:
    """One half of x scales and shifts the other, in turns; the logarithm of the determinant."""
    x = start = keras.Input((4,))
    log_determinant = 0.0
    for _ in range(2):
        stays, goes = ops.split(x, 2, axis=-1)
        hidden = dense(stays, 5)
        scale = layers.Dense(2, activation="tanh")(hidden)
        goes = goes * ops.exp(scale) + layers.Dense(2)(hidden)
        log_determinant = log_determinant + ops.sum(scale, axis=-1)
        x = layers.Concatenate()([goes, stays])
    return keras.Model(start, [x, log_determinant])


def hypernetwork() -> keras.Model:
    """A condition makes the weights of a net of its own for each example."""
    x, condition = keras.Input((4,)), keras.Input((3,))
    hidden = dense(condition, 6)
    kernel, top = (
        ops.reshape(layers.Dense(rows * columns)(hidden), (-1, rows, columns))
        for rows, columns in [(4, 5), (5, 2)]
    )
    inside = ops.tanh(ops.einsum("bi,bio->bo", x, kernel) + layers.Dense(5)(hidden))
    return keras.Model([x, condition], ops.einsum("bi,bio->bo", inside, top))


enter("architectures", "flow: affine coupling", coupling_flow, Floats((4,)), heads=(0, 1))
enter(
    "architectures",
    "hypernetwork: a condition makes two kernels",
    hypernetwork,
    [Floats((4,)), Floats((3,))],
)


def dueling() -> keras.Model:
    """Q(s, a) = V(s) + A(s, a) - mean over a of A(s, a)."""
    state = keras.Input((5,))
    hidden = dense(state, 8)
    value, advantage = layers.Dense(1)(dense(hidden, 4)), layers.Dense(3)(dense(hidden, 4))
    return keras.Model(state, value + advantage - ops.mean(advantage, -1, keepdims=True))


class ActorCritic(keras.Model):
    """Logits of the actions, and the value of the state: a tuple."""

    def __init__(self):
        super().__init__()
        self.body = [layers.Dense(width, activation="tanh") for width in (7, 6)]
        self.actor, self.critic = layers.Dense(3), layers.Dense(1)

    def call(self, state):
        for layer in self.body:
            state = layer(state)
        return self.actor(state), ops.squeeze(self.critic(state), -1)


def actor_critic() -> keras.Model:
    model = ActorCritic()
    model(np.zeros((1, 5)))
    return model


def gaussian_policy() -> keras.Model:
    """The mean of the action depends on the state, its deviation does not."""

    def with_deviation(mean, log_deviation):
        deviation = ops.broadcast_to(ops.exp(log_deviation), ops.shape(mean))
        return ops.concatenate([mean, deviation], axis=-1)

    state = keras.Input((5,))
    mean = layers.Dense(2)(dense(state, 6, 6))
    return keras.Model(state, Learned(with_deviation, log_deviation=(2,))(mean))


enter("architectures", "dueling Q-network", dueling, Floats((5,)))
enter("architectures", "actor and critic", actor_critic, Floats((5,)), heads=(0, 1))
enter("architectures", "Gaussian policy", gaussian_policy, Floats((5,)))


def curves(x, curve, base):
    """A sum of learned functions, one for each input and output: of bumps on a grid, and silu."""
    bumps = ops.exp(-ops.square(x[..., None] - ops.cast(np.linspace(-2, 2, 5), x.dtype)))
    return ops.einsum("big,iog->bo", bumps, curve) + ops.matmul(ops.silu(x), base)


def kolmogorov_arnold() -> keras.Model:
    x = start = keras.Input((3,))
    for width in (4, 2):
        shapes = {"curve": (x.shape[-1], width, 5), "base": (x.shape[-1], width)}
        x = Learned(curves, **shapes)(x)
    return keras.Model(start, x)


def radial_basis() -> keras.Model:
    def bumps(x, centres, log_width):
        squared = ops.sum(ops.square(x[:, None] - centres), axis=-1)
        return ops.exp(-squared * ops.exp(log_width))

    x = keras.Input((3,))
    found = Learned(bumps, centres=(6, 3), log_width=(6,))(x)
    return keras.Model(x, layers.Dense(2)(found))


def fourier_features() -> keras.Model:
    """Waves of directions that do not learn, before a net that does."""

    def waves(x, directions):
        angles = 2 * np.pi * ops.matmul(x, directions)
        return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)

    x = keras.Input((2,))
    found = Learned(waves, trainable=False, directions=(2, 5))(x)
    return keras.Model(x, layers.Dense(3, activation="sigmoid")(dense(found, 6)))


def siren() -> keras.Model:
    x = place = keras.Input((2,))
    for width in (6, 5):
        x = Learned(lambda x, omega: ops.sin(omega * x), omega=())(layers.Dense(width)(x))
    return keras.Model(place, layers.Dense(3)(x))


enter("architectures", "Kolmogorov-Arnold", kolmogorov_arnold, Floats((3,)))
enter("architectures", "radial basis functions", radial_basis, Floats((3,)))
enter("architectures", "Fourier features", fourier_features, Floats((2,)))
enter("architectures", "SIREN, learned frequencies", siren, Floats((2,)))


def physics_informed() -> keras.Model:
    x, t = keras.Input(()), keras.Input(())
    return keras.Model([x, t], layers.Dense(1)(dense(ops.stack([x, t], axis=-1), 6, 5)))


def burgers():
    """u_t + u u_x - u_xx / 10 for the net's u: what training makes small."""
    net = physics_informed()

    def residual(place):
        x, t = place
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch([x, t])
                u = net([x, t])[:, 0]
            u_x, u_t = inner.gradient(u, [x, t])
        return u_t + u * u_x - outer.gradient(u_x, x) / 10

    return residual, net.trainable_variables


PLACE = [Floats(()), Floats(())]
enter("architectures", "physics-informed: of two numbers", physics_informed, PLACE)
enter("architectures", "physics-informed: residual of Burgers' equation", burgers, PLACE)


def quantiles() -> keras.Model:
    """Three quantiles of each of two targets, which do not cross."""
    x = keras.Input((5,))
    found = ops.reshape(layers.Dense(6)(dense(x, 7)), (-1, 2, 3))
    lowest, steps = found[..., :1], ops.softplus(found[..., 1:])
    return keras.Model(x, ops.concatenate([lowest, lowest + ops.cumsum(steps, axis=-1)], axis=-1))


def mixture_density() -> keras.Model:
    """Weights, means and deviations of three normal distributions in the plane."""
    x = keras.Input((4,))
    hidden = dense(x, 7)
    weights = layers.Dense(3, activation="softmax")(hidden)
    means = layers.Reshape((3, 2))(layers.Dense(6)(hidden))
    return keras.Model(x, [weights, means, layers.Dense(3, activation="softplus")(hidden)])


enter("architectures", "quantiles of two targets", quantiles, Floats((5,)))
enter("architectures", "mixture density", mixture_density, Floats((4,)), heads=(0, 1, 2))


def highway() -> keras.Model:
    x = start = keras.Input((5,))
    for _ in range(3):
        gate = layers.Dense(5, activation="sigmoid")(x)
        x = gate * dense(x, 5) + (1 - gate) * x
    return keras.Model(start, layers.Dense(2)(x))


def maxout() -> keras.Model:
    x = start = keras.Input((5,))
    for width in (5, 4):
        x = ops.max(layers.Reshape((width, 3))(layers.Dense(3 * width)(x)), axis=-1)
    return keras.Model(start, layers.Dense(2)(x))


def bilinear() -> keras.Model:
    def form(left, right, kernel):
        return ops.einsum("bi,ijk,bj->bk", left, kernel, right)

    left, right = keras.Input((4,)), keras.Input((5,))
    met = Learned(form, kernel=(6, 5, 3))(dense(left, 6), dense(right, 5))
    return keras.Model([left, right], layers.Dense(2)(ops.tanh(met)))


enter("architectures", "highway", highway, Floats((5,)))
enter("architectures", "maxout", maxout, Floats((5,)))
enter("architectures", "bilinear form of two inputs", bilinear, [Floats((4,)), Floats((5,))])


def by_name() -> keras.Model:
    """Inputs and outputs in dicts; one output is a hidden layer of another."""
    words, numbers = (
        keras.Input((4,), dtype="int32", name="words"),
        keras.Input((3,), name="numbers"),
    )
    said = ops.mean(layers.Embedding(6, 4)(words), axis=1)
    code = dense(layers.Concatenate()([said, numbers]), 5)
    inputs = {"words": words, "numbers": numbers}
    return keras.Model(inputs, {"code": code, "classes": layers.Dense(3)(code)})


enter(
    "architectures",
    "inputs and outputs by name",
    by_name,
    {"words": Ids((4,), below=6), "numbers": Floats((3,))},
    heads=("code", "classes"),
)


class Flagged(keras.Model):
    """At training noisy, with an auxiliary output; at inference sharpened by a temperature."""

    def __init__(self):
        super().__init__()
        self.noise, self.norm = layers.GaussianNoise(0.1), layers.BatchNormalization()
        self.hidden, self.head = layers.Dense(6, activation="tanh"), layers.Dense(3)
        self.auxiliary = layers.Dense(2)
        self.auxiliary.build((None, 6))  # a call at inference would not
        self.sharpened = Learned(lambda x, gamma: ops.softmax(x / gamma), gamma=())

    def call(self, x, training=False):
        hidden = self.norm(self.hidden(self.noise(x, training=training)), training=training)
        if training:
            return ops.concatenate([self.head(hidden), self.auxiliary(hidden)], axis=-1)
        return self.sharpened(self.head(hidden))


def flagged() -> keras.Model:
    model = Flagged()
    model(np.zeros((1, 4)))
    return model


enter("architectures", "subclassed: a flag for training", flagged, Floats((4,)))
