"""Losses → one number for each example: Keras's reduction undone, weights and masks applied.

The loss of an example is what Keras computes for a batch of that example alone, times the weight of
the example. Knows Keras losses and a model's outputs; must not know how anything is differentiated.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from perjac._core.backend import host
from perjac._core.backend.dtypes import at_least_float32
from perjac._core.backend.shapes import shown
from perjac._core.model import arrays, closures
from perjac._core.model.loss_reduction import reduced
from perjac.errors import ExamplesMeetError, InputError, OutOfRangeError, UnknownNameError, nearest

# Keras losses whose labels are numbers of classes,
_SPARSE = ("sparse_categorical_crossentropy", "categorical_generalized_cross_entropy")
# whose labels have other axes than the outputs,
_OF_OTHER_AXES = (*_SPARSE, "ctc")
# which see whether all labels are 0 or 1, and take those for -1 and 1,
_HINGES = ("hinge", "squared_hinge")
# and which take the outputs for probabilities, unless they are told from_logits=True.
_OF_PROBABILITIES = (
    "binary_crossentropy", "binary_focal_crossentropy", "categorical_crossentropy",
    "categorical_focal_crossentropy", *_SPARSE,
)  # fmt: skip

# Names that Keras takes for losses without showing them in keras.losses.
_SHORT = {"bce", "ce", "crossentropy", "kld", "mae", "mape", "mse", "msle"}


@dataclasses.dataclass(frozen=True)
class Term:
    """The loss of one head.

    Attributes
    ----------
    head : str or None
        None for a function of all outputs together.
    loss : keras.Loss or callable
        A callable takes (y, output) to (B,).
    weight : float
        What it is multiplied by.
    classes : int or None
        How many classes the head has, where labels are numbers of classes.
    """

    head: str | None
    loss: Any
    weight: float = 1.0
    classes: int | None = None

    @property
    def name(self) -> str:
        """The loss as a user calls it."""
        return _name(self.loss)


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
    key : Key
        Equal for objectives that compute the same.
    adds : bool
        Whether what layers add to the loss belongs to it.
    """

    adds = False

    def __init__(
        self, loss: Any, loss_weights: Any = None, class_weight: Mapping[int, float] | None = None
    ):
        self._loss, self._loss_weights = loss, loss_weights
        self._class_weight = arrays.class_weights(class_weight)
        arrays.check_loss_weights(loss_weights)
        self._heads: list[str] = []
        self._terms: dict[Any, list[Term]] = {}  # by the shapes of the labels, once traced
        weights = loss_weights is not None and json.dumps(loss_weights, sort_keys=True, default=str)
        self.key = closures.Key(_identity(loss), weights, tuple(self._class_weight.items()))

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
        self._heads = list(heads)
        if self._class_weight and len(heads) > 1:
            raise InputError(
                f"class_weight is for models of one output. This one has {self._heads}: give "
                "sample_weight for each."
            )
        terms = self._terms[_shapes(y)] = self._resolved(heads, y)
        if terms[0].head is None:
            output = outputs if len(heads) > 1 else heads[self._heads[0]]
            return self._of_each(terms[0], output, y, _only(sample_weight, "sample_weight"))
        labels = self._dealt(y, terms, "y")
        weights = self._dealt(sample_weight, terms, "sample_weight")
        each = [
            self._of_each(term, heads[name], labels.get(name, ()), weights.get(name))
            for name, term in ((str(term.head), term) for term in terms)
        ]
        widest = max((losses.dtype for losses in each), key=lambda dtype: dtype.size)
        return tf.add_n([tf.cast(losses, widest) for losses in each])

    @property
    def name(self) -> str:
        """The loss as a user calls it."""
        losses = tf.nest.flatten(self._loss) if is_nested(self._loss) else [self._loss]
        return ", ".join(loss if isinstance(loss, str) else _name(loss) for loss in losses)

    def check_labels(self, y: Any) -> None:
        """Raise for labels that are numbers of classes that the outputs do not have."""
        terms = self._terms[_shapes(y)]
        for term in terms:
            if term.classes is None:
                continue
            labels = np.asarray(self._dealt(y, terms, "y")[term.head])
            arrays.check_classes(labels, term.name)
            fine = (labels >= 0) & (labels < term.classes)
            if not fine.all():
                ignored = host.loss_options(term.loss).get("ignore_class")
                fine |= labels == ignored if ignored is not None else False
            if not fine.all():
                place = np.argwhere(~fine)[0]
                raise OutOfRangeError(
                    f"Label {labels[tuple(place)]:g} of example {place[0]} is out of range: the "
                    f"output {term.head!r} has {term.classes} classes, 0 to {term.classes - 1}."
                )

    def doubts(self, y: Any, outputs: Callable[[str], tf.Tensor]) -> str:
        """Return what is odd about outputs that a loss takes for probabilities, or nothing.

        `outputs` takes a head's name to some of its outputs.
        """
        for term in self._terms[_shapes(y)]:
            if term.head is None or term.name not in _OF_PROBABILITIES:
                continue
            if host.loss_options(term.loss).get("from_logits"):
                continue
            p = np.asarray(outputs(term.head), "float64")
            if not p.size or not np.isfinite(p).all():
                continue
            if not are_probabilities(p, one_class_each="binary" not in term.name):
                return (
                    f"The loss {term.name!r} takes the output {term.head!r} for probabilities, but "
                    f"they range from {p.min():.3g} to {p.max():.3g}. If these are logits, give "
                    "the loss from_logits=True, for example "
                    "loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)."
                )
        return ""

    def _resolved(self, heads: Mapping[str, tf.Tensor], y: Any) -> list[Term]:
        """Return the losses of the heads that have one."""
        losses = self._loss
        if not is_nested(losses):
            if is_function(losses):
                weight = _only(self._loss_weights, "loss_weights")
                return [Term(None, losses, 1.0 if weight is None else float(weight))]
            losses = dict.fromkeys(heads, losses)
        given = _by_name(losses, self._heads, self._heads, "loss")
        names = [name for name in self._heads if given.get(name) is not None]
        if not names:
            raise InputError(f"No output has a loss. There are {self._heads}.")
        labels = _by_name(y, names, self._heads, "y")
        weights = _by_name(self._loss_weights, names, self._heads, "loss_weights")
        return [
            _term(name, given[name], heads[name], labels.get(name, ()), weights.get(name))
            for name in names
        ]

    def _dealt(self, given: Any, terms: Sequence[Term], what: str) -> dict[Any, Any]:
        return _by_name(given, [str(term.head) for term in terms], self._heads, what)

    def _of_each(self, term: Term, output: Any, y: Any, weight: Any) -> tf.Tensor:
        """Return one term of each example, (B,), weighted."""
        if isinstance(term.loss, keras.losses.Loss):
            values, masks = _called(term.loss, y, output)
        else:
            values, masks = _plain(term, y, output), []
        if self._class_weight:
            values *= tf.cast(self._weights_of(y, output, values), values.dtype)
        how = getattr(term.loss, "reduction", "mean")
        return term.weight * reduced(values, masks, weight, how)

    def _weights_of(self, y: tf.Tensor, output: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
        """Return the weight of each label's class, shaped like the losses (B, ...)."""
        if y.shape.rank == output.shape.rank and y.shape[-1] not in (1, None):
            y = tf.argmax(y, -1)  # one-hot
        if y.shape[1:].num_elements() != values.shape[1:].num_elements():
            raise InputError(
                f"class_weight does not fit labels of shape {shown(y)} beside losses of shape "
                f"{shown(values)}: give sample_weight."
            )
        y = tf.cast(tf.round(y) if y.dtype.is_floating else y, tf.int32)
        y = tf.reshape(y, tf.shape(values))
        weights = tf.ones_like(values)
        for label, weight in self._class_weight.items():
            weights = tf.where(tf.equal(y, label), tf.cast(weight, values.dtype), weights)
        return weights


def are_probabilities(outputs: np.ndarray, one_class_each: bool) -> bool:
    """Tell whether numbers may be probabilities: of classes one of which holds, or of each."""
    inside = outputs.min() >= 0 and outputs.max() <= 1 + 1e-3
    return bool(inside and (not one_class_each or np.allclose(outputs.sum(-1), 1, atol=1e-2)))


def _term(head: str, loss: Any, output: tf.Tensor, y: Any, weight: Any) -> Term:
    loss = _loss(loss, output, y)
    classes = output.shape[-1] if _name(loss) in _SPARSE else None
    return Term(head, loss, 1.0 if weight is None else float(weight), classes)


def _called(loss: keras.losses.Loss, y: Any, output: tf.Tensor) -> tuple[tf.Tensor, list]:
    """Return a Keras loss of every position, (B, ...), and the masks of those that count."""
    if is_nothing(y):
        raise InputError(f"The loss {_name(loss)!r} needs labels: give y.")
    if _name(loss) == "circle":
        raise ExamplesMeetError(
            "The loss 'circle' compares examples with one another, so an example has none by "
            "itself. Choose another loss."
        )
    dtype = at_least_float32(output.dtype)
    wide, labels = tf.cast(output, dtype), _labels(loss, tf.cast(y, dtype), output)
    try:
        values = tf.convert_to_tensor(loss.call(labels, wide))
        if values.shape.rank == 0:  # it reduces the whole batch by itself, as Dice does
            values = _one_by_one(loss, labels, wide)
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as failure:
        raise _misfit(loss, y, output, _first_line(failure)) from failure
    masks = [host.mask_of(output), host.mask_of(values)]
    return values, [mask for mask in masks if mask is not None]


def _labels(loss: keras.losses.Loss, y: tf.Tensor, output: tf.Tensor) -> tf.Tensor:
    """Return labels with which a loss of a whole batch keeps the examples apart."""
    name, (mine, theirs) = _name(loss), (y.shape.rank, output.shape.rank)
    if name in _SPARSE and mine == theirs and y.shape[-1] == 1:
        return tf.squeeze(y, -1)
    ours = getattr(loss, "fn", loss).__module__.startswith("keras.")
    if ours and name not in _OF_OTHER_AXES:
        longer = y if mine > theirs else output
        if mine != theirs and (abs(mine - theirs) > 1 or longer.shape[-1] != 1):
            raise _misfit(loss, y, output, "one of them has an axis more")
    if name in _HINGES:
        binary = tf.reduce_all((y == 0) | (y == 1), list(range(1, mine)), keepdims=True)
        return tf.where(binary, 2 * y - 1, y)
    return y


def _misfit(loss: keras.losses.Loss, y: tf.Tensor, output: tf.Tensor, why: str) -> InputError:
    return InputError(
        f"The loss {_name(loss)!r} does not take labels of shape {shown(y)} beside an output of "
        f"shape {shown(output)}: {why}"
    )


def _one_by_one(loss: keras.losses.Loss, y: tf.Tensor, output: tf.Tensor) -> tf.Tensor:
    """Call a loss that makes one number of a batch with each example as a batch of its own."""
    return tf.vectorized_map(lambda one: loss.call(one[0][None], one[1][None]), (y, output))


def _plain(term: Term, y: Any, output: Any) -> tf.Tensor:
    """Call the user's own function (y, output) -> (B,)."""
    output = tf.nest.map_structure(lambda t: tf.cast(t, at_least_float32(t.dtype)), output)
    values = tf.convert_to_tensor(term.loss(None if is_nothing(y) else y, output))
    if values.shape.rank == 0:
        raise InputError(
            f"The loss {term.name!r} returns a single number for the whole batch. Return one for "
            "each example, (B,): leave out the final mean or sum."
        )
    return values


def _loss(loss: Any, output: tf.Tensor, y: Any) -> Any:
    """Return a Keras loss, or the user's own function."""
    found: Any
    if isinstance(loss, str) and loss.lower() in ("crossentropy", "ce"):
        loss = _crossentropy(output, y)
    if isinstance(loss, str) or (isinstance(loss, Mapping) and "class_name" in loss):
        try:
            found = keras.losses.get(loss)
        except (ValueError, TypeError) as failure:
            known = sorted(_SHORT.union(vars(keras.losses)) - {"deserialize", "get", "serialize"})
            raise UnknownNameError(
                f"There is no Keras loss {loss!r}. {nearest(str(loss), known)}"
            ) from failure
    else:
        found = loss() if isinstance(loss, type) else loss
    if isinstance(found, keras.losses.Loss) or is_function(found):
        return found
    return host.wrapped_loss(found)


def _crossentropy(output: tf.Tensor, y: Any) -> str:
    """Return which cross-entropy Keras takes "crossentropy" for."""
    if output.shape.rank == 1 or output.shape[-1] == 1:
        return "binary_crossentropy"
    if is_nothing(y) or (y.shape.rank == output.shape.rank and y.shape[-1] != 1):
        return "categorical_crossentropy"
    return "sparse_categorical_crossentropy"


def _by_name(given: Any, wanted: Sequence[str], heads: Sequence[str], what: str) -> dict[str, Any]:
    """Return what was given for the wanted heads: by name, in order, or one for each."""
    if is_nothing(given):
        return {}
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in heads]
        if unknown:
            raise UnknownNameError(
                f"There is no output {unknown[0]!r}, which {what} has something for. "
                f"{nearest(str(unknown[0]), heads)}"
            )
        missing = [name for name in wanted if name not in given]
        if missing and what == "y":
            raise InputError(f"y has nothing for the output {missing[0]!r}. It has {list(given)}.")
        return {name: given[name] for name in wanted if name in given}
    if isinstance(given, (list, tuple)):
        for names in (wanted, heads):
            if len(names) == len(given):
                return {n: own for n, own in zip(names, given, strict=True) if n in wanted}
        raise InputError(
            f"Expected {what} for {len(wanted)} outputs ({', '.join(wanted)}). "
            f"Received: {len(given)}."
        )
    if len(wanted) > 1 and what == "y":
        raise InputError(f"Expected y as a list or dict for the outputs {wanted}. Received: one.")
    return dict.fromkeys(wanted, given)


