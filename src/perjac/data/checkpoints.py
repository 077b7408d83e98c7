"""Saved weights → the same model at several points of its training, and back to where it was."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from perjac._core.backend import host
from perjac.data._batches import engine_of
from perjac.engine import Engine
from perjac.errors import FileFormatError, InputError


def at_checkpoints(engine: Engine, checkpoints: Iterable[Any]) -> Iterator[Engine]:
    """Give the engine with one checkpoint's weights after another, then put its own back.

    Parameters
    ----------
    engine : Engine
        Of a Keras model, or the model itself.
    checkpoints : iterable of paths or lists of arrays
        Each a file of weights (.weights.h5, .keras or .h5, no code of which is run), or what
        `model.get_weights()` returned.

    Yields
    ------
    Engine
        The same one every time: ask it before going on to the next.

    Raises
    ------
    InputError
        If there are none, if one does not fit the model, or if it is no Keras model.
    FileFormatError
        If a file does not exist.

    Notes
    -----
    The model gets its own weights back at the end of the loop, also where a checkpoint cannot be
    loaded. Where you leave the loop yourself, by `break` or an error, that happens when Python
    drops the iterator; `contextlib.closing(...)` around it makes it certain. `tracin` and `trak`
    do so.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> x, y = np.ones((4, 2), "float32"), np.zeros((4, 1), "float32")
    >>> now, before = model.get_weights(), [np.zeros((2, 1)), np.zeros(1)]
    >>> stages = pj.data.at_checkpoints(pj.Engine(model), [before, now])
    >>> [bool(np.any(engine.gradients(x, y, loss="mse").losses > 0)) for engine in stages]
    [False, True]
    """
    engine = engine_of(engine)
    model = engine.model
    if not host.is_layer(model):
        raise InputError(
            f"Checkpoints are weights of a Keras model. Received an engine of: {model!r:.100}."
        )
    found = list(checkpoints)
    if not found:
        raise InputError("Expected at least one checkpoint. Received: none.")
    own = model.get_weights()
    try:
        for number, checkpoint in enumerate(found):
            _load(model, checkpoint, number)
            yield engine
    finally:
        model.set_weights(own)


def _load(model: Any, checkpoint: Any, number: int) -> None:
    if isinstance(checkpoint, (str, os.PathLike)):
        _load_file(model, pathlib.Path(checkpoint))
        return
    if isinstance(checkpoint, np.ndarray) or not isinstance(checkpoint, (list, tuple)):
        raise InputError(
            "Expected each checkpoint as the path of a file of weights, or as what "
            f"model.get_weights() returned. Received as number {number}: {checkpoint!r:.100}."
        )
    try:
        model.set_weights(checkpoint)
    except ValueError as failure:
        raise InputError(
            f"Checkpoint {number} does not fit model {model.name!r}: {failure}"
        ) from failure


def _load_file(model: Any, path: pathlib.Path) -> None:
    if not path.exists():
        raise FileFormatError(f"There is no file {path}.")
    if not isinstance(model, keras.Model):
        raise InputError(
            f"{model.name!r} is a layer, and only models read files. Give lists of arrays, or put "
            "the layer into a keras.Model."
        )
    try:
        model.load_weights(path)
    except (ValueError, KeyError, OSError) as failure:
        raise InputError(
            f"{path} does not hold weights of model {model.name!r}: {failure}"
        ) from failure
