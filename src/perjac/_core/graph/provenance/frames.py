"""A traced graph laid out for one size of batch: every tensor's shape, and what indices hold.

The functions that its loops, branches and calls refer to are laid out along with it. What depends
on shapes alone is worked out here; nothing of the model is run, and no data is looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend import host
from perjac._core.graph.custom_gradients import gradient_of
from perjac._core.graph.program import Program, import_program
from perjac._core.graph.provenance.owners import Dims, Owners
from perjac._core.graph.provenance.registry import INDICES, Unclear
from perjac._core.graph.sites import Flow

# Operations that call functions, and the attributes that name these.
CALLS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("While", "StatelessWhile"), ("body", "cond")),
    **dict.fromkeys(("If", "StatelessIf"), ("then_branch", "else_branch")),
    **dict.fromkeys(("Case", "StatelessCase"), ("branches",)),
    **dict.fromkeys(("PartitionedCall", "StatefulPartitionedCall"), ("f",)),
}
_SHAPES = {"Shape", "ShapeN", "Size", "Rank"}
# Operations that take entries out of their first operand.
_PICKS = {"StridedSlice", "Slice", "GatherV2"}
# Operands that give a result its entries, where the others give its shape.
_ENTRIES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("BroadcastTo", "Reshape", "Tile"), (0,)),
    **dict.fromkeys(("ZerosLike", "OnesLike"), ()),
    "Fill": (1,),
}
# Operations whose results may be the same for two numbers and another one for a third.
_LIMITS = {
    "Cast", "Ceil", "Equal", "Floor", "FloorDiv", "FloorMod", "Greater", "GreaterEqual", "Less",
    "LessEqual", "Maximum", "Minimum", "Mod", "NotEqual", "Relu", "Rint", "Round", "Select",
    "SelectV2", "Sign", "TruncateDiv", "TruncateMod",
}  # fmt: skip
# As many entries, at most, of which values are read.
_MOST = 100_000


@dataclasses.dataclass
class Frame:
    """The operations of a graph or function, for a batch of one size.

    Attributes
    ----------
    graph : tf.Graph
        That they are in.
    ops : list of tf.Operation
        Each after what it takes.
    arguments, results : list of str
        Of a function.
    dims : dict of str to tuple
        Shapes, where they are known; of a list of tensors, an element's.
    depends, valued : set of str
        Tensors that depend on the data or on the batch's size; and those on the data itself.
    fixed : dict of str to callable
        What gives the value of a placeholder that is always the same.
    found : dict of str to Owners
        The owners that were worked out last.
    """

    graph: Any
    ops: list[Any]
    arguments: list[str]
    results: list[str]
    dims: dict[str, Any]
    depends: set[str]
    valued: set[str]
    fixed: Mapping[str, Any]
    found: dict[str, Owners] = dataclasses.field(default_factory=dict)
    _values: dict[str, np.ndarray | None] = dataclasses.field(default_factory=dict)

    def shape(self, tensor: Any) -> Dims:
        """Return a shape, all axes known, or raise Unclear."""
        dims = self.dims.get(tensor.name)
        if dims is None or None in dims:
            raise Unclear(f"the shape of {tensor.name} is unknown")
        return dims

    def rank(self, tensor: Any) -> int:
        """Return a tensor's rank, or 0 where it is unknown."""
        dims = self.dims.get(tensor.name)
        return 0 if dims is None else len(dims)

    def has_rank(self, tensor: Any, rank: int) -> bool:
        """Tell whether a tensor is known to have this rank."""
        dims = self.dims.get(tensor.name)
        return dims is not None and len(dims) == rank

    def known(self, tensor: Any) -> np.ndarray | None:
        """Return what a tensor holds whatever the data, or None."""
        if tensor.name not in self._values:
            self._values[tensor.name] = None  # while it is worked out
            self._values[tensor.name] = self._worked_out(tensor)
        return self._values[tensor.name]

    def value(self, tensor: Any) -> np.ndarray:
        """Return the same, or raise Unclear."""
        known = self.known(tensor)
        if known is None:
            raise Unclear(f"{tensor.name} depends on the data")
        return known

    def _worked_out(self, tensor: Any) -> np.ndarray | None:
        if tensor.name in self.fixed:
            return self.fixed[tensor.name]()
        op, dims = tensor.op, self.dims.get(tensor.name)
        if tensor.name not in self.knowable or op.type == "Placeholder":
            return None
        if dims is None or None in dims or int(np.prod(dims)) > _MOST:
            return None
        if op.type in _SHAPES:
            given = [self.dims.get(t.name) for t in op.inputs]
            if any(shape is None or None in shape for shape in given):
                return None
            shape = np.array(given[tensor.value_index], np.int64)
            found = {"Size": shape.prod(), "Rank": np.int64(shape.size)}.get(op.type, shape)
            return np.asarray(found, tensor.dtype.as_numpy_dtype)
        operands = [self.known(t) for t in op.inputs]
        if any(operand is None for operand in operands):
            return None
        outputs = _run(op, operands)
        for output, value in zip(op.outputs, outputs, strict=False):
            self._values[output.name] = value
        return self._values[tensor.name]

    def is_constant(self, tensor: Any) -> bool:
        """Tell whether a tensor is known to hold the same in batches of every size.

        The length of an axis which the trace knows does: a sequence's, read from the shape of a
        tensor whose examples lie along another axis. That two sizes give the same number says less:
        the smaller of 3 and the number of examples is 3 at both.
        """
        if tensor.name not in self.depends:
            return True
        entries = self._constant_entries(tensor) if tensor.name in self.knowable else None
        return entries is not None and bool(entries.all())

    def _constant_entries(self, tensor: Any) -> np.ndarray | None:
        """Return which entries of what shapes are made of are the same for every size, or None."""
        op = tensor.op
        if tensor.name not in self.depends or op.type == "Rank":
            held = self.known(tensor)
            return None if held is None else np.ones(held.shape, bool)
        if op.type in ("Shape", "ShapeN"):
            shape = op.inputs[tensor.value_index].shape
            return None if shape.rank is None else np.array([d is not None for d in shape], bool)
        if op.type in _PICKS and all(self.is_constant(t) for t in op.inputs[1:]):
            entries = self._constant_entries(op.inputs[0])
            others = [self.known(t) for t in op.inputs[1:]]
            if entries is None or any(other is None for other in others):
                return None
            return _run(op, [entries, *others])[0]
        return np.array(len(op.inputs) > 0 and all(map(self.is_constant, op.inputs)))

    @functools.cached_property
    def counts(self) -> tuple[set[str], set[str]]:
        """Tensors made of shapes that hold the number of examples, or what is made of it.

        And those of them in which it was compared, or cut off: two sizes of batch say nothing of a
        third there.
        """
        holding: set[str] = set()
        limited: set[str] = set()
        for op in self.ops:
            given = {t.name for t in _entries(op)}
            for t in op.outputs:
                if t.name not in self.knowable or self.is_constant(t):
                    continue
                if op.type in _SHAPES or not op.inputs or given & holding:
                    holding.add(t.name)
                cuts = op.type in _LIMITS and not _is_exact(op)
                if given & limited or (cuts and given & holding):
                    limited.add(t.name)
        return holding, limited

    @functools.cached_property
    def knowable(self) -> set[str]:
        """The tensors that are made of constants, of shapes and of what is fixed alone."""
        found, ragged = set(self.fixed), set()
        for op in self.ops:
            names, outputs = [t.name for t in op.inputs], [t.name for t in op.outputs]
            if op.type in _RAGGED or any(name in ragged for name in names):
                ragged.update(outputs)
            elif op.type == "Placeholder" or op.op_def.is_stateful or op.type in CALLS:
                continue
            elif op.type in _SHAPES or all(name in found for name in names):
                found.update(t.name for t in op.outputs if t.dtype not in _HANDLES)
        return found

    @functools.cached_property
    def counting(self) -> list[tuple[Any, Any]]:
        """Tensors made of the batch's size that are computed with, and the operations that do."""
        found = {}
        for op in self.ops:
            if all(t.name in self.knowable for t in op.inputs):
                continue
            places = _indices(op) if op.type not in _BY_VALUE else []
            looked_up = {op.inputs[n].name for n in places}
            for t in op.inputs:
                if t.name in self.knowable & self.depends and t.name not in looked_up:
                    found.setdefault(t.name, (t, op))
        return list(found.values())

    @functools.cached_property
    def inner(self) -> dict[str, list[Frame]]:
        """The functions that operations call, by the operation's name."""
        return {op.name: _called(op, self) for op in self.ops if op.type in CALLS}


