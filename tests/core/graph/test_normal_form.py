"""The normal form: calls, loops, custom gradients and batches on other axes hide no weight."""

from __future__ import annotations

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from keras import layers
from models import floats, randomise
from sampling import every
from small_models import Weighted, sequential

import perjac as pj
from perjac.errors import SlowPathWarning

pytestmark = pytest.mark.slow  # left out of `make check`


def tape_rows(model: keras.Model, x: np.ndarray) -> list:
    """Assert that the Jacobian agrees with the oracle; return inspect's rows on the tape path."""
    randomise(model.weights)
    right = oracle.weight_rows(lambda one: model(one, training=False), x, model.trainable_variables)
    engine = pj.Engine(model)
    jac = engine.jacobian(x)
    names = [v.path for v in model.trainable_variables]
    oracle.assert_agree([jac[v] for v in model.trainable_variables], right, "float64", names)
    assert engine.verify(x).passed
    return [row for row in engine.inspect().rows if row.path == "tape"]


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, *shape))


class Applied(Weighted):
    """A layer of one weight and a function of the input and of it."""

    def __init__(self, function, *shape: int):
        super().__init__()
        self.function, self.weight_shape = function, shape

    def call(self, x):
        return tf.tanh(self.function(x, self.weight.value))


def applied(function, *weight_shape: int, x: tuple[int, ...] = (4,)) -> keras.Model:
    with floats("float64"):
        return sequential(x, layers.Dense(4, activation="tanh"), Applied(function, *weight_shape))


def step(h, w):
    return h + 0.1 * tf.tanh(tf.matmul(h, w))


def loop(go_on, count, start=0, **options):
    """A loop over (counter, state)."""
    return lambda x, w: tf.while_loop(
        go_on, lambda i, h: (count(i), step(h, w)), (start, x), **options
    )[1]


@tf.function
def over_a_range(x, w):
    for _ in tf.range(3):
        x = step(x, w)
    return x


LOOPS = {
    "less": loop(lambda i, h: i < 4, lambda i: i + 1),
    "limit first": loop(lambda i, h: tf.greater(4, i), lambda i: 1 + i),
    "less or equal, by two": loop(lambda i, h: i <= 7, lambda i: i + 2, start=1),
    "backwards": loop(lambda i, h: i > 0, lambda i: i - 1, start=3),
    "two conditions": loop(lambda i, h: tf.logical_and(i < 6, 2 * i < 5), lambda i: i + 1),
    "most iterations": loop(lambda i, h: i < 99, lambda i: i + 1, maximum_iterations=3),
    "range": over_a_range,
    "scan": lambda x, w: tf.scan(step_with(w), tf.stack([x, 2 * x, x**2]))[-1],
}


def step_with(w):
    return lambda h, x: step(h + x, w)


@pytest.mark.parametrize("name", every(2, LOOPS))
def test_weights_in_loops_are_factored(name):
    assert tape_rows(applied(LOOPS[name], 4, 4), draw(4)) == []


@pytest.mark.filterwarnings("ignore::perjac.errors.SlowPathWarning")
def test_a_loop_whose_end_only_data_tells_goes_to_the_tape():
    def vague(x, w):
        steps = tf.shape(x)[0] // tf.shape(x)[0] + 1  # two, but who knows
        return loop(lambda i, h: i < steps, lambda i: i + 1)(x, w)

    rows = tape_rows(applied(vague, 4, 4), draw(4))
    assert ["While" in row.reason for row in rows] == [True]


@pytest.mark.parametrize("layer", every(3, [layers.LSTM, layers.GRU, layers.SimpleRNN]))
@pytest.mark.parametrize("sequences", [True, pytest.param(False, marks=pytest.mark.more)])
def test_recurrent_layers_are_left_as_they_were(layer, sequences):
    with floats("float64"):
        recurrent = layer(3, return_sequences=sequences)
        model = sequential((5, 2), layers.Masking(), recurrent, layers.Dense(2))
    x = draw(5, 2)
    x[0, 3:] = 0
    before = recurrent.get_config()
    assert tape_rows(model, x) == []
    assert recurrent.get_config() == before


@tf.custom_gradient
def doubled(x):
    return x, lambda dy: 2 * dy


def closing_over(x, _):
    inside = tf.sin(x)

    @tf.custom_gradient
    def function(x):
        return x * inside, lambda dy: 3 * dy * inside

    return function(x)


