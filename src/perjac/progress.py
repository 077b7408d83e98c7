"""How far long work is: whoever works tells, whoever shows it listens; neither knows the other.

Where it tells, what is done is whole: there it can be stopped, too.
"""

from __future__ import annotations

import contextlib
import contextvars
import signal
from collections.abc import Callable, Iterator
from typing import Any

Listener = Callable[[int, int], None]
Reader = Callable[[str], None]

_LISTENER: contextvars.ContextVar[Listener | None] = contextvars.ContextVar(
    "listener", default=None
)
_READER: contextvars.ContextVar[Reader | None] = contextvars.ContextVar("reader", default=None)
_WORDS: contextvars.ContextVar[str] = contextvars.ContextVar("words", default="")
_STOPPING: contextvars.ContextVar[list[bool] | None] = contextvars.ContextVar(
    "stopping", default=None
)


class Stopped(KeyboardInterrupt):
    """Raised by `tell` where work was asked to stop: what was told of is done, and nothing else."""


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


@contextlib.contextmanager
def stoppable(told: Callable[[], Any]) -> Iterator[None]:
    """Have Ctrl-C stop the work inside the block where it next tells how far it is.

    A second one stops it at once, as ever. `told` is called on the first.
    """
    asked: list[bool] = []

    def stop(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        told()

    try:
        before = signal.signal(signal.SIGINT, stop)
    except ValueError:  # another thread than the main one, which Ctrl-C does not reach
        yield
        return
    token = _STOPPING.set(asked)
    try:
        yield
    finally:
        _STOPPING.reset(token)
        signal.signal(signal.SIGINT, before)


def tell(done: int, total: int) -> None:
    """Tell whoever listens how much is done.

    Raises
    ------
    Stopped
        If there is more to do, and work was asked to stop.
    """
    listener = _LISTENER.get()
    if listener is not None:
        listener(done, total)
    if done < total and _STOPPING.get():
        raise Stopped


@contextlib.contextmanager
def read(reader: Reader) -> Iterator[None]:
    """Have `reader(words)` called as something long begins inside the block, "" as it ends.

    Examples
    --------
    >>> from perjac import progress
    >>> with progress.read(lambda words: print(repr(words))), progress.doing("tracing the model"):
    ...     pass
    'tracing the model'
    ''
    """
    token = _READER.set(reader)
    try:
        yield
    finally:
        _READER.reset(token)


@contextlib.contextmanager
def doing(words: str) -> Iterator[None]:
    """Tell whoever reads what is done inside the block, and at its end what it was part of."""
    reader = _READER.get()
    if reader is None:
        yield
        return
    token = _WORDS.set(words)
    reader(words)
    try:
        yield
    finally:
        _WORDS.reset(token)
        reader(_WORDS.get())
