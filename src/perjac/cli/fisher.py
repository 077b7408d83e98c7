"""What `perjac fisher` does: options → a form of the Fisher information → arrays and lines."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from perjac.cli import losses
from perjac.errors import InputError
from perjac.fisher import figures as pictures
from perjac.fisher import serialization
from perjac.fisher._rows_of import KINDS
from perjac.fisher.form import Form
from perjac.fisher.kronecker import APPROXIMATIONS
from perjac.fisher.likelihoods import LIKELIHOODS
from perjac.fisher.matrix_free import Implicit
from perjac.fisher.stochastic import Estimate

_WRITTEN = {
    "diagonal": "the diagonal", "kronecker": "KFAC's sides", "eigenbasis": "EKFAC's eigenbasis",
    "blocks": "the layers' blocks", "dense": "the matrix", "spectrum": "the spectrum",
}  # fmt: skip
FORMS = tuple(_WRITTEN)
PICTURES = ("png", "pdf", "svg")
_KFAC = ("kronecker", "eigenbasis")
_LAYERS, _VALUES = 12, 6
_DAMPING = 1e-3


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a user asks for, checked before anything is read.

    Attributes
    ----------
    out : Path
        An .npz file.
    form, kind : str
        One of `FORMS`, and of the kinds that `Engine.fisher` takes.
    likelihood : str, optional
        A likelihood, by default "categorical", or the name of a Keras loss.
    loss : str, optional
        For kind "empirical".
    from_logits : bool
        Whether the loss takes logits.
    variance : str, optional
        A number, or "fitted".
    approximation : str, optional
        KFAC's, for the forms kronecker and eigenbasis.
    samples, seed : int, optional
        For kind "sampled".
    wrt, of, reduction : as in `Engine.fisher`
        As there.
    damping : float, optional
        For the effective dimension and the log-determinant.
    top : int
        How many eigenvectors a spectrum keeps.
    figures : str, optional
        "png", "pdf" or "svg": pictures are drawn, too.
    """

    out: pathlib.Path
    form: str
    kind: str
    likelihood: str | None
    loss: str | None
    from_logits: bool
    variance: str | None
    approximation: str | None
    samples: int | None
    seed: int | None
    wrt: str
    of: str | None
    reduction: str
    damping: float | None
    top: int
    figures: str | None

    def __post_init__(self):
        serialization.check_path(self.out)
        _check("form", self.form, FORMS)
        _check("kind", self.kind, KINDS)
        _check("reduction", self.reduction, ("mean", "sum"))
        _check("approximation", self.approximation, (None, *APPROXIMATIONS))
        _check("figures", self.figures, (None, *PICTURES))
        if self.damping is not None and not 0 < self.damping < np.inf:
            raise InputError(f"Expected --damping above zero. Received: {self.damping:g}.")
        self._check_together()

    @property
    def needs_labels(self) -> str:
        """The option that needs labels, if one does."""
        if self.kind == "empirical":
            return "--kind empirical"
        if self._is_loss:
            return f"--likelihood {self.law}"
        return "--variance fitted" if self.variance == "fitted" else ""

    @property
    def law(self) -> str:
        """The likelihood, or the loss that stands for one."""
        return self.likelihood or LIKELIHOODS[0]

    @property
    def _is_loss(self) -> bool:
        return self.law not in LIKELIHOODS

    def _check_together(self) -> None:
        """Raise for options that another one makes meaningless: nothing is left out in silence."""
        if self.loss is not None and self.kind != "empirical":
            raise InputError(
                "--loss is for --kind empirical. For the Gauss-Newton matrix of a loss give its "
                f"name to --likelihood. Received: --kind {self.kind}."
            )
        if self.likelihood is not None and self.kind == "empirical":
            raise InputError("--likelihood is for other kinds: --kind empirical is of the --loss.")
        named = self.loss is not None or self.kind != "empirical" and self._is_loss
        if self.from_logits and not named:
            raise InputError("--from-logits goes with a loss: with --loss, or --likelihood LOSS.")
        drawn = {"--samples": self.samples, "--seed": self.seed}
        for option in [name for name, value in drawn.items() if value is not None]:
            if self.kind != "sampled":
                raise InputError(f"{option} is for --kind sampled. Received: --kind {self.kind}.")
        if self.variance is not None and self.likelihood != "gaussian":
            raise InputError("--variance is for --likelihood gaussian.")
        if self.approximation is not None and self.form not in _KFAC:
            raise InputError(
                f"--approximation is for --form {' or '.join(_KFAC)}. Received: --form {self.form}."
            )

    def asked(self, engine: Any, model: str) -> dict[str, Any]:
        """Return the arguments of `Engine.fisher`."""
        likelihood, loss = self.law, None
        if self.kind == "empirical":
            loss = losses.named(engine, model, self.loss, self.from_logits)
        elif self._is_loss:
            likelihood = losses.named(engine, model, likelihood, self.from_logits)
        drawn = {"samples": self.samples, "seed": self.seed}
        return {
            "kind": self.kind, "likelihood": likelihood, "loss": loss, "wrt": self.wrt,
            "of": self.of, "variance": _variance(self.variance), "reduction": self.reduction,
            **{name: value for name, value in drawn.items() if value is not None},
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Found:
    """A form, and what is written, said and drawn of it.

    Attributes
    ----------
    wanted : Wanted
        What was asked for.
    fisher : Fisher
        Of the data.
    form : Form
        Computed.
    """

    wanted: Wanted
    fisher: Any
    form: Form

    @classmethod
    def of(cls, wanted: Wanted, fisher: Any, form: Form) -> Found:
        """Compute all that is written of a form."""
        found = cls(wanted, fisher, form)
        _ = found.arrays
        return found

    def write(self, model: str) -> None:
        """Write the file, with the name of the model's."""
        serialization.write(self.wanted.out, self.arrays, {"model": model, **self.facts()})

    @property
    def explained(self) -> str:
        """What the information is about: an output, its logits, or the loss."""
        return "loss" if self.wanted.kind == "empirical" else self.fisher.explained

    @property
    def complete(self) -> bool:
        """Whether all eigenvalues are to be had."""
        return not isinstance(self.form, Implicit)

    @functools.cached_property
    def top(self) -> tuple[np.ndarray, np.ndarray]:
        """The largest eigenvalues, the largest first, and their vectors (P, k)."""
        if not self.complete:
            return self.form.eigsh(min(self.wanted.top, self.form.shape[0] - 1))
        count = min(self.wanted.top, int(np.sum(self.eigenvalues > 0)))
        if not count:
            return np.zeros(0), np.zeros((self.form.shape[0], 0))
        return self.form.eigsh(count)

    @functools.cached_property
    def eigenvalues(self) -> np.ndarray:
        """All of them, the largest first, what is rounding set to zero; or the largest."""
        if not self.complete:
            return self.top[0]
        values = self.form.eigenvalues()[::-1]
        rounding = values.size * np.finfo("f8").eps * values.max(initial=0)
        return np.where(values > rounding, values, 0)

    @functools.cached_property
    def by_layer(self) -> dict[str, np.ndarray]:
        """The diagonal's entries of each layer, flat."""
        return pictures.by_layer(self.form)

    @functools.cached_property
    def traces(self) -> dict[str, float]:
        """The trace of each layer."""
        return {name: float(entries.sum()) for name, entries in self.by_layer.items()}

    @functools.cached_property
    def damped(self) -> dict[str, float]:
        """The effective dimension and the log-determinant, where they were asked for."""
        damping = self.wanted.damping
        if damping is None and self.wanted.form == "spectrum" and self.complete:
            damping = _DAMPING
        if damping is None:
            return {}
        return {
            "damping": damping,
            "logdet": self.form.logdet(damping),
            "effective_dimension": self.form.effective_dimension(damping),
        }

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """What is written, by name."""
        found = {"traces": np.array(list(self.traces.values())), **self._damped_arrays()}
        if self.wanted.form != "spectrum":
            return {**serialization.arrays(self.form), **found}
        columns, vectors = self.form.columns, self.top[1]
        found["eigenvalues"] = self.eigenvalues
        for key, place in columns.slices.items():
            found[f"vectors/{key}"] = vectors[place].T.reshape(
                vectors.shape[1], *columns.shape(key)
            )
        return {
            **found,
            "about/weights": np.array(columns.keys),
            "about/examples": np.array(self.form.examples),
            "about/reduction": np.array(self.wanted.reduction),
            "about/complete": np.array(self.complete),
        }

    def facts(self) -> dict[str, Any]:
        """Return what a reader of the arrays has to know."""
        import keras
        import tensorflow as tf

        from perjac._version import __version__

        wanted = self.wanted
        facts = {
            "form": wanted.form, "kind": wanted.kind, "explained": self.explained,
            "parameters": self.form.shape[0],
            "layers": list(self.traces), "perjac": __version__, "keras": keras.__version__,
            "tensorflow": tf.__version__, "from_logits": wanted.from_logits,
        }  # fmt: skip
        if wanted.kind == "empirical":
            facts["loss"] = wanted.loss or "compiled"
        else:
            facts["likelihood"] = wanted.law
            if wanted.law == "gaussian":
                facts["variance"] = wanted.variance or "1"
        if wanted.form in _KFAC:
            facts["approximation"] = wanted.approximation or APPROXIMATIONS[0]
        if wanted.kind == "sampled":
            facts |= {"samples": wanted.samples or 1, "seed": wanted.seed or 0}
        return facts

    def _damped_arrays(self) -> dict[str, np.ndarray]:
        found = {}
        for name, value in self.damped.items():
            found[name] = np.array(float(value))
            if isinstance(value, Estimate):
                found[f"{name}_error"] = np.array(value.standard_error)
        return found

    def lines(self) -> list[str]:
        """Return what there is to say, by the line."""
        whole = sum(self.traces.values())
        wanted = self.wanted
        said = [
            f"Wrote {_WRITTEN[wanted.form]} of {self.form.shape[0]:,} weights, from "
            f"{self.form.examples:,} examples, to {wanted.out}.",
            f"Explained: {self.explained}.",
            f"Trace: {whole:.4g}. By layer:",
        ]
        layers = sorted(self.traces, key=lambda name: -self.traces[name])
        width = max(len(name) for name in layers[:_LAYERS])
        for name in layers[:_LAYERS]:
            share = f"{self.traces[name] / whole:6.1%}" if whole else ""
            said.append(f"  {name:<{width}}  {self.traces[name]:<10.4g}{share}")
        if len(layers) > _LAYERS:
            said.append(f"  and {len(layers) - _LAYERS} more.")
        if wanted.form == "spectrum":
            told = ", ".join(f"{value:.4g}" for value in self.top[0][:_VALUES]) or "none above zero"
            zeros = int(np.sum(self.eigenvalues == 0)) if self.complete else 0
            said.append(f"Largest eigenvalues: {told}." + (f" Zero: {zeros:,}." if zeros else ""))
        if self.damped:
            damping, logdet, dimension = self.damped.values()
            said.append(
                f"With damping {damping:g}: effective dimension {_told(dimension)} of "
                f"{self.form.shape[0]:,}, log-determinant {_told(logdet)}."
            )
        return said

    def draw(self) -> list[pathlib.Path]:
        """Draw the pictures that were asked for beside the file; return where they are."""
        wanted = self.wanted
        law = wanted.loss or "its loss" if wanted.kind == "empirical" else wanted.law
        law += {"kronecker": ", KFAC", "eigenbasis": ", EKFAC"}.get(wanted.form, "")
        title = f"Fisher information ({wanted.kind}, {law}) of {self.form.examples:,} examples"
        drawn = {"traces": pictures.traces(self.by_layer, title)}
        if sum(self.traces.values()) > 0:
            drawn["diagonal"] = pictures.diagonal(self.by_layer, title)
            if wanted.form != "diagonal":
                drawn["spectrum"] = pictures.spectrum(
                    self.eigenvalues, self.damped.get("damping"), self.complete, title
                )
        paths = []
        for name, figure in drawn.items():
            path = wanted.out.with_name(f"{wanted.out.stem}-{name}.{wanted.figures}")
            figure.savefig(path, dpi=150, facecolor="white")
            paths.append(path)
        return paths


def _check(option: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        told = ", ".join(name for name in known if name)
        raise InputError(f"Expected --{option} as one of {told}. Received: {value!r}.")


def _variance(text: str | None) -> float | str:
    if text is None or text == "fitted":
        return text or 1.0
    try:
        return float(text)
    except ValueError:
        raise InputError(f"Expected --variance as a number or fitted. Received: {text}.") from None


def _told(value: float) -> str:
    if isinstance(value, Estimate):
        cut = f" (cut off: at most {value.truncation:.1g} more)" if value.truncation else ""
        return f"{float(value):.4g} ± {value.standard_error:.1g}{cut}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
