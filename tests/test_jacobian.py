"""What a Jacobian answers without being formed is what its matrix would say."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import MODELS, floats, randomise
from subjects import chosen, engine, subject

import perjac as pj

# One model for each kind of factor, and for weights that are the sum of several.
VARIED = [
    "mlp",  # Outer, one position
    "dense_on_sequences",  # Outer, many positions, and an output of rank 3
    "cnn",  # Outer, patches
    "depthwise_same_strided",  # Grouped
    "transformer",  # Lookup with repeated ids, and most other things
    "tied_embedding",  # a lookup and a matmul of one table
    "shared_dense",  # a matmul at two sites
    "unrolled_lstm",  # at ten sites
    "low_rank_update",  # pulled back through a parametrisation
    "einsum_dense_heads",
    "conv3d",
]
each_varied = pytest.mark.parametrize("name", VARIED)
RTOL = 1e-9


def jacobian(name: str, **asked) -> pj.Jacobian:
    asked = asked or {"outputs": chosen(name)}
    return engine(name, "float64", "auto").jacobian(subject(name, "float64").x, **asked)


def dense(jac: pj.Jacobian) -> np.ndarray:
    return jac.matrix().numpy()


def random(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def columns(jac: pj.Jacobian) -> dict[str, slice]:
    """Return where each key's columns lie in the matrix."""
    where, start = {}, 0
    for key, rows in jac.items():
        size = int(np.prod(rows.shape[1 + len(jac.row_shape) :]))
        where[key] = slice(start, start + size)
        start += size
    assert start == jac.shape[2]
    return where


@each_varied
def test_matrix_has_the_columns_in_the_order_of_the_keys(name):
    jac = jacobian(name)
    matrix = dense(jac)
    assert matrix.shape == jac.shape
    for key, part in columns(jac).items():
        rows = jac[key].numpy().reshape(*jac.shape[:2], -1)
        np.testing.assert_array_equal(matrix[:, :, part], rows)


@each_varied
def test_norms_are_those_of_the_matrix(name):
    jac = jacobian(name)
    matrix = dense(jac)
    np.testing.assert_allclose(jac.norms(), np.linalg.norm(matrix, axis=(1, 2)), RTOL)
    np.testing.assert_allclose(jac.norms(per="row"), np.linalg.norm(matrix, axis=2), RTOL)
    by_source = jac.norms(per="source")
    assert list(by_source) == list(jac)
    for key, part in columns(jac).items():
        right = np.linalg.norm(matrix[:, :, part], axis=(1, 2))
        np.testing.assert_allclose(by_source[key], right, RTOL, atol=1e-12)


@each_varied
def test_gram_is_that_of_the_matrix(name):
    jac = jacobian(name)
    matrix = dense(jac)
    right = np.einsum("bkp,clp->bkcl", matrix, matrix)
    np.testing.assert_allclose(jac.gram(), right, RTOL, atol=1e-9 * right.max())


@each_varied
def test_gram_is_symmetric_positive_and_has_the_norms_for_its_trace(name):
    jac = jacobian(name)
    batch, rows, _ = jac.shape
    gram = jac.gram().numpy().reshape(batch * rows, batch * rows)
    np.testing.assert_allclose(gram, gram.T, rtol=1e-12, atol=1e-12 * np.abs(gram).max())
    assert np.linalg.eigvalsh(gram).min() > -1e-10 * np.trace(gram)
    blocks = gram.diagonal().reshape(batch, rows)
    np.testing.assert_allclose(blocks.sum(1), np.square(jac.norms()), RTOL)


@each_varied
def test_gram_with_others_is_that_of_the_matrices(name):
    jac, case = jacobian(name), MODELS[name]
    rng = np.random.default_rng(9)
    x = tf.nest.map_structure(lambda leaf: leaf.draw(rng, 2, "float64"), case.example)
    other = engine(name, "float64", "auto").jacobian(x, outputs=[0])
    right = np.einsum("bkp,clp->bkcl", dense(jac), dense(other))
    assert jac.gram(other).shape == (3, jac.shape[1], 2, 1)
    np.testing.assert_allclose(jac.gram(other), right, RTOL, atol=1e-9 * np.abs(right).max())


@each_varied
def test_jvp_is_that_of_the_matrix(name):
    jac = jacobian(name)
    v = random(jac.shape[2])
    right = dense(jac) @ v
    np.testing.assert_allclose(jac.jvp(v), right, RTOL, atol=1e-9)
    rank = 1 + len(jac.row_shape)
    named = {k: v[part].reshape(jac[k].shape[rank:]) for k, part in columns(jac).items()}
    np.testing.assert_allclose(jac.jvp(named), right, RTOL, atol=1e-9)


