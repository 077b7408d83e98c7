"""Weights that are made of other weights: LoRA, norms, constraints, quantisation, hypernetworks.

Importing this module enters their models into `entry.ENTRIES`.
"""

from __future__ import annotations

import functools

import keras
import tensorflow as tf
from keras import layers
from models import Floats, Ids

from zoo.entry import FLOAT_TYPES, enter
from zoo.stacks import enter_table, made, stacked

VECTOR = Floats((4,))
SEQUENCE = Floats((4, 3))
IMAGE = Floats((5, 4, 4))
IDS = Ids((5,), below=6)


def lora(make, rank: int = 2, **options):
    """Return a layer whose kernel is frozen and to which a product of two is added."""

    def function(x):
        layer = make()
        layer.build(x.shape)
        layer.enable_lora(rank, **options)
        return layer(x)

    return function


def there_and_back(make):
    """Return an embedding of ids, and its table as the projection back onto them."""

    def function(ids):
        table = make()
        return table(keras.activations.tanh(table(ids)), reverse=True)

    return function


LORA = {
    VECTOR: {
        "lora dense": lora(lambda: layers.Dense(3)),
        "lora dense relu without bias": lora(
            lambda: layers.Dense(3, activation="relu", use_bias=False)
        ),
        "lora dense alpha": lora(lambda: layers.Dense(3), lora_alpha=5.0),
        "lora dense by argument": lambda x: layers.Dense(3, lora_rank=1)(x),
    },
    SEQUENCE: {
        "lora dense on sequences": lora(lambda: layers.Dense(3)),
        "lora einsumdense": lora(
            lambda: layers.EinsumDense("abc,cd->abd", output_shape=(4, 2), bias_axes="d")
        ),
        "lora einsumdense heads": lora(
            lambda: layers.EinsumDense("abc,cde->abde", output_shape=(4, 2, 3))
        ),
        "lora conv1d": lora(lambda: layers.Conv1D(3, 2, padding="same")),
        "lora timedistributed dense": lambda x: layers.TimeDistributed(
            layers.Dense(3, lora_rank=2)
        )(x),
        "lora and layernormalization": lambda x: layers.Dense(2, lora_rank=1)(
            layers.LayerNormalization()(layers.Dense(3, lora_rank=2, activation="gelu")(x))
        ),
    },
    IMAGE: {
        "lora conv2d": lora(lambda: layers.Conv2D(3, 2)),
        "lora conv2d strided same": lora(lambda: layers.Conv2D(3, 3, strides=2, padding="same")),
        "lora conv2d grouped": lora(lambda: layers.Conv2D(4, 2, groups=2)),
    },
    Floats((3, 3, 3, 2)): {"lora conv3d": lora(lambda: layers.Conv3D(2, 2))},
    IDS: {
        "lora embedding": lora(lambda: layers.Embedding(6, 4)),
        "lora embedding by argument": lambda ids: layers.Embedding(6, 4, lora_rank=1)(ids),
        "lora reversibleembedding": there_and_back(
            lambda: layers.ReversibleEmbedding(6, 4, lora_rank=2)
        ),
    },
}
enter_table(LORA, dtypes=("float32",))  # in which LoRA's weights are under any policy

CONSTRAINTS = {
    "maxnorm": lambda: keras.constraints.MaxNorm(0.5),
    "minmaxnorm": lambda: keras.constraints.MinMaxNorm(0.2, 0.8, axis=0),
    "nonneg": lambda: keras.constraints.NonNeg(),
    "unitnorm": lambda: keras.constraints.UnitNorm(),
}


def constrained(name: str, make):
    def function(x):
        constraint = CONSTRAINTS[name]()
        return layers.Dense(
            4, kernel_constraint=constraint, bias_constraint=constraint, activation="tanh"
        )(x)

    return function


enter_table(
    {
        VECTOR: {
            f"constraint {name}": constrained(name, make) for name, make in CONSTRAINTS.items()
        },
        IMAGE: {
            "constraint conv2d": lambda x: layers.Conv2D(3, 2, kernel_constraint="max_norm")(x)
        },
        IDS: {
            "constraint embedding": lambda x: layers.Embedding(
                6, 3, embeddings_constraint="unit_norm"
            )(x)
        },
    }
)


