"""Metrics of maps: closed forms on linear models, the papers' loops, and sanity checks."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import perjac as pj
from perjac.errors import InputError, UnknownNameError
from perjac.saliency import metrics
from perjac.saliency._problem import Explained
from perjac.saliency.attribution import Attribution
from perjac.saliency.metrics.randomisation import correlation, similarity

pytestmark = pytest.mark.slow  # left out of `make check`

rng = np.random.default_rng(0)


def random(*shape):
    return rng.standard_normal(shape).astype("f4")


@pytest.fixture(scope="module")
def linear():
    """(engine, x, kernel): y = x @ kernel + bias."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8,)), layers.Dense(3, bias_initializer="normal")])
    return pj.Engine(model), random(4, 8), model.get_weights()[0]


@pytest.fixture(scope="module")
def images():
    """(engine, x) of a small convolutional network."""
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(6, 3, activation="relu", name="conv"),
         layers.MaxPooling2D(), layers.Flatten(), layers.Dense(12, activation="relu", name="mid"),
         layers.Dense(4, name="top")]
    )  # fmt: skip
    return pj.Engine(model), random(3, 8, 8, 3)


# Deletion and insertion


def test_on_a_linear_model_deletion_and_insertion_are_sums_of_sorted_parts(linear):
    engine, x, kernel = linear
    att = pj.saliency.input_x_gradient(engine, x, "all")
    parts = np.einsum("bp,pc->bcp", x.astype("f8"), kernel)
    ordered = -np.sort(-parts, -1)
    fallen = np.concatenate([np.zeros((4, 3, 1)), ordered.cumsum(-1)], -1)
    whole = np.asarray(engine.outputs(x))[..., None]
    out = metrics.deletion(engine, x, att)
    np.testing.assert_allclose(out.curves, whole - fallen, rtol=1e-4, atol=1e-5)
    back = metrics.insertion(engine, x, att)
    np.testing.assert_allclose(
        back.curves, whole - parts.sum(-1, keepdims=True) + fallen, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(out.fractions, np.arange(9) / 8)
    area = (out.curves[..., 1:] + out.curves[..., :-1]).sum(-1) / 16
    np.testing.assert_allclose(out.auc, area, rtol=1e-6)
    reverse = pj.saliency.input_x_gradient(engine, x, "all")
    object.__setattr__(reverse, "values", -reverse.values)
    assert np.all(metrics.deletion(engine, x, reverse).auc >= out.auc)
    assert np.all(metrics.insertion(engine, x, reverse).auc <= back.auc)


def test_all_equals_each_alone_and_examples_keep_apart(images):
    engine, x = images
    every = metrics.deletion(engine, x, pj.saliency.gradient(engine, x, "all"), steps=7)
    assert every.curves.shape == (3, 4, 8)
    for c in range(4):
        alone = metrics.deletion(engine, x, pj.saliency.gradient(engine, x, c), steps=7)
        np.testing.assert_allclose(alone.curves, every.curves[:, c], rtol=1e-4, atol=1e-5)
    one = metrics.deletion(engine, x[1:2], pj.saliency.gradient(engine, x[1:2], 2), steps=7)
    np.testing.assert_allclose(one.auc[0], every.auc[1, 2], rtol=1e-4)


@pytest.mark.parametrize("metric", ["deletion", "insertion"])
def test_images_lose_pixels_as_in_a_loop(images, metric):
    engine, x = images
    att = pj.saliency.gradcam(engine, x, 1)
    found = getattr(metrics, metric)(engine, x, att, baseline=0.5, steps=9)
    for b in range(3):
        order = np.argsort(-np.asarray(att.values)[b].ravel(), kind="stable")
        for s, fraction in enumerate(np.linspace(0, 1, 10)):
            first = np.zeros(64, bool)
            first[order[: int(np.round(fraction * 64))]] = True
            keep = ~first if metric == "deletion" else first
            given = np.where(keep.reshape(8, 8, 1), x[b], np.float32(0.5))
            wanted = np.asarray(engine.outputs(given[None]))[0, 1]
            np.testing.assert_allclose(found.curves[b, s], wanted, rtol=1e-4, atol=1e-5)


def test_curves_of_several_inputs_go_along_all_of_them():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    keras.utils.set_random_seed(5)
    model = keras.Model([a, b], layers.Dense(2)(layers.Concatenate()([a, b])))
    engine, x = pj.Engine(model), [random(3, 4), random(3, 3)]
    att = pj.saliency.input_x_gradient(engine, x, 0)
    found = metrics.deletion(engine, x, att)
    parts = np.concatenate(x, 1) * model.get_weights()[0][:, 0]
    fallen = np.concatenate([np.zeros((3, 1)), (-np.sort(-parts, 1)).cumsum(1)], 1)
    wanted = np.asarray(engine.outputs(x))[:, :1] - fallen
    np.testing.assert_allclose(found.curves, wanted, rtol=1e-4, atol=1e-5)


def test_hidden_layers_are_removed_too():
    model = keras.Sequential(
        [keras.Input((6,), dtype="int32"), layers.Embedding(9, 4, name="words"), layers.Flatten(),
         layers.Dense(2)]
    )  # fmt: skip
    engine, x = pj.Engine(model), rng.integers(0, 9, (3, 6))
    there = pj.activation("words")
    att = pj.saliency.input_x_gradient(engine, x, "all", wrt=there)
    found = metrics.deletion(engine, x, att, wrt=there)
    assert found.curves.shape == (3, 2, 7)
    bias = model.get_weights()[-1]
    np.testing.assert_allclose(found.curves[..., -1], np.tile(bias, (3, 1)), atol=1e-6)


def test_logits_are_remembered(images):
    engine, x = images
    soft = keras.Sequential([keras.Input((8, 8, 3)), engine.model, layers.Softmax()])
    probable = pj.Engine(soft)
    att = pj.saliency.gradient(probable, x, 1, of="logits")
    found = metrics.deletion(probable, x, att, steps=4)
    wanted = metrics.deletion(engine, x, pj.saliency.gradient(engine, x, 1), steps=4)
    np.testing.assert_allclose(found.curves, wanted.curves, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(linear, images):
    engine, x, _ = linear
    att = pj.saliency.gradient(engine, x, np.ones((4, 3), "f4"))
    with pytest.raises(InputError, match="directions"):
        metrics.deletion(engine, x, att)
    with pytest.raises(InputError, match="Attribution"):
        metrics.deletion(engine, x, np.ones((4, 8)))
    with pytest.raises(InputError, match="steps="):
        metrics.deletion(engine, x, pj.saliency.gradient(engine, x), steps=0)
    engine, x = images
    small = pj.saliency.gradcam(engine, x, resize=None)
    with pytest.raises(InputError, match="resized"):
        metrics.deletion(engine, x, small)


def test_an_empty_batch_has_no_curves(linear):
    engine, x, _ = linear
    att = pj.saliency.gradient(engine, x[:0], "all")
    assert metrics.deletion(engine, x[:0], att).auc.shape == (0, 3)
    assert metrics.infidelity(engine, x[:0], att).values.shape == (0, 3)
    assert metrics.completeness(engine, x[:0], att).values.shape == (0, 3)


# Completeness and infidelity


def test_completeness(linear):
    engine, x, kernel = linear
    att = pj.saliency.input_x_gradient(engine, x, "all")
    found = metrics.completeness(engine, x, att)
    np.testing.assert_allclose(found.values, 0, atol=1e-5)
    np.testing.assert_allclose(found.rise, x @ kernel, rtol=1e-4, atol=1e-5)
    slopes = metrics.completeness(engine, x, pj.saliency.gradient(engine, x, 0))
    np.testing.assert_allclose(
        slopes.values, kernel[:, 0].sum() - x @ kernel[:, 0], rtol=1e-4, atol=1e-5
    )


def test_completeness_finds_deltas(images):
    engine, x = images
    att = pj.saliency.integrated_gradients(engine, x, "all", steps=5)
    found = metrics.completeness(engine, x, att)
    np.testing.assert_allclose(found.values, att.delta, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("perturbation", ["noise", "removal", lambda x, g: g.uniform(-1, 1, 8)])
def test_infidelity_of_linear_models_is_zero(linear, perturbation):
    engine, x, _ = linear
    for method in (pj.saliency.gradient, pj.saliency.input_x_gradient):
        att = method(engine, x, "all")
        found = metrics.infidelity(engine, x, att, perturbation=perturbation)
        assert found.values.shape == (4, 3)
        assert found.values.max() < 1e-9
    base = random(4, 8)
    att = pj.saliency.integrated_gradients(engine, x, "all", baseline=base)
    found = metrics.infidelity(engine, x, att, perturbation=perturbation, baseline=base)
    assert found.values.max() < 1e-8
    worse = pj.saliency.gradient(engine, x, "all")
    object.__setattr__(worse, "values", 3 * worse.values)
    assert metrics.infidelity(engine, x, worse, perturbation=perturbation).mean > 1e-3
    scaled = metrics.infidelity(engine, x, worse, perturbation=perturbation, scaled=True)
    assert scaled.values.max() < 1e-9
    np.testing.assert_allclose(scaled.scale, 1 / 3, rtol=1e-4)


def test_infidelity_is_the_papers_mean(images):
    engine, x = images
    att = pj.saliency.gradient(engine, x, 2)
    found = metrics.infidelity(engine, x, att, samples=6, seed=3, sigma=0.5)
    for b in range(3):
        errors = []
        for n in range(6):
            i = np.random.default_rng([3, n]).normal(0, 0.5 * np.ptp(x[b]), x[b].shape)
            i = i.astype("f4")
            f = np.asarray(engine.outputs(np.stack([x[b], x[b] - i])), "f8")[:, 2]
            errors.append((np.sum(i.astype("f8") * np.asarray(att.values)[b]) - f[0] + f[1]) ** 2)
        np.testing.assert_allclose(found.values[b], np.mean(errors), rtol=1e-4)
        wanted = np.std(errors, ddof=1) / 6**0.5
        np.testing.assert_allclose(found.standard_error[b], wanted, rtol=1e-4)


def test_infidelity_of_removals_is_the_papers_mean(images):
    engine, x = images
    att = pj.saliency.integrated_gradients(engine, x, 2, baseline=0.5)
    found = metrics.infidelity(
        engine, x, att, perturbation="removal", baseline=0.5, samples=6, seed=3
    )
    for b in range(3):
        slopes = np.asarray(att.values, "f8")[b] / (x[b] - 0.5)
        errors = []
        for n in range(6):
            gone = np.random.default_rng([3, n]).random(x[b].shape) < 0.5
            f = np.asarray(engine.outputs(np.stack([x[b], np.where(gone, 0.5, x[b])])), "f8")[:, 2]
            errors.append((np.sum(slopes * gone * (x[b] - 0.5)) - f[0] + f[1]) ** 2)
        np.testing.assert_allclose(found.values[b], np.mean(errors), rtol=1e-3)


def test_seeds_and_the_other_examples(images):
    engine, x = images
    att = pj.saliency.gradcam(engine, x, 1)
    found = metrics.infidelity(engine, x, att, samples=5, scaled=True)
    again = metrics.infidelity(engine, x, att, samples=5, scaled=True)
    np.testing.assert_array_equal(found.values, again.values)
    other = metrics.infidelity(engine, x, att, samples=5, scaled=True, seed=1)
    assert not np.allclose(found.values, other.values)
    one = pj.saliency.gradcam(engine, x[1:2], 1)
    alone = metrics.infidelity(engine, x[1:2], one, samples=5, scaled=True)
    np.testing.assert_allclose(alone.values[0], found.values[1], rtol=1e-3)


def test_a_map_without_channels_speaks_for_all_of_them(images):
    engine, x = images
    att = pj.saliency.integrated_gradients(engine, x, "all")
    together = pj.saliency.integrated_gradients(engine, x, "all")
    object.__setattr__(together, "values", tf.reduce_sum(att.values, -1, keepdims=True))
    found = metrics.completeness(engine, x, together)
    np.testing.assert_allclose(
        found.values, metrics.completeness(engine, x, att).values, rtol=1e-3, atol=1e-6
    )
    a, b = (metrics.deletion(engine, x, one, steps=5).curves for one in (att, together))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# Max-sensitivity


def test_a_linear_models_gradient_is_not_sensitive(linear):
    engine, x, _ = linear
    found = metrics.max_sensitivity(engine, x, pj.saliency.gradient, "all", samples=4)
    assert found.values.shape == found.standard_error.shape == (4, 3)
    np.testing.assert_allclose(found.values, 0, atol=1e-6)


def test_max_sensitivity_is_the_papers_largest(images):
    engine, x = images
    find = metrics.max_sensitivity
    found = find(engine, x, pj.saliency.input_x_gradient, samples=5, seed=4, radius=0.3)
    plain = find(
        engine, x, pj.saliency.input_x_gradient, samples=5, seed=4, radius=0.3, relative=False
    )
    best = np.asarray(engine.outputs(x)).argmax(1)
    there = np.asarray(pj.saliency.input_x_gradient(engine, x, best).values)
    apart = []
    for n in range(5):
        near = x + np.random.default_rng([4, n]).uniform(-0.3, 0.3, (8, 8, 3)).astype("f4")
        now = np.asarray(pj.saliency.input_x_gradient(engine, near, best).values)
        apart.append(np.linalg.norm((now - there).reshape(3, -1), axis=1))
    np.testing.assert_allclose(plain.values, np.max(apart, 0), rtol=1e-4)
    np.testing.assert_allclose(plain.average, np.mean(apart, 0), rtol=1e-4)
    wanted = np.std(apart, 0, ddof=1) / 5**0.5
    np.testing.assert_allclose(plain.standard_error, wanted, rtol=1e-3)
    lengths = np.linalg.norm(there.reshape(3, -1), axis=1)
    np.testing.assert_allclose(found.values, np.max(apart, 0) / lengths, rtol=1e-4)
    alone = find(
        engine, x[2:], pj.saliency.input_x_gradient, best[2:], samples=5, seed=4, radius=0.3
    )
    np.testing.assert_allclose(alone.values[0], found.values[2], rtol=1e-3)


# Parameter randomisation


def edges(engine, x, target="predicted", *, of=None):
    """A map that does not ask the model: Sobel's edges."""
    strength = np.abs(np.asarray(tf.image.sobel_edges(tf.constant(x)))).sum(-1)
    explained = Explained(engine, x, target, of=of)
    return explained.attribution("edges", [tf.constant(strength)[:, None]])


def test_an_edge_detector_fails_and_gradients_pass(images):
    engine, x = images
    before = [w.copy() for w in engine.model.get_weights()]
    failed = metrics.parameter_randomisation(engine, x, edges)
    assert not failed.passed
    assert [name.rpartition("/")[2] for name in failed.layers] == ["top", "mid", "conv"]
    for values in failed.similarity.values():
        np.testing.assert_allclose(values, 1, atol=1e-6)
    passed = metrics.parameter_randomisation(engine, x, pj.saliency.gradient)
    assert passed.passed
    assert passed.similarity["spearman"].shape == (3, 3)
    assert "FAILED" in str(failed)
    assert "passed" in str(passed)
    for now, then in zip(engine.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_layers_go_from_the_top_down(images):
    engine, x = images
    found = metrics.parameter_randomisation(engine, x, pj.saliency.gradcam, "all")
    assert [name.rpartition("/")[2] for name in found.layers] == ["top", "mid", "conv"]
    assert found.similarity["ssim"].shape == (3, 3, 4)
    repeated = metrics.parameter_randomisation(engine, x, pj.saliency.gradcam, "all")
    np.testing.assert_array_equal(found.similarity["pearson"], repeated.similarity["pearson"])


def test_weights_are_put_back_where_the_method_fails(images):
    engine, x = images
    before = [w.copy() for w in engine.model.get_weights()]
    calls = []

    def failing(engine, x, target, *, of=None):
        calls.append(np.asarray(engine.model.get_weights()[-2]))
        if len(calls) == 3:
            raise RuntimeError("enough")
        return pj.saliency.gradient(engine, x, target, of=of)

    with pytest.raises(RuntimeError, match="enough"):
        metrics.parameter_randomisation(engine, x, failing)
    assert not np.allclose(calls[0], calls[1])
    for now, then in zip(engine.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_similarities_are_those_of_scipy_and_scikit_image(images):
    engine, x = images
    a = pj.saliency.gradient(engine, x, 0)
    b = pj.saliency.gradient(engine, x, 1)
    found = similarity(a, b)
    import scipy.stats

    for n in range(3):
        flat = [np.asarray(att.values)[n].ravel() for att in (a, b)]
        rank = scipy.stats.spearmanr(*flat).statistic
        np.testing.assert_allclose(found["spearman"][n], rank, rtol=1e-5)
        np.testing.assert_allclose(found["pearson"][n], np.corrcoef(*flat)[0, 1], rtol=1e-5)
    ssim = pytest.importorskip("skimage.metrics").structural_similarity
    for n in range(3):
        both = [np.abs(np.asarray(att.values, "f8")[n].sum(-1)) for att in (a, b)]
        wanted = ssim(*(v / v.max() for v in both), data_range=1)
        np.testing.assert_allclose(found["ssim"][n], wanted, rtol=1e-6)
    np.testing.assert_array_equal(correlation(np.ones((2, 5)), np.ones((2, 5))), 1)
    np.testing.assert_array_equal(correlation(np.ones(5), np.arange(5.0)), 0)


# Comparison


def test_methods_are_compared(images):
    engine, x = images
    found = metrics.compare(engine, x, ["gradient", "occlusion"], samples=3)
    assert found.metrics == ["deletion", "insertion", "infidelity", "max_sensitivity"]
    lines = str(found).splitlines()
    assert lines[1].startswith("gradient")
    assert lines[2].startswith("occlusion")
    assert all(line.count("±") == 4 for line in lines[1:3])
    wanted = metrics.deletion(engine, x, pj.saliency.gradient(engine, x)).mean
    np.testing.assert_allclose(found.mean("gradient", "deletion"), wanted, rtol=1e-5)
    mixed = metrics.compare(
        engine, x, {"mine": edges, "cam": pj.saliency.gradcam}, 1,
        metrics=["insertion", "parameter_randomisation"],
    )  # fmt: skip
    assert mixed.best("parameter_randomisation") == "cam"
    assert isinstance(mixed.attributions["mine"], Attribution)
    with pytest.raises(UnknownNameError, match="gradcam"):
        metrics.compare(engine, x, ["gradcamm"])
    with pytest.raises(UnknownNameError, match="deletion"):
        metrics.compare(engine, x, ["gradient"], metrics=["deletions"])


def test_the_best_is_at_the_better_end():
    names = ["deletion", "insertion", "infidelity", "max_sensitivity", "parameter_randomisation"]
    scores = {
        "small": {name: np.array([1.0, 3.0]) for name in names},
        "large": {name: np.array([2.0, 4.0]) for name in names},
    }
    found = metrics.Comparison(scores, {}, {})
    for name in names:
        assert found.best(name) == ("large" if name == "insertion" else "small")
        assert found.standard_error("small", name) == pytest.approx(1)


def test_results_have_pictures(images, tmp_path):
    engine, x = images
    att = pj.saliency.gradient(engine, x)
    for n, result in enumerate(
        [
            metrics.deletion(engine, x, att, steps=4),
            metrics.parameter_randomisation(engine, x, pj.saliency.gradient),
            metrics.compare(engine, x, ["gradient"], metrics=["deletion", "insertion"]),
        ]
    ):
        result.figure().savefig(tmp_path / f"{n}.png")
        assert (tmp_path / f"{n}.png").stat().st_size > 2000


def test_metrics_are_reached_from_saliency_too():
    for name in ("deletion", "insertion", "infidelity", "max_sensitivity", "completeness"):
        assert getattr(pj.saliency, name) is getattr(metrics, name)
