"""DeepLIFT: differences from a baseline, carried back by the multipliers of each operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from perjac._core.backend.dtypes import EPSILON
from perjac.engine import Engine
from perjac.saliency._affine import MOVES, SUMS, WEIGHTED
from perjac.saliency._baselines import lacking, starts
from perjac.saliency._bound import takes_model
from perjac.saliency._problem import Explained
from perjac.saliency._propagation import Operation, Parts, Pull, Route, explain
from perjac.saliency.attribution import Attribution

# Elementwise functions of one operand: the rescale rule.
_CURVED = {
    "Relu", "Relu6", "LeakyRelu", "Elu", "Selu", "Softplus", "Softsign", "Tanh", "Sigmoid", "Erf",
    "Erfc", "ClipByValue", "Maximum", "Minimum", "Exp", "Expm1", "Log", "Log1p", "Sqrt", "Rsqrt",
    "Square", "Pow", "Abs", "Reciprocal", "Inv", "Sin", "Cos", "Floor", "Round",
}  # fmt: skip
# Linear in each operand, or quadratic: f(x) - f(x') = ½ (∇f(x) + ∇f(x')) (x - x') exactly.
_QUADRATIC = {"Mul", "SquaredDifference"} | WEIGHTED
_LINEAR = MOVES | SUMS | {"BiasAdd", "Select", "SelectV2", "FusedBatchNormV3"}
_MAXIMA = {"MaxPool", "MaxPoolV2", "MaxPool3D", "Max", "Maximum"}


@takes_model
def deeplift(
    engine: Engine,
    x: Any,
    target: Any = "predicted",
    *,
    wrt: Any = "inputs",
    of: Any = None,
    baseline: Any = 0.0,
) -> Attribution:
    """Return what each entry's difference from a baseline contributes to the output's.

    Parameters
    ----------
    engine : Engine
        The model, of any kind.
    x : array (B, *input_shape), or list, tuple or dict of arrays
        Examples.
    target : int, array of int (B,), "predicted", "all", or array (B, *output_shape)
        Which output, as in `gradient`.
    wrt, of
        As in `gradient`.
    baseline : number, array (*input_shape) or (B, *input_shape), or a mapping of name to these
        What the examples are compared with.

    Returns
    -------
    Attribution
        `values` of shape (B, *input_shape); (B, C, *input_shape) for "all". `delta`: their sum
        less f(x) - f(baseline), which is zero but for rounding.

    Raises
    ------
    InputError
        If an operation on the way has no rule, naming it and its layer.

    Notes
    -----
    A multiplier m has Σ m Δx = Δy at every operation: Δy / Δx at elementwise functions (the
    rescale rule; the derivative where Δx is next to nothing), the plain gradient at linear ones,
    the mean of the gradients at both ends at products. A maximum gives what it rises to its
    place at x, and what it falls from to its place at the baseline. A softmax is an exponential,
    a sum and a quotient.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh")])
    >>> x = np.ones((2, 4), "float32")
    >>> att = pj.saliency.deeplift(pj.Engine(model), x, target="all", baseline=-1.0)
    >>> att.values.shape, bool(abs(att.delta.numpy()).max() < 1e-5)
    (TensorShape([2, 3, 4]), True)

    References
    ----------
    Shrikumar et al. 2017, Learning Important Features Through Propagating Activation Differences,
    sections 3.2 and 3.5.1; Lundberg and Lee 2017 for the mean over both orders at products.
    """
    explained = Explained(engine, x, target, wrt, of)
    start = starts(baseline, explained)
    carried = explain(explained, "deeplift", _rules, baseline=start)
    values = [
        tf.expand_dims(x - x0, 1) * m
        for x, x0, m in zip(explained.values, start, carried.values, strict=True)
    ]
    return explained.attribution(
        "deeplift",
        values,
        delta=lacking(values, explained.rise(start)),
        facts={"rule": "rescale"},
    )


def _rules(route: Route) -> Callable[[Operation], Pull]:
    return _pull


def _pull(operation: Operation) -> Pull:
    """Return an operation's multipliers."""
    kind, several = operation.type, len(operation.moving) > 1
    operands = operation.operands
    if kind == "StopGradient":  # a difference passes it
        return Pull(operands, lambda dys: [dys[0]])
    if kind == "IdentityN":
        return Pull(operands, lambda dys: [dys[n] for n in operation.moving])
    if kind in ("Softmax", "LogSoftmax"):
        return Pull(operands, lambda dys: [_softmax(operation, dys[0])])
    if kind == "RealDiv" and several:
        return Pull(operands, lambda dys: _quotient(operation, dys[0]))
    if kind in _MAXIMA and (several or kind != "Maximum"):
        return Pull(operands, lambda dys: _maximum(operation, dys))
    if kind in _LINEAR or kind == "RealDiv" and operation.moving == (0,):
        return Pull(operands, operation.vjp)
    if kind in _QUADRATIC:
        return Pull(operands, lambda dys: _mean(operation, dys) if several else operation.vjp(dys))
    if kind in _CURVED | {"RealDiv"} and not several:
        return Pull(operands, lambda dys: [_rescale(operation, dys)])
    raise operation.refused("deeplift")


