"""What XLA compiles of the way from inputs to rows: chosen by option and device; and why it cannot.

Must not know models or graphs.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Iterable, Iterator

# TensorFlow's words for operations that XLA has no kernel for, and for the node that it fails at.
_UNSUPPORTED = re.compile(r" on XLA_\w+: (.+?) \(No registered")
_NODE = re.compile(r"\{\{node ([^}]+)\}\}")


_for_xla = contextvars.ContextVar("for_xla", default=False)


class NotForXla(Exception):
    """Raised where XLA cannot compile a model; it has to be traced anew to go without."""


@contextlib.contextmanager
def for_xla() -> Iterator[None]:
    """Trace for XLA, which lacks some of TensorFlow's kernels, and is slow at others."""
    token = _for_xla.set(True)
    try:
        yield
    finally:
        _for_xla.reset(token)


def is_for_xla() -> bool:
    """Tell whether what is being traced is for XLA."""
    return _for_xla.get()


def compiles_whole(jit: bool | str, devices: Iterable[str]) -> bool:
    """Tell whether all from inputs to factors is to be one program, of static shapes.

    On a CPU XLA's convolutions are 2 to 4 times slower than TensorFlow's, so that is for whoever
    asks; on a GPU it is the default.

    Parameters
    ----------
    jit : {"auto", True, False}
        As `Engine` takes it.
    devices : iterable of str
        The types of the devices there are: "CPU", "GPU".

    Examples
    --------
    >>> compiles_whole("auto", ["CPU"]), compiles_whole("auto", ["CPU", "GPU"])
    (False, True)
    >>> compiles_whole(True, ["CPU"]), compiles_whole(False, ["GPU"])
    (True, False)
    """
    return "GPU" in devices if jit == "auto" else bool(jit)


def why_not(failure: Exception) -> str:
    """Return the operation that XLA fails at, in a few words, from TensorFlow's error."""
    text = str(failure)
    found = _UNSUPPORTED.search(text)
    if found:
        return f"it has no kernel for {found[1]}"
    node = _NODE.search(text)
    where = f" (at {node[1]})" if node else ""
    return f"{type(failure).__name__}: {text.strip().partition(chr(10))[0][:200]}{where}"
