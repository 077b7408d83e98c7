"""Numbers → colours: channels reduced, scales centred on zero, images of any range as RGB.

Draws small pictures by itself, without matplotlib: pages and logs hold many of them.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

from perjac.errors import InputError, missing_extra

# The colour scale ends at this percentile of |values|, so that one pixel does not bleach the rest.
PERCENTILE = 99
REDUCTIONS = ("sum", "mean", "abs-max", "l2", "none")
# ColorBrewer's RdBu, from blue over nearly white to red.
_ANCHORS = [
    "053061",
    "2166ac",
    "4393c3",
    "92c5de",
    "d1e5f0",
    "f7f7f7",
    "fddbc7",
    "f4a582",
    "d6604d",
    "b2182b",
    "67001f",
]
# Larger pictures are stored as JPEG: a photograph as PNG is ten times its size.
_LOSSLESS = 64 * 64


def _palette() -> np.ndarray:
    """Return 256 colours (256, 3); number 128 is that of zero, and 0 is not used."""
    anchors = np.array([[int(a[n : n + 2], 16) for n in (0, 2, 4)] for a in _ANCHORS], "float64")
    places = np.linspace(1, 255, len(anchors))
    return np.stack([np.interp(np.arange(256), places, c) for c in anchors.T], 1).astype("uint8")


PALETTE = _palette()


def channel_axis(shape: tuple[int, ...], data_format: str | None = None) -> int | None:
    """Return which axis of an example's shape holds channels, counted from the end.

    The last, except where images or volumes come channels first: 1, 3 or 4 of them, and fewer than
    of anything else. None for a row of features.
    """
    if data_format not in (None, "channels_first", "channels_last"):
        raise InputError(
            "Expected data_format= as None, 'channels_last' or 'channels_first'. "
            f"Received: {data_format!r}."
        )
    if len(shape) < 2:
        return None
    first = len(shape) > 2 and shape[0] in (1, 3, 4) and shape[0] < min(shape[1:])
    if data_format == "channels_first" or (data_format is None and first and shape[-1] > 4):
        return -len(shape)
    return -1


def check_channels(channels: str) -> None:
    """Refuse a reduction that does not exist."""
    if channels not in REDUCTIONS:
        raise InputError(
            f"Expected channels= as one of {', '.join(map(repr, REDUCTIONS))}. "
            f"Received: {channels!r}."
        )


def reduced(values: np.ndarray, channels: str, axis: int | None) -> np.ndarray:
    """Return the values with their channels taken together, the axis gone; "none" keeps them."""
    check_channels(channels)
    if axis is None or channels == "none":
        return values
    if channels == "sum":
        return values.sum(axis)
    if channels == "mean":
        return values.mean(axis)
    if channels == "abs-max":
        return np.abs(values).max(axis)
    return np.sqrt(np.sum(values**2, axis))


def limit(values: np.ndarray) -> float:
    """Return where a colour scale centred on zero ends."""
    magnitudes = np.abs(values)
    if not magnitudes.size:
        return 1.0
    return float(np.percentile(magnitudes, PERCENTILE)) or float(magnitudes.max()) or 1.0


def numbers(values: np.ndarray, end: float) -> np.ndarray:
    """Return the colour of each value by its number in PALETTE, on a scale from -end to end."""
    return np.clip(np.rint(128 + 127 * (values / end)), 1, 255).astype("uint8")


def rgb(image: np.ndarray) -> np.ndarray:
    """Return an image (height, width, channels), of any range, as (height, width, 3) in 0 to 1.

    One of 0 to 1, or of 0 to 255, is shown as it is; any other is stretched. Images with neither 1,
    3 nor 4 channels are shown by the mean of them.
    """
    image = np.asarray(image)
    whole = image.dtype.kind in "iu"
    image = image.astype("float64")
    if image.shape[-1] not in (1, 3, 4):
        image, whole = image.mean(-1, keepdims=True), False
    low, high = (float(image.min()), float(image.max())) if image.size else (0.0, 1.0)
    # Normalised images may happen to have no negative pixel, but none spans 16 deviations.
    if low >= 0 and high <= 255 and (high > 16 or (whole and high > 1)):
        image = image / 255
    elif low < 0 or high > 1:
        image = (image - low) / ((high - low) or 1)
    if image.shape[-1] == 4:
        image = image[..., :3] * image[..., 3:] + 1 - image[..., 3:]  # over white
    return np.broadcast_to(image, (*image.shape[:2], 3))


def blend(image: np.ndarray, values: np.ndarray, end: float) -> np.ndarray:
    """Lay a map (h, w) over an image (height, width, channels) in grey: RGB in 0 to 1.

    The stronger a value, the less shines through. A map of another size is stretched.
    """
    grey = rgb(image) @ (0.299, 0.587, 0.114)
    grey = 0.35 + 0.65 * grey  # the colours of the map must stay readable on black
    values = resized(values, grey.shape)
    strength = np.clip(np.abs(values) / end, 0, 1)[..., None]
    colour = PALETTE[numbers(values, end)] / 255
    opacity = 0.9 * np.sqrt(strength)
    return (1 - opacity) * grey[..., None] + opacity * colour


def resized(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a map (h, w), stretched to (height, width) where it has another size."""
    if values.shape == shape:
        return values
    image = _pillow().fromarray(np.ascontiguousarray(values, "float32"))
    return np.asarray(image.resize(shape[::-1], 2), values.dtype)  # 2: bilinear


