"""Every form of the Fisher information is what NumPy makes of its definition, F = mean Jᵀ H J.

J is the oracle's Jacobian, H the Hessian of the negative log-likelihood, written out below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import oracle
import pytest
import scipy.linalg
import scipy.special
import tensorflow as tf
from keras import layers
from models import floats, randomise
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from subjects import engine, expected, names, subject

import perjac as pj
from perjac.errors import (
    DisconnectedWarning,
    InputError,
    LossWarning,
    NotFiniteError,
    NotPositiveError,
    OutOfRangeError,
    TooLargeError,
    UnknownNameError,
)
from perjac.fisher import _rows_of

pytestmark = pytest.mark.slow  # left out of `make check`

RTOL = 1e-10
DAMPING = 1e-2
FORMS = ("dense", "low_rank", "operator")  # of the whole matrix


def softmax_hessian(f: np.ndarray) -> np.ndarray:
    """diag(p) - p pᵀ of logits (C,)."""
    p = scipy.special.softmax(f)
    return np.diag(p) - np.outer(p, p)


def of_classes(f: np.ndarray) -> np.ndarray:
    """The Hessian for classes along the last axis of logits (..., C): a block for each position."""
    blocks = [softmax_hessian(row) for row in f.reshape(-1, f.shape[-1])]
    return scipy.linalg.block_diag(*blocks)


def of_each(f: np.ndarray) -> np.ndarray:
    """The Hessian for a yes or no at each entry of logits."""
    p = scipy.special.expit(f.ravel())
    return np.diag(p * (1 - p))


def mean_of(second: Callable) -> Callable:
    """The Hessian of a mean over the entries, each of second derivative second(f, y)."""
    return lambda f, y: np.diag(second(f, y).ravel()) / f.size


def cosh(y: Any, f: tf.Tensor) -> tf.Tensor:
    """A user's own loss, (B,)."""
    return tf.reduce_sum(tf.cosh(f - tf.cast(y, f.dtype)), -1)


L = {"dtype": "float64"}
LOSSES = {
    "mse": (lambda: "mse", mean_of(lambda f, y: np.full(f.shape, 2.0))),
    "huber": (
        lambda: keras.losses.Huber(0.7, **L),
        mean_of(lambda f, y: 1.0 * (np.abs(f - y) <= 0.7)),
    ),
    "log_cosh": (
        lambda: keras.losses.LogCosh(**L),
        mean_of(lambda f, y: 1 / np.cosh(f - y) ** 2),
    ),
    "binary": (
        lambda: keras.losses.BinaryCrossentropy(from_logits=True, **L),
        mean_of(lambda f, y: scipy.special.expit(f) * scipy.special.expit(-f)),
    ),
    "sum_of_squares": (
        lambda: keras.losses.MeanSquaredError(reduction="sum", **L),
        lambda f, y: np.eye(f.size) * 2 / f.shape[-1],
    ),
    "own": (lambda: cosh, lambda f, y: np.diag(np.cosh(f - y).ravel())),
    "sparse": (
        lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, **L),
        lambda f, y: of_classes(f) / (f.size / f.shape[-1]),
    ),
    "one_hot": (
        lambda: keras.losses.CategoricalCrossentropy(from_logits=True, **L),
        lambda f, y: of_classes(f) / (f.size / f.shape[-1]),
    ),
}
# (model, likelihood or loss): one for each kind of factor, of output and of Hessian, and the others
QUICK = [
    ("mlp", "categorical"),
    ("mlp", "huber"),
    ("mlp", "own"),
    ("dense_on_sequences", "sparse"),
    ("tied_embedding", "categorical"),
    ("shared_dense", "gaussian"),
]
CASES = [
    ("mlp", "categorical"),
    ("mlp", "bernoulli"),
    ("mlp", "gaussian"),
    ("conv2d_valid_strided", "categorical"),
    ("lstm", "gaussian"),
    ("lstm", "bernoulli"),
    ("transformer", "categorical"),
    ("transformer_per_token", "categorical"),
    ("dense_on_sequences", "bernoulli"),
    ("tied_embedding", "categorical"),
    ("shared_dense", "gaussian"),
    ("inputs_by_name", "categorical"),
    ("mlp", "mse"),
    ("mlp", "huber"),
    ("mlp", "log_cosh"),
    ("mlp", "binary"),
    ("mlp", "own"),
    ("mlp", "one_hot"),
    ("dense_on_sequences", "mse"),
    ("dense_on_sequences", "sum_of_squares"),
    ("dense_on_sequences", "sparse"),
    ("tied_embedding", "sparse"),
]


@functools.cache
def rows_of(name: str) -> np.ndarray:
    """The oracle's Jacobian, (B, K, P)."""
    parts = expected(name)
    return np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], -1)


@functools.cache
def outputs_of(name: str) -> np.ndarray:
    built = subject(name, "float64")
    return np.asarray(built.call(built.x))