def _mean(operation: Operation, dys: Parts) -> Parts:
    """½ (∇f(x) + ∇f(x')), as the trapezium is exact for what is quadratic."""
    ends = operation.vjp(dys), operation.vjp(dys, operation.reference)
    return [None if a is None else (a + b) / 2 for a, b in zip(*ends, strict=True)]


def _rescale(operation: Operation, dys: Parts) -> tf.Tensor:
    """Δy / Δx. Shrikumar et al. 2017, section 3.5.1."""
    ((x, x0),) = _ends(operation)
    rise = operation.op.outputs[0] - operation.reference.outputs[0]
    return _over(dys[0] * rise, x, x0, _mean(operation, dys)[0])


def _maximum(operation: Operation, dys: Parts) -> Parts:
    """With top = max(y, y'): top - y' goes to the place at x, y - top to that at the baseline."""
    y, y0 = operation.op.outputs[0], operation.reference.outputs[0]
    top = tf.maximum(y, y0)
    up = operation.vjp([dys[0] * (top - y0), *dys[1:]])
    down = operation.vjp([dys[0] * (y - top), *dys[1:]], operation.reference)
    plain = _mean(operation, dys)
    return [
        _over(a + b, x, x0, m)
        for a, b, (x, x0), m in zip(up, down, _ends(operation), plain, strict=True)
    ]


def _ends(operation: Operation) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """Return (x, x') of each operand that moves."""
    return [(operation.op.inputs[n], operation.reference.inputs[n]) for n in operation.moving]


def _over(rise: Any, x: tf.Tensor, x0: tf.Tensor, plain: Any) -> tf.Tensor:
    """Return rise / (x - x'), or `plain` where that difference is mostly rounding."""
    dx = x - x0
    near = tf.abs(dx) <= EPSILON[dx.dtype] ** 0.5 * tf.maximum(tf.abs(x), tf.abs(x0))
    return tf.where(near, plain, rise / tf.where(near, tf.ones_like(dx), dx))


def _quotient(operation: Operation, dy: Any) -> Parts:
    """Of a / b: Δ(a / b) = Δa · mean(1/b) + mean(a) · Δ(1/b), Δ(1/b) = -Δb / (b b')."""
    (a, b), (a0, b0) = operation.op.inputs, operation.reference.inputs
    by_a, by_b = dy * (1 / b + 1 / b0) / 2, -dy * (a + a0) / (2 * b * b0)
    shapes = tf.shape(a), tf.shape(b)
    axes = tf.raw_ops.BroadcastGradientArgs(s0=shapes[0], s1=shapes[1])
    return [
        tf.reshape(tf.reduce_sum(m, axis), shape)
        for m, axis, shape in zip((by_a, by_b), axes, shapes, strict=True)
    ]


def _softmax(operation: Operation, dy: Any) -> tf.Tensor:
    """Of e / Σ e, or of z - log Σ e, with e = exp(z)."""
    z, z0 = operation.op.inputs[0], operation.reference.inputs[0]
    top = tf.reduce_max(tf.maximum(z, z0), -1, keepdims=True)
    e, e0 = tf.exp(z - top), tf.exp(z0 - top)
    least = z.dtype.as_numpy_dtype(1e-30)  # a baseline far below may have nothing left
    total, total0 = (tf.maximum(tf.reduce_sum(v, -1, keepdims=True), least) for v in (e, e0))
    dz = z - z0
    near = tf.abs(dz) < EPSILON[dz.dtype] ** 0.5
    slope = tf.where(near, (e + e0) / 2, (e - e0) / tf.where(near, tf.ones_like(dz), dz))
    if operation.type == "LogSoftmax":
        log = _over(tf.math.log(total / total0), total, total0, 2 / (total + total0))
        return dy - tf.reduce_sum(dy, -1, keepdims=True) * log * slope
    by_e = dy * (1 / total + 1 / total0) / 2
    by_total = -tf.reduce_sum(dy * (e + e0), -1, keepdims=True) / (2 * total * total0)
    return (by_e + by_total) * slope
