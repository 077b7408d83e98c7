"""Attribution: a method's answer, with its pictures."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import tensorflow as tf

from perjac.saliency import figures


@dataclasses.dataclass(frozen=True)
class Attribution:
    """What in each input drives the target.

    Attributes
    ----------
    method : str
        The method's name.
    values : tf.Tensor
        (B, *input_shape), or (B, C, *input_shape) for target "all": signed, channels kept.
    target : array (B,) or scalar of int, "all" or "directions"
        What was explained.
    outputs : tf.Tensor
        The model's outputs, (B, *output_shape).
    x : tf.Tensor
        The inputs.
    """

    method: str
    values: tf.Tensor
    target: Any
    outputs: tf.Tensor
    x: tf.Tensor

    @property
    def maps(self) -> np.ndarray:
        """The values as (B, M, *input_shape): M = 1, or C for target "all"."""
        values = np.asarray(self.values)
        return values if isinstance(self.target, str) and self.target == "all" else values[:, None]

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
        maps, x = self.maps[example], np.asarray(self.x[example])
        return figures.maps(x, maps, self.titles(example), title)

    def save(self, path: str | pathlib.Path, example: int = 0) -> None:
        """Write one example's picture, in the format that the file's ending names."""
        self.figure(example).savefig(path, dpi=150, bbox_inches="tight")
