"""What reaches the screen: perjac's own words only. Everything else goes to a log."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import IO, Any

from perjac import progress
from perjac.errors import PerjacWarning

# Seconds between two lines about the same part, where there is no terminal to draw a bar on.
_QUIET = 5.0


class Screen:
    """The terminal, as it was before TensorFlow could write to it."""

    def __init__(self, out: IO[str], err: IO[str]):
        self._out, self._err = out, err
        self._shown = ""

    def say(self, text: str) -> None:
        """Print a line."""
        self.show("")
        print(text, file=self._out, flush=True)

    def complain(self, text: str) -> None:
        """Print a line where errors go."""
        self.show("")
        print(text, file=self._err, flush=True)

    def show(self, words: str) -> None:
        """Show on a terminal, until the next words, what is being done; elsewhere nothing."""
        if self._out.isatty() and words != self._shown:
            self._out.write(f"\r\x1b[K{words.capitalize()} …" if words else "\r\x1b[K")
            self._out.flush()
            self._shown = words

    def track(self, parts: Sequence[Any], doing: str, of: str = "points") -> Iterator[Any]:
        """Yield the parts with progress bars on a terminal, and plain lines elsewhere.

        What the work on one part tells of itself is shown too, where it takes long; `of` says what
        it counts.
        """
        if self._out.isatty():
            yield from self._with_bars(parts, doing, of)
            return
        last = time.monotonic()

        def listen(done: int, total: int) -> None:
            nonlocal last
            if done < total and time.monotonic() - last > _QUIET:
                last = time.monotonic()
                self.say(f"{done:,} of {total:,} {of}")

        with progress.heard(listen):
            for number, part in enumerate(parts, 1):
                yield part
                if len(parts) > 1:
                    self.say(f"{doing}: {number} of {len(parts)}")

    def _with_bars(self, parts: Sequence[Any], doing: str, of: str) -> Iterator[Any]:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(file=self._out)) as bars:
            whole = bars.add_task(doing, total=len(parts))
            within = bars.add_task(of.capitalize(), visible=False)

            def listen(done: int, total: int) -> None:
                bars.update(within, completed=done, total=total, visible=done < total)

            def show(words: str) -> None:
                bars.update(whole, description=f"{doing} ({words})" if words else doing)

            with progress.heard(listen), progress.read(show):
                for part in parts:
                    yield part
                    bars.advance(whole)


@contextlib.contextmanager
def quiet(log: str | None) -> Iterator[Screen]:
    """Send whatever libraries write, C++ included, to a log file or nowhere.

    TensorFlow writes its start-up lines to the file descriptors themselves, so those are
    redirected; the Screen keeps copies of the real ones.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    real = os.dup(1), os.dup(2)
    sink = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    out, err = (os.fdopen(os.dup(fd), "w", encoding="utf-8") for fd in real)
    screen = Screen(out, err)
    shown = warnings.showwarning
    try:
        os.dup2(sink, 1)
        os.dup2(sink, 2)

        def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
            if issubclass(category, PerjacWarning):
                screen.complain(f"Warning: {message}")
            else:
                shown(message, category, *rest, **more)

        warnings.showwarning = show
        with progress.read(screen.show):
            yield screen
    finally:
        warnings.showwarning = shown
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(real[0], 1)
        os.dup2(real[1], 2)
        for fd in (*real, sink):
            os.close(fd)
        out.close()
        err.close()
