"""The planner: counted work, measured rates, schedules by trial, and what is remembered of them."""

from __future__ import annotations

import json
import math
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from keras import layers
from models import MODELS, floats, randomise
from oracle import assert_agree, weight_rows
from small_models import *  # noqa: F403  (enters its models)

import perjac as pj
from perjac import progress
from perjac._core.backend import disk_cache, machine
from perjac._core.backend.machine import Rates
from perjac._core.backend.xla import NotForXla
from perjac._core.graph import costs
from perjac._core.graph.costs import Cost
from perjac._core.planning import autotune
from perjac._core.planning.schedule import Schedule, alternatives, rows_together
from perjac._core.runtime import batch_padding
from perjac._core.runtime.batch_padding import Sizes
from perjac._core.runtime.jobs import Jobs
from perjac.errors import CacheWarning, InputError, SlowPathWarning

pytestmark = pytest.mark.slow  # left out of `make check`

RNG = np.random.default_rng(0)
SCHEDULES = [Schedule(v, x) for v in (True, False) for x in (True, False)]


def dense(*units: int, shape: tuple[int, ...] = (4,), dtype: str = "float32") -> keras.Model:
    with floats(dtype):
        model = keras.Sequential([keras.Input(shape), *map(layers.Dense, units)])
    randomise(model.weights)
    return model


def numbers(*shape: int, dtype: str = "float32") -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def program_of(model: keras.Model, x: np.ndarray):
    traces = pj.Engine(model)._traces
    traced, names = traces.of(traces.prepare(x))
    return traced.program, names.head(None)


@pytest.fixture
def remembered(tmp_path, monkeypatch) -> pathlib.Path:
    """A cache folder of its own, and no rates known."""
    monkeypatch.setenv(disk_cache.SETTING, str(tmp_path / "cache"))
    machine._rates.cache_clear()
    yield tmp_path / "cache"
    machine._rates.cache_clear()


# Counted work


@given(widths=st.lists(st.integers(1, 40), min_size=2, max_size=5), bias=st.booleans())
def test_dense_layers_cost_the_products_of_their_widths(widths, bias):
    stack = [layers.Dense(n, use_bias=bias) for n in widths[1:]]
    model = keras.Sequential([keras.Input((widths[0],)), *stack])
    program, head = program_of(model, numbers(2, widths[0]))
    expected = sum(a * b for a, b in zip(widths, widths[1:], strict=False))
    assert costs.forward(program, head).products == expected
    back = costs.backward(program, head, program.inputs)
    assert (back.products, back.convolutions) == (expected, 0)


def test_convolutions_cost_a_kernel_for_each_entry():
    model = keras.Sequential(
        [keras.Input((9, 8, 3)), layers.Conv2D(5, (2, 3), strides=2), layers.Flatten()]
    )
    program, head = program_of(model, numbers(2, 9, 8, 3))
    assert costs.forward(program, head).convolutions == (4 * 3 * 5) * (2 * 3 * 3)


def test_views_are_free_and_steps_move_what_they_read_and_write():
    model = keras.Sequential([keras.Input((6, 2)), layers.Flatten(), layers.Activation("relu")])
    program, head = program_of(model, numbers(2, 6, 2))
    assert costs.forward(program, head).moved == 2 * 12 * 4
    assert costs.forward(program, head).products == 0


def test_rows_swept_together_move_more():
    program, head = program_of(dense(6, 3), numbers(2, 4))
    one = costs.backward(program, head, program.inputs)
    tiled = costs.backward(program, head, program.inputs, tiled=True)
    assert tiled.moved >= one.moved
    assert tiled.products == one.products


@given(st.lists(st.floats(0, 1e9), min_size=8, max_size=8), st.integers(1, 99))
def test_times_add_up(parts, examples):
    a, b = Cost(*parts[:4]), Cost(*parts[4:])
    rates = Rates(2e9, 3e9, 5e9, 7e9, 1e-6, 1e-4)
    both = a.seconds(rates, examples) + b.seconds(rates, examples)
    assert (a + b).seconds(rates, examples) == pytest.approx(both)
    assert a.times(3, 1).seconds(rates, examples) == pytest.approx(
        3 * Cost(*parts[:3]).seconds(rates, examples) + parts[3] * 1e-6
    )


# Rates


