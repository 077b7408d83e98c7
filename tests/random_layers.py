"""Random layers: what can follow a tensor of a given shape, drawn from a seeded generator.

A step is a Keras layer, or a function of a tensor made of layers that exist already, so that a
step can be applied again: to another tensor (a shared layer), or within another kind of model.
`draw` returns a step for a shape; nothing here knows perjac.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import layers, ops

Shape = tuple[int, ...]  # of one example
Step = Callable[[Any], Any]
LARGE = 240  # numbers in an example, from which on steps make it smaller
ACTIVATIONS = (None, "relu", "tanh", "swish", "gelu", "sigmoid", "softplus", "elu")
RECURRENT = (layers.LSTM, layers.GRU, layers.SimpleRNN)


@dataclasses.dataclass(eq=False)  # as a function, equal to itself alone
class Chain:
    """Steps one after another."""

    steps: list[Step]

    def __call__(self, x: Any) -> Any:
        for step in self.steps:
            x = step(x)
        return x


def grow(r: random.Random, x: Any, length: int, draw_step: Callable | None = None):
    """Return a chain of random steps that was applied to a symbolic tensor, and its output."""
    steps = []
    for _ in range(length):
        steps.append((draw_step or draw)(r, tuple(x.shape[1:])))
        x = steps[-1](x)
    return Chain(steps), x


def draw(r: random.Random, shape: Shape, accepted: Callable[[Step], bool] = callable) -> Step:
    """Return a random step for a tensor of this shape."""
    table = SMALLER if math.prod(shape) > LARGE else STEPS
    while True:
        step = r.choice(table[len(shape)])(r, shape)
        if step is not None and accepted(step):
            return step


def only_layers(r: random.Random, shape: Shape) -> Step:
    """Return a random step that a Sequential model can hold."""
    return draw(r, shape, lambda step: isinstance(step, keras.Layer))


def ordinary(r: random.Random, shape: Shape) -> Step:
    """Return a recurrent, dilated, separable or dense layer."""
    table = {
        1: [dense],
        2: [recurrent, recurrent, bidirectional, dilated, separable, dense],
        3: [dilated, dilated, separable, dense, flat],
    }
    return r.choice(table[len(shape)])(r, shape)


# What keeps the shape: the inside of residual branches and shared layers.


def keeping(r: random.Random, shape: Shape) -> Step:
    channels, act = shape[-1], r.choice(ACTIVATIONS)
    kinds: list[Callable[[], Step]] = [lambda: layers.Dense(channels, activation=act)]
    if len(shape) == 2:
        kinds += [
            lambda: layers.Conv1D(
                channels, 3, padding=r.choice(["same", "causal"]), dilation_rate=r.choice([1, 2])
            ),
            lambda: r.choice(RECURRENT)(channels, return_sequences=True),
            lambda: itself(layers.MultiHeadAttention(2, 2, dropout=0.1)),
            lambda: layers.SeparableConv1D(channels, 2, padding="same", activation=act),
        ]
    if len(shape) == 3:
        kinds += [
            lambda: layers.Conv2D(channels, 3, padding="same", dilation_rate=r.choice([1, 2])),
            lambda: layers.SeparableConv2D(channels, 2, padding="same", activation=act),
        ]
    if len(shape) == 4:
        kinds += [lambda: layers.Conv3D(channels, 2, padding="same")]
    kinds += [lambda: norm(r, shape) or layers.LayerNormalization()]
    return r.choice(kinds)()


def itself(attention: keras.Layer, **options: Any) -> Step:
    return lambda x: attention(x, x, **options)


# For any shape.


def dense(r, shape):
    return layers.Dense(
        r.randint(1, 5), activation=r.choice(ACTIVATIONS), use_bias=r.random() < 0.8
    )


def activation(r, shape):
    kinds = [
        lambda: layers.Activation(r.choice(ACTIVATIONS[1:])),
        lambda: layers.LeakyReLU(),
        lambda: layers.ReLU(max_value=6.0),
        lambda: layers.Softmax() if shape[-1] > 1 else None,
        lambda: layers.PReLU(),
        lambda: layers.PReLU(shared_axes=list(range(1, len(shape)))) if len(shape) > 1 else None,
    ]
    return r.choice(kinds)()


def norm(r, shape):
    groups = [g for g in (1, 2, 3) if shape[-1] % g == 0]
    kinds = [
        lambda: layers.LayerNormalization(),
        lambda: layers.LayerNormalization(axis=list(range(1, len(shape) + 1))),
        lambda: layers.BatchNormalization(),
        lambda: layers.GroupNormalization(r.choice(groups)) if len(shape) > 1 else None,
        lambda: layers.UnitNormalization(),
        lambda: layers.RMSNormalization(),
    ]
    return r.choice(kinds)()


def quiet(r, shape):
    kinds = [
        lambda: layers.Dropout(0.5),
        lambda: layers.GaussianNoise(0.3),
        lambda: layers.GaussianDropout(0.3),
        lambda: layers.ActivityRegularization(l2=0.1),
        lambda: layers.Rescaling(0.7, offset=0.1),
    ]
    return r.choice(kinds)()


def flat(r, shape):
    return layers.Flatten()


def residual(r, shape):
    inner, add = Chain([keeping(r, shape) for _ in range(r.randint(1, 2))]), layers.Add()
    return lambda x: add([x, inner(x)])


def merged(r, shape):
    merge = r.choice([layers.Add, layers.Multiply, layers.Average, layers.Maximum,
                      layers.Minimum, layers.Subtract])()  # fmt: skip
    left, right = keeping(r, shape), keeping(r, shape)
    return lambda x: merge([left(x), right(x)])


def joined(r, shape):
    axis = r.randint(1, len(shape))
    join, left, right = layers.Concatenate(axis=axis), keeping(r, shape), keeping(r, shape)
    return lambda x: join([left(x), right(x), x])


def shared(r, shape):
    once, act = keeping(r, shape), layers.Activation("tanh")
    between = keeping(r, shape)
    ways = [
        lambda x: once(act(once(x))),
        lambda x: once(x) * once(between(x)),
        lambda x: ops.concatenate([once(x), once(once(x))], axis=-1),
        lambda x: once(x) + once(0.5 * x) + once(act(x)),
    ]
    return r.choice(ways)


def gated(r, shape):
    gate = layers.Dense(shape[-1], activation="sigmoid")
    return lambda x: x * ops.cast(gate(x), x.dtype)


def einsum(r, shape):
    letters = "bhwtc"[-len(shape) - 1 :] if len(shape) < 5 else None
    letters = "b" + letters[1:]
    ways = [(f"{letters},cd->{letters[:-1]}d", (*shape[:-1], 3), "d")]
    if len(shape) == 2:
        ways += [("btc,ts->bsc", (3, shape[1]), "c"), ("btc,tcd->btd", (shape[0], 2), "td")]
        ways += [("btc,cdk->btdk", (shape[0], 2, 2), "dk")]
    if len(shape) == 3:
        ways += [("bwtc,tcd->bwd", (shape[0], 3), "d"), ("bwtc,ws->bstc", (3, *shape[1:]), None)]
    equation, output, bias = r.choice(ways)
    return layers.EinsumDense(
        equation, output_shape=output, bias_axes=bias, activation=r.choice(ACTIVATIONS)
    )


def permuted(r, shape):
    axes = list(range(1, len(shape) + 1))
    r.shuffle(axes)
    return layers.Permute(axes)


def reshaped(r, shape):
    size = math.prod(shape)
    choices = [(size,), (size, 1), (*shape, 1), (math.prod(shape[:-1]), shape[-1])]
    choices += [(size // n, n) for n in (2, 3) if size % n == 0]
    choices += [(size // 4, 2, 2)] if size % 4 == 0 else []
    return layers.Reshape(r.choice([c for c in choices if len(c) < 5]))


def moved(r, shape):
    """Return what moves positions, without weights, by operations in place of layers."""
    axis = r.randint(1, len(shape))
    halves = shape[axis - 1] // 2
    ways: list[Step] = [
        lambda x: ops.flip(x, axis),
        lambda x: ops.roll(x, 1, axis),
        lambda x: ops.cumsum(x, axis),
        lambda x: ops.repeat(x, 2, axis) if math.prod(shape) < LARGE // 2 else x,
        lambda x: ops.max(x, axis, keepdims=True) - x,
        lambda x: x - ops.mean(x, axis, keepdims=True),
        lambda x: ops.take(x, list(range(shape[axis - 1]))[::-2], axis=axis),
    ]
    if halves:
        ways += [lambda x: ops.concatenate(ops.split(x, [halves], axis)[::-1], axis)]
    return r.choice(ways)


# Vectors.


def repeated(r, shape):
    return layers.RepeatVector(r.randint(2, 4)) if shape[0] < 40 else None


def dotted(r, shape):
    left, right = layers.Dense(3), layers.Dense(3, activation="tanh")
    if len(shape) == 1:
        dot, out = layers.Dot(axes=1), layers.Dense(3)
        return lambda x: out(dot([left(x), right(x)]))
    dot = layers.Dot(axes=r.choice([1, 2]), normalize=r.random() < 0.3)
    return lambda x: dot([left(x), right(x)])


# Sequences and what else has positions.


def convolution(r, shape):
    rank, kinds = len(shape) - 1, (layers.Conv1D, layers.Conv2D, layers.Conv3D)
    how = stretch(r, shape, dilate=rank < 3)
    groups = 2 if rank < 3 and shape[-1] % 2 == 0 and r.random() < 0.25 else 1
    filters = groups * r.randint(1, 2)
    options = {"groups": groups, "activation": r.choice(ACTIVATIONS), **how}
    return kinds[rank - 1](filters, use_bias=r.random() < 0.8, **options)


def dilated(r, shape):
    if len(shape) == 2:
        kind, padding = layers.Conv1D, r.choice(["same", "causal"])
        rates = r.choice([2, 3])
    else:
        kind, padding = layers.Conv2D, "same"
        rates = r.choice([2, 3, (2, 1), (1, 3)])
    return kind(
        r.randint(1, 4), r.choice([2, 3]), dilation_rate=rates, padding=padding,
        activation=r.choice(ACTIVATIONS),
    )  # fmt: skip


def separable(r, shape):
    rank, how = len(shape) - 1, stretch(r, shape, dilate=r.random() < 0.5)
    if len(set(how["strides"])) > 1:  # which depthwise kernels do not take
        how["strides"] = (1,) * rank
    if how["padding"] == "causal":
        how["padding"] = "same"
    if r.random() < 0.5:
        kind = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)[rank - 1]
        return kind(depth_multiplier=r.choice([1, 2]), activation=r.choice(ACTIVATIONS), **how)
    kind = (layers.SeparableConv1D, layers.SeparableConv2D)[rank - 1]
    return kind(r.randint(1, 4), activation=r.choice(ACTIVATIONS), **how)


def stretch(r, shape, dilate: bool) -> dict[str, Any]:
    """Return the kernel, strides, dilation and padding of a convolution."""
    rank = len(shape) - 1
    kernel = tuple(r.choice([1, 2, 3]) for _ in range(rank))
    strides = rates = (1,) * rank
    if r.random() < 0.3:
        strides = tuple(r.choice([1, 2]) for _ in range(rank))
    elif dilate and r.random() < 0.5:
        rates = tuple(r.choice([1, 2, 3]) for _ in range(rank))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, rates, strict=True)]
    fits = all(size >= n for size, n in zip(shape, reach, strict=False))
    padding = r.choice(["valid", "same", "causal"] if rank == 1 else ["valid", "same"])
    if padding == "valid" and not fits:
        padding = "same"
    return {
        "kernel_size": kernel, "strides": strides, "dilation_rate": rates, "padding": padding
    }  # fmt: skip


def transposed(r, shape):
    kind = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)[len(shape) - 2]
    return kind(
        r.randint(1, 3), r.choice([2, 3]), strides=r.choice([1, 2]),
        padding=r.choice(["same", "valid"]), activation=r.choice(ACTIVATIONS),
    )  # fmt: skip


def pooled(r, shape):
    rank = len(shape) - 1
    if rank == 3 and keras.config.floatx() != "float32":
        return None  # TensorFlow has no kernel
    window = tuple(min(size, 2) for size in shape[:-1])
    kinds = [
        [layers.MaxPooling1D, layers.AveragePooling1D],
        [layers.MaxPooling2D, layers.AveragePooling2D],
        [layers.MaxPooling3D, layers.AveragePooling3D],
    ][rank - 1]
    strides = r.choice([None, 1]) if math.prod(shape) < LARGE else None
    return r.choice(kinds)(
        window if rank > 1 else window[0], strides=strides, padding=r.choice(["valid", "same"])
    )


def globally(r, shape):
    kinds = [
        [layers.GlobalMaxPooling1D, layers.GlobalAveragePooling1D],
        [layers.GlobalMaxPooling2D, layers.GlobalAveragePooling2D],
        [layers.GlobalMaxPooling3D, layers.GlobalAveragePooling3D],
    ][len(shape) - 2]
    return r.choice(kinds)(keepdims=r.random() < 0.3)


def resized(r, shape):
    rank = len(shape) - 1
    if rank == 1:
        kinds = [
            lambda: layers.UpSampling1D(2),
            lambda: layers.ZeroPadding1D((1, 2)),
            lambda: layers.Cropping1D((1, 0)) if shape[0] > 2 else None,
        ]
    elif rank == 2:
        kinds = [
            lambda: layers.UpSampling2D((2, 1), interpolation="nearest"),
            lambda: layers.UpSampling2D(2, interpolation="bilinear"),
            lambda: layers.ZeroPadding2D(((1, 0), (0, 2))),
            lambda: layers.Cropping2D(((1, 0), (0, 1))) if min(shape[:2]) > 2 else None,
        ]
    else:
        kinds = [
            lambda: layers.UpSampling3D((1, 2, 1)),
            lambda: layers.ZeroPadding3D(((1, 0), (0, 1), (0, 0))),
            lambda: layers.Cropping3D(((0, 0), (1, 0), (0, 1))) if min(shape[:3]) > 2 else None,
        ]
    return r.choice(kinds)()


def recurrent(r, shape):
    kind, options = r.choice(RECURRENT), {"return_sequences": r.random() < 0.5}
    if r.random() < 0.2:
        options["go_backwards"] = True
    if r.random() < 0.1:
        options["unroll"] = True
    if r.random() < 0.2:
        options["dropout"] = 0.3
    return kind(r.randint(1, 4), **options)


def stacked_cells(r, shape):
    cells = [layers.LSTMCell(3), layers.GRUCell(2), layers.SimpleRNNCell(2)]
    return layers.RNN(r.sample(cells, 2), return_sequences=r.random() < 0.5)


def bidirectional(r, shape):
    layer = r.choice(RECURRENT)(r.randint(1, 3), return_sequences=r.random() < 0.5)
    return layers.Bidirectional(layer, merge_mode=r.choice(["concat", "sum", "mul", "ave"]))


def masked(r, shape):
    mask, layer = layers.Masking(), (bidirectional if r.random() < 0.4 else recurrent)(r, shape)
    return lambda x: layer(mask(x)) * 1.0  # the mask ends here: of an empty one a mean is NaN


def attention(r, shape):
    heads = layers.MultiHeadAttention(r.randint(1, 2), 2, value_dim=r.choice([None, 3]))
    other = layers.Dense(shape[-1], activation="tanh")
    query = layers.GroupQueryAttention(2, 4, 2)
    plain = r.choice([layers.Attention(use_scale=True), layers.AdditiveAttention()])
    ways = [
        itself(heads),
        itself(heads, use_causal_mask=True),
        lambda x: heads(x, other(x)),
        itself(query),
        lambda x: plain([x, other(x)]),
    ]
    return r.choice(ways)


def grid_attention(r, shape):
    axes = r.choice([(1, 2), (1,), (2,)])
    return itself(layers.MultiHeadAttention(2, 2, attention_axes=axes))


def at_one_step(r, shape):
    place = r.choice([0, -1])
    return lambda x: x[:, place]


def in_time(r, shape):
    inner = shape[1:]
    kinds = [lambda: layers.Dense(r.randint(1, 3), activation=r.choice(ACTIVATIONS))]
    if len(inner) == 2:
        kinds += [lambda: recurrent(r, inner), lambda: convolution(r, inner)]
        kinds += [lambda: layers.Flatten()]
    if len(inner) == 3:
        kinds += [lambda: convolution(r, inner), lambda: layers.GlobalAveragePooling2D()]
        kinds += [lambda: separable(r, inner), lambda: layers.Flatten()]
    kinds += [lambda: norm(r, inner)]
    layer = r.choice(kinds)()
    return layers.TimeDistributed(layer) if layer is not None else None


def moving(r, shape):
    """Return a ConvLSTM over the first axis."""
    kind = layers.ConvLSTM1D if len(shape) == 3 else layers.ConvLSTM2D
    return kind(
        r.randint(1, 2), 2, padding=r.choice(["same", "valid"]) if min(shape[1:-1]) > 1 else "same",
        return_sequences=r.random() < 0.5,
    )  # fmt: skip


def squeezed(r, shape):
    """Return a squeeze-and-excitation block."""
    pool = layers.GlobalAveragePooling2D(keepdims=True)
    small, large = layers.Dense(2, activation="relu"), layers.Dense(shape[-1], activation="sigmoid")
    return lambda x: x * large(small(pool(x)))


def shuffled(r, shape):
    """Return a pixel shuffle."""
    widen = layers.Conv2D(4 * 2, 2, padding="same")
    if r.random() < 0.5:
        return lambda x: ops.reshape(
            ops.transpose(
                ops.reshape(widen(x), (-1, shape[0], shape[1], 2, 2, 2)), (0, 1, 3, 2, 4, 5)
            ),
            (-1, 2 * shape[0], 2 * shape[1], 2),
        )
    rearrange = layers.Lambda(lambda x: tf.nn.depth_to_space(x, 2))
    return lambda x: rearrange(widen(x))


def windowed(r, shape):
    """Return attention within windows, whose examples and windows share an axis: Swin's."""
    high, wide, channels = shape
    if high % 2 or wide % 2:
        return None
    attend = layers.MultiHeadAttention(1, 2)

    def step(x):
        x = ops.reshape(x, (-1, high // 2, 2, wide // 2, 2, channels))
        x = ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, 4, channels))
        x = ops.reshape(attend(x, x), (-1, high // 2, wide // 2, 2, 2, channels))
        return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, high, wide, channels))

    return step


