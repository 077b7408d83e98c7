"""XRAI: regions of an image, ranked by how much attribution they gather."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.ndimage
import tensorflow as tf

from perjac.engine import Engine
from perjac.errors import InputError, missing_extra
from perjac.saliency import _pictures
from perjac.saliency._bound import takes_model
from perjac.saliency.attribution import Attribution
from perjac.saliency.integrated_gradients import integrated_gradients

# The paper's over-segmentation: scales of Felzenszwalb and Huttenlocher 2004, smallest segments,
# and how far each segment is grown. Its images have 224 pixels a side, and values from -1 to 1.
_SCALES = (50, 100, 150, 250, 500, 1200)
_SMALLEST, _SIGMA, _GROWN, _SIDE = 150, 0.8, 5, 224


@takes_model
def xrai(
    engine: Engine,
    x: Any,
    target: Any = "predicted",
    *,
    of: Any = None,
    segments: Any = None,
    attribution: Any = None,
    data_format: str | None = None,
    **options: Any,
) -> Attribution:
    """Return regions' mean attribution, each pixel's that of the region that took it in.

    Starting from nothing, the region whose pixels not yet taken have the largest mean attribution
    is taken in, and its pixels get that mean; until all are.

    Parameters
    ----------
    engine, x, target, of
        As in `gradient`; x is one batch of images.
    segments : array of int (B, H, W), list of these, or callable, optional
        One or several ways to cut each image up, by labels; or a function from an image (H, W, C)
        to a list of labels (H, W) or of masks, bool (H, W). By default Felzenszwalb's at six
        scales, from scikit-image, as in the paper, in areas and lengths relative to 224 × 224.
    attribution : Attribution or callable, optional
        What is gathered: maps of these examples and this target, or a method. By default integrated
        gradients, from the image's smallest value and from its largest, averaged.
    data_format : str, optional
        "channels_last" or "channels_first"; found out by the shape if left out.
    **options
        For the method.

    Returns
    -------
    Attribution
        `values` of the input's shape with one channel, (B, H, W, 1) or (B, 1, H, W), and
        (B, C, …) for "all".

    Raises
    ------
    MissingExtraError
        If scikit-image is needed and not installed.
    InputError
        If the inputs are no images, or segments do not fit them.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential(
    ...     [keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
    >>> x = np.ones((1, 4, 4, 1), "float32")
    >>> halves = np.arange(16).reshape(1, 4, 4) // 8
    >>> pj.saliency.xrai(pj.Engine(model), x, target=0, segments=halves).values.shape
    TensorShape([1, 4, 4, 1])

    References
    ----------
    Kapishnikov et al. 2019, XRAI: Better Attributions Through Regions, algorithm 1.
    """
    found = _gathered(engine, x, target, of, attribution, options)
    images = found.x_of(None)
    if images.ndim != 4:
        raise InputError(f"Expected images (B, H, W, C). Received: shape {images.shape}.")
    axis = (_pictures.channel_axis(images.shape[1:], data_format) or -1) % 3 + 1
    pixels = np.moveaxis(images, axis, -1)
    summed = np.asarray(found.maps).sum(axis + 1)  # (B, M, H, W)
    values = np.zeros(summed.shape)
    for b, (image, maps) in enumerate(zip(pixels, summed, strict=True)):
        masks = _masks(image, b, segments)
        for m, one in enumerate(maps):
            values[b, m] = ranked(one, masks)
    values = np.expand_dims(values if found.for_all else values[:, 0], axis + found.for_all)
    return dataclasses.replace(
        found,
        method="xrai",
        values=tf.cast(values, found.x.dtype),
        delta=None,
        standard_error=None,
        facts={"of": found.method, **found.facts},
    )


def ranked(values: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Return for each pixel the mean of what the region that took it in added, (H, W).

    Parameters
    ----------
    values : array (H, W)
        Attribution, channels summed.
    masks : sequence of bool arrays (H, W)
        Regions, which may overlap. What none of them has is taken in last.
    """
    inside = np.stack([np.ravel(m) for m in masks])
    flat, left = np.ravel(values).astype("f8"), np.ones(values.size, bool)
    sums, areas = inside @ flat, inside.sum(1)
    given = np.zeros(values.size)
    while areas.any():
        means = np.where(areas > 0, sums / np.maximum(areas, 1), -np.inf)
        best = int(means.argmax())
        taken = inside[best] & left
        given[taken] = means[best]
        left &= ~taken
        shared = inside[:, taken]
        sums = sums - shared @ flat[taken]
        areas = areas - shared.sum(1)
    if left.any():
        given[left] = flat[left].mean()
    return given.reshape(values.shape)


def felzenszwalb(image: np.ndarray) -> list[np.ndarray]:
    """Return the paper's regions of an image (H, W, C), as bool arrays (H, W).

    Raises
    ------
    MissingExtraError
        If scikit-image is not installed.
    """
    try:
        from skimage.segmentation import felzenszwalb as cut
    except ImportError as failure:
        raise missing_extra("Cutting images up", "segments", failure) from failure
    height, width, _ = image.shape
    area = height * width / _SIDE**2
    grown = max(round(_GROWN * area**0.5), 1)
    scaled = 2 * (image - image.min()) / (np.ptp(image) or 1) - 1
    disk = np.hypot(*np.ogrid[-grown : grown + 1, -grown : grown + 1]) <= grown
    masks = []
    for scale in _SCALES:
        smallest = max(round(_SMALLEST * area), 2)
        labels = cut(scaled, scale=scale * area, sigma=_SIGMA, min_size=smallest, channel_axis=-1)
        masks += [scipy.ndimage.binary_dilation(m, disk) for m in _of_labels(labels)]
    return masks


def _of_labels(labels: np.ndarray) -> list[np.ndarray]:
    return [labels == n for n in np.unique(labels)]


def _masks(image: np.ndarray, example: int, segments: Any) -> list[np.ndarray]:
    """Return an example's regions as the user gave them, or by default."""
    if segments is None or callable(segments):
        given = (segments or felzenszwalb)(image)
        given = given if isinstance(given, (list, tuple)) else [given]
    elif isinstance(segments, (list, tuple)):
        given = [np.asarray(one)[example] for one in segments]
    else:
        given = [np.asarray(segments)[example]]
    masks: list[np.ndarray] = []
    for one in map(np.asarray, given):
        if one.shape != image.shape[:2] or one.dtype.kind not in "iub":
            raise InputError(
                f"Expected segments= as labels or masks of shape {image.shape[:2]} for each image. "
                f"Received: shape {one.shape}, type {one.dtype}."
            )
        masks += [one] if one.dtype == bool else _of_labels(one)
    return masks


def _gathered(
    engine: Engine, x: Any, target: Any, of: Any, attribution: Any, options: dict[str, Any]
) -> Attribution:
    """Return the maps that are gathered into regions."""
    if isinstance(attribution, Attribution):
        return attribution
    if attribution is not None:
        method: Callable[..., Attribution] = attribution
        return method(engine, x, target, of=of, **options)
    images = engine._traces.prepare(x).tensors[0]
    ends = [
        tf.broadcast_to(end(images, range(1, images.shape.rank), keepdims=True), images.shape)
        for end in (tf.reduce_min, tf.reduce_max)
    ]
    low, high = (
        integrated_gradients(engine, x, target, of=of, baseline=end, **options) for end in ends
    )
    return dataclasses.replace(low, values=(low.values + high.values) / 2)
