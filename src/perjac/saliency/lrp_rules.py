"""The rules of layer-wise relevance propagation, by their names in the literature.

Each says how a unit z_j = Σ_i x_i w_ij + b_j shares what arrives at z_j among the x_i: as one or
more shares R_i = Σ_j n_ij / z'_j · R_j, with z'_j = Σ_i n_ij + b'_j kept from zero by epsilon.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf

from perjac.saliency._affine import Affine
from perjac.saliency._propagation import Parts, Pull

# (x, w, c): it stands for the numerators n_ij = x_i w_ij c_j.
Term = tuple[tf.Tensor, tf.Tensor | None, Any]


@dataclasses.dataclass(frozen=True)
class Share:
    """A part of what arrives, and in which proportions it goes on.

    Attributes
    ----------
    part : tf.Tensor or float
        Of what arrives.
    terms : list of Term
        The numerators, added up.
    b : tf.Tensor or float
        What the bias adds to the denominator.
    """

    part: Any
    terms: list[Term]
    b: Any = 0.0


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a unit shares relevance among its inputs.

    Attributes
    ----------
    epsilon : float
        Added to denominators, away from zero; zero is allowed.
    """

    epsilon: float = dataclasses.field(default=1e-6, kw_only=True)

    def shares(self, unit: Affine) -> list[Share]:
        """Return what goes on in which proportions."""
        raise NotImplementedError

    def pull(self, unit: Affine) -> Pull:
        """Return what happens at a unit."""
        made = [_Made(share, unit, self.epsilon) for share in self.shares(unit)]

        def back(dys: Parts) -> Parts:
            arriving = unit.back(dys[0])
            return [tf.add_n([share.inputs(arriving) for share in made])]

        def absorbed(dys: Parts) -> dict[str, tf.Tensor]:
            arriving = unit.back(dys[0])
            return {
                "biases": tf.add_n([share.b * share.ratio(arriving) for share in made]),
                "epsilon": tf.add_n([share.added * share.ratio(arriving) for share in made]),
            }

        return Pull([unit.x], back, str(self) if unit.type else "", absorbed)

    def __str__(self) -> str:
        values = [f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self)]
        return f"{type(self).__name__}({', '.join(v for v in values if v != 'epsilon=1e-06')})"


class _Made:
    """A share with everything worked out that does not depend on what arrives."""

    def __init__(self, share: Share, unit: Affine, epsilon: float):
        self._part = share.part
        products = [(x, c, *unit.product(x, w)) for x, w, c in share.terms]
        self.b = tf.zeros_like(unit.z) + share.b
        z = tf.add_n([c * product for _, c, product, _ in products]) + self.b
        self._z = stabilised(z, epsilon)
        self.added = self._z - z
        self._transposes = [(x, c, transposed) for x, c, _, transposed in products]

    def ratio(self, arriving: tf.Tensor) -> tf.Tensor:
        """R_j / z'_j."""
        return tf.math.divide_no_nan(self._part * arriving, self._z)

    def inputs(self, arriving: tf.Tensor) -> tf.Tensor:
        """R_i."""
        s = self.ratio(arriving)
        return tf.add_n([x * transposed(c * s) for x, c, transposed in self._transposes])


@dataclasses.dataclass(frozen=True, repr=False)
class Epsilon(Rule):
    """n = x w. Bach et al. 2015, eq. 58; with epsilon=0 their eq. 56, LRP-0.

    Parameters
    ----------
    epsilon : float
        Absorbs relevance that rests on little.
    """

    epsilon: float = 1e-6

    def shares(self, unit: Affine) -> list[Share]:
        """x w / (Σ x w + b)."""
        return [Share(1.0, [(unit.x, unit.w, unit.c)], unit.b)]


@dataclasses.dataclass(frozen=True, repr=False)
class Gamma(Rule):
    """n = x w + γ (x w)⁺ where z > 0, x w + γ (x w)⁻ where z < 0.

    For inputs that are not negative and z > 0, x (w + γ w⁺): the γ-rule of Montavon et al. 2019;
    the rest as Andéol et al. 2021, so that nothing changes sign under the denominator.

    Parameters
    ----------
    gamma : float
        How much what agrees with z is favoured.
    """

    gamma: float = 0.25

    def shares(self, unit: Affine) -> list[Share]:
        """One share of outputs above zero, one of those below."""
        plain, zero = (unit.x, unit.w, unit.c), tf.zeros([], unit.z.dtype)
        found = []
        for sign, side in ((1, tf.maximum), (-1, tf.minimum)):
            here = tf.cast(sign * unit.z > 0, unit.z.dtype)
            more = [(x, w, self.gamma * c) for x, w, c in _contributions(unit, sign)]
            found.append(Share(here, [plain, *more], unit.b + self.gamma * side(unit.b, zero)))
        return found


