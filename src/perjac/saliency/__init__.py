"""Saliency: what in each input drives an output. One file for each family of methods."""

from perjac.saliency.attribution import Attribution
from perjac.saliency.gradients import gradient

METHODS = {"gradient": gradient}

__all__ = ["METHODS", "Attribution", "gradient"]