_HANDLES = (tf.resource, tf.variant)


def frame(program: Program, flow: Flow, ops: Sequence[Any], batch: int) -> Frame:
    """Lay a trace out for a size of batch.

    Parameters
    ----------
    program, flow : Program, Flow
        The trace.
    ops : sequence of tf.Operation
        Those that matter.
    batch : int
        The size.
    """
    fixed = {
        name: functools.partial(_number, outer)
        for name, outer in program.constants.items()
        if outer.dtype not in _HANDLES and hasattr(outer, "numpy")
    }
    dims = dict(program.dims(batch))
    dims |= {t.name: None for op in ops for t in op.outputs if t.dtype in _HANDLES}
    _lay_lists(ops, dims)
    _lay_loops(ops, dims)
    return Frame(
        program.graph, list(ops), list(program.inputs), [], dims, flow.data, flow.values, fixed
    )


def _entries(op: Any) -> list[Any]:
    """Return the operands that give an operation's results their entries."""
    return [op.inputs[n] for n in _ENTRIES.get(op.type, range(len(op.inputs)))]


def _is_exact(op: Any) -> bool:
    """Tell whether an operation is a cast that keeps numbers as they are, up to rounding."""
    before, after = op.inputs[0].dtype, op.outputs[0].dtype
    return op.type == "Cast" and (after.is_floating or (after.is_integer and before.is_integer))


