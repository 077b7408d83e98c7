"""A model that only Keras can say, as a function of its weights, on JAX's or torch's backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from models import MODELS
from serve import Work


def stateless(work: Work, backend: str) -> tuple[Callable, list[Any]]:
    """Return (weights, batch) -> outputs, and the run's weights that are trained."""
    os.environ["KERAS_BACKEND"] = backend
    import keras

    if backend == "torch" and len(work.about["shape"]) == 3:
        # As torch lays pictures out; and its convolutions' other way cannot be mapped over.
        keras.config.set_image_data_format("channels_first")
    net = MODELS[work.about["model"]].keras()
    net.set_weights(work.weights)
    fixed = [v.value for v in net.non_trainable_variables]

    def outputs(weights, batch):
        return net.stateless_call(weights, fixed, batch, training=False)[0]

    return outputs, [v.value for v in net.trainable_variables]
