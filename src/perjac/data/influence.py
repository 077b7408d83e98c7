"""What training examples did to test examples: TracIn along the training, TRAK at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy.linalg

from perjac._core.backend import host, memory
from perjac.data._batches import Examples, engine_of, gradients
from perjac.data._products import inner_products
from perjac.data._trak_outputs import TASKS, Explained, check_labels, explained
from perjac.data.checkpoints import at_checkpoints
from perjac.engine import Engine
from perjac.errors import InputError, check_counts, check_one_of

_LOOKED_AT = 64  # examples, to tell logits from probabilities


def tracin(
    engine: Engine,
    checkpoints: Iterable[Any],
    x_train: Any,
    y_train: Any,
    x_test: Any,
    y_test: Any,
    *,
    learning_rates: Any = 1.0,
    loss: Any = None,
    wrt: Any = "weights",
    batch_size: int = 64,
) -> np.ndarray:
    """Return by how much training on each example lowered the loss of each test example.

    TracInCP: Σ_i η_i ⟨∇ℓ(w_i, z), ∇ℓ(w_i, z')⟩ over checkpoints w_i. Positive scores are of
    examples that helped (proponents), negative ones of those that harmed (opponents).

    Parameters
    ----------
    engine : Engine
        Of a Keras model, or the model itself. It gets its own weights back, also after an error.
    checkpoints : iterable of paths or lists of arrays
        As in `at_checkpoints`, saved along the training.
    x_train, y_train : array, or list, tuple or dict of arrays
        N examples and their labels, as `Engine.gradients` takes them.
    x_test, y_test : array, or list, tuple or dict of arrays
        T examples and their labels.
    learning_rates : float, or sequence of float
        η: of all checkpoints, or of each.
    loss : as in `Engine.gradients`
        The loss that the model was compiled with, if left out.
    wrt : as in `Engine.gradients`
        Of which weights the gradient is; the paper takes the last layer alone for large models.
    batch_size : int
        How many examples are held at once. The answer does not depend on it.

    Returns
    -------
    np.ndarray (N, T)
        In the model's floating type.

    Raises
    ------
    InputError
        For checkpoints, rates and arrays that do not fit.
    FileFormatError
        If a checkpoint's file does not exist.
    TooLargeError
        If N × T numbers do not fit into memory.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.random.normal(size=(20, 3)), np.random.normal(size=(20, 1))
    >>> saved = []
    >>> for _ in range(3):
    ...     _ = model.fit(x, y, verbose=0)
    ...     saved.append(model.get_weights())
    >>> pj.data.tracin(model, saved, x, y, x[:2], y[:2], learning_rates=0.01).shape
    (20, 2)

    References
    ----------
    Pruthi et al. 2020, Estimating Training Data Influence by Tracing Gradient Descent,
    section 3.3 (TracInCP).
    """
    engine, found = engine_of(engine), list(checkpoints)
    rates = _rates(learning_rates, len(found))
    train, test = Examples.of(x_train, y_train, "_train"), Examples.of(x_test, y_test, "_test")
    _check_size(train, test)
    scores = None
    options = {"batch_size": batch_size, "loss": loss, "wrt": wrt}
    with contextlib.closing(at_checkpoints(engine, found)) as stages:  # type: ignore[type-var]
        for stage, rate in zip(stages, rates, strict=True):
            for rows, columns, products in inner_products(stage, test, train, **options):
                if scores is None:
                    scores = np.zeros((train.size, test.size), products.dtype)
                scores[columns, rows] += rate * products.T
    assert scores is not None
    return scores


def trak(
    engines: Engine | Iterable[Any],
    x_train: Any,
    y_train: Any,
    x_test: Any,
    y_test: Any,
    *,
    task: str = "classification",
    dim: int | None = 512,
    seed: int = 0,
    ridge: float = 0.3,
    from_logits: bool | None = None,
    of: str | None = None,
    wrt: Any = "weights",
    batch_size: int = 64,
) -> np.ndarray:
    """Return by how much each training example holds up the model's output for each test example.

    TRAK: the model is taken for one that is linear in its weights, and an example's leaving for a
    Newton step. With f the output function and φ = S ∇f projected gradients, Φ those of the
    training data as rows,

        τ(x, n) = [Φ (ΦᵀΦ + λ I)^{-1} φ(x)]_n · q_n,    λ = ridge · trace(ΦᵀΦ) / dim,

    both factors averaged over the models before they are multiplied. For classification
    f = log p / (1 - p), p the probability of the labelled class, and q = 1 - p; for regression f
    is the output and q = y - f. Positive: without example n, f(x) would fall.

    Parameters
    ----------
    engines : Engine, or iterable of engines
        Trained models, or engines of them; several, trained alike from other beginnings, are
        better than one. They are asked one after another, so that
        `at_checkpoints(engine, files)` serves for many, in the memory of one.
    x_train, y_train : array, or list, tuple or dict of arrays
        N examples and their labels: class numbers (N,) or one-hot (N, classes); numbers (N,) or
        (N, 1) for regression.
    x_test, y_test : array, or list, tuple or dict of arrays
        T examples and their labels.
    task : {"classification", "regression"}
        What f and q are.
    dim : int or None
        Of the projections, less than N; None for the gradients as they are, for models of a few
        thousand weights.
    seed : int
        Of the projections; model m has the seed `seed + m`.
    ridge : float
        The share of the mean eigenvalue of ΦᵀΦ that is added to all eigenvalues, so that
        directions which the data hardly tells apart do not decide; see the notes.
    from_logits : bool, optional
        Whether the outputs are logits, not probabilities; by default, as those of the first 64
        examples look.
    of : str, optional
        Which output, by name, where the model has several.
    wrt : as in `Engine.gradients`
        Of which weights the gradient is.
    batch_size : int
        How many examples are held at once. The answer does not depend on it.

    Returns
    -------
    np.ndarray (N, T)
        In float64.

    Raises
    ------
    InputError
        For options, outputs and arrays that do not fit, and where ΦᵀΦ cannot be inverted.
    OutOfRangeError
        If a label names a class that the model does not have.
    TooLargeError
        If N × T numbers do not fit into memory.

    Notes
    -----
    In memory for N · dim and N · T numbers. The paper's last step, which sets small scores to
    zero, is left to you.

    Measured by the linear datamodelling score: the rank correlation of Σ τ over half of the
    training examples with the f of a model trained on that half, over 60 to 80 halves, for
    ridge = 0.001 / 0.1 / 0.3 / 1. Digits (N = 500, T = 100), 8 networks of 2410 weights,
    dim = 256: 0.41 / 0.57 / 0.59 / 0.58; one of them alone: 0.28 / 0.44 / 0.47 / 0.48 (`tracin`
    at the ends of all 8: 0.38). Logistic regression with a penalty, all rows: Iris 0.70 / 0.87 /
    0.90 / 0.87, digits 0.29 / 0.67 / 0.78 / 0.87. The more a model is regularised, the more ridge
    fits. The scores rank, but they are no amounts: in these regressions 3 to 70 times too small,
    as the paper's formula leaves out the curvature p (1 - p) between Φᵀ and Φ.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> models = [
    ...     keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, "tanh"),
    ...                       keras.layers.Dense(3)])
    ...     for _ in range(2)
    ... ]
    >>> x, y = np.random.normal(size=(50, 4)), np.random.randint(0, 3, 50)
    >>> pj.data.trak(models, x, y, x[:2], y[:2], dim=16).shape
    (50, 2)

    References
    ----------
    Park et al. 2023, TRAK: Attributing Model Behavior at Scale, section 3 (steps 1 to 4).
    """
    check_one_of(task, TASKS, "task")
    if dim is not None:
        check_counts(dim=dim)
    if not isinstance(ridge, (int, float)) or not np.isfinite(ridge) or ridge < 0:
        raise InputError(f"Expected ridge= as a number, zero or above. Received: {ridge!r}.")
    train, test = Examples.of(x_train, y_train, "_train"), Examples.of(x_test, y_test, "_test")
    _check_size(train, test)
    held, pull, count = np.zeros((train.size, test.size)), np.zeros(train.size), 0
    with _closing(engines) as models:
        for engine in map(engine_of, models):
            what = _what(engine, train, test, task, from_logits, of)
            loss = what.function if of is None else {of: what.function}
            asked = {"batch_size": batch_size, "loss": loss, "wrt": wrt}
            features, f = _features(engine, train, dim, seed + count, **asked)
            wanted, _ = _features(engine, test, dim, seed + count, **asked)
            held += features @ _solved(features, wanted.T, ridge)
            pull += what.pull(train.y, f)
            count += 1
    if not count:
        raise InputError("Expected at least one model. Received: none.")
    return held / count * (pull / count)[:, None]


def _what(
    engine: Engine,
    train: Examples,
    test: Examples,
    task: str,
    from_logits: bool | None,
    of: str | None,
) -> Explained:
    """Return what is explained of a model, a few of its outputs and all labels looked at."""
    outputs = np.asarray(engine.outputs(train.part(slice(0, _LOOKED_AT)).x, of=of))
    what = explained(task, outputs, from_logits)
    if task == "classification":
        check_labels(train.y, outputs, "y_train")
        check_labels(test.y, outputs, "y_test")
    return what


def _features(
    engine: Engine, examples: Examples, dim: int | None, seed: int, *, batch_size: int, **asked: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return φ (N, dim) and f (N,), in float64."""
    rows, values = [], []
    for _, grads in gradients(engine, examples, batch_size, **asked):
        rows.append(np.asarray(grads.matrix() if dim is None else grads.project(dim, seed)))
        values.append(np.asarray(grads.losses))
    return np.concatenate(rows).astype("float64"), np.concatenate(values).astype("float64")


