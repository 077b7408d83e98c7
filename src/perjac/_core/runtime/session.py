"""A model and every trace of it: one for each shape of example, and for each loss behind it.

Turns what users hand over into batches and traces; must not know what will be asked of them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from perjac import progress
from perjac._core.backend import host
from perjac._core.backend.xla import compiles_whole
from perjac._core.graph import added_losses
from perjac._core.graph import program as tracing
from perjac._core.graph.added_losses import LOSS, Behind
from perjac._core.graph.names import Names
from perjac._core.graph.normal_form import normalise
from perjac._core.graph.text_tables import why_not_xla
from perjac._core.model import inputs, inside_functions, loading
from perjac._core.model.fingerprint import Fingerprint
from perjac._core.model.losses import Objective
from perjac._core.runtime import fixed_batch
from perjac._core.runtime.fixed_batch import Fixed
from perjac._core.runtime.traced_model import Traced
from perjac.errors import ExamplesMeetError, InputError, PerjacError, SlowPathWarning, warn

_FOLDED = "its shapes hold the number of examples"


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
        # What is traced at one batch size alone: why, by signature; and the traces, by size too.
        self._sized: dict[tuple, tuple[str, ExamplesMeetError | None]] = {}
        self._of_one: dict[tuple, tuple[Fixed, Names]] = {}
        self._fingerprint = Fingerprint(model)
        self._bind()

    def _bind(self) -> None:
        """Read the model as it is now."""
        model, self._generation = self._model, self._fingerprint.generation
        self.weights = loading.weights_of(model, self._given)
        self.expected = inputs.declared(model)
        self._callee = tracing.Callee(
            loading.function_of(model, self._training),
            model if host.is_layer(model) else None,
            self._fingerprint.called,
        )
        for found in (self._made, self._sized, self._of_one):
            found.clear()
        self.__dict__.pop("floating", None)

    def refresh(self) -> int:
        """Forget every trace if the model has changed; return how often it has."""
        if self._fingerprint.renew() != self._generation:
            loading.loaded(self._model, None)  # refuses a model that has lost its weights
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
        known = self.weights.variables or loading.within_reach(self._model)
        dtypes = (tf.as_dtype(host.tf_variable(v).dtype).real_dtype for v in known)
        return next((d for d in dtypes if d.is_floating), None)

    def prepare(self, x: Any) -> inputs.Batch:
        """Return the user's examples as a batch that fits the model."""
        self.refresh()
        return inputs.prepare(x, self.expected, self.floating)

    def of(self, batch: inputs.Batch, objective: Objective | None = None) -> tuple[Traced, Names]:
        """Return the trace for such a batch: of the model, or of the loss of (x, y, weights).

        Raises
        ------
        InputError
            For a model of one fixed batch size, if the batch has another.
        """
        if inside_functions.is_inside():
            inside_functions.check(batch)
        key = (batch.signature, objective and objective.key)
        if key not in self._made:
            with host.lifted():
                self._made[key] = self._traced(batch, objective)
        made = self._made[key] if not self._sized else self._of_size(batch, objective, key)
        traced, names = made
        return traced if self._compact else traced.uncompacted, names

    def asked(
        self,
        batch: inputs.Batch,
        of: Any,
        objective: Objective | None = None,
        check: bool = True,
    ) -> tuple[Traced, Names, str]:
        """Return the trace that answers for an output, its names, and the output's tensor.

        `check` is whether to refuse an output on whose way examples meet, as far as the graph says.
        Where the batch axis is lost, the model may still work on batches of this size alone.

        Raises
        ------
        ExamplesMeetError
            If they do.
        """
        traced, names = self.of(batch, objective)
        head = names.head(of)
        try:
            traced.check_shapes(head)
        except ExamplesMeetError as meeting:
            if batch.size == 0 or isinstance(traced, Fixed):
                raise
            if not check and head in traced.program.extents:
                return traced, names, head
            try:
                traced, names = self._at_size(batch, objective, _FOLDED, meeting)
                head = names.head(of)
                traced.check_shapes(head)
                if traced.provenance(head).unclear:
                    raise meeting
            except Exception:  # TensorFlow raises whatever another size runs into
                raise meeting from None
            self._sized[(batch.signature, objective and objective.key)] = _FOLDED, meeting
            self._of_one[(batch.signature, objective and objective.key, batch.size)] = traced, names
        if check:
            traced.check_graph(head)
        return traced, names, head

    def _traced(self, batch: inputs.Batch, objective: Objective | None) -> Any:
        """Return the trace at an unknown batch size, or None where there is only one of a size."""
        key = (batch.signature, objective and objective.key)
        try:
            with progress.doing("tracing the model"):
                found = self._behind(objective, batch.specs, batch.structure)
                if not inside_functions.is_rehearsing() and all(map(host.is_eager, batch.tensors)):
                    found.program.offer(batch.tensors)
                if self._declared_size is not None:
                    _ = found.program.extents  # a number of examples in a reshape shows here
                program = normalise(found.program)
                _ = program.extents
        except PerjacError:
            raise
        except Exception as failure:  # TensorFlow raises whatever an unknown size runs into
            self._retry(batch, objective, key, failure)
            return None
        if self._compiles and (why := why_not_xla(program)):
            self.without_xla(why)
        traced = Traced(
            found.callee, program, batch.structure, self._path, self._compiles, self._whole,
            self._autotune, self._certify,
        )  # fmt: skip
        if found.slow:
            traced.refuse(program.heads[LOSS], found.slow)
        if self._declared_size is not None:
            try:
                for head in program.heads.values():
                    traced.check_shapes(head)
            except ExamplesMeetError as meeting:
                self._sized[key] = _FOLDED, meeting
        return traced, Names(program, self.weights, self._model, batch.names[: batch.inputs])

    def _behind(
        self, objective: Objective | None, specs: Sequence[tf.TensorSpec], structure: Any
    ) -> Behind:
        """Return the model, or the model with a loss behind it, and its trace."""
        about = specs, structure, self.weights
        if objective is None:
            return Behind(self._callee, tracing.trace(self._callee, *about))
        return added_losses.behind(self._callee, objective, *about)

    def _retry(
        self, batch: inputs.Batch, objective: Objective | None, key: tuple, failure: Exception
    ) -> None:
        """Trace at the batch's own size, where an unknown one failed; or raise that failure."""
        why = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0][:120]}"
        size = batch.size
        if self._declared_size is not None and size != self._declared_size:
            self._sized[key] = why, None
            return  # which is refused, and says so
        if size == 0:
            raise failure
        try:
            self._of_one[(*key, size)] = self._at_size(batch, objective, why, None)
        except Exception:  # it is not the size, then
            if any(t.dtype == tf.string for t in batch.tensors) and not self.expected:
                raise InputError(f"The model does not take this text: {why}") from failure
            raise failure from None
        self._sized[key] = why, None

    def _of_size(self, batch: inputs.Batch, objective: Objective | None, key: tuple) -> Any:
        """Return the trace at the batch's own size, where that at an unknown one will not do."""
        if key not in self._sized:
            return self._made[key]
        why, meeting = self._sized[key]
        size = self._declared_size
        if size is not None and batch.size != size:
            raise InputError(
                f"Expected batches of {size} examples, the only size that the model works on "
                f"({why}). Received: {batch.size}. Repeat examples to fill the last batch, or "
                "build the model without a batch size."
            )
        if (*key, batch.size) not in self._of_one:
            try:
                self._of_one[(*key, batch.size)] = self._at_size(batch, objective, why, meeting)
            except Exception as failure:  # TensorFlow raises whatever another size runs into
                raise InputError(
                    f"The model does not work on batches of {batch.size} examples, while it does "
                    f"on others ({why})."
                ) from failure
        return self._of_one[(*key, batch.size)]

    def _at_size(
        self,
        batch: inputs.Batch,
        objective: Objective | None,
        why: str,
        meeting: ExamplesMeetError | None,
    ) -> tuple[Fixed, Names]:
        sized = [tf.TensorSpec([batch.size, *s.shape[1:]], s.dtype) for s in batch.specs]
        with host.lifted(), progress.doing("tracing the model"):
            callee = self._callee
            if objective is not None:
                callee = self._behind(objective, sized, batch.structure).callee
            program = fixed_batch.trace(callee, sized, batch.structure, self.weights, batch.size)
        names = Names(program, self.weights, self._model, batch.names[: batch.inputs])
        return Fixed(callee, program, batch.structure, self._path, why, meeting), names

    @property
    def _declared_size(self) -> int | None:
        """The batch size that the model declares, which need not be the only one it works on."""
        sizes = [e.shape[0] for e in self.expected if e.shape]
        return next((size for size in sizes if size is not None), None)

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
        self._of_one.clear()

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
        count = self._declared_size or 1
        arrays = [tf.zeros([count, *e.shape[1:]], e.dtype) for e in self.expected]
        return arrays[0] if len(arrays) == 1 else arrays
