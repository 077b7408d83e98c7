"""Answers laid into a function that is being traced, settled outside of it on made-up examples."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from perjac._core.autodiff import seeds
from perjac._core.backend import host
from perjac._core.factors.reductions import Question
from perjac._core.model import inside_functions
from perjac._core.model.inputs import Batch
from perjac._core.model.losses import Objective


def derived(
    engine: Any,
    batch: Batch,
    objective: Objective | None,
    of: Any,
    wrt: Any,
    question: Question,
    asked: dict[str, Any],
) -> tuple:
    """Return what `Engine._derived` does, in the graph being built.

    Raises
    ------
    InsideError
        Where that needs numbers.
    """
    inside_functions.check(batch)
    # TensorFlow's while loops are traced more than once; what is settled once stays.
    made_up, given = inside_functions.stand_in(batch), inside_functions.asked_of(asked)
    seen: Any = None
    with inside_functions.outside("The call"):
        traced, head, sources, tried = _known(engine, made_up, objective, of, wrt, given)
        settled = (head, sources, made_up, tried, engine.memory_limit, question)
        if not traced.is_settled(*settled):
            _, seen, *_ = engine._derived(made_up, objective, of, wrt, question, **given)
            traced, head, sources, tried = _known(engine, made_up, objective, of, wrt, given)
        row_shape, dtype = traced.row_shape(head), traced.dtype(head)

    def lay(*tensors: tf.Tensor) -> tuple:
        here = Batch(list(tensors), batch.names, batch.structure, batch.labels)
        return traced.answers(head, sources, here, chosen, engine.memory_limit, question)

    with inside_functions.laying("This"):
        if host.is_within_xla():
            chosen = tried
            inside_functions.tried_under_xla(lay, made_up)
        about = asked.get("outputs"), asked.get("cotangents"), batch.size
        chosen = seeds.make(*about, row_shape, dtype)
        result, answers = lay(*batch.tensors)
        result.set_shape([batch.size, *result.shape[1:]])
        _sized(answers, seen)
    return result, answers, sources, chosen.row_shape


def checked(engine: Any, batch: Batch, of: Any) -> tuple:
    """Return what `Engine._checked` does, of made-up examples."""
    inside_functions.check(batch)
    made_up = inside_functions.stand_in(batch)
    with inside_functions.outside("The call"):
        return engine._checked(made_up, of)


def _known(
    engine: Any, batch: Batch, objective: Any, of: Any, wrt: Any, asked: dict[str, Any]
) -> tuple:
    """Return the trace, the output's tensor, the sources, and the seeds."""
    traced, names = engine._traces.of(batch, objective)
    head = names.head(of)
    about = asked.get("outputs"), asked.get("cotangents"), batch.size
    chosen = seeds.make(*about, traced.row_shape(head), traced.dtype(head))
    return traced, head, names.sources(wrt), chosen


def _sized(answers: Any, seen: Any) -> None:
    """Give tensors the lengths along their first axis that they had for the made-up examples."""
    mine, theirs = tf.nest.flatten(answers), tf.nest.flatten(seen)
    for tensor, like in zip(mine, theirs, strict=True) if seen is not None else ():
        if tensor.shape.rank and tensor.shape.rank == like.shape.rank:
            tensor.set_shape([like.shape[0], *tensor.shape[1:]])
