"""What drives the target, by the units of a hidden layer: integrals along the inputs' path."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.model.variables import activation_of
from perjac.engine import Engine
from perjac.errors import check_counts, check_one_of
from perjac.saliency._baselines import between, lacking, starts
from perjac.saliency._bound import takes_model
from perjac.saliency._problem import Explained
from perjac.saliency._quadrature import quadrature
from perjac.saliency.attribution import Attribution
from perjac.saliency.integrated_gradients import integral
from perjac.saliency.presets import settle


@takes_model
def layer_conductance(
    engine: Engine,
    x: Any,
    layer: Any,
    target: Any = "predicted",
    *,
    wrt: Any = "inputs",
    of: Any = None,
    baseline: Any = None,
    steps: int | None = None,
    rule: str | None = None,
    derivative: str | None = None,
    convention: str | None = None,
) -> Attribution:
    """Return how much of f(x) - f(x') flows through each unit of a hidden layer.

    With A the layer's output on the line x' + α(x - x'), unit j gets ∫₀¹ ∂f/∂A_j · dA_j/dα dα.

    Parameters
    ----------
    engine, x
        As in `gradient`.
    layer : str, keras.layers.Layer or Activation
        Whose output, (B, *layer_shape).
    target, wrt, of
        As in `gradient`; `wrt` names the inputs that move, the others stay as they are.
    baseline, steps, rule
        As in `integrated_gradients`.
    derivative : {"exact", "cells", "differences"}, optional
        dA/dα: exact, by a third pass, by default, which is best where the model is smooth; the
        changes of A over "cells", as wide as the rule's weights, about its nodes, which is best
        with kinks (ReLU, maxima) and complete where f is linear in A; or the "differences" of A
        between `steps` + 1 neighbouring nodes, which leave out what is between nodes and ends.
    convention : "captum", optional
        Captum's: differences.

    Returns
    -------
    Attribution
        `values` of shape (B, *layer_shape), (B, C, *layer_shape) for "all"; `x` is the layer's
        output at the examples; `delta`, (B,) or (B, C), which is small where everything that
        reaches the target passes the layer.

    Raises
    ------
    UnknownNameError
        If there is no such layer.
    InputError
        If an option cannot be used.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([
    ...     keras.Input((4,)), keras.layers.Dense(5, "tanh", name="hidden"), keras.layers.Dense(3)])
    >>> x = np.ones((2, 4), "float32")
    >>> pj.saliency.layer_conductance(pj.Engine(model), x, "hidden", target=0).values.shape
    TensorShape([2, 5])

    References
    ----------
    Dhamdhere et al. 2019, How Important Is a Neuron?, eq. 3; Shrikumar et al. 2018, Computationally
    Efficient Measures of Internal Neuron Importance.
    """
    method = "layer_conductance"
    given = {"baseline": baseline, "steps": steps, "rule": rule, "derivative": derivative}
    chosen = settle(method, convention, **given)
    ways = {
        "exact": _Path.by_rates,
        "cells": _Path.by_cells,
        "differences": _Path.by_differences,
    }
    check_one_of(chosen["derivative"], list(ways), "derivative")
    path = _Path(Explained(engine, x, target, wrt, of), layer, chosen["baseline"])
    values = ways[chosen["derivative"]](path, chosen["rule"], chosen["steps"])
    explained = path.explained
    delta = lacking([values], explained.rise(path.first))
    return path.attribution(method, values, chosen, delta=delta)


@takes_model
def internal_influence(
    engine: Engine,
    x: Any,
    layer: Any,
    target: Any = "predicted",
    *,
    wrt: Any = "inputs",
    of: Any = None,
    baseline: Any = None,
    steps: int | None = None,
    rule: str | None = None,
    convention: str | None = None,
) -> Attribution:
    """Return the gradient in a hidden layer's output, averaged on the inputs' line from a baseline.

    Parameters
    ----------
    engine, x, layer, target, wrt, of
        As in `layer_conductance`.
    baseline, steps, rule
        As in `integrated_gradients`.
    convention : "captum", optional
        Captum's defaults, which are ours.

    Returns
    -------
    Attribution
        `values` of shape (B, *layer_shape), (B, C, *layer_shape) for "all"; `x` is the layer's
        output at the examples.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([
    ...     keras.Input((4,)), keras.layers.Dense(5, "tanh", name="hidden"), keras.layers.Dense(3)])
    >>> x = np.ones((2, 4), "float32")
    >>> pj.saliency.internal_influence(pj.Engine(model), x, "hidden", target=0).values.shape
    TensorShape([2, 5])

    References
    ----------
    Leino et al. 2018, Influence-Directed Explanations for Deep Convolutional Networks, section 3.
    """
    method = "internal_influence"
    chosen = settle(method, convention, baseline=baseline, steps=steps, rule=rule)
    path = _Path(Explained(engine, x, target, wrt, of), layer, chosen["baseline"])
    return path.attribution(method, path.mean_gradient(chosen["rule"], chosen["steps"]), chosen)


class _Path:
    """The straight lines of the inputs, seen at a hidden layer."""

    def __init__(self, explained: Explained, layer: Any, baseline: Any):
        self.explained = explained
        self.first = starts(baseline, explained)
        self._layer = activation_of(layer)
        self._examples = np.arange(explained.size)

    def points(self, owners: np.ndarray, alphas: np.ndarray) -> list[tf.Tensor]:
        """Return places on the lines, each (N, *shape)."""
        return [
            between(start, x, owners, alphas)
            for start, x in zip(self.first, self.explained.values, strict=True)
        ]

    def mean_gradient(self, rule: str, steps: int) -> tf.Tensor:
        """Return Σ_k w_k ∂f/∂A(α_k), (B, M, *layer_shape)."""

        def gradient(owners: np.ndarray, alphas: np.ndarray) -> list[tf.Tensor]:
            return [self.explained.hidden(self.points(owners, alphas), owners, self._layer)[1]]

        return integral(self.explained, self._examples, quadrature(rule, steps), gradient)[0]

    def by_rates(self, rule: str, steps: int) -> tf.Tensor:
        """Return Σ_k w_k ∂f/∂A(α_k) dA/dα(α_k)."""

        def flow(owners: np.ndarray, alphas: np.ndarray) -> list[tf.Tensor]:
            points = self.points(owners, alphas)
            apart = [
                tf.gather(x - start, owners)
                for start, x in zip(self.first, self.explained.values, strict=True)
            ]
            gradients = self.explained.hidden(points, owners, self._layer)[1]
            rates = self.explained.hidden_rates(points, apart, owners, self._layer)
            return [gradients * tf.expand_dims(rates, 1)]

        return integral(self.explained, self._examples, quadrature(rule, steps), flow)[0]

    def by_cells(self, rule: str, steps: int) -> tf.Tensor:
        """Return Σ_k ∂f/∂A(α_k) (A(β_k) - A(β_{k-1})), β_k = w_1 + … + w_k: cells that fill [0, 1].

        A Stieltjes sum: the weights of a rule put the k-th node into the k-th cell.
        """
        nodes, weights = quadrature(rule, steps)
        edges = np.append(0.0, np.cumsum(weights))
        return self._flow(nodes, edges[:-1], edges[1:])

    def by_differences(self, rule: str, steps: int) -> tf.Tensor:
        """Return Σ_k ∂f/∂A(α_k) (A(α_{k+1}) - A(α_k)) over the rule's steps + 1 nodes."""
        check_counts(steps=steps)
        nodes = quadrature(rule, steps + 1)[0]
        first = nodes[:-1]
        return self._flow(first, first, nodes[1:])

    def _flow(self, nodes: np.ndarray, low: np.ndarray, high: np.ndarray) -> tf.Tensor:
        """Return Σ_k ∂f/∂A(nodes_k) (A(high_k) - A(low_k)), (B, M, *layer_shape)."""

        def hidden(owners: np.ndarray, alphas: np.ndarray) -> tf.Tensor:
            return self.explained.hidden_values(self.points(owners, alphas), owners, self._layer)

        def flow(owners: np.ndarray, k: np.ndarray) -> list[tf.Tensor]:
            points = self.points(owners, nodes[k])
            here, gradients = self.explained.hidden(points, owners, self._layer)
            below = here if low is nodes else hidden(owners, low[k])
            return [gradients * tf.expand_dims(hidden(owners, high[k]) - below, 1)]

        pieces = np.arange(len(nodes)), np.ones(len(nodes))
        return integral(self.explained, self._examples, pieces, flow)[0]

    def attribution(
        self, method: str, values: tf.Tensor, facts: dict[str, Any], delta: tf.Tensor | None = None
    ) -> Attribution:
        """Return the answer, about the layer's output at the examples."""
        explained = self.explained
        at_x = [
            explained.hidden_values([tf.gather(x, o) for x in explained.values], o, self._layer)
            for o in explained.chunks(explained.size)
        ]
        shown = {name: value for name, value in facts.items() if name != "baseline"}
        return explained.attribution(
            method,
            [values],
            {self._layer.layer: tf.concat(at_x, 0)},
            delta=delta,
            facts=shown | {"layer": self._layer.layer},
        )
