"""`verify` sees every sabotage, and reports no right model as wrong, whatever the examples."""

from __future__ import annotations

import dataclasses
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import floats, randomise

import perjac as pj
from perjac._core import rules
from perjac._core.planning import decisions
from perjac._core.runtime import live_model, session
from perjac.cli import main

pytestmark = pytest.mark.slow  # left out of `make check`

RNG = np.random.default_rng(0)


def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(1).standard_normal(shape)).astype("float32")


def stack(shape: tuple[int, ...], *inside: layers.Layer, dtype: str | None = None) -> keras.Model:
    return keras.Sequential([keras.Input(shape, dtype=dtype), *inside])


def mlp() -> keras.Model:
    return stack((5,), layers.Dense(4, activation="tanh"), layers.Dense(3, activation="softmax"))


def normed() -> keras.Model:
    return stack((5,), layers.Dense(4), layers.BatchNormalization(), layers.Dense(2))


def dilated() -> keras.Model:
    return stack(
        (8, 8, 1), layers.Conv2D(2, 3, dilation_rate=2, activation="tanh"), layers.Flatten(),
        layers.Dense(2),
    )  # fmt: skip


def recurrent() -> keras.Model:
    return stack((4, 3), layers.LSTM(3), layers.Dense(2))


def built(make, seed: int = 0) -> keras.Model:
    keras.utils.set_random_seed(seed)
    model = make()
    randomise(model.weights)
    return model


def doubled(monkeypatch, kind: str) -> None:
    """Let a rule see cotangents that are twice too large."""
    right = rules.RULES[kind]
    monkeypatch.setitem(rules.RULES, kind, lambda site, cotangent: right(site, 2 * cotangent))


def in_another_order(monkeypatch) -> None:
    """Let examples be taken for the slowest along a folded axis where they run fastest."""
    right = decisions._bind

    def bind(*arguments):
        bound = right(*arguments)
        return dataclasses.replace(bound, inner=not bound.inner)

    monkeypatch.setattr(decisions, "_bind", bind)


def halfway_back(monkeypatch) -> None:
    """Let rows go back to the variables without one step of the parametrisation."""
    right = decisions.pull_back

    def pull_back(parametrised, values):
        found = right(parametrised, values)
        return {number: rows * 1.5 for number, rows in found.items()}

    monkeypatch.setattr(decisions, "pull_back", pull_back)


def of_another_model(monkeypatch) -> None:
    """Let the trace be of a model with another activation."""
    right = session.tracing.trace

    def trace(callee, *rest):
        changed = dataclasses.replace(callee, function=lambda x: tf.math.sin(callee.function(x)))
        return right(changed, *rest)

    monkeypatch.setattr(session.tracing, "trace", trace)


SABOTAGED = {
    "rule": (mlp, (5,), lambda patch: doubled(patch, "MatMul")),
    "rule of biases": (mlp, (5,), lambda patch: doubled(patch, "BiasAdd")),
    "rule in a loop": (recurrent, (4, 3), lambda patch: doubled(patch, "MatMul")),
    "order": (dilated, (8, 8, 1), in_another_order),
    "order in a loop": (recurrent, (4, 3), in_another_order),
    "parametrisation": (normed, (5,), halfway_back),
    "trace": (mlp, (5,), of_another_model),
}


LONG = ("normed", "pictures", "recurrent", "attention")


def some_and_more(names):
    return [pytest.param(n, marks=[pytest.mark.more] if n in LONG else []) for n in names]


@pytest.mark.parametrize("name", SABOTAGED)
def test_every_sabotage_is_seen(monkeypatch, name):
    make, shape, sabotage = SABOTAGED[name]
    model, x = built(make), draw(4, *shape)
    assert pj.Engine(model).verify(x).passed
    sabotage(monkeypatch)
    report = pj.Engine(model).verify(x)
    assert report.verdict == "failed"
    assert not report.passed
    assert report.failed
    assert report.failed[0] in str(report)
    assert "FAILED" in str(report)


@pytest.mark.parametrize("name", ["rule", "order", "parametrisation", "trace"])
def test_the_command_ends_with_status_1_where_something_is_wrong(
    monkeypatch, capfd, tmp_path, name
):
    make, shape, sabotage = SABOTAGED[name]
    built(make).save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", draw(4, *shape))
    sabotage(monkeypatch)
    data = [] if name == "rule" else [str(tmp_path / "x.npy")]  # or made up
    status, said = command(monkeypatch, capfd, str(tmp_path / "model.keras"), *data)
    assert status == 1, said
    assert "FAILED" in said


