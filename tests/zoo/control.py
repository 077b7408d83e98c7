"""Weights inside functions, loops, branches, scans, and functions with gradients of their own.

Importing this module enters their models into `entry.ENTRIES`.
"""

from __future__ import annotations

import keras
import tensorflow as tf
from keras import layers, ops
from models import Floats, Ids

from zoo.stacks import enter_table, made

VECTOR = Floats((4,))
SEQUENCE = Floats((4, 3))


def nested_functions(x, w, b):
    @tf.function
    def inner(x):
        return tf.matmul(x, w) + b

    @tf.function
    def outer(x):
        return tf.tanh(inner(tf.tanh(inner(x))))

    return outer(x)


def compiled(x, w):
    return tf.function(lambda x: tf.tanh(tf.matmul(x, w)), jit_compile=True)(x)


def recomputed(x, w):
    """Gradient checkpointing."""
    return tf.recompute_grad(lambda x, w: tf.tanh(tf.matmul(x, w)))(x, w)


def clipped_gradient(x, w):
    """The identity, whose gradient is bent: the Jacobian that is asked for is the bent one."""

    @tf.custom_gradient
    def bent(z):
        return tf.identity(z), lambda dz: tf.tanh(dz)

    return bent(x @ w)


def own_gradient(x, w):
    """A product whose gradient with respect to the weight is not the product's."""

    @tf.custom_gradient
    def product(x, w):
        def gradient(dy):
            return tf.matmul(dy, w, transpose_b=True), 2 * tf.matmul(x, dy, transpose_a=True)

        return tf.matmul(x, w), gradient

    return product(x, w)


