"""Parameter randomisation: a map that does not change with the weights explains no model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.ndimage
import scipy.stats
import tensorflow as tf

from perjac._core.backend import host
from perjac._core.graph import sites, walk
from perjac._drawing import new_figure
from perjac.engine import Engine
from perjac.errors import InputError
from perjac.saliency import _pictures
from perjac.saliency._bound import takes_model
from perjac.saliency.attribution import Attribution
from perjac.saliency.metrics.subject import in_rows, same_target

# scikit-image's window, and Wang et al. 2004's constants, of a range of 1.
_WINDOW, _K1, _K2 = 7, 0.01, 0.03


@dataclasses.dataclass(frozen=True)
class Randomisation:
    """How like their former selves maps are, as layer after layer is made random.

    Attributes
    ----------
    method : str
        Whose maps.
    layers : list of str
        From the top down; those above stay random.
    similarity : dict of str to array (layers, B), or (layers, B, C) for target "all"
        "spearman", "spearman_abs" (of absolute values), "pearson", and "ssim" of absolute values
        over the largest, channels summed; 1 means no change.
    threshold : float
        What the mean rank correlation must fall below.
    """

    method: str
    layers: list[str]
    similarity: dict[str, np.ndarray]
    threshold: float

    @property
    def mean(self) -> float:
        """The larger of the two mean rank correlations when all layers are random."""
        return float(max(np.mean(self.similarity[n][-1]) for n in ("spearman", "spearman_abs")))

    @property
    def passed(self) -> bool:
        """Whether the maps have changed."""
        return bool(self.mean < self.threshold)

    def __str__(self) -> str:
        width = max(len(name) for name in self.layers)
        head = " ".join(f"{name:>12}" for name in self.similarity)
        lines = [f"{'random down to':{max(width, 14)}} {head}"]
        for n, layer in enumerate(self.layers):
            means = " ".join(f"{v[n].mean():>12.3f}" for v in self.similarity.values())
            lines.append(f"{layer:{max(width, 14)}} {means}")
        verdict = "passed" if self.passed else "FAILED: the maps hardly depend on the weights"
        return "\n".join([*lines, f"{self.method}: {verdict}"])

    def figure(self) -> Any:
        """Draw the mean similarities, layer by layer; return a matplotlib Figure."""
        figure = new_figure(5, 3.2)
        axes = figure.subplots()
        for name, values in self.similarity.items():
            axes.plot(values.reshape(len(values), -1).mean(1), marker="o", label=name)
        axes.axhline(self.threshold, color="0.6", linewidth=0.8, linestyle="--")
        axes.set_xticks(range(len(self.layers)), self.layers, rotation=45, ha="right", fontsize=7)
        axes.set_ylabel("similarity")
        axes.set_title(f"{self.method}, weights random from the top", fontsize=9)
        axes.legend(fontsize=7)
        return figure


@takes_model
def parameter_randomisation(
    engine: Engine,
    x: Any,
    method: Callable[..., Attribution],
    target: Any = "predicted",
    *,
    of: Any = None,
    seed: int = 0,
    threshold: float = 0.9,
    data_format: str | None = None,
    **options: Any,
) -> Randomisation:
    """Make the weights random, layer by layer from the top, and compare maps with the first.

    A weight is made random by shuffling its entries, so that their sizes stay those of the model. A
    method whose maps stay alike does not look at the model. The weights are put back, also
    where the method fails.

    Parameters
    ----------
    engine, x, target, of
        As in `gradient`; the output that is predicted at first is explained throughout.
    method : callable
        Takes (engine, x, target, of=…), returns an Attribution.
    seed : int
        Of the shuffles.
    threshold : float
        `passed` where the mean Spearman correlation of the maps, and of their absolute values, is
        below this in the end.
    data_format : str, optional
        "channels_last" or "channels_first"; found out by the shape if left out.
    **options
        For the method.

    Returns
    -------
    Randomisation
        `layers`, `similarity` and `passed`; print it for a table.

    Raises
    ------
    InputError
        If the output depends on no weights.

    Notes
    -----
    Costs one run of the method for each layer, and one. The model must not be used by others at the
    same time.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential(
    ...     [keras.Input((6,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)])
    >>> x = np.arange(12, dtype="float32").reshape(2, 6) / 12
    >>> found = pj.saliency.metrics.parameter_randomisation(
    ...     pj.Engine(model), x, pj.saliency.gradient)
    >>> len(found.layers), found.similarity["spearman"].shape
    (2, (2, 2))

    References
    ----------
    Adebayo et al. 2018, Sanity Checks for Saliency Maps, section 3, cascading randomisation.
    """
    layers = _layers(engine, x, of)
    there = method(engine, x, target, of=of, **options)
    fixed = same_target(there, target)
    generator = np.random.default_rng(seed)
    found: list[dict[str, np.ndarray]] = []
    variables = [v for group in layers.values() for v in group]
    with _put_back(variables):
        for group in layers.values():
            for variable in group:
                mixed = generator.permutation(variable.numpy().ravel())
                variable.assign(tf.reshape(mixed, variable.shape))
            now = method(engine, x, fixed, of=of, **options)
            found.append(similarity(there, now, data_format))
    together = {name: np.stack([one[name] for one in found]) for name in found[0]}
    return Randomisation(there.method, list(layers), together, threshold)


@contextlib.contextmanager
def _put_back(variables: Sequence[tf.Variable]) -> Iterator[None]:
    kept = [tf.identity(v) for v in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)


def _layers(engine: Engine, x: Any, of: Any) -> dict[str, list[tf.Variable]]:
    """Return the weights on the way to the output by layer, the last to meet the data first."""
    traced, names = engine._traces.of(engine._traces.prepare(x))
    program, weights = traced.program, engine._traces.weights
    needed = walk.upstream(program, [names.head(of)])
    at = {op.name: n for n, op in enumerate(program.graph.get_operations())}
    last: dict[int, int] = {}
    for site in sites.flow(program).sites:
        if site.operation in needed:
            for number in site.variables:
                last[number] = max(last.get(number, -1), at[site.operation])
    wanted = set(weights.trainable) & last.keys() or set(last)
    groups: dict[str, list[tf.Variable]] = {}
    for number in sorted(wanted, key=lambda n: -last[n]):
        layer = weights.keys[number].rpartition("/")[0] or weights.keys[number]
        groups.setdefault(layer, []).append(host.tf_variable(weights.variables[number]))
    if not groups:
        raise InputError("The output depends on no weights, so there are none to make random.")
    return groups


def similarity(
    one: Attribution, other: Attribution, data_format: str | None = None
) -> dict[str, np.ndarray]:
    """Return how alike the maps of two attributions are, each (B,), or (B, C) for target "all"."""
    pairs = []  # of each input looked at: (B, M, *shape), and its channels' axis
    for name in one.inputs:
        axis = _pictures.channel_axis(one.x_of(name).shape[1:], data_format)
        whole = one.maps_of(name).ndim - 2 == one.x_of(name).ndim - 1
        pairs.append((one.maps_of(name), other.maps_of(name), axis if whole else None))
    flat = [np.concatenate([in_rows(p[n]) for p in pairs], 2) for n in (0, 1)]
    found = {
        "spearman": correlation(*(scipy.stats.rankdata(f, axis=-1) for f in flat)),
        "spearman_abs": correlation(*(scipy.stats.rankdata(np.abs(f), axis=-1) for f in flat)),
        "pearson": correlation(*flat),
        "ssim": np.mean([_structure(a, b, axis) for a, b, axis in pairs], 0),
    }
    return found if one.for_all else {name: v[:, 0] for name, v in found.items()}


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of (..., n) and (..., n).

    Where one of them is constant: 1 if the other is too, else 0.
    """
    a, b = (v - v.mean(-1, keepdims=True) for v in (a, b))
    lengths = [np.linalg.norm(v, axis=-1) for v in (a, b)]
    bottom = lengths[0] * lengths[1]
    same = (lengths[0] == 0) & (lengths[1] == 0)
    return np.where(bottom == 0, same, (a * b).sum(-1) / np.where(bottom == 0, 1, bottom))


def _structure(a: np.ndarray, b: np.ndarray, axis: int | None) -> np.ndarray:
    """Return the mean structural similarity of maps (B, M, *shape), (B, M): Wang et al. 2004."""
    a, b = (np.abs(v if axis is None else v.sum(axis)).astype("f8") for v in (a, b))
    axes = tuple(range(2, a.ndim))
    a, b = (
        v / np.where(v.max(axes, keepdims=True) == 0, 1, v.max(axes, keepdims=True)) for v in (a, b)
    )
    window = [1, 1, *(min(_WINDOW, n) for n in a.shape[2:])]

    def mean(v: np.ndarray) -> np.ndarray:
        return scipy.ndimage.uniform_filter(v, window)  # type: ignore[arg-type]

    count = np.prod(window)
    sample = count / max(count - 1, 1)  # unbiased, as in scikit-image
    means = mean(a), mean(b)
    variances = [sample * (mean(v * v) - m * m) for v, m in zip((a, b), means, strict=True)]
    covariance = sample * (mean(a * b) - means[0] * means[1])
    c1, c2 = _K1**2, _K2**2
    top = (2 * means[0] * means[1] + c1) * (2 * covariance + c2)
    bottom = (means[0] ** 2 + means[1] ** 2 + c1) * (sum(variances) + c2)
    # Windows that reach over the edge do not count, as in scikit-image.
    inside = tuple(slice((w - 1) // 2, n - w // 2) for w, n in zip(window, a.shape, strict=True))
    return (top / bottom)[inside].mean(axes)
