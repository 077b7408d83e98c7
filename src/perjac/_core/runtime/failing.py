"""What to do where the factored path fails: another way, or the user's own error.

Must not know models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import tensorflow as tf

from perjac._core.backend.xla import NotForXla
from perjac._core.graph import failures
from perjac.errors import PerjacError


class Failed(Exception):
    """Raised where the factored path fails; its cause tells how."""


@contextlib.contextmanager
def failing(last: bool) -> Iterator[None]:
    """Have what fails in the block raise Failed, unless there is no other way to go."""
    try:
        yield
    except (NotForXla, PerjacError, tf.errors.ResourceExhaustedError):
        raise
    except Exception as failure:  # TensorFlow raises whatever an odd graph runs into
        if failures.is_users(failure):
            raise
        if last and not isinstance(failure, LookupError):  # that is explained further up
            raise
        raise Failed from failure
