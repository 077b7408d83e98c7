"""The Laplace approximation is what NumPy makes of the oracle's Jacobians; exact where it is."""

from __future__ import annotations

import functools

import keras
import numpy as np
import oracle
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from keras import layers
from models import floats, randomise
from subjects import engine as engine_of
from subjects import subject

import perjac as pj
from perjac.errors import InputError
from perjac.fisher.evidence import Evidence, Fit
from perjac.fisher.information import Fisher
from perjac.fisher.laplace import last_layer

pytestmark = pytest.mark.slow

FORMS = ["last_layer", "full", "low_rank", "blocks", "diagonal"]
KRONECKER = [name for name in ("kronecker", "eigenbasis") if hasattr(Fisher, name)]
# "final" names the model's last activation; labels are of each kind's shape.
LIKELIHOODS = ["categorical", "bernoulli", "gaussian"]
FINAL = {"categorical": "softmax", "bernoulli": "sigmoid", "gaussian": None}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def near(found, expected, rtol: float = 1e-10) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * scale)


# Linear regression, where the approximation is exact


INPUTS, OUTPUTS, COUNT, PRECISION, VARIANCE = 3, 2, 20, 0.7, 0.3


class Regression:
    """A linear model at the mean of its posterior, and that posterior by its closed form."""

    def __init__(self):
        with floats("float64"):
            self.model = keras.Sequential(
                [keras.Input((INPUTS,)), layers.Dense(OUTPUTS, name="top")]
            )
        self.engine = pj.Engine(self.model)
        self.x = rng(1).standard_normal((COUNT, INPUTS))
        self.y = self.x @ rng(2).standard_normal((INPUTS, OUTPUTS)) + rng(3).standard_normal(
            (COUNT, OUTPUTS)
        )
        # One output is one regression on (x, 1); kernel entries are ordered (input, output).
        self.design = np.c_[self.x, np.ones(COUNT)]
        self.gram = self.design.T @ self.design
        self.covariance = np.linalg.inv(self.gram / VARIANCE + PRECISION * np.eye(INPUTS + 1))
        self.mean = self.covariance @ self.design.T @ self.y / VARIANCE  # (I + 1, O)
        self.model.layers[0].set_weights([self.mean[:-1], self.mean[-1]])

    def laplace(self, **options) -> pj.fisher.Laplace:
        given = {"prior_precision": PRECISION, "variance": VARIANCE, "form": "full"} | options
        return pj.fisher.laplace(self.engine, (self.x, self.y), likelihood="gaussian", **given)


@functools.cache
def regression() -> Regression:
    return Regression()


@pytest.mark.parametrize("form", ["full", "last_layer", "low_rank", "blocks"])
def test_linear_regression_has_its_exact_posterior(form):
    r = regression()
    posterior = r.laplace(form=form)
    near(posterior.mean, np.r_[np.ravel(r.mean[:-1]), r.mean[-1]])
    near(posterior.solve(np.eye(8)), np.kron(r.covariance, np.eye(OUTPUTS)))


def test_linear_regression_has_its_exact_predictive_distribution():
    r = regression()
    x = rng(5).standard_normal((7, INPUTS))
    new = np.c_[x, np.ones(7)]
    found = r.laplace().predict(x, covariance=True)
    variance = np.einsum("bi,ij,bj->b", new, r.covariance, new)
    near(found.mean, new @ r.mean)
    near(found.variance, np.c_[variance, variance])
    near(found.label_variance, np.c_[variance, variance] + VARIANCE)
    near(found.covariance, variance[:, None, None] * np.eye(OUTPUTS))


def test_linear_regression_has_its_exact_evidence():
    r = regression()
    between = r.design @ r.design.T / PRECISION + VARIANCE * np.eye(COUNT)
    expected = scipy.stats.multivariate_normal(np.zeros(COUNT), between).logpdf(r.y.T).sum()
    assert r.laplace().log_marginal_likelihood() == pytest.approx(expected, rel=1e-10)


