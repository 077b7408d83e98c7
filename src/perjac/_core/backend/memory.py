"""How much memory a result may take."""

from __future__ import annotations

import numbers
import os
import re
from typing import Any

from perjac.errors import InputError, TooLargeError

# Of what is free: the rest is for TensorFlow's own intermediates.
_SHARE = 0.8
# What is never too large, unless a limit is set: asking how much is free takes longer.
SMALL = 2**26
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def limit(setting: int | str | None) -> int | None:
    """Return a memory limit in bytes: as given, or a share of what is free now.

    >>> limit("4GiB")
    4294967296
    """
    if setting is None:
        free = available()
        return None if free is None else int(_SHARE * free)
    given, setting = setting, _bytes(setting)
    if setting is None:
        raise InputError(
            f"Expected memory_limit like '4GiB', or a whole number of bytes. Received: {given!r}."
        )
    if setting <= 0:
        raise InputError(f"Expected memory_limit above zero. Received: {given!r}.")
    return setting


def _bytes(setting: Any) -> int | None:
    """Return a size in bytes, or None for what is none."""
    if isinstance(setting, str):
        parts = re.fullmatch(
            r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([KMGT]?)i?B?\s*", setting, re.IGNORECASE
        )
        return int(float(parts[1]) * _UNITS[parts[2].upper()]) if parts else None
    if isinstance(setting, bool) or not isinstance(setting, numbers.Real):
        return None
    if isinstance(setting, numbers.Integral):
        return int(setting)
    return int(float(setting)) if float(setting).is_integer() else None


def available() -> int | None:
    """Return the bytes of memory that are free on this machine, or None where it cannot be told."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return None
    except OSError:
        names = getattr(os, "sysconf_names", {})
        if "SC_AVPHYS_PAGES" not in names:
            return None
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check(needed: int, setting: int | str | None, what: str, instead: str) -> None:
    """Raise TooLargeError, saying what is too large and what to ask instead, above the limit."""
    if setting is None and needed <= SMALL:
        return
    allowed = limit(setting)
    if allowed is not None and needed > allowed:
        raise TooLargeError(
            f"{what} would take {readable(needed)}, more than the limit of {readable(allowed)}. "
            f"{instead}"
        )


def readable(size: float) -> str:
    """Return a size in bytes for people: 1.4 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
