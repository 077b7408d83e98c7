"""Engine: the front door. Binds a model once and answers what each example does."""

from __future__ import annotations

import dataclasses
import math
import numbers
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from perjac._core.autodiff import seeds
from perjac._core.backend import memory
from perjac._core.backend.dtypes import at_least_float32
from perjac._core.backend.shapes import size
from perjac._core.backend.xla import NotForXla
from perjac._core.factors.reductions import THEMSELVES, Question
from perjac._core.graph import failures
from perjac._core.graph.added_losses import LOSS
from perjac._core.model import inputs, inside_functions, loading
from perjac._core.model.losses import Objective
from perjac._core.model.variables import Source
from perjac._core.runtime import export, laid
from perjac._core.runtime.certificate import SCHEDULES
from perjac._core.runtime.inspection import Inspection
from perjac._core.runtime.live_model import Live
from perjac._core.runtime.objectives import Objectives
from perjac._core.runtime.session import Traces
from perjac._core.runtime.traced_model import Traced
from perjac._core.runtime.verification import Verification, verify
from perjac.errors import (
    DisconnectedWarning,
    InputError,
    NotPicklableError,
    PerjacError,
    check_counts,
    check_one_of,
)
from perjac.fisher import Fisher
from perjac.fisher._rows_of import Root
from perjac.gradients import Gradients
from perjac.jacobian import Jacobian

_OPTIONS = {
    "training": (True, False),
    "path": ("auto", "factored", "tape"),
    "jit": ("auto", True, False),
    "autotune": (True, False),
    "independence": ("check", "trust"),
    "certify": SCHEDULES,
}


