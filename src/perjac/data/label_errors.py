"""Suspected label errors: the examples that pull hardest at a model that has not learnt them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from perjac._core.backend import host
from perjac.data._batches import Examples, engine_of
from perjac.data.ranking import BY, Ranking, largest, scored
from perjac.engine import Engine
from perjac.errors import InputError, check_counts, check_one_of


@dataclasses.dataclass(frozen=True)
class Suspects(Ranking):
    """Examples by how much their labels are doubted; what a Ranking has, and the outputs.

    Attributes
    ----------
    outputs : np.ndarray (N, *output_shape)
        What the models say to each example, those that have not seen it where `folds` were made:
        `outputs[indices].argmax(1)` are the labels that they propose.
    """

    outputs: np.ndarray


def label_errors(
    engine: Engine | Callable[[Any, Any], Any],
    x: Any,
    y: Any,
    count: int | None = None,
    *,
    loss: Any = None,
    by: str = "norm",
    wrt: Any = "weights",
    folds: int = 5,
    seed: int = 0,
    of: str | int | None = None,
    batch_size: int = 64,
) -> Suspects:
    """Return the examples whose labels are the most doubtful, by the norms of their gradients.

    A wrong label pulls hard at a model that has not learnt it by heart. So the safest way is to
    say how a model is trained, and let each example be judged by one that has never seen it:
    the data is cut at random into `folds` parts, and a model trained on all others judges each.

    Parameters
    ----------
    engine : callable (x, y) -> Keras model or Engine; or Engine
        How a new model is trained on some of the examples; or a trained model, which judges all
        of them. One trained on these very labels must have been stopped early.
    x, y : array, or list, tuple or dict of arrays
        N examples and their labels, as `Engine.gradients` takes them.
    count : int, optional
        How many to return; all N, in order, if left out.
    loss : as in `Engine.gradients`
        The loss that the model was compiled with, if left out.
    by : {"norm", "loss"}
        The norm of each example's gradient, or its loss.
    wrt : as in `Engine.gradients`
        Of which weights the gradient is. The name of the last layer's bias makes the norm that
        of the error p - e_y, the "EL2N" score of Paul et al. 2021.
    folds : int
        Into how many parts the data is cut; 2 to N.
    seed : int
        For the cut.
    of : str or int, optional
        Which output to keep in `outputs`, where the model has several.
    batch_size : int
        How many examples are held at once. The answer does not depend on it.

    Returns
    -------
    Suspects
        The most doubtful first, with the `scores`, `losses` and `outputs` of all examples.

    Raises
    ------
    InputError
        For options and arrays that do not fit, and if `engine` returns no model.
    NotFiniteError
        If an example's score is NaN or infinite.

    Notes
    -----
    Digits with 10 % of the labels changed to another one, networks of 24 000 weights trained for
    12 epochs on four fifths, 5 seeds (examples/label_errors.py): the tenth of the digits with the
    largest norms holds 91 to 94 % of the changed labels; that with the largest losses 96 to 98 %;
    by chance 10 %. With 5 % changed it holds 99 to 100 %; of 20 %, the first fifth 92 to 94 %.
    The norm of p - e_y alone finds 94 to 97 %: among all weights the size of the activations has a
    say, too. Train briefly: after 60 epochs it is 70 to 71 % (by loss 87 to 92 %); by one model
    that was trained on the very labels it judges 94 to 95 % if it was stopped after 12 epochs,
    and 47 to 58 % after 60.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> def fit(x, y):
    ...     model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="logits")])
    ...     loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ...     model.compile(keras.optimizers.Adam(0.1), loss)
    ...     model.fit(x, y, epochs=20, verbose=0)
    ...     return model
    >>> x = np.random.default_rng(0).normal(size=(60, 2)) + np.repeat([[3], [-3]], 30, axis=0)
    >>> y = np.repeat([0, 1], 30)
    >>> y[7] = 1
    >>> int(pj.data.label_errors(fit, x, y).indices[0])
    7

    References
    ----------
    Paul et al. 2021, Deep Learning on a Data Diet, definitions 2.1 and 2.2, for the scores;
    Northcutt et al. 2021, Confident Learning, section 3, for models that have not seen the example.
    """
    check_one_of(by, BY, "by")
    if count is not None:
        check_counts(count=count)
    examples = Examples.of(x, y)
    asked = {"batch_size": batch_size, "loss": loss, "by": by, "wrt": wrt, "of": of}
    if isinstance(engine, Engine) or host.is_layer(engine) or not callable(engine):
        scores, losses, outputs = _judged(engine_of(engine), examples, **asked)
    else:
        scores, losses, outputs = _held_out(engine, examples, folds, seed, **asked)
    return Suspects(largest(scores, count or examples.size), scores, losses, outputs)


def _held_out(
    fit: Callable[[Any, Any], Any], examples: Examples, folds: int, seed: int, **asked: Any
) -> list[np.ndarray]:
    """Return scores, losses and outputs, each example's by a model trained without it."""
    check_counts(folds=folds)
    if not 2 <= folds <= examples.size:
        raise InputError(f"Expected folds= from 2 to {examples.size}. Received: {folds}.")
    cut = np.array_split(np.random.default_rng(seed).permutation(examples.size), folds)
    cut = [np.sort(held) for held in cut]  # files that are read by numbers want them to rise
    parts = []
    for held in cut:
        kept = examples.part(np.setdiff1d(np.arange(examples.size), held))
        model = fit(kept.x, kept.y)
        if not (isinstance(model, Engine) or host.is_layer(model)):
            raise InputError(
                "Expected a function (x, y) that returns the model it has trained. "
                f"Received from it: {model!r:.100}."
            )
        parts.append(_judged(engine_of(model), examples.part(held), **asked))
    back = np.argsort(np.concatenate(cut))
    return [np.concatenate(each)[back] for each in zip(*parts, strict=True)]


def _judged(
    engine: Engine, examples: Examples, *, batch_size: int, of: Any, **asked: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores, losses and outputs of all examples by one model."""
    scores, losses = scored(engine, examples, batch_size, **asked)
    outputs = [np.asarray(engine.outputs(b.x, of=of)) for _, b in examples.batches(batch_size)]
    return scores, losses, np.concatenate(outputs)