def test_rates_are_measured_once_and_remembered(remembered, monkeypatch):
    said = []
    with progress.read(said.append):
        found = machine.rates(tf.float32)
    assert said == ["measuring how fast this machine is", ""]
    assert all(value > 0 for value in vars(found).values())
    assert 1e8 < found.product < 1e16
    machine._rates.cache_clear()
    monkeypatch.setattr(machine, "_measured", None)  # cannot be called
    assert machine.rates(tf.float32) == found == machine.rates(tf.bfloat16)


def test_rates_that_do_not_read_are_measured_again(remembered):
    found = machine.rates(tf.float32)
    (file,) = remembered.rglob("*.json")
    file.write_text("{")
    machine._rates.cache_clear()
    assert machine.rates(tf.float32).product > 0
    assert json.loads(file.read_text())["value"].keys() == vars(found).keys()


def test_repetitions_end_where_one_takes_too_long():
    took = machine.repeated(lambda: tf.constant(0), least=9, seconds=9.0, enough=0.0)
    assert len(took) == 1
    assert len(machine.repeated(lambda: tf.constant(0), least=3, seconds=0.0)) == 3


def test_the_allocators_peak_is_what_was_given_out():
    peak = machine.peak(lambda: tf.reduce_sum(tf.ones([2**20]) + 1.0))
    assert 2**22 <= peak <= 3 * 2**22


# What is remembered


def test_a_cache_gives_back_what_it_was_given(remembered):
    key, other = {"a": (1, 2)}, {"a": (1, 3)}
    assert disk_cache.recall("kind", key) is None
    disk_cache.remember("kind", key, {"x": 1.5})
    assert disk_cache.recall("kind", key) == {"x": 1.5}
    assert disk_cache.recall("kind", other) is None
    assert disk_cache.recall("other kind", key) is None
    disk_cache.remember("kind", key, {"x": 2.0})
    assert disk_cache.recall("kind", key) == {"x": 2.0}
    assert len(list(remembered.rglob("*"))) == 2  # the folder of the kind, and one file


def test_a_file_of_another_key_is_not_taken_for_this_one(remembered):
    disk_cache.remember("kind", {"a": 1}, {"x": 1})
    (file,) = remembered.rglob("*.json")
    file.write_text(file.read_text().replace('"a": 1', '"a": 2'))
    assert disk_cache.recall("kind", {"a": 1}) is None


@pytest.mark.parametrize("setting", ["off", "OFF"])
def test_a_cache_can_be_switched_off(monkeypatch, setting):
    monkeypatch.setenv(disk_cache.SETTING, setting)
    assert disk_cache.folder() is None
    disk_cache.remember("kind", {}, {"x": 1})
    assert disk_cache.recall("kind", {}) is None


def test_a_cache_is_the_users_by_default(monkeypatch):
    monkeypatch.delenv(disk_cache.SETTING)
    assert "perjac" in str(disk_cache.folder())


def test_a_cache_that_cannot_be_written_to_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(disk_cache.SETTING, str(tmp_path / "file"))
    with pytest.warns(CacheWarning, match="PERJAC_CACHE"):
        disk_cache.remember("kind", {}, {})
    assert disk_cache.recall("kind", {}) is None


# Schedules


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        *(pytest.param(n, marks=pytest.mark.more) for n in ("conv2d_dilated", "tied_embedding")),
        pytest.param("transformer", marks=pytest.mark.more),
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rows_do_not_depend_on_the_schedule(monkeypatch, name, schedule):
    subject = MODELS[name].make()
    taken(monkeypatch, schedule)
    engine = pj.Engine(subject.target, autotune=True, **subject.options)
    jac = engine.jacobian(subject.x, outputs=[0, 1])
    expected = weight_rows(subject.call, subject.x, subject.trainable, [0, 1])
    rows = [np.reshape(jac[v], e.shape) for v, e in zip(subject.trainable, expected, strict=True)]
    assert_agree(rows, expected, "float64")


def taken(monkeypatch, schedule: Schedule) -> None:
    """Have a schedule taken wherever one is chosen."""

    def tune(key, schedules, run, refused):
        run(schedule)()
        return autotune.Tuned((autotune.Trial(schedule, None, 1.0),))

    monkeypatch.setattr("perjac._core.runtime.traced_model.tune", tune)


