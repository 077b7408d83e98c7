"""Interleaved timing: every way once, then every way again, so that all see the same machine."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from jobs import FLOORS, Ways


@dataclasses.dataclass
class Timed:
    """What one way took: milliseconds of each repeat, or why it was left out."""

    way: str
    first_ms: float | None = None  # tracing and compiling included
    repeats_ms: list[float] = dataclasses.field(default_factory=list)
    left_out: str = ""

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.repeats_ms) if self.repeats_ms else None


def compare(ways: Ways, repeats: int) -> list[Timed]:
    """Check that all ways agree, then time them in turn."""
    table = {name: Timed(name) for name in ways}
    reference = None
    for name, way in ways.items():
        timed = table[name]
        try:
            timed.first_ms, answer = _run(way)
        except (tf.errors.OpError, ValueError, MemoryError) as failure:
            timed.left_out = str(failure).strip().splitlines()[0][:200]
            continue
        if name in FLOORS:
            continue
        if reference is None:
            reference = answer
        else:
            _assert_equal(name, answer, reference)
    del reference, answer
    for _ in range(repeats):
        for name, way in ways.items():
            if not table[name].left_out:
                table[name].repeats_ms.append(_run(way)[0])
    return list(table.values())


def _run(way: Callable) -> tuple[float, list[tf.Tensor]]:
    start = time.perf_counter()
    answer = way()
    tf.test.experimental.sync_devices()
    return 1e3 * (time.perf_counter() - start), answer


def _assert_equal(name: str, answer: list[tf.Tensor], reference: list[tf.Tensor]) -> None:
    for a, r in zip(answer, reference, strict=True):
        error = float(tf.norm(a - r) / (tf.norm(r) + np.finfo("float32").tiny))
        if not error < 1e-4:
            raise AssertionError(f"{name} differs from the first way by {error:.1e}")
