"""Whether examples stay apart: as the graph says, or else by its shapes and a probe on data.

Every per-example derivative here rests on it: one sweep from all outputs together gives each
example's own cotangents only where no example influences another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tensorflow as tf

from perjac._core.backend import host
from perjac._core.backend.dtypes import EPSILON
from perjac._core.graph.program import Program
from perjac._core.graph.sites import Flow
from perjac._core.graph.walk import upstream
from perjac.errors import ExamplesMeetError

# How far, relative to the largest number, an example alone may be from the same among others.
_ALONE = 1e-3


# Made-up batches that a probe runs beside the user's own.
_MADE_UP = 3


def check_shapes(program: Program, flow: Flow, head: str) -> None:
    """Raise where the trace itself shows that the batch axis is lost on the way to the output.

    With the batch unknown in the trace, a tensor made from the inputs' values whose shape is all
    known has no room for the examples: they have been reduced into one.

    Raises
    ------
    ExamplesMeetError
        Naming the tensor.
    """
    graph = program.graph
    if graph.get_tensor_by_name(head).shape.rank == 0:
        raise ExamplesMeetError(
            f"The output {program.called(head)!r} is a single number for the whole batch. perjac "
            "differentiates outputs that have the batch as their first axis: leave out the final "
            "reduction."
        )
    needed = upstream(program, [head])
    ops = [op for op in graph.get_operations() if op.name in needed]
    used = {t.name for op in ops for t in op.inputs} | {head}  # a loop also returns its constants
    for op in ops:
        lost = [
            t
            for t in op.outputs
            if t.name in flow.values & used and t.dtype.is_floating and t.shape.is_fully_defined()
        ]
        if lost:
            raise meeting(program, lost[0].name, op.type)


def probe(
    program: Program, flow: Flow, head: str, batches: Iterable[Sequence[tf.Tensor]]
) -> bool | None:
    """Run two examples, change one or leave it out, and see whether the other's numbers move.

    This is for graphs that do not say whether examples stay apart.

    Parameters
    ----------
    program, flow : Program, Flow
        The trace.
    head : str
        The output's tensor.
    batches : iterable of sequences of tf.Tensor
        Batches of data, on each of which that is tried.

    Returns
    -------
    bool or None
        True where an example's own numbers moved and the other's never did. None where nothing
        was decided: nothing moved at all, or two runs differ because the model is random.

    Raises
    ------
    ExamplesMeetError
        If an example's output moves with another's input; it names the first tensor that does.
    """
    run = _runs(program, [head])
    decided = None
    for inputs in batches:
        pair = _two_different(inputs)
        try:
            *runs, again, alone = (found for (found,) in run(pair))
        except tf.errors.OpError:  # the model does not take such data
            continue
        if not _same(runs[0], again):
            return None
        if _leaks(runs) or _depends_on_size(runs[0], alone):
            raise meeting(program, *_first_leak(program, flow, head, pair))
        decided = decided or not _same(runs[1], runs[2]) or None
    return decided


def batches_of(inputs: Sequence[tf.Tensor]) -> list[Sequence[tf.Tensor]]:
    """Return a user's batch, and made-up ones of its shapes and kinds."""
    made = [
        [
            tf.constant(np.stack([_changed(np.asarray(t[0].numpy()), 2 * n + m) for m in (0, 1)]))
            for t in inputs
        ]
        for n in range(_MADE_UP)
    ]
    return [inputs, *made]


Runs = Callable[[Sequence[np.ndarray]], list[list[np.ndarray]]]


def _runs(program: Program, names: Sequence[str]) -> Runs:
    """Return what gives the named tensors for batches (p, q), (p, p), (q, q), (p, q) and (p)."""

    @functools.partial(host.compiled, input_signature=[program.specs])
    def run(inputs):
        found = program.replay(inputs, {}, names)
        return [found[name] for name in names]

    orders = ([0, 1], [0, 0], [1, 1], [0, 1], [0])
    return lambda pair: [[t.numpy() for t in run([x[o] for x in pair])] for o in orders]


def _leaks(runs: Sequence[np.ndarray]) -> bool:
    """Tell whether a block of rows moved with the other example: p's block in (p, q) and (p, p)."""
    both, first, second = runs
    if both.ndim == 0 or len(both) % 2:
        return True
    half = len(both) // 2
    return not (_same(both[:half], first[:half]) and _same(both[half:], second[half:]))


