"""The universal path: `tape.jacobian` of one example, vectorised over the examples by pfor.

Calls the model itself, not its traced graph: it is also what the factored path is checked against.
Where pfor cannot convert an operation, one example after another, and it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.autodiff.seeds import Seeds, select
from perjac._core.backend import host
from perjac._core.backend.shapes import known
from perjac._core.backend.xla import why_not
from perjac._core.graph.program import Callee, Program
from perjac._core.model import inside_functions
from perjac._core.model.variables import Source
from perjac.errors import SlowPathWarning, warn

# pfor converts some operations wrongly without a word: its first answer is compared with a plain
# loop's, and a relative difference above this is no rounding, even in float16.
_TRUST = 0.02


class Tape:
    """The tape path for one choice of output and sources.

    Parameters
    ----------
    callee : Callee
        The model.
    structure : nested structure
        The user's structure of inputs.
    head : callable
        Takes ({head: output}, {layer: outputs}) to the output that is differentiated.
    taps : mapping of Source to callable
        For an activation: takes {layer: outputs} to its tensor.
    variables : sequence of variables
        All of the model's, by number.
    sources : sequence of Source
        What is differentiated against.
    kind : str
        The kind of seeds.
    refused : str
        Why not to try pfor at all, or nothing.
    jit : bool
        Whether XLA compiles what pfor makes, anew for each batch size.
    """

    def __init__(
        self,
        callee: Callee,
        structure: Any,
        head: Callable[..., tf.Tensor],
        taps: Mapping[Source, Callable[..., tf.Tensor]],
        variables: Sequence[Any],
        sources: Sequence[Source],
        kind: str,
        refused: str,
        jit: bool = False,
    ):
        self._callee, self._structure, self._head, self._taps = callee, structure, head, taps
        self._variables, self._sources, self._kind = variables, list(sources), kind
        self._refused, self._trusted = refused, False
        self.disconnected: set[Source] = set()  # known after the first call
        self._batched = host.compiled(self._all, reduce_retracing=True)
        self._whole = host.compiled(self._all, jit_compile=True) if jit else None
        self._single = host.compiled(self._one, reduce_retracing=True)

    def __call__(self, inputs: Sequence[tf.Tensor], seeds: Seeds) -> list[tf.Tensor]:
        """Return each source's rows, (B, K, *shape)."""
        if inside_functions.is_inside() and not (self._trusted or self._refused):
            raise inside_functions.untried("The tape path")
        batch = known(inputs[0].shape[:1])[0]
        payload = seeds.payload
        if self._kind not in ("each", "cotangents"):  # the same for every example
            payload = tf.repeat(payload[None], batch, 0)
        if not self._refused:
            try:
                rows = self._together(list(inputs), payload)
            except LookupError:  # an operation without a gradient, which no loop has either
                raise
            except Exception as failure:  # pfor raises whatever the converter stumbled over
                self._refused = _first_line(failure)
            else:
                # Inside a function there are no numbers to compare.
                if not (self._trusted or inside_functions.is_inside()):
                    self._refused = self._doubt(inputs, payload, rows)
                    self._trusted = not self._refused
                if self._trusted:
                    return rows
        warn(
            f"The tape path goes example by example, which is slow, for "
            f"{', '.join(s.key for s in self._sources[:5])}"
            f"{', …' if len(self._sources) > 5 else ''}: {self._refused}",
            SlowPathWarning,
        )
        alone = [self._single([t[b] for t in inputs], payload[b]) for b in range(batch)]
        return [tf.stack(rows) for rows in zip(*alone, strict=True)]

    def _together(self, inputs: list[tf.Tensor], payload: tf.Tensor) -> list[tf.Tensor]:
        """Return all examples' rows by pfor, compiled by XLA where that is asked for and works."""
        if self._whole is not None:
            try:
                return list(self._whole(inputs, payload))
            except tf.errors.OpError as failure:
                self._whole = None
                warn(
                    f"XLA does not compile the tape path: {why_not(failure)}. It goes without.",
                    SlowPathWarning,
                )
        return list(self._batched(inputs, payload))

    def _doubt(
        self, inputs: Sequence[tf.Tensor], payload: tf.Tensor, rows: Sequence[tf.Tensor]
    ) -> str:
        """Compare pfor's first example with a plain loop's; return what is wrong, or nothing."""
        first = [t[0] for t in inputs], payload[0]
        plain = self._single(*first)
        off = _distances([mine[0] for mine in rows], plain)
        worst = max(range(len(off)), key=off.__getitem__)
        if off[worst] < _TRUST or _distances(self._single(*first), plain)[worst] >= _TRUST:
            return ""  # right, or a random model, for which there is nothing to compare
        key = self._sources[worst].key
        return f"pfor's result for {key!r} is wrong, off by {off[worst]:.0e} from a plain loop's"

    def _all(self, inputs: list[tf.Tensor], payload: tf.Tensor) -> list[tf.Tensor]:
        return tf.vectorized_map(
            lambda example: self._rows(example[0], example[1], pfor=True), (inputs, payload)
        )

    def _one(self, inputs: list[tf.Tensor], payload: tf.Tensor) -> list[tf.Tensor]:
        return self._rows(inputs, payload, pfor=False)

    def _rows(self, example: list[tf.Tensor], payload: tf.Tensor, pfor: bool) -> list[tf.Tensor]:
        """One example's rows with respect to every source, each (K, *shape)."""
        inputs = [t[None] for t in example]
        # What is not watched is not gone back to: there may be no gradient on the way.
        hidden = any(s.kind == "activation" for s in self._sources)
        with tf.GradientTape(persistent=not pfor, watch_accessed_variables=hidden) as tape:
            tape.watch([t for t in inputs if hidden and t.dtype.is_floating])
            given = [s for s in self._sources if s.kind != "activation"]
            tape.watch([self._tensor(s, inputs, {}) for s in given])
            heads, taps = self._callee(tf.nest.pack_sequence_as(self._structure, inputs))
            output = select(self._kind, payload, self._head(heads, taps)[0])
        against = [self._tensor(source, inputs, taps) for source in self._sources]
        # Zeros are filled in here: asking the tape for them fails in TensorFlow 2.21 as soon as
        # a source is unconnected.
        rows = tape.jacobian(output, against) if pfor else _one_by_one(tape, output, against)
        count = tf.shape(output)[0]
        pairs = list(zip(self._sources, rows, strict=True))
        self.disconnected = {source for source, row in pairs if row is None}
        return [
            tf.zeros([count, *source.shape], source.dtype)
            if row is None
            else tf.reshape(row, [count, *source.shape])
            for source, row in pairs
        ]

    def _tensor(self, source: Source, inputs: list[tf.Tensor], taps: Any) -> Any:
        if source.kind == "weight":
            return host.tf_variable(self._variables[source.index])
        return inputs[source.index] if source.kind == "input" else self._taps[source]({}, taps)


