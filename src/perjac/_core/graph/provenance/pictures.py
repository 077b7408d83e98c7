"""Provenance of batches of pictures: convolutions, pooling, resizing and their like."""

from __future__ import annotations

from typing import Any

from perjac._core.graph.provenance.owners import Owners
from perjac._core.graph.provenance.registry import At, Found, channels_first, rule

# The operand that is a batch of pictures, and those that all pictures share.
_PICTURES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        ("Conv2D", "Conv3D", "Conv", "DepthwiseConv2dNative", "MaxPool", "MaxPoolV2", "MaxPool3D",
         "AvgPool", "AvgPool3D", "Dilation2D", "LRN",
         "ResizeBilinear", "ResizeBicubic", "ResizeNearestNeighbor", "ResizeArea",
         "ExtractImagePatches", "ExtractVolumePatches", "DepthToSpace",
         "SpaceToDepth", "MaxPoolWithArgmax", ), (0,),
    ),
    **dict.fromkeys(
        ("Conv2DBackpropInput", "Conv3DBackpropInputV2", "DepthwiseConv2dNativeBackpropInput"),
        (2,),
    ),
    **dict.fromkeys(("AvgPoolGrad", "AvgPool3DGrad"), (1,)),
    **dict.fromkeys(("ResizeBilinearGrad", "ResizeNearestNeighborGrad", "ResizeBicubicGrad"), (0,)),
    **dict.fromkeys(("MaxPoolGrad", "MaxPool3DGrad", "LRNGrad"), (0, 1, 2)),
}  # fmt: skip


@rule(*_PICTURES)
def pictures(op: Any, outs: list[Owners], at: At) -> Found:
    """Each picture by itself, whatever happens within it."""
    own = None
    for out in outs:
        one = out.over_perhaps(range(1, out.rank), f"{op.type} within what several examples share")
        one = one.drop(range(1, out.rank))
        own = one if own is None else own | one
    assert own is not None
    return [
        own.insert(list(range(1, len(at.shape(t)))))
        if n in _PICTURES[op.type]
        else None if t.dtype.is_integer else own.whole(len(at.shape(t)))
        for n, t in enumerate(op.inputs)
    ]  # fmt: skip


@rule("Conv2DBackpropFilter", "Conv3DBackpropFilterV2", "DepthwiseConv2dNativeBackpropFilter")
def kernels(op: Any, outs: list[Owners], at: At) -> Found:
    """Summed over all pictures."""
    return [None if t.dtype.is_integer else outs[0].whole(len(at.shape(t))) for t in op.inputs]


@rule("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
def batch_normalisation(op: Any, outs: list[Owners], at: At) -> Found:
    """In training mode, all entries of a channel meet."""
    own = outs[0]
    channels = 1 if channels_first(op) else own.rank - 1
    others = [n for n in range(own.rank) if n != channels]
    if op.get_attr("is_training"):
        own = own.over(others)
    return [own, *[outs[0].drop(others) for _ in op.inputs[1:]]]
