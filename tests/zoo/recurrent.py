"""The recurrent layers of keras.layers, their cells, and what wraps them.

Importing this module enters them into `entry.ENTRIES`.

Not here: stateful=True. The state's variable has a row for each example of one size of batch, and
a call changes it, so there is no function of one example to differentiate.
"""

from __future__ import annotations

import keras
from keras import layers, ops
from models import Floats, Ids

from zoo.entry import Padded
from zoo.stacks import enter_table

SEQUENCE = Floats((4, 3))
PADDED = Padded((5, 3))
IDS = Ids((5,), below=4)
KINDS = {"lstm": layers.LSTM, "gru": layers.GRU, "simplernn": layers.SimpleRNN}
CELLS = {"lstm": layers.LSTMCell, "gru": layers.GRUCell, "simplernn": layers.SimpleRNNCell}


def of(kind, *arguments, **options):
    """Return for a table what puts a new layer of this kind on the input."""
    return lambda x: kind(*arguments, **options)(x)


def masked(kind, *arguments, **options):
    return lambda x: kind(*arguments, **options)(layers.Masking()(x))


def embedded(kind, *arguments, **options):
    return lambda ids: kind(*arguments, **options)(layers.Embedding(4, 3, mask_zero=True)(ids))


def started(kind):
    """Return a layer that starts from a state which comes with the data."""

    def function(x, *states):
        return kind(3)(x, initial_state=list(states))

    return function


def handed_on(kind):
    """Return an encoder, and a decoder of the same sequence that starts from its state."""

    def function(x):
        _, *states = kind(3, return_state=True)(x)
        return kind(3, return_sequences=True)(x, initial_state=states)

    return function


def twice(kind):
    return lambda x: kind(2)(kind(3, return_sequences=True)(x))


ONWARDS = {
    "": {},
    " sequences": {"return_sequences": True},
    " state": {"return_state": True},
    " sequences and state": {"return_sequences": True, "return_state": True},
    " backwards": {"go_backwards": True, "return_sequences": True},
    " unrolled": {"unroll": True, "return_sequences": True},
    " without bias": {"use_bias": False},
    " relu": {"activation": "relu"},
    " dropout": {"dropout": 0.5, "recurrent_dropout": 0.5},
}
WITH_MASK = {
    " masked": {},
    " masked sequences": {"return_sequences": True},
    " masked state": {"return_state": True},
    " masked backwards": {"go_backwards": True},
    " masked unrolled": {"unroll": True},
}
for name, kind in KINDS.items():
    states = 2 if name == "lstm" else 1
    enter_table(
        {
            SEQUENCE: {
                **{name + how: of(kind, 3, **options) for how, options in ONWARDS.items()},
                f"{name} stacked": twice(kind),
                f"{name} state handed on": handed_on(kind),
            },
            Floats((1, 3)): {f"{name} of one step": of(kind, 3)},
            PADDED: {name + how: masked(kind, 3, **options) for how, options in WITH_MASK.items()},
            IDS: {f"{name} mask_zero": embedded(kind, 3)},
            (SEQUENCE, *[Floats((3,))] * states): {f"{name} initial state": started(kind)},
        }
    )
enter_table(
    {
        SEQUENCE: {
            "gru reset before": of(layers.GRU, 3, reset_after=False),
            "gru reset before sequences": of(
                layers.GRU, 3, reset_after=False, return_sequences=True
            ),
            "gru reset before unrolled": of(layers.GRU, 3, reset_after=False, unroll=True),
            "lstm hard sigmoid": of(layers.LSTM, 3, recurrent_activation="hard_sigmoid"),
        },
        PADDED: {"gru reset before masked": masked(layers.GRU, 3, reset_after=False)},
    }
)


class Leaky(layers.Layer):
    """A cell of our own: two states of different width, and a weight that only scales."""

    def __init__(self):
        super().__init__()
        self.state_size, self.output_size = [3, 2], 5
        self.inner, self.outer = layers.Dense(3), layers.Dense(2, use_bias=False)

    def build(self, shape):
        self.inner.build((shape[0], shape[-1] + 2))
        self.outer.build((shape[0], 3))
        self.leak = self.add_weight(shape=(3,), name="leak")

    def call(self, x, states):
        fast, slow = states
        driven = ops.tanh(self.inner(ops.concatenate([x, slow], axis=-1)))
        fast = fast * ops.sigmoid(self.leak) + driven
        slow = 0.5 * slow + self.outer(fast)
        return ops.concatenate([fast, slow], axis=-1), [fast, slow]


def layered_cells():
    return layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(2), layers.SimpleRNNCell(2)])


def rnn(cell, **options):
    return lambda x: layers.RNN(cell(), **options)(x)


def rnn_masked(cell, **options):
    return lambda x: layers.RNN(cell(), **options)(layers.Masking()(x))


EVERY_CELL = {
    **{f"{name}cell": lambda cell=cell: cell(3) for name, cell in CELLS.items()},
    "a custom cell": Leaky,
    "stackedrnncells": layered_cells,
}
for name, cell in EVERY_CELL.items():
    enter_table(
        {
            SEQUENCE: {
                f"rnn over {name}": rnn(cell),
                f"rnn over {name} sequences and state": rnn(
                    cell, return_sequences=True, return_state=True
                ),
                f"rnn over {name} unrolled": rnn(cell, unroll=True, go_backwards=True),
            },
            PADDED: {
                f"rnn over {name} masked": rnn_masked(cell, return_sequences=True),
                f"rnn over {name} masked to zero": rnn_masked(
                    cell, return_sequences=True, zero_output_for_mask=True
                ),
            },
        }
    )


