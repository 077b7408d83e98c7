"""A folder of saliency maps: a picture for each example, values.npz, and a page of them all."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from perjac.cli.html import render
from perjac.cli.store import opened
from perjac.saliency import Attribution, _pictures
from perjac.saliency.attribution import plain_name

# Outputs of each example that the page shows, where there is a map of every output.
_OUTPUTS = 10
# Pixels of all maps in the page, a byte each before compression; and the longest side of one.
_PIXELS, _SIDES = 10_000_000, (48, 224)
_BARS, _SLICES = 12, 6


def write(
    engine: Any,
    data: Any,
    out: pathlib.Path,
    methods: Mapping[str, Callable[..., Attribution]],
    starts: Iterable[int],
    batch_size: int,
    channels: str = "sum",
) -> Gallery:
    """Explain examples batch by batch; what was finished is kept however it ends.

    Parameters
    ----------
    engine : Engine
        The model.
    data : files.Data
        The examples.
    out : Path
        An existing folder.
    methods : mapping of str to callable
        Each takes (engine, x).
    starts : iterable of int
        Where each batch starts.
    batch_size : int
        Examples at a time.
    channels : str
        How the pictures take channels together; the numbers written keep them.
    """
    gallery = Gallery(list(methods), channels, len(data))
    with opened(out / "values.npz") as store:
        try:
            for start in starts:
                names = data.names[start : start + batch_size]
                part = data.part(start, start + len(names))
                found = {name: method(engine, part) for name, method in methods.items()}
                cards = gallery.cards(found, names, _probabilities(engine, part, found), part)
                for n, name in enumerate(names):
                    stem = _file_stem(name, start + n, data.names)
                    gallery.pictures += _draw(found, n, out / stem, channels, part)
                gallery.shown += cards
                store.add(_arrays(found))
                store.describe(
                    names=data.names[: start + len(names)],
                    methods=list(methods),
                    explained=gallery.explained,
                )
        finally:
            if gallery.shown:
                (out / "index.html").write_text(gallery.page(), encoding="utf-8")
    return gallery


@dataclasses.dataclass
class Gallery:
    """The page, as far as it has come.

    Attributes
    ----------
    methods : list of str
        The methods' names.
    channels : str
        How channels are taken together.
    total : int
        How many examples there will be.
    shown : list of dict
        A card for each example that is finished.
    pictures : int
        How many files were drawn.
    explained : str
        As in `Attribution`.
    for_all, stacked : bool
        Whether there is a map of every output; whether there are channels to take together.
    """

    methods: list[str]
    channels: str
    total: int
    shown: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    pictures: int = 0
    explained: str = ""
    for_all: bool = False
    stacked: bool = False

    def cards(
        self,
        found: Mapping[str, Attribution],
        names: list[str],
        probabilities: np.ndarray | None,
        given: Any,
    ) -> list[dict[str, Any]]:
        """Return a card for each example of a batch: each input, with its maps by each method."""
        first = next(iter(found.values()))
        self.explained, self.for_all = first.explained, first.for_all
        cards = []
        for n, name in enumerate(names):
            outputs = np.ravel(first.outputs[n])
            shares = None if probabilities is None else np.ravel(probabilities[n])
            kept = _pictures.largest(outputs, _OUTPUTS + 2)  # no list is cut by one or two
            if len(kept) < len(outputs):
                kept = _pictures.largest(outputs, _OUTPUTS)
            kept = kept if self.for_all else np.arange(1)
            panels = []
            for wrt in dict.fromkeys(wrt for att in found.values() for wrt in att.inputs):
                having = {method: att for method, att in found.items() if wrt in att.inputs}
                views = [
                    view
                    for method, att in having.items()
                    for view in self._views(method, att, n, wrt, kept, shares, given)
                ]
                shown = _input(next(iter(having.values())), n, wrt, given)
                panels.append({"name": wrt or "", "input": shown, "views": views})
            best = np.argsort(-outputs, kind="stable")[:3]
            cards.append(
                {
                    "name": f"example {name}" if name.isdigit() else name,
                    "panels": panels,
                    "largest": [_told(str(c), c, outputs, shares) for c in best],
                    "outputs": len(outputs),
                    "kept": len(kept),
                }
            )
        return cards

    def _views(
        self,
        method: str,
        att: Attribution,
        n: int,
        wrt: str | None,
        kept: np.ndarray,
        shares: np.ndarray | None,
        given: Any,
    ) -> list[dict[str, Any]]:
        """Return an example's maps by a method, on one scale, with what is said below each."""
        x, maps = att.x_of(wrt)[n], att.maps_of(wrt)[n][kept]
        pieces, end = self._pieces(x, maps, len(kept) * len(att.inputs), _ids(given, x, n))
        outputs, titles, numbers = np.ravel(att.outputs[n]), att.titles(n), att.numbers(n)
        lacking = None if att.delta is None else np.ravel(np.asarray(att.delta)[n])
        views = []
        for place, (c, piece) in enumerate(zip(kept, pieces, strict=True)):
            number = None if numbers is None else numbers[c]
            told = titles[c] if number is None else _told(titles[c], number, outputs, shares)
            views.append(
                {
                    "method": method,
                    "output": number,
                    "predicted": number == outputs.argmax() or not att.for_all,
                    "right": number == outputs.argmax(),
                    "piece": piece,
                    "told": told,
                    "scale": "" if "bars" in piece else f"{end:.3g}",
                    "unsigned": bool(maps[place].min() >= 0),
                    "delta": None if lacking is None else f"{lacking[c]:.2g}",
                }
            )
        return views

    def _pieces(
        self, x: np.ndarray, maps: np.ndarray, count: int, ids: np.ndarray | None
    ) -> tuple[list[dict[str, Any]], float]:
        """Return maps (M, *map_shape) as parts of a page, and where their scale ends."""
        how, axis = self._how, _pictures.channel_axis(x.shape)
        drawn_whole = axis is None or (x.ndim == 2 and ids is None)
        self.stacked |= not drawn_whole and maps.shape[axis or -1] > 1
        if ids is not None:
            values = _pictures.reduced(maps, how, axis) if x.ndim == 2 else maps
            end = _pictures.limit(values)
            return [
                {
                    "words": [
                        (str(word), *_pictures.colour(value, end), f"{value:.3g}")
                        for word, value in zip(ids, one, strict=True)
                    ]
                }
                for one in values
            ], end
        if x.ndim not in (2, 3, 4):
            flat = maps.reshape(len(maps), -1)
            return [_bars(one, x.ravel()) for one in flat], float(np.abs(flat).max()) or 1.0
        # Of sequences all features are shown, downwards, positions to the right.
        values = maps.swapaxes(1, 2) if x.ndim == 2 else _pictures.reduced(maps, how, axis)
        end = _pictures.limit(values)
        if x.ndim == 4:
            values = _slices(values)
        total = self.total * len(self.methods) * count
        side = int(np.clip((_PIXELS / total) ** 0.5, *_SIDES)) * (4 if x.ndim in (2, 4) else 1)
        small = [_pictures.thumbnail(one, side) for one in values]
        return [_picture(_pictures.map_address(one, end), one) for one in small], end

    @property
    def _how(self) -> str:
        """How the page takes channels together: it has no room for each."""
        return "sum" if self.channels == "none" else self.channels

    def page(self) -> str:
        """Return the page, a file of its own."""
        numbers = {
            view["output"]
            for card in self.shown
            for panel in card["panels"]
            for view in panel["views"]
        }
        colours = [_pictures.colour(value, 1)[0] for value in np.linspace(-1, 1, 11)]
        return render(
            "gallery.html",
            cards=self.shown,
            methods=self.methods,
            numbers=sorted(numbers) if self.for_all else [],
            explained=self.explained,
            channels=self._how if self.stacked else "",
            percentile=_pictures.PERCENTILE,
            palette=", ".join(colours),
        )


