"""Examples in order: the hardest by the size of their gradients, the typical by its direction."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from perjac.data._batches import Examples, engine_of, gradients
from perjac.engine import Engine
from perjac.errors import InputError, NotFiniteError, check_counts, check_one_of

BY = ("norm", "loss")


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Examples in order.

    Attributes
    ----------
    indices : np.ndarray of int (count,)
        The numbers of the examples found, the first one first; of equal scores, the smaller.
    scores : np.ndarray (N,)
        The score of every example, so that `scores[indices]` falls.
    losses : np.ndarray (N,)
        The loss of every example.
    """

    indices: np.ndarray
    scores: np.ndarray
    losses: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)


def hardest(
    engine: Engine,
    x: Any,
    y: Any,
    count: int = 10,
    *,
    loss: Any = None,
    by: str = "norm",
    wrt: Any = "weights",
    batch_size: int = 64,
) -> Ranking:
    """Return the examples that pull hardest at the weights: those of the largest gradients.

    Parameters
    ----------
    engine : Engine
        The model, or a model for which an engine is made.
    x, y : array, or list, tuple or dict of arrays
        N examples and their labels, as `Engine.gradients` takes them.
    count : int
        How many to return; all N if there are fewer.
    loss : as in `Engine.gradients`
        The loss that the model was compiled with, if left out.
    by : {"norm", "loss"}
        The norm of each example's gradient, ‖g_b‖, or its loss.
    wrt : as in `Engine.gradients`
        Of which weights the gradient is; a layer, for example.
    batch_size : int
        How many examples are held at once. The answer does not depend on it.

    Returns
    -------
    Ranking
        With `scores`, the norms or losses of all examples.

    Raises
    ------
    InputError
        For options, counts and arrays that do not fit.
    NotFiniteError
        If an example's score is NaN or infinite.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, name="top")])
    >>> model.set_weights([np.ones((1, 1)), np.zeros(1)])
    >>> x, y = np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [5.0], [4.0]])
    >>> pj.data.hardest(pj.Engine(model), x, y, 2, loss="mse").indices
    array([1, 2])

    References
    ----------
    Paul et al. 2021, Deep Learning on a Data Diet, definition 2.1 ("GraNd", there averaged over
    initialisations).
    """
    check_one_of(by, BY, "by")
    check_counts(count=count)
    examples = Examples.of(x, y)
    scores, losses = scored(engine_of(engine), examples, batch_size, loss=loss, by=by, wrt=wrt)
    return Ranking(largest(scores, count), scores, losses)


def typical(
    engine: Engine,
    x: Any,
    y: Any,
    count: int = 10,
    *,
    loss: Any = None,
    wrt: Any = "weights",
    batch_size: int = 64,
) -> Ranking:
    """Return the most typical examples: those whose gradient points where the mean gradient does.

    The score is the cosine s_b = ⟨g_b, ḡ⟩ / (‖g_b‖ ‖ḡ‖) with ḡ = Σ_b g_b / N; 0 for a gradient
    of zero.

    Parameters
    ----------
    engine : Engine
        The model, or a model for which an engine is made.
    x, y : array, or list, tuple or dict of arrays
        N examples and their labels, as `Engine.gradients` takes them.
    count : int
        How many to return; all N if there are fewer.
    loss : as in `Engine.gradients`
        The loss that the model was compiled with, if left out.
    wrt : as in `Engine.gradients`
        Of which weights the gradient is; a layer, for example.
    batch_size : int
        How many examples are held at once. The answer does not depend on it.

    Returns
    -------
    Ranking
        With `scores`, the cosines of all examples, -1 to 1.

    Raises
    ------
    InputError
        For arrays that do not fit, and if the mean gradient is zero.
    NotFiniteError
        If an example's score is NaN or infinite.

    Notes
    -----
    Two passes over the data, one for ḡ and one for the products with it, in memory for ḡ and a
    batch. A model trained to the very end has a mean gradient near zero, whose direction is left
    to chance: give the examples of one class, or a model from earlier in training.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> x, y = np.random.normal(size=(20, 4)), np.random.normal(size=(20, 1))
    >>> pj.data.typical(pj.Engine(model), x, y, count=3, loss="mse").indices.shape
    (3,)
    """
    check_counts(count=count)
    engine, examples = engine_of(engine), Examples.of(x, y)
    mean = _mean_direction(engine, examples, batch_size, loss=loss, wrt=wrt)
    scores, losses = [], []
    for _, grads in gradients(engine, examples, batch_size, loss=loss, wrt=wrt):
        along, norms = np.asarray(grads.jvp(mean)), np.asarray(grads.norms())
        scores.append(np.divide(along, norms, out=np.zeros_like(along), where=norms > 0))
        losses.append(np.asarray(grads.losses))
    cosines = np.clip(np.concatenate(scores), -1, 1)
    return Ranking(largest(cosines, count), cosines, np.concatenate(losses))


def scored(
    engine: Engine, examples: Examples, batch_size: int, *, loss: Any, by: str, wrt: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return every example's score, its gradient's norm or its loss, and its loss, (N,) each."""
    norms, losses = [], []
    for _, grads in gradients(engine, examples, batch_size, loss=loss, wrt=wrt):
        losses.append(np.asarray(grads.losses))
        norms.append(np.asarray(grads.norms()) if by == "norm" else losses[-1])
    return np.concatenate(norms), np.concatenate(losses)


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the numbers of the largest scores, falling; of equal ones the first comes first."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise NotFiniteError(
            f"The score of example {bad[0]} is {scores[bad[0]]}"
            + (f", and {bad.size - 1} more are not finite" if bad.size > 1 else "")
            + ". Look at the model's outputs and the loss there."
        )
    return np.argsort(-scores, kind="stable")[:count]


def _mean_direction(
    engine: Engine, examples: Examples, batch_size: int, *, loss: Any, wrt: Any
) -> dict[str, np.ndarray]:
    """Return the mean gradient at length one, by key."""
    total: dict[str, np.ndarray] = {}
    for _, grads in gradients(engine, examples, batch_size, loss=loss, wrt=wrt):
        for key, part in grads.vjp(np.ones(grads.shape[0])).items():
            # Sums of many batches are kept in float64: they cancel near the end of training.
            total[key] = total.get(key, 0) + np.asarray(part, "float64")
    length = np.sqrt(sum(np.sum(np.square(part)) for part in total.values()))
    if not length:
        raise InputError(
            "The mean gradient is zero, so no example is typical. Give the examples of one class, "
            "or a model from earlier in training."
        )
    return {key: part / length for key, part in total.items()}
