"""Class activation maps: the channels of a hidden layer, weighed by the output's gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend.shapes import known
from perjac._core.model import inside_functions
from perjac.engine import Engine
from perjac.errors import InputError, check_one_of
from perjac.saliency._bound import takes_model
from perjac.saliency._conv_layers import RESIZES, Place, place, resized
from perjac.saliency._problem import Explained
from perjac.saliency.attribution import Attribution


@dataclasses.dataclass(frozen=True)
class Finish:
    """What becomes of the weighed sum of channels, in this order.

    Attributes
    ----------
    rectify : bool
        Whether what is negative becomes 0, before and after resizing.
    resize : "bilinear", "bicubic", "corners" or None
        How the map is brought to the input's size.
    normalise : "max", "minmax" or None
        Each map over its largest value, or from its smallest to its largest.
    first : bool
        Whether it is normalised before it is resized.
    """

    rectify: bool = True
    resize: str | None = "bilinear"
    normalise: str | None = None
    first: bool = False

    def __post_init__(self):
        check_one_of(self.resize, RESIZES, "resize")
        check_one_of(self.normalise, _NORMALISES, "normalise")

    def __call__(self, maps: tf.Tensor, size: tuple[int, ...]) -> tf.Tensor:
        """Return maps (N, M, *grid) as shown, (N, M, *size)."""
        maps = self._rectified(maps)
        if self.first:
            maps = _normalised(maps, self.normalise)
        if self.resize is not None:
            maps = self._rectified(resized(maps, size, self.resize))  # bicubic goes below zero
        return maps if self.first else _normalised(maps, self.normalise)

    def _rectified(self, maps: tf.Tensor) -> tf.Tensor:
        return tf.nn.relu(maps) if self.rectify else maps


_NORMALISES = ("max", "minmax", None)
CONVENTIONS = {
    "captum": Finish(rectify=False, resize=None),
    "tf-keras-vis": Finish(resize="corners", normalise="minmax"),
    "xplique": Finish(resize="bicubic"),
    "pair": Finish(normalise="max", first=True),
}


@takes_model
def gradcam(
    engine: Engine,
    x: Any,
    target: Any = "predicted",
    *,
    of: Any = None,
    layer: Any = None,
    rectify: bool = True,
    resize: str | None = "bilinear",
    normalise: str | None = None,
    convention: str | None = None,
) -> Attribution:
    """Return where a convolution's channels speak for the target, by their mean gradients.

    With A_k channel k of the layer's output and y the target, the map is
    ReLU(Σ_k α_k A_k), α_k the mean of ∂y/∂A_k over the positions. Every output's map ("all") takes
    one pass through the layers before.

    Parameters
    ----------
    engine : Engine
        The model.
    x : array (B, *input_shape), or list, tuple or dict of arrays
        Examples: sequences, images or volumes, channels first or last.
    target : int, array of int (B,), "predicted", "all", or array (B, *output_shape)
        As in `gradient`.
    of : str, int or layer, optional
        Which head, where the model has several; "logits" for what a final softmax is taken of.
    layer : str, layer or Activation, optional
        Whose output is looked at; by default the last layer before the output that convolves and
        has more than one position, or, where others convolve beside it (Inception), the layer that
        joins them. Where only a shortcut passes it by (ResNet, DenseNet), you may prefer to name
        the layer behind.
    rectify : bool
        Whether what is negative becomes 0, before and after resizing.
    resize : "bilinear", "bicubic", "corners" or None
        How the map is brought to the input's size: as `tf.image.resize`; "corners" is linear with
        the corners' centres on one another, as `scipy.ndimage.zoom`; None leaves it as it is.
    normalise : "max", "minmax" or None
        Each map, by itself, over its largest value, or from 0 at its smallest to 1 at its largest;
        a map of zeros stays.
    convention : "captum", "tf-keras-vis", "xplique" or "pair", optional
        These three as in that library, in place of what is given: neither rectified nor resized;
        rectified, resized "corners", "minmax"; rectified, resized "bicubic" (there without
        rectifying again, so that it goes below zero); rectified, "max", then resized.

    Returns
    -------
    Attribution
        `values` of the input's shape but with one channel, (B, *spatial, 1) for channels last,
        (B, 1, *spatial) for channels first, (B, *spatial) for inputs without channels; and
        (B, C, …) for "all". `facts` says which layer, and how many maps are
        blank: nothing in them was above zero (see them with `rectify=False`).

    Raises
    ------
    UnknownNameError
        If there is no such layer, or no convolution and no `layer`.
    InputError
        If the layer's output has no channels over positions, or an option is something else.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([
    ...     keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.GlobalMaxPooling2D(),
    ...     keras.layers.Dense(5)])
    >>> att = pj.saliency.gradcam(pj.Engine(model), np.ones((2, 8, 8, 3), "float32"), target="all")
    >>> att.values.shape
    TensorShape([2, 5, 8, 8, 1])

    References
    ----------
    Selvaraju et al. 2017, Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization, eq. 1 and 2.
    """
    finish = _finish(rectify, resize, normalise, convention)
    return _map("gradcam", _by_mean, engine, x, target, of, layer, finish)


@takes_model
def gradcam_plus_plus(
    engine: Engine,
    x: Any,
    target: Any = "predicted",
    *,
    of: Any = None,
    layer: Any = None,
    rectify: bool = True,
    resize: str | None = "bilinear",
    normalise: str | None = None,
    convention: str | None = None,
) -> Attribution:
    """Return Grad-CAM with each position's gradient weighed, so that several objects count alike.

    The score is exp(y), whose higher derivatives are powers of g = ∂y/∂A_k where the rest of the
    network is piecewise linear: α_k = Σ_ij ReLU(g) g² / (2 g² + g³ Σ_ab A_k). The factor exp(y),
    one number for each map, is left out: it overflows.

    Parameters
    ----------
    engine, x, target, of, layer, rectify, resize, normalise
        As in `gradcam`.
    convention : "captum", "tf-keras-vis", "xplique" or "pair", optional
        As in `gradcam`: what becomes of the map, and not how channels are weighed.

    Returns
    -------
    Attribution
        As of `gradcam`.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([
    ...     keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.GlobalMaxPooling2D(),
    ...     keras.layers.Dense(5)])
    >>> x = np.ones((2, 8, 8, 3), "float32")
    >>> pj.saliency.gradcam_plus_plus(pj.Engine(model), x, resize=None).values.shape
    TensorShape([2, 6, 6, 1])

    References
    ----------
    Chattopadhay et al. 2018, Grad-CAM++: Generalized Gradient-based Visual Explanations for Deep
    Convolutional Networks, eq. 5, 19 and 20.
    """
    finish = _finish(rectify, resize, normalise, convention)
    return _map("gradcam_plus_plus", _by_higher_order, engine, x, target, of, layer, finish)


@takes_model
def layercam(
    engine: Engine,
    x: Any,
    target: Any = "predicted",
    *,
    of: Any = None,
    layer: Any = None,
    rectify: bool = True,
    resize: str | None = "bilinear",
    normalise: str | None = None,
    convention: str | None = None,
) -> Attribution:
    """Return Grad-CAM with each position weighed by its own gradient: sharp in early layers too.

    The map is ReLU(Σ_k ReLU(∂y/∂A_k) A_k), position by position.

    Parameters
    ----------
    engine, x, target, of, layer, rectify, resize, normalise, convention
        As in `gradcam`.

    Returns
    -------
    Attribution
        As of `gradcam`.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([
    ...     keras.Input((8, 3)), keras.layers.Conv1D(4, 3, name="early"), keras.layers.Flatten(),
    ...     keras.layers.Dense(5)])
    >>> x = np.ones((2, 8, 3), "float32")
    >>> pj.saliency.layercam(pj.Engine(model), x, target=0, layer="early").values.shape
    TensorShape([2, 8, 1])

    References
    ----------
    Jiang et al. 2021, LayerCAM: Exploring Hierarchical Class Activation Maps for Localization,
    eq. 4 to 6.
    """
    finish = _finish(rectify, resize, normalise, convention)
    return _map("layercam", _by_position, engine, x, target, of, layer, finish)


def _by_mean(a: tf.Tensor, g: tf.Tensor) -> tf.Tensor:
    """Σ_k mean_s(g[s,k]) a[s,k] of channels a (N, S, K) and gradients g (N, M, S, K)."""
    return tf.einsum("nmk,nsk->nms", tf.reduce_mean(g, 2), a)


def _by_higher_order(a: tf.Tensor, g: tf.Tensor) -> tf.Tensor:
    """Σ_k α_k a[s,k], α_k = Σ_s ReLU(g) / (2 + g Σ a): the paper's fraction over g², g ≠ 0."""
    total = tf.reduce_sum(a, 1, keepdims=True)[:, None]
    alpha = tf.reduce_sum(tf.math.divide_no_nan(tf.nn.relu(g), 2 + g * total), 2)
    return tf.einsum("nmk,nsk->nms", alpha, a)


