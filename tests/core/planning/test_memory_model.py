"""Batches swept in runs of examples: the same results, in bounded memory, whatever the runs."""

import contextlib
import functools
import math
import os
import pathlib
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from models import MODELS, floats, randomise
from oracle import assert_agree, loss_rows, weight_rows
from sampling import but
from small_models import *  # noqa: F403  (enters its models)

import perjac as pj
from perjac._core.autodiff import seeds
from perjac._core.backend import machine, memory
from perjac._core.factors import Explicit, Grouped, Lookup, Outer, Sum, Zero, reductions
from perjac._core.factors.combine import join_examples
from perjac._core.factors.reductions import SideMoments, Squares
from perjac._core.planning import memory_model
from perjac._core.planning.memory_model import Load
from perjac.errors import DisconnectedWarning, NotFiniteError, TooLargeError

pytestmark = pytest.mark.slow  # left out of `make check`

BATCH = 7
QUESTIONS = [Squares(), SideMoments(False, 8192), SideMoments(True, 2)]
# Models that together have every kind of factor, windows of a convolution among them.
KINDS = {
    "mlp": {Outer, Explicit},
    "conv2d_dilated": {Outer, Explicit},
    "transformer": {Outer, Explicit, Lookup},
    "einsum_dense_per_position": {Grouped, Outer, Explicit},
    "tied_embedding": {Sum, Explicit},
    "batch_normalization": {Outer, Explicit},
    "lstm": {Outer, Explicit},
    "shared_dense": {Outer, Explicit},
}


@contextlib.contextmanager
def runs_of(length):
    """Have every batch swept so many examples at a time."""
    plain = Load.runs

    def cut(load, batch, room):
        return [slice(n, min(n + length, batch)) for n in range(0, batch, length)]

    Load.runs = cut
    try:
        yield
    finally:
        Load.runs = plain


def close(found, expected):
    found, expected = (tf.nest.flatten(thing) for thing in (found, expected))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        np.testing.assert_allclose(
            one, other, rtol=1e-10, atol=1e-10 * np.abs(other).max(initial=1)
        )


def lazily(make):
    """Return a function that makes something for each name once."""
    made = {}
    return lambda name: made.setdefault(name, None) or made.update({name: make(name)}) or made[name]


@lazily
def whole(name):
    """Return a model's engine, its data, and what it answers for the batch as a whole."""
    case = MODELS[name]
    subject = case.make(batch=BATCH)
    # XLA compiles a loop for each length of a run, a second each.
    engine = pj.Engine(subject.target, jit=False, **subject.options)
    answers = [engine._summed(question, subject.x) for question in QUESTIONS]
    jac = engine.jacobian(subject.x)
    assert {type(factor) for factor in jac._factors.values()} == KINDS[name]
    expected = weight_rows(subject.call, subject.x, subject.trainable)
    found = [np.reshape(jac[v], (*jac.shape[:2], *v.shape)) for v in subject.trainable]
    assert_agree(found, expected, "float64")
    return engine, subject.x, jac, answers


@pytest.mark.parametrize("name", but({"transformer", "conv2d_dilated", "shared_dense"}, KINDS))
@settings(max_examples=4)
@given(length=st.integers(1, BATCH - 1))
def test_results_do_not_depend_on_the_runs(name, length):
    engine, x, jac, answers = whole(name)
    with runs_of(length):
        parts = engine.jacobian(x)
        summed = [engine._summed(question, x) for question in QUESTIONS]
    for key, factor in jac._factors.items():
        assert type(parts._factors[key]) is type(factor)
    close(parts._factors, jac._factors)
    close(parts.outputs, jac.outputs)
    close(summed, answers)


def test_rows_that_are_zero_are_joined_and_warned_of_once():
    with floats("float64"):
        used, other = (tf.Variable(np.ones((3, 2))) for _ in range(2))
    engine = pj.Engine(lambda x: x @ used, variables=[used, other])
    x = np.random.default_rng(0).standard_normal((5, 3))
    with runs_of(2), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        jac = engine.jacobian(x)
    assert [w.category for w in told] == [DisconnectedWarning]
    assert isinstance(jac._factors[list(jac)[1]], Zero)
    assert jac[other].shape == (5, 2, 3, 2)
    assert not np.any(jac[other])


def masked():
    """Return a recurrent model of two inputs, one of integers, and data with a mask."""
    with floats("float64"):
        series, kind = keras.Input((4, 3)), keras.Input((1,), dtype="int32")
        hidden = layers.LSTM(3, name="memory")(series)
        told = layers.Flatten()(layers.Embedding(3, 3)(kind))
        model = keras.Model([series, kind], layers.Dense(3)(hidden * told))
    randomise(model.weights)
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((BATCH, 4, 3)), rng.integers(0, 3, (BATCH, 1)).astype("int32")]
    return model, x, rng


