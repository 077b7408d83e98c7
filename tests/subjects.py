"""The models of the tests with their engines and oracles, each made once in a process."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import oracle
import small_models  # noqa: F401 (enters its models into MODELS)
from models import MODELS, Subject

import perjac as pj

EVERY_MODEL = list(MODELS)


@functools.cache
def subject(name: str, dtype: str) -> Subject:
    """Return the built model and its batch: of three, or of two where the model is large."""
    return MODELS[name].make(dtype, batch=2 if MODELS[name].slow else 3)


@functools.cache
def engine(name: str, dtype: str, path: str) -> pj.Engine:
    built = subject(name, dtype)
    return pj.Engine(built.target, path=path, **built.options)


@functools.lru_cache(maxsize=20)
def expected(name: str) -> list[np.ndarray]:
    """Return the oracle's Jacobian of every trainable weight, in float64."""
    built = subject(name, "float64")
    return oracle.weight_rows(built.call, built.x, built.trainable, MODELS[name].outputs)


def chosen(name: str) -> list[int] | None:
    """Return the outputs to look at, as the engine takes them."""
    outputs = MODELS[name].outputs
    return None if outputs is None else list(outputs)


def names(variables: list[Any]) -> list[str]:
    return [getattr(v, "path", v.name) for v in variables]


def flat_rows(jacobian: pj.Jacobian, rows: Any) -> np.ndarray:
    """Return rows (B, *row_shape, *shape) with the row axes made one: (B, K, *shape)."""
    batch, count, _ = jacobian.shape
    rank = len(jacobian.row_shape)
    rows = np.asarray(rows)
    assert rows.shape[: 1 + rank] == (batch, *jacobian.row_shape)
    return rows.reshape(batch, count, *rows.shape[1 + rank :])
