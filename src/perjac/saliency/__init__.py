"""Saliency: what in each input drives an output. One file for each family of methods."""

from perjac.saliency.attribution import Attribution
from perjac.saliency.gradients import gradient, input_x_gradient

METHODS = {method.__name__: method for method in (gradient, input_x_gradient)}

__all__ = ["METHODS", "Attribution", "gradient", "input_x_gradient"]