class OwnGradientOfVariables(layers.Layer):
    """A function with its own gradient, which reads its variable inside."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")

    def call(self, x):
        kernel = self.kernel.value

        @tf.custom_gradient
        def product(x):
            def gradient(dy, variables=None):
                return tf.matmul(dy, kernel, transpose_b=True), [
                    tf.matmul(x, dy, transpose_a=True) for _ in variables
                ]

            return tf.matmul(x, kernel), gradient

        return product(x)


def straight_through(x, w):
    hidden = tf.matmul(x, w)
    return hidden + tf.stop_gradient(tf.sign(hidden) - hidden)


def branch_on_a_weight(x, w, switch):
    return tf.cond(
        tf.reduce_sum(switch) > 0, lambda: tf.tanh(x @ w), lambda: tf.sin(x @ w) * switch
    )


def branch_on_the_batch(x, w):
    """Either branch, chosen by data, though always the same."""
    return tf.cond(tf.reduce_sum(x**2) >= 0, lambda: tf.tanh(x @ w), lambda: x @ w)


def switch_case(x, w, v):
    return tf.switch_case(
        tf.constant(1), [lambda: tf.tanh(x @ w), lambda: tf.sin(x @ v), lambda: x @ (w + v)]
    )


def static_steps(x, w, b):
    return tf.while_loop(
        lambda n, h: n < 3, lambda n, h: (n + 1, tf.tanh(h @ w + b)), (tf.constant(0), x)
    )[1]


def steps_that_scale(x, w):
    """The weight meets the data elementwise in each step."""
    return tf.while_loop(lambda n, h: n < 3, lambda n, h: (n + 1, tf.sin(h * w) + x), (0, x))[1]


def growing_weight(x, w):
    """A loop over the weight alone, next to the data."""
    power = tf.while_loop(lambda n, p: n < 2, lambda n, p: (n + 1, p @ w), (0, w))[1]
    return x @ power


def steps_of_the_batch(x, w):
    """As many steps as the longest example needs; each example stops where it ends."""
    lengths = 1 + tf.cast(3 * tf.sigmoid(x[:, 0]), tf.int32)

    def step(n, h):
        return n + 1, tf.where((n < lengths)[:, None], tf.tanh(h @ w), h)

    return tf.while_loop(lambda n, h: n < tf.reduce_max(lengths), step, (0, x))[1]


def until_small(x, w):
    """A fixed point: steps until no example moves, which no example alone can tell."""

    def step(n, h, moved):
        new = 0.3 * tf.tanh(h @ w) + x
        return n + 1, tf.where(n < 4, new, h), tf.reduce_max(tf.abs(new - h))

    start = (0, x, tf.constant(1.0, x.dtype))
    return tf.while_loop(lambda n, h, moved: n < 4, step, start)[1]


def loop_in_a_loop(x, w):
    def outer(n, h):
        inner = tf.while_loop(lambda m, g: m < 2, lambda m, g: (m + 1, tf.tanh(g @ w)), (0, h))
        return n + 1, inner[1] + x

    return tf.while_loop(lambda n, h: n < 2, outer, (0, x))[1]


def branch_in_a_loop(x, w, v):
    def step(n, h):
        return n + 1, tf.cond(n % 2 == 0, lambda: tf.tanh(h @ w), lambda: tf.sin(h @ v))

    return tf.while_loop(lambda n, h: n < 4, step, (0, x))[1]


def weights_by_step(x, w):
    """In step n the n-th of a stack of matrices."""
    return tf.while_loop(lambda n, h: n < 3, lambda n, h: (n + 1, tf.tanh(h @ w[n])), (0, x))[1]


def written_to_an_array(x, w):
    array = tf.TensorArray(x.dtype, size=3)

    def step(n, h, array):
        h = tf.tanh(h @ w)
        return n + 1, h, array.write(n, h)

    array = tf.while_loop(lambda n, *_: n < 3, step, (0, x, array))[2]
    return tf.transpose(array.stack(), (1, 0, 2))


def scanned(x, w, u):
    """A recurrence by tf.scan, over time in front."""
    start = tf.zeros_like(x[:, 0] @ w)
    states = tf.scan(lambda h, x: tf.tanh(x @ w + h @ u), tf.transpose(x, (1, 0, 2)), start)
    return tf.transpose(states, (1, 0, 2))


def scanned_backwards(x, w):
    start = tf.zeros_like(x[:, 0])
    states = tf.scan(
        lambda h, x: tf.sin(x * w + h), tf.transpose(x, (1, 0, 2)), start, reverse=True
    )
    return tf.transpose(states, (1, 0, 2))


def folded(x, w):
    start = tf.zeros_like(x[:, 0])
    return tf.foldl(lambda h, x: tf.tanh(h @ w + x), tf.transpose(x, (1, 0, 2)), start)


def mapped_over_time(x, w):
    steps = tf.map_fn(lambda x: tf.tanh(x @ w), tf.transpose(x, (1, 0, 2)))
    return tf.transpose(steps, (1, 0, 2))


def mapped_over_examples(x, w):
    return tf.map_fn(lambda x: tf.linalg.matvec(w, tf.sin(x)), x)


def vectorised_over_examples(x, w):
    return tf.vectorized_map(lambda x: tf.linalg.matvec(w, tf.sin(x)), x)


def keras_scan(x, w):
    def step(h, x):
        h = ops.tanh(ops.matmul(h, w) + x)
        return h, h

    last, _ = ops.scan(step, ops.zeros_like(x[:, 0]), ops.transpose(x, (1, 0, 2)))
    return last


def keras_fori(x, w):
    return ops.fori_loop(0, 3, lambda n, h: ops.tanh(ops.matmul(h, w)), x)


def keras_cond(x, w):
    return ops.cond(ops.sum(w) > 0, lambda: ops.tanh(x @ w), lambda: ops.sin(x @ w))


def linear_recurrence(x, decay, w):
    """A state-space model: h = a h + x in every step, by doubling (Hillis and Steele 1986)."""
    h = x @ w
    a = tf.sigmoid(decay) * tf.ones_like(h)
    for n in (1, 2):
        behind = [[0, 0], [n, 0], [0, 0]]
        h += a * tf.pad(h[:, :-n], behind)
        a *= tf.pad(a[:, :-n], behind, constant_values=1)
    return h


class FunctionInside(layers.Layer):
    """A layer whose call is itself a tf.function."""

    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(3)

    def build(self, shape):
        self.inner.build(shape)

    @tf.function
    def call(self, x):
        return tf.tanh(self.inner(x))


class AutographLoop(layers.Layer):
    """Python's for over tf.range, which autograph turns into a while loop."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]), name="kernel")

    @tf.function
    def call(self, x):
        for _ in tf.range(3):
            x = tf.tanh(tf.matmul(x, self.kernel))
        return x


