"""Pictures of maps for print: images, volumes, sequences, texts and rows of features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from perjac._drawing import new_figure
from perjac.errors import InputError
from perjac.saliency import _pictures
from perjac.saliency._pictures import PERCENTILE, limit

__all__ = ["PERCENTILE", "Example", "draw", "limit", "overlay", "show"]

_FEATURES, _COLUMNS, _MOST, _LINES = 15, 6, 60, 8
_RED, _BLUE, _INK = "#b2182b", "#2166ac", "#1c2430"


@dataclasses.dataclass(frozen=True)
class Example:
    """What is drawn: one input of one example, with its maps.

    Attributes
    ----------
    x : array (*input_shape)
        The input.
    maps : array (M, *map_shape)
        As `x`, but for the size of images, and with one channel in place of several, perhaps.
    titles : list of str
        What each map explains.
    framed : int or None
        Which map is of the class predicted.
    channels : str
        How channels are taken together.
    axis : int or None
        Where they are, counted from the end.
    tokens, features : sequence of str, optional
        The words of a text; the names of a row's features.
    """

    x: np.ndarray
    maps: np.ndarray
    titles: list[str]
    framed: int | None = None
    channels: str = "sum"
    axis: int | None = -1
    tokens: Sequence[Any] | None = None
    features: Sequence[Any] | None = None

    def is_framed(self, n: int) -> bool:
        """Return whether map n is of the class predicted, with others to tell it from."""
        return n == self.framed and len(self.maps) > 1

    @property
    def image(self) -> np.ndarray:
        """The input with its channels last; a matrix becomes an image with one channel."""
        if self.x.ndim == 2:
            return self.x[..., None]
        return np.moveaxis(self.x, self.axis or -1, -1)

    def reduced(self) -> np.ndarray:
        """Return the maps without their channels; `spread` has them as maps of their own."""
        return _pictures.reduced(self.maps, self.channels, self.axis)

    def spread(self) -> Example:
        """Return the example with a map for each channel, where channels are kept."""
        if self.channels != "none" or self.axis is None:
            return self
        apart = np.moveaxis(self.maps, self.axis, 1)  # (M, C, ...)
        count = apart.shape[1]
        titles = [f"{t}, channel {c}" for t in self.titles for c in range(count)]
        maps = np.expand_dims(apart.reshape(-1, *apart.shape[2:]), self.axis)
        if len(maps) > _MOST:
            titles[_MOST - 1] += f"\n(of {len(maps)} maps)"
            maps = maps[:_MOST]
        return dataclasses.replace(self, maps=maps, titles=titles, framed=None, channels="sum")


def draw(example: Example, kind: str, title: str) -> Any:
    """Draw an input beside its maps; return a matplotlib Figure.

    Raises
    ------
    InputError
        If there is no such kind of picture, or not of inputs like this one.
    """
    rank = example.x.ndim
    if kind == "auto":
        kind = "tokens" if example.tokens is not None else _AUTO.get(rank, "bars")
    elif kind not in _KINDS:
        known = ", ".join(map(repr, ("auto", *_KINDS)))
        raise InputError(f"Expected kind= as one of {known}. Received: {kind!r}.")
    picture, ranks = _KINDS[kind]
    if ranks and rank not in ranks:
        fitting = [name for name, (_, fit) in _KINDS.items() if not fit or rank in fit]
        raise InputError(
            f"kind={kind!r} does not fit an example of shape {example.x.shape}. There are: "
            f"{', '.join(map(repr, fitting))}."
        )
    figure, note = picture(example)
    figure.suptitle(title + (f"\n{note}" if note else ""), fontsize=9)
    return figure


def show(axes: Any, image: np.ndarray) -> None:
    """Show an input image (height, width, channels) on its own scale."""
    if image.shape[-1] in (3, 4):
        axes.imshow(_pictures.rgb(image), interpolation="nearest")
    else:  # dark where it is lowest, whatever its range: there may be little contrast
        axes.imshow(image.mean(-1), cmap="gray", interpolation="nearest")
    bare(axes)


def overlay(axes: Any, values: np.ndarray, end: float) -> Any:
    """Show a map (height, width, channels), channels summed, on a scale from -end to end."""
    return _map(axes, values.sum(-1), end)


def bare(axes: Any) -> None:
    """Take the ticks and frame away."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _colours() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(_pictures.PALETTE[1:] / 255)