def test_the_effective_dimension_is_the_number_of_well_determined_parameters():
    r = regression()
    values = np.repeat(np.linalg.eigvalsh(r.gram) / VARIANCE, OUTPUTS)
    expected = np.sum(values / (values + PRECISION))
    assert r.laplace().effective_dimension() == pytest.approx(expected, rel=1e-10)


def evidence_by_determinants(r: Regression, precision: float, variance: float) -> float:
    theta, scatter = r.laplace().mean, np.sum((r.y - r.design @ r.mean) ** 2)
    posterior = np.kron(r.gram, np.eye(OUTPUTS)) / variance + precision * np.eye(len(theta))
    likelihood = -0.5 * (scatter / variance + r.y.size * np.log(2 * np.pi * variance))
    ratio = np.linalg.slogdet(posterior)[1] - len(theta) * np.log(precision)
    return likelihood - 0.5 * (precision * theta @ theta + ratio)


@pytest.mark.parametrize(("precision", "variance"), [(0.1, 0.3), (1.0, 2.0), (30.0, 0.05)])
def test_evidence_elsewhere_is_that_of_the_determinants(precision, variance):
    r = regression()
    found = r.laplace().at(precision, variance).log_marginal_likelihood()
    assert found == pytest.approx(evidence_by_determinants(r, precision, variance), rel=1e-10)


@pytest.mark.parametrize("fitted", ["prior_precision", "variance", "both"])
def test_fitted_numbers_have_the_largest_evidence(fitted):
    r = regression()
    names = ["prior_precision", "variance"] if fitted == "both" else [fitted]
    posterior = r.laplace(**dict.fromkeys(names, "fitted"))
    fixed = {"prior_precision": PRECISION, "variance": VARIANCE}

    def loss(logs):
        numbers = fixed | dict(zip(names, np.exp(logs), strict=True))
        return -evidence_by_determinants(r, *numbers.values())

    best = scipy.optimize.minimize(loss, np.zeros(len(names)), tol=1e-12)
    for name, log in zip(names, best.x, strict=True):
        assert getattr(posterior, name) == pytest.approx(np.exp(log), rel=1e-4)
    assert posterior.log_marginal_likelihood() >= -best.fun - 1e-9
    for name in set(fixed) - set(names):
        assert getattr(posterior, name) == fixed[name]


@pytest.mark.parametrize("when", ["at once", "later"])
def test_fitted_numbers_are_mackays_fixed_point(when):
    r, fitted = regression(), ("fitted", "fitted")
    if when == "later":
        posterior = r.laplace().at(*fitted)
    else:
        posterior = r.laplace(prior_precision=fitted[0], variance=fitted[1])
    theta, gamma = posterior.mean, posterior.effective_dimension()
    residual = np.sum((r.y - r.design @ r.mean) ** 2)
    assert posterior.prior_precision == pytest.approx(gamma / (theta @ theta), rel=1e-10)
    assert posterior.variance == pytest.approx(residual / (r.y.size - gamma), rel=1e-10)


def test_the_prior_may_have_another_mean():
    r = regression()
    zero, two = r.laplace(), r.laplace(prior_mean=2.0)
    near(two.solve(np.eye(8)), zero.solve(np.eye(8)))
    distances = [np.sum((zero.mean - m) ** 2) for m in (0, 2)]
    lost = zero.log_marginal_likelihood() - two.log_marginal_likelihood()
    assert lost == pytest.approx(0.5 * PRECISION * (distances[1] - distances[0]), rel=1e-9)


sizes = st.integers(1, 6)
positive = st.floats(-3, 3).map(lambda log: 10**log)


@given(
    values=st.lists(st.one_of(st.just(0.0), positive), min_size=1, max_size=6),
    distance=positive, squares=positive, count=sizes, other=st.tuples(positive, positive),
)  # fmt: skip
def test_no_other_pair_has_more_evidence(values, distance, squares, count, other):
    evidence = Evidence(np.array([*values, 1.0]), distance, Fit(0.0, squares, count))
    best = evidence.best(None, None)
    assert evidence.at(*best) >= evidence.at(*other) - 1e-9
    for factor in (0.99, 1.01):
        assert evidence.at(*best) >= evidence.at(best[0] * factor, best[1]) - 1e-12
        assert evidence.at(*best) >= evidence.at(best[0], best[1] * factor) - 1e-12


