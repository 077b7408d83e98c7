"""perjac as compiled programs, run by JAX's PJRT client: no TensorFlow on this side."""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import numpy as np
import serve
from by_jax import DEVICE
from serve import Way, Ways, Work

_CARRIED = pathlib.Path(sys.argv[1]).resolve().parent
sys.path.insert(0, str(_CARRIED.parent))  # perjac's few files that this side needs lie there

from perjac import __version__, pjrt  # noqa: E402


def _job(name: str, about: dict):
    def ways(work: Work) -> Ways:
        program = pjrt.load(_CARRIED / f"{name}.stablehlo")
        specs = program.manifest["inputs"]
        with jax.enable_x64(True):  # labels may be int64, and are not to be turned in every call
            inputs = [
                jax.device_put(data.astype(spec["dtype"]))
                for data, spec in zip((work.x, work.y), specs, strict=False)
            ]

        def canonical(found):
            return [np.asarray(found[key]) for key in about["order"]]

        on_card = DEVICE.name != "cpu"
        return {
            "": Way(
                lambda: jax.block_until_ready(program(*inputs)),
                canonical,
                needs_mb=(lambda: program.memory / 1e6) if on_card else None,
            )
        }

    return ways


_about = json.loads((_CARRIED / "carried.json").read_text())
JOBS = {name: _job(name, about) for name, about in _about["jobs"].items()}

if __name__ == "__main__":
    serve.serve(JOBS, {"perjac": __version__, "jax": jax.__version__}, DEVICE)
