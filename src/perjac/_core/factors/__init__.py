"""Factors: Jacobian rows (B, K, *W.shape) of one weight, held without forming them.

Every kind answers the same queries; only `dense` forms the rows. They know no operation names.
B examples, K rows, T positions, I and O the two sides of a weight, G groups, D a width.
"""

from perjac._core.factors.base import Explicit, Factor, Zero
from perjac._core.factors.lookup import Lookup
from perjac._core.factors.moments import Moments
from perjac._core.factors.outer import Grouped, Outer
from perjac._core.factors.pairs import Pairs
from perjac._core.factors.sum import Sum
from perjac._core.factors.way import Way

__all__ = [
    "Explicit",
    "Factor",
    "Grouped",
    "Lookup",
    "Moments",
    "Outer",
    "Pairs",
    "Sum",
    "Way",
    "Zero",
]
