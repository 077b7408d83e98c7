"""The batch axis: where a model has folded positions into it, they are folded out again here."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def unfold(tensor: tf.Tensor, batch: Any, fold: int, inner: bool = False) -> tf.Tensor:
    """Split the leading axis: (B·F, ...) becomes (B, F, ...).

    `inner` says that the examples run fastest along that axis, (F·B, ...), as where TensorFlow
    moves the holes of a dilated convolution into the batch, or where time comes first.
    """
    if fold == 1:
        return tf.expand_dims(tensor, 1)
    lead = [fold, batch] if inner else [batch, fold]
    split = tf.reshape(tensor, tf.concat([lead, tf.shape(tensor)[1:]], 0))
    return tf.transpose(split, [1, 0, *range(2, split.shape.rank)]) if inner else split
