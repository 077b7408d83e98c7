"""Engine calls inside a function that TensorFlow is tracing: `tf.function`, `Dataset.map`, loops.

There the data are no numbers yet. All that needs numbers (whether examples meet, what compiles,
which way each weight takes) is done once, outside, on made-up examples of the same shapes; what was
settled is then laid into the function.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend import host, xla
from perjac._core.backend.shapes import known
from perjac._core.model.inputs import Batch
from perjac.errors import InsideError, PerjacError

_rehearsing = contextvars.ContextVar("rehearsing", default=False)
_OUTSIDE = "Call the engine outside of the function and hand its results in"


def is_inside() -> bool:
    """Tell whether a function is being traced."""
    return not tf.executing_eagerly()


def is_rehearsing() -> bool:
    """Tell whether made-up examples are tried, of which failing proves nothing."""
    return _rehearsing.get()


def check(batch: Batch) -> None:
    """Raise for a batch that cannot be answered for inside a function.

    Raises
    ------
    InsideError
        Where how many examples there are, or the shape of one, is unknown.
    """
    if not host.runs_eagerly_outside():
        raise InsideError(
            "TensorFlow's graph mode of version 1 is on. perjac needs eager execution: leave out "
            "tf.compat.v1.disable_eager_execution()."
        )
    vague = [n for n, t in zip(batch.names, batch.tensors, strict=True) if not _known(t)]
    if vague:
        raise InsideError(
            f"The shape of {vague[0]!r} is not known while this function is traced. Expected a "
            "known number of examples: use batch(..., drop_remainder=True) for a Dataset, "
            "x.set_shape([...]), or an input_signature with the batch size. Or call the engine "
            "outside of the function."
        )


def refuse(what: str, instead: str = "") -> None:
    """Raise where a function is being traced, for what has to see numbers.

    Raises
    ------
    InsideError
        Always, inside.
    """
    if is_inside():
        raise InsideError(
            f"{what} needs numbers, and inside a function that is being traced (tf.function, "
            f"Dataset.map, tf.while_loop) there are none yet. {instead or _OUTSIDE}."
        )


def untried(what: str) -> InsideError:
    """Return what to raise for something that was not tried outside before."""
    return InsideError(
        f"{what} has to be tried on numbers first, and inside a function that is being traced "
        "there are none. Call the engine once outside, on examples of the same shapes and number."
    )


def stand_in(batch: Batch) -> Batch:
    """Return made-up examples of a batch's shapes and types; outside, the batch as it is."""
    if not is_inside():
        return batch
    rng = np.random.default_rng(0)
    with host.lifted():
        made = [_made_up(t, rng, n < batch.inputs) for n, t in enumerate(batch.tensors)]
    return dataclasses.replace(batch, tensors=made)


def asked_of(asked: dict[str, Any]) -> dict[str, Any]:
    """Return made-up outputs and cotangents in place of those that are no numbers yet."""
    rng = np.random.default_rng(0)
    symbolic = {k: v for k, v in asked.items() if tf.is_tensor(v) and not host.is_eager(v)}
    with host.lifted():
        return asked | {name: _made_up(t, rng, False) for name, t in symbolic.items()}


@contextlib.contextmanager
def outside(doing: str) -> Iterator[None]:
    """Run the block outside of the function that is being traced, on made-up examples.

    Raises
    ------
    InsideError
        If the model does not take those.
    """
    token = _rehearsing.set(True)
    try:
        with host.lifted():
            yield
    except (PerjacError, xla.NotForXla):
        raise
    except Exception as failure:  # whatever a model raises for data it does not know
        first = (str(failure).strip().splitlines() or [""])[0][:200]
        raise InsideError(
            f"{doing} was tried on made-up examples, as there are no numbers yet inside a function "
            f"that is being traced, and fails with {type(failure).__name__}: {first}. Call the "
            "engine once outside, on examples of the same shapes and number; inside it then "
            "does the same."
        ) from failure
    finally:
        _rehearsing.reset(token)


@contextlib.contextmanager
def laying(what: str) -> Iterator[None]:
    """Lay what was settled into the function; only perjac's own errors come out.

    Raises
    ------
    InsideError
        For what TensorFlow cannot do without numbers.
    """
    if not is_inside():
        yield
        return
    try:
        yield
    except PerjacError:
        raise
    except Exception as failure:  # TensorFlow's, for numbers that there are none of
        first = (str(failure).strip().splitlines() or [""])[0][:200]
        raise InsideError(
            f"{what} cannot be given inside a function that is being traced: "
            f"{type(failure).__name__}: {first}. {_OUTSIDE}."
        ) from failure


def sealed(answers: Any) -> Any:
    """Return a nest of tensors through which no derivative goes: it would not be right.

    The steps back that perjac takes are made to be gone once.
    """
    return tf.nest.map_structure(
        lambda t: _sealed(t) if tf.is_tensor(t) and t.dtype.is_floating else t, answers
    )


def tried_under_xla(function: Callable[..., Any], batch: Batch) -> None:
    """Compile what is to be part of a function that XLA compiles, on made-up examples.

    Raises
    ------
    InsideError
        If XLA cannot.
    """
    try:
        with host.lifted():
            tf.function(function, autograph=False, jit_compile=True)(*batch.tensors)
    except tf.errors.OpError as failure:
        raise InsideError(
            f"XLA does not compile this model's derivatives ({xla.why_not(failure)}), and "
            f"this function is compiled by XLA. Leave out jit_compile=True. Or: {_OUTSIDE}."
        ) from failure


_AGAIN = (
    "perjac's results cannot be differentiated again: a tape, or tf.gradients, asked for a "
    "derivative of them. Use nested tf.GradientTape for second derivatives, or tf.stop_gradient on "
    "what perjac returns."
)


@tf.custom_gradient
def _sealed(tensor: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
    result = tf.identity(tensor)

    def backward(cotangent: tf.Tensor) -> tf.Tensor:
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        if graph is None or graph is getattr(result, "graph", None):
            raise InsideError(_AGAIN)
        # A tape outside of a tf.function has the way back made for all its results, wanted or not.
        unwanted = tf.equal(cotangent, 0)
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(unwanted), [_AGAIN])]):
            nothing = tf.zeros_like(cotangent)
            return tf.where(unwanted, nothing, tf.constant(float("nan"), cotangent.dtype))

    return result, backward


def _known(tensor: tf.Tensor) -> bool:
    return tensor.shape.rank is not None and tensor.shape.is_fully_defined()


def _made_up(tensor: tf.Tensor, rng: np.random.Generator, is_input: bool) -> tf.Tensor:
    """Return normal numbers for inputs, and what any loss takes for labels and weights."""
    shape, dtype = known(tensor.shape), tensor.dtype
    if dtype == tf.string:
        return tf.fill(shape, "")
    if dtype.is_floating or dtype.is_complex:
        drawn = rng.standard_normal(shape) if is_input else rng.uniform(size=shape)
        return tf.cast(drawn, dtype)
    return tf.cast(rng.integers(0, 2, shape) if is_input else np.zeros(shape), dtype)
