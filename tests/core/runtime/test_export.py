"""Exported programs, run by PJRT, against TensorFlow's own results."""

from __future__ import annotations

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from sampling import every

import perjac as pj
from perjac import pjrt
from perjac._core.factors import patches

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def dense(dtype):
    return keras.Sequential(
        [
            keras.Input((4,), dtype=dtype),
            layers.Dense(5, "tanh", dtype=dtype),
            layers.Dense(3, dtype=dtype),
        ]
    )


def convolutional(dtype):
    return keras.Sequential(
        [
            keras.Input((6, 6, 1), dtype=dtype),
            layers.Conv2D(3, 3, activation="relu", dtype=dtype),
            layers.MaxPooling2D(2, dtype=dtype),
            layers.Flatten(dtype=dtype),
            layers.Dense(3, dtype=dtype),
        ]
    )


def embedded(dtype):
    ids = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4, dtype=dtype)(ids)
    x = layers.LayerNormalization(dtype=dtype)(x)
    return keras.Model(ids, layers.Dense(3, dtype=dtype)(layers.Flatten(dtype=dtype)(x)))


def recurrent(dtype):
    ids = keras.Input((5,), dtype="int32")
    x = layers.GRU(3, return_sequences=True, dtype=dtype)(layers.Embedding(7, 2, dtype=dtype)(ids))
    return keras.Model(ids, layers.Dense(2, dtype=dtype)(x))  # an output of two axes


def batch(model, size=4):
    (spec,) = model.inputs
    shape = (size, *spec.shape[1:])
    if spec.dtype == "int32":
        return RNG.integers(0, 7, shape).astype("int32")
    return RNG.normal(size=shape).astype(spec.dtype)


CASES = [
    (make, job, dtype)
    for make in (dense, convolutional, embedded)
    for job in ("jacobian", "inputs", "diagonal", "gradients", "norms")
    for dtype in ("float32", "float64")
    if (make, job) != (embedded, "inputs") and (dtype == "float32" or job in ("jacobian", "norms"))
]  # integers have no derivative
CASES += [(recurrent, "jacobian", "float64"), (recurrent, "diagonal", "float32")]


@pytest.mark.parametrize(
    ("make", "job", "dtype"), every(2, CASES), ids=lambda part: getattr(part, "__name__", part)
)
def test_programs_compute_what_the_engine_computes(make, job, dtype, tmp_path):
    model = make(dtype)
    x, y = batch(model), RNG.integers(0, 3, 4)
    engine = pj.Engine(model)
    if job == "inputs":
        options = {"job": "jacobian", "wrt": "inputs"}
        expected = dict(engine.jacobian(x, wrt="inputs").items())
    elif job in ("jacobian", "diagonal"):
        options, jac = {"job": job}, engine.jacobian(x)
        expected = dict(jac.items()) if job == "jacobian" else jac.diagonal()
    else:
        options, grads = {"job": job, "loss": LOSS}, engine.gradients(x, y, loss=LOSS)
        expected = dict(grads.items()) if job == "gradients" else {"norms": grads.norms()}
    about = (x, y) if "loss" in options else (x,)
    program = pjrt.load(engine.export(tmp_path / "program.stablehlo", *about, **options))
    found = program(*about)
    scale = max(float(np.abs(rows).max()) for rows in expected.values())
    for key, rows in expected.items():
        assert (found[key].dtype.name, found[key].shape) == (dtype, tuple(rows.shape))
        error = np.abs(np.asarray(found[key]) - np.asarray(rows)).max() / scale
        assert error < (1e-13 if dtype == "float64" else 2e-6), key


def test_other_data_and_other_weights(tmp_path):
    model, other = dense("float32"), dense("float32")
    engine = pj.Engine(model)
    x = batch(model)
    program = pjrt.load(engine.export(tmp_path / "p.stablehlo", x))
    moved = batch(model)
    swapped = {v.path: v.numpy() for v in other.variables}
    names = [each["name"] for each in program.manifest["variables"]]
    values = dict(zip(names, swapped.values(), strict=True))
    rows = program(moved, variables=values)
    for key, expected in zip(names, pj.Engine(other).jacobian(moved).values(), strict=True):
        np.testing.assert_allclose(rows[key], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows["outputs"], other(moved), rtol=1e-5, atol=1e-6)


