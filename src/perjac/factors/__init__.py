"""Factors: Jacobian rows (B, K, *W.shape) of one weight, held without forming them.

Every kind answers the same queries; only `dense` forms the rows. They know no operation names.
B examples, K rows, T positions, I and O the two sides of a weight, G groups, D a width.
"""

from perjac.factors.base import Explicit, Factor, Zero
from perjac.factors.lookup import Lookup
from perjac.factors.moments import Moments
from perjac.factors.outer import Grouped, Outer
from perjac.factors.pairs import Pairs
from perjac.factors.sum import Sum
from perjac.factors.way import Way

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
