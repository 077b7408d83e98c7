"""The neural tangent kernel against J J'ᵀ by a plain tape, and regression against weight space."""

from __future__ import annotations

import functools

import keras
import numpy as np
import oracle
import pytest
import scipy.linalg
import small_models  # noqa: F401  (enters its models)
import tensorflow as tf
from models import MODELS, floats, randomise

import perjac as pj
from perjac import progress
from perjac.errors import FileFormatError, InputError, NotPositiveError, TooLargeError
from perjac.fisher import NTKRegression, kernel_condition, kernel_eigh, ntk

pytestmark = pytest.mark.slow

RTOL = {"float64": 1e-10, "float32": 1e-4}


def rows_of(subject, x=None, outputs=None):
    """Return the explicit Jacobian, (N, K, P), in float64."""
    x = subject.x if x is None else x
    found = oracle.weight_rows(subject.call, x, subject.trainable, outputs)
    return np.concatenate([r.reshape(*r.shape[:2], -1) for r in found], 2).astype("f8")


def kernel_of(left, right):
    return np.einsum("bkp,clp->bkcl", left, right)


def close(found, expected, rtol=1e-10):
    assert np.linalg.norm(found - expected) <= rtol * np.linalg.norm(expected)


def small(dtype="float64", outputs=2, width=5):
    """A network of two layers, its engine and a Jacobian by hand."""
    with floats(dtype):
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(width, activation="tanh"),
                keras.layers.Dense(outputs),
            ]
        )
    randomise(model.weights)
    return model


@functools.cache
def shared():
    """The same, and its engine, traced and compiled once for all tests that do not change it."""
    model = small()
    return model, pj.Engine(model)


def engine_of(limit=None):
    engine = shared()[1]
    engine.memory_limit = limit
    return engine


def data(count, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal((count, 3)).astype(dtype)


def by_hand(model, x, outputs=None):
    call = lambda one: model(one, training=False)  # noqa: E731
    found = oracle.weight_rows(call, x, model.trainable_variables, outputs)
    return np.concatenate([r.reshape(*r.shape[:2], -1) for r in found], 2).astype("f8")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["mlp", "conv2d_same_strided", "conv1d", "module", "shared_dense"])
def test_kernel_is_that_of_the_rows(name, dtype):
    subject = MODELS[name].make(dtype, batch=4)
    rows = rows_of(MODELS[name].make("float64", batch=4))
    found = ntk(pj.Engine(subject.target, **subject.options), subject.x)
    assert found.dtype == dtype
    close(found, kernel_of(rows, rows), RTOL[dtype])


@pytest.mark.parametrize("outputs", [None, 1, [2, 0]])
@pytest.mark.parametrize("trace", [False, True])
def test_kernel_between_two_sets_of_some_outputs(outputs, trace):
    subject = MODELS["mlp"].make(batch=7)
    chosen = None if outputs is None else np.atleast_1d(outputs)
    rows = rows_of(subject, outputs=chosen)
    found = ntk(
        pj.Engine(subject.target), subject.x[:4], subject.x[4:], outputs=outputs, trace=trace
    )
    whole = kernel_of(rows[:4], rows[4:])
    close(found, np.einsum("bkck->bc", whole) if trace else whole)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("limit", ["18KiB", "22KiB", None])
@pytest.mark.parametrize("other", [False, True])
def test_kernel_does_not_depend_on_tiles(limit, trace, other):
    model, x, x2 = shared()[0], data(23), data(9, 1) if other else None
    heard = []
    with progress.heard(lambda done, total: heard.append((done, total))):
        found = ntk(engine_of(limit), x, x2, trace=trace)
    rows = by_hand(model, x)
    whole = kernel_of(rows, by_hand(model, x2) if other else rows)
    close(found, np.einsum("bkck->bc", whole) if trace else whole)
    assert [done for done, _ in heard] == list(range(1, heard[-1][1] + 1))
    assert (len(heard) > 1) == (limit is not None)


