"""One series of benchmarks/scaling.py: a job of perjac's at growing sizes, in one process."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import serve
import tensorflow as tf
from keras import layers
from keras_net import LOSS, device, done

import perjac as pj
from perjac._core.backend import memory


def _dense(inputs: int, widths: list[int], outputs: int) -> keras.Model:
    hidden = [layers.Dense(width, activation="relu") for width in widths]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(outputs)])


def _convolutions(positions: int) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((positions, 16)),
            layers.Conv1D(32, 3, activation="relu"),
            layers.Conv1D(32, 3, activation="relu"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(4),
        ]
    )


def _case(axis: str, job: str, size: int) -> tuple[keras.Model, int, int | None, int]:
    """Return the model, how many examples, how many outputs if not all, and what grew to what."""
    # What writes no weights' rows is over before its call's fixed cost has become small.
    examples = 32 if job in ("weights", "gradients") else 512
    if axis == "B":
        return _dense(784, [256, 256], 10), size, None, size
    if axis == "K" and job == "inputs":  # with fewer inputs than rows they would go by columns
        return _dense(512, [384], 256), 256, size, size
    if axis == "K":
        return _dense(64, [128], 256), examples, size, size
    if axis == "P":
        model = _dense(64, [size, size], 4)
        return model, examples, None, model.count_params()
    return _convolutions(size), 16, None, size


def _job(name: str, engine: pj.Engine, x: Any, y: Any, outputs: Any) -> Callable[[], object]:
    def weights():
        jac = engine.jacobian(x, outputs=outputs)
        return done([jac[key] for key in jac])

    def gradients():
        found = engine.gradients(x, y, loss=LOSS)
        return done([found[key] for key in found])

    return {
        "weights": weights,
        "gradients": gradients,
        "inputs": lambda: done([engine.jacobian(x, wrt="inputs", outputs=outputs)["inputs"]]),
        "jacobian_norms": lambda: done(engine.jacobian(x, outputs=outputs).norms()),
        "gradient_norms": lambda: done(engine.gradients(x, y, loss=LOSS).norms()),
    }[name]


def measure(axis: str, job: str, size: int, asked: dict) -> dict[str, float]:
    """Return a point: size, median time and range, and the peak of memory above what was idle."""
    keras.utils.set_random_seed(0)
    model, examples, count, grown = _case(axis, job, size)
    rng = np.random.default_rng(0)
    x = tf.constant(rng.standard_normal((examples, *model.input_shape[1:])), "float32")
    y = tf.constant(rng.integers(0, model.output_shape[-1], examples))
    engine = pj.Engine(model, memory_limit=asked["limit"])
    run = _job(job, engine, x, y, None if count is None else list(range(count)))
    run()  # traces and compiles
    start = time.perf_counter()
    run()
    often = max(1, int(serve.SHORTEST_MS / 1e3 / (time.perf_counter() - start)))
    clock = time.perf_counter if asked["clock"] == "wall" else time.process_time
    times, peak_mb = [], 0.0
    for _ in range(asked["repeats"]):
        idle_mb = _idle_mb()
        start = clock()
        for _ in range(often):
            run()
        times.append(1e3 * (clock() - start) / often)
        peak_mb = max(peak_mb, _device.peak_mb() - idle_mb)
    return {
        "size": grown,
        "ms": statistics.median(times),
        "low_ms": min(times),
        "high_ms": max(times),
        "mb": max(peak_mb, 0.0),
        "limit_bytes": memory.limit(asked["limit"]),
    }


_device = device()


def _idle_mb() -> float:
    """Return what is in use before a repetition, and begin to look for the peak."""
    gc.collect()
    _device.forget()
    return _device.resident_mb()


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    points = [measure(asked["axis"], asked["job"], size, asked) for size in asked["sizes"]]
    print(json.dumps(points))
