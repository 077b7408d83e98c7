"""Several methods under the same metrics: a table and a figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from perjac._drawing import new_figure
from perjac.engine import Engine
from perjac.errors import InputError, UnknownNameError, nearest
from perjac.saliency._bound import takes_model
from perjac.saliency.attribution import Attribution
from perjac.saliency.metrics.fidelity import infidelity
from perjac.saliency.metrics.randomisation import parameter_randomisation
from perjac.saliency.metrics.removal import deletion, insertion
from perjac.saliency.metrics.sensitivity import max_sensitivity

# Which end of each metric is the better one.
BETTER = {
    "deletion": "low",
    "insertion": "high",
    "infidelity": "low",
    "max_sensitivity": "low",
    "parameter_randomisation": "low",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Methods by metrics: means over examples and their standard errors.

    Attributes
    ----------
    scores : dict of str to dict of str to array (B, ...)
        Method to metric to its value for each example.
    results : dict of str to dict of str to object
        What the metrics returned.
    attributions : dict of str to Attribution
        What the methods returned.
    """

    scores: dict[str, dict[str, np.ndarray]]
    results: dict[str, dict[str, Any]]
    attributions: dict[str, Attribution]

    @property
    def metrics(self) -> list[str]:
        """The metrics' names."""
        return list(next(iter(self.scores.values())))

    def mean(self, method: str, metric: str) -> float:
        """Return the mean over examples."""
        return float(np.mean(self.scores[method][metric]))

    def standard_error(self, method: str, metric: str) -> float:
        """Return that of the mean, from how far examples are apart; NaN for one example."""
        values = self.scores[method][metric]
        each = values.reshape(len(values), -1).mean(1)
        return float(each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else float("nan")

    def best(self, metric: str) -> str:
        """Return the method that does best."""
        sign = 1 if BETTER[metric] == "low" else -1
        return min(self.scores, key=lambda method: sign * self.mean(method, metric))

    def __str__(self) -> str:
        width = max(len(method) for method in self.scores)
        heads = [f"{metric} ({BETTER[metric]})" for metric in self.metrics]
        columns = [max(len(head), 20) for head in heads]
        lines = [
            " " * width + "  " + "  ".join(f"{h:>{c}}" for h, c in zip(heads, columns, strict=True))
        ]
        for method in self.scores:
            cells = []
            for metric, column in zip(self.metrics, columns, strict=True):
                star = "*" if self.best(metric) == method else " "
                mean, error = self.mean(method, metric), self.standard_error(method, metric)
                cells.append(f"{f'{mean:.3g} ± {error:.1g}{star}':>{column}}")
            lines.append(f"{method:{width}}  " + "  ".join(cells))
        return "\n".join([*lines, "Means over examples ± standard errors; * does best."])

    def figure(self) -> Any:
        """Draw a panel for each metric, a bar for each method; return a matplotlib Figure."""
        metrics, methods = self.metrics, list(self.scores)
        figure = new_figure(2.6 * len(metrics) + 1, 0.35 * len(methods) + 1.1)
        grid = figure.subplots(1, len(metrics), squeeze=False, sharey=True).ravel()
        for axes, metric in zip(grid, metrics, strict=True):
            means = [self.mean(method, metric) for method in methods]
            errors = [np.nan_to_num(self.standard_error(method, metric)) for method in methods]
            colours = ["#2166ac" if m == self.best(metric) else "0.7" for m in methods]
            axes.barh(range(len(methods)), means, xerr=errors, color=colours)
            axes.set_title(f"{metric}\n{BETTER[metric]} is good", fontsize=8)
            axes.tick_params(labelsize=7)
        grid[0].set_yticks(range(len(methods)), methods)
        grid[0].invert_yaxis()
        return figure


@takes_model
def compare(
    engine: Engine,
    x: Any,
    methods: Sequence[str] | Mapping[str, Callable[..., Attribution]] = (
        "gradient",
        "input_x_gradient",
        "integrated_gradients",
        "occlusion",
    ),
    target: Any = "predicted",
    *,
    of: Any = None,
    metrics: Sequence[str] = ("deletion", "insertion", "infidelity", "max_sensitivity"),
    baseline: Any = 0.0,
    samples: int = 20,
    seed: int = 0,
) -> Comparison:
    """Run several methods on the same examples and compare them under the same metrics.

    Parameters
    ----------
    engine, x, target, of
        As in `gradient`.
    methods : sequence of str, or mapping of str to callable
        Names of methods; or methods of your own, which take (engine, x, target, of=…), by name.
    metrics : sequence of str
        Of "deletion", "insertion", "infidelity" (of removals, scaled), "max_sensitivity" and
        "parameter_randomisation" (the Spearman correlation in the end).
    baseline : number, array (*input_shape) or (B, *input_shape), or dict of these
        For deletion, insertion and infidelity.
    samples, seed : int
        For infidelity (five times as many) and max-sensitivity.

    Returns
    -------
    Comparison
        Print it for a table; `figure()` draws it.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> engine = pj.Engine(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))
    >>> x = np.arange(8, dtype="float32").reshape(2, 4) - 3
    >>> found = pj.saliency.metrics.compare(
    ...     engine, x, ["gradient", "input_x_gradient"], metrics=["deletion"])
    >>> found.scores["gradient"]["deletion"].shape
    (2,)
    """
    chosen = _methods(methods)
    for metric in metrics:
        if metric not in BETTER:
            raise UnknownNameError(f"There is no metric {metric!r}. {nearest(metric, BETTER)}")
    scores: dict[str, dict[str, np.ndarray]] = {}
    results: dict[str, dict[str, Any]] = {}
    attributions = {}
    for name, method in chosen.items():
        found = attributions[name] = method(engine, x, target, of=of)
        results[name], scores[name] = {}, {}
        for metric in metrics:
            if metric in ("deletion", "insertion"):
                run = deletion if metric == "deletion" else insertion
                result: Any = run(engine, x, found, of=of, baseline=baseline)
                score = result.auc
            elif metric == "infidelity":
                result = infidelity(
                    engine, x, found, of=of, baseline=baseline, perturbation="removal",
                    samples=5 * samples, seed=seed, scaled=True,
                )  # fmt: skip
                score = result.values
            elif metric == "max_sensitivity":
                result = max_sensitivity(
                    engine, x, method, target, of=of, samples=max(samples, 2), seed=seed
                )
                score = result.values
            else:
                result = parameter_randomisation(engine, x, method, target, of=of, seed=seed)
                score = result.similarity["spearman"][-1]
            results[name][metric], scores[name][metric] = result, np.asarray(score)
    return Comparison(scores, results, attributions)


def _methods(given: Any) -> dict[str, Callable[..., Attribution]]:
    """Return methods by name."""
    if isinstance(given, Mapping):
        chosen = dict(given)
    else:
        from perjac.saliency._registry import named  # among what this module is part of

        chosen = {name: named(name) for name in given}
    if not chosen:
        raise InputError("Expected methods= to name at least one. Received: none.")
    return chosen
