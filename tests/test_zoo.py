"""The zoo: Jacobians of every model agree with the oracle, and no weight leaves the factored path
unless it is said here."""

from __future__ import annotations

import functools
import importlib
import pathlib
import warnings

import numpy as np
import oracle
import pytest
import zoo.entry
from zoo import applications, coverage, page

import perjac as pj
from perjac.errors import DisconnectedWarning, SlowPathWarning

for module in pathlib.Path(zoo.__path__[0]).glob("*.py"):
    importlib.import_module(f"zoo.{module.stem}")

ENTRIES = zoo.entry.ENTRIES
TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
# Models that have weights on the tape path, and why.
ON_THE_TAPE: dict[str, str] = {}


def marks(entry: zoo.entry.Entry) -> list:
    if entry.family == "applications" and entry.name not in applications.SMALLEST:
        return [pytest.mark.large]
    return [pytest.mark.slow]


def head_of(output, of):
    """Return the head that `of=` names."""
    if of is None:
        return output
    return output[of]


each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks(entry)) for name, entry in ENTRIES.items()]
)


@each
def test_jacobians_agree_with_the_oracle(name, record_property):
    entry = ENTRIES[name]
    dtype = entry.dtypes[0]
    subject = entry.subject(dtype)
    engine = pj.Engine(subject.target, **subject.options)
    chosen = None if entry.outputs is None else list(entry.outputs)
    worst, rows = 0.0, {}
    for of in entry.heads:
        with warnings.catch_warnings():
            # A head need not depend on every weight; the tape path may have to go one by one.
            for expected in (DisconnectedWarning, SlowPathWarning):
                warnings.simplefilter("ignore", expected)
            jac = engine.jacobian(subject.x, of=of, outputs=chosen)
            found = [np.asarray(jac[v]) for v in subject.trainable]
            rows |= {row.weight: row for row in engine.inspect(x=subject.x, of=of).rows}
        call = functools.partial(lambda one, of: head_of(subject.call(one), of), of=of)
        right = oracle.weight_rows(call, subject.x, subject.trainable, entry.outputs)
        worst = max(worst, difference(found, right))
    precision = dtype.removeprefix("mixed_")
    assert worst <= TOLERANCE[precision]
    taped = {row.weight: row.reason for row in rows.values() if row.path != "factored"}
    if name not in ON_THE_TAPE:
        assert taped == {}
    rules = sorted({site.split()[0] for row in rows.values() for site in row.sites})
    line = page.Line(
        name, dtype, len(rows), len(rows) - len(taped), worst, tuple(set(taped.values())),
        tuple(rules),
    )  # fmt: skip
    record_property("coverage", page.as_json(line))


def difference(found: list[np.ndarray], right: list[np.ndarray]) -> float:
    """Return the largest of the weights' relative errors, ‖J - R‖ / (‖R‖ + 1e-6 max ‖R‖).

    The second term is there for weights whose exact gradient is zero, such as the bias of
    attention's keys.
    """
    norms = [np.linalg.norm(np.ravel(r).astype("float64")) for r in right]
    floor = 1e-6 * max(norms)
    assert floor > 0, "a model whose gradients are all zero shows nothing"
    return max(
        float(np.linalg.norm(np.ravel(j).astype("float64") - np.ravel(r)) / (norm + floor))
        for j, r, norm in zip(found, right, norms, strict=True)
    )


@pytest.mark.slow
def test_every_weighted_layer_has_an_entry():
    assert coverage.without_entry() == []