def _input(att: Attribution, n: int, wrt: str | None, given: Any) -> dict[str, Any] | None:
    """Return what is shown beside an example's maps; nothing beside words and bars."""
    x = att.x_of(wrt)[n]
    if _ids(given, x, n) is not None or x.ndim not in (2, 3, 4):
        return None
    if x.ndim == 2:
        image = x.T[..., None]
    else:
        image = np.moveaxis(x, _pictures.channel_axis(x.shape) or -1, -1)
    if x.ndim == 4:
        image = _slices(image[None])[0]
    side = _SIDES[1] * (4 if x.ndim in (2, 4) else 1)
    small = _pictures.thumbnail(_pictures.rgb(image), side)
    return _picture(_pictures.image_address(small), small)


def _slices(volumes: np.ndarray) -> np.ndarray:
    """Return slices of volumes (M, depth, height, width, ...) side by side, evenly apart."""
    depth = volumes.shape[1]
    chosen = np.rint(np.linspace(0, depth - 1, min(depth, _SLICES))).astype(int)
    return np.concatenate(np.moveaxis(volumes[:, chosen], 1, 0), 2)


def _picture(address: str, array: np.ndarray) -> dict[str, Any]:
    height, width = array.shape[:2]
    return {"src": address, "width": width, "height": height, "small": max(height, width) < 100}


