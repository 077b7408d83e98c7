"""What layers add to the loss (`add_loss`, activity regularisers), told apart by example.

A layer adds one number for the whole batch. An example's part is what it would add for a batch of
that example alone. It is read off the trace: from the tensors closest to the number that still have
one row for each example, the rest of the way is computed for each row by itself, sizes included. A
trace that cannot be cut so is made again with the model called once for each example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend.dtypes import at_least_float32
from perjac._core.graph import captured_rows, sites
from perjac._core.graph import program as tracing
from perjac._core.graph.inline import CALLS
from perjac._core.graph.normal_form import flatten
from perjac._core.graph.program import Callee, Program, collect, import_program
from perjac._core.model.losses import Objective
from perjac._core.model.variables import Weights
from perjac.errors import InputError

# The heads of a model with its loss behind it: the loss, and the outputs that it is of.
LOSS, BEHIND = "loss", "outputs/{}"
_ADDED = "added/{}"


# Operations that a vectorised map is trusted with: those of numbers by themselves, reductions, and
# what moves numbers. It converts some others wrongly, without a word.
_ALONE = (
    "Abs Add AddV2 AddN Acos Asin Atan Atan2 Cast Ceil ClipByValue Cos Cosh Div DivNoNan Elu Equal "
    "Erf Erfc Exp Expm1 Floor Greater GreaterEqual Identity IsFinite IsNan LeakyRelu Less "
    "LessEqual Lgamma Log Log1p LogicalAnd LogicalNot LogicalOr Maximum Minimum Mul MulNoNan Neg "
    "NotEqual OnesLike Pow RealDiv Reciprocal Relu Relu6 Round Rsqrt Select SelectV2 Selu Sigmoid "
    "Sign Sin Sinh Softplus Softsign Sqrt Square SquaredDifference StopGradient Sub Tan Tanh Xdivy "
    "Xlog1py Xlogy ZerosLike FloorDiv FloorMod"
)
_REDUCE = "All Any ArgMax ArgMin L2Loss LogSoftmax Max Mean Min Prod Softmax Sum"
_MOVE = (
    "BroadcastTo ConcatV2 ExpandDims Fill GatherV2 OneHot Pack Range Reshape Shape Size Split "
    "Squeeze StridedSlice Tile Transpose Unpack"
)
_MULTIPLY = "BatchMatMulV2 BiasAdd MatMul"
_TRUSTED = frozenset(" ".join((_ALONE, _REDUCE, _MOVE, _MULTIPLY)).split())


class _NotApart(Exception):
    """Raised where a trace cannot be cut between the examples' own rows and the added number."""


@dataclasses.dataclass(frozen=True)
class Behind:
    """A model with its loss behind it.

    Attributes
    ----------
    callee : Callee
        (x, y, sample_weight) to the losses (B,), and the outputs.
    program : Program
        Its trace.
    slow : str
        Why its derivatives must come from the callee, or nothing where the trace has them.
    """

    callee: Callee
    program: Program
    slow: str = ""


def behind(
    callee: Callee,
    objective: Objective,
    specs: Sequence[tf.TensorSpec],
    structure: Any,
    weights: Weights,
) -> Behind:
    """Trace a model with its loss behind it.

    Parameters
    ----------
    callee : Callee
        The model.
    objective : Objective
        The loss, which may take in what layers add.
    specs, structure, weights : as in `trace.trace`
        Of (x, y, sample_weight).

    Raises
    ------
    InputError
        If there is no loss, or a layer adds one that is not part of the graph.
    """
    if not objective.adds:
        whole = _with(callee, objective, lambda x: {})
        return Behind(whole, tracing.trace(whole, specs, structure, weights))
    model = callee.model
    bare = _with(callee, objective, lambda x: _added(model))
    program = tracing.trace(bare, specs, structure, weights)
    names = [name for name in program.heads if name not in (LOSS, *_outputs(program))]
    mine = _of_data(program, names)
    if not mine and LOSS not in program.heads:
        raise objective.missing()  # type: ignore[attr-defined]
    which = [names.index(name) for name in mine]
    alone = _Alone(callee, which)
    whole = _with(callee, objective, alone.of_each if mine else lambda x: {})
    if not mine:
        heads = {name: t for name, t in program.heads.items() if name not in names}
        return Behind(whole, dataclasses.replace(program, heads=heads))
    if specs[0].shape[0] is not None:
        raise InputError(
            "This model takes batches of one size alone, so what its layers add to the loss is not "
            "known for an example by itself. Give loss= for the loss without it."
        )
    try:
        return Behind(whole, _apart(program, mine, [n for n in names if n not in mine]))
    except _NotApart as refusal:
        slow = f"what layers add to its loss is computed for each example alone: {refusal}"
        return Behind(whole, tracing.trace(whole, specs, structure, weights), slow)


