"""A compiled program as a file: StableHLO for any PJRT runtime, and what its arguments are.

Knows traces and factors; must not know who will run it. `perjac.pjrt` does, without TensorFlow.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.autodiff.seeds import Seeds
from perjac._core.backend import host, xla
from perjac._core.factors import Factor
from perjac._core.graph.text_tables import why_not_xla
from perjac._core.model.inputs import Batch
from perjac._core.model.variables import Source
from perjac._core.runtime.traced_model import Traced
from perjac._rows import grouped_norms
from perjac.errors import InputError, PathError

Question = Callable[[Mapping[str, Factor], Sequence[Source], tuple[int, ...]], dict[str, tf.Tensor]]


def _rows(
    factors: Mapping[str, Factor], sources: Sequence[Source], lead: tuple[int, ...]
) -> dict[str, tf.Tensor]:
    """Form all rows, (*lead, *shape) by source, lead being (B, *row_shape)."""
    return {
        s.key: tf.reshape(tf.cast(factors[s.key].dense(), s.dtype), [*lead, *s.shape])
        for s in sources
    }


def _norms(
    factors: Mapping[str, Factor], sources: Sequence[Source], lead: tuple[int, ...]
) -> dict[str, tf.Tensor]:
    return {"norms": tf.reshape(grouped_norms(factors, None)[""], lead[:1])}


def _diagonal(
    factors: Mapping[str, Factor], sources: Sequence[Source], lead: tuple[int, ...]
) -> dict[str, tf.Tensor]:
    return {s.key: tf.cast(factors[s.key].diagonal(), s.dtype) for s in sources}


# What a program can answer, and whether it is about losses.
JOBS: dict[str, tuple[Question, bool]] = {
    "jacobian": (_rows, False),
    "diagonal": (_diagonal, False),
    "gradients": (_rows, True),
    "norms": (_norms, True),
}


def write(
    path: str | pathlib.Path,
    job: str,
    traced: Traced,
    head: str,
    sources: Sequence[Source],
    batch: Batch,
    chosen: Seeds,
) -> pathlib.Path:
    """Write a program for batches of one size, its manifest, and the variables' values.

    Parameters
    ----------
    path : str or path
        Of the program. Beside it go a manifest, `.json`, and the variables, `.npz`.
    job : str
        One of `JOBS`.
    traced, head : Traced, str
        The model and its output.
    sources : sequence of Source
        What is differentiated against.
    batch : Batch
        Of the size that the program is for.
    chosen : Seeds
        The rows.

    Returns
    -------
    pathlib.Path
        Of the program.

    Raises
    ------
    PathError
        If some weight would need the tape path.
    InputError
        If XLA cannot compile it.
    """
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise InputError(f"There is no folder {path.parent} to write {path.name} to.")
    weights = [s for s in sources if s.kind == "weight"]
    taped = [d for d in traced.decisions(head, weights, chosen.count) if d.path != "factored"]
    if taped:
        names = ", ".join(f"{d.source.key!r} ({d.reason})" for d in taped[:5])
        raise PathError(f"Only factored weights can be exported. These need the tape: {names}.")
    if why := why_not_xla(traced.program):
        raise InputError(f"The model cannot be exported: {why}. Give Engine what comes behind it.")
    question = JOBS[job][0]
    run = traced.body(head, sources, batch, chosen)

    @tf.function(autograph=False, jit_compile=True)
    def program(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        output, factors = run(list(tensors), tf.constant(chosen.payload.numpy()))
        output = tf.reshape(output, [batch.size, *traced.row_shape(head)])
        return {"outputs": output} | question(factors, sources, (batch.size, *chosen.row_shape))

    specs = [tf.TensorSpec(t.shape, t.dtype) for t in batch.tensors]
    with xla.for_xla():
        concrete = program.get_concrete_function(*specs)
    try:
        code = program.experimental_get_compiler_ir(*specs)(stage="stablehlo_serialized")
    except (tf.errors.OpError, ValueError) as failure:
        raise InputError(
            f"XLA cannot compile this program: {str(failure).splitlines()[0][:300]}"
        ) from failure
    captured, values = _captured(concrete, traced)
    outputs = concrete.structured_outputs
    manifest = {
        "format": "perjac program 1",
        "job": job,
        "inputs": [
            {"name": name, **_described(spec)}
            for name, spec in zip(batch.names, specs, strict=True)
        ],
        "variables": captured,
        "outputs": [{"name": name, **_described(outputs[name])} for name in sorted(outputs)],
    }
    path.write_bytes(code)
    path.with_suffix(".json").write_text(json.dumps(manifest, indent=1))
    np.savez(path.with_suffix(".npz"), allow_pickle=False, **values)
    return path


def _captured(concrete: Any, traced: Traced) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Describe what follows the inputs in the arguments, in their order, and give its values."""
    program = traced.program
    by_handle = {
        id(host.handle(v)): (key, host.tf_variable(v))
        for key, v in zip(program.weights.keys, program.weights.variables, strict=True)
    }
    described, values = [], {}
    for n, tensor in enumerate(concrete.captured_inputs):
        name, value = by_handle.get(id(tensor), (f"constant_{n}", tensor))
        described.append({"name": name, **_described(value)})
        values[name] = np.asarray(value)
    return described, values


def _described(tensor: Any) -> dict[str, Any]:
    return {"shape": [int(n) for n in tensor.shape], "dtype": tensor.dtype.name}
