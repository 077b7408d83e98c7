"""Random models, each with five examples, and whether an engine is right on them in any order.

    python tests/random_models.py --seeds 0:500

asks about many in a process of their own, which may crash, and prints what came out of it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("PERJAC_CACHE", "off")

import keras
import numpy as np
import oracle
import tensorflow as tf
from keras import layers
from models import Floats, Ids, Subject, randomise
from random_layers import ACTIVATIONS, Chain, grow, only_layers, ordinary
from zoo.entry import policy

import perjac as pj

DTYPES = ["float32"] * 9 + ["float64"] * 9 + ["mixed_float16", "mixed_bfloat16"]
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "mixed_float16": 0.1, "mixed_bfloat16": 0.4}
# What rounding may make of an input: the oracle's answer to such a change tells how well its
# question is conditioned. A maximum of two equal numbers is not at all.
NUDGE = {"float64": 1e-13, "float32": 1e-6, "mixed_float16": 1e-3, "mixed_bfloat16": 8e-3}
SHAPES = [
    (4,), (6,), (4, 3), (6, 2), (7, 1), (5, 4), (5, 4, 2), (6, 6, 1), (4, 6, 3), (8, 5, 2),
    (3, 4, 4, 2),
]  # fmt: skip
ALIKE = ("duplicates", "near duplicates", "zeros", "dim", "hardly anything", "huge", "normal")
ORDERS = ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3], [3, 1, 0, 4, 2])
FAMILIES = ("any", "ordinary")


@dataclasses.dataclass
class Example:
    """A random model: what an engine takes, five examples, and how they were drawn."""

    seed: int
    subject: Subject
    dtype: str
    about: str  # kind of model, type, kind of batch: to be read by people


@dataclasses.dataclass
class Outcome:
    """What came out of one model."""

    seed: int
    # right, wrong, undecided (ill-conditioned), refused, error, crash, or "no reference" where
    # TensorFlow itself does not differentiate the model or gives no finite numbers.
    kind: str
    about: str = ""
    detail: str = ""
    error: float = 0.0
    weights: int = 0
    on_tape: int = 0
    seconds: float = 0.0


# Models.


def build(seed: int, family: str = "any") -> Example:
    """Return the random model of a seed."""
    r = random.Random(f"{family} {seed}")
    if family == "ordinary":
        return _ordinary(r, seed)
    dtype = r.choice(DTYPES)
    kind = r.choice(["functional"] * 5 + ["sequential", "subclassed", "function"])
    with policy(dtype) as floatx:
        inputs = _inputs(r, 1 if kind == "sequential" else r.choice([1, 1, 1, 1, 2]))
        if kind == "sequential":
            program, output = _sequential(r, inputs[0])
        else:
            program, output = _program(r, inputs)
        subject = _subject(kind, inputs, program, output)
    alike = r.choice(ALIKE if dtype in ("float64", "float32") else ALIKE[:5])
    return _finished(r, seed, subject, inputs, dtype, floatx, f"{kind} {dtype} {alike}", alike)


def _ordinary(r: random.Random, seed: int) -> Example:
    """Return a float32 model of recurrent, dilated, separable and dense layers."""
    with policy("float32"):
        x = keras.Input(r.choice([(6, 2), (7, 3), (5, 1), (8, 8, 1), (7, 6, 2)]))
        chain, y = grow(r, x, r.randint(1, 3), ordinary)
        chain.steps += [layers.Flatten(), layers.Dense(r.randint(1, 3))]
        model = keras.Sequential([x, *chain.steps])
    alike = ALIKE[seed % 6]
    about = f"ordinary float32 {alike}"
    return _finished(r, seed, Subject.of(model), [x], "float32", "float32", about, alike)


def _finished(r, seed, subject, inputs, dtype, floatx, about, alike) -> Example:
    randomise(subject.weights, seed)
    drawn = [_batch(np.random.default_rng([seed, n]), x, floatx, alike) for n, x in
             enumerate(inputs)]  # fmt: skip
    subject.x = drawn[0] if len(drawn) == 1 else drawn
    about += f": {[type(layer).__name__ for layer in _leaves(subject.target)]}"
    return Example(seed, subject, dtype, about)


def _inputs(r: random.Random, count: int) -> list[Any]:
    made = []
    for _ in range(count):
        if r.random() < 0.12:
            made.append(keras.Input((r.randint(3, 6),), dtype="int32"))
        else:
            made.append(keras.Input(r.choice(SHAPES)))
    return made


def _front(r: random.Random, x: Any) -> list[Any]:
    """Return what ids have to go through first."""
    if "int" not in x.dtype:
        return []
    if r.random() < 0.3:
        recurrent = r.choice([layers.LSTM, layers.GRU, layers.SimpleRNN])
        return [layers.Embedding(7, 3, mask_zero=True), recurrent(3)]
    return [layers.Embedding(7, r.randint(1, 4))]


def _program(r: random.Random, inputs: list[Any]) -> tuple[Callable, Any]:
    """Return a function of the inputs, made of layers, and its symbolic output."""
    if len(inputs) == 1:
        front = Chain(_front(r, inputs[0]))
        chain, y = grow(r, front(inputs[0]), r.randint(1, 5))
        head, y = _head(r, y)
        return Chain([front, chain, head]), y
    branches, parts = [], []
    for x in inputs:
        front = Chain(_front(r, x))
        chain, y = grow(r, front(x), r.randint(1, 2))
        ends = Chain([layers.Flatten(), layers.Dense(4, activation="tanh")])
        branches.append(Chain([front, chain, ends]))
        parts.append(ends(y))
    merge = r.choice([layers.Concatenate(), layers.Add(), layers.Multiply(), layers.Dot(axes=1)])
    shared = layers.Dense(4, activation=r.choice(ACTIVATIONS))
    chain, y = grow(r, merge([shared(part) for part in parts]), r.randint(0, 2))
    head, y = _head(r, y)

    def program(inputs):
        parts = [branch(x) for branch, x in zip(branches, inputs, strict=True)]
        return head(chain(merge([shared(part) for part in parts])))

    return program, y


def _head(r: random.Random, y: Any) -> tuple[Chain, Any]:
    """Return what makes an output of a few numbers."""
    shape = tuple(y.shape[1:])
    if int(np.prod(shape)) <= 6 and r.random() < 0.5:
        steps = [layers.Dense(shape[-1])]  # a small grid stays one
    else:
        steps = [layers.Flatten(), layers.Dense(r.randint(1, 3))]
    ending = r.choice([None, None, None, "tanh", "sigmoid", "softmax"])
    steps += [layers.Activation(ending)] if ending else []
    head = Chain(steps)
    return head, head(y)


def _sequential(r: random.Random, x: Any) -> tuple[Chain, Any]:
    front = Chain(_front(r, x))
    chain, y = grow(r, front(x), r.randint(1, 5), only_layers)
    head, y = _head(r, y)
    return Chain([*front.steps, *chain.steps, *head.steps]), y


class Subclassed(keras.Model):
    """The program in a `call` of its own."""

    def __init__(self, program: Callable, parts: list[keras.Layer]):
        super().__init__()
        self.program, self.parts = program, parts

    def call(self, inputs):
        return self.program(inputs)


def _subject(kind: str, inputs: list[Any], program: Callable, output: Any) -> Subject:
    given = inputs[0] if len(inputs) == 1 else inputs
    if kind == "sequential":
        return Subject.of(keras.Sequential([given, *program.steps]))
    functional = keras.Model(given, output)
    if kind == "functional":
        return Subject.of(functional)
    if kind == "subclassed":
        model = Subclassed(program, functional.layers)
        model(tf.nest.map_structure(lambda t: np.zeros((1, *t.shape[1:]), t.dtype), given))
        return Subject.of(model)
    subject = Subject.of((program, functional.trainable_variables))
    subject.weights = functional.weights  # the moving averages too
    return subject


def _leaves(target: Any) -> list[Any]:
    if not isinstance(target, keras.Model):
        return []
    return [layer for layer in target._flatten_layers() if not isinstance(layer, keras.Model)]


# Examples.


def _batch(rng: np.random.Generator, x: Any, floatx: str, alike: str) -> np.ndarray:
    """Return five examples, the first two of them alike, zeros, dim or huge."""
    shape = tuple(x.shape[1:])
    if "int" in x.dtype:
        batch = Ids(shape, 7).draw(rng, 5, floatx)
        if alike != "normal":
            batch[:2] = 0 if alike == "zeros" else batch[0]
        return batch
    batch = Floats(shape).draw(rng, 5, floatx)
    if alike == "duplicates":
        batch[1] = batch[0]
    elif alike == "near duplicates":
        batch[1] = batch[0] * (1 + 1e-6)
    elif alike != "normal":
        batch[:2] *= {"zeros": 0, "dim": 1e-3, "hardly anything": 1e-6, "huge": 30}[alike]
    return batch


# The check.


def check(seed: int, family: str = "any") -> Outcome:
    """Compare an engine with the oracle on a random model, in four orders of its batch."""
    started = time.perf_counter()
    try:
        example = build(seed, family)
    except tf.errors.OpError as failure:  # no kernel for the type
        return Outcome(seed, "no reference", detail=_first_line(failure))
    outcome = _compared(example)
    outcome.about, outcome.seconds = example.about, time.perf_counter() - started
    return outcome


def _compared(example: Example) -> Outcome:
    seed, subject = example.seed, example.subject
    try:
        right = answer(subject, subject.x)
    except tf.errors.OpError as failure:
        return Outcome(seed, "no reference", detail=_first_line(failure))
    if not all(np.isfinite(rows).all() for rows in right):
        return Outcome(seed, "no reference", detail="not finite")
    if not _is_sound(example):
        return Outcome(seed, "no reference", detail="TensorFlow's own outputs depend on the batch")
    worst: dict[int, tuple[float, list[int]]] = {}  # of each derivative: error, order of the batch
    largest, taped = sizes(right), 0
    try:
        for order, found, taped in _asked(example):  # noqa: B007
            for n, rows in enumerate(found):
                off = distance(rows, right[n][order], largest[order])
                worst[n] = max(worst.get(n, (0.0, [])), (off, order))
    except pj.errors.PerjacError as refusal:
        return Outcome(seed, "refused", detail=f"{type(refusal).__name__}: {refusal}"[:400])
    except Exception:
        return Outcome(seed, "error", detail=traceback.format_exc()[-1500:])
    kind, names = "right", _names(subject)
    (error, order), n = max((found, n) for n, found in worst.items())
    off = {n: error for n, (error, _) in worst.items() if error > TOLERANCE[example.dtype]}
    if off:
        loose = _looseness(example, right)
        wrong = [n for n in off if not off[n] < 10 * loose[n]]
        kind = "wrong" if wrong else "undecided"
        n = max(wrong or off, key=lambda n: off[n])
        error, order = worst[n]
    about = f"{names[n]}, order {order}"
    return Outcome(seed, kind, "", about, error, len(subject.trainable), taped)


def _is_sound(example: Example) -> bool:
    """Tell whether TensorFlow gives an example the same output alone as among others.

    In 2.21 it does not for some float32 convolutions of one channel over pictures one wide, which
    read past their operands.
    """
    subject = example.subject

    def outputs(x: Any) -> np.ndarray:
        return np.asarray(tf.nest.flatten(subject.call(x))[0], "float64")

    together = outputs(subject.x)
    alone = np.concatenate([outputs(_taken(subject.x, [b])) for b in range(len(together))])
    scale = np.abs(alone).max() + 1e-30
    return bool(np.abs(together - alone).max() <= 10 * TOLERANCE[example.dtype] * scale)


def _names(subject: Subject) -> list[str]:
    inputs = [t for t in tf.nest.flatten(subject.x) if t.dtype.kind == "f"]
    return [v.path if hasattr(v, "path") else v.name for v in subject.trainable] + [
        f"input {n}" for n in range(len(inputs))
    ]


def answer(subject: Subject, x: Any) -> list[np.ndarray]:
    """Return the Jacobians by the weights and by the float inputs, by the oracle."""
    by_weights, by_inputs = oracle.all_rows(subject.call, x, subject.trainable)
    return [np.asarray(rows, "float64") for rows in [*by_weights, *by_inputs]]


def _asked(example: Example) -> Iterator[tuple[list[int], list[np.ndarray], int]]:
    """Give perjac's answer for each order: from one engine, which may have seen others before."""
    subject, seed = example.subject, example.seed
    jit = False if seed % 4 else "auto"  # XLA takes half of the time where a model has loops
    engine = pj.Engine(subject.target, jit=jit, **subject.options)
    floats = [t for t in tf.nest.flatten(subject.x) if t.dtype.kind == "f"]
    wrt = ["weights", "inputs"] if len(floats) == len(tf.nest.flatten(subject.x)) else ["weights"]
    wrt = wrt if subject.trainable else ["inputs"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pj.errors.SlowPathWarning)
        warnings.simplefilter("ignore", pj.errors.DisconnectedWarning)
        if seed % 3 == 2:
            engine.jacobian(_taken(subject.x, [0, 1]), wrt=wrt)
        orders = ORDERS if seed % 3 else [ORDERS[n] for n in (1, 0, 3, 2)]
        taped = 0
        for order in orders:
            x = _taken(subject.x, order)
            jac = engine.jacobian(x, wrt=wrt)
            keys = [*subject.trainable, *list(jac)[len(subject.trainable) :]]
            if order == orders[0]:
                taped = sum(row.path != "factored" for row in engine.inspect(x=x).rows)
            yield order, [np.asarray(jac[key], "float64") for key in keys], taped


