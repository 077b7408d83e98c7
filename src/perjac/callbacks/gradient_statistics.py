"""What per-example gradients do while a model trains."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._rows import group_of
from perjac.callbacks._logger import Logger, arrays, folder_of
from perjac.errors import InputError, check_counts


class GradientStatistics(Logger):
    """Log the gradients of a fixed set of examples to TensorBoard while a model trains.

    Parameters
    ----------
    x, y : array, or list, tuple or dict of arrays
        The examples and their labels, as in `Engine.gradients`; held-out ones, or some of those
        trained on. The first `limit` are kept.
    log_dir : str or path
        Where TensorBoard looks; events go to its folder `gradients`.
    every : "epoch" or int
        At the end of each epoch, or after so many batches.
    loss : as in `Engine.gradients`, optional
        By default the loss that the model is compiled with.
    sample_weight : array, optional
        As in `Engine.gradients`.
    limit : int
        How many examples at most: what each logging costs grows with it.
    batch_size : int
        Examples at a time, which bounds the memory.
    hardest : int
        How many of the examples with the largest gradients are shown.

    Raises
    ------
    InputError
        If an option is none of these, or x and y differ in length or have fewer than two examples.
    MissingExtraError
        If TensorBoard is not installed.

    Warns
    -----
    PerjacWarning
        Once, if the weights become NaN or infinite; training goes on.

    Notes
    -----
    Logged, with the number of the epoch or batch for a step:

    - `gradients/norms`, a histogram of the examples' gradient norms ‖g_b‖;
    - `gradients/snr`, the signal-to-noise ratio ‖ḡ‖² / tr C of mean ḡ = Σ_b g_b / N and covariance
      C = Σ_b (g_b - ḡ)(g_b - ḡ)ᵀ / N. Its inverse is the "simple noise scale": with batches much
      smaller than that, steps are mostly noise. Infinite where all gradients are alike;
    - `gradients/loss`, the examples' mean loss;
    - `gradient_norm/<layer>`, the mean over the examples of the norm of the layer's part;
    - `gradient_snr/<layer>`, the ratio of the layer's part;
    - `gradients/hardest`, the examples with the largest norms, by their place in x; and
      `gradients/hardest_images`, where an input is images (B, H, W, 1, 3 or 4).

    Gradients are those of the model as it predicts: without dropout, with the moving averages of
    batch normalisation. The model is traced once, when training starts; each logging takes about
    the time of `Engine.gradients(...).norms()` and one weighted sum over the `limit` examples, and
    memory for twice the weights besides a batch. Training goes as it would without the callback.

    References
    ----------
    McCandlish et al. 2018, An empirical model of large-batch training, section 2.2.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj, tempfile
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="top")])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.ones((8, 4), "float32"), np.arange(8.0)
    >>> folder = tempfile.mkdtemp()
    >>> logger = pj.callbacks.GradientStatistics(x, y, log_dir=folder)
    >>> _ = model.fit(x, y, epochs=2, verbose=0, callbacks=[logger])
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        log_dir: str | os.PathLike = "logs",
        *,
        every: str | int = "epoch",
        loss: Any = None,
        sample_weight: Any = None,
        limit: int = 256,
        batch_size: int = 32,
        hardest: int = 8,
    ):
        super().__init__(folder_of(log_dir, "gradients"), every, "Gradients")
        check_counts(limit=limit, batch_size=batch_size)
        check_counts(0, hardest=hardest)
        examples = {"x": x, "y": y, "sample_weight": sample_weight}
        self._examples = {
            name: arrays(given, limit) for name, given in examples.items() if given is not None
        }
        lengths = {
            name: {len(array) for array in tf.nest.flatten(held)}
            for name, held in self._examples.items()
        }
        found = set().union(*lengths.values())
        if len(found) != 1 or min(found) < 2:
            raise InputError(
                "Expected x, y and sample_weight of the same examples, two at least. Received "
                f"lengths: { {name: sorted(n) for name, n in lengths.items()} }."
            )
        self._count = min(found)
        self._loss, self._batch_size, self._hardest = loss, batch_size, hardest

    def prepare(self) -> None:
        """Find out whether the examples fit."""
        self._gradients(0)

    def log(self, step: int) -> None:
        """Log the statistics of now."""
        found = self._measured()
        finite = found.norms[np.isfinite(found.norms)]
        tf.summary.histogram("gradients/norms", finite)
        tf.summary.scalar("gradients/loss", found.losses.mean())
        tf.summary.scalar("gradients/snr", found.snr(*found.layers))
        for layer, norms in found.layers.items():
            tf.summary.scalar(f"gradient_norm/{layer}", norms.mean())
            tf.summary.scalar(f"gradient_snr/{layer}", found.snr(layer))
        if self._hardest:
            self._show(found)

    def _gradients(self, start: int) -> Any:
        part = {
            name: tf.nest.map_structure(lambda a: a[start : start + self._batch_size], held)
            for name, held in self._examples.items()
        }
        return self.engine.gradients(**part, loss=self._loss)

    def _measured(self) -> Measured:
        """Go through the examples, keeping their norms and one sum of gradients."""
        norms, losses, layers = [], [], []
        sums: dict[str, np.ndarray] = {}
        for start in range(0, self._count, self._batch_size):
            grads = self._gradients(start)
            norms.append(np.asarray(grads.norms(), "float64"))
            losses.append(np.asarray(grads.losses, "float64"))
            layers.append(grads.norms(per="layer"))
            for key, total in grads.vjp(tf.ones_like(grads.losses)).items():
                sums[key] = sums.get(key, 0) + np.asarray(total, "float64")
        signal: dict[str, float] = {}
        for key, total in sums.items():
            layer = group_of(key, "layer")
            signal[layer] = signal.get(layer, 0) + float(np.sum((total / self._count) ** 2))
        by_layer = {
            layer: np.concatenate([np.asarray(part[layer], "float64") for part in layers])
            for layer in signal
        }
        return Measured(np.concatenate(norms), np.concatenate(losses), by_layer, signal)

    def _show(self, found: Measured) -> None:
        """Log the examples with the largest gradients: a table, and pictures of images."""
        order = np.argsort(-found.norms, kind="stable")[: self._hardest]
        y = self._examples.get("y")
        labels = y.ravel() if isinstance(y, np.ndarray) and y.size == self._count else None
        lines = ["| example | norm | loss |", "|---:|---:|---:|"]
        if labels is not None:
            lines = ["| example | label | norm | loss |", "|---:|---:|---:|---:|"]
        for n in order:
            label = "" if labels is None else f" {labels[n]:g} |"
            lines.append(f"| {n} |{label} {found.norms[n]:.4g} | {found.losses[n]:.4g} |")
        tf.summary.text("gradients/hardest", "\n".join(lines))
        images = [a for a in tf.nest.flatten(self._examples["x"]) if _is_images(a)]
        for number, array in enumerate(images):
            name = "gradients/hardest_images" + (f"_{number}" if len(images) > 1 else "")
            tf.summary.image(name, _pictures(array[order]), max_outputs=self._hardest)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the gradients of N examples come to.

    Attributes
    ----------
    norms, losses : array (N,)
        Of each example.
    layers : dict of str to array (N,)
        The norms of each layer's part.
    signal : dict of str to float
        The squared norm of each layer's part of the mean.
    """

    norms: np.ndarray
    losses: np.ndarray
    layers: dict[str, np.ndarray]
    signal: dict[str, float]

    def snr(self, *layers: str) -> float:
        """Return ‖ḡ‖² / tr C of some layers together; tr C is the mean of ‖g_b‖² less ‖ḡ‖²."""
        signal = sum(self.signal[layer] for layer in layers)
        power = sum(float(np.mean(self.layers[layer] ** 2)) for layer in layers)
        noise = power - signal
        if signal == 0:
            return 0.0
        # Where all gradients are alike, rounding is what is left.
        return signal / noise if not noise < 1e-6 * power else math.inf


def _is_images(array: np.ndarray) -> bool:
    return array.ndim == 4 and array.shape[-1] in (1, 3, 4) and array.dtype.kind in "uif"


def _pictures(array: np.ndarray) -> np.ndarray:
    """Return images as 0 to 255 or 0 to 1, stretched together where they are neither."""
    if array.dtype == np.uint8:
        return array
    array = array.astype("float32")
    low, high = float(array.min()), float(array.max())
    return array if low >= 0 and high <= 1 else (array - low) / ((high - low) or 1)