def _with(callee: Callee, objective: Objective, more: Callable[[Any], Any]) -> Callee:
    """Return the model with its loss behind it.

    `more` takes the inputs, after the model was called on them, to a number for each example, to
    more heads, or to nothing.
    """

    def losses(arguments: Any) -> dict[str, tf.Tensor]:
        x, y, sample_weight = arguments
        outputs = callee.function(x)
        added = more(x)
        heads = callee.heads(outputs)
        loss = _unmixed(objective, outputs, heads, y, sample_weight)
        found = {BEHIND.format(name): head for name, head in heads.items()}
        if isinstance(added, dict):
            found |= added
        elif loss is None:
            loss = added
        else:
            loss = _total([loss, added])
        return found if loss is None else {LOSS: loss} | found

    return dataclasses.replace(callee, function=losses)


def _unmixed(
    objective: Objective, outputs: Any, heads: Mapping[str, tf.Tensor], y: Any, sample_weight: Any
) -> tf.Tensor | None:
    """Return the losses (B,), made of nothing that is of one batch alone."""
    if tf.executing_eagerly():
        return objective(outputs, heads, y, sample_weight)
    graph = tf.compat.v1.get_default_graph()
    before = len(graph.get_operations())
    loss = objective(outputs, heads, y, sample_weight)
    data = [t for t in tf.nest.flatten((dict(heads), y, sample_weight)) if tf.is_tensor(t)]
    if all(t.shape[0] is None for t in data):
        captured_rows.check(graph.get_operations()[before:], data, objective.name)
        rows = None if loss is None else loss.shape[0]
        if rows is not None and rows != 1:
            raise captured_rows.refusal(objective.name, rows)
    return loss


def _added(model: Any) -> dict[str, tf.Tensor]:
    """Return what was added to the loss in the call just made, and the weights' regularisers."""
    graph = tf.compat.v1.get_default_graph()
    found = list(getattr(model, "losses", None) or [])
    if any(getattr(t, "graph", graph) is not graph for t in found):
        raise InputError(
            "A layer adds to the loss inside a loop or a function of its own (TimeDistributed, "
            "tf.map_fn, tf.function), so the model has no such number outside. Add it outside of "
            "that, or give loss=."
        )
    return {_ADDED.format(n): tf.convert_to_tensor(t) for n, t in enumerate(found)}


class _Alone:
    """What a model's layers add to the loss for batches of one example.

    Parameters
    ----------
    callee : Callee
        The model.
    which : sequence of int
        Those of the model's losses that depend on the data.
    """

    def __init__(self, callee: Callee, which: Sequence[int]):
        self._callee, self._which = callee, which

    def of_each(self, x: Any) -> tf.Tensor:
        """Return it for each example, (B,), after the model was called on them all."""
        flat = tf.nest.flatten(x)
        if flat[0].shape[0] == 1:
            return self._number()[None]

        def one(rows: tuple[tf.Tensor, ...]) -> tf.Tensor:
            self._callee.function(tf.nest.pack_sequence_as(x, [row[None] for row in rows]))
            return self._number()

        return tf.map_fn(one, tuple(flat), fn_output_signature=self._number().dtype)

    def _number(self) -> tf.Tensor:
        losses = self._callee.model.losses
        return _total([_summed(losses[n]) for n in self._which])


def _summed(loss: Any) -> tf.Tensor:
    """Return an added loss as a number, as Keras does."""
    loss = tf.convert_to_tensor(loss)
    dtype = at_least_float32(loss.dtype) if loss.dtype.is_floating else tf.float32
    return tf.reduce_sum(tf.cast(loss, dtype))


def _total(losses: Sequence[tf.Tensor]) -> tf.Tensor:
    widest = max((t.dtype for t in losses), key=lambda dtype: dtype.size)
    return tf.add_n([tf.cast(t, widest) for t in losses])


def _outputs(program: Program) -> list[str]:
    return [name for name in program.heads if name.startswith(BEHIND.format(""))]


def _of_data(program: Program, heads: Sequence[str]) -> list[str]:
    """Return the heads that depend on the inputs' values, which weights' regularisers do not."""
    values = sites.flow(program).values
    return [name for name in heads if program.heads[name] in values]


