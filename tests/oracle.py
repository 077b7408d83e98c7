"""The oracle: one example and one output at a time, by plain tf.GradientTape on the model itself.

Slow and obvious, to be checked by reading. Everything else is compared with this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf


def weight_rows(call: Callable, x: Any, weights: Sequence, outputs=None) -> list[np.ndarray]:
    """Return the (B, K, *shape) Jacobian of each weight; K runs over `outputs`, all by default."""
    graph = tf.function(call, autograph=False)  # the same, and a tape over it is 100 times faster
    return _rows(lambda one: (graph(one), weights), x, outputs)


def input_rows(call: Callable, x: Any, outputs=None) -> list[np.ndarray]:
    """Return the (B, K, *shape) Jacobian of each float input, in the order of tf.nest.flatten."""
    graph = tf.function(call, autograph=False)
    return hidden_rows(lambda one: (graph(one), _floats(one)), x, outputs)


def hidden_rows(call: Callable, x: Any, outputs=None) -> list[np.ndarray]:
    """Return the (B, K, *shape) Jacobian of each hidden tensor; `call` gives (output, hidden)."""
    return [rows[:, :, 0] for rows in _rows(call, x, outputs)]


def all_rows(call: Callable, x: Any, weights: Sequence) -> tuple[list, list]:
    """Return what `weight_rows` and `input_rows` do, in half the time."""
    graph = tf.function(call, autograph=False)
    rows = _rows(lambda one: (graph(one), [*weights, *_floats(one)]), x, None)
    return rows[: len(weights)], [of_input[:, :, 0] for of_input in rows[len(weights) :]]


def loss_rows(call: Callable, loss: Callable, x: Any, y: Any, weights: Sequence | None = None):
    """Return each example's loss, (B,), and its gradient by each weight, (B, *shape).

    By each float input where no weights are given. `loss` takes one example's labels and outputs,
    a batch of one each, to a number.
    """
    graph = tf.function(lambda one, labels: loss(labels, call(one)), autograph=False)
    losses, gradients = [], []
    for b in range(len(tf.nest.flatten(x)[0])):
        one, labels = _alone(x, b), _alone(y, b)
        with tf.GradientTape() as tape:
            tape.watch(_floats(one))
            value = graph(one, labels)
        sources = _floats(one) if weights is None else weights
        found = tape.gradient(value, sources)
        losses.append(value.numpy().item())
        gradients.append([_dense(g, s) for g, s in zip(found, sources, strict=True)])
    rows = [np.array(of_source) for of_source in zip(*gradients, strict=True)]
    return np.array(losses), rows if weights is not None else [r[:, 0] for r in rows]


def _rows(call: Callable, x: Any, outputs) -> list[np.ndarray]:
    per_example = []
    for b in range(len(tf.nest.flatten(x)[0])):
        one = _alone(x, b)
        chosen = range(tf.size(call(one)[0])) if outputs is None else outputs
        per_example.append([_row(call, one, k) for k in chosen])
    return [np.array(rows) for rows in _transpose(per_example)]


def _alone(x: Any, b: int) -> Any:
    """Return example b as a batch of one."""
    return tf.nest.map_structure(lambda t: tf.convert_to_tensor(t[b : b + 1]), x)


def _row(call: Callable, one: Any, k: int) -> list[np.ndarray]:
    # A tape for each row: a persistent one records derivatives of derivatives, 500 times slower.
    with tf.GradientTape() as tape:
        tape.watch(_floats(one))
        y, sources = call(one)
        y_k = tf.reshape(y, [-1])[k]
    return [_dense(g, s) for g, s in zip(tape.gradient(y_k, sources), sources, strict=True)]


def _transpose(per_example: list) -> list:
    sources = range(len(per_example[0][0]))
    return [[[row[i] for row in rows] for rows in per_example] for i in sources]


def _dense(gradient: Any, source: Any) -> np.ndarray:
    """Return the gradient as an array: zeros for None, rows of a lookup added up."""
    if gradient is None:
        return np.zeros(source.shape, tf.as_dtype(source.dtype).as_numpy_dtype)
    return tf.convert_to_tensor(gradient).numpy()


def _floats(tensors: Any) -> list[tf.Tensor]:
    return [t for t in tf.nest.flatten(tensors) if t.dtype.is_floating]


def assert_agree(found: Sequence, expected: Sequence, dtype: str, names=None) -> None:
    """Assert ‖J − R‖ ≤ rtol ‖R‖ + 100 eps max_w ‖R_w‖ for each Jacobian J and its oracle R.

    The second term is there for weights whose exact gradient is zero, such as the bias of
    attention's keys: rounding leaves noise of the size of its neighbours' there.
    """
    rtol = {"float64": 1e-10, "float32": 1e-4}[dtype]
    assert len(found) == len(expected)
    names = names or range(len(expected))
    floor = 100 * np.finfo(dtype).eps * max(np.linalg.norm(np.ravel(r)) for r in expected)
    for name, j, r in zip(names, found, expected, strict=True):
        j = np.asarray(j)
        assert j.dtype == dtype, f"{name}: {j.dtype}, expected {dtype}"
        assert j.shape == r.shape, f"{name}: shape {j.shape}, expected {r.shape}"
        error, size = np.linalg.norm(np.ravel(j - r)), np.linalg.norm(np.ravel(r))
        assert error <= rtol * size + floor, f"{name}: off by {error:.1e} of {size:.1e}"
