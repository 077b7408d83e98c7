"""Calls with masks and other arguments: `pj.call` in place of a batch."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from keras import layers
from models import floats, randomise

import perjac as pj
from perjac.errors import InputError

pytestmark = pytest.mark.slow  # left out of `make check`

RNG = np.random.default_rng(4)
X = RNG.standard_normal((3, 5, 4))
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], bool)


def built(layer, *arguments, **options):
    with floats("float64"):
        made = layer(*arguments, **options)
        made(*[X] * (2 if layer is layers.MultiHeadAttention else 1))
    randomise(made.weights)
    return made


def agrees(layer, call, inputs, engine_input, **options) -> None:
    right = oracle.weight_rows(call, inputs, layer.trainable_variables, **options)
    engine = pj.Engine(layer)
    chosen = {name: list(value) for name, value in options.items()}
    jac = engine.jacobian(engine_input, **chosen)
    found = [
        np.reshape(jac[v], r.shape) for v, r in zip(layer.trainable_variables, right, strict=True)
    ]
    oracle.assert_agree(found, right, "float64")
    assert {row.path for row in engine.inspect(x=engine_input).rows} == {"factored"}
    assert engine.verify(engine_input).passed


def test_a_mask_by_name():
    lstm = built(layers.LSTM, 3)
    inputs = {"x": X, "mask": MASK}
    agrees(lstm, lambda d: lstm(d["x"], mask=d["mask"]), inputs, pj.call(X, mask=MASK))


def test_several_arguments_and_options():
    attention = built(layers.MultiHeadAttention, 2, 3)
    agrees(
        attention,
        lambda d: attention(d["q"], d["v"], use_causal_mask=True),
        {"q": X, "v": X**2},
        pj.call(X, X**2, use_causal_mask=True),
        outputs=(0, 7),
    )


def test_a_call_is_refused_where_it_does_not_fit():
    lstm = built(layers.LSTM, 2)
    with pytest.raises(InputError, match="one batch size"):
        pj.Engine(lstm).jacobian(pj.call(X, mask=MASK[:2]))
    with pytest.raises(InputError, match="first argument"):
        pj.call(mask=MASK)
