"""Find wrong labels: change some of the digits' labels on purpose, and see who finds them.

    python examples/label_errors.py
    python examples/label_errors.py --flip 0.05 0.1 0.2 --seeds 0 1 2 3 4

For each share of changed labels and each seed, five small networks are trained, each on four fifths
of the digits with the labels as they then are, and judge the fifth that they have not seen. The
labels with the largest gradients are the suspects. It prints how many of them are wrong indeed,
beside a ranking by loss and by chance, and saves a picture of the first run's.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import functools

import keras
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import perjac as pj

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
SHARES = (0.05, 0.1, 0.2, 0.3)


def digits():
    """Return scikit-learn's 1797 digits, (N, 8, 8, 1) from 0 to 1, and their labels."""
    found = load_digits()
    return (found.images[..., None] / 16).astype("float32"), found.target


def changed(labels, share, seed):
    """Return the labels with a share of them changed to another digit, each as likely."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(labels), round(share * len(labels)), replace=False)
    wrong = labels.copy()
    wrong[chosen] = (wrong[chosen] + rng.integers(1, 10, len(chosen))) % 10
    return wrong


def fit(x, y, epochs):
    """Train a small network, and stop before it has learnt the labels by heart."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, name="logits"),
        ]
    )
    model.compile(keras.optimizers.Adam(2e-3), LOSS)
    model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
    return model


def found_by(order, wrong):
    """Return, for every number of labels looked at in this order, how many wrong ones are there."""
    return np.cumsum(wrong[order])


def tell(rankings, wrong):
    """Print what each ranking finds among the first labels looked at."""
    print(f"  {'looked at':>16}" + "".join(f"{name:>24}" for name in rankings))
    for share in SHARES:
        count = round(share * len(wrong))
        cells = [found_by(order, wrong)[count - 1] for order in rankings.values()]
        told = [f"{n / wrong.sum():.1%} found, {n / count:.0%} right" for n in cells]
        print(f"  {count:>9} ({share:>3.0%}) " + "".join(f"{text:>24}" for text in told))


def draw(x, y, proposed, rankings, wrong, path):
    """Draw the top suspects, and how many wrong labels are found as one looks at more."""
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.1, 1))
    order = rankings["by norm"]
    for axes, n in zip(left.subplots(5, 8).ravel(), order, strict=False):
        axes.imshow(x[n, :, :, 0], cmap="gray_r", interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        colour = "#b2182b" if wrong[n] else "#555555"
        axes.set_title(f"given {y[n]}, says {proposed[n]}", fontsize=8.5, color=colour)
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=2)
    left.suptitle("The 40 most doubtful labels, by gradient norm (red: changed on purpose)")
    axes = right.subplots()
    looked = np.arange(1, len(wrong) + 1) / len(wrong)
    styles = {"by norm": "#b2182b", "by loss": "#2166ac", "by chance": "#999999"}
    for name, ranking in rankings.items():
        axes.plot(looked, found_by(ranking, wrong) / wrong.sum(), color=styles[name], label=name)
    axes.axvline(wrong.mean(), color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel="share of all labels looked at", ylabel="share of the changed labels found")
    axes.set(xlim=(0, 0.5), ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flip", type=float, nargs="+", default=[0.1], help="shares to change")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--out", default="label_errors.png", help="the picture of the first run")
    options = parser.parse_args()

    x, labels = digits()
    runs = [(share, seed) for share in options.flip for seed in options.seeds]
    for share, seed in runs:
        keras.utils.set_random_seed(seed)
        y = changed(labels, share, seed)
        wrong = y != labels
        suspects = pj.data.label_errors(
            functools.partial(fit, epochs=options.epochs), x, y, folds=options.folds, seed=seed
        )
        rankings = {
            "by norm": suspects.indices,
            "by loss": np.argsort(-suspects.losses, kind="stable"),
            "by chance": np.random.default_rng(seed).permutation(len(y)),
        }
        print(f"{wrong.sum()} of {len(y)} labels changed ({share:.0%}), seed {seed}:")
        tell(rankings, wrong)
        if (share, seed) == runs[0]:
            draw(x, y, suspects.outputs.argmax(1), rankings, wrong, options.out)
            print(f"  Picture: {options.out}")


if __name__ == "__main__":
    main()
