"""Krylov spaces of a symmetric operator, and what is read from them: nodes, vectors, bounds.

Knows products alone; must not know what is estimated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, aslinearoperator, eigsh

from perjac.errors import NotConvergedError

# Bytes of Krylov vectors held at a time, beyond those of one start.
_AT_ONCE = 2**30
# An off-diagonal of Lanczos below so much of the largest number says that the space is exhausted.
_EXHAUSTED = 1e-12
# Relative error of an inverse root's product.
_ROOT = 1e-8
_MOST_STEPS = 2000


@dataclasses.dataclass(eq=False)
class Space:
    """A Krylov space: T = tridiag(beta[:-1], alpha, beta[:-1]), what follows, and its vectors.

    `beta[-1]` couples it to the next vector, and is zero where there is none.
    """

    alpha: np.ndarray
    beta: np.ndarray
    length: float = 1.0  # of the start
    basis: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))

    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the Ritz values and the vectors of T."""
        return scipy.linalg.eigh_tridiagonal(self.alpha, self.beta[:-1])  # type: ignore

    def rules(self, lowest: float) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return nodes and weights of the Gauss rule, and of Radau's with a node below the others.

        Golub and Meurant 1994, section 3.2: the extended T has `lowest` for an eigenvalue.
        """
        values, vectors = self.spectrum()
        gauss = values, vectors[0] ** 2
        if not self.beta[-1]:
            return [gauss, gauss]
        last = lowest + self.beta[-1] ** 2 * np.sum(vectors[-1] ** 2 / (values - lowest))
        extended = Space(np.append(self.alpha, last), np.append(self.beta, 0))
        values, vectors = extended.spectrum()
        return [gauss, (values, vectors[0] ** 2)]


def _grown(
    product: Callable[[np.ndarray], np.ndarray], start: np.ndarray, most: int
) -> Iterator[Space]:
    """Give the Krylov space of a unit vector (P, 1) after each step; with its vectors."""
    basis = np.empty((min(most, 16), len(start)))
    alpha, beta = np.zeros(0), np.zeros(0)
    v = start[:, 0]
    for step in range(most):
        if step == len(basis):
            basis = np.concatenate([basis, np.empty((min(step, most - step), len(start)))])
        basis[step] = v
        image = product(v[:, None])[:, 0]
        alpha = np.append(alpha, v @ image)
        rest = _orthogonal(image[:, None], basis[: step + 1, :, None])[:, 0]
        length = np.linalg.norm(rest)
        scale = max(np.abs(alpha).max(), beta.max(initial=0), np.finfo("f8").tiny)
        ended = length <= _EXHAUSTED * scale or step + 1 == len(start)
        beta = np.append(beta, 0 if ended else length)
        yield Space(alpha, beta, basis=basis)
        if ended:
            return
        v = rest / length


def krylov(
    product: Callable[[np.ndarray], np.ndarray], starts: np.ndarray, steps: int
) -> tuple[list[Space], int]:
    """Return the Krylov spaces of n starts (P, n), side by side, and how many products they took.

    A pass over the data serves several; all vectors are held, and orthogonalised against, twice.
    """
    size, count = starts.shape
    steps = min(steps, size)
    at_once = max(1, _AT_ONCE // (8 * size * steps))
    spaces: list[Space] = []
    used = 0
    for n in range(0, count, at_once):
        found, products = _together(product, starts[:, n : n + at_once], steps)
        spaces, used = spaces + found, used + products
    return spaces, used


def _together(product: Any, starts: np.ndarray, steps: int) -> tuple[list[Space], int]:
    size, count = starts.shape
    lengths = np.linalg.norm(starts, axis=0)
    basis = np.zeros((steps, size, count))
    alpha, beta = np.zeros((steps, count)), np.zeros((steps, count))
    v = np.divide(starts, lengths, out=np.zeros_like(starts), where=lengths > 0)
    ends = np.full(count, steps)
    going = np.arange(count)
    used = 0
    for step in range(steps):
        basis[step][:, going] = v
        image = product(v)
        used += len(going)
        alpha[step, going] = np.sum(v * image, 0)
        rest = _orthogonal(image, basis[: step + 1][:, :, going])
        length = np.linalg.norm(rest, axis=0)
        scale = np.maximum(np.abs(alpha[:, going]).max(0), beta[:, going].max(0))
        on = (length > _EXHAUSTED * scale) & (step + 1 < size)
        beta[step, going[on]] = length[on]
        ends[going[~on]] = step + 1
        v, going = rest[:, on] / length[on], going[on]
        if not going.size:
            break
    spaces = [Space(alpha[:e, n], beta[:e, n], lengths[n]) for n, e in enumerate(ends)]
    return spaces, used


def _orthogonal(v: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return v (P, n) without its parts along the vectors (k, P, n); once more for rounding."""
    for _ in range(2):
        v = v - np.einsum("kpn,kn->pn", basis, np.einsum("kpn,pn->kn", basis, v))
    return v


