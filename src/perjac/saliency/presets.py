"""Methods' options: our defaults, and other libraries' by name; what is explicit wins."""

from __future__ import annotations

from typing import Any

from perjac.errors import InputError

# Captum 0.9, saliency 0.2 (PAIR), Xplique 2.0, tf-keras-vis 0.8, zennit 1.0. Ours are under None.
# None of them changes what is explained or its shape: channels are kept, nothing is rectified.
_NOISE = {
    None: {"samples": 50, "sigma": 0.15, "relative": True},
    "captum": {"samples": 5, "sigma": 1.0, "relative": False},
    "xplique": {"samples": 50, "sigma": 0.2, "relative": False},
    "pair": {"samples": 25, "sigma": 0.15, "relative": True},
    "zennit": {"samples": 20, "sigma": 0.1, "relative": True},
}
# tf-keras-vis takes no samples unless told to; its documentation shows 20.
_KERAS_VIS = {"samples": 20, "sigma": 0.2, "relative": True}
_IG: dict[Any, dict[str, Any]] = {
    None: {"baseline": 0.0, "steps": 50, "rule": "gausslegendre"},
    "captum": {},
    "xplique": {"rule": "riemann_trapezoid"},
    "pair": {"rule": "endpoint_mean", "steps": 25},
    "zennit": {"rule": "riemann_right", "steps": 20},
}
CONVENTIONS: dict[str, dict[Any, dict[str, Any]]] = {
    "integrated_gradients": _IG,
    "expected_gradients": {None: {"samples": 200}, "shap": {}, "captum": {"samples": 5}},
    "blur_ig": {
        None: {"steps": 50, "rule": "gausslegendre", "max_sigma": None, "spacing": "square"},
        "pair": {"steps": 100, "rule": "riemann_left", "max_sigma": 50.0, "spacing": "linear"},
    },
    "guided_ig": {
        None: {"baseline": 0.0, "steps": 200, "fraction": 0.25, "max_dist": 0.02},
        "pair": {},
    },
    "smoothgrad": {name: {"each": "signed", **rest} for name, rest in _NOISE.items()}
    | {
        "pair": {"each": "squared", **_NOISE["pair"]},
        "tf-keras-vis": {"each": "absolute", **_KERAS_VIS},
    },
    "smoothgrad_squared": _NOISE,
    "vargrad": _NOISE,
    "layer_conductance": {
        None: {"baseline": 0.0, "steps": 50, "rule": "gausslegendre", "derivative": "exact"},
        "captum": {"derivative": "differences"},
    },
    "internal_influence": {
        None: {"baseline": 0.0, "steps": 50, "rule": "gausslegendre"},
        "captum": {},
    },
}


def settle(method: str, convention: str | None, **given: Any) -> dict[str, Any]:
    """Return a method's options: those given that are not None, else the convention's, else ours.

    Raises
    ------
    InputError
        If the library named has no such method.
    """
    presets = CONVENTIONS[method]
    if convention not in presets:
        known = sorted(name for name in presets if name)
        raise InputError(f"Expected convention= one of {known}. Received: {convention!r}.")
    explicit = {name: value for name, value in given.items() if value is not None}
    return presets[None] | presets[convention] | explicit
