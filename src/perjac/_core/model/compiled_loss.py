"""The loss that a Keras model was compiled with: the losses of its outputs, and what layers add.

Knows what `model.compile` keeps; must not know how the added losses are told apart by example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from perjac._core.backend import host
from perjac._core.model.closures import Key
from perjac._core.model.losses import Objective, is_function, is_nested, is_nothing
from perjac.errors import InputError

_NONE = (
    "The model is not compiled with a loss, and none is given. Name one, for example "
    'loss="mse", or compile the model.'
)


class CompiledLoss(Objective):
    """The loss of each example that a model was compiled with, but for what its layers add.

    Parameters
    ----------
    model : keras.Model or callable
        The model.
    loss_weights, class_weight : as in `Objective`
        In place of the compiled weights; and as Keras's `fit` takes them.

    Raises
    ------
    InputError
        If the model has no loss, or computes it in a method of its own.
    """

    adds = True

    def __init__(
        self, model: Any, loss_weights: Any = None, class_weight: Mapping[int, float] | None = None
    ):
        found = host.compiled_loss(model)
        if found is None and not host.is_layer(model):
            raise InputError(_NONE)
        own = getattr(type(model), "compute_loss", keras.Model.compute_loss)
        if own is not keras.Model.compute_loss:
            raise InputError(
                f"{type(model).__name__} computes its loss in a compute_loss() of its own, which "
                "gives one number for a whole batch. Give loss= as a function "
                "(y, output) -> (B,)."
            )
        loss, weights = (None, None) if found is None else compiled(model)
        super().__init__(loss, weights if loss_weights is None else loss_weights, class_weight)
        self.key = Key("compiled", *self.key.parts)

    def __call__(
        self, outputs: Any, heads: Mapping[str, tf.Tensor], y: Any, sample_weight: Any
    ) -> tf.Tensor | None:
        """Return the loss of each example, (B,); None where only the layers have losses."""
        if self._loss is not None:
            return super().__call__(outputs, heads, y, sample_weight)
        if not (is_nothing(y) and is_nothing(sample_weight)) or self._class_weight:
            raise InputError(
                f"{_NONE} What its layers add to the loss takes no y, sample_weight or "
                "class_weight."
            )
        return None

    def check_labels(self, y: Any) -> None:
        """As in `Objective`."""
        if self._loss is not None:
            super().check_labels(y)

    def doubts(self, y: Any, outputs: Callable[[str], tf.Tensor]) -> str:
        """As in `Objective`."""
        return "" if self._loss is None else super().doubts(y, outputs)

    @staticmethod
    def missing() -> InputError:
        """Return what to raise where neither the outputs nor the layers have a loss."""
        return InputError(_NONE)


def compiled(model: Any) -> tuple[Any, Any]:
    """Return (loss, loss_weights) that a Keras model was compiled with.

    Raises
    ------
    InputError
        If it was not.
    """
    found = host.compiled_loss(model)
    if found is None:
        raise InputError(_NONE)
    return _wrapped(found[0]), found[1]


def _wrapped(loss: Any) -> Any:
    """Wrap functions as `model.compile` does.

    That brings labels to the outputs' type and leaves out what is masked.
    """
    if is_function(loss):
        return host.wrapped_loss(loss)
    if isinstance(loss, Mapping) and is_nested(loss):
        return {head: _wrapped(own) for head, own in loss.items()}
    return [_wrapped(own) for own in loss] if is_nested(loss) else loss
