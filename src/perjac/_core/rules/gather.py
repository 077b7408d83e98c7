"""Tables of rows looked up by integers: embeddings."""

from __future__ import annotations

import tensorflow as tf

from perjac._core.backend.shapes import known, size
from perjac._core.factors import Factor, Lookup
from perjac._core.rules.bound import BoundSite, NoRule
from perjac._core.rules.registry import rule


@rule("GatherV2", "ResourceGather")
def gather(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y[t] = W[ids[t]], so J adds δ[t] to row ids[t]."""
    if site.operand != 0 or site.attr("batch_dims"):
        raise NoRule("the weight is not a plain table of rows")
    if site.op.type == "GatherV2" and tf.get_static_value(site.op.inputs[2]) != 0:
        raise NoRule("the rows are not looked up along the table's first axis")
    return _looked_up(site, delta, site.stacked(1), 1)


@rule("GatherNd", "ResourceGatherNd")
def gather_nd(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y[t] = W[i_t, j_t, …]: the same, its first axes read as one."""
    if site.operand != 0:
        raise NoRule("the weight is not a plain table of rows")
    places = site.stacked(1)
    axes = known(places.shape[-1:])[0]
    lengths = site.layout.target[:axes]
    strides = tf.math.cumprod(tf.constant(lengths, places.dtype), exclusive=True, reverse=True)
    return _looked_up(site, delta, tf.reduce_sum(places * strides, -1), axes)


def _looked_up(site: BoundSite, delta: tf.Tensor, ids: tf.Tensor, axes: int) -> Factor:
    """Return the factor of rows looked up by ids (B·F, ...) along the table's first axes."""
    table, width = size(site.layout.target[:axes]), size(site.layout.target[axes:])
    if ids.shape.rank == 0 or not ids.shape[1:].is_fully_defined():
        raise NoRule("the number of look-ups for one example is unknown")
    positions = site.fold * size(ids.shape[1:])
    count = delta.shape[1] or tf.shape(delta)[1]
    return Lookup(
        site.layout.reshape([table, width]),
        tf.reshape(ids, [site.batch, positions]),
        tf.reshape(delta, [site.batch, count, positions, width]),
    )
