"""The few private names of TensorFlow and Keras that perjac needs, each with its reason.

Whoever needs one imports it from here; a test of this module fails first when a release moves one.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses import losses as wrapping
from tensorflow.core.protobuf import config_pb2
from tensorflow.python import pywrap_tfe
from tensorflow.python.autograph.core import config as autograph
from tensorflow.python.eager import context
from tensorflow.python.framework import function_def_to_graph
from tensorflow.python.framework import ops as framework
from tensorflow.python.ops import control_flow_util
from tensorflow.python.ops.parallel_for import pfor

from perjac._core.backend import xla

# `autograph.core.config.CONVERSION_RULES` (since TensorFlow 1.15): a user's tf.function would
# rewrite perjac's own Python, call by call; `do_not_convert` says it of single functions alone.
autograph.CONVERSION_RULES = (autograph.DoNotConvert("perjac"), *autograph.CONVERSION_RULES)


def captures(graph: Any) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """Return what a function's graph closes over, as (tensor outside, placeholder inside).

    `FuncGraph.captures` (since TensorFlow 2.0): tells which placeholder is which variable. The
    public `ConcreteFunction.captured_inputs` gives the outer tensors without their names inside.
    """
    return list(graph.captures)


def capture(graph: Any, tensor: tf.Tensor) -> tf.Tensor:
    """Bring an outer tensor into the function graph being built (`FuncGraph.capture`).

    TensorFlow does so by itself whenever an op takes an outer tensor, but an imported graph's
    `input_map` wants tensors that are inside already.
    """
    return graph.capture(tensor) if hasattr(graph, "capture") else tensor


def function_nodes(definition: Any) -> tuple[Any, dict[str, str]]:
    """Return a FunctionDef as a GraphDef, and its tensors' names there.

    `function_def_to_graph_def` (since TensorFlow 1.9): a FunctionDef names tensors by operation,
    output argument and number, a GraphDef by operation and number.
    """
    return function_def_to_graph.function_def_to_graph_def(definition)


def compiled(function: Callable[..., Any], grows: bool = False, **options: Any) -> Compiled:
    """Return `tf.function(function, autograph=False, **options)`, quick to call.

    With `grows` it is traced once more for tensors that are longer or shorter along their first
    axes, and then never again, however long they are.

    And quiet about being traced often, by `Function._omit_frequent_tracing_warning` (since
    TensorFlow 2.4): a job or query is traced once for each shape and kind on purpose, which
    TensorFlow takes for a mistake of the user's.
    """
    made = tf.function(function, autograph=False, **options)
    made._omit_frequent_tracing_warning = True
    return Compiled(made, grows)


# TensorFlow rewrites a graph before its first run: that took 2.2 of 5.9 s for three rows of
# EfficientNetB0, 1.3 of 2.5 for ResNet50's gradients. Graphs so large run no faster for it (1.07 s
# against 1.09, 151 ms against 154).
_MANY_OPERATIONS = 4000


class Compiled:
    """A `tf.function` that finds what it has compiled by a key of its own.

    `tf.function` spends 0.5 to 0.7 ms a call on describing nested arguments to itself, which is a
    third of a small network's gradient. `ConcreteFunction._inference_function` (since TensorFlow
    2.14) runs without; where it is missing, or somebody's tape is watching, or the call is part of
    a graph being built, the tf.function itself is called.
    """

    def __init__(self, function: Any, grows: bool):
        self._function, self._grows, self._found = function, grows, {}
        self._python = function.python_function
        # By what is left of a key without the lengths: the lengths first seen, and what was traced
        # for any others; nothing where the function has to know them.
        self._lengths: dict[Any, list[int]] = {}
        self._any_length: dict[Any, Any] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Call the function with nests of tensors, which must all be positional."""
        tensors: list[Any] = []
        key = _key(arguments, tensors) if tf.executing_eagerly() else None
        if key is None or not pywrap_tfe.TFE_Py_TapeSetIsEmpty():
            return self._plainly(arguments)
        if key not in self._found:
            concrete = self._traced(arguments, tensors)
            large = len(concrete.graph.get_operations()) > _MANY_OPERATIONS
            quick = getattr(concrete, "_inference_function", None)
            around = as_it_is if large else contextlib.nullcontext
            self._found[key] = concrete, quick, around, _packing(concrete.structured_outputs)
        concrete, quick, around, packed = self._found[key]
        if quick is None:
            return self._plainly(arguments)
        with around():
            flat = quick.call_flat(*tensors, *concrete.captured_inputs)
        return packed(iter(flat))

    def _plainly(self, arguments: tuple) -> Any:
        """Call the tf.function itself, as a graph even where the user has such run eagerly."""
        if is_within_xla():  # what was traced without may not compile
            with xla.for_xla():
                return self._python(*arguments)
        if not tf.config.functions_run_eagerly():
            return self._function(*arguments)
        tf.config.run_functions_eagerly(False)  # as tf.vectorized_map does
        try:
            return self._function(*arguments)
        finally:
            tf.config.run_functions_eagerly(True)

    def _traced(self, arguments: tuple, tensors: list[Any]) -> Any:
        """Return the concrete function for these arguments.

        `reduce_retracing` would do it, but TensorFlow 2.21 cannot generalise the type of a nested
        dataclass.
        """
        if not self._grows:
            return self._function.get_concrete_function(*arguments)
        kind = _key(arguments, [], whole=False)
        lengths = [t.shape[0] if t.shape.rank else 0 for t in tensors]
        first = self._lengths.setdefault(kind, lengths)
        if first == lengths:
            return self._function.get_concrete_function(*arguments)
        if kind not in self._any_length:
            specs = [
                tf.TensorSpec(t.shape if a == b else [None, *t.shape[1:]], t.dtype)
                for t, a, b in zip(tensors, first, lengths, strict=True)
            ]
            self._any_length[kind] = specs, self._with(arguments, specs)
        specs, concrete = self._any_length[kind]
        if concrete and all(s.is_compatible_with(t) for s, t in zip(specs, tensors, strict=True)):
            return concrete
        return self._function.get_concrete_function(*arguments)

    def _with(self, arguments: tuple, specs: list[tf.TensorSpec]) -> Any:
        try:
            return self._function.get_concrete_function(*_packing(arguments)(iter(specs)))
        except (TypeError, ValueError):  # what needs an axis that is not known raises these
            return None


