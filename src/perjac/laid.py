"""Answers laid into a function that is being traced, settled outside of it on made-up examples."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from perjac import host, inside, seeds
from perjac.inputs import Batch
from perjac.losses import Objective
from perjac.questions import Question


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
    inside.check(batch)
    # TensorFlow's while loops are traced more than once; what is settled once stays.
    made_up, given = inside.stand_in(batch), inside.asked_of(asked)
    with inside.outside("The call"):
        engine._derived(made_up, objective, of, wrt, question, **given)
        traced, names = engine.traces.of(made_up, objective)
        head, sources = names.head(of), names.sources(wrt)
        row_shape, dtype = traced.row_shape(head), traced.dtype(head)

    def lay(*tensors: tf.Tensor) -> tuple:
        here = Batch(list(tensors), batch.names, batch.structure, batch.labels)
        return traced.answers(head, sources, here, chosen, engine.memory_limit, question)

    with inside.laying("This"):
        about = asked.get("outputs"), asked.get("cotangents"), batch.size
        if host.is_within_xla():
            chosen = seeds.make(
                *(given.get(k) for k in ("outputs", "cotangents")), *about[2:], row_shape, dtype
            )
            inside.tried_under_xla(lay, made_up)
        chosen = seeds.make(*about, row_shape, dtype)
        result, answers = lay(*batch.tensors)
        result.set_shape([batch.size, *result.shape[1:]])
    return result, answers, sources, chosen.row_shape
