"""Operations that meet the data entry by entry: biases, scales and whatever else broadcasts."""

from __future__ import annotations

import tensorflow as tf

from perjac._core.backend.shapes import batched, known
from perjac._core.factors import Explicit, Factor
from perjac._core.rules.bound import BoundSite, NoRule
from perjac._core.rules.registry import rule


@rule("Add", "AddV2", "BroadcastTo", "Fill")
def add(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y = x + W, so J = δ, summed over the axes along which W is broadcast."""
    return _reduced(site, delta)


@rule("Tile")
def tile(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y = W over and over, so J = δ, summed over the copies; once for each example in front."""
    own, out = known(site.weight.shape), known(site.output.shape[1:])
    if not own or own[0] != 1:
        raise NoRule("the weight has an entry of its own for each example of the batch")
    copies = [n for whole, part in zip(out, own[1:], strict=True) for n in (whole // part, part)]
    lead = [site.batch, delta.shape[1] or tf.shape(delta)[1]]
    split = tf.reshape(delta, [*lead, site.fold, *copies])
    rows = tf.reduce_sum(split, [2, *range(3, 3 + len(copies), 2)])
    return Explicit(site.layout, tf.reshape(rows, [*lead, *own]))


@rule("BiasAdd")
def bias_add(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y = x + b along the channels, last or (NCHW) second."""
    if site.attr("data_format") == "NCHW":
        return _reduced(site, delta, after=len(site.output.shape) - 2)
    return _reduced(site, delta)


@rule("Sub")
def subtract(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y = x - W, so J = -δ; or W - x."""
    return _reduced(site, -delta if site.operand == 1 else delta)


@rule("Mul")
def multiply(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y = x ∘ W, so J = δ ∘ x, summed over the axes along which W is broadcast."""
    return _reduced(site, delta * _beside(site, 1 - site.operand, delta))


@rule("RealDiv")
def divide(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y = W / x, so J = δ / x; or y = x / W, so J = -δ ∘ y / W."""
    if site.operand == 0:
        return _reduced(site, delta / _beside(site, 1, delta))
    result = tf.expand_dims(site.unfold(site.output), 1)
    return _reduced(site, -delta * result / site.weight)


@rule("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
def batch_normalisation(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y = γ (x - μ) (σ² + ε)^-½ + β, so J = δ ∘ (x - μ) (σ² + ε)^-½ for γ, and δ for β.

    TensorFlow takes μ and σ² for constants.
    """
    if site.attr("is_training"):
        raise NoRule("a batch normalisation in training mode")
    if site.operand > 2:
        raise NoRule("TensorFlow has no derivative by a fused normalisation's mean and variance")
    x, _, _, mean, variance = site.op.inputs
    first = site.attr("data_format") == "NCHW"
    after = len(site.output.shape) - 2 if first else 0

    def along_channels(v: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.reshape(v, [-1, *[1] * after]), site.output.dtype)

    if site.operand == 1:
        scale = along_channels(tf.math.rsqrt(variance + site.attr("epsilon")))
        z = (x - along_channels(mean)) * scale
        delta *= tf.expand_dims(site.unfold(z), 1)
    return _reduced(site, tf.cast(delta, site.weight.dtype), after)


@rule("Div", "DivNoNan", "Xdivy", "Xlogy", "MulNoNan", "Atan2", "Pow", "SquaredDifference")
@rule("Maximum", "Minimum", "SelectV2")
def entrywise(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y = f(x, W) entry by entry, so J = δ ∘ ∂f/∂W, the partial from TensorFlow itself."""
    names = [argument.name for argument in site.op.op_def.input_arg]
    # A copy of W for each entry of y: its gradient is the partial derivative, entry by entry.
    spread = tf.broadcast_to(site.weight, tf.shape(site.output))
    arguments = dict(zip(names, site.op.inputs, strict=True))
    arguments[names[site.operand]] = spread
    result = getattr(tf.raw_ops, site.op.type)(**arguments)
    partial = tf.gradients(result, spread)[0]
    if partial is None:
        raise NoRule("it has no derivative")
    return _reduced(site, delta * tf.expand_dims(site.unfold(partial), 1))


def _reduced(site: BoundSite, delta: tf.Tensor, after: int = 0) -> Factor:
    """Sum (B, K, F, *rest) over F and the axes along which W is broadcast.

    `after` counts axes of the result that come after W's own.
    """
    if not site.weight.shape.is_fully_defined():
        raise NoRule("the weight's shape is unknown")
    own = known(site.weight.shape)
    shape = [*own, *[1] * after]
    rank = site.output.shape.rank
    if rank is None or len(shape) > rank or (len(shape) == rank and shape[0] != 1):
        raise NoRule("the weight has an entry of its own for each example of the batch")
    padded = [1] * (rank - len(shape)) + shape
    axes = [2] + [n + 2 for n in range(1, rank) if padded[n] == 1]
    count = delta.shape[1] or tf.shape(delta)[1]
    rows = batched(tf.reduce_sum(delta, axes), site.batch, [count, *own])
    rows.set_shape([None, delta.shape[1], *own])
    return Explicit(site.layout, rows)


def _beside(site: BoundSite, operand: int, delta: tf.Tensor) -> tf.Tensor:
    """Return a data operand as (B, 1, F, ...), its axes lined up with those of δ."""
    x = site.op.inputs[operand]
    if x.shape.rank is None or x.shape.rank != site.output.shape.rank:
        if x.shape.rank == 0 or x.shape.is_fully_defined():
            return x  # no batch axis: it broadcasts as it is
        raise NoRule("the data has fewer axes than the result")
    if x.shape[1:] != site.output.shape[1:]:
        # Spread as in the operation itself: beside δ, TensorFlow runs out of broadcast axes.
        x = tf.broadcast_to(x, tf.shape(site.output))
    return tf.expand_dims(site.unfold(x), 1)
