"""Backward steps of our own against TensorFlow's, operation by operation."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from perjac._core.graph.thin_convolutions import quickened

RNG = np.random.default_rng(0)


def both(function, *specs):
    """Return TensorFlow's gradient function and ours, and which operations have ours."""
    traced = tf.function(function, autograph=False).get_concrete_function(*specs)
    plain = traced.graph.as_graph_def()
    ours = quickened(traced.graph, plain)
    output = traced.outputs[0].name

    def gradient(graph_def):
        @tf.function(autograph=False)
        def pull(inputs, dy):
            feed = {t.name: value for t, value in zip(traced.inputs, inputs, strict=True)}
            (y,) = tf.graph_util.import_graph_def(graph_def, feed, [output])
            return tf.gradients(y, inputs, dy)

        return pull

    marked = {
        n.op: n.attr["_gradient_op_type"].s for n in ours.node if "_gradient_op_type" in n.attr
    }
    return gradient(plain), gradient(ours), marked


def check(function, *values, quick=True):
    """Check that all gradients are TensorFlow's, and that they are ours where they should be."""
    specs = [tf.TensorSpec([None, *values[0].shape[1:]], values[0].dtype)]
    specs += [tf.TensorSpec(v.shape, v.dtype) for v in values[1:]]
    theirs, ours, marked = both(function, *specs)
    assert bool(marked) is quick
    inputs = [tf.constant(v) for v in values]
    dy = RNG.normal(size=function(*inputs).shape).astype(values[0].dtype)
    for expected, found in zip(theirs(inputs, dy), ours(inputs, dy), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", ["VALID", "SAME", "EXPLICIT"])
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.integers(1, 4),
    st.integers(1, 5),
)
@settings(max_examples=12, deadline=None)
def test_convolutions_of_few_channels(padding, extra, window, channels, more):
    compare(padding, 2, extra, window, channels, more)


# Every parity of a window's sides, which padding is dealt out by; and no examples.
@pytest.mark.parametrize("padding", ["VALID", "SAME", "EXPLICIT"])
@pytest.mark.parametrize("window", [(2, 3), (3, 4), (4, 2), (1, 5)])
@pytest.mark.parametrize("batch", [0, 3])
def test_convolutions_by_the_parity_of_their_windows(batch, window, padding):
    compare(padding, batch, (5, 4), window, 2, 3)


def compare(padding, batch, extra, window, channels, more):
    x = RNG.normal(size=(batch, *(e + w - 1 for e, w in zip(extra, window, strict=True)), channels))
    kernel = RNG.normal(size=(*window, channels, channels + more))
    if padding == "EXPLICIT":
        padding = [[0, 0], *RNG.integers(0, 4, (2, 2)).tolist(), [0, 0]]
    check(lambda x, w: tf.nn.conv2d(x, w, 1, padding), x, kernel)


@pytest.mark.parametrize("options", [{"strides": 2}, {}])
def test_other_convolutions_are_left_to_tensorflow(options):
    channels = 2 if options else 5
    x, kernel = RNG.normal(size=(2, 6, 6, channels)), RNG.normal(size=(2, 2, channels, 8))
    options = {"strides": 1, "padding": "VALID"} | options
    check(lambda x, w: tf.nn.conv2d(x, w, **options), x, kernel, quick=False)