def test_where_the_data_determines_next_to_nothing_the_variance_is_the_residuals():
    evidence = Evidence(np.array([1e-25, 0.0]), 1.0, Fit(0.0, 6.0, 3))
    assert evidence.best(1.0, None) == pytest.approx((1.0, 2.0), rel=1e-12)
    assert evidence.best(None, None)[1] == pytest.approx(2.0, rel=1e-10)


# Networks


class Network:
    """A small network with a likelihood, its data, and what the oracle says of them."""

    def __init__(self, likelihood: str):
        self.likelihood, units = likelihood, 3
        with floats("float64"):
            hidden = layers.Dense(4, activation="tanh", name="low")
            top = layers.Dense(units, name="top")
            self.logits = keras.Sequential([keras.Input((2,)), hidden, top])
            end = [layers.Activation(FINAL[likelihood])] if FINAL[likelihood] else []
            self.model = keras.Sequential([keras.Input((2,)), hidden, top, *end])
        randomise(self.model.weights, seed=4)
        self.engine = pj.Engine(self.model)
        self.x, self.new = rng(1).standard_normal((9, 2)), rng(2).standard_normal((5, 2))
        self.y = {
            "categorical": rng(3).integers(0, units, 9),
            "bernoulli": rng(3).integers(0, 2, (9, units)),
            "gaussian": rng(3).standard_normal((9, units)),
        }[likelihood]
        self.f = np.asarray(self.logits(self.x))
        self.rows, self.new_rows = self._rows(self.x), self._rows(self.new)
        self.slices = {"low": slice(0, 12), "top": slice(12, 27)}

    def _rows(self, x) -> np.ndarray:
        """Return the Jacobian of the logits, (B, K, P)."""
        found = oracle.weight_rows(self.logits, x, self.logits.trainable_variables)
        return np.concatenate([r.reshape(*r.shape[:2], -1) for r in found], 2)

    def hessians(self) -> np.ndarray:
        """Return the Hessians of -log p(y|f) by f, (B, K, K), at σ² = 1."""
        if self.likelihood == "gaussian":
            return np.tile(np.eye(3), (9, 1, 1))
        if self.likelihood == "bernoulli":
            p = scipy.special.expit(self.f)
            return np.einsum("bk,kl->bkl", p * (1 - p), np.eye(3))
        p = scipy.special.softmax(self.f, -1)
        return np.einsum("bk,kl->bkl", p, np.eye(3)) - np.einsum("bk,bl->bkl", p, p)

    def matrix(self, form: str) -> np.ndarray:
        """Return N·F in one of its forms."""
        whole = np.einsum("bkp,bkl,blq->pq", self.rows, self.hessians(), self.rows)
        if form == "last_layer":
            return whole[self.slices["top"], self.slices["top"]]
        if form == "diagonal":
            return np.diag(np.diag(whole))
        if form == "blocks":
            return np.block(
                [[whole[:12, :12], np.zeros((12, 15))], [np.zeros((15, 12)), whole[12:, 12:]]]
            )
        if form in KRONECKER:
            f = self.engine.fisher(self.x, likelihood=self.likelihood, reduction="sum")
            return getattr(f, form)().to_numpy()
        return whole

    def log_likelihood(self, variance: float) -> float:
        if self.likelihood == "gaussian":
            return scipy.stats.norm(self.f, np.sqrt(variance)).logpdf(self.y).sum()
        if self.likelihood == "bernoulli":
            return scipy.stats.bernoulli(scipy.special.expit(self.f)).logpmf(self.y).sum()
        p = scipy.special.softmax(self.f, -1)
        return float(np.log(p[np.arange(9), self.y]).sum())

    def laplace(self, form: str, **options) -> pj.fisher.Laplace:
        given = {"prior_precision": 0.5, "variance": self.variance} | options
        return pj.fisher.laplace(
            self.engine, (self.x, self.y), form, likelihood=self.likelihood, **given
        )

    @property
    def variance(self) -> float:
        return 0.3 if self.likelihood == "gaussian" else 1.0


