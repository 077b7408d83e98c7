"""Provenance: who owns an input's entries, beside which outputs move when that entry is changed."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tensorflow as tf

import perjac as pj
from perjac._core.graph.provenance.analysis import _Analysis
from perjac._core.graph.provenance.owners import Owners, _groups
from perjac._core.graph.provenance.registry import RULES
from perjac.errors import SlowPathWarning

X = (4, 6)  # an example, unless a case says otherwise
PICTURE = (6, 6, 2)
rng = np.random.default_rng(0)
SQUARE = np.eye(4) * 3 + rng.normal(size=(4, 4))
MIXED, WIDE = rng.normal(size=(6, 3)), rng.normal(size=(3, 24))
TURN = tf.Variable(rng.normal(size=(6, 6)))
TABLE = tf.Variable(rng.normal(size=(5, 3)))
KERNEL, DEEP, BACK = (
    rng.normal(size=shape) for shape in ((3, 3, 2, 3), (3, 3, 2, 2), (3, 3, 3, 2))
)


def batch(x):
    return tf.shape(x)[0]


def front(x, order):
    """Bring the batch behind, compute, and bring it back."""
    return tf.transpose(x, order)


# What is computed, of which shape of example. Every entry of the result is row b's of its own.
APART = {
    "a custom gradient clipped by the example": lambda x: _clipping(x),
    "a step for each position": lambda x: _steps(x, tf.shape(front(x, [1, 0, 2]))[0]),
    "a mask of positions": lambda x: x * tf.cast(tf.range(tf.shape(x)[2]) < 2, x.dtype),
    "the larger of it and zeros": lambda x: tf.maximum(x, tf.zeros([batch(x), 1, 1], x.dtype)),
    "the larger of two made up": lambda x: x + tf.maximum(tf.ones([batch(x), 1, 6], x.dtype), 0.5),
    "reshape": lambda x: tf.reshape(x, [-1, 3, 8]),
    "fold and unfold": lambda x: tf.reshape(tf.reshape(x, [-1, 6]) * 2.0, [-1, 4, 6]),
    "transpose": lambda x: tf.transpose(tf.transpose(x, [1, 0, 2]) * 2.0, [1, 2, 0]),
    "time in front, folded": lambda x: tf.transpose(
        tf.reshape(tf.reshape(tf.transpose(x, [1, 0, 2]), [-1, 6]) * 2.0, [4, -1, 6]), [1, 0, 2]
    ),
    "squeeze": lambda x: tf.squeeze(tf.expand_dims(x, 2), 2),
    "concat": lambda x: tf.concat([x, 2 * x], 1),
    "concat along the batch, and split": lambda x: sum(tf.split(tf.concat([x, 2 * x], 0), 2)),
    "pack": lambda x: tf.stack([x, -x], 1),
    "pack in front, unpack": lambda x: tf.add_n(tf.unstack(tf.stack([x, -2 * x], 0), axis=0)),
    "unpack": lambda x: tf.unstack(x, axis=1)[2],
    "split": lambda x: tf.split(x, [1, 3], 1)[1],
    "pad": lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 1]]),
    "pad with a value": lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 1]], constant_values=3.0),
    "pad the batch, cut it off": lambda x: tf.pad(x, [[1, 2], [0, 0], [0, 0]])[1:-2],
    "mirror pad": lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 0]], "REFLECT"),
    "slice": lambda x: tf.slice(x, [0, 1, 2], [-1, 2, 3]),
    "strided slice": lambda x: x[:, ::2, 1:-1],
    "strided slice with new and single axes": lambda x: x[:, tf.newaxis, 1, ..., ::2],
    "reverse": lambda x: x[:, ::-1],
    "reverse twice": lambda x: tf.reverse(tf.reverse(x, [0]) * 2.0, [0]),
    "roll": lambda x: tf.roll(x, 2, 1),
    "roll and back": lambda x: tf.roll(tf.roll(x, 2, 0) * 2.0, -2, 0),
    "tile": lambda x: tf.tile(x, [1, 2, 1]),
    "tile in front": lambda x: tf.reduce_sum(
        tf.reshape(tf.tile(x, [3, 1, 1]), [3, -1, 4, 6]), 0
    ),
    "repeat": lambda x: tf.reshape(tf.repeat(x, 3, 0), [-1, 3, 4, 6]),
    "broadcast": lambda x: tf.broadcast_to(x[:, :1], [batch(x), 5, 6]),
    "gather": lambda x: tf.gather(x, [3, 1, 1], axis=1),
    "gather of all examples": lambda x: tf.gather(tf.gather(x, tf.range(batch(x))[::-1]),
                                                  tf.range(batch(x))[::-1]),
    "gather by data": lambda x: tf.gather(
        x, tf.cast(tf.abs(x[:, 0, :2]), tf.int32) % 4, axis=1, batch_dims=1
    ),
    "gather_nd of rows by data": lambda x: tf.gather_nd(
        x, tf.stack([tf.range(batch(x)), tf.cast(tf.abs(x[:, 0, 0]), tf.int32) % 4], 1)
    ),
    "gather_nd of known places": lambda x: tf.gather_nd(
        x, tf.stack([tf.range(batch(x)), tf.zeros([batch(x)], tf.int32)], 1)
    ),
    "scatter": lambda x: tf.scatter_nd(tf.range(batch(x))[::-1, None], x, tf.shape(x))[::-1],
    "scatter into": lambda x: tf.tensor_scatter_nd_update(
        x, tf.range(batch(x))[:, None], 2 * x
    ),
    "segments": lambda x: tf.math.unsorted_segment_sum(
        tf.reshape(x, [-1, 6]), tf.repeat(tf.range(batch(x)), 4), batch(x)
    ),
    "stitch": lambda x: tf.dynamic_stitch(
        [tf.range(0, 2 * batch(x), 2), tf.range(1, 2 * batch(x), 2)], [x, -x]
    )[::2],
    "sum": lambda x: tf.reduce_sum(x, 1),
    "mean of all": lambda x: tf.reduce_mean(x, [1, 2], keepdims=True),
    "maximum": lambda x: tf.reduce_max(x, -1),
    "place of the largest": lambda x: tf.cast(tf.argmax(x, -1), tf.float64) * tf.reduce_sum(x, -1),
    "cumsum": lambda x: tf.cumsum(x, 1),
    "softmax": lambda x: tf.nn.softmax(x),
    "log softmax": lambda x: tf.nn.log_softmax(x),
    "largest": lambda x: tf.math.top_k(x, 2).values,
    "sorted": lambda x: tf.sort(x, axis=1),
    "spectrum": lambda x: tf.abs(tf.signal.rfft(x)),
    "spectrum in two axes": lambda x: tf.abs(tf.signal.fft2d(tf.cast(x, tf.complex128))),
    "matmul": lambda x: x @ MIXED,
    "matmul, the batch behind": lambda x: tf.transpose(
        tf.constant(WIDE) @ tf.transpose(tf.reshape(x, [-1, 24]))
    ),
    "products within an example": lambda x: tf.matmul(x, x, transpose_b=True),
    "einsum": lambda x: tf.einsum("btc,bsc->bts", x, x),
    "diagonal of products between examples": lambda x: tf.linalg.diag_part(
        tf.reshape(x, [-1, 24]) @ tf.transpose(tf.reshape(x, [-1, 24]))
    ),
    "inverse": lambda x: tf.linalg.inv(x[:, :, :4] @ tf.transpose(x[:, :, :4], [0, 2, 1])
                                       + 9 * tf.eye(4, dtype=x.dtype)),
    "determinant": lambda x: tf.linalg.det(x[:, :, :4]),
    "triangular": lambda x: tf.linalg.band_part(x, 1, 1),
    "diagonal": lambda x: tf.linalg.diag(x[:, 0]),
    "solve": lambda x: tf.linalg.solve(tf.broadcast_to(SQUARE, [batch(x), 4, 4]), x),
    "solve, examples in columns": lambda x: tf.transpose(
        tf.linalg.solve(tf.constant(SQUARE), tf.transpose(x[:, :, 0]))
    ),
    "triangular solve, examples in columns": lambda x: tf.transpose(
        tf.linalg.triangular_solve(tf.constant(SQUARE), tf.transpose(x[:, :, 0]))
    ),
    "one-hot": lambda x: tf.one_hot(tf.cast(tf.abs(x[:, 0, 0]), tf.int32) % 5, 5, dtype=x.dtype)
    * x[:, 0, :5],
    "zeros of the batch": lambda x: x + tf.zeros([batch(x), 1, 6], x.dtype),
    "filled": lambda x: x * tf.fill([batch(x), 1, 1], tf.constant(2.0, x.dtype)),
    "cross entropy": lambda x: tf.nn.softmax_cross_entropy_with_logits(
        tf.nn.softmax(x[:, 0]), x[:, 1]
    ),
    "sparse cross entropy": lambda x: tf.nn.sparse_softmax_cross_entropy_with_logits(
        tf.cast(tf.abs(x[:, 0, 0]), tf.int32) % 6, x[:, 1]
    ),
    "scan": lambda x: tf.transpose(tf.scan(lambda a, e: a * 0.5 + e, tf.transpose(x, [1, 0, 2])),
                                   [1, 0, 2]),
    "loop": lambda x: tf.while_loop(lambda n, y: n < 3, lambda n, y: (n + 1, tf.sin(y)),
                                    (0, x))[1],
    "branch by shapes": lambda x: tf.cond(tf.shape(x)[1] > 3, lambda: 2 * x, lambda: x[::-1]),
    "call": lambda x: tf.function(lambda y: tf.sin(y) * 2)(x),
    "vectorized map": lambda x: tf.vectorized_map(lambda one: tf.reduce_sum(one, 0), x),
    "rows chosen by a vector": lambda x: tf.raw_ops.Select(
        condition=x[:, 0, 0] > 0, x=x, y=-2 * x
    ),
    "steps reversed by lengths": lambda x: tf.reverse_sequence(
        x, tf.cast(tf.abs(x[:, 0, 0]), tf.int32) % 5, seq_axis=1
    ),
    "several at once": lambda x: tf.add_n(tf.identity_n([x, 2 * x])),
    "rows of a variable": lambda x: tf.gather(TABLE, tf.cast(tf.abs(x[:, :, 0]), tf.int32) % 5),
    "entries of a variable": lambda x: tf.raw_ops.ResourceGatherNd(
        resource=TABLE.handle, indices=tf.cast(tf.abs(x[:, :, :2]), tf.int32) % 3, dtype=tf.float64
    ),
    "gradient of a slice": lambda x: _gradient(lambda x: tf.sin(x[:, 1:, ::2]), x),
    "gradient of a single place": lambda x: _gradient(lambda x: tf.sin(x[:, 1]), x),
    "a loop with a weight": lambda x: tf.while_loop(
        lambda n, y: n < 3, lambda n, y: (n + 1, tf.sin(y @ TURN)), (0, x[:, 0])
    )[1],
    "a loop with a weight at folded positions": lambda x: tf.while_loop(
        lambda n, y: n < 3, lambda n, y: (n + 1, tf.sin(tf.tensordot(y, TURN, 1))), (0, x)
    )[1],
    "gradient of a convolution": lambda x: _gradient(
        lambda x: tf.nn.conv1d(tf.sin(x), tf.constant(DEEP[0, :, :1, :]) * tf.ones([1, 6, 1],
                                                                                 x.dtype), 1,
                               "SAME"), x,
    ),
    "a custom gradient": lambda x: tf.nn.silu(x) + tf.reduce_sum(tf.nn.silu(2 * x), 1, True),
    "masked by a table": lambda x: x * tf.constant([0.0, 1.0, 1.0, 0.0, 1.0, 1.0], x.dtype),
    "one of two by a table": lambda x: tf.where([True, False, True, False, True, False], x, 2 * x),
}  # fmt: skip
# The same of pictures.
PICTURES = {
    "convolution": lambda x: tf.nn.conv2d(x, KERNEL, 1, "SAME"),
    "dilated convolution": lambda x: tf.nn.conv2d(
        x, KERNEL, 1, "SAME", dilations=2
    ),
    "space to batch and back": lambda x: tf.batch_to_space(
        2 * tf.space_to_batch(x, [2, 2], [[0, 2], [2, 0]]), [2, 2], [[0, 2], [2, 0]]
    ),
    "space to batch, pieces apart": lambda x: tf.reduce_sum(
        tf.reshape(tf.space_to_batch(x, [2, 3], [[0, 0], [0, 0]]), [6, -1, 3, 2, 2]), 0
    ),
    "depthwise convolution": lambda x: tf.nn.depthwise_conv2d(
        x, DEEP, [1, 1, 1, 1], "SAME"
    ),
    "transposed convolution": lambda x: tf.nn.conv2d_transpose(
        x, BACK, [batch(x), 12, 12, 3], 2
    ),
    "largest of windows": lambda x: tf.nn.max_pool2d(x, 2, 2, "VALID"),
    "mean of windows": lambda x: tf.nn.avg_pool2d(x, 2, 2, "VALID"),
    "resized": lambda x: tf.cast(tf.image.resize(x, [4, 4]), x.dtype),
    "nearest": lambda x: tf.image.resize(x, [9, 9], "nearest"),
    "depth to space": lambda x: tf.nn.depth_to_space(tf.nn.space_to_depth(x, 2) * 2.0, 2),
    "patches": lambda x: tf.image.extract_patches(
        x, [1, 3, 3, 1], [1, 1, 1, 1], [1, 1, 1, 1], "VALID"
    ),
    "windows folded into the batch": lambda x: tf.reduce_sum(
        tf.reshape(
            tf.reshape(
                tf.transpose(tf.reshape(x, [-1, 2, 3, 2, 3, 2]), [0, 1, 3, 2, 4, 5]), [-1, 9, 2]
            ) * 2.0, [-1, 4, 9, 2],
        ), 1,
    ),
    "normalisation by stored moments": lambda x: tf.raw_ops.FusedBatchNormV3(
        x=tf.cast(x, tf.float32), scale=[1.0, 2.0], offset=[0.0, 1.0], mean=[0.0, 1.0],
        variance=[1.0, 2.0], is_training=False,
    ).y,
}  # fmt: skip
# Examples meet, or are moved to another's place, whatever the data.
MEET = {
    "mean over the batch": lambda x: x - tf.reduce_mean(x, 0),
    "first example": lambda x: x + x[:1],
    "third example of many": lambda x: x + tf.reduce_sum(x[2:3], 0),
    "beyond the twentieth": lambda x: x + tf.reduce_sum(x[20:], 0),
    "running sum": lambda x: tf.cumsum(x, 0),
    "sorted": lambda x: tf.sort(x, axis=0),
    "sorted by the data, and back": lambda x: tf.gather(
        tf.gather(x, tf.argsort(x[:, 0, 0])), tf.argsort(tf.argsort(x[:, 0, 0]))
    ),
    "softmax over the batch": lambda x: tf.transpose(tf.nn.softmax(tf.transpose(x))),
    "reversed": lambda x: x[::-1],
    "rolled": lambda x: tf.roll(x, 1, 0),
    "rolled by ten": lambda x: tf.roll(x, 10, 0),
    "gathered backwards": lambda x: tf.gather(x, tf.range(batch(x))[::-1]),
    "shuffled by a table": lambda x: tf.gather(x, tf.math.floormod(tf.range(batch(x)) * 2 + 1,
                                                                  batch(x))),
    "products between examples": lambda x: x[:, 0] @ tf.transpose(x[:, 0]) @ x[:, 0],
    "divided by the number of examples": lambda x: x / tf.cast(batch(x), x.dtype),
    "times the place in the batch": lambda x: x * tf.cast(tf.range(batch(x)), x.dtype)[:, None,
                                                                                       None],
    "neighbours folded together": lambda x: tf.cumsum(tf.reshape(x, [-1, 6]), 0)[:: 4],
    "moments of the batch": lambda x: tf.raw_ops.FusedBatchNormV3(
        x=tf.cast(x[..., None], tf.float32), scale=[1.0], offset=[0.0], mean=[0.0], variance=[1.0],
        is_training=True,
    ).y,
    "a custom gradient that counts examples": lambda x: _averaging(x),
    "a custom gradient of the whole batch": lambda x: _mixing(x),
    "gradient of the whole batch": lambda x: _gradient_of_all(x),
    "norm of the batch": lambda x: x * tf.nn.l2_loss(x),
    "shuffled": lambda x: tf.random.shuffle(x),
    "gradient by a kernel": lambda x: x * tf.reduce_sum(
        _gradient(lambda w: tf.nn.conv1d(x, w, 1, "SAME"), tf.constant(rng.normal(size=(3, 6, 2))))
    ),
    "gradient by a bias": lambda x: x * tf.reduce_sum(
        _gradient(lambda b: tf.sin(tf.nn.bias_add(x, b)), tf.constant(rng.normal(size=6)))
    ),
    "divided by the number of examples in a loop": lambda x: tf.while_loop(
        lambda n, y: n < 3, lambda n, y: (n + 1, y / tf.cast(batch(y), y.dtype)), (0, x)
    )[1],
    "in a loop": lambda x: tf.while_loop(
        lambda n, y: n < 3, lambda n, y: (n + 1, y - tf.reduce_mean(y, 0)), (0, x)
    )[1],
}  # fmt: skip


# Of these the graph does not tell.
UNCLEAR = {
    "map over examples": lambda x: tf.map_fn(lambda one: tf.sin(one), x),
    "gradient through a loop": lambda x: _gradient(
        lambda x: tf.while_loop(lambda n, y: n < 3, lambda n, y: (n + 1, tf.sin(y * x)), (0, x))[1],
        x,
    ),
    "until nothing is large": lambda x: tf.while_loop(
        lambda y: tf.reduce_any(tf.abs(y) > 0.1),
        lambda y: (tf.where(tf.abs(y) > 0.1, y / 2, y),),
        (x,),
    )[0],
    "counted beyond a hundred": lambda x: x + tf.reduce_sum(x[150:], 0),
    # These are alike in large batches, and not in small ones.
    "as many steps as examples, up to 3": lambda x: _steps(x, tf.minimum(batch(x), 3)),
    "as many steps as three rows have": lambda x: _steps(x, tf.shape(x[:3])[0]),
    "times the number of examples, up to 3": lambda x: (
        x * tf.cast(tf.minimum(batch(x), 3), x.dtype)
    ),
    "a branch by the number of examples": lambda x: tf.cond(batch(x) > 2, lambda: x, lambda: 2 * x),
    "chosen by the number of examples": lambda x: tf.where(batch(x) > 2, x, 2 * x),
    "an operation without a rule": lambda x: (
        x + tf.cast(tf.reshape(tf.unique(tf.reshape(tf.sign(x), [-1])).idx, tf.shape(x)), x.dtype)
    ),
}


def _steps(x, count):
    return tf.while_loop(lambda n, y: n < count, lambda n, y: (n + 1, tf.sin(y)), (0, x))[1]


def _gradient_of_all(x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        energy = tf.reduce_sum(tf.reduce_mean(x, 0) ** 2)
    return tape.gradient(energy, x)


@tf.custom_gradient
def _clipping(x):
    return tf.sin(x), lambda dy: tf.clip_by_norm(dy, 0.5, axes=[1, 2])


@tf.custom_gradient
def _averaging(x):
    return tf.sin(x), lambda dy: dy / tf.cast(batch(x), x.dtype)


@tf.custom_gradient
def _mixing(x):
    return tf.sin(x), lambda dy: dy - tf.reduce_mean(dy, 0)


def _gradient(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    return tape.gradient(y, x)


def analysis(function, shape):
    x = rng.normal(size=(3, *shape))
    engine = pj.Engine(function, independence="trust", certify="never")
    with warnings.catch_warnings():  # some loops are left as they are
        warnings.simplefilter("ignore", SlowPathWarning)
        traced, names = engine._traces.of(engine._traces.prepare(x))
    return _Analysis(traced.program, traced._flow, names.head(None))


def moved_rows(function, x):
    """Return for each entry of x the rows of the output that move with it: (*x.shape, B)."""
    before, flat = function(tf.constant(x)).numpy(), x.reshape(-1)
    found = np.zeros((flat.size, len(x)), bool)
    for n in range(flat.size):
        for step in (0.7, -40.0):
            other = flat.copy()
            other[n] += step
            after = function(tf.constant(other.reshape(x.shape))).numpy()
            change = (after != before).reshape(len(x), -1).any(1)
            found[n] |= change
    return found.reshape(*x.shape, len(x))


CASES = {name: (f, X) for name, f in APART.items()}
CASES |= {f"pictures: {name}": (f, PICTURE) for name, f in PICTURES.items()}
each_case = pytest.mark.parametrize("name", list(CASES))
each_meeting = pytest.mark.parametrize("name", list(MEET))


@each_case
def test_examples_that_stay_apart_are_proved_to(name):
    function, shape = CASES[name]
    found = analysis(function, shape).result([])
    assert found.meeting is None
    assert found.unclear == ""


@each_meeting
def test_examples_that_meet_are_found_in_the_graph(name):
    found = analysis(MEET[name], X).result([])
    assert found.meeting is not None, found.unclear


@pytest.mark.parametrize("name", list(UNCLEAR))
def test_what_the_graph_does_not_tell_is_said_to_be_unclear(name):
    found = analysis(UNCLEAR[name], X).result([])
    assert found.meeting is None
    assert found.unclear


def test_where_the_graph_counts_too_far_no_order_is_known():
    found = analysis(UNCLEAR["counted beyond a hundred"], X).result(["some tensor"])
    assert "150" in found.order.why("some tensor")


@pytest.mark.parametrize("name", [*CASES, *MEET])
def test_whoever_moves_with_an_entry_owns_it(name):
    function, shape = CASES.get(name) or (MEET[name], X)
    known = analysis(function, shape)
    size = known._program.batches[0]
    if size > 11:
        pytest.skip("a batch of so many examples takes a call for each of their entries")
    x = rng.normal(size=(size, *shape))
    own = known._found[0].get(known._program.inputs[0], Owners.nobody(x.ndim))
    if own.unclear:
        return  # there may be more owners
    rows = np.arange(size)
    first, last = (np.broadcast_to(side, x.shape)[..., None] for side in (own.first, own.last))
    owned = (first <= rows) & (rows <= last)
    assert not (moved_rows(function, x) & ~owned).any()


def test_every_rule_has_a_case():
    there = set()
    for function, shape in [*CASES.values(), *((f, X) for f in (MEET | UNCLEAR).values())]:
        program = analysis(function, shape)._program
        there |= {op.type for op in program.graph.get_operations()}
        there |= {n.op for f in program.graph_def.library.function for n in f.node_def}
    tried = {RULES[kind] for kind in there & set(RULES)}
    assert sorted(kind for kind, rule in RULES.items() if rule not in tried) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 6), (12,)), ((12,), (3, 4)), ((2, 3, 4), (6, 4)), ((5, 1, 4), (5, 4)), ((4, 6), (3, 8)),
     ((1, 4), (4, 1, 1)), ((), (1, 1)), ((2, 3, 5, 7), (6, 35)), ((4, 9), (6, 6))],
)  # fmt: skip
def test_a_reshape_keeps_every_entrys_owner(before, after):
    groups = _groups(before, after)
    assert [n for mine, _ in groups for n in mine] == list(range(len(before)))
    assert [n for _, theirs in groups for n in theirs] == list(range(len(after)))
    for axes in [()] + [(n,) for n in range(len(before))]:
        kept = tuple(n if axis in axes else 1 for axis, n in enumerate(before))
        own = Owners(*[np.arange(np.prod(kept, dtype=int), dtype=np.int32).reshape(kept)] * 2)
        found = own.reshaped(before, after)
        right = np.broadcast_to(own.first, before).reshape(after)
        assert (np.broadcast_to(found.first, after) == right).all()


def test_places_taken_twice_have_both_owners():
    own = Owners(*[np.array([0, 1, 2], np.int32)] * 2)
    found = own.moved(0, np.array([1, 1, -1]), 4)
    assert found.first.tolist()[1] == 0
    assert found.last.tolist() == [-1, 1, -1, -1]


def test_what_may_meet_is_unclear_and_not_shared():
    own = Owners.rows(3, 2)
    assert own.over([0]).is_shared
    found = own.over_perhaps([0], "why")
    assert (found.is_shared, found.unclear) == (False, "why")
    assert own.over_perhaps([1], "why").unclear == ""
