"""Engine: the front door. Binds a model once and answers what each example does."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from perjac import host, independence, inputs, memory, seeds, sites
from perjac import trace as tracing
from perjac.errors import (
    DisconnectedWarning,
    InputError,
    IntegerInputError,
    NotAModelError,
    NotBuiltError,
    NotFiniteError,
    UnknownNameError,
    nearest,
)
from perjac.factors import Explicit, join_rows
from perjac.inspection import Inspection
from perjac.jacobian import Jacobian
from perjac.layout import Relabelling
from perjac.plan import Decision, Job, chunk_of, decide, rows_at_once, zero
from perjac.sources import (
    Activation,
    Source,
    Weights,
    is_variable,
    known_number,
    match,
    weights_of,
)
from perjac.tape import Tape
from perjac.verification import Verification, verify

_OPTIONS = {
    "path": ("auto", "factored", "tape"),
    "jit": ("auto", True, False),
    "independence": ("check", "trust"),
}


class _Traced:
    """A model traced for one shape of example, with what is found out about it."""

    def __init__(self, program: tracing.Program, structure: Any):
        self.program, self.structure = program, structure
        self.flow = sites.flow(program)
        self.checked: set[str] = set()  # heads whose shapes show no meeting
        self.probed: set[str] = set()  # heads for which the probe has run
        self.order = independence.Order()
        self.jobs: dict[tuple, Any] = {}


class Engine:
    """Per-example Jacobians of a model.

    Parameters
    ----------
    model : keras.Model, keras.Layer, path, tf.Module or callable
        A built Keras model, a .keras or .h5 file, or any function of a batch whose outputs have
        the batch as their first axis.
    variables : sequence of variables, optional
        The weights of a plain function; a model's own are found.
    training : bool
        Whether to run the model in training mode.
    path : {"auto", "factored", "tape"}
        "auto" takes the factored path for every weight that has a rule and the tape path for the
        others; "factored" refuses to leave it; "tape" takes the tape path for everything.
    memory_limit : int or str, optional
        Bytes, or "4GiB", that a result may take; by default a share of what is free.
    jit : {"auto", True, False}
        Whether XLA may assemble rank-one rows; "auto" does.
    independence : {"check", "trust"}
        Whether to make sure that no example influences another.

    Raises
    ------
    NotBuiltError
        If a Keras model has no weights yet.
    NotAModelError
        If `model` is nothing that can be called on a batch.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
    >>> jac = pj.Engine(model).jacobian(np.ones((2, 4), "float32"))
    >>> jac["top/bias"].shape
    TensorShape([2, 3, 3])
    """

    def __init__(
        self,
        model: Any,
        *,
        variables: Sequence[Any] | None = None,
        training: bool = False,
        path: str = "auto",
        memory_limit: int | str | None = None,
        jit: bool | str = "auto",
        independence: str = "check",
    ):
        given = {"path": path, "jit": jit, "independence": independence}
        for name, value in given.items():
            if value not in _OPTIONS[name]:
                raise InputError(f"Expected {name}= one of {_OPTIONS[name]}. Received: {value!r}.")
        memory.limit(memory_limit)  # refuses what it cannot read
        if isinstance(model, (str, pathlib.Path)):
            from perjac import files

            model = files.load_model(model)
        _check_model(model)
        self.model = model
        self._path, self._memory_limit, self._jit = path, memory_limit, jit
        self._check = independence == "check"
        self._training = training
        self._weights = _weights(model, variables)
        self._expected = inputs.declared(model)
        self._callee = tracing.Callee(self._function(), model if host.is_layer(model) else None)
        self._traced: dict[tuple, _Traced] = {}

    def __repr__(self) -> str:
        name = getattr(self.model, "name", type(self.model).__name__)
        return f"Engine({name!r}, {len(self._weights.keys)} variables)"

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs that the model declares."""
        return [e.name for e in self._expected]

    @property
    def weight_names(self) -> list[str]:
        """The keys of the trainable weights."""
        return [self._weights.keys[n] for n in self._weights.trainable]

    def jacobian(
        self,
        x: Any,
        *,
        wrt: Any = "weights",
        of: Any = None,
        outputs: Any = None,
        cotangents: Any = None,
    ) -> Jacobian:
        """Differentiate each example's outputs.

        Parameters
        ----------
        x : array, or list, tuple or dict of arrays
            A batch of B examples.
        wrt : str, layer, variable, Activation, or list of these
            "weights" (all trainable ones), "inputs", a layer (its weights), a variable, a name of
            any of these, or `pj.activation(name)` for a hidden layer's output.
        of : str, int or layer, optional
            Which output, where the model has several; or a hidden layer, for its output.
        outputs : int, list of int, or array of int (B,), optional
            Which entries of the output, counted in C order; all if left out.
        cotangents : array (B, K, *output_shape), optional
            Directions in the output, in place of single entries.

        Returns
        -------
        Jacobian
            Of shape (B, K, P); rows are formed when a key is looked up.

        Raises
        ------
        PerjacError
            Of the kind that `perjac.errors` lists: wrong shapes, unknown names, outputs out of
            range, examples that influence one another, NaN, results larger than memory.

        Warns
        -----
        DisconnectedWarning
            Where the output does not depend on something asked about: its rows are zero.
        SlowPathWarning
            Where the tape path has to go example by example.

        Notes
        -----
        The first call with a new shape of example traces the model and compiles; later calls
        with the same shapes, whatever the batch size, do not.
        """
        batch = self._prepare(x)
        traced = self._trace(batch)
        head = self._head(traced, of)
        sources = self._sources(traced, wrt)
        self._check_examples(traced, head, sources, batch)
        output = traced.program.graph.get_tensor_by_name(head)
        chosen = seeds.make(outputs, cotangents, batch.size, _row_shape(traced, head), output.dtype)
        if batch.size == 0 or chosen.count == 0:
            factors = {s.key: zero(s, batch.size, chosen.count) for s in sources}
            empty = tf.zeros([batch.size, *_row_shape(traced, head)], output.dtype)
            result = empty if batch.size == 0 else self.outputs(x, of=of)
        else:
            result, factors = self._run(traced, head, of, sources, batch, chosen)
        return Jacobian(
            factors, sources, self._weights, result, chosen.row_shape,
            memory_limit=self._memory_limit, jit=self._jit is not False,
        )  # fmt: skip

    def outputs(self, x: Any, *, of: Any = None) -> tf.Tensor:
        """Return the model's outputs, (B, *output_shape)."""
        batch = self._prepare(x)
        traced = self._trace(batch)
        job = self._job(traced, self._head(traced, of), [], {}, ("all", 1), 1)
        return job.run(batch.tensors, tf.zeros([0], tf.int32))[0]

    def inspect(self, batch_size: int = 32, *, x: Any = None, of: Any = None) -> Inspection:
        """Return how each trainable weight goes: its sites, rules, path, why, and the cost.

        Parameters
        ----------
        batch_size : int
            For the memory and work expected.
        x : array, optional
            An example batch, for a model that does not declare the shapes of its inputs.
        of : str, int or layer, optional
            As in `jacobian`.

        Returns
        -------
        Inspection
            A table: print it, or read its `rows`.
        """
        batch = self._prepare(self._example() if x is None else x)
        traced = self._trace(batch)
        head = self._head(traced, of)
        if self._check:
            self._check_shapes(traced, head)
        weights = [self._weights.source(n) for n in self._weights.trainable]
        count = tf.TensorShape(_row_shape(traced, head)).num_elements()
        decisions = self._decisions(traced, head, weights, count)
        return Inspection.of(decisions, batch_size, count)

    def verify(self, x: Any, *, of: Any = None, rtol: float | None = None) -> Verification:
        """Compare with a plain loop over examples and outputs, in float64.

        Parameters
        ----------
        x : array, or list, tuple or dict of arrays
            A few examples.
        of : str, int or layer, optional
            As in `jacobian`.
        rtol : float, optional
            The relative error allowed; by default 1e-10 in float64, 1e-4 in float32, 1e-2 below.

        Returns
        -------
        Verification
            With `passed` and the worst error of each weight.
        """
        batch = self._prepare(x)
        if batch.size == 0:
            raise InputError("Expected at least one example to verify on. Received: none.")
        traced = self._trace(batch)
        head = self._head(traced, of)
        weights = [self._weights.source(n) for n in self._weights.trainable]
        return verify(
            traced.program, head, batch, weights,
            lambda part, rows: self.jacobian(part, of=of, outputs=rows), rtol,
        )  # fmt: skip

    # ---- from what the user typed to tensors, heads and sources ----

    def _function(self) -> Callable[[Any], Any]:
        model = self.model
        if host.is_layer(model) and host.takes_training(model):
            return lambda x: model(x, training=self._training)
        return model

    def _prepare(self, x: Any) -> inputs.Batch:
        return inputs.prepare(x, self._expected, self._float())

    def _float(self) -> tf.DType | None:
        """The dtype that floating data takes where the model declares none."""
        dtypes = [host.tf_variable(v).dtype for v in self._weights.variables]
        return next((dtype for dtype in dtypes if dtype.is_floating), None)

    def _trace(self, batch: inputs.Batch) -> _Traced:
        if batch.signature not in self._traced:
            program = tracing.trace(self._callee, batch.specs, batch.structure, self._weights)
            self._traced[batch.signature] = _Traced(program, batch.structure)
        return self._traced[batch.signature]

    def _head(self, traced: _Traced, of: Any) -> str:
        if isinstance(of, Activation):
            return traced.program.tap(of)
        return traced.program.head(of.name if host.is_layer(of) else of)

    def _sources(self, traced: _Traced, wrt: Any) -> list[Source]:
        asked = wrt if isinstance(wrt, (list, tuple)) else [wrt]
        found = [source for one in asked for source in self._named(traced, one)]
        if not found:
            raise InputError("Expected wrt= to name something. Received: an empty list.")
        return list(dict.fromkeys(found))

    def _named(self, traced: _Traced, wrt: Any) -> list[Source]:
        weights, program = self._weights, traced.program
        if isinstance(wrt, Activation):
            return [_activation(program, wrt)]
        if host.is_layer(wrt):
            return weights_of(wrt, weights)
        if is_variable(wrt):
            return [weights.source(known_number(wrt, weights))]
        if not isinstance(wrt, str):
            raise InputError(
                "Expected wrt= as 'weights', 'inputs', a layer, a variable, a name, "
                f"pj.activation(name), or a list of these. Received: {wrt!r}."
            )
        if wrt == "weights":
            if not weights.trainable:
                raise InputError(
                    "The model has no trainable weights. Name the ones you mean, or wrt='inputs'."
                )
            return [weights.source(n) for n in weights.trainable]
        names = self._input_names(traced)
        if wrt == "inputs":
            return [_input(program, n, name) for n, name in enumerate(names)]
        if wrt in weights.keys:
            return [weights.source(weights.keys.index(wrt))]
        if wrt in names:
            return [_input(program, names.index(wrt), wrt)]
        return self._layer_or_weight(wrt, names)

    def _layer_or_weight(self, name: str, also: Sequence[str]) -> list[Source]:
        weights = self._weights
        inside = host.operations_within(self.model) if host.is_layer(self.model) else []
        layers = [layer for layer in inside if host.is_layer(layer) and layer.name == name]
        if len(layers) == 1:
            return weights_of(layers[0], weights)
        ends = any(key.endswith("/" + name) for key in weights.keys)
        if layers or not ends:
            known = [*weights.keys, *(layer.name for layer in inside), *also, "weights", "inputs"]
            several = f"{len(layers)} layers are called {name!r}; give the layer itself. "
            raise UnknownNameError(
                several if layers else f"There is no weight, layer or input {name!r}. "
                + nearest(name, known)
            )  # fmt: skip
        return [weights.source(weights.keys.index(match(name, weights.keys, "weight")))]

    def _input_names(self, traced: _Traced) -> list[str]:
        if self._expected:
            return self.input_names
        count = len(traced.program.inputs)
        if isinstance(traced.structure, dict) and len(traced.structure) == count:
            return sorted(traced.structure)
        return ["inputs"] if count == 1 else [f"inputs_{n}" for n in range(count)]

    def _example(self) -> Any:
        """Return one example of the shape the model declares, to trace it with."""
        if not self._expected or any(None in e.shape[1:] for e in self._expected):
            raise InputError(
                "The model does not declare the shapes of its inputs: give inspect an example "
                "batch, x=."
            )
        arrays = [tf.zeros([1, *e.shape[1:]], e.dtype) for e in self._expected]
        return arrays[0] if len(arrays) == 1 else arrays

    # ---- from those to a Jacobian ----

    def _check_examples(
        self, traced: _Traced, head: str, sources: Sequence[Source], batch: inputs.Batch
    ) -> None:
        """Make sure, once for each head, that no example influences another."""
        if not self._check:
            return
        self._check_shapes(traced, head)
        watched = [s.tensor for s in sources if s.tensor]
        if batch.size < 2 or {head, *watched} <= traced.probed:
            return
        program = traced.program
        needed = sites.upstream(program, [head])
        places = [program.graph.get_operation_by_name(s.operation) for s in traced.flow.sites]
        watched += [op.outputs[0].name for op in places if op.name in needed]
        order = independence.probe(program, traced.flow, head, watched, batch.tensors)
        astray = [s.key for s in sources if s.tensor in order.inner | order.mixed]
        if astray:
            raise InputError(
                f"The output of layer {astray[0]!r} does not keep the examples apart along its "
                "first axis, so a derivative with respect to it cannot be given per example."
            )
        traced.order |= order
        traced.probed |= {head, *watched}

    def _check_shapes(self, traced: _Traced, head: str) -> None:
        if head not in traced.checked:
            independence.check_shapes(traced.program, traced.flow, head)
            traced.checked.add(head)

    def _decisions(
        self, traced: _Traced, head: str, weights: Sequence[Source], count: int
    ) -> list[Decision]:
        key = ("decisions", head, tuple(weights), count, traced.order)
        if key not in traced.jobs:
            traced.jobs[key] = decide(
                traced.program, traced.flow, head, weights, count, self._path, traced.order
            )
        return traced.jobs[key]

    def _run(
        self,
        traced: _Traced,
        head: str,
        of: Any,
        sources: Sequence[Source],
        batch: inputs.Batch,
        chosen: seeds.Seeds,
    ) -> tuple[tf.Tensor, dict[str, Any]]:
        """Return the output and each source's factor."""
        weights = [s for s in sources if s.kind == "weight"]
        others = {
            s: s.tensor or traced.program.inputs[s.index] for s in sources if s.kind != "weight"
        }
        decisions = self._decisions(traced, head, weights, chosen.count)
        self._check_memory(decisions, others, batch.size, chosen.count, head, traced)
        taped = [d.source for d in decisions if d.path == "tape"]
        if self._path == "tape":
            taped, others = list(sources), {}
        factored = tuple(d for d in decisions if d.path == "factored")
        result, factors, fine, fine_variables = self._sweep(
            traced, head, factored, others, batch, chosen
        )
        batch.check_finite(fine.numpy())
        self._check_weights(fine_variables.numpy())
        if taped:
            tape = self._tape(traced, of, taped, chosen.kind)
            rows = tape(batch.tensors, chosen)
            for source, jacobian in zip(taped, rows, strict=True):
                factors[source.key] = Explicit(Relabelling.of(source.shape), jacobian)
            lost = {s.key for s in tape.disconnected}
        else:
            lost = set()
        lost |= {s.key for s in sources if s.key not in factors}
        if lost:
            _warn_disconnected(head, [s.key for s in sources if s.key in lost])
        return result, {
            s.key: factors[s.key] if s.key in factors else zero(s, batch.size, chosen.count)
            for s in sources
        }

    def _sweep(
        self,
        traced: _Traced,
        head: str,
        decisions: Sequence[Decision],
        tensors: dict[Source, str],
        batch: inputs.Batch,
        chosen: seeds.Seeds,
    ) -> tuple:
        """Run the job, over blocks of rows where they cannot all be compiled into one."""
        answers = []
        for block in chosen.blocks(rows_at_once(traced.program, chosen.count)):
            chunk = chunk_of(traced.program, head, block.count, batch.size)
            job = self._job(traced, head, decisions, tensors, block.signature, chunk)
            answers.append(job.run(batch.tensors, block.payload))
        result, _, *fine = answers[0]
        return result, join_rows([factors for _, factors, *_ in answers]), *fine

    def _job(
        self,
        traced: _Traced,
        head: str,
        decisions: Sequence[Decision],
        tensors: dict[Source, str],
        signature: tuple,
        chunk: int,
    ) -> Job:
        wanted = tuple(d.source.key for d in decisions), tuple(s.key for s in tensors)
        key = ("job", head, wanted, signature, chunk, traced.order)
        if key not in traced.jobs:
            traced.jobs[key] = Job(
                traced.program, head, decisions, tensors, *signature, chunk, traced.order
            )
        return traced.jobs[key]

    def _tape(self, traced: _Traced, of: Any, sources: Sequence[Source], kind: str) -> Tape:
        head = self._head(traced, of)
        key = ("tape", head, tuple(sources), kind)
        if key not in traced.jobs:
            program = traced.program
            traced.jobs[key] = Tape(
                self._callee,
                traced.structure,
                _finder(program, head),
                {s: _finder(program, s.tensor) for s in sources if s.tensor},
                self._weights.variables,
                sources,
                kind,
                vectorise=not program.stubborn,
                reason=program.stubborn,
            )
        return traced.jobs[key]

    def _check_weights(self, fine: Iterable[bool]) -> None:
        if all(fine):
            return
        for key, variable in zip(self._weights.keys, self._weights.variables, strict=True):
            value = tf.convert_to_tensor(host.tf_variable(variable))
            if value.dtype.is_floating and not tf.reduce_all(tf.math.is_finite(value)):
                raise NotFiniteError(
                    f"Weight {key!r} has NaN or Inf. The model has probably diverged in "
                    "training: go back to an earlier checkpoint."
                )

    def _check_memory(
        self,
        decisions: Sequence[Decision],
        others: dict[Source, str],
        batch: int,
        count: int,
        head: str,
        traced: _Traced,
    ) -> None:
        entries = sum(d.entries or 0 for d in decisions) + sum(count * s.size for s in others)
        size = traced.program.graph.get_tensor_by_name(head).dtype.size
        memory.check(
            batch * entries * size, self._memory_limit,
            f"Even unformed, the Jacobian of {batch} examples × {count} outputs",
            "Give fewer examples at a time, or choose outputs=.",
        )  # fmt: skip