def test_there_are_as_many_schedules_as_choices():
    program, head = program_of(dense(6, 3), numbers(2, 4))
    usual, compiled = Schedule(), Schedule(xla=True)
    found = alternatives(program, head, 3, usual)
    assert found[0] == usual
    assert set(found) == {usual, compiled, Schedule(True), Schedule(True, True)}
    assert set(alternatives(program, head, 1, usual)) == {usual, compiled}
    many = alternatives(program, head, 1000, usual)  # usually together; one by one are too many
    assert set(many) == {usual, compiled, Schedule(False)}
    assert set(alternatives(program, head, 10**6, compiled)) == {usual, compiled}
    assert alternatives(program, head, 10**6, compiled)[0] == compiled


def test_the_usual_schedule_looks_at_each_stretch_of_the_way():
    """A thousand outputs over a place of four: rows from there down are few, and unrolled."""
    model = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(4, 3), layers.MaxPooling2D(4), layers.Flatten(),
         layers.Dense(1000)]
    )  # fmt: skip
    engine, x = pj.Engine(model), numbers(3, 6, 6, 2)
    engine.jacobian(x, wrt="inputs")
    (job,) = engine._traces.of(engine._traces.prepare(x))[0]._jobs._by_route.values()
    assert job._route.lower.chunk == 1
    assert not Schedule().unrolls(job._program, job._head, 1000)


def test_loops_and_convolutions_stay_as_they_are_under_xla():
    recurrent = keras.Sequential([keras.Input((5, 2)), layers.LSTM(3)])
    program, head = program_of(recurrent, numbers(2, 5, 2))
    assert {s.xla for s in alternatives(program, head, 3, Schedule(None, True))} == {True}
    assert Schedule().seconds(program, head, program.inputs, 3, 2) is None
    convolving = keras.Sequential([keras.Input((5, 2)), layers.Conv1D(3, 2), layers.Flatten()])
    program, head = program_of(convolving, numbers(2, 5, 2))
    assert {s.xla for s in alternatives(program, head, 3, Schedule())} == {False}


@given(st.integers(1, 5000), st.integers(1, 600), st.floats(1, 1e7))
def test_chunks_of_rows_are_even(count, batch, room):
    together = rows_together(count, batch, room)
    chunks = math.ceil(count / together)
    assert 2 <= together <= max(2, count)
    assert together == max(2, math.ceil(count / chunks))  # fewer would be more chunks


def test_ten_rows_go_as_five_and_five():
    assert rows_together(10, 64, 1e6) == 5
    assert rows_together(10, 1, 1e6) == 10


# Trials


def trials(remembered, seconds: dict[Schedule, float | Exception], expected=None, key="k"):
    """Tune on made-up times, and tell what was run."""
    ran = []

    def run(schedule):
        def once():
            ran.append(schedule)
            took = seconds[schedule]
            if isinstance(took, Exception):
                raise took
            clock[0] += took

        return once

    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine.time, "perf_counter", lambda: clock[0])
        given = [(s, (expected or {}).get(s)) for s in seconds]
        found = autotune.tune({"key": key}, given, run, (NotForXla,))
    return found, ran


A, B, C, D = SCHEDULES


def test_the_fastest_schedule_is_taken_and_remembered(remembered):
    found, ran = trials(remembered, {A: 2.0, B: 1.0, C: 3.0})
    assert found.best.schedule == B
    assert [t.seconds for t in found.trials] == [1.0, 2.0, 3.0]
    again, ran = trials(remembered, {A: 2.0, B: 1.0, C: 3.0})
    assert (again, ran) == (found, [])
    other, ran = trials(remembered, {A: 1.0, B: 2.0}, key="other")
    assert other.best.schedule == A
    assert ran


def test_the_usual_schedule_stays_where_others_are_hardly_faster(remembered):
    assert trials(remembered, {A: 1.0, B: 0.97})[0].best.schedule == A


def test_a_schedule_that_fails_is_not_taken(remembered):
    found, _ = trials(remembered, {A: 2.0, B: NotForXla("no kernel"), C: 1.0})
    assert found.best.schedule == C
    assert "no kernel" in found.trials[-1].note
    with pytest.raises(NotForXla):
        trials(remembered, {A: NotForXla("the usual one"), B: 1.0}, key="first")
    with pytest.raises(ZeroDivisionError):
        trials(remembered, {A: 1.0, B: ZeroDivisionError()}, key="a mistake")


