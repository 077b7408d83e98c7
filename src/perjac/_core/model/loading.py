"""What the user hands to an engine → a function of a batch, and its weights."""

from __future__ import annotations

import functools
import inspect
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend import host
from perjac._core.model import inputs
from perjac._core.model.saved_model import SavedFunction
from perjac._core.model.variables import Weights, is_variable
from perjac.errors import FileFormatError, InputError, NotAModelError, NotBuiltError

# Endings of a model's file.
_MODELS = {".keras", ".h5", ".hdf5"}
# Things that are looked at for a plain function's variables.
_MOST_HELD = 1000


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
        model = load_model(model, signature=signature)
    elif signature is not None:
        raise InputError(f"signature={signature!r} goes with the path of a SavedModel.")
    if host.is_layer(model) and not model.built:
        raise NotBuiltError(
            f"Model {model.name!r} is not built: it has no weights yet. Call it once on data, "
            "model.build(input_shape), or start it with keras.Input(...)."
        )
    if inspect.ismethod(model) and model.__name__ == "__call__":
        return loaded(model.__self__, None)
    if isinstance(model, tf.types.experimental.ConcreteFunction):
        return SavedFunction(model, "function", variables=host.variables_read(model, []))
    if not callable(model) and getattr(model, "signatures", None):
        return SavedFunction.of_loaded(model)
    if not callable(model):
        raise NotAModelError(
            "Expected a Keras model, the path of one or of a SavedModel, or a callable on a batch. "
            f"Received: {type(model).__name__}."
        )
    return model


def load_model(
    path: str | pathlib.Path,
    allow_code: bool = False,
    signature: str | None = None,
    compiled: bool = False,
) -> Any:
    """Load a model, without running Python code from the file unless allowed.

    Parameters
    ----------
    path : str or Path
        A .keras or .h5 file, or the folder of a SavedModel.
    allow_code : bool
        Whether Lambda layers in the file may run the Python code stored in it: that code can do
        anything that you can.
    signature : str, optional
        Which function of a SavedModel.
    compiled : bool
        Whether to load what the model was compiled with, its loss, too.

    Raises
    ------
    FileFormatError
        If the file does not exist, is of another kind, or cannot be read.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return SavedFunction.of_folder(path, signature)
    if signature is not None:
        raise InputError(f"signature={signature!r} is for SavedModels. Received: {path}.")
    if not path.exists():
        raise FileFormatError(f"There is no file {path}.")
    if path.suffix.lower() not in _MODELS:
        raise FileFormatError(
            f"Expected a .keras or .h5 file, or a SavedModel's folder. Received: {path}."
        )
    try:
        return _keras_model(path, allow_code, compiled)
    except FileFormatError as failure:
        if not compiled:
            raise
        _keras_model(path, allow_code, compiled=False)
        raise FileFormatError(  # the model alone can be read
            f"{failure} The fault lies in what it was compiled with: name the loss to leave that "
            "out, for example --loss mse."
        ) from failure


def _keras_model(path: pathlib.Path, allow_code: bool, compiled: bool) -> Any:
    import keras

    try:
        return keras.models.load_model(path, compile=compiled, safe_mode=not allow_code)
    except Exception as failure:  # Keras raises whatever its readers stumble over
        text = str(failure).partition(" Full object config")[0].strip().splitlines()
        hint = ""
        if "safe" in str(failure).lower() and "lambda" in str(failure).lower():
            hint = " If you trust the file, --allow-code runs the Python code stored in it."
        raise FileFormatError(
            f"Cannot read the model {path}: {text[0] if text else type(failure).__name__}{hint}"
        ) from failure


def function_of(model: Any, training: bool) -> Callable[[Any], Any]:
    """Return the model as a function of a batch, or of the arguments of a Call."""
    takes_training = host.is_layer(model) and host.takes_training(model)
    options = {"training": training} if takes_training else {}
    return lambda x: inputs.called(model, x, **options)


def weights_of(model: Any, variables: Sequence[Any] | None) -> Weights:
    """Return a model's variables, or those given; a plain function's are found as it is traced."""
    if variables is not None:
        return Weights(list(variables), list(variables))
    if host.is_layer(model) or isinstance(model, (tf.Module, SavedFunction)):
        return Weights(list(model.variables), list(model.trainable_variables))
    return Weights([], [], held=list(within_reach(model)))


def within_reach(function: Any) -> Iterator[Any]:
    """Return the variables that a plain function holds: by its closure, its object, its globals.

    Which of them it reads, only a call shows; but their type is the one that data should have.
    """
    seen: dict[int, Any] = {}  # keeps what it has seen, lest an address be used again
    stack = [function]
    while stack and len(seen) < _MOST_HELD:
        thing = stack.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if is_variable(thing):
            yield thing
        elif host.is_layer(thing) or isinstance(thing, tf.Module):
            yield from thing.variables
        else:
            stack += _held_by(thing)


def _held_by(thing: Any) -> list[Any]:
    """Return what a function, a method, an object that is called or a collection holds."""
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, (list, tuple)):
        return list(thing)
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if inspect.ismethod(thing):
        return [thing.__self__, thing.__func__]
    if inspect.isfunction(thing):
        named = inspect.getclosurevars(thing)
        return [*named.nonlocals.values(), *named.globals.values(), *(thing.__defaults__ or ())]
    if hasattr(thing, "python_function"):  # a tf.function
        return [thing.python_function]
    return list(vars(thing).values()) if callable(thing) and hasattr(thing, "__dict__") else []