@contextlib.contextmanager
def as_it_is() -> Iterator[None]:
    """Run functions inside the block without rewriting their graphs (Grappler) at the first call.

    `Context.function_call_options` (since TensorFlow 1.14) is what a call is made with; the public
    `tf.config.optimizer` says it of the whole process. Everything else stays as the user has it.
    """
    here: Any = context.context()
    usual = here.function_call_options
    here.function_call_options = _unchanged(usual)
    try:
        yield
    finally:
        here.function_call_options = usual


@functools.lru_cache(maxsize=8)
def _unchanged(usual: Any) -> Any:
    settings = config_pb2.ConfigProto.FromString(usual.config_proto_serialized)
    settings.graph_options.rewrite_options.disable_meta_optimizer = True
    return context.FunctionCallOptions(usual.executor_type, settings)


def _key(thing: Any, tensors: list[Any], whole: bool = True) -> Any:
    """Return what a compiled function depends on, and gather the tensors; None if it is unknown.

    Without the lengths of first axes, if not `whole`.
    """
    if isinstance(thing, framework.EagerTensor):
        tensors.append(thing)
        shape = thing._shape_tuple()
        return shape if whole else (len(shape), *shape[1:]), thing.dtype
    if isinstance(thing, dict):
        parts = [(name, _key(thing[name], tensors, whole)) for name in sorted(thing)]
        return None if any(part is None for _, part in parts) else (dict, *parts)
    static, moving = (), thing
    if hasattr(thing, "__tf_flatten__"):
        static, moving = thing.__tf_flatten__()
    elif not isinstance(thing, (list, tuple)):
        return None
    parts = [_key(part, tensors, whole) for part in moving]
    return None if None in parts else (type(thing), static, *parts)


def _packing(structure: Any) -> Callable[[Iterator[Any]], Any]:
    """Return what does as `tf.nest.pack_sequence_as` to tensors, for what perjac returns.

    The structure is looked at once, not at every call.
    """
    if isinstance(structure, dict):
        names, parts = list(structure), [(n, _packing(structure[n])) for n in sorted(structure)]

        def mapping(flat: Iterator[Any]) -> dict:
            found = {name: part(flat) for name, part in parts}
            return {name: found[name] for name in names}

        return mapping
    if hasattr(structure, "__tf_flatten__"):
        static, moving = structure.__tf_flatten__()
        inside, made = _packing(tuple(moving)), type(structure).__tf_unflatten__
        return lambda flat: made(static, inside(flat))
    if isinstance(structure, (list, tuple)):
        kind, each = type(structure), [_packing(part) for part in structure]
        return lambda flat: kind([part(flat) for part in each])
    return next