def _only(given: Any, what: str) -> Any:
    """Return what was given for a function of all outputs, of which there can be but one."""
    if is_nothing(given) or not isinstance(given, (Mapping, list, tuple)):
        return None if is_nothing(given) else given
    if len(given) != 1:
        raise InputError(
            f"Expected one {what}, as the loss is one function of all outputs. "
            f"Received: {len(given)}."
        )
    return next(iter(given.values() if isinstance(given, Mapping) else given))


def is_nested(loss: Any) -> bool:
    """Tell whether it is a loss for each output."""
    return isinstance(loss, (list, tuple)) or (
        isinstance(loss, Mapping) and "class_name" not in loss
    )


def is_function(loss: Any) -> bool:
    """Tell whether a loss is the user's own function, and not Keras's."""
    ours = (getattr(loss, "__module__", "") or "").startswith("keras.")
    return callable(loss) and not ours and not isinstance(loss, (type, keras.losses.Loss))


def is_nothing(given: Any) -> bool:
    """Tell None, or the () that a Batch has in its place."""
    return given is None or (isinstance(given, tuple) and not given)


def _name(loss: Any) -> str:
    fn = getattr(loss, "fn", loss)
    return getattr(fn, "__name__", type(fn).__name__)


def _identity(loss: Any) -> Any:
    """Return what a loss is known by: Keras losses of the same function and options are one."""
    if isinstance(loss, Mapping) and is_nested(loss):
        return tuple((head, _identity(own)) for head, own in sorted(loss.items()))
    if is_nested(loss):
        return tuple(_identity(own) for own in loss)
    if isinstance(loss, Mapping):
        return json.dumps(loss, sort_keys=True, default=str)
    if loss is not None and not isinstance(loss, str) and not callable(loss):
        raise InputError(
            "Expected loss= as a Keras loss, its name, or a callable (y, output) -> (B,). "
            f"Received: {loss!r}."
        )
    if loss is None or isinstance(loss, str):
        return loss
    if not hasattr(loss, "fn"):
        return closures.identity(loss)
    # Not by its configuration, which may lack an option, as Huber's lacks delta in Keras 3.15.
    options = closures.identity(host.loss_options(loss))
    return type(loss), closures.identity(loss.fn), loss.reduction, options


def _shapes(y: Any) -> str:
    shapes = y.shape[1:] if tf.is_tensor(y) else tf.nest.map_structure(lambda t: t.shape[1:], y)
    return str(shapes)


def _first_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:300]
