"""Stochastic estimates lie as far from the exact value as they say, and no further."""

from __future__ import annotations

import pickle
from typing import Any

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import scipy.integrate
from models import floats, randomise
from scipy.sparse.linalg import LinearOperator

import perjac as pj
from perjac.errors import InputError, NotConvergedError
from perjac.fisher import lanczos
from perjac.fisher.stochastic import (
    Estimate,
    hutchpp_trace,
    spectral_density,
    stochastic_diagonal,
    stochastic_effective_dimension,
    stochastic_logdet,
)

pytestmark = pytest.mark.slow  # left out of `make check`

SIZE = 80
SEEDS = range(40)
SPECTRA = {
    "geometric": 10.0 ** (-np.arange(SIZE) / 14),
    "power": 1 / np.arange(1, SIZE + 1) ** 1.5,
    "flat": np.linspace(0.5, 1.5, SIZE),
    "outliers": np.r_[50.0, 20.0, 10.0, np.full(SIZE - 3, 0.1) + 0.05 * np.arange(SIZE - 3) / SIZE],
}


def matrix(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """A symmetric matrix of these eigenvalues."""
    size = len(values)
    vectors = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    return (vectors * values) @ vectors.T


def logdet(values: np.ndarray, damping: float) -> float:
    return float(np.log(values + damping).sum())


def dimension(values: np.ndarray, damping: float) -> float:
    return float((values / (values + damping)).sum())


OF_SPECTRUM = {
    "logdet": (stochastic_logdet, logdet),
    "effective_dimension": (stochastic_effective_dimension, dimension),
}
each_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)
each_question = pytest.mark.parametrize("question", OF_SPECTRUM)


class Counting(LinearOperator):
    """Counts the vectors that it is given."""

    def __init__(self, held: np.ndarray):
        self.held, self.products = held, 0
        super().__init__(held.dtype, held.shape)

    def _matvec(self, v):
        self.products += 1
        return self.held @ v

    def _matmat(self, v):
        self.products += v.shape[1]
        return self.held @ v


def assert_covered(errors: Any, standard_errors: Any, within: float = 0.95) -> None:
    """Assert that errors are as large as their standard errors say, and of no sign.

    With 10 probes the ratio follows Student's t, which exceeds 4 in 0.3 % of cases; skew adds some.
    """
    ratios = np.asarray(errors) / np.asarray(standard_errors)
    assert np.mean(np.abs(ratios) <= 4) >= within
    assert 0.6 <= np.std(ratios) <= 1.8
    spread = np.std(errors) / np.sqrt(len(ratios))
    assert abs(np.mean(errors)) <= 4 * spread  # unbiased


@each_spectrum
def test_hutchpp_errors_are_as_told(spectrum):
    a = matrix(SPECTRA[spectrum])
    found = [hutchpp_trace(a, 30, seed) for seed in SEEDS]
    assert_covered([one - np.trace(a) for one in found], [one.standard_error for one in found])


@each_spectrum
def test_diagonal_errors_are_as_told(spectrum):
    a = matrix(SPECTRA[spectrum])
    found = [stochastic_diagonal(a, 30, seed) for seed in range(20)]
    errors = np.ravel([one.values - np.diag(a) for one in found])
    assert_covered(errors, np.ravel([one.standard_errors for one in found]))


@each_question
@each_spectrum
@pytest.mark.parametrize("deflate", [0, 8])
def test_quadrature_errors_are_as_told(question, spectrum, deflate):
    ask, exact = OF_SPECTRUM[question]
    values = SPECTRA[spectrum]
    a, damping = matrix(values), 0.01
    found = [ask(a, damping, seed=seed, steps=40, deflate=deflate) for seed in SEEDS]
    assert max(one.truncation for one in found) <= 0.05 * found[0].standard_error
    errors = [one - exact(values, damping) for one in found]
    assert_covered(errors, [one.standard_error for one in found])