def _one_by_one(tape: tf.GradientTape, output: tf.Tensor, against: Sequence[Any]) -> list[Any]:
    """Return what `tape.jacobian` does, by a loop over the entries of the output, (K,).

    TensorFlow's own loop, as in 2.21, takes every row to be of the output's type.
    """
    count = tf.shape(output)[0]

    def row(k: Any) -> list[Any]:
        unit = tf.one_hot(k, count, dtype=output.dtype)
        return tape.gradient(output, against, output_gradients=unit)

    return looped(row, count, output.shape[0])


def looped(row: Callable[[Any], list[Any]], count: Any, known_count: int | None) -> list[Any]:
    """Return the tensors of `row(k)` for k from 0 to count - 1, stacked; None where it gives None.

    `known_count` is the count where that is a number, and not only known when the graph runs.
    """
    first = row(0)
    reached = [n for n, g in enumerate(first) if g is not None]
    found: list[Any] = [None] * len(first)
    rows = [tf.convert_to_tensor(first[n]) for n in reached]
    if known_count == 1:
        rows = [r[None] for r in rows]
    elif reached:  # the first row is there for its types: as nobody uses it, it is never computed
        rows = tf.map_fn(
            lambda k: [tf.convert_to_tensor(g) for g in row(k) if g is not None],
            tf.range(count),
            fn_output_signature=[tf.TensorSpec(r.shape, r.dtype) for r in rows],
        )
    for n, of_source in zip(reached, rows, strict=True):
        found[n] = of_source
    return found


def _distances(found: Sequence[tf.Tensor], right: Sequence[tf.Tensor]) -> list[float]:
    """Relative distances; of a source with hardly any gradient, relative to the largest's."""
    wide = [tf.complex128 if r.dtype.is_complex else tf.float64 for r in right]
    norms = [_length(tf.cast(r, w)) for r, w in zip(right, wide, strict=True)]
    floor = 1e-3 * max(norms) or 1.0
    return [
        _length(tf.cast(f, w) - tf.cast(r, w)) / max(norm, floor)
        for f, r, w, norm in zip(found, right, wide, norms, strict=True)
    ]


def _length(tensor: tf.Tensor) -> float:
    return float(tf.norm(tf.abs(tensor)))


def _first_line(failure: Exception) -> str:
    text = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {text[0][:200] if text else ''}"


def finder(program: Program, name: str) -> Callable[..., tf.Tensor]:
    """Return how the tape finds a traced tensor again: by its head, or its layer and call."""
    for head, tensor in program.heads.items():
        if tensor == name:
            return lambda heads, taps: heads[head]
    for layer, calls in program.taps.items():
        if name in calls:
            call = calls.index(name)
            return lambda heads, taps: taps[layer][call]
    raise KeyError(name)
