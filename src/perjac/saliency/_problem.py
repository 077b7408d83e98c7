"""What a method explains: a target of each example, and its derivative at any inputs like those.

Methods look at many points around each example; everything about targets, inputs that stay as they
are, chunks and memory is settled here, once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac import progress
from perjac._core.autodiff import seeds
from perjac._core.backend import host, memory
from perjac._core.graph.names import before_link
from perjac._core.model import inside_functions
from perjac._core.model.inputs import Batch
from perjac._core.model.variables import Activation
from perjac._core.runtime.fixed_batch import Fixed
from perjac._core.runtime.traced_model import Traced
from perjac.engine import Engine
from perjac.errors import InputError
from perjac.saliency._rates import rates
from perjac.saliency._slots import rounds
from perjac.saliency._submodel import after
from perjac.saliency.attribution import Attribution

# Points asked about at a time, and bytes for them, where memory does not set a lower limit: a small
# network's calls are worth their overhead, a large one's soon tell how far they are.
_POINTS = 2048
_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Target:
    """Which outputs are explained, for each example.

    Attributes
    ----------
    kind : str
        "one" output for all examples, "each" example's own, "all" outputs, or "directions".
    chosen : array or None
        The number; the numbers (B,); nothing; or cotangents (B, *output_shape).
    count : int
        M, maps for each example.
    shape : tuple of int
        The output's, for one example.
    """

    kind: str
    chosen: Any
    count: int
    shape: tuple[int, ...]

    def asked(self, owners: np.ndarray) -> dict[str, Any]:
        """Return what to ask an engine for at points that belong to examples `owners` (N,)."""
        if self.kind == "all":
            return {}
        if self.kind == "one":
            return {"outputs": int(self.chosen)}
        if self.kind == "each":
            return {"outputs": self._owned(owners)}
        return {"cotangents": tf.gather(self.chosen, owners)[:, None]}

    def _owned(self, owners: np.ndarray) -> Any:
        """Return the numbers of outputs at points of these examples."""
        if tf.is_tensor(self.chosen):  # inside a function that is being traced
            return tf.gather(self.chosen, owners)
        return self.chosen[owners]

    def of(self, outputs: tf.Tensor, owners: np.ndarray) -> tf.Tensor:
        """Return the numbers that are explained, (N, M), of outputs (N, *output_shape)."""
        flat = tf.reshape(outputs, [len(owners), -1])
        if self.kind == "all":
            return flat
        if self.kind == "one":
            return flat[:, int(self.chosen)][:, None]
        if self.kind == "each":
            return tf.gather(flat, self._owned(owners), axis=1, batch_dims=1)[:, None]
        u = tf.reshape(tf.gather(self.chosen, owners), [len(owners), -1])
        return tf.reduce_sum(flat * tf.cast(u, flat.dtype), 1, keepdims=True)


class Explained:
    """A model, a batch of examples, and what is explained of them.

    Parameters
    ----------
    engine : Engine
        The model.
    x : array, or list, tuple or dict of arrays, or Call
        B examples.
    target : int, array of int (B,), "predicted", "all", or array (B, *output_shape)
        Which outputs.
    wrt : str, Activation, or list of str
        What is looked at: "inputs" (all floating ones), inputs by name, or a hidden layer's output,
        from which on the model is then run.
    of : str, int or layer, optional
        As in `Engine.jacobian`; "logits" for what a final softmax or sigmoid is taken of.

    Attributes
    ----------
    names : list of str
        Of what is looked at.
    values : list of tf.Tensor
        It at the examples, each (B, *shape).
    target : Target
        What is explained.
    link : str
        "Softmax", "LogSoftmax" or "Sigmoid" where the outputs explained are the result of one.
    """

    def __init__(self, engine: Engine, x: Any, target: Any, wrt: Any = "inputs", of: Any = None):
        self._of = of
        if isinstance(wrt, Activation):
            engine, given = after(engine, wrt, x)
            batch = engine._traces.prepare(given)
            self._places, self.names = [0], [wrt.layer]
        else:
            batch = engine._traces.prepare(x)
            self._places = _places(batch, wrt)
            self.names = [batch.names[n] for n in self._places]
        self._engine, self._batch = engine, batch
        self._sources = [batch.names[n] for n in self._places]
        self.values = [batch.tensors[n] for n in self._places]
        traced, _, head = engine._traces.asked(batch, of, check=False)
        self._in_places = isinstance(traced, Fixed)
        self._each = traced.footprint(head)
        self.link = "" if of == "logits" else before_link(traced.program, head)[1]
        dtype = traced.dtype(head)
        self.target = _target(target, traced.row_shape(head), dtype, self)

    @functools.cached_property
    def outputs(self) -> tf.Tensor:
        """The model's outputs at the examples, (B, *output_shape)."""
        return self._engine.outputs(self._batch.packed, of=self._of)

    @property
    def size(self) -> int:
        """B."""
        return self._batch.size

    def at_examples(self) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Return the target and its gradients at the examples themselves, as `at` does."""
        values, gradients, outputs = [], [], []
        for owners in self.chunks(self.size):
            found = self._asked([tf.gather(value, owners) for value in self.values], owners)
            for parts, part in zip((values, gradients, outputs), found, strict=True):
                parts.append(part)
        self.outputs = tf.concat(outputs, 0)  # which need not be computed again
        return tf.concat(values, 0), [tf.concat(g, 0) for g in zip(*gradients, strict=True)]

    def chunks(self, points: int) -> Iterator[np.ndarray]:
        """Cut the numbers 0 to `points` - 1 into runs, one or more, to be asked about at once.

        Of no points there is one run, of none, so that results get their shapes from what a method
        does for any other run.
        """
        for start in range(0, max(points, 1), self._at_once):
            end = min(start + self._at_once, points)
            yield np.arange(start, end)
            progress.tell(end, points)

    def at(
        self, points: Sequence[tf.Tensor], owners: np.ndarray
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Return the target and its gradient at other points.

        Parameters
        ----------
        points : sequence of tf.Tensor
            In place of `values`, each (N, *shape).
        owners : array of int (N,)
            Which example each point belongs to: its target, and its inputs that are not looked at.

        Returns
        -------
        values : tf.Tensor
            (N, M).
        gradients : list of tf.Tensor
            One for each of `names`, (N, M, *shape).
        """
        values, gradients, _ = self._asked(points, owners)
        return values, gradients

    def forward(self, points: Sequence[tf.Tensor], owners: np.ndarray) -> tf.Tensor:
        """Return the target at other points, (N, M), without a gradient."""
        if self._in_places and not self._stand(owners):
            return self._by_rounds(lambda p, own: [self.forward(p, own)], points, owners)[0]
        outputs = self._engine.outputs(self._packed(points, owners), of=self._of)
        return self.target.of(outputs, owners)

    def everywhere(self, points: Sequence[tf.Tensor]) -> tf.Tensor:
        """Return the target at one point of each example, points (B, *shape), as (B, M)."""
        parts = [
            self.forward([tf.gather(p, owners) for p in points], owners)
            for owners in self.chunks(self.size)
        ]
        return tf.concat(parts, 0)

    @property
    def engine(self) -> Engine:
        """Of the model, or of what follows the hidden layer that is looked at."""
        return self._engine

    def rise(self, start: Sequence[tf.Tensor]) -> tf.Tensor:
        """Return f(x) - f(start), start (B, *shape) for each of `names`: (B, M), in float64."""
        at_x, below = (tf.cast(f, tf.float64) for f in (self.at_x, self.everywhere(start)))
        return at_x - below

    def trace(self) -> tuple[Traced, str, Batch, list[int]]:
        """Return the trace, the output's tensor, the batch, and which of its tensors count.

        Raises
        ------
        ExamplesMeetError
            If examples influence one another.
        """
        traced, head = self._engine._checked(self._batch, self._of)
        return traced, head, self._batch, self._places

    @property
    def at_x(self) -> tf.Tensor:
        """The target at the examples themselves, (B, M)."""
        return self.target.of(self.outputs, np.arange(self.size))

    def hidden(
        self, points: Sequence[tf.Tensor], owners: np.ndarray, activation: Activation
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return a hidden layer's output (N, *shape), and the target's gradient in it.

        Parameters
        ----------
        points, owners
            As in `at`.
        activation : Activation
            The hidden layer.

        Returns
        -------
        values : tf.Tensor
            (N, *shape).
        gradients : tf.Tensor
            (N, M, *shape).
        """
        packed = self._packed(points, owners)
        asked = self.target.asked(owners)
        jac = self._engine.jacobian(packed, wrt=activation, of=self._of, **asked)
        (key,) = jac
        values = self.hidden_values(points, owners, activation)
        return values, tf.reshape(jac[key], [len(owners), self.target.count, *values.shape[1:]])

    def hidden_values(
        self, points: Sequence[tf.Tensor], owners: np.ndarray, activation: Activation
    ) -> tf.Tensor:
        """Return a hidden layer's output at points, (N, *shape)."""
        return self._engine.outputs(self._packed(points, owners), of=activation)

    def hidden_rates(
        self,
        points: Sequence[tf.Tensor],
        directions: Sequence[tf.Tensor],
        owners: np.ndarray,
        activation: Activation,
    ) -> tf.Tensor:
        """Return how a hidden layer's output (N, *shape) changes as points move in directions."""
        batch = self._engine._traces.prepare(self._packed(points, owners))
        moves = dict(zip(self._places, directions, strict=True))
        return rates(self._engine, activation, batch, moves)

    def attribution(
        self,
        method: str,
        values: Sequence[tf.Tensor],
        looked_at: dict[str, tf.Tensor] | None = None,
        *,
        delta: tf.Tensor | None = None,
        standard_error: Sequence[tf.Tensor] | None = None,
        facts: dict[str, Any] | None = None,
    ) -> Attribution:
        """Return a method's answer, as users see it.

        Parameters
        ----------
        method : str
            Its name.
        values : sequence of tf.Tensor
            One for each of `names`, (B, M, *shape).
        looked_at : dict of str to tf.Tensor, optional
            What the values are about, each (B, *shape), where that is not `values`.
        delta : tf.Tensor, optional
            (B, M).
        standard_error : sequence of tf.Tensor, optional
            As `values`.
        facts : dict, optional
            How it was computed.
        """
        x = looked_at or dict(zip(self.names, self.values, strict=True))
        kinds = {"all": "all", "directions": "directions"}
        link = f"probabilities, after {self.link}" if self.link else "outputs"
        return Attribution(
            method=method,
            values=self._arranged(values, x),
            target=kinds.get(self.target.kind, self.target.chosen),
            outputs=self.outputs,
            x=next(iter(x.values())) if len(x) == 1 else x,
            explained="logits" if self._of == "logits" else link,
            delta=None if delta is None else self.shown(tf.cast(delta, self.outputs.dtype)),
            standard_error=None if standard_error is None else self._arranged(standard_error, x),
            facts=facts or {},
        )

    def _arranged(self, values: Sequence[tf.Tensor], like: dict[str, tf.Tensor]) -> Any:
        """Return values (B, M, *shape) as users see them: one, or a dict, in the inputs' types."""
        shown = {
            name: self.shown(tf.cast(v, x.dtype))
            for (name, x), v in zip(like.items(), values, strict=True)
        }
        return next(iter(shown.values())) if len(shown) == 1 else shown

    def shown(self, values: tf.Tensor) -> tf.Tensor:
        """Return (B, M, ...) as users see it: without M, but for target "all"."""
        return values if self.target.kind == "all" else values[:, 0]

    def _asked(
        self, points: Sequence[tf.Tensor], owners: np.ndarray
    ) -> tuple[tf.Tensor, list[tf.Tensor], tf.Tensor]:
        """Return what `at` does, and the model's outputs (N, *output_shape)."""
        if self._in_places and not self._stand(owners):

            def flat(moved: Sequence[tf.Tensor], own: np.ndarray) -> list[tf.Tensor]:
                values, gradients, outputs = self._asked(moved, own)
                return [values, *gradients, outputs]

            values, *gradients, outputs = self._by_rounds(flat, points, owners)
            return values, gradients, outputs
        jac = self._engine.jacobian(
            self._packed(points, owners),
            wrt=self._sources,
            of=self._of,
            **self.target.asked(owners),
        )
        count = len(owners)
        gradients = [
            tf.reshape(jac[name], [count, self.target.count, *value.shape[1:]])
            for name, value in zip(self._sources, self.values, strict=True)
        ]
        return self.target.of(jac.outputs, owners), gradients, jac.outputs

    def _stand(self, owners: np.ndarray) -> bool:
        """Tell whether there is one point for each example, in the order of the batch."""
        return np.array_equal(owners, np.arange(self.size))

    def _by_rounds(
        self,
        ask: Callable[[Sequence[tf.Tensor], np.ndarray], list[tf.Tensor]],
        points: Sequence[tf.Tensor],
        owners: np.ndarray,
    ) -> list[tf.Tensor]:
        """Ask a model of one batch size about any points, each at its example's place."""
        order, parts = [], []
        for which, where in rounds(owners, self.size):
            missing = tf.reshape(tf.constant(which < 0), [-1])
            moved = [
                tf.where(
                    tf.reshape(missing, [-1] + [1] * (p.shape.rank - 1)),
                    value,
                    tf.cast(tf.gather(p, np.maximum(which, 0)), value.dtype),
                )
                for p, value in zip(points, self.values, strict=True)
            ]
            found = ask(moved, np.arange(self.size))
            order += which[where].tolist()
            parts.append([tf.gather(t, where) for t in found])
        back = np.argsort(order)
        return [tf.gather(tf.concat(each, 0), back) for each in zip(*parts, strict=True)]

    def _packed(self, points: Sequence[tf.Tensor], owners: np.ndarray) -> Any:
        moved = dict(zip(self._places, points, strict=True))
        leaves = [
            moved[n] if n in moved else tf.gather(tensor, owners)
            for n, tensor in enumerate(self._batch.tensors)
        ]
        return tf.nest.pack_sequence_as(self._batch.structure, leaves)

    @property
    def _at_once(self) -> int:
        """How many points fit into the memory limit, with every tensor of the model at each."""
        allowed = min(memory.limit(self._engine.memory_limit) or _BYTES, _BYTES)
        each = max(self._each * (1 + self.target.count), 1)
        return max(1, min(_POINTS, allowed // each))


def _target(target: Any, shape: tuple[int, ...], dtype: tf.DType, explained: Explained) -> Target:
    """Return the outputs that a `target` means, for outputs (B, *shape)."""
    if isinstance(target, str):
        if target == "all":
            return Target("all", None, math.prod(shape), shape)
        if target != "predicted":
            raise InputError(
                "Expected target= an int, one int for each example, 'predicted', 'all', or "
                f"cotangents. Received: {target!r}."
            )
        flat = tf.reshape(explained.outputs, [explained.size, math.prod(shape)])
        best = tf.argmax(flat, 1)
        return Target("each", best if inside_functions.is_inside() else np.asarray(best), 1, shape)
    if tf.is_tensor(target) and inside_functions.is_inside():
        return _no_numbers_yet(target, shape, dtype, explained.size)
    array = np.asarray(target)
    if array.dtype.kind in "iu" and array.ndim <= 1:
        if array.ndim and len(array) != explained.size:
            raise InputError(
                f"Expected target= as one number, or one for each of {explained.size} examples. "
                f"Received: {len(array)} numbers."
            )
        asked = array if array.ndim else int(array)
        with host.lifted():
            chosen = seeds.make(asked, None, explained.size, shape, dtype).payload.numpy()
        return (
            Target("each", chosen, 1, shape) if array.ndim else Target("one", chosen[0], 1, shape)
        )
    if array.shape != (explained.size, *shape):
        raise InputError(
            f"Expected target= as directions of shape {(explained.size, *shape)}, or as numbers of "
            f"outputs. Received: an array of shape {array.shape} and type {array.dtype}."
        )
    return Target("directions", tf.cast(target, dtype), 1, shape)


def _no_numbers_yet(
    target: tf.Tensor, shape: tuple[int, ...], dtype: tf.DType, size: int
) -> Target:
    """Return the outputs that a target means which a graph being built computes."""
    if tuple(target.shape) == (size, *shape) and not target.dtype.is_integer:
        return Target("directions", tf.cast(target, dtype), 1, shape)
    chosen = seeds.make(target, None, size, shape, dtype).payload
    return Target("each", tf.broadcast_to(chosen, [size]), 1, shape)


def _places(batch: Batch, wrt: Any) -> list[int]:
    """Return which of the batch's tensors are looked at."""
    floating = [n for n, tensor in enumerate(batch.tensors) if tensor.dtype.is_floating]
    if isinstance(wrt, str) and wrt == "inputs":
        if not floating:
            raise InputError(
                "The model has no input of real numbers to look at. Look at what turns its "
                'integers into numbers: wrt=pj.activation("embedding").'
            )
        return floating
    wanted = [wrt] if isinstance(wrt, str) else list(wrt)
    unknown = [name for name in wanted if name not in batch.names]
    if unknown:
        raise InputError(f"There is no input {unknown[0]!r}. There are: {list(batch.names)}.")
    return [batch.names.index(name) for name in wanted]
