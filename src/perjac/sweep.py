"""Seeds → cotangents: reverse sweeps through the traced graph, one for each row.

Examples do not influence one another, so one sweep from all examples' outputs gives every
example's own cotangents. Must not know rules, weights or factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

Row = Callable[[object], tf.Tensor]


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

    if chunk <= 1:
        rows = [sweep(k) for k in range(count)]
        return [None if g[0] is None else tf.stack(g, 1) for g in zip(*rows, strict=True)]
    return _vectorised(sweep, len(targets), count, min(chunk, count))


def _vectorised(
    sweep: Callable[[object], list[tf.Tensor | None]], width: int, count: int, chunk: int
) -> list[tf.Tensor | None]:
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
    for tensor in swept:  # a loop forgets how often it ran; factors choose their ways by K
        tensor.set_shape([count, *tensor.shape[1:]])
    result: list[tf.Tensor | None] = [None] * width
    for n, tensor in zip(connected, swept, strict=bool(connected)):
        tensor.set_shape([count, *tensor.shape[1:]])
        result[n] = tf.transpose(tensor, [1, 0, *range(2, tensor.shape.rank)])
    return result