@each_question
@each_spectrum
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16])
def test_truncation_bounds_what_more_steps_would_change(question, spectrum, steps):
    ask = OF_SPECTRUM[question][0]
    a, damping = matrix(SPECTRA[spectrum]), 1e-3
    for seed in range(3):
        short, full = (ask(a, damping, 2, n, seed=seed) for n in (steps, SIZE))
        assert full.truncation <= 1e-9 * abs(full)
        assert abs(short - full) <= short.truncation * (1 + 1e-9) + 1e-9 * abs(full)
        assert short.truncation <= 1e3 * abs(full)  # a bound that says something


@each_question
def test_more_steps_narrow_the_bounds(question):
    ask, a = OF_SPECTRUM[question][0], matrix(SPECTRA["geometric"])
    widths = [ask(a, 1e-3, 2, steps).truncation for steps in (2, 5, 10, 20, 40)]
    assert np.all(np.diff(widths) < 0)
    assert widths[-1] < 1e-2 * widths[0]


@each_question
@pytest.mark.parametrize("rank", [0, 1, 7])
def test_exact_where_all_that_is_not_zero_is_deflated(question, rank):
    ask, exact = OF_SPECTRUM[question]
    values = np.r_[np.geomspace(1, 10, rank), np.zeros(SIZE - rank)]
    found = ask(matrix(values), 0.1, probes=2, deflate=rank)
    assert found == pytest.approx(exact(values, 0.1), rel=1e-8, abs=1e-8)
    assert found.standard_error <= 1e-7
    assert found.truncation <= 1e-7


@pytest.mark.parametrize("rank", [0, 1, 10])
def test_hutchpp_and_the_diagonal_are_exact_for_what_has_a_small_rank(rank):
    a = matrix(np.r_[np.geomspace(1, 10, rank), np.zeros(SIZE - rank)])
    trace, diagonal = hutchpp_trace(a, 30), stochastic_diagonal(a, 30)
    assert trace == pytest.approx(np.trace(a), rel=1e-10, abs=1e-10)
    assert trace.standard_error <= 1e-9
    assert np.allclose(diagonal.values, np.diag(a), atol=1e-10)
    assert diagonal.standard_errors.max() <= 1e-9


@pytest.mark.parametrize("size", [1, 2, 5])
def test_exact_where_the_products_span_everything(size):
    a = matrix(np.arange(1.0, size + 1))
    trace, diagonal = hutchpp_trace(a, 30), stochastic_diagonal(a, 30)
    assert trace == pytest.approx(np.trace(a))
    assert trace.standard_error == 0
    assert np.allclose(diagonal.values, np.diag(a))
    assert stochastic_logdet(a, 0.5, deflate=size - 1) == pytest.approx(
        np.linalg.slogdet(a + 0.5 * np.eye(size))[1]
    )


@hypothesis.given(
    values=st.lists(st.floats(0, 1e3), min_size=2, max_size=12),
    damping=st.floats(1e-3, 10),
    seed=st.integers(0, 100),
)
@hypothesis.settings(max_examples=30)
@pytest.mark.parametrize("question", OF_SPECTRUM)
def test_exact_with_one_direction_left(question, values, damping, seed):
    """In a space of one dimension every probe says the same."""
    ask, exact = OF_SPECTRUM[question]
    values = np.array(values)
    found = ask(matrix(values, seed), damping, 2, 12, len(values) - 1, seed)
    assert found == pytest.approx(exact(values, damping), rel=1e-6, abs=1e-6)


def test_of_a_multiple_of_the_identity_one_probe_knows_everything():
    a = 3.0 * np.eye(SIZE)
    for seed in range(3):
        assert stochastic_logdet(a, 1.0, 1, 5, seed=seed) == pytest.approx(SIZE * np.log(4))
        assert stochastic_effective_dimension(a, 1.0, 1, 5) == pytest.approx(0.75 * SIZE)
        density = spectral_density(a, 1, 5, seed)
        assert density.nodes == pytest.approx(3.0)
        assert density.weights == pytest.approx(1.0)