def _taken(x: Any, order: list[int]) -> Any:
    return tf.nest.map_structure(lambda t: t[order], x)


def sizes(right: list[np.ndarray]) -> np.ndarray:
    """Return the largest entry of each example, over all derivatives: (B,)."""
    return np.max([np.abs(r).reshape(len(r), -1).max(1, initial=0) for r in right], axis=0)


def distance(found: np.ndarray, right: np.ndarray, largest: np.ndarray) -> float:
    """Return the largest error of an example, relative to its largest entry.

    An example's entries may vanish beside those of others, and a weight's beside those of other
    weights (the bias of attention's keys has none): then rounding is what there is.
    """
    found = found.reshape(right.shape)
    if not right.size:
        return 0.0
    if not np.isfinite(found).all():
        return np.inf
    each = np.abs(right).reshape(len(right), -1).max(1)
    off = np.abs(found - right).reshape(len(right), -1).max(1)
    return float(np.max(off / (each + 1e-3 * each.max() + 0.02 * largest + 1e-30)))


def _looseness(example: Example, right: list[np.ndarray]) -> list[float]:
    """Return how far the oracle moves, in the terms of `distance`, with the inputs' last digits."""
    rng, nudge, largest = np.random.default_rng(0), NUDGE[example.dtype], sizes(right)

    def nudged(t: np.ndarray) -> np.ndarray:
        if t.dtype.kind != "f":
            return t
        noise = rng.standard_normal((2, *t.shape))
        return (t + nudge * (t * noise[0] + 0.1 * noise[1])).astype(t.dtype)

    moved = [tf.nest.map_structure(nudged, example.subject.x) for _ in range(3)]
    answers = [answer(example.subject, x) for x in moved]
    return [
        max(distance(other[n], right[n], largest) for other in answers) for n in range(len(right))
    ]


