"""Write what all peers' processes read: a model's weights, and inputs and labels.

python write_work.py MODEL EXAMPLES FILE
"""

from __future__ import annotations

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import keras
import numpy as np
from models import MODELS


def write(name: str, examples: int, file: str) -> None:
    """Write one work file."""
    keras.utils.set_random_seed(0)
    model = MODELS[name]
    net = model.keras()
    rng = np.random.default_rng(1)
    # Biases of zero would hide who loses them.
    weights = {
        f"w{n}": w if w.ndim > 1 else (w + 0.1 * rng.standard_normal(w.shape)).astype("f4")
        for n, w in enumerate(net.get_weights())
    }
    about = {
        "model": name,
        "weights": len(weights),
        "shape": model.shape,
        "layers": model.layers,
        "outputs": net.output_shape[-1],
    }
    y = rng.integers(0, net.output_shape[-1], examples)
    np.savez(file, about=json.dumps(about), x=model.batch(examples), y=y, **weights)


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]), sys.argv[3])
