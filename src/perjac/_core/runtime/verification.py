"""Compare the engine with the live model's own gradients, one example and one output at a time.

Decides between right, wrong and "could not tell"; must not know how either side is computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend import dtypes, host
from perjac._core.model.inputs import Batch
from perjac._core.model.variables import Source
from perjac._core.runtime import live_model
from perjac._core.runtime.live_model import Live, Reference
from perjac.errors import InputError

# By the narrowest type that the model computes in.
_RTOL = {tf.float64: 1e-10, tf.float32: 1e-4, tf.float16: 1e-2, tf.bfloat16: 5e-2}
# More rows than these are sampled evenly: the reference takes a pass for each.
_ROWS, _EXAMPLES = 10, 8
# Of rounding that the largest weight's Jacobian allows the others: a weight whose exact gradient is
# zero (attention's key bias) has noise divided by noise for a relative error.
_SLACK = 10
# Times what plain TensorFlow loses to rounding, that we may be off as well; and the share of a
# gradient that may be lost in all before it is too uncertain to be compared.
_AS_MUCH, _UNCERTAIN = 4, 0.2
# How often the numbers are shaken to see what rounding does, and by how many ε.
_SHAKES, _BY = 2, 2
# Other examples, at most, that a weight whose gradient is zero on these is asked about.
_OTHERS = 5
# Bytes of our rows that are formed once; more are formed weight by weight whenever they are needed.
_AT_ONCE = 2**29


@dataclasses.dataclass(frozen=True)
class Verification:
    """What a comparison with the live model's own gradients found.

    Attributes
    ----------
    verdict : {"passed", "failed", "undecided"}
        "failed" where a weight's rows are wrong; "undecided" where a weight's gradient is zero on
        these examples but not on others, or is lost to rounding in plain TensorFlow too.
    errors : dict of str to float
        For each weight ‖J - R‖ / (‖R‖ + 10 ε/rtol · max over weights ‖R‖), R the reference, over
        the rows that could be compared.
    rtol : float
        The error allowed; where plain TensorFlow loses more itself, four times that is.
    dtype : str
        The reference's type.
    examples, rows : list of int
        Which examples and outputs were compared.
    reference : str
        What was compared with, in words.
    failed, undecided, zero : list of str
        The weights whose rows are wrong; those that could not be compared; and those whose
        gradient is zero, or zero but for rounding, whatever the examples.
    note : str
        What else there is to know: why the reference is not in float64, or what was compared in
        place of the outputs.
    """

    verdict: str
    errors: dict[str, float]
    rtol: float
    dtype: str
    examples: list[int]
    rows: list[int]
    reference: str
    failed: list[str] = dataclasses.field(default_factory=list)
    undecided: list[str] = dataclasses.field(default_factory=list)
    zero: list[str] = dataclasses.field(default_factory=list)
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every weight was compared and is right: False where it could not be told."""
        return self.verdict == "passed"

    @property
    def worst(self) -> tuple[str, float]:
        """The weight with the largest error, and that error."""
        name = max(self.errors, key=lambda key: _order(self.errors[key]))
        return name, self.errors[name]

    def __str__(self) -> str:
        name, error = self.worst
        verdict = {"passed": "passed", "failed": "FAILED", "undecided": "could not tell"}
        lines = [
            f"Verification {verdict[self.verdict]}: {len(self.errors)} weights, "
            f"{len(self.examples)} examples × {len(self.rows)} outputs against a plain "
            f"{self.dtype} loop. Worst relative error {error:.1e} ({name}); allowed "
            f"{self.rtol:.0e}.",
            f"Reference: {self.reference}.",
        ]
        lines += [f"  wrong: {key}: {self.errors[key]:.1e}" for key in self.failed]
        if self.undecided:
            lines.append(
                f"Not decided: {_listed(self.undecided)}. On these examples the gradient is zero, "
                "or so small that plain TensorFlow loses it to rounding too. Give other examples, "
                "such as some that the model was trained on."
            )
        if self.zero:
            lines.append(f"Zero, as they should be: {_listed(self.zero)}.")
        return "\n".join([*lines, self.note] if self.note else lines)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def verify(
    live: Live,
    batch: Batch,
    weights: Sequence[Source],
    count: int,
    jacobian: Callable[[Any, list[int]], Mapping[str, tf.Tensor]],
    rtol: float | None,
) -> Verification:
    """Compare `jacobian(x, rows)` with the loop, on up to 8 examples and 10 outputs.

    Parameters
    ----------
    live : Live
        The model itself, and the numbers of the weights.
    batch : Batch
        Examples.
    weights : sequence of Source
        What to compare.
    count : int
        The entries of the output, for one example.
    jacobian : callable
        The engine's answer: takes a batch and the outputs to differentiate.
    rtol : float or None
        The error allowed.

    Returns
    -------
    Verification
    """
    rows = _evenly(count, _ROWS)
    examples = list(range(min(batch.size, _EXAMPLES)))
    few = [t[: len(examples)] for t in batch.tensors]
    ours = jacobian(tf.nest.pack_sequence_as(batch.structure, few), rows)
    loop = _Loop(live, few, count)
    rtol = _RTOL[loop.narrowest] if rtol is None else rtol
    judged = _Judged(loop, rtol, len(weights))
    formed = _formed(ours, weights)
    for b in examples:
        for n, row in enumerate(rows):
            judged.row(b, row, [np.asarray(formed(s.key)[b, n], "float64") for s in weights])
    return judged.verdict([s.key for s in weights], examples, rows)