def _bars(values: np.ndarray, x: np.ndarray) -> dict[str, Any]:
    """Return the largest values of a row of features as bars."""
    order = np.argsort(-np.abs(values), kind="stable")[:_BARS]
    end = float(np.abs(values).max()) or 1.0
    rows = [
        (
            f"feature {f}" + (f" = {x[f]:.3g}" if f < len(x) else ""),
            f"{values[f]:.3g}",
            round(50 * abs(float(values[f])) / end, 1),
            bool(values[f] > 0),
        )
        for f in order
    ]
    return {"bars": rows, "left": len(values) - len(rows)}


def _told(title: str, number: int, outputs: np.ndarray, shares: np.ndarray | None) -> str:
    """Return an output with its value, and as a probability where it is one."""
    value = f"{outputs[number]:.3g}" if shares is None else f"{shares[number]:.1%}"
    return f"{title}: {value}"


def _ids(given: Any, x: np.ndarray, n: int) -> np.ndarray | None:
    """Return the words of an example as numbers, where it is a text seen through an embedding."""
    if isinstance(given, dict) or np.asarray(given).dtype.kind not in "iu" or x.ndim != 2:
        return None
    ids = np.asarray(given)[n]
    return ids if ids.ndim == 1 and len(ids) == len(x) else None


def _probabilities(engine: Any, part: Any, found: Mapping[str, Attribution]) -> np.ndarray | None:
    """Return the outputs as probabilities, where the model ends in a softmax or sigmoid."""
    first = next(iter(found.values()))
    if first.explained.startswith("probabilities"):
        return np.asarray(first.outputs)
    if first.explained != "logits":
        return None
    outputs = engine.outputs(part)
    same = not isinstance(outputs, (dict, list)) and outputs.shape == first.outputs.shape
    return np.asarray(outputs) if same else None


def _draw(
    found: Mapping[str, Attribution], n: int, path: pathlib.Path, channels: str, given: Any
) -> int:
    """Write an example's pictures; return how many."""
    for method, att in found.items():
        several = f"_{method}" if len(found) > 1 else ""
        x = att.x_of(att.inputs[0])[n]
        att.save(
            path.with_name(f"{path.name}{several}.png"),
            n,
            channels=channels,
            tokens=_ids(given, x, n),
        )
    return sum(len(att.inputs) for att in found.values())


def _arrays(found: Mapping[str, Attribution]) -> dict[str, np.ndarray]:
    """Return the arrays of values.npz, named by method and input where there are several."""
    arrays: dict[str, np.ndarray] = {}
    for method, att in found.items():
        of_method = f"/{method}" if len(found) > 1 else ""
        for what in ("values", "standard_error"):
            held = getattr(att, what)
            if held is None:
                continue
            parts = held if isinstance(held, dict) else {None: held}
            for wrt, array in parts.items():
                of_input = "" if wrt is None else f"/{plain_name(wrt)}"
                arrays[f"{what}{of_method}{of_input}"] = np.asarray(array)
        if att.delta is not None:
            arrays[f"delta{of_method}"] = np.asarray(att.delta)
        arrays["outputs"] = np.asarray(att.outputs)
        if not att.for_all:
            arrays["target"] = np.broadcast_to(att.target, len(att.outputs))
    return arrays


def _file_stem(name: str, number: int, names: list[str]) -> str:
    """Return a picture's file name: the example's own, or with its number where two would clash."""
    stem = pathlib.Path(name).stem
    clash = sum(pathlib.Path(other).stem == stem for other in names) > 1
    if stem.isdigit():
        stem = f"example_{stem}"
    return f"{stem}_{number}" if clash else stem