@functools.cache
def labels_of(name: str, likelihood: str) -> np.ndarray:
    rng, f = np.random.default_rng(3), outputs_of(name)
    if likelihood == "sparse":
        return rng.integers(0, f.shape[-1], f.shape[:-1])
    if likelihood == "one_hot":
        return rng.dirichlet(np.ones(f.shape[-1]), f.shape[:-1])
    if likelihood == "binary":
        return rng.integers(0, 2, f.shape).astype("f8")
    return f + rng.standard_normal(f.shape)


def hessians_of(name: str, likelihood: str) -> np.ndarray:
    """(B, K, K), by the formulas above."""
    f = outputs_of(name)
    plain = {
        "categorical": of_classes,
        "bernoulli": of_each,
        "gaussian": lambda f: np.eye(f.size),
    }
    if likelihood in plain:
        return np.array([plain[likelihood](one) for one in f])
    y = labels_of(name, likelihood)
    return np.array([LOSSES[likelihood][1](*pair) for pair in zip(f, y, strict=True)])


@functools.cache
def definition(name: str, likelihood: str) -> np.ndarray:
    """F = mean_b J_bᵀ H_b J_b, (P, P)."""
    j, h = rows_of(name), hessians_of(name, likelihood)
    return np.einsum("bkp,bkl,blq->pq", j, h, j, optimize=True) / len(j)


@functools.cache
def information(name: str, likelihood: str, **options) -> pj.fisher.Fisher:
    data = subject(name, "float64").x
    if likelihood in LOSSES:
        data, likelihood = (data, labels_of(name, likelihood)), LOSSES[likelihood][0]()
    with floats("float64"):  # of losses that are given by name
        return engine(name, "float64", "auto").fisher(data, likelihood=likelihood, **options)


@functools.cache
def form_of(name: str, likelihood: str, form: str) -> Any:
    return getattr(information(name, likelihood), form)()


def near(found: Any, wanted: Any, rtol: float = RTOL) -> bool:
    """Whether ‖found - wanted‖ ≤ rtol ‖wanted‖."""
    found, wanted = np.asarray(found, "f8"), np.asarray(wanted, "f8")
    assert found.shape == wanted.shape
    return bool(np.linalg.norm(found - wanted) <= rtol * np.linalg.norm(wanted))


def random(*shape: int, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, marks=[] if case in QUICK else pytest.mark.more, id="-".join(case))
        for case in CASES
    ],
)
def case(request) -> tuple[str, str]:
    return request.param


def test_forms_agree_with_the_definition(case):
    F, wanted = information(*case), definition(*case)
    assert list(F.keys) == names(subject(case[0], "float64").trainable)
    for form in FORMS:
        found = form_of(*case, form)
        assert near(found.to_numpy(), wanted), form
        assert near(found.diagonal(), np.diag(wanted)), form
        assert found.trace() == pytest.approx(np.trace(wanted), rel=RTOL), form
    assert near(F.diagonal().diagonal(), np.diag(wanted))
    assert near(F.diagonal().to_numpy(), np.diag(np.diag(wanted)))
    assert F.trace() == pytest.approx(np.trace(wanted), rel=RTOL)


def test_blocks_are_those_of_the_layers(case):
    F, wanted = information(*case), definition(*case)
    owner = np.concatenate(
        [np.full(np.prod(s, dtype=int), hash(k.rpartition("/")[0] or k))
         for k, s in zip(F.columns.keys, F.columns.shapes, strict=True)]
    )  # fmt: skip
    wanted = np.where(owner[:, None] == owner, wanted, 0)
    found = F.blocks()
    assert near(found.to_numpy(), wanted)
    assert sum(found.traces().values()) == pytest.approx(np.trace(wanted), rel=RTOL)


def test_products_and_solutions(case):
    wanted = definition(*case)
    count = len(wanted)
    v, both = random(count), random(count, 2)
    scale = np.linalg.norm(wanted, 2)
    damping = DAMPING * scale
    for form in FORMS:
        found = form_of(*case, form)
        assert near(found @ v, wanted @ v), form
        assert near(found.rmatvec(v), wanted @ v), form
        assert near(found @ both, wanted @ both), form
        assert near(found.apply(v, damping), wanted @ v + damping * v), form
        for right in (v, both):
            solved = found.solve(right, damping)
            left = wanted @ solved + damping * solved - right
            assert np.linalg.norm(left) <= 1e-8 * np.linalg.norm(right), form


