"""Which classes of keras.layers have weights, and which of those no entry of the zoo holds.

Found by looking at Keras's source, so that a layer that comes with a new Keras is missed by none.
"""

from __future__ import annotations

import functools
import inspect
import re

from keras import layers

from zoo.entry import ENTRIES, Entry

HOLDS = {"layer", "layers", "cell", "cells"}  # arguments that hand a layer its layers

# Weighted classes of which the zoo needs no entry, and why.
EXCEPTIONS = {
    "FlaxLayer": "needs JAX",
    "JaxLayer": "needs JAX",
    "TorchModuleWrapper": "needs PyTorch",
    "Wrapper": "abstract: it has no call",
}


def public() -> dict[str, type]:
    """Return the classes of keras.layers, a class of several names under its own."""
    found = {thing for thing in vars(layers).values() if inspect.isclass(thing)}
    return {kind.__name__: kind for kind in found if issubclass(kind, layers.Layer)}


@functools.cache
def code(kind: type) -> str:
    """Return the code of a class and of what it inherits below Layer, without docstrings."""
    parts = [k for k in kind.__mro__ if issubclass(k, layers.Layer) and k is not layers.Layer]
    return re.sub(r'"""(?s:.*?)"""', "", "".join(inspect.getsource(part) for part in parts))


def weighted() -> list[str]:
    """Return the public classes that make a weight, or a layer with weights, or hold layers."""
    kinds = public()
    found = {
        name
        for name, kind in kinds.items()
        if re.search(r"\._?(add|track)\w*_(weight|variable)\(", code(kind))
        or HOLDS & set(inspect.signature(kind.__init__).parameters)
    }
    while True:  # a layer made of weighted layers, and so on
        making = re.compile(rf"\b({'|'.join(found)})\(")
        more = {name for name, kind in kinds.items() if making.search(code(kind))} - found
        if not more:
            return sorted(found)
        found |= more


def holds(entry: Entry, name: str) -> bool:
    """Tell whether a layer of the class is in the entry's model, which is built."""
    model, _ = entry.make(entry.dtypes[0])
    return any(type(layer).__name__ == name for layer in model._flatten_layers())


def without_entry() -> list[str]:
    """Return the weighted classes of which no model holds a layer, exceptions left out.

    Only entries with the class in their name are looked into: building them all takes minutes.
    """
    missing = []
    for name in weighted():
        named = [e for e in ENTRIES.values() if re.search(rf"\b{name.lower()}\b", e.name)]
        if name not in EXCEPTIONS and not any(holds(entry, name) for entry in named):
            missing.append(name)
    return missing