def _by_position(a: tf.Tensor, g: tf.Tensor) -> tf.Tensor:
    """Σ_k ReLU(g[s,k]) a[s,k]."""
    return tf.einsum("nmsk,nsk->nms", tf.nn.relu(g), a)


def _finish(
    rectify: bool, resize: str | None, normalise: str | None, convention: str | None
) -> Finish:
    if convention is None:
        return Finish(rectify, resize, normalise)
    check_one_of(convention, list(CONVENTIONS), "convention")
    return CONVENTIONS[convention]


def _map(
    method: str,
    weigh: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    engine: Engine,
    x: Any,
    target: Any,
    of: Any,
    layer: Any,
    finish: Finish,
) -> Attribution:
    """Return one of the methods' answers; they differ in how channels are weighed."""
    batch = engine._traces.prepare(x)
    there = place(engine, batch, layer, of)
    seen, size = _under(batch.tensors, there, finish)
    explained = Explained(engine, batch.packed, target, there.activation, of)
    grid = list(known(explained.values[0].shape[1:]))
    del grid[there.channels - 1]
    parts = []
    for owners in explained.chunks(explained.size):
        a = tf.gather(explained.values[0], owners)
        _, (g,) = explained.at([a], owners)
        weighed = weigh(_in_rows(a, there.channels, 1), _in_rows(g, there.channels + 1, 2))
        maps = tf.reshape(weighed, [len(owners), explained.target.count, *grid])
        parts.append(finish(maps, size))
    values = tf.concat(parts, 0)
    blank = tf.reduce_all(values == 0, list(range(2, values.shape.rank)))  # all was negative
    axis = there.input_channels if finish.resize else there.channels
    if axis:
        values = tf.expand_dims(values, axis + 1)
    facts = {"layer": there.activation.layer, "grid": tuple(grid), **dataclasses.asdict(finish)}
    if not inside_functions.is_inside():
        facts["blank"] = int(tf.math.count_nonzero(blank))
    found = explained.attribution(method, [values], facts=facts)
    return dataclasses.replace(found, x=seen)