class Engine:
    """Per-example Jacobians of a model.

    Parameters
    ----------
    model : keras.Model, keras.Layer, path, tf.Module or callable
        A built Keras model, a .keras or .h5 file, the folder of a SavedModel, or any function of
        a batch whose outputs have the batch as their first axis.
    variables : sequence of variables, optional
        The weights of a plain function; a model's own are found.
    signature : str, optional
        Which function of a SavedModel; its "serving_default" or only one by default.
    training : bool
        Whether to run the model in training mode.
    path : {"auto", "factored", "tape"}
        "auto" takes the factored path for every weight that has a rule and the tape path for the
        others; "factored" refuses to leave it; "tape" takes the tape path for everything.
    memory_limit : int or str, optional
        Bytes, or "4GiB", that a result may take; by default a share of what is free.
    jit : {"auto", True, False}
        Whether XLA compiles all from inputs to factors into one program, anew for each batch
        size. "auto" does on a GPU; on a CPU, where that is slower, it compiles recurrent loops and
        the assembly of rank-one rows. What XLA cannot compile goes without, with a warning.
    autotune : bool
        Whether to try, the first time that something is asked at a batch size, the ways to run it
        (rows together or one after another, with XLA or without) and take the fastest. That takes
        seconds, or tens of them for a large network; what was found is remembered in the user's
        cache folder, or in the one that the environment's `PERJAC_CACHE` names; "off" there
        remembers nothing.
    independence : {"check", "trust"}
        Whether to make sure that no example influences another.
    certify : {"schedule", "always", "never"}
        Which calls are compared with `tf.GradientTape` on the model: numbers 1, 2, 16, 128, ... of
        each kind; all; or none. Weights that do not agree take the tape path, with a warning.

    Attributes
    ----------
    model : object
        What is called.

    Raises
    ------
    NotBuiltError
        If a Keras model has no weights yet.
    NotAModelError
        If `model` is nothing that can be called on a batch.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
    >>> jac = pj.Engine(model).jacobian(np.ones((2, 4), "float32"))
    >>> jac["top/bias"].shape
    TensorShape([2, 3, 3])
    """

    def __init__(
        self,
        model: Any,
        *,
        variables: Sequence[Any] | None = None,
        signature: str | None = None,
        training: bool = False,
        path: str = "auto",
        memory_limit: int | str | None = None,
        jit: bool | str = "auto",
        autotune: bool = False,
        independence: str = "check",
        certify: str = "schedule",
    ):
        given = {
            "training": training, "path": path, "jit": jit, "autotune": autotune,
            "independence": independence, "certify": certify,
        }  # fmt: skip
        for name, value in given.items():
            check_one_of(value, _OPTIONS[name], name)
        memory.limit(memory_limit)  # refuses what it cannot read
        self.model = model = loading.loaded(model, signature)
        self.memory_limit, self._jit = memory_limit, jit is not False
        self._check = independence == "check"
        self._traces = Traces(model, variables, training, path, jit, autotune, certify)
        self._objectives = Objectives(model, self._traces)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotPicklableError(
            "An engine cannot be pickled or copied: it holds compiled programs. Pickle the model, "
            "or the path of its file, and make the Engine anew there."
        )

    def __repr__(self) -> str:
        name = getattr(self.model, "name", type(self.model).__name__)
        return f"Engine({name!r}, {len(self._traces.weights.keys)} variables)"

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs that the model declares."""
        return [e.name for e in self._traces.expected]

    @property
    def expected(self) -> list[inputs.Expected]:
        """The inputs that the model declares: names, shapes and dtypes."""
        return list(self._traces.expected)

    def made_up(self, count: int, seed: int = 0) -> Any:
        """Return made-up examples of the shapes the model declares: normal numbers, 0s and 1s."""
        self._traces.example()  # refuses a model that declares none
        return inputs.made_up(self._traces.expected, count, seed)

    @property
    def weight_names(self) -> list[str]:
        """The keys of the trainable weights."""
        return [self._traces.weights.keys[n] for n in self._traces.weights.trainable]

    def jacobian(
        self,
        x: Any,
        *,
        wrt: Any = "weights",
        of: Any = None,
        outputs: Any = None,
        cotangents: Any = None,
    ) -> Jacobian:
        """Differentiate each example's outputs.

        Parameters
        ----------
        x : array, or list, tuple or dict of arrays, or Call
            A batch of B examples; `pj.call(x, mask=mask)` for a call with further arguments.
        wrt : str, layer, variable, Activation, or list of these
            "weights" (all trainable ones), "inputs", a layer (its weights), a variable, a name of
            any of these, or `pj.activation(name)` for a hidden layer's output.
        of : str, int or layer, optional
            Which output, where the model has several; or a hidden layer, for its output.
        outputs : int, list of int, or array of int (B,), optional
            Which entries of the output, counted in C order; all if left out.
        cotangents : array (B, K, *output_shape), optional
            Directions in the output, in place of single entries.

        Returns
        -------
        Jacobian
            Of shape (B, K, P); rows are formed when a key is looked up.

        Raises
        ------
        PerjacError
            Of the kind that `perjac.errors` lists: wrong shapes, unknown names, outputs out of
            range, examples that influence one another, NaN, results larger than memory.

        Warns
        -----
        DisconnectedWarning
            Where the output does not depend on something asked about: its rows are zero.
        SlowPathWarning
            Where the tape path has to go example by example, or XLA cannot compile what it was
            asked to.

        Notes
        -----
        The first call with a new shape of example traces the model and compiles; later calls
        with the same shapes, whatever the batch size, do not.

        Inside a `tf.function`, `Dataset.map` or loop, the batch size must be known. What needs
        numbers is done while it is traced, on made-up examples: NaN and labels that there are
        not are not looked for, and results cannot be differentiated again.
        """
        batch = self._traces.prepare(x)
        result, factors, sources, row_shape = self._derived(
            batch, None, of, wrt, outputs=outputs, cotangents=cotangents
        )
        return Jacobian(
            factors,
            sources,
            self._traces.weights,
            result,
            row_shape,
            memory_limit=self.memory_limit,
            jit=self._jit,
        )

    def gradients(
        self,
        x: Any,
        y: Any = None,
        *,
        loss: Any = None,
        wrt: Any = "weights",
        sample_weight: Any = None,
        class_weight: Mapping[int, float] | None = None,
        loss_weights: Any = None,
    ) -> Gradients:
        """Differentiate each example's loss.

        Parameters
        ----------
        x : array, or list, tuple or dict of arrays, or Call
            A batch of B examples, as in `jacobian`.
        y : array, or list, tuple or dict of arrays
            Their labels, the batch first; one array for each output that has a loss, in order or
            by the output's name.
        loss : keras.Loss, str, callable, or a dict or list of these, optional
            A Keras loss or its name; a callable (y, output) -> (B,), which gets the outputs of a
            model with several as the model returns them; one for each output, by name or in order.
            By default the loss that the model was compiled with, and what its layers add to it
            (`add_loss`, activity regularisers); a loss that is given is the whole loss.
        wrt : as in `jacobian`
            "weights" by default.
        sample_weight : array (B,) or (B, positions), or a list or dict of these, optional
            What the losses of examples, or of positions within them, are multiplied by.
        class_weight : mapping of int to float, optional
            What the losses of each class's labels are multiplied by; others stay as they are.
        loss_weights : float, or a list or dict of these, optional
            What the loss of each output is multiplied by.

        Returns
        -------
        Gradients
            Of shape (B, P), with `losses` (B,).

        Raises
        ------
        PerjacError
            As `jacobian`, and for labels that do not fit or name classes that there are not.

        Warns
        -----
        LossWarning
            Where a loss takes the outputs for probabilities, which they are not.

        Notes
        -----
        The loss of an example is what Keras computes for a batch of that example alone: losses of
        several positions are averaged, or added up for reduction "sum" or None, and positions
        that the model masks do not count. Weight regularisers are no example's, and are left out.
        What layers add is what they would add for the example alone; `sample_weight`,
        `class_weight` and `loss_weights` do not multiply it, as in Keras.
        Losses are computed in the outputs' type, in float32 at least.

        Examples
        --------
        >>> import keras, numpy as np, perjac as pj
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
        >>> x, y = np.ones((5, 4), "float32"), np.array([0, 1, 2, 1, 0])
        >>> grads = pj.Engine(model).gradients(x, y, loss="sparse_categorical_crossentropy")
        >>> grads.norms().shape, grads.mean()["kernel"].shape
        (TensorShape([5]), TensorShape([4, 3]))
        """
        objective = self._objectives.of(loss, loss_weights, class_weight)
        batch = self._objectives.labelled(objective, x, y, sample_weight)
        losses, factors, sources, _ = self._derived(batch, objective, LOSS, wrt)
        return Gradients(
            factors,
            sources,
            self._traces.weights,
            losses,
            memory_limit=self.memory_limit,
            jit=self._jit,
        )

    def fisher(
        self,
        data: Any,
        *,
        kind: str = "exact",
        likelihood: Any = "categorical",
        wrt: Any = "weights",
        of: Any = None,
        loss: Any = None,
        variance: float | str = 1.0,
        samples: int = 1,
        seed: int = 0,
        reduction: str = "mean",
    ) -> Fisher:
        """Return the Fisher information of a data set about the weights.

        Parameters
        ----------
        data : x, (x, y), or a batched tf.data.Dataset of either
            Examples, and labels where they are needed. A tuple is a pair, as in Keras; several
            inputs are a list or a dict.
        kind : {"exact", "sampled", "empirical"}
            The expectation over the labels that the model itself expects, which is the generalised
            Gauss-Newton matrix; `samples` draws of them; or the labels given, with `loss`.
        likelihood : {"categorical", "bernoulli", "gaussian"}, or a Keras loss or its name
            How labels spread about the output: classes along its last axis, from logits; a yes or
            no at each entry, from logits; normal about the output with `variance`. A model's own
            final softmax or sigmoid is left out. Of a loss, its generalised Gauss-Newton matrix.
        wrt : as in `jacobian`
            Weights.
        of : str, int or layer, optional
            As in `jacobian`.
        loss : as in `gradients`
            For the empirical kind; by default the compiled one.
        variance : float or "fitted"
            The Gaussian's; "fitted" is the mean squared residual of the labels.
        samples, seed : int
            For the sampled kind. An example's draws depend on the seed and its number alone.
        reduction : {"mean", "sum"}
            Over the examples.

        Returns
        -------
        Fisher
            Ask it for a form: `dense()`, `blocks()`, `diagonal()`, `kronecker()`, `eigenbasis()`,
            `low_rank()`, `operator()`; or, for the exact matrix by whichever form is cheapest,
            `solve`, `eigsh`, `trace`, `logdet`, `effective_dimension`.

        Raises
        ------
        PerjacError
            As `jacobian`; for data without the labels that are needed; for losses that are not
            convex in the output.

        Examples
        --------
        >>> import keras, numpy as np, perjac as pj
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
        >>> x = np.random.default_rng(0).normal(size=(50, 4)).astype("float32")
        >>> F = pj.Engine(model).fisher(x, likelihood="categorical")
        >>> step = F.solve({"top/kernel": np.ones((4, 3))}, damping=1e-3)
        >>> step["top/kernel"].shape, F.eigsh(2)[0].shape
        ((4, 3), (2,))

        References
        ----------
        Martens 2020, New insights and perspectives on the natural gradient method; Kunstner et al.
        2019, Limitations of the empirical Fisher approximation.
        """
        inside_functions.refuse("fisher()")
        known_variance = 1.0 if variance == "fitted" else variance
        how = Root(self, kind, likelihood, known_variance, loss, samples, seed, wrt, of)  # type: ignore[arg-type]
        return Fisher(how, data, reduction, variance)

    def outputs(self, x: Any, *, of: Any = None) -> tf.Tensor:
        """Return the model's outputs, (B, *output_shape).

        Parameters
        ----------
        x : array, or list, tuple or dict of arrays
            A batch of examples.
        of : str, int or layer, optional
            As in `jacobian`.
        """
        return self._outputs(self._traces.prepare(x), of)

    def inspect(
        self, batch_size: int = 32, *, x: Any = None, of: Any = None, measure: bool = False
    ) -> Inspection:
        """Return how each trainable weight goes: its sites, rules, path, why, and the cost.

        Parameters
        ----------
        batch_size : int
            For the time and memory expected.
        x : array, optional
            An example batch, for a model that does not declare the shapes of its inputs.
        of : str, int or layer, optional
            As in `jacobian`.
        measure : bool
            Whether to run it, and tell the time and memory that it took; an engine with
            `autotune=True` does anyway.

        Returns
        -------
        Inspection
            A table: print it, or read its `rows` and `plan`.

        Notes
        -----
        The time expected is counted work over the machine's rates, which are measured the first
        time (half a second) and remembered. It is wrong by up to a factor of three where one
        kernel is much slower than its kind.
        """
        check_counts(batch_size=batch_size)
        inside_functions.refuse("inspect()")
        batch = self._traces.prepare(self._traces.example() if x is None else x)
        traced, names, head = self._traces.asked(batch, of, check=self._check)
        count = size(traced.row_shape(head))
        sources = names.sources("weights")
        chosen = seeds.make(None, None, batch_size, traced.row_shape(head), traced.dtype(head))
        plan = traced.plan(head, sources, batch, batch_size, chosen, self.memory_limit, measure)
        decisions = traced.decisions(head, sources, count)
        return Inspection.of(decisions, batch_size, count, plan, traced.independence(head))

    def verify(self, x: Any, *, of: Any = None, rtol: float | None = None) -> Verification:
        """Compare with a plain loop over examples and outputs, in float64.

        Parameters
        ----------
        x : array, or list, tuple or dict of arrays
            A few examples; the first 8 are looked at, and up to 10 outputs.
        of : str, int or layer, optional
            As in `jacobian`.
        rtol : float, optional
            The relative error allowed; by default 1e-10 in float64, 1e-4 in float32, 1e-2 below.

        Returns
        -------
        Verification
            With `verdict`, `passed` and the error of each weight.

        Notes
        -----
        The reference is the model itself, not perjac's trace of it: its layers computing in
        float64, a fresh trace of it in float64, or, where neither runs, a tape in its own type.
        Where outputs are saturated, so that plain TensorFlow loses their gradients to rounding, the
        comparison is made before the final softmax or sigmoid, and the note says so. Where that
        does not help, the verdict is "undecided" and `passed` is False.
        """
        inside_functions.refuse("verify()")
        if not (rtol is None or _is_positive(rtol)):
            raise InputError(f"Expected rtol= as a number above zero. Received: {rtol!r}.")
        batch = self._traces.prepare(x)
        if batch.size == 0:
            raise InputError("Expected at least one example to verify on. Received: none.")
        found = self._compared(batch, of, rtol)
        if found.verdict == "undecided" and of is None and self._has_logits(batch):
            before = self._compared(batch, "logits", rtol)
            if before.verdict != "undecided":
                note = "The outputs are saturated: compared before the final softmax or sigmoid."
                return dataclasses.replace(before, note=f"{note} {before.note}".strip())
        return found

    def _has_logits(self, batch: inputs.Batch) -> bool:
        try:
            self._traces.of(batch)[1].head("logits")
        except PerjacError:
            return False
        return True

    def _compared(self, batch: inputs.Batch, of: Any, rtol: float | None) -> Verification:
        """Compare the Jacobian of one output with the live model's."""
        traced, names = self._traces.of(batch)
        head, sources = names.head(of), names.sources("weights")
        logits = not traced.has_output(head)  # then it lies before the only output's end
        live = Live(
            traced.model(names.head(None) if logits else head),
            traced.layer,
            traced.program.weights,
            [s.index for s in sources],
            logits,
        )

        def jacobian(part: Any, rows: list[int]) -> Any:
            # The report names what is zero, and what a certificate would leave to the tape.
            with warnings.catch_warnings(), traced.uncertified():
                warnings.simplefilter("ignore", DisconnectedWarning)
                return self.jacobian(part, of=of, outputs=rows)

        return verify(live, batch, sources, size(traced.row_shape(head)), jacobian, rtol)

    def export(
        self,
        path: str | pathlib.Path,
        x: Any,
        y: Any = None,
        *,
        job: str = "jacobian",
        wrt: Any = "weights",
        of: Any = None,
        outputs: Any = None,
        loss: Any = None,
    ) -> pathlib.Path:
        """Write a compiled program for batches of one size, to be run without TensorFlow.

        Parameters
        ----------
        path : str or path
            Of the program, in StableHLO; beside it go a manifest of its arguments, `.json`, and
            the variables' values, `.npz`.
        x, y : as in `jacobian` and `gradients`
            Examples of the shapes, types and batch size that the program is for.
        job : {"jacobian", "diagonal", "gradients", "norms"}
            Rows of the Jacobian; Σ of their squares; gradients of each example's loss; their norms.
        wrt, of, outputs : as in `jacobian`
            `wrt="inputs"` gives the Jacobian by the inputs.
        loss : as in `gradients`
            For the last two jobs.

        Returns
        -------
        pathlib.Path
            Of the program. `perjac.pjrt.load` runs it.

        Raises
        ------
        PathError
            If some weight would need the tape path.
        InputError
            If XLA cannot compile it.
        """
        check_one_of(job, list(export.JOBS), "job")
        inside_functions.refuse("export()")
        batch, objective = self._traces.prepare(x), None
        if export.JOBS[job][1]:
            objective = self._objectives.of(loss, None, None)
            wide = at_least_float32(self._traces.floating)
            batch = inputs.beside(batch, wide, y=y, sample_weight=None)
        traced, names = self._traces.of(batch, objective)
        head, sources = names.head(of if objective is None else LOSS), names.sources(wrt)
        if self._check:
            traced.check_graph(head)
            traced.check_data(head, batch)
        traced.check_sources(head, sources)
        chosen = seeds.make(outputs, None, batch.size, traced.row_shape(head), traced.dtype(head))
        return export.write(path, job, traced, head, sources, batch, chosen)

    def _summed(
        self, question: Question, x: Any, *, wrt: Any = "weights", of: Any = None, **asked: Any
    ) -> dict[str, Any]:
        """Return what a question makes of each weight's rows, which are not kept.

        The question is answered in the program that sweeps: one call, and nothing traced anew for
        another batch size.

        Parameters
        ----------
        question : Question
            One of `perjac._core.factors.reductions`.
        x : as in `jacobian`
            A batch.
        wrt, of : as in `jacobian`
            The weights, and the output.
        **asked : as in `jacobian`
            `outputs=` or `cotangents=`; or, for the rows of `gradients`, `y=` and `loss=`.
        """
        if "y" not in asked:
            return self._derived(self._traces.prepare(x), None, of, wrt, question, **asked)[1]
        objective = self._objectives.of(asked["loss"], None, None)
        batch = self._objectives.labelled(objective, x, asked["y"], None)
        return self._derived(batch, objective, LOSS, wrt, question)[1]

    def _sided(self) -> Engine:
        """Return this engine, with factors that keep both sides even where rows are smaller."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._traces = self._traces.uncompacted
        return other

    def _derived(
        self,
        batch: inputs.Batch,
        objective: Objective | None,
        of: Any,
        wrt: Any,
        question: Question = THEMSELVES,
        **asked: Any,
    ) -> tuple[tf.Tensor, dict[str, Any], list[Source], tuple[int, ...]]:
        """Return (outputs, answers, sources, row shape) of a head, or of the loss."""
        if inside_functions.is_inside():
            return laid.derived(self, batch, objective, of, wrt, question, asked)
        traced, names, head = self._traces.asked(batch, of, objective, self._check)
        sources = names.sources(wrt)
        if self._check:
            with failures.blamed(traced.program, head, batch):
                traced.check_data(head, batch)
        traced.check_sources(head, sources)
        chosen = seeds.make(
            asked.get("outputs"),
            asked.get("cotangents"),
            batch.size,
            traced.row_shape(head),
            traced.dtype(head),
        )
        try:
            with failures.blamed(traced.program, head, batch):
                result, answers = traced.answers(
                    head, sources, batch, chosen, self.memory_limit, question
                )
        except NotForXla as failure:
            self._traces.without_xla(str(failure))
            return self._derived(batch, objective, of, wrt, question, **asked)
        return result, answers, sources, chosen.row_shape

    def _outputs(self, batch: inputs.Batch, of: Any) -> tf.Tensor:
        traced, _, head = self._traces.asked(batch, of, check=False)
        return traced.outputs(head, batch, self.memory_limit)

    def _checked(self, batch: inputs.Batch, of: Any = None) -> tuple[Traced, str]:
        """Return the trace for such a batch and an output's tensor, the examples kept apart.

        Raises
        ------
        ExamplesMeetError
            If they are not.
        """
        if inside_functions.is_inside():
            return laid.checked(self, batch, of)
        traced, _, head = self._traces.asked(batch, of, check=self._check)
        if self._check:
            with failures.blamed(traced.program, head, batch):
                traced.check_data(head, batch)
        return traced, head


def _is_positive(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and 0 < float(value) < math.inf
