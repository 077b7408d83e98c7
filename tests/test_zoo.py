"""The zoo: Jacobians of every model agree with the oracle, and no weight leaves the factored path
unless it is said here."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import oracle
import pytest
import tensorflow as tf
import zoo.entry
from models import Subject
from zoo import applications, coverage, page

import perjac as pj
from perjac.errors import DisconnectedWarning, ExamplesMeetError, SlowPathWarning

zoo.everything()
ENTRIES = zoo.entry.ENTRIES
EPSILON = {
    "float64": 2**-52, "float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7, "float8": 2**-23
}  # fmt: skip
TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "float8": 1e-2}
# Models that have weights on the tape path, and why.
OWN_GRADIENT = "its custom gradient is a gradient by the weight too"
VAGUE = "how often the loop runs is no number, or the weight meets the data in a loop within it"
BRANCH = "it meets the data in a branch"
ON_THE_TAPE = {
    "recompute_grad": OWN_GRADIENT,
    "rematerialised": OWN_GRADIENT,
    "custom gradient of the weight": OWN_GRADIENT,
    "custom gradient with variables inside": OWN_GRADIENT,
    "dense quantised to float8": OWN_GRADIENT,
    "einsumdense quantised to float8": OWN_GRADIENT,
    "cond on a weight": BRANCH,
    "keras cond": BRANCH,
    "switch_case": BRANCH,
    "cond in a while": BRANCH,
    "while of as many steps as the batch needs": VAGUE,
    "while in a while": VAGUE,
    "map_fn over examples": VAGUE,
    "while with weights by step": "each step has another part of the weight",
    "convlstm1d dilated": "dilation folds positions into the batch within a step",
    "convlstm2d dilated": "dilation folds positions into the batch within a step",
    "linear system": "no rule for MatrixSolve",
    "triangular system": "no rule for MatrixTriangularSolve",
    "dilation by a weight": "no rule for Dilation2D",
    "gather of columns by data": "no rule for rows looked up along another axis",
    "complex matmul": "no rule for complex numbers",
    "fourier filter": "no rule for complex numbers",
}
# Models of which the graph does not tell that their examples stay apart, and why: 1 % of all.
PROBED = {
    "while of as many steps as the batch needs": "the data decides how often it runs",
    "map_fn over examples": "a list of examples, read by a number that changes",
    "discretization one_hot": "Keras counts as many bins as the data needs",
    "categoryencoding multi_hot": "the same",
    "categoryencoding count": "the same",
    "integerlookup tf_idf": "the same",
    "hashedcrossing into embedding": "no provenance rule for sparse tensors",
    "recompute_grad": "a gradient by variables cannot be copied, nor looked into",
    "rematerialised": "the same",
}
# Examples meet in it: in a branch that the whole batch decides about.
REFUSED = "cond on the batch"


# `make test` takes every eighth model, `make more` the others.
SAMPLE = 8
# Members that take the longest, mostly for the oracle: `make zoo` runs them.
LONG = (
    "NASNetMobile", "DenseNet121", "InceptionResNetV2", "ConvNeXtTiny", "EfficientNetV2B0",
    "InceptionV3", "ResNet50V2", "Xception",
)  # fmt: skip


def marks(entry: zoo.entry.Entry) -> list:
    small = entry.name in applications.SMALLEST and entry.name not in LONG
    if entry.family == "applications" and not small:
        return [pytest.mark.large]
    if list(ENTRIES).index(entry.name) % SAMPLE:
        return [pytest.mark.more]
    return [pytest.mark.slow]


def head_of(output, of):
    """Return the head that `of=` names."""
    if of is None:
        return output
    return tf.nest.flatten(output)[of] if isinstance(of, int) else output[of]


each = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=marks(entry)) for name, entry in ENTRIES.items() if name != REFUSED],
)


def kind_of(name: str, dtype: str) -> str:
    """Return the float type whose rounding an entry has."""
    # Keras rounds a bias's gradient to bfloat16 on its way through a cast; a factor does not.
    return "float8" if "float8" in name else dtype.removeprefix("mixed_")


def compared(name: str, dtype: str) -> tuple[float, dict[str, Any], set[str]]:
    """Return the worst weight's error, the rows of `inspect`, and how examples stay apart."""
    entry, kind = ENTRIES[name], kind_of(name, dtype)
    subject = entry.subject(dtype)
    engine = pj.Engine(subject.target, **subject.options)
    chosen = None if entry.outputs is None else list(entry.outputs)
    worst, rows, independence = 0.0, {}, set()
    for of in entry.heads:
        with warnings.catch_warnings():
            # A head need not depend on every weight; the tape path may have to go one by one.
            for expected in (DisconnectedWarning, SlowPathWarning):
                warnings.simplefilter("ignore", expected)
            jac = engine.jacobian(subject.x, of=of, outputs=chosen)
            found = [np.asarray(jac[v]) for v in subject.trainable]
            inspection = engine.inspect(x=subject.x, of=of)
            rows |= {row.weight: row for row in inspection.rows}
            independence |= {re.sub(r" \(at .*|\d+", "", inspection.independence)}
        right = reference(entry, subject, of)
        worst = max(worst, difference(found, right, 10 * EPSILON[kind] / TOLERANCE[kind]))
    return worst, rows, independence


