"""Seeds → cotangents: sweeps through the traced graph, one for each row or each column.

Examples do not influence one another, so one sweep from all examples' outputs gives every
example's own cotangents. Must not know rules, weights or factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

Row = Callable[[object], tf.Tensor]
Sweep = Callable[[object], list[tf.Tensor | None]]


def cotangents(
    output: tf.Tensor,
    targets: Sequence[tf.Tensor],
    unfolds: Sequence[Callable[[tf.Tensor], tf.Tensor]],
    row: Row,
    count: int,
    chunk: int,
) -> list[tf.Tensor | None]:
    """Return the cotangent of each target for each row, (B, K, F, ...).

    Parameters
    ----------
    output : tf.Tensor
        (B, *output_shape), in the graph being built.
    targets : sequence of tf.Tensor
        Tensors of the same graph, each (B·F, ...).
    unfolds : sequence of callable
        How each target's batch axis is folded out, (B·F, ...) to (B, F, ...).
    row : callable
        k → the cotangent of the output, (B, *output_shape); k is a number or a scalar tensor.
    count : int
        K.
    chunk : int
        How many rows are swept together: 1 unrolls the rows one after another over the shared
        forward pass; more vectorises over that many, in a loop over the chunks.

    Returns
    -------
    list of tf.Tensor or None
        None for a target that the output does not depend on.
    """

    def sweep(k: object) -> list[tf.Tensor | None]:
        swept = tf.gradients(output, list(targets), grad_ys=row(k))
        return [
            None if g is None else unfold(tf.convert_to_tensor(g))
            for g, unfold in zip(swept, unfolds, strict=True)
        ]

    return _each(sweep, len(targets), count, chunk)


def tangents(
    output: tf.Tensor, source: tf.Tensor, column: Row, count: int, chunk: int
) -> tf.Tensor | None:
    """Return the output's tangent for each column, (B, D, *output_shape).

    Parameters
    ----------
    output, source : tf.Tensor
        (B, *output_shape) and (B, *shape), in the graph being built.
    column : callable
        d → the tangent of the source, (B, *shape); d is a number or a scalar tensor.
    count : int
        D.
    chunk : int
        As in `cotangents`.

    Raises
    ------
    LookupError
        If an operation's gradient has no gradient.
    """
    ahead = forward(output, [source])
    if ahead is None:
        return None
    return _each(lambda d: [ahead([column(d)])], 1, count, chunk)[0]


def forward(
    output: tf.Tensor, sources: Sequence[tf.Tensor]
) -> Callable[[Sequence[tf.Tensor]], tf.Tensor] | None:
    """Return a function of tangents of the sources to the output's; None if it depends on none.

    A cotangent's way back is linear in the cotangent, and the derivative by it is the way ahead,
    whatever the cotangent; so of the way back nothing is computed.

    Raises
    ------
    LookupError
        If an operation's gradient has no gradient; the function raises it.
    """
    cotangent = tf.zeros_like(output)
    back = tf.gradients(output, list(sources), grad_ys=cotangent)
    reached = [n for n, b in enumerate(back) if b is not None]
    if not reached:
        return None
    ends = [tf.convert_to_tensor(back[n]) for n in reached]

    def ahead(tangents: Sequence[tf.Tensor]) -> tf.Tensor:
        moves = [tangents[n] for n in reached]
        return tf.gradients(ends, cotangent, moves, unconnected_gradients="zero")[0]

    return ahead


def _each(sweep: Sweep, width: int, count: int, chunk: int) -> list[tf.Tensor | None]:
    if chunk <= 1:
        rows = [sweep(k) for k in range(count)]
        return [None if g[0] is None else tf.stack(g, 1) for g in zip(*rows, strict=True)]
    return _vectorised(sweep, width, count, min(chunk, count))


def _vectorised(sweep: Sweep, width: int, count: int, chunk: int) -> list[tf.Tensor | None]:
    connected: list[int] = []

    def reached(k: tf.Tensor) -> list[tf.Tensor]:
        swept = sweep(k)
        connected[:] = [n for n, g in enumerate(swept) if g is not None]
        return [g for g in swept if g is not None] or [tf.zeros([])]

    def together(start: tf.Tensor) -> list[tf.Tensor]:
        # The last chunk runs over the end: its surplus repeats the last row and is cut off.
        rows = tf.minimum(start + tf.range(chunk), count - 1)
        return tf.vectorized_map(reached, rows)

    if chunk == count:
        swept = together(tf.constant(0))
    else:
        starts = tf.range(0, count, chunk)
        probe = together(tf.constant(0))  # gives the signature; pruned, as nothing uses it
        signature = [tf.TensorSpec(t.shape, t.dtype) for t in probe]
        swept = tf.map_fn(together, starts, fn_output_signature=signature, parallel_iterations=1)
        swept = [tf.reshape(t, tf.concat([[-1], tf.shape(t)[2:]], 0))[:count] for t in swept]
    result: list[tf.Tensor | None] = [None] * width
    for n, tensor in zip(connected, swept, strict=bool(connected)):
        # A loop forgets how often it ran; factors choose their ways by K.
        tensor.set_shape([count, *tensor.shape[1:]])
        result[n] = tf.transpose(tensor, [1, 0, *range(2, tensor.shape.rank)])
    return result
