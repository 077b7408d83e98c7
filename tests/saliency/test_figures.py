"""Pictures of maps: the right pixels and colours, whatever the input's range, layout and rank."""

import base64
import io

import keras
import numpy as np
import pytest
from PIL import Image

import perjac as pj
from perjac.errors import InputError, OutOfRangeError, UnknownNameError
from perjac.saliency import Attribution, _pictures

pytestmark = pytest.mark.slow  # left out of `make check`

rng = np.random.default_rng(0)


def made(shape, outputs=3, target="all", batch=2, maps=None):
    """Return an attribution of made-up numbers."""
    lead = (batch, outputs) if target == "all" else (batch,)
    return Attribution(
        method="made",
        values=rng.standard_normal((*lead, *(maps or shape))),
        target=target if isinstance(target, str) else np.full(batch, target),
        outputs=rng.standard_normal((batch, outputs)),
        x=rng.standard_normal((batch, *shape)),
    )


def texts(figure):
    """Return all that is written in a figure."""
    import matplotlib.text

    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def test_the_scale_is_symmetric_and_zero_is_nearly_white():
    numbers = _pictures.numbers(np.array([-9.0, -1, -0.5, 0, 0.5, 1, 9]), 1.0)
    np.testing.assert_array_equal(numbers, [1, 1, 64, 128, 192, 255, 255])
    assert _pictures.PALETTE[128].min() > 240
    red, _, blue = _pictures.PALETTE[225].astype(int)
    assert red > 2 * blue
    red, _, blue = _pictures.PALETTE[30].astype(int)
    assert blue > 2 * red
    assert _pictures.colour(1.0, 1.0) == ("#67001f", "#ffffff")
    assert _pictures.colour(0.0, 1.0)[1] == "#1c2430"


def test_one_pixel_does_not_bleach_the_rest():
    values = np.append(np.full(999, 0.5), 1e6)
    assert _pictures.limit(values) == 0.5
    assert _pictures.limit(np.zeros(4)) == 1.0
    assert _pictures.limit(np.append(np.zeros(999), 2.0)) == 2.0


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_any_range_look_alike(channels):
    image = rng.integers(0, 256, (5, 4, channels)).astype("uint8")
    image[0, 0], image[0, 1] = 0, 255
    image[..., 3:] = 255
    shown = _pictures.rgb(image)
    assert shown.shape == (5, 4, 3)
    expected = image[..., : min(channels, 3)] / 255
    np.testing.assert_allclose(shown, np.broadcast_to(expected, shown.shape), atol=1e-12)
    for same in (image.astype("float32"), image / 255.0, image.astype("int64")):
        np.testing.assert_allclose(_pictures.rgb(same), shown, atol=1e-6)
    if channels < 4:  # an opacity has no other range
        np.testing.assert_allclose(_pictures.rgb(image / 127.5 - 1), shown, atol=1e-6)
    assert _pictures.rgb(np.full((2, 2, 3), -7.0)).max() == 0
    assert _pictures.rgb(rng.standard_normal((4, 4, 9))).shape == (4, 4, 3)


def test_transparent_pixels_show_white():
    image = np.zeros((1, 2, 4))
    image[0, 1, 3] = 1
    np.testing.assert_array_equal(_pictures.rgb(image)[0, :, 0], [1, 0])


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((6,), None), ((5, 4), -1), ((8, 8, 1), -1), ((3, 8, 9), -3), ((1, 28, 28), -3),
     ((4, 4, 512), -1), ((4, 9, 3), -1), ((2, 8, 8, 1), -1), ((1, 8, 8, 8), -4), ((7, 7, 64), -1)],
)  # fmt: skip
def test_where_channels_are(shape, axis):
    assert _pictures.channel_axis(shape) == axis


def test_data_format_overrides_the_guess():
    assert _pictures.channel_axis((8, 16, 16), "channels_first") == -3
    assert _pictures.channel_axis((3, 8, 9), "channels_last") == -1
    with pytest.raises(InputError, match="'channels_last' or 'channels_first'. Received: 'nchw'"):
        _pictures.channel_axis((3, 8, 9), "nchw")


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("target", ["all", 1])
def test_channels_are_reduced_as_told(first, target):
    att = made((3, 8, 9) if first else (8, 9, 3), target=target)
    axis = -3 if first else -1
    v = att.values
    for channels, expected in {
        "sum": v.sum(axis),
        "mean": v.mean(axis),
        "abs-max": np.abs(v).max(axis),
        "l2": np.linalg.norm(v, axis=axis),
        "none": v,
    }.items():
        np.testing.assert_allclose(att.reduce(channels), expected, rtol=1e-12)
    with pytest.raises(InputError, match="'abs-max', 'l2', 'none'. Received: 'max'"):
        att.reduce("max")


