"""Laplace approximation: trained weights become a normal distribution, N(θ*, (N·F + δ·I)⁻¹)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend import memory
from perjac._core.backend.shapes import size
from perjac.errors import InputError, check_counts, check_one_of
from perjac.fisher._stream import Stream
from perjac.fisher._values import current, keyed
from perjac.fisher.blocks import BlockForm
from perjac.fisher.evidence import Evidence, Fit
from perjac.fisher.form import Form
from perjac.fisher.likelihoods import LIKELIHOODS
from perjac.fisher.predictive import Predictive

# Each form, and the method of `Fisher` that makes it.
FORMS = {
    "last_layer": "dense",
    "full": "dense",
    "low_rank": "low_rank",
    "blocks": "blocks",
    "diagonal": "diagonal",
    "kronecker": "kronecker",
    "eigenbasis": "eigenbasis",
}
# The empirical kind is no likelihood's curvature where labels are noisy: Kunstner et al. 2019.
KINDS = ("exact", "sampled")
# Bytes for rows at a time, where memory does not set a lower limit.
_AT_ONCE = 2**28


def laplace(
    engine: Any,
    data: Any,
    form: str = "last_layer",
    likelihood: str = "categorical",
    prior_precision: float | str = 1.0,
    variance: float | str = 1.0,
    prior_mean: float = 0.0,
    wrt: Any = None,
    of: Any = None,
    kind: str = "exact",
    samples: int = 1,
    seed: int = 0,
) -> Laplace:
    """Return the Laplace approximation of a trained model's posterior.

    The posterior of the weights is taken to be normal about their present values θ*, with the
    precision N·F + δ·I: the Fisher information of all examples and a normal prior's.

    Parameters
    ----------
    engine : Engine
        Of the trained model.
    data : (x, y), x, or a batched tf.data.Dataset of either
        What it was trained on. Without labels there is no marginal likelihood.
    form : {"last_layer", "full", "low_rank", "blocks", "diagonal", "kronecker", "eigenbasis"}
        Of the Fisher information: all of it, of the weights of the layer nearest to the output, or
        of all weights, as a matrix or by the Gram matrix of the examples' rows, where these are
        fewer than the weights; or a simpler form, of all weights.
    likelihood : {"categorical", "bernoulli", "gaussian"}
        As in `Engine.fisher`. A model's own final softmax or sigmoid is left out.
    prior_precision : float or "fitted"
        δ; "fitted" takes the one with the largest marginal likelihood. A weight decay of ½ w ‖θ‖²
        beside the mean loss, in Keras L2(w / 2), is δ = N·w; N·w/σ² beside the mean of
        ½ ‖y - f‖².
    variance : float or "fitted"
        The Gaussian's, σ²; "fitted" takes the one with the largest marginal likelihood.
    prior_mean : float
        Of every weight.
    wrt : as in `Engine.jacobian`, optional
        The weights that are uncertain, where they are not those that `form` says.
    of : str, int or layer, optional
        As in `Engine.jacobian`.
    kind : {"exact", "sampled"}
        Of the information, as in `Engine.fisher`; "sampled" where there are many outputs.
    samples, seed : int
        For the sampled kind.

    Returns
    -------
    Laplace
        Ask it to `predict`, to `sample` weights, and for its `log_marginal_likelihood`.

    Raises
    ------
    InputError
        For options, or labels, that do not fit.
    TooLargeError
        If the form does not fit into the memory limit.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
    >>> x, y = np.eye(4, dtype="float32"), np.array([0, 1, 2, 0])
    >>> posterior = pj.fisher.laplace(pj.Engine(model), (x, y), prior_precision="fitted")
    >>> found = posterior.predict(x)
    >>> found.probabilities.shape, found.variance.shape
    ((4, 3), (4, 3))

    Notes
    -----
    Around weights that are not a maximum of the posterior the approximation still stands, for the
    linearised model; "fitted" does not move the weights. Averaging over weights makes the
    probabilities of classes less certain, also those of a network that is well calibrated already:
    compare on held-out data.

    References
    ----------
    MacKay 1992, A practical Bayesian framework for backpropagation networks; Ritter et al. 2018
    (Kronecker); Immer et al. 2021, Improving predictions of Bayesian neural nets via local
    linearization; Daxberger et al. 2021, Laplace redux.
    """
    check_one_of(form, tuple(FORMS), "form")
    check_one_of(likelihood, LIKELIHOODS, "likelihood")
    check_one_of(kind, KINDS, "kind")
    variance = variance if likelihood == "gaussian" else 1.0
    _fixed(prior_precision, "prior_precision")  # refuses what it cannot read
    _fixed(variance, "variance")
    if wrt is None:
        last = form == "last_layer"
        wrt = last_layer(engine, Stream.of(data).first()[0], of) if last else "weights"
    fisher = engine.fisher(
        data, kind=kind, likelihood=likelihood, wrt=wrt, of=of, samples=samples, seed=seed,
        reduction="sum",
    )  # fmt: skip
    of = "logits" if fisher.explained == "logits" else of
    found = Laplace(
        engine, getattr(fisher, FORMS[form])(), likelihood, _fit(engine, data, likelihood, of),
        current(engine, fisher.columns), float(prior_mean), of,
    )  # fmt: skip
    return found.at(prior_precision, variance)


@dataclasses.dataclass(frozen=True, eq=False)
class Laplace:
    """A normal distribution over weights, N(θ*, (F/σ² + δ·I)⁻¹); made by `laplace`.

    Attributes
    ----------
    engine : Engine
        Of the model.
    form : Form
        F, summed over the examples, of a Gaussian at σ² = 1.
    likelihood : str
        "categorical", "bernoulli" or "gaussian".
    fit : Fit or None
        How well the model explains the labels, where there were any.
    mean : array (P,)
        θ*: the weights when it was made.
    prior_mean, prior_precision : float
        The prior is N(prior_mean, 1/δ) for every weight.
    of : str, int, layer or None
        The output that is predicted.
    variance : float
        σ², of the Gaussian; 1 for classes.
    """

    engine: Any
    form: Form
    likelihood: str
    fit: Fit | None
    mean: np.ndarray
    prior_mean: float
    of: Any
    prior_precision: float = 1.0
    variance: float = 1.0

    def __repr__(self) -> str:
        return (
            f"Laplace(likelihood={self.likelihood!r}, shape={self.form.shape}, prior_precision="
            f"{self.prior_precision:.4g}, variance={self.variance:.4g})"
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """The uncertain weights, in the order of the P numbers."""
        return self.form.keys

    @functools.cached_property
    def evidence(self) -> Evidence:
        """The marginal likelihood for any prior precision and variance.

        Raises
        ------
        InputError
            If the data had no labels.
        """
        if self.fit is None:
            raise InputError("The marginal likelihood needs labels: give data as (x, y).")
        values = np.maximum(self.form.eigenvalues(), 0)
        return Evidence(values, float(np.sum((self.mean - self.prior_mean) ** 2)), self.fit)

    def at(self, prior_precision: float | str, variance: float | str | None = None) -> Laplace:
        """Return the same with another prior precision, and for the Gaussian another variance.

        Parameters
        ----------
        prior_precision, variance : float or "fitted"
            As `laplace` takes them; the variance stays as it is if left out. No pass over the data.
        """
        precision = _fixed(prior_precision, "prior_precision")
        noise = self.variance if variance is None else _fixed(variance, "variance")
        if precision is None or noise is None:
            precision, noise = self.evidence.best(precision, noise)
        return dataclasses.replace(self, prior_precision=precision, variance=noise)

    def log_marginal_likelihood(self) -> float:
        """Return log p(labels | prior, variance), by Laplace's method.

        log p(y|θ*) - ½ (δ ‖θ* - μ‖² + log det(F/σ² + δ·I) - log det(δ·I)). Models, priors and
        variances can be compared by it without further data.

        Raises
        ------
        InputError
            If the data had no labels.
        """
        return self.evidence.at(self.prior_precision, self.variance)

    def effective_dimension(self) -> float:
        """Return γ = Σ_i λ_i / (λ_i + δ): how many of the P numbers the data determines."""
        return self.form.effective_dimension(self._damping)

    def solve(self, v: Any) -> Any:
        """Return the covariance times v, (F/σ² + δ·I)⁻¹ v, for v as in `Form.solve`."""
        return self.form.columns.like(
            self.variance * self.form.solve(self.form.columns.flat(v), self._damping), v
        )

    def sample(self, count: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
        """Return draws of the weights, by key, each (count, *shape)."""
        check_counts(count=count)
        spread = np.sqrt(self.variance) * self.form.sample(count, self._damping, seed)
        drawn, columns = self.mean + spread, self.form.columns
        return keyed(
            {
                key: drawn[:, where].reshape(count, *columns.shape(key))
                for key, where in columns.slices.items()
            }
        )

    def predict(self, x: Any, covariance: bool = False) -> Predictive:
        """Return the predictive distribution of the linearised model, f + J (θ - θ*).

        Parameters
        ----------
        x : array, or list or dict of arrays, or a batched tf.data.Dataset
            B examples.
        covariance : bool
            Whether to keep the covariances between an example's outputs, (B, K, K), too.

        Returns
        -------
        Predictive
            With `mean`, `variance` = diag(J Σ Jᵀ), and `probabilities` of classes.

        Raises
        ------
        InputError
            If the model's weights are not those that this was made of.

        Notes
        -----
        One Jacobian for a chunk of examples, as many as fit into memory. Block by block its rows
        are formed, and are right-hand sides of one solve.
        """
        if not np.array_equal(current(self.engine, self.form.columns), self.mean):
            raise InputError(
                "The model's weights have changed since this was made: set them back, or make it "
                "anew."
            )
        parts = [self._predicted(part, covariance) for part in self._chunks(x)]
        joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        noise = self.variance if self.likelihood == "gaussian" else 0.0
        return Predictive(self.likelihood, joined[0], joined[1], noise, *joined[2:])

    @property
    def _damping(self) -> float:
        """What is added to F: F/σ² + δ·I = (F + σ²δ·I)/σ²."""
        return self.prior_precision * self.variance

    def _predicted(self, x: Any, covariance: bool) -> list[np.ndarray]:
        """Return outputs and variances (B, *output_shape), and covariances (B, K, K) if asked."""
        jacobian = self.engine.jacobian(x, wrt=list(self.keys), of=self.of)
        outputs = np.asarray(jacobian.outputs, "f8")
        batch, count, _ = jacobian.shape
        total = np.zeros((batch, count, count) if covariance else (batch, count))
        for keys, solve in self._parts():
            formed = [np.reshape(np.asarray(jacobian[k], "f8"), (batch, count, -1)) for k in keys]
            rows = np.concatenate(formed, 2) if len(formed) > 1 else formed[0]
            pulled = solve(rows.reshape(batch * count, -1).T).T.reshape(rows.shape)
            if covariance:
                total += rows @ pulled.transpose(0, 2, 1)
            else:
                total += np.einsum("bkp,bkp->bk", rows, pulled)
        if not covariance:
            return [outputs, np.maximum(total, 0).reshape(outputs.shape)]
        variance = np.maximum(np.einsum("bkk->bk", total), 0).reshape(outputs.shape)
        return [outputs, variance, (total + total.transpose(0, 2, 1)) / 2]

    def _parts(self) -> Iterator[tuple[tuple[str, ...], Any]]:
        """Give the weights between which there is no covariance, and what solves for theirs."""
        if not isinstance(self.form, BlockForm):
            yield self.keys, self.solve
            return
        for keys, block in self.form.blocks.items():
            yield keys, functools.partial(block.of_spectrum, self._inverse)

    def _inverse(self, values: np.ndarray) -> np.ndarray:
        """Return the covariance's eigenvalues, of those of F."""
        return self.variance / (np.maximum(values, 0) + self._damping)

    def _chunks(self, x: Any) -> Iterator[Any]:
        """Give as many examples at a time as memory has room for the rows of a block of."""
        stream = Stream.of(x if isinstance(x, tf.data.Dataset) else (x,))
        traced, names = self.engine._traces.of(self.engine._traces.prepare(stream.first()[0]))
        head, weights = names.head(self.of), names.sources(list(self.keys))
        count = size(traced.row_shape(head))
        decisions = traced.decisions(head, weights, count)
        held = sum((d.entries or d.source.size) * d.source.dtype.size for d in decisions)
        widest = max(self.form.columns.only(keys).count for keys, _ in self._parts())
        # Formed, in float64, solved and on the way there.
        each = 2 * traced.footprint(head) + held + 4 * 8 * count * widest
        limit = min(memory.limit(self.engine.memory_limit) or _AT_ONCE, _AT_ONCE)
        for _, part, _ in stream.batches(max(1, limit // each)):
            yield part


def last_layer(engine: Any, x: Any, of: Any = None) -> list[str]:
    """Return the weights of the layer that meets the data last on the way to the output.

    Parameters
    ----------
    engine : Engine
        Of the model.
    x : array, or list, tuple or dict of arrays
        A few examples.
    of : str, int or layer, optional
        As in `Engine.jacobian`.
    """
    traced, names = engine._traces.of(engine._traces.prepare(x))
    head, weights = names.head(of), names.sources("weights")
    count = size(traced.row_shape(head))
    order = {op.name: n for n, op in enumerate(traced.program.graph.get_operations())}
    places = {  # operations stand in the order in which they can run
        d.source.key: max(order[site.operation] for site in d.sites)
        for d in traced.decisions(head, weights, count)
        if d.sites
    }
    if not places:
        raise InputError("The output depends on no trainable weight: name some with wrt=.")
    latest = max(places, key=places.__getitem__)
    layer = latest.rpartition("/")[0]
    return [key for key in places if key == latest or (layer and key.rpartition("/")[0] == layer)]


def _fit(engine: Any, data: Any, likelihood: str, of: Any) -> Fit | None:
    """Return how well the outputs explain the labels, in one pass; None where there are none."""
    stream, total = Stream.of(data), Fit()
    x, y = stream.first()
    if y is None:
        return None
    traced, names = engine._traces.of(engine._traces.prepare(x))
    limit = min(memory.limit(engine.memory_limit) or _AT_ONCE, _AT_ONCE)
    most = max(1, limit // (2 * traced.footprint(names.head(of))))
    for start, x, y in stream.batches(most):
        total += Fit.of(likelihood, engine.outputs(x, of=of), y, start)
    return total


def _fixed(value: Any, name: str) -> float | None:
    """Return a number above zero, or None for "fitted"."""
    if isinstance(value, str) and value == "fitted":
        return None
    if isinstance(value, (int, float, np.number)) and 0 < value < np.inf:
        return float(value)
    raise InputError(f"Expected {name}= above zero, or 'fitted'. Received: {value!r}.")