def test_eigenvalues_and_what_is_made_of_them(case):
    F, wanted = information(*case), definition(*case)
    spectrum = scipy.linalg.eigvalsh(wanted)
    damping = DAMPING * spectrum[-1]
    logdet = np.log(np.maximum(spectrum, 0) + damping).sum()
    directions = (np.maximum(spectrum, 0) / (np.maximum(spectrum, 0) + damping)).sum()
    low = form_of(*case, "low_rank")
    k = min(3, low.rank)
    assert low.rank <= np.linalg.matrix_rank(rows_of(case[0]).reshape(-1, len(wanted)))
    for form in FORMS:
        found = form_of(*case, form)
        values, vectors = found.eigsh(k)
        assert np.allclose(values, spectrum[::-1][:k], rtol=1e-9, atol=0), form
        left = wanted @ vectors - vectors * values
        assert np.linalg.norm(left) <= 1e-7 * spectrum[-1], form
        assert np.allclose(vectors.T @ vectors, np.eye(k), atol=1e-9), form
    for form in ("dense", "low_rank"):
        found = form_of(*case, form)
        assert near(found.eigenvalues(), spectrum, 1e-8), form
        assert found.logdet(damping) == pytest.approx(logdet, rel=1e-9), form
        assert found.effective_dimension(damping) == pytest.approx(directions, rel=1e-9), form
    assert np.allclose(
        np.sort(eigsh(form_of(*case, "operator"), k, v0=np.ones(len(wanted)))[0])[::-1],
        spectrum[::-1][:k],
        rtol=1e-8,
    )
    assert F.logdet(damping) == pytest.approx(logdet, rel=1e-9)
    assert F.effective_dimension(damping) == pytest.approx(directions, rel=1e-9)


def test_operator_is_one_of_scipys():
    F, wanted = form_of("mlp", "categorical", "operator"), definition("mlp", "categorical")
    assert isinstance(F, LinearOperator)
    assert (F.dtype, F.shape) == (np.float64, wanted.shape)
    v = random(len(wanted))
    damped = F + 0.1 * LinearOperator(F.shape, matvec=np.ravel, dtype="f8")
    solved, failed = cg(damped, v, rtol=1e-12)
    assert not failed
    assert near(solved, np.linalg.solve(wanted + 0.1 * np.eye(len(v)), v), 1e-8)
    for transposed in (F.T, F.H):
        assert near(transposed @ v, F @ v)


def test_mappings_go_in_and_come_out():
    F, wanted = information("mlp", "categorical"), definition("mlp", "categorical")
    keys, shapes = F.columns.keys, F.columns.shapes
    given = {keys[0]: random(*shapes[0]), keys[2].split("/", 1)[1]: random(*shapes[2])}
    flat = F.columns.flat(given)
    assert np.count_nonzero(flat) == sum(np.prod(shapes[n]) for n in (0, 2))
    damped = wanted + DAMPING * np.eye(len(wanted))
    for form in (F, *(form_of("mlp", "categorical", name) for name in FORMS)):
        solved, product = form.solve(given, DAMPING), form.apply(given, DAMPING)
        assert list(solved) == list(product) == list(keys)
        assert [solved[key].shape for key in keys] == list(shapes)
        assert solved[keys[1].split("/", 1)[1]] is solved[keys[1]]  # by a short name
        assert near(np.concatenate([np.ravel(product[k]) for k in keys]), damped @ flat)
        assert near(damped @ np.concatenate([np.ravel(solved[k]) for k in keys]), flat, 1e-8)


# How data comes, and in what pieces

KINDS = [
    {"likelihood": "categorical"},
    {"likelihood": "gaussian", "variance": 0.5},
    {"kind": "sampled", "likelihood": "categorical", "samples": 3, "seed": 5},
    {"kind": "sampled", "likelihood": "bernoulli", "samples": 2},
    {"kind": "empirical", "loss": "mse"},
    {"likelihood": "mse"},
]


def of_kind(options: dict, data: Any = None, count: int = 11, name: str = "mlp", **more):
    """The information of some examples, as arrays unless `data` makes something else of them."""
    x = random(count, 6, seed=1)
    pair = x, random(count, 4, seed=2)
    with floats("float64"):
        made = engine(name, "float64", "auto")
        return made.fisher(pair if data is None else data(*pair), **options, **more)


each_kind = pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(map(str, o.values())))


more = pytest.mark.more


@each_kind
@pytest.mark.parametrize(
    "form", ["dense", *(pytest.param(f, marks=more) for f in ("diagonal", "low_rank", "operator"))]
)
def test_result_does_not_depend_on_chunks(options, form, monkeypatch):
    whole = getattr(of_kind(options), form)()
    pieces = []
    for limit, most_examples in [(2**14, 11), (2**9, 1)]:
        monkeypatch.setattr(_rows_of, "_AT_ONCE", limit)
        cut = of_kind(options)
        parts = list(cut.rows())
        assert max(part.shape[0] for part in parts) <= most_examples
        pieces.append(len(parts))
        assert near(getattr(cut, form)().to_numpy(), whole.to_numpy())
    # Examples' rows are cut as well, but for the empirical kind's, of which there is one.
    assert pieces[1] >= 11 + (options.get("kind") != "empirical") > pieces[0]


@each_kind
@pytest.mark.parametrize("batch", [4, *(pytest.param(n, marks=more) for n in (1, 11, 64))])
def test_datasets_are_as_good_as_arrays(options, batch):
    def data(x, y):
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch)

    F, whole = of_kind(options, data), of_kind(options)
    assert near(F.dense().to_numpy(), whole.dense().to_numpy())
    assert F.examples == 11
    fresh = of_kind(options, data)
    assert fresh.low_rank().examples == 11
    assert fresh.trace() == pytest.approx(whole.trace())
    assert of_kind(options, data).operator().trace() == pytest.approx(whole.trace())


