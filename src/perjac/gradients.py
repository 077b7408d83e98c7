"""Gradients: what the user holds of a loss, one gradient for each example."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.backend.shapes import known
from perjac._core.factors import Factor, Lookup
from perjac._core.factors.reductions import Factors, query
from perjac._core.model.variables import Source, Weights
from perjac._rows import Rows, group_of, grouped_norms, norms, weighted_sum
from perjac.errors import InputError, check_one_of

_PER = (None, "source", "layer")


class Gradients(Rows):
    """The gradient of each example's loss with respect to the chosen sources.

    Made by `Engine.gradients`. B is the number of examples, P of numbers differentiated against.
    Nothing of size B × P is formed unless it is asked for.

    Attributes
    ----------
    shape : tuple of int
        (B, P).
    losses : tf.Tensor
        The loss of each example, (B,).

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="top")])
    >>> grads = pj.Engine(model).gradients(np.ones((5, 3)), np.zeros((5, 2)), loss="mse")
    >>> grads.shape, grads["top/kernel"].shape, grads.norms().shape
    ((5, 8), TensorShape([5, 3, 2]), TensorShape([5]))
    """

    _instead = (
        "norms(), gram(), mean(), variance(), clipped_sum(), project(), jvp() and vjp() answer "
        "without forming it"
    )

    def __init__(
        self,
        factors: Mapping[str, Factor],
        sources: Sequence[Source],
        weights: Weights,
        losses: tf.Tensor,
        memory_limit: int | str | None = None,
        jit: bool = True,
    ):
        self.losses = losses
        lead = known(losses.shape)
        super().__init__(factors, sources, weights, lead, (), memory_limit, jit)

    def norms(self, per: str | None = None) -> Any:
        """Return the Euclidean norm of each example's gradient.

        Parameters
        ----------
        per : None, "source" or "layer"
            Of everything together; of each weight; or of each layer, by the weights' paths.

        Returns
        -------
        tf.Tensor or dict of str to tf.Tensor
            (B,), or {name: (B,)}.

        References
        ----------
        Goodfellow 2015, Efficient per-example gradient computations.
        """
        check_one_of(per, _PER, "per")
        return self._as_sources(query(norms, per=per)(self._factors))

    def mean(self) -> dict[str, tf.Tensor]:
        """Return the mean gradient over the examples, by key, each of its source's shape."""
        u = tf.fill([self._some(1), 1], tf.constant(1 / self.shape[0], self._held))
        return self._ordered(query(weighted_sum)(self._factors, u))

    def variance(self, ddof: int = 0) -> dict[str, tf.Tensor]:
        """Return the variance of each number of the gradient over the examples, by key.

        Parameters
        ----------
        ddof : int
            The divisor is B - ddof, as in `numpy.var`.
        """
        divisor = self._some(1 + ddof) - ddof
        return self._ordered(query(_spread)(self._factors, tf.cast(divisor, self._held)))

    def snr(self, ddof: int = 0) -> dict[str, tf.Tensor]:
        """Return the gradient signal-to-noise ratio, mean² / variance, by key.

        Where the variance is zero it is infinite, or 0 if the mean is zero too.

        Parameters
        ----------
        ddof : int
            As in `variance`.

        References
        ----------
        Liu et al. 2020, Understanding why neural networks generalize well through GSNR of
        parameters, eq. 1.
        """
        mean, variance = self.mean(), self.variance(ddof)
        return self._ordered(
            {
                key: tf.where(tf.equal(m, 0), tf.zeros_like(m), tf.square(m) / variance[key])
                for key, m in ((key, tf.abs(m)) for key, m in mean.items())
            }
        )

    def clipped_sum(
        self, max_norm: float | Mapping[str, float] = 1.0, per: str | None = None
    ) -> dict[str, tf.Tensor]:
        """Return Σ_b g_b · min(1, max_norm / ‖g_b‖), by key, each of its source's shape.

        Parameters
        ----------
        max_norm : float, or mapping of str to float
            What the norms are clipped to; a mapping gives each source or layer its own.
        per : None, "source" or "layer"
            Whether whole gradients are clipped, or the parts of each weight or layer by themselves.

        Notes
        -----
        In memory for one gradient, not B: the norms first, then one weighted sum.

        References
        ----------
        Abadi et al. 2016, Deep learning with differential privacy, algorithm 1; Li et al. 2022,
        Large language models can be strong differentially private learners ("ghost clipping").
        """
        check_one_of(per, _PER, "per")
        groups = list(dict.fromkeys(group_of(key, per) for key in self))
        limits = self._limits(max_norm, groups)
        return self._ordered(query(_clipped, per=per)(self._factors, limits))

    def slices(self, key: Any) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
        """Return the rows of a table's gradient that need not be zero, each once per example.

        Parameters
        ----------
        key : str or variable
            A weight, such as an embedding: one that is only looked up by ids is never formed.

        Returns
        -------
        ids : tf.RaggedTensor
            (B, n_b), increasing: rows of the table.
        rows : tf.RaggedTensor
            (B, n_b, D): their gradients. All other rows of the table are zero.
        """
        source = self._find(key)
        factor = self._factors[source.key]
        if not source.shape:
            raise InputError(f"{source.key!r} is a single number: it has no rows.")
        if isinstance(factor, Lookup):
            ids, rows, used = query(_sliced)(factor)
            rows = tf.cast(rows, source.dtype)
        else:  # in another way too, or of a table that is smaller than what was looked up
            rows = self[source.key]
            found = tf.reduce_any(tf.not_equal(rows, 0), list(range(2, rows.shape.rank)))
            ids, used = tf.where(found)[:, 1], tf.math.count_nonzero(found, 1)
            rows = tf.boolean_mask(rows, found)
        ids = tf.cast(ids, tf.int64)
        return tf.RaggedTensor.from_row_lengths(ids, used), tf.RaggedTensor.from_row_lengths(
            rows, used
        )

    def _some(self, least: int) -> int:
        """Return B, or raise where there are fewer examples than a statistic needs."""
        if self.shape[0] < least:
            raise InputError(f"Expected at least {least} examples. Received: {self.shape[0]}.")
        return self.shape[0]

    def _limits(self, max_norm: Any, groups: Sequence[str]) -> dict[str, tf.Tensor]:
        given: dict[str, Any] = (
            dict(max_norm) if isinstance(max_norm, Mapping) else dict.fromkeys(groups, max_norm)
        )
        if set(given) != set(groups):
            raise InputError(f"Expected max_norm for {groups}. Received: {list(given)}.")
        bad = [value for value in given.values() if not _is_positive(value)]
        if bad:
            raise InputError(f"Expected max_norm above zero. Received: {bad[0]!r}.")
        return {group: tf.constant(given[group], self._held) for group in groups}


def _is_positive(value: Any) -> bool:
    try:
        return float(value) > 0 and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _spread(factors: Factors, divisor: tf.Tensor) -> dict[str, tf.Tensor]:
    """Σ_b (g_b - ḡ)² / divisor, by key."""
    return {key: factor.squared_deviations() / divisor for key, factor in factors.items()}


def _clipped(
    factors: Factors, limits: Mapping[str, tf.Tensor], per: str | None
) -> dict[str, tf.Tensor]:
    kept = {  # min(1, c / ‖g‖), also where g is zero, or c beyond the type's range
        group: tf.where(norm <= limits[group], tf.ones_like(norm), limits[group] / norm)
        for group, norm in grouped_norms(factors, per).items()
    }
    return {key: factor.vjp(kept[group_of(key, per)][:, None]) for key, factor in factors.items()}


def _sliced(factor: Lookup) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    ids, rows, used = factor.slices()
    return ids, rows[:, 0], used
