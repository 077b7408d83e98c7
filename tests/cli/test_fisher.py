"""`perjac fisher` and the files of forms: what is written is what the definition says."""

import signal

import keras
import numpy as np
import pytest
import scipy.special
from commanded import run
from models import floats, randomise
from oracle import weight_rows

import perjac as pj
from perjac import fisher as forms
from perjac import progress
from perjac.cli import screen
from perjac.errors import FileFormatError, InputError
from perjac.fisher._columns import Columns
from perjac.fisher._sums import Matrices
from perjac.fisher.blocks import Block, BlockForm, Dense, Diagonal
from perjac.fisher.kronecker import Eigenbasis, Kronecker
from perjac.progress import Stopped, stoppable

pytestmark = pytest.mark.slow  # left out of `make check`

N, CLASSES = 7, 3
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
LOGITS = ["--loss", "sparse_categorical_crossentropy", "--from-logits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network of two layers in float64, saved bare, compiled, with a softmax; data and labels."""
    path = tmp_path_factory.mktemp("fisher")
    with floats("float64"):
        inside = keras.Sequential(
            [keras.Input((5,)), keras.layers.Dense(4, "tanh", name="mid"),
             keras.layers.Dense(CLASSES, name="top")]
        )  # fmt: skip
        randomise(inside.weights)
        inside.save(path / "model.keras")
        keras.Sequential([keras.Input((5,)), *inside.layers, keras.layers.Softmax()]).save(
            path / "soft.keras"
        )
        inside.compile("sgd", LOSS)
        inside.save(path / "compiled.keras")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((N, 5)), rng.integers(0, CLASSES, N)
    np.save(path / "x.npy", x)
    np.savez(path / "x.npz", x=x)
    np.savetxt(path / "x.csv", x, delimiter=",", fmt="%.18g")
    np.save(path / "y.npy", y)
    np.save(path / "real.npy", rng.standard_normal((N, CLASSES)))
    for name, part in {"a": slice(0, 3), "b": slice(3, N)}.items():
        np.save(path / f"{name}.npy", x[part])
    return path


class Truth:
    """The definitions, from the explicit Jacobian of the model in a folder, in float64."""

    def __init__(self, folder):
        self.model = keras.models.load_model(folder / "model.keras", compile=False)
        self.x, self.y = np.load(folder / "x.npy"), np.load(folder / "y.npy")
        self.keys = [variable.path for variable in self.model.trainable_variables]
        rows = weight_rows(self.model, self.x, self.model.trainable_variables)
        self.jacobian = np.concatenate([r.reshape(N, CLASSES, -1) for r in rows], 2)
        self.shapes = [tuple(v.shape) for v in self.model.trainable_variables]
        self.p = scipy.special.softmax(np.asarray(self.model(self.x)), -1)
        self.hessians = np.stack([np.diag(p) - np.outer(p, p) for p in self.p])

    def information(self, hessians=None):
        """Return mean_b J_bᵀ H_b J_b, (P, P)."""
        found = self.hessians if hessians is None else hessians
        return sum(j.T @ h @ j for j, h in zip(self.jacobian, found, strict=True)) / N

    def empirical(self):
        """Return mean_b g_b g_bᵀ of the cross-entropy, (P, P)."""
        slopes = self.p - np.eye(CLASSES)[self.y]
        g = np.einsum("bk,bkp->bp", slopes, self.jacobian)
        return g.T @ g / N

    def by_key(self, vector):
        return Columns(tuple(self.keys), tuple(self.shapes)).by_key(vector)


@pytest.fixture(scope="module")
def truth(folder):
    return Truth(folder)


def written(capfd, folder, *options, model="model.keras", data="x.npy", out="out.npz"):
    """Run the command; return what it wrote, and said."""
    status, said, complaint = run(
        capfd, "fisher", folder / model, folder / data, "-o", folder / out, *options
    )
    assert status == 0, complaint
    with np.load(folder / out) as held:
        return dict(held), said


def close(found, expected, rtol=1e-10):
    """Compare with what is small beside the largest taken as rounding."""
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def test_the_diagonal_is_the_definitions(folder, truth, capfd):
    held, said = written(capfd, folder)
    expected = truth.by_key(np.diag(truth.information()))
    for key in truth.keys:
        close(held[f"diagonal/{key}"], expected[key])
    sums = [sum(expected[f"{name}/{w}"].sum() for w in ("kernel", "bias")) for name in
            ("mid", "top")]  # fmt: skip
    close(held["traces"], np.array(sums))
    assert list(held["about/layers"]) == ["mid", "top"]
    facts = {
        "form": "diagonal", "kind": "exact", "likelihood": "categorical", "explained": "output",
        "reduction": "mean", "examples": N, "parameters": len(truth.jacobian[0, 0]),
        "model": str(folder / "model.keras"), "perjac": pj.__version__,
    }  # fmt: skip
    assert {name: held[f"about/{name}"].item() for name in facts} == facts
    assert f"from {N} examples" in said
    assert f"Trace: {np.sum(sums):.4g}." in said
    assert f"{sums[0] / np.sum(sums):.1%}" in said
    assert "effective dimension" not in said


def test_matrices_are_the_definitions(folder, truth, capfd):
    whole = truth.information()
    held, _ = written(capfd, folder, "--form", "dense")
    close(held["dense/all"], whole)
    held, _ = written(capfd, folder, "--form", "blocks", "--reduction", "sum")
    cut = 5 * 4 + 4
    close(held["dense/mid"], N * whole[:cut, :cut])
    close(held["dense/top"], N * whole[cut:, cut:])


def test_kfacs_sides_of_the_last_layer_are_second_moments(folder, truth, capfd):
    """There δ is a row of the Hessian's root, so that B is the mean Hessian."""
    held, _ = written(capfd, folder, "--form", "kronecker")
    hidden = np.asarray(truth.model.layers[0](truth.x))
    close(held["kronecker/top/kernel/left"][0], hidden.T @ hidden / N)
    close(held["kronecker/top/kernel/right"][0], truth.hessians.mean(0))
    assert held["about/approximation"] == "expand"
    held, _ = written(capfd, folder, "--form", "eigenbasis", "--approximation", "reduce")
    assert held["about/approximation"] == "reduce"
    loaded = forms.load(folder / "out.npz")
    close(loaded.trace(), np.trace(truth.information()))  # the exact second moments in its basis


@pytest.mark.parametrize("implicit", [False, True])
def test_the_spectrum_is_that_of_the_definition(folder, truth, capfd, monkeypatch, implicit):
    if implicit:
        monkeypatch.setattr("perjac.fisher.information._SMALL", 0)
        monkeypatch.setattr("perjac.fisher.information._GRAM", 0)
    damping = 1e-2
    held, said = written(
        capfd, folder, "--form", "spectrum", "--top", 4, "--damping", damping
    )  # fmt: skip
    matrix = truth.information()
    values = np.linalg.eigvalsh(matrix)[::-1]
    assert held["about/complete"] == (not implicit)
    count = 4 if implicit else len(values)
    close(held["eigenvalues"], np.where(values > 1e-13 * values[0], values, 0)[:count])
    vectors = np.concatenate([held[f"vectors/{k}"].reshape(4, -1) for k in truth.keys], 1)
    close(vectors @ vectors.T, np.eye(4))
    close(matrix @ vectors.T, vectors.T * values[:4])
    dimension = np.sum(values / (values + damping))
    logdet = np.log(np.maximum(values, 0) + damping).sum()
    off = {}
    for name, expected in {"effective_dimension": dimension, "logdet": logdet}.items():
        off[name] = abs(float(held[name]) - expected)
        bound = 5 * held[f"{name}_error"] if implicit else 1e-10 * abs(expected)
        assert off[name] <= max(bound, 1e-6 * abs(expected))
    assert ("±" in said) == implicit
    assert f"Largest eigenvalues: {values[0]:.4g}, {values[1]:.4g}" in said
    zeros = np.sum(values <= 1e-13 * values[0])
    assert (f"Zero: {zeros}." in said) == (not implicit)


def test_other_kinds_are_their_definitions(folder, truth, capfd):
    labels = ["--labels", folder / "y.npy"]
    empirical = np.diag(truth.empirical())
    cases = {
        "named": (["--kind", "empirical", *LOGITS, *labels], "model.keras", empirical),
        "compiled": (["--kind", "empirical", *labels], "compiled.keras", empirical),
        "gauss-newton": (
            ["--likelihood", LOGITS[1], "--from-logits", *labels], "model.keras",
            np.diag(truth.information()),
        ),
        "gaussian": (
            ["--likelihood", "gaussian", "--variance", 4], "model.keras",
            np.diag(truth.information([np.eye(CLASSES) / 4] * N)),
        ),
    }  # fmt: skip
    for name, (options, model, expected) in cases.items():
        held, said = written(capfd, folder, *options, model=model)
        for key, part in truth.by_key(expected).items():
            close(held[f"diagonal/{key}"], part)
        if name in ("named", "compiled"):
            assert held["about/loss"] == (LOGITS[1] if name == "named" else "compiled")
            assert held["about/explained"] == "loss"
            assert "Explained: loss." in said
    residuals = np.load(folder / "real.npy") - np.asarray(truth.model(truth.x))
    fitted = ["--likelihood", "gaussian", "--variance", "fitted", "--labels", folder / "real.npy"]
    held, _ = written(capfd, folder, *fitted)
    expected = np.diag(truth.information([np.eye(CLASSES) / np.mean(residuals**2)] * N))
    close(held["diagonal/mid/kernel"], truth.by_key(expected)["mid/kernel"])


def test_draws_are_those_of_the_seed_and_written_down(folder, truth, capfd):
    options = ["--kind", "sampled", "--samples", 3]
    held, _ = written(capfd, folder, *options, "--seed", 5)
    engine = pj.Engine(truth.model)
    expected = engine.fisher(truth.x, kind="sampled", samples=3, seed=5).diagonal().diagonal()
    for key, part in truth.by_key(expected).items():
        close(held[f"diagonal/{key}"], part)
    assert (held["about/samples"], held["about/seed"]) == (3, 5)
    other, _ = written(capfd, folder, *options)
    assert other["about/seed"] == 0
    assert not np.allclose(held["diagonal/mid/kernel"], other["diagonal/mid/kernel"])


def test_a_softmax_is_left_out_and_that_is_said(folder, truth, capfd):
    held, said = written(capfd, folder, model="soft.keras")
    assert held["about/explained"] == "logits"
    assert "Explained: logits." in said
    expected = truth.by_key(np.diag(truth.information()))
    close(held["diagonal/top/kernel"], expected["top/kernel"])


def test_some_weights_of_any_kind_of_file(folder, truth, capfd):
    expected = truth.by_key(np.diag(truth.information()))["mid/kernel"]
    for data in ("x.npy", "x.npz", "x.csv"):
        held, _ = written(capfd, folder, "--wrt", "mid/kernel", data=data)
        assert list(held["about/weights"]) == ["mid/kernel"]
        close(held["diagonal/mid/kernel"], expected, 1e-5 if data == "x.csv" else 1e-10)


@pytest.mark.parametrize("form", ["diagonal", "blocks", "dense", "kronecker"])
def test_two_halves_merged_are_the_whole(folder, truth, capfd, form):
    for name in ("a", "b"):
        written(capfd, folder, "--form", form, data=f"{name}.npy", out=f"half_{name}.npz")
    merged = forms.load(folder / "half_a.npz").merge(forms.load(folder / "half_b.npz"))
    written(capfd, folder, "--form", form)
    whole = forms.load(folder / "out.npz")
    assert merged.examples == whole.examples == N
    close(merged.to_numpy(), whole.to_numpy())
    v = np.random.default_rng(0).standard_normal(len(whole.diagonal()))
    close(merged.solve(v, damping=0.1), whole.solve(v, damping=0.1), 1e-8)
    if form != "kronecker":
        engine = pj.Engine(truth.model)
        close(whole.to_numpy(), getattr(engine.fisher(truth.x), form)().to_numpy())


def made(size):
    """Return a block of each kind, of made-up numbers, some with what is optional left out."""
    rng = np.random.default_rng(size)
    root = rng.standard_normal((size, size))
    matrix = root @ root.T
    q = np.linalg.qr(root)[0][None]
    order = rng.permutation(size)
    values = rng.uniform(size=(1, size, 1))
    return {
        "dense": Dense(matrix),
        "diagonal": Diagonal(rng.uniform(size=size)),
        "kronecker": Kronecker(matrix[None], np.array([[[2.0]]]), 3.0),
        "kronecker-ordered": Kronecker(matrix[None], np.array([[2.0]]), 3.5, order),
        "eigenbasis": Eigenbasis(q, None, values),
        "eigenbasis-ordered": Eigenbasis(None, np.ones((1, 1, 1)), values, order),
    }


@pytest.mark.parametrize("kind", list(made(2)))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_block_comes_back_as_it_was(tmp_path, kind, reduction):
    columns = Columns(("net/a/kernel", "net/a/bias", "b"), ((2, 3), (6,), ()))
    groups = [("net/a/kernel",), ("net/a/bias",), ("b",)]
    blocks = {keys: made(columns.only(keys).count)[kind] for keys in groups}
    form = BlockForm(columns, 11, blocks, reduction)
    forms.save(form, tmp_path / "form.npz", note="mine", numbers=[1, 2])
    back = forms.load(tmp_path / "form.npz")
    assert back.columns == columns
    assert (back.examples, back.reduction) == (11, reduction)
    assert list(back.blocks) == groups
    np.testing.assert_array_equal(back.to_numpy(), form.to_numpy())
    np.testing.assert_array_equal(back.merge(form).to_numpy(), form.merge(form).to_numpy())
    held = np.load(tmp_path / "form.npz")
    assert held["about/note"] == "mine"
    assert list(held["about/numbers"]) == [1, 2]
    if kind == "diagonal":
        assert held["diagonal/net/a/kernel"].shape == (2, 3)


def test_the_kinds_of_blocks_that_files_know_are_all_there_are():
    kinds, waiting = set(), [Block]
    while waiting:
        found = waiting.pop().__subclasses__()
        kinds, waiting = kinds | set(found), waiting + found
    ours = {kind for kind in kinds if kind.__module__.startswith("perjac.")}
    assert {type(block) for block in made(2).values()} == ours


@pytest.mark.parametrize("groups", [[("b", "c/k"), ("a/k",)], [("c/k",), ("b",), ("a/k",)]])
def test_weights_of_blocks_in_any_order_come_back_so(tmp_path, groups):
    columns = Columns(("a/k", "b", "c/k"), ((2,), (1,), (2, 2)))
    blocks = {keys: Dense(made(columns.only(keys).count)["dense"].matrix) for keys in groups}
    form = BlockForm(columns, 1, blocks)
    forms.save(form, tmp_path / "form.npz")
    np.testing.assert_array_equal(forms.load(tmp_path / "form.npz").to_numpy(), form.to_numpy())


def test_blocks_within_one_layer_have_names_of_their_own(tmp_path):
    columns = Columns(("a/k", "a/b", "a/c", "a/d"), ((2,), (1,), (2,), (1,)))
    blocks = {keys: made(3)["dense"] for keys in [("a/k", "a/b"), ("a/c", "a/d")]}
    forms.save(BlockForm(columns, 1, blocks), tmp_path / "form.npz")
    assert list(np.load(tmp_path / "form.npz")["about/blocks"]) == ["0:a", "1:a"]
    assert list(forms.load(tmp_path / "form.npz").blocks) == list(blocks)


def test_what_is_no_form_is_refused(folder, truth, capfd, tmp_path):
    engine = pj.Engine(truth.model)
    form = engine.fisher(truth.x).diagonal()
    with pytest.raises(InputError, match="made of blocks.*LowRank"):
        forms.save(engine.fisher(truth.x).low_rank(), tmp_path / "form.npz")
    with pytest.raises(FileFormatError, match=r"end in \.npz"):
        forms.save(form, tmp_path / "form.zip")
    with pytest.raises(FileFormatError, match="no folder"):
        forms.save(form, tmp_path / "nowhere" / "form.npz")
    with pytest.raises(InputError, match="about/reduction"):
        forms.save(form, tmp_path / "form.npz", reduction="sum")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileFormatError, match="There is no file"):
        forms.load(tmp_path / "form.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(FileFormatError, match="Cannot read"):
        forms.load(tmp_path / "text.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    with pytest.raises(FileFormatError, match="Cannot read"):
        forms.load(tmp_path / "objects.npz")
    written(capfd, folder, "--form", "spectrum", out="spectrum.npz")
    with pytest.raises(FileFormatError, match="a spectrum, which numpy.load reads"):
        forms.load(folder / "spectrum.npz")
    forms.save(form, tmp_path / "form.npz")
    held = dict(np.load(tmp_path / "form.npz"))
    damaged = {
        "missing": {k: v for k, v in held.items() if k != "diagonal/mid/kernel"},
        "size": held | {"diagonal/mid/kernel": np.zeros(3)},
        "kind": held | {"about/kinds": np.array(["odd"] * 4)},
        "members": held | {"about/members": np.array(["[1"] * 4)},
    }
    for name, arrays in damaged.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(FileFormatError, match="damaged"):
            forms.load(tmp_path / f"{name}.npz")


def test_wrong_options_are_one_clean_line_and_status_2(folder, capfd):
    y = ["--labels", folder / "y.npy"]
    np.save(folder / "four.npy", [0, 1, 2, 0])
    nan = np.load(folder / "x.npy")
    nan[4] = np.nan
    np.save(folder / "nan.npy", nan)
    compiled = folder / "compiled.keras"
    for words, options in {
        "--form as one of diagonal, kronecker": ["--form", "kfac"],
        "--kind as one of exact, sampled": ["--kind", "true"],
        "--reduction as one of mean, sum": ["--reduction", "max"],
        "--figures as one of png, pdf, svg": ["--figures", "gif"],
        "--approximation as one of expand, reduce": ["--approximation", "a", "--form", "kronecker"],
        "--approximation is for --form kronecker": ["--approximation", "expand"],
        "--damping above zero. Received: -1": ["--damping", -1],
        "--damping above zero. Received: nan": ["--damping", "nan"],
        "--samples is for --kind sampled": ["--samples", 3],
        "--seed is for --kind sampled": ["--seed", 3, "--kind", "empirical", *y, *LOGITS],
        "--loss is for --kind empirical": ["--loss", "mse"],
        "--from-logits goes with a loss": ["--from-logits"],
        "--variance is for --likelihood gaussian": ["--variance", 2],
        "--likelihood is for other kinds": [
            "--kind",
            "empirical",
            "--likelihood",
            "gaussian",
            *y,
            *LOGITS,
        ],
        "--variance as a number or fitted": ["--likelihood", "gaussian", "--variance", "large"],
        "Expected variance= above zero": ["--likelihood", "gaussian", "--variance", -2],
        "--kind empirical needs --labels": ["--kind", "empirical", *LOGITS],
        "--likelihood mse needs --labels": ["--likelihood", "mse"],
        "--variance fitted needs --labels": ["--likelihood", "gaussian", "--variance", "fitted"],
        "keeps no loss. Name one": ["--kind", "empirical", *y],
        "No Keras loss 'mse' takes --from-logits": ["--likelihood", "mse", "--from-logits", *y],
        "Received: 4 in": ["--kind", "empirical", *LOGITS, "--labels", folder / "four.npy"],
        "There is no weight": ["--wrt", "nowhere"],
        "end in .npz": ["-o", folder / "out.zarr"],
        "no folder": ["-o", folder / "nowhere" / "out.npz"],
        "Labels can be drawn for": ["--kind", "sampled", "--likelihood", "mse", *y],
    }.items():
        status, _, complaint = run(
            capfd, "fisher", folder / "model.keras", folder / "x.npy", "-o", folder / "bad.npz",
            *options,
        )  # fmt: skip
        assert status == 2, words
        assert words in complaint
        assert "Traceback" not in complaint
    status, _, complaint = run(
        capfd, "fisher", compiled, folder / "nan.npy", "-o", folder / "bad.npz"
    )
    assert status == 2
    assert "example 4" in complaint
    assert not (folder / "bad.npz").exists()


def test_no_information_at_all_is_written_and_drawn_as_such(folder, capfd, monkeypatch):
    """A dead layer: nothing reaches the outputs, so that every eigenvalue is zero."""
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2, name="a"),
                              keras.layers.ReLU(), keras.layers.Dense(3, name="b")])  # fmt: skip
    model.get_layer("a").set_weights([np.zeros((5, 2)), np.full(2, -1.0)])
    model.get_layer("b").set_weights([np.zeros((2, 3)), np.zeros(3)])
    model.save(folder / "dead.keras")
    for small in (1024, 0):  # by the matrix, and by the rows
        monkeypatch.setattr("perjac.fisher.information._SMALL", small)
        held, said = written(
            capfd, folder, "--form", "spectrum", "--wrt", "a", "--figures", "png",
            model="dead.keras", out="dead.npz",
        )  # fmt: skip
        assert not held["eigenvalues"].any()
        assert held["vectors/a/kernel"].shape == (0, 5, 2)
        assert held["traces"] == [0]
        assert "Largest eigenvalues: none above zero. Zero: 12." in said
        assert "Drew dead-traces.png beside it." in said