def test_empty_elements_of_a_dataset_do_not_count():
    x = random(5, 6, seed=1)
    spec = tf.TensorSpec((None, 6), tf.float64)
    pieces = [x[:0], x[:2], x[2:2], x[2:], x[5:]]
    data = tf.data.Dataset.from_generator(lambda: iter(pieces), output_signature=spec)
    F = of_kind({}, lambda *_: data)
    assert near(F.dense().to_numpy(), of_kind({}, lambda *_: x).dense().to_numpy())
    assert F.examples == 5


def test_a_generator_that_is_used_up_serves_one_pass():
    x = random(6, 6, seed=1)
    spec = tf.TensorSpec((None, 6), tf.float64)

    def data(*_):
        once = iter([x[:2], x[2:]])
        return tf.data.Dataset.from_generator(lambda: once, output_signature=spec)

    F = of_kind({}, data)
    assert near(F.diagonal().diagonal(), of_kind({}, lambda *_: x).diagonal().diagonal())
    with pytest.raises(InputError, match="6 the last time, 0 now"):
        F.trace()


def test_a_dataset_is_read_once_for_each_form():
    passes = []
    x = random(6, 6, seed=1)

    def read():
        passes.append(0)
        yield from (x[:2], x[2:])

    spec = tf.TensorSpec((None, 6), tf.float64)
    F = of_kind({}, lambda *_: tf.data.Dataset.from_generator(read, output_signature=spec))
    for n, form in enumerate(("dense", "diagonal", "low_rank", "operator"), 1):
        getattr(F, form)()
        assert len(passes) == n


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", ["dense", "blocks", "diagonal", "low_rank"])
def test_parts_merge_into_the_whole(form, reduction):
    def parts(start, stop):
        return lambda x, y: (x[start:stop], y[start:stop])

    halves = [
        getattr(of_kind({"likelihood": "mse", "reduction": reduction}, parts(*ends)), form)()
        for ends in ((0, 3), (3, 11))
    ]
    whole = getattr(of_kind({"likelihood": "mse", "reduction": reduction}), form)()
    found = halves[0].merge(halves[1])
    assert found.examples == 11
    assert near(found.to_numpy(), whole.to_numpy())
    v = random(found.shape[0])
    assert near(found.solve(v, 0.1), whole.solve(v, 0.1), 1e-8)


@each_kind
def test_a_sum_is_n_times_the_mean(options):
    found = of_kind(options, reduction="sum").dense().to_numpy()
    assert near(found, 11 * of_kind(options).dense().to_numpy())


def test_weights_of_a_layer_alone():
    built = subject("mlp", "float64").target
    whole, F = information("mlp", "categorical"), None
    for wrt in (built.layers[-1], [built.layers[0], built.layers[-1].bias]):
        F = engine("mlp", "float64", "auto").fisher(
            subject("mlp", "float64").x, likelihood="categorical", wrt=wrt
        )
        places = np.concatenate([np.r_[whole.columns.slices[key]] for key in F.keys])
        wanted = definition("mlp", "categorical")[np.ix_(places, places)]
        assert near(F.dense().to_numpy(), wanted)
        assert near(F.low_rank().to_numpy(), wanted)


# Kinds


def test_empirical_is_of_the_gradients_of_the_loss():
    built = subject("mlp", "float64")
    y = labels_of("mlp", "mse")
    loss = keras.losses.MeanSquaredError(dtype="float64")
    parts = oracle.loss_rows(built.call, loss, built.x, y, built.trainable)[1]
    g = np.concatenate([part.reshape(len(y), -1) for part in parts], 1)
    F = engine("mlp", "float64", "auto").fisher((built.x, y), kind="empirical", loss=loss)
    for form in FORMS:
        assert near(getattr(F, form)().to_numpy(), g.T @ g / len(y)), form


def fourth_moments(name: str, likelihood: str, v: np.ndarray) -> tuple[float, float]:
    """Mean and variance of vᵀF̂v for one drawn label of each example, from the labels' law."""
    f, u = outputs_of(name), rows_of(name) @ v  # (B, K)
    mean = variance = 0.0
    for b, logits in enumerate(f.reshape(len(f), -1)):
        if likelihood == "gaussian":  # (ε·u)², ε·u normal
            second, fourth = u[b] @ u[b], 3 * (u[b] @ u[b]) ** 2
        else:
            p = scipy.special.softmax(logits)
            slopes = p @ u[b] - u[b]
            second, fourth = p @ slopes**2, p @ slopes**4
        mean, variance = mean + second / len(f), variance + (fourth - second**2) / len(f) ** 2
    return mean, variance


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_sampled_is_exact_in_the_mean(likelihood):
    samples, x = 4000, subject("mlp", "float64").x
    F = engine("mlp", "float64", "auto").fisher(
        x, kind="sampled", likelihood=likelihood, samples=samples, seed=1
    )
    operator, exact = F.operator(), definition("mlp", likelihood)
    for seed in range(4):
        v = random(len(exact), seed=seed)
        mean, variance = fourth_moments("mlp", likelihood, v)
        assert mean == pytest.approx(v @ exact @ v, rel=1e-9)
        error = np.sqrt(variance / samples)
        assert error < 0.05 * mean  # so that the next line tells something
        assert abs(v @ operator.matvec(v) - mean) <= 4.5 * error


