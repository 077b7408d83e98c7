"""Methods that are gradients of the output with respect to the input, as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from perjac.engine import Engine
from perjac.errors import InputError
from perjac.saliency.attribution import Attribution


def gradient(engine: Engine, x: Any, target: Any = "predicted") -> Attribution:
    """Return the gradient of the target output with respect to the input, signed, all channels.

    Parameters
    ----------
    engine : Engine
        The model, with a single floating input.
    x : array (B, *input_shape)
        Examples.
    target : int, array of int (B,), "predicted", "all", or array (B, *output_shape)
        Which output: one for all, one for each example, the largest, every one, or a direction.

    Returns
    -------
    Attribution
        `values` of shape (B, *input_shape); (B, C, *input_shape) for "all".

    Raises
    ------
    OutOfRangeError
        If a target does not exist.
    InputError
        If the model has several inputs, or `target` is something else.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> att = pj.saliency.gradient(pj.Engine(model), np.ones((2, 4), "float32"), target="all")
    >>> att.values.shape
    TensorShape([2, 3, 4])

    References
    ----------
    Simonyan et al. 2013, Deep Inside Convolutional Networks.
    """
    chosen, asked = _rows(engine, x, target)
    jac = engine.jacobian(x, wrt="inputs", **asked)
    if len(jac) != 1:
        raise InputError(
            f"Expected a model of one input. It has {len(jac)}: {', '.join(map(repr, jac))}. Use "
            "engine.jacobian(x, wrt=name) for one of them."
        )
    (rows,) = jac.values()
    batch, count, _ = jac.shape
    values = tf.reshape(rows, [batch, count, *rows.shape[1 + len(jac.row_shape) :]])
    if not (isinstance(target, str) and target == "all"):
        values = values[:, 0]
    return Attribution("gradient", values, chosen, jac.outputs, tf.convert_to_tensor(x))


def _rows(engine: Engine, x: Any, target: Any) -> tuple[Any, dict[str, Any]]:
    """Return the targets as numbers (B,) where they are, and what to ask the engine for."""
    if isinstance(target, str):
        if target == "all":
            return "all", {}
        if target != "predicted":
            raise InputError(
                "Expected target= an int, one int for each example, 'predicted', 'all', or "
                f"cotangents. Received: {target!r}."
            )
        outputs = engine.outputs(x)
        flat = tf.reshape(outputs, [outputs.shape[0], -1])
        best = tf.argmax(flat, 1, output_type=tf.int32).numpy()
        return best, {"outputs": best}
    array = np.asarray(target)
    if array.dtype.kind in "iu" and array.ndim <= 1:
        return array, {"outputs": target if array.ndim == 0 else array}
    return "directions", {"cotangents": tf.convert_to_tensor(target)[:, None]}