def test_labels_that_nothing_needs_are_left_out_aloud(folder, truth, capfd):
    held, said = written(capfd, folder, "--labels", folder / "y.npy")
    assert "makes no use of --labels" in said
    expected = truth.by_key(np.diag(truth.information()))
    close(held["diagonal/mid/kernel"], expected["mid/kernel"])


def stopping(monkeypatch, after):
    """Have Ctrl-C come while the batch after so many is worked on."""
    whole, calls = pj.Engine._summed, []

    def pressed(engine, *asked, **named):
        calls.append(asked)
        if len(calls) == after + 1:
            signal.raise_signal(signal.SIGINT)
        return whole(engine, *asked, **named)

    monkeypatch.setattr(pj.Engine, "_summed", pressed)
    return calls


@pytest.mark.parametrize("options", [
    ["--form", "diagonal"],
    ["--form", "kronecker", "--reduction", "sum"],
    ["--kind", "sampled", "--samples", "2", "--seed", "3"],
], ids=lambda options: options[1])  # fmt: skip
def test_an_interrupted_run_keeps_what_is_done_and_another_goes_on(
    folder, capfd, monkeypatch, tmp_path, options
):
    monkeypatch.setattr("perjac.fisher._rows_of._AT_ONCE", 1)  # an example at a time
    out, kept = tmp_path / "form.npz", tmp_path / "form.partial.npz"
    arguments = ["fisher", folder / "model.keras", folder / "x.npy", "-o", out, *options]
    assert run(capfd, *arguments)[0] == 0
    expected, before = dict(np.load(out)), out.read_bytes()
    done = 0
    for resume in ([], ["--resume"], ["--resume"]):
        with monkeypatch.context() as patched:
            calls = stopping(patched, 1)
            status, said, complaint = run(capfd, *arguments, *resume)
        assert len(calls) == 2
        assert status == 130
        assert f"Going on after {done} examples." in said or not resume
        before_it, done = done, forms.load(kept).examples
        assert before_it < done < N
        assert "Ctrl-C again stops at once" in complaint
        assert f"{done} of {N} examples are kept in {kept}: --resume goes on" in complaint
        assert out.read_bytes() == before
        assert np.load(kept)["about/of"] == N
    status, said, _ = run(capfd, *arguments, "--resume")
    assert status == 0
    assert f"Going on after {done} examples." in said
    assert [path.name for path in tmp_path.iterdir()] == ["form.npz"]
    held = dict(np.load(out))
    assert held.keys() == expected.keys()
    for name, array in expected.items():
        if array.dtype.kind == "f":
            close(held[name], array)
        else:
            np.testing.assert_array_equal(held[name], array)


