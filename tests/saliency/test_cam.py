"""Class activation maps: the papers' formulas by a plain tape, in every shape of network."""

import keras
import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf
from keras import layers

import perjac as pj
from perjac.errors import InputError, UnknownNameError

pytestmark = pytest.mark.slow  # left out of `make check`

METHODS = [pj.saliency.gradcam, pj.saliency.gradcam_plus_plus, pj.saliency.layercam]
rng = np.random.default_rng(0)


def random(*shape):
    return rng.standard_normal(shape).astype("f4")


def tail_of(model, name):
    """Return (front, back): a sequential model cut behind a layer."""
    at = [layer.name for layer in model.layers].index(name) + 1
    front = keras.Sequential(model.layers[:at])
    return front, lambda a: [a := layer(a) for layer in model.layers[at:]][-1]


def by_the_papers(method, a, g):
    """The map of one example: channels a (*grid, K), gradients g of one score."""
    grid = tuple(range(a.ndim - 1))
    if method == "gradcam":
        return np.maximum((g.mean(grid) * a).sum(-1), 0)
    if method == "layercam":
        return np.maximum((np.maximum(g, 0) * a).sum(-1), 0)
    bottom = 2 * g**2 + a.sum(grid) * g**3
    alpha = np.where(g == 0, 0, g**2 / np.where(bottom == 0, 1, bottom))
    return np.maximum(((alpha * np.maximum(g, 0)).sum(grid) * a).sum(-1), 0)


def expected(method, model, layer, x, c):
    """(B, *grid), example by example, in float64."""
    front, back = tail_of(model, layer)
    maps = []
    for one in x:
        a = front(one[None])
        with tf.GradientTape() as tape:
            tape.watch(a)
            score = back(a)[0, c]
        g = tape.gradient(score, a)
        maps.append(by_the_papers(method, np.float64(a)[0], np.float64(g)[0]))
    return np.stack(maps)


def network(shape, conv, pool):
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [keras.Input(shape), conv(4, 3, activation="relu"), pool(2),
         conv(5, 2, name="last", bias_initializer="random_normal"), layers.Activation("tanh"),
         layers.Flatten(), layers.Dense(3, name="scores")]
    )  # fmt: skip


NETWORKS = {
    1: ((14, 2), layers.Conv1D, layers.MaxPooling1D),
    2: ((10, 9, 3), layers.Conv2D, layers.MaxPooling2D),
    3: ((8, 7, 9, 2), layers.Conv3D, layers.MaxPooling3D),
}