def test_some_rows_of_an_example_at_a_time():
    """An example's rows that do not fit are computed an output at a time."""
    with floats("float64"):
        model = keras.Sequential([keras.Input((3, 4)), keras.layers.Conv1D(40, 2)])
    randomise(model.weights)
    x = np.random.default_rng(0).standard_normal((1, 3, 4))
    rows = by_hand(model, x)
    engine = pj.Engine(model, memory_limit="60KiB")
    asked = []
    plain = engine.jacobian
    engine.jacobian = lambda *a, **k: asked.append(k["outputs"]) or plain(*a, **k)
    close(ntk(engine, x), kernel_of(rows, rows))
    assert max(map(len, asked)) < 80


@pytest.mark.parametrize("trace", [False, True])
def test_kernel_on_disk_is_that_in_memory(tmp_path, trace):
    zarr = pytest.importorskip("zarr")
    x, store = data(23), tmp_path / "ntk.zarr"
    found = ntk(engine_of("9KiB"), x, trace=trace, store=store)
    assert found.nchunks > 1
    close(found[...], ntk(engine_of(), x, trace=trace), 1e-12)
    np.testing.assert_array_equal(zarr.open_array(str(store))[...], found[...])


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4])
def test_kernel_that_was_interrupted_goes_on(tmp_path, after):
    pytest.importorskip("zarr")
    x, store = data(23), tmp_path / "ntk.zarr"

    def stop(done, total):
        if done == after:
            raise Stop

    with pytest.raises(Stop), progress.heard(stop):
        ntk(engine_of("9KiB"), x, store=store)
    heard = []
    engine = engine_of("30KiB")  # other tiles would do now
    with progress.heard(lambda done, total: heard.append((done, total))):
        found = ntk(engine, x, store=store)
    assert heard[0][0] == after + 1
    assert len(heard) == heard[0][1] - after
    close(found[...], ntk(engine, x), 1e-12)


