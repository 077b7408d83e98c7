"""A model and every trace of it: one for each shape of example, and for each loss behind it.

Turns what users hand over into batches and traces; must not know what will be asked of them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from perjac import binding, host, inputs, progress
from perjac import trace as tracing
from perjac.compiling import compiles_whole
from perjac.errors import InputError, SlowPathWarning, warn
from perjac.fingerprint import Fingerprint
from perjac.losses import Objective
from perjac.naming import Names
from perjac.normalise import normalise
from perjac.traced import Traced

# The heads of a model with its loss behind it: the loss, and the outputs that it is of.
LOSS, BEHIND = "loss", "outputs/{}"


class Traces:
    """A model bound once.

    Parameters
    ----------
    model : keras.Model, keras.Layer, tf.Module or callable
        What is traced.
    variables : sequence of variables or None
        As `Engine` takes them.
    training : bool
        Whether to run the model in training mode.
    path : str
        "auto", "factored" or "tape".
    jit : {"auto", True, False}
        As `Engine` takes it.
    autotune : bool
        As `Engine` takes it.
    certify : str
        As `Engine` takes it.

    Attributes
    ----------
    weights : Weights
        The model's variables.
    expected : list of inputs.Expected
        The inputs that it declares.
    """

    def __init__(
        self,
        model: Any,
        variables: Sequence[Any] | None,
        training: bool,
        path: str,
        jit: bool | str,
        autotune: bool = False,
        certify: str = "schedule",
    ):
        self._model, self._path, self._compiles = model, path, jit is not False
        self._given, self._training = variables, training
        self._autotune, self._certify = autotune, certify
        devices = [d.device_type for d in tf.config.list_physical_devices()]
        self._whole = compiles_whole(jit, devices)
        self._made: dict[tuple, tuple[Traced, Names]] = {}
        self._compact = True
        self._fingerprint = Fingerprint(model)
        self._bind()

    def _bind(self) -> None:
        """Read the model as it is now."""
        model, self._generation = self._model, self._fingerprint.generation
        self.weights = binding.weights_of(model, self._given)
        self.expected = inputs.declared(model)
        self._callee = tracing.Callee(
            binding.function_of(model, self._training),
            model if host.is_layer(model) else None,
            self._fingerprint.called,
        )
        self._made.clear()
        self.__dict__.pop("floating", None)

    def refresh(self) -> int:
        """Forget every trace if the model has changed; return how often it has."""
        if self._fingerprint.renew() != self._generation:
            binding.loaded(self._model, None)  # refuses a model that has lost its weights
            self._bind()
        return self._generation

    @functools.cached_property
    def uncompacted(self) -> Traces:
        """The same traces, whose factors keep their two sides even where the rows are smaller."""
        other = copy.copy(self)
        other._compact = False
        return other

    @functools.cached_property
    def floating(self) -> tf.DType | None:
        """The weights' floating type, which data takes where the model declares none."""
        dtypes = [host.tf_variable(v).dtype for v in self.weights.variables]
        return next((d for d in dtypes if d.is_floating), None)

    def prepare(self, x: Any) -> inputs.Batch:
        """Return the user's examples as a batch that fits the model."""
        self.refresh()
        return inputs.prepare(x, self.expected, self.floating)

    def of(self, batch: inputs.Batch, objective: Objective | None = None) -> tuple[Traced, Names]:
        """Return the trace for such a batch: of the model, or of the loss of (x, y, weights)."""
        key = (batch.signature, objective and objective.key)
        if key not in self._made:
            callee = self._callee if objective is None else self._with_loss(objective)
            with progress.doing("tracing the model"):
                traced = tracing.trace(callee, batch.specs, batch.structure, self.weights)
                program = normalise(traced)
            names = batch.names[: batch.inputs]
            self._made[key] = (
                Traced(
                    callee,
                    program,
                    batch.structure,
                    self._path,
                    self._compiles,
                    self._whole,
                    self._autotune,
                    self._certify,
                ),
                Names(program, self.weights, self._model, names),
            )
        traced, names = self._made[key]
        return traced if self._compact else traced.uncompacted, names

    def without_xla(self, why: str) -> None:
        """Forget every trace, and let XLA compile none of the next ones.

        TensorFlow does not let two graphs define a loop's functions under the same names.

        Warns
        -----
        SlowPathWarning
            Where XLA was to compile everything.
        """
        if self._whole:
            warn(
                f"XLA does not compile this model's Jacobian: {why}. It is computed without XLA; "
                "jit=False goes without from the start.",
                SlowPathWarning,
            )
        self._compiles = self._whole = False
        self._made.clear()

    def example(self) -> Any:
        """Return one example of the shape that the model declares.

        Raises
        ------
        InputError
            If it declares none.
        """
        if not self.expected or any(None in e.shape[1:] for e in self.expected):
            raise InputError(
                "The model does not declare the shapes of its inputs: give an example batch, x=."
            )
        arrays = [tf.zeros([1, *e.shape[1:]], e.dtype) for e in self.expected]
        return arrays[0] if len(arrays) == 1 else arrays

    def _with_loss(self, objective: Objective) -> tracing.Callee:
        """Return the model with its loss behind it: (x, y, sample_weight) to losses (B,)."""
        callee = self._callee

        def losses(arguments: Any) -> dict[str, tf.Tensor]:
            x, y, sample_weight = arguments
            outputs = callee.function(x)
            heads = callee.heads(outputs)
            loss = objective(outputs, heads, y, sample_weight)
            return {LOSS: loss} | {BEHIND.format(name): head for name, head in heads.items()}

        return dataclasses.replace(callee, function=losses)
