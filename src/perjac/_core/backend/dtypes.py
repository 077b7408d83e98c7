"""Floating types, and wider ones: of a whole traced graph, for an exact reference of any model."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import graph_pb2, types_pb2

# The distance from 1 to the next number.
EPSILON = {tf.float64: 2**-52, tf.float32: 2**-23, tf.float16: 2**-10, tf.bfloat16: 2**-7}
_NARROW = {types_pb2.DT_HALF, types_pb2.DT_BFLOAT16, types_pb2.DT_FLOAT}


def at_least_float32(dtype: Any) -> Any:
    """Return a floating type that losses may be computed in: half precision is too coarse."""
    return tf.float32 if dtype is not None and dtype.size < 4 else dtype


def raised(graph_def: Any) -> Any:
    """Return a copy of a GraphDef in which every narrower floating type is float64.

    Constants, casts, function signatures and bodies go along. Whether every operation has a
    float64 kernel shows only when the graph runs.
    """
    copy = graph_pb2.GraphDef()
    copy.CopyFrom(graph_def)
    nodes = list(copy.node)
    for function in copy.library.function:
        nodes += function.node_def
        for argument in [*function.signature.input_arg, *function.signature.output_arg]:
            if argument.type in _NARROW:
                argument.type = types_pb2.DT_DOUBLE
    # Functions under their old names would clash with the originals, which the caller's graph has.
    renamed = {f.signature.name: f"{f.signature.name}_raised" for f in copy.library.function}
    for function in copy.library.function:
        function.signature.name = renamed[function.signature.name]
    for node in nodes:
        node.op = renamed.get(node.op, node.op)
        for value in node.attr.values():
            _raise_attribute(value)
            for called in [value.func, *value.list.func] if _calls(value) else []:
                called.name = renamed.get(called.name, called.name)
    return copy


def _calls(value: Any) -> bool:
    return value.WhichOneof("value") == "func" or bool(value.list.func)


def _raise_attribute(value: Any) -> None:
    kind = value.WhichOneof("value")
    if kind == "type" and value.type in _NARROW:
        value.type = types_pb2.DT_DOUBLE
    elif kind == "tensor" and value.tensor.dtype in _NARROW:
        wide = tf.make_ndarray(value.tensor).astype(np.float64)
        value.tensor.CopyFrom(tf.make_tensor_proto(wide))
    elif kind == "list":
        types = [types_pb2.DT_DOUBLE if t in _NARROW else t for t in value.list.type]
        del value.list.type[:]
        value.list.type.extend(types)


def widened(tensor: Any) -> tf.Tensor:
    """Return a tensor or variable's value in float64 if it is a float, else as it is."""
    tensor = tf.convert_to_tensor(tensor)
    return tf.cast(tensor, tf.float64) if tensor.dtype.is_floating else tensor
