"""What a tangent kernel says: its spectrum, and what training the linearised model leads to."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import LinearOperator, eigsh

from perjac import progress
from perjac._core.backend import memory
from perjac.errors import InputError, NotPositiveError, OutOfRangeError, check_counts
from perjac.fisher._stream import Stream
from perjac.fisher.ntk import ntk

# Eigenvalues of a kernel below so much of the largest are its rounding.
_NOTHING = {"float32": 1e-6, "float64": 1e-13}
# Rows up to which all eigenvalues are found, a few of which then are looked at.
_SMALL = 1024
# Examples that go through the network at a time.
_FORWARD = 128
# Numbers of the kernel between test and training examples that are held at a time.
_AT_ONCE = 2**25


def kernel_eigh(kernel: Any, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest eigenvalues of a kernel, the largest first, and their vectors.

    Parameters
    ----------
    kernel : array (N, K, N, K) or (N, N), or zarr.Array
        As `ntk` returns it; one on disk is read block by block when `k` is given.
    k : int, optional
        How many; all M = N·K if left out.

    Returns
    -------
    values : np.ndarray (k,)
        In float64.
    vectors : np.ndarray (M, k)
        Of unit length, rows in the order (N, K).

    Raises
    ------
    InputError
        If the kernel is not square, or has no k eigenvalues.

    Notes
    -----
    The kernel's eigenvalues times the learning rate are the rates at which training the linearised
    model reduces the error along their vectors.

    Examples
    --------
    >>> import numpy as np
    >>> from perjac.fisher import kernel_eigh
    >>> kernel_eigh(np.diag([1.0, 3.0, 2.0]), k=2)[0]
    array([3., 2.])

    References
    ----------
    Jacot et al. 2018, section 5; Lehoucq et al. 1998, ARPACK.
    """
    count = _order(kernel)
    if k is not None:
        check_counts(k=k)
        if k > count:
            raise OutOfRangeError(f"Expected k= from 1 to {count}. Received: {k!r}.")
    if k is None or count <= _SMALL or 4 * k > count:
        values, vectors = scipy.linalg.eigh(_matrix(kernel))
        chosen = slice(None, None if k is None else -k - 1, -1)
        return values[::-1][:k], vectors[:, chosen]
    values, vectors = eigsh(_operator(kernel), k=k)
    order = np.argsort(values)[::-1]
    return values[order], vectors[:, order]


def kernel_condition(kernel: Any) -> float:
    """Return a kernel's largest eigenvalue over its smallest.

    Infinite where the smallest is within the rounding of the largest: the kernel is then singular,
    as it is for more rows than weights, N·K > P.

    Parameters
    ----------
    kernel : array (N, K, N, K) or (N, N), or zarr.Array
        As `ntk` returns it.

    Examples
    --------
    >>> import numpy as np
    >>> from perjac.fisher import kernel_condition
    >>> kernel_condition(np.diag([1.0, 4.0]))
    4.0
    """
    _order(kernel)
    values = scipy.linalg.eigvalsh(_matrix(kernel))
    if values[0] <= _rounding(kernel.dtype) * values[-1]:
        return float("inf")
    return float(values[-1] / values[0])


