"""The Keras model of a run, for the workers on TensorFlow."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from models import MODELS
from serve import Device, Work

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
VERSIONS = {"tensorflow": tf.__version__, "keras": keras.__version__}
tf.get_logger().setLevel("ERROR")  # pfor tells of every while loop
_models: dict[str, keras.Model] = {}


def net(work: Work) -> keras.Model:
    """Return the model with the run's weights."""
    name = work.about["model"]
    if name not in _models:
        _models[name] = MODELS[name].keras()
        _models[name].set_weights(work.weights)
    return _models[name]


def device() -> Device:
    """Return the processor, by what TensorFlow's allocator gives out.

    With oneDNN it keeps what is given back, so what is resident would be the most that any job
    before took. Elsewhere it is what is resident.
    """
    config, plain = tf.config.experimental, Device()
    try:
        config.get_memory_info("CPU:0")
    except ValueError:
        return plain
    idle_mb = plain.resident_mb()

    def counted(which):
        return lambda: idle_mb + config.get_memory_info("CPU:0")[which] / 1e6

    return Device(
        forget=lambda: config.reset_memory_stats("CPU:0"),
        peak_mb=counted("peak"),
        resident_mb=counted("current"),
    )


def done(answer: object) -> object:
    """Wait until every tensor of an answer is there."""
    tf.test.experimental.sync_devices()
    return answer
