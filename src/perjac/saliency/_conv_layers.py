"""Where a traced model's convolutions are, which axes are channels, and maps resized.

Knows traced graphs and grids; must not know what is explained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend import host
from perjac._core.backend.shapes import known
from perjac._core.graph import walk
from perjac._core.graph.program import Program
from perjac._core.model.inputs import Batch
from perjac._core.model.variables import Activation, activation_of
from perjac.engine import Engine
from perjac.errors import InputError, UnknownNameError

# A convolution's operation, and which of its operands is the data.
_DATA = {
    "Conv2D": 0,
    "Conv3D": 0,
    "DepthwiseConv2dNative": 0,
    "Conv2DBackpropInput": 2,
    "Conv3DBackpropInputV2": 2,
}
_RESHAPING = ("Reshape", "ExpandDims", "Squeeze")
RESIZES = ("bilinear", "bicubic", "corners", None)


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer whose output is a grid of channels, and the input that the grid lies over.

    Attributes
    ----------
    activation : Activation
        The layer's output.
    channels : int
        Which axis of the output is the channels', the batch counted.
    input : int
        Which of the model's inputs, flattened; -1 where none has as many spatial axes.
    input_channels : int
        The same of that input; 0 where it has none.
    """

    activation: Activation
    channels: int
    input: int
    input_channels: int


def place(engine: Engine, batch: Batch, layer: Any, of: Any) -> Place:
    """Return the layer that is named, or the last convolution before the output.

    Raises
    ------
    UnknownNameError
        If there is no such layer, or no convolution.
    InputError
        If the layer's output is no grid of channels.
    """
    traced, names = engine._traces.of(batch)
    head, wanted = names.head(of), None if layer is None else activation_of(layer)
    return traced.once(("place", head, wanted), lambda: _place(traced.program, head, wanted))


def _place(program: Program, head: str, wanted: Activation | None) -> Place:
    activation = wanted or _last(program, head)
    tensor = program.graph.get_tensor_by_name(program.tap(activation))
    if not (_is_grid(program, tensor) and tensor.dtype.is_floating):
        raise InputError(
            f"Expected a layer whose output has channels over 1, 2 or 3 spatial axes. Received: "
            f"layer {activation.layer!r}, whose output has shape {tuple(tensor.shape)}."
        )
    channels = _channels(tensor)
    number, axis = _input_of(program, tensor, channels)
    return Place(activation, channels, number, axis)


def _last(program: Program, head: str) -> Activation:
    """Return the last layer on the way to `head` that convolves, and has more than one position."""
    order = {op.name: n for n, op in enumerate(program.graph.get_operations())}
    needed = walk.upstream(program, [head])
    taps = _taps(program)
    found: dict[int, Activation] = {}
    for name, (layer, call) in taps.items():
        tensor = program.graph.get_tensor_by_name(name)
        if tensor.op.name not in needed or not _has_positions(program, tensor):
            continue
        if _back(tensor, _convolves, stops=taps.keys() - {name}):
            found[order[tensor.op.name]] = _activation(program, layer, call)
    if found:
        return _joined(program, found, order)
    grids = [n for t, (n, _) in taps.items() if _is_grid(program, _tensor(program, t))]
    raise UnknownNameError(
        "The model has no convolution before this output that a layer's output shows. Name the "
        f"layer whose channels are weighed, layer=…; those with channels over positions: "
        f"{', '.join(map(repr, grids[-8:])) or 'none'}."
    )


def _joined(program: Program, found: dict[int, Activation], order: dict[str, int]) -> Activation:
    """Return the last of the convolutions, or where it meets others that run beside it."""
    last = found[max(found)]
    names = {name for name, at in order.items() if at in found}
    if names <= walk.upstream(program, [program.tap(last)]):
        return last
    for _, layer, call in sorted(
        (order[_tensor(program, t).op.name], layer, call)
        for t, (layer, call) in _taps(program).items()
        if order[_tensor(program, t).op.name] > max(found)
        and _is_grid(program, _tensor(program, t))
    ):
        activation = _activation(program, layer, call)
        if names <= walk.upstream(program, [program.tap(activation)]):
            return activation
    return last


def _taps(program: Program) -> dict[str, tuple[str, int]]:
    """Return each layer's output tensors, with its name and the number of the call."""
    found: dict[str, tuple[str, int]] = {}
    for layer, tensors in program.taps.items():
        for call, name in enumerate(tensors):
            if name:
                found.setdefault(name, (layer, call))
    return found


def _activation(program: Program, layer: str, call: int) -> Activation:
    return Activation(layer, call if len(program.taps[layer]) > 1 else None)


def _tensor(program: Program, name: str) -> Any:
    return program.graph.get_tensor_by_name(name)


def _is_grid(program: Program, tensor: Any) -> bool:
    extent = program.extents.get(tensor.name)
    return extent is not None and extent.fold == 1 and len(extent.rest) in (2, 3, 4)


def _has_positions(program: Program, tensor: Any) -> bool:
    """Tell whether a tensor has channels over more than one position: squeezed ones have not."""
    return (
        _is_grid(program, tensor)
        and math.prod(known(tensor.shape[1:])) > tensor.shape[_channels(tensor)]
    )


