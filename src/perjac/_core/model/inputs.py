"""The user's data → tensors that fit the model: structure, dtypes, shapes, and their errors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from perjac._core.backend.shapes import known
from perjac._core.model import arrays as checks
from perjac.errors import InputError, NotFiniteError


@dataclasses.dataclass(frozen=True)
class Expected:
    """One input that the model declares: its name, shape with the batch in front, and dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: tf.DType


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call of a model; made by `call`.

    `options` are those that are no arrays. Being a nest, it flattens into the arrays.
    """

    positional: tuple[Any, ...]
    named: dict[str, Any]
    options: tuple[tuple[str, Any], ...] = ()

    def __tf_flatten__(self) -> tuple[tuple, tuple]:
        return (self.options,), (self.positional, self.named)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple, components: tuple) -> Call:
        return cls(*components, *metadata)


def call(*arguments: Any, **named: Any) -> Call:
    """Hold the arguments of a call with more than one, in place of the batch `x`.

    Parameters
    ----------
    *arguments : array, or list, tuple or dict of arrays
        What the model is called with, the batch first.
    **named : array, bool, int, float, str or None
        Keyword arguments: arrays have the batch first, such as a `mask`; whatever else is passed
        on as it is.

    Returns
    -------
    Call
        For every method that takes a batch.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((5, 2)), keras.layers.LSTM(3)])
    >>> x, mask = np.ones((4, 5, 2), "float32"), np.ones((4, 5), bool)
    >>> pj.Engine(model).jacobian(pj.call(x, mask=mask)).shape
    (4, 3, 72)
    """
    if not arguments:
        raise InputError("Expected a batch as the first argument of call(). Received: none.")
    plain = (bool, int, float, str, type(None))
    options = tuple(sorted((k, v) for k, v in named.items() if isinstance(v, plain)))
    return Call(arguments, {k: v for k, v in named.items() if not isinstance(v, plain)}, options)


def called(function: Callable[..., Any], inputs: Any, **options: Any) -> Any:
    """Return what a function gives for a batch, or for the arguments of a Call."""
    if not isinstance(inputs, Call):
        return function(inputs, **options)
    return function(*inputs.positional, **options, **inputs.named, **dict(inputs.options))


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of examples, ready for the model.

    Attributes
    ----------
    tensors : list of tf.Tensor
        The inputs, flattened.
    names : tuple of str
        Theirs.
    structure : nested structure
        The user's structure, to pack them into.
    labels : int
        How many of the last tensors are no inputs of the model, but labels and weights.
    """

    tensors: list[tf.Tensor]
    names: tuple[str, ...]
    structure: Any
    labels: int = 0

    @functools.cached_property
    def size(self) -> int:
        """B."""
        return known(self.tensors[0].shape[:1])[0]

    @property
    def inputs(self) -> int:
        """How many of the tensors are the model's inputs."""
        return len(self.tensors) - self.labels

    @property
    def packed(self) -> Any:
        """The tensors in the user's structure."""
        return tf.nest.pack_sequence_as(self.structure, self.tensors)

    @property
    def y(self) -> Any:
        """The labels of a batch that `beside` made, in the user's structure."""
        return _packed(self.structure[1], self.tensors[self.inputs :])

    def first(self, count: int) -> Batch:
        """Return the first examples."""
        return self.part(slice(count))

    def part(self, where: slice) -> Batch:
        """Return some of the examples."""
        return dataclasses.replace(self, tensors=[t[where] for t in self.tensors])

    def repeated(self, count: int) -> Batch:
        """Return so many examples: these, from the first again after the last."""
        if count == self.size:
            return self
        which = tf.range(count) % self.size
        return dataclasses.replace(self, tensors=[tf.gather(t, which) for t in self.tensors])

    @property
    def specs(self) -> list[tf.TensorSpec]:
        """Shapes with the batch unknown, and dtypes."""
        return [tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in self.tensors]

    @functools.cached_property
    def signature(self) -> tuple:
        """What a trace depends on."""
        return repr(self.structure), tuple((tuple(t.shape[1:]), t.dtype) for t in self.tensors)

    def check_finite(self, fine: Sequence[bool]) -> None:
        """Raise for the first input that is not `fine`, naming the example.

        Raises
        ------
        NotFiniteError
            If a number in it is NaN or infinite indeed.
        """
        whole = zip(self.tensors, self.names, fine, strict=True)
        for n, (tensor, name, good) in enumerate(whole):
            if good:
                continue
            rest = list(range(1, tensor.shape.rank))
            bad = np.flatnonzero(~tf.reduce_all(tf.math.is_finite(tensor), rest).numpy())
            if bad.size:
                raise NotFiniteError(
                    f"{_kind(n < self.inputs)} {name!r} has NaN or Inf in example {bad[0]}"
                    + (f" and {bad.size - 1} more" if bad.size > 1 else "")
                    + ". Remove or mend these examples."
                )


