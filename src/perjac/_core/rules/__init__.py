"""Rules: one for each operation at which a weight meets the data, by the operation's type.

A rule turns (site, δ) into a Factor, or raises NoRule with the reason. δ is (B, K, F, ...): the
cotangent of the operation's output, K rows for each example, the batch folded out.
"""

from perjac._core.rules import (  # noqa: F401  (register)
    contraction,
    convolution,
    elementwise,
    gather,
)
from perjac._core.rules.bound import BoundSite, NoRule
from perjac._core.rules.registry import RULES, apply

__all__ = ["RULES", "BoundSite", "NoRule", "apply"]