@functools.cache
def network(likelihood: str) -> Network:
    return Network(likelihood)


each_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
each_form = pytest.mark.parametrize("form", FORMS + KRONECKER)


@each_likelihood
@each_form
def test_covariance_is_the_inverse_of_information_and_prior(likelihood, form):
    n = network(likelihood)
    information = n.matrix(form) / n.variance
    expected = np.linalg.inv(information + 0.5 * np.eye(len(information)))
    # By its Gram matrix, a matrix of nearly full rank loses half of its digits.
    rtol = 1e-8
    near(n.laplace(form).solve(np.eye(len(information))), expected, rtol)


@each_likelihood
@each_form
def test_predictive_variance_is_that_of_the_linearised_model(likelihood, form):
    n = network(likelihood)
    information = n.matrix(form) / n.variance
    covariance = np.linalg.inv(information + 0.5 * np.eye(len(information)))
    rows = n.new_rows[..., n.slices["top"]] if form == "last_layer" else n.new_rows
    expected = np.einsum("bkp,pq,blq->bkl", rows, covariance, rows)
    found = n.laplace(form).predict(n.new, covariance=True)
    near(found.outputs, np.asarray(n.logits(n.new)))
    near(found.covariance, expected, 1e-8)
    near(found.variance, np.einsum("bkk->bk", expected), 1e-8)
    without = n.laplace(form).predict(n.new)
    assert without.covariance is None
    near(without.variance, found.variance)


@each_likelihood
@each_form
def test_log_marginal_likelihood_is_laplaces(likelihood, form):
    n = network(likelihood)
    posterior, information = n.laplace(form), n.matrix(form) / n.variance
    theta, eye = posterior.mean, np.eye(len(information))
    ratio = np.linalg.slogdet(information + 0.5 * eye)[1] - len(theta) * np.log(0.5)
    expected = n.log_likelihood(n.variance) - 0.5 * (0.5 * theta @ theta + ratio)
    assert posterior.log_marginal_likelihood() == pytest.approx(expected, rel=1e-8)


@each_likelihood
@each_form
def test_a_fitted_prior_has_the_largest_evidence(likelihood, form):
    posterior = network(likelihood).laplace(form, prior_precision="fitted")
    best, best_precision = posterior.log_marginal_likelihood(), posterior.prior_precision
    others = [
        posterior.at(best_precision * f).log_marginal_likelihood()
        for f in (1e-3, 0.1, 0.9, 0.999, 1.001, 1.1, 10, 1e3)
    ]
    assert best > max(others)


def test_probabilities_of_classes_are_softened_by_their_variance():
    n = network("categorical")
    found = n.laplace("full").predict(n.new)
    logits = np.asarray(n.logits(n.new))
    kappa = 1 / np.sqrt(1 + np.pi * found.variance / 8)
    near(found.probabilities, scipy.special.softmax(kappa * logits, -1))
    near(found.mean, found.probabilities)
    near(found.label_variance, found.probabilities * (1 - found.probabilities))


def test_probabilities_of_yes_are_nearly_those_of_draws():
    """Against the integral itself, by quadrature: the probit is off by a percent at most."""
    n = network("bernoulli")
    found = n.laplace("full").predict(n.new)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    f = found.outputs[..., None] + np.sqrt(found.variance)[..., None] * nodes
    expected = scipy.special.expit(f) @ weights / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(found.probabilities, expected, atol=0.02)
    kappa = 1 / np.sqrt(1 + np.pi * found.variance / 8)
    near(found.probabilities, scipy.special.expit(kappa * found.outputs))


