"""Rows: what Jacobians and gradients have in common. A mapping from sources to rows.

Rows are formed when asked for; every query is handed to the factors, compiled once for each kind
of factor and shape.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import ItemsView, Iterator, Mapping, Sequence, ValuesView
from typing import Any, Self

import numpy as np
import tensorflow as tf

from perjac._core.backend import memory
from perjac._core.backend.shapes import known, size
from perjac._core.factors import Explicit, Factor, random_projection
from perjac._core.factors.combine import complex_like, held_in
from perjac._core.factors.explain import Explanation
from perjac._core.factors.reductions import Factors, Squares, query
from perjac._core.model import arrays
from perjac._core.model.variables import ByKey, Source, Weights, is_variable, match
from perjac.errors import InputError, UnknownNameError, check_counts, check_one_of, nearest

# Bytes of rows that are formed by one call: three of a small network take a fifth longer.
_AT_ONCE = 2**28
# Numbers, at most, of rows that are there already and are copied for the sake of fewer calls.
_COPIED = 2**18
_QUERIES = (
    "norms", "gram", "cosine_similarity", "jvp", "vjp", "diagonal", "project", "mean", "variance",
    "snr", "clipped_sum",
)  # fmt: skip


class Rows(Mapping):
    """Derivatives by the chosen sources, B examples × K rows × P numbers.

    `Jacobian` shows the rows' axis, `Gradients`, of one row, does not: what comes before the
    numbers of a row, `lead`, is (B, K) or (B,).
    """

    _instead = "norms(), gram(), jvp(), vjp(), project() and diagonal() answer without forming it"

    def __init__(
        self,
        factors: Mapping[str, Factor],
        sources: Sequence[Source],
        weights: Weights,
        lead: tuple[int, ...],
        row_shape: tuple[int, ...],
        memory_limit: int | str | None = None,
        jit: bool = True,
    ):
        self._factors, self._weights, self._jit = dict(factors), weights, jit
        self._sources = {source.key: source for source in sources}
        self._memory_limit, self._lead, self._row_shape = memory_limit, lead, row_shape
        dtypes = [source.dtype for source in sources]
        self._held = held_in(dtypes)
        real = [dtype.real_dtype for dtype in dtypes]
        self._dtype = max(real, key=lambda dtype: dtype.size)  # of what is about all sources
        self._count = (*lead, 1)[1]  # K
        self.shape = (*lead, sum(source.size for source in sources))

    def __getitem__(self, key: Any) -> tf.Tensor:
        """Form the rows of one source, (B, *row_shape, *source.shape)."""
        source = self._find(key)
        self._check_size(source.size, source.dtype, repr(source.key))
        return self._formed([source])[source.key]

    def items(self) -> ItemsView:
        """Form all rows, by key; one after another where all of them would be large."""
        return self._whole().items() if self._is_small() else super().items()

    def values(self) -> ValuesView:
        """Form all rows; one after another where all of them would be large."""
        return self._whole().values() if self._is_small() else super().values()

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, key: object) -> bool:
        try:
            self._find(key)
        except KeyError:
            return False
        return True

    def __repr__(self) -> str:
        inside = ", ".join(f"{s.key!r}: {s.shape}" for s in self._sources.values())
        return f"{type(self).__name__}(shape={self.shape}, {{{inside}}})"

    @property
    def sources(self) -> tuple[Source, ...]:
        """What was differentiated against, in the order of the keys."""
        return tuple(self._sources.values())

    @property
    def nbytes(self) -> int:
        """The memory held: by the factors, not by their rows."""
        parts = tf.nest.flatten(list(self._factors.values()), expand_composites=True)
        held = {id(part): part for part in parts}  # two factors may share one side
        return sum(part.dtype.size * int(tf.size(part)) for part in held.values())

    def widened(self) -> Self:
        """Return the same rows held, and answering, in float64."""
        other = copy.copy(self)
        other._factors = {k: factor.cast(tf.float64) for k, factor in self._factors.items()}
        found = self._sources.items()
        other._sources = {
            k: dataclasses.replace(s, dtype=complex_like(s.dtype, tf.float64)) for k, s in found
        }
        other._held = other._dtype = tf.float64
        return other

    def matrix(self) -> tf.Tensor:
        """Form everything as one array, (*lead, P), columns in the order of `keys()`.

        Raises
        ------
        MemoryError
            If it does not fit into the memory limit.
        """
        self._check_size(self.shape[-1], self._dtype, "all of it")
        formed = self._whole() if self._is_small() else self
        parts = [tf.reshape(formed[k], [*self._lead, s.size]) for k, s in self._sources.items()]
        complex_ones = [part.dtype for part in parts if part.dtype.is_complex]
        dtype = complex_like((complex_ones or [self._dtype])[0], self._dtype)
        return tf.concat([tf.cast(part, dtype) for part in parts], -1)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Form everything as one array: `numpy.asarray(rows)` is `rows.matrix()`."""
        if copy is False:
            raise ValueError(
                "The rows are formed when they are asked for, so an array of them is always new: "
                "leave out copy=False."
            )
        formed = self.matrix().numpy()
        return formed if dtype is None else formed.astype(dtype, copy=False)

    def gram(self, other: Self | None = None) -> tf.Tensor:
        """Return all inner products of rows, (*lead, *other's lead).

        Of a Jacobian it is the empirical neural tangent kernel, (B, K, B', K').

        Parameters
        ----------
        other : of the same class, optional
            Of the same sources on other examples; itself if left out.

        References
        ----------
        Jacot et al. 2018, Neural Tangent Kernel.
        """
        alone = other is None or other is self
        other = self if other is None else other
        if type(other) is not type(self) or list(other) != list(self):
            raise InputError(
                f"Expected {type(self).__name__} with respect to the same sources. "
                f"Received: {other!r:.200}, beside {self!r:.200}."
            )
        size = self.shape[0] * self._count * other.shape[0] * other._count
        memory.check(
            size * self._dtype.size, self._memory_limit, "The Gram matrix",
            "Choose fewer outputs or examples, and fill it block by block with gram(other).",
        )  # fmt: skip
        asked = (self._factors,) if alone else (self._factors, other._factors)
        products = query(_gram, anew=True)(*asked)  # in blocks of inputs, by how many rows
        products = tf.cast(products, self._dtype)
        return tf.reshape(products, [*self._lead, *other._lead])

    def cosine_similarity(self, other: Self | None = None) -> tf.Tensor:
        """Return the cosines of the angles between all rows, (*lead, *other's lead); 0 beside zero.

        Parameters
        ----------
        other : of the same class, optional
            As in `gram`.
        """
        other = self if other is None else other
        products = self.gram(other)
        lengths = tf.tensordot(self._lengths(), other._lengths(), 0)
        return tf.clip_by_value(tf.math.divide_no_nan(products, lengths), -1, 1)

    def jvp(self, v: Any) -> tf.Tensor:
        """Return the rows' inner products with a direction, J v, (*lead).

        Parameters
        ----------
        v : array (P,), or mapping of name to array
            A direction in the sources; names left out of a mapping count as zero.
        """
        directions = self._directions(v)
        asked = {key: self._factors[key] for key in directions}
        return self._shown(query(_along)(asked, directions))

    def vjp(self, u: Any, per_example: bool = False) -> dict[str, tf.Tensor]:
        """Return the weighted sum of the rows, Jᵀ u, by key, each of its source's shape.

        Parameters
        ----------
        u : array (*lead), or (B, *row_shape)
            A weight for every row.
        per_example : bool
            Whether to keep the examples apart: (B, *shape) instead of their sum.
        """
        u = arrays.direction(u, self._held, "u")
        shapes = list(dict.fromkeys([self._lead, (self.shape[0], *self._row_shape)]))
        if tuple(u.shape) not in shapes:
            raise InputError(
                f"Expected u of shape {' or '.join(map(str, shapes))}. Received: {tuple(u.shape)}."
            )
        u = tf.reshape(u, [self.shape[0], self._count])
        return self._ordered(query(weighted_sum, per_example=per_example)(self._factors, u))

    def diagonal(self) -> dict[str, tf.Tensor]:
        """Return Σ over examples and rows of the squares, by key, each of its source's shape."""
        return self._ordered(query(Squares())(self._factors))

    def squares_along(self, bases: Mapping[str, Mapping[str, tf.Tensor]]) -> dict[str, tf.Tensor]:
        """Return Σ over examples and rows of (Uᵀ J V)², by key, (G, I, O).

        Parameters
        ----------
        bases : mapping of str to mapping
            By key, of "left" to U (G, I, I) and "right" to V (G, O, O), orthogonal; unit vectors
            where one is left out.
        """
        return query(_squares_along)(self._factors, bases)

    @property
    def held(self) -> tf.DType:
        """The type that factors are held in, and sums over them formed in."""
        return self._held

    def project(self, dim: int, seed: int = 0, kind: str = "gaussian") -> tf.Tensor:
        """Return random projections of the rows, (*lead, dim), that keep inner products.

        ⟨S r, S r'⟩ has the mean ⟨r, r'⟩ over seeds and a standard deviation of at most
        3 ‖r‖‖r'‖ / √dim (√11 for "sparse"). Rows are never formed where a factor is cheaper.

        Parameters
        ----------
        dim : int
            Of the projections.
        seed : int
            The same seed gives the same projection, whatever the batch and the weights' names, in
            any process and on any machine, up to rounding. Weights are told apart by their number
            in the model.
        kind : {"gaussian", "rademacher", "sparse"}
            Normal numbers; signs, which are a little more exact; or a count sketch, whose cost
            does not grow with `dim` times the weights.

        Notes
        -----
        A weight is read as a matrix (I, O), as it meets the data, and each of the `dim` numbers is
        rᵀ J q with r and q random: for J = Σ_t a_t δ_tᵀ that is Σ_t (r·a_t)(q·δ_t), so
        T·dim·(I + O) multiply-adds an example instead of dim·I·O. How a weight is read belongs to
        the model and the path that the weight takes; `explain("project")` shows it.

        References
        ----------
        Johnson and Lindenstrauss 1984; Pham and Pagh 2013, TensorSketch ("sparse"), whose variance
        is bounded in Avron, Nguyen and Woodruff 2014; Sun et al. 2018, tensor random projections.
        """
        check_counts(dim=dim)
        check_one_of(kind, random_projection.KINDS, "kind")
        places = {key: source.place for key, source in self._sources.items()}
        sides = {places[key]: factor.sides for key, factor in self._factors.items()}
        rows = self.shape[0] * self._count
        random_projection.check(sides, int(dim), kind, rows, self._held, self._memory_limit)
        by_place = random_projection.draw(sides, int(dim), seed, kind, self._held)
        drawn = {key: by_place[places[key]] for key in self._factors}
        return self._shown(query(_projected)(self._factors, drawn))

    def explain(self, question: str = "norms", dim: int = 512) -> Explanation:
        """Return which way each weight's factor takes to the answer of a query, and why.

        Parameters
        ----------
        question : str
            A query's name: "norms", "gram", "jvp", "vjp", "diagonal", "project", …
        dim : int
            Of a projection.

        Returns
        -------
        Explanation
            A table: print it, or read its `rows`. Multiply-adds and numbers formed on the way,
            beside those of the other ways there are, for one example.
        """
        queries = [name for name in _QUERIES if hasattr(self, name)]
        if question not in queries:
            raise UnknownNameError(f"There is no query {question!r}. {nearest(question, queries)}")
        return Explanation.of(question, self._factors, self.shape[0], dim)

    def _is_small(self) -> bool:
        size = self.shape[0] * self._count * self.shape[-1] * self._dtype.size
        if self._memory_limit is None and size <= memory.SMALL:
            return True
        return size <= min(_AT_ONCE, memory.limit(self._memory_limit) or _AT_ONCE)

    def _whole(self) -> dict[str, tf.Tensor]:
        return self._formed(list(self._sources.values()))

    def _formed(self, sources: Sequence[Source]) -> dict[str, tf.Tensor]:
        """Form the rows of some sources, by key: of one kind all in one call."""
        there, kinds = {}, {}
        for source in sources:
            factor = self._factors[source.key]
            if isinstance(factor, Explicit):
                there[source.key] = factor
            else:
                kinds.setdefault(self._jit and factor.rank_one, {})[source.key] = factor
        if kinds:  # biases come along in a call that is made anyway
            small = {k: f for k, f in there.items() if size(f.jacobian.shape) <= _COPIED}
            kinds[max(kinds)] |= small
            there = {k: f for k, f in there.items() if k not in small}
        found = {key: factor.dense() for key, factor in there.items()}
        for jit, factors in kinds.items():
            found |= query(_dense, jit, row_shape=self._row_shape)(factors)
        return {s.key: self._laid_out(found[s.key], s) for s in sources}

    def _laid_out(self, rows: tf.Tensor, source: Source) -> tf.Tensor:
        shape = (self.shape[0], *self._row_shape, *source.shape)
        rows = rows if rows.shape == shape else tf.reshape(rows, shape)
        return rows if rows.dtype == source.dtype else tf.cast(rows, source.dtype)

    def _lengths(self) -> tf.Tensor:
        """The norm of every row, (*lead)."""
        return self._shown(query(lengths)(self._factors))

    def _shown(self, answer: tf.Tensor) -> tf.Tensor:
        """Give an answer (B, K, ...) as (*lead, ...), in the type of the sources."""
        answer = tf.cast(answer, self._dtype)
        return answer if len(self._lead) == 2 else tf.squeeze(answer, 1)

    def _as_sources(self, answer: Any) -> Any:
        """Give an answer, or each of a mapping's, in the type of the sources."""
        return tf.nest.map_structure(lambda t: tf.cast(t, self._dtype), answer)

    def _ordered(self, answers: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answers in the order and types of the sources."""
        found = {
            key: tf.cast(answers[key], _type_of(s, answers[key]))
            for key, s in self._sources.items()
        }
        return ByKey(found, lambda key: self._find(key).key)

    def _find(self, key: Any) -> Source:
        if is_variable(key):
            number = self._weights.number(key)
            if number is None or self._weights.keys[number] not in self._sources:
                raise UnknownNameError(f"There are no rows for variable {key!r} here.")
            return self._sources[self._weights.keys[number]]
        if not isinstance(key, str):
            raise UnknownNameError(f"Expected a key or a variable. Received: {key!r}.")
        if key == "inputs":
            inputs = [s for s in self._sources.values() if s.kind == "input"]
            if len(inputs) == 1:
                return inputs[0]
        return self._sources[match(key, self._sources, "key")]

    def _directions(self, v: Any) -> dict[str, tf.Tensor]:
        sources = list(self._sources.values())
        if isinstance(v, Mapping):
            found = [(self._find(key), key, value) for key, value in v.items()]
            named = {
                s: arrays.direction(value, complex_like(s.dtype, self._held), f"v[{key!r}]")
                for s, key, value in found
            }
            if not named:
                raise InputError("Expected v to have a direction for some source. Received: {}.")
            for source, value in named.items():
                if tuple(value.shape) != source.shape:
                    raise InputError(
                        f"Expected v[{source.key!r}] of shape {source.shape}. "
                        f"Received: {tuple(value.shape)}."
                    )
            return {source.key: value for source, value in named.items()}
        flat = arrays.direction(v, self._held, "v")
        if tuple(flat.shape) != (self.shape[-1],):
            raise InputError(
                f"Expected v of shape (P,) = ({self.shape[-1]},). Received: {tuple(flat.shape)}."
            )
        parts = tf.split(flat, [source.size for source in sources])
        return {
            s.key: self._direction(s, tf.reshape(part, s.shape))
            for s, part in zip(sources, parts, strict=True)
        }

    def _direction(self, source: Source, value: tf.Tensor) -> tf.Tensor:
        return tf.cast(value, complex_like(source.dtype, self._held))

    def _check_size(self, size: int, dtype: tf.DType, what: str) -> None:
        shape = (*self._lead, size)
        memory.check(
            self.shape[0] * self._count * size * dtype.size, self._memory_limit,
            f"Forming {what} as {shape}",
            f"{self._instead}; or choose fewer outputs= or examples.",
        )  # fmt: skip


def _type_of(source: Source, answer: tf.Tensor) -> tf.DType:
    """Return the type of an answer about a source: sums of squares are real."""
    return source.dtype if answer.dtype.is_complex else source.dtype.real_dtype


def lengths(factors: Factors) -> tf.Tensor:
    """Return the norm of every row, (B, K)."""
    return tf.sqrt(tf.add_n([factor.squared_norms() for factor in factors.values()]))


def norms(factors: Factors, per: str | None) -> Any:
    """Return each example's norm, (B,): of all, or by "source" or "layer"."""
    found = grouped_norms(factors, per)
    return found if per else found[""]


def grouped_norms(factors: Factors, per: str | None) -> dict[str, tf.Tensor]:
    """Return each example's norm of every group, (B,), by what `group_of` calls it."""
    squared: dict[str, list[tf.Tensor]] = {}
    for key, factor in factors.items():
        squared.setdefault(group_of(key, per), []).append(tf.reduce_sum(factor.squared_norms(), 1))
    return {name: tf.sqrt(tf.add_n(parts)) for name, parts in squared.items()}


def group_of(key: str, per: str | None) -> str:
    """Return what a source's norm is part of: "layer" is its path without the last name."""
    if per is None:
        return ""
    return (key.rpartition("/")[0] or key) if per == "layer" else key


def weighted_sum(factors: Factors, u: tf.Tensor, per_example: bool = False) -> dict[str, tf.Tensor]:
    """Return Σ u · row by key, u (B, K)."""
    return {key: factor.vjp(u, per_example) for key, factor in factors.items()}


def _dense(factors: Factors, row_shape: tuple[int, ...]) -> dict[str, tf.Tensor]:
    # In the shape that is shown: a reshape outside would be a call of its own for each weight.
    formed = {key: factor.dense() for key, factor in factors.items()}
    return {
        key: tf.reshape(rows, [-1, *row_shape, *known(rows.shape[2:])])
        for key, rows in formed.items()
    }


def _gram(factors: Factors, others: Factors | None = None) -> tf.Tensor:
    others = factors if others is None else others  # the same ones: half of it is enough
    return tf.add_n([factor.gram(others[key]) for key, factor in factors.items()])


def _along(factors: Factors, directions: Mapping[str, tf.Tensor]) -> tf.Tensor:
    return tf.add_n([factor.jvp(directions[key]) for key, factor in factors.items()])


def _squares_along(factors: Factors, bases: Mapping[str, Any]) -> dict[str, tf.Tensor]:
    return {key: factor.squares_along(bases[key]) for key, factor in factors.items()}


def _projected(factors: Factors, drawn: Mapping[str, Any]) -> tf.Tensor:
    return tf.add_n([factor.project(drawn[key]) for key, factor in factors.items()])