@tf.function
def called(x, w):
    return tf.nn.silu(tf.matmul(x, w))


def straight_through(x, w):
    @tf.custom_gradient
    def rounded(w):
        return tf.round(4 * w) / 4, lambda dy: dy

    return tf.matmul(x, rounded(w))


CUSTOM = {
    "silu": lambda x, w: tf.nn.silu(tf.matmul(x, w)),
    "twice the gradient": lambda x, w: doubled(tf.matmul(x, w)),
    "closing over a tensor": lambda x, w: closing_over(tf.matmul(x, w), w),
    "in a nested function": called,
    "in a loop": lambda x, w: loop(lambda i, h: i < 3, lambda i: i + 1)(tf.nn.silu(x), w),
    "in a step": lambda x, w: tf.while_loop(
        lambda i, h: i < 3, lambda i, h: (i + 1, tf.nn.silu(step(h, w))), (0, x)
    )[1],
    "of the weight alone": straight_through,
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_gradients_are_respected(name):
    assert tape_rows(applied(CUSTOM[name], 4, 4), draw(4)) == []


def test_a_weight_with_a_gradient_of_its_own_goes_to_the_tape():
    def function(x, w):
        @tf.custom_gradient
        def product(x, w):
            y = tf.matmul(x, w)
            return y, lambda dy: (2 * tf.matmul(dy, w, transpose_b=True),
                                  5 * tf.matmul(x, dy, transpose_a=True))  # fmt: skip

        return product(x, w)

    rows = tape_rows(applied(function, 4, 4), draw(4))
    assert [row.reason.split(" (")[0] for row in rows] == ["no rule for IdentityN"]


def time_first(function):
    return lambda x, w: tf.transpose(function(tf.transpose(x, [1, 0, 2]), w), [1, 0, 2])


ELSEWHERE = {  # function, the weight's shape
    "three operands": (lambda x, w: tf.einsum("bti,ijk,btj->btk", x, w, x), (4, 4, 2)),
    "experts": (
        lambda x, w: tf.einsum("bteh,ehd,bte->btd", tf.stack([x, 2 * x], 2), w, x[..., :2]),
        (2, 4, 3),
    ),
    "einsum": (time_first(lambda x, w: tf.einsum("tbi,io->tbo", x, w)), (4, 3)),
    "products of the same weight": (
        time_first(lambda x, w: tf.raw_ops.BatchMatMulV2(x=x, y=w)), (4, 3),
    ),
    "products of a weight for each step": (time_first(lambda x, w: tf.matmul(x, w)), (5, 4, 3)),
    "experts in front, positions folded": (
        lambda x, w: tf.reshape(
            tf.reduce_sum(tf.tanh(tf.einsum("th,ehm->etm", tf.reshape(x, (-1, 4)), w)), 0),
            (-1, 5, 3),
        ),
        (2, 4, 3),
    ),
    "repeated for every example": (
        lambda x, w: x[:, None] * tf.repeat(w, tf.shape(x)[0], axis=0), (1, 1, 1, 4),
    ),
    "sum": (time_first(lambda x, w: x + w), (4,)),
    "difference": (time_first(lambda x, w: w - x), (5, 1, 1)),
    "scale": (time_first(lambda x, w: w * x), (5, 1, 4)),
    "batch last": (
        lambda x, w: tf.transpose(tf.matmul(w, x[:, 0], transpose_a=True, transpose_b=True)),
        (4, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_batch_may_lie_on_any_axis(name):
    function, shape = ELSEWHERE[name]
    assert tape_rows(applied(function, *shape, x=(5, 4)), draw(5, 4)) == []


def test_what_cannot_be_copied_goes_to_the_tape_and_says_so(monkeypatch):
    def broken(*_):
        raise NotImplementedError("no factors today")

    model = applied(lambda x, w: tf.matmul(x, w), 4, 4)
    randomise(model.weights)
    monkeypatch.setattr("perjac._core.planning.decisions.combine", broken)
    engine, x = pj.Engine(model), draw(4)
    with pytest.warns(SlowPathWarning, match="NotImplementedError: no factors today"):
        jac = engine.jacobian(x)
    right = oracle.weight_rows(model, x, model.trainable_variables)
    oracle.assert_agree([jac[v] for v in model.trainable_variables], right, "float64")
    assert {row.path for row in engine.inspect().rows} == {"tape"}
    with pytest.raises(NotImplementedError):
        pj.Engine(model, path="factored").jacobian(x)