class Recurrence(layers.Layer):
    """Layers called inside a loop."""

    def __init__(self):
        super().__init__()
        self.cell, self.norm = layers.Dense(3, activation="tanh"), layers.LayerNormalization()

    def build(self, shape):
        self.cell.build((None, 2 * shape[-1]))
        self.norm.build((None, shape[-1]))

    def call(self, x):
        def step(n, h):
            joined = tf.concat([h, tf.gather(x, n, axis=1)], axis=-1)
            return n + 1, self.norm(self.cell(joined))

        return tf.while_loop(lambda n, h: n < x.shape[1], step, (0, tf.zeros_like(x[:, 0])))[1]


class Remat(layers.Layer):
    """Keras's gradient checkpointing. Its RematScope fails in any tf.function."""

    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(3, activation="tanh")

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return keras.remat(self.inner)(x)


enter_table(
    {
        VECTOR: {
            "functions in functions": made(nested_functions, w=(4, 4), b=(4,)),
            "function marked for xla": made(compiled, w=(4, 3)),
            "recompute_grad": made(recomputed, w=(4, 3)),
            "custom gradient of the cotangent": made(clipped_gradient, w=(4, 3)),
            "custom gradient of the weight": made(own_gradient, w=(4, 3)),
            "custom gradient with variables inside": lambda x: OwnGradientOfVariables()(x),
            "straight-through": made(straight_through, w=(4, 3)),
            "rematerialised": lambda x: Remat()(x),
            "cond on a weight": made(branch_on_a_weight, w=(4, 3), switch=(3,)),
            "cond on the batch": made(branch_on_the_batch, w=(4, 3)),
            "switch_case": made(switch_case, w=(4, 3), v=(4, 3)),
            "keras cond": made(keras_cond, w=(4, 3)),
            "while of static steps": made(static_steps, w=(4, 4), b=(4,)),
            "while that scales": made(steps_that_scale, w=(4,)),
            "while over a weight": made(growing_weight, w=(4, 4)),
            "while of as many steps as the batch needs": made(steps_of_the_batch, w=(4, 4)),
            "while until the batch moves no more": made(until_small, w=(4, 4)),
            "while in a while": made(loop_in_a_loop, w=(4, 4)),
            "cond in a while": made(branch_in_a_loop, w=(4, 4), v=(4, 4)),
            "while with weights by step": made(weights_by_step, w=(3, 4, 4)),
            "while into an array": made(written_to_an_array, w=(4, 4)),
            "keras fori_loop": made(keras_fori, w=(4, 4)),
            "map_fn over examples": made(mapped_over_examples, w=(4, 4)),
            "vectorized_map over examples": made(vectorised_over_examples, w=(3, 4)),
            "call in a tf.function": lambda x: FunctionInside()(x),
            "autograph loop": lambda x: AutographLoop()(x),
        },
        SEQUENCE: {
            "scan": made(scanned, w=(3, 2), u=(2, 2)),
            "scan backwards": made(scanned_backwards, w=(3,)),
            "foldl": made(folded, w=(3, 3)),
            "map_fn over time": made(mapped_over_time, w=(3, 3)),
            "keras scan": made(keras_scan, w=(3, 3)),
            "linear recurrence by doubling": made(linear_recurrence, decay=(2,), w=(3, 2)),
            "layers in a while": lambda x: Recurrence()(x),
        },
        Ids((4,), below=5): {
            "while over embedded ids": made(
                lambda ids, table, u: folded(tf.gather(table, ids), u), table=(5, 3), u=(3, 3)
            ),
        },
    }
)
