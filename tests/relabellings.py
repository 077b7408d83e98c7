"""Chains of reshapes and transpositions, drawn at random."""

import numpy as np
from hypothesis import strategies as st

from perjac._core.backend.axis_layout import Relabelling


@st.composite
def chains(draw):
    """A shape, and a chain of reshapes and transpositions from it."""
    layout = Relabelling.of(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    for _ in range(draw(st.integers(0, 5))):
        if draw(st.booleans()):
            layout = layout.transpose(draw(st.permutations(range(len(layout.target)))))
        else:
            target = list(layout.target)
            cut = draw(st.integers(0, len(target) - 1))
            merged = int(np.prod(target[cut:]))
            layout = layout.reshape([*target[:cut], 1, merged])
    return layout
