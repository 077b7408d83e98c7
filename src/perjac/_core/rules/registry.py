"""The table from operation type to rule."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from perjac._core.factors import Factor
from perjac._core.rules.bound import BoundSite, NoRule

Rule = Callable[[BoundSite, tf.Tensor], Factor]
RULES: dict[str, Rule] = {}


def rule(*types: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule for operations of these types."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(types, function))
        return function

    return register


def apply(site: BoundSite, delta: tf.Tensor) -> Factor:
    """Return the factor of a site, or raise NoRule with the reason."""
    found = RULES.get(site.op.type)
    if found is None:
        raise NoRule(f"no rule for {site.op.type}")
    return found(site, delta)