def thumbnail(values: np.ndarray, side: int) -> np.ndarray:
    """Return a map (h, w) or image (h, w, 3) in 0 to 1, its longest side no longer than `side`."""
    longest = max(values.shape[:2])
    if longest <= side:
        return values
    size = [max(1, round(n * side / longest)) for n in values.shape[:2]]
    planes = values[..., None] if values.ndim == 2 else values
    small = []
    for plane in np.moveaxis(planes, -1, 0):
        image = _pillow().fromarray(np.ascontiguousarray(plane, "float32"))
        small.append(np.asarray(image.resize(size[::-1], 4)))  # 4: the mean of each box
    return small[0] if values.ndim == 2 else np.stack(small, -1)


def map_address(values: np.ndarray, end: float) -> str:
    """Return a map (h, w) as a data: address, with a byte for each pixel before compression."""
    # Every other colour is left out: the eye cannot tell, and the file is a fifth smaller.
    image = _pillow().fromarray(numbers(values, end) & 0xFE)
    image.putpalette(PALETTE.tobytes())
    return _address(image, "png")


def image_address(image: np.ndarray) -> str:
    """Return an RGB image (height, width, 3) in 0 to 1 as a data: address."""
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype("uint8")
    kind = "png" if pixels.shape[0] * pixels.shape[1] <= _LOSSLESS else "jpeg"
    return _address(_pillow().fromarray(pixels), kind)


def colour(value: float, end: float) -> tuple[str, str]:
    """Return the colour of a value, and one that is readable on it, as #rrggbb."""
    found = PALETTE[numbers(np.asarray(value), end)]
    dark = found @ (0.299, 0.587, 0.114) < 130
    return "#" + "".join(f"{int(c):02x}" for c in found), "#ffffff" if dark else "#1c2430"


def flat(
    x: np.ndarray, maps: np.ndarray, channels: str, data_format: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return any example (*input_shape) as an image (h, w, channels), its maps as (M, h, w).

    Sequences and rows of features become stripes, positions to the right; volumes, their middle
    slices; anything else, a row.
    """
    axis = channel_axis(x.shape, data_format)
    if x.ndim == 2:
        return x.T[..., None], maps.swapaxes(1, 2)
    if x.ndim not in (3, 4):
        return x.reshape(1, -1, 1), maps.reshape(len(maps), 1, -1)
    image, values = np.moveaxis(x, axis or -1, -1), reduced(maps, channels, axis)
    if x.ndim == 4:
        return image[len(image) // 2], values[:, values.shape[1] // 2]
    return image, values


def layers(values: np.ndarray, count: int = 6) -> np.ndarray:
    """Return which slices of volumes (..., depth, height, width) have the largest values."""
    depth = values.shape[-3]
    each = np.abs(values).reshape(-1, depth, values.shape[-2] * values.shape[-1]).sum((0, 2))
    return np.sort(np.argsort(-each, kind="stable")[:count])


def largest(outputs: np.ndarray, most: int) -> np.ndarray:
    """Return the numbers of the outputs to show of one example, in order: the largest `most`."""
    return np.sort(np.argsort(-np.ravel(outputs), kind="stable")[:most])


def _address(image: Any, kind: str) -> str:
    written = io.BytesIO()
    image.save(written, format=kind, optimize=True)
    return f"data:image/{kind};base64," + base64.b64encode(written.getvalue()).decode()


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as failure:
        raise missing_extra("Drawing pictures", "report", failure) from failure
    return Image
