"""Rules: for every registered operation, the rule = the tape path = the oracle, in float64."""

import warnings

import numpy as np
import oracle
import pytest
import tensorflow as tf

import perjac as pj
from perjac._core.rules import RULES
from perjac.errors import SlowPathWarning

B = 3


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def raw(name: str, **options):
    """A raw operation with its options bound: raw("MatMul", transpose_b=True)(a=x, b=w)."""
    return lambda **tensors: getattr(tf.raw_ops, name)(**tensors, **options)


def matmul(**flags):
    op = raw("MatMul", **{"transpose_a": False, "transpose_b": False, **flags})
    return lambda x, w: op(a=x, b=w)


def batch_matmul(name: str, weight_left: bool = False, **flags):
    op = raw(name, **flags)
    return lambda x, w: op(x=w, y=x) if weight_left else op(x=x, y=w)


def version_three(x, w):
    return tf.raw_ops.BatchMatMulV3(x=x, y=w, Tout=tf.float64)


def einsum(equation: str, weight_left: bool = False):
    return lambda x, w: tf.raw_ops.Einsum(
        inputs=[w, x] if weight_left else [x, w], equation=equation
    )


def conv(strides=(1, 1), padding="VALID", dilations=(1, 1), explicit=()):
    op = raw(
        "Conv2D", strides=[1, *strides, 1], padding=padding, dilations=[1, *dilations, 1],
        explicit_paddings=list(explicit),
    )  # fmt: skip
    return lambda x, w: op(input=x, filter=w)


def conv3d(stride: int, padding: str):
    op = raw("Conv3D", strides=[1, stride, stride, 1, 1], padding=padding)
    return lambda x, w: op(input=x, filter=w)


def transposed(name: str, strides: tuple[int, ...], padding: str, out: tuple[int, ...], **options):
    """From x to pictures of size `out`; the kernel is (*window, channels out, channels in)."""
    op = raw(name, strides=[1, *strides, 1], padding=padding, **options)

    def call(x, w):
        sizes = [tf.shape(x)[0], *out, w.shape[-2]]
        return op(input_sizes=sizes, filter=w, out_backprop=x)

    return call


def depthwise(stride: int, padding: str):
    op = raw("DepthwiseConv2dNative", strides=[1, stride, stride, 1], padding=padding)
    return lambda x, w: op(input=x, filter=w)


def binary(name: str, weight_left: bool = False):
    op = raw(name)
    return lambda x, w: op(x=w, y=x) if weight_left else op(x=x, y=w)


def batch_norm(name: str, operand: int):
    """The inference form, the weight as its scale or offset."""
    op = raw(name, is_training=False, epsilon=0.1)

    def call(x, w):
        names = ["scale", "offset", "mean", "variance"]
        constants = {key: tf.constant([0.5, 2.0, 1.5], x.dtype) for key in names}
        return op(x=x, **constants | {names[operand - 1]: w + 2.0}).y

    return call


def places(x):
    """Two indices below 4 for each entry of x."""
    ids = tf.cast(x, tf.int32)
    return tf.stack([ids, (3 * ids + 1) % 4], -1)


def folded(function):
    """The same with positions folded into the batch axis and out again, as Keras does."""

    def call(x, w):
        rows = function(tf.reshape(x, [-1, *x.shape[2:]]), w)
        return tf.reshape(rows, [tf.shape(x)[0], x.shape[1], *rows.shape[1:]])

    return call