def declared(model: Any) -> list[Expected]:
    """Return what a functional or sequential Keras model declares; nothing for other callables."""
    inputs = getattr(model, "inputs", None)
    if not inputs or not all(hasattr(t, "shape") and hasattr(t, "dtype") for t in inputs):
        return []
    return [Expected(t.name, tuple(t.shape), tf.as_dtype(t.dtype)) for t in inputs]


def made_up(expected: Sequence[Expected], count: int, seed: int) -> Any:
    """Return made-up examples of declared shapes: normal numbers; 0s and 1s, as text for text."""
    rng = np.random.default_rng(seed)
    arrays = []
    for e in expected:
        shape = (count, *known(e.shape[1:]))
        if e.dtype.is_floating:
            arrays.append(tf.cast(rng.standard_normal(shape), e.dtype))
        else:
            digits = rng.integers(0, 2, shape)
            is_text = e.dtype == tf.string
            arrays.append(tf.as_string(digits) if is_text else tf.cast(digits, e.dtype))
    return arrays[0] if len(arrays) == 1 else arrays


def beside(batch: Batch, dtype: tf.DType | None, **more: Any) -> Batch:
    """Return a batch with more arrays of the same examples, as a tuple behind its inputs.

    Parameters
    ----------
    batch : Batch
        The model's inputs.
    dtype : tf.DType or None
        For floating arrays.
    **more : array, nested structure of arrays, or None
        By name; None becomes an empty tuple.
    """
    parts = [
        Batch([], (), ()) if given is None else prepare(given, (), dtype, name)
        for name, given in more.items()
    ]
    tensors = [t for part in [batch, *parts] for t in part.tensors]
    names = tuple(n for part in [batch, *parts] for n in part.names)
    _check_sizes(tensors, names)
    structure = (batch.structure, *(part.structure for part in parts))
    return Batch(tensors, names, structure, len(tensors) - len(batch.tensors))


def prepare(
    x: Any, expected: Sequence[Expected], dtype: tf.DType | None, called: str = "inputs"
) -> Batch:
    """Return the user's data as a Batch.

    Parameters
    ----------
    x : array, or list, tuple or dict of arrays
        One array for each input, the batch first.
    expected : sequence of Expected
        What the model declares; may be empty.
    dtype : tf.DType or None
        For floating arrays of other types where the model declares nothing.
    called : str
        What arrays without a name are called.

    Raises
    ------
    InputError
        Where structure, shape or type do not fit.
    """
    if isinstance(x, Batch):  # which was prepared before
        return x
    checks.check_is_batch(x, "x" if called == "inputs" else called)
    if isinstance(x, Call):
        alone = len(x.positional) == 1
        first = prepare(x.positional[0] if alone else x.positional, expected, dtype)
        named = prepare(x.named, (), dtype) if x.named else Batch([], (), {})
        structure = Call(
            (first.structure,) if alone else first.structure, named.structure, x.options
        )
        tensors, names = first.tensors + named.tensors, first.names + named.names
        _check_sizes(tensors, names)
        return Batch(tensors, names, structure)
    if isinstance(x, (list, tuple)) and _is_one_array(x, len(expected)):
        x = _as_array(x, called)
    elif isinstance(x, (list, tuple)) and len(x) == len(expected) == 1:
        x = x[0]
    elif isinstance(x, Mapping):  # a list in it is a column
        x = {key: np.asarray(v) if _is_column(v) else v for key, v in x.items()}
    structure, leaves = _taken_apart(x)
    if expected and len(leaves) != len(expected):
        raise InputError(
            f"Expected {len(expected)} inputs ({', '.join(repr(e.name) for e in expected)}). "
            f"Received: {len(leaves)}."
        )
    specs, names = _paired(x, expected, len(leaves), called)
    tensors = [
        _tensor(leaf, name, spec, dtype, is_input=called == "inputs")
        for leaf, name, spec in zip(leaves, names, specs, strict=True)
    ]
    _check_sizes(tensors, names)
    return Batch(tensors, tuple(names), structure)


def _taken_apart(x: Any) -> tuple[Any, list[Any]]:
    """Return a nest's structure, zeros in place of its leaves, and the leaves."""
    if isinstance(x, (tf.Tensor, np.ndarray)):  # what most are; asking tf.nest takes 10 µs
        return 0, [x]
    return tf.nest.map_structure(lambda leaf: 0, x), tf.nest.flatten(x)


def _as_array(x: Sequence[Any], called: str) -> np.ndarray:
    """Return nested lists of numbers as one array."""
    try:
        return np.asarray(x)
    except ValueError as failure:  # of several lengths
        what = f"{_kind(called == 'inputs')} {called!r}"
        raise InputError(f"{what} is no array of numbers: {failure}") from failure