def test_store_of_another_kernel_is_refused(tmp_path):
    pytest.importorskip("zarr")
    model, x, store = small(), data(5), tmp_path / "ntk.zarr"
    engine = pj.Engine(model)
    ntk(engine, x, store=store)
    for other in ({"outputs": 1}, {"trace": True}, {"x2": x}):
        with pytest.raises(FileFormatError, match="not of the same"):
            ntk(engine, x, store=store, **other)
    model.weights[0].assign(model.weights[0] + 1)
    with pytest.raises(FileFormatError, match="not of the same"):
        ntk(engine, x, store=store)
    np.testing.assert_array_equal(ntk(engine, x, store=store, resume=False)[...], ntk(engine, x))
    with pytest.raises(FileFormatError, match="end in .zarr"):
        ntk(engine, x, store=tmp_path / "ntk.npy")
    with pytest.raises(FileFormatError, match="no folder"):
        ntk(engine, x, store=tmp_path / "nowhere" / "ntk.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(FileFormatError, match="no Zarr array"):
        ntk(engine, x, store=tmp_path / "empty.zarr")


def test_kernel_too_large_for_memory_is_refused():
    with pytest.raises(TooLargeError, match="store="):
        ntk(engine_of("10KiB"), data(40))


@pytest.mark.parametrize("outputs", [[], np.arange(3), "all"])
def test_outputs_that_are_no_list_are_refused(outputs):
    with pytest.raises(InputError, match="outputs="):
        ntk(engine_of(), data(3), outputs=outputs)


@pytest.mark.parametrize("x", [(data(3), np.zeros(3)), np.zeros((0, 3)), iter([data(3)])])
def test_examples_that_are_no_arrays_are_refused(x):
    with pytest.raises(InputError, match="Expected|iterator"):
        ntk(engine_of(), x)


@pytest.mark.parametrize("k", [None, 1, 5])
def test_eigenvalues_are_those_of_the_matrix(k):
    kernel = ntk(engine_of(), data(9))
    expected = np.linalg.eigvalsh(kernel.reshape(18, 18))[::-1]
    values, vectors = kernel_eigh(kernel, k)
    assert len(values) == (k or 18)
    np.testing.assert_allclose(values, expected[:k], rtol=1e-10, atol=1e-10 * expected[0])
    close(kernel.reshape(18, 18) @ vectors, vectors * values)
    close(vectors.T @ vectors, np.eye(len(values)))


def test_a_few_eigenvalues_of_a_large_kernel_on_disk(tmp_path):
    zarr = pytest.importorskip("zarr")
    root = np.random.default_rng(0).standard_normal((1100, 40)) * 0.8 ** np.arange(40)
    kernel = (root @ root.T).reshape(550, 2, 550, 2)
    stored = zarr.create_array(
        str(tmp_path / "k.zarr"), shape=kernel.shape, dtype="f8", chunks=(100, 2, 100, 2)
    )
    stored[...] = kernel
    expected = np.linalg.eigvalsh(root.T @ root)[::-1][:4]
    for given in (kernel, stored):
        values, vectors = kernel_eigh(given, 4)
        np.testing.assert_allclose(values, expected, rtol=1e-9)
        close(kernel.reshape(1100, 1100) @ vectors, vectors * values, 1e-8)


def test_condition_number_and_singular_kernels():
    model = shared()[0]
    kernel = ntk(engine_of(), data(4), outputs=0)
    assert kernel_condition(kernel) == pytest.approx(np.linalg.cond(kernel.reshape(4, 4)))
    weights = model.count_params()
    assert kernel_condition(ntk(engine_of(), data(weights))) == np.inf
    with pytest.raises(InputError, match="kernel"):
        kernel_condition(np.ones((3, 2)))


def in_weight_space(model, x, y, ridge, time=None):
    """Return the weights' change Δw (P,) that training the linearised model leads to."""
    rows = by_hand(model, x).reshape(-1, model.count_params())
    residuals = np.ravel(y - np.asarray(model(x)))
    square, pulled = rows.T @ rows, rows.T @ residuals
    if time is None:
        if ridge == 0:
            return np.linalg.lstsq(rows, residuals, rcond=None)[0]
        return np.linalg.solve(square + ridge * np.eye(len(square)), pulled)
    # dΔ/dt = Jᵀr - (JᵀJ + ridge) Δ, with one more number that stays 1.
    flow = np.zeros((len(square) + 1,) * 2)
    flow[:-1, :-1], flow[:-1, -1] = -square - ridge * np.eye(len(square)), pulled
    return scipy.linalg.expm(flow * time)[:-1, -1]


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("count", [6, 40])
def test_regression_is_that_of_the_weights(ridge, count):
    model, x, new = shared()[0], data(count), data(5, 1)
    y = np.random.default_rng(2).standard_normal((count, 2))
    trained = NTKRegression(engine_of(), x, y, ridge=ridge)
    across = by_hand(model, new)
    for time in (None, 0.0, 0.07, 2.0):
        moved = across @ in_weight_space(model, x, y, ridge, time)
        close(trained.predict(new, time=time), np.asarray(model(new)) + moved, 1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_variance_is_that_of_the_weights_posterior(ridge):
    model, x, new = shared()[0], data(6), data(5, 1)
    rows = by_hand(model, x).reshape(-1, model.count_params())
    if ridge:
        posterior = np.linalg.inv(rows.T @ rows / ridge + np.eye(rows.shape[1]))
    else:
        posterior = np.eye(rows.shape[1]) - np.linalg.pinv(rows) @ rows
    moved = by_hand(model, new)
    expected = np.einsum("bkp,pq,bkq->bk", moved, posterior, moved)
    trained = NTKRegression(engine_of(), x, np.zeros((6, 2)), ridge=ridge)
    mean, variance = trained.predict(new, variance=True)
    close(variance, expected, 1e-8)
    close(mean, trained.predict(new), 1e-12)


def test_long_training_converges_and_none_changes_nothing():
    model, x, new = shared()[0], data(6), data(5, 1)
    trained = NTKRegression(engine_of(), x, np.ones((6, 2)))
    close(trained.predict(new, time=0.0), np.asarray(model(new)), 1e-12)
    close(trained.predict(new, time=1e9), trained.predict(new), 1e-9)
    close(trained.predict(x), np.ones((6, 2)), 1e-8)


def test_regression_of_a_linear_model_is_the_trained_model():
    with floats("float64"):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    randomise(model.weights)
    x, new = data(30), data(5, 1)
    y = np.random.default_rng(2).standard_normal((30, 2))
    trained = NTKRegression(pj.Engine(model), x, y)
    with_ones = lambda x: np.c_[x, np.ones(len(x))]  # noqa: E731
    best = np.linalg.lstsq(with_ones(x), y, rcond=None)[0]
    close(trained.predict(new), with_ones(new) @ best, 1e-8)


def test_regression_of_one_output_and_of_float32():
    model, x, new = small("float32"), data(20, dtype="float32"), data(5, 1, "float32")
    y = np.sin(x[:, 0])
    trained = NTKRegression(pj.Engine(model), x, y, ridge=0.1, outputs=1)
    wide = small()
    rows = by_hand(wide, x.astype("f8"), [1])[:, 0]
    alpha = np.linalg.solve(rows @ rows.T + 0.1 * np.eye(20), y - np.asarray(wide(x))[:, 1])
    expected = np.asarray(wide(new))[:, 1] + by_hand(wide, new.astype("f8"), [1])[:, 0] @ (
        rows.T @ alpha
    )
    mean, variance = trained.predict(new, variance=True)
    assert mean.shape == variance.shape == (5, 1)
    close(mean[:, 0], expected, 1e-4)


def test_regression_refuses_what_does_not_fit():
    engine, x = engine_of(), data(6)
    with pytest.raises(InputError, match="Expected y of shape"):
        NTKRegression(engine, x, np.zeros((6, 3)))
    with pytest.raises(InputError, match="ridge="):
        NTKRegression(engine, x, np.zeros((6, 2)), ridge=-1)
    trained = NTKRegression(engine, x, np.zeros((6, 2)), ridge=0.1)
    with pytest.raises(InputError, match="time="):
        trained.predict(x, time=1.0, variance=True)
    with pytest.raises(InputError, match="time="):
        trained.predict(x, time=-1.0)
    many = data(60)  # more rows than weights: singular but for a ridge that rounding hides
    with pytest.raises(NotPositiveError, match="ridge"):
        NTKRegression(engine, many, np.zeros((60, 2)), ridge=1e-18).predict(x)


@pytest.mark.parametrize("examples", [59, 64])
def test_many_long_rows_are_multiplied_by_halves(examples):
    """Above 512 rows of 512 numbers only the blocks below the diagonal are computed."""
    from perjac._core.backend.axis_layout import Relabelling
    from perjac._core.factors import Explicit

    rows = np.random.default_rng(0).standard_normal((examples, 9, 52, 10))
    factor = Explicit(Relabelling.of((52, 10)), tf.constant(rows))
    flat = rows.reshape(examples * 9, 520)
    found = factor.gram(factor).numpy().reshape(examples * 9, -1)
    close(found, flat @ flat.T, 1e-13)
    first = examples * 9 // 4
    np.testing.assert_array_equal(found[:first, first:], found[first:, :first].T)
    again = factor.gram(Explicit(factor.layout, tf.constant(rows))).numpy()
    close(found, again.reshape(found.shape), 1e-13)


@pytest.mark.parametrize("block", [2**25, 2**9])
def test_own_gram_of_convolutions_is_that_with_a_copy(monkeypatch, block):
    """Rows of both sides of a Gram matrix are formed a block of inputs at a time."""
    monkeypatch.setattr("perjac._core.factors.outer._BLOCK", block)
    subject = MODELS["conv2d_same_strided"].make(batch=4)
    engine = pj.Engine(subject.target)
    jac, copy = (engine.jacobian(subject.x) for _ in range(2))
    with_copy = {key: f.gram(copy._factors[key]) for key, f in jac._factors.items()}
    for key, factor in jac._factors.items():
        close(factor.gram(factor).numpy(), with_copy[key].numpy(), 1e-13)
    close(jac.gram().numpy(), sum(with_copy.values()).numpy(), 1e-13)