@each_form
def test_draws_have_the_posterior_mean_and_covariance(form):
    n = network("gaussian")
    posterior, count = n.laplace(form), 40_000
    draws = posterior.sample(count, seed=3)
    assert list(draws) == list(posterior.keys)
    assert draws["top/kernel"].shape == (count, 4, 3)
    flat = np.concatenate([d.reshape(count, -1) for d in draws.values()], 1)
    covariance = posterior.solve(np.eye(flat.shape[1]))
    spread = np.sqrt(np.diag(covariance))
    z = (flat.mean(0) - posterior.mean) / spread * np.sqrt(count)
    assert np.abs(z).max() < 5
    # Of a product of two standard normal numbers the standard deviation is √(1 + ρ²) ≤ √2.
    scale = np.outer(spread, spread) * np.sqrt(2 / count)
    assert np.abs((np.cov(flat.T) - covariance) / scale).max() < 5
    near(flat[:3], np.concatenate([d.reshape(3, -1) for d in posterior.sample(3, 3).values()], 1))


@each_likelihood
def test_labels_may_be_given_batch_by_batch(likelihood):
    n = network(likelihood)
    data = tf.data.Dataset.from_tensor_slices((n.x, n.y)).batch(4)
    found = pj.fisher.laplace(n.engine, data, "full", likelihood, 0.5, n.variance)
    expected = n.laplace("full")
    assert found.log_marginal_likelihood() == pytest.approx(expected.log_marginal_likelihood())
    near(found.predict(data).variance, expected.predict(n.x).variance)


def test_one_hot_labels_are_numbers_of_classes():
    n = network("categorical")
    found = pj.fisher.laplace(n.engine, (n.x, np.eye(3)[n.y]), prior_precision=0.5)
    column = pj.fisher.laplace(n.engine, (n.x, n.y[:, None]), prior_precision=0.5)
    expected = n.laplace("last_layer").log_marginal_likelihood()
    assert found.log_marginal_likelihood() == pytest.approx(expected, rel=1e-12)
    assert column.log_marginal_likelihood() == pytest.approx(expected, rel=1e-12)


def test_positions_add_up():
    built = subject("dense_on_sequences", "float64")
    y = rng().integers(0, 4, (3, 5))
    engine = engine_of("dense_on_sequences", "float64", "auto")
    posterior = pj.fisher.laplace(engine, (built.x, y), "full", prior_precision=2.0)
    p = scipy.special.softmax(np.asarray(built.call(built.x)), -1)
    expected = np.log(np.take_along_axis(p, y[..., None], -1)).sum()
    assert posterior.fit.log_likelihood == pytest.approx(expected, rel=1e-12)
    assert posterior.predict(built.x).probabilities.shape == (3, 5, 4)


def test_predictions_do_not_depend_on_chunks():
    n = network("categorical")
    # Two examples' rows, 2 · 3 · 27 numbers in four arrays, and what the network makes.
    small = pj.Engine(n.model, memory_limit=12_000)
    posterior = n.laplace("full")
    chunked = pj.fisher.Laplace(
        small, posterior.form, "categorical", None, posterior.mean, 0.0, "logits", 0.5
    )
    assert len(list(chunked._chunks(n.new))) > 1
    near(chunked.predict(n.new).variance, posterior.predict(n.new).variance)


def test_sampled_information_is_near_the_exact():
    n = network("categorical")
    exact = n.laplace("full").form.to_numpy()
    found = n.laplace("full", kind="sampled", samples=4000).form.to_numpy()
    assert np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact)


def test_chosen_weights_are_uncertain():
    n = network("gaussian")
    posterior = n.laplace("full", wrt="low")
    assert [key.split("/")[-2:] for key in posterior.keys] == [["low", "kernel"], ["low", "bias"]]
    information = n.matrix("full")[:12, :12] / n.variance
    near(posterior.solve(np.eye(12)), np.linalg.inv(information + 0.5 * np.eye(12)), 1e-8)


class HeadFirst(keras.Model):
    """Its last layer comes first among its weights."""

    def __init__(self):
        super().__init__()
        self.head, self.body = layers.Dense(2, name="head"), layers.Dense(3, name="body")

    def call(self, x):
        return self.head(self.body(x))


def test_the_last_layer_is_the_one_nearest_to_the_output():
    model = HeadFirst()
    model(np.zeros((1, 4)))
    found = last_layer(pj.Engine(model), np.zeros((2, 4), "float32"))
    assert [key.split("/")[-2:] for key in found] == [["head", "kernel"], ["head", "bias"]]


