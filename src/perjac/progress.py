"""How far long work is: whoever works tells, whoever shows it listens; neither knows the other."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

Listener = Callable[[int, int], None]

_LISTENER: contextvars.ContextVar[Listener | None] = contextvars.ContextVar(
    "listener", default=None
)


@contextlib.contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """Have `listener(done, total)` called as work goes on inside the block.

    Examples
    --------
    >>> from perjac import progress
    >>> with progress.heard(lambda done, total: print(f"{done} of {total}")):
    ...     progress.tell(3, 10)
    3 of 10
    """
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tell(done: int, total: int) -> None:
    """Tell whoever listens how much is done."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(done, total)
