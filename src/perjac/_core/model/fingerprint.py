"""Whether a model is still the one that was traced: what its layers hold, by identity.

Looks at attributes, not at values of variables: a training step changes no trace. Knows Keras
layers and modules; must not know traces.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from perjac._core.backend import host
from perjac._core.model.variables import is_variable

_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
_CONTAINERS = (list, tuple, dict)


class Fingerprint:
    """What a model's layers, modules and containers held when last looked at.

    Parameters
    ----------
    model : keras.Model, keras.Layer, tf.Module or callable
        The root. Of a plain function only the layers and modules that it mentions are known.

    Attributes
    ----------
    generation : int
        How often the model has changed.
    """

    def __init__(self, model: Any):
        self._model, self.generation = model, 0
        self._moving: set[tuple[int, str]] = set()  # what a call of the model itself changes
        self._look()

    def renew(self) -> int:
        """Return how often the model has changed, and take it as it is now."""
        if self.changed():
            self.generation += 1
            self._look()
        return self.generation

    def changed(self) -> str:
        """Return what has changed since the last look, or nothing: "'activation' of Dense 'a'"."""
        for n, (attributes, held) in enumerate(self._objects):
            try:  # a microsecond for a layer: what is the same object is not compared further
                same = tuple(attributes.values()) == held
            except Exception:  # arrays and tensors do not say in one word whether they are equal
                same = False
            if not same and (why := self._why(n)):
                return why
        for container, held, name in self._containers:
            try:
                same = container == held
            except Exception:
                same = False
            if not same and not _alike(container, held):
                return name
        if list(map(_is_trainable, self._variables)) != self._trainable:
            return "'trainable' of a variable"
        return ""

    @contextlib.contextmanager
    def called(self) -> Iterator[None]:
        """Take what changes inside the block, in which the model is called, for no change of it.

        A layer may count its calls, for one.
        """
        pending = self.changed()
        yield
        if pending:
            return
        moved = {(id(c), "") for c, held, _ in self._containers if not _alike(c, held)}
        for thing, saved in zip(self._watched, self._saved, strict=True):
            moved |= {(id(thing), name) for name in self._changed_names(thing, saved)}
        if moved:
            self._moving |= moved
            self._look()

    def _why(self, n: int) -> str:
        """Return which attribute of object n has changed in earnest, or take it as it is."""
        thing = self._watched[n]
        for name in self._changed_names(thing, self._saved[n]):
            return f"{name!r} of {_called(thing)}"
        self._saved[n] = dict(vars(thing))
        self._objects[n] = vars(thing), tuple(vars(thing).values())
        return ""

    def _changed_names(self, thing: Any, old: Mapping[str, Any]) -> list[str]:
        new, missing = vars(thing), object()
        changed = []
        for name in dict.fromkeys([*old, *new]):
            a, b = old.get(name, missing), new.get(name, missing)
            if a is b or host.is_bookkeeping(thing, name) or (id(thing), name) in self._moving:
                continue
            unset = {id(a), id(b)} == {id(missing), id(None)}
            if not unset and not _is_equal(a, b):
                changed.append(name)
        return changed

    def _look(self) -> None:
        """Go through all that the model consists of."""
        self._watched: list[Any] = []
        self._containers: list[tuple[Any, Any, str]] = []
        self._variables: list[Any] = []
        seen: dict[int, Any] = {}
        stack = [(root, "") for root in _roots(self._model)]
        while stack:
            thing, name = stack.pop()
            if id(thing) in seen:
                continue
            if is_variable(thing):
                self._variables.append(thing)
            elif host.is_part(thing):
                self._watched.append(thing)
                stack += [
                    (value, f"{key!r} of {_called(thing)}")
                    for key, value in vars(thing).items()
                    if not host.is_bookkeeping(thing, key) and (id(thing), key) not in self._moving
                ]
            elif isinstance(thing, _CONTAINERS):
                if not isinstance(thing, tuple) and (id(thing), "") not in self._moving:
                    held = dict(thing) if isinstance(thing, dict) else list(thing)
                    self._containers.append((thing, held, name))
                stack += [(value, name) for value in _values(thing)]
            else:
                continue
            seen[id(thing)] = thing
        self._moving = {moving for moving in self._moving if moving[0] in seen}
        self._saved = [dict(vars(thing)) for thing in self._watched]
        self._objects = [(vars(t), tuple(vars(t).values())) for t in self._watched]
        self._trainable = list(map(_is_trainable, self._variables))


_is_trainable = operator.attrgetter("trainable")


def _called(thing: Any) -> str:
    return f"{type(thing).__name__} {getattr(thing, 'name', '')!r}"


def _roots(model: Any) -> list[Any]:
    """Return the layers and modules that a model is or is bound to, or that it mentions."""
    if host.is_part(model):
        return [model]
    inside = [getattr(model, "__self__", None)]
    for cell in getattr(model, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            inside.append(cell.cell_contents)
    code, known = getattr(model, "__code__", None), getattr(model, "__globals__", {})
    inside += [known.get(name) for name in getattr(code, "co_names", ())]
    return [thing for thing in inside if host.is_part(thing)]


def _values(container: Any) -> Any:
    return container.values() if isinstance(container, Mapping) else container


def _alike(container: Any, held: Any) -> bool:
    """Tell whether a container has the same objects as before, in the same places."""
    keys = isinstance(container, Mapping) and list(container) != list(held)
    pairs = zip(_values(container), _values(held), strict=False)
    return not keys and len(container) == len(held) and all(a is b for a, b in pairs)


def _is_equal(a: Any, b: Any) -> bool:
    """Tell whether two values are surely alike: numbers, text, arrays, and tuples of these."""
    if type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        return a == b
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_is_equal, a, b))
    if isinstance(a, np.ndarray) or host.is_eager(a):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return False