@contextlib.contextmanager
def lifted() -> Iterator[None]:
    """Run the block outside of all functions that are being traced; there it is as it was.

    `tf.init_scope` does so but stops all tapes, of which models and the tape path have their own:
    `TFE_Py_TapeSetRestartOnThread` (since TensorFlow 1.13) lets those record.
    """
    if tf.executing_eagerly():
        yield
        return
    with tf.init_scope():
        pywrap_tfe.TFE_Py_TapeSetRestartOnThread()
        try:
            yield
        finally:
            pywrap_tfe.TFE_Py_TapeSetStopOnThread()


def is_within_xla() -> bool:
    """Tell whether a function is being traced that XLA will compile.

    `GraphOrParentsInXlaContext` (since TensorFlow 2.1): nothing public tells.
    """
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)


def is_watched() -> bool:
    """Tell whether a tape is recording, or may be: inside a graph being built."""
    return not (tf.executing_eagerly() and pywrap_tfe.TFE_Py_TapeSetIsEmpty())


def is_eager(tensor: Any) -> bool:
    """Tell whether a tensor has its numbers (`EagerTensor`, since TensorFlow 1.5)."""
    return isinstance(tensor, framework.EagerTensor)


def runs_eagerly_outside() -> bool:
    """Tell whether there is eager execution around all graphs being built."""
    return bool(tf.compat.v1.executing_eagerly_outside_functions())


def runs_at_once() -> bool:
    """Tell whether operations run at once, and functions are compiled."""
    return tf.executing_eagerly() and not tf.config.functions_run_eagerly()


def scratch_graph() -> Any:
    """Return a function graph to try things in (`tf.__internal__.FuncGraph`, since 2.5)."""
    return tf.__internal__.FuncGraph("scratch")


def carry_gradient(traced: Any, imported: Any) -> None:
    """Let an imported call be differentiated like the traced one.

    A call's gradient is a Python function kept on the operation (`Operation._gradient_function`,
    since TensorFlow 2.2), which a GraphDef does not hold; without it TensorFlow falls back to a
    SymbolicGradient that does not run.
    """
    imported._gradient_function = traced._gradient_function


# Operation → the name of its gradient between tensors of equal shapes. Where shapes are not all
# known, TensorFlow's own takes ten operations to find out along which axes to sum: none here.
ALIKE = {name: f"PerjacAlike{name}" for name in ("Add", "AddV2", "Sub", "Mul")}
# Operation → the name of its gradient for the first operand alone. TensorFlow's own works the
# second one's out too, for which a loop keeps the first, step by step, even if nobody asks.
FIRST = {name: f"PerjacFirst{name}" for name in ("MatMul",)}


def _matmul_first(op: Any, dy: tf.Tensor) -> tuple[tf.Tensor, None]:
    w, transposed = op.inputs[1], op.get_attr("transpose_b")
    if op.get_attr("transpose_a"):
        return tf.matmul(w, dy, transpose_a=transposed, transpose_b=True), None
    return tf.matmul(dy, w, transpose_b=not transposed), None


for _name, _gradient in {
    ALIKE["Add"]: lambda op, dy: (dy, dy),
    ALIKE["AddV2"]: lambda op, dy: (dy, dy),
    ALIKE["Sub"]: lambda op, dy: (dy, -dy),
    ALIKE["Mul"]: lambda op, dy: (dy * op.inputs[1], dy * op.inputs[0]),
    FIRST["MatMul"]: _matmul_first,
}.items():
    tf.RegisterGradient(_name)(_gradient)


def _vectorised_matmul(asked: Any) -> Any:
    """Return what a vectorised map makes of BatchMatMulV2, past a kernel that is wrong.

    oneDNN's product (N, 1, T, I) @ (1, 1, I, O), as in TensorFlow 2.21, reads past its operands:
    wrong numbers, or the end of the process. That is N rows of one example. With another axis of
    length 1 it is right and takes as long.
    """
    asked.expanddim_inputs_for_broadcast()
    operands = [asked.input(n)[0] for n in range(2)]
    matrices = [x for x in operands if x.shape.rank == 4]
    risky = max(x.shape.rank or 0 for x in operands) == 4 and all(
        x.shape[1] in (1, None) for x in matrices
    )
    if risky:
        operands = [x[:, None] if x.shape.rank == 4 else x for x in operands]
    product = tf.matmul(
        *operands, adjoint_a=asked.get_attr("adj_x"), adjoint_b=asked.get_attr("adj_y")
    )
    return pfor.wrap(tf.squeeze(product, 1) if risky else product, True)