def test_programs_run_without_tensorflow(tmp_path):
    model = dense("float32")
    path = pj.Engine(model).export(tmp_path / "p.stablehlo", batch(model))
    code = (
        "import sys, numpy as np; from perjac import pjrt; "
        f"rows = pjrt.load({str(path)!r})(np.ones((4, 4), 'float32')); "
        "print(sum(v.size for v in rows.values()), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(4 * 3 * (43 + 1)), "False"]


def test_programs_take_no_groups_of_channels(tmp_path, monkeypatch):
    model = keras.Sequential(
        [keras.Input((6, 6, 4)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(3)]
    )
    x, y = RNG.normal(size=(5, 6, 6, 4)).astype("float32"), RNG.integers(0, 3, 5)
    runs, calls, grouped = patches._groups_run(tf.float32), [], patches.Patches._grouped

    def noted(self, delta):
        calls.append(delta)
        return grouped(self, delta)

    monkeypatch.setattr(patches.Patches, "_grouped", noted)
    rows = {k: np.asarray(v) for k, v in pj.Engine(model).gradients(x, y, loss=LOSS).items()}
    assert bool(calls) == runs  # where they are quick, which is outside XLA
    calls.clear()
    program = pjrt.load(pj.Engine(model).export(tmp_path / "p", x, y, job="gradients", loss=LOSS))
    assert not [delta for delta in calls if delta.shape[0] == 5]  # checks know no batch size
    found = program(x, y)
    for key, expected in rows.items():
        np.testing.assert_allclose(found[key], expected, rtol=1e-5, atol=1e-6)


def test_chosen_outputs_and_the_manifest(tmp_path):
    model = dense("float32")
    engine, x = pj.Engine(model), batch(model, 2)
    path = engine.export(tmp_path / "p.stablehlo", x, outputs=[2], wrt=model.layers[-1])
    manifest = json.loads(path.with_suffix(".json").read_text())
    (given,) = manifest["inputs"]
    assert (given["shape"], given["dtype"]) == ([2, 4], "float32")
    jac = engine.jacobian(x, outputs=[2], wrt=model.layers[-1])
    shapes = {each["name"]: tuple(each["shape"]) for each in manifest["outputs"]}
    assert shapes == {"outputs": (2, 3)} | {key: tuple(rows.shape) for key, rows in jac.items()}
    found = pjrt.load(path)(x)
    for key in jac:
        np.testing.assert_allclose(found[key], jac[key], rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path):
    model = dense("float32")
    engine, x = pj.Engine(model), batch(model)
    path = engine.export(tmp_path / "p.stablehlo", x)
    program = pjrt.load(path)
    with pytest.raises(pj.errors.InputError, match=r"\(4, 4\).*exported.*\(3, 4\)"):
        program(x[:3])
    with pytest.raises(pj.errors.InputError, match="1 inputs.*2"):
        program(x, x)
    with pytest.raises(pj.errors.InputError, match="no variable 'kernel'"):
        program(x, variables={"kernel": x})
    with pytest.raises(pj.errors.InputError, match="job= one of"):
        engine.export(tmp_path / "p.stablehlo", x, job="hessian")
    with pytest.raises(pj.errors.InputError, match="no folder"):
        engine.export(tmp_path / "nowhere" / "p.stablehlo", x)
    with pytest.raises(pj.errors.FileFormatError, match="There is no"):
        pjrt.load(tmp_path / "q.stablehlo")
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(pj.errors.FileFormatError, match="no manifest of format"):
        pjrt.load(path)


def test_weights_for_the_tape_are_named(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    engine = pj.Engine(model, path="tape")
    with pytest.raises(pj.errors.PathError, match="need the tape.*kernel"):
        engine.export(tmp_path / "p.stablehlo", batch(model))
