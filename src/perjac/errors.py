"""Every error and warning perjac raises, each also the built-in its caller would expect.

A message says what was wrong, where, and what to do. This module knows nothing of TensorFlow.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PerjacError(Exception):
    """Base of every error that perjac raises."""


class InputError(PerjacError, ValueError):
    """Data, shapes or options that do not fit the model or the call."""


class NotAModelError(PerjacError, TypeError):
    """Something that cannot be differentiated was given for a model."""


class NotBuiltError(PerjacError, ValueError):
    """A model without weights yet: it has not seen an input shape."""


class NotFiniteError(PerjacError, ValueError):
    """NaN or Inf in the inputs, the weights or the outputs."""


class ExamplesMeetError(PerjacError, ValueError):
    """An example influences another, so a per-example derivative has no meaning."""


class OutOfRangeError(PerjacError, IndexError, ValueError):
    """A chosen output or target that the model does not have."""


class UnknownNameError(PerjacError, KeyError):
    """A weight, layer, head or input name that does not exist, or fits several."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class IntegerInputError(PerjacError, TypeError):
    """A derivative with respect to an integer input was asked for."""


class PathError(PerjacError, ValueError):
    """`path="factored"` was asked of a weight that no rule covers."""


class TooLargeError(PerjacError, MemoryError):
    """A result that does not fit into the memory limit."""


class MissingExtraError(PerjacError, ImportError):
    """A feature whose optional extra is not installed."""


class FileFormatError(PerjacError, ValueError):
    """A model or data file that cannot be read."""


class PerjacWarning(UserWarning):
    """Base of every warning that perjac gives."""


class DisconnectedWarning(PerjacWarning):
    """The outputs asked for do not depend on something asked about: its Jacobian is zero."""


class LossWarning(PerjacWarning):
    """A loss that does not seem to fit the outputs it is given."""


class LostGradientWarning(PerjacWarning):
    """A file does not hold the custom gradients of its model: plain ones take their place."""


class SlowPathWarning(PerjacWarning):
    """A slower way was taken, and why."""


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return a sentence naming the known names closest to `name`, for an error message.

    >>> nearest("dens", ["dense", "conv"])
    "Nearest: 'dense'."
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.4) or known[:limit]
    if not close:
        return "There are none."
    return "Nearest: " + ", ".join(repr(c) for c in close) + "."


def missing_extra(feature: str, extra: str, cause: ImportError) -> MissingExtraError:
    """Return the error for a feature whose optional dependency is absent."""
    return MissingExtraError(
        f"{feature} needs {cause.name or 'a package'}, which is not installed. "
        f'Install it with: pip install "perjac[{extra}]"'
    )