def _number(tensor: Any) -> np.ndarray | None:
    return tensor.numpy() if tensor.shape.num_elements() <= _MOST else None


def _run(op: Any, operands: Sequence[Any]) -> list[np.ndarray | None]:
    """Run one operation of the trace by itself."""
    if op.type == "Const":
        return [tf.make_ndarray(op.get_attr("value"))]
    run = getattr(tf.raw_ops, op.type, None)
    if run is None:
        return [None] * len(op.outputs)
    places = iter(operands)
    arguments: dict[str, Any] = {}
    inferred = set()
    # Python calls some operands otherwise than the graph does, in the same order.
    names = list(inspect.signature(run).parameters)
    for called, argument in zip(names, op.op_def.input_arg, strict=False):
        inferred.update((argument.type_attr, argument.number_attr, argument.type_list_attr))
        if argument.number_attr:
            count = op.get_attr(argument.number_attr)
            arguments[called] = [next(places) for _ in range(count)]
        elif argument.type_list_attr:
            count = len(op.get_attr(argument.type_list_attr))
            arguments[called] = [next(places) for _ in range(count)]
        else:
            arguments[called] = next(places)
    for attribute in op.op_def.attr:
        if attribute.name not in inferred:
            arguments[attribute.name] = op.get_attr(attribute.name)
    try:
        with host.lifted(), tf.device("CPU:0"):
            found = run(**arguments)
            return [np.asarray(t) for t in (found if isinstance(found, (list, tuple)) else [found])]
    except (tf.errors.OpError, TypeError, ValueError):
        return [None] * len(op.outputs)


def _called(op: Any, outer: Frame) -> list[Frame]:
    """Lay out the functions that an operation calls, on the operands that it gets."""
    operands = list(op.inputs)
    if "If" in op.type or "Case" in op.type:  # the first one decides
        operands = operands[1:]
    functions = []
    for attribute in CALLS[op.type]:
        called = op.get_attr(attribute)
        functions += called if isinstance(called, list) else [called]
    graphs = [host.function_graph(outer.graph, called.name) for called in functions]
    depends = outer.depends - {t.name for t in operands if outer.is_constant(t)}
    staying = set(range(len(operands)))
    if "While" in op.type:
        body = graphs[0]
        staying = {n for n in staying if _origin(body.outputs[n]).name == body.inputs[n].name}
    is_loop = "While" in op.type
    return [_function(graph, operands, outer, depends, staying, is_loop) for graph in graphs]


