"""tf-keras-vis: SmoothGrad of Keras models."""

from __future__ import annotations

import importlib.metadata

import serve
from jobs import SAMPLES, SIGMA
from keras_net import VERSIONS, device, net
from serve import Way, Ways, Work
from tf_keras_vis.saliency import Saliency
from tf_keras_vis.utils.scores import CategoricalScore


def smoothgrad(work: Work) -> Ways:
    saliency, score = Saliency(net(work), clone=False), CategoricalScore(work.y.tolist())
    # Its noise is a share of each example's range: the others' on average.
    flat = work.x.reshape(len(work.x), -1)
    share = SIGMA / float((flat.max(1) - flat.min(1)).mean())

    def run():
        return saliency(
            score, work.x, smooth_samples=SAMPLES, smooth_noise=share, keepdims=True,
            gradient_modifier=None, normalize_map=False,
        )  # fmt: skip

    return {"": Way(run, lambda found: [found])}


JOBS = {"smoothgrad": smoothgrad}

if __name__ == "__main__":
    version = importlib.metadata.version("tf-keras-vis")
    serve.serve(JOBS, {"tf-keras-vis": version, **VERSIONS}, device())
