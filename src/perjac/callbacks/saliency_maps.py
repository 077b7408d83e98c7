"""What in each example drives the model, as pictures, while it trains."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import tensorflow as tf

from perjac.callbacks._logger import Logger, arrays, folder_of
from perjac.errors import InputError, check_counts
from perjac.saliency import Attribution, _pictures
from perjac.saliency._registry import choose

# Small images are enlarged until their longer side has at least so many pixels.
_SIDE = 128
# Outputs drawn of each example, of target "all".
_MOST = 10


class SaliencyMaps(Logger):
    """Log saliency maps of a fixed set of examples to TensorBoard while a model trains.

    Parameters
    ----------
    x : array, or list, tuple or dict of arrays
        The examples; the first `limit` are kept.
    method : str
        One of `pj.saliency.METHODS`.
    target : int, array of int, "predicted" or "all"
        What is explained, as in `pj.saliency.gradient`.
    log_dir : str or path
        Where TensorBoard looks; events go to its folder `saliency`.
    every : "epoch" or int
        At the end of each epoch, or after so many batches.
    limit : int
        How many examples at most: what each logging costs grows with it.
    channels : str
        How channels are taken together: "sum", "mean", "abs-max" or "l2".
    data_format : str, optional
        "channels_last" or "channels_first"; found out by the shape if left out.
    **options
        Of the method: `of="logits"`, `wrt=`, `steps=`, `samples=`, `seed=` and the like.

    Raises
    ------
    InputError
        If an option is none of these, or the method does not take it.
    UnknownNameError
        If there is no such method.
    MissingExtraError
        If TensorBoard or Pillow is not installed.

    Warns
    -----
    PerjacWarning
        Once, if the weights become NaN or infinite; training goes on.

    Notes
    -----
    Logged as images, with the number of the epoch or batch for a step: `saliency/<method>`, each
    example beside its map (for "all", beside the maps of all outputs, in order; where there are
    more than ten, of the ten that were largest when first logged). Red is where a larger value
    would raise the output, blue where it would lower it, on a scale of the example's own that ends
    at the 99th percentile. Where several inputs are looked at, each has its images. Volumes are
    shown by their middle slices; sequences and rows of features as stripes, positions to the
    right. `saliency_scale/<method>`, the mean of where the scales end, tells how large the values
    are.

    Maps are those of the model as it predicts. The model is traced once, when training starts.
    Training goes as it would without the callback.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj, tempfile
    >>> layers = [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(3)]
    >>> model = keras.Sequential(layers)
    >>> model.compile("sgd", "mse")
    >>> x, y = np.ones((6, 8, 8, 1), "float32"), np.ones((6, 3))
    >>> maps = pj.callbacks.SaliencyMaps(x, target=0, log_dir=tempfile.mkdtemp(), limit=2)
    >>> _ = model.fit(x, y, epochs=2, verbose=0, callbacks=[maps])
    """

    def __init__(
        self,
        x: Any,
        method: str = "gradient",
        target: Any = "predicted",
        log_dir: str | os.PathLike = "logs",
        *,
        every: str | int = "epoch",
        limit: int = 8,
        channels: str = "sum",
        data_format: str | None = None,
        **options: Any,
    ):
        super().__init__(folder_of(log_dir, "saliency"), every, "Saliency maps")
        check_counts(limit=limit)
        _pictures.check_channels(channels)
        if channels == "none":
            raise InputError("Expected channels= as 'sum', 'mean', 'abs-max' or 'l2'.")
        self._x = arrays(x, limit)
        lengths = {len(array) for array in tf.nest.flatten(self._x)}
        if len(lengths) != 1 or 0 in lengths:
            raise InputError(f"Expected examples, of one number. Received: {sorted(lengths)}.")
        if np.ndim(target) == 1:
            target = np.asarray(target)[:limit]
        self._name, self._channels, self._format = method, channels, data_format
        self._method = choose([method], {"target": target, **options})[method]
        self._limit = limit
        self._chosen: np.ndarray | None = None

    def prepare(self) -> None:
        """Find out whether the examples fit."""
        self._method(self.engine, self._x)

    def log(self, step: int) -> None:
        """Log the maps of now."""
        att = self._method(self.engine, self._x)
        if self._chosen is None:  # the same outputs at each step
            each = np.asarray(att.outputs)
            self._chosen = np.stack([_pictures.largest(outputs, _MOST) for outputs in each])
        for wrt in att.inputs:
            name = self._name if wrt is None else f"{self._name}/{wrt}"
            drawn, ends = self._drawn(att, wrt, self._chosen)
            tf.summary.image(f"saliency/{name}", drawn, max_outputs=self._limit)
            tf.summary.scalar(f"saliency_scale/{name}", np.mean(ends))

    def _drawn(
        self, att: Attribution, wrt: str | None, chosen: np.ndarray
    ) -> tuple[np.ndarray, list[float]]:
        """Return each example beside its maps, RGB (B, height, width, 3), and where scales end."""
        x, maps = att.x_of(wrt), att.maps_of(wrt)
        rows, ends = [], []
        for n, image in enumerate(x):
            drawn = maps[n][chosen[n]] if att.for_all else maps[n]
            shown, values = _pictures.flat(image, drawn, self._channels, self._format)
            end = _pictures.limit(values)
            cells = [_pictures.rgb(shown)]
            for one in values:
                stretched = _pictures.resized(one, shown.shape[:2])
                cells.append(_pictures.PALETTE[_pictures.numbers(stretched, end)] / 255)
            rows.append(_beside(cells))
            ends.append(end)
        return np.stack(rows), ends


def _beside(cells: list[np.ndarray]) -> np.ndarray:
    """Put pictures of one size beside each other, or below where they are wide; enlarge them."""
    height, width = cells[0].shape[:2]
    times = max(1, -(-_SIDE // max(height, width)))
    tall = max(times, -(-16 // height)) if height * 4 < width else times
    large = [cell.repeat(tall, 0).repeat(times, 1) for cell in cells]
    down = width > 2 * height
    gap = np.ones((4, large[0].shape[1], 3) if down else (large[0].shape[0], 4, 3))
    parts = [part for cell in large for part in (cell, gap)][:-1]
    return np.concatenate(parts, 0 if down else 1).astype("float32")