def test_signs_see_a_diagonal_as_it_is():
    """g ∘ D g is the diagonal of D for signs g, so nothing is left to chance."""
    a = np.diag(SPECTRA["power"])
    a[0, 1] = a[1, 0] = 0.5
    found = stochastic_diagonal(a, 90)
    errors = np.abs(found.values - np.diag(a))
    assert np.all(errors <= 5 * found.standard_errors + 1e-12)
    assert found.standard_errors.max() < 0.05


# The spectral density


@each_spectrum
def test_densities_are_as_far_off_as_told(spectrum):
    values = SPECTRA[spectrum]
    a, width = matrix(values), 0.1 * values.max()
    points = np.linspace(values.min(), values.max(), 7)
    z = (points[:, None] - values) / width
    exact = np.exp(-(z**2) / 2).mean(1) / (np.sqrt(2 * np.pi) * width)
    found = [spectral_density(a, 20, 40, seed).density(points, width) for seed in SEEDS]
    for n in range(len(points)):
        errors = [density[n] - exact[n] for density, _ in found]
        assert_covered(errors, [told[n] for _, told in found])


def test_moments_of_the_density_are_those_of_the_matrix():
    a = matrix(SPECTRA["flat"])
    density = spectral_density(a, 4, 6, seed=1)
    assert density.weights.sum(1) == pytest.approx(1)
    z = np.random.default_rng([1, 3]).standard_normal((SIZE, 4))  # the probes
    z *= np.sqrt(SIZE) / np.linalg.norm(z, axis=0)
    image = z
    for power in range(12):  # a rule of 6 nodes is exact up to the 11th
        wanted = np.sum(z * image, 0) / SIZE
        assert np.sum(density.weights * density.nodes**power, 1) == pytest.approx(wanted)
        image = a @ image


def test_counts_above_a_threshold():
    values = SPECTRA["outliers"]
    found = spectral_density(matrix(values), 10, 30).above(5.0)
    assert abs(found - 3) <= 4 * found.standard_error
    assert found.standard_error < 2
    assert found.products == 300


def test_smoothed_densities_have_a_mass_of_one():
    density = spectral_density(matrix(SPECTRA["flat"]), 3, 10)
    points = np.linspace(-1, 3, 2001)
    assert scipy.integrate.trapezoid(density.density(points, 0.1)[0], points) == pytest.approx(1)


# Lanczos


@pytest.mark.parametrize("damping", [1.0, 1e-4, 1e-8])
def test_inverse_roots(damping):
    values = SPECTRA["geometric"]
    a = matrix(values)
    for seed in range(3):
        z = np.random.default_rng(seed).standard_normal(SIZE)
        spectrum, vectors = np.linalg.eigh(a)
        wanted = vectors @ ((vectors.T @ z) / np.sqrt(spectrum + damping))
        found = lanczos.inverse_root(a, z, damping)
        assert np.linalg.norm(found - wanted) <= 2e-8 * np.linalg.norm(wanted)


def test_inverse_roots_of_nothing():
    assert np.array_equal(lanczos.inverse_root(np.eye(4), np.zeros(4), 1.0), np.zeros(4))
    z = np.array([1.0, 2.0, -1.0])
    assert lanczos.inverse_root(np.zeros((3, 3)), z, 4.0) == pytest.approx(z / 2)


def test_inverse_roots_that_take_too_long_are_told(monkeypatch):
    monkeypatch.setattr(lanczos, "_MOST_STEPS", 4)
    with pytest.raises(NotConvergedError, match="in 4 steps"):
        lanczos.inverse_root(matrix(SPECTRA["geometric"]), np.ones(SIZE), 1e-6)