def _function(
    graph: Any,
    operands: Sequence[Any],
    outer: Frame,
    depends: set[str],
    staying: set[int],
    is_loop: bool,
) -> Frame:
    arguments = [t.name for t in graph.inputs]
    results = [t.name for t in graph.outputs]
    ops = _behind(graph, results)
    given = [t.name for t in operands]
    moved = [n for n in range(len(arguments)) if n not in staying]
    dims = {a: outer.dims.get(name) for a, name in zip(arguments, given, strict=True)}
    fixed = {
        a: functools.partial(outer.known, operands[n])
        for n, a in enumerate(arguments)
        if n in staying and given[n] in outer.knowable
    }
    numbers = {
        a: value
        for a, known in fixed.items()
        if graph.get_tensor_by_name(a).dtype.is_integer and (value := known()) is not None
    }
    dims = _inferred(graph, ops, dims, numbers)
    here = Frame(
        graph, ops, arguments, results, dims,
        _spread(ops, arguments, results, given, depends, moved, is_loop),
        _spread(ops, arguments, results, given, outer.valued, moved, is_loop, True),
        fixed,
    )  # fmt: skip
    branched = [op for op in ops if op.type in _BRANCHES]
    if not all(_is_whole(dims.get(t.name)) for op in branched for t in op.outputs):
        for op in branched:  # their results' shapes are those of the functions that they call
            for t, *ends in zip(op.outputs, *(f.results for f in _called(op, here)), strict=True):
                shapes = {f.dims.get(n) for f, n in zip(_called(op, here), ends, strict=True)}
                if len(shapes) == 1 and _is_whole(shape := shapes.pop()):
                    dims[t.name] = shape
        here = dataclasses.replace(here, dims=_inferred(graph, ops, dims, numbers), _values={})
    return here


def gradient_frame(op: Any, outer: Frame) -> tuple[Frame, list[str], list[str]]:
    """Lay out the gradient of an operation that has its own; `custom_gradients` has traced it.

    Returns
    -------
    Frame
        From the cotangents and what is carried along to the gradients; a result that is "" is none.
    list of str, list of str
        Its arguments that are the cotangents, and those that are what is carried along.
    """
    gradient = gradient_of(op)
    graph = gradient.graph
    results = [name or "" for name in gradient.dxs]
    ops = _behind(graph, [name for name in results if name])
    cotangents = ["" if t is None else t.name for t in gradient.dys]
    own = len(gradient.dys)
    taken = [*op.outputs[:own], *op.inputs[own:]]
    given = dict(zip([*cotangents, *gradient.names], taken, strict=True))
    given.pop("", None)
    dims = {name: outer.dims.get(t.name) for name, t in given.items()}
    names, outside = list(given), [t.name for t in given.values()]
    here = Frame(
        graph, ops, names, results, _inferred(graph, ops, dims, {}),
        _spread(ops, names, results, outside, outer.depends, [], False),
        _spread(ops, names, results, outside, outer.valued, [], False, True),
        {},
    )  # fmt: skip
    return here, cotangents, list(gradient.names)


