"""Ways to use a weight in TensorFlow's own operations, beyond what Keras's layers do.

Importing this module enters their models into `entry.ENTRIES`.
"""

from __future__ import annotations

import tensorflow as tf
from models import Floats, Ids

from zoo.stacks import enter_table, made

VECTOR = Floats((4,))
SEQUENCE = Floats((4, 3))
IMAGE = Floats((5, 4, 3))
IDS = Ids((4,), below=5)


def rows(x, w):
    """Return a copy of w for each example, (B, *w.shape)."""
    return tf.broadcast_to(w, tf.concat([tf.shape(x)[:1], tf.shape(w)], axis=0))


def spectrum_scaled(x, real, imaginary):
    """A global filter (Rao et al. 2021): complex weights on the Fourier transform over time."""
    spectrum = tf.signal.rfft(tf.transpose(x, (0, 2, 1)))
    filtered = spectrum * tf.complex(real, imaginary)
    return tf.transpose(tf.signal.irfft(filtered, [4]), (0, 2, 1))


def complex_matmul(x, real, imaginary):
    product = tf.matmul(tf.complex(x, tf.cos(x)), tf.complex(real, imaginary))
    return tf.abs(product)


def scattered_rows(x, w):
    """w's rows laid at the places 2 and 0 of a constant table, and the table times x."""
    table = tf.tensor_scatter_nd_update(tf.ones((4, 3), w.dtype), [[2], [0]], w)
    return x @ table


def polynomial(x, w):
    """Horner's rule: the weight's entries one by one."""
    total = tf.zeros_like(x)
    for coefficient in tf.unstack(w):
        total = total * x + coefficient
    return total


def gated_experts(x, gate, w):
    chosen = tf.nn.softmax(x @ gate)
    return tf.einsum("bi,be,eio->bo", x, chosen, w)


def routed_experts(x, gate, w):
    """Each example goes to one expert, whose matrix is looked up."""
    best = tf.argmax(x @ gate, axis=1)
    return tf.linalg.matvec(tf.gather(w, best), x, transpose_a=True)


def kernel_of_data(x, w):
    """A hypernetwork of the data: each example has a matrix of its own."""
    return tf.linalg.matvec(tf.reshape(tf.tanh(x @ w), (-1, 3, 4)), x)


def codebook(x, w):
    """Soft vector quantisation: distances to the codes, and their mixture."""
    distances = tf.reduce_sum((x[:, None] - w) ** 2, axis=-1)
    return tf.nn.softmax(-distances) @ w