@pytest.mark.parametrize("damping", [1.0, 1e-4])
def test_conjugate_gradients(damping):
    a = matrix(SPECTRA["geometric"]) + damping * np.eye(SIZE)
    right = np.random.default_rng(0).standard_normal((SIZE, 4)) * [1.0, 1e6, 1e-6, 0.0]
    counting = Counting(a)
    found = lanczos.conjugate_gradients(counting.matmat, right, 1e-10)
    left = np.linalg.norm(a @ found - right, axis=0)
    assert np.all(left <= 1e-8 * np.linalg.norm(right, axis=0))
    assert np.array_equal(found[:, 3], np.zeros(SIZE))
    assert counting.products <= 3 * 10 * SIZE
    assert np.allclose(
        found[:, 1], lanczos.conjugate_gradients(lambda v: a @ v, right[:, 1:2], 1e-10)[:, 0]
    )


def test_conjugate_gradients_do_not_solve_what_has_no_solution():
    a = np.diag([1.0, 0.0])
    with pytest.raises(NotConvergedError, match="without curvature"):
        lanczos.conjugate_gradients(lambda v: a @ v, np.array([[0.0], [1.0]]), 1e-10)
    with pytest.raises(NotConvergedError, match="20 steps|without curvature"):
        lanczos.conjugate_gradients(lambda v: a @ v, np.array([[1.0], [1.0]]), 1e-10)


def test_krylov_vectors_stay_orthogonal():
    """Without orthogonalisation copies of large eigenvalues appear after some twenty steps."""
    values = 10.0 ** (-np.arange(SIZE) / 6)
    density = spectral_density(matrix(values), 2, 60)
    for nodes, weights in zip(density.nodes, density.weights, strict=True):
        large = nodes[nodes > 1.2e-3]
        assert len(large) == np.sum(values > 1.2e-3)
        assert np.sort(large)[::-1] == pytest.approx(values[: len(large)], rel=1e-8)
        assert weights.min() >= 0


def test_spaces_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    a = matrix(SPECTRA["power"])
    together = spectral_density(a, 7, 9)
    monkeypatch.setattr(lanczos, "_AT_ONCE", 8 * SIZE * 9 * 2)
    apart = spectral_density(a, 7, 9)
    assert np.allclose(together.nodes, apart.nodes)
    assert np.allclose(together.weights, apart.weights)


def test_spaces_that_end_early_leave_the_others_alone():
    """A probe of a matrix of four eigenvalues spans at most four dimensions."""
    values = np.repeat([1.0, 2.0, 3.0, 10.0], SIZE // 4)
    density = spectral_density(matrix(values), 3, 50)
    assert density.products <= 3 * 6
    kept = density.weights > 1e-9
    assert np.all(kept.sum(1) == 4)
    assert np.allclose(np.sort(density.nodes[0][kept[0]]), [1, 2, 3, 10])
    assert stochastic_logdet(matrix(values), 1.0, 2, 50).truncation <= 1e-9


# What an estimate is


def test_products_are_counted():
    asked = {
        "trace": lambda a: hutchpp_trace(a, 31),
        "diagonal": lambda a: stochastic_diagonal(a, 31),
        "small": lambda a: hutchpp_trace(a, 3 * SIZE + 9),
        "logdet": lambda a: stochastic_logdet(a, 0.1, 3, 7),
        "deflated": lambda a: stochastic_logdet(a, 0.1, 3, 7, deflate=4),
        "density": lambda a: spectral_density(a, 3, 7),
    }
    for what, ask in asked.items():
        a = Counting(matrix(SPECTRA["power"]))
        assert ask(a).products == a.products, what


def test_seeds_are_all_that_chance_depends_on():
    a = matrix(SPECTRA["power"])
    for ask in (hutchpp_trace, lambda a, seed: stochastic_logdet(a, 0.1, 3, 9, seed=seed)):
        assert ask(a, seed=1) == ask(a, seed=1)
        assert ask(a, seed=1) != ask(a, seed=2)


def test_estimates_are_floats():
    found = Estimate(2.5, 0.25, 0.125, products=40)
    assert isinstance(found, float)
    assert (found + 1, f"{found:.1f}") == (3.5, "2.5")
    assert repr(found) == "2.5 ± 0.2 ± 0.1 (cut off), 40 products"
    again = pickle.loads(pickle.dumps(found))
    assert (again, again.standard_error, again.truncation, again.products) == (2.5, 0.25, 0.125, 40)


def test_one_probe_does_not_tell_its_error():
    assert stochastic_logdet(matrix(SPECTRA["power"]), 0.1, probes=1).standard_error == np.inf


# Forms


@pytest.fixture(scope="module")
def fisher() -> pj.fisher.Fisher:
    with floats("float64"):
        model = keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.Dense(9, activation="tanh"),
                keras.layers.Dense(4),
            ]
        )
    randomise(model.weights)
    x = np.random.default_rng(0).standard_normal((30, 5))
    return pj.Engine(model).fisher(x, likelihood="categorical")


