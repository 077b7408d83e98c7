"""Attribution: a method's answer, with its pictures."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import tensorflow as tf

from perjac.errors import InputError
from perjac.saliency import figures


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
        values = np.asarray(self._only("values"))
        return values if isinstance(self.target, str) and self.target == "all" else values[:, None]

    def _only(self, name: str) -> Any:
        """Return the values or inputs where one input was looked at."""
        held = getattr(self, name)
        if isinstance(held, dict):
            raise InputError(
                f"There are maps of several inputs ({', '.join(map(repr, held))}): look at one, "
                "wrt=name."
            )
        return held

    def titles(self, example: int) -> list[str]:
        """Return what each of an example's maps explains."""
        if isinstance(self.target, str):
            count = self.maps.shape[1]
            return [f"output {n}" for n in range(count)] if self.target == "all" else ["direction"]
        target = np.broadcast_to(self.target, [len(self.maps)])
        return [f"output {target[example]}"]

    def figure(self, example: int = 0) -> Any:
        """Draw one example beside its maps; return a matplotlib Figure.

        Raises
        ------
        MissingExtraError
            If matplotlib is not installed.
        """
        title = f"{self.method}, example {example}"
        maps, x = self.maps[example], np.asarray(self._only("x")[example])
        return figures.maps(x, maps, self.titles(example), title)

    def save(self, path: str | pathlib.Path, example: int = 0) -> None:
        """Write one example's picture, in the format that the file's ending names."""
        self.figure(example).savefig(path, dpi=150, bbox_inches="tight")