def largest_of(
    operator: LinearOperator, count: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` largest eigenvalues, the largest first, and their vectors, by Lanczos.

    Raises
    ------
    NotConvergedError
        If ARPACK does not find them.
    """
    size = operator.shape[0]
    start = np.random.default_rng([seed, 1]).standard_normal(size)
    if not np.any(operator.matvec(start)):  # ARPACK stops at a matrix of zeros
        return np.zeros(count), np.eye(size, count)
    try:
        values, vectors = eigsh(operator, k=count, which="LA", v0=start)
    except ArpackNoConvergence as failure:
        raise NotConvergedError(
            f"Lanczos found {len(failure.eigenvalues)} of the {count} largest eigenvalues: ask for "
            "fewer, or take low_rank()."
        ) from failure
    order = np.argsort(values)[::-1]
    return values[order], vectors[:, order]


def conjugate_gradients(
    product: Callable[[np.ndarray], np.ndarray], right: np.ndarray, rtol: float
) -> np.ndarray:
    """Return A⁻¹ right of a positive definite A, for right (P, m), all columns side by side.

    A pass over the data serves all of them.

    Raises
    ------
    NotConvergedError
        If a residual is not below rtol of its right side after 10·P steps, or A is singular.

    References
    ----------
    Hestenes and Stiefel 1952, Methods of conjugate gradients for solving linear systems.
    """
    found, rest, way = np.zeros_like(right), right.copy(), right.copy()
    squared = np.sum(rest**2, 0)
    wanted = rtol**2 * squared
    most = 10 * len(right)
    for _ in range(most):
        on = squared > wanted
        if not on.any():
            return found
        image = product(way[:, on])
        curvature = np.sum(way[:, on] * image, 0)
        if not np.all(curvature > 0):
            raise NotConvergedError(
                "Conjugate gradients met a direction without curvature, as of a singular matrix: "
                "choose a larger damping."
            )
        step = squared[on] / curvature
        found[:, on] += step * way[:, on]
        rest[:, on] -= step * image
        new = np.sum(rest[:, on] ** 2, 0)
        way[:, on] = rest[:, on] + (new / squared[on]) * way[:, on]
        squared[on] = new
    raise NotConvergedError(
        f"Conjugate gradients did not reach a residual of {rtol:g} in {most} steps: choose a "
        "larger damping, low_rank() or an approximate form."
    )


def inverse_root(matrix: Any, z: np.ndarray, damping: float) -> np.ndarray:
    """Return (A + damping·I)^(-1/2) z of a positive semi-definite A, for z (P,), by Lanczos.

    Notes
    -----
    The error is at most damping^(-1/2) times the residual that conjugate gradients would have for
    (A + damping·I) x = z at the same step, which is known on the way; it ends where that is 1e-8
    of the result.

    Raises
    ------
    NotConvergedError
        If that takes more than 2,000 steps.

    References
    ----------
    Ilić, Turner and Simpson 2010, A restarted Lanczos approximation to functions of a symmetric
    matrix; Frommer, Güttel and Schweitzer 2014, Efficient and stable Arnoldi restarts for matrix
    functions based on quadrature: the error bound for Stieltjes functions.
    """
    operator = aslinearoperator(matrix)
    length = float(np.linalg.norm(z))
    if not length:
        return np.zeros_like(z)
    most = min(len(z), _MOST_STEPS)
    for space in _grown(operator.matmat, z[:, None] / length, most):
        steps = len(space.alpha)
        if space.beta[-1] and steps % 5 and steps < most:
            continue  # the small eigenproblem is not worth every step
        values, vectors = space.spectrum()
        shifted = np.maximum(values, 0) + damping
        inside = vectors @ (vectors[0] / np.sqrt(shifted))
        residual = space.beta[-1] * abs(vectors[-1] @ (vectors[0] / shifted))
        if residual / np.sqrt(damping) <= _ROOT * np.linalg.norm(inside) or steps == len(z):
            return length * (space.basis[:steps].T @ inside)
    raise NotConvergedError(
        f"Lanczos did not reach a relative error of {_ROOT:g} in {most} steps: choose a larger "
        "damping, low_rank() or an approximate form."
    )
