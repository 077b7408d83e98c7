"""Noise: the statistics are those of the draws, whatever the company and the chunks."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import floats

import perjac as pj
from perjac.errors import InputError
from perjac.saliency import _problem
from perjac.saliency.smoothgrad import draws

pytestmark = pytest.mark.slow  # left out of `make check`

S = pj.saliency
METHODS = ["smoothgrad", "smoothgrad_squared", "vargrad"]
each = pytest.mark.parametrize("name", METHODS)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def net():
    keras.utils.set_random_seed(1)
    with floats("float64"):
        model = keras.Sequential(
            [keras.Input((5, 4, 3)), layers.Conv2D(4, 2, activation="tanh"),
             layers.Flatten(), layers.Dense(3, "softplus")]
        )  # fmt: skip
    return pj.Engine(model), rng().standard_normal((4, 5, 4, 3)) * np.arange(1, 5)[
        :, None, None, None
    ]


def by_hand(engine, x, target, samples, sigma, seed=0):
    """Return the gradients at every noisy input, one by one, (samples, B, *shape)."""
    noise = [tf.random.stateless_normal([60], [seed, s]) for s in range(samples)]
    return np.stack(
        [
            [
                S.gradient(engine, v[None] + sigma[n] * np.reshape(z, (1, 5, 4, 3)), target).values[
                    0
                ]
                for n, v in enumerate(x)
            ]
            for z in noise
        ]
    )


@pytest.mark.parametrize("relative", [True, False])
def test_statistics_are_those_of_the_draws(net, relative):
    engine, x = net
    sigma = 0.2 * np.ptp(x.reshape(4, -1), axis=1) if relative else np.full(4, 0.2)
    gradients = by_hand(engine, x, 1, 6, sigma, seed=7)
    more = {"samples": 6, "sigma": 0.2, "relative": relative, "seed": 7}
    for name, g, value in (
        ("smoothgrad", gradients, np.mean(gradients, 0)),
        ("smoothgrad_squared", gradients**2, np.mean(gradients**2, 0)),
        ("vargrad", gradients, np.var(gradients, 0, ddof=1)),
    ):
        found = getattr(S, name)(engine, x, 1, **more)
        np.testing.assert_allclose(found.values, value, rtol=1e-7, atol=1e-12)
        if name != "vargrad":
            error = np.std(g, 0, ddof=1) / np.sqrt(6)
            np.testing.assert_allclose(found.standard_error, error, rtol=1e-7, atol=1e-12)
    absolute = S.smoothgrad(engine, x, 1, each="absolute", **more)
    np.testing.assert_allclose(absolute.values, np.mean(np.abs(gradients), 0), rtol=1e-7)


@each
def test_all_equals_each_target_alone(net, name):
    engine, x = net
    every = np.asarray(getattr(S, name)(engine, x, "all", samples=10).values)
    for c in range(3):
        alone = getattr(S, name)(engine, x, c, samples=10)
        np.testing.assert_allclose(every[:, c], alone.values, rtol=1e-9, atol=1e-13)
    best = np.asarray(engine.outputs(x)).argmax(1)
    predicted = getattr(S, name)(engine, x, samples=10).values
    np.testing.assert_allclose(predicted, every[np.arange(4), best], rtol=1e-9, atol=1e-13)


@each
@pytest.mark.parametrize("target", [1, "all"])
def test_an_example_does_not_depend_on_others_or_on_chunks(net, name, target, monkeypatch):
    engine, x = net
    whole = getattr(S, name)(engine, x, target, samples=9)
    alone = getattr(S, name)(engine, x[2:3], target, samples=9)
    np.testing.assert_allclose(whole.values[2], alone.values[0], rtol=1e-10, atol=1e-14)
    for points in (1, 7):
        monkeypatch.setattr(_problem, "_POINTS", points)
        pieces = getattr(S, name)(engine, x, target, samples=9)
        np.testing.assert_allclose(pieces.values, whole.values, rtol=1e-9, atol=1e-14)


def test_draws_depend_on_the_seed_and_the_sample_only():
    shapes = [(3, 2), (5,)]
    many = draws(3, np.arange(9), shapes)
    few = draws(3, np.array([7, 2]), shapes)
    for a, b, shape in zip(many, few, shapes, strict=True):
        assert a.shape == (9, *shape)
        np.testing.assert_array_equal(np.asarray(a)[[7, 2]], b)
    other = draws(4, np.arange(9), shapes)
    assert not np.any(np.asarray(many[1]) == np.asarray(other[1]))
    normal = np.asarray(draws(0, np.arange(500), [(200,)])[0])
    assert abs(normal.mean()) < 0.02
    assert normal.std() == pytest.approx(1, abs=0.02)
    assert np.abs(np.corrcoef(normal)[np.triu_indices(500, 1)]).max() < 0.4


def test_a_linear_models_map_is_its_weight_without_variance():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    x = rng().standard_normal((3, 6)).astype("f4")
    w = model.get_weights()[0][:, 1]
    found = S.smoothgrad(pj.Engine(model), x, 1)
    np.testing.assert_allclose(found.values, np.tile(w, (3, 1)), rtol=1e-6)
    np.testing.assert_allclose(found.standard_error, 0, atol=1e-8)
    squared = S.smoothgrad_squared(pj.Engine(model), x, 1)
    np.testing.assert_allclose(squared.values, np.tile(w**2, (3, 1)), rtol=1e-6)
    varied = np.asarray(S.vargrad(pj.Engine(model), x, 1).values)
    assert varied.min() >= 0
    np.testing.assert_allclose(varied, 0, atol=1e-12)


def test_a_quadratics_map_tends_to_its_gradient_and_its_variance_is_known():
    a = rng(1).standard_normal((4, 4))
    a = a + a.T

    def f(x):
        return tf.einsum("ni,ij,nj->n", x, a, x)[:, None]

    x = rng(2).standard_normal((3, 4))
    more = {"samples": 4000, "sigma": 0.5, "relative": False}
    found = S.smoothgrad(pj.Engine(f), x, 0, **more)
    off = np.abs(found.values - 2 * x @ a) / np.asarray(found.standard_error)
    assert off.max() < 4.5
    varied = S.vargrad(pj.Engine(f), x, 0, **more)
    exact = 4 * 0.25 * (a**2).sum(1)  # of 2 A (x + σ z)
    np.testing.assert_allclose(varied.values, np.tile(exact, (3, 1)), rtol=0.15)


def test_variance_is_not_negative_where_squares_cancel():
    # E[g²] - E[g]² in float32 would be off by 1e6² · 1e-7 either way.
    def f(x):
        return 1e6 * x[:, :1] + 1e-3 * tf.sin(x[:, 1:2])

    x = rng().standard_normal((5, 2)).astype("f4")
    varied = np.asarray(S.vargrad(pj.Engine(f), x, 0).values)
    assert varied.min() >= 0
    assert (varied[:, 0] == 0).all()
    assert (varied[:, 1] > 0).all()


def test_standard_errors_shrink_by_the_root_of_the_samples(net):
    engine, x = net
    errors = [
        np.mean(S.smoothgrad(engine, x, 1, samples=n, sigma=0.05).standard_error) for n in (40, 640)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert S.smoothgrad(engine, x, 1, samples=1).standard_error is None


def test_no_noise_is_the_gradient(net):
    engine, x = net
    found = S.smoothgrad(engine, x, "all", sigma=0.0, samples=3)
    np.testing.assert_allclose(found.values, S.gradient(engine, x, "all").values, rtol=1e-12)


def test_several_inputs_and_embeddings():
    keras.utils.set_random_seed(2)
    a, ids = keras.Input((4,), name="a"), keras.Input((6,), dtype="int32", name="ids")
    words = layers.Embedding(9, 3, name="words")(ids)
    read = layers.LSTM(4)(words)
    model = keras.Model([a, ids], layers.Dense(2)(layers.Concatenate()([a, read])))
    engine = pj.Engine(model, jit=False)
    x = [rng().standard_normal((3, 4)).astype("f4"), rng().integers(0, 9, (3, 6))]
    found = S.smoothgrad(engine, x, "all", samples=5)
    assert found.values.shape == (3, 2, 4)
    about = S.vargrad(engine, x, 1, wrt=pj.activation("words"), samples=5)
    assert about.values.shape == (3, 6, 3)
    assert np.min(about.values) >= 0
    b = keras.Input((3, 2), name="b")
    both = keras.Model({"a": a, "b": b}, layers.Dense(2, "tanh")(
        layers.Concatenate()([a, layers.Flatten()(b)])))  # fmt: skip
    given = {"a": x[0], "b": rng(1).standard_normal((3, 3, 2)).astype("f4")}
    found = S.smoothgrad(pj.Engine(both), given, 0, samples=5)
    assert {n: v.shape for n, v in found.standard_error.items()} == {"a": (3, 4), "b": (3, 3, 2)}


@each
def test_no_examples_have_no_maps(net, name):
    engine, x = net
    assert getattr(S, name)(engine, x[:0], 1).values.shape == (0, 5, 4, 3)


def test_conventions_are_presets_and_explicit_arguments_win(net):
    engine, x = net
    theirs = S.smoothgrad(engine, x, 1, convention="pair")
    assert theirs.facts == {"samples": 25, "sigma": 0.15, "relative": True, "each": "squared",
                            "seed": 0}  # fmt: skip
    squared = S.smoothgrad_squared(engine, x, 1, samples=25)
    np.testing.assert_array_equal(theirs.values, squared.values)
    mixed = S.smoothgrad(engine, x, 1, convention="pair", each="signed", samples=5)
    np.testing.assert_array_equal(mixed.values, S.smoothgrad(engine, x, 1, samples=5).values)
    assert S.smoothgrad(engine, x, 1, convention="captum").facts["sigma"] == 1.0
    assert not S.vargrad(engine, x, 1, convention="xplique").facts["relative"]
    assert S.smoothgrad(engine, x, 1, convention="tf-keras-vis").facts["each"] == "absolute"


@pytest.mark.parametrize(
    ("name", "more", "match"),
    [
        ("smoothgrad", {"samples": 0}, "samples= as an int of 1"),
        ("vargrad", {"samples": 1}, "samples= as an int of 2"),
        ("smoothgrad", {"sigma": -1.0}, "-1.0"),
        ("smoothgrad", {"each": "cubed"}, "'cubed'"),
        ("smoothgrad_squared", {"convention": "torch"}, "'torch'"),
    ],
)
def test_what_cannot_be_used_is_refused(net, name, more, match):
    engine, x = net
    with pytest.raises(InputError, match=match):
        getattr(S, name)(engine, x, 0, **more)
