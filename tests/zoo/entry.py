"""What an entry of the zoo is, and the list of them all.

A builder makes its model in Keras's current float type; `enter` adds weights that hide nothing
and a batch of two.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from models import Floats, Subject, floats, randomise

FLOAT_TYPES = ("float64", "float32")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the zoo."""

    name: str
    family: str  # "applications", "layers" or "architectures"
    make: Callable[[str], tuple[Any, Any]]  # dtype -> what `Subject.of` takes, a batch of 2
    outputs: tuple[int, ...] | None = None  # the few to look at where all would be dear
    heads: tuple[Any, ...] = (None,)  # what `of=` takes: one output, or the name of each
    dtypes: tuple[str, ...] = FLOAT_TYPES  # that `make` takes, the one to test in first
    slow: bool = False

    def subject(self, dtype: str) -> Subject:
        """Return the model and its batch, with what the oracle needs to know of it."""
        built, x = self.make(dtype)
        subject = Subject.of(built)
        subject.x = x
        return subject


ENTRIES: dict[str, Entry] = {}


@dataclasses.dataclass(frozen=True)
class Pixels:
    """An image of 0 to 255, for models that begin with their own rescaling."""

    shape: tuple[int, ...]

    def draw(self, rng: np.random.Generator, batch: int, dtype: str) -> np.ndarray:
        return rng.integers(0, 256, (batch, *self.shape)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Padded:
    """Sequences of different lengths: steps of zeros behind, and one in between."""

    shape: tuple[int, ...]

    def draw(self, rng: np.random.Generator, batch: int, dtype: str) -> np.ndarray:
        x = Floats(self.shape).draw(rng, batch, dtype)
        for n, sequence in enumerate(x):
            sequence[len(sequence) - 1 - n :] = 0
            sequence[1] = 0
        return x


@contextlib.contextmanager
def policy(dtype: str) -> Iterator[str]:
    """Make `dtype` Keras's policy, mixed ones too; give the type that inputs have under it."""
    floatx = "float32" if dtype.startswith("mixed") else dtype
    with floats(floatx):
        keras.config.set_dtype_policy(dtype)  # `floats` puts the old one back
        yield floatx


def enter(
    family: str,
    name: str,
    build: Callable[[], Any],
    example: Any,
    *,
    finish: Callable[[Any], None] | None = None,
    **options: Any,
) -> None:
    """Enter a model into ENTRIES.

    `example` is Floats, Ids and the like, nested as the model's input; `finish` does to the model
    what has to come after its weights have their values. `options` are fields of Entry.
    """
    assert name not in ENTRIES, name

    def make(dtype: str) -> tuple[Any, Any]:
        with policy(dtype) as floatx:
            built = build()
            randomise(Subject.of(built).weights)
            if finish is not None:
                finish(built)
        rng = np.random.default_rng(1)
        return built, tf.nest.map_structure(lambda leaf: leaf.draw(rng, 2, floatx), example)

    ENTRIES[name] = Entry(name, family, make, **options)