def test_bernoulli_draws_are_exact_in_the_mean():
    x, samples = subject("mlp", "float64").x, 4000
    F = engine("mlp", "float64", "auto").fisher(
        x, kind="sampled", likelihood="bernoulli", samples=samples
    )
    exact = definition("mlp", "bernoulli")
    # Slopes are bounded by 1, so a sample of vᵀF̂v is at most the mean of ‖J v‖₁².
    v = random(len(exact))
    most = np.mean(np.abs(rows_of("mlp") @ v).sum(-1) ** 2)
    found = v @ F.operator().matvec(v)
    assert abs(found - v @ exact @ v) <= 4.5 * most / np.sqrt(samples)


def test_draws_depend_on_the_seed_and_the_examples_number_alone():
    options = {"kind": "sampled", "likelihood": "categorical", "samples": 2}
    first, again, other = (
        of_kind(options, seed=seed).dense().to_numpy() for seed in (1, 1, 2)
    )  # fmt: skip
    assert np.array_equal(first, again)
    assert not near(first, other, 1e-2)


def test_the_gaussians_variance():
    y = labels_of("mlp", "mse")
    x = subject("mlp", "float64").x
    made, unit = engine("mlp", "float64", "auto"), definition("mlp", "gaussian")
    known = made.fisher(x, likelihood="gaussian", variance=0.25)
    assert near(known.dense().to_numpy(), 4 * unit)
    fitted = made.fisher((x, y), likelihood="gaussian", variance="fitted")
    assert near(fitted.dense().to_numpy(), unit / np.mean((y - outputs_of("mlp")) ** 2))
    assert near(fitted.operator().diagonal(), np.diag(fitted.dense().to_numpy()))


@functools.cache
def classifier(activation: str, units: int, dtype: str = "float64") -> keras.Model:
    with floats(dtype):
        model = keras.Sequential(
            [
                keras.Input((5,)),
                layers.Dense(4, activation="tanh"),
                layers.Dense(units, activation=activation, name="top"),
            ]
        )
    randomise(model.weights)
    return model


@pytest.mark.parametrize(
    ("activation", "units", "likelihood", "losses"),
    [
        ("softmax", 3, "categorical", ["sparse_categorical_crossentropy", "crossentropy"]),
        ("sigmoid", 1, "bernoulli", ["binary_crossentropy", "crossentropy"]),
    ],
)
def test_the_logits_of_probabilities_are_found(activation, units, likelihood, losses):
    x, y = random(7, 5), np.random.default_rng(0).integers(0, max(units, 2), (7, 1))
    probabilities, logits = classifier(activation, units), classifier("linear", units)
    wanted = pj.Engine(logits).fisher(x, likelihood=likelihood).dense().to_numpy()
    made = pj.Engine(probabilities)
    F = made.fisher(x, likelihood=likelihood)
    assert F.explained == "logits"
    assert near(F.dense().to_numpy(), wanted)
    with floats("float64"):
        for loss in losses:  # the Hessian by the logits, whatever the label
            assert near(made.fisher((x, y), likelihood=loss).dense().to_numpy(), wanted, 1e-8)
    assert made.fisher(x, kind="sampled", likelihood=likelihood).explained == "logits"


def test_a_loss_without_curvature_says_so():
    y = labels_of("mlp", "mse")
    F = engine("mlp", "float64", "auto").fisher((subject("mlp", "float64").x, y), likelihood="mae")
    with pytest.warns(LossWarning, match="no curvature"):
        assert F.trace() == 0


def test_a_loss_of_probabilities_beside_logits_is_told():
    F = engine("mlp", "float64", "auto").fisher
    x, y = subject("mlp", "float64").x, np.array([0, 3, 1])
    with pytest.warns(LossWarning, match="from_logits=True"):
        F((x, y), likelihood="sparse_categorical_crossentropy")


def test_logits_that_look_like_probabilities_are_told():
    model = classifier("softmax", 3)
    made = pj.Engine(lambda x: 1.0 * model(x), variables=model.weights)  # hides the softmax
    with pytest.warns(LossWarning, match="looks like probabilities"):
        made.fisher(random(4, 5), likelihood="categorical")


# Draws


@pytest.mark.parametrize("form", [*FORMS, "blocks", "diagonal"])
def test_draws_have_the_inverse_for_covariance(form):
    count = 3000
    found = getattr(of_kind({}), form)()
    damping = 0.05 * found.eigsh(1)[0][0]
    draws = found.sample(30 if form == "operator" else count, damping, seed=3)
    inverse = np.linalg.inv(found.to_numpy() + damping * np.eye(found.shape[0]))
    for seed in range(3):  # vᵀx is normal: the mean of n squares has a deviation of √(2/n) of it
        v = random(found.shape[0], seed=seed)
        wanted = v @ inverse @ v
        assert abs(np.mean((draws @ v) ** 2) - wanted) <= 4.5 * np.sqrt(2 / len(draws)) * wanted
    assert np.array_equal(draws[:2], found.sample(len(draws), damping, seed=3)[:2])


