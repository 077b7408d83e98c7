"""Functions that move examples about: each is right in any order of the batch, or refused.

`right` marks functions whose output b depends on example b alone, by whatever detour; `meets`
those in which examples influence one another, which must be refused whatever the data; `either`
those that are independent in a way that takes an argument about the data's values: a refusal is
good there, a wrong number is not.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from models import floats, randomise
from sampling import every

import perjac as pj
from perjac.errors import DisconnectedWarning, ExamplesMeetError, SlowPathWarning

B = 5
ORDERS = ([0, 1, 2, 3, 4], [3, 1, 0, 4, 2], [4, 3, 2, 1, 0])
RIGHT: dict[str, tuple] = {}
MEETS: dict[str, tuple] = {}
EITHER: dict[str, tuple] = {}
GRID = np.random.default_rng(3).normal(size=(4, 2))


def entering(table: dict[str, tuple]) -> Callable:
    def with_shapes(x: tuple[int, ...] = (2,), below: int = 0, **weights: tuple[int, ...]):
        def enter(function):
            assert function.__name__ not in RIGHT | MEETS | EITHER
            table[function.__name__] = (function, x, below, weights)
            return function

        return enter

    return with_shapes


right, meets, either = entering(RIGHT), entering(MEETS), entering(EITHER)


def made(name: str):
    """Return a function, its weights and five examples; the first two differ by rounding only."""
    function, shape, below, weights = (RIGHT | MEETS | EITHER)[name]
    rng = np.random.default_rng(0)
    variables = [tf.Variable(rng.normal(size=s), name=n) for n, s in weights.items()]
    if below:
        x = rng.integers(0, below, (B, *shape))
        x[1] = x[0]
    else:
        x = rng.normal(size=(B, *shape))
        x[1] = np.nextafter(x[0], 9)
    return lambda x: function(x, *variables), variables, x


def compare(name: str) -> None:
    """Assert that one engine agrees with the oracle in every order of the batch."""
    function, variables, x = made(name)
    wanted = oracle.weight_rows(function, x, variables)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        warnings.simplefilter("ignore", DisconnectedWarning)
        engine = pj.Engine(function, variables=variables)
        for order in ORDERS:
            jac = engine.jacobian(x[order])
            found = [np.asarray(jac[v]).reshape(w.shape) for v, w in
                     zip(variables, wanted, strict=True)]  # fmt: skip
            oracle.assert_agree(found, [w[order] for w in wanted], "float64", jac)


@pytest.mark.slow
@pytest.mark.parametrize("name", every(2, RIGHT))
def test_independent_examples_are_right_in_any_order(name):
    compare(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", EITHER)
def test_examples_that_pass_one_another_are_right_or_refused(name):
    with contextlib.suppress(ExamplesMeetError):
        compare(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEETS)
def test_examples_that_meet_are_refused(name):
    function, variables, x = made(name)
    with pytest.raises(ExamplesMeetError):
        pj.Engine(function, variables=variables).jacobian(x)


class Training(keras.Model):
    """Normalises by the batch at inference too."""

    def __init__(self):
        super().__init__()
        self.norm, self.dense = keras.layers.BatchNormalization(), keras.layers.Dense(2)

    def call(self, x):
        return self.dense(self.norm(x, training=True))


@pytest.mark.parametrize("where", ["engine", "call"])
def test_batch_normalization_in_training_is_refused(where):
    x = np.random.default_rng(0).normal(size=(B, 3)).astype("float32")
    x[1] = x[0]
    if where == "engine":
        layers = [keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
        model = keras.Sequential(layers)
    else:
        model = Training()
        model(x)
    with pytest.raises(ExamplesMeetError):
        pj.Engine(model, training=where == "engine").jacobian(x)


# Derivatives within the function.


@right(w=(2, 3), v=(3, 2))
def divergence(x, w, v):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.tanh(x @ w) @ v
    return tf.linalg.trace(tape.batch_jacobian(y, x))


@right(w=(2, 3), v=(3, 2))
def divergence_by_a_loop(x, w, v):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.tanh(x @ w) @ v
    return tf.linalg.trace(tape.batch_jacobian(y, x, experimental_use_pfor=False))


@right(w=(2, 3), v=(3, 2))
def divergence_by_one_hot_cotangents(x, w, v):
    total = 0.0
    for n in range(2):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.tanh(x @ w) @ v
        cotangents = tf.one_hot(tf.fill([tf.shape(x)[0]], n), 2, dtype=x.dtype)
        total += tape.gradient(y, x, cotangents)[:, n]
    return total


@right(w=(2, 3), v=(3, 1))
def laplacian(x, w, v):
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            u = tf.tanh(x @ w) @ v
        slope = inner.gradient(u, x)
    return tf.linalg.trace(outer.batch_jacobian(slope, x))


@right(w=(2, 3), v=(3, 1))
def second_derivative_of_a_sum(x, w, v):
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            u = tf.tanh(x @ w) @ v
        slope = inner.gradient(u, x)[:, 0]
    return outer.gradient(slope, x)


@right(w=(2, 3), v=(3, 2))
def gradient_penalty(x, w, v):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(tf.tanh(x @ w) @ v)
    return tf.norm(tape.gradient(y, x), axis=1)


@right(w=(2, 3), v=(3, 2))
def forward_mode(x, w, v):
    with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as along:
        y = tf.tanh(x @ w) @ v
    return along.jvp(y)


@right(w=(2, 3), v=(3, 2))
def flow_with_the_determinant_of_its_jacobian(x, w, v):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = x + 0.1 * tf.tanh(x @ w) @ v
    return tf.linalg.slogdet(tape.batch_jacobian(y, x))[1] - tf.reduce_sum(y**2, 1)


@right(w=(2, 3), v=(3, 2))
def squared_jacobian(x, w, v):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.tanh(x @ w) @ v
    return tf.reduce_sum(tape.batch_jacobian(y, x) ** 2, [1, 2])


@right(w=(2, 3), v=(3, 1))
def hessian_by_rows(x, w, v):
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            u = tf.tanh(x @ w) @ v
        slope = inner.gradient(u, x)
        parts = tf.unstack(slope, axis=1)
    return tf.stack([outer.gradient(part, x) for part in parts], 1)


# The same in Keras models.


class Physics(keras.Model):
    """The residual of a differential equation, for a network within."""

    def __init__(self, way: str):
        super().__init__()
        self.net = keras.Sequential(
            [keras.Input((2,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(2)]
        )
        self.way = way

    def call(self, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = self.net(x)
        if self.way == "divergence":
            return tf.linalg.trace(tape.batch_jacobian(y, x))[:, None]
        if self.way == "jacobian":
            return tape.batch_jacobian(y, x)
        return tape.gradient(y, x) @ tf.constant([[0.0, 1.0], [-1.0, 0.0]], x.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("way", ["divergence", "jacobian", "hamiltonian"])
def test_models_that_differentiate_are_right_in_any_order(way, dtype):
    with floats(dtype):
        model = Physics(way)
        x = np.random.default_rng(0).normal(size=(B, 2)).astype(dtype)
        x[1] = np.nextafter(x[0], np.asarray(9, dtype))
        model(tf.constant(x))
    randomise(model.weights)
    wanted = oracle.weight_rows(model, x, model.trainable_variables)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DisconnectedWarning)
        engine = pj.Engine(model)
        for order in ORDERS:
            jac = engine.jacobian(x[order])
            found = [np.asarray(jac[v]).reshape(w.shape) for v, w in
                     zip(model.trainable_variables, wanted, strict=True)]  # fmt: skip
            oracle.assert_agree(found, [w[order] for w in wanted], dtype, jac)


# What a layer sees may be the same whatever the data: then no data shows the order there.
NOTHING = {
    "normalised away": lambda x: keras.layers.LayerNormalization(axis=-1)(x),
    "zeros": lambda x: keras.ops.zeros_like(x),
    "positions alone": lambda x: keras.ops.zeros_like(x) + np.arange(4.0)[:, None],
    "dead units": lambda x: keras.ops.relu(-keras.ops.square(x) - 1) + 1,
}
SEEING = {
    "lstm": lambda: keras.layers.LSTM(2),
    "gru": lambda: keras.layers.GRU(2, return_sequences=True),
    "simplernn": lambda: keras.layers.SimpleRNN(2),
    "bidirectional": lambda: keras.layers.Bidirectional(keras.layers.SimpleRNN(2)),
    "dilated": lambda: keras.layers.Conv1D(2, 2, dilation_rate=2, padding="causal"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layer", SEEING)
@pytest.mark.parametrize("nothing", every(2, NOTHING))
def test_layers_that_see_the_same_for_all_data_are_right_in_any_order(nothing, layer):
    with floats("float64"):
        x = keras.Input((4, 1))
        flat = keras.layers.Flatten()
        seen = keras.layers.Dense(2, "tanh")(flat(SEEING[layer]()(NOTHING[nothing](x))))
        model = keras.Model(x, seen * keras.layers.Dense(2)(flat(x)))
    randomise(model.weights)
    x = np.random.default_rng(0).normal(size=(B, 4, 1))
    call = functools.partial(model, training=False)
    wanted = oracle.weight_rows(call, x, model.trainable_variables)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DisconnectedWarning)
        jac = pj.Engine(model, jit=False).jacobian(x)
    oracle.assert_agree([jac[v] for v in model.trainable_variables], wanted, "float64", jac)


# A grid beside the examples.


@right(w=(2, 3))
def constant_grid_repeated(x, w):
    n = tf.shape(x)[0]
    places = tf.reshape(tf.repeat(GRID, n, axis=0) @ w, [4, n, 3])
    return tf.reduce_sum(tf.tanh(places) * tf.reduce_sum(x, -1)[None, :, None], [0, 2])


@right(w=(2, 3))
def constant_grid_tiled(x, w):
    n = tf.shape(x)[0]
    places = tf.reshape(tf.tile(GRID, [n, 1]) @ w, [n, 4, 3])
    return tf.reduce_sum(tf.tanh(places) * tf.reduce_sum(x, -1)[:, None, None], [1, 2])


@right(w=(2, 3))
def constant_grid_broadcast_to_each_example(x, w):
    n = tf.shape(x)[0]
    places = tf.reshape(tf.broadcast_to(GRID, [n, 4, 2]), [-1, 2]) @ w
    return tf.reduce_sum(tf.tanh(tf.reshape(places, [-1, 4, 3])) * x[:, :1, None], [1, 2])


@right(w=(2, 3))
def constant_grid_broadcast_in_front(x, w):
    n = tf.shape(x)[0]
    places = tf.reshape(tf.broadcast_to(GRID[:, None], [4, n, 2]), [-1, 2]) @ w
    return tf.reduce_sum(tf.tanh(tf.reshape(places, [4, -1, 3])) * x[None, :, :1], [0, 2])


@right(w=(4, 3), v=(3, 1))
def examples_repeated_beside_a_tiled_grid(x, w, v):
    n = tf.shape(x)[0]
    joined = tf.concat([tf.repeat(x, 4, axis=0), tf.tile(tf.constant(GRID), [n, 1])], 1)
    return tf.reshape(tf.tanh(joined @ w) @ v, [n, 4])


@right(w=(4, 3), v=(3, 1))
def examples_tiled_beside_a_repeated_grid(x, w, v):
    n = tf.shape(x)[0]
    joined = tf.concat([tf.tile(x, [4, 1]), tf.repeat(tf.constant(GRID), n, axis=0)], 1)
    return tf.transpose(tf.reshape(tf.tanh(joined @ w) @ v, [4, n]))


@right(w=(2, 3))
def grid_of_positions_by_einsum(x, w):
    places = tf.einsum("pi,bi->pbi", tf.constant(GRID), x)
    hidden = tf.tanh(tf.reshape(places, [-1, 2]) @ w)
    return tf.reduce_sum(tf.reshape(hidden, [4, -1, 3]), [0, 2])


@right(w=(2, 3), v=(3, 2))
def samples_tiled(x, w, v):
    noise = tf.repeat(tf.constant(GRID), tf.shape(x)[0], axis=0)
    y = tf.tanh((tf.tile(x, [4, 1]) + noise) @ w) @ v
    return tf.reduce_mean(tf.reshape(y, [4, -1, 2]), 0)


@right(w=(2, 3), v=(3, 2))
def ones_of_the_size_of_the_batch(x, w, v):
    ones = tf.ones([tf.shape(x)[0] * 3, 2], x.dtype)
    hidden = tf.reshape(tf.tanh(ones @ w), [3, -1, 3])
    return tf.reduce_sum(hidden * tf.tanh(x @ w)[None], 0) @ v


# Several examples made of one, and back.


@right(w=(2, 3), v=(3, 2))
def both_views_one_after_the_other(x, w, v):
    y = tf.tanh(tf.concat([x, -2 * x], 0) @ w) @ v
    first, second = tf.split(y, 2)
    return first * second


@right(w=(2, 3), v=(3, 2))
def both_views_side_by_side(x, w, v):
    both = tf.reshape(tf.stack([x, tf.sin(x)], 1), [-1, 2])
    y = tf.reshape(tf.tanh(both @ w) @ v, [-1, 2, 2])
    return y[:, 0] * y[:, 1]


@right(x=(4, 2), w=(2, 3), v=(3, 2))
def views_flipped_in_time(x, w, v):
    both = tf.concat([x, x[:, ::-1] ** 2], 0)
    y = tf.tanh(tf.reshape(both, [-1, 2]) @ w) @ v
    return tf.reduce_mean(tf.reshape(y, [2, -1, 4, 2]), [0, 2])


@right(x=(3, 4), w=(4, 4), v=(4, 2))
def heads_in_front_of_the_batch(x, w, v):
    parts = tf.concat(tf.split(x @ w, 2, axis=-1), 0)  # (2·B, 3, 2)
    mixed = tf.nn.softmax(tf.matmul(parts, parts, transpose_b=True)) @ parts
    return tf.reduce_sum(tf.tanh(tf.concat(tf.split(mixed, 2), -1)) @ v, 1)


@right(x=(3, 4), w=(4, 4), v=(2, 2))
def heads_folded_into_the_batch_and_a_weight_there(x, w, v):
    parts = tf.reshape(tf.tanh(x @ w), [-1, 3, 2, 2])
    parts = tf.reshape(tf.transpose(parts, [2, 0, 1, 3]), [-1, 3, 2])  # (2·B, 3, 2)
    parts = tf.tanh(tf.matmul(parts, v))
    return tf.reduce_sum(tf.reshape(parts, [2, -1, 3, 2]), [0, 2])


@right(x=(4, 2), w=(2, 3), v=(3, 1))
def positions_in_front(x, w, v):
    flat = tf.reshape(tf.transpose(x, [1, 0, 2]), [-1, 2])
    return tf.reduce_sum(tf.reshape(tf.tanh(flat @ w) @ v, [4, -1]), 0)


@right(x=(4, 2), w=(2, 3), b=(3,))
def positions_in_front_and_a_bias(x, w, b):
    flat = tf.reshape(tf.transpose(x, [1, 0, 2]), [-1, 2])
    hidden = tf.tanh(tf.nn.bias_add(flat @ w, b))
    return tf.reduce_sum(tf.reshape(hidden, [4, -1, 3]), 0)


@right(x=(4, 6), w=(3, 2), v=(2, 2))
def positions_halved_twice(x, w, v):
    folded = tf.reshape(x, [-1, 4, 2, 3])
    folded = tf.reshape(tf.transpose(folded, [2, 1, 0, 3]), [-1, 3])  # (2·4·B, 3)
    hidden = tf.reshape(tf.tanh(folded @ w), [2, 4, -1, 2])
    hidden = tf.reshape(tf.transpose(hidden, [1, 2, 0, 3]), [-1, 2]) @ v  # (4·B·2, 2)
    return tf.reduce_sum(tf.reshape(tf.tanh(hidden), [4, -1, 2, 2]), [0, 2])


@right(x=(4, 2), w=(2, 3), v=(3, 3))
def rows_stacked_by_hand(x, w, v):
    steps = tf.concat(tf.unstack(x, axis=1), 0)  # (4·B, 2)
    hidden = tf.tanh(tf.tanh(steps @ w) @ v)
    return tf.add_n(tf.split(hidden, 4))


@right(x=(4, 2), w=(2, 3))
def reversed_and_back(x, w):
    flat = tf.reshape(tf.reverse(x, [0]), [-1, 2])
    return tf.reduce_sum(tf.reverse(tf.reshape(tf.tanh(flat @ w), [-1, 4, 3]), [0]), 1)


@right(w=(2, 3))
def rolled_and_back(x, w):
    return tf.roll(tf.tanh(tf.roll(x, 1, 0) @ w), -1, 0)


@right(w=(2, 3))
def padded_and_cut_off(x, w):
    padded = tf.pad(x, [[1, 2], [0, 0]], constant_values=1.0)
    return tf.tanh(padded @ w)[1:-2]


@right(w=(2, 3))
def gathered_in_its_own_order(x, w):
    return tf.tanh(tf.gather(x, tf.range(tf.shape(x)[0])) @ w)


@right(w=(2, 3))
def gathered_backwards_and_back(x, w):
    back = tf.range(tf.shape(x)[0])[::-1]
    return tf.gather(tf.tanh(tf.gather(x, back) @ w), back)


@right(w=(2, 3), v=(3, 2))
def gathered_twice_each(x, w, v):
    twice = tf.gather(x, tf.repeat(tf.range(tf.shape(x)[0]), 2))
    return tf.reduce_sum(tf.reshape(tf.tanh(twice @ w) @ v, [-1, 2, 2]) ** 2, 1)


@right(w=(2, 3), v=(3, 2))
def gathered_in_two_rounds(x, w, v):
    rounds = tf.gather(x, tf.tile(tf.range(tf.shape(x)[0]), [2]))
    return tf.reduce_sum(tf.reshape(tf.tanh(rounds @ w) @ v, [2, -1, 2]) ** 2, 0)


@right(x=(4, 2), w=(2, 3))
def sums_of_segments(x, w):
    n = tf.shape(x)[0]
    hidden = tf.tanh(tf.reshape(x, [-1, 2]) @ w)
    return tf.math.segment_sum(hidden, tf.repeat(tf.range(n), 4))


@either(x=(4, 2), w=(2, 3))
def sums_of_unsorted_segments(x, w):
    n = tf.shape(x)[0]
    hidden = tf.tanh(tf.reshape(tf.transpose(x, [1, 0, 2]), [-1, 2]) @ w)
    return tf.math.unsorted_segment_sum(hidden, tf.tile(tf.range(n), [4]), n)


@either(x=(4, 2), w=(2, 3))
def scattered(x, w):
    n = tf.shape(x)[0]
    hidden = tf.tanh(tf.reshape(x, [-1, 2]) @ w)
    return tf.scatter_nd(tf.repeat(tf.range(n), 4)[:, None], hidden, tf.stack([n, 3]))


# Loops and maps.


@right(w=(2, 3), v=(3, 2))
def vectorized_map_over_examples(x, w, v):
    return tf.vectorized_map(lambda row: (tf.tanh(row[None] @ w) @ v)[0], x)


@right(x=(4, 2), w=(2, 3), v=(3, 2))
def vectorized_map_over_positions(x, w, v):
    y = tf.vectorized_map(lambda step: tf.tanh(step @ w) @ v, tf.transpose(x, [1, 0, 2]))
    return tf.reduce_sum(y**2, 0)


@right(w=(2, 3), v=(3, 2))
def map_fn_over_examples(x, w, v):
    return tf.map_fn(lambda row: tf.tanh(row[None] @ w)[0][None] @ v, x)[:, 0]


@right(x=(4, 2), w=(2, 3), v=(3, 2))
def map_fn_over_positions(x, w, v):
    y = tf.map_fn(lambda step: tf.tanh(step @ w) @ v, tf.transpose(x, [1, 0, 2]))
    return tf.reduce_sum(y**2, 0)


@right(x=(4, 2), w=(2, 3), u=(3, 3))
def scan_over_positions(x, w, u):
    start = tf.zeros([tf.shape(x)[0], 3], x.dtype)
    steps = tf.scan(lambda h, step: tf.tanh(step @ w + h @ u), tf.transpose(x, [1, 0, 2]), start)
    return tf.reduce_sum(steps, 0)


@right(x=(4, 2), w=(2, 3), u=(3, 3))
def fold_over_positions(x, w, u):
    start = tf.zeros([tf.shape(x)[0], 3], x.dtype)
    return tf.foldl(lambda h, step: tf.tanh(step @ w + h @ u), tf.transpose(x, [1, 0, 2]), start)


@right(x=(4, 2), w=(2, 3), u=(3, 3), v=(3, 2))
def loop_into_an_array_and_a_weight_behind(x, w, u, v):
    steps, start = tf.TensorArray(x.dtype, 4), tf.zeros([tf.shape(x)[0], 3], x.dtype)

    def step(n, h, steps):
        h = tf.tanh(x[:, n] @ w + h @ u)
        return n + 1, h, steps.write(n, h)

    steps = tf.while_loop(lambda n, *_: n < 4, step, (0, start, steps))[2].concat()  # (4·B, 3)
    return tf.reduce_sum(tf.reshape(tf.tanh(steps @ v), [4, -1, 2]), 0)


@right(w=(2, 2))
def loop_until_every_example_is_done(x, w):
    def step(n, y):
        live = tf.reduce_sum(y**2, -1, keepdims=True) > 0.05
        return n + 1, tf.where(live, 0.7 * y + 0.1 * tf.tanh(y @ w), y)

    def going(n, y):
        return (n < 20) & tf.reduce_any(tf.reduce_sum(y**2, -1) > 0.05)

    return tf.while_loop(going, step, (0, x))[1]


@right(x=(4, 2), w=(2, 3), u=(3, 3))
def scan_of_keras(x, w, u):
    def step(h, one):
        h = tf.tanh(one @ w + h @ u)
        return h, h

    start = tf.zeros([tf.shape(x)[0], 3], x.dtype)
    _, steps = keras.ops.scan(step, start, tf.transpose(x, [1, 0, 2]))
    return tf.reduce_sum(steps, 0)


@right(x=(4, 2), w=(2, 3))
def associative_scan_of_keras(x, w):
    gates = tf.sigmoid(tf.reshape(tf.reshape(x, [-1, 2]) @ w, [-1, 4, 3]))

    def joined(a, b):
        return a[0] * b[0], a[1] * b[0] + b[1]

    return keras.ops.associative_scan(joined, (gates, tf.tanh(gates)), axis=1)[1][:, -1]


@right(w=(2, 3), v=(3, 2))
def map_of_keras(x, w, v):
    return keras.ops.map(lambda row: (tf.tanh(row[None] @ w) @ v)[0], x)


@right(w=(2, 3), v=(3, 2))
def vectorized_map_of_keras(x, w, v):
    return keras.ops.vectorized_map(lambda row: (tf.tanh(row[None] @ w) @ v)[0], x)


# Images.


@right(x=(6, 6, 2), w=(2, 2, 2, 3))
def space_to_batch_by_hand(x, w):
    folded = tf.space_to_batch(x, [2, 3], [[0, 0], [0, 0]])
    return tf.reduce_sum(tf.tanh(tf.batch_to_space(
        tf.nn.conv2d(folded, w, 1, "SAME"), [2, 3], [[0, 0], [0, 0]])), [1, 2])  # fmt: skip


@right(x=(5, 5, 1), w=(2, 2, 1, 3), v=(1, 2, 3, 2))
def atrous_convolutions(x, w, v):
    hidden = tf.tanh(tf.nn.atrous_conv2d(x, w, 2, "SAME"))
    return tf.reduce_sum(tf.tanh(tf.nn.atrous_conv2d(hidden, v, 3, "SAME")), [1, 2])


@right(x=(4, 4, 2), w=(2, 2, 2, 4))
def pixel_shuffle(x, w):
    return tf.reduce_sum(tf.tanh(tf.nn.depth_to_space(tf.nn.conv2d(x, w, 1, "SAME"), 2)), -1)[:, 0]


def windows(x):
    x = tf.reshape(x, [-1, 2, 2, 2, 2, 3])
    return tf.reshape(tf.transpose(x, [0, 1, 3, 2, 4, 5]), [-1, 4, 3])


def pictures(x):
    x = tf.reshape(x, [-1, 2, 2, 2, 2, 3])
    return tf.reshape(tf.transpose(x, [0, 1, 3, 2, 4, 5]), [-1, 4, 4, 3])


def within(x, w):
    hidden = tf.matmul(x, w)
    return tf.nn.softmax(tf.matmul(hidden, x, transpose_b=True)) @ hidden


@right(x=(4, 4, 3), w=(3, 3))
def attention_in_windows(x, w):
    return tf.reduce_sum(pictures(within(windows(x), w)), [1, 2])


@right(x=(4, 4, 3), w=(3, 3))
def attention_in_shifted_windows(x, w):
    shifted = tf.roll(x, [-1, -1], [1, 2])
    return tf.reduce_sum(
        tf.roll(pictures(within(windows(shifted), w)), [1, 1], [1, 2]) ** 2, [1, 2]
    )


@right(x=(4, 4, 3), w=(3, 3), b=(4, 4))
def attention_in_windows_with_a_bias_of_windows(x, w, b):
    hidden = tf.matmul(windows(x), w)
    scores = tf.matmul(hidden, windows(x), transpose_b=True)
    scores = tf.reshape(scores, [-1, 4, 4, 4]) + b[None, :, None]
    mixed = tf.nn.softmax(tf.reshape(scores, [-1, 4, 4])) @ hidden
    return tf.reduce_sum(pictures(mixed), [1, 2])


@right(x=(4, 4, 2), w=(8, 3))
def patches_folded_into_the_batch(x, w):
    patches = tf.image.extract_patches(x, [1, 2, 2, 1], [1, 2, 2, 1], [1] * 4, "VALID")
    hidden = tf.tanh(tf.reshape(patches, [-1, 8]) @ w)
    return tf.reduce_sum(tf.reshape(hidden, [-1, 4, 3]), 1)


@right(x=(3, 4, 4, 1), w=(2, 2, 1, 2))
def frames_folded_into_the_batch(x, w):
    frames = tf.nn.conv2d(tf.reshape(x, [-1, 4, 4, 1]), w, 1, "VALID")
    return tf.reduce_sum(tf.reshape(tf.tanh(frames), [-1, 3, 3, 3, 2]), [1, 2, 3])


@right(x=(3, 4, 4, 1), w=(2, 2, 1, 2))
def frames_in_front_of_the_batch(x, w):
    frames = tf.reshape(tf.transpose(x, [1, 0, 2, 3, 4]), [-1, 4, 4, 1])
    frames = tf.nn.conv2d(frames, w, 1, "VALID")
    return tf.reduce_sum(tf.reshape(tf.tanh(frames), [3, -1, 3, 3, 2]), [0, 2, 3])


@right(x=(3, 4, 4, 2), w=(2, 2, 2, 1))
def frames_in_front_of_the_batch_each_channel_alone(x, w):
    frames = tf.reshape(tf.transpose(x, [1, 0, 2, 3, 4]), [-1, 4, 4, 2])
    frames = tf.nn.depthwise_conv2d(frames, w, [1] * 4, "VALID")
    return tf.reduce_sum(tf.reshape(tf.tanh(frames), [3, -1, 3, 3, 2]), [0, 2, 3])


@either(x=(4, 4, 2), w=(2, 2, 2, 3))
def crops(x, w):
    n = tf.shape(x)[0]
    boxes = tf.tile([[0.0, 0.0, 0.6, 0.6], [0.3, 0.2, 1.0, 0.9]], [n, 1])
    cut = tf.image.crop_and_resize(x, boxes, tf.repeat(tf.range(n), 2), [3, 3])
    hidden = tf.tanh(tf.nn.conv2d(tf.cast(cut, x.dtype), w, 1, "VALID"))
    return tf.reduce_sum(tf.reshape(hidden, [-1, 2, 2, 2, 3]), [1, 2, 3])


# Ids.


@right(x=(4,), below=6, w=(6, 3), v=(3, 2))
def lookup_of_flat_ids(ids, w, v):
    found = tf.tanh(tf.gather(w, tf.reshape(ids, [-1])) @ v)
    return tf.reduce_sum(tf.reshape(found, [-1, 4, 2]), 1)


@right(x=(4,), below=6, w=(6, 3), v=(3, 2))
def lookup_of_flat_ids_positions_in_front(ids, w, v):
    found = tf.tanh(tf.gather(w, tf.reshape(tf.transpose(ids), [-1])) @ v)
    return tf.reduce_sum(tf.reshape(found, [4, -1, 2]), 0)


@right(x=(4,), below=6, w=(6, 3), v=(3, 2))
def one_hot_of_flat_ids_positions_in_front(ids, w, v):
    flat = tf.one_hot(tf.reshape(tf.transpose(ids), [-1]), 6, dtype=w.dtype)
    return tf.reduce_sum(tf.reshape(tf.tanh(tf.tanh(flat @ w) @ v), [4, -1, 2]), 0)


# Experts.


@right(w=(2, 3), e=(3, 2, 2))
def experts_weighed(x, w, e):
    return tf.einsum("be,beo->bo", tf.nn.softmax(x @ w), tf.einsum("bi,eio->beo", x, e))


@right(w=(2, 3), e=(3, 2, 2))
def experts_looked_up(x, w, e):
    best = tf.argmax(x @ w, 1)
    return tf.tanh(tf.einsum("bi,bio->bo", x, tf.gather(e, best)))


@right(w=(2, 2), e=(2, 2), f=(2, 2))
def experts_masked(x, w, e, f):
    first = tf.cast((x @ w)[:, :1] > 0, x.dtype)
    return first * tf.tanh(x @ e) + (1 - first) * tf.sin(x @ f)


@either(e=(2, 2), f=(2, 2))
def experts_on_parts_of_the_batch(x, e, f):
    which = tf.cast(x[:, 0] > 0, tf.int32)
    places = tf.dynamic_partition(tf.range(tf.shape(x)[0]), which, 2)
    first, second = tf.dynamic_partition(x, which, 2)
    return tf.dynamic_stitch(places, [tf.tanh(first @ e), tf.sin(second @ f)])


@either(e=(2, 2))
def sorted_by_a_number_and_back(x, e):
    order = tf.argsort(x[:, 0])
    return tf.gather(tf.tanh(tf.gather(x, order) @ e), tf.argsort(order))


@either(e=(2, 2))
def only_some_examples_and_put_back(x, e):
    chosen = tf.where(x[:, 0] > 0)
    some = tf.tanh(tf.gather_nd(x, chosen) @ e)
    return tf.tensor_scatter_nd_update(x, chosen, some)


@either(w=(2, 3))
def diagonal_of_all_pairs(x, w):
    hidden = tf.tanh(x @ w)
    return tf.linalg.diag_part(tf.matmul(hidden, hidden, transpose_b=True))


# Where examples meet.


@meets(e=(2, 2))
def experts_with_a_capacity(x, e):
    place = tf.cumsum(tf.cast(x[:, :1] > -9, x.dtype), axis=0)
    return tf.where(place <= 3, tf.tanh(x @ e), tf.zeros_like(x))


@meets(w=(2, 2), e=(2, 2, 2))
def experts_dispatched_with_a_capacity(x, w, e):
    gates = tf.one_hot(tf.argmax(x @ w, 1), 2, dtype=x.dtype)
    place = tf.cumsum(gates, axis=0) * gates
    gates = gates * tf.cast(place <= 2, x.dtype)
    slots = gates[:, :, None] * tf.one_hot(tf.cast(place, tf.int32) - 1, 2, dtype=x.dtype)
    sent = tf.einsum("bec,bi->eci", slots, x)
    return tf.einsum("bec,eco->bo", slots, tf.tanh(tf.matmul(sent, e)))


@meets(w=(2, 3))
def cumulative_sum(x, w):
    return tf.tanh(tf.cumsum(x, axis=0) @ w)


@meets(w=(2, 3))
def cumulative_sum_behind(x, w):
    return tf.cumsum(tf.tanh(x @ w), axis=0)


@meets(w=(2, 3))
def sort(x, w):
    return tf.tanh(tf.sort(x, axis=0) @ w)


@meets(w=(2, 3))
def largest_first(x, w):
    values, _ = tf.math.top_k(tf.transpose(tf.tanh(x @ w)), tf.shape(x)[0])
    return tf.transpose(values)


@meets(w=(2, 3))
def rank_among_the_examples(x, w):
    rank = tf.argsort(tf.argsort(x[:, 0]))
    return tf.tanh(x @ w) * tf.cast(rank, x.dtype)[:, None]


@meets(w=(2, 3))
def roll(x, w):
    return tf.tanh((x + tf.roll(x, 1, 0)) @ w)


@meets(w=(2, 3))
def reverse(x, w):
    return tf.tanh(tf.reverse(x, [0]) @ w)


@meets(w=(2, 3))
def gather_backwards(x, w):
    return tf.tanh(tf.gather(x, tf.range(tf.shape(x)[0])[::-1]) @ w)


@meets(w=(2, 3))
def neighbour_by_concatenation(x, w):
    return tf.tanh(x @ w) - tf.tanh(tf.concat([x[1:], x[:1]], 0) @ w)


@meets(w=(2, 3))
def less_the_mean(x, w):
    hidden = x @ w
    return tf.tanh(hidden - tf.reduce_mean(hidden, 0))


@meets(w=(2, 3))
def over_the_largest(x, w):
    hidden = x @ w
    return hidden / tf.reduce_max(tf.abs(hidden), 0)


@meets(w=(2, 3))
def over_the_norm_of_all(x, w):
    return tf.tanh(x @ w) / tf.norm(x)


@meets(w=(2, 3))
def softmax_over_the_batch(x, w):
    return tf.nn.softmax(x @ w, axis=0)


@meets(w=(2, 3))
def moments_of_the_batch(x, w):
    mean, variance = tf.nn.moments(x, [0])
    return tf.tanh((x - mean) * tf.math.rsqrt(variance + 0.1) @ w)


@meets(w=(2, 3))
def contrastive(x, w):
    hidden = tf.nn.l2_normalize(tf.tanh(x @ w), 1)
    scores = tf.matmul(hidden, hidden, transpose_b=True)
    return tf.linalg.diag_part(tf.nn.log_softmax(scores))


@meets(w=(2, 3))
def contrastive_by_labels(x, w):
    hidden = tf.tanh(x @ w)
    scores = tf.matmul(hidden, hidden, transpose_b=True)
    labels = tf.range(tf.shape(x)[0])
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, scores)


@meets(w=(2, 3))
def all_pairs(x, w):
    hidden = tf.tanh(x @ w)
    return tf.reduce_sum((hidden[:, None] - hidden[None]) ** 2, [1, 2])


@meets(w=(2, 3))
def attention_among_examples(x, w):
    hidden = x @ w
    return tf.nn.softmax(tf.matmul(hidden, hidden, transpose_b=True)) @ hidden


@meets(w=(2, 2))
def gram_matrix(x, w):
    hidden = x @ w
    return hidden @ tf.matmul(hidden, hidden, transpose_a=True)


@meets(w=(2, 3))
def number_of_examples(x, w):
    return tf.tanh(x @ w) / tf.cast(tf.shape(x)[0], x.dtype)


@meets(w=(2, 3))
def scan_over_examples(x, w):
    return tf.scan(lambda h, row: 0.5 * h + tf.tanh(row[None] @ w)[0], x, tf.zeros(3, x.dtype))


@meets(x=(4, 2), w=(2, 3))
def folded_the_wrong_way(x, w):
    hidden = tf.reshape(tf.tanh(tf.reshape(x, [-1, 2]) @ w), [4, -1, 3])
    return tf.reduce_sum(hidden, 0)


@meets(w=(2, 3), v=(3, 2))
def second_half_of_the_views_backwards(x, w, v):
    y = tf.tanh(tf.concat([x, x[::-1]], 0) @ w) @ v
    return tf.add_n(tf.split(y, 2))


@meets(w=(2, 3), v=(3, 2))
def jacobian_of_a_sum_that_meets(x, w, v):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(tf.tanh(x @ w) @ v) ** 2
    return tape.gradient(y, x)