def test_a_hopeless_schedule_is_not_tried(remembered):
    found, ran = trials(remembered, {A: 1.0, B: 0.1}, {A: 1.0, B: 4.1})
    assert set(ran) == {A}
    assert "too long" in found.trials[-1].note


def test_a_slow_schedule_is_tried_once(remembered):
    _, ran = trials(remembered, {A: 1.0, B: 2.1, C: 0.5})
    assert ran.count(B) == 2 < ran.count(A)  # the call that compiles, and one more


@pytest.mark.parametrize("text", ["[]", '{"key": 1}', '{"key": {"key": "k"}, "value": {"t": 1}}'])
def test_trials_that_do_not_read_are_made_again(remembered, text):
    trials(remembered, {A: 2.0, B: 1.0})
    (file,) = remembered.rglob("*.json")
    file.write_text(text)
    found, ran = trials(remembered, {A: 2.0, B: 1.0})
    assert found.best.schedule == B
    assert ran


def test_engines_tune_once_for_each_question_and_size(remembered):
    model, x = dense(6, 3), numbers(4, 4)
    said = []
    with progress.read(said.append):
        engine = pj.Engine(model, autotune=True)
        first = engine.jacobian(x)
        tried = [words for words in said if words.startswith("trying")]
        assert len(tried) >= 2
        said.clear()
        again = engine.jacobian(x)
        assert not said
        engine.jacobian(x[:3])
        assert [words for words in said if words.startswith("trying")]
        said.clear()
        other = pj.Engine(model, autotune=True).jacobian(x)  # as another process would
        assert not [words for words in said if words.startswith("trying")]
    plain = pj.Engine(model).jacobian(x)
    for key, rows in plain.items():
        for jac in (first, again, other):
            np.testing.assert_allclose(jac[key], rows, rtol=1e-5, atol=1e-7)


def test_trials_of_what_fails_end_on_the_tape(remembered, monkeypatch):
    run = Jobs.run

    def fails(jobs, job, *data):
        if job._wanted:
            raise ZeroDivisionError("odd graph")
        return run(jobs, job, *data)

    model, x = dense(6, 3), numbers(4, 4)
    expected = pj.Engine(model).jacobian(x)
    monkeypatch.setattr(Jobs, "run", fails)
    with pytest.warns(SlowPathWarning, match="odd graph"):
        found = pj.Engine(model, autotune=True).jacobian(x)
    for key, rows in expected.items():
        np.testing.assert_allclose(found[key], rows, rtol=1e-5, atol=1e-7)
    with pytest.raises(ZeroDivisionError):
        pj.Engine(model, autotune=True, path="factored").jacobian(x)


def test_nothing_is_compiled_by_xla_where_that_was_refused(remembered):
    model, x = dense(6, 3), numbers(4, 4)
    pj.Engine(model, autotune=True).jacobian(x)  # what this remembers is not for the next one
    engine = pj.Engine(model, autotune=True, jit=False)
    engine.jacobian(x)
    traced = engine._traces.of(engine._traces.prepare(x))[0]
    (tuned,) = (made for key, made in traced._made.items() if key[0] == "tuned")
    assert {trial.schedule.xla for trial in tuned.trials} == {False}


# What inspect() tells of it


def test_inspect_foretells_and_measures():
    engine = pj.Engine(dense(256, 10, shape=(32,)))
    plan = engine.inspect(512).plan
    assert plan.measured is None
    assert 0 < plan.expected.seconds < 1
    assert (plan.examples, plan.rows) == (512, 1)
    assert plan.forming.bytes == 512 * 10 * 4 * (32 * 256 + 256 + 256 * 10 + 10)
    measured = engine.inspect(512, measure=True).plan.measured
    assert 0 < measured.seconds < 1
    assert 0 < measured.bytes < plan.expected.bytes
    assert "too little" in str(pj.Engine(dense(3)).inspect(2, measure=True))
    text = str(engine.inspect(512, measure=True))
    assert "rows one after another" in text
    assert "; measured " in text


@pytest.mark.more
def test_inspect_makes_no_batch_to_foretell():
    engine = pj.Engine(dense(8, 3, shape=(1000,)))
    engine.inspect(2)
    assert machine.peak(lambda: engine.inspect(10**7)) < 2**20
    with pytest.raises(InputError, match="batch_size"):
        engine.inspect(0)


