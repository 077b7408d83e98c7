"""A site bound to a graph: what a rule reads the operation, its data and its shapes from.

The batch is folded out here, once for all rules: a tensor (B·F, ...) becomes (B, F, ...), where F
counts the positions that the model folded into the batch axis (1 where it did not).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf

from perjac._core.backend.axis_layout import Relabelling
from perjac._core.backend.shapes import unfold


class NoRule(Exception):
    """Raised by a rule for a site that it does not cover; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class BoundSite:
    """A site in the graph being built.

    Attributes
    ----------
    op : tf.Operation
        The operation.
    operand : int
        The weights' side.
    layout : Relabelling
        From the weight to that operand; the identity of ψ where ψ does more than relabel.
    fold : int
        F, positions folded into the batch axis.
    batch : tf.Tensor
        B, a scalar int32.
    inner : bool
        Whether the examples run fastest along the folded axis, instead of slowest.
    """

    op: Any
    operand: int
    layout: Relabelling
    fold: int
    batch: tf.Tensor
    inner: bool = False

    @property
    def weight(self) -> tf.Tensor:
        """The operand on the weights' side, ψ(W)."""
        return self.op.inputs[self.operand]

    @property
    def output(self) -> tf.Tensor:
        """The operation's first output."""
        return self.op.outputs[0]

    @property
    def kind(self) -> tuple:
        """What a rule can tell sites apart by: shapes, types, attributes, values that are known."""
        node = self.op.node_def
        attributes = sorted((name, node.attr[name].SerializeToString()) for name in node.attr)
        tensors = [(t.dtype, str(t.shape), _value(t)) for t in [*self.op.inputs, *self.op.outputs]]
        return (
            self.op.type, self.operand, self.layout, self.fold, self.inner,
            tuple(attributes), tuple(tensors),
        )  # fmt: skip

    def data(self, operand: int) -> tf.Tensor:
        """Return a data operand with the batch folded out, (B, F, ...)."""
        return self.unfold(self.op.inputs[operand])

    def stacked(self, operand: int) -> tf.Tensor:
        """Return a data operand as (B·F, ...), the examples one after another."""
        if not self.inner:
            return self.op.inputs[operand]
        split = self.data(operand)
        return tf.reshape(split, tf.concat([[-1], tf.shape(split)[2:]], 0))

    def unfold(self, tensor: tf.Tensor) -> tf.Tensor:
        """Fold the batch out of a tensor that has it like the operation's result."""
        return unfold(tensor, self.batch, self.fold, self.inner)

    def attr(self, name: str) -> Any:
        """Return an attribute of the operation, text as str."""
        value = self.op.get_attr(name)
        return value.decode() if isinstance(value, bytes) else value


def _value(tensor: Any) -> bytes | None:
    """Return the value of integers that are the same whatever the data."""
    value = tf.get_static_value(tensor) if tensor.dtype.is_integer else None
    return None if value is None else value.tobytes()
