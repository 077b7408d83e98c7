"""Xplique: integrated gradients and SmoothGrad of Keras models."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import serve
import tensorflow as tf
from jobs import SAMPLES, SIGMA, STEPS
from keras_net import VERSIONS, device, done, net
from serve import Way, Ways, Work
from xplique.attributions import IntegratedGradients, SmoothGrad

# As many points at once as all examples have, in place of 32.
_ALL = 32 * STEPS


def integrated_gradients(work: Work) -> Ways:
    def method(size):
        return IntegratedGradients(
            net(work), batch_size=size, reducer=None, steps=STEPS, baseline_value=0.0
        )

    # Ours are Gauss and Legendre's places on the line.
    return _ways(work, method, "trapezoid rule", tolerance=0.05)


def smoothgrad(work: Work) -> Ways:
    def method(size):
        return SmoothGrad(net(work), batch_size=size, reducer=None, nb_samples=SAMPLES, noise=SIGMA)

    return _ways(work, method)


def _ways(work: Work, method, note: str = "", tolerance: float | None = None) -> Ways:
    x = tf.constant(work.x)
    targets = tf.one_hot(work.y, work.about["outputs"])

    def way(size):
        explainer = method(size)

        def canonical(found):
            return [np.asarray(found).reshape(work.x.shape)]

        return Way(lambda: done(explainer.explain(x, targets)), canonical, note, tolerance)

    return {"": way(32), "all at once": way(_ALL)}


JOBS = {job.__name__: job for job in (integrated_gradients, smoothgrad)}

if __name__ == "__main__":
    serve.serve(JOBS, {"Xplique": importlib.metadata.version("xplique"), **VERSIONS}, device())
