"""Windows of a picture, laid out and summed over, are those that one cuts out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from perjac._core.factors.patches import Patches

SIZES = st.integers(1, 3)


def cut(x: np.ndarray, patches: Patches) -> np.ndarray:
    """Return every window, one number after another, (B, T, window·channels)."""
    at = [
        [
            x[(slice(None), *(t * s + w * d for t, s, w, d in zip(place, patches.strides, offset,
               patches.dilations, strict=True)))]
            for offset in itertools.product(*map(range, patches.window))
        ]
        for place in itertools.product(*map(range, patches.output))
    ]  # fmt: skip
    return np.stack([np.concatenate(windows, -1) for windows in at], 1)


@st.composite
def pictures(draw):
    """Return a picture of 1 to 3 dimensions whose windows just fit, or leave less than a stride."""
    rank = draw(st.integers(1, 3))
    window, strides, dilations, output = (tuple(draw(SIZES) for _ in range(rank)) for _ in range(4))
    left = [draw(st.integers(0, stride - 1)) for stride in strides]
    spatial = [
        (o - 1) * s + (w - 1) * d + 1 + n
        for o, s, w, d, n in zip(output, strides, window, dilations, left, strict=True)
    ]
    channels, seed = draw(st.sampled_from([1, 2, 5])), draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, *spatial, channels))
    return rng, x, Patches(tf.constant(x), window, strides, dilations, output, 1)


@settings(max_examples=40, deadline=None)
@given(pictures(), st.integers(1, 2))
def test_windows_and_their_sums_are_those_cut_by_hand(picture, count):
    rng, x, patches = picture
    windows = cut(x, patches)
    np.testing.assert_array_equal(patches.columns(), windows)
    delta = rng.standard_normal((3, count, math.prod(patches.output), 4))
    rows = np.einsum("bti,bkto->bkio", windows, delta)
    np.testing.assert_allclose(patches.rows(tf.constant(delta)), rows, rtol=1e-10, atol=1e-12)
    if patches.backward:
        summed = patches.summed(tf.constant(delta[:, 0]))
        np.testing.assert_allclose(summed, rows[:, 0].sum(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("channels", [3, 4, 16, 64, 65])
@pytest.mark.parametrize("count", [1, 3])
def test_rows_in_float32_agree_whatever_kernel_forms_them(channels, count):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 7, 6, channels)).astype("float32")
    delta = rng.standard_normal((5, count, 20, 3)).astype("float32")
    patches = Patches(tf.constant(x), (3, 3), (1, 1), (1, 1), (5, 4), 1)
    rows = np.einsum("bti,bkto->bkio", cut(x, patches), delta)
    found = tf.function(lambda d: patches.rows(d))(tf.constant(delta))  # as in a job, in a graph
    np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-4)


def test_positions_folded_into_the_batch_stay_with_their_example():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * 3, 5, 4, 2))  # two examples of three pictures
    patches = Patches(tf.constant(x), (2, 2), (1, 1), (1, 1), (4, 3), 3)
    windows = cut(x, patches).reshape(2, 3 * 12, 8)
    np.testing.assert_array_equal(patches.columns(), windows)
    np.testing.assert_array_equal(patches.example(1).columns(), windows[1:])
    delta = rng.standard_normal((2, 1, 36, 3))
    rows = np.einsum("bti,bkto->bkio", windows, delta)
    np.testing.assert_allclose(patches.rows(tf.constant(delta)), rows, rtol=1e-10)


@pytest.mark.parametrize("count", [1, 2])
def test_groups_of_channels_give_the_rows_where_they_run(count):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 6, 4, 3)).astype("float32")
    delta = rng.standard_normal((5, count, 5 * 2, 2)).astype("float32")
    patches = Patches(tf.constant(x), (2, 3), (1, 1), (1, 1), (5, 2), 1)
    try:
        found = patches._grouped(tf.constant(delta))
    except (tf.errors.OpError, ValueError):
        pytest.skip("this TensorFlow's backward pass takes no groups of channels")
    rows = np.einsum("bti,bkto->bkio", cut(x, patches), delta)
    np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-4)