def reference(entry: zoo.entry.Entry, subject: Subject, of: Any) -> list[np.ndarray]:
    """Return the oracle's Jacobians of one head."""
    call = functools.partial(lambda one, of: head_of(subject.call(one), of), of=of)
    return oracle.weight_rows(call, subject.x, subject.trainable, entry.outputs)


def on_the_tape(rows: dict[str, Any]) -> dict[str, str]:
    return {row.weight: row.reason for row in rows.values() if row.path != "factored"}


@each
def test_jacobians_agree_with_the_oracle(name, record_property):
    dtype = ENTRIES[name].dtypes[0]
    worst, rows, independence = compared(name, dtype)
    assert worst <= TOLERANCE[kind_of(name, dtype)]
    taped = on_the_tape(rows)
    assert (taped == {}) == (name not in ON_THE_TAPE), taped
    assert (independence == {"proved from the graph"}) == (name not in PROBED), independence
    rules = sorted({site.split()[0] for row in rows.values() for site in row.sites})
    reasons = tuple(sorted({re.sub(r" \(at .*\)$", "", why) for why in taped.values()}))
    line = page.Line(
        name, dtype, len(rows), len(rows) - len(taped), worst, reasons,
        tuple(rules), "; ".join(sorted(independence)),
    )  # fmt: skip
    record_property("coverage", page.as_json(line))


# Float32 has kernels of its own (oneDNN's), and graph passes, one of which ended the process.
# `make test` takes these, `make more` all.
FLOAT32 = (
    "dense silu", "conv1d causal dilated", "conv2d dilated same", "conv2d grouped",
    "depthwiseconv2d", "separableconv2d", "conv2dtranspose", "conv3d", "lstm", "gru",
    "simplernn", "lstm masked", "gru bidirectional concat", "lstm stacked",
    "timedistributed conv2d", "convlstm1d",
    "convlstm2d", "convlstm3d", "layernormalization", "batchnormalization", "groupnormalization",
    "multiheadattention self", "embedding", "einsumdense heads", "prelu", "while over a weight",
    "experts routed", "squeeze-and-excitation",
)  # fmt: skip
# TensorFlow alone ends the process where a convolution's kernel is padded: oneDNN's layout pass
# takes the padding for that of the picture.
NOT_IN_FLOAT32 = (REFUSED, "kernel padded")
# Layers that have ended the process: a process of its own keeps the test run alive.
APART = ("convlstm",)


def check_in_float32(name: str) -> None:
    """Assert that the Jacobians are as right in float32 as the oracle's there."""
    worst, rows, _ = compared(name, "float32")
    if worst > 1e-3:
        assert worst <= 10 * rounding(name), f"off by {worst:.1e}"
    taped = on_the_tape(rows)
    assert (taped == {}) == (name not in ON_THE_TAPE), taped


def rounding(name: str) -> float:
    """Return how far the oracle in float32 is from the one in float64."""
    entry = ENTRIES[name]
    single, double = entry.subject("float32"), entry.subject("float64")
    return max(
        difference(reference(entry, single, of), reference(entry, double, of), 1e-2)
        for of in entry.heads
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in FLOAT32 else pytest.mark.more)
        for name, entry in ENTRIES.items()
        if name not in NOT_IN_FLOAT32
        and entry.dtypes[0] == "float64"
        and "float32" in entry.dtypes
        and pytest.mark.large not in marks(entry)
    ],
)
def test_jacobians_agree_with_the_oracle_in_float32(name):
    if not name.startswith(APART):
        return check_in_float32(name)
    code = f"import test_zoo; test_zoo.check_in_float32({name!r})"
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    return None


