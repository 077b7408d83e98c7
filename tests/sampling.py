"""Of many cases of one kind `make test` takes some, `make more` the others, and CI both."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def every(step: int, cases: Iterable[Any]) -> list[Any]:
    """Return cases for `parametrize`, of which `make test` takes each so-and-so-many-th."""
    return [_more(case) if n % step else case for n, case in enumerate(cases)]


def but(left: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Return cases for `parametrize`, of which `make test` leaves some to `make more`."""
    return [_more(case) if case in left else case for case in cases]


def _more(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.more)