class NTKRegression:
    """The model that training a network linearised about its weights leads to.

    With f the network at its weights w₀, K its tangent kernel and loss
    ½ Σ (f + J (w - w₀) - y)² + ½ ridge ‖w - w₀‖², gradient flow for a time t leads to

        f_t(x) = f(x) + K(x, X) (K + ridge·I)⁻¹ (I - exp(-(K + ridge·I) t)) (y - f(X)),

    and for t → ∞ to kernel ridge regression of the residuals. Nothing of the size of the weights
    is formed.

    Parameters
    ----------
    engine : Engine
        Of the network at initialisation, or wherever it is linearised.
    x : array, or list or dict of arrays
        N training examples.
    y : array (N, *output_shape), or (N, K) for `outputs`
        What their outputs should be.
    ridge : float
        What the weights' distance from where they were costs; as a Gaussian process, the variance
        of the labels' noise.
    outputs, of, wrt : as in `ntk`
        Of which K outputs, with respect to which weights.

    Attributes
    ----------
    kernel : np.ndarray (N, K, N, K)
        In the type of the weights.
    residuals : np.ndarray (N, K)
        y - f(X), in float64.

    Raises
    ------
    InputError
        For labels that do not fit.
    PerjacError
        As `ntk`.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> from perjac.fisher import NTKRegression
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "tanh"),
    ...                           keras.layers.Dense(1)])
    >>> x = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
    >>> trained = NTKRegression(pj.Engine(model), x, np.sin(x[:, :1]), ridge=0.1)
    >>> mean, variance = trained.predict(x[:3], variance=True)
    >>> mean.shape, variance.shape
    ((3, 1), (3, 1))

    References
    ----------
    Jacot et al. 2018, Neural Tangent Kernel; Lee et al. 2019, Wide neural networks of any depth
    evolve as linear models under gradient descent, eq. 8 to 11.
    """

    def __init__(
        self,
        engine: Any,
        x: Any,
        y: Any,
        *,
        ridge: float = 0.0,
        outputs: int | Sequence[int] | None = None,
        of: Any = None,
        wrt: Any = "weights",
    ):
        if not isinstance(ridge, (int, float)) or not 0 <= ridge < np.inf:
            raise InputError(f"Expected ridge= as a number of 0 or more. Received: {ridge!r}.")
        self._engine, self._x, self.ridge = engine, x, float(ridge)
        self._asked = {"outputs": outputs, "of": of, "wrt": wrt}
        f = self._outputs(x)
        self.row_shape = f.shape[1:]
        labels = np.asarray(y, "f8")
        if labels.shape != f.shape and not (labels.ndim == 1 and labels.size == f.size):
            raise InputError(f"Expected y of shape {f.shape}. Received: {labels.shape}.")
        self.residuals = (labels.reshape(f.shape) - f).reshape(len(f), -1)
        self.kernel = ntk(engine, x, **self._asked)

    def __repr__(self) -> str:
        return f"NTKRegression(kernel={self.kernel.shape}, ridge={self.ridge:g})"

    def predict(self, x: Any, *, time: float | None = None, variance: bool = False) -> Any:
        """Return the trained model's outputs, and how uncertain they are.

        Parameters
        ----------
        x : array, or list or dict of arrays
            T examples.
        time : float, optional
            Until when it is trained: the learning rate times the number of small steps on the loss
            above; times 2 / (N·K) on Keras's mean squared error. To convergence if left out.
        variance : bool
            Whether to return the variance too: of the Gaussian process whose prior covariance is
            the kernel, and whose labels have noise of variance `ridge`. It is that of the
            linearised model with normal weights about w₀, of variance 1 each.

        Returns
        -------
        mean : np.ndarray (T, *output_shape)
            In float64.
        variance : np.ndarray (T, *output_shape)
            Of the function, without the labels' noise; only if asked for.

        Raises
        ------
        NotPositiveError
            If the kernel plus `ridge` is not positive, but for rounding.
        """
        if time is not None and (variance or not isinstance(time, (int, float)) or time < 0):
            raise InputError(
                f"Expected time= as a number of 0 or more, without variance. Received: {time!r}."
            )
        alpha = self._solved(self.residuals.reshape(-1, 1), time)
        stream = Stream.of(x)
        most = max(1, _AT_ONCE // (self.residuals.size * self.residuals.shape[1]))
        means, variances = [], []
        for _, part, _ in stream.batches(most):
            with progress.heard(lambda done, total: None):  # the examples are told already
                across = ntk(self._engine, part, self._x, **self._asked)
            across = np.asarray(across, "f8").reshape(-1, self.residuals.size)  # (T·K, N·K)
            f = self._outputs(part)
            means.append(f + (across @ alpha).reshape(f.shape))
            if variance:
                taken = np.sum(across.T * self._solved(across.T, None), 0)
                variances.append(np.maximum(self._prior(part) - taken, 0).reshape(f.shape))
        mean = np.concatenate(means)
        return (mean, np.concatenate(variances)) if variance else mean

    def _outputs(self, x: Any) -> np.ndarray:
        """Return the network's outputs at w₀, (N, *output_shape), or those chosen of them."""
        f = np.concatenate(
            [
                np.asarray(self._engine.outputs(part, of=self._asked["of"]), "f8")
                for _, part, _ in Stream.of(x).batches(_FORWARD)
            ]
        )
        chosen = self._asked["outputs"]
        return f if chosen is None else f.reshape(len(f), -1)[:, np.atleast_1d(chosen)]

    def _prior(self, x: Any) -> np.ndarray:
        """Return the kernel's diagonal, (T·K,): the rows' squared norms."""
        asked = dict(self._asked)
        if asked["outputs"] is not None:
            asked["outputs"] = list(np.atleast_1d(asked["outputs"]))
        rows = self._engine.jacobian(x, **asked)
        return np.ravel(np.square(np.asarray(rows.norms(per="row"), "f8")))

    @functools.cached_property
    def _cholesky(self) -> Any:
        matrix = _matrix(self.kernel)
        matrix[np.diag_indices_from(matrix)] += self.ridge
        try:
            return scipy.linalg.cho_factor(matrix, lower=True, overwrite_a=True)
        except np.linalg.LinAlgError as failure:
            raise NotPositiveError(
                f"The kernel with ridge={self.ridge:g} is not positive: its eigenvalues are within "
                f"the rounding of {self.kernel.dtype}. Choose a larger ridge=, or 0."
            ) from failure

    @functools.cached_property
    def _spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """The eigenvalues above rounding, and their vectors: no row lies beside them."""
        values, vectors = scipy.linalg.eigh(_matrix(self.kernel))
        kept = values > _rounding(self.kernel.dtype) * values.max(initial=0)
        return values[kept], vectors[:, kept]

    def _solved(self, v: np.ndarray, time: float | None) -> np.ndarray:
        """Return (K + ridge)⁻¹ (1 - exp(-(K + ridge) t)) v, for v (N·K, m)."""
        if time is None and self.ridge:  # 27 times cheaper than the spectrum
            return scipy.linalg.cho_solve(self._cholesky, v)
        values, vectors = self._spectrum
        rates = values + self.ridge
        weights = (1 if time is None else -np.expm1(-rates * time)) / rates
        return vectors @ (weights[:, None] * (vectors.T @ v))


def _order(kernel: Any) -> int:
    """Return M of a kernel (M, M) or (N, K, N, K) with M = N·K."""
    shape = tuple(kernel.shape)
    half = len(shape) // 2
    if len(shape) not in (2, 4) or shape[:half] != shape[half:]:
        raise InputError(f"Expected a kernel (N, K, N, K) or (N, N). Received: {shape}.")
    return int(np.prod(shape[:half]))


def _matrix(kernel: Any) -> np.ndarray:
    """Return a kernel as a matrix (M, M) of its own, in float64."""
    count = _order(kernel)
    memory.check(
        8 * count**2, None, f"The kernel, ({count}, {count}),", "Ask kernel_eigh for the k largest."
    )
    return np.array(kernel[...], "f8").reshape(count, count)


def _operator(kernel: Any) -> LinearOperator:
    """Return a kernel's products, made of as many of its rows at a time as a tile has."""
    count = _order(kernel)
    most = getattr(kernel, "chunks", kernel.shape)[0]

    def products(v: np.ndarray) -> np.ndarray:
        bands = [
            np.asarray(kernel[n : n + most], "f8").reshape(-1, count) @ v
            for n in range(0, kernel.shape[0], most)
        ]
        return np.concatenate(bands)

    shape = (count, count)
    return LinearOperator(shape, matvec=products, matmat=products, dtype="f8")  # type: ignore


def _rounding(dtype: Any) -> float:
    return _NOTHING.get(np.dtype(dtype).name, _NOTHING["float32"])
