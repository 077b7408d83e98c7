"""Pictures of Fisher information: they show the numbers given, and nothing written overlaps."""

import itertools
from unittest import mock

import matplotlib.text
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perjac.errors import InputError
from perjac.fisher import figures
from perjac.fisher._columns import Columns
from perjac.fisher.blocks import BlockForm, Diagonal

pytestmark = pytest.mark.slow  # left out of `make check`

rng = np.random.default_rng(0)
NAMES = {
    "few": ["conv2d", "conv2d_1", "dense"],
    "four": ["a", "b", "c", "d"],
    "one": ["dense"],
    "nested": [f"net/block{n}/attention/query" for n in range(5)],
    "long": [f"resnet50v2_with_a_long_name/conv{n}_block{n % 3}_{n}_preact_bn" for n in range(9)],
    "dollars": ["a$b$c", "_x_^2", "\\alpha"],
}


def seen(figure):
    """Draw a figure; return what is written in it, and where: texts with their boxes in pixels."""
    found = {}
    draw = matplotlib.text.Text.draw

    def noted(text, renderer):
        if text.get_text().strip() and text.get_visible():
            found[id(text)] = (text.get_text(), text.get_window_extent(renderer))
        return draw(text, renderer)

    with mock.patch.object(matplotlib.text.Text, "draw", noted):  # ticks out of range are not drawn
        figure.canvas.draw()
    return list(found.values())


def assert_readable(figure):
    """Assert that texts lie inside the figure and apart from one another."""
    written = seen(figure)
    for told, box in written:
        assert box.x0 >= -1, told
        assert box.y0 >= -1, told
        assert box.x1 <= figure.bbox.x1 + 1, told
        assert box.y1 <= figure.bbox.y1 + 1, told
    for (one, a), (other, b) in itertools.combinations(written, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, f"{one!r} overlaps {other!r}"


def assert_curves_pass_by(figure):
    """Assert that no curve runs through what is written inside the axes."""
    figure.canvas.draw()
    for axes in figure.axes:
        points = axes.transData.transform(axes.lines[0].get_xydata())
        steps = np.linspace(0, 1, 50)[:, None, None]
        along = (points[:-1] + steps * np.diff(points, axis=0)).reshape(-1, 2)
        for text in axes.texts:
            box = text.get_window_extent()
            inside = (along > [box.x0, box.y0]) & (along < [box.x1, box.y1])
            assert not inside.all(1).any(), f"{text.get_text()!r} lies on the curve"


@pytest.mark.parametrize("names", NAMES)
def test_bars_are_the_traces(names):
    sizes = dict(zip(NAMES[names], rng.uniform(1e-3, 2000, len(NAMES[names])), strict=True))
    figure = figures.traces(sizes, "Fisher information (exact, categorical) of 360 examples")
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == list(sizes.values())
    assert axes.yaxis_inverted()  # the first layer on top
    told = [text for text, _ in seen(figure)]
    for size in sizes.values():
        share = 100 * size / sum(sizes.values())
        expected = f"({share:.0f} %)" if share >= 1 else "(<1 %)"
        assert any(text.endswith(expected) for text in told)
    assert_readable(figure)


def test_of_many_layers_the_largest_have_bars_and_the_rest_is_told():
    sizes = {f"layer{n}": float(n + 1) for n in rng.permutation(107)}
    figure = figures.traces(sizes)
    (axes,) = figure.axes
    expected = [size for size in sizes.values() if size > 77]
    assert [bar.get_width() for bar in axes.patches] == expected
    rest = 100 * sum(range(78)) / sum(sizes.values())
    assert f"77 other layers: {rest:.0f} %" in axes.get_xlabel()
    assert_readable(figure)


def test_nothing_but_zeros_is_drawn_as_such():
    figure = figures.traces({"a": 0.0, "b": 0.0})
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0, 0]
    assert_readable(figure)