def _check_model(model: Any) -> None:
    if host.is_layer(model):
        if not model.built:
            raise NotBuiltError(
                f"Model {model.name!r} is not built: it has no weights yet. Call it once on data, "
                "model.build(input_shape), or start it with keras.Input(...)."
            )
        return
    if not callable(model):
        raise NotAModelError(
            "Expected a Keras model, a path to a .keras or .h5 file, or a callable on a batch. "
            f"Received: {type(model).__name__}."
        )


def _weights(model: Any, variables: Sequence[Any] | None) -> Weights:
    if variables is not None:
        return Weights(list(variables), list(variables))
    if isinstance(model, (keras.layers.Layer, tf.Module)):
        return Weights(list(model.variables), list(model.trainable_variables))
    return Weights([], [])


def _input(program: tracing.Program, number: int, name: str) -> Source:
    spec = program.specs[number]
    if not spec.dtype.is_floating:
        layer = next((n for n in program.taps if "embedding" in n.lower()), "embedding")
        raise IntegerInputError(
            f"Input {name!r} is of type {spec.dtype.name}: there is no derivative with respect to "
            f"integers. Ask for the layer that turns them into numbers: pj.activation({layer!r})."
        )
    return Source("input", name, tuple(spec.shape[1:]), spec.dtype, index=number)


