"""TensorFlow's failures that the user's data or model is to blame for → errors that say so.

Ids beyond a table's rows, and operations without a gradient. Where TensorFlow does not fail, on a
GPU and under XLA, the program that runs looks at the ids. Must not know plans.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend import host
from perjac._core.graph.program import Program, import_program
from perjac._core.graph.walk import upstream
from perjac._core.model.inputs import Batch
from perjac.errors import OutOfRangeError, PerjacError

_OUT_OF_RANGE = re.compile(
    r"is not in \[0, \d+\)|outside the valid range of \[|does not index into|Index out of range"
)
_SHAPES = {"Shape", "ShapeN", "Size", "Rank"}
# Operations between a variable and the table that is looked up in.
_PASSING = {"Identity", "Cast", "Reshape", "ReadVariableOp"}


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A place where rows of a table are looked up by ids that come from an input.

    Attributes
    ----------
    ids : str
        The tensor of ids.
    rows : int
        How many rows the table has.
    variable : int
        The number of the table.
    """

    ids: str
    rows: int
    variable: int


def lookups(program: Program, head: str) -> list[Lookup]:
    """Return the lookups on the way to an output, of programs with integer inputs."""
    specs = zip(program.inputs, program.specs, strict=True)
    integers = {name for name, spec in specs if not spec.dtype.is_floating}
    if not integers:
        return []
    needed = upstream(program, [head])
    found = []
    op: Any
    for op in program.graph.get_operations():
        if op.name not in needed or op.type not in ("GatherV2", "ResourceGather"):
            continue
        variable: Any = _table(program, op.inputs[0])
        axis: Any = 0
        if op.type == "GatherV2":
            axis = tf.get_static_value(op.inputs[2])
        if variable is None or axis is None or not _comes_from(op.inputs[1], integers):
            continue
        shape: Any = host.tf_variable(program.weights.variables[variable]).shape
        if op.type == "GatherV2":
            shape = op.inputs[0].shape
        if shape.rank and (rows := shape[int(axis)]) is not None:
            found.append(Lookup(op.inputs[1].name, int(rows), variable))
    return found


def _table(program: Program, tensor: Any) -> int | None:
    """Return the number of the variable that a tensor is the value or the handle of."""
    while tensor.name not in program.handles and tensor.name not in program.reads:
        if tensor.op.type not in _PASSING:
            return None
        tensor = tensor.op.inputs[0]
    return {**program.handles, **program.reads}[tensor.name]


def _comes_from(tensor: Any, inputs: set[str]) -> bool:
    """Tell whether a tensor's values come from those of some inputs."""
    seen: set[str] = set()
    stack = [tensor]
    while stack:
        one = stack.pop()
        if one.name in inputs:
            return True
        if one.name not in seen and one.op.type not in _SHAPES:
            seen.add(one.name)
            stack.extend(one.op.inputs)
    return False


def within(found: Sequence[Lookup], tensors: dict[str, Any]) -> list[tf.Tensor]:
    """Return for each lookup, in the graph being built, whether all of its ids have rows."""
    return [
        tf.reduce_all((tensors[one.ids] >= 0) & (tensors[one.ids] < tf.cast(one.rows, ids.dtype)))
        for one in found
        for ids in [tensors[one.ids]]
    ]


def check_ids(program: Program, head: str, batch: Batch) -> None:
    """Raise for ids that a table has no row for, after something has shown that there are some.

    Raises
    ------
    OutOfRangeError
        Naming the input, the example, the id and the table.
    """
    found = lookups(program, head)
    tensors = _values(program, list(dict.fromkeys(one.ids for one in found)), batch)
    for one in found:
        ids = np.asarray(tensors[one.ids])
        wrong = np.argwhere((ids < 0) | (ids >= one.rows))
        if wrong.size:
            raise OutOfRangeError(_said(program, one, ids, tuple(wrong[0]), batch))


def _values(program: Program, names: Sequence[str], batch: Batch) -> dict[str, tf.Tensor]:
    """Return tensors of a trace, without running what comes after them."""
    needed = upstream(program, names)
    before = type(program.graph_def)(library=program.graph_def.library)
    before.versions.CopyFrom(program.graph_def.versions)
    before.node.extend(node for node in program.graph_def.node if node.name in needed)

    def run(inputs: list[tf.Tensor]) -> dict[str, tf.Tensor]:
        graph = tf.compat.v1.get_default_graph()
        feed = dict(zip(program.inputs, inputs, strict=True))
        feed |= {name: host.capture(graph, outer) for name, outer in program.constants.items()}
        for name, number in program.handles.items():
            feed[name] = host.capture(graph, host.handle(program.weights.variables[number]))
        return import_program(before, feed, names)

    return host.compiled(run)(batch.tensors) if names else {}


def _said(
    program: Program, lookup: Lookup, ids: np.ndarray, place: tuple[int, ...], batch: Batch
) -> str:
    key = program.weights.keys[lookup.variable]
    number = int(np.ravel_multi_index(place, ids.shape))
    value, where = ids[place], "The model looks up id"
    alike = [
        n
        for n, t in enumerate(batch.tensors[: batch.inputs])
        if not t.dtype.is_floating and int(tf.size(t)) == ids.size
    ]
    if len(alike) == 1:  # what the user gave: the model may have moved it
        given = np.asarray(batch.tensors[alike[0]])
        value = given.ravel()[number]
        example = np.unravel_index(number, given.shape)[0]
        where = f"Example {example} of input {batch.names[alike[0]]!r} has the id"
    return (
        f"{where} {value}, and the table {key!r} has {lookup.rows} rows: ids go from 0 to "
        f"{lookup.rows - 1}. Mend the ids, or give the layer more rows (an Embedding's input_dim "
        "is the largest id + 1)."
    )


def is_users(failure: BaseException) -> bool:
    """Tell whether a failure is one that `blamed` explains, so that another path fails as well."""
    return isinstance(failure, PerjacError) or bool(_reason(failure))


def _reason(failure: BaseException) -> Any:
    if isinstance(failure, (tf.errors.InvalidArgumentError, tf.errors.OutOfRangeError)):
        return _OUT_OF_RANGE.search(str(failure))
    return None


@contextlib.contextmanager
def blamed(program: Program, head: str, batch: Batch) -> Iterator[None]:
    """Translate such failures inside the block.

    Raises
    ------
    OutOfRangeError
        For ids that a table has no row for, and other indices out of range.
    """
    try:
        yield
    except (tf.errors.InvalidArgumentError, tf.errors.OutOfRangeError) as failure:
        reason = None if isinstance(failure, PerjacError) else _reason(failure)
        if not reason:
            raise
        check_ids(program, head, batch)
        line = next(n for n in str(failure).splitlines() if _OUT_OF_RANGE.search(n))
        raise OutOfRangeError(
            f"An index in the data is out of range. TensorFlow says: {line.strip()[:200]}"
        ) from failure
