"""Several factors → one: of a weight's several sites, and of blocks of rows.

Knows the kinds of factors; must not know where they come from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend.axis_layout import Relabelling
from perjac._core.factors import Explicit, Factor, Grouped, Lookup, Outer, Pairs, Sum
from perjac._core.model.variables import Source


def held_in(dtypes: Iterable[tf.DType]) -> tf.DType:
    """Return the type in which rows by sources of these types are held and summed up.

    Half precision is too coarse, and too soon at its end, for sums of squares. Complex numbers are
    held as pairs of real ones.
    """
    return tf.float64 if tf.float64 in {dtype.real_dtype for dtype in dtypes} else tf.float32


def held(source: Source, rows: tf.Tensor, dtype: tf.DType) -> Explicit:
    """Return rows by a source, (B, K, *shape), as they are held in a floating type."""
    if rows.dtype.is_complex:
        return Pairs.of(rows).cast(dtype)
    return Explicit(Relabelling.of(source.shape), rows).cast(dtype)


def complex_like(dtype: tf.DType, real: tf.DType) -> tf.DType:
    """Return a floating type, or the complex one of its width where `dtype` is complex."""
    if not dtype.is_complex:
        return real
    return tf.complex128 if real == tf.float64 else tf.complex64


def combine(factors: Sequence[Factor]) -> Factor:
    """Return one factor for a weight used at several sites.

    Contributions of one kind and layout are laid side by side along the positions T (or added,
    where they are explicit); what is left of different kinds becomes a Sum.
    """
    kinds: dict[Any, list[Factor]] = {}
    for factor in factors:
        kinds.setdefault((type(factor), factor.layout), []).append(factor)
    merged = [_merge(group) for group in kinds.values()]
    explicit = [factor for factor in merged if isinstance(factor, Explicit)]
    if len(explicit) > 1:  # laid out differently: one is enough
        plain = Relabelling.of(merged[0].layout.shape)
        rows = Explicit(plain, tf.add_n([factor.dense() for factor in explicit]))
        merged = [factor for factor in merged if factor not in explicit] + [rows]
    if len(merged) == 1:
        return merged[0]
    return Sum(Relabelling.of(merged[0].layout.shape), tuple(merged))


def join_rows(answers: Sequence[Mapping[str, Factor]]) -> dict[str, Factor]:
    """Return factors with the rows of all the answers, one after another along K."""
    first = answers[0]
    if len(answers) == 1:
        return dict(first)
    return {key: _join([answer[key] for answer in answers]) for key in first}


def join_examples(
    answers: Iterable[Mapping[str, Factor]], runs: Sequence[slice]
) -> dict[str, Factor]:
    """Return factors with the examples of all the answers, one after another along B.

    Parameters
    ----------
    answers : iterable of mapping of str to Factor
        For one run of examples after another. Every tensor of a factor has its examples in front.
    runs : sequence of slice
        Which examples they are of.
    """
    kinds: Any = None
    whole: list[tf.Tensor] = []
    for answer, run in zip(answers, runs, strict=True):
        parts = tf.nest.flatten(dict(answer))
        if not whole:
            kinds, whole = answer, [_room(part, run, runs[-1].stop) for part in parts]
        whole = [_laid(part, run, into) for part, into in zip(parts, whole, strict=True)]
    return tf.nest.pack_sequence_as(dict(kinds), whole)


def joined(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    """Return tensors (B, ...) one after another along B."""
    return parts[0] if len(parts) == 1 else tf.concat(parts, 0)


def _room(part: tf.Tensor, run: slice, batch: int) -> tf.Tensor:
    """Return room for all examples of which `part` is a run."""
    folded = part.shape[0] // (run.stop - run.start)
    return tf.raw_ops.Empty(shape=[batch * folded, *part.shape[1:]], dtype=part.dtype)


def _laid(part: tf.Tensor, run: slice, into: tf.Tensor) -> tf.Tensor:
    """Write a run of examples to its place: joining all at the end would need them twice.

    180 ms for 400 MB, where that takes 130.
    """
    folded = part.shape[0] // (run.stop - run.start)
    places = tf.range(run.start * folded, run.stop * folded)
    return tf.raw_ops.InplaceUpdate(x=into, i=places, v=part)


def _join(factors: Sequence[Any]) -> Factor:
    first = factors[0]
    if isinstance(first, Sum):
        parts = zip(*(factor.parts for factor in factors), strict=True)
        return dataclasses.replace(first, parts=tuple(_join(part) for part in parts))
    name = "jacobian" if isinstance(first, Explicit) else "delta"
    rows = tf.concat([getattr(factor, name) for factor in factors], 1)
    return dataclasses.replace(first, **{name: rows})


def _merge(factors: list[Factor]) -> Factor:
    first = factors[0]
    if len(factors) == 1:
        return first
    if isinstance(first, Explicit):
        return Explicit(first.layout, tf.add_n([f.jacobian for f in factors]))  # type: ignore
    delta = tf.concat([f.delta for f in factors], 2)  # type: ignore[attr-defined]
    if isinstance(first, Lookup):
        ids = [tf.cast(f.ids, tf.int32) for f in factors]  # type: ignore[attr-defined]
        return Lookup(first.layout, tf.concat(ids, 1), delta)
    if isinstance(first, Grouped):
        return Grouped(first.layout, tf.concat([f.a for f in factors], 1), delta)  # type: ignore
    return Outer(first.layout, tf.concat([f.columns for f in factors], 1), delta)  # type: ignore