def _inferred(
    graph: Any, ops: Sequence[Any], dims: dict[str, Any], numbers: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Return every tensor's shape in a function, from its arguments', and from known numbers.

    What is read from a list has the shape that was put in, which TensorFlow forgets.
    """
    found = dict(dims)
    for op in ops:  # a handle that is handed in does not say its variable's shape
        if op.type == "ReadVariableOp" and op.outputs[0].shape.is_fully_defined():
            found[op.outputs[0].name] = tuple(op.outputs[0].shape.as_list())
    for _ in range(3):  # what is put into one list may be read from another
        _lay_lists(ops, found)
        known = dict(found)
        _infer(graph, ops, found, numbers)
        _lay_lists(ops, found)
        _lay_loops(ops, found)
        if known == found:
            break
    return found


def _infer(
    graph: Any, ops: Sequence[Any], dims: dict[str, Any], numbers: Mapping[str, np.ndarray]
) -> None:
    """Let TensorFlow infer the shapes of a function's tensors, where some are given."""
    with host.scratch_graph().as_default():
        feed: dict[str, Any] = {name: tf.constant(value) for name, value in numbers.items()}
        for op in ops:
            for t in op.outputs:
                given = dims.get(t.name)
                starts = op.type in _STARTS
                if starts and t.name not in feed and (given is not None or t.dtype in _HANDLES):
                    shape = t.shape if t.dtype in _HANDLES else given
                    feed[t.name] = tf.compat.v1.placeholder(t.dtype, shape)
        names = list(dict.fromkeys(t.name for op in ops for t in op.outputs))
        names = [name for name in names if name not in feed]
        definition = graph.as_graph_def()
        for node in definition.node:  # shapes do not depend on what has to run before
            node.input[:] = [reference for reference in node.input if not reference.startswith("^")]
        try:
            found = import_program(definition, feed, names)
        except ValueError:  # of shapes that do not fit, as in a branch that is not taken
            return
        for name, tensor in found.items():
            if tensor.dtype not in _HANDLES and tensor.shape.rank is not None:
                dims[name] = tuple(tensor.shape.as_list())


_READS = {"TensorListGetItem", "TensorListPopBack"}
_BRANCHES = {"If", "StatelessIf", "Case", "StatelessCase"}
_STARTS = _READS | _BRANCHES | {"Placeholder", "ReadVariableOp", "While", "StatelessWhile"}


def _lay_lists(ops: Sequence[Any], dims: dict[str, Any]) -> None:
    """Note the shape of the elements of lists of tensors, and of what is read from them."""
    for op in ops:
        if not op.type.startswith(("TensorList", "EmptyTensorList", "Identity")):
            continue
        held = [dims.get(t.name) for t in op.inputs]
        element = None
        if op.type == "TensorListFromTensor":
            element = held[0] and held[0][1:]
        elif op.type == "TensorListSetItem":
            element = held[2] if _is_whole(held[2]) else held[0]
        elif op.type == "TensorListPushBack":
            element = held[1] if _is_whole(held[1]) else held[0]
        elif op.type in _READS or op.type == "Identity":
            element = held[0]
        if not _is_whole(element):
            continue
        for t in op.outputs:
            if t.dtype == tf.variant or op.type in _READS:
                dims[t.name] = element


def _lay_loops(ops: Sequence[Any], dims: dict[str, Any]) -> None:
    """Take the shape of a loop's results from what it starts with; `_loop` checks that it stays."""
    for op in ops:
        if op.type in ("While", "StatelessWhile"):
            for before, after in zip(op.inputs, op.outputs, strict=True):
                if not _is_whole(dims.get(after.name)) and _is_whole(dims.get(before.name)):
                    dims[after.name] = dims[before.name]


def _is_whole(dims: Any) -> bool:
    return dims is not None and None not in dims


# Operations whose operands' values rules may look at, but which compute with them.
_BY_VALUE = {"Mul", "SelectV2"}


def _indices(op: Any) -> list[int]:
    count = len(op.inputs)
    return [n % count for n in INDICES.get(op.type, ()) if -count <= n < count]


# Operations of whose results the data tells the shape.
_RAGGED = {
    "BooleanMask", "DynamicPartition", "NonMaxSuppression", "NonMaxSuppressionV2",
    "NonMaxSuppressionV3", "NonMaxSuppressionV4", "NonMaxSuppressionV5", "RaggedRange",
    "RaggedGather", "RaggedTensorToSparse", "RaggedTensorToTensor", "SparseCross", "StringSplit",
    "StringSplitV2", "Unique", "UniqueV2", "UniqueWithCounts", "UniqueWithCountsV2", "Where",
}  # fmt: skip


def _behind(graph: Any, results: Iterable[str]) -> list[Any]:
    """Return the operations that a function's results are computed from, in order."""
    needed: set[str] = set()
    stack = [graph.get_tensor_by_name(name).op for name in results]
    while stack:
        op = stack.pop()
        if op.name not in needed:
            needed.add(op.name)
            stack.extend(t.op for t in op.inputs)
    return [op for op in graph.get_operations() if op.name in needed]


def _origin(tensor: Any) -> Any:
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    return tensor


def _spread(
    ops: Sequence[Any], arguments: Sequence[str], results: Sequence[str], given: Sequence[str],
    outer: set[str], moved: Sequence[int], is_loop: bool, blind: bool = False,
) -> set[str]:  # fmt: skip
    """Return a function's tensors that depend on operands which do outside.

    `blind` says that shapes do not count. A loop's results are its arguments again.
    """
    found = {a for a, name in zip(arguments, given, strict=True) if name in outer}
    while True:
        for op in ops:
            if blind and op.type in _SHAPES:
                continue
            if any(t.name in found for t in op.inputs):
                found.update(t.name for t in op.outputs)
        if not is_loop or len(results) != len(arguments):
            return found
        again = {arguments[n] for n in moved if results[n] in found} - found
        if not again:
            return found
        found |= again