# Operation → [(the operation as a function of data and weight, data's shape, weight's shape)].
CASES = {
    "MatMul": [
        (matmul(), (4,), (4, 3)),
        (matmul(transpose_b=True), (4,), (3, 4)),
        (folded(matmul()), (5, 4), (4, 3)),
    ],
    "BatchMatMulV2": [
        (batch_matmul("BatchMatMulV2"), (5, 4), (4, 3)),
        (batch_matmul("BatchMatMulV2"), (2, 5, 4), (2, 4, 3)),
        (batch_matmul("BatchMatMulV2"), (2, 5, 4), (1, 1, 4, 3)),
        (batch_matmul("BatchMatMulV2"), (1, 5, 4), (6, 4, 3)),
        (batch_matmul("BatchMatMulV2", adj_y=True), (2, 5, 4), (3, 4)),
        (batch_matmul("BatchMatMulV2", adj_x=True), (4, 5), (4, 3)),
        (batch_matmul("BatchMatMulV2", weight_left=True), (4, 5), (3, 4)),
        (batch_matmul("BatchMatMulV2", weight_left=True, adj_x=True), (2, 4, 5), (2, 4, 3)),
    ],
    "BatchMatMulV3": [(version_three, (2, 5, 4), (2, 4, 3))],
    "Einsum": [
        (einsum("bi,io->bo"), (4,), (4, 3)),
        (einsum("btd,dhk->bthk"), (5, 4), (4, 2, 3)),
        (einsum("bthk,hkd->btd"), (5, 2, 3), (2, 3, 4)),
        (einsum("btd,td->bt"), (5, 4), (5, 4)),
        (einsum("bti,tio->bto"), (5, 4), (5, 4, 3)),
        (einsum("bti,ts->bsi"), (5, 4), (5, 6)),
        (einsum("b...i,io->b...o"), (2, 5, 4), (4, 3)),
        (einsum("bij,o->bo"), (2, 3), (4,)),
        (einsum("oi,bti->bot", weight_left=True), (5, 4), (3, 4)),
    ],
    "Conv2D": [
        (conv(), (6, 5, 2), (3, 2, 2, 3)),
        (conv((2, 1), "SAME"), (7, 6, 2), (3, 3, 2, 3)),
        (conv((2, 2), "SAME"), (6, 6, 2), (3, 3, 2, 3)),
        (conv((3, 2), "SAME"), (7, 7, 2), (2, 3, 2, 3)),
        (conv((2, 3), "VALID"), (7, 8, 1), (1, 1, 1, 3)),
        (conv((1, 1), "EXPLICIT", explicit=(0, 0, 2, 1, 0, 3, 0, 0)), (4, 5, 2), (3, 2, 2, 3)),
    ],
    "Conv3D": [
        (conv3d(1, "VALID"), (3, 4, 3, 2), (2, 2, 2, 2, 3)),
        (conv3d(2, "SAME"), (4, 5, 3, 1), (3, 2, 2, 1, 2)),
    ],
    "Conv2DBackpropInput": [
        (transposed("Conv2DBackpropInput", (2, 1), "SAME", (7, 4)), (4, 4, 2), (3, 2, 3, 2)),
        (transposed("Conv2DBackpropInput", (2, 3), "VALID", (9, 8)), (4, 3, 2), (3, 2, 1, 2)),
        (
            transposed(
                "Conv2DBackpropInput",
                (2, 2),
                "EXPLICIT",
                (7, 6),
                explicit_paddings=[0, 0, 2, 0, 1, 1, 0, 0],
            ),
            (4, 3, 2),
            (3, 3, 1, 2),
        ),
    ],
    "Conv3DBackpropInputV2": [
        (
            transposed("Conv3DBackpropInputV2", (2, 1, 2), "SAME", (3, 2, 4)),
            (2, 2, 2, 2),
            (3, 2, 2, 1, 2),
        ),
    ],
    "DepthwiseConv2dNative": [
        (depthwise(1, "VALID"), (6, 5, 3), (3, 2, 3, 1)),
        (depthwise(2, "SAME"), (7, 6, 2), (3, 3, 2, 2)),
        (folded(depthwise(1, "SAME")), (2, 5, 5, 2), (3, 3, 2, 1)),
    ],
    "GatherV2": [
        (lambda x, w: tf.gather(w + 0.0, tf.cast(x, tf.int32)), (5,), (4, 3)),
        (lambda x, w: tf.gather(tf.identity(w), tf.cast(x, tf.int32)), (2, 3), (4, 3, 2)),
    ],
    "GatherNd": [(lambda x, w: tf.gather_nd(w + 0.0, places(x)), (5,), (4, 4, 2))],
    "ResourceGatherNd": [
        (lambda x, w: tf.gather_nd(w, places(x)), (5,), (4, 4)),
        (lambda x, w: tf.gather_nd(w, tf.cast(x, tf.int32)[..., None]), (2, 3), (4, 2)),
    ],
    "ResourceGather": [(lambda x, w: tf.gather(w, tf.cast(x, tf.int32)), (5,), (4, 3))],
    "Add": [(binary("Add"), (5, 3), (3,)), (binary("Add", weight_left=True), (5, 3), (5, 1))],
    "AddV2": [
        (binary("AddV2"), (5, 3), ()),
        (binary("AddV2"), (1, 3), (5, 3)),
        (folded(binary("AddV2")), (2, 5, 3), (1, 1, 3)),
    ],
    "Fill": [(lambda x, w: x * tf.fill([tf.shape(x)[0], 3], w + 0.0), (3,), ())],
    "Tile": [
        (lambda x, w: tf.tile(w, [tf.shape(x)[0], 2, 1]) * x, (4, 3), (1, 2, 3)),
        (lambda x, w: tf.tile(w[None], [tf.shape(x)[0], 1, 3]) * x, (2, 6), (2, 2)),
    ],
    "FusedBatchNorm": [(batch_norm("FusedBatchNorm", 1), (2, 2, 3), (3,))],
    "FusedBatchNormV2": [(batch_norm("FusedBatchNormV2", 2), (2, 2, 3), (3,))],
    "FusedBatchNormV3": [
        (batch_norm("FusedBatchNormV3", operand), (2, 2, 3), (3,)) for operand in (1, 2)
    ],
    "BroadcastTo": [
        (lambda x, w: tf.broadcast_to(w, [tf.shape(x)[0], 2, 3]), (5,), (2, 3)),
        (lambda x, w: tf.broadcast_to(w, [tf.shape(x)[0], 4, 3]), (5,), (1, 3)),
    ],
    "BiasAdd": [(lambda x, w: tf.raw_ops.BiasAdd(value=x, bias=w), (5, 4, 3), (3,))],
    "Sub": [(binary("Sub"), (5, 3), (3,)), (binary("Sub", weight_left=True), (5, 3), (5, 1))],
    "Mul": [
        (binary("Mul"), (5, 3), (3,)),
        (binary("Mul"), (5, 3), (1, 5, 1)),
        (binary("Mul", weight_left=True), (1, 3), (5, 1)),
    ],
    "RealDiv": [
        (binary("RealDiv"), (5, 3), (3,)),
        (binary("RealDiv", weight_left=True), (5, 3), (5, 1)),
    ],
    "Div": [(binary("Div"), (5, 3), (3,))],
    "DivNoNan": [(binary("DivNoNan"), (5, 3), (3,))],
    "Xdivy": [(binary("Xdivy"), (5, 3), (3,))],
    "Xlogy": [(lambda x, w: tf.raw_ops.Xlogy(x=x, y=w**2 + 1), (5, 3), (3,))],
    "MulNoNan": [(binary("MulNoNan"), (5, 3), (3,))],
    "Atan2": [(binary("Atan2"), (5, 3), (3,))],
    "Maximum": [(binary("Maximum"), (5, 3), (3,))],
    "Minimum": [(binary("Minimum", weight_left=True), (5, 3), (5, 1))],
    "SquaredDifference": [(binary("SquaredDifference"), (5, 3), (3,))],
    "Pow": [(lambda x, w: tf.raw_ops.Pow(x=tf.abs(x) + 1.0, y=w), (5, 3), (3,))],
    "SelectV2": [(lambda x, w: tf.raw_ops.SelectV2(condition=x > 0, t=w, e=x), (5, 3), (3,))],
}
# TensorFlow has no kernels in float64 for these.
NARROW = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
FLAT = [(name, n) for name, cases in CASES.items() for n in range(len(cases))]