def difference(found: list[np.ndarray], right: list[np.ndarray], slack: float) -> float:
    """Return the largest of the weights' relative errors, ‖J - R‖ / (‖R‖ + slack · max ‖R‖).

    The second term is there for weights whose exact gradient is zero, such as the bias of
    attention's keys: they have noise of the size of their neighbours'.
    """
    norms = [np.linalg.norm(np.ravel(r).astype("float64")) for r in right]
    floor = slack * max(norms)
    assert floor > 0, "a model whose gradients are all zero shows nothing"
    return max(
        float(np.linalg.norm(np.ravel(j).astype("float64") - np.ravel(r)) / (norm + floor))
        for j, r, norm in zip(found, right, norms, strict=True)
    )


# Members that show each way through XLA: `make test` compiles these, `make zoo` all.
COMPILED = (
    "squeeze-and-excitation", "dense silu", "conv3dtranspose", "while over a weight",
)  # fmt: skip
# Where TensorFlow's own gradient does not compile, and in which float type it does.
# ResizeBilinearGrad is float32 under XLA.
TENSORFLOWS_OWN = dict.fromkeys(("U-Net: upsampling", "upsampling2d bilinear between"), "float32")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in COMPILED else pytest.mark.large)
        for name, entry in ENTRIES.items()
        if name != REFUSED
        and (entry.family != "applications" or entry.name in applications.SMALLEST)
    ],
)
def test_what_tensorflow_compiles_is_compiled_with_its_jacobian(name):
    entry = ENTRIES[name]
    dtype = TENSORFLOWS_OWN.get(name, entry.dtypes[0])
    subject = entry.subject(dtype)
    x = tf.nest.map_structure(tf.convert_to_tensor, subject.x)
    try:
        output = tf.function(subject.call, autograph=False, jit_compile=True)(x)
    except (tf.errors.OpError, ValueError) as failure:
        pytest.skip(f"TensorFlow does not compile it: {str(failure).splitlines()[0][:200]}")
    size = tf.size(head_of(output, entry.heads[0])[0])
    asked = {"of": entry.heads[0], "outputs": list(entry.outputs or range(min(int(size), 2)))}
    with warnings.catch_warnings():
        for expected in (DisconnectedWarning, SlowPathWarning):
            warnings.simplefilter("ignore", expected)
        warnings.filterwarnings("error", "XLA does not compile", SlowPathWarning)
        found = pj.Engine(subject.target, jit=True, **subject.options).jacobian(x, **asked)
        right = pj.Engine(subject.target, jit=False, **subject.options).jacobian(x, **asked)
    kind = "float8" if "float8" in name else dtype.removeprefix("mixed_")
    pairs = [(np.asarray(found[key], "f8"), np.asarray(right[key], "f8")) for key in right]
    scale = max(np.abs(rows).max() for _, rows in pairs)
    assert scale > 0
    worst = max(np.abs(mine - rows).max() for mine, rows in pairs) / scale
    assert worst <= {"float64": 1e-10, "float32": 1e-5}.get(kind, TOLERANCE[kind])


def test_a_branch_that_the_whole_batch_decides_about_is_refused():
    subject = ENTRIES[REFUSED].subject("float64")
    with pytest.raises(ExamplesMeetError):
        pj.Engine(subject.target).jacobian(subject.x)
    right = oracle.weight_rows(subject.call, subject.x, subject.trainable)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        jac = pj.Engine(subject.target, independence="trust").jacobian(subject.x)
    oracle.assert_agree([jac[v] for v in subject.trainable], right, "float64")


def test_nearly_all_models_are_proved_to_keep_their_examples_apart():
    """`test_jacobians_agree_with_the_oracle` asserts that all others are."""
    assert len(PROBED) <= 0.05 * len(ENTRIES)


@pytest.mark.slow
def test_every_weighted_layer_has_an_entry():
    assert coverage.without_entry() == []