@each_varied
def test_vjp_is_that_of_the_matrix(name):
    jac = jacobian(name)
    u = random(*jac.shape[:2])
    right = np.einsum("bk,bkp->bp", u, dense(jac))
    apart, summed = jac.vjp(u, per_example=True), jac.vjp(u)
    assert list(apart) == list(summed) == list(jac)
    for key, part in columns(jac).items():
        shape = jac[key].shape[1 + len(jac.row_shape) :]
        assert summed[key].shape == shape
        assert apart[key].shape == (len(u), *shape)
        found = apart[key].numpy().reshape(len(u), -1)
        np.testing.assert_allclose(found, right[:, part], RTOL, atol=1e-9)
        np.testing.assert_allclose(np.ravel(summed[key]), right[:, part].sum(0), RTOL, atol=1e-9)


@each_varied
def test_jvp_and_vjp_are_adjoint(name):
    jac = jacobian(name)
    v, u = random(jac.shape[2], seed=6), random(*jac.shape[:2], seed=7)
    back = np.concatenate([np.ravel(part) for part in jac.vjp(u).values()])
    np.testing.assert_allclose(np.sum(u * jac.jvp(v)), back @ v, RTOL)


@each_varied
def test_diagonal_is_that_of_the_matrix(name):
    jac = jacobian(name)
    diagonal = jac.diagonal()
    assert list(diagonal) == list(jac)
    right = np.square(dense(jac)).sum((0, 1))
    for key, part in columns(jac).items():
        assert diagonal[key].shape == jac[key].shape[1 + len(jac.row_shape) :]
        np.testing.assert_allclose(np.ravel(diagonal[key]), right[part], RTOL, atol=1e-12)


@pytest.mark.parametrize("wrt", ["inputs", pj.activation("embedding_like")])
def test_queries_hold_for_inputs_and_activations_too(wrt):
    with floats("float64"):
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(5, activation="tanh", name="embedding_like"),
                layers.Dense(2),
            ]
        )
    randomise(model.weights)
    jac = pj.Engine(model).jacobian(random(3, 4), wrt=wrt)
    matrix = dense(jac)
    np.testing.assert_allclose(jac.norms(), np.linalg.norm(matrix, axis=(1, 2)), RTOL)
    np.testing.assert_allclose(jac.gram(), np.einsum("bkp,clp->bkcl", matrix, matrix), RTOL)
    v = random(jac.shape[2])
    np.testing.assert_allclose(jac.jvp(v), matrix @ v, RTOL)


# --- Which rows -----------------------------------------------------------------------------

ROWS = ["mlp", "dense_on_sequences", "lenet"]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    "outputs", [2, np.int64(2), tf.constant(2), [0], [3, 1], (1, 2, 3, 0), [1, 1]], ids=str
)
def test_chosen_outputs_are_rows_of_all(name, outputs):
    every, some = jacobian(name, outputs=None), jacobian(name, outputs=outputs)
    wanted = np.atleast_1d(np.asarray(outputs))
    assert some.row_shape == (len(wanted),)
    np.testing.assert_allclose(some.matrix(), dense(every)[:, wanted], RTOL, atol=1e-12)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("form", [np.array, tf.constant])
