"""Saliency: closed forms, and each target alone equals its map among all."""

import keras
import numpy as np
import pytest

import perjac as pj
from perjac.errors import InputError, OutOfRangeError

pytestmark = pytest.mark.slow  # left out of `make check`


@pytest.fixture(scope="module")
def net():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((5, 4, 3)), keras.layers.Conv2D(4, 2, activation="tanh"),
         keras.layers.Flatten(), keras.layers.Dense(3)]
    )  # fmt: skip
    return pj.Engine(model), np.random.default_rng(0).standard_normal((4, 5, 4, 3)).astype("f4")


def test_all_equals_each_target_alone(net):
    engine, x = net
    every = np.asarray(pj.saliency.gradient(engine, x, target="all").values)
    assert every.shape == (4, 3, 5, 4, 3)
    for c in range(3):
        alone = pj.saliency.gradient(engine, x, target=c).values
        np.testing.assert_allclose(every[:, c], alone, rtol=1e-5, atol=1e-7)
    each = np.array([2, 0, 1, 1])
    mixed = pj.saliency.gradient(engine, x, target=each).values
    np.testing.assert_allclose(mixed, every[np.arange(4), each], rtol=1e-5, atol=1e-7)
    best = np.asarray(engine.outputs(x)).argmax(1)
    predicted = pj.saliency.gradient(engine, x).values
    np.testing.assert_allclose(predicted, every[np.arange(4), best], rtol=1e-5, atol=1e-7)
    u = np.random.default_rng(2).standard_normal((4, 3)).astype("f4")
    directed = pj.saliency.gradient(engine, x, target=u).values
    np.testing.assert_allclose(
        directed, np.einsum("bc,bc...->b...", u, every), rtol=1e-4, atol=1e-6
    )


def test_a_linear_models_map_is_its_weight():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
    x = np.random.default_rng(0).standard_normal((3, 6)).astype("f4")
    found = pj.saliency.gradient(pj.Engine(model), x, target=1).values
    np.testing.assert_allclose(found, np.tile(model.get_weights()[0][:, 1], (3, 1)), rtol=1e-6)


def test_wrong_targets_are_refused(net):
    engine, x = net
    with pytest.raises(OutOfRangeError, match="7.*0 to 2"):
        pj.saliency.gradient(engine, x, target=7)
    with pytest.raises(InputError, match="'best'"):
        pj.saliency.gradient(engine, x, target="best")


@pytest.mark.parametrize("shape", [(6,), (5, 4), (5, 4, 1), (5, 4, 3), (2, 3, 2, 1)])
@pytest.mark.parametrize("target", ["predicted", "all"])
def test_every_rank_of_input_has_a_picture(shape, target, tmp_path):
    model = keras.Sequential([keras.Input(shape), keras.layers.Flatten(), keras.layers.Dense(3)])
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype("f4")
    pj.saliency.gradient(pj.Engine(model), x, target=target).save(tmp_path / "map.png", example=1)
    assert (tmp_path / "map.png").stat().st_size > 2000


def test_a_hidden_layer_before_a_loop_and_custom_gradients_is_a_beginning_like_any_other():
    ids = keras.Input((6,), dtype="int32")
    hidden = keras.layers.Embedding(9, 4, name="table")(ids)
    hidden = keras.layers.LSTM(5, return_sequences=True)(hidden)
    hidden = keras.layers.Dense(4, activation="swish", name="swish")(hidden)
    model = keras.Model(ids, keras.layers.Dense(2)(keras.layers.Flatten()(hidden)))
    engine = pj.Engine(model)
    x = np.random.default_rng(0).integers(0, 9, (3, 6))
    found = pj.saliency.gradient(engine, x, target=1, wrt=pj.activation("table"))
    right = engine.jacobian(x, wrt=pj.activation("table"), outputs=1)["table"]
    np.testing.assert_allclose(found.values, np.reshape(right, (3, 6, 4)), rtol=1e-5, atol=1e-8)


def test_a_layer_of_custom_gradients_has_a_conductance():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5, "swish", name="swish"), keras.layers.Dense(2)]
    )
    x = np.random.default_rng(0).standard_normal((3, 4)).astype("f4")
    found = pj.saliency.layer_conductance(pj.Engine(model), x, "swish", target=0)
    assert np.abs(found.delta).max() < 1e-5


def test_targets_of_another_number_of_examples_are_refused(net):
    engine, x = net
    with pytest.raises(InputError, match="target=.*4 examples.*2 numbers"):
        pj.saliency.gradient(engine, x, target=np.array([0, 1]))
