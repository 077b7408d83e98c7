"""What was measured once, remembered in the user's cache folder.

One small JSON file for each thing. `PERJAC_CACHE` names another folder, or is "off". What cannot be
read counts as not there. Must not know what is remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

import platformdirs

from perjac.errors import CacheWarning, warn

SETTING = "PERJAC_CACHE"


def folder() -> pathlib.Path | None:
    """Return where things are remembered, or None where that is switched off.

    Examples
    --------
    >>> import os
    >>> before = os.environ.get("PERJAC_CACHE", "")
    >>> os.environ["PERJAC_CACHE"] = "off"
    >>> folder() is None
    True
    >>> os.environ["PERJAC_CACHE"] = before
    """
    setting = os.environ.get(SETTING, "")
    if setting.lower() == "off":
        return None
    return pathlib.Path(setting or platformdirs.user_cache_dir("perjac"))


def recall(kind: str, key: dict[str, Any]) -> dict[str, Any] | None:
    """Return what was remembered under a key, if anything."""
    place = _place(kind, key)
    if place is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(place.read_text())
        if isinstance(found, dict) and found.get("key") == _plain(key):
            return found.get("value")
    return None


def remember(kind: str, key: dict[str, Any], value: dict[str, Any]) -> None:
    """Remember something under a key, in place of what was there.

    Warns
    -----
    CacheWarning
        If the folder cannot be written to: it will be measured again.
    """
    place = _place(kind, key)
    if place is None:
        return
    text = json.dumps({"key": key, "value": value}, indent=1)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, place)  # whole, or not at all: other processes read here
    except OSError as failure:
        warn(
            f"What was measured cannot be kept for the next time: {failure}. Set {SETTING} to a "
            f"folder that can be written to, or to 'off'.",
            CacheWarning,
        )


def _place(kind: str, key: dict[str, Any]) -> pathlib.Path | None:
    where = folder()
    if where is None:
        return None
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return where / kind / f"{name}.json"


def _plain(key: dict[str, Any]) -> Any:
    """A key as it comes back from a file: tuples are lists there."""
    return json.loads(json.dumps(key))