@pytest.mark.parametrize("names", NAMES)
def test_histograms_count_every_entry_above_zero(names):
    entries = {name: 10 ** rng.normal(-3, 2, (9, 5)) for name in NAMES[names]}
    first = NAMES[names][0]
    entries[first][:3] = 0
    figure = figures.diagonal(entries)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    for axes, values in zip(panels, entries.values(), strict=True):
        assert sum(bar.get_height() for bar in axes.patches) == np.sum(values > 0)
        (median,) = axes.lines
        logs = np.log10(values[values > 0])
        np.testing.assert_allclose(median.get_xdata(), np.median(logs))
        fullest = max(axes.patches, key=lambda bar: bar.get_height())
        low, high = fullest.get_x(), fullest.get_x() + fullest.get_width()
        assert fullest.get_height() >= np.sum((logs >= low + 1e-9) & (logs < high - 1e-9))
    told = [text for text, _ in seen(figure)]
    assert "45 weights\n33 % zero" in told
    assert_readable(figure)


def test_far_below_the_rest_entries_are_in_the_first_bar():
    entries = np.append(np.full(5000, 2e-2), 1e-30)
    figure = figures.diagonal({"dense": entries})
    (axes,) = figure.axes
    bars = axes.patches
    assert bars[0].get_height() == 1
    assert bars[0].get_x() == -2
    assert "first bar: all below, too" in figure.get_supxlabel()


def test_of_many_layers_the_largest_have_histograms():
    entries = {f"layer{n}": rng.uniform(n, n + 1, 8) for n in range(30)}
    figure = figures.diagonal(entries, "Title")
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert titles == [f"layer{n}" for n in range(6, 30)]
    assert figure.get_suptitle() == "Title\n6 layers with smaller traces are left out"
    assert_readable(figure)


def test_the_spectrum_falls_and_leaves_zeros_out():
    values = np.append(10 ** rng.normal(0, 2, 50), [0, 0, -1e-16, 1e-17])
    figure = figures.spectrum(rng.permutation(values), damping=0.1)
    left, right = figure.axes
    drawn = left.lines[0].get_ydata()
    np.testing.assert_array_equal(drawn, np.sort(values[:50])[::-1])
    assert left.get_yscale() == right.get_xscale() == "log"
    assert left.get_xlabel() == "rank; 4 of 54 are zero"
    dampings, counts = right.lines[0].get_data()
    expected = [np.sum(values[:50] / (values[:50] + one)) for one in dampings]
    np.testing.assert_allclose(counts, expected)
    assert dampings[0] < 0.1 < dampings[-1]
    point = next(line for line in right.lines if line.get_marker() == "o")
    np.testing.assert_allclose(
        point.get_xydata(), [[0.1, np.sum(values[:50] / (values[:50] + 0.1))]]
    )
    assert_readable(figure)


def test_of_a_part_of_the_spectrum_no_dimension_is_drawn():
    figure = figures.spectrum([3.0, 2.0, 1.0], damping=0.1, complete=False, title="Title")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "rank, of the 3 largest"
    assert_readable(figure)


@given(
    count=st.integers(1, 400),
    decades=st.floats(0.0, 14),
    damping=st.one_of(st.none(), st.floats(-12, 6)),
    largest=st.floats(-6, 6),
)
def test_what_is_written_beside_a_spectrum_stays_apart(count, decades, damping, largest):
    values = 10 ** (largest - decades * np.linspace(0, 1, count) ** 0.5)
    damping = None if damping is None else 10**damping
    figure = figures.spectrum(values, damping=damping, title="Fisher information")
    assert_readable(figure)
    assert_curves_pass_by(figure)


def test_what_cannot_be_drawn_is_an_error():
    for draw, nothing in {
        figures.spectrum: [[], [0.0, 0.0], [-1.0]],
        figures.traces: [{}],
        figures.diagonal: [{}, {"a": np.zeros(3)}],
    }.items():
        for given_ in nothing:
            with pytest.raises(InputError, match="Expected"):
                draw(given_)


def test_forms_are_drawn_by_layer():
    columns = Columns(("net/a/kernel", "net/a/bias", "scale"), ((2, 2), (2,), ()))
    entries = rng.uniform(1, 2, 7)
    blocks = {(key,): Diagonal(entries[place]) for key, place in columns.slices.items()}
    form = BlockForm(columns, 5, blocks)
    found = figures.by_layer(form)
    assert list(found) == ["net/a", "scale"]
    np.testing.assert_array_equal(found["net/a"], entries[:6])
    (axes,) = figures.traces(form).axes
    expected = [entries[:6].sum(), entries[6]]
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], expected)
    panels = figures.diagonal(form).axes
    assert [sum(bar.get_height() for bar in axes.patches) for axes in panels] == [6, 1]
    values = figures.spectrum(form).axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(values, np.sort(entries)[::-1])
