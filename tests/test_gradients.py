"""What Gradients answer is what NumPy makes of the oracle's gradients, one example at a time."""

from __future__ import annotations

import functools

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from keras import layers
from models import floats, randomise
from subjects import engine, subject

import perjac as pj
from perjac.errors import DisconnectedWarning, InputError, TooLargeError, UnknownNameError

pytestmark = pytest.mark.slow  # left out of `make check`

# One model for each kind of factor, and for weights that are the sum of several.
VARIED = [
    "mlp",  # Outer, one position
    "dense_on_sequences",  # many positions
    "conv2d_valid_strided",  # Patches
    "conv2d_dilated",
    "conv2d_grouped",  # Grouped
    "depthwise_same_strided",
    "lstm",  # a while loop
    "transformer",  # Lookup with repeated ids, and most other things
    "tied_embedding",  # a lookup and a matmul of one table
    "shared_dense",  # a matmul at two sites
]
FEW = ["gru", "low_rank_update", "class_token"]
RTOL = 1e-10
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")
SQUARES = keras.losses.MeanSquaredError(dtype="float64")


@pytest.fixture(scope="module", params=VARIED)  # pytest then runs all tests of a model together
def name(request) -> str:
    return request.param


def random(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def loss_of(name: str) -> keras.losses.Loss:
    return SPARSE if name in ("transformer", "tied_embedding") else SQUARES


@functools.cache
def labels(name: str) -> np.ndarray:
    """Return labels for the model's batch: class numbers, or numbers of the output's shape."""
    built = subject(name, "float64")
    shape = built.call(built.x).shape
    if loss_of(name) is SPARSE:
        return np.random.default_rng(2).integers(0, shape[-1], shape[:-1])
    return random(*shape).astype("float32").astype("float64")


@functools.cache
def gradients(name: str, dtype: str = "float64", path: str = "auto") -> pj.gradients.Gradients:
    x, y = subject(name, dtype).x, labels(name)
    return engine(name, dtype, path).gradients(x, y, loss=loss_of(name))


@functools.cache
def expected(name: str) -> tuple[np.ndarray, list[np.ndarray]]:
    built = subject(name, "float64")
    return oracle.loss_rows(built.call, loss_of(name), built.x, labels(name), built.trainable)


def matrix(name: str) -> np.ndarray:
    """Return the oracle's gradients as one array, (B, P)."""
    rows = expected(name)[1]
    return np.concatenate([r.reshape(len(r), -1) for r in rows], 1)


def columns(grads) -> dict[str, slice]:
    """Return where each key's columns lie in the matrix."""
    where, start = {}, 0
    for key, rows in grads.items():
        size = int(np.prod(rows.shape[1:]))
        where[key] = slice(start, start + size)
        start += size
    assert start == grads.shape[1]
    return where


def close(found, right, rtol: float = RTOL, scale: float = 0.0):
    """Assert ‖found − right‖ ≤ rtol ‖right‖, or of what it was computed from: `scale`."""
    found, right = np.asarray(found), np.asarray(right)
    assert found.shape == right.shape
    error = np.linalg.norm(np.ravel(found - right))
    assert error <= rtol * np.linalg.norm(np.ravel(right)) + 1e-14 * scale


def close_by_key(found, right: np.ndarray, grads, rtol: float = RTOL, scale: float = 0.0):
    """Compare a mapping by key with a flat (P,) or (B, P)."""
    assert list(found) == list(grads)
    for key, part in columns(grads).items():
        assert found[key].shape == right.shape[:-1] + grads[key].shape[1:]
        flat = np.reshape(found[key], right[..., part].shape)
        close(flat, right[..., part], rtol, max(scale, np.linalg.norm(right)))


# --- Every query ----------------------------------------------------------------------------


def test_losses_and_rows_are_the_oracles(name):
    grads, (losses, rows) = gradients(name), expected(name)
    close(grads.losses, losses)
    oracle.assert_agree(list(grads.values()), rows, "float64", list(grads))
    assert grads.shape == matrix(name).shape
    close(grads.matrix(), matrix(name))


@pytest.mark.parametrize("name", FEW)
def test_other_models_answers_are_those_of_the_oracles_matrix(name):
    grads, right = gradients(name), matrix(name)
    close(grads.matrix(), right)
    close(grads.norms(), np.linalg.norm(right, axis=1))
    close(grads.gram(), right @ right.T)
    close_by_key(grads.variance(), right.var(0), grads)
    close_by_key(grads.clipped_sum(0.1), clipped(right, 0.1), grads)


def test_norms_are_those_of_the_matrix(name):
    grads, right = gradients(name), matrix(name)
    close(grads.norms(), np.linalg.norm(right, axis=1))
    per_source, layers_ = grads.norms(per="source"), {}
    assert list(per_source) == list(grads)
    for key, part in columns(grads).items():
        squares = np.square(right[:, part]).sum(1)
        close(per_source[key], np.sqrt(squares), scale=np.linalg.norm(right))
        layer = key.rpartition("/")[0] or key
        layers_[layer] = layers_.get(layer, 0) + squares
    per_layer = grads.norms(per="layer")
    assert list(per_layer) == list(layers_)
    for layer, squares in layers_.items():
        close(per_layer[layer], np.sqrt(squares), scale=np.linalg.norm(right))


def test_gram_and_cosines_are_those_of_the_matrix(name):
    grads, right = gradients(name), matrix(name)
    close(grads.gram(), right @ right.T)
    directions = right / np.linalg.norm(right, axis=1, keepdims=True)
    close(grads.cosine_similarity(), directions @ directions.T)


def test_jvp_and_vjp_are_those_of_the_matrix(name):
    grads, right = gradients(name), matrix(name)
    v, u = random(right.shape[1]), random(len(right), seed=6)
    close(grads.jvp(v), right @ v, scale=np.linalg.norm(right))
    named = {k: v[part].reshape(grads[k].shape[1:]) for k, part in columns(grads).items()}
    close(grads.jvp(named), right @ v, scale=np.linalg.norm(right))
    close_by_key(grads.vjp(u), u @ right, grads)
    close_by_key(grads.vjp(u, per_example=True), u[:, None] * right, grads)


def test_mean_variance_and_snr_are_those_of_the_matrix(name):
    grads, right = gradients(name), matrix(name)
    mean, variance = right.mean(0), right.var(0)
    close_by_key(grads.mean(), mean, grads)
    # By moments where no row is formed: rounding errors are of the size of the squares.
    close_by_key(grads.variance(), variance, grads, scale=np.square(right).max())
    close_by_key(grads.variance(ddof=1), right.var(0, ddof=1), grads)
    snr = np.concatenate([np.ravel(part) for part in grads.snr().values()])
    sure = (variance > 1e-4 * np.square(right).max(0)) & (np.abs(right).max(0) > 1e-9)
    assert sure.sum() > 10
    np.testing.assert_allclose(snr[sure], mean[sure] ** 2 / variance[sure], rtol=RTOL, atol=1e-14)


def clipped(right: np.ndarray, max_norm: float) -> np.ndarray:
    norms = np.linalg.norm(right, axis=1, keepdims=True)
    return (right * np.minimum(1, max_norm / norms)).sum(0)


def test_clipped_sums_are_those_of_the_matrix(name):
    grads, right = gradients(name), matrix(name)
    middle = float(np.median(np.linalg.norm(right, axis=1)))
    for max_norm in (middle, 1e-6 * middle, 1e6 * middle):
        close_by_key(grads.clipped_sum(max_norm), clipped(right, max_norm), grads)


def test_clipped_sums_of_parts_are_those_of_the_matrixs_parts(name):
    grads, right, where = gradients(name), matrix(name), columns(gradients(name))
    groups = {"source": lambda key: key, "layer": lambda key: key.rpartition("/")[0] or key}
    for per, group_of in groups.items():
        limits = {group: 0.1 * (n + 1) for n, group in enumerate(grads.norms(per=per))}
        summed = np.zeros(right.shape[1])
        for group, limit in limits.items():
            parts = [np.arange(right.shape[1])[p] for k, p in where.items() if group_of(k) == group]
            part = np.concatenate(parts)
            if np.abs(right[:, part]).max() > 1e-12:  # of zeros there is nothing to clip
                summed[part] = clipped(right[:, part], limit)
        close_by_key(grads.clipped_sum(limits, per=per), summed, grads)
        # One number is the same for all.
        same = grads.clipped_sum(dict.fromkeys(limits, 0.2), per=per)
        for key, part in grads.clipped_sum(0.2, per=per).items():
            close(part, same[key])


# --- Other ways to the same -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "dense_on_sequences", "tied_embedding"])
def test_the_tape_path_agrees(name):
    grads, right = gradients(name, path="tape"), matrix(name)
    close(grads.losses, expected(name)[0])
    close(grads.matrix(), right)
    close(grads.norms(), np.linalg.norm(right, axis=1))
    close(grads.gram(), right @ right.T)
    close_by_key(grads.variance(), right.var(0), grads)
    close_by_key(grads.clipped_sum(0.1), clipped(right, 0.1), grads)


@pytest.mark.parametrize("name", ["mlp", "conv2d_dilated", "tied_embedding"])
def test_float32_agrees_to_five_digits(name):
    grads, right = gradients(name, "float32"), matrix(name)
    answers = [grads.losses, grads.norms(), grads.matrix(), *grads.mean().values()]
    assert {answer.dtype.name for answer in answers} == {"float32"}
    close(grads.losses, expected(name)[0], 1e-5)
    close(grads.matrix(), right, 1e-5)
    close(grads.norms(), np.linalg.norm(right, axis=1), 1e-5)
    close(grads.gram(), right @ right.T, 1e-5)
    flat = np.concatenate([np.ravel(part) for part in grads.variance().values()])
    close(flat, right.var(0), 1e-5)
    flat = np.concatenate([np.ravel(part) for part in grads.clipped_sum(0.1).values()])
    close(flat, clipped(right, 0.1), 1e-5)


def test_an_example_alone_has_the_same_gradient(name):
    built, right = subject(name, "float64"), matrix(name)
    x = tf.nest.map_structure(lambda t: t[1:2], built.x)
    grads = engine(name, "float64", "auto").gradients(x, labels(name)[1:2], loss=loss_of(name))
    assert grads.shape == (1, right.shape[1])
    close(grads.matrix(), right[1:2])
    close(grads.losses, expected(name)[0][1:2])
    close(grads.norms(), np.linalg.norm(right[1:2], axis=1))
    close_by_key(grads.mean(), right[1], grads)


def test_gram_between_batches():
    built, right = subject("mlp", "float64"), matrix("mlp")
    x, y = built.x[:2][::-1], labels("mlp")[:2][::-1]
    other = engine("mlp", "float64", "auto").gradients(x, y, loss=SQUARES)
    close(gradients("mlp").gram(other), right @ right[1::-1].T)
    assert gradients("mlp").cosine_similarity(other).shape == (3, 2)
    with pytest.raises(InputError, match="Gradients.*Jacobian"):
        other.gram(engine("mlp", "float64", "auto").jacobian(x))


def test_the_sum_of_the_gradients_is_that_of_the_batch():
    built = subject("mlp", "float64")
    with tf.GradientTape() as tape:
        loss = keras.losses.MeanSquaredError(reduction="sum", dtype="float64")(
            labels("mlp"), built.call(built.x)
        )
    whole = tape.gradient(loss, built.trainable)
    summed = gradients("mlp").vjp(np.ones(3))
    for key, part in zip(summed, whole, strict=True):
        # Keras's "sum" adds what each example has, the mean over its outputs.
        close(summed[key], part)


# --- Corners --------------------------------------------------------------------------------


def small() -> keras.Model:
    with floats("float64"):
        model = keras.Sequential(
            [keras.Input((4,), name="x"), layers.Dense(5, activation="relu", name="hidden"),
             layers.Dense(3, name="top")]
        )  # fmt: skip
    randomise(model.weights)
    return model


def small_gradients(x=None, y=None, **asked):
    x = random(3, 4) if x is None else x
    y = random(len(x), 3, seed=7) if y is None else y
    return pj.Engine(small()).gradients(x, y, loss="mse", **asked)


def test_a_gradient_of_zero():
    model, x = small(), random(3, 4)
    y = random(3, 3)
    y[1] = model(x)[1]
    grads = pj.Engine(model).gradients(x, y, loss="mse")
    assert grads.losses[1] == 0
    assert grads.norms()[1] == 0
    cosines = grads.cosine_similarity().numpy()
    np.testing.assert_array_equal(cosines[1], 0)
    np.testing.assert_allclose(np.diag(cosines)[[0, 2]], 1, rtol=1e-12)
    right = np.asarray(grads.matrix())
    for max_norm in (1e-3, 1e3):
        close_by_key(grads.clipped_sum(max_norm), clipped(right[[0, 2]], max_norm), grads)


def test_all_gradients_zero():
    model, x = small(), random(3, 4)
    grads = pj.Engine(model).gradients(x, model(x), loss="mse")
    for answer in (grads.norms(), grads.gram(), grads.cosine_similarity(), grads.matrix()):
        np.testing.assert_array_equal(answer, 0)
    for answers in (grads.mean(), grads.variance(), grads.snr(), grads.clipped_sum(0.5)):
        for answer in answers.values():
            np.testing.assert_array_equal(answer, 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("max_norm", [1e-300, 1e-30, 1e30, 1e300])
def test_clipping_to_numbers_at_the_ends_of_the_range(max_norm, dtype):
    model = small()
    x, y = random(3, 4), random(3, 3, seed=7)
    y[1] = model(x)[1]
    if dtype == "float32":
        model = keras.Sequential(
            [keras.Input((4,)), layers.Dense(5, activation="relu"), layers.Dense(3)]
        )
    grads = pj.Engine(model).gradients(x, y, loss="mse")
    summed = grads.clipped_sum(max_norm)
    whole = grads.vjp(np.ones(3))
    for key, part in summed.items():
        assert np.all(np.isfinite(part))
        if max_norm > 1:
            np.testing.assert_allclose(part, whole[key], rtol=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(part)) for part in summed.values()))
    assert max_norm > 1 or norm <= 3 * max_norm


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan"), float("inf"), "much", None])
def test_a_max_norm_that_is_no_positive_number(max_norm):
    with pytest.raises(InputError, match="max_norm above zero"):
        small_gradients().clipped_sum(max_norm)