@pytest.mark.parametrize("form", ["blocks", "dense"])
def test_matrices_go_on_too(truth, monkeypatch, form):
    engine = pj.Engine(truth.model)
    information = engine.fisher(truth.x)
    information._root.at_once = lambda *asked: (2, CLASSES)
    add = Matrices.add

    def pressed(sums, rows):
        signal.raise_signal(signal.SIGINT)
        add(sums, rows)

    with monkeypatch.context() as patched, stoppable(lambda: None):
        patched.setattr(Matrices, "add", pressed)
        with pytest.raises(Stopped):
            getattr(information, form)()
    part = information.partial
    assert 0 < part.examples < N
    whole = part.merge(getattr(information.after(part.examples), form)())
    assert whole.examples == N
    close(whole.to_numpy(), getattr(engine.fisher(truth.x), form)().to_numpy())
    with pytest.raises(InputError, match="from 0 to 6. Received: 7"):
        information.after(N)


def test_only_the_same_run_goes_on(folder, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr("perjac.fisher._rows_of._AT_ONCE", 1)
    out, kept = tmp_path / "form.npz", tmp_path / "form.partial.npz"
    arguments = ["fisher", folder / "model.keras", folder / "x.npy", "-o", out]
    with monkeypatch.context() as patched:
        stopping(patched, 1)
        assert run(capfd, *arguments)[0] == 130
    left = kept.read_bytes()
    np.save(tmp_path / "other.npy", np.load(folder / "x.npy") + 1)
    other = ["fisher", folder / "model.keras", tmp_path / "other.npy", "-o", out]
    for words, wrong in {
        "--reduction was mean, is sum": [*arguments, "--reduction", "sum"],
        "the weights or the data were others": other,
        "--form diagonal, kronecker, blocks, dense": [*arguments, "--form", "eigenbasis"],
    }.items():
        status, _, complaint = run(capfd, *wrong, "--resume")
        assert (status, complaint.count("\n")) == (2, 1)
        assert words in complaint
        assert kept.read_bytes() == left
    status, said, _ = run(capfd, *arguments)  # anew
    assert (status, forms.load(out).examples) == (0, N)
    assert "Going on" not in said
    out.rename(kept)
    status, _, complaint = run(capfd, *arguments, "--resume")
    assert (status, "is no part of a run" in complaint) == (2, True)
    kept.unlink()
    assert run(capfd, *arguments, "--resume")[0] == 0  # from the start


@pytest.mark.parametrize("form", ["eigenbasis", "spectrum"])
def test_forms_that_cannot_be_made_of_parts_say_so(folder, capfd, monkeypatch, tmp_path, form):
    monkeypatch.setattr("perjac.fisher._rows_of._AT_ONCE", 1)
    told, out = progress.tell, tmp_path / "form.npz"

    def pressed(done, total):
        if done == 3:
            signal.raise_signal(signal.SIGINT)
        told(done, total)

    monkeypatch.setattr("perjac.progress.tell", pressed)
    status, _, complaint = run(
        capfd, "fisher", folder / "model.keras", folder / "x.npy", "-o", out, "--form", form
    )
    assert status == 130
    assert f"Nothing is written to {out}: --form {form} cannot be made of parts." in complaint
    assert not list(tmp_path.iterdir())


def test_stopping_at_once_leaves_what_was_there(folder, capfd, monkeypatch, tmp_path):
    def twice(engine, *asked, **named):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(pj.Engine, "_summed", twice)
    out = tmp_path / "form.npz"
    out.write_bytes(b"before")
    before = signal.getsignal(signal.SIGINT)
    status, _, complaint = run(capfd, "fisher", folder / "model.keras", folder / "x.npy", "-o", out)
    assert status == 130
    assert complaint.endswith(f"Interrupted. Nothing is written to {out}.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["form.npz"]
    assert out.read_bytes() == b"before"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_file_that_cannot_be_written_whole_is_not_written(truth, tmp_path, monkeypatch):
    form = pj.Engine(truth.model).fisher(truth.x).diagonal()
    forms.save(form, tmp_path / "form.npz")
    before = (tmp_path / "form.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        forms.save(form, tmp_path / "form.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["form.npz"]
    assert (tmp_path / "form.npz").read_bytes() == before


def test_it_tells_how_far_it_is(folder, capfd, monkeypatch):
    monkeypatch.setattr("perjac.fisher._rows_of._AT_ONCE", 1)
    monkeypatch.setattr(screen, "_QUIET", -1.0)
    _, said = written(capfd, folder)
    assert [f"{n} of {N} examples" in said for n in range(1, N)] == [True] * (N - 1)


@pytest.mark.parametrize(("ending", "form"), [("png", "diagonal"), ("pdf", "spectrum"),
                                              ("svg", "kronecker")])  # fmt: skip
def test_figures_are_drawn_beside_the_file(folder, capfd, ending, form):
    starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    (folder / ending).mkdir()
    _, said = written(
        capfd, folder, "--form", form, "--figures", ending, out=f"{ending}/form.npz"
    )  # fmt: skip
    names = ["traces", "diagonal"] + (["spectrum"] if form != "diagonal" else [])
    drawn = {f"form-{name}.{ending}" for name in names}
    assert {path.name for path in (folder / ending).iterdir()} == drawn | {"form.npz"}
    for name in drawn:
        picture = (folder / ending / name).read_bytes()
        assert picture.startswith(starts[ending])
        assert len(picture) > 2000
        assert name in said
