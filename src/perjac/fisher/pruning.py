"""How much the loss would rise without a weight: scores by which networks are pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from perjac._core.backend import memory
from perjac._core.backend.shapes import known as shaped
from perjac._core.model.variables import match
from perjac.errors import InputError, NotPositiveError
from perjac.fisher._columns import Columns
from perjac.fisher._values import current, every_variable, form_of, keyed
from perjac.fisher.form import Form
from perjac.fisher.information import Fisher

# Right-hand sides that the inverse's diagonal is solved for at a time.
_AT_ONCE = 256


def optimal_brain_damage(engine: Any, information: Fisher | Form) -> dict[str, np.ndarray]:
    """Return ½ θ_i² F_ii by key: the loss's rise when that number becomes zero, others kept.

    Parameters
    ----------
    engine : Engine
        Of the model.
    information : Fisher or Form
        The Fisher information; of kind "empirical" these are the scores of Fisher pruning.

    Returns
    -------
    dict of str to array
        Each of its weight's shape, in float64.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
    >>> engine = pj.Engine(model)
    >>> scores = pj.fisher.optimal_brain_damage(engine, engine.fisher(np.eye(4)))
    >>> mask = pj.fisher.lowest(scores, share=0.5)
    >>> sum(int(m.sum()) for m in mask.values())
    8

    References
    ----------
    LeCun, Denker and Solla 1990, Optimal brain damage; Theis et al. 2018, Faster gaze prediction
    with dense networks and Fisher pruning, eq. 7.
    """
    form = form_of(information)
    theta = current(engine, form.columns)
    return keyed(form.columns.by_key(0.5 * theta**2 * form.diagonal()))


def optimal_brain_surgeon(
    engine: Any, information: Fisher | Form, damping: float = 1e-3
) -> dict[str, np.ndarray]:
    """Return ½ θ_i² / [(F + damping·I)⁻¹]_ii by key: the loss's rise, all others adjusted.

    It is never above the one with others kept, at the same damping.

    Parameters
    ----------
    engine : Engine
        Of the model.
    information : Fisher or Form
        Of a Fisher the matrix itself is taken, so small models; of layers choose `blocks()`.
    damping : float
        Added to every eigenvalue of F.

    Returns
    -------
    dict of str to array
        Each of its weight's shape, in float64.

    Raises
    ------
    NotPositiveError
        If F + damping·I is singular.

    Notes
    -----
    A solve with P right-hand sides.

    References
    ----------
    Hassibi and Stork 1993, Second order derivatives for network pruning: Optimal brain surgeon,
    eq. 5.
    """
    form = form_of(information, "dense")
    theta, count = current(engine, form.columns), form.columns.count
    memory.check(
        2 * 8 * count * min(count, _AT_ONCE), engine.memory_limit,
        f"Solving for the inverse's diagonal, {_AT_ONCE} columns of {count} at a time,",
        "Choose fewer weights with wrt=.",
    )  # fmt: skip
    inverse = np.empty(count)
    for start in range(0, count, _AT_ONCE):
        asked = np.arange(start, min(start + _AT_ONCE, count))
        units = np.zeros((count, len(asked)))
        units[asked, np.arange(len(asked))] = 1
        inverse[asked] = form.solve(units, damping)[asked, np.arange(len(asked))]
    if not inverse.min() > 0:
        raise NotPositiveError(
            f"The inverse has {inverse.min():.3g} on its diagonal: choose a larger damping."
        )
    return keyed(form.columns.by_key(0.5 * theta**2 / inverse))


def taylor(engine: Any, gradient: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return (g_i θ_i)² by key: the loss's change, squared, when that number becomes zero.

    Parameters
    ----------
    engine : Engine
        Of the model.
    gradient : mapping of key to array
        Of the mean loss, as `Gradients.mean()` returns it.

    Returns
    -------
    dict of str to array
        Each of its weight's shape, in float64, in the gradient's order.

    References
    ----------
    Molchanov et al. 2019, Importance estimation for neural network pruning, eq. 6.
    """
    if not isinstance(gradient, Mapping):
        raise InputError(
            "Expected gradient= by key, as Gradients.mean() returns it. Received: "
            f"{type(gradient).__name__}."
        )
    known = every_variable(engine)
    keys = {match(key, list(known), "key"): key for key in gradient}
    columns = Columns(tuple(keys), tuple(shaped(known[key].shape) for key in keys))
    slopes = columns.flat({key: gradient[given] for key, given in keys.items()})
    return keyed(columns.by_key((slopes * current(engine, columns)) ** 2))


def lowest(scores: Mapping[str, Any], share: float) -> dict[str, np.ndarray]:
    """Return masks by key, True at the share of all numbers that has the lowest scores.

    Parameters
    ----------
    scores : mapping of key to array
        As the functions here return them. For whole channels, add up over the other axes first.
    share : float
        Of all numbers together, from 0 to 1; rounded to a whole number of them. Of equal scores
        the first are taken.

    Returns
    -------
    dict of str to array of bool
        Each of its scores' shape: what to prune.
    """
    if not (isinstance(share, (int, float, np.number)) and 0 <= share <= 1):
        raise InputError(f"Expected share= from 0 to 1. Received: {share!r}.")
    columns = Columns(tuple(scores), tuple(tuple(np.shape(s)) for s in scores.values()))
    flat = columns.flat(scores)
    if not np.isfinite(flat).all():
        raise InputError("Expected scores that are finite. Received: NaN or Inf among them.")
    chosen = np.zeros(columns.count, bool)
    chosen[np.argsort(flat, kind="stable")[: round(share * columns.count)]] = True
    return keyed(columns.by_key(chosen))
