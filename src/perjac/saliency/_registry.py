"""Methods by name, each with those of the options given that it takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from perjac.errors import InputError, UnknownNameError, nearest
from perjac.saliency import METHODS


def choose(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """Return methods that take (engine, x), with the options bound.

    Parameters
    ----------
    names : sequence of str
        Of the methods.
    options : mapping
        By the names of the methods' arguments. Each goes to those methods that take it.

    Raises
    ------
    UnknownNameError
        If there is no such method.
    InputError
        If none of the methods takes an option, one lacks an option that it needs, or a method is
        named twice.
    """
    methods = {name: named(name) for name in names}
    if len(set(names)) < len(names) or not names:
        raise InputError(f"Expected different methods. Received: {', '.join(names) or 'none'}.")
    for option in options:
        if not any(takes(name, option) for name in names):
            able = [name for name in METHODS if takes(name, option)]
            others = f"Methods that take it: {', '.join(able)}." if able else "No method takes it."
            who = f"{names[0]} does" if len(names) == 1 else f"{', '.join(names)} do"
            raise InputError(f"{who} not take the option {option!r}. {others}")
    for name in names:
        missing = [option for option in _needed(name) if option not in options]
        if missing:
            raise InputError(f"{name} needs the option {missing[0]!r}.")
    return {
        name: functools.partial(
            method, **{o: value for o, value in options.items() if takes(name, o)}
        )
        for name, method in methods.items()
    }


def named(name: str) -> Callable[..., Any]:
    """Return a method by its name.

    Raises
    ------
    UnknownNameError
        If there is no such method.
    """
    if name not in METHODS:
        raise UnknownNameError(f"There is no method {name!r}. {nearest(str(name), METHODS)}")
    return METHODS[name]


def takes(method: str, option: str) -> bool:
    """Return whether a method has an argument of this name."""
    return option in inspect.signature(METHODS[method]).parameters


def _needed(method: str) -> list[str]:
    """Return the arguments that a method does not do without, after the engine and the examples."""
    parameters = list(inspect.signature(METHODS[method]).parameters.values())[2:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in named if p.default is p.empty]