@pytest.fixture(scope="module", params=NETWORKS)
def net(request):
    model = network(*NETWORKS[request.param])
    return model, pj.Engine(model), random(3, *NETWORKS[request.param][0])


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_the_papers(net, method):
    model, engine, x = net
    att = method(engine, x, "all", resize=None)
    assert att.facts["layer"] == "last"
    for c in range(3):
        wanted = expected(att.method, model, "last", x, c)
        np.testing.assert_allclose(att.values[:, c, ..., 0], wanted, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_all_equals_each_target_alone_and_examples_keep_apart(net, method):
    _, engine, x = net
    every = method(engine, x, "all").values
    assert every.shape == (3, 3, *x.shape[1:-1], 1)
    for c in range(3):
        np.testing.assert_allclose(method(engine, x, c).values, every[:, c], rtol=1e-5, atol=1e-7)
    best = np.asarray(engine.outputs(x)).argmax(1)
    chosen = np.asarray(every)[np.arange(3), best]
    np.testing.assert_allclose(method(engine, x).values, chosen, rtol=1e-5, atol=1e-7)
    alone = method(engine, x[1:2], best[1:2]).values
    np.testing.assert_allclose(alone[0], chosen[1], rtol=1e-4, atol=1e-6)


def test_an_empty_batch_has_empty_maps(net):
    _, engine, x = net
    assert pj.saliency.gradcam(engine, x[:0]).values.shape == (0, *x.shape[1:-1], 1)


def test_behind_global_average_pooling_it_is_the_class_activation_map():
    """With y = W·mean(A), ∂y_c/∂A_k = W_kc / positions: CAM = positions · Grad-CAM."""
    model = keras.Sequential(
        [keras.Input((9, 9, 3)), layers.Conv2D(6, 3), layers.GlobalAveragePooling2D(),
         layers.Dense(4)]
    )  # fmt: skip
    x = random(2, 9, 9, 3)
    found = pj.saliency.gradcam(pj.Engine(model), x, "all", rectify=False, resize=None).values
    cam = np.einsum("bhwk,kc->bchw", model.layers[0](x), model.get_weights()[2])
    np.testing.assert_allclose(49 * np.asarray(found)[..., 0], cam, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resize", ["bilinear", "bicubic", "corners"])
@pytest.mark.parametrize("method", METHODS)
def test_rectified_maps_are_never_negative_and_sizes_fit(net, method, resize):
    _, engine, x = net
    values = np.asarray(method(engine, x, "all", resize=resize).values)
    assert values.min() >= 0
    assert values.max() > 0
    for how in ("max", "minmax"):
        scaled = np.asarray(method(engine, x, "all", resize=resize, normalise=how).values)
        peaks = scaled.reshape(3, 3, -1).max(-1)
        assert np.all(np.isclose(peaks, 1) | (peaks == 0))
        assert np.isfinite(scaled).all()


def test_resizing_is_that_of_tensorflow_and_scipy():
    model = network(*NETWORKS[2])
    engine, x = pj.Engine(model), random(2, 10, 9, 3)
    small = pj.saliency.gradcam(engine, x, rectify=False, resize=None).values
    for how in ("bilinear", "bicubic"):
        found = pj.saliency.gradcam(engine, x, rectify=False, resize=how).values
        wanted = tf.image.resize(small, (10, 9), how)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    found = pj.saliency.gradcam(engine, x, rectify=False, resize="corners").values
    grid = small.shape[1:3]
    wanted = scipy.ndimage.zoom(small, (1, 10 / grid[0], 9 / grid[1], 1), order=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_conventions():
    engine, x = pj.Engine(network(*NETWORKS[2])), random(4, 10, 9, 3)

    def cam(**options):
        return np.asarray(pj.saliency.gradcam(engine, x, 1, **options).values)

    raw = cam(rectify=False, resize=None)
    assert raw.min() < 0
    np.testing.assert_array_equal(cam(convention="captum"), raw)
    np.testing.assert_array_equal(
        cam(convention="tf-keras-vis"), cam(resize="corners", normalise="minmax")
    )
    np.testing.assert_array_equal(cam(convention="xplique"), cam(resize="bicubic"))
    peak = np.maximum(raw, 0).max((1, 2, 3), keepdims=True)
    scaled = np.maximum(raw, 0) / np.where(peak == 0, 1, peak)
    np.testing.assert_allclose(
        cam(convention="pair"), tf.image.resize(scaled, (10, 9)), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(InputError, match="keras-vis'"):
        cam(convention="keras-vis")
    with pytest.raises(InputError, match="'nearest'"):
        cam(resize="nearest")
    with pytest.raises(InputError, match="'l2'"):
        cam(normalise="l2")


def test_a_map_of_zeros_stays_zeros():
    model = keras.Sequential(
        [keras.Input((6, 6, 1)), layers.Conv2D(2, 3, activation="relu", kernel_initializer="ones"),
         layers.GlobalAveragePooling2D(), layers.Dense(2)]
    )  # fmt: skip
    model.layers[-1].set_weights([-np.ones((2, 2)), np.zeros(2)])
    for how in (None, "max", "minmax"):
        att = pj.saliency.gradcam(pj.Engine(model), np.ones((1, 6, 6, 1), "f4"), 0, normalise=how)
        np.testing.assert_array_equal(att.values, 0)
        assert att.facts["blank"] == 1


def test_nested_models_are_looked_into():
    keras.utils.set_random_seed(4)
    plain = network(*NETWORKS[2])
    inner = keras.Sequential(plain.layers[:4], name="backbone")
    inputs = keras.Input((10, 9, 3))
    outputs = plain.layers[5](plain.layers[4](inner(inputs * 1.0)))
    nested = keras.Model(inputs, outputs)
    x = random(2, 10, 9, 3)
    for method in METHODS:
        found = method(pj.Engine(nested), x, "all")
        assert found.facts["layer"] == "last"
        np.testing.assert_allclose(
            found.values, method(pj.Engine(plain), x, "all").values, rtol=1e-5, atol=1e-7
        )


def test_layers_may_be_named():
    model = network(*NETWORKS[2])
    engine, x = pj.Engine(model), random(2, 10, 9, 3)
    first = model.layers[0]
    for layer in (first, first.name, pj.activation(first)):
        found = pj.saliency.gradcam(engine, x, 2, layer=layer, resize=None)
        wanted = expected("gradcam", model, first.name, x, 2)
        np.testing.assert_allclose(found.values[..., 0], wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(UnknownNameError, match="last"):
        pj.saliency.gradcam(engine, x, layer="lastt")
    with pytest.raises(InputError, match="scores"):
        pj.saliency.gradcam(engine, x, layer="scores")


def test_without_a_convolution_it_says_what_there_is():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    with pytest.raises(UnknownNameError, match="no convolution"):
        pj.saliency.gradcam(pj.Engine(model), random(2, 4))


def test_logits_behind_a_softmax():
    model = network(*NETWORKS[2])
    soft = keras.Sequential([keras.Input((10, 9, 3)), *model.layers, layers.Softmax()])
    x = random(2, 10, 9, 3)
    found = pj.saliency.gradcam(pj.Engine(soft), x, "all", of="logits")
    assert found.explained == "logits"
    wanted = pj.saliency.gradcam(pj.Engine(model), x, "all").values
    np.testing.assert_allclose(found.values, wanted, rtol=1e-5, atol=1e-7)


def test_branches_are_taken_where_they_meet():
    inputs = keras.Input((8, 8, 3))
    y = layers.Conv2D(4, 3, name="stem")(inputs)
    branches = [
        layers.Conv2D(2, n, padding="same", activation="relu", name=f"branch{n}")(y)
        for n in (1, 2, 3)
    ]
    joined = layers.Concatenate(name="joined")(branches)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.ReLU()(joined))))
    assert pj.saliency.gradcam(pj.Engine(model), random(2, 8, 8, 3)).facts["layer"] == "joined"
    short = layers.Add()([y, layers.Conv2D(4, 3, padding="same", name="residual")(y)])
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.ReLU()(short))))
    assert pj.saliency.gradcam(pj.Engine(model), random(2, 8, 8, 3)).facts["layer"] == "residual"


