"""What the user names → Sources: weights, layers, variables, inputs, activations.

Knows the traced program's names and shapes; must not know how a derivative is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from perjac._core.backend import host
from perjac._core.backend.shapes import known
from perjac._core.graph.program import Program
from perjac._core.model.variables import (
    Activation,
    Source,
    Weights,
    is_variable,
    known_number,
    match,
    weights_of,
)
from perjac.errors import InputError, IntegerInputError, UnknownNameError, nearest

# Operations that turn logits into probabilities, and those that only pass on what they get.
_LINKS = ("Softmax", "LogSoftmax", "Sigmoid")
_PASSING = ("Identity", "Reshape", "Cast", "Squeeze", "ExpandDims")


def before_link(program: Program, tensor: str) -> tuple[str, str]:
    """Return what a head's final softmax or sigmoid is taken of, and the operation's type.

    ("", "") if it has none.
    """
    before, link = link_of(program.graph.get_tensor_by_name(tensor))
    return ("" if before is None else before.name), link


def _is_name(of: Any) -> bool:
    return isinstance(of, (str, int, np.integer))


def link_of(output: Any) -> tuple[Any, str]:
    """Return what a final softmax or sigmoid is taken of, and its type; or (None, "")."""
    op = output.op
    while op.type in _PASSING:
        op = op.inputs[0].op
    return (op.inputs[0], op.type) if op.type in _LINKS else (None, "")


class Names:
    """The names that one traced model answers to.

    Parameters
    ----------
    program : Program
        The trace.
    weights : Weights
        The model's variables.
    model : object
        The Keras model, or whatever else is called.
    inputs : sequence of str
        The inputs' names.
    """

    def __init__(self, program: Program, weights: Weights, model: Any, inputs: Sequence[str]):
        self._program, self._weights, self._inputs = program, weights, list(inputs)
        inside = host.operations_within(model) if host.is_layer(model) else []
        self._layers = [layer for layer in inside if host.is_layer(layer)]
        self._found: dict[str, list[Source]] = {}

    def head(self, of: Any) -> str:
        """Return the tensor that `of` names: a head, or a hidden layer's output.

        "logits" is what the only head's final softmax or sigmoid is taken of, where no layer has
        that name.
        """
        program = self._program
        if isinstance(of, Activation):
            return program.tap(of)
        if isinstance(of, bool) or not (of is None or host.is_layer(of) or _is_name(of)):
            raise InputError(
                "Expected of= as an output's name or number, a layer, or pj.activation(name). "
                f"Received: {of!r}."
            )
        of = int(of) if isinstance(of, np.integer) else of
        if of == "logits" and of not in program.heads and of not in program.taps:
            found, _ = before_link(program, program.head(None))
            if not found:
                raise UnknownNameError(
                    "The model does not end with a softmax or sigmoid, so there are no logits "
                    "before it: leave of= out."
                )
            return found
        return self._program.head(of.name if host.is_layer(of) else of)

    def sources(self, wrt: Any) -> list[Source]:
        """Return what `wrt` names, each once.

        Raises
        ------
        UnknownNameError
            If a name fits nothing, or several things.
        IntegerInputError
            If it is an input or activation of integers.
        InputError
            If it is nothing that can be named.
        """
        if isinstance(wrt, str) and wrt in self._found:
            return list(self._found[wrt])
        asked = wrt if isinstance(wrt, (list, tuple)) else [wrt]
        found = [source for one in asked for source in self._one(one)]
        if not found:
            raise InputError("Expected wrt= to name something. Received: an empty list.")
        found = list(dict.fromkeys(found))
        if isinstance(wrt, str):
            self._found[wrt] = list(found)
        return found

    def _one(self, wrt: Any) -> list[Source]:
        weights = self._weights
        if isinstance(wrt, Activation):
            return [self._activation(wrt)]
        if host.is_layer(wrt):
            return weights_of(wrt, weights)
        if is_variable(wrt):
            return [weights.source(known_number(wrt, weights))]
        if not isinstance(wrt, str):
            raise InputError(
                "Expected wrt= as 'weights', 'inputs', a layer, a variable, a name, "
                f"pj.activation(name), or a list of these. Received: {wrt!r}."
            )
        if wrt == "weights":
            if not weights.trainable:
                raise InputError(
                    "The model has no trainable weights. Name the ones you mean, or use "
                    "wrt='inputs'; a plain function's go into Engine(fn, variables=[...])."
                )
            return [weights.source(n) for n in weights.trainable]
        if wrt == "inputs":
            return [self._input(n) for n in range(len(self._inputs))]
        if wrt in weights.keys:
            return [weights.source(weights.keys.index(wrt))]
        if wrt in self._inputs:
            return [self._input(self._inputs.index(wrt))]
        return self._layer_or_weight(wrt)

    def _layer_or_weight(self, name: str) -> list[Source]:
        weights = self._weights
        called = [layer for layer in self._layers if layer.name == name]
        if len(called) == 1:
            return weights_of(called[0], weights)
        if called:
            raise UnknownNameError(
                f"{len(called)} layers are called {name!r}: give the layer itself instead."
            )
        if any(key.endswith("/" + name) for key in weights.keys):
            return [weights.source(weights.keys.index(match(name, weights.keys, "weight")))]
        known = [*weights.keys, *(layer.name for layer in self._layers), *self._inputs]
        raise UnknownNameError(
            f"There is no weight, layer or input {name!r}. "
            + nearest(name, [*known, "weights", "inputs"])
        )

    def _input(self, number: int) -> Source:
        name, spec = self._inputs[number], self._program.specs[number]
        if not spec.dtype.is_floating:
            tables = [t.name for t in self._layers if isinstance(t, keras.layers.Embedding)]
            layer = tables[0] if tables else "embedding"
            kind = "text" if spec.dtype == tf.string else "what is no real number"
            raise IntegerInputError(
                f"Input {name!r} is of type {spec.dtype.name}: there is no derivative with "
                f"respect to {kind}. Ask for the layer that turns it into real numbers: "
                f"wrt=pj.activation({layer!r}). Other inputs can be named: wrt=[...]."
            )
        return Source("input", name, known(spec.shape[1:]), spec.dtype, index=number)

    def _activation(self, activation: Activation) -> Source:
        name = self._program.tap(activation)
        tensor = self._program.graph.get_tensor_by_name(name)
        if not tensor.dtype.is_floating:
            raise IntegerInputError(
                f"The output of layer {activation.layer!r} is of type {tensor.dtype.name}: there "
                "is no derivative with respect to integers. Choose a later layer."
            )
        extent = self._program.extents.get(name)
        if extent is None or extent.fold != 1:
            raise InputError(
                f"The output of layer {activation.layer!r} has no batch axis in front, so a "
                "derivative with respect to it cannot be given per example."
            )
        layer, call = activation.layer, activation.call
        key = layer if call is None else f"{layer}:{call}"
        return Source("activation", key, extent.rest, tensor.dtype, tensor=name)
