"""KFAC and EKFAC: against their formulas on activations and cotangents by plain TensorFlow."""

from __future__ import annotations

import functools

import keras
import numpy as np
import oracle
import pytest
import scipy.linalg
import subjects
import tensorflow as tf
from chains import BATCH, CHAINS, made
from keras import layers
from models import MODELS, Subject, floats, randomise
from sampling import every

import perjac as pj
from perjac.errors import InputError, PerjacWarning, TooLargeError
from perjac.fisher import kronecker
from perjac.fisher._rows_of import Root

pytestmark = pytest.mark.slow  # left out of `make check`


def roots(logits: np.ndarray) -> np.ndarray:
    """Return S with S Sᵀ the Hessian of -log softmax, (B, C, K)."""
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return np.sqrt(p)[:, None] * (np.eye(p.shape[1]) - p[:, :, None])


@functools.cache
def sides(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return a (B, T, G, I) and δ (B, K, T, G, O) of each kernel, by one backward pass a row."""
    model, stack, x = made(name)
    found = {}
    for place, read in CHAINS[name].columns.items():
        before = tf.constant(x)
        for layer in stack[:place]:
            before = layer(before)
        with tf.GradientTape() as tape:
            met = after = stack[place](before)
            tape.watch(met)
            for layer in stack[place + 1 :]:
                after = layer(after)
        slopes = tape.batch_jacobian(after, met).numpy()  # (B, C, ..., O)
        delta = np.einsum("bck,bc...->bk...", roots(after.numpy()), slopes)
        a = read(np.asarray(before))
        delta = delta.reshape(*delta.shape[:2], a.shape[1], a.shape[2], -1)
        found[stack[place].weights[0].path] = a, delta
    return found


def factors(a: np.ndarray, delta: np.ndarray, approximation: str):
    """Return A and B of a group's a (B, T, I) and δ (B, K, T, O), from the definition."""
    batch, positions = a.shape[:2]
    if approximation == "expand":
        left = np.einsum("bti,btj->ij", a, a) / (batch * positions)
        return left, np.einsum("bkto,bktp->op", delta, delta) / batch
    mean, total = a.mean(1), delta.sum(2)
    left = np.einsum("bi,bj->ij", mean, mean) / batch
    return left, np.einsum("bko,bkp->op", total, total) / batch


def factors_of_rows(rows: np.ndarray):
    """Return A and B of rows (B, K, I, O) whose a and δ are not held."""
    left = np.einsum("bkio,bkjo->ij", rows, rows) / np.sum(rows**2)
    return left, np.einsum("bkio,bkip->op", rows, rows) / len(rows)


def on_the_weight(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return blocks (G, I, O, I, O) as a matrix (p, p) in the order of the weight's numbers."""
    g, i, o = blocks.shape[:3]
    whole = np.zeros((g, i, o, g, i, o))
    for n in range(g):
        whole[n, :, :, n] = blocks[n]
    if g > 1:  # (h, w, channel, multiplier); (h, w, channel of the group, (group, output of it))
        whole = whole.transpose(1, 0, 2, 4, 3, 5)
    return whole.reshape(np.prod(shape, dtype=int), -1)


def expected_block(name: str, approximation: str, key: str, shape):
    """Return the KFAC block of a kernel; of an embedding with A's diagonal alone."""
    a, delta = sides(name)[key]
    blocks = []
    for group in range(a.shape[2]):
        a_g, delta_g = a[:, :, group], delta[:, :, :, group]
        if name == "conv_depthwise":
            left, right = factors_of_rows(np.einsum("bti,bkto->bkio", a_g, delta_g))
        else:
            left, right = factors(a_g, delta_g, approximation)
        left = np.diag(np.diag(left)) if "embedding" in key else left
        blocks.append(np.einsum("ij,op->iojp", left, right))
    return on_the_weight(np.array(blocks), shape)


@functools.cache
def exact_blocks(name: str) -> list[np.ndarray]:
    """Return the block of F of each weight, from its explicit rows."""
    model, _, x = made(name)
    found = []
    for rows in oracle.weight_rows(model, x, model.trainable_variables):
        rows = rows.reshape(*rows.shape[:2], -1)
        rows = np.einsum("bck,bcp->bkp", roots(model(x).numpy()), rows)
        found.append(np.einsum("bkp,bkq->pq", rows, rows) / len(rows))
    return found


@functools.cache
def engine(name: str) -> pj.Engine:
    return pj.Engine(made(name)[0])


def fisher(name: str, likelihood: str = "gaussian", **options):
    return engine(name).fisher(made(name)[2], likelihood=likelihood, **options)


@functools.cache
def form(name: str, likelihood: str, approximation: str, kind: str):
    return getattr(fisher(name, likelihood), kind)(approximation)


def close(found, expected, rtol=1e-10):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(expected).max())


over_chains = pytest.mark.parametrize("name", list(CHAINS))
over_approximations = pytest.mark.parametrize("approximation", ["expand", "reduce"])


over_kinds = pytest.mark.parametrize("kind", ["kronecker", "eigenbasis"])


@over_chains
@over_approximations
def test_blocks_are_the_formula(name, approximation):
    found = form(name, "categorical", approximation, "kronecker").to_numpy()
    every = zip(made(name)[0].trainable_variables, exact_blocks(name), strict=True)
    blocks = [
        expected_block(name, approximation, variable.path, variable.shape)
        if variable.path in sides(name)
        else exact  # a bias
        for variable, exact in every
    ]
    close(found, scipy.linalg.block_diag(*blocks))


@over_chains
@over_approximations
def test_eigenbasis_is_the_diagonal_in_the_basis_of_kfac(name, approximation):
    kfac, ekfac = (form(name, "categorical", approximation, k) for k in ("kronecker", "eigenbasis"))
    for (keys, block), exact in zip(ekfac.blocks.items(), exact_blocks(name), strict=True):
        near, size = kfac.blocks[keys], np.abs(exact).max()
        basis = block.eigenvectors(np.arange(block.size))
        close(basis.T @ basis, np.eye(block.size))
        inside = basis.T @ near.products(basis)
        close(inside, np.diag(np.diag(inside)))  # it is KFAC's
        close(block.eigenvalues(), np.diag(basis.T @ exact @ basis))
        close(block.products(np.eye(block.size)), basis * block.eigenvalues() @ basis.T)
        assert block.trace() == pytest.approx(np.trace(exact), rel=1e-10)
        errors = [np.linalg.norm(b.products(np.eye(b.size)) - exact) for b in (block, near)]
        assert errors[0] <= errors[1] + 1e-10 * size


@over_chains
@over_kinds
def test_answers_are_those_of_the_matrix(name, kind):
    found = form(name, "categorical", "expand", kind)
    whole, damping = found.to_numpy(), 1e-3
    count = len(whole)
    damped = whole + damping * np.eye(count)
    v = np.random.default_rng(3).standard_normal((count, 2))
    close(whole, whole.T)
    close(found.apply(v, damping), damped @ v)
    solution = found.solve(v, damping)
    assert np.linalg.norm(damped @ solution - v) < 1e-8 * np.linalg.norm(v)
    close(found.diagonal(), np.diag(whole))
    assert found.trace() == pytest.approx(np.trace(whole), rel=1e-10)
    assert found.logdet(damping) == pytest.approx(np.linalg.slogdet(damped)[1], rel=1e-10)
    values = np.linalg.eigvalsh(whole)
    close(found.eigenvalues(), values)
    some, vectors = found.eigsh(4)
    close(some, values[::-1][:4])
    close(whole @ vectors, some * vectors)
    close(vectors.T @ vectors, np.eye(4))
    spread = found._spread(np.eye(count), damping)
    close(spread @ spread.T @ damped, np.eye(count), rtol=1e-9)


@over_kinds
def test_solutions_are_exact_in_float32(kind):
    """A side of more entries than examples has eigenvalues that rounding leaves below zero."""
    model = keras.Sequential([keras.Input((30,)), layers.Dense(20), layers.Dense(3)])
    x = np.random.default_rng(0).standard_normal((8, 30)).astype("float32")
    found = getattr(pj.Engine(model).fisher(x), kind)()
    v = np.random.default_rng(1).standard_normal(found.shape[0])
    residual = found.apply(found.solve(v, 1e-6), 1e-6) - v
    assert np.linalg.norm(residual) < 1e-8 * np.linalg.norm(v)


@pytest.mark.parametrize(
    ("name", "approximation", "reduction"),
    [(name, "expand", "mean") for name in CHAINS]
    + [("conv", "reduce", "mean"), ("conv", "expand", "sum"), ("conv_depthwise", "expand", "sum")],
)
def test_halves_merge_to_the_whole(name, approximation, reduction):
    x = made(name)[2]
    parts = [
        engine(name).fisher(part, likelihood="gaussian", reduction=reduction)
        for part in (x[:2], x[2:], x)
    ]
    first, second, whole = (part.kronecker(approximation) for part in parts)
    merged = first.merge(second)
    close(merged.to_numpy(), whole.to_numpy())
    assert merged.examples == BATCH


def test_eigenbases_of_different_data_do_not_merge():
    x = made("dense")[2]
    first, second = (engine("dense").fisher(part).eigenbasis() for part in (x[:2], x[2:]))
    with pytest.raises(InputError, match="eigenbases of two parts of the data are not the same"):
        first.merge(second)
    close(first.merge(first).to_numpy(), first.to_numpy())


@over_kinds
@pytest.mark.parametrize("name", ["dense_on_sequences", "conv", "embedding"])
def test_batches_do_not_matter(name, kind):
    x = made(name)[2]
    data = tf.data.Dataset.from_tensor_slices(x).batch(2)
    found = getattr(engine(name).fisher(data, likelihood="gaussian"), kind)()
    close(found.to_numpy(), form(name, "gaussian", "expand", kind).to_numpy())


@over_kinds
@pytest.mark.parametrize("name", ["conv", "conv_depthwise", "embedding"])
def test_rows_may_come_a_few_at_a_time(name, kind, monkeypatch):
    monkeypatch.setattr(Root, "at_once", lambda *_: (2, 1))
    found = getattr(fisher(name), kind)()
    close(found.to_numpy(), form(name, "gaussian", "expand", kind).to_numpy())


def linear(shape: tuple[int, ...], *after: layers.Layer) -> tuple[pj.Engine, np.ndarray]:
    """Return a model of one weight, linear in it, and examples."""
    with floats("float64"):
        model = keras.Sequential([keras.Input(shape), layers.Dense(3, use_bias=False), *after])
    randomise(model.weights)
    return pj.Engine(model), np.random.default_rng(0).standard_normal((6, *shape))


@pytest.mark.parametrize(
    ("shape", "after", "approximations"),
    [
        ((4,), [], ["expand", "reduce"]),
        ((5, 4), [], ["expand"]),
        ((5, 4), [layers.GlobalAveragePooling1D(dtype="float64")], ["reduce"]),
    ],
    ids=["one position", "an output for each position", "the mean of positions"],
)
def test_exact_where_the_cotangents_do_not_depend_on_the_data(shape, after, approximations):
    own, x = linear(shape, *after)
    exact = own.fisher(x, likelihood="gaussian")
    for approximation in approximations:
        close(exact.kronecker(approximation).to_numpy(), exact.dense().to_numpy())


def test_exact_for_one_example_of_one_position():
    exact = engine("dense").fisher(made("dense")[2][:1])
    close(exact.kronecker().to_numpy(), exact.blocks([[k] for k in exact.keys]).to_numpy())


@pytest.mark.parametrize("options", [
    {"kind": "sampled", "likelihood": "categorical", "samples": 2, "seed": 3},
    {"kind": "empirical", "loss": "mse"},
    {"likelihood": "mse"},
], ids=["sampled", "empirical", "loss"])  # fmt: skip
def test_other_kinds_of_information(options):
    """Their rows are others; a bias's block is exact, and EKFAC's trace."""
    x = made("dense_on_sequences")[2]
    y = np.random.default_rng(1).standard_normal((len(x), 3))
    found = engine("dense_on_sequences").fisher((x, y), **options)
    kfac, ekfac, exact = (
        found.kronecker(),
        found.eigenbasis(),
        found.blocks([[key] for key in found.keys]),
    )
    close(kfac.blocks[found.keys[1],].products(np.eye(5)), exact.blocks[found.keys[1],].matrix)
    assert ekfac.trace() == pytest.approx(exact.trace(), rel=1e-10)


def exact_rows(own: Subject) -> dict[str, np.ndarray]:
    rows = oracle.weight_rows(own.call, own.x, own.trainable)
    return dict(zip(subjects.names(own.trainable), rows, strict=True))


@pytest.mark.parametrize("name", ["tied_embedding", "normalised_weight", "low_rank_update"])
def test_rows_that_are_no_outer_products_keep_their_trace(name):
    own = subjects.subject(name, "float64")
    found = subjects.engine(name, "float64", "auto").fisher(own.x, likelihood="gaussian")
    kfac = found.kronecker()
    shared = {"tied_embedding": "embeddings", "normalised_weight": "kernel"}.get(name, "down")
    for key, rows in exact_rows(own).items():
        if not key.split("/")[-1].startswith(shared) or rows.ndim != 4:
            continue
        left, right = factors_of_rows(rows)
        block = kfac.blocks[key,]
        close(block.products(np.eye(block.size)), np.kron(left, right))
        assert block.trace() == pytest.approx(np.sum(rows**2) / len(rows), rel=1e-10)
        return
    pytest.fail(f"{name} has no weight {shared}")


def test_tape_path_keeps_the_trace():
    own = subjects.subject("mlp", "float64")
    found = subjects.engine("mlp", "float64", "tape").fisher(own.x, likelihood="gaussian")
    kfac = found.kronecker()
    for key, rows in exact_rows(own).items():
        block = kfac.blocks[key,].products(np.eye(kfac.blocks[key,].size))
        left, right = factors_of_rows(rows.reshape(*rows.shape[:2], -1, rows.shape[-1]))
        close(block, np.kron(left, right))


def test_recurrent_kernels_expand_over_time():
    """LSTM: z_t = x_t W + h_{t-1} R + b, so that both kernels' sides run over the steps."""
    own = subjects.subject("lstm", "float64")
    kernel, recurrent, bias, *dense = own.trainable
    befores, deltas = [], []
    for x in own.x:
        with tf.GradientTape(persistent=True) as tape:
            h = c = tf.zeros((1, recurrent.shape[0]), tf.float64)
            met, before = [], []
            for step in x:
                before.append(h)
                z = step[None] @ kernel.value + h @ recurrent.value + bias.value
                tape.watch(z)
                met.append(z)
                i, f, g, o = tf.split(z, 4, 1)
                c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(g)
                h = tf.sigmoid(o) * tf.tanh(c)
            out = tf.unstack((h @ dense[0].value + dense[1].value)[0])
        deltas.append([[tape.gradient(o_k, z)[0] for z in met] for o_k in out])
        befores.append(tf.concat(before, 0))
    delta = np.array(deltas)
    kfac = subjects.engine("lstm", "float64", "auto").fisher(own.x, likelihood="gaussian")
    kfac = kfac.kronecker()
    for variable, a in ((kernel, own.x), (recurrent, befores)):
        left, right = factors(np.array(a), delta, "expand")
        block = kfac.blocks[variable.path,]
        close(block.left[0], left)
        close(block.right[0], right)


def test_long_sides_keep_their_diagonal(monkeypatch):
    whole = form("dense", "categorical", "expand", "kronecker")
    monkeypatch.setattr(kronecker, "_LONGEST", 4)
    found = fisher("dense", "categorical")
    with pytest.warns(PerjacWarning, match="only the diagonal of sides longer than 4"):
        kfac = found.kronecker()
    for keys, block in kfac.blocks.items():
        full = whole.blocks[keys]
        for side, other in ((block.left, full.left), (block.right, full.right)):
            close(side, np.einsum("gii->gi", other) if other.shape[1] > 4 else other)
    assert kfac.trace() == pytest.approx(whole.trace(), rel=1e-10)
    with pytest.warns(PerjacWarning):
        ekfac = found.eigenbasis()
    assert ekfac.trace() == pytest.approx(found.trace(), rel=1e-10)
    v = np.ones(kfac.shape[0])
    for some in (kfac, ekfac):
        close((some.to_numpy() + np.eye(len(v))) @ some.solve(v, 1.0), v)


def test_blocks_survive_a_weight_without_influence():
    with floats("float64"):
        given = keras.Input((4,))
        first, second = layers.Dense(2, name="used")(given), layers.Dense(3, name="unused")(given)
        model = keras.Model(given, [first, second])
    found = pj.Engine(model).fisher(np.ones((3, 4)), likelihood="gaussian", of=0)
    with pytest.warns(pj.errors.DisconnectedWarning):
        kfac = found.kronecker()
    assert kfac.blocks["unused/kernel",].trace() == 0
    assert np.isfinite(kfac.solve(np.ones(kfac.shape[0]), 1.0)).all()


@over_approximations
@pytest.mark.parametrize(
    "name", every(2, [name for name, case in MODELS.items() if not case.outputs])
)
def test_every_model(name, approximation):
    """Whatever a weight's factor is: EKFAC's trace is F's, and solutions solve."""
    own = subjects.subject(name, "float64")
    found = subjects.engine(name, "float64", "auto").fisher(own.x, likelihood="gaussian")
    kfac, ekfac = found.kronecker(approximation), found.eigenbasis(approximation)
    assert ekfac.trace() == pytest.approx(found.trace(), rel=1e-9)
    v = np.random.default_rng(0).standard_normal(kfac.shape[0])
    for some in (kfac, ekfac):
        residual = some.apply(some.solve(v, 1e-3), 1e-3) - v
        assert np.linalg.norm(residual) < 1e-8 * np.linalg.norm(v)


def test_options_and_memory_are_checked():
    found = fisher("dense")
    for ask in (found.kronecker, found.eigenbasis):
        with pytest.raises(InputError, match="approximation= one of"):
            ask("both")
    wide = keras.Sequential([keras.Input((200,)), layers.Dense(1)])
    narrow = pj.Engine(wide, memory_limit=300_000).fisher(np.ones((1, 200)), likelihood="gaussian")
    with pytest.raises(TooLargeError, match="KFAC's sides"):
        narrow.kronecker()
