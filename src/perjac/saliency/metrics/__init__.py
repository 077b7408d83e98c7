"""Metrics: whether a map tells the truth about the model. Each takes what the method took."""

from perjac.saliency.metrics.comparison import Comparison, compare
from perjac.saliency.metrics.fidelity import Completeness, Infidelity, completeness, infidelity
from perjac.saliency.metrics.randomisation import Randomisation, parameter_randomisation
from perjac.saliency.metrics.removal import Curve, deletion, insertion
from perjac.saliency.metrics.sensitivity import Sensitivity, max_sensitivity

__all__ = [
    "Comparison",
    "Completeness",
    "Curve",
    "Infidelity",
    "Randomisation",
    "Sensitivity",
    "compare",
    "completeness",
    "deletion",
    "infidelity",
    "insertion",
    "max_sensitivity",
    "parameter_randomisation",
]
