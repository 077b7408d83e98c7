"""A model from a hidden layer's output on: what methods move about where inputs are integers."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from perjac._core.model.variables import Activation
from perjac._core.runtime.traced_model import Traced
from perjac.engine import Engine
from perjac.errors import InputError


def after(engine: Engine, activation: Activation, x: Any) -> tuple[Engine, list[tf.Tensor]]:
    """Return an engine of the model from a hidden layer's output on, and what to give it.

    Parameters
    ----------
    engine : Engine
        Of the whole model.
    activation : Activation
        Whose output takes the place of an input.
    x : array, or list, tuple or dict of arrays, or Call
        B examples.

    Returns
    -------
    tail : Engine
        Of a function of [the layer's output, *the model's inputs], with the same heads.
    given : list of tf.Tensor
        These at the examples, the layer's output (B, *shape) first.
    """
    batch = engine._traces.prepare(x)
    traced, names = engine._traces.of(batch)
    tensor = names.head(activation)
    value = traced.outputs(tensor, batch)
    if not value.dtype.is_floating:
        raise InputError(f"The output of layer {activation.layer!r} is of type {value.dtype.name}.")
    tail = traced.once(("tail", tensor), lambda: _tail(traced, tensor, engine.memory_limit))
    return tail, [value, *batch.tensors]


def _tail(traced: Traced, tensor: str, memory_limit: int | str | None) -> Engine:
    program = traced.plain
    moved = traced.program.counterpart(tensor, program)

    def rest(leaves: list[tf.Tensor]) -> dict[str, tf.Tensor]:
        wanted = program.heads
        found = program.replay(leaves[1:], {}, list(wanted.values()), {moved: leaves[0]})
        return {name: found[there] for name, there in wanted.items()}

    return Engine(rest, memory_limit=memory_limit)
