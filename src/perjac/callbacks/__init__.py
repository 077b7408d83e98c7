"""Callbacks of `model.fit`: what examples do to a model while it trains, to TensorBoard.

Know Keras's callbacks and `tf.summary`; must not touch the model, its optimizer or random numbers.
"""

from perjac.callbacks.gradient_statistics import GradientStatistics
from perjac.callbacks.saliency_maps import SaliencyMaps

__all__ = ["GradientStatistics", "SaliencyMaps"]
