"""The page of maps in a browser: what its pickers show, and that it stays small and safe."""

import html.parser
import re
import shutil
import subprocess

import keras
import numpy as np
import pytest
from models import randomise

import perjac as pj
from perjac.cli.data_files import Data
from perjac.cli.gallery import write
from perjac.saliency._registry import choose

pytestmark = pytest.mark.slow  # left out of `make check`

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium on this machine: pages were not looked at in a browser"
)
EVIL = '<img src=x onerror="document.title=1">&"\'.png'
METHODS = ("gradient", "input_x_gradient")


def network(*layers):
    model = keras.Sequential(list(layers))
    randomise(model.weights)
    return pj.Engine(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A page of three images, one of them with an evil name, and 14 classes by two methods."""
    out = tmp_path_factory.mktemp("gallery")
    engine = network(
        keras.Input((9, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(14),
        keras.layers.Softmax(),
    )  # fmt: skip
    x = np.random.default_rng(0).uniform(size=(3, 9, 8, 3)).astype("f4")
    data = Data(x, ["a.png", EVIL, "2"], [])
    methods = choose(METHODS, {"target": "all", "of": "logits"})
    write(engine, data, out, methods, range(0, 3, 2), 2)
    return out


class Shown(html.parser.HTMLParser):
    """What a page shows, after its script: the classes, data and texts of what is not hidden."""

    def __init__(self, text):
        super().__init__()
        self.views, self.told, self.status, self.body, self.missing = [], [], "", "", 0
        self._into = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        kinds = (given.get("class") or "").split()
        if "view" in kinds and "hidden" not in given and tag == "div":
            self.views.append((given["data-method"], given["data-output"]))
        self.missing += "missing" in kinds and "hidden" not in given
        if tag == "body":
            self.body = given.get("class") or ""
        if "told" in kinds and "view" in kinds and "hidden" not in given:
            self._into = self.told
            self.told.append("")
        elif given.get("id") == "status":
            self._into = "status"

    def handle_data(self, data):
        if self._into == "status":
            self.status += data
        elif self._into is not None:
            self._into[-1] += data

    def handle_endtag(self, tag):
        if tag == "p":
            self._into = None


def browse(folder, tmp_path, choice=""):
    """Open the page at an address; return what it shows."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
         "--virtual-time-budget=2000", "--dump-dom", f"file://{folder / 'index.html'}{choice}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console
    return Shown(done.stdout), done.stdout


@needs_browser
def test_the_page_opens_on_the_class_predicted(folder, tmp_path):
    shown, dom = browse(folder, tmp_path)
    outputs = np.load(folder / "values.npz")["outputs"]
    best = outputs.argmax(1)
    assert shown.views == [("gradient", str(c)) for c in best]
    shares = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    for told, c, share in zip(shown.told, best, shares, strict=True):
        assert told.startswith(f"output {c}: {share[c]:.1%}")
    assert "gradient, the output predicted of each example" in shown.status
    assert shown.missing == 0
    assert "document.title=1" in dom  # as text: the title is still the page's
    assert "<title>Saliency: gradient, input_x_gradient</title>" in dom


@needs_browser
def test_method_and_class_are_picked_by_the_address(folder, tmp_path):
    outputs = np.load(folder / "values.npz")["outputs"]
    kept = [set(np.argsort(-row)[:10]) for row in outputs]
    lacking = next(c for c in range(14) if {c in row for row in kept} == {True, False})
    choice = f"#method=input_x_gradient&output={lacking}&over="
    shown, _ = browse(folder, tmp_path, choice)
    having = sum(lacking in row for row in kept)
    assert shown.views == [("input_x_gradient", str(lacking))] * having
    assert shown.missing == 3 - having
    assert shown.body == "over"
    assert f"output {lacking}" in shown.status


@needs_browser
def test_changing_a_picker_shows_another_map(folder, tmp_path):
    page = (folder / "index.html").read_text(encoding="utf-8")
    outputs = np.load(folder / "values.npz")["outputs"]
    common = next(c for c in range(14) if all(c in np.argsort(-row)[:10] for row in outputs))
    act = f"""<script>
    for (const [id, value] of [["method", "input_x_gradient"], ["output", "{common}"]]) {{
      document.getElementById(id).value = value;
      document.getElementById(id).dispatchEvent(new Event("change"));
    }}
    document.title = location.hash;
    </script>"""
    (tmp_path / "index.html").write_text(page.replace("</body>", act + "</body>"))
    shown, dom = browse(tmp_path, tmp_path)
    assert shown.views == [("input_x_gradient", str(common))] * 3
    assert f"<title>#method=input_x_gradient&amp;output={common}</title>" in dom


def test_the_page_is_one_file_with_names_escaped_and_controls_labelled(folder):
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?:|url\(|@import", page)
    pictures = re.findall(r"<img [^>]*>", page)
    assert len(pictures) == 3 + 3 * 2 * 10
    assert all(re.search(r'alt="[^"]+"', picture) for picture in pictures)
    assert len(re.findall(r"<label>[^<]*<select", page)) == 2
    assert "Explained: <strong>logits</strong>" in page


def test_completeness_is_told(tmp_path, monkeypatch):
    import dataclasses

    from perjac import saliency

    def complete(engine, x, target="predicted"):
        found = saliency.gradient(engine, x, target)
        lacking = np.full(found.values.shape[: 2 if target == "all" else 1], 0.0123)
        return dataclasses.replace(found, delta=lacking)

    monkeypatch.setitem(saliency.METHODS, "complete", complete)
    engine = network(keras.Input((6, 6, 1)), keras.layers.Flatten(), keras.layers.Dense(2))
    data = Data(np.ones((2, 6, 6, 1), "f4"), ["0", "1"], [])
    for target, count in (("all", 4), (1, 2)):
        write(engine, data, tmp_path, choose(["complete"], {"target": target}), [0], 2)
        page = (tmp_path / "index.html").read_text(encoding="utf-8")
        assert page.count("completeness lacks 0.012") == count
        assert np.load(tmp_path / "values.npz")["delta"].shape == ((2, 2) if count == 4 else (2,))


def test_methods_that_look_at_different_inputs_share_a_page(tmp_path, monkeypatch):
    from perjac import saliency

    def one(engine, x, target="predicted"):
        return saliency.gradient(engine, x, target, wrt="image")

    monkeypatch.setitem(saliency.METHODS, "one", one)
    image, row = keras.Input((6, 6, 1), name="image"), keras.Input((4,), name="row")
    flat = keras.layers.Concatenate()([keras.layers.Flatten()(image), row])
    engine = pj.Engine(keras.Model([image, row], keras.layers.Dense(2)(flat)))
    x = {"image": np.ones((1, 6, 6, 1), "f4"), "row": np.ones((1, 4), "f4")}
    write(engine, Data(x, ["0"], []), tmp_path, choose(["one", "gradient"], {}), [0], 1)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert re.findall("<h3>(.*?)</h3>", page) == ["image", "row"]
    keys = set(np.load(tmp_path / "values.npz").files)
    assert {"values/one", "values/gradient/image", "values/gradient/row"} <= keys


@pytest.mark.parametrize("shape", [(9,), (12, 3), (20, 20, 1), (3, 20, 20), (5, 6, 6, 1)])
def test_every_rank_of_input_has_a_page(shape, tmp_path):
    engine = network(keras.Input(shape), keras.layers.Flatten(), keras.layers.Dense(3))
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype("f4")
    data = Data(x, ["0", "1"], [])
    write(engine, data, tmp_path, choose(METHODS, {"target": "all"}), [0], 2)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count('<article class="card">') == 2
    if len(shape) == 1:
        assert page.count('<table class="bars"') == 2 * 2 * 3
    else:
        assert page.count("<img ") == 2 * (1 + 2 * 3)


def test_a_hundred_photographs_of_many_classes_make_a_small_page(tmp_path, monkeypatch):
    from perjac.cli import gallery

    monkeypatch.setattr(gallery, "_draw", lambda *given: 1)  # what is measured is the page
    engine = network(keras.Input((160, 160, 3)), keras.layers.Flatten(), keras.layers.Dense(12))
    rng = np.random.default_rng(0)
    coarse = rng.uniform(size=(100, 10, 10, 3)).astype("f4")
    data = Data(coarse.repeat(16, 1).repeat(16, 2), [str(n) for n in range(100)], [])
    methods = choose(["gradient"], {"target": "all"})
    write(engine, data, tmp_path, methods, range(0, 100, 20), 20)
    assert (tmp_path / "index.html").stat().st_size < 15e6