def command(monkeypatch, capfd, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["perjac", "verify", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return stop.value.code, "".join(capfd.readouterr())


def test_a_model_changed_after_its_trace_is_not_compared_with_itself():
    model, x = built(mlp), draw(4, 5)
    engine = pj.Engine(model)
    engine.jacobian(x)
    model.layers[0].activation = keras.activations.relu
    report = engine.verify(x)
    right = pj.Engine(model).jacobian(x).matrix()
    anew = np.allclose(engine.jacobian(x).matrix(), right)  # which an engine may notice
    assert report.verdict == ("passed" if anew else "failed")


@pytest.mark.parametrize("scale", [1e-30, 1e6])
@pytest.mark.parametrize("name", ["rule", "trace"])
def test_a_sabotage_is_not_taken_for_rounding(monkeypatch, name, scale):
    make, shape, sabotage = SABOTAGED[name]
    model = built(make)
    sabotage(monkeypatch)
    assert not pj.Engine(model).verify(draw(4, *shape, scale=scale)).passed


# --- Right models ---------------------------------------------------------------------------


def attention() -> keras.Model:
    x = keras.Input((4, 6))
    h = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 3)(x, x))
    return keras.Model(x, layers.Dense(3, activation="softmax")(layers.Flatten()(h)))


def words() -> keras.Model:
    return stack(
        (6,), layers.Embedding(9, 4), layers.GlobalAveragePooling1D(),
        layers.Dense(3, activation="sigmoid"), dtype="int32",
    )  # fmt: skip


def pictures() -> keras.Model:
    return stack(
        (8, 8, 2), layers.Conv2D(3, 3), layers.BatchNormalization(), layers.ReLU(),
        layers.MaxPooling2D(), layers.SeparableConv2D(4, 2), layers.Flatten(),
        layers.Dense(3, activation="softmax"),
    )  # fmt: skip


RIGHT = {
    "mlp": (mlp, (5,)),
    "normed": (normed, (5,)),
    "attention": (attention, (4, 6)),
    "pictures": (pictures, (8, 8, 2)),
    "recurrent": (recurrent, (4, 3)),
    "words": (words, (6,)),
}


def examples(name: str, scale: float = 1.0) -> np.ndarray:
    shape = RIGHT[name][1]
    if name == "words":
        return RNG.integers(0, 9, (4, *shape)).astype("int32")
    return draw(4, *shape, scale=scale)


@pytest.mark.parametrize("policy", ["float32", "float64", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", some_and_more(RIGHT))
def test_a_right_model_passes_in_every_type(name, policy):
    usual = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = built(RIGHT[name][0])
    finally:
        keras.config.set_dtype_policy(usual)
    report = pj.Engine(model).verify(examples(name))
    assert report.passed, str(report)
    assert report.dtype == "float64"
    assert "itself" in report.reference
    assert model.dtype_policy.name == policy  # which the model has back


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e3, 1e6, 1e30])
@pytest.mark.parametrize("name", some_and_more(name for name in RIGHT if name != "words"))
def test_no_scale_of_the_examples_makes_a_right_model_fail(name, scale):
    report = pj.Engine(built(RIGHT[name][0])).verify(examples(name, scale))
    assert report.verdict != "failed", str(report)
    assert report.passed or report.undecided


def saturated() -> keras.Model:
    norm = layers.Normalization()
    norm.adapt(np.random.default_rng(0).normal(0.05, 0.01, (300, 5)).astype("float32"))
    return stack((5,), norm, layers.Dense(8, activation="relu"), layers.Dense(1, "sigmoid"))


def test_saturated_outputs_are_compared_before_the_sigmoid(monkeypatch):
    model, x = built(saturated), draw(4, 5, scale=100)
    report = pj.Engine(model).verify(x)
    assert report.passed, str(report)
    assert "before the final softmax or sigmoid" in report.note
    doubled(monkeypatch, "MatMul")
    assert pj.Engine(model).verify(x).verdict == "failed"


def test_saturation_inside_the_model_is_no_verdict():
    model = built(lambda: stack((5,), layers.Dense(4, "sigmoid"), layers.Dense(2, "tanh")))
    report = pj.Engine(model).verify(draw(4, 5, scale=1e5))
    assert report.verdict == "undecided"
    assert not report.passed
    assert report.undecided
    assert "could not tell" in str(report)


def dead() -> keras.Model:
    """A model without a gradient where its inputs are negative."""
    model = stack((5,), layers.Dense(4, "relu", use_bias=False), layers.Dense(2))
    model.layers[0].kernel.assign(np.ones((5, 4)))
    return model


