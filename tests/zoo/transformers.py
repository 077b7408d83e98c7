"""Transformers and their kin, written by hand: what attends, and what stands in for attention.

Importing this module enters them into `entry.ENTRIES`.
"""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from models import Floats, Ids

from zoo.entry import enter
from zoo.parts import (
    Learned,
    attention,
    block,
    causal,
    feed_forward,
    norm_first,
    norm_last,
    positions,
    softmax_mix,
    vocabulary,
)

STEPS, WIDTH = 6, 8


def classified(x, blocks: list) -> Any:
    """Run (B, T, width) through blocks of these mixers; classify the mean over the steps."""
    for mixer in blocks:
        x = block(x, mixer)
    return layers.Dense(3)(ops.mean(layers.LayerNormalization()(x), axis=1))


def from_steps(*blocks, shape: tuple[int, ...] = (STEPS, WIDTH)) -> keras.Model:
    x = keras.Input(shape)
    return keras.Model(x, classified(x, list(blocks)))


def padded_encoder(residual) -> keras.Model:
    """Ids of 0 are padding: nobody attends to them, and the mean leaves them out."""
    ids = keras.Input((STEPS,), dtype="int32")
    seen = ops.not_equal(ids, 0)
    mix = softmax_mix(lambda scores: ops.where(seen[:, None, None, :], scores, -1e9))
    x = positions(layers.Embedding(4, WIDTH)(ids))
    for _ in range(2):
        x = block(x, functools.partial(attention, mix=mix), residual)
    counts = ops.cast(seen, x.dtype)[:, :, None]
    return keras.Model(ids, layers.Dense(3)(ops.sum(x * counts, 1) / ops.sum(counts, 1)))


for words, residual in [("norm first", norm_first), ("norm last", norm_last)]:
    enter(
        "architectures",
        f"encoder: {words}, learned positions, padding mask from ids",
        functools.partial(padded_encoder, residual),
        Ids((STEPS,), below=4),
    )


def rms_norm(x):
    def normalise(x, gamma):
        return x * ops.rsqrt(ops.mean(ops.square(x), -1, keepdims=True) + 1e-6) * gamma

    return Learned(normalise, gamma=x.shape[-1:])(x)


