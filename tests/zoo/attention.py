"""The attention layers of keras.layers.

Importing this module enters them into `entry.ENTRIES`.
"""

from __future__ import annotations

from keras import layers, ops
from models import Floats, Ids

from zoo.stacks import enter_table

SEQUENCE = Floats((4, 6))
MEMORY = Floats((3, 5))
ALIKE = Floats((3, 6))  # as wide as the queries, which grouped queries ask for
GRID = Floats((2, 3, 4))
VOLUME = Floats((2, 2, 3, 4))
IDS = Ids((4,), below=5)


def multihead(**options):
    return layers.MultiHeadAttention(**{"num_heads": 2, "key_dim": 3, **options})


def grouped(**options):
    heads = {"head_dim": 4, "num_query_heads": 4, "num_key_value_heads": 2}
    return layers.GroupQueryAttention(**{**heads, **options})


def self_attention(make, call=None, **options):
    return lambda x: make(**options)(x, x, **(call or {}))


def masked(make, **options):
    """Return attention among embedded ids, of which 0 is padding."""

    def function(ids):
        x = layers.Embedding(5, 6, mask_zero=True)(ids)
        return make(**options)(x, x)

    return function


def with_mask(make):
    """Return attention with a mask that comes with the data, the same for every head."""

    def function(x, scores):
        # Every query sees itself: softmax over nothing would be the same for any weights.
        allowed = ops.logical_or(scores > 0, ops.eye(4, dtype="bool"))
        return make()(x, x, attention_mask=allowed)

    return function


def both_heads(make):
    return {
        "self": self_attention(make),
        "without bias": self_attention(make, use_bias=False),
        "causal": self_attention(make, {"use_causal_mask": True}),
        "with scores": self_attention(make, {"return_attention_scores": True}),
        "flash off": self_attention(make, flash_attention=False),
        "dropout": self_attention(make, dropout=0.5),
        "sliding window": self_attention(make, sliding_window=2),
        "gated": self_attention(make, use_gate=True),
    }


def cross(make, **options):
    return lambda query, memory: make(**options)(query, memory)


def keys_apart(make):
    return lambda query, value, key: make()(query, value, key)


for kind, make, memory in (
    ("multiheadattention", multihead, MEMORY),
    ("groupedqueryattention", grouped, ALIKE),
):
    enter_table(
        {
            SEQUENCE: {f"{kind} {name}": function for name, function in both_heads(make).items()},
            IDS: {f"{kind} masked": masked(make)},
            (SEQUENCE, memory): {f"{kind} cross": cross(make)},
            (SEQUENCE, memory, Floats((3, 2))): {
                f"{kind} keys apart from values": keys_apart(make)
            },
            (SEQUENCE, Floats((4, 4))): {f"{kind} mask given": with_mask(make)},
        }
    )

enter_table(
    {
        SEQUENCE: {
            "multiheadattention one head": self_attention(multihead, num_heads=1),
            "multiheadattention value_dim": self_attention(multihead, value_dim=5),
            "multiheadattention output_shape": self_attention(multihead, output_shape=(2, 3)),
            "groupedqueryattention one group": self_attention(grouped, num_key_value_heads=1),
            "groupedqueryattention all groups": self_attention(grouped, num_key_value_heads=4),
        },
        (SEQUENCE, MEMORY): {"multiheadattention cross value_dim": cross(multihead, value_dim=2)},
        GRID: {
            "multiheadattention of the first axis": self_attention(multihead, attention_axes=1),
            "multiheadattention of the second axis": self_attention(multihead, attention_axes=2),
            "multiheadattention of both axes": self_attention(multihead, attention_axes=(1, 2)),
        },
        VOLUME: {
            "multiheadattention of two of three axes": self_attention(
                multihead, attention_axes=(2, 3)
            ),
        },
    }
)


def projected(layer, **call):
    """Return attention between dense projections of its inputs, as many as it takes."""

    def function(*inputs):
        return layer()([layers.Dense(3)(tensor) for tensor in inputs], **call)

    return function


def masked_scores(layer):
    """Return attention between embedded ids, of which 0 is padding."""

    def function(ids):
        x = layers.Embedding(5, 3, mask_zero=True)(ids)
        return layer()([x, x])

    return function


CALCULATIONS = {
    "attention": lambda: layers.Attention(),
    "attention scaled": lambda: layers.Attention(use_scale=True),
    "attention concat": lambda: layers.Attention(score_mode="concat"),
    "attention concat scaled": lambda: layers.Attention(score_mode="concat", use_scale=True),
    "additiveattention": lambda: layers.AdditiveAttention(),
    "additiveattention without scale": lambda: layers.AdditiveAttention(use_scale=False),
}
for name, layer in CALCULATIONS.items():
    enter_table(
        {
            (SEQUENCE, MEMORY): {name: projected(layer)},
            (SEQUENCE, MEMORY, MEMORY): {f"{name} keys apart": projected(layer)},
            IDS: {f"{name} masked": masked_scores(layer)},
            (SEQUENCE, SEQUENCE): {
                f"{name} causal": projected(layer, use_causal_mask=True),
                f"{name} with scores": projected(layer, return_attention_scores=True),
            },
        }
    )
