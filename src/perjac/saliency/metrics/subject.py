"""What a metric asks about: an attribution's target again, and its maps as numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend.shapes import known
from perjac.engine import Engine
from perjac.errors import InputError
from perjac.saliency import _pictures
from perjac.saliency._problem import Explained
from perjac.saliency.attribution import Attribution


class Subject:
    """An attribution, and the model that it explains.

    Parameters
    ----------
    engine, x : Engine and examples
        As the method got them.
    attribution : Attribution
        Its answer.
    of, wrt
        As the method got them; "logits" is remembered.

    Attributes
    ----------
    explained : Explained
        The target at any points.
    maps : list of array
        For each input looked at, (B, M, *shape), float64. What a map says of all channels together
        is shared out equally among them, so that sums stay.
    """

    def __init__(self, engine: Engine, x: Any, attribution: Attribution, of: Any, wrt: Any):
        if not isinstance(attribution, Attribution):
            raise InputError(
                f"Expected an Attribution, a method's answer. Received: {attribution!r:.80}."
            )
        target: Any = attribution.target
        if isinstance(target, str) and target == "directions":
            raise InputError("Expected an attribution of outputs. Received: one of directions.")
        if of is None and attribution.explained == "logits":
            of = "logits"
        several = isinstance(attribution.values, dict)
        if several and wrt == "inputs":
            wrt = list(attribution.values)
        self.attribution = attribution
        self.explained = Explained(engine, x, target, wrt, of)
        names = attribution.inputs if several else [None]
        if len(names) != len(self.explained.names):
            raise InputError(
                f"The attribution is of one input, and the model has {self.explained.names}: say "
                "which it is, wrt=name."
            )
        self.maps = [
            _shared(attribution.maps_of(name), known(x.shape))
            for name, x in zip(names, self.explained.values, strict=True)
        ]

    def of_map(self, values: tf.Tensor, numbers: np.ndarray) -> np.ndarray:
        """Return of values (N, M) of the target those that maps `numbers` (N,) explain."""
        return np.asarray(values, "f8")[np.arange(len(numbers)), numbers]

    def shown(self, values: np.ndarray) -> np.ndarray:
        """Return (B, M, ...) as users see it: without M, but for target "all"."""
        return values if self.attribution.for_all else values[:, 0]


def same_target(attribution: Attribution, target: Any) -> Any:
    """Return what to ask for so that the outputs explained stay, whatever is predicted by then."""
    return target if isinstance(attribution.target, str) else attribution.target


def in_rows(maps: np.ndarray) -> np.ndarray:
    """Return maps (B, M, *shape) as float64 (B, M, entries)."""
    return maps.astype("f8").reshape(*maps.shape[:2], math.prod(maps.shape[2:]))


def _shared(maps: np.ndarray, x: tuple[int, ...]) -> np.ndarray:
    """Return maps (B, M, *map_shape) as (B, M, *shape) of examples (B, *shape)."""
    maps, shape = maps.astype("f8"), x[1:]
    channel = _pictures.channel_axis(shape)
    if maps.ndim - 2 == len(shape) - 1 and channel is not None:
        maps = np.expand_dims(maps, maps.ndim if channel == -1 else 2)
    fits = len(maps) == x[0] and maps.ndim - 2 == len(shape)
    if not fits or any(m not in (1, n) for m, n in zip(maps.shape[2:], shape, strict=True)):
        raise InputError(
            f"The maps have shape {maps.shape[2:]} and the inputs {shape}, for {x[0]} examples: "
            "give the examples that were explained. A map of a hidden layer's grid has to be "
            "resized first; maps of a hidden layer go with wrt=pj.activation(layer)."
        )
    together = np.prod(shape, dtype=float) / np.prod(maps.shape[2:], dtype=float)
    return np.broadcast_to(maps / together, (*maps.shape[:2], *shape))