def test_a_max_norm_for_other_groups_than_there_are():
    with pytest.raises(InputError, match="hidden.*top.*nowhere"):
        small_gradients().clipped_sum({"nowhere": 1.0}, per="layer")


@pytest.mark.parametrize("query", ["norms", "clipped_sum"])
def test_parts_of_another_kind(query):
    with pytest.raises(InputError, match="'row'"):
        getattr(small_gradients(), query)(per="row")


def test_one_example():
    grads = small_gradients(random(1, 4))
    for key, part in grads.mean().items():
        close(part, grads[key][0])
    for part in grads.variance().values():
        np.testing.assert_array_equal(part, 0)
    right = np.asarray(grads.matrix())
    close_by_key(grads.clipped_sum(0.1), clipped(right, 0.1), grads)
    close(grads.cosine_similarity(), [[1.0]], 1e-12)
    with pytest.raises(InputError, match="at least 2 examples"):
        grads.variance(ddof=1)


def test_examples_that_are_all_the_same_have_no_variance():
    x, y = np.repeat(random(1, 4), 4, 0), np.repeat(random(1, 3), 4, 0)
    grads = small_gradients(x, y)
    for key, part in grads.variance().items():
        np.testing.assert_allclose(part, 0, atol=1e-14 * np.square(grads[key]).max())


