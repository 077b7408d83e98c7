"""perjac beside TensorFlow's own ways, on one machine, in one run.

    python benchmarks/run.py --jobs weights inputs --models cnn --repeats 9

prints a table, and writes it with every single time to benchmarks/results. Absolute times are
worth little from machine to machine: compare only inside a row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from jobs import JOBS
from models import EXAMPLES, MODELS, batch
from timing import Timed, compare

import perjac as pj


def main() -> None:
    options = _options()
    tf.get_logger().setLevel("ERROR")  # pfor tells of every while loop
    keras.utils.set_random_seed(0)
    results = []
    for model_name in options.models:
        model = MODELS[model_name]()
        x = batch(model, options.batch or EXAMPLES.get(model_name, 128))
        for job in options.jobs:
            if job == "inputs" and x.dtype.kind == "i":
                continue  # there is no derivative by tokens
            print(f"{job} of {model_name}, {len(x)} examples …", flush=True)
            timed = compare(JOBS[job](model, x), options.repeats)
            results.append({"job": job, "model": model_name, "examples": len(x), "ways": timed})
            print(_table(results[-1:]), "\n", flush=True)
    _write(options.out, results, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, help="examples (default: 128; 16 for the transformer)")
    here = pathlib.Path(__file__).parent
    parser.add_argument("--out", type=pathlib.Path, default=here / "results", help="a folder")
    return parser.parse_args()


def _table(results: list[dict]) -> str:
    """Return the results as a Markdown table: medians, and how many times perjac's they are."""
    lines = [
        "| job | model, examples | way | median, ms | range, ms | × perjac | first call, ms |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for result in results:
        ours = result["ways"][0].median_ms
        for way in result["ways"]:
            model = f"{result['model']}, {result['examples']}"
            lines.append(f"| {result['job']} | {model} | {_cells(way, ours)} |")
    return "\n".join(lines)


def _cells(way: Timed, ours: float | None) -> str:
    if way.left_out:
        return f"{way.way} | left out: {way.left_out} | | |"
    low, high = min(way.repeats_ms), max(way.repeats_ms)
    ratio = f"{way.median_ms / ours:.2f}" if ours else ""
    return f"{way.way} | {way.median_ms:.1f} | {low:.1f}–{high:.1f} | {ratio} | {way.first_ms:.0f}"


def _machine() -> dict[str, str]:
    devices = [
        tf.config.experimental.get_device_details(d).get("device_name", d.name)
        for d in tf.config.list_physical_devices("GPU")
    ]
    return {
        "device": ", ".join(devices) or f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "perjac": pj.__version__,
    }


def _write(folder: pathlib.Path, results: list[dict], options: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    machine = _machine()
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    heading = f"Medians of {options.repeats} interleaved repeats: {about}."
    (folder / "latest.md").write_text(f"{heading}\n\n{_table(results)}\n")
    for result in results:
        result["ways"] = [dataclasses.asdict(way) for way in result["ways"]]
    record = {"machine": machine, "results": results}
    (folder / "latest.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"Written: {folder / 'latest.md'} and latest.json")


if __name__ == "__main__":
    main()
