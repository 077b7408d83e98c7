"""The values that a model's weights have now, in the order of a form's numbers, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend import host
from perjac._core.model.variables import ByKey, match
from perjac.errors import InputError
from perjac.fisher._columns import Columns
from perjac.fisher.form import Form
from perjac.fisher.information import Fisher


def every_variable(engine: Any) -> dict[str, tf.Variable]:
    """Return all of the engine's variables, by key."""
    weights = engine._traces.weights
    return keyed(dict(zip(weights.keys, map(host.tf_variable, weights.variables), strict=True)))


def variables(engine: Any, columns: Columns) -> dict[str, tf.Variable]:
    """Return the engine's variables that the numbers belong to, by key, in their order.

    Raises
    ------
    InputError
        If the model has no weights of these names and shapes.
    """
    known = every_variable(engine)
    found = {key: known[key] for key in columns.keys if key in known}
    shapes = tuple(tuple(variable.shape) for variable in found.values())
    if tuple(found) != columns.keys or shapes != columns.shapes:
        raise InputError(
            f"Expected information about weights of this model: {', '.join(known)}. "
            f"Received: about {', '.join(columns.keys)}, of shapes {columns.shapes}."
        )
    return found


def current(engine: Any, columns: Columns) -> np.ndarray:
    """Return the weights' values, (P,), in float64."""
    found = variables(engine, columns)
    return np.concatenate([np.ravel(np.asarray(v, "f8")) for v in found.values()])


def keyed(answers: Mapping[str, Any]) -> ByKey:
    """Return answers by key that short names and variables find, too."""
    keys = list(answers)
    return ByKey(
        answers,
        lambda key: match(key if isinstance(key, str) else host.variable_path(key), keys, "key"),
    )


def form_of(information: Any, name: str = "diagonal") -> Form:
    """Return a form as it is, and of a Fisher the form of that name.

    Raises
    ------
    InputError
        If it is neither.
    """
    if isinstance(information, Fisher):
        return getattr(information, name)()
    if isinstance(information, Form):
        return information
    raise InputError(
        "Expected what engine.fisher() returns, or one of its forms. "
        f"Received: {type(information).__name__}."
    )