def test_custom_gradients_behind_the_layer():
    """Swish has one; and batch normalisation behind a convolution without bias is not the layer."""
    keras.utils.set_random_seed(6)
    model = keras.Sequential(
        [keras.Input((9, 9, 3)), layers.Conv2D(4, 3, activation="swish"),
         layers.Conv2D(4, 3, use_bias=False, name="last"), layers.BatchNormalization(),
         layers.Activation("swish"), layers.GlobalAveragePooling2D(), layers.Dense(3)]
    )  # fmt: skip
    x = random(2, 9, 9, 3)
    att = pj.saliency.gradcam(pj.Engine(model), x, 1, resize=None)
    assert att.facts["layer"] == "last"
    wanted = expected("gradcam", model, "last", x, 1)
    np.testing.assert_allclose(att.values[..., 0], wanted, rtol=1e-4, atol=1e-6)


def test_squeeze_and_excitation_is_not_the_last_convolution():
    inputs = keras.Input((8, 8, 3))
    y = layers.Conv2D(4, 3, name="wanted")(inputs)
    gate = layers.Conv2D(4, 1)(layers.GlobalAveragePooling2D(keepdims=True)(y))
    y = layers.Multiply()([y, gate])
    y = layers.Conv2D(3, 1)(layers.GlobalAveragePooling2D(keepdims=True)(y))
    model = keras.Model(inputs, layers.Flatten()(y))
    att = pj.saliency.gradcam(pj.Engine(model), random(2, 8, 8, 3))
    assert att.facts["layer"] == "wanted"


@pytest.mark.parametrize(
    "conv",
    [
        lambda: layers.DepthwiseConv2D(3, name="it"),
        lambda: layers.SeparableConv2D(4, 3, name="it"),
        lambda: layers.Conv2DTranspose(4, 3, name="it"),
        lambda: layers.Conv2D(4, 3, dilation_rate=2, activation="relu", name="it"),
        lambda: layers.Conv2D(6, 3, groups=3, name="it"),
        lambda: layers.SeparableConv1D(4, 3, name="it"),
        lambda: layers.Conv3DTranspose(4, 3, name="it"),
    ],
)
def test_every_kind_of_convolution_is_found(conv):
    layer = conv()
    rank = layer.rank if hasattr(layer, "rank") else 2
    model = keras.Sequential(
        [keras.Input((7,) * rank + (3,)), layer, layers.Activation("relu"), layers.Flatten(),
         layers.Dense(2)]
    )  # fmt: skip
    att = pj.saliency.gradcam(pj.Engine(model), random(2, *(7,) * rank, 3), 1)
    assert att.facts["layer"] == "it"
    assert att.values.shape == (2, *(7,) * rank, 1)


def channels_first_twin(model, x):
    """Return a network whose convolutions run channels first, with the weights of `model`."""
    keras.utils.set_random_seed(3)
    twin = keras.Sequential(
        [keras.Input((3, 10, 9)),
         layers.Conv2D(4, 3, activation="relu", data_format="channels_first"),
         layers.MaxPooling2D(2, data_format="channels_first"),
         layers.Conv2D(5, 2, name="last", data_format="channels_first"),
         layers.Activation("tanh"), layers.Permute((2, 3, 1)), layers.Flatten(), layers.Dense(3)]
    )  # fmt: skip
    twin.set_weights(model.get_weights())
    try:
        twin(x)
    except Exception as failure:
        pytest.skip(f"this machine runs no convolution channels first: {type(failure).__name__}")
    return twin