def _under(
    tensors: Sequence[tf.Tensor], there: Place, finish: Finish
) -> tuple[tf.Tensor, tuple[int, ...]]:
    """Return the input that lies under a layer, and the lengths of its spatial axes."""
    if there.input < 0:
        if finish.resize is not None:
            raise InputError(
                f"No input has as many spatial axes as the output of {there.activation.layer!r}, "
                "so its map cannot be resized to one. Use resize=None."
            )
        return tensors[0], ()
    seen = tensors[there.input]
    axes = range(1, len(seen.shape))
    return seen, known(seen.shape[n] for n in axes if n != there.input_channels)


def _in_rows(tensor: tf.Tensor, channels: int, lead: int) -> tf.Tensor:
    """Return (*lead axes, *grid, with K channels somewhere) as (*lead axes, positions, K)."""
    rest = [n for n in range(tensor.shape.rank) if n != channels]
    moved = tf.transpose(tensor, [*rest, channels])
    count = math.prod(known(moved.shape[lead:-1]))
    return tf.reshape(moved, [*moved.shape[:lead], count, moved.shape[-1]])


def _normalised(maps: tf.Tensor, how: str | None) -> tf.Tensor:
    """Return each map (*grid) of (N, M, *grid) on the scale that `normalise` names."""
    if how is None:
        return maps
    axes = list(range(2, maps.shape.rank))
    if how == "minmax":
        maps = maps - tf.reduce_min(maps, axes, keepdims=True)
    return tf.math.divide_no_nan(maps, tf.reduce_max(tf.abs(maps), axes, keepdims=True))