def test_one_output_for_each_example(name, form):
    every, own = jacobian(name, outputs=None), jacobian(name, outputs=form([3, 0, 2]))
    assert own.row_shape == (1,)
    right = dense(every)[range(3), [3, 0, 2]]
    np.testing.assert_allclose(own.matrix()[:, 0], right, RTOL, atol=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_cotangents_mix_the_rows_of_all(name):
    every = jacobian(name, outputs=None)
    u = random(3, 4, *every.row_shape)
    mixed = jacobian(name, cotangents=u)
    assert mixed.row_shape == (4,)
    right = np.einsum("bnk,bkp->bnp", u.reshape(3, 4, -1), dense(every))
    np.testing.assert_allclose(mixed.matrix(), right, RTOL, atol=1e-9)


@pytest.mark.parametrize("name", ["mlp", "dense_on_sequences", "transformer_per_token"])
def test_rows_take_the_shape_of_the_output_in_c_order(name):
    built = subject(name, "float64")
    jac, variable = jacobian(name, outputs=None), built.trainable[0]
    output = built.call(built.x).shape[1:]
    assert jac.row_shape == tuple(output)
    assert jac.shape[1] == int(np.prod(output))
    assert jac[variable].shape == (3, *output, *variable.shape)
    for k in range(jac.shape[1]):
        row = jacobian(name, outputs=k)[variable][:, 0]
        all_rows = jac[variable].numpy()[(slice(None), *np.unravel_index(k, output))]
        np.testing.assert_allclose(all_rows, row, RTOL, atol=1e-12)


def test_a_single_output_keeps_its_axis():
    kernel = subject("seed", "float64").trainable[0]
    for outputs in (None, 0):
        jac = jacobian("seed", outputs=outputs)
        assert jac.row_shape == (1,)
        assert jac[kernel].shape == (3, 1, *kernel.shape)


@pytest.mark.parametrize("name", ROWS)
def test_outputs_are_the_models(name):
    built = subject(name, "float64")
    np.testing.assert_allclose(jacobian(name).outputs, built.call(built.x), 1e-12)


# --- A mapping ------------------------------------------------------------------------------


def named_model() -> keras.Model:
    """Return a model whose variables' paths are known: net/first/kernel and so on."""
    with floats("float64"):
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(3, activation="tanh", name="first"),
                layers.Dense(2, name="second"),
            ],
            name="net",
        )
    randomise(model.weights)
    return model


def test_keys_are_the_paths_of_the_trainable_variables():
    model = named_model()
    jac = pj.Engine(model).jacobian(random(2, 4))
    assert list(jac) == list(jac.keys()) == [v.path for v in model.trainable_variables]
    assert len(jac) == 4
    for variable, (key, rows) in zip(model.trainable_variables, jac.items(), strict=True):
        assert key == variable.path
        np.testing.assert_array_equal(rows, jac[variable])


def test_a_key_may_be_shortened_to_an_unambiguous_end():
    model = named_model()
    jac = pj.Engine(model).jacobian(random(2, 4))
    whole = model.get_layer("first").kernel.path
    np.testing.assert_array_equal(jac["first/kernel"], jac[whole])
    assert "first/kernel" in jac
    assert "kernel" not in jac
    assert jac.get("nothing") is None
    only = pj.Engine(model).jacobian(random(2, 4), wrt="first/kernel")
    np.testing.assert_array_equal(only["kernel"], jac[whole])


def test_an_ambiguous_key_names_what_it_could_be():
    jac = pj.Engine(named_model()).jacobian(random(2, 4))
    with pytest.raises(KeyError, match=r"'kernel'.*first/kernel.*second/kernel") as caught:
        jac["kernel"]
    assert isinstance(caught.value, pj.PerjacError)


def test_an_end_that_is_no_path_component_is_no_key():
    jac = pj.Engine(named_model()).jacobian(random(2, 4))
    assert "ond/kernel" not in jac


@pytest.mark.parametrize("by", ["layer", "variable", "name of layer", "key", "list"])
def test_weights_may_be_named_in_any_way(by):
    model = named_model()
    layer = model.get_layer("second")
    wrt = {
        "layer": layer,
        "variable": layer.kernel,
        "name of layer": "second",
        "key": "second/kernel",
        "list": [layer.kernel, "second/bias"],
    }[by]
    jac = pj.Engine(model).jacobian(random(2, 4), wrt=wrt)
    expected = [layer.kernel.path, layer.bias.path]
    assert list(jac) == (expected[:1] if by in ("variable", "key") else expected)


class Twins(keras.Model):
    """Two layers of one name, built on their own, so that their variables share a path."""

    def __init__(self):
        super().__init__()
        self.pair = [layers.Dense(3, name="twin"), layers.Dense(3, name="twin")]
        for layer in self.pair:
            layer.build((None, 3))

    def call(self, x):
        return self.pair[1](tf.tanh(self.pair[0](x)))


def test_variables_that_share_a_path_get_keys_that_differ():
    with floats("float64"):
        model = Twins()
        model(np.zeros((1, 3)))
    randomise(model.weights)
    assert len({v.path for v in model.trainable_variables}) == 2, "they share no path any more"
    jac = pj.Engine(model).jacobian(random(2, 3))
    assert len(set(jac.keys())) == len(jac) == 4
    right = [jac[v].numpy() for v in model.trainable_variables]
    for key, rows in zip(jac, right, strict=True):
        np.testing.assert_array_equal(jac[key], rows)
    assert not np.allclose(right[0], right[2])


def test_an_int_label_is_no_key():
    with pytest.raises(KeyError):
        pj.Engine(named_model()).jacobian(random(2, 4))[0]


