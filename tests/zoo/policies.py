"""A handful of layers in half precision: Keras's mixed policies, and float16 throughout.

Importing this module enters them into `entry.ENTRIES`.
"""

from __future__ import annotations

from keras import layers
from models import Floats, Ids

from zoo.stacks import enter_table

POLICIES = ("mixed_float16", "mixed_bfloat16", "float16")


def attention(x):
    return layers.MultiHeadAttention(2, 3)(x, x)


BY_INPUT = {
    Floats((4,)): {
        "dense": lambda x: layers.Dense(3)(x),
        "dense softmax": lambda x: layers.Dense(3, activation="softmax")(x),
        "dense in float32 behind": lambda x: layers.Dense(2, dtype="float32")(layers.Dense(3)(x)),
    },
    Floats((5, 4, 3)): {
        "conv2d": lambda x: layers.Conv2D(3, 2)(x),
        "depthwiseconv2d": lambda x: layers.DepthwiseConv2D(2)(x),
        "batchnormalization": lambda x: layers.BatchNormalization()(layers.Conv2D(3, 2)(x)),
    },
    Floats((4, 3)): {
        "lstm": lambda x: layers.LSTM(3)(x),
        "layernormalization": lambda x: layers.LayerNormalization()(layers.Dense(3)(x)),
        "multiheadattention": attention,
        "einsumdense": lambda x: layers.EinsumDense("abc,cd->abd", output_shape=(4, 2))(x),
    },
    Ids((4,), below=5): {"embedding": lambda ids: layers.Embedding(5, 3)(ids)},
}
for policy in POLICIES:
    enter_table(
        {
            example: {f"{name} {policy}": function for name, function in functions.items()}
            for example, functions in BY_INPUT.items()
        },
        dtypes=(policy,),
    )