def rotary(x):
    """Turn pairs of entries of (B, T, …, size), halves apart, by angles that grow with T."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 10.0 ** -np.arange(half)
    angles = angles.reshape(-1, *[1] * (len(x.shape) - 3), half)
    cos, sin = (ops.cast(wave(angles), x.dtype) for wave in (np.cos, np.sin))
    first, second = x[..., :half], x[..., half:]
    return ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def grouped_attention(x, query, key, value, output):
    """Causal attention in which r heads share the keys and values of their group g."""
    queries = rotary(ops.einsum("btd,dgrk->btgrk", x, query))
    keys = rotary(ops.einsum("btd,dgk->btgk", x, key))
    values = ops.einsum("btd,dgk->btgk", x, value)
    weights = ops.softmax(causal(ops.einsum("btgrk,bsgk->bgrts", queries, keys) / 2))
    return ops.einsum("bgrts,bsgk,grkd->btd", weights, values, output)


def swiglu(x):
    gate, up = (layers.Dense(12, use_bias=False)(x) for _ in range(2))
    return layers.Dense(x.shape[-1], use_bias=False)(ops.silu(gate) * up)


def decoder(tied: bool) -> keras.Model:
    ids = keras.Input((5,), dtype="int32")
    words = Learned(vocabulary, table=(7, WIDTH))
    x = words(ids)
    for _ in range(2):
        attended = Learned(
            grouped_attention,
            query=(WIDTH, 2, 2, 4),
            key=(WIDTH, 2, 4),
            value=(WIDTH, 2, 4),
            output=(2, 2, 4, WIDTH),
        )
        x = x + attended(rms_norm(x))
        x = x + swiglu(rms_norm(x))
    return keras.Model(ids, (words if tied else layers.Dense(7, use_bias=False))(rms_norm(x)))


for tied in (False, True):
    enter(
        "architectures",
        "decoder: rotary, RMSNorm, SwiGLU, grouped queries" + ", tied output" * tied,
        functools.partial(decoder, tied),
        Ids((5,), below=7),
        outputs=(0, 17, 34),
    )


def encoder_decoder() -> keras.Model:
    source, target = keras.Input((5,), dtype="int32"), keras.Input((4,), dtype="int32")
    embedding = layers.Embedding(6, WIDTH)
    memory = positions(embedding(source))
    for _ in range(2):
        memory = block(memory)
    x = positions(embedding(target))
    for _ in range(2):
        x = norm_first(x, functools.partial(attention, mix=softmax_mix(causal)))
        x = block(x, lambda x: attention(x, memory))
    return keras.Model([source, target], layers.Dense(6)(x))


enter(
    "architectures",
    "encoder and decoder, cross attention, two inputs",
    encoder_decoder,
    [Ids((5,), below=6), Ids((4,), below=6)],
    outputs=(0, 13, 23),
)


def patches(image, width: int, side: int):
    """Cut an image into patches and embed each: (B, T, width)."""
    x = layers.Conv2D(width, side, strides=side)(image)
    return ops.reshape(x, (-1, x.shape[1] * x.shape[2], width))


def prepend(x, token):
    return ops.concatenate([ops.broadcast_to(token, (ops.shape(x)[0], *token.shape)), x], axis=1)


def vision_transformer() -> keras.Model:
    image = keras.Input((12, 12, 3))
    x = Learned(prepend, token=(1, WIDTH))(patches(image, WIDTH, 4))
    x = positions(x)
    for _ in range(2):
        x = block(x)
    return keras.Model(image, layers.Dense(3)(layers.LayerNormalization()(x[:, 0])))


enter("architectures", "ViT: patches, class token", vision_transformer, Floats((12, 12, 3)))


def windowed(x, shift: int):
    """Attention inside the 2x2 windows of a 4x4 grid, with a bias for each offset in a window."""
    places = np.stack(np.meshgrid([0, 1], [0, 1], indexing="ij"), -1).reshape(4, 2)
    offsets = (places[:, None] - places[None] + 1) @ [3, 1]  # (4, 4), from 0 to 8
    bias = Learned(
        lambda scores, table: scores + ops.moveaxis(ops.take(table, offsets, axis=0), 2, 0),
        table=(9, 2),
    )
    grid = ops.roll(ops.reshape(x, (-1, 4, 4, WIDTH)), (-shift, -shift), axis=(1, 2))
    windows = ops.transpose(ops.reshape(grid, (-1, 2, 2, 2, 2, WIDTH)), (0, 1, 3, 2, 4, 5))
    windows = attention(ops.reshape(windows, (-1, 4, WIDTH)), mix=softmax_mix(bias))
    grid = ops.transpose(ops.reshape(windows, (-1, 2, 2, 2, 2, WIDTH)), (0, 1, 3, 2, 4, 5))
    grid = ops.roll(ops.reshape(grid, (-1, 4, 4, WIDTH)), (shift, shift), axis=(1, 2))
    return ops.reshape(grid, (-1, 16, WIDTH))


def swin() -> keras.Model:
    image = keras.Input((8, 8, 3))
    blocks = [functools.partial(windowed, shift=shift) for shift in (0, 1)]
    return keras.Model(image, classified(patches(image, WIDTH, 2), blocks))


enter("architectures", "Swin: shifted windows, gathered relative bias", swin, Floats((8, 8, 3)))


def bucketed() -> keras.Model:
    """The blocks share a bias for each bucket of distances, wider the farther (T5)."""
    offsets = np.arange(STEPS)[None] - np.arange(STEPS)[:, None]
    buckets = np.floor(np.log2(1 + np.abs(offsets))).astype("int32") + 3 * (offsets > 0)
    bias = Learned(
        lambda scores, table: scores + ops.transpose(ops.take(table, buckets, axis=0), (2, 0, 1)),
        table=(6, 2),
    )
    project = functools.partial(layers.Dense, use_bias=False)
    mixer = functools.partial(attention, mix=softmax_mix(bias), project=project)
    return from_steps(mixer, mixer)


enter("architectures", "T5: bucketed relative bias, shared", bucketed, Floats((STEPS, WIDTH)))


def sloped(x):
    """The farther, the less: by a learned slope for each head (ALiBi)."""
    distances = np.abs(np.arange(STEPS)[None] - np.arange(STEPS)[:, None])
    bias = Learned(
        lambda scores, slopes: causal(scores - slopes * ops.cast(distances, scores.dtype)),
        slopes=(2, 1, 1),
    )
    return attention(x, mix=softmax_mix(bias))


enter(
    "architectures",
    "ALiBi: learned slopes, causal",
    functools.partial(from_steps, sloped, sloped),
    Floats((STEPS, WIDTH)),
)


def experts(x, gates, up, bias, down):
    hidden = ops.gelu(ops.einsum("btd,edh->bteh", x, up) + bias)
    return ops.einsum("bteh,ehd,bte->btd", hidden, down, gates)


def mixture_of_experts() -> keras.Model:
    x = start = keras.Input((STEPS, WIDTH))
    for _ in range(2):
        x = norm_first(x, attention)
        gates = layers.Dense(3, activation="softmax")(x)
        shapes = {"up": (3, WIDTH, 5), "bias": (3, 5), "down": (3, 5, WIDTH)}
        x = x + Learned(experts, **shapes)(x, gates)
    return keras.Model(start, layers.Dense(3)(ops.mean(x, axis=1)))


enter(
    "architectures",
    "mixture of experts, dense routing",
    mixture_of_experts,
    Floats((STEPS, WIDTH)),
)


def performer(x):
    """Softmax attention by positive random features (FAVOR+), its directions frozen."""

    def features(x, omega):
        return ops.exp(ops.matmul(x, omega) - ops.sum(ops.square(x), -1, keepdims=True) / 2)

    def mix(queries, keys, values):
        phi = Learned(features, trainable=False, omega=(WIDTH // 2, 5))
        queries, keys = phi(queries / 2), phi(keys / 2)
        summary = ops.einsum("bhsm,bhsk->bhmk", keys, values)
        scale = ops.einsum("bhtm,bhm->bht", queries, ops.sum(keys, axis=2))
        return ops.einsum("bhtm,bhmk->bhtk", queries, summary) / scale[..., None]

    return attention(x, mix=mix)


def running_sums(x):
    """Linear attention to the past, by sums along time."""

    def mix(queries, keys, values):
        queries, keys = ops.elu(queries) + 1, ops.elu(keys) + 1
        summary = ops.cumsum(ops.einsum("bhsm,bhsk->bhsmk", keys, values), axis=2)
        scale = ops.sum(queries * ops.cumsum(keys, axis=2), -1, keepdims=True)
        return ops.einsum("bhtm,bhtmk->bhtk", queries, summary) / scale

    return attention(x, mix=mix)


def spatial_gate(x):
    """Half of the channels gate the other half with what they see along time (gMLP)."""
    hidden = layers.Dense(2 * WIDTH, activation="gelu")(x)
    passed, gate = ops.split(hidden, 2, axis=-1)
    gate = ops.transpose(layers.LayerNormalization()(gate), (0, 2, 1))
    gate = ops.transpose(layers.Dense(STEPS)(gate), (0, 2, 1))
    return layers.Dense(WIDTH)(passed * gate)


for words, mixer in [
    ("Performer: frozen random features", performer),
    ("linear attention, causal by running sums", running_sums),
    ("gMLP: spatial gating unit", spatial_gate),
]:
    enter(
        "architectures",
        words,
        functools.partial(from_steps, mixer, mixer),
        Floats((STEPS, WIDTH)),
    )


def mlp_mixer() -> keras.Model:
    def across(x):
        return ops.swapaxes(feed_forward(ops.swapaxes(x, 1, 2)), 1, 2)

    image = keras.Input((8, 8, 3))
    return keras.Model(image, classified(patches(image, WIDTH, 4), [across, across]))


enter("architectures", "MLP-Mixer", mlp_mixer, Floats((8, 8, 3)))


def perceiver() -> keras.Model:
    """A few learned queries, the same for every example, read a longer input twice."""
    x = keras.Input((8, 5))
    memory = layers.Dense(WIDTH)(x)
    latents = Learned(
        lambda x, latents: ops.broadcast_to(latents, (ops.shape(x)[0], *latents.shape)),
        latents=(3, WIDTH),
    )(x)
    for _ in range(2):
        latents = block(block(latents, lambda x: attention(x, memory)))
    return keras.Model(x, layers.Dense(3)(ops.mean(latents, axis=1)))


enter("architectures", "Perceiver: latent queries over the batch", perceiver, Floats((8, 5)))


def adapted(width: int):
    """Return a projection that is frozen, and learns by a narrow one beside it (LoRA)."""
    frozen = layers.Dense(width, trainable=False)

    def project(x):
        narrow = Learned(
            lambda x, down, up: ops.matmul(ops.matmul(x, down), up) / 2,
            down=(x.shape[-1], 2),
            up=(2, width),
        )
        return frozen(x) + narrow(x)

    return project


def with_lora() -> keras.Model:
    """Keras's own way: it adds the low rank to the kernels."""
    model = from_steps(attention, attention)
    for layer in model.layers:
        if isinstance(layer, layers.Dense):
            layer.enable_lora(2)
    return model


enter(
    "architectures",
    "LoRA: narrow projections beside frozen ones",
    functools.partial(from_steps, functools.partial(attention, project=adapted)),
    Floats((STEPS, WIDTH)),
)
enter(
    "architectures",
    "LoRA: every kernel of an encoder by enable_lora",
    with_lora,
    Floats((STEPS, WIDTH)),
    dtypes=("float32",),  # the type of the added weights, whatever the model's
)
