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
from PIL import Image

from perjac import cli

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
    rng = np.random.default_rng(0)
    np.save(path / "x.npy", rng.uniform(size=(5, 6, 5, 1)).astype("float32"))
    (path / "pictures").mkdir()
    for n in range(3):
        pixels = rng.integers(0, 256, (6, 5), dtype="uint8")
        Image.fromarray(pixels).save(path / "pictures" / f"p{n}.png")
    (path / "pictures" / "<script>.txt").write_text("no picture")
    return path


def run(capfd, *arguments) -> tuple[int, str, str]:
    """Run main in this process; return its exit status and what it printed."""
    before = sys.argv
    sys.argv = ["perjac", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = before
    printed = capfd.readouterr()
    return stop.value.code, printed.out, printed.err


def test_help_answers_without_tensorflow():
    code = "import sys, perjac.cli; sys.exit('tensorflow' in sys.modules or 'numpy' in sys.modules)"
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
    assert (out / "index.html").read_text().count("data:image/png;base64,") == 3


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_verify_and_inspect(folder, capfd, ending):
    status, said, _ = run(capfd, "verify", folder / f"model.{ending}", folder / "x.npy")
    assert status == 0
    assert "passed" in said
    status, said, _ = run(capfd, "inspect", folder / f"model.{ending}")
    assert status == 0
    assert "Conv2D" in said


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


@pytest.mark.slow
def test_demo_writes_a_report_that_a_browser_shows(tmp_path):
    done = subprocess.run([PERJAC, "demo", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
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
