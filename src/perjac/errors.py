"""Every error and warning perjac raises, each also the built-in its caller would expect.

A message says what was wrong, where, and what to do. This module knows nothing of TensorFlow.
"""

from __future__ import annotations

import difflib
import operator
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from typing import Any


class PerjacError(Exception):
    """Base of every error that perjac raises."""

    # Named here, as AutoGraph raises again, from inside a tf.function, only what has this one.
    __init__ = Exception.__init__


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


class NoGradientError(PerjacError, LookupError):
    """An operation that TensorFlow has no gradient for, on the way to the output."""


class PathError(PerjacError, ValueError):
    """`path="factored"` was asked of a weight that no rule covers."""


class InsideError(PerjacError, RuntimeError):
    """Something that cannot be answered inside a function that TensorFlow is tracing."""


class TooLargeError(PerjacError, MemoryError):
    """A result that does not fit into the memory limit."""


class NotPicklableError(PerjacError, TypeError):
    """An engine was to be pickled or copied."""


class NotPositiveError(PerjacError, ArithmeticError, ValueError):
    """A matrix that has to be positive definite, or semi-definite, and is not."""


class NotConvergedError(PerjacError, ArithmeticError):
    """An iteration that did not come to its end."""


class CertificateError(PerjacError, ArithmeticError):
    """A derivative that does not agree with the model's own, and that no path computes."""


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


class CertificateWarning(PerjacWarning):
    """A derivative did not agree with the model's own: the tape path computes it from now on."""


class CacheWarning(PerjacWarning):
    """What was measured cannot be kept for the next time."""


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


def warn(message: str, kind: type[PerjacWarning]) -> None:
    """Warn, as of the line outside this package from which the package was called."""
    ours = os.path.dirname(__file__) + os.sep
    callers = list(traceback.walk_stack(sys._getframe()))  # this function first
    outermost = max(n for n, (f, _) in enumerate(callers) if f.f_code.co_filename.startswith(ours))
    warnings.warn(message, kind, stacklevel=outermost + 2)


def warn_disconnected(output: str, keys: Sequence[str]) -> None:
    """Warn of what an output does not depend on."""
    names = ", ".join(map(repr, keys[:8]))
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    warn(
        f"The output {output!r} does not depend on {names}{more}: the Jacobian is zero there.",
        DisconnectedWarning,
    )


def check_one_of(value: Any, known: Sequence[Any], name: str) -> None:
    """Raise for an option that there is not.

    Raises
    ------
    InputError
        Naming the option and those that there are.
    """
    # 0 is not False, nor 1 True; and an array is equal to nothing.
    if not any(isinstance(value, type(one)) and value == one for one in known):
        raise InputError(f"Expected {name}= one of {known}. Received: {value!r}.")


def check_counts(least: int = 1, **counts: Any) -> None:
    """Raise for options that are no whole numbers of `least` or more.

    Raises
    ------
    InputError
        Naming the option.
    """
    for name, value in counts.items():
        if not is_count(value, least):
            raise InputError(f"Expected {name}= as an int of {least} or more. Received: {value!r}.")


def is_count(value: Any, least: int) -> bool:
    """Return whether a value is a whole number of at least so much."""
    try:
        return not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        return False


def missing_extra(feature: str, extra: str, cause: ImportError) -> MissingExtraError:
    """Return the error for a feature whose optional dependency is absent."""
    return MissingExtraError(
        f"{feature} needs {cause.name or 'a package'}, which is not installed. "
        f'Install it with: pip install "perjac[{extra}]"'
    )
