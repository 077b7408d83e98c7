"""A model given where a method takes an engine: bound for the one call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from perjac.engine import Engine

_P = ParamSpec("_P")
_R = TypeVar("_R")


def takes_model(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function whose first argument is an engine take a model, or anything Engine takes.

    An engine is made for the call, which traces the model: for several calls make one yourself.
    """

    @functools.wraps(method)
    def taking(*arguments: Any, **named: Any) -> Any:
        if arguments:
            arguments = (_bound(arguments[0]), *arguments[1:])
        elif "engine" in named:
            named["engine"] = _bound(named["engine"])
        return method(*arguments, **named)

    return taking


def _bound(model: Any) -> Any:
    return model if isinstance(model, Engine) else Engine(model)