def quantised(model: keras.Model, mode: str) -> None:
    for layer in model.layers:
        if isinstance(layer, (layers.Dense, layers.EinsumDense, layers.Embedding)):
            layer.quantize(mode)


QUANTISED = {
    ("dense", VECTOR): lambda x: layers.Dense(3)(layers.Dense(5, activation="tanh")(x)),
    ("einsumdense", SEQUENCE): lambda x: layers.EinsumDense(
        "abc,cd->abd", output_shape=(4, 2), bias_axes="d"
    )(layers.LayerNormalization()(x)),
    ("embedding", IDS): lambda ids: layers.LayerNormalization()(layers.Embedding(6, 4)(ids)),
    ("lora dense", VECTOR): lora(lambda: layers.Dense(3)),
    ("lora embedding", IDS): lora(lambda: layers.Embedding(6, 4)),
}
for (what, example), function in QUANTISED.items():
    for mode in ("int8", "int4", "float8"):
        if mode == "float8" and (what.startswith("lora") or "embedding" in what):
            continue  # Keras has none
        enter(
            "layers",
            f"{what} quantised to {mode}",
            functools.partial(stacked, example, function),
            example,
            finish=functools.partial(quantised, mode=mode),
            # Keras's float8 has gradients in float32 for any weight.
            dtypes=("float32",) if "lora" in what or mode == "float8" else FLOAT_TYPES,
        )


def standardised(kernel):
    """Weight standardisation (Qiao et al. 2019): each filter of mean zero and variance one."""
    mean, variance = tf.nn.moments(kernel, [0, 1, 2], keepdims=True)
    return (kernel - mean) * tf.math.rsqrt(variance + 1e-5)


def skew(w):
    return w - tf.transpose(w)


def cayley(w):
    """An orthogonal matrix of any square one."""
    eye = tf.eye(4, dtype=w.dtype)
    return tf.linalg.solve(eye + skew(w), eye - skew(w))


def spectral_norm(w, u):
    """W over its largest singular value, after two steps from u."""
    for _ in range(2):
        v = tf.math.l2_normalize(tf.linalg.matvec(w, u, transpose_a=True))
        u = tf.math.l2_normalize(tf.linalg.matvec(w, v))
    return w / tf.tensordot(u, tf.linalg.matvec(w, v), 1)


def householder(v):
    """A product of two reflections."""
    q = tf.eye(4, dtype=v.dtype)
    for row in tf.unstack(v):
        unit = tf.math.l2_normalize(row)
        q -= 2 * tf.tensordot(tf.linalg.matvec(q, unit), unit, 0)
    return q


def times(parametrisation, **shapes):
    """Return x times a matrix that is made of the weights."""
    return made(lambda x, *weights: tf.matmul(x, parametrisation(*weights)), **shapes)


def convolved(parametrisation, **shapes):
    """Return x convolved with a kernel that is made of the weights."""
    return made(
        lambda x, *weights: tf.nn.conv2d(x, parametrisation(*weights), 1, "VALID"), **shapes
    )


