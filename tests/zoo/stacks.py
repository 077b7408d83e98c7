"""Tables into entries: beside each name what goes in, and what becomes of it, in Keras's layers.

A head mixes what comes out: without its tanh a layer that is linear would have cotangents that
are the same for every example.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf
from keras import layers, ops
from models import Ids

from zoo.entry import enter

Table = Mapping[Any, Mapping[str, Callable[..., Any]]]  # what goes in -> name -> function of it


class Made(layers.Layer):
    """A layer of a function of the input and of weights, which are given by their shapes."""

    def __init__(self, function: Callable[..., Any], **shapes: tuple[int, ...]):
        super().__init__()
        self.function, self.shapes = function, shapes

    def build(self, _):
        self.made = [self.add_weight(shape=shape, name=n) for n, shape in self.shapes.items()]

    def call(self, x):
        return self.function(x, *[tf.convert_to_tensor(weight) for weight in self.made])


def made(function: Callable[..., Any], **shapes: tuple[int, ...]) -> Callable[..., Any]:
    """Return for a table what makes a new layer each time that a model is built."""
    return lambda x: Made(function, **shapes)(x)


def symbols(example: Any, name: str | None = None) -> Any:
    """Return Keras inputs, nested as the example, and with the names of its dictionaries."""
    if isinstance(example, dict):
        return {key: symbols(part, key) for key, part in example.items()}
    if isinstance(example, (tuple, list)):
        return type(example)(symbols(part) for part in example)
    return keras.Input(
        example.shape, dtype="int32" if isinstance(example, Ids) else None, name=name
    )


def mixed(outputs: Any) -> Any:
    """Return two numbers into which all outputs go."""
    # Flatten would warn where there is a mask.
    flat = [ops.reshape(t, (-1, math.prod(t.shape[1:]))) for t in tf.nest.flatten(outputs)]
    joined = flat[0] if len(flat) == 1 else layers.Concatenate()(flat)
    return layers.Dense(2)(layers.Activation("tanh")(joined))


def stacked(example: Any, function: Callable[..., Any]) -> keras.Model:
    """Return the model of a function, which takes a tuple's inputs one by one."""
    inputs = symbols(example)
    outputs = function(*inputs) if isinstance(inputs, tuple) else function(inputs)
    return keras.Model(inputs, mixed(outputs))


def enter_table(table: Table, **options: Any) -> None:
    """Enter each function of a table."""
    for example, functions in table.items():
        for name, function in functions.items():
            build = functools.partial(stacked, example, function)
            enter("layers", name, build, example, **options)