def _apart(program: Program, mine: Sequence[str], others: Sequence[str]) -> Program:
    """Return a trace whose loss is that of each example, what layers add included.

    Parameters
    ----------
    program : Program
        The trace of the model, its outputs' loss (B,), and what is added, by head.
    mine : sequence of str
        The heads that belong to the loss.
    others : sequence of str
        Those that do not.

    Raises
    ------
    _NotApart
        Where that cannot be told.
    """
    cut = _Cut(program, [program.heads[name] for name in mine])
    if cut.calls:
        program = flatten(program)
        cut = _Cut(program, [program.heads[name] for name in mine])
    if cut.stubborn:
        raise _NotApart(cut.stubborn)
    kept = {n: t for n, t in program.heads.items() if n not in (*mine, *others)}
    taps = [name for calls in program.taps.values() for name in calls if name]
    there: dict[str, Any] = {}

    def rebuild(*inputs):
        found = program.replay(inputs, {}, [*kept.values(), *taps, *cut.rows, *cut.given])
        there.update(found)
        try:
            each = cut.of_each(found)
        except Exception as failure:  # pfor raises whatever the converter stumbled over
            why = (str(failure).strip().splitlines() or [""])[0][:200]
            raise _NotApart(f"{type(failure).__name__}: {why}") from failure
        heads = {name: tf.identity(found[tensor]) for name, tensor in kept.items()}
        return heads | {LOSS: _total([heads[LOSS], each]) if LOSS in heads else each}

    traced = tf.function(rebuild, autograph=False).get_concrete_function(*program.specs)
    named = {
        layer: [name and there[name].name for name in calls]
        for layer, calls in program.taps.items()
    }
    return collect(traced, len(program.specs), program.weights, named)


class _Cut:
    """The end of a trace, from tensors with a row for each example to what layers add to the loss.

    Parameters
    ----------
    program : Program
        The trace.
    ends : sequence of str
        The tensors that are added.

    Attributes
    ----------
    rows : list of str
        The tensors with a row for each example that the end starts from.
    given : list of str
        What it takes that does not depend on the data.
    calls : bool
        Whether it has calls of functions.
    stubborn : str
        Why it cannot be computed for each row, or nothing.
    """

    def __init__(self, program: Program, ends: Sequence[str]):
        self._program, self._ends = program, ends
        self.rows: list[str] = []
        self.given: list[str] = []
        self.calls, self.stubborn = False, ""
        self._operations: set[str] = set()
        flow, seen, stack = sites.flow(program), set(), list(ends)
        self._sized = _of_size(program, flow)
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            op = program.graph.get_tensor_by_name(name).op
            if name not in flow.data:
                self.given.append(name)
            elif self._has_rows(name):
                self.rows.append(name)
            elif op.name not in self._operations:
                self._operations.add(op.name)
                self.calls = self.calls or op.type in CALLS
                if op.type not in _TRUSTED or (op.type == "Squeeze" and _unknown(op)):
                    self.stubborn = f"it depends on {op.name!r} ({op.type})"
                stack.extend(t.name for t in op.inputs)

    def _has_rows(self, name: str) -> bool:
        """Tell whether a tensor's first axis, and no other one, is as long as the batch."""
        program, dtype = self._program, self._program.graph.get_tensor_by_name(name).dtype
        if dtype in (tf.resource, tf.variant) or name in self._sized or name not in program.shapes:
            return False
        return name in program.extents and program.extents[name].fold == 1

    def of_each(self, found: dict[str, tf.Tensor]) -> tf.Tensor:
        """Return what is added for each example, (B,), in the graph being built."""
        definition = self._definition()
        given = {name: found[name] for name in self.given}

        def alone(rows: list[tf.Tensor]) -> tf.Tensor:
            feed = given | {n: row[None] for n, row in zip(self.rows, rows, strict=True)}
            ends = import_program(definition, feed, self._ends)
            return _total([_summed(ends[name]) for name in self._ends])

        rows = [found[name] for name in self.rows]
        for name, tensor in zip(self.rows, rows, strict=True):
            tensor.set_shape([None, *self._program.extents[name].rest])
        each = tf.vectorized_map(alone, rows, fallback_to_while_loop=False)
        return tf.ensure_shape(each, [None])

    def _definition(self) -> Any:
        whole = self._program.graph_def
        part = type(whole)(versions=whole.versions, library=whole.library)
        for node in whole.node:
            if node.name in self._operations:
                copy = part.node.add()
                copy.CopyFrom(node)
                copy.input[:] = [name for name in node.input if not name.startswith("^")]
                if node.op == "Squeeze" and not node.attr["squeeze_dims"].list.i:
                    shape = self._program.graph.get_operation_by_name(node.name).inputs[0].shape
                    ones = [n for n, length in enumerate(shape) if length == 1]
                    copy.attr["squeeze_dims"].list.i[:] = ones  # not the examples' axis with them
                if "_class" in copy.attr:  # colocated with what is not here
                    del copy.attr["_class"]
        return part


def _of_size(program: Program, flow: sites.Flow) -> set[str]:
    """Return the tensors whose numbers depend on how many examples there are."""
    found: set[str] = set()
    sizes = flow.data - flow.values
    for op in program.graph.get_operations():
        counts = op.type == "Cast" and op.outputs[0].dtype.is_floating
        counts = counts and op.inputs[0].name in sizes
        if counts or any(t.name in found for t in op.inputs):
            found.update(t.name for t in op.outputs)
    return found


def _unknown(squeeze: Any) -> bool:
    """Tell whether it depends on the batch which axes are taken away."""
    known = squeeze.inputs[0].shape.is_fully_defined()
    return not known and not squeeze.get_attr("squeeze_dims")
