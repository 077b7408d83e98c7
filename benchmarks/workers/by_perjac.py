"""perjac's way to each job."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import serve
import tensorflow as tf
from jobs import CLIP, SAMPLES, SIGMA, STEPS
from keras_net import LOSS, VERSIONS, device, done, net
from serve import Way, Ways, Work

import perjac as pj


def weights(engine: pj.Engine, work: Work) -> Way:
    x = tf.constant(work.x)

    def run():
        jac = engine.jacobian(x)
        return done([jac[key] for key in jac])

    return Way(run, _arrays)


def inputs(engine: pj.Engine, work: Work) -> Way:
    x = tf.constant(work.x)
    return Way(lambda: done([engine.jacobian(x, wrt="inputs")["inputs"]]), _arrays)


def jacobian_norms(engine: pj.Engine, work: Work) -> Way:
    x = tf.constant(work.x)
    return Way(lambda: done([engine.jacobian(x).norms()]), _arrays)


def gradients(engine: pj.Engine, work: Work) -> Way:
    grads = _gradients(engine, work)
    return Way(lambda: done(list(grads().values())), _arrays)


def gradient_norms(engine: pj.Engine, work: Work) -> Way:
    grads = _gradients(engine, work)
    return Way(lambda: done([grads().norms()]), _arrays)


def clipped_sum(engine: pj.Engine, work: Work) -> Way:
    grads = _gradients(engine, work)
    return Way(lambda: done(list(grads().clipped_sum(CLIP).values())), _arrays)


def ggn_diagonal(engine: pj.Engine, work: Work) -> Way:
    def canonical(form):
        keys = form.columns.slices
        flat = form.diagonal()
        shapes = [variable.shape for variable in net(work).trainable_variables]
        return [flat[keys[k]].reshape(s) for k, s in zip(form.keys, shapes, strict=True)]

    return Way(lambda: engine.fisher(work.x).diagonal(), canonical)


def kfac(engine: pj.Engine, work: Work) -> Way:
    def canonical(form):
        shapes = [variable.shape for variable in net(work).trainable_variables]
        for block, shape in zip(form.blocks.values(), shapes, strict=True):
            if len(shape) > 1:
                a, b = block.left[0], block.right[0]
                yield from (a / np.trace(a), b / np.trace(b), np.trace(a) * np.trace(b))

    return Way(lambda: engine.fisher(work.x).kronecker(), canonical)


def ntk(engine: pj.Engine, work: Work) -> Way:
    x = tf.constant(work.x)
    return Way(lambda: done([engine.jacobian(x).gram()]), _arrays)


def integrated_gradients(engine: pj.Engine, work: Work) -> Way:
    def run():
        target = pj.saliency.integrated_gradients(engine, work.x, work.y, baseline=0.0, steps=STEPS)
        return done([target.values])

    return Way(run, _arrays)


def smoothgrad(engine: pj.Engine, work: Work) -> Way:
    def run():
        found = pj.saliency.smoothgrad(
            engine, work.x, work.y, samples=SAMPLES, sigma=SIGMA, relative=False
        )
        return done([found.values])

    return Way(run, _arrays)


def _gradients(engine: pj.Engine, work: Work):
    x, y = tf.constant(work.x), tf.constant(work.y)
    return lambda: engine.gradients(x, y, loss=LOSS)


def _arrays(answer) -> list[np.ndarray]:
    return [np.asarray(part) for part in answer]


@functools.cache
def _engine(model, autotune: bool) -> pj.Engine:
    return pj.Engine(model, autotune=autotune)


# Jobs that no schedule is chosen for: their sweeps are those of maps.
_UNTUNED = (integrated_gradients, smoothgrad)


def _both(job: Callable[[pj.Engine, Work], Way], work: Work) -> Ways:
    """Every job as it comes, and with schedules chosen by trial."""
    tuned = {} if job in _UNTUNED else {"autotune": job(_engine(net(work), True), work)}
    return {"": job(_engine(net(work), False), work), **tuned}


JOBS = {
    job.__name__: functools.partial(_both, job)
    for job in (
        weights, inputs, jacobian_norms, gradients, gradient_norms, clipped_sum, ggn_diagonal, kfac,
        ntk, integrated_gradients, smoothgrad,
    )
}  # fmt: skip

if __name__ == "__main__":
    serve.serve(JOBS, {"perjac": pj.__version__, **VERSIONS}, device())