def test_forms_of_one_matrix_give_the_same_draws():
    F = of_kind({})
    wanted = F.dense().sample(3, 0.01, seed=2)
    assert near(F.low_rank().sample(3, 0.01, seed=2), wanted, 1e-8)
    assert near(F.operator().sample(3, 0.01, seed=2), wanted, 1e-7)


# Numbers of few bits, many numbers, numbers that are none


@functools.cache
def floating(dtype: str) -> keras.Model:
    """One model, its weights exact in bfloat16, in several floating types."""
    with floats(dtype):
        model = keras.Sequential(
            [keras.Input((5,)), layers.Dense(8, activation="tanh"), layers.Dense(3)]
        )
    randomise(model.weights)
    for weight in model.weights:
        weight.assign(tf.cast(tf.cast(weight, "bfloat16"), dtype))
    return model


@pytest.mark.parametrize(("dtype", "rtol"), [("float16", 1e-2), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("likelihood", ["categorical", "sparse"])
def test_half_precision(dtype, rtol, likelihood):
    x = random(6, 5).astype("float16").astype("f4")
    y = np.arange(6) % 3
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    data, given = ((x, y), loss) if likelihood == "sparse" else (x, likelihood)
    wanted = pj.Engine(floating("float32")).fisher(data, likelihood=given).dense().to_numpy()
    F = pj.Engine(floating(dtype)).fisher(data, likelihood=given)
    for form in FORMS:
        assert near(getattr(F, form)().to_numpy(), wanted, rtol), form


def test_float32_rows_are_squared_in_float64():
    x = random(4, 5).astype("f4")
    x[1] = x[0] * (1 + 2**-10)  # nearly the same
    F = pj.Engine(floating("float32")).fisher(x, likelihood="categorical")
    wanted = pj.Engine(floating("float64")).fisher(x.astype("f8")).dense().eigenvalues()
    rank = 8  # 4 examples, of three logits whose probabilities add up to one
    assert wanted[-rank] < 1e-6 * wanted[-1]
    for form in ("dense", "low_rank"):
        found = getattr(F, form)()
        values = found.eigenvalues()
        assert np.allclose(values[-rank:], wanted[-rank:], rtol=1e-2, atol=0), form
        assert np.all(np.abs(values[:-rank]) <= 1e-13 * wanted[-1]), form
    v = random(F.shape[0])
    damping = 1e-6 * wanted[-1]
    for form in FORMS:
        found = getattr(F, form)()
        left = found.apply(found.solve(v, damping), damping) - v
        assert np.linalg.norm(left) <= 1e-8 * np.linalg.norm(v), form


@pytest.mark.parametrize("likelihood", ["categorical", "mse"])
def test_what_is_not_finite_is_refused(likelihood):
    x = random(11, 6, seed=1)
    x[7, 2] = np.nan
    with pytest.raises(NotFiniteError, match="7"):
        of_kind({"likelihood": likelihood}, lambda _, y: (x, y)).dense()


def test_labels_that_are_not_finite_are_refused():
    y = random(11, 4, seed=1)
    y[3, 0] = np.nan
    loss = keras.losses.LogCosh(dtype="float64")
    with pytest.raises(NotFiniteError, match="LogCosh|log_cosh.*example 3"):
        of_kind({"likelihood": loss}, lambda x, _: (x, y)).dense()


def test_nothing_of_the_size_of_the_matrix_is_made():
    """P is 1,000,000: a matrix would take 8·10¹² bytes."""
    model = keras.Sequential([keras.Input((1000,)), layers.Dense(1000, use_bias=False)])
    x = random(2, 1000).astype("f4")
    F = pj.Engine(model).fisher(x, kind="sampled", likelihood="gaussian", samples=3)
    assert F.shape == (1_000_000, 1_000_000)
    low, operator, diagonal = F.low_rank(), F.operator(), F.diagonal()
    assert low.rank == 6
    v = random(1_000_000)
    for form in (low, operator, diagonal):
        left = form.apply(form.solve(v, 1.0), 1.0) - v
        assert np.linalg.norm(left) <= 1e-8 * np.linalg.norm(v)
    assert low.eigsh(2)[0] == pytest.approx(operator.eigsh(2)[0], rel=1e-8)
    assert diagonal.trace() == pytest.approx(F.trace(), rel=1e-5)
    assert isinstance(F.exact(), type(low))
    for form in (low, operator, diagonal):
        with pytest.raises(TooLargeError):
            form.to_numpy()
    with pytest.raises(TooLargeError, match=r"low_rank\(\) or operator\(\)"):
        F.dense()


def test_rows_of_large_outputs_come_in_pieces(monkeypatch):
    """1,000 outputs of one number each: F of the kernel is the mean of x xᵀ for each of them."""
    monkeypatch.setattr(_rows_of, "_AT_ONCE", 2**19)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1000, use_bias=False)])
    x = random(2, 3).astype("f4")
    F = pj.Engine(model).fisher(x, likelihood="gaussian", reduction="sum")
    parts = list(F.rows())
    assert len(parts) > 10
    assert all(part.nbytes <= 2**19 for part in parts)
    wanted = np.repeat(np.square(x.astype("f8")).sum(0)[:, None], 1000, 1).ravel()
    assert near(F.diagonal().diagonal(), wanted, 1e-6)
    assert F.trace() == pytest.approx(wanted.sum(), rel=1e-6)


