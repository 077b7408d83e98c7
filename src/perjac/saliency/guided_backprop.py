"""Gradients whose way back through rectifiers is another: guided backpropagation, deconvnet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.graph.inline import CALLS
from perjac._core.graph.while_loops import LOOPS
from perjac.engine import Engine
from perjac.saliency._bound import takes_model
from perjac.saliency._problem import Explained
from perjac.saliency._propagation import Operation, Parts, Pull, Route, explain
from perjac.saliency.attribution import Attribution


@takes_model
def guided_backprop(
    engine: Engine, x: Any, target: Any = "predicted", *, wrt: Any = "inputs", of: Any = None
) -> Attribution:
    """Return the gradient that drops what is negative at every rectifier on its way back.

    Parameters
    ----------
    engine : Engine
        The model, of any kind.
    x : array (B, *input_shape), or list, tuple or dict of arrays
        Examples.
    target : int, array of int (B,), "predicted", "all", or array (B, *output_shape)
        Which output, as in `gradient`.
    wrt, of
        As in `gradient`.

    Returns
    -------
    Attribution
        `values` of shape (B, *input_shape); (B, C, *input_shape) for "all". `facts["rectifiers"]`
        counts the ReLUs on the way: with none it is the plain gradient.

    Raises
    ------
    InputError
        If the model loops, so that its rectifiers cannot be reached.

    Notes
    -----
    At y = max(x, 0), with dy arriving: dx = max(dy, 0) where x > 0, else 0. Rectifiers are ReLU,
    ReLU6, and a maximum with zero; all other operations have their plain gradient. The map tells
    little about the output explained: it does not change much when later weights are made random
    (Adebayo et al. 2018).

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "relu")])
    >>> x = np.ones((2, 4), "float32")
    >>> pj.saliency.guided_backprop(pj.Engine(model), x, target=0).values.shape
    TensorShape([2, 4])

    References
    ----------
    Springenberg et al. 2014, Striving for Simplicity: The All Convolutional Net, section 3.4.
    """
    explained = Explained(engine, x, target, wrt, of)
    return _modified("guided_backprop", explained, lambda op, dy: op.vjp([tf.nn.relu(dy)]))


@takes_model
def deconvnet(
    engine: Engine, x: Any, target: Any = "predicted", *, wrt: Any = "inputs", of: Any = None
) -> Attribution:
    """Return the gradient with each rectifier on its way back rectifying the gradient instead.

    Parameters
    ----------
    engine, x, target, wrt, of
        As in `guided_backprop`.

    Returns
    -------
    Attribution
        As `guided_backprop`.

    Raises
    ------
    InputError
        If the model loops, so that its rectifiers cannot be reached.

    Notes
    -----
    At y = max(x, 0), with dy arriving: dx = max(dy, 0), whatever x is. Max-pooling goes back to
    where the maximum was.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "relu")])
    >>> x = np.ones((2, 4), "float32")
    >>> pj.saliency.deconvnet(pj.Engine(model), x, target="all").values.shape
    TensorShape([2, 3, 4])

    References
    ----------
    Zeiler and Fergus 2014, Visualizing and Understanding Convolutional Networks, section 2.1.
    """
    explained = Explained(engine, x, target, wrt, of)
    return _modified("deconvnet", explained, lambda op, dy: [tf.nn.relu(dy)])


def _modified(
    method: str, explained: Explained, at_rectifier: Callable[[Operation, Any], Parts]
) -> Attribution:
    def rule(route: Route) -> Callable[[Operation], Pull]:
        def pull(operation: Operation) -> Pull:
            if operation.type in CALLS | LOOPS:
                raise operation.refused(method)
            if not _is_rectifier(operation):
                return Pull(operation.operands, operation.vjp)
            return Pull(operation.operands, lambda dys: at_rectifier(operation, dys[0]), method)

        return pull

    carried = explain(explained, method, rule)
    met = sum(rule == method for _, _, rule in carried.rules)
    return explained.attribution(method, carried.values, facts={"rectifiers": met})


def _is_rectifier(operation: Operation) -> bool:
    if operation.type != "Maximum" or len(operation.moving) != 1:
        return operation.type in ("Relu", "Relu6")
    other = tf.get_static_value(operation.op.inputs[1 - operation.moving[0]])
    return other is not None and not np.any(other)
