"""Fisher information and curvature: its kinds, forms, and what is done with them."""

from perjac.fisher.blocks import BlockForm
from perjac.fisher.evidence import Evidence, Fit
from perjac.fisher.ewc import ElasticWeightConsolidation, ElasticWeights
from perjac.fisher.form import Form
from perjac.fisher.influence_functions import Influence
from perjac.fisher.information import Fisher
from perjac.fisher.laplace import Laplace, laplace
from perjac.fisher.low_rank import LowRank
from perjac.fisher.matrix_free import Implicit
from perjac.fisher.natural_gradient import descend, natural_gradient
from perjac.fisher.ntk import ntk
from perjac.fisher.predictive import Predictive
from perjac.fisher.pruning import lowest, optimal_brain_damage, optimal_brain_surgeon, taylor
from perjac.fisher.regression import NTKRegression, kernel_condition, kernel_eigh
from perjac.fisher.serialization import load, save
from perjac.fisher.stochastic import (
    DiagonalEstimate,
    Estimate,
    SpectralDensity,
    hutchpp_trace,
    spectral_density,
    stochastic_diagonal,
    stochastic_effective_dimension,
    stochastic_logdet,
)

__all__ = [
    "BlockForm",
    "DiagonalEstimate",
    "ElasticWeightConsolidation",
    "ElasticWeights",
    "Estimate",
    "Evidence",
    "Fisher",
    "Fit",
    "Form",
    "Implicit",
    "Influence",
    "Laplace",
    "LowRank",
    "NTKRegression",
    "Predictive",
    "SpectralDensity",
    "descend",
    "hutchpp_trace",
    "kernel_condition",
    "kernel_eigh",
    "laplace",
    "load",
    "lowest",
    "natural_gradient",
    "ntk",
    "optimal_brain_damage",
    "optimal_brain_surgeon",
    "save",
    "spectral_density",
    "stochastic_diagonal",
    "stochastic_effective_dimension",
    "stochastic_logdet",
    "taylor",
]