def _vectorised_l2_loss(asked: Any) -> Any:
    """Return what a vectorised map makes of L2Loss, which TensorFlow 2.21 has nothing for."""
    x = asked.stacked_input(0)
    return pfor.wrap(tf.reduce_sum(x * x, list(range(1, x.shape.rank))) / 2, True)


# `pfor._pfor_converter_registry` (since TensorFlow 1.13): `RegisterPFor` refuses to replace one.
pfor._pfor_converter_registry["BatchMatMulV2"] = _vectorised_matmul
pfor._pfor_converter_registry.setdefault("L2Loss", _vectorised_l2_loss)


def goes_its_own_way(operation: Any) -> bool:
    """Tell whether an operation has a gradient of its own, other than its type's."""
    return "_gradient_op_type" in operation.node_def.attr


def registered_gradient(name: bytes) -> Callable[..., Any]:
    """Return the gradient registered under a name (`ops.gradient_registry`, since TensorFlow 1.0).

    `tf.RegisterGradient` registers and nothing public looks up.
    """
    return framework.gradient_registry.lookup(name.decode())


def gradient_function(op: Any) -> Callable[..., Any] | None:
    """Return an operation's gradient, of it and its cotangents; None where nothing goes through.

    `ops.get_gradient_function` (since TensorFlow 1.0): `tf.gradients` walks whole graphs, and not
    from inside a loop's body out of it, where one operation's own gradient can be taken.
    """
    return framework.get_gradient_function(op)


def function_graph(graph: Any, name: str) -> Any:
    """Return the graph that a function was traced in (`Graph._get_function`, since 1.0).

    A function that came with an imported graph has its definition only (`_DefinedFunction`), from
    which `function_def_to_graph` (since 1.9) makes a graph.
    """
    found = graph._get_function(name)
    if hasattr(found, "graph"):
        return found.graph
    with graph.as_default():  # where the functions that it calls itself are found
        return function_def_to_graph.function_def_to_graph(found.definition)


def tf_variable(variable: Any) -> tf.Variable:
    """Return the `tf.Variable` behind a Keras or TensorFlow variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def handle(variable: Any) -> tf.Tensor:
    """Return the resource that ReadVariableOp reads (`ResourceVariable.handle`, since 2.0)."""
    return tf_variable(variable).handle


def variables_read(concrete: Any, held: Sequence[Any]) -> list[Any]:
    """Return the variables that a concrete function reads, in the order in which it meets them.

    Keras variables where there are such: TensorFlow knows only what is behind them, which has
    neither their path nor, once a layer is frozen, their `trainable`. `KerasVariable._value`
    (Keras 3.0) is what is behind; the public `value` may be a copy in another type. They are looked
    for among those `held`, and then among all that there are, which takes 0.1 s.
    """
    handles = {id(handle(v)): v for v in concrete.variables}
    read = [handles[id(outer)] for outer, _ in captures(concrete.graph) if id(outer) in handles]
    known = {id(getattr(v, "_value", v)): v for v in held}
    if not all(id(v) in known for v in read):
        kinds = {keras.Variable, *keras.Variable.__subclasses__()}
        there = [thing for thing in gc.get_objects() if type(thing) in kinds]
        known |= {id(getattr(v, "_value", v)): v for v in there}
    return [known.get(id(v), v) for v in read]


def variable_path(variable: Any) -> str:
    """Return a Keras variable's path, or a tf.Variable's name without its output number."""
    return getattr(variable, "path", None) or variable.name.removesuffix(":0")


def operations_within(model: Any) -> list[Any]:
    """Return the layers and operations inside a Keras model or layer, nested ones included.

    `Layer._flatten_layers` (Keras 3.0) reaches layers of subclassed models; `Functional.operations`
    adds the nameless operations between them.
    """
    layers = list(model._flatten_layers(include_self=False)) if is_layer(model) else []
    found = {id(layer): layer for layer in layers}
    for part in [model, *layers]:
        for operation in getattr(part, "operations", []):
            found.setdefault(id(operation), operation)
    return list(found.values())


def is_keras_variable(thing: Any) -> bool:
    """Tell whether `thing` is a variable of Keras's own."""
    return isinstance(thing, keras.Variable)