def test_no_examples():
    grads = small_gradients(np.zeros((0, 4)), np.zeros((0, 3)))
    assert grads.shape == (0, 43)
    assert grads.losses.shape == grads.norms().shape == (0,)
    assert grads.gram().shape == grads.cosine_similarity().shape == (0, 0)
    assert grads.project(5).shape == (0, 5)
    assert grads.matrix().shape == (0, 43)
    assert grads.jvp(np.ones(43)).shape == (0,)
    for key, part in grads.clipped_sum().items():
        assert part.shape == grads[key].shape[1:]
        np.testing.assert_array_equal(part, 0)
    for query in (grads.mean, grads.variance, grads.snr):
        with pytest.raises(InputError, match="at least 1 examples. Received: 0"):
            query()


# --- With respect to what -------------------------------------------------------------------


def test_with_respect_to_inputs():
    model, x, y = small(), random(3, 4), random(3, 3, seed=7)
    grads = pj.Engine(model).gradients(x, y, loss="mse", wrt="inputs")
    losses, (right,) = oracle.loss_rows(model, SQUARES, x, y)
    close(grads.losses, losses)
    assert grads.shape == (3, 4)
    close(grads["inputs"], right)
    close(grads["x"], right)
    close(grads.norms(), np.linalg.norm(right, axis=1))
    close(grads.gram(), right @ right.T)
    close(grads.variance()["x"], right.var(0))


