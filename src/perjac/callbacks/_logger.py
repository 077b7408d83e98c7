"""When callbacks log, and to where; their examples as arrays."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from perjac.engine import Engine
from perjac.errors import InputError, NotFiniteError, PerjacWarning, is_count, missing_extra


class Logger(keras.callbacks.Callback):
    """A callback that writes to a folder of TensorBoard's, each epoch or every so many batches.

    Those that stand on it say what is tried before training, `prepare`, and what is logged, `log`;
    `engine` is the model's, made when first asked for.

    Parameters
    ----------
    folder : str
        Where the events go.
    every : "epoch" or int
        At the end of each epoch, or after so many batches.
    what : str
        What is logged, for the warning that it cannot be.
    """

    def __init__(self, folder: str, every: str | int, what: str):
        super().__init__()
        if every != "epoch" and not is_count(every, 1):
            raise InputError(
                f"Expected every= as 'epoch' or a number of batches. Received: {every!r}."
            )
        try:
            import tensorboard  # noqa: F401  (tf.summary needs it)
        except ImportError as failure:
            raise missing_extra("Logging to TensorBoard", "tensorboard", failure) from failure
        self._folder, self._every, self._what = folder, every, what
        self._engine: Any = None
        self._writer: Any = None
        self._batches = self._of_epoch = 0
        self._complained = False

    def prepare(self) -> None:
        """Find out whether the examples fit; called where the model is built."""

    def log(self, step: int) -> None:
        """Write the summaries of now; the step and the writer are set."""
        raise NotImplementedError

    @property
    def engine(self) -> Engine:
        """The model's."""
        if self._engine is None:
            self._engine = Engine(self.model)
        return self._engine

    def on_train_begin(self, logs: Any = None) -> None:
        """Bind the model, open the log, and find out whether the examples fit."""
        self._engine = None
        if getattr(self.model, "built", False):  # others are, once they have seen a batch
            self.prepare()
        self._writer = tf.summary.create_file_writer(self._folder)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Count the epoch's batches from its start."""
        self._of_epoch = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Log, if it is time to."""
        passed = batch + 1 - self._of_epoch  # more than one with steps_per_execution
        before, self._batches = self._batches, self._batches + passed
        self._of_epoch = batch + 1
        if isinstance(self._every, int) and self._batches // self._every > before // self._every:
            self._try(self._batches)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Log, if it is time to."""
        if self._every == "epoch":
            self._try(epoch)

    def on_train_end(self, logs: Any = None) -> None:
        """Close the log."""
        self._writer.close()

    def _try(self, step: int) -> None:
        try:
            with self._writer.as_default(step=step):
                self.log(step)
        except NotFiniteError as problem:
            if not self._complained:
                warnings.warn(
                    f"{self._what} are not logged, from step {step} on: {problem}",
                    PerjacWarning,
                    stacklevel=2,
                )
            self._complained = True
            return
        self._writer.flush()


def folder_of(log_dir: str | os.PathLike, name: str) -> str:
    """Return the folder of TensorBoard's that a kind of events goes to."""
    return os.path.join(log_dir, name)


def arrays(given: Any, limit: int) -> Any:
    """Return the first examples as arrays, in the user's structure."""
    if isinstance(given, (tf.data.Dataset, keras.utils.PyDataset)):
        raise InputError(
            f"Expected arrays. Received: {type(given).__name__}. Take a batch of it, for example "
            "x, y = next(iter(dataset))."
        )
    parts = given if isinstance(given, (list, tuple)) else ()
    if parts and not any(hasattr(part, "shape") or isinstance(part, Mapping) for part in parts):
        given = np.asarray(given)  # a list of numbers
    return tf.nest.map_structure(lambda array: np.asarray(array[:limit]), given)