def test_every_rule_has_a_case():
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize(("name", "n"), FLAT, ids=[f"{name}-{n}" for name, n in FLAT])
def test_rule_agrees_with_tape_and_oracle(name, n):
    operation, shape, weight_shape = CASES[name][n]
    dtype = "float32" if name in NARROW else "float64"
    x = draw(B, *shape).astype(dtype)
    if "Gather" in name:
        x = np.random.default_rng(0).integers(0, 4, (B, *shape)).astype(dtype)  # ids repeat
    w = tf.Variable(draw(*weight_shape, seed=1).astype(dtype))

    def model(batch):
        # A nonlinear end makes every output's cotangent depend on the data.
        y = tf.reshape(operation(batch, w), [tf.shape(batch)[0], -1])
        return tf.tanh(y @ tf.cast(mixing(y.shape[1] or size), dtype))

    size = int(np.prod(operation(tf.constant(x), w).shape[1:]))
    expected = oracle.weight_rows(model, x, [w])
    for path in ("factored", "tape"):
        engine = pj.Engine(model, variables=[w], path=path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowPathWarning)  # explicit padding stops pfor
            found = engine.jacobian(x).matrix()
        oracle.assert_agree([found], [flat(expected[0])], dtype)
    sites = pj.Engine(model, variables=[w]).inspect(x=x).rows[0].sites
    assert any(site.split()[0] == name for site in sites), f"{name} is not at the site: {sites}"


def mixing(size: int) -> tf.Tensor:
    return tf.constant(draw(size, 2, seed=2) / np.sqrt(size))


def flat(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(*rows.shape[:2], -1)