def test_a_row_of_features_has_no_channels():
    att = made((6,), target=0)
    np.testing.assert_array_equal(att.reduce("abs-max"), att.values)


def test_the_classes_have_a_grid_with_the_one_predicted_framed():
    att = made((8, 8, 1), outputs=5)
    figure = att.figure(1)
    framed = [
        axes.get_title()
        for axes in figure.axes
        if axes.get_title() and all(s.get_visible() for s in axes.spines.values())
    ]
    assert framed == [f"output {att.outputs[1].argmax()}"]
    assert [axes.get_title() for axes in figure.axes[:6]] == ["input", *att.titles(1)]
    end = _pictures.limit(att.maps[1].sum(-1))
    for n, axes in enumerate(figure.axes[1:6]):
        (drawn,) = axes.images
        np.testing.assert_array_equal(drawn.get_array(), att.values[1, n].sum(-1))
        assert (drawn.norm.vmin, drawn.norm.vmax) == (-end, end)


def test_of_many_classes_the_largest_are_drawn():
    att = made((4, 4, 1), outputs=40)
    titles = {axes.get_title() for axes in att.figure().axes} - {"", "input"}
    assert titles == {f"output {n}" for n in np.argsort(-att.outputs[0])[:24]}
    assert any("the 24 largest of 40 outputs" in text for text in texts(att.figure()))


def test_the_picture_says_what_its_colours_mean():
    att = made((8, 8, 3), target=2)
    written = " ".join(texts(att.figure(channels="abs-max")))
    assert "99th percentile" in written
    assert "abs-max over 3 channels" in written
    assert "red: large" in written
    assert "red raises, blue lowers" in " ".join(texts(att.figure()))
    assert "made, example 1" in " ".join(texts(att.figure(-1)))


def test_an_overlay_is_grey_where_nothing_is_and_coloured_where_something_is():
    values = np.zeros((4, 4))
    values[1, 2], values[2, 1] = 1, -1
    over = _pictures.blend(rng.uniform(size=(4, 4, 3)), values, 1.0)
    np.testing.assert_allclose(np.ptp(over[values == 0], axis=-1), 0, atol=1e-9)
    assert over[1, 2, 0] > over[1, 2, 2] + 0.2
    assert over[2, 1, 2] > over[2, 1, 0] + 0.2


def test_coarse_maps_are_stretched_over_the_image():
    att = made((16, 12, 3), target=0, maps=(4, 3, 1))
    figure = att.figure(kind="overlay")
    assert figure.axes[1].images[0].get_array().shape == (16, 12, 3)


@pytest.mark.parametrize("first", [False, True])
def test_each_channel_has_a_map_where_channels_are_kept(first):
    att = made((3, 8, 9) if first else (8, 9, 3), target=0)
    figure = att.figure(channels="none")
    assert [axes.get_title() for axes in figure.axes[1:4]] == [
        f"output 0, channel {c}" for c in range(3)
    ]
    for c, axes in enumerate(figure.axes[1:4]):
        expected = att.values[0, c] if first else att.values[0, ..., c]
        np.testing.assert_array_equal(axes.images[0].get_array(), expected)


@pytest.mark.parametrize("target", ["all", 1])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [((6,), "bars"), ((40,), "lines"), ((6, 3), "map"), ((6, 1), "lines"), ((6, 12), "lines"),
     ((8, 7), "overlay"), ((6, 3), "tokens"), ((8, 7, 3), "both"), ((8, 7, 1), "overlay"),
     ((8, 7, 4), "map"), ((3, 8, 7), "auto"), ((6, 8, 8, 1), "slices"), ((1, 6, 8, 8), "slices"),
     ((6, 8, 8), "slices"), ((2, 2, 2, 2, 2), "auto"), ((1,), "auto"), ((1, 1, 1), "auto")],
)  # fmt: skip
def test_every_kind_draws(shape, kind, target, tmp_path):
    made(shape, target=target).save(tmp_path / "map.png", 1, kind=kind)
    assert np.ptp(np.asarray(Image.open(tmp_path / "map.png").convert("L"))) > 100


def test_zeros_are_drawn_white(tmp_path):
    att = Attribution("made", np.zeros((1, 4, 4, 1)), 0, np.zeros((1, 2)), np.zeros((1, 4, 4, 1)))
    att.save(tmp_path / "map.png")
    assert _pictures.limit(att.maps) == 1.0