def test_formed_rows_count_for_how_many_come_at_once(monkeypatch):
    monkeypatch.setattr(_rows_of, "_AT_ONCE", 2**16)
    F = of_kind({"likelihood": "gaussian"}, count=40)
    most = max(part.shape[0] * part.shape[1] for part in F.rows(16 * F.shape[0]))
    assert 16 * F.shape[0] * most <= 2**16
    assert most < max(part.shape[0] * part.shape[1] for part in F.rows())


def test_the_cheapest_exact_form_is_taken(monkeypatch):
    from perjac.fisher import information as room

    F = of_kind({})
    assert type(F.exact()) is type(F.dense())
    monkeypatch.setattr(room, "_SMALL", 10)
    assert type(of_kind({}).exact()) is type(F.low_rank())
    monkeypatch.setattr(room, "_GRAM", 10)
    assert type(of_kind({}).exact()) is type(F.operator())
    v = random(F.shape[0])
    assert near(of_kind({}).solve(v, 0.1), F.solve(v, 0.1), 1e-8)


# What is refused


def plainly(**options):
    return lambda: of_kind(options)


def with_data(make, **options):
    return lambda: of_kind({"likelihood": "categorical", **options}, make)


def asked(question, **options):
    return lambda: question(of_kind({"likelihood": "categorical", **options}))


