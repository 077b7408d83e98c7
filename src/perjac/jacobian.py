"""Jacobian: what the user holds of a model's outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend.shapes import known
from perjac._core.factors import Factor
from perjac._core.factors.reductions import query
from perjac._core.model.variables import Source, Weights
from perjac._rows import Rows, norms
from perjac.errors import check_one_of


class Jacobian(Rows):
    """Every example's derivative of the chosen outputs with respect to the chosen sources.

    Made by `Engine.jacobian`. B is the number of examples, K of rows, P of numbers differentiated
    against. Rows are formed only when a key is looked up; the queries mostly do without.

    Attributes
    ----------
    shape : tuple of int
        (B, K, P).
    row_shape : tuple of int
        How the K rows are arranged: the output's shape, or (n,) for n chosen outputs.
    outputs : tf.Tensor
        The model's outputs, (B, *output_shape).

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="top")])
    >>> jac = pj.Engine(model).jacobian(np.ones((5, 3), "float32"))
    >>> jac.shape, jac["top/kernel"].shape
    ((5, 2, 8), TensorShape([5, 2, 3, 2]))
    """

    def __init__(
        self,
        factors: Mapping[str, Factor],
        sources: Sequence[Source],
        weights: Weights,
        outputs: tf.Tensor,
        row_shape: tuple[int, ...],
        memory_limit: int | str | None = None,
        jit: bool = True,
    ):
        self.outputs, self.row_shape = outputs, tuple(row_shape)
        lead = (known(outputs.shape)[0], math.prod(self.row_shape))
        super().__init__(factors, sources, weights, lead, self.row_shape, memory_limit, jit)

    def norms(self, per: str | None = None) -> Any:
        """Return Frobenius norms, without forming rows where there is a cheaper way.

        Parameters
        ----------
        per : None, "row", "source" or "layer"
            One for each example; for each example and row; for each example and source; or and
            layer, by the sources' paths.

        Returns
        -------
        tf.Tensor or dict of str to tf.Tensor
            (B,); (B, K); or {key: (B,)}.
        """
        check_one_of(per, (None, "row", "source", "layer"), "per")
        if per == "row":
            return self._lengths()
        return self._as_sources(query(norms, per=per)(self._factors))