def test_dead_units_are_no_verdict_unless_no_example_wakes_them():
    model = dead()
    report = pj.Engine(model).verify(-np.abs(draw(4, 5)))
    assert report.verdict == "undecided"
    assert report.undecided == [v.path for v in model.trainable_variables[:2]]
    model.layers[1].kernel.assign(np.zeros((4, 2)))  # now nothing goes through for any example
    report = pj.Engine(model).verify(draw(4, 5))
    assert report.passed, str(report)
    assert report.zero == [model.layers[0].kernel.path]


def test_the_command_says_that_it_could_not_tell(monkeypatch, capfd, tmp_path):
    dead().save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", -np.abs(draw(4, 5)))
    status, said = command(
        monkeypatch, capfd, str(tmp_path / "model.keras"), str(tmp_path / "x.npy")
    )
    assert (status, "could not tell" in said) == (3, True)


def test_the_command_makes_up_examples_until_they_tell(monkeypatch, capfd, tmp_path):
    model = stack((5,), layers.Rescaling(1e4), layers.Dense(4, "sigmoid"), layers.Dense(2))
    model.save(tmp_path / "model.keras")
    status, said = command(monkeypatch, capfd, str(tmp_path / "model.keras"))
    assert status in (0, 3), said
    assert "making up others" in said


def test_a_random_model_is_no_verdict():
    model = built(lambda: stack((5,), layers.Dense(4), layers.Dropout(0.5), layers.Dense(2)))
    report = pj.Engine(model, training=True).verify(draw(4, 5))
    assert report.verdict == "undecided"
    assert "random" in report.note


# --- The reference --------------------------------------------------------------------------


class Insisting(layers.Layer):
    """Computes in float32 whatever it is told."""

    def call(self, x):
        return tf.cast(tf.tanh(tf.cast(x, "float32") * tf.constant(0.5)), x.dtype)


class Module(tf.Module):
    def __init__(self):
        self.w = tf.Variable(draw(5, 3))

    @tf.function
    def __call__(self, x):
        return tf.nn.softmax(tf.tanh(x @ self.w) * tf.constant(3.0))


def test_a_layer_that_insists_on_float32_is_traced_afresh():
    model = built(lambda: stack((5,), layers.Dense(4), Insisting(), layers.Dense(2)))
    report = pj.Engine(model).verify(draw(4, 5))
    assert report.passed, str(report)
    assert report.dtype == "float64"


def test_modules_and_functions_are_traced_afresh():
    module = Module()
    w = tf.Variable(draw(5, 3))
    for engine in (pj.Engine(module), pj.Engine(lambda x: tf.sin(x @ w), variables=[w])):
        report = engine.verify(draw(4, 5))
        assert report.passed, str(report)
        assert report.dtype == "float64"
        assert "fresh trace" in report.reference


def test_the_logits_of_a_model_can_be_verified():
    report = pj.Engine(built(mlp)).verify(draw(4, 5), of="logits")
    assert report.passed, str(report)
    assert pj.Engine(Module()).verify(draw(4, 5), of="logits").passed


def test_a_hidden_layer_can_be_verified():
    model = built(mlp)
    report = pj.Engine(model).verify(draw(4, 5), of=model.layers[0])
    assert report.passed, str(report)


def test_a_model_without_a_float64_kernel_is_compared_in_its_own_type(monkeypatch):
    model, x = built(mlp), draw(4, 5)
    monkeypatch.setattr(live_model, "in_float64", lambda *_: iter(()))
    report = pj.Engine(model).verify(x)
    assert report.passed, str(report)
    assert report.dtype == "float32"
    assert "does not run in float64" in report.note
    doubled(monkeypatch, "MatMul")
    assert pj.Engine(model).verify(x).verdict == "failed"


def test_a_reference_of_another_model_is_not_used(monkeypatch):
    model, x = built(mlp), draw(4, 5)
    right = live_model._widened_layers

    def wrong(live):
        return right(dataclasses.replace(live, call=lambda x: 2 * live.call(x)))

    monkeypatch.setattr(live_model, "_widened_layers", wrong)
    report = pj.Engine(model).verify(x)
    assert report.passed, str(report)
    assert "fresh trace" in report.reference


def test_examples_of_float64_models_are_compared_to_float64():
    with floats("float64"):
        model = built(mlp)
    report = pj.Engine(model).verify(draw(4, 5).astype("float64"))
    assert (report.passed, report.rtol) == (True, 1e-10)
    assert report.worst[1] < 1e-12