def _formed(ours: Mapping[str, tf.Tensor], weights: Sequence[Source]) -> Callable[[str], tf.Tensor]:
    """Return how a weight's rows are looked up: formed once, where they are not too many."""
    shape = getattr(ours, "shape", (0,))
    if int(np.prod(shape)) * 8 > _AT_ONCE:
        return ours.__getitem__
    return {s.key: ours[s.key] for s in weights}.__getitem__


class _Loop:
    """The reference, and what plain TensorFlow loses beside it, for any example and output.

    Parameters
    ----------
    live : Live
        The model.
    few : list of tf.Tensor
        The examples. A model that takes no example alone is given all of them.
    count : int
        The entries of the output, for one example.
    """

    def __init__(self, live: Live, few: list[tf.Tensor], count: int):
        self._few, self._count = few, count
        run = host.compiled(live.call)
        try:
            self._alone, output = True, run([t[:1] for t in few])
        except Exception:  # a model of one batch size raises whatever it runs into
            self._alone, output = False, run(few)
        self.note = ""
        example = self._example(0)
        program = live_model.fresh(live, example)
        types = live_model.own_types(program)
        self.narrowest = max(types, key=_RTOL.__getitem__)
        self._plain = live_model.plain(live)
        self._wide: Reference | None = None
        for way in live_model.in_float64(live, program):
            try:
                live_model.checked(way, example, output)
            except Exception as failure:  # an operation without a float64 kernel, in any words
                self.note = (str(failure).strip() or type(failure).__name__).splitlines()[0][:150]
            else:
                self._wide = way
                break
        kept = {v.dtype for v in live.variables if v.dtype.is_floating} | types
        self.exact = self._plain if kept == {tf.float64} else self._wide or self._plain
        self.dtype = "float64" if self._wide or kept == {tf.float64} else output.dtype.name
        self.note = (
            f"The reference is in {self.dtype}: the model does not run in float64 ({self.note})."
            if self.dtype != "float64"
            else ""
        )

    def _example(self, b: int) -> list[tf.Tensor]:
        return [t[b : b + 1] for t in self._few] if self._alone else self._few

    def _at(self, b: int, row: int) -> tuple[list[tf.Tensor], int]:
        return self._example(b), row if self._alone else b * self._count + row

    def __call__(self, b: int, row: int) -> list[np.ndarray]:
        """Return the gradient of one output of an example in each weight."""
        return self.exact(*self._at(b, row))

    def plain(self, b: int, row: int) -> list[np.ndarray]:
        """Return what a tape around the model gives."""
        return self._plain(*self._at(b, row))

    def lost(self, b: int, row: int, right: Sequence[np.ndarray]) -> np.ndarray:
        """Return how far rounding alone takes each weight's gradient from the right one."""
        found, way = [], self._wide or self._plain
        with contextlib.suppress(InputError):  # logits that are out of a tape's sight
            found.append(_distances(self.plain(b, row), right))
        exact = way(*self._at(b, row))
        for seed in range(_SHAKES):
            size = _BY * dtypes.EPSILON[self.narrowest]
            found.append(_distances(way.shaken(*self._at(b, row), size, seed), exact))
        lost = np.array(found)
        return np.where(np.isfinite(lost), lost, np.inf).max(0)

    def moving(self, rows: Sequence[int]) -> np.ndarray:
        """Tell of each weight whether other examples than these give it a gradient."""
        found: Any = 0
        for seed in range(_OTHERS):
            other = [_redrawn(t, seed) for t in self._few]
            inputs = [t[:1] for t in other] if self._alone else other
            for row in rows:
                found = found + np.nan_to_num(_norms(self.exact(inputs, row)), nan=1.0)
        return found > 0

    @property
    def is_random(self) -> bool:
        """Whether the model gives other gradients for the same example each time."""
        try:
            first, second = self.plain(0, 0), self.plain(0, 0)
        except InputError:
            return False
        off, size = _distances(first, second), _norms(first)
        return bool(np.any(off > 1e-3 * np.maximum(size, 1e-3 * size.max(initial=0))))


