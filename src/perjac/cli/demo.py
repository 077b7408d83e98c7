"""The demo: train a small net on real digits, then look at it through its Jacobians."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from perjac._drawing import new_figure
from perjac.cli.html import picture, render
from perjac.errors import missing_extra
from perjac.fisher.figures import spectrum as spectrum_figure
from perjac.fisher.figures import traces as traces_figure
from perjac.saliency import figures, gradient

_TEST, _SHOWN, _GALLERY = 360, 6, 10
# Digits whose exact spectrum is drawn: the Gram matrix of their 300 rows is a second of work.
_SPECTRUM, _DAMPING = 30, 1e-3


def run(out: pathlib.Path, say: Callable[[str], None]) -> None:
    """Train, explain, and write the pictures and report.html to an existing folder.

    Raises
    ------
    MissingExtraError
        If scikit-learn or matplotlib is not installed.
    """
    from perjac import Engine

    x, labels = _digits()
    start = time.perf_counter()
    say(f"Training on {len(x) - _TEST} digits …")
    model = _train(x[:-_TEST], labels[:-_TEST])
    x, labels = x[-_TEST:], labels[-_TEST:]
    trained = time.perf_counter() - start
    model.save(out / "model.keras")
    np.save(out / "digits.npy", x)

    engine = Engine(model)
    logits = np.asarray(engine.outputs(x))
    accuracy = float(np.mean(logits.argmax(1) == labels))
    say(f"Trained in {trained:.0f} s; {accuracy:.1%} of {_TEST} unseen digits right.")
    say("Saliency maps of all ten classes …")
    shown = [int(np.flatnonzero(labels == digit)[0]) for digit in range(_SHOWN)]
    maps = gradient(engine, x[shown], target="all")
    classes = picture(_class_grid(maps, labels[shown]), out / "classes.png")
    say("Jacobian norms …")
    engine.jacobian(x).norms()  # traces and compiles; the next call is what every later one costs
    start = time.perf_counter()
    jac = engine.jacobian(x)
    norms = np.asarray(jac.norms())
    took = time.perf_counter() - start
    gallery = picture(_gallery(x, labels, logits, norms, "‖J‖"), out / "norms.png")
    right = logits.argmax(1) == labels
    spread = picture(_spread(norms, right), out / "spread.png")
    say("Gradients of each digit's loss …")
    grads = engine.gradients(x, labels, loss=_loss())
    pulls = np.asarray(grads.norms())
    hardest = picture(_gallery(x, labels, logits, pulls, "‖g‖"), out / "gradients.png")
    say("Fisher information …")
    information = engine.fisher(x, likelihood="categorical").diagonal()
    traces = picture(traces_figure(information), out / "fisher-traces.png")
    low_rank = engine.fisher(x[:_SPECTRUM], likelihood="categorical").low_rank()
    drawn = spectrum_figure(low_rank, damping=_DAMPING)
    spectrum = picture(drawn, out / "fisher-spectrum.png")
    say("Verifying against a plain float64 loop …")
    check, table = engine.verify(x[:4]), engine.inspect()
    page = render(
        "report.html",
        train=len(_digits()[0]) - _TEST,
        test=_TEST,
        facts=[
            ("Accuracy, unseen digits", f"{accuracy:.1%}"),
            ("Weights", f"{jac.shape[2]:,}"),
            ("Jacobian", " × ".join(f"{n:,}" for n in jac.shape)),
            ("All its norms", f"{1000 * took:.0f} ms"),
            ("Training", f"{trained:.1f} s"),
        ],
        classes=classes,
        percentile=figures.PERCENTILE,
        norms=gallery,
        spread=spread,
        told=_told(norms, right),
        hardest=hardest,
        share=f"{_share(pulls):.0%}",
        traces=traces,
        spectrum=spectrum,
        few=_SPECTRUM,
        damping=_DAMPING,
        dimension=f"{low_rank.effective_dimension(_DAMPING):.0f}",
        weights=f"{low_rank.columns.count:,}",
        summary=table.summary,
        columns=table.columns,
        cells=table.cells(),
        verdict=str(check),
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    say(str(check))
    say(f"Report: {out / 'report.html'}")


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits, shuffled the same way every time: (N, 8, 8, 1) in 0 to 1."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as failure:
        raise missing_extra("The demo", "demo", failure) from failure
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    return (digits.images[order, :, :, None] / 16).astype("float32"), digits.target[order]


def _train(x: np.ndarray, labels: np.ndarray) -> Any:
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ],
        name="digits",
    )
    model.compile(optimizer=keras.optimizers.Adam(2e-3), loss=_loss())
    model.fit(x, labels, batch_size=64, epochs=12, verbose=0)  # pyright: ignore
    return model


def _loss() -> Any:
    import keras

    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _share(norms: np.ndarray) -> float:
    """Return which share of all norms the hardest tenth of the examples has."""
    hardest = np.sort(norms)[::-1][: max(len(norms) // 10, 1)]
    return float(hardest.sum() / norms.sum())


def _class_grid(maps: Any, labels: np.ndarray) -> Any:
    """Rows of digits, columns of classes; the class predicted framed, the true one dotted."""
    values, x = np.asarray(maps.values), np.asarray(maps.x)
    predicted = np.asarray(maps.outputs).argmax(1)
    count, classes = values.shape[:2]
    figure = new_figure(1.0 * (classes + 1), 1.06 * count + 0.25)
    grid = figure.subplots(count, classes + 1, squeeze=False)
    for n, row in enumerate(grid):
        figures.show(row[0], x[n])
        end = figures.limit(values[n].sum(-1))
        for c, axes in enumerate(row[1:]):
            figures.overlay(axes, values[n, c], end)
            if c == predicted[n]:
                for spine in axes.spines.values():
                    spine.set(visible=True, linewidth=2.5, edgecolor="#1c2430")
            if n == 0:
                axes.set_title(str(c), fontsize=12)
            if c == labels[n]:
                axes.set_xlabel("●", fontsize=7, labelpad=2)
    grid[0, 0].set_title("input", fontsize=12)
    return figure


def _gallery(
    x: np.ndarray, labels: np.ndarray, logits: np.ndarray, norms: np.ndarray, name: str
) -> Any:
    order = np.argsort(-norms)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    figure = new_figure(1.15 * _GALLERY, 3.9)
    grid = figure.subplots(2, _GALLERY)
    for row, chosen in zip(grid, (order[:_GALLERY], order[::-1][:_GALLERY]), strict=True):
        for axes, n in zip(row, chosen, strict=True):
            figures.show(axes, x[n])
            guess = logits[n].argmax()
            told = f"{name} = {norms[n]:.3g}\n{guess} ({shares[n, guess]:.0%})"
            wrong = guess != labels[n]
            axes.set_xlabel(
                told + (f"\ntrue: {labels[n]}" if wrong else ""),
                fontsize=9.5,
                color="#b2182b" if wrong else "#1c2430",
            )
    grid[0, 0].set_title("largest", fontsize=11, loc="left")
    grid[1, 0].set_title("smallest", fontsize=11, loc="left")
    return figure


def _spread(norms: np.ndarray, right: np.ndarray) -> Any:
    figure = new_figure(8, 2.6)
    axes = figure.subplots()
    bins = np.linspace(norms.min(), norms.max(), 31)
    axes.hist(norms[right], bins, color="#92b4d4", label="right")
    axes.hist(norms[~right], bins, color="#b2182b", label="wrong")
    axes.set_xlabel("norm of the example's Jacobian")
    axes.set_ylabel("examples")
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _told(norms: np.ndarray, right: np.ndarray) -> str:
    """Say what the norms and the mistakes have to do with each other, in this very run."""
    text = f"Median norm of the {right.sum()} digits it gets right: {np.median(norms[right]):.0f}"
    if right.all():
        return text + "; it gets none wrong."
    return text + f"; of the {(~right).sum()} it gets wrong: {np.median(norms[~right]):.0f}."
