"""Saliency: what in each input drives an output. One file for each family of methods."""

from perjac.saliency import metrics
from perjac.saliency.attribution import Attribution
from perjac.saliency.blur_ig import blur_ig
from perjac.saliency.cam import gradcam, gradcam_plus_plus, layercam
from perjac.saliency.conductance import internal_influence, layer_conductance
from perjac.saliency.deeplift import deeplift
from perjac.saliency.gradients import gradient, input_x_gradient
from perjac.saliency.guided_backprop import deconvnet, guided_backprop
from perjac.saliency.guided_ig import guided_ig
from perjac.saliency.integrated_gradients import expected_gradients, integrated_gradients
from perjac.saliency.lrp import lrp
from perjac.saliency.metrics import (
    compare,
    completeness,
    deletion,
    infidelity,
    insertion,
    max_sensitivity,
    parameter_randomisation,
)
from perjac.saliency.occlusion import occlusion
from perjac.saliency.smoothgrad import smoothgrad, smoothgrad_squared, vargrad
from perjac.saliency.xrai import xrai

METHODS = {
    method.__name__: method
    for method in (
        gradient,
        input_x_gradient,
        gradcam,
        gradcam_plus_plus,
        layercam,
        occlusion,
        blur_ig,
        internal_influence,
        layer_conductance,
        guided_ig,
        smoothgrad,
        smoothgrad_squared,
        vargrad,
        expected_gradients,
        integrated_gradients,
        xrai,
        guided_backprop,
        deconvnet,
        lrp,
        deeplift,
    )
}

__all__ = [
    "Attribution",
    "METHODS",
    "blur_ig",
    "compare",
    "completeness",
    "deconvnet",
    "deeplift",
    "deletion",
    "expected_gradients",
    "gradcam",
    "gradcam_plus_plus",
    "gradient",
    "guided_backprop",
    "guided_ig",
    "infidelity",
    "input_x_gradient",
    "insertion",
    "integrated_gradients",
    "internal_influence",
    "layer_conductance",
    "layercam",
    "lrp",
    "max_sensitivity",
    "metrics",
    "occlusion",
    "parameter_randomisation",
    "smoothgrad",
    "smoothgrad_squared",
    "vargrad",
    "xrai",
]