def _map(axes: Any, values: np.ndarray, end: float, **more: Any) -> Any:
    more = {"interpolation": "nearest", "vmin": -end, "vmax": end} | more
    drawn = axes.imshow(values, cmap=_colours(), **more)
    bare(axes)
    return drawn


def _over(axes: Any, image: np.ndarray, values: np.ndarray, end: float) -> None:
    axes.imshow(_pictures.blend(image, values, end), interpolation="nearest")
    bare(axes)


def _frame(axes: Any) -> None:
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=2.5, edgecolor=_INK)


def _scale(figure: Any, grid: Any, values: np.ndarray, end: float) -> None:
    """Draw the colour scale; magnitudes have no lower half."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(
        ScalarMappable(Normalize(-end, end), _colours()), ax=list(grid), shrink=0.8, pad=0.02
    )
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    if values.size and values.min() >= 0:
        bar.ax.set_ylim(0, end)


def _note(example: Example, values: np.ndarray, reduced: bool = True) -> str:
    """Say what the colours mean, where they end, and how channels were taken together."""
    unsigned = values.size and values.min() >= 0
    told = "red: large" if unsigned else "red raises, blue lowers"
    told += f"; colours end at the {PERCENTILE}th percentile"
    axis = example.axis
    count = 1 if axis is None or not reduced else example.maps.shape[axis]
    return told + (f"; {example.channels} over {count} channels" if count > 1 else "")


def _image(example: Example, ways: Sequence[str]) -> tuple[Any, str]:
    """An image beside its maps: each alone, over the image, or both."""
    image = example.image
    if example.x.ndim == 2:  # without channels
        example = dataclasses.replace(example, axis=None)
    example = example.spread()
    values = example.reduced()
    end = limit(values)
    cells = [(n, way) for n in range(len(values)) for way in ways]
    count = len(cells) + 1
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    tall = min(max(image.shape[0] / image.shape[1], 0.3), 3)
    figure = new_figure(2.1 * columns + 0.9, (2.0 * tall + 0.3) * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    show(grid[0], image)
    grid[0].set_title("input", fontsize=9)
    for axes, (n, way) in zip(grid[1:], cells, strict=False):
        if way == "over":
            _over(axes, image, values[n], end)
        else:
            _map(axes, values[n], end)
        both = len(ways) > 1 and way == "over"
        axes.set_title("over the input" if both else example.titles[n], fontsize=9)
        if example.is_framed(n):
            _frame(axes)
    for axes in grid[count:]:
        axes.set_visible(False)
    _scale(figure, grid, values, end)
    return figure, _note(example, values)


def _auto_image(example: Example) -> tuple[Any, str]:
    one = len(example.maps) == 1 and example.channels != "none"
    return _image(example, ("alone", "over") if one else ("alone",))


def _over_image(example: Example) -> tuple[Any, str]:
    return _image(example, ("over",))


def _map_alone(example: Example) -> tuple[Any, str]:
    return _heat(example) if example.x.ndim == 2 else _image(example, ("alone",))


def _heat(example: Example) -> tuple[Any, str]:
    """A sequence: position to the right, features downwards, all of them."""
    values = example.maps
    figure = new_figure(7, 1.7 * len(values) + 2.1)
    grid = figure.subplots(len(values) + 1, 1, squeeze=False).ravel()
    end = limit(values)
    grid[0].imshow(example.x.T, cmap="gray", aspect="auto", interpolation="nearest")
    grid[0].set_title("input", fontsize=9)
    for n, axes in enumerate(grid[1:]):
        _map(axes, values[n].T, end, aspect="auto")
        _title(axes, example, n)
    for axes in grid:
        bare(axes)
        axes.set_ylabel(f"{example.x.shape[1]} features", fontsize=8)
    grid[-1].set_xlabel(f"position, 0 to {len(example.x) - 1}", fontsize=8)
    _scale(figure, grid[1:], values, end)
    return figure, _note(example, values, reduced=False)


def _lines(example: Example) -> tuple[Any, str]:
    """A sequence or signal as curves: the input, then each map, red above zero and blue below."""
    values = example.reduced() if example.channels != "none" else example.maps.sum(-1)
    signals = example.x[:, None] if example.x.ndim == 1 else example.x
    figure = new_figure(7, 1.3 * len(values) + 2.1)
    grid = figure.subplots(len(values) + 1, 1, squeeze=False, sharex=True).ravel()
    positions = np.arange(len(signals))
    for signal in signals.T[:_LINES]:
        grid[0].plot(positions, signal, color=_INK, linewidth=0.8, alpha=0.6)
    shown = f", {_LINES} of {signals.shape[1]} features" if signals.shape[1] > _LINES else ""
    grid[0].set_title(f"input{shown}", fontsize=9)
    largest = float(np.abs(values).max()) or 1.0
    for n, axes in enumerate(grid[1:]):
        for part, tint in ((values[n].clip(min=0), _RED), (values[n].clip(max=0), _BLUE)):
            axes.fill_between(positions, part, step="mid", color=tint, linewidth=0)
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_ylim(-1.05 * largest if values.min() < 0 else 0, 1.05 * largest)
        _title(axes, example, n)
    for axes in grid:
        axes.tick_params(labelsize=8)
        _open(axes)
    grid[-1].set_xlabel("position", fontsize=8)
    summed = example.axis is not None and example.maps.shape[-1] > 1
    how = "sum" if example.channels == "none" else example.channels
    return figure, f"{how} over {example.maps.shape[-1]} features" if summed else ""


def _bars(example: Example) -> tuple[Any, str]:
    """The largest values as bars, named."""
    flat = example.maps.reshape(len(example.maps), -1)
    x, named = example.x.ravel(), example.features
    if named is not None and len(named) != flat.shape[1]:
        raise InputError(
            f"Expected features= as {flat.shape[1]} names. Received: {len(named)} of them."
        )
    shown = min(flat.shape[1], _FEATURES)
    figure = new_figure(6, (0.22 * shown + 0.6) * len(flat) + 0.5)
    grid = figure.subplots(len(flat), 1, squeeze=False).ravel()
    for n, (axes, one) in enumerate(zip(grid, flat, strict=True)):
        largest = np.argsort(-np.abs(one), kind="stable")[:_FEATURES][::-1]
        labels = [
            f"{_plain(named[f]) if named is not None else f'feature {f}'} = {_number(x, f)}"
            for f in largest
        ]
        axes.barh(
            range(shown), one[largest], color=[_RED if v > 0 else _BLUE for v in one[largest]]
        )
        axes.set_yticks(range(shown), labels)
        axes.axvline(0, color="0.4", linewidth=0.8)
        _title(axes, example, n)
        axes.tick_params(labelsize=8)
        axes.tick_params(axis="y", length=0)
        _open(axes, "left")
    rest = f"the {shown} largest of {flat.shape[1]} values" if flat.shape[1] > shown else ""
    return figure, rest


def _number(x: np.ndarray, place: int) -> str:
    return f"{x[place]:.3g}" if place < len(x) else "?"


def _tokens(example: Example) -> tuple[Any, str]:
    """Words in their order, each on the colour of its value summed over the embedding."""
    if example.x.ndim == 2:
        values = example.reduced() if example.channels != "none" else example.maps.sum(-1)
    else:
        values = example.maps
    words = tokens_of(example.tokens, values.shape[1])
    end = limit(values)
    rows = _wrapped(words, 86)
    tall = 0.27 * len(rows) + 0.34
    figure = new_figure(9, tall * len(values) + 0.6)
    grid = figure.subplots(len(values), 1, squeeze=False).ravel()
    for n, axes in enumerate(grid):
        axes.set_xlim(0, 92)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.axis("off")
        _title(axes, example, n, loc="left")
        for line, row in enumerate(rows):
            for place, left in row:
                behind, ink = _pictures.colour(values[n, place], end)
                axes.text(
                    left + 0.7,
                    line,
                    words[place],
                    family="monospace",
                    fontsize=10,
                    color=ink,
                    va="center",
                    parse_math=False,
                    bbox={"facecolor": behind, "edgecolor": "none", "pad": 1.8},
                )
    _scale(figure, grid, values, end)
    return figure, _note(example, values)


def tokens_of(tokens: Sequence[Any] | None, count: int) -> list[str]:
    """Return the words to show at so many positions: those given, or the positions' numbers."""
    if tokens is None:
        return [str(n) for n in range(count)]
    if len(tokens) != count:
        raise InputError(
            f"Expected tokens= as one for each of {count} positions. Received: {len(tokens)}."
        )
    return [_plain(token) for token in tokens]


