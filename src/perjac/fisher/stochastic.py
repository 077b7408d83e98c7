"""Numbers of a matrix that is known by its products alone: estimates that report their error.

Knows symmetric operators; must not know models or data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from perjac.errors import InputError, check_counts
from perjac.fisher.lanczos import krylov, largest_of

_TINY = np.finfo("f8").tiny


class Estimate(float):
    """A number that was estimated: a float that knows how well.

    Attributes
    ----------
    standard_error : float
        The standard deviation of the mean over probes.
    truncation : float
        How far the mean may be off besides, at most, because Krylov spaces were cut off.
    products : int
        How many products with the matrix it took.

    Examples
    --------
    >>> from perjac.fisher.stochastic import Estimate
    >>> Estimate(2.0, 0.1, products=30) + 1
    3.0
    """

    standard_error: float
    truncation: float
    products: int

    def __new__(
        cls, value: float, standard_error: float = 0.0, truncation: float = 0.0, products: int = 0
    ):
        """Make a float with its errors."""
        found = super().__new__(cls, value)
        found.standard_error, found.truncation = float(standard_error), float(truncation)
        found.products = int(products)
        return found

    def __repr__(self) -> str:
        cut = f" ± {self.truncation:.1g} (cut off)" if self.truncation else ""
        return f"{float(self):.6g} ± {self.standard_error:.1g}{cut}, {self.products} products"

    def __reduce__(self) -> tuple:
        return type(self), (float(self), self.standard_error, self.truncation, self.products)


@dataclasses.dataclass(frozen=True, eq=False)
class DiagonalEstimate:
    """An estimated diagonal.

    Attributes
    ----------
    values, standard_errors : np.ndarray
        (P,).
    products : int
        How many products with the matrix it took.
    """

    values: np.ndarray
    standard_errors: np.ndarray
    products: int


@dataclasses.dataclass(frozen=True, eq=False)
class SpectralDensity:
    """How the eigenvalues of a matrix are spread: a measure of mass 1.

    Attributes
    ----------
    nodes, weights : np.ndarray
        (n, k): one measure for each of n probes, whose mean is the estimate; weights of a row sum
        to 1. The exact one has one row, of all eigenvalues.
    size : int
        P: a weight w stands for w·P eigenvalues.
    products : int
        How many products with the matrix it took; 0 for the exact one.
    """

    nodes: np.ndarray
    weights: np.ndarray
    size: int
    products: int = 0

    def density(self, points: Any, width: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the density smoothed by a Gaussian, and its standard errors, at some points.

        Parameters
        ----------
        points : array (m,)
            Where.
        width : float
            The Gaussian's standard deviation.

        Returns
        -------
        tuple of np.ndarray
            (m,) each.
        """
        if not width > 0:
            raise InputError(f"Expected width= above zero. Received: {width!r}.")
        points = np.asarray(points, "f8")
        z = (points[:, None, None] - self.nodes) / width
        bumps = np.exp(-(z**2) / 2) / (np.sqrt(2 * np.pi) * width)
        return self._mean(np.sum(bumps * self.weights, -1).T)

    def above(self, threshold: float) -> Estimate:
        """Return how many eigenvalues are above a threshold."""
        each = np.sum(self.weights * (self.nodes > threshold), -1)
        mean, error = self._mean(each)
        return Estimate(self.size * float(mean), self.size * float(error), products=self.products)

    def _mean(self, each: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return each.mean(0), _standard_error(each) if self.products else np.zeros(each.shape[1:])


def hutchpp_trace(matrix: Any, products: int = 90, seed: int = 0) -> Estimate:
    """Return the trace of a symmetric matrix, by Hutch++.

    Parameters
    ----------
    matrix : Form, LinearOperator or array (P, P)
        Symmetric.
    products : int
        How many products it may take: a third each finds where the matrix is large, where the trace
        is then taken exactly, and samples the rest.
    seed : int
        Of the probes.

    Returns
    -------
    Estimate
        Unbiased. Its standard error is that of the sampled rest, and zero, up to rounding, where
        the rank is at most a third of the products.

    Examples
    --------
    >>> import numpy as np
    >>> from perjac.fisher.stochastic import hutchpp_trace
    >>> v = np.arange(100.0)
    >>> trace = hutchpp_trace(np.outer(v, v) / 1000)
    >>> round(trace, 3), trace.products, trace.standard_error < 1e-9
    (328.35, 90, True)

    References
    ----------
    Meyer, Musco, Musco and Woodruff 2021, Hutch++: optimal stochastic trace estimation.
    """
    base, image, samples, used = _deflated(matrix, products, seed)
    each = samples.sum(0)
    return Estimate(np.sum(base * image) + each.mean(), float(_standard_error(each)), products=used)


def stochastic_diagonal(matrix: Any, products: int = 90, seed: int = 0) -> DiagonalEstimate:
    """Return the diagonal of a symmetric matrix, by Diag++.

    Parameters
    ----------
    matrix, products, seed : as in `hutchpp_trace`
        The part within the range found is exact, the rest sampled.

    Returns
    -------
    DiagonalEstimate
        Unbiased, with the standard error of each entry.

    References
    ----------
    Bekas, Kokiopoulou and Saad 2007, An estimator for the diagonal of a matrix; Baston and
    Nakatsukasa 2022, Stochastic diagonal estimation, whose deflation is here of both sides.
    """
    base, image, samples, used = _deflated(matrix, products, seed)
    # With Π = QQᵀ: A = ΠA + (1 - Π)AΠ + (1 - Π)A(1 - Π), the last of which was sampled.
    outside = image - base @ (base.T @ image)
    exact = np.sum(base * (image + outside), 1)
    return DiagonalEstimate(exact + samples.mean(1), _standard_error(samples.T), used)


def stochastic_logdet(
    matrix: Any,
    damping: float,
    probes: int = 10,
    steps: int = 50,
    deflate: int = 0,
    seed: int = 0,
) -> Estimate:
    """Return log det(A + damping·I) of a positive semi-definite A, by Lanczos quadrature.

    Parameters
    ----------
    matrix : Form, LinearOperator or array (P, P)
        A.
    damping : float
        Above zero.
    probes, steps : int
        Krylov spaces, and the dimension of each: probes · steps products.
    deflate : int
        How many of the largest eigenvalues are taken exactly, before the rest is sampled.
    seed : int
        Of the probes.

    Returns
    -------
    Estimate
        With the standard error over the probes. `truncation` bounds what a longer Krylov space
        could change: the Gauss rule is above, the Gauss-Radau rule with a node at 0 is below.

    Examples
    --------
    >>> import numpy as np
    >>> from perjac.fisher.stochastic import stochastic_logdet
    >>> v = np.arange(100.0)
    >>> found = stochastic_logdet(np.outer(v, v), damping=1.0, deflate=1)
    >>> round(found - np.log(1 + v @ v), 6) + 0.0
    0.0

    References
    ----------
    Ubaru, Chen and Saad 2017, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature; Golub
    and Meurant 1994, Matrices, moments and quadrature, for the bounds.
    """
    _check_positive(damping)
    found = _trace_of(
        matrix, lambda x: np.log1p(x / damping), damping, probes, steps, deflate, seed
    )
    constant = aslinearoperator(matrix).shape[0] * np.log(damping)
    return Estimate(found + constant, found.standard_error, found.truncation, found.products)


def stochastic_effective_dimension(
    matrix: Any,
    damping: float,
    probes: int = 10,
    steps: int = 50,
    deflate: int = 0,
    seed: int = 0,
) -> Estimate:
    """Return Σ_i λ_i / (λ_i + damping) of a positive semi-definite matrix, by Lanczos quadrature.

    Parameters
    ----------
    matrix, damping, probes, steps, deflate, seed : as in `stochastic_logdet`
        As there.

    Returns
    -------
    Estimate
        As there.
    """
    _check_positive(damping)
    return _trace_of(matrix, lambda x: x / (x + damping), damping, probes, steps, deflate, seed)


def spectral_density(
    matrix: Any, probes: int = 10, steps: int = 50, seed: int = 0
) -> SpectralDensity:
    """Return the spectral density of a symmetric matrix, by Lanczos quadrature.

    Parameters
    ----------
    matrix : Form, LinearOperator or array (P, P)
        Symmetric.
    probes, steps : int
        Krylov spaces, and the dimension of each: probes · steps products.
    seed : int
        Of the probes.

    Returns
    -------
    SpectralDensity
        Nodes and weights, which `density` smooths.

    References
    ----------
    Ghorbani, Krishnan and Xiao 2019, An investigation into neural net optimization via Hessian
    eigenvalue density; Lin, Saad and Yang 2016, Approximating spectral densities of large matrices.
    """
    operator = aslinearoperator(matrix)
    check_counts(probes=probes, steps=steps)
    size = operator.shape[0]
    found, used = krylov(operator.matmat, _directions(_normal(size, probes, seed), size), steps)
    nodes, weights = np.zeros((2, probes, max(len(space.alpha) for space in found)))
    for n, space in enumerate(found):
        values, vectors = space.spectrum()
        nodes[n, : len(values)], weights[n, : len(values)] = values, vectors[0] ** 2
    return SpectralDensity(nodes, weights, size, used)


def _trace_of(
    matrix: Any,
    function: Callable[[Any], Any],
    damping: float,
    probes: int,
    steps: int,
    deflate: int,
    seed: int,
) -> Estimate:
    """Return tr f(A) for f(0) = 0, whose even derivatives are negative and odd ones positive."""
    check_counts(probes=probes, steps=steps)
    check_counts(least=0, deflate=deflate)
    operator = aslinearoperator(matrix)
    size = operator.shape[0]
    counted = _Counted(operator)
    values, base = _largest(counted, min(deflate, size - 1), seed)

    def project(v: np.ndarray) -> np.ndarray:
        return v - base @ (base.T @ v)

    starts = _directions(project(project(_normal(size, probes, seed))), size - base.shape[1])
    spaces, _ = krylov(lambda v: project(counted.matmat(v)), starts, steps)
    bounds = np.zeros((2, probes))
    for n, space in enumerate(spaces):
        largest = max(np.abs(space.alpha).max(), space.beta.max())
        # Below every Ritz value, whose rounding may bring them below zero.
        lowest = -min(1e-12 * largest, damping / 2) - _TINY
        for bound, (nodes, weights) in zip(bounds, space.rules(lowest), strict=True):
            shares = weights * function(np.maximum(nodes, lowest))
            bound[n] = space.length**2 * np.sum(shares)
    upper, lower = bounds
    each = (upper + lower) / 2
    return Estimate(
        np.sum(function(values)) + each.mean(),
        float(_standard_error(each)),
        max(0.0, float(np.mean(upper - lower) / 2)),
        counted.products,
    )


class _Counted(LinearOperator):
    """An operator that counts its products."""

    def __init__(self, operator: LinearOperator):
        self._operator, self.products = operator, 0
        super().__init__(np.dtype("f8"), operator.shape)

    def _matvec(self, v: np.ndarray) -> np.ndarray:
        self.products += 1
        return self._operator.matvec(v)

    def _matmat(self, v: np.ndarray) -> np.ndarray:
        self.products += v.shape[1]
        return self._operator.matmat(v)


def _largest(operator: LinearOperator, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest eigenvalues (k,) and their vectors (P, k)."""
    size = operator.shape[0]
    if not count:
        return np.zeros(0), np.zeros((size, 0))
    return largest_of(operator, count, seed)


def _deflated(
    matrix: Any, products: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return Q (P, k), AQ, samples (P, n) of the diagonal of (1 - QQᵀ)A(1 - QQᵀ), and the cost."""
    check_counts(least=6, products=products)
    operator = aslinearoperator(matrix)
    size = operator.shape[0]
    sketched = min(products // 3, size)
    rng = np.random.default_rng([seed, 2])
    base = np.linalg.qr(operator.matmat(_drawn(rng, size, sketched)))[0]
    image = operator.matmat(base)
    if base.shape[1] == size:
        return base, image, np.zeros((size, 2)), 2 * size
    probes = _drawn(rng, size, products - 2 * sketched)
    inside = probes - base @ (base.T @ probes)
    found = operator.matmat(inside)
    samples = probes * (found - base @ (base.T @ found))
    return base, image, samples, products


def _normal(size: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 3]).standard_normal((size, count))


def _directions(normal: np.ndarray, dimension: int) -> np.ndarray:
    """Return directions that are uniform in a space of so many dimensions, of squared length that.

    The average of z zᵀ is the identity there, and what is the same in all directions has no
    variance, which random signs do not offer in a subspace.
    """
    return normal * (np.sqrt(dimension) / np.maximum(np.linalg.norm(normal, axis=0), _TINY))


def _drawn(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    return rng.integers(0, 2, (size, count)) * 2.0 - 1.0


def _standard_error(each: np.ndarray) -> Any:
    """Return the standard error of the mean over the first axis; infinite for a single one."""
    if len(each) < 2:
        return np.full(each.shape[1:], np.inf)
    return np.std(each, axis=0, ddof=1) / np.sqrt(len(each))


def _check_positive(damping: Any) -> None:
    if not isinstance(damping, (int, float, np.number)) or not 0 < damping < np.inf:
        raise InputError(
            "Expected damping= above zero: products do not tell how small the eigenvalues become. "
            f"Received: {damping!r}."
        )
