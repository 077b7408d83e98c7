"""Methods that are gradients of the output with respect to the input, as they are."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from perjac.engine import Engine
from perjac.saliency._bound import takes_model
from perjac.saliency._problem import Explained
from perjac.saliency.attribution import Attribution


@takes_model
def gradient(
    engine: Engine, x: Any, target: Any = "predicted", *, wrt: Any = "inputs", of: Any = None
) -> Attribution:
    """Return the gradient of the target output with respect to the input, signed, all channels.

    Parameters
    ----------
    engine : Engine
        The model.
    x : array (B, *input_shape), or list, tuple or dict of arrays
        Examples.
    target : int, array of int (B,), "predicted", "all", or array (B, *output_shape)
        Which output: one for all, one for each example, the largest, every one, or a direction.
    wrt : str, Activation, or list of str
        What is looked at: "inputs" (all floating ones), an input by name, or a hidden layer's
        output, `pj.activation("embedding")`.
    of : str, int or layer, optional
        Which head, where the model has several; "logits" for what a final softmax is taken of.

    Returns
    -------
    Attribution
        `values` of shape (B, *input_shape); (B, C, *input_shape) for "all".

    Raises
    ------
    OutOfRangeError
        If a target does not exist.
    InputError
        If `target` or `wrt` is something else.

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
    explained = Explained(engine, x, target, wrt, of)
    return explained.attribution("gradient", explained.at_examples()[1])


@takes_model
def input_x_gradient(
    engine: Engine, x: Any, target: Any = "predicted", *, wrt: Any = "inputs", of: Any = None
) -> Attribution:
    """Return the gradient times the input: what each entry adds, where the model is linear.

    Parameters
    ----------
    engine, x, target, wrt, of
        As in `gradient`.

    Returns
    -------
    Attribution
        `values` of shape (B, *input_shape); (B, C, *input_shape) for "all".

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> x = np.ones((2, 4), "float32")
    >>> pj.saliency.input_x_gradient(pj.Engine(model), x, target=0).values.shape
    TensorShape([2, 4])

    References
    ----------
    Shrikumar et al. 2016, Not Just a Black Box; Ancona et al. 2018, section 2.
    """
    explained = Explained(engine, x, target, wrt, of)
    values = [
        tf.expand_dims(x, 1) * g
        for x, g in zip(explained.values, explained.at_examples()[1], strict=True)
    ]
    return explained.attribution("input_x_gradient", values)
