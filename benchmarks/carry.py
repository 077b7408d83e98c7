"""perjac's compiled programs, with what it takes to run and check them without TensorFlow.

    python benchmarks/carry.py FOLDER --models mlp cnn

writes programs, weights, inputs, what the answers must be, the harness, and the four files of
perjac that run a program. There, with JAX and NumPy (torch, BackPACK, Opacus and Keras if they are
to take part):

    python FOLDER/benchmarks/run.py --carried FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import sys
from typing import Any

from jobs import JOBS
from models import MODELS

_HERE = pathlib.Path(__file__).resolve().parent
# What the programs are called in `Engine.export`.
_PROGRAMS: dict[str, dict[str, Any]] = {
    "weights": {"job": "jacobian"},
    "inputs": {"job": "jacobian", "wrt": "inputs"},
    "gradients": {"job": "gradients"},
    "gradient_norms": {"job": "norms"},
}
_MODELS = ("mlp", "cnn", "resnet50", "transformer")
# Of fewer examples, where the answer would fill this machine: 0.9 GB of every ResNet50.
_FEWER = {("resnet50", "weights"): 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(_MODELS),
                        metavar="MODEL", help=", ".join(MODELS))  # fmt: skip
    parser.add_argument("--jobs", nargs="+", choices=_PROGRAMS, default=list(_PROGRAMS),
                        metavar="JOB", help=", ".join(_PROGRAMS))  # fmt: skip
    parser.add_argument("--batch", type=int, help="examples, in place of each model's number")
    options = parser.parse_args()
    carry(options.folder, options.models, options.jobs, options.batch)


def carry(folder: pathlib.Path, models: list[str], jobs: list[str], batch: int | None) -> None:
    """Write a folder to carry along."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the same programs whatever this machine has
    sys.path.insert(0, str(_HERE / "workers"))
    import tensorflow as tf

    # Or XLA would be free to multiply in TensorFloat-32 on a card, which the peers are kept from.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    folder.mkdir(parents=True, exist_ok=True)
    _runner(folder)
    for name in models:
        place = folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        about = _carried(place, name, [job for job in jobs if _asks(name, job)], batch)
        (place / "carried.json").write_text(json.dumps(about, indent=1) + "\n")


def _asks(name: str, job: str) -> bool:
    # A full Jacobian of ResNet50 is not among its jobs elsewhere; here it is, of few examples.
    model = MODELS[name]
    return not (model.tokens and job == "inputs") and (model.asks(job) or (name, job) in _FEWER)


def _carried(place: pathlib.Path, name: str, jobs: list[str], batch: int | None) -> dict[str, Any]:
    """Write a model's programs, and return what is to be known of them."""
    import by_perjac
    import numpy as np
    from keras_net import LOSS, net
    from serve import Work, sketched
    from write_work import write

    import perjac as pj

    examples = batch or MODELS[name].examples
    write(name, examples, str(place / "work.npz"))
    whole = Work.read(str(place / "work.npz"))
    engine = pj.Engine(net(whole))
    about: dict[str, Any] = {"examples": examples, "jobs": {}}
    for job in jobs:
        print(f"{JOBS[job].title}, {name} …", flush=True)
        work = whole.first(_FEWER.get((name, job), examples))
        options = dict(_PROGRAMS[job])
        given = [work.x]
        if options["job"] in ("gradients", "norms"):
            given, options["loss"] = [work.x, work.y], LOSS
        engine.export(place / f"{job}.stablehlo", *given, **options)
        way = by_perjac.JOBS[job](work)[""]
        answer = way.canonical(way.run())
        about["jobs"][job] = {
            "examples": len(work.x),
            "order": _order(engine, job, work.x),
            "expected": [sketched(np.asarray(array)) for array in answer],
        }
    return about


def _order(engine: Any, job: str, x: Any) -> list[str]:
    """Return the names of a program's results, in the order that peers give them."""
    if job == "gradient_norms":
        return ["norms"]
    return list(engine.jacobian(x, outputs=0, wrt="inputs" if job == "inputs" else "weights"))


def _runner(folder: pathlib.Path) -> None:
    """Copy what runs on the other side."""
    import perjac

    ours = pathlib.Path(perjac.__file__).parent
    (folder / "perjac").mkdir(exist_ok=True)
    for name in ("__init__.py", "_version.py", "errors.py", "pjrt.py"):
        shutil.copy(ours / name, folder / "perjac")
    if folder.resolve() / "benchmarks" != _HERE:
        kept_here = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(_HERE, folder / "benchmarks", ignore=kept_here, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
