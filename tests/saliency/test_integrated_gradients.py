"""Paths: closed forms, completeness, and results that do not depend on company or chunks."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import floats

import perjac as pj
from perjac.errors import InputError
from perjac.saliency import _problem, _quadrature
from perjac.saliency.blur_ig import _kernels
from perjac.saliency.integrated_gradients import _draws

pytestmark = pytest.mark.slow  # left out of `make check`

S = pj.saliency


def rng(seed=0):
    return np.random.default_rng(seed)


def smooth(activation="tanh"):
    """A small convolutional net in float64."""
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [keras.Input((5, 4, 3)), layers.Conv2D(4, 2, activation=activation, name="conv"),
         layers.Flatten(), layers.Dense(6, activation, name="hidden"), layers.Dense(3)]
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def double():
    with floats("float64"):
        yield


@pytest.fixture(scope="module")
def net():
    return pj.Engine(smooth()), rng().standard_normal((4, 5, 4, 3))


@pytest.fixture(scope="module")
def quadratic():
    """f_c(x) = xᵀ A_c x + b_c x, whose integrated gradients are (x - x')(A + Aᵀ)(x + x')/2 + …."""
    a, b = rng(1).standard_normal((2, 5, 5)), rng(2).standard_normal((2, 5))
    a = a + a.transpose(0, 2, 1)

    def f(x):
        return tf.einsum("ni,cij,nj->nc", x, a, x) + tf.einsum("ci,ni->nc", b, x)

    def exact(x, start):
        mean = np.einsum("cij,nj->nci", a, x + start) + b
        return (x - start)[:, None] * mean

    return pj.Engine(f), exact, rng(3).standard_normal((3, 5)), a, b


METHODS = {
    "integrated_gradients": {},
    "expected_gradients": {"background": rng(9).standard_normal((6, 5, 4, 3)), "samples": 30},
    "blur_ig": {},
    "guided_ig": {"steps": 20},
    "layer_conductance": {"layer": "hidden"},
    "internal_influence": {"layer": "hidden"},
}
each = pytest.mark.parametrize("name", METHODS)


def call(name, engine, x, target="predicted", **more):
    return getattr(S, name)(engine, x, target=target, **{**METHODS[name], **more})


# --- rules ---


@pytest.mark.parametrize("rule", _quadrature.RULES)
@pytest.mark.parametrize("steps", [2, 3, 50])
def test_rules_are_means_over_the_unit_interval(rule, steps):
    nodes, weights = _quadrature.quadrature(rule, steps)
    assert len(nodes) == len(weights) == steps
    assert weights.sum() == pytest.approx(1, abs=1e-15)
    assert nodes.min() >= 0
    assert nodes.max() <= 1
    # The error on g(α) = α, whose mean is 1/2, is known.
    off = {"riemann_left": -0.5 / steps, "riemann_right": 0.5 / steps}.get(rule, 0)
    assert nodes @ weights - 0.5 == pytest.approx(off, abs=1e-14)


@pytest.mark.parametrize("rule", _quadrature.RULES)
@pytest.mark.parametrize("n", [2, 3, 50])
def test_rules_are_off_by_what_their_textbooks_say(rule, n):
    nodes, weights = _quadrature.quadrature(rule, n)
    off = {
        "gausslegendre": 0,
        "riemann_left": -1 / (2 * n) + 1 / (6 * n**2),
        "riemann_right": 1 / (2 * n) + 1 / (6 * n**2),
        "riemann_middle": -1 / (12 * n**2),
        "riemann_trapezoid": 1 / (6 * (n - 1) ** 2),
        "endpoint_mean": (2 * n - 1) / (6 * (n - 1)) - 1 / 3,
    }[rule]
    assert nodes**2 @ weights - 1 / 3 == pytest.approx(off, abs=1e-14)  # g(α) = α²


def test_gauss_legendre_is_exact_to_degree_2n_minus_1():
    nodes, weights = _quadrature.quadrature("gausslegendre", 4)
    for degree in range(8):
        assert nodes**degree @ weights == pytest.approx(1 / (degree + 1), rel=1e-14)


# --- closed forms ---


def test_a_linear_models_map_is_weight_times_input():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    x, start = rng().standard_normal((3, 6)), rng(1).standard_normal(6)
    w = model.get_weights()[0]
    for rule in _quadrature.RULES:
        found = S.integrated_gradients(pj.Engine(model), x, 1, baseline=start, rule=rule, steps=3)
        np.testing.assert_allclose(found.values, (x - start) * w[:, 1], rtol=1e-12)
        np.testing.assert_allclose(found.delta, 0, atol=1e-12)


@pytest.mark.parametrize(
    ("rule", "steps"),
    [("gausslegendre", 1), ("gausslegendre", 2), ("riemann_trapezoid", 2), ("riemann_middle", 5)],
)
def test_rules_that_are_exact_for_lines_are_exact_for_a_quadratic(quadratic, rule, steps):
    engine, exact, x, _, _ = quadratic
    start = rng(5).standard_normal((3, 5))
    found = S.integrated_gradients(engine, x, "all", baseline=start, rule=rule, steps=steps)
    np.testing.assert_allclose(found.values, exact(x, start), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(found.delta, 0, atol=1e-11)


@pytest.mark.parametrize(("rule", "sign"), [("riemann_left", -1), ("riemann_right", 1)])
def test_left_and_right_sums_are_off_as_known(quadratic, rule, sign):
    engine, exact, x, a, _ = quadratic
    found = S.integrated_gradients(engine, x, "all", rule=rule, steps=10)
    slope = 2 * np.einsum("cij,nj->nci", a, x)  # of the gradient along the line
    error = sign * x[:, None] * slope / 20
    np.testing.assert_allclose(found.values - exact(x, 0 * x), error, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(found.delta, error.sum(2), rtol=1e-9)


def test_expected_gradients_of_a_quadratic_are_means_over_the_background(quadratic):
    engine, exact, x, _, _ = quadratic
    background = rng(6).standard_normal((4, 5))
    found = S.expected_gradients(engine, x, "all", background=background, samples=20_000)
    mean = np.mean([exact(x, b[None]) for b in background], axis=0)
    off = np.abs(found.values - mean) / (found.standard_error + 1e-12)
    assert np.max(off) < 4.5
    assert np.mean(np.asarray(off) < 1) > 0.4


def test_expected_gradients_from_one_baseline_tend_to_integrated_gradients(net):
    engine, x = net
    start = rng(3).standard_normal((1, 5, 4, 3))
    found = S.expected_gradients(engine, x, 1, background=start, samples=400)
    exact = S.integrated_gradients(engine, x, 1, baseline=start[0])
    off = np.abs(found.values - exact.values) / (found.standard_error + 1e-12)
    assert np.max(off) < 5
    errors = [
        np.mean(S.expected_gradients(engine, x, 1, background=start, samples=n).standard_error)
        for n in (50, 800)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)


def test_the_delta_of_expected_gradients_is_from_the_baselines_drawn(net):
    engine, x = net
    background = rng(9).standard_normal((6, 5, 4, 3))
    found = S.expected_gradients(engine, x, "all", background=background, samples=17, seed=4)
    drawn, _ = _draws(4, 17, 6)
    assert len(set(np.bincount(drawn))) > 1  # some more often than others
    rise = engine.outputs(x) - np.mean(np.asarray(engine.outputs(background))[drawn], 0)
    sums = np.asarray(found.values).reshape(4, 3, -1).sum(2)
    np.testing.assert_allclose(found.delta, sums - rise, atol=1e-12)


# --- completeness ---


@pytest.mark.parametrize("activation", ["tanh", "softplus", "gelu"])
@pytest.mark.parametrize("name", ["integrated_gradients", "blur_ig", "layer_conductance"])
def test_values_add_up_to_the_change_of_the_target(name, activation):
    engine, x = pj.Engine(smooth(activation)), rng().standard_normal((3, 5, 4, 3))
    found = call(name, engine, x, "all")
    values = np.asarray(found.values)
    if name == "blur_ig":
        sharp = S.blur_ig(engine, x, "all", steps=80)
        np.testing.assert_allclose(values, sharp.values, atol=1e-7)
    else:
        rise = engine.outputs(x) - engine.outputs(0 * x)
        sums = values.reshape(3, 3, -1).sum(2)
        np.testing.assert_allclose(found.delta, sums - rise, atol=1e-12)
    assert np.abs(found.delta).max() < 1e-6


def test_guided_paths_get_complete_with_more_steps(net):
    engine, x = net
    deltas = [np.abs(S.guided_ig(engine, x, steps=n).delta).max() for n in (20, 80, 320)]
    assert deltas[0] > 2 * deltas[1] > 4 * deltas[2]


def test_a_tolerance_refines_the_examples_that_need_it():
    engine = pj.Engine(smooth())
    x = np.concatenate([rng().standard_normal((2, 5, 4, 3)) * s for s in (0.01, 3)])
    found = S.integrated_gradients(engine, x, 0, steps=2, tolerance=1e-8)
    rise = np.abs(engine.outputs(x) - engine.outputs(0 * x))[:, 0]
    assert found.facts["converged"].all()
    assert np.all(np.abs(found.delta) <= 1e-8 * rise)
    steps = found.facts["steps"]
    assert steps[:2].max() < steps[2:].min()
    for n in range(4):  # each is what its own number of steps gives
        alone = S.integrated_gradients(engine, x[n : n + 1], 0, steps=int(steps[n]))
        np.testing.assert_allclose(found.values[n], alone.values[0], rtol=1e-10, atol=1e-14)


def test_a_tolerance_that_is_out_of_reach_is_said_to_be():
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(20, "relu"), layers.Dense(1)])
    x = rng().standard_normal((2, 3)) + 1
    weights = [rng(n).standard_normal(w.shape) for n, w in enumerate(model.get_weights())]
    model.set_weights(weights)
    found = S.integrated_gradients(pj.Engine(model), x, 0, rule="riemann_left", tolerance=1e-13)
    assert not found.facts["converged"].any()
    assert (found.facts["steps"] == 3200).all()


def test_no_change_at_all_converges():
    engine = pj.Engine(smooth())
    x = rng().standard_normal((2, 5, 4, 3))
    found = S.integrated_gradients(engine, x, 0, baseline=x, tolerance=1e-6)
    assert found.facts["converged"].all()
    assert not np.any(found.values)


# --- targets, company, chunks ---


@each
def test_all_equals_each_target_alone(net, name):
    engine, x = net
    every = call(name, engine, x, "all")
    values = np.asarray(every.values)
    for c in range(3):
        alone = call(name, engine, x, c)
        np.testing.assert_allclose(values[:, c], alone.values, rtol=1e-9, atol=1e-13)
        if alone.delta is not None:
            np.testing.assert_allclose(np.asarray(every.delta)[:, c], alone.delta, atol=1e-12)
    u = rng(2).standard_normal((4, 3))
    if name != "guided_ig":  # whose path depends on the target
        directed = call(name, engine, x, u)
        expected = np.einsum("bc,bc...->b...", u, values)
        np.testing.assert_allclose(directed.values, expected, rtol=1e-9, atol=1e-12)
    best = np.asarray(engine.outputs(x)).argmax(1)
    predicted = call(name, engine, x)
    np.testing.assert_allclose(predicted.values, values[np.arange(4), best], rtol=1e-9, atol=1e-13)


@each
@pytest.mark.parametrize("target", [1, "all"])
def test_an_example_does_not_depend_on_others_or_on_chunks(net, name, target, monkeypatch):
    engine, x = net
    every = call(name, engine, x, target)
    alone = call(name, engine, x[2:3], target)
    np.testing.assert_allclose(every.values[2], alone.values[0], rtol=1e-10, atol=1e-14)
    more = {"expected_gradients": {"samples": 9}, "guided_ig": {"steps": 4}}.get(name, {"steps": 5})
    whole = call(name, engine, x, target, **more)
    for points in (1, 7):
        monkeypatch.setattr(_problem, "_POINTS", points)
        pieces = call(name, engine, x, target, **more)
        np.testing.assert_allclose(pieces.values, whole.values, rtol=1e-10, atol=1e-14)
        if whole.delta is not None:
            np.testing.assert_allclose(pieces.delta, whole.delta, atol=1e-13)


@pytest.mark.parametrize("name", ["integrated_gradients", "expected_gradients"])
def test_the_same_function_by_another_graph_has_the_same_map(name):
    w = rng(4).standard_normal((5, 3))

    def one(x):
        return tf.nn.softplus(x @ w)

    def other(x):
        parts = [tf.einsum("ni,i->n", x[:, ::-1], w[::-1, c]) for c in range(3)]
        return tf.stack([tf.math.log1p(tf.exp(-tf.abs(p))) + tf.nn.relu(p) for p in parts], 1)

    x = rng().standard_normal((3, 5))
    more = {"background": rng(1).standard_normal((4, 5))} if name == "expected_gradients" else {}
    maps = [getattr(S, name)(pj.Engine(f), x, "all", **more).values for f in (one, other)]
    np.testing.assert_allclose(maps[0], maps[1], rtol=1e-9, atol=1e-12)


@each
def test_no_examples_have_no_maps(net, name):
    engine, x = net
    found = call(name, engine, x[:0], 1)
    shape = (6,) if "layer" in METHODS[name] else x.shape[1:]
    assert found.values.shape == (0, *shape)


# --- inputs ---


@pytest.fixture(scope="module")
def two_inputs():
    keras.utils.set_random_seed(2)
    a, b = keras.Input((4,), name="a"), keras.Input((3, 2), name="b")
    joined = layers.Concatenate()([a, layers.Flatten()(b)])
    out = layers.Dense(2)(layers.Dense(5, "tanh", name="hidden")(joined))
    x = {"a": rng().standard_normal((3, 4)), "b": rng(1).standard_normal((3, 3, 2))}
    return pj.Engine(keras.Model({"a": a, "b": b}, out)), x


def test_several_inputs_share_the_change(two_inputs):
    engine, x = two_inputs
    start = {"a": np.ones(4), "b": 0.5}
    found = S.integrated_gradients(engine, x, "all", baseline=start)
    assert {n: v.shape[1:] for n, v in found.values.items()} == {"a": (2, 4), "b": (2, 3, 2)}
    rise = engine.outputs(x) - engine.outputs({"a": 0 * x["a"] + 1, "b": 0 * x["b"] + 0.5})
    total = sum(np.reshape(v, (3, 2, -1)).sum(2) for v in found.values.values())
    np.testing.assert_allclose(total, rise, atol=1e-10)
    # One input alone: the other stays where it is.
    alone = S.integrated_gradients(engine, x, 0, wrt="b", baseline=0.5)
    rise = engine.outputs(x) - engine.outputs({"a": x["a"], "b": 0 * x["b"] + 0.5})
    np.testing.assert_allclose(np.sum(alone.values, axis=(1, 2)), rise[:, 0], atol=1e-10)
    background = {"a": rng(3).standard_normal((5, 4)), "b": rng(4).standard_normal((5, 3, 2))}
    drawn = S.expected_gradients(engine, x, 0, background=background)
    assert set(drawn.values) == set(drawn.standard_error) == {"a", "b"}
    flow = S.layer_conductance(engine, x, "hidden", 0, baseline=start)
    np.testing.assert_allclose(flow.delta, 0, atol=1e-8)
    guided = S.guided_ig(engine, x, "all", baseline=start, steps=200)
    assert np.abs(guided.delta).max() < 0.05
    blurred = S.blur_ig(engine, x, 0, wrt="b")
    np.testing.assert_allclose(blurred.delta, 0, atol=1e-6)


def test_embeddings_of_a_recurrent_net_with_a_sequence_of_outputs():
    keras.utils.set_random_seed(4)
    ids = keras.Input((4,), dtype="int32")
    hidden = layers.LSTM(5, return_sequences=True)(layers.Embedding(9, 4, name="words")(ids))
    engine = pj.Engine(keras.Model(ids, layers.Dense(2)(hidden)))
    x = rng().integers(0, 9, (2, 4))
    words = pj.activation("words")
    found = S.integrated_gradients(engine, x, 7, wrt=words, steps=20)
    assert found.values.shape == (2, 4, 4)
    np.testing.assert_allclose(found.delta, 0, atol=1e-8)
    every = S.integrated_gradients(engine, x, "all", wrt=words, steps=20)
    assert every.values.shape == (2, 8, 4, 4)
    np.testing.assert_allclose(every.values[:, 7], found.values, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(every.delta, 0, atol=1e-8)
    causal = np.abs(np.asarray(every.values)).sum(-1).reshape(2, 4, 2, 4).sum(2)
    assert not np.triu(causal.sum(0), 1).any()  # later words do nothing to earlier outputs
    blurred = S.blur_ig(engine, x, 7, wrt=words)
    np.testing.assert_allclose(blurred.delta, 0, atol=1e-6)
    guided = S.guided_ig(engine, x, 7, wrt=words, steps=20)
    assert guided.values.shape == (2, 4, 4)


def test_conductance_through_a_recurrent_layer():
    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [keras.Input((3, 3)), layers.LSTM(4, return_sequences=True, name="first"),
         layers.GlobalAveragePooling1D(), layers.Dense(2, "tanh")]
    )  # fmt: skip
    engine, x = pj.Engine(model), rng().standard_normal((2, 3, 3))
    found = S.layer_conductance(engine, x, "first", 1, steps=20)
    assert found.values.shape == (2, 3, 4)
    np.testing.assert_allclose(found.delta, 0, atol=1e-8)


# --- conductance ---


def test_conductance_of_the_layer_is_the_chain_rule_on_the_path(net):
    engine, x = net
    model = engine.model
    nodes, weights = _quadrature.quadrature("gausslegendre", 12)
    expected = np.zeros((4, 6))
    mean = np.zeros((4, 6))
    for alpha, w in zip(nodes, weights, strict=True):
        point = tf.constant(alpha * x)
        hidden = keras.Model(model.inputs, model.get_layer("hidden").output)
        with tf.GradientTape() as tape:
            tape.watch(point)
            a = hidden([point])
        jacobian = tape.batch_jacobian(a, point)
        gradient = np.asarray(model.get_layer("hidden")._outbound_nodes[0].operation.kernel)[:, 2]
        rate = np.einsum("nhijc,nijc->nh", jacobian, x)
        expected += w * rate * gradient
        mean += w * gradient
    found = S.layer_conductance(engine, x, "hidden", 2, steps=12)
    np.testing.assert_allclose(found.values, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.x, hidden([x]), rtol=1e-12)
    influence = S.internal_influence(engine, x, "hidden", 2, steps=12)
    np.testing.assert_allclose(influence.values, mean, rtol=1e-9)


@pytest.mark.parametrize("rule", _quadrature.RULES)
def test_cells_are_complete_where_the_target_is_linear_in_the_layer(rule):
    keras.utils.set_random_seed(5)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(9, "relu", name="hidden"), layers.Dense(3)]
    )
    x, start = rng().standard_normal((2, 3, 4))
    found = S.layer_conductance(
        pj.Engine(model), x, "hidden", "all", baseline=start, rule=rule, derivative="cells", steps=7
    )
    np.testing.assert_allclose(found.delta, 0, atol=1e-12)


def test_cells_tend_to_the_exact_conductance(net):
    engine, x = net
    exact = np.asarray(S.layer_conductance(engine, x, "conv", 0).values)
    off = [
        np.abs(
            S.layer_conductance(engine, x, "conv", 0, derivative="cells", steps=n).values - exact
        )
        for n in (10, 20)
    ]
    assert np.max(off[0]) > 3.5 * np.max(off[1])  # of second order


def test_differences_are_between_one_node_more_than_steps(net):
    engine, x = net
    found = S.layer_conductance(engine, x, "hidden", 2, derivative="differences", steps=4)
    nodes, _ = _quadrature.quadrature("gausslegendre", 5)
    low, high = (engine.outputs(a * x, of=pj.activation("hidden")) for a in nodes[[0, -1]])
    kernel = engine.model.get_weights()[-2][:, 2]  # the same at every node, so that sums telescope
    np.testing.assert_allclose(found.values, kernel * (high - low), rtol=1e-9, atol=1e-12)


def test_differences_tend_to_the_exact_conductance(net):
    engine, x = net
    exact = np.asarray(S.layer_conductance(engine, x, "conv", 0).values)
    off = [
        np.abs(
            S.layer_conductance(
                engine, x, "conv", 0, derivative="differences", steps=n, rule="riemann_trapezoid"
            ).values - exact
        ).max()
        for n in (20, 80)
    ]  # fmt: skip
    assert off[0] > 3 * off[1] > 0


# --- straight from the papers, slowly ---


def blurred(image, sigma):
    """Convolve (H, W, C) with the sampled Gaussian, pixel by pixel."""
    if sigma == 0:
        return image
    d = np.arange(-400, 401)
    norm = np.exp(-(d**2) / (2 * sigma**2)).sum() ** 2
    out = np.zeros_like(image)
    for i, j in np.ndindex(image.shape[:2]):
        for k, m in np.ndindex(image.shape[:2]):
            w = np.exp(-((i - k) ** 2 + (j - m) ** 2) / (2 * sigma**2)) / norm
            out[i, j] += w * image[k, m]
    return out


def gradient_of(engine, point, target):
    return np.asarray(S.gradient(engine, point[None], target).values)[0]


def test_blur_ig_is_xus_equation(net):
    engine, x = net
    steps, end, h = 8, 2.0, 1e-5
    found = S.blur_ig(
        engine, x[:2], 1, steps=steps, max_sigma=end, rule="riemann_middle", spacing="linear"
    )
    for n in range(2):
        total = np.zeros_like(x[n])
        for k in range(steps):
            sigma = (k + 0.5) / steps * end
            rate = (blurred(x[n], sigma + h) - blurred(x[n], sigma - h)) / (2 * h)
            total -= gradient_of(engine, blurred(x[n], sigma), 1) * rate * end / steps
        np.testing.assert_allclose(found.values[n], total, rtol=1e-6, atol=1e-9)


def test_kernels_fade_to_nothing_and_have_the_slope_they_say():
    sigmas = np.array([0.0, 0.01, 0.3, 1.0, 5.0])
    kernels, slopes = _kernels(7, sigmas)
    np.testing.assert_allclose(kernels[:2], np.eye(7)[None].repeat(2, 0), atol=1e-300)
    assert (kernels.sum(2) <= 1 + 1e-12).all()
    h = 1e-6
    up, down = (_kernels(7, sigmas[2:] + d)[0] for d in (h, -h))
    np.testing.assert_allclose(slopes[2:], (up - down) / (2 * h), atol=1e-8)


def guided_slowly(engine, x, start, target, steps, fraction, max_dist):
    """Algorithm 1 and section 4.3 of Kapishnikov et al. 2021, for one example."""
    here, values = start.copy(), np.zeros_like(x)
    whole = np.abs(x - start).sum()
    for step in range(steps):
        gradient = gradient_of(engine, here, target)
        alpha = (step + 1) / steps
        low = start + (x - start) * max(alpha - max_dist, 0)
        high = start + (x - start) * min(alpha + max_dist, 1)
        wanted = whole * (1 - alpha)
        for _ in range(10_000):
            old = here.copy()
            for i in np.ndindex(x.shape):
                if abs(x[i] - here[i]) > abs(x[i] - low[i]):
                    here[i] = low[i]
            missing = np.abs(x - here).sum() - wanted
            if missing <= 1e-9 * whole:
                values += gradient * (here - old)
                break
            steep = np.abs(gradient)
            steep[here == high] = np.inf
            threshold = np.quantile(steep, fraction, method="lower")
            chosen = [i for i in np.ndindex(x.shape) if steep[i] <= threshold < np.inf]
            if not chosen:
                chosen = [i for i in np.ndindex(x.shape) if steep[i] < np.inf]
            room = sum(abs(high[i] - here[i]) for i in chosen)
            share = min(missing / room, 1)
            for i in chosen:
                here[i] = high[i] if share == 1 else here[i] + share * (high[i] - here[i])
            values += gradient * (here - old)
    return values


@pytest.mark.parametrize(("fraction", "max_dist"), [(0.25, 0.02), (0.1, 1.0), (0.6, 0.2)])
def test_guided_ig_is_kapishnikovs_algorithm(net, fraction, max_dist):
    engine, x = net
    start = rng(8).standard_normal(x.shape[1:])
    x = x.copy()
    x[0, 0] = start[0]  # entries that have nowhere to go
    found = S.guided_ig(
        engine, x, 1, baseline=start, steps=12, fraction=fraction, max_dist=max_dist
    )
    for n in range(4):
        slow = guided_slowly(engine, x[n], start, 1, 12, fraction, max_dist)
        np.testing.assert_allclose(found.values[n], slow, rtol=1e-7, atol=1e-10)


def test_a_guided_path_without_room_is_the_straight_line(net):
    engine, x = net
    guided = S.guided_ig(engine, x, 1, steps=30, max_dist=0)
    straight = S.integrated_gradients(engine, x, 1, steps=30, rule="riemann_left")
    np.testing.assert_allclose(guided.values, straight.values, rtol=1e-8, atol=1e-12)


# --- conventions and refusals ---


def test_conventions_are_presets_and_explicit_arguments_win(net):
    engine, x = net
    theirs = S.integrated_gradients(engine, x, 0, convention="pair")
    assert theirs.facts == {"rule": "endpoint_mean", "steps": 25}
    alphas = np.linspace(0, 1, 25)
    mean = np.mean([S.gradient(engine, a * x, 0).values for a in alphas], axis=0)
    np.testing.assert_allclose(theirs.values, x * mean, rtol=1e-9)
    mixed = S.integrated_gradients(engine, x, 0, convention="pair", steps=7)
    assert mixed.facts == {"rule": "endpoint_mean", "steps": 7}
    xplique = S.integrated_gradients(engine, x, 0, convention="xplique")
    assert xplique.facts == {"rule": "riemann_trapezoid", "steps": 50}


@pytest.mark.parametrize(
    ("name", "more", "match"),
    [
        ("integrated_gradients", {"rule": "simpson"}, "'simpson'"),
        ("integrated_gradients", {"steps": 0}, "Received: 0"),
        ("integrated_gradients", {"rule": "riemann_trapezoid", "steps": 1}, "2 or more"),
        ("integrated_gradients", {"baseline": np.zeros(7)}, r"\(7,\)"),
        ("integrated_gradients", {"baseline": {"b": 0.0}}, "'b'"),
        ("integrated_gradients", {"convention": "torch"}, "'torch'"),
        ("expected_gradients", {"background": np.zeros((5, 4, 3))}, "background"),
        ("expected_gradients", {"samples": 1}, "2 or more"),
        ("blur_ig", {"max_sigma": -1.0}, "-1"),
        ("blur_ig", {"spacing": "cubic"}, "'cubic'"),
        ("guided_ig", {"fraction": 2.0}, "2.0"),
        ("layer_conductance", {"derivative": "no"}, "'no'"),
        ("layer_conductance", {"derivative": "differences", "steps": 0}, "Received: 0"),
        ("layer_conductance", {"layer": 3}, "layer=.* Received: 3"),
    ],
)
def test_what_cannot_be_used_is_refused(net, name, more, match):
    engine, x = net
    with pytest.raises(InputError, match=match):
        call(name, engine, x, 0, **more)


def test_rows_of_features_cannot_be_blurred(quadratic):
    engine, _, x, _, _ = quadratic
    with pytest.raises(InputError, match="spatial"):
        S.blur_ig(engine, x, 0)


def test_float32_is_complete_to_rounding():
    with floats("float32"):
        engine = pj.Engine(smooth())
    x = rng().standard_normal((3, 5, 4, 3)).astype("f4")
    found = S.integrated_gradients(engine, x, "all", tolerance=1e-4)
    assert found.values.dtype == found.delta.dtype == tf.float32
    assert found.facts["converged"].all()