def called_once(cell):
    """Return a cell used as a layer: one step, from states made of the data."""

    def function(x):
        count = 2 if cell is layers.LSTMCell else 1
        return cell(3)(x, [layers.Dense(3)(x) for _ in range(count)])[0]

    return function


enter_table(
    {Floats((4,)): {f"{name}cell by itself": called_once(cell) for name, cell in CELLS.items()}}
)


def two_ways(kind, merge_mode="concat", **options):
    return lambda x: layers.Bidirectional(kind(3, **options), merge_mode=merge_mode)(x)


def two_ways_masked(kind, **options):
    return lambda x: layers.Bidirectional(kind(3, **options))(layers.Masking()(x))


def two_different_ways(x):
    backward = layers.LSTM(3, go_backwards=True, activation="relu")
    return layers.Bidirectional(layers.LSTM(3), backward_layer=backward, merge_mode="concat")(x)


MERGES = {"concat": "concat", "sum": "sum", "mul": "mul", "ave": "ave", "unmerged": None}
enter_table(
    {
        SEQUENCE: {
            **{
                f"{name} bidirectional {merge}": two_ways(kind, mode)
                for name, kind in KINDS.items()
                for merge, mode in MERGES.items()
            },
            **{
                f"{name} bidirectional sequences": two_ways(kind, return_sequences=True)
                for name, kind in KINDS.items()
            },
            "lstm bidirectional state": two_ways(layers.LSTM, return_state=True),
            "lstm bidirectional unrolled": two_ways(layers.LSTM, unroll=True),
            "lstm bidirectional of two kinds": two_different_ways,
            "rnn bidirectional": lambda x: layers.Bidirectional(layers.RNN(layers.GRUCell(3)))(x),
            "lstm bidirectional twice": lambda x: layers.Bidirectional(layers.LSTM(2))(
                layers.Bidirectional(layers.LSTM(2, return_sequences=True))(x)
            ),
        },
        PADDED: {
            f"{name} bidirectional masked": two_ways_masked(kind, return_sequences=True)
            for name, kind in KINDS.items()
        },
    }
)


def small_model():
    return keras.Sequential(
        [keras.Input((3, 2)), layers.Flatten(), layers.Dense(3, activation="tanh")]
    )


def each_step(make):
    return lambda x: layers.TimeDistributed(make())(x)


enter_table(
    {
        SEQUENCE: {
            "timedistributed dense": each_step(lambda: layers.Dense(2)),
            "timedistributed dense twice": lambda x: layers.TimeDistributed(layers.Dense(2))(
                layers.TimeDistributed(layers.Dense(3, activation="tanh"))(x)
            ),
            "timedistributed layernormalization": each_step(lambda: layers.LayerNormalization()),
        },
        PADDED: {
            "timedistributed dense masked": lambda x: layers.TimeDistributed(layers.Dense(2))(
                layers.Masking()(x)
            ),
        },
        Floats((3, 4, 3, 2)): {
            "timedistributed conv2d": each_step(lambda: layers.Conv2D(2, 2)),
            "timedistributed depthwiseconv2d": each_step(lambda: layers.DepthwiseConv2D(2)),
            "timedistributed conv2dtranspose": each_step(lambda: layers.Conv2DTranspose(2, 2)),
            "timedistributed batchnormalization": each_step(lambda: layers.BatchNormalization()),
        },
        Floats((2, 3, 2)): {
            "timedistributed lstm": each_step(lambda: layers.LSTM(2)),
            "timedistributed model": each_step(small_model),
            "timedistributed timedistributed": each_step(
                lambda: layers.TimeDistributed(layers.Dense(2))
            ),
            "timedistributed conv1d into gru": lambda x: layers.GRU(2)(
                layers.TimeDistributed(layers.Flatten())(
                    layers.TimeDistributed(layers.Conv1D(2, 2))(x)
                )
            ),
        },
        Ids((2, 3), below=4): {
            "timedistributed embedding": each_step(lambda: layers.Embedding(4, 2)),
        },
    }
)


def convlstm_masked(x):
    seen = ops.any(ops.not_equal(x, 0), axis=(2, 3, 4))  # Masking would give a mask of pixels
    return layers.ConvLSTM2D(1, 2, return_sequences=True)(x, mask=seen)


MOVING = {
    "": {},
    " same": {"padding": "same", "return_sequences": True},
    " strided": {"strides": 2},
    " dilated": {"dilation_rate": 2, "padding": "same"},
    " backwards": {"go_backwards": True, "return_state": True},
    " without bias": {"use_bias": False},
    " dropout": {"dropout": 0.5, "recurrent_dropout": 0.5},
}
enter_table(
    {
        Floats((3, 6, 2)): {
            "convlstm1d" + how: of(layers.ConvLSTM1D, 2, 2, **options)
            for how, options in MOVING.items()
        },
        Floats((3, 4, 5, 2)): {
            **{
                "convlstm2d" + how: of(layers.ConvLSTM2D, 2, 2, **options)
                for how, options in MOVING.items()
            },
            "convlstm2d bidirectional": lambda x: layers.Bidirectional(
                layers.ConvLSTM2D(1, 2, return_sequences=True)
            )(x),
        },
        Floats((2, 3, 3, 3, 1)): {
            "convlstm3d": of(layers.ConvLSTM3D, 1, 2),
            "convlstm3d same": of(layers.ConvLSTM3D, 1, 2, padding="same", return_sequences=True),
        },
        Padded((4, 4, 3, 1)): {"convlstm2d masked": convlstm_masked},
    }
)
