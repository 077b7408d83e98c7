"""Shapes that nobody thought of: random models of one layer against the oracle."""

from __future__ import annotations

import keras
import numpy as np
import oracle
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from keras import layers
from models import Floats, Ids, floats, randomise

import perjac as pj

few = st.integers(1, 4)
pytestmark = [
    pytest.mark.slow,  # left out of `make check`
    pytest.mark.filterwarnings("ignore::perjac.errors.SlowPathWarning"),
]


def check(example: Floats | Ids, stack, batch: int) -> None:
    """Compare every weight's Jacobian and its norms with the oracle's."""
    with floats("float64"):
        dtype = "int32" if isinstance(example, Ids) else None
        model = keras.Sequential([keras.Input(example.shape, dtype=dtype), *stack()])
    randomise(model.weights)
    x = example.draw(np.random.default_rng(4), batch, "float64")
    right = oracle.weight_rows(model, x, model.trainable_variables)
    jac = pj.Engine(model).jacobian(x)
    found = [np.reshape(jac[v], (*jac.shape[:2], *v.shape)) for v in model.trainable_variables]
    oracle.assert_agree(found, right, "float64")
    squares = sum(np.square(r).reshape(batch, -1).sum(1) for r in right)
    np.testing.assert_allclose(jac.norms(), np.sqrt(squares), rtol=1e-9, atol=1e-12)


@given(batch=few, lead=st.lists(few, max_size=2), width=few, units=few, bias=st.booleans())
def test_dense(batch, lead, width, units, bias):
    check(
        Floats((*lead, width)),
        lambda: [layers.Dense(units, use_bias=bias, activation="tanh"), layers.Dense(2)],
        batch,
    )


@given(
    batch=few,
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels=few,
    filters=few,
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(["same", "valid"]),
)
def test_convolution(batch, size, channels, filters, kernel, strides, dilation, padding):
    assume(strides == 1 or dilation == 1)
    reach = [dilation * (k - 1) + 1 for k in kernel]
    assume(padding == "same" or all(r <= s for r, s in zip(reach, size, strict=True)))
    check(
        Floats((*size, channels)),
        lambda: [
            layers.Conv2D(filters, kernel, strides, padding, dilation_rate=dilation),
            layers.Activation("tanh"),
            layers.GlobalAveragePooling2D(),
        ],
        batch,
    )


@given(
    batch=few,
    size=st.integers(3, 6),
    channels=few,
    multiplier=st.integers(1, 3),
    kernel=st.integers(1, 3),
    strides=st.integers(1, 3),
    padding=st.sampled_from(["same", "valid"]),
)
def test_depthwise_convolution(batch, size, channels, multiplier, kernel, strides, padding):
    check(
        Floats((size, size, channels)),
        lambda: [
            layers.DepthwiseConv2D(kernel, strides, padding, depth_multiplier=multiplier),
            layers.Activation("tanh"),
            layers.GlobalAveragePooling2D(),
        ],
        batch,
    )


EQUATIONS = {  # equation: how the output shape is made of the sizes of its letters
    "bi,io->bo": "o",
    "bti,io->bto": "to",
    "bti,ihk->bthk": "thk",
    "bthk,hkd->btd": "td",
    "bti,tio->bto": "to",
    "bti,ts->bsi": "si",
    "bti,iht->bh": "h",
    "bti,io->bot": "ot",
    "bti,i->bti": "ti",
}


@given(
    batch=few,
    equation=st.sampled_from(sorted(EQUATIONS)),
    sizes=st.fixed_dictionaries(dict.fromkeys("tiohkds", few)),
)
def test_einsum(batch, equation, sizes):
    inside = equation.split(",")[0][1:]
    output = tuple(sizes[letter] for letter in EQUATIONS[equation])
    check(
        Floats(tuple(sizes[letter] for letter in inside)),
        lambda: [layers.EinsumDense(equation, output, activation="tanh")],
        batch,
    )


@given(batch=few, length=few, vocabulary=st.integers(2, 4), width=few)
def test_embedding(batch, length, vocabulary, width):
    check(
        Ids((length,), below=vocabulary),
        lambda: [
            layers.Embedding(vocabulary, width),
            layers.Activation("tanh"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(2),
        ],
        batch,
    )


def test_an_embedding_of_one_word():
    check(Ids((2,), below=1), lambda: [layers.Embedding(1, 3), layers.Flatten()], batch=2)


def test_an_empty_batch_does_not_run_the_model():
    # TensorFlow mistakes the width of what a convolution and a pooling make of nothing.
    model = keras.Sequential(
        [keras.Input((6, 3)), keras.layers.Conv1D(3, 2), keras.layers.GlobalMaxPooling1D(),
         keras.layers.Dense(2)]
    )  # fmt: skip
    jac = pj.Engine(model).jacobian(np.zeros((0, 6, 3), "float32"))
    assert jac.outputs.shape == (0, 2)
    assert jac.norms().shape == (0,)
