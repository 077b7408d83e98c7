"""How a hidden layer's output changes as the inputs move: derivatives in forward direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tensorflow as tf

from perjac._core.autodiff.sweep import forward
from perjac._core.backend import host
from perjac._core.model.inputs import Batch
from perjac._core.model.variables import Activation
from perjac._core.runtime.traced_model import Traced
from perjac.engine import Engine
from perjac.errors import InputError


def rates(
    engine: Engine, activation: Activation, batch: Batch, moves: Mapping[int, tf.Tensor]
) -> tf.Tensor:
    """Return Σ_n (∂A/∂x_n)·v_n, (B, *shape), without a finite difference.

    Parameters
    ----------
    engine : Engine
        The model.
    activation : Activation
        The layer whose output is A.
    batch : Batch
        B examples.
    moves : mapping of int to tf.Tensor
        v_n (B, *input_shape) for input n; the others stay.
    """
    traced, names = engine._traces.of(batch)
    tensor, places = names.head(activation), tuple(sorted(moves))
    rate = traced.once(("rate", tensor, places), lambda: _rate(traced, tensor, places))
    try:
        return rate(list(batch.tensors), [moves[n] for n in places])
    except LookupError as failure:
        raise InputError(
            f"The output of layer {activation.layer!r} cannot be differentiated twice: {failure}. "
            "Use derivative='differences'."
        ) from failure


def _rate(traced: Traced, tensor: str, places: Sequence[int]) -> host.Compiled:
    """Return a function of the inputs, and of directions of those at `places`."""
    program = traced.plain
    there = traced.program.counterpart(tensor, program)

    def rate(leaves: list[tf.Tensor], directions: list[tf.Tensor]) -> tf.Tensor:
        hidden = program.replay(leaves, {}, [there])[there]
        ahead = forward(hidden, [leaves[n] for n in places])
        return tf.zeros_like(hidden) if ahead is None else ahead(directions)

    return host.compiled(rate)
