"""Losses → one number for each example: Keras's reduction undone, weights and masks applied.

The loss of an example is what Keras computes for a batch of that example alone. Knows Keras losses
and a model's outputs; must not know how anything is differentiated.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from perjac import host
from perjac.errors import InputError, OutOfRangeError, UnknownNameError, nearest

_SPARSE = "sparse_categorical_crossentropy"
# Losses of probabilities, unless they are told from_logits=True.
_OF_PROBABILITIES = {
    "binary_crossentropy", "binary_focal_crossentropy", "categorical_crossentropy",
    "categorical_focal_crossentropy", _SPARSE,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Term:
    """The loss of one head: `head` is None for a function of all outputs together."""

    head: str | None
    loss: Any  # a keras.Loss, or a callable (y, output) -> (B,)
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The loss as a user calls it."""
        fn = getattr(self.loss, "fn", self.loss)
        return getattr(fn, "__name__", type(fn).__name__)

    @property
    def wants_probabilities(self) -> bool:
        """Whether it takes the outputs for probabilities."""
        return self.name in _OF_PROBABILITIES and not self._given("from_logits")

    def _given(self, option: str) -> Any:
        return getattr(self.loss, option, None) or getattr(self.loss, "_fn_kwargs", {}).get(option)


class Objective:
    """The loss of each example, as a function of a model's outputs and the labels.

    Parameters
    ----------
    loss : keras.Loss, str, callable, or a dict or list of these by head
        What `Engine.gradients` was given.
    loss_weights : float, or a dict or list of these, optional
        What each head's loss is multiplied by.
    class_weight : mapping of int to float, optional
        What the loss of each class is multiplied by; 1 for classes left out.

    Attributes
    ----------
    key : tuple
        Equal for objectives that compute the same.
    """

    def __init__(
        self, loss: Any, loss_weights: Any = None, class_weight: Mapping[int, float] | None = None
    ):
        self._loss, self._loss_weights = loss, loss_weights
        self._class_weight = _classes(class_weight)
        self._classes: dict[str, int] = {}  # of sparse labels, by head; known once traced
        self._terms: list[Term] = []
        weights = json.dumps(loss_weights, sort_keys=True, default=str)
        self.key = (_identity(loss), weights, tuple(self._class_weight.items()))

    def __call__(
        self, outputs: Any, heads: Mapping[str, tf.Tensor], y: Any, sample_weight: Any
    ) -> tf.Tensor:
        """Return the loss of each example, (B,).

        Parameters
        ----------
        outputs : nested structure of tensors
            The model's, as it returns them.
        heads : mapping of str to tensor
            The same by name.
        y, sample_weight : nested structure of tensors
            One for each head that has a loss, by name or in order; () for nothing.
        """
        self._terms = self._resolve(heads, y)
        named = [term.head for term in self._terms]
        labels = self._labels(y)
        weights = {} if sample_weight == () else _by_head(sample_weight, named, "sample_weight")
        total = [
            term.weight
            * self._of_each(
                term,
                outputs if term.head is None else heads[term.head],
                labels.get(term.head, ()),
                weights.get(term.head),
            )
            for term in self._terms
        ]
        widest = max((t.dtype for t in total), key=lambda dtype: dtype.size)
        return tf.add_n([tf.cast(t, widest) for t in total])

    def check_labels(self, y: Any) -> None:
        """Raise for labels of sparse losses that name a class that the output does not have."""
        labels = self._labels(y)
        for term in self._terms:
            count = self._classes.get(term.head or "")
            if count is None:
                continue
            given = np.asarray(labels[term.head])
            ignored = getattr(term.loss, "ignore_class", None)
            wrong = (given < 0) | (given >= count)
            wrong &= given != ignored if ignored is not None else True
            if wrong.any():
                place = np.argwhere(wrong)[0]
                raise OutOfRangeError(
                    f"Label {given[tuple(place)]:g} of example {place[0]} is out of range: the "
                    f"output {term.head!r} has {count} classes, 0 to {count - 1}."
                )

    def doubts(self, outputs: Callable[[str], tf.Tensor]) -> str:
        """Return what is odd about outputs that a loss takes for probabilities, or nothing.

        `outputs` takes a head's name to some of its outputs.
        """
        for term in self._terms:
            if not term.wants_probabilities or term.head is None:
                continue
            p = np.asarray(outputs(term.head), "float64")
            if not p.size or not np.isfinite(p).all():
                continue
            whole = "binary" in term.name or np.allclose(p.sum(-1), 1, atol=1e-2)
            if p.min() < 0 or p.max() > 1 + 1e-3 or not whole:
                return (
                    f"The loss {term.name!r} takes the output {term.head!r} for probabilities, but "
                    f"they range from {p.min():.3g} to {p.max():.3g}. If these are logits, give "
                    "the loss from_logits=True, for example "
                    "loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)."
                )
        return ""

    def _labels(self, y: Any) -> dict[str | None, Any]:
        """Return the labels of each term's head; all of them for a function of all outputs."""
        named = [term.head for term in self._terms]
        return {None: y} if None in named else _by_head(y, named, "y")

    def _resolve(self, heads: Mapping[str, tf.Tensor], y: Any) -> list[Term]:
        """Return the loss of each head."""
        names, loss = list(heads), self._loss
        if not _is_nested(loss):
            found = _resolved(loss, heads[names[0]], tf.nest.flatten(y)[:1])
            if not isinstance(found, keras.losses.Loss) and len(names) > 1:
                return [Term(None, found, _weight(self._loss_weights, None, 0))]
            loss = [loss] * len(names)
        given = _by_head(loss, names, "loss")
        labels = _by_head(y, [n for n in names if given.get(n) is not None], "y")
        return [
            Term(
                name,
                _resolved(given[name], heads[name], tf.nest.flatten(labels.get(name, ()))[:1]),
                _weight(self._loss_weights, name, n),
            )
            for n, name in enumerate(names)
            if given.get(name) is not None
        ]

    def _of_each(self, term: Term, output: Any, y: Any, weight: Any) -> tf.Tensor:
        """Return one head's loss of each example, (B,), weighted."""
        if isinstance(term.loss, keras.losses.Loss):
            dtype = output.dtype if output.dtype.size >= 4 else tf.float32
            values, valid = _called(term.loss, y, output, dtype)
            if term.name == _SPARSE:
                self._classes[term.head or ""] = int(output.shape[-1] or 0)
        else:
            values, valid = _plain(term, y, output), None
        if self._class_weight:
            values *= tf.cast(self._weights_of(y, output, values), values.dtype)
        if weight is not None:
            weight = tf.cast(weight, values.dtype)
        how = getattr(term.loss, "reduction", "sum_over_batch_size")
        return _reduced(values, valid, weight, how)

    def _weights_of(self, y: tf.Tensor, output: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
        """Return the weight of each label's class, shaped like the losses (B, ...)."""
        if y.shape.rank == output.shape.rank and output.shape[-1] != 1:
            y = tf.argmax(y, -1)  # one-hot
        y = tf.cast(tf.round(y) if y.dtype.is_floating else y, tf.int32)
        y = tf.reshape(y, tf.shape(values))
        weights = tf.ones_like(values)
        for label, weight in self._class_weight.items():
            weights = tf.where(tf.equal(y, label), tf.cast(weight, values.dtype), weights)
        return weights


def compiled(model: Any) -> tuple[Any, Any]:
    """Return (loss, loss_weights) that a Keras model was compiled with.

    Raises
    ------
    InputError
        If it was not.
    """
    found = host.compiled_loss(model)
    if found is None:
        raise InputError(
            "The model is not compiled with a loss, and none is given. Name one, for example "
            'loss="mse", or compile the model.'
        )
    return found


def _called(
    loss: keras.losses.Loss, y: Any, output: tf.Tensor, dtype: tf.DType
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Return a Keras loss of every position, (B, ...), and which positions count."""
    mask = getattr(output, "_keras_mask", None)
    if isinstance(y, tuple) and y == ():
        raise InputError(f"The loss {loss.name!r} needs labels: give y.")
    wide, labels = tf.cast(output, dtype), tf.cast(y, dtype)
    try:
        values = tf.convert_to_tensor(loss.call(labels, wide))
        if values.shape.rank == 0:  # it reduces the whole batch by itself, as Dice does
            values = _one_by_one(loss, labels, wide)
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as failure:
        raise InputError(
            f"The loss {loss.name!r} does not take labels of shape {_shown(labels)} beside an "
            f"output of shape {_shown(output)}: {_first_line(failure)}"
        ) from failure
    own = getattr(values, "_keras_mask", None)
    masks = [tf.cast(m, tf.bool) for m in (mask, own) if m is not None]
    if len(masks) == 2 and masks[0].shape.rank == masks[1].shape.rank:
        return values, masks[0] & masks[1]
    return values, masks[-1] if masks else None


def _one_by_one(loss: keras.losses.Loss, y: tf.Tensor, output: tf.Tensor) -> tf.Tensor:
    """Call a loss that makes one number of a batch with each example as a batch of its own."""
    return tf.vectorized_map(lambda one: loss.call(one[0][None], one[1][None]), (y, output))


def _plain(term: Term, y: Any, output: Any) -> tf.Tensor:
    """Call the user's own function (y, output) -> (B,)."""
    values = tf.convert_to_tensor(term.loss(None if y == () else y, output))
    if values.shape.rank == 0:
        raise InputError(
            f"The loss {term.name!r} returns a single number for the whole batch. Return one for "
            "each example, (B,): leave out the final mean or sum."
        )
    return values


def _reduced(
    values: tf.Tensor, valid: tf.Tensor | None, weight: tf.Tensor | None, how: str | None
) -> tf.Tensor:
    """Reduce the losses of the positions (B, ...) as Keras would for a batch of one, to (B,).

    "sum" and None add them up; the means divide by the number of positions, of valid ones under a
    mask; "mean_with_sample_weight" by the weights along the positions. A weight of a whole example
    multiplies its loss.
    """
    own = None
    if weight is not None:
        weight = _lined_up(weight, values)
        if all(n == 1 for n in weight.shape[1:]):
            own, weight = tf.reshape(weight, [-1]), None
    counted = tf.ones_like(values)
    if valid is not None:
        counted *= tf.cast(_lined_up(valid, values), values.dtype)
    weighted = counted if weight is None else counted * weight
    # What does not count may be NaN, which times zero is NaN.
    losses = tf.where(tf.equal(weighted, 0), tf.zeros_like(values), values * weighted)
    axes = list(range(1, values.shape.rank))
    total = tf.reduce_sum(losses, axes)
    if axes and how not in ("sum", "none", None):
        over = weighted if how == "mean_with_sample_weight" else counted
        total = tf.math.divide_no_nan(total, tf.reduce_sum(over, axes))
    return total if own is None else total * own


def _lined_up(weight: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Give a weight or mask (B, ...) the rank of the losses, its axes from the left."""
    rank, wanted = weight.shape.rank, values.shape.rank
    while rank > wanted and weight.shape[-1] == 1:
        weight, rank = tf.squeeze(weight, -1), rank - 1
    if rank > wanted:
        raise InputError(
            f"sample_weight of shape {_shown(weight)} has more axes than the losses, "
            f"{_shown(values)}."
        )
    for axis in range(1, rank):
        if weight.shape[axis] not in (1, values.shape[axis]):
            raise InputError(
                f"sample_weight of shape {_shown(weight)} does not fit losses of shape "
                f"{_shown(values)}."
            )
    for _ in range(wanted - rank):
        weight = tf.expand_dims(weight, -1)
    return weight


def _resolved(loss: Any, output: tf.Tensor, labels: Sequence[tf.Tensor]) -> Any:
    """Return a Keras loss, or the user's own function."""
    if isinstance(loss, str) and loss.lower() in ("crossentropy", "ce"):
        loss = _crossentropy(output, labels)
    if isinstance(loss, str) or (isinstance(loss, Mapping) and "class_name" in loss):
        try:
            loss = keras.losses.get(loss)
        except ValueError as failure:
            known = [n for n in dir(keras.losses) if n.islower() and not n.startswith("_")]
            raise UnknownNameError(
                f"There is no Keras loss {loss!r}. {nearest(str(loss), known)}"
            ) from failure
    if isinstance(loss, type) and issubclass(loss, keras.losses.Loss):
        loss = loss()
    if isinstance(loss, keras.losses.Loss):
        return loss
    if not callable(loss):
        raise InputError(
            "Expected loss= as a Keras loss, its name, or a callable (y, output) -> (B,). "
            f"Received: {loss!r}."
        )
    ours = getattr(loss, "__module__", "") or ""
    return host.wrapped_loss(loss) if ours.startswith("keras.") else loss


def _crossentropy(output: tf.Tensor, labels: Sequence[tf.Tensor]) -> str:
    """Return which cross-entropy Keras takes "crossentropy" for."""
    if output.shape[-1] == 1:
        return "binary_crossentropy"
    sparse = bool(labels) and (
        labels[0].shape.rank < output.shape.rank  # type: ignore[operator]
        or labels[0].shape[-1] == 1
    )
    return _SPARSE if sparse else "categorical_crossentropy"


def _by_head(given: Any, names: Sequence[Any], what: str) -> dict[Any, Any]:
    """Return what was given for each head: a mapping by name, a list in order, or one for one."""
    if isinstance(given, Mapping):
        unknown = [key for key in given if key not in names]
        if unknown and what == "loss":
            raise UnknownNameError(
                f"There is no output {unknown[0]!r} for a loss. {nearest(str(unknown[0]), names)}"
            )
        missing = [name for name in names if name not in given]
        if missing and what == "y":
            raise InputError(f"y has nothing for the output {missing[0]!r}. It has {list(given)}.")
        return dict(given)
    if isinstance(given, (list, tuple)) and len(names) > 1:
        if len(given) != len(names):
            raise InputError(
                f"Expected {what} for {len(names)} outputs ({', '.join(map(str, names))}). "
                f"Received: {len(given)}."
            )
        return dict(zip(names, given, strict=True))
    if isinstance(given, (list, tuple)) and len(given) == 1:
        given = given[0]
    if len(names) > 1 and what != "y":
        return dict.fromkeys(names, given)
    if len(names) > 1:
        raise InputError(f"Expected y as a list or dict for the outputs {names}. Received one.")
    return {names[0]: given} if names else {}


def _weight(given: Any, name: str | None, number: int) -> float:
    if given is None:
        return 1.0
    if isinstance(given, Mapping):
        return float(given.get(name, 1.0))
    if isinstance(given, (list, tuple)):
        return float(given[number])
    return float(given)


def _classes(given: Mapping[int, float] | None) -> dict[int, float]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InputError(f"Expected class_weight= as {{class: weight}}. Received: {given!r}.")
    return {int(label): float(weight) for label, weight in sorted(given.items())}


def _is_nested(loss: Any) -> bool:
    return isinstance(loss, (list, tuple)) or (
        isinstance(loss, Mapping) and "class_name" not in loss
    )


def _identity(loss: Any) -> Any:
    """Return what a loss is known by: equal configurations of a Keras loss are one."""
    if isinstance(loss, Mapping):
        return tuple((key, _identity(value)) for key, value in sorted(loss.items(), key=str))
    if isinstance(loss, (list, tuple)):
        return tuple(_identity(value) for value in loss)
    if isinstance(loss, keras.losses.Loss) and type(loss).__module__.startswith("keras."):
        config = {k: v for k, v in loss.get_config().items() if k != "name"}
        return type(loss).__name__, json.dumps(config, sort_keys=True, default=str)
    return loss


def _shown(tensor: tf.Tensor) -> str:
    dims = ["B" if n == 0 else str(d) for n, d in enumerate(tensor.shape)]
    return f"({', '.join(dims)})"


def _first_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:300]
