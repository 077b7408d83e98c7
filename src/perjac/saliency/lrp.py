"""Layer-wise relevance propagation: an output shared out backward, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from perjac.engine import Engine
from perjac.errors import InputError, UnknownNameError, nearest
from perjac.saliency._affine import MOVES, SUMS, WEIGHTED, Affine, after_weights, unit
from perjac.saliency._baselines import lacking
from perjac.saliency._bound import takes_model
from perjac.saliency._problem import Explained
from perjac.saliency._propagation import Operation, Parts, Pull, Route, explain
from perjac.saliency.attribution import Attribution
from perjac.saliency.lrp_rules import AlphaBeta, Epsilon, Flat, Gamma, Rule, ZPlus, stabilised

Where = str | Callable[[Affine], bool]
Composite = Sequence[tuple[Where, Rule]]

_DENSE = {"MatMul", "BatchMatMul", "BatchMatMulV2", "Einsum"}
# What `where` may say, beside a type of operation and a layer's name.
_KINDS: dict[str, Callable[[Affine], bool]] = {
    "first": lambda unit: unit.first,
    "convolution": lambda unit: unit.type in WEIGHTED - _DENSE,
    "dense": lambda unit: unit.type in _DENSE,
    "any": lambda unit: bool(unit.type),
}
# By zennit's names. Units that no entry fits take Epsilon().
COMPOSITES: dict[str, Composite] = {
    "epsilon": (),
    "epsilon_plus": (("convolution", ZPlus()),),
    "epsilon_plus_flat": (("first", Flat()), ("convolution", ZPlus())),
    "epsilon_alpha2_beta1": (("convolution", AlphaBeta()),),
    "epsilon_alpha2_beta1_flat": (("first", Flat()), ("convolution", AlphaBeta())),
    "epsilon_gamma": (("convolution", Gamma()),),
}

# Elementwise functions, which relevance passes as it is: Bach et al. 2015, section 2.4.
_PASSED = {
    "Relu", "Relu6", "LeakyRelu", "Elu", "Selu", "Softplus", "Softsign", "Tanh", "Sigmoid",
    "Softmax", "LogSoftmax", "ClipByValue", "Erf",
}  # fmt: skip
# Those that choose an entry: the winner takes all.
_CHOICES = {
    "MaxPool", "MaxPoolV2", "MaxPool3D", "Max", "Maximum", "Minimum", "Select", "SelectV2",
}  # fmt: skip
# Products of two tensors that move: all goes to the signal and none to its gate, the operand
# of the higher number here (Arras et al. 2017, "signal-take-all"; for attention and layer
# normalisation Ali et al. 2022).
_PRODUCTS = {"Mul", "MatMul", "BatchMatMul", "BatchMatMulV2", "Einsum", "RealDiv"}
_GATES = {"Rsqrt": 3, "Softmax": 2, "Sigmoid": 2, "Erf": 2, "Erfc": 2, "Relu6": 2, "Tanh": 1}
# For shares in proportion, which rest on nothing that could be small on purpose.
_TINY = 1e-9


@takes_model
def lrp(
    engine: Engine,
    x: Any,
    target: Any = "predicted",
    *,
    wrt: Any = "inputs",
    of: Any = None,
    rules: str | Rule | Composite = "epsilon",
) -> Attribution:
    """Return relevance: the target output, shared out to the inputs layer by layer.

    Parameters
    ----------
    engine : Engine
        The model, of any kind.
    x : array (B, *input_shape), or list, tuple or dict of arrays
        Examples.
    target : int, array of int (B,), "predicted", "all", or array (B, *output_shape)
        Which output, as in `gradient`. Its value is what is shared out.
    wrt, of
        As in `gradient`; of="logits" is recommended where the model ends with a softmax.
    rules : str, Rule, or sequence of (where, Rule)
        What products with weights do. One of `relevance.COMPOSITES`: "epsilon", "epsilon_plus",
        "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_alpha2_beta1_flat", "epsilon_gamma";
        or one rule for all: `rules.Epsilon(0.01)`; or pairs, of which the first that fits counts
        and after which comes `Epsilon()`. `where` is "first" (weights after the input),
        "convolution", "dense", "any", a type of operation, a layer's name, or a function of an
        `Affine`. Functions are told apart by identity, so keep one to be traced once.

    Returns
    -------
    Attribution
        `values` of shape (B, *input_shape); (B, C, *input_shape) for "all". `delta`: their sum
        less the output. `facts`: "rules", of each layer; "layers", for each layer what arrives,
        leaves, and is absorbed by biases and by epsilon, or lost otherwise, each (B,).

    Raises
    ------
    InputError
        If an operation on the way has no rule, naming it and its layer.
    UnknownNameError
        If there are no rules of that name.

    Notes
    -----
    A product, its bias and the normalisation after it are one unit. Sums, averages and residual
    connections share in proportion; activations pass relevance on as it is; a maximum gives all
    to the winner; a gate gets nothing.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, use_bias=False)])
    >>> att = pj.saliency.lrp(pj.Engine(model), np.ones((2, 4), "float32"), target="all")
    >>> att.values.shape, bool(abs(att.delta.numpy()).max() < 1e-4)
    (TensorShape([2, 3, 4]), True)

    References
    ----------
    Bach et al. 2015, On Pixel-Wise Explanations by Layer-Wise Relevance Propagation; Montavon et
    al. 2019, Layer-Wise Relevance Propagation: An Overview.
    """
    composite = _composite(rules)
    explained = Explained(engine, x, target, wrt, of)
    carried = explain(explained, ("lrp", composite), _Rules(composite), relevance=True)
    names = [r for r in carried.rules if r[2] not in ("gradient", "")]
    return explained.attribution(
        "lrp",
        carried.values,
        delta=lacking(carried.values, explained.at_x),
        facts={
            "rules": {layer: rule for layer, _, rule in reversed(names)},
            "layers": {
                layer: {name: explained.shown(v) for name, v in _balanced(entry).items()}
                for layer, entry in reversed(carried.account.items())
            },
        },
    )


class _Rules:
    """A composite, to be asked about a route."""

    def __init__(self, composite: Composite):
        self._composite = composite

    def __call__(self, route: Route) -> Callable[[Operation], Pull]:
        weighted = after_weights(route)

        def pull(operation: Operation) -> Pull:
            found = unit(route, operation, weighted)
            if found is not None:
                return self.rule_of(found).pull(found)
            if operation.type == "StopGradient":
                return Pull([], lambda dys: [])
            if operation.type == "IdentityN":  # what a custom gradient is attached to
                pairs = [(operation.op.inputs[n], n) for n in operation.moving]
                return Pull([t for t, _ in pairs], lambda dys: [dys[n] for _, n in pairs])
            if operation.type in _PASSED or _is_clip(operation):
                return Pull(operation.operands, lambda dys: [dys[0]], "")
            if operation.type in MOVES | _CHOICES:
                return Pull(operation.operands, operation.vjp)
            if operation.type in SUMS:
                return _in_proportion(operation, operation.moving)
            if operation.type in _PRODUCTS:
                return _in_proportion(operation, [_signal(route, operation)])
            raise operation.refused("lrp")

        return pull

    def rule_of(self, unit: Affine) -> Rule:
        """Return the first rule that fits a unit."""
        for where, rule in self._composite:
            if _fits(where, unit):
                return rule
        return Epsilon()


def _in_proportion(operation: Operation, chosen: Sequence[int]) -> Pull:
    """R_a = a ⊙ vjp_a(R / z): each operand's share of a sum z."""
    places = [operation.moving.index(n) for n in chosen]
    operands = [operation.operands[n] for n in places]
    z = operation.op.outputs[0]
    held = stabilised(z, _TINY)

    def back(dys: Parts) -> Parts:
        parts = operation.vjp([dys[0] / held, *dys[1:]])
        return [
            None if parts[n] is None else x * parts[n]
            for n, x in zip(places, operands, strict=True)
        ]

    return Pull(operands, back, absorbed=lambda dys: {"epsilon": (held - z) * dys[0] / held})