@pytest.mark.parametrize("length", [1, 3, 6])
def test_gradients_with_labels_weights_and_several_inputs(length):
    model, x, rng = masked()
    y, weights = rng.integers(0, 3, BATCH), rng.uniform(1, 2, BATCH)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")
    losses, expected = loss_rows(
        model, lambda y, f: loss(y[0], f) * y[1][0], x, [y, weights], model.trainable_variables
    )
    engine = pj.Engine(model, jit=False)
    with runs_of(length):
        grads = engine.gradients(x, y, loss=loss, sample_weight=weights)
        plain = engine.gradients(x, y, loss=loss)
    close(grads.losses, losses)
    close([grads[v] for v in model.trainable_variables], expected)
    close(list(grads.mean().values()), [rows.mean(0) for rows in expected])
    close(plain.losses, losses / weights)


@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.more), 4])
def test_masks_and_seeds_go_with_their_examples(length):
    with floats("float64"):
        model = keras.Sequential(
            [keras.Input((5, 2)), layers.LSTM(3, name="memory"), layers.Dense(4)]
        )
    randomise(model.weights)
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((6, 5, 2)), rng.random((6, 5)) < 0.7
    mask[:, 0] = True
    engine = pj.Engine(model, jit=False)
    asked = {
        "all": {}, "inputs": {"wrt": "inputs"}, "hidden": {"wrt": pj.activation("memory")},
        "each": {"outputs": np.arange(6) % 4}, "some": {"outputs": [3, 1]},
        "directions": {"cotangents": rng.standard_normal((6, 2, 4))},
    }  # fmt: skip
    for name, how in asked.items():
        # A mask is an input of integers, without derivatives.
        batches = [x] if name == "inputs" else [x, pj.call(x, mask=mask)]
        for batch in batches:
            expected = engine.jacobian(batch, **how)
            with runs_of(length):
                found = engine.jacobian(batch, **how)
                close(engine.outputs(batch), expected.outputs)
            close([found[key] for key in expected], [expected[key] for key in expected])
            close(found.outputs, expected.outputs)


def test_the_tape_path_goes_in_runs_too():
    _, x, jac, _ = whole("mlp")
    subject = MODELS["mlp"].make(batch=BATCH)
    engine = pj.Engine(subject.target, path="tape")
    with runs_of(3):
        taped, squares = engine.jacobian(x), engine._summed(Squares(), x)
    close([taped[key] for key in taped], [jac[key] for key in jac])
    close([squares[key] for key in taped], list(jac.diagonal().values()))


def test_examples_are_counted_through_the_runs():
    engine, x, *_ = whole("mlp")
    x = np.array(x)
    x[5] = np.nan
    with runs_of(2), pytest.raises(NotFiniteError, match="example 5"):
        engine.jacobian(x)


def test_rows_swept_together_keep_their_number(monkeypatch):
    """Where 9 rows are swept 5 at a time, a factor still knows how many there are."""
    monkeypatch.setattr("perjac._core.planning.schedule._UNROLLED_OPERATIONS", 0)
    model = MODELS["lenet"].build()
    jac = pj.Engine(model).jacobian(np.zeros((64, 28, 28, 1), "float32"), outputs=list(range(9)))
    assert {factor.row_count for factor in jac._factors.values()} == {9}
    inspected = pj.Engine(model).inspect(64)
    assert jac.nbytes <= sum(row.held_bytes for row in inspected.rows)


@given(
    batch=st.integers(1, 5000),
    count=st.integers(1, 1000),
    unrolled=st.booleans(),
    forward=st.integers(1, 2**28),
    swept=st.integers(0, 2**28),
    room=st.integers(1, 2**32),
)
def test_runs_cover_the_batch_and_fit(batch, count, unrolled, forward, swept, room):
    load = Load(count, unrolled, forward, swept)
    runs = load.runs(batch, room)
    assert [n for run in runs for n in range(run.start, run.stop)] == list(range(batch))
    lengths = [run.stop - run.start for run in runs]
    assert len(set(lengths[:-1])) <= 1
    assert lengths[-1] <= lengths[0]
    assert lengths[0] == 1 or load.passing(lengths[0], room) <= room
    together = load.together(lengths[0], room)
    assert (together == 1) == unrolled or count == 1
    assert together <= max(count, 2)


