"""Where along a path a method looks, and how much each place counts."""

from __future__ import annotations

import functools

import numpy as np

from perjac.errors import InputError, check_one_of

RULES = (
    "gausslegendre",
    "riemann_left",
    "riemann_right",
    "riemann_middle",
    "riemann_trapezoid",
    "endpoint_mean",
)


@functools.lru_cache
def quadrature(rule: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes α in [0, 1] and weights w that sum to one: ∫₀¹ g(α) dα ≈ Σ_k w_k g(α_k).

    Parameters
    ----------
    rule : str
        One of `RULES`. "riemann_trapezoid" and "endpoint_mean" have nodes 0 and 1 among the n;
        the latter, PAIR's, weighs all of them alike, and is off by (g(0) + g(1) - 2·mean) / 2n.
    steps : int
        n, how many nodes.

    Returns
    -------
    nodes, weights : array (n,) of float64
        The nodes in order.

    Raises
    ------
    InputError
        If there is no such rule, or too few steps for it.
    """
    least = 2 if rule in ("riemann_trapezoid", "endpoint_mean") else 1
    check_one_of(rule, RULES, "rule")
    if int(steps) != steps or steps < least:
        raise InputError(f"Expected steps= {least} or more for rule={rule!r}. Received: {steps!r}.")
    n = int(steps)
    alike = np.full(n, 1 / n)
    if rule == "gausslegendre":
        nodes, weights = np.polynomial.legendre.leggauss(n)
        return (nodes + 1) / 2, weights / weights.sum()
    if rule in ("riemann_trapezoid", "endpoint_mean"):
        ends = np.full(n, 1 / (n - 1))
        ends[[0, -1]] /= 2  # Captum's and alibi's are 1/n, which sum to (n - 1)/n
        return np.linspace(0, 1, n), ends if rule == "riemann_trapezoid" else alike
    shift = {"riemann_left": 0.0, "riemann_middle": 0.5, "riemann_right": 1.0}[rule]
    return (np.arange(n) + shift) / n, alike
