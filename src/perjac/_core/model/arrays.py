"""Arrays as users give them → what TensorFlow takes, or an error that names the argument.

Nothing is changed in silence: no mask is dropped, no integer wraps, no fraction or imaginary part
is cut off. Must not know models.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from perjac.errors import InputError, NotFiniteError

_PLAIN = (tf.Tensor, np.ndarray)


def check_is_batch(x: Any, name: str) -> None:
    """Raise for a whole data set, or nothing at all, where one batch is expected.

    Raises
    ------
    InputError
        Naming the argument.
    """
    if isinstance(x, _PLAIN):
        return
    if x is None:
        raise InputError(f"Expected {name} as a batch of examples. Received: None.")
    if isinstance(x, tf.data.Dataset) or _yields_batches(x):
        raise InputError(
            f"Expected {name} as one batch of arrays. Received: {type(x).__name__}, a whole data "
            "set. Loop over it and give one batch at a time; engine.fisher and perjac.data take "
            "whole data sets."
        )


def _yields_batches(x: Any) -> bool:
    """Tell what is iterated over batch by batch from arrays and their nests."""
    if isinstance(x, (Iterator, tf.distribute.DistributedDataset)):
        return True
    if isinstance(x, (list, tuple, Mapping, str, bytes)) or _is_array(x):
        return False
    return hasattr(type(x), "__iter__") or (
        hasattr(type(x), "__getitem__") and hasattr(type(x), "__len__")
    )


def _is_array(x: Any) -> bool:
    arrays = ("__array__", "__tf_flatten__", "dtype", "shape", "_type_spec", "value")
    return any(hasattr(x, name) for name in arrays)


def array(given: Any, what: str) -> Any:
    """Return an array or tensor that nothing is lost of when TensorFlow takes it.

    Parameters
    ----------
    given : array
        A NumPy array, a tensor, nested lists, or what NumPy takes for an array.
    what : str
        What messages call it, such as "Input 'x'".

    Raises
    ------
    InputError
        For None, masked entries, Python objects and ragged lists.
    """
    if isinstance(given, tf.Tensor):
        return given
    if given is None:
        raise InputError(f"{what} is None. Expected an array.")
    if isinstance(given, np.ma.MaskedArray) and np.ma.getmaskarray(given).any():
        raise InputError(
            f"{what} has masked entries, which have no value. Fill them, for example with "
            ".filled(0), or leave these examples out."
        )
    if not isinstance(given, np.ndarray) and hasattr(given, "__array__"):
        given = _from_other(given, what)
    if isinstance(given, np.ndarray) and given.dtype == object and not _is_text(given):
        raise InputError(
            f"{what} holds Python objects (dtype object), not numbers. Expected an array of one "
            'type: convert it, for example with .astype("float32").'
        )
    return given


def _from_other(given: Any, what: str) -> Any:
    """Return the NumPy array of a data frame, a tensor of another framework, a variable."""
    if hasattr(given, "value") and hasattr(given, "assign"):  # a variable
        return tf.convert_to_tensor(given)
    try:
        return np.asarray(given)
    except Exception as failure:  # whatever the other framework raises
        raise InputError(f"{what} is no array of numbers: {failure}") from failure


def _is_text(objects: np.ndarray) -> bool:
    return bool(objects.size) and all(isinstance(o, (str, bytes)) for o in objects.flat)


def cast(tensor: tf.Tensor, dtype: tf.DType, what: str) -> tf.Tensor:
    """Return a tensor in the type that is wanted, if that loses nothing but precision.

    Raises
    ------
    InputError
        For complex numbers, fractions and integers that the type cannot hold.
    """
    if tensor.dtype == dtype:
        return tensor
    if tensor.dtype.is_complex and not dtype.is_complex:
        raise InputError(
            f"{what} is complex, and {dtype.name} is expected. Give its real and imaginary parts, "
            "or its absolute values."
        )
    if (dtype.is_integer or dtype.is_bool) and hasattr(tensor, "numpy"):
        _check_whole(tensor.numpy(), dtype, what)
    return tf.cast(tensor, dtype)


def _check_whole(values: np.ndarray, dtype: tf.DType, what: str) -> None:
    """Raise for numbers that an integer type does not hold as they are."""
    if values.dtype.kind not in "iuf" and values.dtype.kind != "V":
        return
    low, high = (0, 1) if dtype.is_bool else (dtype.min, dtype.max)
    if values.dtype.kind in "iu" and values.size:
        info = np.iinfo(values.dtype)
        if low <= info.min and info.max <= high:
            return
        fine = (values >= low) & (values <= high)
    else:
        values = values.astype("float64")
        fine = (values == np.rint(values)) & (values >= low) & (values <= high)
    if not np.all(fine):
        place = tuple(int(n) for n in np.argwhere(~fine)[0])
        where = f" at {place}" if place else ""
        raise InputError(
            f"{what} holds {values[place]:.17g}{where}, and the model takes {dtype.name}: whole "
            f"numbers from {low} to {high}."
        )


def direction(given: Any, dtype: tf.DType, name: str) -> tf.Tensor:
    """Return a vector that a Jacobian is multiplied by, in its type.

    Raises
    ------
    InputError
        If it is no array of numbers.
    NotFiniteError
        If it has NaN or Inf.
    """
    try:
        tensor = tf.convert_to_tensor(array(given, name))
    except (ValueError, TypeError) as failure:
        if isinstance(failure, InputError):
            raise
        raise InputError(f"{name} is no array of numbers: {failure}") from failure
    if tensor.dtype in (tf.string, tf.bool):
        raise InputError(f"Expected {name} as numbers. Received: {tensor.dtype.name}.")
    tensor = cast(tensor, dtype, name)
    if hasattr(tensor, "numpy") and not is_finite(tensor.numpy()):
        raise NotFiniteError(f"{name} has NaN or Inf. Expected finite numbers.")
    return tensor


def is_finite(values: np.ndarray) -> bool:
    """Tell whether all numbers are finite: by their sum, and one by one where that is not."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())