def test_a_limit_cuts_batches_and_what_is_held_must_fit():
    subject = MODELS["cnn"].make("float32", batch=64)
    engine = pj.Engine(subject.target, memory_limit="16MiB")
    lengths = []
    plain = Load.runs

    def watched(load, batch, room):
        found = plain(load, batch, room)
        lengths.extend(run.stop - run.start for run in found)
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Load, "runs", watched)
        found = engine.jacobian(subject.x, outputs=1)
    assert 1 <= max(lengths) < 64
    expected = pj.Engine(subject.target).jacobian(subject.x, outputs=1)
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-4, atol=1e-5)
    with pytest.raises(TooLargeError, match="Even unformed"):
        pj.Engine(subject.target, memory_limit="1MiB").jacobian(subject.x)
    small = pj.Engine(subject.target, memory_limit="1MiB")  # of which nothing is held
    squares = small._summed(Squares(), subject.x[:8])
    expected = pj.Engine(subject.target)._summed(Squares(), subject.x[:8])
    for key, square in expected.items():
        np.testing.assert_allclose(squares[key], square, rtol=1e-4, atol=1e-5)


def test_joined_factors_are_written_beside_one_another():
    tensors = [tf.constant(np.arange(n * 6.0).reshape(n, 1, 2, 3)) for n in (2, 2, 1)]
    layout = next(iter(whole("mlp")[2]._factors.values())).layout
    parts = ({"w": Explicit(layout, tensor)} for tensor in tensors)
    found = join_examples(parts, [slice(0, 2), slice(2, 4), slice(4, 5)])
    np.testing.assert_array_equal(found["w"].jacobian, np.concatenate(tensors))


def test_without_a_limit_chunks_are_bounded_too(monkeypatch):
    load = Load(10, True, 2**20, 2**20, held=2**20)
    monkeypatch.setattr(memory, "available", lambda: 2**40)
    assert load.room(2**14, None) == memory_model.MOST
    monkeypatch.setattr(memory, "available", lambda: 2**30)
    assert load.room(2**9, None) == int(0.8 * 2**30) - 2**29
    monkeypatch.setattr(memory, "available", lambda: None)
    assert load.room(2**14, None) == memory_model.MOST


@pytest.mark.parametrize(("free", "together"), [(2**50, 16), (2**35, 8), (2**33, 3), (2**31, 1)])
def test_a_few_large_examples_are_swept_together_where_there_is_memory(monkeypatch, free, together):
    load, rooms = Load(1, True, 2**29), set()  # 1.25 GiB an example
    for spare in (0, 2**20):  # what is free is never the same twice
        monkeypatch.setattr(memory, "available", lambda spare=spare: free + spare)
        room = load.room(16, None)
        rooms.add(room)
        assert load.runs(16, room)[0].stop == math.ceil(16 / math.ceil(16 / together))
        assert load.passing(together, room) <= 0.8 * (free + spare)
    assert len(rooms) == 1


@pytest.mark.parametrize("name", ["lenet", "conv2d_dilated", "depthwise_same_strided"])
@pytest.mark.parametrize("operations", [0, 10**9], ids=["together", "one by one"])
@pytest.mark.parametrize("wrt", ["weights", "inputs"])
def test_no_more_memory_is_taken_than_foretold(name, operations, wrt, monkeypatch):
    monkeypatch.setattr("perjac._core.planning.schedule._UNROLLED_OPERATIONS", operations)
    examples = 64 if name == "lenet" else 4096
    model = MODELS[name].build()
    engine = pj.Engine(model)
    x = np.random.default_rng(0).standard_normal((examples, *model.input_shape[1:]))
    batch = engine._traces.prepare(x)
    traced, names = engine._traces.of(batch)
    head, sources = names.head(None), names.sources(wrt)
    dtype = traced.program.graph.get_tensor_by_name(head).dtype
    chosen = seeds.make(None, None, examples, traced.row_shape(head), dtype)
    load = traced._task(head, sources, examples, chosen)[0].load
    ask = functools.partial(traced.answers, head, sources, batch, chosen, None)
    ask()
    assert 2**18 < machine.peak(ask) <= load.passing(examples, memory_model.MOST)


