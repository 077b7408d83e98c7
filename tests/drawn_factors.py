"""Random factors of every kind, and their rows by formulas written out here."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from perjac._core.backend.axis_layout import Relabelling
from perjac._core.factors import Explicit, Grouped, Lookup, Outer, Sum, Zero
from perjac._core.factors.patches import Patches

KINDS = ["explicit", "zero", "outer", "outer_over_positions", "patches", "grouped", "lookup", "sum"]


class Draw:
    """Random numbers in float64, and a factor of each kind made of them."""

    def __init__(self, seed: int, sizes: tuple[int, ...]):
        self.rng = np.random.default_rng(seed)
        self.batch, self.count, self.t, self.g, self.i, self.o = sizes

    def numbers(self, *shape: int) -> tf.Tensor:
        return tf.constant(self.rng.standard_normal(shape))

    def factor(self, kind: str):
        return getattr(self, kind)()

    def explicit(self):
        layout = Relabelling.of((self.i, self.o)).transpose((1, 0))
        return Explicit(layout, self.numbers(self.batch, self.count, self.o, self.i))

    def zero(self):
        return Zero(Relabelling.of((self.i, self.o)), self.numbers(self.batch, self.count, 0))

    def outer(self, positions: int = 1):
        # The weight lies transposed, and with an axis more, on the user's side.
        layout = Relabelling.of((self.o, self.i, 1)).transpose((1, 0, 2))
        return Outer(
            layout.reshape((self.i, self.o)),
            self.numbers(self.batch, positions, self.i),
            self.numbers(self.batch, self.count, positions, self.o),
        )

    def outer_over_positions(self):
        return self.outer(self.t + 1)

    def patches(self):
        x = self.numbers(self.batch, self.t + 3, 5, self.i)
        seen = Patches(x, (2, 2), (1, 2), (1, 2), (self.t + 2, 2), 1)
        delta = self.numbers(self.batch, self.count, 2 * (self.t + 2), self.o)
        return Outer(Relabelling.of((4 * self.i, self.o)), seen, delta)

    def grouped(self):
        layout = Relabelling.of((self.i, self.g, self.o)).transpose((1, 0, 2))
        return Grouped(
            layout,
            self.numbers(self.batch, self.t, self.g, self.i),
            self.numbers(self.batch, self.count, self.t, self.g, self.o),
        )

    def lookup(self):
        ids = tf.constant(self.rng.integers(0, self.i, (self.batch, self.t + 2)), tf.int32)
        delta = self.numbers(self.batch, self.count, self.t + 2, self.o)
        return Lookup(Relabelling.of((self.i, self.o)), ids, delta)  # ids repeat

    def sum(self):
        plain = Relabelling.of((self.i, self.o))
        outer = self.outer()
        return Sum(plain, (self.lookup(), Outer(plain, outer.a, outer.delta)))


SIZES = st.tuples(*[st.integers(1, n) for n in (4, 3, 4, 3, 4, 5)])
SHAPES = given(seed=st.integers(0, 10**6), sizes=SIZES)


def by_kind(test):
    return pytest.mark.parametrize("kind", KINDS)(settings(max_examples=5, deadline=None)(test))


def close(found, expected):
    expected = np.asarray(expected)
    scale = np.max(np.abs(expected), initial=0)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12 * max(scale, 1))


def plain(kind: str, draw: Draw):
    """Return a factor and its rows (B, K, *W.shape) formed by a formula written out here."""
    factor = draw.factor(kind)
    return factor, rows_of(factor)


def rows_of(factor) -> np.ndarray:
    lead = (np.shape(factor.delta)[:2]) if hasattr(factor, "delta") else None
    if isinstance(factor, Sum):
        return np.add(*[rows_of(part) for part in factor.parts])
    if isinstance(factor, Zero):
        return np.zeros((*lead, *factor.layout.shape))
    if isinstance(factor, Explicit):
        return np.asarray(factor.jacobian).transpose(0, 1, 3, 2)
    delta = np.asarray(factor.delta)
    if isinstance(factor, Lookup):
        rows = np.zeros((*lead, *factor.layout.shape))
        for b, k, t in np.ndindex(delta.shape[:3]):
            rows[b, k, factor.ids[b, t]] += delta[b, k, t]
        return rows
    if isinstance(factor, Grouped):
        return np.einsum("btgi,bktgo->bkigo", factor.a, delta)
    if isinstance(factor.a, Patches):
        return np.einsum("bti,bkto->bkio", windows(factor.a), delta)
    rows = np.einsum("bti,bkto->bkio", factor.a, delta)
    return rows.transpose(0, 1, 3, 2)[..., None] if factor.layout.steps else rows


def windows(patches: Patches) -> np.ndarray:
    """Cut every window out of the picture, one after another."""
    x = np.asarray(patches.x)
    cut = [
        [
            x[:, r * patches.strides[0] + u * patches.dilations[0]][
                :, c * patches.strides[1] + v * patches.dilations[1]
            ]
            for u in range(patches.window[0])
            for v in range(patches.window[1])
        ]
        for r in range(patches.output[0])
        for c in range(patches.output[1])
    ]
    return np.stack([np.concatenate(offsets, 1) for offsets in cut], 1)