def _solved(features: np.ndarray, wanted: np.ndarray, ridge: float) -> np.ndarray:
    """Return (ΦᵀΦ + λ I)^{-1} wanted."""
    square = features.T @ features
    square[np.diag_indices_from(square)] += ridge * np.trace(square) / len(square)
    try:
        return scipy.linalg.solve(square, wanted, assume_a="pos")
    except np.linalg.LinAlgError as failure:
        raise InputError(
            f"The gradients of {len(features)} examples do not span the {len(square)} directions "
            f"that are compared. Choose a ridge= above {ridge:g}, or a smaller dim=."
        ) from failure


def _closing(engines: Any) -> contextlib.AbstractContextManager[Iterable[Any]]:
    """Give one model or several; a generator of them is closed at the end."""
    if isinstance(engines, Engine) or host.is_layer(engines):
        return contextlib.nullcontext([engines])
    close = hasattr(engines, "close")
    return contextlib.closing(engines) if close else contextlib.nullcontext(engines)


def _rates(given: Any, count: int) -> np.ndarray:
    rates = np.asarray(given, "float64")
    if rates.ndim == 0:
        rates = np.repeat(rates, count)
    if rates.shape != (count,):
        raise InputError(
            f"Expected learning_rates= as one number, or one for each of {count} checkpoints. "
            f"Received: {given!r:.100}."
        )
    return rates


def _check_size(train: Examples, test: Examples) -> None:
    memory.check(
        train.size * test.size * 8, None, f"The scores, {train.size} × {test.size},",
        "Give fewer test examples at a time.",
    )  # fmt: skip
