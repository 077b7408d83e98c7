"""What is differentiated against: weights, inputs, activations; and names turned into them.

Knows names, shapes and dtypes. Must not know graphs or how a derivative is computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend import host
from perjac._core.backend.shapes import known
from perjac.errors import InputError, UnknownNameError, nearest


@dataclasses.dataclass(frozen=True)
class Activation:
    """A hidden layer's output, by the layer's name; made by `activation`."""

    layer: str
    call: int | None = None


def activation(layer: Any, call: int | None = None) -> Activation:
    """Name a hidden layer's output as something to differentiate against.

    Parameters
    ----------
    layer : str or keras.layers.Layer
        The layer, or its name.
    call : int, optional
        Which of its calls, counted from 0, where the model calls the layer several times.

    Returns
    -------
    Activation
        For `engine.jacobian(x, wrt=...)`. Of a layer with several outputs it is the first.

    Examples
    --------
    >>> import perjac as pj
    >>> pj.activation("conv2d_3")
    Activation(layer='conv2d_3', call=None)
    """
    return Activation(layer if isinstance(layer, str) else layer.name, call)


def activation_of(layer: Any) -> Activation:
    """Return the output that `layer=` names: a layer's, its name's, or one that is named already.

    Raises
    ------
    InputError
        If it is none of these.
    """
    if isinstance(layer, Activation):
        return layer
    if isinstance(layer, str) or host.is_layer(layer):
        return activation(layer)
    raise InputError(
        f"Expected layer= as a layer, its name, or pj.activation(name, call). Received: {layer!r}."
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """One thing differentiated against: its key, its shape for one example, and where it is.

    `kind` is "weight", "input" or "activation"; `index` counts the engine's variables or the
    model's inputs; `tensor` names an activation's tensor in the traced graph.
    """

    kind: str
    key: str
    shape: tuple[int, ...]
    dtype: tf.DType
    index: int = -1
    tensor: str = ""

    def __hash__(self) -> int:
        return hash(self.key)  # which text remembers; dozens are looked up at every call

    @property
    def place(self) -> str:
        """What it is known by where names may change: Keras numbers layers anew in each process."""
        return f"{self.kind} {self.key if self.kind == 'activation' else self.index}"

    @property
    def size(self) -> int:
        """Entries for one example."""
        return math.prod(self.shape)


class Weights:
    """A model's variables under keys that differ: their paths, numbered where two share one.

    Parameters
    ----------
    variables : sequence of variables
        All that the model has, each once.
    trainable : sequence of variables
        Those that `wrt="weights"` means.
    held : sequence of variables, optional
        Those that a plain function holds: which of them, or of others, it reads is found in every
        trace, and those are added.
    """

    def __init__(
        self,
        variables: Sequence[Any],
        trainable: Sequence[Any],
        held: Sequence[Any] | None = None,
    ):
        self.variables: list[Any] = []
        self.keys: list[str] = []
        self.trainable: list[int] = []
        self._number: dict[int, int] = {}
        self._held = held
        self._add(variables, trainable)

    def read_by(self, concrete: Any) -> None:
        """Add the variables that a traced function reads, unless the user or the model lists them.

        The numbers and keys of those that are there already stay as they are.
        """
        if self._held is not None:
            found = host.variables_read(concrete, self._held)
            self._add(found, [v for v in found if v.trainable])

    def _add(self, variables: Sequence[Any], trainable: Sequence[Any]) -> None:
        for variable in variables:
            if id(host.tf_variable(variable)) not in self._number:
                self._number[id(host.tf_variable(variable))] = len(self.variables)
                self.variables.append(variable)
        self.keys[:] = _distinct([host.variable_path(v) for v in self.variables])
        numbers = [self._number[id(host.tf_variable(v))] for v in trainable]
        self.trainable += [n for n in dict.fromkeys(numbers) if n not in self.trainable]

    def number(self, variable: Any) -> int | None:
        """Return which variable this is, or None for one that is not the model's."""
        try:
            return self._number.get(id(host.tf_variable(variable)))
        except AttributeError:
            return None

    def source(self, number: int) -> Source:
        """Return variable `number` as a Source."""
        variable = host.tf_variable(self.variables[number])
        return Source(
            "weight", self.keys[number], known(variable.shape), variable.dtype, index=number
        )


def match(name: str, keys: Iterable[str], what: str) -> str:
    """Return the one key that is `name` or ends with it, path component by path component.

    Raises
    ------
    UnknownNameError
        If none or several do; it names the nearest, or all that fit.
    """
    keys = list(keys)
    if name in keys:
        return name
    fits = [key for key in keys if key.endswith("/" + name)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise UnknownNameError(
            f"The {what} {name!r} is ambiguous: it could be {', '.join(map(repr, fits))}. "
            "Give more of the path."
        )
    raise UnknownNameError(f"There is no {what} {name!r}. {nearest(name, keys)}")


class ByKey(dict):
    """Answers by key, which are also found by a short name or the variable itself.

    Parameters
    ----------
    answers : mapping
        Key to answer.
    find : callable, optional
        Takes what the user gives to the key, or raises UnknownNameError.
    """

    def __init__(self, answers: Any = (), find: Callable[[Any], str] | None = None):
        super().__init__(answers)
        self._find = find or (lambda key: key)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._find(key) if is_variable(key) else key)  # no hash

    def __missing__(self, key: Any) -> Any:
        found = self._find(key)
        if found == key:
            raise UnknownNameError(f"There is nothing for {key!r}. {nearest(str(key), self)}")
        return self[found]


def is_variable(thing: Any) -> bool:
    """Tell whether `thing` is a TensorFlow or Keras variable."""
    return isinstance(host.tf_variable(thing) if hasattr(thing, "value") else thing, tf.Variable)


def weights_of(layer: Any, weights: Weights) -> list[Source]:
    """Return a layer's trainable weights, or all of a frozen layer's, as Sources."""
    chosen = list(layer.trainable_weights) or [
        v for v in layer.weights if host.tf_variable(v).dtype.is_floating
    ]
    if not chosen:
        raise InputError(
            f"Layer {layer.name!r} has no weights. For its output use "
            f"wrt=pj.activation({layer.name!r})."
        )
    return [weights.source(known_number(v, weights)) for v in chosen]


def known_number(variable: Any, weights: Weights) -> int:
    """Return the number of a variable of the model, or raise for one that is not."""
    number = weights.number(variable)
    if number is None:
        raise UnknownNameError(
            f"Variable {host.variable_path(variable)!r} does not belong to this model. "
            "Its variables: " + ", ".join(map(repr, weights.keys[:8])) + ", …"
        )
    return number


def _distinct(names: Sequence[str]) -> list[str]:
    """Number repeated names: ["a", "b", "a"] becomes ["a", "b", "a#2"]."""
    seen: dict[str, int] = {}
    keys = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        keys.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return keys