def _activation(program: tracing.Program, activation: Activation) -> Source:
    name = program.tap(activation)
    tensor = program.graph.get_tensor_by_name(name)
    if not tensor.dtype.is_floating:
        raise IntegerInputError(
            f"The output of layer {activation.layer!r} is of type {tensor.dtype.name}: there is "
            "no derivative with respect to integers."
        )
    extent = program.extents.get(name)
    if extent is None or extent.fold != 1:
        raise InputError(
            f"The output of layer {activation.layer!r} has no batch axis in front, so a "
            "derivative with respect to it cannot be given per example."
        )
    key = activation.layer if activation.call is None else f"{activation.layer}:{activation.call}"
    return Source("activation", key, extent.rest, tensor.dtype, tensor=name)


def _row_shape(traced: _Traced, head: str) -> tuple[int, ...]:
    """Return the output's shape for one example."""
    program = traced.program
    extent = program.extents.get(head)
    if extent is None or extent.fold != 1:
        shape = program.graph.get_tensor_by_name(head).shape
        raise InputError(
            f"The output {head!r} has shape {shape}. Expected one row for each example, with all "
            "other axes known."
        )
    return extent.rest


def _finder(program: tracing.Program, name: str) -> Callable[..., tf.Tensor]:
    """Return how the tape finds a traced tensor again: by its head, or its layer and call."""
    for head, tensor in program.heads.items():
        if tensor == name:
            return lambda heads, taps: heads[head]
    for layer, calls in program.taps.items():
        if name in calls:
            call = calls.index(name)
            return lambda *found: found[-1][layer][call]
    raise KeyError(name)


def _warn_disconnected(head: str, keys: Sequence[str]) -> None:
    names = ", ".join(map(repr, keys[:8])) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    warnings.warn(
        f"The output {head!r} does not depend on {names}: the Jacobian is zero there.",
        DisconnectedWarning,
        stacklevel=4,
    )