def test_channels_first():
    model, x = network(*NETWORKS[2]), random(2, 10, 9, 3)
    turned = np.transpose(x, (0, 3, 1, 2))
    twin = channels_first_twin(model, turned)
    for method in METHODS:
        wanted = method(pj.Engine(model), x, "all").values
        found = method(pj.Engine(twin), turned, "all").values
        assert found.shape == (2, 3, 1, 10, 9)
        np.testing.assert_allclose(found[:, :, 0], wanted[..., 0], rtol=1e-4, atol=1e-5)
        small = method(pj.Engine(twin), turned, resize=None).values
        assert small.shape == (2, 1, *np.asarray(small).shape[2:])


def test_permuted_axes_are_followed():
    """Inputs come channels first, the network works channels last, the layer named is first."""
    inputs = keras.Input((3, 10, 9))
    y = layers.Conv2D(4, 3, name="conv")(layers.Permute((2, 3, 1))(inputs))
    y = layers.Permute((3, 1, 2), name="turned")(y)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.ReLU()(y))))
    engine, x = pj.Engine(model), random(2, 3, 10, 9)
    last = pj.saliency.gradcam(engine, x, 0)
    first = pj.saliency.gradcam(engine, x, 0, layer="turned")
    assert last.values.shape == first.values.shape == (2, 1, 10, 9)
    np.testing.assert_allclose(last.values, first.values, rtol=1e-5, atol=1e-7)


def test_inputs_without_channels():
    inputs = keras.Input((10, 9))
    y = layers.Conv2D(4, 3)(layers.Reshape((10, 9, 1))(inputs))
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(y)))
    assert pj.saliency.gradcam(pj.Engine(model), random(2, 10, 9)).values.shape == (2, 10, 9)


def test_integer_tokens():
    model = keras.Sequential(
        [keras.Input((12,), dtype="int32"), layers.Embedding(20, 4), layers.Conv1D(3, 3),
         layers.GlobalMaxPooling1D(), layers.Dense(2)]
    )  # fmt: skip
    x = rng.integers(0, 20, (3, 12))
    att = pj.saliency.gradcam(pj.Engine(model), x, "all")
    assert att.values.shape == (3, 2, 12)
    np.testing.assert_array_equal(att.x, x)


def test_a_layer_called_twice_is_told_apart():
    shared = layers.Conv2D(4, 3, padding="same", name="shared")
    inputs = keras.Input((6, 6, 4))
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(shared(shared(inputs)))))
    engine, x = pj.Engine(model), random(2, 6, 6, 4)
    found = pj.saliency.gradcam(engine, x, 0).values
    second = pj.saliency.gradcam(engine, x, 0, layer=pj.activation("shared", 1)).values
    first = pj.saliency.gradcam(engine, x, 0, layer=pj.activation("shared", 0)).values
    np.testing.assert_array_equal(found, second)
    assert not np.allclose(found, first)


def test_several_inputs_and_heads():
    image, extra = keras.Input((8, 8, 3), name="image"), keras.Input((4,), name="extra")
    y = layers.Flatten()(layers.Conv2D(4, 3)(image))
    y = layers.Concatenate()([y, extra])
    model = keras.Model([extra, image], {"a": layers.Dense(2)(y), "b": layers.Dense(3)(y)})
    x = [random(2, 4), random(2, 8, 8, 3)]
    att = pj.saliency.gradcam(pj.Engine(model), x, "all", of="b")
    assert att.values.shape == (2, 3, 8, 8, 1)
    np.testing.assert_array_equal(att.x, x[1])


@pytest.mark.parametrize("rank", NETWORKS)
def test_maps_have_pictures(rank, tmp_path):
    att = pj.saliency.gradcam(
        pj.Engine(network(*NETWORKS[rank])), random(2, *NETWORKS[rank][0]), "all"
    )
    att.save(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 2000


def test_results_do_not_depend_on_chunks(monkeypatch):
    model, x = network(*NETWORKS[2]), random(5, 10, 9, 3)
    engine = pj.Engine(model)
    whole = pj.saliency.gradcam(engine, x, "all").values
    monkeypatch.setattr("perjac.saliency._problem._POINTS", 2)
    parts = pj.saliency.gradcam(engine, x, "all").values
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)