def test_results_keep_the_models_dtype():
    for dtype in ("float32", "float64"):
        jac = engine("mlp", dtype, "auto").jacobian(subject("mlp", dtype).x)
        answers = [jac.matrix(), jac.norms(), jac.gram(), jac.jvp(np.ones(jac.shape[2], dtype))]
        answers += [*jac.diagonal().values(), *jac.vjp(np.ones(jac.shape[:2], dtype)).values()]
        assert {answer.dtype.name for answer in answers} == {dtype}


def test_numpy_takes_the_results():
    rows = np.asarray(jacobian("mlp").matrix())
    assert rows.shape == jacobian("mlp").shape


# --- Without repeating itself ---------------------------------------------------------------


class Counting(layers.Layer):
    """Counts how often its Python code runs."""

    calls = 0

    def call(self, x):
        Counting.calls += 1
        return x * 1.5


@pytest.mark.parametrize("path", ["auto", "tape"])
def test_the_model_is_not_traced_again_for_shapes_it_has_seen(path):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4), Counting(), layers.Dense(2)])
    made = pj.Engine(model, path=path, certify="never")  # which calls the model itself
    x = random(4, 3).astype("float32")
    made.jacobian(x).matrix()
    before = Counting.calls
    made.jacobian(x + 1).matrix()
    made.jacobian(x - 1).norms()
    assert Counting.calls == before
    made.jacobian(x[:3]).matrix()  # a second batch size may ask for a trace that suits all
    before = Counting.calls
    for batch in (1, 2, 3, 4):
        made.jacobian(x[:batch]).matrix()
    assert Counting.calls == before


def test_weights_changed_after_binding_count():
    model = named_model()
    made, x = pj.Engine(model), random(3, 4)
    first = made.jacobian(x)["first/kernel"].numpy()
    model.get_layer("second").kernel.assign(2 * model.get_layer("second").kernel)
    np.testing.assert_allclose(made.jacobian(x)["first/kernel"], 2 * first, RTOL)


@pytest.mark.parametrize(
    "asked",
    [
        [{"outputs": 1}, {"outputs": 0}],
        [{"outputs": [0, 1]}, {"outputs": [1, 1]}],
        [{"outputs": np.array([0, 1, 1])}, {"outputs": np.array([1, 0, 1])}],
        [{"cotangents": random(3, 3, 2)}, {"cotangents": random(3, 3, 2, seed=6)}],
        [{"wrt": "first"}, {"wrt": "second"}, {"wrt": "inputs"}, {"wrt": ["second", "first"]}],
    ],
    ids=["one", "some", "each", "directions", "sources"],
)
def test_a_question_asked_before_is_answered_on_what_is_given_now(asked):
    made, x = pj.Engine(named_model()), random(3, 4)
    for shift in (0, 1):
        for how in asked * 2:
            found, expected = made.jacobian(x + shift, **how), pj.Engine(made.model)
            expected = expected.jacobian(x + shift, **how)
            assert list(found) == list(expected)
            np.testing.assert_array_equal(found.matrix(), expected.matrix())
            np.testing.assert_array_equal(found.outputs, expected.outputs)


def test_a_jacobian_stays_what_it_was_when_weights_change():
    model = named_model()
    x = random(3, 4)
    jac = pj.Engine(model).jacobian(x)
    first = dense(jac)
    for variable in model.trainable_variables:
        variable.assign(-3 * variable)
    np.testing.assert_array_equal(jac.matrix(), first)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_queries_of_half_precision_are_summed_in_float32(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = keras.Sequential(
            [keras.Input((5, 8)), keras.layers.Dense(64), keras.layers.LayerNormalization(),
             keras.layers.Flatten(), keras.layers.Dense(4)]
        )  # fmt: skip
    finally:
        keras.config.set_dtype_policy("float32")
    x = 20 * np.random.default_rng(0).standard_normal((3, 5, 8)).astype("float16")
    jac = pj.Engine(model).jacobian(x)
    rows = np.asarray(jac.matrix(), "float64")
    rtol = 2e-3 if policy == "float16" else 1e-5  # of what the result is rounded to
    right = np.sqrt((rows**2).sum((1, 2)))
    np.testing.assert_allclose(np.asarray(jac.norms(), "float64"), right, rtol=rtol)
    np.testing.assert_allclose(
        np.asarray(jac.jvp(np.ones(jac.shape[2])), "float64"), rows.sum(2), rtol=50 * rtol,
        atol=rtol * np.abs(rows).sum(2).max(),
    )  # fmt: skip
    for key, squares in jac.diagonal().items():
        assert squares.dtype == jac[key].dtype