def test_forms_and_operators_are_what_estimates_take(fisher):
    dense, operator = fisher.dense(), fisher.operator()
    exact = dense.trace()
    for form in (dense, fisher.diagonal(), operator):
        found = hutchpp_trace(form, 60)
        assert abs(found - exact) <= 5 * found.standard_error + 1e-9
    diagonal = stochastic_diagonal(operator, 60)
    ratios = (diagonal.values - dense.diagonal()) / (diagonal.standard_errors + 1e-12)
    assert np.mean(np.abs(ratios) <= 4) >= 0.95


@pytest.mark.parametrize("question", ["logdet", "effective_dimension"])
def test_an_operator_estimates_what_the_matrix_knows(fisher, question):
    operator, exact = fisher.operator(), getattr(fisher.dense(), question)(0.01)
    found = getattr(operator, question)(0.01, steps=30)
    assert 0 < found.standard_error < 0.2 * abs(exact)
    assert abs(found - exact) <= 4.5 * found.standard_error + found.truncation
    deflated = getattr(operator, question)(0.01, steps=30, deflate=40)
    assert abs(deflated - exact) <= 4.5 * deflated.standard_error + deflated.truncation
    assert deflated.standard_error < found.standard_error


def test_spectral_densities_of_forms(fisher):
    exact, found = fisher.dense().spectral_density(), fisher.operator().spectral_density(20, 40)
    assert exact.products == 0
    assert exact.above(0.01).standard_error == 0
    assert exact.above(0.01) == pytest.approx(np.sum(fisher.dense().eigenvalues() > 0.01))
    counted = found.above(0.01)
    assert abs(counted - exact.above(0.01)) <= 4 * counted.standard_error
    points = np.linspace(0, exact.nodes.max(), 5)
    values, told = found.density(points, 0.05)
    wanted, nothing = exact.density(points, 0.05)
    assert np.all(np.abs(values - wanted) <= 4.5 * told + 1e-9)
    assert np.array_equal(nothing, np.zeros(5))
    low = fisher.low_rank().spectral_density()
    assert np.allclose(low.nodes, exact.nodes, atol=1e-10)


@pytest.mark.parametrize(
    ("ask", "match"),
    [
        (lambda a: hutchpp_trace(a, 5), "products="),
        (lambda a: stochastic_logdet(a, 0.0), "damping= above zero.*0.0"),
        (lambda a: stochastic_logdet(a, -1), "damping= above zero.*-1"),
        (lambda a: stochastic_effective_dimension(a, np.nan), "damping= above zero.*nan"),
        (lambda a: stochastic_logdet(a, 1.0, probes=0), "probes="),
        (lambda a: stochastic_logdet(a, 1.0, steps=0), "steps="),
        (lambda a: stochastic_logdet(a, 1.0, deflate=-1), "deflate="),
        (lambda a: spectral_density(a, 0), "probes="),
        (lambda a: spectral_density(a).density([0.0], 0), "width="),
    ],
)
def test_what_is_refused(ask, match):
    with pytest.raises(InputError, match=match):
        ask(np.eye(3))