EVERYWHERE = [
    dense, dense, activation, norm, norm, quiet, flat, residual, residual, merged, joined, shared,
    shared, gated, einsum, permuted, reshaped, moved,
]  # fmt: skip
STEPS: dict[int, Sequence[Callable[[random.Random, Shape], Step | None]]] = {
    1: [*EVERYWHERE, repeated, dotted],
    2: [
        *EVERYWHERE, convolution, convolution, dilated, separable, separable, transposed, pooled,
        globally, resized, recurrent, recurrent, recurrent, stacked_cells, bidirectional,
        bidirectional, masked, attention, attention, at_one_step, in_time, dotted,
    ],
    3: [
        *EVERYWHERE, convolution, convolution, dilated, dilated, separable, separable, transposed,
        pooled, pooled, globally, resized, in_time, in_time, moving, squeezed, shuffled, windowed,
        grid_attention, at_one_step,
    ],
    4: [
        *EVERYWHERE, convolution, transposed, pooled, pooled, globally, resized, in_time, in_time,
        moving, at_one_step,
    ],
}  # fmt: skip
SMALLER: dict[int, Sequence[Callable[[random.Random, Shape], Step | None]]] = {
    1: [dense],
    2: [pooled, globally, recurrent, at_one_step],
    3: [pooled, globally, at_one_step],
    4: [pooled, globally, at_one_step],
}