LAST = {
    "mlp": 2,
    "lenet": 2,
    "transformer": 2,
    "tied_embedding": 1,
    "inputs_by_name": 2,
    "lstm": 2,
    "conv1d": 2,
    "plain_function": 1,
}


@pytest.mark.parametrize("name", LAST)
def test_the_last_layer_is_found_in_any_model(name):
    built, engine = subject(name, "float64"), engine_of(name, "float64", "auto")
    found = last_layer(engine, built.x)
    count = LAST[name]
    expected = ["embeddings"] if name == "tied_embedding" else engine.weight_names[-count:]
    assert len(found) == count
    assert all(key.endswith(end) for key, end in zip(found, expected, strict=True))


# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "half"}, "form="),
        ({"likelihood": "poisson"}, "likelihood="),
        ({"prior_precision": 0.0}, "prior_precision="),
        ({"prior_precision": "best"}, "prior_precision="),
        ({"kind": "empirical"}, "kind="),
    ],
)
def test_options_that_there_are_not_are_refused(options, message):
    n = network("categorical")
    with pytest.raises(InputError, match=message):
        pj.fisher.laplace(n.engine, (n.x, n.y), **options)


@pytest.mark.parametrize("variance", [-1.0, "known", np.inf])
def test_variances_that_there_are_not_are_refused(variance):
    n = network("gaussian")
    with pytest.raises(InputError, match="variance="):
        n.laplace("full", variance=variance)
    with pytest.raises(InputError, match="variance="):
        n.laplace("full").at(1.0, variance)


def test_without_labels_there_is_no_evidence():
    n = network("categorical")
    posterior = pj.fisher.laplace(n.engine, n.x, prior_precision=0.5)
    near(posterior.predict(n.new).variance, n.laplace("last_layer").predict(n.new).variance)
    with pytest.raises(InputError, match="needs labels"):
        posterior.log_marginal_likelihood()
    with pytest.raises(InputError, match="needs labels"):
        pj.fisher.laplace(n.engine, n.x, prior_precision="fitted")


@pytest.mark.parametrize(
    ("likelihood", "labels", "message"),
    [
        ("categorical", np.full(9, 3), "classes from 0 to 2"),
        ("categorical", np.full(9, 0.5), "classes from 0 to 2"),
        ("categorical", np.zeros((9, 2)), "labels of shape"),
        ("bernoulli", np.full((9, 3), 2), "labels from 0 to 1"),
        ("bernoulli", np.zeros((9, 1)), "labels of shape"),
        ("gaussian", np.zeros(9), "labels of shape"),
        ("gaussian", np.full((9, 3), np.nan), "NaN"),
    ],
)
def test_labels_that_do_not_fit_are_refused(likelihood, labels, message):
    n = network(likelihood)
    with pytest.raises(InputError, match=message):
        pj.fisher.laplace(n.engine, (n.x, labels), likelihood=likelihood)


def test_a_prior_around_the_weights_cannot_be_fitted():
    with pytest.raises(InputError, match="infinite"):
        Evidence(np.ones(2), 0.0, Fit(-1.0)).best(None, 1.0)
    with pytest.raises(InputError, match="is zero"):
        Evidence(np.zeros(2), 1.0, Fit(-1.0)).best(None, 1.0)
    with pytest.raises(InputError, match="outputs are the labels"):
        Evidence(np.ones(2), 1.0, Fit(0.0, 0.0, 3)).best(None, None)


def test_a_model_that_has_changed_is_refused():
    n = Network("gaussian")
    posterior, bias = n.laplace("last_layer"), n.model.get_layer("top").bias
    before, own = posterior.predict(n.new), bias.numpy().copy()
    bias.assign(own + 1)
    with pytest.raises(InputError, match="have changed"):
        posterior.predict(n.new)
    bias.assign(own)
    near(posterior.predict(n.new).variance, before.variance)


def test_a_gaussian_has_no_probabilities():
    n = network("gaussian")
    with pytest.raises(InputError, match="no probabilities"):
        _ = n.laplace("full").predict(n.new).probabilities
