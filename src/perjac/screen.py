"""What a command says: results on stdout, notes and progress on stderr, and nothing else.

TensorFlow writes to the file descriptors 1 and 2 from C++, past sys.stdout and sys.stderr. So the
descriptors themselves are pointed at the log, and perjac speaks through copies of the old ones.
Knows no models and no data; imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from perjac.errors import PerjacError, PerjacWarning

DONE, VERIFICATION_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
# Off a terminal a line of progress at most this often, in seconds.
_PATIENCE = 2.0


class Screen:
    """Where perjac's own words go.

    Parameters
    ----------
    out, err : text streams
        For results, and for notes and progress.
    """

    def __init__(self, out: IO[str], err: IO[str]):
        self._out, self._err = out, err
        self._console: Any = None  # rich's, while a progress bar is up
        self._warned: set[str] = set()

    def say(self, text: str) -> None:
        """Print a result."""
        self._print(text, self._out)

    def note(self, text: str) -> None:
        """Print what is going on, or what was assumed."""
        self._print(text, self._err)

    def warn(self, text: str) -> None:
        """Print a warning, once."""
        if text not in self._warned:
            self._warned.add(text)
            self.note(f"warning: {text}")

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yield `advance(n)`: a bar on a terminal, a line now and then elsewhere."""
        if not self._err.isatty():
            yield self._lines(what, total)
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        console = Console(file=self._err)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining()
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total)
            self._console = console
            try:
                yield lambda n: bar.advance(task, n)
            finally:
                self._console = None

    def _lines(self, what: str, total: int) -> Callable[[int], None]:
        done, spoken = 0, time.monotonic()

        def advance(n: int) -> None:
            nonlocal done, spoken
            done += n
            if done == total or time.monotonic() - spoken > _PATIENCE:
                self.note(f"{what}: {done} of {total}")
                spoken = time.monotonic()

        return advance

    def _print(self, text: str, stream: IO[str]) -> None:
        if self._console is not None:  # above the bar
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        print(text, file=stream, flush=True)


@contextlib.contextmanager
def session(log: Path | None) -> Iterator[Screen]:
    """Run a command: everything native goes to `log`, every error becomes a line and a status.

    Parameters
    ----------
    log : Path or None
        A file for TensorFlow's words and for tracebacks; None drops them.

    Yields
    ------
    Screen

    Raises
    ------
    SystemExit
        With the exit status, where something went wrong: 2 for bad input, 130 if interrupted.
    """
    status = DONE
    with _redirected(log) as screen:
        try:
            with _own_warnings(screen):
                yield screen
        except KeyboardInterrupt:
            screen.note("Interrupted.")
            status = INTERRUPTED
        except BrokenPipeError:  # the reader has had enough: perjac inspect | head
            status = BAD_INPUT
        except (PerjacError, OSError, MemoryError) as error:
            screen.note(f"perjac: {_first_words(error)}")
            status = BAD_INPUT
        except Exception as error:
            traceback.print_exc()  # to the log
            screen.note(
                f"perjac: unexpected {type(error).__name__}: {_first_words(error)}\n"
                "This looks like a bug in perjac. --log FILE keeps the details."
            )
            status = BAD_INPUT
    if status:
        raise SystemExit(status)


def _first_words(error: BaseException) -> str:
    """Return an error's message in a few lines: TensorFlow's go on for pages."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return "\n".join(lines[:6])


@contextlib.contextmanager
def _redirected(log: Path | None) -> Iterator[Screen]:
    try:
        target = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as error:
        print(f"perjac: Cannot write the log {str(log)!r}: {error.strerror}.", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from error
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    streams = _copy_of(sys.stdout, 1, saved[0]), _copy_of(sys.stderr, 2, saved[1])
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        yield Screen(*streams)
    finally:
        # What is still in the buffers belongs to the log.
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(BrokenPipeError):
            streams[0].flush()
            streams[1].flush()
        for number, old in enumerate(saved, start=1):
            os.dup2(old, number)
            os.close(old)
        os.close(target)


def _copy_of(stream: IO[str], number: int, copy: int) -> IO[str]:
    """Return a stream on the descriptor's copy, or `stream` itself where it is no descriptor."""
    try:
        if stream.fileno() != number:
            return stream
    except (OSError, ValueError, AttributeError):  # replaced, by a test or a notebook
        return stream
    return open(copy, "w", encoding=stream.encoding, errors="replace", closefd=False)


@contextlib.contextmanager
def _own_warnings(screen: Screen) -> Iterator[None]:
    """Show perjac's warnings as lines; send all others to the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", PerjacWarning)
        to_log = warnings.showwarning

        def show(message: Any, category: Any, *where: Any, **more: Any) -> None:
            if issubclass(category, PerjacWarning):
                screen.warn(str(message))
            else:
                to_log(message, category, *where, **more)

        warnings.showwarning = show
        yield