def test_with_respect_to_several_inputs():
    built = subject("shared_dense", "float64")
    y = labels("shared_dense")
    grads = engine("shared_dense", "float64", "auto").gradients(
        built.x, y, loss="mse", wrt="inputs"
    )
    _, right = oracle.loss_rows(built.call, SQUARES, built.x, y)
    for found, rows in zip(grads.values(), right, strict=True):
        close(found, rows)


@pytest.mark.parametrize("by", ["layer", "variable", "name", "list"])
def test_with_respect_to_some_weights(by):
    model, x, y = small(), random(3, 4), random(3, 3, seed=7)
    hidden = model.get_layer("hidden")
    wrt = {
        "layer": hidden,
        "variable": hidden.kernel,
        "name": "hidden/kernel",
        "list": [hidden.kernel, "hidden/bias"],
    }[by]
    grads = pj.Engine(model).gradients(x, y, loss="mse", wrt=wrt)
    wanted = [hidden.kernel, hidden.bias][: 2 if by in ("layer", "list") else 1]
    assert list(grads) == [v.path for v in wanted]
    _, right = oracle.loss_rows(model, SQUARES, x, y, wanted)
    for variable, rows in zip(wanted, right, strict=True):
        close(grads[variable], rows)
    flat = np.concatenate([rows.reshape(3, -1) for rows in right], 1)
    close(grads.norms(), np.linalg.norm(flat, axis=1))


