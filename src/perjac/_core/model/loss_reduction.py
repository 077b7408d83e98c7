"""Losses of positions → one number for each example, as Keras reduces a batch of one.

Knows values, masks and weights; must not know what loss they come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf

from perjac._core.backend.shapes import shown
from perjac.errors import InputError


def reduced(
    values: tf.Tensor, masks: Sequence[tf.Tensor], weight: tf.Tensor | None, how: str | None
) -> tf.Tensor:
    """Reduce the losses of the positions (B, ...) as Keras would for a batch of one, to (B,).

    "sum" and None add them up; the means divide by the number of positions, of valid ones under a
    mask; "mean_with_sample_weight" by the weights along the positions. A weight of a whole example
    multiplies its loss.
    """
    rank = max(t.shape.rank for t in (values, *masks))
    values = _lined_up(values, rank)
    counted = [tf.cast(_lined_up(mask, rank), values.dtype) for mask in masks]
    weighted, own = counted, None
    if weight is not None:
        weight = tf.cast(_fitting(weight, values), values.dtype)
        if all(n == 1 for n in weight.shape[1:]):
            own = tf.reshape(weight, [-1])
        else:
            weighted = [*counted, weight]
    axes = list(range(1, rank))
    total = tf.reduce_sum(math.prod(weighted, start=values), axes)
    if how == "mean_with_sample_weight" and weighted:
        total = tf.math.divide_no_nan(total, tf.reduce_sum(math.prod(weighted), axes))
    elif how not in ("sum", "none", None):
        over = tf.reduce_sum(math.prod(counted, start=tf.ones_like(values)), axes)
        total = tf.math.divide_no_nan(total, over)
    return total if own is None else total * own


def _lined_up(tensor: tf.Tensor, rank: int) -> tf.Tensor:
    """Give a tensor (B, ...) more axes behind its own."""
    missing = [1] * (rank - tensor.shape.rank)
    return tf.reshape(tensor, tf.concat([tf.shape(tensor), missing], 0)) if missing else tensor


def _fitting(weight: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Give a weight (B, ...) the rank of the losses, its axes from the left."""
    rank, wanted = weight.shape.rank, values.shape.rank
    while rank > wanted and weight.shape[-1] == 1:
        weight, rank = tf.squeeze(weight, -1), rank - 1
    pairs = zip(weight.shape[1:], values.shape[1:], strict=False)
    if rank > wanted or any(mine not in (1, theirs) for mine, theirs in pairs):
        raise InputError(
            f"sample_weight of shape {shown(weight)} does not fit losses of shape {shown(values)}."
        )
    return _lined_up(weight, wanted)
