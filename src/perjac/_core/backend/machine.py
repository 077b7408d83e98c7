"""What this machine does in a second: measured once, remembered, and used to foretell times.

Must not know models.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from perjac import progress
from perjac._core.backend import disk_cache

# A measurement takes its fastest of some repetitions, as other work on the machine only adds.
_REPETITIONS, _SECONDS = 5, 0.02
# Operations in a row that tell what one takes to start.
_CHAIN = 1000


@dataclasses.dataclass(frozen=True)
class Rates:
    """The speed of a device in one type of numbers.

    Attributes
    ----------
    product, convolution : float
        Multiply-adds a second in matrix products, and in convolutions.
    traffic : float
        Bytes a second that steps entry by entry read and write.
    fill : float
        Bytes a second into memory that was just asked for.
    start : float
        Seconds that an operation takes to start.
    call : float
        Seconds that a compiled program takes to start.
    """

    product: float
    convolution: float
    traffic: float
    fill: float
    start: float
    call: float


def key(dtype: tf.DType) -> dict[str, Any]:
    """Return what tells this machine from others, as far as speed goes."""
    cards = tf.config.list_physical_devices("GPU")
    about = [tf.config.experimental.get_device_details(c).get("device_name", "GPU") for c in cards]
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "devices": [*about, f"{_processor()} × {count}"],
        "threads": tf.config.threading.get_intra_op_parallelism_threads(),
        "tensorflow": tf.__version__,
        "dtype": dtype.name,
    }


def rates(dtype: tf.DType, xla: bool = False) -> Rates:
    """Return the speed of the machine, measured if it is not known: a quarter of a second.

    Parameters
    ----------
    dtype : tf.DType
        Half-precision numbers count as float32, in which their sums run.
    xla : bool
        Whether XLA compiles what runs.
    """
    return _rates(tf.float64 if dtype == tf.float64 else tf.float32, xla)


@functools.cache
def _rates(dtype: tf.DType, xla: bool) -> Rates:
    about = {**key(dtype), "xla": xla}
    known = disk_cache.recall("device", about)
    if known and known.keys() == {f.name for f in dataclasses.fields(Rates)}:
        return Rates(**known)
    with progress.doing("measuring how fast this machine is"):
        found = _measured(dtype, xla)
    disk_cache.remember("device", about, dataclasses.asdict(found))
    return found


def _measured(dtype: tf.DType, xla: bool) -> Rates:
    itemsize, n = dtype.size, 512
    matrix = tf.ones([n, n], dtype)
    pictures, kernel = tf.ones([16, 32, 32, 32], dtype), tf.ones([3, 3, 32, 32], dtype)
    wide, number = tf.ones([2**22], dtype), tf.ones([8], dtype)

    def chain(x: tf.Tensor) -> tf.Tensor:
        for _ in range(_CHAIN):
            x = tf.cumsum(x)  # which nothing merges with the next
        return x

    def there_and_back(x: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
        y = tf.nn.conv2d(x, w, 1, "SAME")
        return tf.gradients(y, x, grad_ys=y)[0]

    def timed(function: Callable[..., tf.Tensor], *arguments: tf.Tensor) -> float:
        compiled = tf.function(function, autograph=False, jit_compile=xla or None)
        return fastest(lambda: compiled(*arguments))

    call = timed(tf.identity, number)
    work = {
        "product": (n**3, timed(lambda a: tf.matmul(a, a), matrix)),
        "convolution": (
            2 * 9 * 32 * tf.size(pictures).numpy(),
            timed(there_and_back, pictures, kernel),
        ),
        "traffic": (2 * itemsize * wide.shape[0], timed(tf.nn.relu, wide)),
        "fill": (itemsize * 2**24, timed(lambda x: tf.fill([2**24], x[0]), number)),
    }
    return Rates(
        **{name: float(much / max(took - call, 1e-9)) for name, (much, took) in work.items()},
        start=max(timed(chain, number) - call, 1e-9) / _CHAIN,
        call=call,
    )


def fastest(run: Callable[[], Any]) -> float:
    """Return the seconds that a call takes, the first one, which compiles, left out."""
    return min(repeated(run, _REPETITIONS, _SECONDS))


def repeated(
    run: Callable[[], Any], least: int, seconds: float, enough: float = math.inf
) -> list[float]:
    """Return how long each of some calls took, after a first one that is not counted.

    So many calls and so long at least, or one that took longer than is of any use.
    """
    took: list[float] = []
    for n in range(10_000):
        began = time.perf_counter()
        for tensor in tf.nest.flatten(run()):
            if tf.is_tensor(tensor) and "GPU" in tensor.device:
                tensor.numpy()  # a card answers before it is done
        took += [time.perf_counter() - began] * (n > 0)
        if sum(took[:1]) > enough or len(took) >= least and sum(took) > seconds:
            break
    return took


def peak(run: Callable[[], Any]) -> int:
    """Return the bytes that TensorFlow's allocator gave out in a call, at most, above those before.

    The process's own statistics begin anew with that.
    """
    name = "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"
    tf.config.experimental.reset_memory_stats(name)
    before = tf.config.experimental.get_memory_info(name)["current"]
    kept = run()
    found = tf.config.experimental.get_memory_info(name)["peak"]
    del kept
    return max(found - before, 0)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()