def _packed(structure: Any, leaves: Sequence[Any]) -> Any:
    """Put the first of these leaves into a structure."""
    if structure == 0:
        return leaves[0]
    return tf.nest.pack_sequence_as(structure, leaves[: len(tf.nest.flatten(structure))])


def _check_sizes(tensors: Sequence[tf.Tensor], names: Sequence[str]) -> None:
    sizes = {name: t.shape[0] for name, t in zip(names, tensors, strict=True)}
    if len(set(sizes.values())) > 1:
        raise InputError(f"Expected arrays of one batch size. Received: {sizes}.")


def _is_one_array(x: Sequence[Any], count: int) -> bool:
    """Tell whether a list is nested numbers (one array) and not a list of inputs."""
    if any(isinstance(e, (np.ndarray, tf.Tensor, Mapping)) or hasattr(e, "dtype") for e in x):
        return False
    return count <= 1


def _is_column(leaf: Any) -> bool:
    """Tell whether a mapping's value is a list of numbers or texts, nested or not."""
    while isinstance(leaf, (list, tuple)) and leaf:
        leaf = leaf[0]
    return isinstance(leaf, (bool, int, float, str, bytes))


def _paired(
    x: Any, expected: Sequence[Expected], count: int, called: str
) -> tuple[list[Expected | None], list[str]]:
    """Pair each leaf with what the model declares: a dict's by name, all others in order."""
    if isinstance(x, Mapping) and len(x) == count:
        keys = sorted(x)  # the order of tf.nest
        by_name = {e.name: e for e in expected}
        if expected and set(keys) - set(by_name):
            return list(expected), [e.name for e in expected]
        given = [str(key) if called == "inputs" else f"{called}[{key!r}]" for key in keys]
        return [by_name.get(key) for key in keys], given
    if expected:
        return list(expected), [e.name for e in expected]
    return [None] * count, [called] if count == 1 else [f"{called}_{n}" for n in range(count)]


def _kind(is_input: bool) -> str:
    """Return what messages call an array: labels and weights are no inputs."""
    return "Input" if is_input else "Array"


def _tensor(
    leaf: Any, name: str, spec: Expected | None, dtype: tf.DType | None, is_input: bool
) -> tf.Tensor:
    what = f"{_kind(is_input)} {name!r}"
    if isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
        raise InputError(
            f"{what} is a {type(leaf).__name__}. perjac takes dense tensors: use "
            f".to_tensor() and a mask, or tf.sparse.to_dense()."
        )
    try:
        tensor = tf.convert_to_tensor(checks.array(leaf, what))
    except InputError:
        raise
    except (ValueError, TypeError) as failure:
        raise InputError(f"{what} is no array: {failure}") from failure
    _check_text(tensor, what, spec, is_input)
    if spec is not None:
        tensor = checks.cast(tensor, spec.dtype, what)
        _check_shape(tensor, name, spec)
    elif not is_input and tensor.dtype.is_complex and not (dtype or tensor.dtype).is_complex:
        raise InputError(f"{what} is complex. Expected real numbers.")
    elif dtype not in (None, tensor.dtype) and tensor.dtype.is_floating:
        tensor = tf.cast(tensor, dtype)
    if tensor.shape.rank == 0:
        raise InputError(f"{what} is a single number. Expected a batch of examples.")
    return tensor


def _check_text(tensor: tf.Tensor, what: str, spec: Expected | None, is_input: bool) -> None:
    """Raise for text where numbers are expected, and the other way round.

    What a plain function takes, only calling it shows.
    """
    is_text = tensor.dtype == tf.string
    if not is_input:
        if is_text:
            raise InputError(
                f"{what} holds text. Expected numbers, such as those of classes counted from 0."
            )
    elif spec is not None and is_text != (spec.dtype == tf.string):
        given, wanted = ("text", "numbers") if is_text else ("numbers", "text")
        raise InputError(
            f"{what} holds {given}. Expected {wanted}: the model declares this input as "
            f"{spec.dtype.name}."
        )


def _check_shape(tensor: tf.Tensor, name: str, spec: Expected) -> None:
    given = tuple(tensor.shape)
    wanted = zip(spec.shape[1:], given[1:], strict=False)
    if len(given) == len(spec.shape) and all(want in (None, got) for want, got in wanted):
        return
    shown = "(" + ", ".join("B" if n == 0 else str(d) for n, d in enumerate(spec.shape)) + ")"
    hint = ""
    if tensor.shape.rank == len(spec.shape) - 1:
        hint = " The batch axis seems to be missing: try x[None]."
    raise InputError(f"Expected input {name!r} of shape {shown}. Received: {given}.{hint}")