class _Judged:
    """What has been found of each weight, row by row."""

    def __init__(self, loop: _Loop, rtol: float, weights: int):
        self._loop, self._rtol = loop, rtol
        self._squares = np.zeros((2, weights))  # of the difference, of the reference
        self._counts = {
            kind: np.zeros(weights, int) for kind in ("right", "wrong", "unclear", "zero")
        }
        self._noise = np.zeros(weights, bool)  # zero but for rounding, by measurement
        self._exactly = np.ones(weights, bool)  # zero in every row so far
        self._random: bool | None = None

    def row(self, b: int, row: int, found: Sequence[np.ndarray]) -> None:
        """Take one output of one example into account: our rows in each weight."""
        right = self._loop(b, row)
        off, norms = _distances(found, right), _norms(right)
        slack = _SLACK * dtypes.EPSILON[self._loop.narrowest] * norms.max(initial=0)
        small = norms <= slack  # of these the gradient may be zero but for rounding
        fine = off <= self._rtol * norms + np.where(small & self._noise, slack, 0)
        unclear = np.zeros(len(found), bool)
        if not fine.all() and self._is_random():
            unclear[:] = True
        elif not fine.all():
            lost = self._loop.lost(b, row, right)
            # What plain TensorFlow cannot compute either tells nothing of us.
            hopeless = ~np.isfinite(lost) | ~np.isfinite(norms)
            allowed = self._rtol * norms + _AS_MUCH * np.where(hopeless, 0, lost)
            uncertain = allowed > _UNCERTAIN * norms
            self._noise |= small & uncertain
            fine = (fine | (off <= allowed + np.where(small & uncertain, slack, 0))) & ~hopeless
            unclear = hopeless | (fine & uncertain & ~small)
        zero = fine & ((norms == 0) | (small & self._noise))
        self._counts["zero"] += zero & ~unclear
        self._counts["unclear"] += unclear
        self._counts["right"] += fine & ~zero & ~unclear
        self._counts["wrong"] += ~fine & ~unclear
        self._exactly &= norms == 0
        self._squares += np.where(unclear, 0, np.square([off, norms]))

    def _is_random(self) -> bool:
        if self._random is None:
            self._random = self._loop.is_random
        return self._random

    def verdict(self, keys: list[str], examples: list[int], rows: list[int]) -> Verification:
        """Return what all rows say together."""
        difference, norms = np.sqrt(self._squares)
        slack = _SLACK * dtypes.EPSILON[self._loop.narrowest] / self._rtol
        scale = norms + slack * norms.max(initial=0)
        errors = np.divide(difference, scale, out=difference.copy(), where=scale > 0)
        wrong, right = self._counts["wrong"] > 0, self._counts["right"] > 0
        unclear = ~wrong & ~right & (self._counts["unclear"] > 0)
        zero = ~wrong & ~right & ~unclear
        if (idle := zero & self._exactly).any():  # on these examples, or on any?
            unclear |= (moved := idle & self._loop.moving(rows))
            zero &= ~moved
        verdict = "failed" if wrong.any() else "passed"
        if not wrong.any() and (unclear.any() or not right.any()):
            verdict = "undecided"
        note = self._loop.note
        if self._random:
            note = "The model is random: it gives other gradients each time it is called. " + note
        named = np.array(keys, object)
        return Verification(
            verdict,
            {key: float(e) for key, e in zip(keys, errors, strict=True)},
            self._rtol,
            self._loop.dtype,
            examples,
            rows,
            self._loop.exact.told,
            failed=named[wrong].tolist(),
            undecided=named[unclear].tolist(),
            zero=named[zero].tolist(),
            note=note.strip(),
        )


def _redrawn(tensor: tf.Tensor, seed: int) -> tf.Tensor:
    """Return other examples: normal numbers about the same mean or zero, or integers reordered."""
    rng, values = np.random.default_rng(seed), np.asarray(tensor)
    if not tensor.dtype.is_floating:
        return tf.constant(rng.permuted(values.ravel()).reshape(values.shape), tensor.dtype)
    mean, spread = values.astype("float64").mean(), values.astype("float64").std() or 1.0
    mean, spread = [(0, 1), (0, 0.01), (0, spread), (mean, spread), (0, 10 * spread)][seed]
    return tf.cast(mean + spread * rng.standard_normal(values.shape), tensor.dtype)


def _norms(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([np.linalg.norm(a) for a in arrays])


def _distances(found: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of infinities
        return np.array([np.linalg.norm(f - r) for f, r in zip(found, right, strict=True)])


def _evenly(total: int, most: int) -> list[int]:
    if total <= most:
        return list(range(total))
    return sorted({round(n) for n in np.linspace(0, total - 1, most)})


def _order(error: float) -> float:
    return np.inf if np.isnan(error) else error