def test_with_respect_to_an_activation():
    model, x, y = small(), random(3, 4), random(3, 3, seed=7)
    grads = pj.Engine(model).gradients(x, y, loss="mse", wrt=pj.activation("hidden"))
    hidden = model.get_layer("hidden")(x).numpy()
    _, (right,) = oracle.loss_rows(model.get_layer("top"), SQUARES, hidden, y)
    close(grads["hidden"], right)
    close(grads.norms(), np.linalg.norm(right, axis=1))


def test_a_weight_that_the_loss_does_not_depend_on_is_zero_and_named():
    x = keras.Input((4,))
    model = keras.Model(x, [layers.Dense(2, name="cats")(x), layers.Dense(3, name="dogs")(x)])
    with pytest.warns(DisconnectedWarning, match="cats/kernel"):
        grads = pj.Engine(model).gradients(
            random(3, 4), {"dogs": random(3, 3)}, loss={"dogs": "mse"}
        )
    np.testing.assert_array_equal(grads["cats/kernel"], 0)
    assert np.all(grads.norms() > 0)
    assert not np.any(grads.variance()["cats/kernel"])
    assert not np.any(grads.clipped_sum(0.1)["cats/kernel"])


# --- Answers --------------------------------------------------------------------------------


def test_answers_take_short_keys():
    grads = small_gradients(wrt="top")
    kernel = next(key for key in grads if key.endswith("kernel"))
    for answer in (grads.mean(), grads.variance(), grads.clipped_sum(), grads.vjp(np.ones(3))):
        np.testing.assert_array_equal(answer["kernel"], answer[kernel])
    assert "kernel" in grads
    with pytest.raises(UnknownNameError, match=r"'bias'.*hidden/bias.*top/bias"):
        small_gradients().mean()["bias"]


def test_variables_look_answers_up():
    model = small()
    grads = pj.Engine(model).gradients(random(3, 4), random(3, 3), loss="mse")
    kernel = model.get_layer("top").kernel
    np.testing.assert_array_equal(grads.mean()[kernel], grads.mean()["top/kernel"])


