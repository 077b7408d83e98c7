"""Outputs and labels → the one number of each example that TRAK explains, and its pull.

Written as losses (y, output) -> (B,), so that the engine differentiates them like one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special
import tensorflow as tf

from perjac._core.backend.shapes import known
from perjac._core.model.losses import are_probabilities
from perjac.errors import InputError, OutOfRangeError

TASKS = ("classification", "regression")


@dataclasses.dataclass(frozen=True)
class Explained:
    """What is explained of a model's output.

    Attributes
    ----------
    function : callable (y, output) -> (B,)
        The output function f, the same object for the same question, so that nothing is traced
        anew.
    pull : callable (y, f) -> array (B,)
        -∂ℓ/∂f: how hard an example, with f as it is, pulls its own f up.
    """

    function: Callable[[Any, tf.Tensor], tf.Tensor]
    pull: Callable[[Any, np.ndarray], np.ndarray]


def explained(task: str, outputs: np.ndarray, from_logits: bool | None) -> Explained:
    """Return what is explained of a model with such outputs, or raise where it cannot be."""
    if task == "regression":
        if outputs[0].size != 1:
            raise InputError(
                "Expected one number for each example for task='regression'. The model's output "
                f"has the shape (B, {', '.join(map(str, outputs.shape[1:]))})."
            )
        return Explained(value, residual)
    if outputs.ndim != 2:
        raise InputError(
            "Expected the model's output as (B, classes). It has the shape "
            f"(B, {', '.join(map(str, outputs.shape[1:]))})."
        )
    if from_logits is None:
        from_logits = not are_probabilities(outputs, one_class_each=outputs.shape[1] > 1)
    return Explained(margin_of_logits if from_logits else margin_of_probabilities, doubt)


def check_labels(y: Any, outputs: np.ndarray, called: str) -> None:
    """Raise for labels that name a class which the output does not have."""
    labels, classes = np.asarray(y), outputs.shape[-1]
    if classes > 1 and labels.shape[1:] == (classes,):
        return
    if not labels.ndim or labels.size != len(labels):
        raise InputError(
            f"Expected {called} as (N,) class numbers, or (N, {classes}) one-hot. "
            f"Received: {labels.shape}."
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= max(classes, 2)))
    if wrong.size:
        raise OutOfRangeError(
            f"{called}[{wrong[0]}] is {labels.reshape(-1)[wrong[0]]:g}, but there are "
            f"{max(classes, 2)} classes, 0 to {max(classes, 2) - 1}."
        )


def margin_of_logits(y: Any, output: tf.Tensor) -> tf.Tensor:
    """f = log p / (1 - p) of the labelled class, which is z_y - log Σ_{c≠y} exp z_c.

    A single output is the logit of class 1, so that f is ± z.
    """
    (classes,) = known(output.shape[1:])
    if classes == 1:
        sign = 2 * tf.cast(tf.reshape(y, [-1]), output.dtype) - 1
        return sign * output[:, 0]
    y = tf.argmax(y, -1) if y.shape.rank == 2 and y.shape[-1] == classes else tf.reshape(y, [-1])
    hot = tf.one_hot(tf.cast(y, tf.int32), classes, on_value=True, off_value=False, dtype=tf.bool)
    others = tf.where(hot, tf.constant(-np.inf, output.dtype), output)
    own = tf.where(hot, output, tf.zeros_like(output))
    return tf.reduce_sum(own, 1) - tf.reduce_logsumexp(others, 1)


def margin_of_probabilities(y: Any, output: tf.Tensor) -> tf.Tensor:
    """f as of logits, which the logarithms of probabilities are.

    So 1 - p is formed for a single output only, where rounding makes it zero for p near 1.
    """
    if output.shape[-1] == 1:
        output = tf.concat([1 - output, output], 1)
    tiny = np.finfo(output.dtype.name).tiny
    return margin_of_logits(y, tf.math.log(tf.maximum(output, tiny)))


def value(y: Any, output: tf.Tensor) -> tf.Tensor:
    """f is the output itself."""
    del y
    return tf.reshape(output, [-1])


def doubt(y: Any, f: np.ndarray) -> np.ndarray:
    """1 - p for f = log p / (1 - p): -∂ℓ/∂f of ℓ = -log p."""
    del y
    return scipy.special.expit(-f)


def residual(y: Any, f: np.ndarray) -> np.ndarray:
    """y - f: -∂ℓ/∂f of ℓ = (y - f)² / 2."""
    return np.asarray(y, f.dtype).reshape(-1) - f
