"""Relabellings: there and back again is the identity, whatever the chain."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from relabellings import chains

from perjac._core.backend.axis_layout import Relabelling


@settings(max_examples=60, deadline=None)
@given(layout=chains(), lead=st.integers(0, 2))
def test_invert_undoes_apply(layout, lead):
    x = np.arange(np.prod((*range(2, 2 + lead), *layout.shape))).reshape(
        *range(2, 2 + lead), *layout.shape
    )
    there = layout.apply(tf.constant(x), lead)
    assert tuple(there.shape[lead:]) == layout.target
    np.testing.assert_array_equal(layout.invert(there, lead), x)


@settings(max_examples=60, deadline=None)
@given(layout=chains())
def test_apply_and_invert_are_adjoint(layout):
    rng = np.random.default_rng(0)
    v, u = rng.standard_normal(layout.shape), rng.standard_normal(layout.target)
    there, back = layout.apply(tf.constant(v)), layout.invert(tf.constant(u))
    np.testing.assert_allclose(np.vdot(u, there), np.vdot(back, v), rtol=1e-12)


def test_a_reshape_that_loses_entries_is_refused():
    with pytest.raises(ValueError, match="Expected 6 entries"):
        Relabelling.of((2, 3)).reshape((4, 2))