def class_weights(given: Mapping[int, float] | None) -> dict[int, float]:
    """Return the weight of each class, by its number.

    Raises
    ------
    InputError
        For what is no finite number for an integer.
    """
    if given is None:
        return {}
    try:
        found = {operator.index(label): float(weight) for label, weight in sorted(given.items())}
    except (AttributeError, TypeError, ValueError) as failure:
        raise InputError(
            f"Expected class_weight= as {{class: weight}}, classes as ints. Received: {given!r}."
        ) from failure
    for label, weight in found.items():
        if not math.isfinite(weight):
            raise InputError(
                f"Expected class_weight= as finite numbers. Received: {weight} for class {label}."
            )
    return found


def check_loss_weights(given: Any) -> None:
    """Raise for loss weights that are no finite numbers, one or a list or dict of them."""
    inside = list(given.values()) if isinstance(given, Mapping) else given
    each: list[Any] = list(inside) if isinstance(inside, (list, tuple)) else [given]
    for weight in each:
        try:
            fine = weight is None or math.isfinite(float(weight))
        except (TypeError, ValueError):
            fine = False
        if not fine or isinstance(weight, (str, bool)):
            raise InputError(
                "Expected loss_weights= as a finite number for each output that has a loss. "
                f"Received: {given!r}."
            )


def check_classes(labels: np.ndarray, loss: str) -> None:
    """Raise for labels that are no whole numbers, where a loss takes numbers of classes."""
    if labels.dtype.kind != "f" or np.array_equal(labels, np.rint(labels), equal_nan=True):
        return
    odd = np.argwhere(np.isfinite(labels) & (labels != np.rint(labels)))
    if odd.size:
        raise InputError(
            f"Label {labels[tuple(odd[0])]:g} of example {odd[0][0]} is no whole number. The loss "
            f"{loss!r} takes numbers of classes, counted from 0."
        )
