"""Not a peer but two floors: filling memory of the answer's size, and one ordinary gradient.

Every answer must be written, and every per-example gradient needs the arithmetic of the gradient of
the batch's mean loss.
"""

from __future__ import annotations

import serve
import tensorflow as tf
from jobs import FILL, PLAIN
from keras_net import LOSS, VERSIONS, device, done, net
from serve import Way, Ways, Work


def weights(work: Work) -> Ways:
    model = net(work)
    rows = (len(work.x), model.output_shape[-1])
    return _filled([(*rows, *v.shape) for v in model.trainable_variables])


def inputs(work: Work) -> Ways:
    return _filled([(len(work.x), net(work).output_shape[-1], *work.x.shape[1:])])


def gradients(work: Work) -> Ways:
    sizes = [(len(work.x), *v.shape) for v in net(work).trainable_variables]
    return {**_filled(sizes), **gradient(work)}


def ntk(work: Work) -> Ways:
    return _filled([(len(work.x), net(work).output_shape[-1]) * 2])


def gradient(work: Work) -> Ways:
    model, x, y = net(work), tf.constant(work.x), tf.constant(work.y)

    @tf.function(autograph=False)
    def plain():
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=False))
        return tape.gradient(loss, model.trainable_variables)

    return {PLAIN: Way(lambda: done(plain()))}


def _filled(sizes: list[tuple[int, ...]]) -> Ways:
    return {FILL: Way(lambda: done([tf.fill(size, 1.0) for size in sizes]))}


JOBS = {"weights": weights, "inputs": inputs, "gradients": gradients, "ntk": ntk}
JOBS |= dict.fromkeys(("gradient_norms", "clipped_sum", "ggn_diagonal", "kfac"), gradient)

if __name__ == "__main__":
    serve.serve(JOBS, VERSIONS, device())