def test_inspect_tells_of_the_tape_and_of_runs(remembered):
    model = dense(64, 10, shape=(32,))
    plan = pj.Engine(model, path="tape").inspect().plan
    assert (plan.schedule, plan.expected.seconds) == ("the tape path", None)
    assert "unknown time" in str(plan)
    narrow = pj.Engine(model, memory_limit=400_000).inspect(1000).plan
    assert narrow.examples < 1000
    assert narrow.expected.bytes <= 400_000
    tuned = pj.Engine(model, autotune=True).inspect(16).plan
    assert tuned.measured.seconds > 0


# Short batches of programs that XLA compiles for each size


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60), st.floats(0.01, 10))
def test_filling_up_never_takes_more_than_twice_what_it_might(asked, compiling):
    """A call takes a second at size 64: against the best choice with all sizes known before."""
    sizes, spent = Sizes({64: compiling}), {}
    for size in asked:
        at = sizes.of(size)
        new = at not in sizes.compiled
        took = at / 64 + compiling * new
        spent[size] = spent.get(size, 0.0) + took - size / 64  # above what has to be
        sizes.ran(size, at, compiling if new else took)
    for size, more in spent.items():
        never = asked.count(size) * (1 - size / 64)
        best = min(never, compiling)
        assert more <= 2 * best + (1 - size / 64) + 1e-9  # the last call may run over


@pytest.mark.parametrize("wrt", ["weights", "inputs"])
@pytest.mark.parametrize("outputs", [None, 1, np.array([0, 2, 1])], ids=["all", "one", "each"])
def test_short_batches_are_filled_up_and_cut_off(wrt, outputs):
    model, x = dense(6, 3, dtype="float64"), numbers(8, 4, dtype="float64")
    engine, plain = pj.Engine(model, jit=True), pj.Engine(model, jit=False)
    each = isinstance(outputs, np.ndarray)
    engine.jacobian(x, wrt=wrt, outputs=np.zeros(8, int) if each else outputs)
    found = engine.jacobian(x[:3], wrt=wrt, outputs=outputs)
    expected = plain.jacobian(x[:3], wrt=wrt, outputs=outputs)
    assert found.shape == expected.shape
    for key, rows in expected.items():
        np.testing.assert_allclose(found[key], rows, rtol=1e-12)
    np.testing.assert_allclose(found.norms(), expected.norms(), rtol=1e-12)
    ((sizes),) = engine._traces.of(engine._traces.prepare(x))[0]._jobs._sizes.values()
    assert set(sizes.compiled) == {8}
    assert 3 in sizes.wasted


def test_what_is_cut_off_is_wasted():
    sizes = Sizes({8: 1.0})
    sizes.ran(6, 8, 2.0)
    assert sizes.wasted == {6: 0.5}
    sizes.ran(8, 8, 2.0)
    assert sizes.wasted == {6: 0.5}


def test_a_size_that_comes_often_is_compiled_for():
    engine, x = pj.Engine(dense(6, 3), jit=True), numbers(8, 4)
    engine.jacobian(x)
    (sizes,) = engine._traces.of(engine._traces.prepare(x))[0]._jobs._sizes.values()
    sizes.wasted[3] = 1e9
    engine.jacobian(x[:3])
    assert set(sizes.compiled) == {8, 3}


def test_seeds_and_labels_are_filled_up_alike():
    model, x = dense(6, 3, dtype="float64"), numbers(8, 4, dtype="float64")
    y, directions = RNG.integers(0, 3, 8), numbers(8, 2, 3, dtype="float64")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    engine, plain = pj.Engine(model, jit=True), pj.Engine(model, jit=False)
    for part in (slice(None), slice(5)):
        for ask in (
            lambda e, p: e.gradients(x[p], y[p], loss=loss),
            lambda e, p: e.jacobian(x[p], cotangents=directions[p]),
        ):
            found, expected = ask(engine, part), ask(plain, part)
            for key, rows in expected.items():
                np.testing.assert_allclose(found[key], rows, rtol=1e-11, atol=1e-14)


def test_first_cuts_positions_of_examples():
    nest = {"a": tf.range(12), "b": (tf.zeros([4, 2]), tf.zeros([8]))}
    cut = batch_padding.first(nest, 3, 4)
    assert cut["a"].numpy().tolist() == list(range(9))
    assert [t.shape[0] for t in cut["b"]] == [3, 6]
