"""What the user hands to an engine → a function of a batch, and its weights."""

from __future__ import annotations

import functools
import inspect
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac import files, host, inputs
from perjac.errors import InputError, NotAModelError, NotBuiltError
from perjac.saved import SavedFunction
from perjac.sources import Weights, is_variable

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
        model = files.load_model(model, signature=signature)
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