@pytest.mark.parametrize("vocabulary", [40, 3])  # larger and smaller than a sentence
def test_a_table_in_slices_is_the_rows_that_are_not_zero(vocabulary):
    model = keras.Sequential(
        [keras.Input((6,), dtype="int32"), layers.Embedding(vocabulary, 4), layers.Conv1D(3, 3),
         layers.GlobalAveragePooling1D()]
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(0, vocabulary, (5, 6))
    ids[0] = [1, 2, 1, 1, 2, 1]
    grads = pj.Engine(model).gradients(ids, random(5, 3), loss="mse")
    found, rows = grads.slices("embeddings")
    whole = grads["embeddings"].numpy()
    assert found.shape[0] == rows.shape[0] == 5
    for b, looked_up in enumerate(ids):
        used = np.unique(looked_up)
        np.testing.assert_array_equal(found[b], used)
        np.testing.assert_allclose(rows[b], whole[b, used], rtol=1e-6)
        assert not np.any(np.delete(whole[b], used, 0))


def test_a_table_that_is_used_in_another_way_too_has_all_its_rows():
    grads, table = gradients("tied_embedding"), subject("tied_embedding", "float64").trainable[0]
    ids, rows = grads.slices(table)
    np.testing.assert_array_equal(ids.to_tensor(), [np.arange(7)] * 3)
    np.testing.assert_array_equal(rows.to_tensor(), grads[table])


def test_a_matrix_that_is_too_large_tells_a_way_out():
    model = keras.Sequential([keras.Input((300,)), layers.Dense(400), layers.Dense(8)])
    grads = pj.Engine(model, memory_limit="1MiB").gradients(
        random(16, 300), random(16, 8), loss="mse"
    )
    with pytest.raises(TooLargeError, match="clipped_sum"):
        grads.matrix()
    assert grads.norms().shape == (16,)


def test_what_it_is_shows():
    grads = small_gradients()
    assert repr(grads).startswith("Gradients(shape=(3, 43)")


@pytest.mark.parametrize("question", ["norms", "gram", "jvp", "variance", "clipped_sum", "project"])
def test_every_weight_is_explained(question):
    grads = gradients("transformer")
    explanation = grads.explain(question)
    assert [row.weight for row in explanation.rows] == list(grads)
    text = str(explanation)
    assert text.startswith(question)
    for row in explanation.rows:
        assert f"{row.weight}  {row.factor}  {row.ways[0].name}" in text


def test_a_query_that_there_is_not_brings_those_that_there_are():
    made = engine("mlp", "float64", "auto").jacobian(subject("mlp", "float64").x)
    with pytest.raises(UnknownNameError, match="no query 'snr'.*'norms'"):
        made.explain("snr")
    with pytest.raises(UnknownNameError, match="'varience'.*'variance'"):
        small_gradients().explain("varience")


def test_gradients_stay_what_they_were_when_weights_change():
    model = small()
    grads = pj.Engine(model).gradients(random(3, 4), random(3, 3), loss="mse")
    first = grads.matrix().numpy()
    for variable in model.trainable_variables:
        variable.assign(-3 * variable)
    np.testing.assert_array_equal(grads.matrix(), first)


class Counting(layers.Layer):
    """Counts how often its Python code runs."""

    calls = 0

    def call(self, x):
        Counting.calls += 1
        return x * 1.5


@pytest.mark.parametrize(
    "loss",
    ["mse", keras.losses.Huber(delta=0.5), keras.losses.mean_squared_error, None],
    ids=["name", "object", "function", "compiled"],
)
def test_the_model_is_not_traced_again_for_shapes_it_has_seen(loss):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), Counting(), layers.Dense(2)])
    model.compile(loss=lambda y, output: tf.abs(y - output))
    made = pj.Engine(model, certify="never")  # which calls the model itself
    x, y = random(4, 4).astype("float32"), random(4, 2)
    for batch in (4, 3):
        made.gradients(x[:batch], y[:batch], loss=loss).norms()
    before = Counting.calls
    again = keras.losses.Huber(delta=0.5) if isinstance(loss, keras.losses.Huber) else loss
    for batch in (1, 2, 3, 4):
        made.gradients(x[:batch] + 1, y[:batch] - 1, loss=again).norms()
    assert Counting.calls == before
