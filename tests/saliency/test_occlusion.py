"""Occlusion against a loop over windows, and XRAI's regions against its algorithm."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers

import perjac as pj
from perjac.errors import InputError, MissingExtraError
from perjac.saliency.xrai import ranked

pytestmark = pytest.mark.slow  # left out of `make check`

rng = np.random.default_rng(0)


def random(*shape):
    return rng.standard_normal(shape).astype("f4")


def net(shape, outputs=3):
    keras.utils.set_random_seed(2)
    return keras.Sequential(
        [keras.Input(shape), layers.Flatten(), layers.Dense(6, activation="tanh"),
         layers.Dense(outputs)]
    )  # fmt: skip


def by_a_loop(model, x, c, window, stride, baseline):
    """The mean of f(x) − f(covered) over the windows that cover an entry, one by one."""
    shape = x.shape[1:]
    total, count = np.zeros(x.shape), np.zeros(shape)
    starts = []
    for length, w, s in zip(shape, window, stride, strict=True):
        last = -(-max(length - w, 0) // s)
        starts.append([n * s for n in range(last + 1) if n * s < length])
    whole = np.asarray(model(x))[:, c]
    for corner in itertools.product(*starts):
        part = tuple(slice(a, a + w) for a, w in zip(corner, window, strict=True))
        covered = x.copy()
        covered[(slice(None), *part)] = np.broadcast_to(baseline, x.shape)[(slice(None), *part)]
        lost = whole - np.asarray(model(covered))[:, c]
        total[(slice(None), *part)] += lost.reshape([-1] + [1] * len(shape))
        count[part] += 1
    return total / np.maximum(count, 1)


@pytest.mark.parametrize(
    ("shape", "window", "stride", "full"),
    [
        ((7,), 2, 1, ((2,), (1,))),
        ((7,), 3, None, ((3,), (3,))),
        ((6, 4), 2, 1, ((2, 4), (1, 4))),
        ((7, 5, 3), (3, 2), (2, 1), ((3, 2, 3), (2, 1, 3))),
        ((7, 5, 3), (3, 2, 1), (2, 2, 1), ((3, 2, 1), (2, 2, 1))),
        ((4, 5, 3, 2), (2, 2, 2), 2, ((2, 2, 2, 2), (2, 2, 2, 2))),
        ((5, 5, 1), 2, 4, ((2, 2, 1), (4, 4, 1))),
    ],
)
def test_occlusion_is_a_loop_over_windows(shape, window, stride, full):
    model, x = net(shape), random(3, *shape)
    engine = pj.Engine(model)
    for baseline in (0.0, random(*shape), random(3, *shape)):
        found = pj.saliency.occlusion(
            engine, x, "all", window=window, stride=stride, baseline=baseline
        )
        for c in range(3):
            wanted = by_a_loop(model, x, c, *full, baseline)
            np.testing.assert_allclose(found.values[:, c], wanted, rtol=1e-4, atol=1e-5)
    assert found.facts == {"window": full[0], "stride": full[1]}


def test_occluding_each_entry_of_a_linear_model_is_its_part():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    x = random(4, 6)
    found = pj.saliency.occlusion(pj.Engine(model), x, 1, window=1).values
    np.testing.assert_allclose(found, x * model.get_weights()[0][:, 1], rtol=1e-4, atol=1e-5)


def test_occlusion_does_not_depend_on_chunks_or_the_other_examples(monkeypatch):
    engine, x = pj.Engine(net((6, 6, 2))), random(5, 6, 6, 2)
    whole = np.asarray(pj.saliency.occlusion(engine, x, "all", window=2, stride=1).values)
    each = np.array([2, 0, 1, 1, 2])
    chosen = pj.saliency.occlusion(engine, x, each, window=2, stride=1).values
    np.testing.assert_allclose(chosen, whole[np.arange(5), each], rtol=1e-4, atol=1e-6)
    alone = pj.saliency.occlusion(engine, x[2:3], "all", window=2, stride=1).values
    np.testing.assert_allclose(alone[0], whole[2], rtol=1e-4, atol=1e-6)
    monkeypatch.setattr("perjac.saliency._problem._POINTS", 7)
    parts = pj.saliency.occlusion(engine, x, "all", window=2, stride=1).values
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)
    assert pj.saliency.occlusion(engine, x[:0], "all").values.shape == (0, 3, 6, 6, 2)


def test_windows_that_do_not_fit_are_refused():
    engine, x = pj.Engine(net((6, 6, 2))), random(2, 6, 6, 2)
    for wrong in (0, -1, 1.5, (2,), (2, 2, 2, 2)):
        with pytest.raises(InputError, match="window="):
            pj.saliency.occlusion(engine, x, window=wrong)
    with pytest.raises(InputError, match="stride="):
        pj.saliency.occlusion(engine, x, window=2, stride=0)


def test_several_inputs_are_covered_one_at_a_time():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    keras.utils.set_random_seed(5)
    model = keras.Model([a, b], layers.Dense(2)(layers.Concatenate()([a, b])))
    x = [random(3, 4), random(3, 3)]
    found = pj.saliency.occlusion(pj.Engine(model), x, 0, window=1).values
    kernel = model.get_weights()[0][:, 0]
    np.testing.assert_allclose(found["a"], x[0] * kernel[:4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["b"], x[1] * kernel[4:], rtol=1e-4, atol=1e-5)


def algorithm_1(values, masks):
    """Kapishnikov et al. 2019, with sets of pixels."""
    regions = [set(map(tuple, np.argwhere(m))) for m in masks]
    taken, found = set(), np.zeros(values.shape)
    while any(r - taken for r in regions):
        gains = [np.mean([values[p] for p in r - taken]) if r - taken else -np.inf for r in regions]
        best = int(np.argmax(gains))
        for p in regions[best] - taken:
            found[p] = gains[best]
        taken |= regions[best]
    return found


def test_xrai_takes_regions_in_the_papers_order():
    values = rng.standard_normal((8, 7))
    masks = [rng.random((8, 7)) < 0.3 for _ in range(6)] + [np.ones((8, 7), bool)]
    np.testing.assert_allclose(ranked(values, masks), algorithm_1(values, masks))


def test_xrai_of_segments_is_the_mean_over_each():
    engine, x = pj.Engine(net((6, 6, 3))), random(2, 6, 6, 3)
    quarters = np.add.outer(2 * (np.arange(6) // 3), np.arange(6) // 3)
    segments = np.stack([quarters] * 2)
    found = pj.saliency.xrai(engine, x, "all", segments=segments)
    assert found.values.shape == (2, 3, 6, 6, 1)
    low, high = (
        pj.saliency.integrated_gradients(
            engine, x, "all", baseline=np.broadcast_to(end(x, (1, 2, 3), keepdims=True), x.shape)
        ).values
        for end in (np.min, np.max)
    )
    summed = (np.asarray(low) + np.asarray(high)).sum(-1) / 2
    for n in range(4):
        there = summed[:, :, quarters == n]
        wanted = np.broadcast_to(there.mean(-1, keepdims=True), there.shape)
        got = np.asarray(found.values)[:, :, quarters == n, 0]
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    alone = pj.saliency.xrai(engine, x, 1, segments=segments)
    np.testing.assert_allclose(alone.values, found.values[:, 1], rtol=1e-4, atol=1e-6)
    given = pj.saliency.xrai(
        engine, x, 1, segments=segments, attribution=pj.saliency.input_x_gradient
    )
    assert given.facts["of"] == "input_x_gradient"
    with pytest.raises(InputError, match="segments="):
        pj.saliency.xrai(engine, x, 1, segments=segments[:, :3])


def test_xrai_cuts_images_up_by_itself(tmp_path):
    pytest.importorskip("skimage")
    engine = pj.Engine(net((24, 24, 3)))
    x = np.zeros((1, 24, 24, 3), "f4")
    x[:, 6:16, 8:18] = 1
    found = pj.saliency.xrai(engine, x)
    assert found.values.shape == (1, 24, 24, 1)
    assert len(np.unique(found.values)) > 1
    found.save(tmp_path / "xrai.png")


def test_without_scikit_image_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage.segmentation", None)
    with pytest.raises(MissingExtraError, match=r"perjac\[segments\]"):
        pj.saliency.xrai(pj.Engine(net((6, 6, 3))), random(1, 6, 6, 3))