@contextlib.contextmanager
def computing_in_float64(model: Any, values: Sequence[tuple[Any, tf.Tensor]]) -> Iterator[None]:
    """Let a Keras model compute in float64 inside the block, on other values of its variables.

    `Layer._dtype_policy` (Keras 3.0) without the setter, which may quantise; and
    `StatelessScope.state_mapping` (3.0), as its constructor casts to the variables' own types.
    """
    wide = keras.dtype_policies.DTypePolicy("float64")
    layers = [layer for layer in [model, *operations_within(model)] if is_layer(layer)]
    usual = [layer._dtype_policy for layer in layers]
    scope = keras.StatelessScope(initialize_variables=False)
    scope.state_mapping = {id(variable): value for variable, value in values}
    try:
        for layer in layers:
            object.__setattr__(layer, "_dtype_policy", wide)
        with scope:
            yield
    finally:
        for layer, policy in zip(layers, usual, strict=True):
            object.__setattr__(layer, "_dtype_policy", policy)


def is_layer(thing: Any) -> bool:
    """Tell whether `thing` is a Keras layer or model."""
    return isinstance(thing, keras.layers.Layer)


def is_part(thing: Any) -> bool:
    """Tell whether `thing` is a layer, operation or module: what models are made of."""
    return isinstance(thing, (keras.Operation, tf.Module))


# Attributes in which Keras 3 keeps account of calls, of where a layer is used, and of saving; and
# those in which a model keeps its training.
_ACCOUNTS, _TRAINING = (
    frozenset(names.split())
    for names in (
        """_tracker _tracked _lock _path _parent_path _called _losses _loss_ids _losses_override
        _metrics _inbound_nodes _outbound_nodes _build_shapes_dict _auto_config _call_context_args
        _saved_model_inputs_spec _saved_model_arg_spec _call_has_context_arg _call_signature
        call_signature_parameters _seed_generators _nodes _nodes_by_depth _operations_by_depth
        name _name is_gptq_calibrated is_awq_calibrated""",
        """_run_eagerly _jit_compile compiled loss optimizer steps_per_execution _initial_epoch
        history _compute_loss_has_training_arg _compile_loss _compile_metrics _loss_tracker
        _compile_config _compiled_trainable_state _distribute_strategy _distribute_reduction_method
        train_function test_function predict_function unrolled_steps_per_execution stop_training
        _eval_epoch_iterator stop_evaluating stop_predicting train_tf_function test_tf_function
        predict_tf_function""",
    )
)


def is_bookkeeping(thing: Any, attribute: str) -> bool:
    """Tell whether an attribute of a layer or module says nothing about what it computes."""
    if attribute.startswith("_self_"):
        return attribute != "_self_tracked_trackables"  # parts of older Keras models
    return attribute in _ACCOUNTS or (attribute in _TRAINING and hasattr(thing, "compile"))


def compiled_loss(model: Any) -> tuple[Any, Any] | None:
    """Return the (loss, loss_weights) of `model.compile`, or None where there is none.

    `Trainer._compile_loss` (Keras 3.0) keeps what the user gave; `model.loss` does not.
    """
    made = getattr(model, "_compile_loss", None)
    return None if made is None else (made._user_loss, made._user_loss_weights)


def wrapped_loss(function: Callable[..., Any]) -> keras.losses.Loss:
    """Return one of Keras's loss functions as a Loss, as `model.compile` does.

    `LossFunctionWrapper` (Keras 3.0) is not exported; it brings labels and outputs to one rank.
    """
    return wrapping.LossFunctionWrapper(function)


def loss_options(loss: Any) -> dict[str, Any]:
    """Return what a Keras loss gives its function (`LossFunctionWrapper._fn_kwargs`, since 3.0)."""
    return dict(getattr(loss, "_fn_kwargs", {}))


def mask_of(tensor: tf.Tensor) -> tf.Tensor | None:
    """Return the mask that a layer or loss left on a tensor (`_keras_mask`, since Keras 3.0)."""
    return getattr(tensor, "_keras_mask", None)


def logits_of(tensor: tf.Tensor) -> tf.Tensor | None:
    """Return what a softmax or sigmoid was taken of; Keras 3.0 notes it down (`_keras_logits`)."""
    return getattr(tensor, "_keras_logits", None)


def takes_training(layer: Any) -> bool:
    """Tell whether a layer's `call` has a `training` argument, by name or by `**kwargs`."""
    parameters = inspect.signature(layer.call).parameters.values()
    return any(p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters)
