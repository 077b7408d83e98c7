"""The command line as a user runs it, in a process of its own or through its main."""

import pathlib
import shutil
import statistics
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from commanded import run
from PIL import Image

pytestmark = pytest.mark.slow  # left out of `make check`

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
PERJAC = str(pathlib.Path(sys.executable).parent / "perjac")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, arrays, and a folder of pictures with one file that is none."""
    path = tmp_path_factory.mktemp("cli")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6, 5, 1)), keras.layers.Conv2D(3, 3, activation="relu"),
         keras.layers.Flatten(), keras.layers.Dense(4)]
    )  # fmt: skip
    model.save(path / "model.keras")
    model.save(path / "model.h5")
    model.compile("adam", LOSS)
    model.save(path / "compiled.keras")
    model.save(path / "compiled.h5")
    rng = np.random.default_rng(0)
    np.save(path / "x.npy", rng.uniform(size=(5, 6, 5, 1)).astype("float32"))
    np.save(path / "y.npy", [3, 0, 1, 1, 2])
    (path / "y.csv").write_text("class\n3\n0\n1\n1\n2\n")
    (path / "pictures").mkdir()
    for n in range(3):
        pixels = rng.integers(0, 256, (6, 5), dtype="uint8")
        Image.fromarray(pixels).save(path / "pictures" / f"p{n}.png")
    (path / "pictures" / "<script>.txt").write_text("no picture")
    return path


def test_help_answers_without_tensorflow():
    code = (
        "import sys, perjac.cli.main; sys.exit(bool({'tensorflow', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([PERJAC, "--help"], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert "saliency" in done.stdout
    assert statistics.median(times) < 2  # half a second on an idle machine; tests share theirs


def test_saliency_writes_a_picture_for_each_image_with_the_oracles_values(folder, capfd):
    out = folder / "maps"
    status, said, _ = run(
        capfd, "saliency", folder / "model.keras", folder / "pictures", "-o", out,
        "--method", "gradient", "--batch-size", 2,
    )  # fmt: skip
    assert status == 0, said
    assert sorted(p.name for p in out.glob("*.png")) == ["p0.png", "p1.png", "p2.png"]
    assert "<script>.txt" in said
    saved = np.load(out / "values.npz")
    model = keras.models.load_model(folder / "model.keras", compile=False)
    for n in range(3):
        pixels = np.asarray(Image.open(folder / "pictures" / f"p{n}.png"), "float32") / 255
        x = tf.constant(pixels[None, ..., None])
        with tf.GradientTape() as tape:
            tape.watch(x)
            top = tf.reduce_max(model(x))
        np.testing.assert_allclose(
            saved["values"][n], tape.gradient(top, x)[0], rtol=1e-4, atol=1e-6
        )
    assert (out / "index.html").read_text().count("data:image/png;base64,") == 6


def test_saliency_of_all_outputs_by_several_methods(folder, capfd):
    import perjac as pj

    out = folder / "several"
    status, said, _ = run(
        capfd, "saliency", folder / "model.keras", folder / "x.npy", "-o", out, "--target", "all",
        "--method", "gradient,input_x_gradient", "--channels", "abs-max", "--batch-size", 3,
    )  # fmt: skip
    assert status == 0, said
    assert "Wrote 10 pictures" in said
    assert "Explained: outputs." in said
    both = ("gradient", "input_x_gradient")
    expected = {f"example_{n}_{method}.png" for n in range(5) for method in both}
    assert {p.name for p in out.glob("*.png")} == expected
    saved, x = np.load(out / "values.npz"), np.load(folder / "x.npy")
    engine = pj.Engine(keras.models.load_model(folder / "model.keras", compile=False))
    for method in both:
        att = pj.saliency.METHODS[method](engine, x, target="all")
        np.testing.assert_allclose(saved[f"values/{method}"], att.values, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(saved["outputs"], att.outputs, rtol=1e-5)
    assert list(saved["about/names"]) == list("01234")
    assert list(saved["about/methods"]) == list(both)


def test_a_softmax_is_noticed_and_logits_are_explained_on_request(folder, capfd):
    inside = keras.models.load_model(folder / "model.keras", compile=False)
    keras.Sequential([inside, keras.layers.Softmax()]).save(folder / "soft.keras")
    arguments = ["saliency", folder / "soft.keras", folder / "x.npy", "-o", folder / "soft"]
    status, said, _ = run(capfd, *arguments)
    assert status == 0
    assert "Explained: probabilities, after Softmax." in said
    assert "--of logits" in said
    status, said, _ = run(capfd, *arguments, "--of", "logits")
    assert status == 0
    assert "Explained: logits." in said
    assert "--of logits" not in said
    saved = np.load(folder / "soft" / "values.npz")
    np.testing.assert_allclose(saved["outputs"], inside(np.load(folder / "x.npy")), rtol=1e-5)
    np.testing.assert_array_equal(saved["target"], saved["outputs"].argmax(1))


def test_saliency_of_an_embedding_and_of_several_inputs(folder, capfd):
    ids, number = keras.Input((7,), dtype="int32", name="ids"), keras.Input((2,), name="number")
    words = keras.layers.Embedding(20, 4, name="embed")(ids)
    top = keras.layers.Dense(3)(keras.layers.Flatten()(words))
    keras.Model(ids, top).save(folder / "text.keras")
    np.save(folder / "ids.npy", np.arange(14).reshape(2, 7))
    text = ["saliency", folder / "text.keras", folder / "ids.npy", "-o", folder / "text"]
    assert run(capfd, *text, "--wrt", "embed")[0] == 0
    assert np.load(folder / "text" / "values.npz")["values"].shape == (2, 7, 4)
    assert ">13</span>" in (folder / "text" / "index.html").read_text()
    image = keras.Input((4, 4, 1), name="image")
    flat = keras.layers.Concatenate()([keras.layers.Flatten()(image), number])
    keras.Model([image, number], keras.layers.Dense(2)(flat)).save(folder / "two.keras")
    np.savez(folder / "two.npz", image=np.ones((3, 4, 4, 1), "f4"), number=np.ones((3, 2), "f4"))
    two = ["saliency", folder / "two.keras", folder / "two.npz", "-o", folder / "two"]
    assert run(capfd, *two, "--target", "all")[0] == 0
    saved = np.load(folder / "two" / "values.npz")
    assert saved["values/image"].shape == (3, 2, 4, 4, 1)
    assert saved["values/number"].shape == (3, 2, 2)
    assert (folder / "two" / "example_2_number.png").exists()
    assert run(capfd, *two, "--wrt", "number")[0] == 0
    assert np.load(folder / "two" / "values.npz")["values"].shape == (3, 2)


def test_options_go_to_the_methods_that_take_them(folder, capfd, monkeypatch):
    from perjac import saliency

    asked = []

    def along(engine, x, target="predicted", *, steps=50, seed=0):
        asked.append((target, steps, seed))
        return saliency.gradient(engine, x, target)

    def against(engine, x, background, target="predicted"):
        asked.append(background.shape)
        return saliency.gradient(engine, x, target)

    monkeypatch.setitem(saliency.METHODS, "against", against)
    monkeypatch.setitem(saliency.METHODS, "along", along)
    arguments = ["saliency", folder / "model.keras", folder / "x.npy", "-o", folder / "along"]
    status, said, _ = run(capfd, *arguments, "--method", "gradient, along", "--steps", 7)
    assert (status, asked) == (0, [("predicted", 7, 0)])
    assert "--steps is for along alone." in said
    status, _, complaint = run(capfd, *arguments, "--method", "gradient", "--steps", 7)
    assert status == 2
    assert "gradient does not take the option 'steps'. Methods that take it: " in complaint
    assert "along" in complaint
    status, _, complaint = run(capfd, *arguments, "--method", "along", "--wrt", "inputs")
    assert status == 2
    assert "along does not take the option 'wrt'" in complaint
    status, _, complaint = run(capfd, *arguments, "--method", "against")
    assert (status, complaint) == (2, "Error: against needs the option 'background'.\n")
    background = ["--background", folder / "x.npy"]
    assert run(capfd, *arguments, "--method", "against", *background)[0] == 0
    assert asked[1:] == [(5, 6, 5, 1)]


def test_saliency_keeps_what_is_finished(folder, capfd, monkeypatch):
    from perjac import saliency

    calls = []

    def interrupted(engine, x, target="predicted"):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return saliency.gradient(engine, x, target)

    monkeypatch.setitem(saliency.METHODS, "interrupted", interrupted)
    out = folder / "cut"
    status, _, complaint = run(
        capfd, "saliency", folder / "model.keras", folder / "x.npy", "-o", out,
        "--method", "interrupted", "--batch-size", 2,
    )  # fmt: skip
    assert (status, complaint) == (130, "Interrupted. What was finished is kept.\n")
    saved = np.load(out / "values.npz")
    assert saved["values"].shape == (4, 6, 5, 1)
    assert list(saved["about/names"]) == list("0123")
    assert len(list(out.glob("*.png"))) == 4
    assert (out / "index.html").read_text().count('<article class="card">') == 4


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_verify_and_inspect(folder, capfd, ending):
    status, said, _ = run(capfd, "verify", folder / f"model.{ending}", folder / "x.npy")
    assert status == 0
    assert "passed" in said
    status, said, _ = run(capfd, "inspect", folder / f"model.{ending}")
    assert status == 0
    assert "Conv2D" in said
    assert "; expected" in said
    assert "; measured" not in said
    status, said, _ = run(capfd, "inspect", folder / f"model.{ending}", "--measure")
    assert status == 0
    assert "; measured" in said


def test_verify_makes_up_examples(folder, capfd):
    status, said, _ = run(capfd, "verify", folder / "model.keras")
    assert status == 0
    assert "made-up" in said


def test_jacobian_in_batches_is_the_jacobian(folder, capfd):
    import zarr

    for name in ("j.npz", "j.zarr"):
        status, said, _ = run(
            capfd, "jacobian", folder / "model.keras", folder / "x.npy", "-o", folder / name,
            "--outputs", "3,1", "--batch-size", 2,
        )  # fmt: skip
        assert status == 0, said
    import perjac as pj

    model = keras.models.load_model(folder / "model.keras", compile=False)
    expected = pj.Engine(model).jacobian(np.load(folder / "x.npy"), outputs=[3, 1])
    plain, group = np.load(folder / "j.npz"), zarr.open_group(str(folder / "j.zarr"), mode="r")
    for key, rows in expected.items():
        np.testing.assert_allclose(plain[key], rows, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.asarray(group[key]), rows, rtol=1e-4, atol=1e-6)


def of_losses(folder, name="model.keras"):
    """Return the gradients that the commands below are to write."""
    import perjac as pj

    model = keras.models.load_model(folder / name, compile=False)
    return pj.Engine(model).gradients(
        np.load(folder / "x.npy"), np.load(folder / "y.npy"), loss=LOSS
    )


@pytest.mark.parametrize("ending", ["npz", "zarr"])
def test_gradients_in_batches_are_the_gradients(folder, capfd, ending):
    import zarr

    out, model = folder / f"g.{ending}", folder / "compiled.keras"
    status, said, _ = run(
        capfd, "gradients", model, folder / "x.npy", "--labels", folder / "y.csv", "-o", out,
        "--batch-size", 2,
    )  # fmt: skip
    assert status == 0
    written = np.load(out) if ending == "npz" else zarr.open_group(str(out), mode="r")
    grads = of_losses(folder)
    for key, rows in {**grads, "losses": grads.losses}.items():
        np.testing.assert_allclose(np.asarray(written[key]), rows, rtol=1e-4, atol=1e-6)
    facts = written if ending == "npz" else {f"about/{k}": v for k, v in written.attrs.items()}
    assert str(facts["about/model"]) == str(model)
    norms = np.asarray(grads.norms())
    hardest = said.partition("Hardest")[2].splitlines()[1:]
    assert [int(line.split()[0]) for line in hardest] == list(np.argsort(-norms))
    assert f"median {np.median(norms):.3g}, largest {norms.max():.3g}" in said
    assert f"Mean loss: {np.mean(grads.losses):.3g}" in said


def test_gradients_keep_norms_or_projections(folder, capfd):
    out = folder / "kept.npz"
    named = ["--loss", "sparse_categorical_crossentropy", "--from-logits", "--batch-size", 2]
    for model, options in [("compiled.h5", []), ("model.keras", named)]:
        grads = of_losses(folder, model)  # weights are called differently in an .h5
        arguments = [folder / model, folder / "x.npy", "--labels", folder / "y.npy", "-o", out]
        status, said, _ = run(capfd, "gradients", *arguments, *options, "--keep", "norms")
        assert status == 0, said
        written = np.load(out)
        np.testing.assert_allclose(written["norms"], grads.norms(), rtol=1e-4)
        by_layer = grads.norms(per="layer")
        assert set(written["about/layers"]) == set(by_layer)
        columns = np.stack([by_layer[str(name)] for name in written["about/layers"]], 1)
        np.testing.assert_allclose(written["layer_norms"], columns, rtol=1e-4)
        status, said, _ = run(
            capfd, "gradients", *arguments, *options, "--keep", "project:7", "--seed", 5,
            "--kind", "rademacher",
        )  # fmt: skip
        assert status == 0, said
        written = np.load(out)
        expected = grads.project(7, seed=5, kind="rademacher")
        np.testing.assert_allclose(written["projection"], expected, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(written["losses"], grads.losses, rtol=1e-4)
        facts = [written[f"about/{name}"].item() for name in ("dim", "seed", "kind")]
        assert facts == [7, 5, "rademacher"]


def test_gradients_of_pictures_and_of_several_outputs(folder, capfd):
    np.save(folder / "three.npy", [0, 1, 2])
    status, said, _ = run(
        capfd, "gradients", folder / "compiled.keras", folder / "pictures", "--labels",
        folder / "three.npy", "-o", folder / "p.npz", "--keep", "norms",
    )  # fmt: skip
    assert status == 0, said
    written = np.load(folder / "p.npz")
    assert list(written["about/names"]) == ["p0.png", "p1.png", "p2.png"]
    assert f"{written['about/names'][np.argmax(written['norms'])]}  norm" in said
    inside = keras.Input((30,))
    heads = {"a": keras.layers.Dense(4, name="a")(inside), "b": keras.layers.Dense(1)(inside)}
    model = keras.Model(inside, heads)
    model.compile("sgd", {"a": LOSS, "b": "mse"})
    model.save(folder / "heads.keras")
    x = np.load(folder / "x.npy").reshape(5, 30)
    y = {"a": np.load(folder / "y.npy"), "b": np.arange(5.0)[:, None]}
    np.save(folder / "flat.npy", x)
    np.savez(folder / "y.npz", **y)
    status, said, _ = run(
        capfd, "gradients", folder / "heads.keras", folder / "flat.npy", "--labels",
        folder / "y.npz", "-o", folder / "h.npz",
    )  # fmt: skip
    assert status == 0, said
    import perjac as pj

    expected = pj.Engine(model).gradients(x, y)
    for key, rows in expected.items():
        np.testing.assert_allclose(np.load(folder / "h.npz")[key], rows, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ending", ["npz", "zarr"])
def test_what_is_finished_is_kept(folder, capfd, ending, monkeypatch):
    import zarr

    from perjac.gradients import Gradients

    formed = Gradients.__getitem__
    calls = []

    def interrupted(grads, key):
        calls.append(key)
        if len(calls) == 7:  # in the midst of the second batch of four weights
            raise KeyboardInterrupt
        return formed(grads, key)

    monkeypatch.setattr(Gradients, "__getitem__", interrupted)
    out = folder / f"cut.{ending}"
    status, said, complaint = run(
        capfd, "gradients", folder / "compiled.keras", folder / "x.npy", "--labels",
        folder / "y.npy", "-o", out, "--batch-size", 2,
    )  # fmt: skip
    assert (status, complaint) == (130, "Interrupted. What was finished is kept.\n")
    written = np.load(out) if ending == "npz" else zarr.open_group(str(out), mode="r")
    for key, rows in of_losses(folder).items():
        assert written[key].shape == (2, *rows.shape[1:])


def test_labels_that_do_not_fit_are_one_clean_line_and_status_2(folder, capfd):
    @keras.saving.register_keras_serializable()
    class Odd(keras.metrics.Mean):
        pass

    model = keras.models.load_model(folder / "model.keras", compile=False)
    model.compile("adam", LOSS, metrics=[Odd()])
    model.save(folder / "odd.keras")
    del keras.saving.get_custom_objects()["Custom>Odd"]  # as in another process
    (folder / "words.csv").write_text("a,b\n1,2\n3,four\n")
    np.save(folder / "four.npy", [0, 1, 2, 3])
    np.save(folder / "text.npy", ["a"] * 5)
    np.save(folder / "range.npy", [3, 0, 1, 1, 4])
    np.savez(folder / "lengths.npz", a=np.zeros(5), b=np.zeros(4))
    sparse = "sparse_categorical_crossentropy"
    compiled, bare, y = folder / "compiled.keras", folder / "model.keras", folder / "y.npy"
    for words, (model, labels, *options) in {
        "Received: 4 in": (compiled, folder / "four.npy"),
        "There is no file": (compiled, folder / "nowhere.npy"),
        "labels as .npy, .npz or .csv": (compiled, compiled),
        "line 3, column 2": (compiled, folder / "words.csv"),
        "classes counted from 0": (compiled, folder / "text.npy"),
        "one length": (compiled, folder / "lengths.npz"),
        "counted from 4 here": (compiled, folder / "range.npy", "--batch-size", 2),
        "keeps no loss. Name one": (bare, y),
        f"Nearest: '{sparse}'": (bare, y, "--loss", "sparse_categorical"),
        "'mse' takes --from-logits": (bare, y, "--loss", "mse", "--from-logits"),
        "--from-logits goes with --loss": (bare, y, "--from-logits"),
        "does not take labels of shape": (bare, y, "--loss", "mse"),
        "full, norms or project:DIM": (compiled, y, "--keep", "project:0"),
        "gaussian, rademacher, sparse": (compiled, y, "--keep", "project:4", "--kind", "gauss"),
        "name the loss to leave that out": (folder / "odd.keras", y),
        "end in .npz or .zarr": (compiled, y, "-o", folder / "g.txt"),
    }.items():
        status, _, complaint = run(
            capfd, "gradients", model, folder / "x.npy", "--labels", labels,
            "-o", folder / "bad.npz", *options,
        )  # fmt: skip
        assert status == 2, words
        assert words in complaint
        assert "Traceback" not in complaint


def test_bad_input_is_one_clean_line_and_status_2(folder, capfd):
    (folder / "broken.keras").write_bytes(b"not a model")
    (folder / "words.csv").write_text("a,b\n1,2\n3,four\n")
    (folder / "empty").mkdir(exist_ok=True)
    nan = np.load(folder / "x.npy")
    nan[3] = np.nan
    np.save(folder / "nan.npy", nan)
    np.save(folder / "single.npy", nan[0])
    model, x = folder / "model.keras", folder / "x.npy"
    maps, j = folder / "o", folder / "j.npz"
    for words, arguments in {
        "broken.keras": ["inspect", folder / "broken.keras"],
        "nowhere.keras": ["inspect", "nowhere.keras"],
        "line 3, column 2": ["verify", model, folder / "words.csv"],
        "No image": ["saliency", model, folder / "empty", "-o", maps],
        "example 3": ["verify", model, folder / "nan.npy"],
        "batch axis": ["verify", model, folder / "single.npy"],
        "0 to 3": ["saliency", model, x, "-o", maps, "--target", "9"],
        "no method 'magic'": ["saliency", model, x, "-o", maps, "--method", "magic"],
        "Nearest: 'gradient'": ["saliency", model, x, "-o", maps, "--method", "gradeint"],
        "different methods": ["saliency", model, x, "-o", maps, "--method", "gradient,gradient"],
        "predicted, all or a number": ["saliency", model, x, "-o", maps, "--target", "best"],
        "'abs-max', 'l2'": ["saliency", model, x, "-o", maps, "--channels", "max"],
        "no layer 'nowhere'": ["saliency", model, x, "-o", maps, "--wrt", "nowhere"],
        "There is no weight": ["jacobian", model, x, "-o", j, "--wrt", "nope"],
        "no folder": ["jacobian", model, x, "-o", folder / "nowhere" / "j.npz"],
        ".npz or .zarr": ["jacobian", model, x, "-o", folder / "j.txt"],
        "is a file": ["saliency", model, x, "-o", x],
        "numbers separated by commas": ["jacobian", model, x, "-o", j, "--outputs", "a"],
    }.items():  # fmt: skip
        status, _, complaint = run(capfd, *arguments)
        assert status == 2, arguments
        assert words in complaint
        assert "Traceback" not in complaint


def test_wrong_usage_is_status_2(capfd):
    assert run(capfd, "inspect")[0] == 2
    assert run(capfd, "fly")[0] == 2


def test_demo_writes_a_report_that_a_browser_shows(tmp_path):
    done = subprocess.run([PERJAC, "demo", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 6
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine: the page was not looked at in a browser")
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         f"file://{tmp_path / 'report.html'}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "Which pixels drive which class" in shown.stdout