def _depends_on_size(pair: np.ndarray, alone: np.ndarray) -> bool:
    """Tell whether p's block is another one where p is alone, beyond what rounding makes of it.

    TensorFlow multiplies matrices of other sizes in another order, hence the tolerance.
    """
    if not _epsilon(alone):
        return False
    tolerance = max(_ALONE, 100 * _epsilon(alone))
    blocks = (tensor[: len(alone)] for tensor in (pair, _regrouped(pair)))
    return not any(_same(block, alone, tolerance) for block in blocks)


def _regrouped(tensor: np.ndarray) -> np.ndarray:
    """Put the two examples of (F·2, ...) one after the other: (2·F, ...)."""
    if tensor.ndim == 0 or len(tensor) % 2:
        return tensor
    split = tensor.reshape(-1, 2, *tensor.shape[1:])
    return split.swapaxes(0, 1).reshape(tensor.shape)


def _same(a: np.ndarray, b: np.ndarray, tolerance: float | None = None) -> bool:
    if a.shape != b.shape:
        return False
    tolerance = tolerance or 100 * _epsilon(a)
    if not tolerance:
        return bool(np.array_equal(a, b))
    a, b = (x.astype(complex if x.dtype.kind == "c" else float) for x in (a, b))
    scale = np.max(np.abs(a[np.isfinite(a)]), initial=0)
    return np.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)


def _epsilon(tensor: np.ndarray) -> float:
    """Return the precision of floating and complex numbers, 0 for others."""
    return EPSILON.get(tf.as_dtype(tensor.dtype).real_dtype, 0)


def _first_leak(
    program: Program, flow: Flow, head: str, pair: Sequence[np.ndarray]
) -> tuple[str, str]:
    """Return the name and type of the first operation at which examples meet."""
    needed = upstream(program, [head])
    ops = [op for op in program.graph.get_operations() if op.name in needed]
    numeric = [
        (t.name, op.type)
        for op in ops
        for t in op.outputs
        if t.name in flow.values
        and (t.dtype.is_floating or t.dtype.is_integer)
        and t.shape.rank is not None
        and (t.shape.rank == 0 or t.shape[0] is None)
    ]
    *runs, _, alone = _runs(program, [name for name, _ in numeric])(pair)
    for n, named in enumerate(numeric):
        if _leaks([run[n] for run in runs]) or _depends_on_size(runs[0][n], alone[n]):
            return named
    return head, "output"


def meeting(program: Program, tensor: str, kind: str) -> ExamplesMeetError:
    """Return the error that says at which tensor, of what operation, examples meet."""
    layer = program.layer_of(tensor)
    where = f"in layer {layer!r}" if layer else "outside of any layer"
    return ExamplesMeetError(
        f"Examples influence one another: they meet {where}, tensor {tensor!r} ({kind}). A "
        "derivative of one example alone has no meaning there. Is a batch normalisation in "
        "training mode, a reduction, sort or reversal along the batch axis, or the number of "
        "examples in a formula? Use training=False or reduce within the example; "
        'independence="trust" skips this check.'
    )


def _two_different(inputs: Sequence[tf.Tensor]) -> list[np.ndarray]:
    """Return two examples that differ in every input, made up where the data has none."""
    pair = []
    for tensor in inputs:
        first = np.asarray(tensor[0].numpy())
        other = next((t for t in tensor[1:33].numpy() if not np.array_equal(t, first)), None)
        if other is None:
            other = _changed(first, 0)
        pair.append(np.stack([first, other]))
    return pair


def _changed(example: np.ndarray, seed: int) -> np.ndarray:
    """Return something else of the same kind: noise for floats, another order of other things."""
    rng = np.random.default_rng(seed)
    if example.dtype.kind == "f":
        noise = rng.normal(size=example.shape)
        return (example + 0.1 * (np.std(example) + 1) * noise).astype(example.dtype)
    if example.dtype.kind == "b":
        return ~example
    if example.ndim == 0:
        return example  # a text or a number by itself, of which there is no other order
    # Integers may be places in a table, and texts words of one, so only those that occur are safe.
    return np.roll(example.ravel(), 1 + seed).reshape(example.shape)