ASKED = {
    "norms": lambda j: j.norms(), "row": lambda j: j.norms(per="row"),
    "layer": lambda j: list(j.norms(per="layer").values()),
    "jvp": lambda j: j.jvp(np.ones(j.shape[-1])),
    "vjp": lambda j: list(j.vjp(np.ones(j.shape[:2])).values()),
    "vjp of each": lambda j: list(j.vjp(np.ones(j.shape[:2]), per_example=True).values()),
    "diagonal": lambda j: list(j.diagonal().values()), "project": lambda j: j.project(8),
    "sparse": lambda j: j.project(8, kind="sparse"), "rows": lambda j: [j[key] for key in j],
    "gram": lambda j: j.gram(),
}  # fmt: skip
NOT_ONCE = ("gram",)  # has to know how many rows there are


@pytest.mark.parametrize("name", ["tied_embedding", "einsum_dense_per_position", "conv2d_dilated"])
@pytest.mark.parametrize("asked", ASKED)
def test_queries_are_traced_for_any_number_of_examples(name, asked, monkeypatch):
    engine, x, *_ = whole(name)
    traced, plain, ask = [], reductions.host.compiled, ASKED[asked]

    def counted(question, **options):
        return plain(lambda *factors: traced.append(question) or question(*factors), **options)

    monkeypatch.setattr(reductions.host, "compiled", counted)
    reductions.query.cache_clear()
    found = {}
    for size in (4, 6, 5, 1, 7):
        part = engine.jacobian(tf.nest.map_structure(lambda leaf, n=size: leaf[:n], x))
        found[size] = part, ask(part)
        if size == 6:
            twice = len(traced)
    assert traced
    assert (len(traced) == twice) == (asked not in NOT_ONCE)
    for part, answer in found.values():
        reductions.query.cache_clear()
        close(answer, ask(part))
    reductions.query.cache_clear()


def test_what_has_to_know_a_length_is_traced_for_each():
    traced = []

    def tiled(x):
        traced.append(x.shape)
        return x * np.ones(x.shape[0])[:, None]

    made = reductions.host.compiled(tiled, grows=True)
    for length in (2, 3, 4, 3):
        x = tf.constant(np.arange(length * 2.0).reshape(length, 2))
        np.testing.assert_array_equal(made(x), x)
    assert [shape for shape in traced if shape[0]] == [(2, 2), (3, 2), (4, 2)]
    both = reductions.host.compiled(lambda x, s: tf.reduce_sum(x, 0) * s, grows=True)
    for length in (2, 3, 5):  # a number has no length
        np.testing.assert_array_equal(
            both(tf.ones([length, 2]), tf.constant(2.0)), [2 * length] * 2
        )
    assert both(tf.ones([3]), tf.constant(1.0)) == 3


# Bytes that a job takes beyond what was resident, by VmHWM, in a process of its own.
PEAK = """
import sys; sys.path.insert(0, {tests!r})
import os; os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras, numpy as np
import models, perjac as pj
from perjac._core.factors.reductions import Squares

def resident(kind):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

if {model!r} == "cnn":
    model, x = models.cnn(), np.random.default_rng(0).standard_normal(({size}, 28, 28, 1))
else:
    ids = keras.Input((32,), dtype="int32")
    embedded = models.Positions()(keras.layers.Embedding(500, 64)(ids))
    pooled = keras.layers.GlobalAveragePooling1D()(models.encoder(embedded, 2, 64))
    model = keras.Model(ids, keras.layers.Dense(4)(pooled))
    x = np.random.default_rng(0).integers(0, 500, ({size}, 32))
x, y = x.astype(model.inputs[0].dtype), np.arange({size}) % 4
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
engine = pj.Engine(model, memory_limit={limit!r})
jobs = {{
    "jacobian": lambda x, y: engine.jacobian(x),
    "squares": lambda x, y: engine._summed(Squares(), x),
    "gradients": lambda x, y: engine.gradients(x, y, loss=loss),
}}
job = jobs[{job!r}]
job(x[:2], y[:2]), job(x[:3], y[:3])
before = resident("VmRSS")
found = job(x, y)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("model", "job", "limit"),
    [pytest.param("cnn", "jacobian", 384, marks=pytest.mark.more),
     *(pytest.param(*case, marks=pytest.mark.large)
       for case in [("cnn", "squares", 64), ("cnn", "gradients", 96),
                    ("transformer", "gradients", 320), ("transformer", "squares", 64)])],
)  # fmt: skip
def test_peak_memory_stays_under_the_limit(model, job, limit):
    tests = str(pathlib.Path(__file__).parents[2])
    for size in (10, 100, 1000):
        code = PEAK.format(tests=tests, model=model, job=job, size=size, limit=f"{limit}MiB")
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"},
        )  # fmt: skip
        peak = int(done.stdout.split()[-1])
        assert peak < limit * 2**20, f"{size} examples: {peak / 2**20:.0f} MiB"
