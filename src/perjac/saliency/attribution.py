"""Attribution: a method's answer, with its pictures."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.model import inside_functions
from perjac.errors import InputError, OutOfRangeError, UnknownNameError, nearest
from perjac.saliency import _pictures, figures

# Outputs drawn of one example, of target "all".
_MOST = 24


@dataclasses.dataclass(frozen=True)
class Attribution:
    """What in each input drives the target.

    Attributes
    ----------
    method : str
        The method's name.
    values : tf.Tensor, or dict of str to tf.Tensor
        (B, *input_shape), or (B, C, *input_shape) for target "all": signed, channels kept. One for
        each input, by name, where several were looked at.
    target : array (B,) or scalar of int, "all" or "directions"
        What was explained.
    outputs : tf.Tensor
        The model's outputs, (B, *output_shape).
    x : tf.Tensor, or dict of str to tf.Tensor
        What was looked at.
    explained : str
        "outputs", "logits", or "probabilities, after Softmax".
    delta : tf.Tensor or None
        What completeness lacks: the sum of the values less what it should be, (B,), or (B, C).
    standard_error : like `values`, or None
        Of values that are means over random draws.
    facts : dict
        How it was computed: steps, seeds, rules, and the like.
    """

    method: str
    values: Any
    target: Any
    outputs: tf.Tensor
    x: Any
    explained: str = "outputs"
    delta: tf.Tensor | None = None
    standard_error: Any = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def maps(self) -> np.ndarray:
        """The values as (B, M, *input_shape): M = 1, or C for target "all"."""
        return self.maps_of(None)

    @property
    def inputs(self) -> list[str | None]:
        """The names of the inputs looked at; [None] where there is one."""
        return list(self.values) if isinstance(self.values, dict) else [None]

    def maps_of(self, wrt: str | None) -> np.ndarray:
        """Return the maps of one of several inputs, as `maps`."""
        inside_functions.refuse("A map in numbers")
        values = np.asarray(self._of("values", wrt))
        return values if self.for_all else values[:, None]

    def x_of(self, wrt: str | None) -> np.ndarray:
        """Return one of several inputs, (B, *input_shape)."""
        inside_functions.refuse("An example in numbers")
        return np.asarray(self._of("x", wrt))

    @property
    def for_all(self) -> bool:
        """Whether there is a map of every output."""
        return isinstance(self.target, str) and self.target == "all"

    def _of(self, name: str, wrt: str | None) -> Any:
        """Return the values or inputs of the input that is meant."""
        held = getattr(self, name)
        if not isinstance(held, dict):
            held = {wrt if wrt is not None else next(iter(self.inputs)): held}
        if wrt is None and len(held) > 1:
            raise InputError(
                f"There are maps of several inputs: choose one, wrt={next(iter(held))!r}. There "
                f"are: {', '.join(map(repr, held))}."
            )
        if wrt is not None and wrt not in held:
            raise UnknownNameError(f"There is no map of {wrt!r}. {nearest(wrt, map(str, held))}")
        return held[wrt] if wrt is not None else next(iter(held.values()))

    def reduce(self, channels: str = "sum", data_format: str | None = None) -> Any:
        """Take the channels of each map together.

        Parameters
        ----------
        channels : str
            "sum" (which keeps completeness), "mean", "abs-max" (as Simonyan et al. 2013), "l2", or
            "none".
        data_format : str, optional
            "channels_last" or "channels_first"; found out by the shape if left out. Sequences
            (T, F) have their features for channels; rows of features have none, and stay.

        Returns
        -------
        array, or dict of str to array
            `values` without their axis of channels.

        Raises
        ------
        InputError
            If there is no such reduction or data format.

        Examples
        --------
        >>> import keras, numpy as np, perjac as pj
        >>> layers = [keras.Input((4, 4, 3)), keras.layers.Flatten(), keras.layers.Dense(2)]
        >>> engine = pj.Engine(keras.Sequential(layers))
        >>> att = pj.saliency.gradient(engine, np.ones((5, 4, 4, 3), "float32"))
        >>> att.reduce("abs-max").shape
        (5, 4, 4)
        """

        def one(wrt: str | None) -> np.ndarray:
            axis = _pictures.channel_axis(self.x_of(wrt).shape[1:], data_format)
            return _pictures.reduced(np.asarray(self._of("values", wrt)), channels, axis)

        if isinstance(self.values, dict):
            return {wrt: one(wrt) for wrt in self.values}
        return one(None)

    def numbers(self, example: int) -> list[int] | None:
        """Return which output each of an example's maps explains; None for a direction."""
        if self.for_all:
            return list(range(np.size(self.outputs[example])))
        if isinstance(self.target, str):
            return None
        return [int(np.broadcast_to(self.target, [len(self.outputs)])[example])]

    def titles(self, example: int) -> list[str]:
        """Return what each of an example's maps explains."""
        numbers = self.numbers(example)
        return ["direction"] if numbers is None else [f"output {n}" for n in numbers]

    def figure(
        self,
        example: int = 0,
        kind: str = "auto",
        *,
        channels: str = "sum",
        tokens: Sequence[Any] | None = None,
        features: Sequence[Any] | None = None,
        wrt: str | None = None,
        data_format: str | None = None,
    ) -> Any:
        """Draw one example beside its maps.

        Parameters
        ----------
        example : int
            Which.
        kind : str
            "auto"; "overlay" (maps over the image in grey), "map" (beside it) or "both"; "slices"
            of a volume; "lines" of a sequence; "tokens", words on the colour of their value; or
            "bars", the largest values.
        channels : str
            As in `reduce`; "none" draws each channel.
        tokens : sequence of str or int, optional
            The words of this example, or their numbers: draws "tokens".
        features : sequence of str, optional
            The names of a row's features, for "bars".
        wrt : str, optional
            Which input, where several were looked at.
        data_format : str, optional
            "channels_last" or "channels_first"; found out by the shape if left out.

        Returns
        -------
        matplotlib.figure.Figure
            Of target "all", the class predicted is framed, and of more than 24 outputs, the largest
            24 are drawn. All maps of the example have one scale.

        Raises
        ------
        MissingExtraError
            If matplotlib is not installed.
        InputError
            If there is no such example, or no such picture of it.

        Examples
        --------
        >>> import keras, numpy as np, perjac as pj
        >>> ids, embed = keras.Input((5,), dtype="int32"), keras.layers.Embedding(20, 4, name="e")
        >>> top = keras.layers.Dense(2)(keras.layers.Flatten()(embed(ids)))
        >>> engine, x = pj.Engine(keras.Model(ids, top)), np.array([[3, 1, 4, 1, 5]])
        >>> att = pj.saliency.gradient(engine, x, target=0, wrt=pj.activation("e"))
        >>> drawn = att.figure(tokens=["what", "a", "lovely", "little", "film"])
        """
        maps, x = self.maps_of(wrt), self.x_of(wrt)
        if not -len(x) <= example < len(x):
            raise OutOfRangeError(f"There is no example {example}: there are {len(x)}.")
        example %= len(x)
        titles, outputs = self.titles(example), np.ravel(self.outputs[example])
        chosen, framed = np.arange(1), None
        if self.for_all:
            chosen = _pictures.largest(outputs, _MOST)
            framed = int(np.flatnonzero(chosen == outputs.argmax())[0])
        shown = figures.Example(
            x=x[example],
            maps=maps[example][chosen],
            titles=[titles[n] for n in chosen],
            framed=framed,
            channels=channels,
            axis=_pictures.channel_axis(x.shape[1:], data_format),
            tokens=tokens,
            features=features,
        )
        of = "" if self.explained == "outputs" else f" of {self.explained}"
        where = "" if wrt is None else f", {wrt}"
        if len(chosen) < len(titles):
            where += f", the {len(chosen)} largest of {len(titles)} outputs"
        return figures.draw(shown, kind, f"{self.method}{of}, example {example}{where}")

    def save(self, path: str | pathlib.Path, example: int = 0, **how: Any) -> None:
        """Write one example's picture, in the format that the file's ending names: PNG, PDF, SVG.

        Parameters
        ----------
        path : str or Path
            Where several inputs were looked at, each has a file of its own, its name added:
            "map.png" becomes "map_image.png" and "map_number.png".
        example, **how
            As in `figure`.
        """
        path = pathlib.Path(path)
        if how.get("wrt") is not None or not isinstance(self.values, dict):
            self._write(path, example, how)
            return
        for wrt in self.values:
            named = path.with_name(f"{path.stem}_{plain_name(wrt)}{path.suffix}")
            self._write(named, example, {**how, "wrt": wrt})

    def _write(self, path: pathlib.Path, example: int, how: dict[str, Any]) -> None:
        figure = self.figure(example, **how)
        known = figure.canvas.get_supported_filetypes()
        if path.suffix[1:].lower() not in known:
            raise InputError(f"Expected a path ending in .png, .pdf or .svg. Received: {path}.")
        figure.savefig(path, dpi=150, bbox_inches="tight")


def plain_name(name: str) -> str:
    """Return a name as part of a file's name: what is neither letter, digit nor . - becomes _."""
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "_"
