"""One program for XLA: the same rows as without, and a clear word where it cannot be made."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import Floats, Ids, floats, randomise

import perjac as pj
from perjac import progress
from perjac._core.backend import xla
from perjac._core.backend.xla import compiles_whole, why_not
from perjac._core.factors import patches
from perjac._core.factors.reductions import Squares
from perjac.errors import SlowPathWarning

pytestmark = pytest.mark.slow  # left out of `make check`

RNG = np.random.default_rng(3)


@pytest.mark.parametrize(
    ("jit", "devices", "whole"),
    [
        ("auto", ["CPU"], False),
        ("auto", ["CPU", "GPU"], True),
        ("auto", ["CPU", "TPU"], False),
        (True, ["CPU"], True),
        (False, ["CPU", "GPU"], False),
    ],
)
def test_all_is_compiled_on_a_gpu_or_for_whoever_asks(jit, devices, whole):
    assert compiles_whole(jit, devices) is whole


@pytest.mark.parametrize("jit", [True, "auto", False])
def test_engines_go_by_the_devices_there_are(monkeypatch, jit):
    cards = [tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: cards)
    x, model = RNG.normal(size=(2, 4, 4, 2)).astype("f4"), dilated()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        pj.Engine(model, jit=jit).jacobian(x)
    assert bool(about_xla(given)) == (jit is not False)


@pytest.mark.parametrize("jit", [True, False])
def test_windows_are_laid_out_for_xla(monkeypatch, jit):
    under_xla, rows = [], patches.Patches.rows

    def noted(self, delta):
        under_xla.append(xla.is_for_xla())
        return rows(self, delta)

    monkeypatch.setattr(patches.Patches, "rows", noted)
    model = keras.Sequential([keras.Input((6, 6, 4)), layers.Conv2D(4, 3), layers.Flatten()])
    x = RNG.normal(size=(2, 6, 6, 4)).astype("f4")
    pj.Engine(model, jit=jit).jacobian(x, outputs=3)
    assert under_xla
    assert any(under_xla) is jit


def dilated() -> keras.Model:
    """A model that XLA has no kernel for."""
    shape = tf.constant(RNG.normal(size=(2, 2, 2)).astype("f4"))
    return keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            layers.Conv2D(2, 3, padding="same"),
            layers.Lambda(
                lambda x: tf.nn.dilation2d(x, shape, [1] * 4, "SAME", "NHWC", [1] * 4),
                output_shape=(4, 4, 2),
            ),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def about_xla(given: list) -> list[str]:
    return [str(w.message) for w in given if "XLA" in str(w.message)]


def dense():
    return [keras.Input((5,)), layers.Dense(6, "tanh"), layers.Dense(3)], Floats((5,))


def pictures():
    parts = [
        keras.Input((6, 6, 2)),
        layers.Conv2D(8, 3, padding="same"),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.DepthwiseConv2D(3, strides=2),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(3),
    ]
    return parts, Floats((6, 6, 2))


def words():
    parts = [keras.Input((4,), dtype="int32"), layers.Embedding(7, 5), layers.LSTM(4)]
    return [*parts, layers.Dense(3)], Ids((4,), 7)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (dense, "float64"),
        (dense, "float32"),
        pytest.param(pictures, "float64", marks=pytest.mark.more),
        pytest.param(words, "float32", marks=pytest.mark.more),
    ],
)
def test_rows_are_the_same_compiled(make, dtype):
    with floats(dtype):
        parts, example = make()
        model = keras.Sequential(parts)
    randomise(model.weights)
    x, y = example.draw(np.random.default_rng(1), 3, dtype), np.array([0, 2, 1])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    compiled, plain = (pj.Engine(model, jit=jit) for jit in (True, False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = [
            (compiled.jacobian(x), plain.jacobian(x)),
            (compiled.gradients(x, y, loss=loss), plain.gradients(x, y, loss=loss)),
            # Sums of squared rows of an embedding are none of XLA's: asked apart.
            (compiled._summed(Squares(), x), plain._summed(Squares(), x)),
        ]
    for found, right in pairs:
        scale = max(np.abs(rows).max() for rows in right.values())
        for key, rows in right.items():
            error = np.abs(np.asarray(found[key]) - np.asarray(rows)).max()
            assert error <= (1e-10 if dtype == "float64" else 1e-5) * scale, key


def test_what_xla_cannot_compile_is_named_and_goes_without():
    model, x = dilated(), RNG.normal(size=(2, 4, 4, 2)).astype("f4")
    engine = pj.Engine(model, jit=True)
    with pytest.warns(SlowPathWarning, match=r"no kernel for Dilation2D.*without XLA"):
        found = engine.jacobian(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        again = engine.jacobian(x[:1])
        right = pj.Engine(model, jit="auto").jacobian(x)
    for key, rows in right.items():
        np.testing.assert_allclose(found[key], rows, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(again[key], rows[:1], rtol=1e-5, atol=1e-6)


def test_the_tape_is_compiled_where_it_can_be():
    model, x = dilated(), RNG.normal(size=(2, 4, 4, 2)).astype("f4")
    with pytest.warns(SlowPathWarning, match="tape path: it has no kernel for"):
        found = pj.Engine(model, path="tape", jit=True).jacobian(x)
    right = pj.Engine(model, jit=False).jacobian(x)
    for key, rows in right.items():
        np.testing.assert_allclose(found[key], rows, rtol=1e-5, atol=1e-6)
    model = keras.Sequential(dense()[0])
    x = RNG.normal(size=(2, 5)).astype("f4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pj.Engine(model, path="tape", jit=True).jacobian(x)
    for key, rows in pj.Engine(model, jit=False).jacobian(x).items():
        np.testing.assert_allclose(found[key], rows, rtol=1e-5, atol=1e-6)


def test_other_failures_are_told_as_they_are():
    told = why_not(tf.errors.InternalError(None, None, "something else {{node a/b}}\nand more"))
    assert told == "InternalError: something else {{node a/b}} (at a/b)"


@pytest.mark.parametrize(("jit", "told"), [("auto", 1), (True, 2)])
def test_whoever_reads_is_told_what_takes_long(jit, told):
    engine = pj.Engine(keras.Sequential(dense()[0]), jit=jit)
    said = []
    with progress.read(said.append):
        engine.jacobian(np.ones((2, 5), "f4"), outputs=0)
        engine.jacobian(np.ones((2, 5), "f4"), outputs=0)
        engine.jacobian(np.ones((3, 5), "f4"), outputs=0)  # XLA compiles anew
    size = " for batches of 2" if jit is True else ""
    assert said[:4] == [
        "tracing the model", "", f"compiling the sweep{size}", ""
    ]  # fmt: skip
    assert len(said) == 2 * (1 + told)
    engine.jacobian(np.ones((4, 5), "f4"))
    assert len(said) == 2 * (1 + told)  # nobody reads any more
