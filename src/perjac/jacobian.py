"""Jacobian: what the user holds. A mapping from sources to rows that are formed when asked for.

Every query is handed to the factors, compiled once for each kind of factor and shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac import host, memory
from perjac.combination import held_in
from perjac.errors import InputError, UnknownNameError
from perjac.factors import Explicit, Factor
from perjac.shapes import known
from perjac.sources import Source, Weights, is_variable, match


class Jacobian(Mapping):
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
        self._factors, self._weights, self._jit = dict(factors), weights, jit
        self._sources = {source.key: source for source in sources}
        self._memory_limit = memory_limit
        self.outputs, self.row_shape = outputs, tuple(row_shape)
        dtypes = [source.dtype for source in sources]
        self._held = held_in(dtypes)
        self._dtype = max(dtypes, key=lambda dtype: dtype.size)  # of what is about all sources
        entries = sum(source.size for source in sources)
        self.shape = (known(outputs.shape)[0], math.prod(self.row_shape), entries)

    def __getitem__(self, key: Any) -> tf.Tensor:
        """Form the rows of one source, (B, *row_shape, *source.shape)."""
        source = self._find(key)
        batch, count, _ = self.shape
        self._check_size(source.size, source.dtype, repr(source.key))
        factor = self._factors[source.key]
        if isinstance(factor, Explicit):
            rows = factor.dense()
        else:  # under one name: queries are compiled for kinds and shapes, not for each weight
            rows = _query("dense", self._jit and factor.rank_one)({"": factor})[""]
        shape = (batch, *self.row_shape, *source.shape)
        rows = rows if rows.shape == shape else tf.reshape(rows, shape)
        return tf.cast(rows, source.dtype)

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
        return f"Jacobian(shape={self.shape}, row_shape={self.row_shape}, {{{inside}}})"

    def matrix(self) -> tf.Tensor:
        """Form the whole Jacobian as (B, K, P), columns in the order of `keys()`.

        Raises
        ------
        MemoryError
            If it does not fit into the memory limit.
        """
        batch, count, size = self.shape
        self._check_size(size, self._dtype, "the whole Jacobian")
        parts = [tf.reshape(self[key], [batch, count, s.size]) for key, s in self._sources.items()]
        return tf.concat([tf.cast(part, self._dtype) for part in parts], 2)

    def norms(self, per: str | None = None) -> Any:
        """Return Frobenius norms, without forming rows where there is a cheaper way.

        Parameters
        ----------
        per : None, "row" or "source"
            One for each example; for each example and row; or for each example and source.

        Returns
        -------
        tf.Tensor or dict of str to tf.Tensor
            (B,); (B, K); or {key: (B,)}.
        """
        if per not in (None, "row", "source"):
            raise InputError(f"Expected per=None, 'row' or 'source'. Received: {per!r}.")
        squared = _query("squared_norms")(self._factors)
        if per == "source":
            return self._ordered({k: tf.sqrt(tf.reduce_sum(s, 1)) for k, s in squared.items()})
        total = tf.add_n(list(squared.values()))
        norms = tf.sqrt(total if per == "row" else tf.reduce_sum(total, 1))
        return tf.cast(norms, self._dtype)

    def gram(self, other: Jacobian | None = None) -> tf.Tensor:
        """Return all inner products of rows, (B, K, B', K'): the empirical neural tangent kernel.

        Parameters
        ----------
        other : Jacobian, optional
            Of the same sources on other examples; itself if left out.

        References
        ----------
        Jacot et al. 2018, Neural Tangent Kernel.
        """
        other = self if other is None else other
        if list(other) != list(self):
            raise InputError(
                "Expected a Jacobian with respect to the same sources. "
                f"Received: {list(other)[:4]}…, beside {list(self)[:4]}…."
            )
        size = self.shape[0] * self.shape[1] * other.shape[0] * other.shape[1]
        memory.check(
            size * self.outputs.dtype.size, self._memory_limit, "the Gram matrix",
            "Choose fewer outputs or examples, and fill it block by block with gram(other).",
        )  # fmt: skip
        return self._total(_query("gram")(self._factors, other._factors))

    def jvp(self, v: Any) -> tf.Tensor:
        """Return J v, (B, K).

        Parameters
        ----------
        v : array (P,), or mapping of name to array
            A direction in the sources; names left out of a mapping count as zero.
        """
        directions = self._directions(v)
        asked = {key: self._factors[key] for key in directions}
        return self._total(_query("jvp")(asked, directions))

    def vjp(self, u: Any, per_example: bool = False) -> dict[str, tf.Tensor]:
        """Return Jᵀ u, as a mapping from key to an array of the source's shape.

        Parameters
        ----------
        u : array (B, K) or (B, *row_shape)
            A weight for every row.
        per_example : bool
            Whether to keep the examples apart: (B, *shape) instead of their sum.
        """
        batch, count, _ = self.shape
        u = tf.convert_to_tensor(u)
        if tuple(u.shape) not in ((batch, count), (batch, *self.row_shape)):
            raise InputError(
                f"Expected u of shape {(batch, count)} or {(batch, *self.row_shape)}. "
                f"Received: {tuple(u.shape)}."
            )
        u = tf.cast(tf.reshape(u, [batch, count]), self._held)
        return self._ordered(_query("vjp", per_example=per_example)(self._factors, u))

    def diagonal(self) -> dict[str, tf.Tensor]:
        """Return Σ over examples and rows of J², as a mapping from key to the source's shape."""
        return self._ordered(_query("diagonal")(self._factors))

    def _ordered(self, answers: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answers in the order and types of the sources."""
        return {key: tf.cast(answers[key], s.dtype) for key, s in self._sources.items()}

    def _total(self, answers: Mapping[str, tf.Tensor]) -> tf.Tensor:
        return tf.cast(tf.add_n(list(answers.values())), self._dtype)

    def _find(self, key: Any) -> Source:
        if is_variable(key):
            number = self._weights.number(key)
            if number is None or self._weights.keys[number] not in self._sources:
                raise UnknownNameError(f"This Jacobian has no rows for variable {key!r}.")
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
            named = {self._find(key): value for key, value in v.items()}
            wrong = [s for s, value in named.items() if tuple(value.shape) != s.shape]
            if wrong or not named:
                raise InputError(
                    f"Expected v[{wrong[0].key!r}] of shape {wrong[0].shape}. Received: "
                    f"{tuple(named[wrong[0]].shape)}." if wrong else "v is empty."
                )  # fmt: skip
            return {s.key: tf.cast(value, self._held) for s, value in named.items()}
        flat = tf.convert_to_tensor(v)
        if tuple(flat.shape) != (self.shape[2],):
            raise InputError(
                f"Expected v of shape (P,) = ({self.shape[2]},). Received: {tuple(flat.shape)}."
            )
        parts = tf.split(flat, [source.size for source in sources])
        return {
            s.key: tf.cast(tf.reshape(part, s.shape), self._held)
            for s, part in zip(sources, parts, strict=True)
        }

    def _check_size(self, size: int, dtype: tf.DType, what: str) -> None:
        batch, count, _ = self.shape
        memory.check(
            batch * count * size * dtype.size, self._memory_limit,
            f"Forming {what} as ({batch}, {count}, {size})",
            "norms(), gram(), jvp(), vjp() and diagonal() answer without forming it; or choose "
            "fewer outputs= or examples.",
        )  # fmt: skip


@functools.cache
def _query(name: str, jit: bool = False, **options: Any) -> Callable[..., dict[str, Any]]:
    """Return the compiled query: ({key: factor}, arguments …) → {key: answer}.

    A mapping among the arguments gives each factor its own entry.
    """

    def ask(factors: Mapping[str, Factor], *arguments: Any) -> dict[str, Any]:
        answers = {}
        for key, factor in factors.items():
            mine = [a[key] if isinstance(a, Mapping) else a for a in arguments]
            answers[key] = getattr(factor, name)(*mine, **options)
        return answers

    # No reduce_retracing: TensorFlow 2.21 cannot generalise the type of a nested dataclass.
    return host.compiled(ask, jit_compile=jit or None)