enter_table(
    {
        VECTOR: {
            "weight on the left": made(
                lambda x, w: tf.transpose(tf.matmul(w, x, transpose_b=True)), w=(3, 4)
            ),
            "matmul transpose_b": made(lambda x, w: tf.matmul(x, w, transpose_b=True), w=(3, 4)),
            "matmul adjoint_b": made(lambda x, w: tf.matmul(x, w, adjoint_b=True), w=(3, 4)),
            "matvec": made(lambda x, w: tf.linalg.matvec(w, x), w=(3, 4)),
            "tensordot": made(lambda x, w: tf.tensordot(x, w, [[1], [1]]), w=(3, 4, 2)),
            "bilinear": made(lambda x, w: tf.einsum("bi,ijo,bj->bo", x, w, x), w=(4, 4, 3)),
            "quadratic form": made(lambda x, w: tf.reduce_sum((x @ w) * x, -1), w=(4, 4)),
            "two matmuls of one weight": made(lambda x, w: tf.tanh(tf.tanh(x @ w) @ w), w=(4, 4)),
            "weight and its transpose": made(
                lambda x, w: tf.matmul(tf.tanh(x @ w), w, transpose_b=True), w=(4, 3)
            ),
            "power": made(lambda x, w: tf.abs(x) ** w, w=(4,)),
            "quotient": made(lambda x, w: w / (1.5 + x**2), w=(4,)),
            "weight in the denominator": made(lambda x, w: x / (2.0 + tf.tanh(w)), w=(4,)),
            "maximum": made(tf.maximum, w=(4,)),
            "minimum of rows": made(lambda x, w: tf.minimum(x[:, None], w), w=(3, 4)),
            "atan2": made(lambda x, w: tf.atan2(x, 2.0 + w**2), w=(4,)),
            "squared difference": made(
                lambda x, w: tf.math.squared_difference(x[:, None], w), w=(3, 4)
            ),
            "where by data": made(lambda x, w, v: tf.where(x > 0, w, v), w=(4,), v=(4,)),
            "where by a weight": made(lambda x, w: tf.where(w > 0, x * w, x - w), w=(4,)),
            "where by a constant": made(
                lambda x, w: tf.where([True, False, True, False], x, w), w=(4,)
            ),
            "stack of weights": made(
                lambda x, w, v: tf.einsum("bi,nio->bno", x, tf.stack([w, v])), w=(4, 2), v=(4, 2)
            ),
            "concatenation of weights": made(
                lambda x, w, v: x @ tf.concat([w, v], axis=1), w=(4, 2), v=(4, 1)
            ),
            "weight behind the data": made(
                lambda x, w: tf.tanh(tf.concat([x, rows(x, w)], axis=1)), w=(3,)
            ),
            "split weight": made(
                lambda x, w: tf.multiply(*[x @ part for part in tf.split(w, 2, axis=1)]), w=(4, 6)
            ),
            "tiled weight": made(lambda x, w: x * tf.tile(w, [2]), w=(2,)),
            "tiled over the batch": made(
                lambda x, w: x * tf.tile(w[None], [tf.shape(x)[0], 1]), w=(4,)
            ),
            "broadcast over the batch": made(lambda x, w: x * rows(x, w), w=(4,)),
            "matrices for each example": made(
                lambda x, w: tf.matmul(x[:, None], rows(x, w))[:, 0], w=(4, 3)
            ),
            "ones times weight": made(
                lambda x, w: tf.concat([tf.ones_like(x[:, :1]), x], axis=1) @ w, w=(5, 3)
            ),
            "cumulative sum of a weight": made(lambda x, w: x * tf.cumsum(w), w=(4,)),
            "cumulative sum behind": made(lambda x, w: tf.cumsum(x * w, axis=1), w=(4,)),
            "cumulative product of a weight": made(lambda x, w: x * tf.math.cumprod(w), w=(4,)),
            "rolled weight": made(lambda x, w: x * tf.roll(w, 1, axis=0), w=(4,)),
            "rolled sum": made(lambda x, w: tf.roll(x * w, 1, axis=1) + x, w=(4,)),
            "padded weight": made(lambda x, w: x + tf.pad(w, [[1, 1]]), w=(2,)),
            "reversed weight": made(lambda x, w: x * tf.reverse(w, [0]), w=(4,)),
            "sliced weight": made(lambda x, w: x @ w[1:5, ::2], w=(6, 5)),
            "row of a weight": made(lambda x, w: x * w[2], w=(3, 4)),
            "gather at a constant": made(lambda x, w: x * tf.gather(w, [3, 0, 0, 1]), w=(5,)),
            "gather at axis 1": made(lambda x, w: x @ tf.gather(w, [2, 0], axis=1), w=(4, 3)),
            "scattered rows": made(scattered_rows, w=(2, 3)),
            "scattered into the data": made(
                lambda x, w: tf.transpose(
                    tf.tensor_scatter_nd_add(tf.transpose(x), [[1], [1]], tf.transpose(rows(x, w)))
                ),
                w=(2,),
            ),
            "sum over a weight": made(lambda x, w: x * tf.reduce_sum(w), w=(3, 4)),
            "norm of a weight": made(lambda x, w: tf.tanh(x * tf.norm(w)), w=(3,)),
            "largest entry of a weight": made(lambda x, w: x * tf.reduce_max(w, axis=0), w=(3, 4)),
            "sorted weight": made(lambda x, w: x * tf.sort(w), w=(4,)),
            "sorted sum": made(lambda x, w: tf.sort(x + w, axis=1), w=(4,)),
            "top of the sum": made(lambda x, w: tf.math.top_k(x * w, 2).values, w=(4,)),
            "log-sum-exp": made(lambda x, w: tf.reduce_logsumexp(x[:, None] * w, -1), w=(3, 4)),
            "softmax behind": made(lambda x, w: tf.nn.softmax(x @ w), w=(4, 3)),
            "polynomial": made(polynomial, w=(3,)),
            "temperature": made(lambda x, t: tf.nn.softmax(x / (1.0 + t**2)), t=()),
            "scalar of shape one": made(lambda x, s: tf.tanh(x * s) + s, s=(1,)),
            "layer scale": made(lambda x, g, w: x + g * tf.tanh(x @ w), g=(4,), w=(4, 4)),
            "linear system": made(
                lambda x, w: tf.transpose(
                    tf.linalg.solve(w + 3 * tf.eye(4, dtype=w.dtype), tf.transpose(x))
                ),
                w=(4, 4),
            ),
            "triangular system": made(
                lambda x, w: tf.transpose(
                    tf.linalg.triangular_solve(w + 3 * tf.eye(4, dtype=w.dtype), tf.transpose(x))
                ),
                w=(4, 4),
            ),
            "log-determinant": made(
                lambda x, w: x * tf.linalg.slogdet(w + 3 * tf.eye(3, dtype=w.dtype))[1], w=(3, 3)
            ),
            "experts gated": made(gated_experts, gate=(4, 2), w=(2, 4, 3)),
            "experts routed": made(routed_experts, gate=(4, 2), w=(2, 4, 3)),
            "hypernetwork of the data": made(kernel_of_data, w=(4, 12)),
            "codebook": made(codebook, w=(3, 4)),
            "complex matmul": made(complex_matmul, real=(4, 3), imaginary=(4, 3)),
            "random features frozen": made(
                lambda x, w, b: tf.cos(x @ tf.stop_gradient(w) + b), w=(4, 3), b=(3,)
            ),
            "unused weight": made(lambda x, w, v: x @ w, w=(4, 3), v=(4, 3)),
            "weight without data": made(lambda x, w: rows(x, tf.tanh(w)), w=(3,)),
        },
        SEQUENCE: {
            "matmul over time": made(lambda x, w: tf.matmul(w, x), w=(5, 4)),
            "matmul over time transposed": made(
                lambda x, w: tf.matmul(w, x, transpose_a=True), w=(4, 5)
            ),
            "matmul of a matrix for each position": made(
                lambda x, w: tf.matmul(x[:, :, None], w)[:, :, 0], w=(4, 3, 2)
            ),
            "matmul folded": made(
                lambda x, w: tf.reshape(tf.reshape(x, (-1, 3)) @ w, (-1, 4, 2)), w=(3, 2)
            ),
            "matmul folded time-major": made(
                lambda x, w: tf.transpose(
                    tf.reshape(tf.reshape(tf.transpose(x, (1, 0, 2)), (-1, 3)) @ w, (4, -1, 2)),
                    (1, 0, 2),
                ),
                w=(3, 2),
            ),
            "bias over time": made(lambda x, b: x + b[:, None], b=(4,)),
            "bias of positions": made(lambda x, b: tf.tanh(x) + b, b=(4, 3)),
            "relative positions": made(
                lambda x, b: (
                    tf.nn.softmax(
                        tf.matmul(x, x, transpose_b=True)
                        + tf.gather(b, tf.range(4)[:, None] - tf.range(4) + 3)
                    )
                    @ x
                ),
                b=(7,),
            ),
            "class token": made(
                lambda x, w: tf.nn.softmax(tf.concat([rows(x, w[None]), x], axis=1)), w=(3,)
            ),
            "fourier filter": made(spectrum_scaled, real=(3, 3), imaginary=(3, 3)),
            "causal mask on a weight": made(
                lambda x, w: tf.matmul(tf.linalg.band_part(w, -1, 0), x), w=(4, 4)
            ),
            "bias_add": made(lambda x, b: tf.nn.bias_add(tf.sin(x), b), b=(3,)),
            "bias_add before the pixels": made(
                lambda x, b: tf.nn.bias_add(tf.sin(x)[..., None], b, data_format="NCHW"), b=(4,)
            ),
            "segments": made(
                lambda x, w: tf.transpose(
                    tf.math.unsorted_segment_sum(tf.transpose(x * w, (1, 0, 2)), [0, 1, 0, 1], 2),
                    (1, 0, 2),
                ),
                w=(3,),
            ),
            "attention without weights": made(
                lambda x, w: tf.nn.softmax(tf.matmul(x, x, transpose_b=True)) @ (x @ w), w=(3, 2)
            ),
            "attention pooling": made(
                lambda x, q: tf.einsum("bt,btd->bd", tf.nn.softmax(tf.linalg.matvec(x, q)), x),
                q=(3,),
            ),
            "one query for all": made(
                lambda x, q: tf.matmul(tf.nn.softmax(tf.matmul(q, x, transpose_b=True)), x),
                q=(2, 3),
            ),
        },
        IMAGE: {
            "patches times a matrix": made(
                lambda x, w: tf.matmul(
                    tf.image.extract_patches(x, [1, 2, 2, 1], [1, 2, 2, 1], [1] * 4, "SAME"), w
                ),
                w=(12, 2),
            ),
            "convolution with explicit padding": made(
                lambda x, w: tf.nn.conv2d(x, w, 1, [[0, 0], [1, 0], [0, 2], [0, 0]]),
                w=(2, 2, 3, 2),
            ),
            "convolution of two kernels of one weight": made(
                lambda x, w: tf.nn.conv2d(tf.tanh(tf.nn.conv2d(x, w, 1, "SAME")), w, 1, "VALID"),
                w=(2, 2, 3, 3),
            ),
            "depthwise with a dense kernel's diagonal": made(
                lambda x, w: tf.nn.depthwise_conv2d(
                    x, tf.linalg.diag_part(w)[None, ..., None], [1] * 4, "VALID"
                ),
                w=(2, 3, 3),
            ),
            "positions resized": made(
                lambda x, w: x + tf.cast(tf.image.resize(w, (5, 4)), x.dtype), w=(3, 2, 3)
            ),
            "dilation by a weight": made(
                lambda x, w: tf.nn.dilation2d(x, w, [1] * 4, "VALID", "NHWC", [1] * 4), w=(2, 2, 3)
            ),
            "gain of channels": made(
                lambda x, w: x * tf.sigmoid(tf.reduce_mean(x, [1, 2], keepdims=True) @ w), w=(3, 3)
            ),
            "depth to space": made(
                lambda x, w: tf.nn.depth_to_space(tf.nn.conv2d(x, w, 1, "SAME"), 2),
                w=(2, 2, 3, 4),
            ),
        },
        IDS: {
            "one-hot matmul": made(
                lambda ids, w: tf.matmul(tf.one_hot(ids, 5, dtype=w.dtype), w), w=(5, 3)
            ),
            "gather_nd": made(lambda ids, w: tf.gather_nd(w, ids[..., None]), w=(5, 3)),
            "gather_nd of pairs": made(
                lambda ids, w: tf.gather_nd(w, tf.stack([ids, 4 - ids], axis=-1)), w=(5, 5)
            ),
            "gather of columns by data": made(
                lambda ids, w: tf.transpose(tf.gather(w, ids, axis=1), (1, 0, 2)), w=(3, 5)
            ),
            "gather in each row": made(
                lambda ids, w: tf.gather(rows(ids, w), ids, batch_dims=1), w=(5, 3)
            ),
            "embedding bag": made(
                lambda ids, w: tf.reduce_mean(tf.nn.embedding_lookup(w, ids), axis=1), w=(5, 3)
            ),
            "two tables": made(
                lambda ids, w, v: tf.gather(w, ids // 2) * tf.gather(v, ids % 2), w=(3, 2), v=(2, 2)
            ),
            "table and positions": made(
                lambda ids, w, p: tf.gather(w, ids) + tf.gather(p, tf.range(4)), w=(5, 3), p=(6, 3)
            ),
        },
    }
)