@dataclasses.dataclass(frozen=True, repr=False)
class AlphaBeta(Rule):
    """α parts of the positive contributions' relevance less β of the negative ones'.

    Bach et al. 2015, eq. 60. Conserves relevance for α - β = 1, where both kinds are there.

    Parameters
    ----------
    alpha, beta : float
        α and β.
    """

    alpha: float = 2.0
    beta: float = 1.0

    def shares(self, unit: Affine) -> list[Share]:
        """α (x w)⁺ / (Σ (x w)⁺ + b⁺) - β (x w)⁻ / (Σ (x w)⁻ + b⁻)."""
        zero = tf.zeros([], unit.z.dtype)
        found = [Share(self.alpha, _contributions(unit, 1), tf.maximum(unit.b, zero))]
        if self.beta:
            found.append(Share(-self.beta, _contributions(unit, -1), tf.minimum(unit.b, zero)))
        return found


@dataclasses.dataclass(frozen=True, repr=False)
class ZPlus(AlphaBeta):
    """α = 1, β = 0: positive contributions alone. The z⁺-rule of Montavon et al. 2017."""

    alpha: float = 1.0
    beta: float = 0.0


@dataclasses.dataclass(frozen=True, repr=False)
class Flat(Rule):
    """n = 1: the same to every input. Lapuschkin et al. 2019, supplement."""

    def shares(self, unit: Affine) -> list[Share]:
        """1 / Σ 1."""
        w = None if unit.w is None else tf.ones_like(unit.w)
        return [Share(1.0, [(tf.ones_like(unit.x), w, 1.0)])]


@dataclasses.dataclass(frozen=True, repr=False)
class WSquare(Rule):
    """n = w². The w²-rule of Montavon et al. 2017."""

    def shares(self, unit: Affine) -> list[Share]:
        """w² / Σ w²."""
        w = None if unit.w is None else tf.square(unit.w)
        return [Share(1.0, [(tf.ones_like(unit.x), w, tf.square(unit.c))])]


@dataclasses.dataclass(frozen=True, repr=False)
class ZBox(Rule):
    """n = x w - l w⁺ - h w⁻, for inputs between l and h. The zᴮ-rule of Montavon 2017.

    Parameters
    ----------
    low, high : float
        The least and the greatest that an input can be.
    """

    low: float = 0.0
    high: float = 1.0

    def shares(self, unit: Affine) -> list[Share]:
        """(x w - l w⁺ - h w⁻) / Σ (x w - l w⁺ - h w⁻)."""
        low, high = (tf.ones_like(unit.x) * bound for bound in (self.low, self.high))
        less = [*_signed(unit, low, 1), *_signed(unit, high, -1)]
        return [Share(1.0, [(unit.x, unit.w, unit.c), *((x, w, -c) for x, w, c in less)])]


def stabilised(z: tf.Tensor, epsilon: float) -> tf.Tensor:
    """Return z with epsilon added away from zero; zero counts as positive."""
    return z + tf.where(z < 0, tf.cast(-epsilon, z.dtype), tf.cast(epsilon, z.dtype))


def _signed(unit: Affine, x: tf.Tensor, sign: int) -> list[Term]:
    """Return x (c w)⁺ for sign 1, x (c w)⁻ for -1, where (c w)⁺ = c⁺ w⁺ + c⁻ w⁻."""
    zero = tf.zeros([], unit.z.dtype)
    c = tf.maximum(unit.c, zero), tf.minimum(unit.c, zero)
    if unit.w is None:
        return [(x, None, c[0] if sign > 0 else c[1])]
    w = tf.maximum(unit.w, zero), tf.minimum(unit.w, zero)
    same, other = w if sign > 0 else w[::-1]
    return [(x, same, c[0]), (x, other, c[1])] if unit.scaled else [(x, same, unit.c)]


def _contributions(unit: Affine, sign: int) -> list[Term]:
    """Return (x w)⁺ for sign 1, (x w)⁻ for -1, where (x w)⁺ = x⁺ w⁺ + x⁻ w⁻."""
    zero = tf.zeros([], unit.x.dtype)
    above, below = tf.maximum(unit.x, zero), tf.minimum(unit.x, zero)
    return [*_signed(unit, above, sign), *_signed(unit, below, -sign)]
