"""Certificates see every kind of fault on the first call, and see none where there is none."""

from __future__ import annotations

import contextlib
import warnings

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf

import perjac as pj
from perjac import plan, pullback, reference, rules, seeds, trace
from perjac.errors import CertificateError, CertificateWarning, SlowPathWarning
from perjac.independence import Order

L = keras.layers
RNG = np.random.default_rng(0)


def data(*shape, dtype="float32"):
    return RNG.normal(size=shape).astype(dtype)


def mlp(activation="tanh", dtype="float32"):
    with policy(dtype):
        return keras.Sequential(
            [keras.Input((5,)), L.Dense(7, activation), L.Dense(6, activation), L.Dense(3)]
        )


@contextlib.contextmanager
def policy(name):
    """Build under a dtype policy."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    yield
    keras.config.set_dtype_policy(before)


def certificates(engine):
    """Return the certificates of an engine's only trace."""
    ((traced, _),) = engine.traces._made.values()
    return traced._certificates


def recurrent():
    return keras.Sequential([keras.Input((6, 3)), L.LSTM(4, name="lstm"), L.Dense(2)])


def normalised():
    return keras.Sequential([keras.Input((5,)), L.Dense(4), L.BatchNormalization(), L.Dense(3)])


# Each switches one fault on: model, data, and the weights that come out wrong.


def wrong_rule(monkeypatch):
    right = rules.RULES["MatMul"]
    twice = lambda site, delta: right(site, 2 * delta)  # noqa: E731
    monkeypatch.setitem(rules.RULES, "MatMul", twice)
    return mlp(), data(4, 5)


def wrong_order(monkeypatch):
    right = plan._bind
    monkeypatch.setattr(
        plan,
        "_bind",
        lambda program, site, op, batch, order: right(program, site, op, batch, Order()),
    )
    return recurrent(), data(4, 6, 3)


def wrong_parametrisation(monkeypatch):
    def pulled(parametrised, values):
        return {n: rows[..., ::-1] for n, rows in pullback.pull_back(parametrised, values).items()}

    monkeypatch.setattr(plan, "pull_back", pulled)
    model = normalised()
    model.layers[1].gamma.assign(data(4))
    return model, data(4, 5)


def wrong_seeds(monkeypatch):
    row, rows = seeds.row, seeds.rows
    monkeypatch.setattr(seeds, "row", lambda *given: tf.roll(row(*given), 1, -1))
    monkeypatch.setattr(seeds, "rows", lambda *given: tf.roll(rows(*given), 1, -1))
    return mlp(), data(4, 5)


def wrong_trace(monkeypatch):
    right = trace.Program.replay

    def other(self, inputs, *rest, **more):
        return right(self, [tf.abs(t) for t in inputs], *rest, **more)

    monkeypatch.setattr(trace.Program, "replay", other)
    return mlp(), data(4, 5)


SABOTAGES = [wrong_rule, wrong_order, wrong_parametrisation, wrong_seeds, wrong_trace]


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda f: f.__name__)
def test_every_sabotage_is_found_on_the_first_call(sabotage, monkeypatch):
    with monkeypatch.context() as patched:
        model, x = sabotage(patched)
        engine = pj.Engine(model, independence="trust")
        with pytest.warns(CertificateWarning) as told, warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowPathWarning)
            jac = engine.jacobian(x)
        rows = [jac[v] for v in model.trainable_variables]
    right = oracle.weight_rows(model, x, model.trainable_variables)
    oracle.assert_agree(rows, right, "float32")
    named = [v.path for v in model.trainable_variables if v.path in str(told[0].message)]
    assert named
    shown = {row.weight: row for row in engine.inspect().rows}
    assert all(shown[key].path == "tape" for key in named)
    assert all("certificate failed" in shown[key].reason for key in named)


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda f: f.__name__)
def test_never_lets_the_fault_through(sabotage, monkeypatch):
    """Else the tests above would see nothing but their own warnings."""
    model, x = sabotage(monkeypatch)
    jac = pj.Engine(model, certify="never", independence="trust").jacobian(x)
    right = oracle.weight_rows(model, x, model.trainable_variables)
    with pytest.raises(AssertionError):
        oracle.assert_agree([jac[v] for v in model.trainable_variables], right, "float32")