def _plain(token: Any) -> str:
    if isinstance(token, bytes):
        token = token.decode("utf-8", "replace")
    return str(token).replace("\n", "⏎").replace("\t", " ")


def _wrapped(words: Sequence[str], width: int) -> list[list[tuple[int, int]]]:
    """Return rows of (word's number, column), as a page of `width` letters would have them."""
    rows: list[list[tuple[int, int]]] = [[]]
    column = 0
    for n, word in enumerate(words):
        if rows[-1] and column + len(word) > width:
            rows.append([])
            column = 0
        rows[-1].append((n, column))
        column += len(word) + 1
    return rows


def _slices(example: Example) -> tuple[Any, str]:
    """A volume: the slices along its first axis that have the largest values, over the input."""
    volume = example.x[..., None] if example.x.ndim == 3 else example.image
    if example.x.ndim == 3:  # without channels
        example = dataclasses.replace(example, axis=None)
    example = example.spread()
    values = example.reduced()  # (M, depth, height, width)
    end = limit(values)
    chosen = _pictures.layers(values)
    inside = np.rint(chosen * (len(volume) - 1) / max(values.shape[1] - 1, 1)).astype(int)
    rows, columns = len(values) + 1, len(chosen)
    figure = new_figure(1.7 * columns + 0.9, 1.8 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False)
    whole = _pictures.rgb(volume.reshape(-1, *volume.shape[2:])).reshape(*volume.shape[:3], 3)
    for column, (here, there) in enumerate(zip(chosen, inside, strict=True)):
        grid[0, column].imshow(whole[there], interpolation="nearest")
        grid[0, column].set_title(f"slice {there}", fontsize=9)
        bare(grid[0, column])
        for n, row in enumerate(grid[1:]):
            _over(row[column], whole[there], values[n, here], end)
            if example.is_framed(n):
                _frame(row[column])
    for name, row in zip(["input", *example.titles], grid, strict=True):
        row[0].set_ylabel(name, fontsize=9)
    _scale(figure, grid[1:].ravel(), values, end)
    return figure, _note(example, values)


def _open(axes: Any, *more: str) -> None:
    for side in ("top", "right", *more):
        axes.spines[side].set_visible(False)


def _title(axes: Any, example: Example, n: int, **where: Any) -> None:
    """Write above a map what it explains, in bold where that is predicted."""
    predicted = example.is_framed(n)
    text = example.titles[n] + (" (predicted)" if predicted else "")
    axes.set_title(text, fontsize=9, fontweight="bold" if predicted else None, **where)


# Each kind of picture, and the ranks of examples that it can be drawn of (any, where none).
_KINDS: dict[str, tuple[Callable[[Example], tuple[Any, str]], tuple[int, ...]]] = {
    "both": (_auto_image, (2, 3)),
    "overlay": (_over_image, (2, 3)),
    "map": (_map_alone, (2, 3)),
    "slices": (_slices, (3, 4)),
    "lines": (_lines, (1, 2)),
    "tokens": (_tokens, (1, 2)),
    "bars": (_bars, ()),
}
_AUTO = {1: "bars", 2: "map", 3: "both", 4: "slices"}
