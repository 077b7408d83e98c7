"""Watching the layers inside a Keras model while it is called."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from perjac._core.backend.host import operations_within


@contextlib.contextmanager
def watching_calls(model: Any, seen: Callable[[str, Any], None]) -> Iterator[None]:
    """Report each inner layer's output, as `seen(layer name, output)`, while inside the block.

    `Operation.__call__` (Keras 3.0) looks `call` up on the instance, so a wrapper set there is
    reached for every kind of model; set with `object.__setattr__`, past Keras's own tracking.
    """
    wrapped = []
    try:
        for operation in operations_within(model):
            if "call" in vars(operation):
                continue  # somebody else's wrapper: leave it
            object.__setattr__(operation, "call", _reporting(operation, seen))
            wrapped.append(operation)
        yield
    finally:
        for operation in wrapped:
            object.__delattr__(operation, "call")


def _reporting(operation: Any, seen: Callable[[str, Any], None]) -> Callable[..., Any]:
    call = operation.call

    @functools.wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        seen(operation.name, output)
        return output

    return wrapper