def _convolves(tensor: Any) -> bool:
    return tensor.op.type in _DATA


def _axis(op: Any) -> int:
    """Return which axis of a convolution's data and result is the channels'."""
    first = op.get_attr("data_format").startswith(b"NC")
    return 1 if first else op.outputs[0].shape.rank - 1


def _channels(tensor: Any) -> int:
    """Return which axis of a layer's output is the channels': the last where nothing tells."""
    met = _back(tensor, _convolves)
    if met is not None:
        labels = met[1]
        axis = labels[_axis(met[0].op)]
        if axis is not None:
            return axis
    return tensor.shape.rank - 1


def _input_of(program: Program, tensor: Any, channels: int) -> tuple[int, int]:
    """Return the input under a layer's grid, and which of its axes is the channels'."""
    spatial = tensor.shape.rank - 2
    needed = walk.upstream(program, [tensor.name])
    under = [
        n
        for n, name in enumerate(program.inputs)
        if _tensor(program, name).op.name in needed
        and _tensor(program, name).shape.rank in (spatial + 1, spatial + 2)
    ]
    if not under:
        return -1, 0
    for op in program.graph.get_operations():
        if op.name not in needed or op.type not in _DATA:
            continue
        met = _back(op.inputs[_DATA[op.type]], lambda t: t.name in program.inputs)
        if met is None or program.inputs.index(met[0].name) not in under:
            continue
        found, labels = met
        axis = labels.index(_axis(op)) if _axis(op) in labels else 0
        if (axis > 0) == (found.shape.rank == spatial + 2):
            return program.inputs.index(found.name), axis
    rank = _tensor(program, program.inputs[under[0]]).shape.rank
    if rank == spatial + 1:
        return under[0], 0
    return under[0], 1 if channels == 1 else rank - 1


Labels = list[int | None]


def _back(
    start: Any, arrived: Callable[[Any], bool], stops: Container[str] = ()
) -> tuple[Any, Labels] | None:
    """Go back from a tensor to the nearest one wanted, through operations that keep its axes.

    Returns
    -------
    tensor, labels
        What was found, and for each of its axes the axis of `start` that it became.
    """
    stack: list[tuple[Any, Labels]] = [(start, list(range(start.shape.rank)))]
    seen: set[str] = set()
    while stack:
        tensor, labels = stack.pop()
        if tensor.name in seen or tensor.name in stops:
            continue
        if arrived(tensor):
            return tensor, labels
        seen.add(tensor.name)
        op = tensor.op
        if op.type == "Transpose":
            order = tf.get_static_value(op.inputs[1])
            if order is not None:
                moved: Labels = [None] * len(labels)
                for n, axis in enumerate(order):
                    moved[int(axis)] = labels[n]
                stack.append((op.inputs[0], moved))
        elif op.type in _RESHAPING:
            before = _before(labels, tensor.shape, op.inputs[0].shape)
            if before is not None:
                stack.append((op.inputs[0], before))
        else:
            same = [t for t in op.inputs if t.shape.rank == len(labels)]
            stack += [(t, labels) for t in reversed(same)]
    return None


def _before(labels: Labels, after: Any, before: Any) -> Labels | None:
    """Return the labels from before a reshape that only adds or drops axes of length one."""
    if after.rank is None or before.rank is None:
        return None
    new, old, n, m, found = list(after), list(before), 0, 0, []
    while n < len(new) or m < len(old):
        if n < len(new) and m < len(old) and new[n] == old[m]:
            found.append(labels[n])
            n, m = n + 1, m + 1
        elif n < len(new) and new[n] == 1:
            n += 1
        elif m < len(old) and old[m] == 1:
            found.append(None)
            m += 1
        else:
            return None
    return found


def resized(maps: tf.Tensor, size: Sequence[int], how: str) -> tf.Tensor:
    """Return maps (N, M, *grid) over grids of another size, one axis after another.

    Parameters
    ----------
    maps : tf.Tensor
        With 1, 2 or 3 spatial axes.
    size : sequence of int
        How long each becomes.
    how : str
        "bilinear" or "bicubic", as `tf.image.resize`; "corners": linear, the corners' centres on
        one another, as `scipy.ndimage.zoom`.
    """
    for old, new in zip(known(maps.shape[2:]), size, strict=True):
        weights = tf.cast(_weights(old, new, how), maps.dtype)
        maps = tf.tensordot(maps, weights, [[2], [1]])  # the new axis comes last
    return maps


def _weights(old: int, new: int, how: str) -> np.ndarray:
    """Return what each new position takes of each old one, (new, old)."""
    if how == "corners":
        at = np.linspace(0, old - 1, new)
        left = np.minimum(np.floor(at).astype(int), max(old - 2, 0))
        share = at - left
        found = np.zeros((new, old))
        found[np.arange(new), left] = 1 - share
        found[np.arange(new), np.minimum(left + 1, old - 1)] += share
        return found
    with host.lifted():
        unit = tf.eye(old)[None, :, :, None]
        return np.asarray(tf.image.resize(unit, [new, old], how))[0, :, :, 0]
