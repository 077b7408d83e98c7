"""Natural gradients: a gradient → the direction that is steepest in the model's predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.model.variables import match
from perjac.errors import InputError, check_one_of
from perjac.fisher._values import every_variable, form_of, keyed
from perjac.fisher.form import Form
from perjac.fisher.information import Fisher

# Each method, and the form of a `Fisher` that solves by it.
METHODS = {
    "auto": "exact",
    "cg": "operator",
    "woodbury": "low_rank",
    "dense": "dense",
    "kronecker": "kronecker",
    "eigenbasis": "eigenbasis",
    "diagonal": "diagonal",
}


def natural_gradient(
    information: Fisher | Form, gradient: Any, damping: float = 1e-3, method: str = "auto"
) -> Any:
    """Return the natural gradient, (F + damping·I)⁻¹ g.

    Parameters
    ----------
    information : Fisher or Form
        What `engine.fisher(...)` returns; or a form of it, which may be older than the gradient,
        so that one serves many steps.
    gradient : mapping of key to array, sequence of arrays, or array (P,)
        By key, as `Gradients.mean()` returns it; or one for each weight, in the weights' order, as
        `tape.gradient(loss, model.trainable_variables)` does. Of the mean loss, beside information
        of reduction "mean". None counts as zero, as do keys left out.
    damping : float
        Added to every eigenvalue of F.
    method : {"auto", "cg", "woodbury", "dense", "kronecker", "eigenbasis", "diagonal"}
        How a `Fisher` is solved with: conjugate gradients with products alone; the Gram matrix of
        all rows, by Woodbury's identity; the matrix itself; or an approximation. "auto" takes the
        exact one that is cheapest. A form solves in its own way, "auto".

    Returns
    -------
    mapping of key to array, list of arrays, or array (P,)
        As the gradient was given, in the weights' order and the gradient's types.

    Raises
    ------
    InputError
        If the gradient does not fit the weights.
    NotPositiveError
        If F + damping·I is singular.
    NotConvergedError
        If conjugate gradients do not get there.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
    >>> engine, x, y = pj.Engine(model), np.eye(4, dtype="float32"), np.array([0, 1, 2, 0])
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> gradient = engine.gradients(x, y, loss=loss).mean()
    >>> direction = pj.fisher.natural_gradient(engine.fisher(x), gradient, damping=0.1)
    >>> pj.fisher.descend(engine, direction, rate=0.5)
    >>> direction["top/kernel"].shape
    (4, 3)

    References
    ----------
    Amari 1998, Natural gradient works efficiently in learning; Martens and Grosse 2015 (Kronecker);
    Ren and Goldfarb 2019 (Woodbury).
    """
    check_one_of(method, tuple(METHODS), "method")
    if isinstance(information, Form) and method != "auto":
        raise InputError(
            f"A form solves in its own way: leave method= out, or give the Fisher information "
            f"itself. Received: method={method!r} beside a {type(information).__name__}."
        )
    form = form_of(information, METHODS[method])
    named = _named(gradient, form.keys)
    if not isinstance(named, Mapping):
        return form.solve(named, damping)
    found = form.solve(named, damping)
    types = {match(key, form.keys, "key"): _dtype(g) for key, g in named.items()}
    answers = keyed({key: v.astype(types.get(key, "f8")) for key, v in found.items()})
    return answers if isinstance(gradient, Mapping) else list(answers.values())


def descend(engine: Any, direction: Any, rate: float = 1.0) -> None:
    """Take a step: θ ← θ - rate · direction, in place.

    An optimiser takes a direction like any gradient instead, here with momentum:
    `optimizer.apply_gradients(zip(direction.values(), model.trainable_variables))`.

    Parameters
    ----------
    engine : Engine
        Of the model.
    direction : mapping of key to array
        As `natural_gradient` returns it. Weights left out stay as they are.
    rate : float
        How far.
    """
    named = _named(direction, engine.weight_names)
    if not isinstance(named, Mapping):
        raise InputError(
            "Expected direction= as a mapping of key to array. Received: "
            f"{type(direction).__name__}."
        )
    known = every_variable(engine)
    steps = [(known[key], v) for key, v in named.items()]
    for variable, step in steps:
        if tuple(np.shape(step)) != tuple(variable.shape):
            raise InputError(
                f"Expected a direction of shape {tuple(variable.shape)} for {variable.name!r}. "
                f"Received: {np.shape(step)}."
            )
    for variable, step in steps:
        variable.assign_sub(tf.cast(rate * tf.convert_to_tensor(step), variable.dtype))


def _named(gradient: Any, keys: Sequence[str]) -> Any:
    """Return one array for each weight by key, where there are some, and a vector as it is."""
    if isinstance(gradient, (list, tuple)):
        if len(gradient) != len(keys):
            raise InputError(
                f"Expected a gradient for each of {', '.join(keys)}. Received: {len(gradient)}."
            )
        gradient = dict(zip(keys, gradient, strict=True))
    if not isinstance(gradient, Mapping):
        return gradient
    return {  # a table's gradient comes from a tape as the rows that are not zero
        key: tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g
        for key, g in gradient.items()
        if g is not None
    }


def _dtype(array: Any) -> Any:
    """Return the floating type of an array or tensor as NumPy's, float64 of anything else."""
    dtype = tf.as_dtype(getattr(array, "dtype", "float64"))
    return dtype.as_numpy_dtype if dtype.is_floating else np.float64