def test_words_stand_on_the_colour_of_their_sum():
    att = made((4, 8), target=2)
    words = ["a", "$lovely$", "<b>", b"film"]
    figure = att.figure(tokens=words)
    drawn = {t.get_text(): t for t in figure.axes[0].texts}
    assert list(drawn) == ["a", "$lovely$", "<b>", "film"]
    sums = att.values[0].sum(-1)
    for word, value in zip(drawn, sums, strict=True):
        from matplotlib.colors import to_hex

        behind = to_hex(drawn[word].get_bbox_patch().get_facecolor())
        assert behind == _pictures.colour(value, _pictures.limit(sums))[0]
    assert {t.get_text() for t in att.figure(tokens=[7, 7, 3, 1]).axes[0].texts} == {"7", "3", "1"}
    with pytest.raises(InputError, match="each of 4 positions. Received: 2"):
        att.figure(tokens=["a", "b"])


def test_the_largest_features_have_bars_with_their_names_and_values():
    att = made((30,), target=0)
    figure = att.figure(features=[f"age {n}" for n in range(30)])
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    order = np.argsort(-np.abs(att.values[0]))[:15][::-1]
    assert labels == [f"age {n} = {att.x[0, n]:.3g}" for n in order]
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(widths, att.values[0][order])
    with pytest.raises(InputError, match="features= as 30 names. Received: 2"):
        att.figure(features=["a", "b"])


def test_slices_are_those_with_the_largest_values():
    values = np.zeros((1, 20, 4, 4, 1))
    values[0, [3, 7, 8, 12, 13, 19]] = 1
    x = rng.uniform(size=(1, 20, 4, 4, 1))
    figure = Attribution("made", values, 0, np.zeros((1, 2)), x).figure()
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [f"slice {n}" for n in (3, 7, 8, 12, 13, 19)]


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_the_ending_names_the_format(ending, tmp_path):
    path = tmp_path / f"map.{ending}"
    made((8, 8, 3), target=0).save(path, kind="overlay")
    start = path.read_bytes()[:5]
    assert start.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[ending])
    with pytest.raises(InputError, match=r"\.png, \.pdf or \.svg. Received: .*map.txt"):
        made((8, 8, 3), target=0).save(tmp_path / "map.txt")


def test_several_inputs_have_a_picture_each(tmp_path):
    image, row = keras.Input((8, 8, 3), name="image"), keras.Input((5,), name="row")
    flat = keras.layers.Concatenate()([keras.layers.Flatten()(image), row])
    engine = pj.Engine(keras.Model([image, row], keras.layers.Dense(2)(flat)))
    x = [rng.uniform(size=(2, 8, 8, 3)).astype("f4"), rng.uniform(size=(2, 5)).astype("f4")]
    att = pj.saliency.gradient(engine, x, target="all")
    att.save(tmp_path / "map.png")
    assert {p.name for p in tmp_path.iterdir()} == {"map_image.png", "map_row.png"}
    assert {k: v.shape for k, v in att.reduce().items()} == {
        "image": (2, 2, 8, 8),
        "row": (2, 2, 5),
    }
    assert len(att.figure(wrt="row").axes) == 2
    with pytest.raises(InputError, match="choose one, wrt='image'"):
        att.figure()
    with pytest.raises(UnknownNameError, match="'rows'. Nearest: 'row'"):
        att.figure(wrt="rows")


def test_pictures_that_do_not_fit_are_refused():
    att = made((6,), target=0)
    with pytest.raises(InputError, match=r"kind='overlay' does not fit .*\(6,\).*'lines'"):
        att.figure(kind="overlay")
    with pytest.raises(InputError, match="'slices'.* Received: 'pie'"):
        att.figure(kind="pie")
    with pytest.raises(OutOfRangeError, match="no example 2: there are 2"):
        att.figure(2)


def test_small_pictures_of_pages_hold_the_maps_colours():
    values = np.clip(rng.standard_normal((20, 30)), -1, 1)
    address = _pictures.map_address(values, 1.0)
    kind, _, data = address.partition(";base64,")
    assert kind == "data:image/png"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.mode == "P"
    expected = _pictures.PALETTE[_pictures.numbers(values, 1.0)].astype(int)
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - expected).max() <= 6


def test_thumbnails_keep_means():
    values = rng.standard_normal((40, 60))
    small = _pictures.thumbnail(values, 30)
    np.testing.assert_allclose(small, values.reshape(20, 2, 30, 2).mean((1, 3)), atol=1e-5)
    assert _pictures.thumbnail(values, 60) is values
    assert _pictures.thumbnail(rng.uniform(size=(90, 30, 3)), 30).shape == (30, 10, 3)