def _first_line(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"[:300]


# Many of them, in processes that may crash.


def outcomes(
    seeds: Iterable[int], family: str = "any", limit: float = 120, chunk: int = 10
) -> Iterator[Outcome]:
    """Check seeds in processes of their own, a new one for each chunk, and after each crash."""
    waiting = list(seeds)
    while waiting:
        asked, done = waiting[:chunk], set()
        command = [sys.executable, __file__, "--family", family, "--here", *map(str, asked)]
        with tempfile.TemporaryFile("w+") as complaints, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaints, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        ) as process:  # fmt: skip
            # A loop that hangs is a crash too.
            timer = threading.Timer(limit * len(asked), process.kill)
            timer.start()
            for line in process.stdout or ():
                if line.startswith('{"seed"'):
                    outcome = Outcome(**json.loads(line))
                    done.add(outcome.seed)
                    yield outcome
            process.wait()
            timer.cancel()
            complaints.seek(0)
            last = [line.strip() for line in complaints if line.strip()][-3:]
        left = [seed for seed in asked if seed not in done]
        if left:
            status = f"exit status {process.returncode}: "
            yield Outcome(left[0], "crash", detail=status + " | ".join(last)[-600:])
        waiting = left[1:] + waiting[chunk:]


def _here(seeds: Iterable[int], family: str) -> None:
    warnings.simplefilter("ignore")
    for seed in seeds:
        try:
            outcome = check(seed, family)
        except Exception:
            outcome = Outcome(seed, "error", "the generator", traceback.format_exc()[-1500:])
        print(json.dumps(dataclasses.asdict(outcome)), flush=True)
        keras.backend.clear_session()


def summary(found: list[Outcome]) -> str:
    """Return what a run found, for people."""
    counts = collections.Counter(outcome.kind for outcome in found)
    weights = sum(outcome.weights for outcome in found)
    taped = sum(outcome.on_tape for outcome in found)
    lines = [
        f"{o.kind}: seed {o.seed}, error {o.error:.1e} at {o.detail} [{o.about}]"
        for o in found
        if o.kind not in ("right", "no reference")
    ]
    lines.append(f"{len(found)} models: " + ", ".join(f"{n} {k}" for k, n in counts.items()))
    lines.append(f"{taped} of {weights} weights took the tape path")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="any")
    parser.add_argument("--seeds", help="first:last")
    parser.add_argument("--log", type=pathlib.Path, help="a file for every outcome, a line each")
    parser.add_argument("--here", nargs="*", type=int, help="seeds to check in this process")
    given = parser.parse_args()
    if given.here:
        return _here(given.here, given.family)
    first, last = map(int, given.seeds.split(":"))
    found = []
    for outcome in outcomes(range(first, last), given.family):
        found.append(outcome)
        if given.log:
            with given.log.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
    print(summary(found))
    return None


if __name__ == "__main__":
    main()