def _signal(route: Route, operation: Operation) -> int:
    """Return which operand of a product is not the gate."""
    if len(operation.moving) == 1:
        return operation.moving[0]
    if operation.type == "RealDiv":
        return 0
    first, second = (_gate(route, t) for t in operation.operands)
    if first == second:
        raise operation.refused("lrp", "which of its two operands is the gate cannot be told")
    return operation.moving[int(first > second)]


def _gate(route: Route, tensor: tf.Tensor) -> int:
    """Return how much a tensor is like a gate, looking through factors, shifts and moves."""
    made = route.made_by.get(tensor.name)
    while made is not None and made.type not in _GATES and len(made.moving) == 1:
        if made.type not in MOVES | {"Mul", "RealDiv", "AddV2", "Add", "Sub", "BiasAdd", "Neg"}:
            return 0
        made = route.made_by.get(made.operands[0].name)
    return _GATES.get(made.type, 0) if made is not None else 0


def _is_clip(operation: Operation) -> bool:
    return operation.type in ("Maximum", "Minimum") and len(operation.moving) == 1


def _composite(rules: Any) -> Composite:
    if isinstance(rules, Rule):
        return (("any", rules),)
    if isinstance(rules, str):
        if rules not in COMPOSITES:
            raise UnknownNameError(f"There are no rules {rules!r}. {nearest(rules, COMPOSITES)}")
        return COMPOSITES[rules]
    for pair in rules:
        fits = isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[1], Rule)
        if not fits or not (isinstance(pair[0], str) or callable(pair[0])):
            raise InputError(
                "Expected rules= a name, a rule, or pairs of a place and a rule, like "
                f"[('convolution', Gamma(0.25))]. Received: {pair!r}."
            )
    return tuple((where, rule) for where, rule in rules)


def _fits(where: Where, unit: Affine) -> bool:
    if callable(where):
        return bool(where(unit))
    return _KINDS[where](unit) if where in _KINDS else where in (unit.type, *unit.layers)


def _balanced(entry: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Return a layer's account with what is lost to neither biases nor epsilon."""
    nothing = tf.zeros_like(next(iter(entry.values())))
    found = {n: entry.get(n, nothing) for n in ("arriving", "leaving", "biases", "epsilon")}
    gone = found["leaving"] + found["biases"] + found["epsilon"]
    return found | {"lost": found["arriving"] - gone}