X = random(4, 6, seed=1)
REFUSED = {
    "kind": (plainly(kind="true"), InputError, "kind= one of .*'true'"),
    "reduction": (plainly(reduction="max"), InputError, "reduction= one of .*'max'"),
    "samples": (plainly(kind="sampled", samples=0), InputError, "samples="),
    "seed": (plainly(kind="sampled", seed=-1), InputError, "seed="),
    "variance": (
        plainly(likelihood="gaussian", variance=-1.0), InputError, "variance= above zero.*-1.0",
    ),
    "variance of classes": (plainly(variance=2.0), InputError, "of likelihood='gaussian'.*2.0"),
    "variance of gradients": (
        plainly(kind="empirical", loss="mse", likelihood="gaussian", variance="fitted"),
        InputError, "of likelihood='gaussian'",
    ),
    "loss of another kind": (plainly(loss="mse"), InputError, "give it as likelihood="),
    "no such loss": (plainly(likelihood="categoricl"), UnknownNameError, "categoricl"),
    "no loss at all": (plainly(likelihood=3), InputError, "loss="),
    "draws of a loss": (plainly(kind="sampled", likelihood="mse"), InputError, "Labels can be dr"),
    "not compiled": (plainly(kind="empirical"), InputError, "not compiled"),
    "output of a loss": (plainly(kind="empirical", loss="mse", of="x"), InputError, "of='x'"),
    "no such weight": (plainly(wrt="kernal"), UnknownNameError, "kernal"),
    "inputs": (plainly(wrt="inputs"), InputError, "wrt= as weights"),
    "inputs of a loss": (
        plainly(kind="empirical", loss="mse", wrt="inputs"), InputError, "wrt= as weights",
    ),
    "no labels": (with_data(lambda x, y: x, likelihood="mse"), InputError, "needs labels"),
    "no labels for gradients": (
        with_data(lambda x, y: x, kind="empirical", loss="mse"), InputError, "needs labels",
    ),
    "no labels to fit": (
        with_data(lambda x, y: x, likelihood="gaussian", variance="fitted"),
        InputError, "needs labels",
    ),
    "other labels to fit": (
        with_data(lambda x, y: (x, y[:, :2]), likelihood="gaussian", variance="fitted"),
        InputError, r"labels of shape \(11, 4\).*\(11, 2\)",
    ),
    "perfect fit": (
        with_data(
            lambda x, y: (x, subject("mlp", "float64").call(x)),
            likelihood="gaussian", variance="fitted",
        ),
        InputError, "variance='fitted' is zero",
    ),
    "other labels": (
        with_data(lambda x, y: (x, y[:, :3]), likelihood="mse"), InputError, "does not take labels",
    ),
    "triple": (with_data(lambda x, y: (x, y, y)), InputError, "tuple of 3"),
    "fewer labels": (with_data(lambda x, y: (x, y[:5])), InputError, "as many labels.*5, 11"),
    "nobody": (with_data(lambda x, y: x[:0]), InputError, "at least one"),
    "empty": (
        with_data(lambda x, y: tf.data.Dataset.from_tensor_slices(x[:0]).batch(2)),
        InputError, "empty data set",
    ),
    "endless": (
        with_data(lambda x, y: tf.data.Dataset.from_tensor_slices(x).batch(2).repeat()),
        InputError, "repeats for ever",
    ),
    "iterator": (with_data(lambda x, y: iter([x])), InputError, "used up"),
    "numbers": (with_data(lambda x, y: np.float64(3)), InputError, "batches of examples"),
    "groups": (asked(lambda F: F.blocks([F.keys[:2]])), InputError, "groups="),
    "short": (asked(lambda F: F.solve(X[0])), InputError, "vector"),
    "shape": (asked(lambda F: F.solve({F.keys[0]: X})), InputError, "of shape"),
    "variable": (asked(lambda F: F.solve({3: X})), UnknownNameError, "name of a weight.*3"),
    "key": (asked(lambda F: F.solve({"kernul": X})), UnknownNameError, "kernul"),
    "damping": (asked(lambda F: F.solve(np.ones(F.shape[0]), -1.0)), InputError, "damping=.*-1.0"),
    "nan damping": (asked(lambda F: F.logdet(np.nan)), InputError, "damping=.*nan"),
    "no damping": (asked(lambda F: F.effective_dimension(0)), InputError, "damping=.*0"),
    "singular": (asked(lambda F: F.dense().solve(np.ones(F.shape[0]))), NotPositiveError, "singul"),
    "singular too": (asked(lambda F: F.low_rank().logdet()), NotPositiveError, "singular"),
    "k": (asked(lambda F: F.dense().eigsh(0)), InputError, "k= from 1"),
    "more than the rank": (asked(lambda F: F.low_rank().eigsh(45)), InputError, "the rank"),
    "all": (asked(lambda F: F.operator().eigsh(F.shape[0])), InputError, "k= from 1"),
    "all eigenvalues": (asked(lambda F: F.operator().eigenvalues()), InputError, "spectral_dens"),
    "undamped": (asked(lambda F: F.operator().logdet()), InputError, "damping= above zero"),
    "undamped draws": (asked(lambda F: F.operator().sample()), InputError, "damping="),
    "draws": (asked(lambda F: F.dense().sample(0, 1.0)), InputError, "count="),
    "other form": (asked(lambda F: F.dense().merge(F.blocks())), InputError, "same blocks"),
    "other weights": (
        asked(lambda F: F.dense().merge(of_kind({}, wrt=F.keys[0]).dense())),
        InputError, "same form",
    ),
    "form of another kind": (
        asked(lambda F: F.low_rank().merge(F.dense())), InputError, "same form",
    ),
    "other reduction": (
        asked(lambda F: F.dense().merge(of_kind({"reduction": "sum"}).dense())),
        InputError, "reduction='mean'.*'sum'",
    ),
    "other kind": (
        asked(lambda F: F.low_rank().merge(
            of_kind({"likelihood": "gaussian", "variance": 0.5}).low_rank())),
        InputError, "count 2 times as much",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_and_how(what):
    ask, kind, match = REFUSED[what]
    with pytest.raises(kind, match=match):
        ask()


def test_labels_out_of_range_are_named():
    y = np.array([0, 1, 5, 2])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with pytest.raises(OutOfRangeError, match="Label 5 of example 2"):
        of_kind({"likelihood": loss}, lambda x, _: (x[:4], y)).dense()


def test_a_loss_that_is_not_convex_is_refused_at_its_example():
    def bumps(y, f):
        return tf.reduce_sum(tf.cos(f - tf.cast(y, f.dtype)), -1)

    y = outputs_of("mlp").copy() + np.pi
    y[1] -= np.pi
    F = engine("mlp", "float64", "auto").fisher((subject("mlp", "float64").x, y), likelihood=bumps)
    with pytest.raises(NotPositiveError, match="bumps.*not convex in the output at example 1"):
        F.dense()


def test_the_output_has_to_be_logits():
    softmax, sigmoid = classifier("softmax", 3), classifier("sigmoid", 2)
    x = random(4, 5)
    with pytest.raises(InputError, match="ends with a Sigmoid"):
        pj.Engine(sigmoid).fisher(x, likelihood="categorical")
    with pytest.raises(InputError, match="ends with a Softmax"):
        pj.Engine(softmax).fisher(x, likelihood="bernoulli")
    with pytest.raises(InputError, match="choose 'bernoulli'"):
        pj.Engine(classifier("linear", 1)).fisher(x, likelihood="categorical")


def test_a_weight_that_the_output_does_not_need_has_no_information():
    w, idle = (tf.Variable(random(3, 2)) for _ in range(2))
    made = pj.Engine(lambda x: x @ w, variables=[w, idle])
    with pytest.warns(DisconnectedWarning):
        found = made.fisher(random(4, 3), likelihood="gaussian").dense()
    assert np.count_nonzero(found.diagonal()) == 6
