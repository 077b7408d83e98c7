"""What several architectures are put together from: weights used by a function, and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import layers, ops


class Learned(layers.Layer):
    """Weights of the shapes that their names are given, and what `use` makes of inputs and them."""

    def __init__(self, use: Callable, *, trainable: bool = True, **shapes: tuple[int, ...]):
        super().__init__(trainable=trainable)
        self.use = use
        self.learned = {name: self.add_weight(shape, name=name) for name, shape in shapes.items()}

    def call(self, *inputs):
        return self.use(*inputs, **self.learned)


def vocabulary(x: Any, table: Any) -> Any:
    """Look ids up in the table, or project hidden states onto it."""
    if "int" in keras.backend.standardize_dtype(x.dtype):
        return ops.take(table, x, axis=0)
    return ops.matmul(x, ops.transpose(table))


def positions(x: Any) -> Any:
    """Add a learned vector to each step of (B, T, width)."""
    return Learned(lambda x, table: x + table, table=x.shape[1:])(x)


def causal(scores: Any) -> Any:
    """Hide what comes after a step from it: scores are (B, heads, T, T)."""
    steps = scores.shape[-1]
    return ops.where(ops.tri(steps, dtype="bool"), scores, -1e9)


def split(x: Any, heads: int) -> Any:
    """Turn (B, T, heads * size) into (B, heads, T, size)."""
    _, steps, width = x.shape
    return ops.transpose(ops.reshape(x, (-1, steps, heads, width // heads)), (0, 2, 1, 3))


def merge(x: Any) -> Any:
    """Turn (B, heads, T, size) into (B, T, heads * size)."""
    _, heads, steps, size = x.shape
    return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (-1, steps, heads * size))


def attention(
    x: Any,
    memory: Any = None,
    *,
    mix: Callable | None = None,
    project: Callable = layers.Dense,
) -> Any:
    """Attention of `x` to `memory`, itself if there is none, with two heads.

    `mix` takes queries, keys and values, (B, H, T, size); `project` makes a layer of a width.
    """
    width, memory = x.shape[-1], x if memory is None else memory
    parts = [split(project(width)(part), heads=2) for part in (x, memory, memory)]
    return project(width)(merge((mix or softmax_mix())(*parts)))


def softmax_mix(bend: Callable = lambda scores: scores) -> Callable:
    """Return the usual way to mix values; `bend` changes the scores (B, H, T, S) before."""

    def mix(queries, keys, values):
        scores = ops.matmul(queries, ops.swapaxes(keys, 2, 3)) / queries.shape[-1] ** 0.5
        return ops.matmul(ops.softmax(bend(scores)), values)

    return mix


def feed_forward(x: Any) -> Any:
    hidden = layers.Dense(2 * x.shape[-1], activation="gelu")(x)
    return layers.Dense(x.shape[-1])(hidden)


def norm_first(x: Any, part: Callable) -> Any:
    return x + part(layers.LayerNormalization()(x))


def norm_last(x: Any, part: Callable) -> Any:
    return layers.LayerNormalization()(x + part(x))


def block(x: Any, mixer: Callable = attention, residual: Callable = norm_first) -> Any:
    """Mix the steps of (B, T, width) by `mixer`, then the channels: a block of a transformer."""
    return residual(residual(x, mixer), feed_forward)