enter_table(
    {
        VECTOR: {
            "weight norm": times(
                lambda v, gain: gain * v / tf.norm(v, axis=0), v=(4, 3), gain=(3,)
            ),
            "weight times scalar": times(lambda w, s: w * s, w=(4, 3), s=()),
            "weight times scalar times scalar": times(
                lambda w, s, t: w * tf.exp(s) * t, w=(4, 3), s=(), t=()
            ),
            "low rank": times(lambda a, b: a @ b, a=(4, 2), b=(2, 3)),
            "low rank added": times(lambda w, a, b: w + a @ b, w=(4, 3), a=(4, 2), b=(2, 3)),
            "three factors": times(
                lambda a, d, b: a @ (d[:, None] * b), a=(4, 2), d=(2,), b=(2, 3)
            ),
            "kronecker product": times(
                lambda a, b: tf.reshape(tf.einsum("ij,kl->ikjl", a, b), (4, 6)), a=(2, 3), b=(2, 2)
            ),
            "circulant": times(
                lambda w: tf.stack([tf.roll(w, n, axis=0) for n in range(4)]), w=(4,)
            ),
            "toeplitz": times(lambda w: tf.stack([w[3 - n : 7 - n] for n in range(4)]), w=(7,)),
            "diagonal": times(tf.linalg.diag, w=(4,)),
            "diagonal added": times(
                lambda w, d: tf.linalg.set_diag(w, tf.exp(d)), w=(4, 4), d=(4,)
            ),
            "symmetric": times(lambda w: w + tf.transpose(w), w=(4, 4)),
            "triangular": times(lambda w: tf.linalg.band_part(w, -1, 0), w=(4, 4)),
            "cholesky factor": times(
                lambda w: tf.linalg.cholesky(w @ tf.transpose(w) + tf.eye(4, dtype=w.dtype)),
                w=(4, 4),
            ),
            "orthogonal by expm": times(lambda w: tf.linalg.expm(skew(w)), w=(4, 4)),
            "orthogonal by cayley": times(cayley, w=(4, 4)),
            "orthogonal by householder": times(householder, v=(2, 4)),
            "orthogonal by qr": times(lambda w: tf.linalg.qr(w).q, w=(4, 4)),
            "inverse": times(lambda w: tf.linalg.inv(w + 3 * tf.eye(4, dtype=w.dtype)), w=(4, 4)),
            "spectral norm": times(spectral_norm, w=(4, 3), u=(4,)),
            "positive": times(tf.nn.softplus, w=(4, 3)),
            "clipped": times(lambda w: tf.clip_by_value(w, -0.5, 0.5), w=(4, 3)),
            "softmax of weights": times(lambda w: tf.nn.softmax(w, axis=0), w=(4, 3)),
            "mixture of kernels": times(
                lambda w, logits: tf.tensordot(tf.nn.softmax(logits), w, 1),
                w=(3, 4, 2),
                logits=(3,),
            ),
            "hypernetwork": times(
                lambda z, w, b: tf.reshape(tf.tanh(z @ w) + b, (4, 3)), z=(1, 2), w=(2, 12), b=(12,)
            ),
            "binary with straight gradient": times(
                lambda w: w + tf.stop_gradient(tf.sign(w) - w), w=(4, 3)
            ),
            "masked weight": times(
                lambda w: w * tf.constant([[1.0], [0.0], [1.0], [1.0]], w.dtype), w=(4, 3)
            ),
            "frozen half": times(
                lambda w: tf.concat([tf.stop_gradient(w[:2]), w[2:]], axis=0), w=(4, 3)
            ),
            "moving average": times(lambda w, v: 0.9 * w + 0.1 * v, w=(4, 3), v=(4, 3)),
            "fourier features of a weight": times(
                lambda w: tf.math.real(tf.signal.fft(tf.complex(w, tf.zeros_like(w)))), w=(4, 4)
            ),
            "product in a loop": times(
                lambda w: tf.while_loop(
                    lambda n, p: n < 3, lambda n, p: (n + 1, tf.tanh(p @ w)), (0, w)
                )[1],
                w=(4, 4),
            ),
        },
        IMAGE: {
            "weight standardisation": convolved(standardised, kernel=(2, 2, 4, 3)),
            "kernel of its basis": convolved(
                lambda basis, w: tf.einsum("hwn,nio->hwio", basis, w), basis=(3, 3, 2), w=(2, 4, 3)
            ),
            "kernel symmetric": convolved(
                lambda w: w + tf.reverse(w, axis=[1]), kernel=(2, 3, 4, 2)
            ),
            "kernel padded": convolved(
                lambda w: tf.pad(w, [[1, 0], [0, 1], [0, 0], [0, 0]]), kernel=(1, 2, 4, 3)
            ),
            "kernel repeated over channels": convolved(
                lambda w: tf.repeat(w, 4, axis=2), kernel=(2, 2, 1, 3)
            ),
            "kernel rotated and stacked": convolved(
                lambda w: tf.stack([tf.image.rot90(w, n) for n in range(4)], axis=-1),
                kernel=(2, 2, 4),
            ),
        },
        IDS: {
            "embedding of factors": made(
                lambda ids, a, b: tf.gather(a @ b, ids), a=(6, 2), b=(2, 3)
            ),
            "embedding normalised": made(
                lambda ids, w: tf.gather(tf.math.l2_normalize(w, axis=1), ids), table=(6, 3)
            ),
            "embedding factored outside": made(
                lambda ids, a, b: tf.gather(a, ids) @ b, a=(6, 2), b=(2, 3)
            ),
        },
    }
)
