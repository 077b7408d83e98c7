"""What the user hands to an engine → a function of a batch, and its weights."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from perjac import files, host, inputs
from perjac.errors import InputError, NotAModelError, NotBuiltError
from perjac.saved import SavedFunction
from perjac.sources import Weights


def loaded(model: Any, signature: str | None) -> Any:
    """Return a model that can be called: itself, or what a path names.

    Raises
    ------
    NotBuiltError
        If a Keras model has no weights yet.
    NotAModelError
        If it is nothing that can be called on a batch.
    """
    if isinstance(model, (str, pathlib.Path)):
        model = files.load_model(model, signature=signature)
    elif signature is not None:
        raise InputError(f"signature={signature!r} goes with the path of a SavedModel.")
    if host.is_layer(model) and not model.built:
        raise NotBuiltError(
            f"Model {model.name!r} is not built: it has no weights yet. Call it once on data, "
            "model.build(input_shape), or start it with keras.Input(...)."
        )
    if not callable(model):
        raise NotAModelError(
            "Expected a Keras model, the path of one or of a SavedModel, or a callable on a batch. "
            f"Received: {type(model).__name__}."
        )
    return model


def function_of(model: Any, training: bool) -> Callable[[Any], Any]:
    """Return the model as a function of a batch, or of the arguments of a Call."""
    takes_training = host.is_layer(model) and host.takes_training(model)
    options = {"training": training} if takes_training else {}
    return lambda x: inputs.called(model, x, **options)


def weights_of(model: Any, variables: Sequence[Any] | None) -> Weights:
    """Return a model's variables, or those given for a plain function."""
    if variables is not None:
        return Weights(list(variables), list(variables))
    if host.is_layer(model) or isinstance(model, (tf.Module, SavedFunction)):
        return Weights(list(model.variables), list(model.trainable_variables))
    return Weights([], [])
