"""Influence functions: what each training example does to trained weights, losses and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.linalg
import tensorflow as tf

from perjac import progress
from perjac._core.backend import memory
from perjac._core.model.compiled_loss import compiled
from perjac.errors import InputError, NotPositiveError, OutOfRangeError, check_one_of
from perjac.fisher._products import pushed
from perjac.fisher._rows_of import Root
from perjac.fisher._stream import Stream
from perjac.fisher._values import form_of, keyed
from perjac.fisher.form import Form, check_damping
from perjac.fisher.information import Fisher

# The forms of the curvature, by the methods of `Fisher` that make them.
FORMS = (
    "exact", "dense", "blocks", "diagonal", "kronecker", "eigenbasis", "low_rank", "operator",
)  # fmt: skip
# Bytes of the directions that are solved for at a time, where memory does not set a lower limit.
_AT_ONCE = 2**28


class Influence:
    """What a trained model would be if a training example counted a little more, or not at all.

    The weights θ minimise (1/N) Σ ℓ(z_n, θ) + ½ damping ‖θ‖². With one example's loss added ε
    times they move by -ε H⁻¹ ∇ℓ(z), H the Hessian of that sum. It is taken to be the generalised
    Gauss-Newton matrix plus the damping, which for models linear in their weights it is.

    Parameters
    ----------
    engine : Engine
        Of the trained model.
    data : (x, y), or a batched tf.data.Dataset of it
        The N training examples, in the same order each time.
    loss : keras.Loss, str or callable, optional
        The loss that it was trained on, convex in the output; by default the compiled one,
        without what layers add to it.
    form : {"exact", "dense", "blocks", "diagonal", "kronecker", "eigenbasis", "low_rank", \
"operator"}, Form or Fisher
        Of the curvature: a form of the loss's Gauss-Newton matrix, of which "exact" is the
        cheapest exact one, "kronecker" and "eigenbasis" the ones for large models; or one that is
        at hand, of other kinds too.
    damping : float
        The weight decay that the model was trained with, or what makes H positive and well
        conditioned. Of a mean over examples, whatever the form's reduction.
    wrt : as in `Engine.jacobian`
        The weights that would move.

    Raises
    ------
    InputError
        For data without labels, and options that do not fit.

    Notes
    -----
    Beside the form: P numbers in float64 for each test example of a block, which is as large as
    memory allows, and a pass over the training data for each block. `perjac.data` has TracIn and
    TRAK, which need no curvature.

    Influence is a derivative where the weights are a minimum. Of networks that are no minimum, or
    with many of them, it is that of the model linearised about the weights, pulled back to them by
    the damping (Bae et al. 2022).

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> x, y = np.random.default_rng(0).normal(size=(20, 4)), np.arange(20) % 3
    >>> found = pj.fisher.Influence(pj.Engine(model), (x, y), loss=loss, damping=0.1)
    >>> found.on_losses(x[:5], y[:5]).shape, found.of_itself().shape
    ((20, 5), (20,))
    >>> found.weights_without([0, 3])["kernel"].shape
    (2, 4, 3)

    References
    ----------
    Koh and Liang 2017, Understanding black-box predictions via influence functions; Bae et al.
    2022, If influence functions are the answer, then what is the question?
    """

    def __init__(
        self,
        engine: Any,
        data: Any,
        *,
        loss: Any = None,
        form: str | Form | Fisher = "exact",
        damping: float = 1e-3,
        wrt: Any = "weights",
    ):
        check_damping(damping)
        self._engine, self._wrt, self.damping = engine, wrt, float(damping)
        self._loss = compiled(engine.model)[0] if loss is None else loss
        self._stream = Stream.of(data)
        self._root = Root(engine, "exact", self._loss, 1.0, None, 1, 0, wrt, None)
        information = Fisher(self._root, data, "mean")
        self._gradients = engine.fisher(data, kind="empirical", loss=self._loss, wrt=wrt)
        if isinstance(form, str):
            check_one_of(form, FORMS, "form")
            form = getattr(information, form)()
        self.form = form_of(form, "exact")
        if self.form.columns != information.columns:
            raise InputError(
                f"Expected a form about the weights {', '.join(information.keys)}. "
                f"Received: about {', '.join(self.form.keys)}."
            )

    def __repr__(self) -> str:
        return f"Influence(form={type(self.form).__name__}, damping={self.damping:g})"

    @property
    def examples(self) -> int:
        """N."""
        return self._gradients.examples

    def on_losses(self, x: Any, y: Any) -> np.ndarray:
        """Return dL(t)/dε, the influence of each training example on each test example's loss.

        -∇L(t)ᵀ H⁻¹ ∇ℓ(n). Below zero: more of example n would lower the loss of t.

        Parameters
        ----------
        x, y : arrays
            T test examples and their labels.

        Returns
        -------
        np.ndarray (N, T)
            In float64.
        """
        blocks = self._each_gradient(Stream.of((x, y)))
        return np.concatenate([self._met(self._solved(rows.T)) for _, rows, _ in blocks], 1)

    def on_outputs(
        self, x: Any, *, outputs: int | Sequence[int] | None = None, of: Any = None
    ) -> np.ndarray:
        """Return df_k(t)/dε, the influence of each training example on test examples' outputs.

        Parameters
        ----------
        x : array, or list or dict of arrays
            T test examples.
        outputs : int or list of int, optional
            Which K entries of the output, counted in C order; all if left out.
        of : str, int or layer, optional
            As in `Engine.jacobian`.

        Returns
        -------
        np.ndarray (N, T, K)
            In float64.
        """
        found = []
        stream = Stream.of(x)
        first = self._engine.jacobian(stream.first(1)[0], outputs=outputs, of=of, wrt=self._wrt)
        for _, part, _ in stream.batches(self._most(first.shape[1])):
            jacobian = self._engine.jacobian(part, outputs=outputs, of=of, wrt=self._wrt)
            rows = np.asarray(jacobian.matrix(), "f8")  # (T, K, P)
            met = self._met(self._solved(rows.reshape(-1, rows.shape[2]).T))
            found.append(met.reshape(-1, *rows.shape[:2]))
        return np.concatenate(found, 1)

    def of_itself(self) -> np.ndarray:
        """Return the influence of each training example on its own loss, (N,), never above zero.

        Far below zero for examples that nothing but themselves teaches: atypical, or mislabelled.
        """
        blocks = self._each_gradient(self._stream)
        found = [-np.sum(rows * self._solved(rows.T).T, 1) for _, rows, _ in blocks]
        return np.concatenate(found)

    def weights_without(self, examples: int | Sequence[int], newton: bool = False) -> Any:
        """Return by how much the weights would change, were the model trained without an example.

        The others' losses keep their weight of 1/N each.

        Parameters
        ----------
        examples : int or list of int
            Numbers of n training examples, each left out by itself.
        newton : bool
            Whether the example's own curvature is left out of H too: a Newton step on the others'
            losses, in place of the derivative 1/N · H⁻¹ ∇ℓ. Closer by far for examples that
            matter much; it takes K more solves for each.

        Returns
        -------
        dict of str to array (n, *shape)
            By key, in float64.

        Raises
        ------
        OutOfRangeError
            If there is no such example.
        NotPositiveError
            For `newton`, if the form is too rough for it.

        References
        ----------
        Koh and Liang 2017, section 2.1; for the Newton step Rad and Maleki 2020, A scalable
        estimate of the out-of-sample prediction error via approximate leave-one-out
        cross-validation.
        """
        wanted = [int(n) for n in np.atleast_1d(examples)]
        if not wanted or min(wanted) < 0 or max(wanted) >= self.examples:
            raise OutOfRangeError(
                f"Expected examples= from 0 to {self.examples - 1}. Received: {examples!r}."
            )
        found = {}
        for numbers, moved in self._each_change(newton, set(wanted)):
            found.update(zip(numbers, moved.T, strict=True))
        flat = np.stack([found[n] for n in wanted])
        return keyed(
            {
                key: flat[:, where].reshape(-1, *self.form.columns.shape(key))
                for key, where in self.form.columns.slices.items()
            }
        )

    def losses_without(self, x: Any, y: Any, newton: bool = False) -> np.ndarray:
        """Return by how much test losses would change, were the model trained without an example.

        Above zero: the example helps. To first order in the weights' change.

        Parameters
        ----------
        x, y : arrays
            T test examples and their labels.
        newton : bool
            As in `weights_without`.

        Returns
        -------
        np.ndarray (N, T)
            In float64.
        """
        if not newton:
            return -self.on_losses(x, y) / self.examples
        test = self._engine.fisher((x, y), kind="empirical", loss=self._loss, wrt=self._wrt)
        every = set(range(self.examples))
        changes = self._each_change(newton, every)
        return np.concatenate([_pushed(test, moved).T for _, moved in changes])

    def _solved(self, v: np.ndarray) -> np.ndarray:
        """Return H⁻¹ v for v (P, m), H that of the mean over examples."""
        if self.form.reduction == "mean":
            return self.form.solve(v, self.damping)
        return self.form.examples * self.form.solve(v, self.form.examples * self.damping)

    def _met(self, directions: np.ndarray) -> np.ndarray:
        """Return -∇ℓ(n)ᵀ v for all training examples, (N, m), for v (P, m)."""
        return -_pushed(self._gradients, directions)

    def _most(self, rows: int) -> int:
        """Return how many examples with so many rows of P numbers each are looked at at a time."""
        limit = min(memory.limit(self._engine.memory_limit) or _AT_ONCE, _AT_ONCE)
        # In float64: the rows, what they are solved to, and what the solver works on.
        return max(1, limit // (3 * 8 * self.form.columns.count * rows))

    def _each_gradient(
        self, stream: Stream, rows: int = 1, wanted: set[int] | None = None
    ) -> Iterator[tuple[int, np.ndarray, Any]]:
        """Give (number of the first example, gradients (m, P), (x, y)), block by block.

        Blocks with none of the examples that are `wanted` are passed over.
        """
        for start, x, y in stream.batches(self._most(rows)):
            here = range(start, start + len(tf.nest.flatten(x)[0]))
            if wanted is None or not wanted.isdisjoint(here):
                gradients = self._engine.gradients(x, y, loss=self._loss, wrt=self._wrt)
                yield start, np.asarray(gradients.matrix(), "f8"), (x, y)

    def _each_change(
        self, newton: bool, wanted: set[int]
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Give numbers of some examples, and by how much the weights change without, (P, n)."""
        first = self._engine._traces.prepare(self._stream.first()[0])
        own = self._root.row_count(first) if newton else 0
        for start, gradients, pair in self._each_gradient(self._stream, 1 + own, wanted):
            here = [n for n in range(len(gradients)) if start + n in wanted]
            moved = self._solved(gradients[here].T)
            if newton:
                rows = self._rows(start, *pair)[here]
                moved += np.stack([self._own(g, v) for g, v in zip(rows, moved.T, strict=True)], 1)
            yield [start + n for n in here], moved / self.examples

    def _own(self, rows: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """Return what leaving out GᵀG / N adds to H⁻¹ g, for G (K, P) and H⁻¹ g (P,).

        (H - GᵀG / N)⁻¹ = H⁻¹ + H⁻¹ Gᵀ (N·I - G H⁻¹ Gᵀ)⁻¹ G H⁻¹, by Woodbury's identity.
        """
        solved = self._solved(rows.T)
        inside = self.examples * np.eye(len(rows)) - rows @ solved
        try:
            return solved @ scipy.linalg.solve(inside, rows @ moved, assume_a="pos")
        except np.linalg.LinAlgError as failure:
            raise NotPositiveError(
                f"Without an example's own curvature a {type(self.form).__name__} is not positive: "
                "it is not exact enough for newton=True. Choose another form=, or a larger damping."
            ) from failure

    def _rows(self, start: int, x: Any, y: Any) -> np.ndarray:
        """Return the rows of the curvature of a block of examples, (m, K, P)."""
        given = self._engine._traces.prepare(x)
        parts = [
            np.asarray(rows.matrix(), "f8")
            for rows in self._root.parts(given, y, start, self._root.row_count(given))
        ]
        return np.concatenate(parts, 1)


def _pushed(information: Fisher, directions: np.ndarray) -> np.ndarray:
    """Return all rows times directions (P, m), (N, m), in a pass that nobody is told about."""
    with progress.heard(lambda done, total: None):
        return np.concatenate([pushed(rows, directions) for rows in information.rows()])
