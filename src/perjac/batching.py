"""The batch axis: where a model has folded positions into it, they are folded out again here."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def unfold(tensor: tf.Tensor, batch: Any, fold: int) -> tf.Tensor:
    """Split the leading axis: (B·F, ...) becomes (B, F, ...)."""
    if fold == 1:
        return tf.expand_dims(tensor, 1)
    return tf.reshape(tensor, tf.concat([[batch, fold], tf.shape(tensor)[1:]], 0))
