"""Per-example Jacobians of TensorFlow/Keras models: the public names, nothing else.

Names load on first use, so that `import perjac` and `perjac --help` do not wait for TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from perjac._version import __version__

if TYPE_CHECKING:
    from perjac import callbacks, data, errors, fisher, saliency
    from perjac._core.model.inputs import call
    from perjac._core.model.variables import activation
    from perjac.engine import Engine
    from perjac.errors import PerjacError, PerjacWarning
    from perjac.gradients import Gradients
    from perjac.jacobian import Jacobian

_HOME = {
    "Engine": "perjac.engine",
    "Gradients": "perjac.gradients",
    "Jacobian": "perjac.jacobian",
    "PerjacError": "perjac.errors",
    "PerjacWarning": "perjac.errors",
    "activation": "perjac._core.model.variables",
    "call": "perjac._core.model.inputs",
}
_MODULES = {
    name: f"perjac.{name}" for name in ("callbacks", "data", "errors", "fisher", "saliency")
}

__all__ = [
    "Engine",
    "Gradients",
    "Jacobian",
    "PerjacError",
    "PerjacWarning",
    "__version__",
    "activation",
    "call",
    "callbacks",
    "data",
    "errors",
    "fisher",
    "saliency",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'perjac' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
